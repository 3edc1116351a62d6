"""A served disk that the kernel has mounted: NBD, nbdfuse, a loop device, a filesystem."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from processes import WAIT_S, wait_until
from serving import MIB, Served, run, try_run, volume_of

MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}
SIZE = {"ext4": 64 * MIB, "xfs": 320 * MIB}


@dataclass
class Mounted:
    """A filesystem at `point`, on a loop device over a FUSE file over NBD."""

    point: Path
    loop: str
    fuse: subprocess.Popen[bytes]
    probes: list[threading.Thread] = field(default_factory=list)

    def write(self, name: str, content: bytes) -> None:
        """Write a file and make it durable, as a program does that must not lose it."""
        with (self.point / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def can_write(self, timeout_s: float = WAIT_S) -> bool:
        """Whether a write ends in time: that of a frozen filesystem waits."""
        thread = threading.Thread(target=self.write, args=("probe", b"x"), daemon=True)
        self.probes.append(thread)
        thread.start()
        thread.join(timeout_s)
        return not thread.is_alive()

    def unmount(self) -> None:
        """Unmount, once writes that waited for a thaw are done; lazily if nothing else helps."""
        for thread in self.probes:
            thread.join(WAIT_S)
        if try_run("umount", str(self.point)).code != 0:
            run("umount", "--lazy", str(self.point))


def require_fuse() -> None:
    """Skip where an export cannot be a file."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("host: no /dev/fuse")


def require_mounts() -> None:
    """Skip where loop devices, FUSE or mounts are not allowed."""
    if os.geteuid() != 0:
        pytest.skip("host: mounting needs root")
    if not Path("/dev/fuse").exists() or not Path("/dev/loop-control").exists():
        pytest.skip("host: no FUSE or no loop devices")


def mkfs(path: Path, kind: str, *options: str) -> None:
    run(*MAKE[kind], *options, str(path))


@contextmanager
def formatted(kind: str = "ext4", *options: str, size: int | None = None) -> Iterator[Served]:
    """A volume that holds one filesystem, not served yet."""
    require_mounts()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sb-"))
        beside = stack.enter_context(tempfile.TemporaryDirectory(prefix="sb-"))
        origin = Path(beside) / "disk.img"
        origin.touch()
        os.truncate(origin, size or SIZE[kind])
        mkfs(origin, kind, *options)
        yield stack.enter_context(volume_of(origin, folder))


@contextmanager
def as_file(
    served: Served, snapshot: str | None = None
) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """An export as a file, and the nbdfuse that makes it one; skip without FUSE."""
    require_fuse()
    with (
        tempfile.TemporaryDirectory(prefix="sb-nbd-") as folder,
        tempfile.TemporaryFile() as said,
    ):
        file = Path(folder) / "disk"
        fuse = subprocess.Popen(["nbdfuse", str(file), served.uri(snapshot)], stderr=said)
        try:
            # It says nothing when it is ready, but then the file is there.
            assert wait_until(
                lambda: fuse.poll() is not None or (file.exists() and file.stat().st_size > 0)
            )
            if fuse.poll() is not None:
                said.seek(0)
                words = said.read().decode()
                if "fuse" in words.lower() and "permi" in words.lower():
                    pytest.skip(f"host: FUSE is not allowed here: {words.strip()}")
                raise AssertionError(words)
            yield file, fuse
        finally:
            _end(fuse, Path(folder))


@contextmanager
def mounted(
    served: Served, *options: str, snapshot: str | None = None, is_writable: bool = False
) -> Iterator[Mounted]:
    """Mount what a server exports; all of it is undone in the end, also if the server is gone.

    `is_writable`: the export is a clone, `monday+rehearsal`.
    """
    read_only = ["-r"] if snapshot is not None and not is_writable else []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sb-mount-")))
        folder.chmod(0o755)  # servers that use the mount are other users
        (folder / "point").mkdir()
        file, fuse = stack.enter_context(as_file(served, snapshot))
        attached = try_run("losetup", "--find", "--show", *read_only, str(file))
        if attached.code != 0:
            pytest.skip(f"host: no loop devices: {attached.err.strip()}")
        loop = attached.out.strip()
        stack.callback(try_run, "losetup", "--detach", loop)
        mount = ["mount", *(["-o", ",".join(options)] if options else [])]
        run(*mount, loop, str(folder / "point"))
        disk = Mounted(point=folder / "point", loop=loop, fuse=fuse)
        stack.callback(disk.unmount)
        stack.callback(fuse.send_signal, signal.SIGCONT)
        yield disk


def _end(fuse: subprocess.Popen[bytes], folder: Path) -> None:
    try_run("fusermount3", "-u", "-z", str(folder))
    try:
        fuse.wait(timeout=WAIT_S)
    except subprocess.TimeoutExpired:
        fuse.kill()
        fuse.wait()


def ours(folder: Path) -> tuple[list[str], list[str]]:
    """Mount points and loop devices below a directory, newest first, as the kernel tells."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split(" ")[4] for line in lines if f" {folder}/" in line]
    loops = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if str(folder) in backing.read_text():
                loops.append(f"/dev/{backing.parent.parent.name}")
        except OSError:
            pass  # detached just now
    return points[::-1], loops


def clear(folder: Path) -> None:
    """Undo what a test that failed left mounted."""
    points, _ = ours(folder)
    for point in points:
        if "/s/run/" not in point:
            try_run("umount", "--lazy", point)
    for loop in ours(folder)[1]:
        try_run("losetup", "--detach", loop)
    for point in ours(folder)[0]:
        try_run("umount", "--lazy", point)
