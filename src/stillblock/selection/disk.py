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
        # Where each piece begins on the mapped disk, and the end of the last.
        self._starts = list(accumulate((end - start for start, end in pieces), initial=0))

    @property
    def size(self) -> int:
        """The sum of the pieces."""
        return self._starts[-1]

    def pread(self, *, offset: int, length: int) -> bytes:
        """Read, piece by piece; the pieces lie on the disk below, so nothing is short."""
        return b"".join(
            read_exactly(self._disk, offset=start, length=end - start)
            for start, end in self._located(offset, offset + length)
        )

    def to_disk(self, extents: Extents) -> Extents:
        """Return where extents of this disk lie on the disk below; what is past the end is cut."""
        return normalise(piece for start, end in extents for piece in self._located(start, end))

    def _located(self, start: int, end: int) -> Iterator[Extent]:
        """Yield the pieces below, in the order of this disk."""
        end = min(end, self.size)
        index = max(0, bisect_right(self._starts, start) - 1)
        while start < end:
            base = self._pieces[index][0] - self._starts[index]
            stop = min(end, self._starts[index + 1])
            yield start + base, stop + base
            start = stop
            index += 1
