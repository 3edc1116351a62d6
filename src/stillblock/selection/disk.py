"""What `selection` needs of a disk: its size and reads. Tests give bytes, the service views."""

from typing import Final, Protocol

from stillblock.errors import OriginIOError

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
