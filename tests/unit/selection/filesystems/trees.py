"""A tree with one of everything that makes a file's map hard."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from stillblock.selection.filesystems import Run
from unit.selection.filesystems.mounting import MIB, Told, fiemap, mounted, told

KIB = 1024


class Grown(NamedTuple):
    """An image with the tree, what the kernel said of its files, and how it mapped them."""

    image: Path
    files: dict[str, Told]
    maps: dict[str, list[Run]]


def grown_in(image: Path, *, fill: Callable[[Path], None]) -> Grown:
    """Fill an image that is empty, with `grow_tree` or more."""
    with mounted(image) as top:
        fill(top)
        os.sync()
        files = told(top)
        maps = {path: fiemap(top / path[1:]) for path in files}
    return Grown(image, files, maps)


def grow_tree(top: Path, *, seed: int = 7, many: int = 300) -> None:
    """Fill a mounted filesystem. What it cannot do (links, odd names) is not for this tree."""
    dice = random.Random(seed)
    write(top / "empty", b"")
    write(top / "tiny", b"x")
    write(top / "inline", dice.randbytes(50))
    write(top / "inline and more", dice.randbytes(130))
    write(top / "one block and a bit", dice.randbytes(4097))
    write(top / "huge", dice.randbytes(5 * MIB + 123))
    _holes(top, dice)
    _preallocated(top, dice)
    _fragmented(top, dice)
    _names(top, dice)
    deep = top
    for level in range(40):
        deep /= f"level {level}"
        deep.mkdir()
    write(deep / "bottom", dice.randbytes(5000))
    crowd = top / "crowd"
    crowd.mkdir()
    for index in range(many):
        write(crowd / f"a file with a long name, number {index:05}", dice.randbytes(index))
    for index in range(0, many, 3):
        (crowd / f"a file with a long name, number {index:05}").unlink()
    (top / "small").mkdir()
    write(top / "small" / "only", b"only\n")
    write(top / "gone", dice.randbytes(70_000))
    (top / "gone").unlink()


def write(path: Path | bytes, data: bytes, *, at: int = 0) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o640)
    try:
        if data:
            assert os.pwrite(descriptor, data, at) == len(data)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _holes(top: Path, dice: random.Random) -> None:
    write(top / "nothing but a hole", b"")
    os.truncate(top / "nothing but a hole", 3 * MIB)
    # With 1 KiB blocks these lie behind one, two and three indirect blocks.
    for at in (0, 100 * KIB, MIB, 20 * MIB, 66 * MIB):
        write(top / "sparse", dice.randbytes(5000), at=at)
    os.truncate(top / "sparse", 68 * MIB)
    write(top / "hole first", dice.randbytes(9000), at=MIB + 4096)


def _preallocated(top: Path, dice: random.Random) -> None:
    for name, begin in (("preallocated", b""), ("preallocated, written in part", b"yes")):
        write(top / name, begin)
        descriptor = os.open(top / name, os.O_RDWR)
        try:
            os.posix_fallocate(descriptor, 0, MIB)
            if begin:
                os.pwrite(descriptor, dice.randbytes(10_000), 300 * KIB)
        finally:
            os.close(descriptor)


def _fragmented(top: Path, dice: random.Random) -> None:
    """Two files that grow in turns, each step on the disk before the next."""
    for step in range(16):
        for name in ("fragmented", "fragmented too"):
            write(top / name, dice.randbytes(8 * KIB), at=step * 16 * KIB)
            sync(top / name)


def _names(top: Path, dice: random.Random) -> None:
    (top / "odd").mkdir()
    odd = os.fsencode(top / "odd")
    for name in (
        b"new\nline",
        b"not \xff\xfe UTF-8",
        "gr\u00fc\u00df".encode(),
        b"n" * 255,
        b"\\",
        b" ",
    ):
        write(odd + b"/" + name, dice.randbytes(100))
    write(top / "first name", dice.randbytes(30_000))
    os.link(top / "first name", top / "odd" / "second name")
    (top / "odd" / "short link").symlink_to("../tiny")
    (top / "odd" / "long link").symlink_to("/" + "long/" * 100)
    os.mkfifo(top / "odd" / "pipe")
