"""A disk with a memory: readers ask for small pieces, and each question may cost a round trip."""

from collections import OrderedDict
from typing import Final

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
        self._chunks: OrderedDict[int, bytes] = OrderedDict()

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
        data = self._chunk(index)[begin : begin + length]
        if len(data) < length:
            data += self._chunk(index + 1)[: length - len(data)]
        return data

    def _chunk(self, index: int) -> bytes:
        chunk = self._chunks.get(index)
        if chunk is not None:
            self._chunks.move_to_end(index)
            return chunk
        start = index * _CHUNK_BYTES
        length = min(_CHUNK_BYTES, self._size - start)
        chunk = read_exactly(self._disk, offset=start, length=length)
        if len(self._chunks) >= _CHUNK_COUNT_MAX:
            self._chunks.popitem(last=False)
        self._chunks[index] = chunk
        return chunk
