"""Inodes of ext2/3/4 and the blocks they lead to, by extents or by indirect blocks.

Format: the Linux kernel's Documentation/filesystems/ext4, "Index Nodes" and "The Contents of
inode.i_block".
"""

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from stillblock.native import crc32c
from stillblock.selection.disk import Disk
from stillblock.selection.filesystems.ext_superblock import Superblock
from stillblock.selection.filesystems.filesystem import FileKind, Node, Run, UnresolvedError

RUN_COUNT_MAX: Final = 500_000
"""Pieces of one file: beyond that it takes more memory than a reader should."""
_DEPTH_MAX: Final = 5
_EXTENT_MAGIC: Final = 0xF30A
_UNWRITTEN_FROM: Final = 32768
"""An extent's length counts from here on when it is unwritten."""

_INODE: Final = struct.Struct("<HHI4x4xIIHHIII60sIIIIHHHHH2x")
_EXTENT_HEADER: Final = struct.Struct("<HHHH4x")
_EXTENT: Final = struct.Struct("<IHHI")
_INDEX: Final = struct.Struct("<IIH2x")
assert _INODE.size == 128

_KINDS: Final = {
    stat.S_IFREG: FileKind.REGULAR,
    stat.S_IFDIR: FileKind.DIRECTORY,
    stat.S_IFLNK: FileKind.SYMLINK,
    stat.S_IFCHR: FileKind.OTHER,
    stat.S_IFBLK: FileKind.OTHER,
    stat.S_IFIFO: FileKind.OTHER,
    stat.S_IFSOCK: FileKind.OTHER,
}


class Flag(IntEnum):
    """Flags of an inode that change what its blocks mean."""

    COMPRESSED = 0x4
    DIRTY = 0x100
    COMPRESSED_BLOCKS = 0x200
    ENCRYPTED = 0x800
    INDEX = 0x1000
    HUGE_FILE = 0x40000
    EXTENTS = 0x80000
    VERITY = 0x100000
    EA_INODE = 0x200000
    SNAPSHOT = 0x01000000
    INLINE_DATA = 0x10000000


@dataclass(frozen=True, slots=True)
class Inode:
    """One inode, checked. Its checksum's seed also begins those of its blocks."""

    node: Node
    flags: int
    sectors: int
    """512-byte sectors that it says it takes, attributes included."""
    body: bytes
    """`i_block`: 60 bytes of extents, block numbers or data."""
    extra: bytes
    """What follows the first 128 bytes: timestamps, then attributes."""
    attributes_block: int
    """0 if it has none."""
    checksum_seed: int

    @property
    def has_inline_data(self) -> bool:
        """Whether its data lies in the inode itself."""
        return bool(self.flags & Flag.INLINE_DATA)


def parse_inode(number: int, raw: bytes, superblock: Superblock) -> Inode:
    """Return an inode in use; raise `UnresolvedError` if it is damaged or not in use."""
    (
        mode,
        uid,
        size,
        modified,
        _deleted,
        gid,
        links,
        sectors,
        flags,
        _version,
        body,
        generation,
        attributes,
        size_high,
        _fragment,
        sectors_high,
        attributes_high,
        uid_high,
        gid_high,
        checksum,
    ) = _INODE.unpack_from(raw)
    seed = 0
    extra_size = int.from_bytes(raw[128:130], "little") if len(raw) > 128 else 0
    if extra_size % 4 or 128 + extra_size > max(len(raw), 128):
        raise UnresolvedError(f"inode {number} is damaged: its extra size is {extra_size}")
    if superblock.has_checksums:
        identity = number.to_bytes(4, "little") + raw[0x64:0x68]
        seed = crc32c(identity, superblock.checksum_seed)
        if extra_size >= 4:
            covered = raw[:0x7C] + b"\0\0" + raw[0x7E:0x82] + b"\0\0" + raw[0x84:]
            is_right = ~crc32c(covered, seed) & 0xFFFFFFFF == checksum | (raw[0x82] << 16) | (
                raw[0x83] << 24
            )
        else:
            covered = raw[:0x7C] + b"\0\0" + raw[0x7E:]
            is_right = ~crc32c(covered, seed) & 0xFFFF == checksum
        if not is_right:
            raise UnresolvedError(f"the checksum of inode {number} is wrong")
    kind = _KINDS.get(stat.S_IFMT(mode))
    if kind is None:
        raise UnresolvedError(f"inode {number} is of no kind there is")
    if flags & Flag.HUGE_FILE or superblock.has_huge_files:
        sectors |= sectors_high << 32
        if flags & Flag.HUGE_FILE:
            sectors *= superblock.block_size // 512
    if kind is FileKind.REGULAR or superblock.has_large_directories:
        size |= size_high << 32
    if modified >= 1 << 31:
        modified -= 1 << 32
    nanoseconds = 0
    if extra_size >= 12:
        finer = int.from_bytes(raw[0x88:0x8C], "little")
        modified += (finer & 3) << 32
        nanoseconds = finer >> 2
    node = Node(
        number=number,
        generation=generation,
        kind=kind,
        size=size,
        links=links,
        mode=stat.S_IMODE(mode),
        uid=uid | uid_high << 16,
        gid=gid | gid_high << 16,
        modified_ns=modified * 1_000_000_000 + nanoseconds,
    )
    attributes_block = attributes | attributes_high << 32
    return Inode(node, flags, sectors, body, raw[128:], attributes_block, seed)


