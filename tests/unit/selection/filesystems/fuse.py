"""Filesystems mounted through FUSE, copies of their images, and the map that partclone draws."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stillblock.extents import normalise, subtract
from stillblock.model import Extents
from stillblock.selection.filesystems import Filesystem
from unit.selection.filesystems.leaving_out import overwrite
from unit.selection.filesystems.mounting import copy_sparse, run
from unit.selection.filesystems.reading import data_extents, files_of


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
    copy = copy_sparse(image, image.with_name(name))
    overwrite(copy, extents)
    return copy


def left_out_with(filesystem: Filesystem, paths: set[str]) -> Extents:
    """What a snapshot without these files and without free space does not have."""
    found = files_of(filesystem)
    numbers = {found[path].number for path in paths}
    extents = list(filesystem.free())
    for node in found.values():
        if node.number in numbers:
            extents += data_extents(filesystem, node)
    return subtract(normalise(extents), filesystem.fixed())
