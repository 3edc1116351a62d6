"""Where things are: the state directory, the run directories, sockets and the log."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillblock.errors import SocketPathError, StateError

if TYPE_CHECKING:
    from collections.abc import Mapping

STATE_VARIABLE: Final = "STILLBLOCK_STATE"
DEBUG_VARIABLE: Final = "STILLBLOCK_DEBUG"
SOCKET_PATH_BYTES_MAX: Final = 107
"""`sun_path` has 108 bytes on Linux, the last of them a NUL."""

_ROOT_STATE: Final = Path("/var/lib/stillblock")
_ROOT_UID: Final = 0
_PRIVATE: Final = 0o700


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The places this invocation uses; nothing is created before `ensure`."""

    state_dir: Path
    run_dirs: tuple[Path, ...]
    """Where sockets may be, the one for new sockets first. A server started by another service
    manager may not have had the same environment as the client, so clients look in all of them."""

    @classmethod
    def load(
        cls,
        *,
        state_dir: Path | None = None,
        environment: Mapping[str, str] | None = None,
        uid: int | None = None,
    ) -> Config:
        """Return the configuration that an option, the environment and the user come to."""
        variables = os.environ if environment is None else environment
        user = os.getuid() if uid is None else uid
        default = _default_state(variables, user)
        named = variables.get(STATE_VARIABLE)
        chosen = state_dir or (Path(named) if named else default)
        absolute = Path(os.path.abspath(chosen.expanduser()))  # noqa: PTH100 - keep symlinks
        return cls(
            state_dir=absolute,
            run_dirs=_run_dirs(absolute, variables, user, is_default=absolute == default),
        )

    @property
    def run_dir(self) -> Path:
        """Where new sockets go."""
        return self.run_dirs[0]

    @property
    def catalog_path(self) -> Path:
        """The rebuildable index of volumes and events."""
        return self.state_dir / "catalog.sqlite"

    @property
    def presets_dir(self) -> Path:
        """The directory of the user's own presets, `NAME.toml`."""
        return self.state_dir / "presets"

    @property
    def mounts_dir(self) -> Path:
        """The records of what is mounted."""
        return self.state_dir / "mounts"

    def images_dir(self, volume: str) -> Path:
        """Return where a served volume's images are shown as files for mounts to lie on."""
        return self.run_dir / f"{volume}.images"

    @property
    def log_path(self) -> Path:
        """Where internal errors leave their traceback."""
        return self.state_dir / "stillblock.log"

    def default_store(self, volume: str) -> Path:
        """Return where a volume's store goes if nobody says otherwise."""
        return self.state_dir / "stores" / volume

    def control_socket(self, volume: str) -> Path:
        """Return the socket on which the process that serves the volume answers."""
        return checked_socket_path(self.run_dir / f"{volume}.sock")

    def control_sockets(self, volume: str) -> tuple[Path, ...]:
        """Return every place where that socket may be."""
        candidates = (run_dir / f"{volume}.sock" for run_dir in self.run_dirs)
        return tuple(p for p in candidates if len(os.fsencode(p)) <= SOCKET_PATH_BYTES_MAX)

    def nbd_socket(self, volume: str) -> Path:
        """Return the default NBD socket of a process that serves this volume first."""
        return checked_socket_path(self.run_dir / f"{volume}.nbd")

    def ensure(self) -> None:
        """Make the state and run directories, for this user only."""
        for directory in (self.state_dir, self.run_dir):
            try:
                directory.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            except OSError as error:
                raise StateError(
                    f"cannot make {directory}: {error.strerror}",
                    hint=f"set {STATE_VARIABLE} or --state-dir to a directory you can write",
                ) from error
        if self.run_dir.stat().st_uid != os.getuid():
            raise StateError(f"{self.run_dir} belongs to another user; sockets there are not safe")


def checked_socket_path(path: Path) -> Path:
    """Return the path if a Unix socket can have it; raise `SocketPathError`."""
    length = len(os.fsencode(path))
    if length <= SOCKET_PATH_BYTES_MAX:
        return path
    raise SocketPathError(
        f"socket path {path} has {length} bytes, a Unix socket's path may have "
        f"{SOCKET_PATH_BYTES_MAX}",
        hint=f"use a shorter --state-dir, for example one in {tempfile.gettempdir()}",
    )


def is_debug(environment: Mapping[str, str] | None = None) -> bool:
    """Return whether tracebacks should be shown."""
    variables = os.environ if environment is None else environment
    return variables.get(DEBUG_VARIABLE, "") not in {"", "0"}


def _default_state(variables: Mapping[str, str], uid: int) -> Path:
    if uid == _ROOT_UID:
        return _ROOT_STATE
    home = variables.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(home).expanduser() / "stillblock"


def _run_dirs(
    state_dir: Path, variables: Mapping[str, str], uid: int, *, is_default: bool
) -> tuple[Path, ...]:
    """List the run directories: the user's, one for each state directory, then the state's own.

    Sockets of two state directories must not meet, hence the digest for all but the default one.
    """
    if uid == _ROOT_UID and is_default:
        return (state_dir / "run",)
    digest = hashlib.sha256(os.fsencode(state_dir)).hexdigest()[:12]
    suffix = Path() if is_default else Path(digest)
    found: list[Path] = []
    for base in (variables.get("XDG_RUNTIME_DIR"), f"/run/user/{uid}"):
        if not base:
            continue
        path = Path(base) / "stillblock" / suffix
        if path not in found and Path(base).is_dir() and os.access(base, os.W_OK):
            found.append(path)
    return (*found, state_dir / "run")