def has_blocks(inode: Inode) -> bool:
    """Whether an inode's body is a map of blocks, not a link's target or a device's number."""
    kind = inode.node.kind
    if kind is FileKind.SYMLINK:
        return bool(inode.flags & Flag.EXTENTS) or inode.node.size >= len(inode.body)
    return kind is not FileKind.OTHER


class BlockMap:
    """Follows inodes to their blocks on one disk."""

    def __init__(self, disk: Disk, superblock: Superblock) -> None:
        self._disk = disk
        self._superblock = superblock
        self._block_size = superblock.block_size

    def runs(self, inode: Inode) -> tuple[Run, ...]:
        """Return where an inode's blocks lie, in order, neighbours merged.

        Raise `UnresolvedError` for blocks outside the filesystem, or more than the inode says.
        """
        return self.follow(inode)[0]

    def follow(self, inode: Inode) -> tuple[tuple[Run, ...], list[int]]:
        """Return an inode's runs, and the numbers of the blocks that hold the way to them."""
        if inode.has_inline_data:
            return (), []
        tree: list[int] = []
        if inode.flags & Flag.EXTENTS:
            pieces = self._extents(inode, tree)
        else:
            pieces = self._indirect(inode, tree)
        return self._to_runs(inode, pieces, tree), tree

    def _to_runs(
        self, inode: Inode, pieces: Iterator[tuple[int, int, int, bool]], tree: list[int]
    ) -> tuple[Run, ...]:
        size = self._block_size
        merged: list[tuple[int, int, int, bool]] = []
        total = 0
        limit = min(inode.sectors // (size // 512), self._superblock.block_count)
        for piece in pieces:
            logical, count, start, is_unwritten = piece
            total += count
            # With clusters the inode counts whole ones, which is more.
            if total + len(tree) > limit:
                raise UnresolvedError(f"inode {inode.node.number} leads to more blocks than it has")
            if merged:
                last_logical, last_count, last_start, was_unwritten = merged[-1]
                if (
                    last_logical + last_count == logical
                    and last_start + last_count == start
                    and was_unwritten == is_unwritten
                ):
                    merged[-1] = (last_logical, last_count + count, last_start, is_unwritten)
                    continue
            if len(merged) >= RUN_COUNT_MAX:
                raise UnresolvedError(
                    f"inode {inode.node.number} lies in more than {RUN_COUNT_MAX} pieces"
                )
            merged.append(piece)
        return tuple(
            Run(logical * size, count * size, start * size, is_unwritten)
            for logical, count, start, is_unwritten in merged
        )

    def _check_place(self, inode: Inode, start: int, count: int) -> None:
        first = self._superblock.first_data_block
        if start <= first or start + count > self._superblock.block_count:
            raise UnresolvedError(
                f"inode {inode.node.number} leads to block {start}, which is none of its own"
            )

    # Extents ----------------------------------------------------------------------------------

    def _extents(self, inode: Inode, tree: list[int]) -> Iterator[tuple[int, int, int, bool]]:
        """Yield (logical block, count, start, is unwritten), following the tree without recursion.

        Every node must begin at or after the logical block where the last one ended: so the walk
        ends, and no two pieces of a file overlap.
        """
        number = inode.node.number
        position = 0
        entries = _ExtentEntries(inode.body, number, depth=None)
        stack = [entries]
        while stack:
            entries = stack[-1]
            entry = entries.next_entry()
            if entry is None:
                stack.pop()
                continue
            logical, count, start, is_unwritten = entry
            if logical < position:
                raise UnresolvedError(f"inode {number} is damaged: its extents are out of order")
            if entries.depth == 0:
                self._check_place(inode, start, count)
                position = logical + count
                if position > 1 << 32:
                    raise UnresolvedError(f"inode {number} is damaged: an extent is too far out")
                yield logical, count, start, is_unwritten
                continue
            self._check_place(inode, start, 1)
            tree.append(start)
            position = logical
            block = self._disk.pread(offset=start * self._block_size, length=self._block_size)
            self._check_extent_block(inode, block)
            stack.append(_ExtentEntries(block, number, depth=entries.depth - 1))

    def _check_extent_block(self, inode: Inode, block: bytes) -> None:
        if not self._superblock.has_checksums:
            return
        end = 12 + 12 * int.from_bytes(block[4:6], "little")
        stored = int.from_bytes(block[end : end + 4], "little")
        if end + 4 > len(block) or ~crc32c(block[:end], inode.checksum_seed) & 0xFFFFFFFF != stored:
            raise UnresolvedError(
                f"a block of inode {inode.node.number}'s extents has a wrong checksum"
            )

    # Indirect blocks --------------------------------------------------------------------------

    def _indirect(self, inode: Inode, tree: list[int]) -> Iterator[tuple[int, int, int, bool]]:
        """Yield (logical block, 1, start, False) of a file that is mapped block by block."""
        pointers = struct.unpack("<15I", inode.body)
        per_block = self._block_size // 4
        # (logical block, levels of indirection left, block), the next one last.
        waiting = [(logical, 0, start) for logical, start in enumerate(pointers[:12]) if start]
        logical = 12
        for level, start in enumerate(pointers[12:], 1):
            if start:
                waiting.append((logical, level, start))
            logical += per_block**level
        waiting.reverse()
        # Each indirect block that is read is one of those the inode says it has: so this ends.
        budget = inode.sectors // (self._block_size // 512)
        while waiting:
            logical, level, start = waiting.pop()
            self._check_place(inode, start, 1)
            if level == 0:
                yield logical, 1, start, False
                continue
            tree.append(start)
            if len(tree) > budget:
                raise UnresolvedError(f"inode {inode.node.number} leads to more blocks than it has")
            block = self._disk.pread(offset=start * self._block_size, length=self._block_size)
            span = per_block ** (level - 1)
            below = [
                (logical + index * span, level - 1, pointer)
                for index, (pointer,) in enumerate(struct.iter_unpack("<I", block))
                if pointer
            ]
            waiting.extend(reversed(below))


class _ExtentEntries:
    """The entries of one node of an extent tree."""

    def __init__(self, raw: bytes, number: int, *, depth: int | None) -> None:
        magic, count, limit, self.depth = _EXTENT_HEADER.unpack_from(raw)
        is_sound = (
            magic == _EXTENT_MAGIC
            and count <= limit
            and 12 + 12 * limit <= len(raw)
            and (self.depth <= _DEPTH_MAX if depth is None else self.depth == depth)
            # Only the root of an empty file has no entries.
            and (count > 0 or depth is None)
        )
        if not is_sound:
            raise UnresolvedError(
                f"inode {number} is damaged: a node of its extents makes no sense"
            )
        self._raw = raw
        self._number = number
        self._at = 12
        self._end = 12 + 12 * count

    def next_entry(self) -> tuple[int, int, int, bool] | None:
        """Return the next extent, or with count 0 the next node below; None after the last."""
        if self._at >= self._end:
            return None
        at = self._at
        self._at += 12
        if self.depth:
            logical, low, high = _INDEX.unpack_from(self._raw, at)
            return logical, 0, low | high << 32, False
        logical, count, high, low = _EXTENT.unpack_from(self._raw, at)
        is_unwritten = count > _UNWRITTEN_FROM
        if is_unwritten:
            count -= _UNWRITTEN_FROM
        if count == 0:
            raise UnresolvedError(f"inode {self._number} is damaged: an extent has no length")
        return logical, count, low | high << 32, is_unwritten


# Data inside the inode --------------------------------------------------------------------------

_ATTRIBUTES_MAGIC: Final = 0xEA020000
_ATTRIBUTE: Final = struct.Struct("<BBHIII")
_SYSTEM_INDEX: Final = 7
_ATTRIBUTE_COUNT_MAX: Final = 1024


def inline_tail(inode: Inode) -> bytes:
    """Return the part of inline data after the first 60 bytes: the attribute `system.data`."""
    extra = inode.extra
    start = int.from_bytes(extra[:2], "little")
    if len(extra) < start + 4 or int.from_bytes(extra[start : start + 4], "little") != (
        _ATTRIBUTES_MAGIC
    ):
        raise UnresolvedError(f"inode {inode.node.number} is damaged: no attribute holds its data")
    base = at = start + 4
    for _ in range(_ATTRIBUTE_COUNT_MAX):
        if at + 4 > len(extra) or not any(extra[at : at + 4]):
            break
        if at + _ATTRIBUTE.size > len(extra):
            break
        name_length, index, offset, holder, size, _hash = _ATTRIBUTE.unpack_from(extra, at)
        name = extra[at + _ATTRIBUTE.size : at + _ATTRIBUTE.size + name_length]
        if index == _SYSTEM_INDEX and name == b"data":
            if holder or base + offset + size > len(extra):
                break
            return extra[base + offset : base + offset + size]
        at += _ATTRIBUTE.size + (name_length + 3) // 4 * 4
    raise UnresolvedError(f"inode {inode.node.number} is damaged: no attribute holds its data")
