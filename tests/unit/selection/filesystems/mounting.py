"""Image files as disks, mounted by the kernel, and what the kernel says about the files in them."""

import fcntl
import hashlib
import mmap
import os
import stat
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from stillblock.selection.filesystems import Run

MIB = 1024 * 1024


class FileDisk:
    """A disk that is a file, read as it is at that moment."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self._content)

    def pread(self, *, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size, "a reader asks for what is there"
        return self._content[offset : offset + length]


def run(*command: str | Path, env: Mapping[str, str] | None = None) -> str:
    """Run a command; return its standard output, and show all that it said if it fails."""
    words = [str(word) for word in command]
    ran = subprocess.run(words, env=env, capture_output=True, check=False)
    assert ran.returncode == 0, f"{command}: {(ran.stdout + ran.stderr).decode(errors='replace')}"
    return ran.stdout.decode(errors="replace")


@contextmanager
def mounted(image: Path, *, options: str = "") -> Iterator[Path]:
    """Mount a filesystem image; skip where the host does not let us."""
    if os.geteuid() != 0:
        pytest.skip("host: mounting needs root")
    folder = image.with_suffix(".mnt")
    folder.mkdir(exist_ok=True)
    words = ["mount", "-o", ",".join(filter(None, ["loop", options])), str(image), str(folder)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        pytest.skip(f"host: mount is not allowed here: {ran.stderr.strip()}")
    try:
        yield folder
    finally:
        run("umount", folder)
        folder.rmdir()


def copy_sparse(source: Path, target: Path) -> Path:
    run("cp", "--sparse=always", source, target)
    return target


def copy_frozen(image: Path, top: Path, target: Path) -> Path:
    """A copy of a mounted image while its filesystem is frozen."""
    run("fsfreeze", "--freeze", top)
    try:
        return copy_sparse(image, target)
    finally:
        run("fsfreeze", "--unfreeze", top)


class Told(NamedTuple):
    """What the kernel tells about a file."""

    digest: str
    size: int
    links: int
    mode: int
    uid: int
    modified_ns: int
    number: int


def regular_files(top: Path) -> list[Path]:
    return sorted(path for path in top.rglob("*") if stat.S_ISREG(path.lstat().st_mode))


def told(top: Path) -> dict[str, Told]:
    """What a mounted tree holds: every path that is a regular file, and its content's digest."""
    found = {}
    for path in regular_files(top):
        status = path.lstat()
        found[f"/{path.relative_to(top)}"] = Told(
            digest_of(path),
            status.st_size,
            status.st_nlink,
            status.st_mode & 0o7777,
            status.st_uid,
            status.st_mtime_ns,
            status.st_ino,
        )
    return found


def contents(top: Path) -> dict[str, str]:
    """Every regular file under a mount point by its path from there, and its digest."""
    return {path: file.digest for path, file in told(top).items()}


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_of(path: Path) -> str:
    return digest(path.read_bytes())


def fiemap(path: Path) -> list[Run]:
    """A file's extents as the kernel maps them (ioctl FS_IOC_FIEMAP); inline data has none."""
    runs: list[Run] = []
    with path.open("rb") as file:
        position = 0
        while True:
            request = struct.pack("=QQLLLL", position, 2**64 - 1 - position, 1, 0, 256, 0)
            buffer = bytearray(request + bytes(56 * 256))
            fcntl.ioctl(file.fileno(), 0xC020660B, buffer)
            (count,) = struct.unpack_from("=L", buffer, 20)
            for index in range(count):
                offset, start, length, _, _, flags = struct.unpack_from(
                    "=QQQQQL", buffer, 32 + 56 * index
                )
                assert not flags & (0x2 | 0x4 | 0x8), "sync has placed everything"
                if not flags & 0x200:
                    runs.append(Run(offset, length, start, bool(flags & 0x800)))
                position = offset + length
                if flags & 0x1:
                    return runs
            if not count:
                return runs


def blocks_of(runs, *, block_size: int) -> set[tuple[int, int, bool]]:
    """Runs as single blocks, so that it does not matter where one ends and the next begins."""
    return {
        (run.offset + at, run.start + at, run.is_unwritten)
        for run in runs
        if run.start is not None
        for at in range(0, run.length, block_size)
    }
