"""Items of btrfs that trees of files and their log share: directory entries, extents of files.

Source: the btrfs documentation, "On-disk Format" (btrfs.readthedocs.io).
"""

import struct
from typing import Final, NamedTuple, Self

from stillblock.selection.filesystems.filesystem import UnresolvedError

INODE_ITEM: Final = 1
DIRECTORY_INDEX: Final = 96
EXTENT_DATA: Final = 108
ROOT_ITEM: Final = 132

_ENTRY: Final = struct.Struct("<QBQ8xHHB")
_EXTENT_HEAD: Final = struct.Struct("<QQBBHB")
_EXTENT_PLACE: Final = struct.Struct("<QQQQ")
_INLINE, _REGULAR, _PREALLOCATED = 0, 1, 2


class Entry(NamedTuple):
    """A name in a directory."""

    number: int
    kind: int
    """The type of item it leads to: of an inode in the same tree, or the root of a subvolume."""
    name: bytes


def parse_entry(value: bytes) -> Entry:
    """Return a directory's entry; raise `UnresolvedError` if it is none."""
    if len(value) >= _ENTRY.size:
        number, kind, _, extra, length, _ = _ENTRY.unpack_from(value)
        name = value[_ENTRY.size : _ENTRY.size + length]
        if (
            len(value) == _ENTRY.size + length + extra
            and name not in {b"", b".", b".."}
            and b"/" not in name
            and b"\0" not in name
            and kind in {INODE_ITEM, ROOT_ITEM}
        ):
            return Entry(number, kind, name)
    raise UnresolvedError("btrfs: a directory has a damaged entry")


class FileExtent(NamedTuple):
    """A piece of a file: inline, a hole (address 0), or part of an extent on the disk."""

    is_inline: bool
    is_unwritten: bool
    is_compressed: bool
    inline: bytes = b""
    """As it lies there."""
    address: int = 0
    """Logical."""
    size: int = 0
    """On the disk, all of the extent."""
    skip: int = 0
    """Where in the extent, uncompressed, the piece begins."""
    length: int = 0
    """Of the piece."""

    @classmethod
    def parse(cls, value: bytes) -> Self:
        """Return what an item says; raise `UnresolvedError` if that is not understood."""
        if len(value) < _EXTENT_HEAD.size:
            raise UnresolvedError("btrfs: a file has a damaged extent")
        _, _, compression, encryption, encoding, kind = _EXTENT_HEAD.unpack_from(value)
        if encryption or encoding:
            raise UnresolvedError("btrfs: a file is encrypted or encoded")
        if kind == _INLINE:
            content = value[_EXTENT_HEAD.size :]
            return cls(
                is_inline=True,
                is_unwritten=False,
                is_compressed=compression != 0,
                inline=content,
            )
        if (
            kind not in {_REGULAR, _PREALLOCATED}
            or len(value) != _EXTENT_HEAD.size + _EXTENT_PLACE.size
        ):
            raise UnresolvedError("btrfs: a file has a damaged extent")
        address, size, skip, length = _EXTENT_PLACE.unpack_from(value, _EXTENT_HEAD.size)
        if (
            length == 0
            or length >= 1 << 63
            or (address and size == 0)
            or (address and not compression and skip + length > size)
        ):
            raise UnresolvedError("btrfs: a file has a damaged extent")
        return cls(
            is_inline=False,
            is_unwritten=kind == _PREALLOCATED,
            is_compressed=compression != 0,
            address=address,
            size=size,
            skip=skip,
            length=length,
        )
