"""Block groups of ext2/3/4: where their tables lie, which blocks are free, what is fixed.

Format: the Linux kernel's Documentation/filesystems/ext4, "Block Group Descriptors" and "Bitmaps".
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from stillblock.extents import normalise, round_out, subtract, total_bytes
from stillblock.model import Extent, Extents
from stillblock.native import crc32c
from stillblock.selection.disk import Disk
from stillblock.selection.filesystems.ext_superblock import Incompat, Superblock
from stillblock.selection.filesystems.filesystem import UnresolvedError

_INODE_UNINIT, _BLOCK_UNINIT = 0x1, 0x2
_DESCRIPTOR: Final = struct.Struct("<IIIHHHHIHHHH")
_DESCRIPTOR_HIGH: Final = struct.Struct("<IIIHHHHIHHI")
_CHECKSUM_AT: Final = 0x1E
_CLEAR_BITS: Final = re.compile(b"0+")
_SET_BITS: Final = re.compile(b"1+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """One group's descriptor. Places are block numbers."""

    block_bitmap: int
    inode_bitmap: int
    inode_table: int
    free_clusters: int
    free_inodes: int
    has_no_inodes: bool
    """None is in use, and its inode bitmap was never written."""
    is_bitmap_computed: bool
    """The bitmap was never written: what is in use is the group's own metadata."""
    bitmap_checksum: int


