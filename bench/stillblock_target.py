"""stillblock under test: its command line starts it, its control socket takes the snapshots.

All that the benchmark knows about stillblock's commands and routes stands here. Snapshots go
through the control socket rather than the command line: starting an interpreter beside the load
would be measured as if it were a stall.
"""

import http.client
import json
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from bench import fields, nbd
from bench.errors import MissingToolError, PeerError
from bench.process import ServerProcess, run_tool
from bench.targets import Place, Role, Target, TargetName

VOLUME = "web"
REQUEST_TIMEOUT_S = 120.0
COMMAND_TIMEOUT_S = 120.0
TERMS_MAX = 1000
"""Rules are lines that people write; a request with more terms is refused."""


class Stillblock(Target):
    """`stillblock serve` on a volume made for this life; state and store lie in scratch."""

    plain_role: ClassVar[Role] = Role.SNAPSHOT

    def __init__(self, name: TargetName, *, place: Place) -> None:
        super().__init__(name, place=place)
        self._control: Path | None = None

    @staticmethod
    def command_prefix() -> list[str]:
        """The program: the one beside this interpreter, else the one on the PATH; or
        MissingToolError."""
        beside = Path(sys.executable).with_name("stillblock")
        if beside.is_file():
            return [str(beside)]
        found = shutil.which("stillblock")
        if found is None:
            raise MissingToolError(
                "stillblock is not installed (run `make bench`, or install the package)"
            )
        return [found]

    def launch(self) -> ServerProcess:
        self.uri = nbd.unix_uri(self.socket_path, VOLUME)
        disk = ("--origin", str(self.place.image), "--store", str(self.directory / "store"))
        self.command("volume", "add", VOLUME, *disk)
        serve = self._words("serve", VOLUME, "--listen", str(self.socket_path))
        direct = ["--direct"] if self.place.is_direct else []
        return ServerProcess([*serve, *direct], log=self.log)

    def command(self, *words: str) -> None:
        """Run a command on this server's volume."""
        run_tool(self._words(*words), timeout_s=COMMAND_TIMEOUT_S)

    def _words(self, *words: str) -> list[str]:
        return [*self.command_prefix(), *words, "--state-dir", str(self._state_dir)]

    def start(self) -> None:
        super().start()
        # Now, so that looking for it is in no measured window.
        self._control = self._control_socket()

    def take_snapshot(self, number: int, *, extents: list[tuple[int, int]] | None = None) -> None:
        body: dict[str, object] = {"name": f"s{number}"}
        if extents is not None:
            body["terms"] = [{"include": True, "text": f"{start}-{end}"} for start, end in extents]
            body["only_these"] = True
        begin = time.perf_counter()
        self._call("POST", f"/v1/volumes/{VOLUME}/snapshots", body)
        self.snapshot_s = time.perf_counter() - begin
        self.view_uri = self.view_uri or self.snapshot_uri(number)

    def delete_snapshot(self, number: int) -> None:
        self._call("DELETE", f"/v1/volumes/{VOLUME}/snapshots/s{number}")

    def leave_bookmark(self, number: int) -> None:
        body = {"snapshot": f"s{number}"}
        self._call("POST", f"/v1/volumes/{VOLUME}/bookmarks", body)
        self.delete_snapshot(number)
        # Nothing is left to read.
        self.view_uri = None

    def store_bytes(self) -> int:
        volume = self._call("GET", f"/v1/volumes/{VOLUME}")
        return fields.integer(volume.get("store_bytes"), "store_bytes")

    def snapshot_uri(self, number: int) -> str:
        """Where snapshot `number` can be read."""
        return nbd.unix_uri(self.socket_path, f"{VOLUME}@s{number}")

    @staticmethod
    def changed_context(since: int) -> str:
        """The metadata context that shows what changed since snapshot `since`."""
        return f"qemu:dirty-bitmap:s{since}"

    @property
    def _state_dir(self) -> Path:
        return self.directory / "state"

    def _control_socket(self) -> Path:
        try:
            from stillblock.config import Config  # noqa: PLC0415 - peers need no stillblock
        except ImportError as error:
            raise MissingToolError(
                "the stillblock package is not installed for this Python"
            ) from error
        candidates = Config.load(state_dir=self._state_dir).control_sockets(VOLUME)
        for path in candidates:
            if path.exists():
                return path
        raise PeerError("stillblock serves no control socket where its configuration says")

    def _call(
        self, method: str, route: str, body: Mapping[str, object] | None = None
    ) -> Mapping[str, object]:
        assert self._control is not None, "the server was not started"
        connection = _UnixConnection(self._control)
        try:
            headers = {"Content-Type": "application/json"}
            content = None if body is None else json.dumps(body)
            connection.request(method, route, body=content, headers=headers)
            answer = connection.getresponse()
            content_read = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise PeerError(f"{method} {route}: {error}") from error
        finally:
            connection.close()
        if answer.status >= http.client.BAD_REQUEST:
            raise PeerError(f"{method} {route}: {answer.status}: {content_read[:300]!r}")
        return fields.mapping(json.loads(content_read), route) if content_read else {}


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=REQUEST_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
