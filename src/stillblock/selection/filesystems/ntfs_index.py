"""NTFS directories: a B-tree of names, its root in the directory's record, the rest in blocks."""

from collections.abc import Iterator
from struct import Struct
from typing import Final

from stillblock.selection.filesystems.filesystem import UnresolvedError
from stillblock.selection.filesystems.ntfs_files import DOS_NAME, NAME_HEAD, File, MasterFileTable
from stillblock.selection.filesystems.ntfs_records import (
    FILE_NAME,
    INDEX_ALLOCATION,
    INDEX_BITMAP,
    INDEX_ROOT,
    Stream,
    join_sectors,
)

_I30: Final = "$I30".encode("utf-16-le")
_BLOCK_SIZES: Final = tuple(1 << power for power in range(9, 17))
_BITMAP_BYTES_MAX: Final = 64 << 20
_PIECE_BYTES: Final = 64 * 1024
_PIECES_KEPT: Final = 32
_HAS_BLOCKS, _HAS_CHILD, _IS_LAST = 1, 1, 2

_ROOT: Final = Struct("<III")
_HEADER: Final = Struct("<IIIB")
_ENTRY: Final = Struct("<QHHH")
_ENTRY_BYTES: Final = 16

Name = tuple[int, int, bytes]
"""The reference of the file, that of the directory, and the UTF-16 name."""


def directory_names(table: MasterFileTable, directory: File) -> Iterator[Name]:
    """Yield what a directory holds, without 8.3 names that stand beside long ones."""
    what = f"directory {directory.number}"
    root = directory.pieces.get((INDEX_ROOT, _I30))
    if root is None:
        raise UnresolvedError(f"{what} has no index: it is damaged")
    value = root[0].value()
    indexed, _, block_size = _ROOT.unpack_from(value)
    if indexed != FILE_NAME or block_size not in _BLOCK_SIZES:
        raise UnresolvedError(f"{what} has a damaged index")
    begin, end, flags = _bounds(value, header=16, what=what)
    pending: list[int] = []
    yield from _entries(value, begin, end, pending, what=what)
    blocks = directory.pieces.get((INDEX_ALLOCATION, _I30))
    if not flags & _HAS_BLOCKS or blocks is None:
        if pending or flags & _HAS_BLOCKS or blocks is not None:
            raise UnresolvedError(f"{what} has a damaged index: its blocks are missing")
        return
    stream = table.stream(blocks)
    cluster_size = table.geometry.cluster_size
    # A block is found by its VCN, or by sectors of 512 where it is smaller than a cluster.
    step = cluster_size if block_size >= cluster_size else 512
    used = table.content(
        directory.pieces.get((INDEX_BITMAP, _I30), []) or root, size_max=_BITMAP_BYTES_MAX
    )
    blocks_read = _ReadAhead(stream)
    visited: set[int] = set()
    while pending:
        vcn = pending.pop()
        block, odd = divmod(vcn * step, block_size)
        if odd or block in visited or (block + 1) * block_size > stream.size:
            raise UnresolvedError(f"{what} has a damaged index: block {vcn} is wrong")
        if block >> 3 >= len(used) or not used[block >> 3] >> (block & 7) & 1:
            raise UnresolvedError(f"{what} has a damaged index: block {vcn} is not in use")
        visited.add(block)
        raw = blocks_read.read(offset=block * block_size, length=block_size)
        data = join_sectors(raw, magic=b"INDX", what=f"{what}: index block {vcn}")
        if int.from_bytes(data[16:24], "little") != vcn:
            raise UnresolvedError(f"{what} has a damaged index: block {vcn} is another one")
        begin, end, _ = _bounds(data, header=24, what=what)
        yield from _entries(bytes(data), begin, end, pending, what=what)
    # A block that no entry leads to holds names that nobody would see.
    if len(visited) != sum(byte.bit_count() for byte in used):
        raise UnresolvedError(f"{what} has a damaged index: blocks in use are not reached")


class _ReadAhead:
    """A stream read in pieces of many blocks, of which the last are kept."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._pieces: dict[int, bytes] = {}

    def read(self, *, offset: int, length: int) -> bytes:
        """Return a block, which lies within one piece: both are powers of two."""
        begin = offset % _PIECE_BYTES
        piece = self._pieces.get(offset - begin)
        if piece is None:
            piece = self._stream.read(offset=offset - begin, length=_PIECE_BYTES)
            self._pieces[offset - begin] = piece
            if len(self._pieces) > _PIECES_KEPT:
                del self._pieces[next(iter(self._pieces))]
        return piece[begin : begin + length]


def _bounds(data: bytes | bytearray, *, header: int, what: str) -> tuple[int, int, int]:
    """Return where a node's entries begin and end, and its flags."""
    first, used, _, flags = _HEADER.unpack_from(data, header)
    if first & 7 or first < 16 or not first < used <= len(data) - header:
        raise UnresolvedError(f"{what} has a damaged index")
    return header + first, header + used, flags


def _entries(data: bytes, at: int, end: int, pending: list[int], *, what: str) -> Iterator[Name]:
    """Yield the names of one node, and add the VCNs of those below it to `pending`."""
    unpack_entry, unpack_key = _ENTRY.unpack_from, NAME_HEAD.unpack_from
    while at + _ENTRY_BYTES <= end:
        reference, length, key_length, flags = unpack_entry(data, at)
        if length < _ENTRY_BYTES or length & 7 or at + length > end:
            break
        if flags & _HAS_CHILD:
            if length < _ENTRY_BYTES + 8:
                break
            pending.append(int.from_bytes(data[at + length - 8 : at + length], "little"))
        if flags & _IS_LAST:
            return
        if key_length < NAME_HEAD.size or _ENTRY_BYTES + key_length > length:
            break
        parent, name_length, namespace = unpack_key(data, at + _ENTRY_BYTES)
        begin = at + _ENTRY_BYTES + NAME_HEAD.size
        if not name_length or NAME_HEAD.size + 2 * name_length > key_length:
            break
        if namespace != DOS_NAME:
            yield reference, parent, data[begin : begin + 2 * name_length]
        at += length
    raise UnresolvedError(f"{what} has a damaged index")