class Groups:
    """The group descriptors of a filesystem and what follows from them."""

    def __init__(self, disk: Disk, superblock: Superblock) -> None:
        """Read and check all descriptors; raise `UnresolvedError` if one is damaged."""
        self._disk = disk
        self._superblock = superblock
        self._table_blocks = -(
            -superblock.inodes_per_group * superblock.inode_size // superblock.block_size
        )
        self._per_block = superblock.block_size // superblock.descriptor_size
        self._tables: list[int] = []
        self._fixed = self._find_fixed()

    @property
    def fixed(self) -> Extents:
        """Superblocks, descriptors with what is reserved for more, bitmaps and inode tables."""
        return self._fixed

    def inode_offset(self, number: int) -> int:
        """Return where an inode lies, in bytes."""
        superblock = self._superblock
        if not 1 <= number <= superblock.inode_count:
            raise UnresolvedError(f"there is no inode {number}")
        group, index = divmod(number - 1, superblock.inodes_per_group)
        return self._tables[group] * superblock.block_size + index * superblock.inode_size

    def free(self) -> Extents:
        """Return what no bitmap has in use; raise `UnresolvedError` if one is damaged."""
        found: list[Extent] = []
        block_size = self._superblock.block_size
        for group, descriptor in enumerate(self._descriptors()):
            count = 0
            for start, end in self._free_clusters(group, descriptor):
                count += end - start
                found.append(self._to_bytes(group, start, end))
            if count != descriptor.free_clusters and not descriptor.is_bitmap_computed:
                raise UnresolvedError(
                    f"the bitmap of group {group} has {count} free, its descriptor says "
                    f"{descriptor.free_clusters}"
                )
        end = self._superblock.block_count * block_size
        # Clusters with metadata are in use whole, also where no bitmap was written.
        cluster_bytes = block_size * self._superblock.cluster_blocks
        fixed = round_out(self._fixed, block_size=cluster_bytes, size=end)
        return subtract(normalise((a, min(b, end)) for a, b in found), fixed)

    def used_inodes(self) -> Iterator[int]:
        """Yield the numbers of inodes in use, in order."""
        superblock = self._superblock
        per_group = superblock.inodes_per_group
        for group, descriptor in enumerate(self._descriptors()):
            if descriptor.has_no_inodes:
                continue
            place = descriptor.inode_bitmap * superblock.block_size
            bits = _bits(self._disk.pread(offset=place, length=-(-per_group // 8)))[:per_group]
            if bits.count(b"0") != descriptor.free_inodes:
                raise UnresolvedError(f"the inode bitmap of group {group} is damaged")
            for match in _SET_BITS.finditer(bits):
                for index in range(*match.span()):
                    yield group * per_group + index + 1

    def _to_bytes(self, group: int, start: int, end: int) -> Extent:
        block_size, ratio = self._superblock.block_size, self._superblock.cluster_blocks
        base = self._superblock.group_start(group)
        return (base + start * ratio) * block_size, (base + end * ratio) * block_size

    def _free_clusters(self, group: int, descriptor: Descriptor) -> Iterator[Extent]:
        """Yield runs of free clusters, counted from the start of the group."""
        superblock = self._superblock
        ratio = superblock.cluster_blocks
        count = -(-superblock.group_blocks(group) // ratio)
        if descriptor.is_bitmap_computed:
            # Whatever metadata lies there is fixed, and comes off in the end.
            yield 0, count
            return
        place = descriptor.block_bitmap * superblock.block_size
        bitmap = self._disk.pread(offset=place, length=superblock.block_size)
        covered = bitmap[: superblock.blocks_per_group // ratio // 8]
        if superblock.has_checksums:
            checksum = ~crc32c(covered, superblock.checksum_seed) & 0xFFFFFFFF
            # 32-byte descriptors hold its lower half only.
            mask = 0xFFFFFFFF if superblock.descriptor_size >= 64 else 0xFFFF
            if checksum & mask != descriptor.bitmap_checksum:
                raise UnresolvedError(f"the checksum of group {group}'s block bitmap is wrong")
        for match in _CLEAR_BITS.finditer(_bits(covered), 0, count):
            yield match.span()

    # Descriptors ------------------------------------------------------------------------------

    def _find_fixed(self) -> Extents:
        superblock = self._superblock
        block_size = superblock.block_size
        found: list[Extent] = []
        # Before the first group: the boot block, and with 1 KiB blocks nothing else.
        if superblock.first_data_block:
            found.append((0, superblock.first_data_block * block_size))
        for group, descriptor in enumerate(self._descriptors()):
            self._tables.append(descriptor.inode_table)
            head = self._head_blocks(group)
            start = superblock.group_start(group)
            pieces = (
                (start, start + min(head, superblock.group_blocks(group))),
                (descriptor.block_bitmap, descriptor.block_bitmap + 1),
                (descriptor.inode_bitmap, descriptor.inode_bitmap + 1),
                (descriptor.inode_table, descriptor.inode_table + self._table_blocks),
            )
            for first, end in pieces:
                if first < superblock.first_data_block or end > superblock.block_count:
                    raise UnresolvedError(f"group {group} has its tables outside the filesystem")
                found.append((first * block_size, end * block_size))
            if Incompat.FLEX_BG not in superblock.incompat:
                limit = start + superblock.group_blocks(group)
                if not all(start <= first and end <= limit for first, end in pieces):
                    raise UnresolvedError(f"group {group} has its tables in another group")
        fixed = normalise(found)
        if total_bytes(fixed) != sum(end - start for start, end in found):
            raise UnresolvedError("tables of several groups lie on top of each other")
        return fixed

    def _head_blocks(self, group: int) -> int:
        """Return how many blocks the superblock and the descriptors take at a group's start."""
        superblock = self._superblock
        has_superblock = superblock.has_superblock(group)
        blocks = int(has_superblock)
        if group == 0 and superblock.block_size == 1024 and superblock.first_data_block == 0:
            blocks = 2  # The boot block is part of the group, and the superblock comes after it.
        meta_group = group // self._per_block
        if Incompat.META_BG not in superblock.incompat or meta_group < superblock.first_meta_group:
            if has_superblock:
                blocks += self._old_descriptor_blocks() + superblock.reserved_descriptor_blocks
        elif group % self._per_block in (0, 1, self._per_block - 1):
            blocks += 1
        return blocks

    def _old_descriptor_blocks(self) -> int:
        """Return how many descriptor blocks follow the superblock, as they did before meta_bg."""
        count = -(-self._superblock.group_count // self._per_block)
        if Incompat.META_BG in self._superblock.incompat:
            return min(count, self._superblock.first_meta_group)
        return count

    def _descriptor_block(self, index: int) -> int:
        """Return where the block with descriptors of groups `index * per_block` on lies."""
        superblock = self._superblock
        if index < self._old_descriptor_blocks():
            head = max(superblock.first_data_block, 1 if superblock.block_size == 1024 else 0)
            return head + 1 + index
        group = index * self._per_block
        place = superblock.group_start(group) + int(superblock.has_superblock(group))
        if group == 0 and superblock.block_size == 1024 and superblock.first_data_block == 0:
            place += 1
        return place

    def _descriptors(self) -> Iterator[Descriptor]:
        """Yield every group's descriptor, checked."""
        superblock = self._superblock
        block_size, size = superblock.block_size, superblock.descriptor_size
        for index in range(-(-superblock.group_count // self._per_block)):
            place = self._descriptor_block(index) * block_size
            block = self._disk.pread(offset=place, length=block_size)
            first = index * self._per_block
            for group in range(first, min(first + self._per_block, superblock.group_count)):
                at = (group - first) * size
                yield self._parse(group, block[at : at + size])

    def _parse(self, group: int, raw: bytes) -> Descriptor:
        superblock = self._superblock
        (
            block_bitmap,
            inode_bitmap,
            inode_table,
            free_clusters,
            free_inodes,
            _directories,
            flags,
            _exclude_bitmap,
            bitmap_checksum,
            _inode_bitmap_checksum,
            _unused_inodes,
            checksum,
        ) = _DESCRIPTOR.unpack_from(raw)
        if len(raw) >= 64:
            high = _DESCRIPTOR_HIGH.unpack_from(raw, 32)
            block_bitmap |= high[0] << 32
            inode_bitmap |= high[1] << 32
            inode_table |= high[2] << 32
            free_clusters |= high[3] << 16
            free_inodes |= high[4] << 16
            bitmap_checksum |= high[8] << 16
        has_checksum = superblock.has_descriptor_checksums
        if has_checksum and checksum != self._checksum(group, raw):
            raise UnresolvedError(f"the checksum of group {group}'s descriptor is wrong")
        return Descriptor(
            block_bitmap=block_bitmap,
            inode_bitmap=inode_bitmap,
            inode_table=inode_table,
            free_clusters=free_clusters,
            free_inodes=free_inodes,
            has_no_inodes=has_checksum and bool(flags & _INODE_UNINIT),
            is_bitmap_computed=has_checksum and bool(flags & _BLOCK_UNINIT),
            bitmap_checksum=bitmap_checksum,
        )

    def _checksum(self, group: int, raw: bytes) -> int:
        number = group.to_bytes(4, "little")
        if self._superblock.has_checksums:
            covered = number + raw[:_CHECKSUM_AT] + b"\0\0" + raw[_CHECKSUM_AT + 2 :]
            return ~crc32c(covered, self._superblock.checksum_seed) & 0xFFFF
        uuid = bytes.fromhex(self._superblock.uuid.replace("-", "")) or bytes(16)
        return _crc16(uuid + number + raw[:_CHECKSUM_AT] + raw[_CHECKSUM_AT + 2 :])


def _bits(bitmap: bytes) -> bytes:
    """Return one digit for each bit, the first block's first."""
    digits = f"{int.from_bytes(bitmap, 'little'):0{len(bitmap) * 8}b}"
    return digits[::-1].encode()


def _crc16_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        crc = value
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_CRC16_TABLE: Final = _crc16_table()


def _crc16(data: bytes) -> int:
    """Return the CRC-16 of uninit_bg: polynomial 0x8005 reflected, all ones first."""
    crc = 0xFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC16_TABLE[(crc ^ byte) & 0xFF]
    return crc
