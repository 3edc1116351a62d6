"""Filesystems mounted through FUSE, image files as disks, and the map that partclone draws."""

import hashlib
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stillblock.extents import normalise, subtract
from stillblock.model import Extents
from stillblock.selection.filesystems import FileKind, Filesystem, Node, read_runs, walk


class FileDisk:
    """An image file, read as it is now."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self._content)

    def pread(self, *, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        return self._content[offset : offset + length]


def run(*command: str | Path, **options) -> str:
    """Run a command, and show what it said if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        **options,
    )
    assert done.returncode == 0, f"{command}: {done.returncode}: {done.stdout}"
    return done.stdout


@contextmanager
def looped(image: Path) -> Iterator[Path]:
    """A loop device over an image, for drivers that take nothing else; skip without them."""
    if os.geteuid():
        pytest.skip("host: loop devices need root")
    done = subprocess.run(
        ["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"host: no loop device: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def mounted(image: Path, *, driver: str, options: str, point: Path | None = None) -> Iterator[Path]:
    """Mount an image with a FUSE driver; skip where the host has no FUSE."""
    if not os.access("/dev/fuse", os.W_OK):
        pytest.skip("host: no FUSE")
    point = point or image.with_suffix(".mount")
    point.mkdir()
    try:
        done = subprocess.run(
            [driver, str(image), str(point), "-o", options],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            if os.geteuid():
                pytest.skip("host: FUSE mounts of this driver need root")
            pytest.fail(f"{driver}: {done.stderr}")
        try:
            yield point
        finally:
            run("umount", point)
    finally:
        point.rmdir()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def contents(top: Path) -> dict[str, str]:
    """Every regular file under a mount point by its path from there, and its digest."""
    found: dict[str, str] = {}
    for base, _, names in os.walk(top):
        for name in names:
            path = Path(base, name)
            if path.is_file() and not path.is_symlink():
                found["/" + str(path.relative_to(top))] = digest(path.read_bytes())
    return found


def files(filesystem: Filesystem) -> dict[str, Node]:
    return {path: node for path, node in walk(filesystem) if node.kind is FileKind.REGULAR}


def content_by_runs(disk: FileDisk, filesystem: Filesystem, node: Node) -> bytes:
    """A file's bytes from where its runs say they are; read plainly if they are in metadata."""
    runs = filesystem.runs(node)
    if runs:
        return read_runs(disk, runs, size=node.size, offset=0, length=node.size)
    return filesystem.read(node, offset=0, length=node.size)


def data_extents(filesystem: Filesystem, node: Node) -> Extents:
    """Where on the disk a file's data lies."""
    return normalise(
        (run.start, run.start + run.length)
        for run in filesystem.runs(node)
        if run.start is not None
    )


def free_by_partclone(image: Path, *, kind: str) -> Extents:
    """What partclone would leave out of an image of this filesystem."""
    tool = shutil.which(f"partclone.{kind}")
    assert tool is not None, "the test says that it needs it"
    domain = image.with_suffix(".domain")
    run(tool, "-D", "--offset_domain=0", "-s", image, "-O", domain, "-L", f"{domain}.log")
    extents = []
    for line in domain.read_text().splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[2] == "?":
            start, length = int(fields[0], 0), int(fields[1], 0)
            extents.append((start, start + length))
    return normalise(extents)


def patched(image: Path, changes: dict[int, bytes], *, name: str) -> Path:
    """A copy of an image with some bytes put in place."""
    copy = image.with_name(name)
    shutil.copyfile(image, copy)
    with copy.open("r+b") as file:
        for offset, data in changes.items():
            file.seek(offset)
            file.write(data)
    return copy


def without(image: Path, extents: Extents, *, name: str) -> Path:
    """A copy of an image with other bytes where nothing is kept: as if it had been overwritten."""
    pattern = b"not kept"
    return patched(
        image,
        {start: pattern * ((end - start) // len(pattern)) for start, end in extents},
        name=name,
    )


def left_out_with(filesystem: Filesystem, paths: set[str]) -> Extents:
    """What a snapshot without these files and without free space does not have."""
    found = files(filesystem)
    numbers = {found[path].number for path in paths}
    extents = list(filesystem.free())
    for node in found.values():
        if node.number in numbers:
            extents += data_extents(filesystem, node)
    return subtract(normalise(extents), filesystem.fixed())
