"""The machine: what it is, where scratch space lies, and how much of it others use meanwhile."""

import contextlib
import mmap
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.errors import MissingToolError, UsageError
from bench.peers import qemu_storage_daemon, tool
from bench.results import Machine
from bench.units import BLOCK_BYTES, GIB, MIB

MEMORY_SCRATCH = Path("/dev/shm")  # noqa: S108 - memory is the point; directories in it are private
FILL_SEED = 1
OTHERS_SAMPLE_S = 2.0
_VERSION_PATTERNS = ("fio", "qemu-nbd", "nbdkit", "nbdcopy")


def describe() -> Machine:
    """What explains figures, and no name of a host or a directory."""
    versions = {name: _first_line(name, "--version") for name in _VERSION_PATTERNS}
    with contextlib.suppress(MissingToolError):
        versions["qemu-storage-daemon"] = _first_line(qemu_storage_daemon(), "--version")
    processor = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    return Machine(
        kernel=os.uname().release,
        processor=processor,
        cpu_count=os.cpu_count() or 1,
        memory_gib=round(memory_bytes / GIB, 1),
        versions={name: version for name, version in versions.items() if version},
    )


def filesystem_of(path: Path) -> str:
    """The name of the filesystem type, as stat(1) has it."""
    return _first_line("stat", "-f", "-c", "%T", str(path))


def memory_scratch() -> Path | None:
    """A memory-backed directory, if this machine has one."""
    return MEMORY_SCRATCH if os.access(MEMORY_SCRATCH, os.W_OK) else None


@contextlib.contextmanager
def scratch_directory(parent: Path | None, *, needed_bytes: int) -> Iterator[Path]:
    """A directory that goes away afterwards; raise UsageError if it has too little room."""
    root = parent or Path(tempfile.gettempdir())
    free_bytes = shutil.disk_usage(root).free
    if free_bytes < needed_bytes:
        raise UsageError(
            f"the scratch directory has {free_bytes / GIB:.1f} GiB free and this run may need "
            f"{needed_bytes / GIB:.1f}; give --dir or --disk another place, or a smaller --size"
        )
    path = Path(tempfile.mkdtemp(prefix="bench-", dir=root))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def fill(path: Path, size_bytes: int) -> None:
    """Fill a file with random bytes in writes of 4 KiB.

    4 KiB on purpose: on ext4 of recent kernels a file written in large pieces sits in large
    folios, and every later 4 KiB write then walks hundreds of buffer heads (11 to 40 us instead
    of 1 us), which would hide all else.
    """
    piece = memoryview(random.Random(FILL_SEED).randbytes(MIB))
    with path.open("wb", buffering=0) as file:
        for _ in range(0, size_bytes, MIB):
            for start in range(0, MIB, BLOCK_BYTES):
                file.write(piece[start : start + BLOCK_BYTES])
        os.fdatasync(file.fileno())


def fill_sparse(path: Path, *, size_bytes: int, used_bytes: int) -> None:
    """A sparse file whose first bytes are really there."""
    fill(path, used_bytes)
    os.truncate(path, size_bytes)


def evict(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def evict_all(directory: Path) -> None:
    """Take every file of a tree out of the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            evict(path)


def disk_usage_bytes(path: Path) -> int:
    """What a file or a tree takes on its filesystem."""
    every = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(entry.stat().st_blocks * 512 for entry in every if entry.is_file())


def others_now_cores() -> float:
    """Cores that other processes use at this moment.

    Not the load average: after a build, or after our own last run, it tells of the past.
    """
    meter = OthersMeter()
    time.sleep(OTHERS_SAMPLE_S)
    return meter.cores()


class OthersMeter:
    """How many cores other processes used since it was made.

    What the machine was busy with, less what this process and its ended children used. Interrupts
    and time stolen by a hypervisor are left out.
    """

    def __init__(self) -> None:
        self._begin_s = time.monotonic()
        self._busy_s = _machine_busy_s()
        self._own_s = own_cpu_s()

    def cores(self) -> float:
        """Cores used by others on average; call it when all children have ended."""
        elapsed_s = max(time.monotonic() - self._begin_s, 1e-6)
        others_s = (_machine_busy_s() - self._busy_s) - (own_cpu_s() - self._own_s)
        return max(0.0, others_s / elapsed_s)


def _machine_busy_s() -> float:
    user, nice, system = Path("/proc/stat").read_text(encoding="ascii").split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def own_cpu_s() -> float:
    """CPU seconds of this process and of its ended children."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.splitlines()[0] if done.stdout else ""


def require_client_tools() -> None:
    """Raise MissingToolError unless fio is there, UsageError if it has no nbd engine."""
    fio = tool("fio", package="fio")
    engines = subprocess.run([fio, "--enghelp"], stdout=subprocess.PIPE, text=True, check=False)
    if "nbd" not in engines.stdout.split():
        raise UsageError("this fio was built without the nbd engine (Debian's build has it)")
