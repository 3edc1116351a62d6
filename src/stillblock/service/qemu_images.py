"""Images in formats of QEMU: qemu-img makes an empty one, a qemu-nbd of its own fills it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import quote

from stillblock.errors import RefusedError
from stillblock.operations.exporting import ExportError, sync_folder
from stillblock.service.nbd import NbdDisk, NbdError

if TYPE_CHECKING:
    from stillblock.operations.exporting import ExportPlan

FORMATS: Final = ("qcow2", "vmdk", "vdi", "vhdx")
"""What qemu-nbd can write, block by block."""
_START_S: Final = 20.0
_END_S: Final = 600.0
"""It writes out what it still holds; on a slow disk that takes a while."""
_SOCKET_PATH_MAX: Final = 100
_SECTOR_BYTES: Final = 512


class QemuImage:
    """An image under `NAME.partial` until it is whole. Use it in a `with` statement."""

    def __init__(self, target: Path, plan: ExportPlan, *, form: str) -> None:
        """Say where it goes, and in which of `FORMATS`."""
        self._target = target
        self._partial = target.with_name(f"{target.name}.partial")
        self._plan = plan
        self._form = form
        self._stack = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._disk: NbdDisk | None = None

    def __enter__(self) -> Self:
        """Make it; raise `RefusedError` if it is there already or QEMU is not."""
        for command in ("qemu-img", "qemu-nbd"):
            if shutil.which(command) is None:
                raise RefusedError(
                    f"an image in format {self._form} is written by {command}, which is not here",
                    hint="install qemu-utils, or export to a raw image",
                )
        for path, hint in (
            (self._target, "it is not overwritten"),
            (self._partial, "remove it if it is left of an export that was broken off"),
        ):
            if path.exists() or path.is_symlink():
                raise RefusedError(f"{path} exists already", hint=hint)
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End QEMU; nothing is left of an image that was not finished."""
        self._stack.close()

    def write(self, data: memoryview, *, offset: int) -> None:
        """Put data."""
        assert self._disk is not None, "it was entered"
        self._disk.pwrite(data, offset=offset)

    def finish(self) -> None:
        """Let QEMU write out the image, and give it its name, durably."""
        assert self._disk is not None, "it was entered"
        assert self._process is not None, "both were started"
        self._disk.flush()
        self._disk.close()
        try:
            code = self._process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired as error:
            raise ExportError(f"{self._partial}: qemu-nbd does not end") from error
        if code != 0:
            raise ExportError(f"{self._partial}: qemu-nbd ended with {code}{self._said()}")
        try:
            with self._partial.open("rb+") as image:
                os.fsync(image.fileno())
            # Unlike a rename, a link takes nobody's place.
            self._target.hardlink_to(self._partial)
            sync_folder(self._target)
        except OSError as error:
            raise ExportError(f"{self._target}: {error.strerror}") from error

    def _start(self) -> None:
        self._stack.callback(_remove, self._partial)
        made = subprocess.run(
            ["qemu-img", "create", "-q", "-f", self._form, "--", *self._created()],
            capture_output=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if made.returncode != 0:
            words = made.stderr.decode(errors="replace").strip()
            raise ExportError(f"{self._partial} cannot be made: {words}")
        self._partial.chmod(0o600)
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="stillblock-")))
        socket_path = folder / "nbd"
        if len(str(socket_path)) > _SOCKET_PATH_MAX:
            raise ExportError(f"{socket_path} is too long for a socket; set TMPDIR to a short one")
        self._errors = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        bound = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        server = ["qemu-nbd", "-f", self._form, "--discard=unmap", "-k", str(socket_path)]
        self._process = subprocess.Popen(
            [*bound, *server, "--", str(self._partial.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
        )
        self._stack.callback(_end, self._process)
        self._disk = self._connected(self._process, socket_path)
        self._stack.callback(self._disk.close)
        # Formats count in sectors.
        if not 0 <= self._disk.size_bytes - self._plan.size_bytes < _SECTOR_BYTES:
            raise ExportError(f"{self._partial} has {self._disk.size_bytes} bytes")

    def _connected(self, process: subprocess.Popen[bytes], socket_path: Path) -> NbdDisk:
        """Return a connection, once there is somebody to connect to."""
        deadline = time.monotonic() + _START_S
        while True:
            try:
                return NbdDisk(f"nbd+unix:///?socket={quote(str(socket_path))}")
            except NbdError as error:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.01)
                if process.poll() is not None or time.monotonic() > deadline:
                    words = f"qemu-nbd does not start{self._said()}"
                    raise ExportError(f"{self._partial}: {words}") from error

    def _created(self) -> tuple[str, str]:
        return str(self._partial.absolute()), str(self._plan.size_bytes)

    def _said(self) -> str:
        self._errors.seek(0)
        words = self._errors.read(4096).decode(errors="replace").strip()
        return f": {words}" if words else ""


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
