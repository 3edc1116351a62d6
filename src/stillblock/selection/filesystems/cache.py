"""A disk with a memory: readers ask for small pieces, and each question may cost a round trip."""

from collections import OrderedDict
from contextlib import suppress
from typing import Final

from stillblock.errors import OriginIOError
from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.filesystems.filesystem import UnresolvedError

_CHUNK_BYTES: Final = 128 * 1024
_CHUNK_COUNT_MAX: Final = 64
"""8 MiB in all: what a walk comes back to is the tables and directories of a few groups."""


class CachedDisk:
    """Reads a disk in aligned chunks and keeps the last ones; what is long goes past them.

    An answer is that of the disk at some time since this was made, so it is for disks that stand
    still. A place beyond the end is `UnresolvedError`: only a structure on the disk can name one.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._size = disk.size
        self._chunks: OrderedDict[int, bytes | None] = OrderedDict()

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self._size

    def pread(self, *, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`."""
        if offset < 0 or length < 0 or offset + length > self._size:
            raise UnresolvedError(
                f"a structure names bytes {offset} to {offset + length}, and there are {self._size}"
            )
        if length > _CHUNK_BYTES:
            return read_exactly(self._disk, offset=offset, length=length)
        index, begin = divmod(offset, _CHUNK_BYTES)
        first = self._chunk(index)
        if first is not None and begin + length <= len(first):
            return first[begin : begin + length]
        second = self._chunk(index + 1) if begin + length > _CHUNK_BYTES else b""
        if first is None or second is None:
            # Something near it cannot be read; what was asked for perhaps can.
            return read_exactly(self._disk, offset=offset, length=length)
        return first[begin:] + second[: begin + length - len(first)]

    def _chunk(self, index: int) -> bytes | None:
        """Return an aligned piece of the disk, None if not all of it can be read."""
        if index in self._chunks:
            self._chunks.move_to_end(index)
            return self._chunks[index]
        start = index * _CHUNK_BYTES
        length = min(_CHUNK_BYTES, self._size - start)
        chunk: bytes | None = None
        with suppress(OriginIOError):
            chunk = read_exactly(self._disk, offset=start, length=length)
        if len(self._chunks) >= _CHUNK_COUNT_MAX:
            self._chunks.popitem(last=False)
        self._chunks[index] = chunk
        return chunk
