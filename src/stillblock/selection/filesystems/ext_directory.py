"""Directories of ext2/3/4: the names in one block, or in the inode itself.

Hash trees need no care: their leaves are ordinary blocks, and their nodes look like empty ones.
Format: the Linux kernel's Documentation/filesystems/ext4, "Directory Entries".
"""

import base64
import os
import struct
from collections.abc import Iterator
from typing import Final

from stillblock.native import crc32c
from stillblock.selection.filesystems.ext_inode import Flag, Inode
from stillblock.selection.filesystems.ext_superblock import Incompat, Superblock
from stillblock.selection.filesystems.filesystem import FileKind, UnresolvedError

_ENTRY: Final = struct.Struct("<IHBB")
_TAIL: Final = struct.Struct("<IHBBI")
_TAIL_TYPE: Final = 0xDE
_NAME_BYTES_MAX: Final = 255
_KINDS: Final = {
    0: None,
    1: FileKind.REGULAR,
    2: FileKind.DIRECTORY,
    3: FileKind.OTHER,
    4: FileKind.OTHER,
    5: FileKind.OTHER,
    6: FileKind.OTHER,
    7: FileKind.SYMLINK,
}

Entry = tuple[str, int, FileKind | None]
"""Name, inode, and what the name says its kind is: None if it does not say."""


class DirectoryBlocks:
    """Reads the blocks of one directory."""

    def __init__(self, inode: Inode, superblock: Superblock) -> None:
        self._number = inode.node.number
        self._inode_count = superblock.inode_count
        self._has_kinds = Incompat.FILETYPE in superblock.incompat
        self._has_checksums = superblock.has_checksums
        self._seed = inode.checksum_seed
        self._is_indexed = bool(inode.flags & Flag.INDEX)
        self._is_encrypted = bool(inode.flags & Flag.ENCRYPTED)

    def entries(self, block: bytes, *, index: int) -> Iterator[Entry]:
        """Yield the names in block `index`; raise `UnresolvedError` where it is damaged."""
        end = len(block)
        if self._has_checksums and not self._is_node_of_index(block, index):
            end -= _TAIL.size
            nothing, length, no_name, kind, checksum = _TAIL.unpack_from(block, end)
            is_tail = (nothing, length, no_name, kind) == (0, _TAIL.size, 0, _TAIL_TYPE)
            if not is_tail or ~crc32c(block[:end], self._seed) & 0xFFFFFFFF != checksum:
                raise self._damaged("the checksum of one of its blocks is wrong")
        yield from self.parse(block, begin=0, end=end, is_first=index == 0)

    def parse(self, block: bytes, *, begin: int, end: int, is_first: bool) -> Iterator[Entry]:
        """Yield the entries in `[begin, end)`, which they must fill to the byte."""
        unpack = _ENTRY.unpack_from
        at = begin
        position = 0
        while at < end:
            if at + 8 > end:
                raise self._damaged("its entries do not fill their block")
            inode, length, name_length, kind = unpack(block, at)
            if not self._has_kinds:
                name_length |= kind << 8
                kind = 0
            if length in (0, 65535) and len(block) == 65536:
                length = 65536
            if length < 8 + name_length or length % 4 or length < 12 or at + length > end:
                raise self._damaged(f"an entry of {length} bytes does not fit")
            if inode:
                name = block[at + 8 : at + 8 + name_length]
                if is_first and position < 2:
                    self._check_dots(name, inode, position)
                elif not name or len(name) > _NAME_BYTES_MAX or name in (b".", b".."):
                    raise self._damaged(f"it holds the name {name!r}")
                else:
                    yield self._decode(name), self._check_number(inode), self._kind(kind)
            at += length
            position += 1

    def _check_dots(self, name: bytes, inode: int, position: int) -> None:
        if name != (b".", b"..")[position] or (position == 0 and inode != self._number):
            raise self._damaged("it does not begin with itself and what it is in")

    def _check_number(self, inode: int) -> int:
        if inode > self._inode_count:
            raise self._damaged(f"it leads to inode {inode}, which there is not")
        return inode

    def _kind(self, kind: int) -> FileKind | None:
        if kind not in _KINDS:
            raise self._damaged(f"a name leads to something of kind {kind}")
        return _KINDS[kind]

    def _decode(self, name: bytes) -> str:
        if self._is_encrypted:
            # Without the key a name is any bytes, slashes too: letters stand for them.
            return base64.urlsafe_b64encode(name).rstrip(b"=").decode("ascii")
        if b"/" in name or b"\0" in name:
            raise self._damaged(f"it holds the name {name!r}")
        return os.fsdecode(name)

    def _is_node_of_index(self, block: bytes, index: int) -> bool:
        """Whether a block is part of a hash tree: the root in block 0, or one big empty entry."""
        if not self._is_indexed:
            return False
        inode, length, _, _ = _ENTRY.unpack_from(block)
        is_whole = length == len(block) or (length in (0, 65535) and len(block) == 65536)
        return index == 0 or (inode == 0 and is_whole)

    def _damaged(self, what: str) -> UnresolvedError:
        return UnresolvedError(f"directory {self._number} is damaged: {what}")
