"""Readers that do what a reader must not, for a worker that must survive or end of it.

Imported by name in worker processes.
"""

import ctypes
import itertools
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from stillblock.errors import OriginIOError
from stillblock.selection.disk import Disk
from stillblock.selection.filesystems import FileKind, Node, UnresolvedError
from unit.selection.fake_filesystems import FakeFile, FakeFilesystem


def open_good(disk: Disk) -> FakeFilesystem:
    """Gives the first bytes of the disk as its label."""
    label = disk.pread(offset=0, length=8).hex()
    return FakeFilesystem(
        {"/a": FakeFile([(4096, 8192)]), "/b\udcff\n": FakeFile([(8192, 12288)])},
        size=disk.size,
        label=label,
        caveats=("a \x1b[2J caveat",),
        free_extents=((16384, 32768),),
    )


class _Endless(FakeFilesystem):
    """Its directories have names without end."""

    def children(self, directory: Node) -> Iterator[tuple[str, Node]]:
        """Yield one name after the other."""
        for number in itertools.count(100):
            yield str(number), Node(number=number, kind=FileKind.REGULAR, size=0)


def open_endless(disk: Disk) -> FakeFilesystem:
    return _Endless(size=disk.size)


def open_refusing(disk: Disk) -> FakeFilesystem:
    raise UnresolvedError("the log is\x1b[2J dirty")


def open_defective(disk: Disk) -> FakeFilesystem:
    raise IndexError("list index out of range")


def open_crashing(disk: Disk) -> FakeFilesystem:
    ctypes.string_at(0)
    raise AssertionError("unreachable")


def open_exiting(disk: Disk) -> FakeFilesystem:
    os._exit(3)


def open_hanging(disk: Disk) -> FakeFilesystem:
    while True:
        disk.pread(offset=0, length=1)


def open_greedy(disk: Disk) -> FakeFilesystem:
    return FakeFilesystem(label=str(len(bytearray(1 << 40))))


def open_greedy_step_by_step(disk: Disk) -> FakeFilesystem:
    taken = []
    while True:
        taken.append(bytearray(1 << 20))


def open_reading_past_the_end(disk: Disk) -> FakeFilesystem:
    last = disk.pread(offset=disk.size - 4, length=100)
    beyond = disk.pread(offset=disk.size, length=1)
    return FakeFilesystem(size=disk.size, label=f"{len(last)} {len(beyond)}")


def open_reading_badly(disk: Disk) -> FakeFilesystem:
    """Reads what fails, and beside it what does not."""
    try:
        disk.pread(offset=0, length=10)
        bad = "read"
    except OriginIOError as error:
        bad = error.message
    good = disk.pread(offset=5000, length=4).decode()
    return FakeFilesystem(size=disk.size, label=f"{bad}, {good}")


STEPS = (4096, 10_000, 300_000, 1 << 20, 5 << 20)


def counting(size: int) -> bytes:
    """Content in which no two places are alike."""
    return b"".join(number.to_bytes(4, "little") for number in range(size // 4))


def open_reading_in_steps(disk: Disk) -> FakeFilesystem:
    """Reads all of it in steps of several sizes, and counts what is wrong and what failed."""
    expected = counting(disk.size)
    wrong, failed = 0, set()
    for step in STEPS:
        for offset in range(0, disk.size, step):
            try:
                data = disk.pread(offset=offset, length=step)
            except OriginIOError:
                failed.add((offset, step))
                continue
            wrong += data != expected[offset : offset + step]
    return FakeFilesystem(size=disk.size, label=f"{wrong} {sorted(failed)}")


def open_lying(disk: Disk) -> FakeFilesystem:
    return FakeFilesystem({"/a": FakeFile()}, size=disk.size, free_extents=((0, disk.size + 1),))


def open_oversized(disk: Disk) -> FakeFilesystem:
    return FakeFilesystem(size=disk.size * 2)


def _attempts() -> dict[str, object]:
    def thread() -> None:
        threading.Thread(target=print).start()

    return {
        "open": lambda: Path("/etc/passwd").read_bytes(),
        "create": lambda: Path("/var/tmp/stillblock-worker").write_bytes(b"x"),
        "socket": socket.socket,
        "pipe": os.pipe,
        "dup": lambda: os.dup(0),
        "fork": os.fork,
        "thread": thread,
        "exec": lambda: os.execv("/bin/true", ["true"]),
        "run": lambda: subprocess.run(["/bin/true"], check=True),
        "kill": lambda: os.kill(os.getppid(), signal.SIGTERM),
        "limit": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
        "unlink": lambda: Path("/etc/passwd").unlink(),
        "mkdir": lambda: Path("/var/tmp/stillblock-worker").mkdir(),
        "chdir": lambda: os.chdir("/"),
        "list": lambda: os.listdir("/"),
        "stat": lambda: Path("/etc/passwd").stat(),
        "uid": lambda: os.setuid(0),
        "import": lambda: __import__("sqlite3"),
    }


def open_breaking_out(disk: Disk) -> FakeFilesystem:
    """Tries everything; its label is what worked."""
    worked = []
    for name, attempt in _attempts().items():
        try:
            attempt()  # type: ignore[operator]
            worked.append(name)
        except (OSError, RuntimeError, ImportError, ValueError):
            pass
    return FakeFilesystem(size=disk.size, label=" ".join(worked))


def open_bounded(disk: Disk) -> FakeFilesystem:
    """Its label tells what holds for its process."""
    limits = (
        resource.RLIMIT_NOFILE,
        resource.RLIMIT_FSIZE,
        resource.RLIMIT_CORE,
        resource.RLIMIT_NPROC,
        resource.RLIMIT_AS,
    )
    # Without the right to ask: the call is not on the list. So the clock, which is, is asked too.
    try:
        label = str([resource.getrlimit(limit) for limit in limits])
    except OSError:
        label = f"cannot ask {time.monotonic() > 0}"
    return FakeFilesystem(size=disk.size, label=label)
