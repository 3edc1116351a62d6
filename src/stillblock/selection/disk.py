"""What `selection` needs of a disk: its size and reads. Tests give bytes, the service views."""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Final, Protocol

from stillblock.errors import OriginIOError
from stillblock.extents import normalise
from stillblock.model import Extent, Extents

SECTOR_SIZES: Final = (512, 4096)
"""Logical sector sizes that disks have. The bytes of a disk do not say which: its tables may."""


class Disk(Protocol):
    """A readable disk of fixed size."""

    @property
    def size(self) -> int:
        """The size in bytes."""

    def pread(self, *, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`, all of them inside `size`."""


def read_exactly(disk: Disk, *, offset: int, length: int) -> bytes:
    """Return `length` bytes at `offset`; fewer are an error, never padded."""
    data = disk.pread(offset=offset, length=length)
    if len(data) != length:
        raise OriginIOError(
            f"reading {length} bytes at {offset} gave {len(data)}, although the disk says that it "
            f"has {disk.size}; check that nothing truncates it"
        )
    return data


class MappedDisk:
    """A disk made of pieces of another, one behind the other: a partition, a logical volume."""

    def __init__(self, disk: Disk, pieces: tuple[Extent, ...]) -> None:
        self._disk = disk
        self._pieces = pieces
        self._starts = _starts(pieces)

    @property
    def size(self) -> int:
        """The sum of the pieces."""
        return self._starts[-1]

    def pread(self, *, offset: int, length: int) -> bytes:
        """Read, piece by piece; the pieces lie on the disk below, so nothing is short."""
        return b"".join(
            read_exactly(self._disk, offset=start, length=end - start)
            for start, end in _located(self._pieces, self._starts, offset, offset + length)
        )


def to_disk(pieces: tuple[Extent, ...], extents: Extents) -> Extents:
    """Return where extents of a mapped disk lie on the one below; what is past its end is cut."""
    starts = _starts(pieces)
    return normalise(
        part for start, end in extents for part in _located(pieces, starts, start, end)
    )


def _starts(pieces: tuple[Extent, ...]) -> list[int]:
    """Return where each piece begins on the mapped disk, and the end of the last."""
    return list(accumulate((end - start for start, end in pieces), initial=0))


def _located(
    pieces: tuple[Extent, ...], starts: list[int], start: int, end: int
) -> Iterator[Extent]:
    """Yield where a range lies below, in the order of the mapped disk."""
    end = min(end, starts[-1])
    index = max(0, bisect_right(starts, start) - 1)
    while start < end:
        base = pieces[index][0] - starts[index]
        stop = min(end, starts[index + 1])
        yield start + base, stop + base
        start = stop
        index += 1
