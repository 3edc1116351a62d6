"""The ext2/3/4 superblock: what it says, and whether it can be believed.

Format: the Linux kernel's Documentation/filesystems/ext4, "Super Block". All numbers are
little-endian; the superblock lies 1024 bytes from the start.
"""

import struct
import uuid
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

from stillblock.native import crc32c
from stillblock.selection.disk import Disk
from stillblock.selection.filesystems.filesystem import UnresolvedError

SUPERBLOCK_OFFSET: Final = 1024
SUPERBLOCK_BYTES: Final = 1024
_MAGIC: Final = 0xEF53
_CHECKSUM_AT: Final = 0x3FC
_GROUP_COUNT_MAX: Final = 1 << 20
"""128 TiB in groups of 128 MiB: their descriptors take up to 64 MiB of memory."""


class Compat(IntFlag):
    """Features that one may ignore when reading."""

    HAS_JOURNAL = 0x4
    RESIZE_INODE = 0x10
    SPARSE_SUPER2 = 0x200
    FAST_COMMIT = 0x400
    ORPHAN_FILE = 0x1000


class Incompat(IntFlag):
    """Features without which nothing here can be read right."""

    FILETYPE = 0x2
    RECOVER = 0x4
    META_BG = 0x10
    EXTENTS = 0x40
    BIT64 = 0x80
    MMP = 0x100
    FLEX_BG = 0x200
    EA_INODE = 0x400
    CSUM_SEED = 0x2000
    LARGEDIR = 0x4000
    INLINE_DATA = 0x8000
    ENCRYPT = 0x10000
    CASEFOLD = 0x20000


class RoCompat(IntFlag):
    """Features without which nothing must be written; some change what a map means."""

    SPARSE_SUPER = 0x1
    LARGE_FILE = 0x2
    BTREE_DIR = 0x4
    HUGE_FILE = 0x8
    GDT_CSUM = 0x10
    DIR_NLINK = 0x20
    EXTRA_ISIZE = 0x40
    QUOTA = 0x100
    BIGALLOC = 0x200
    METADATA_CSUM = 0x400
    READONLY = 0x1000
    PROJECT = 0x2000
    VERITY = 0x8000
    ORPHAN_PRESENT = 0x10000


_EXT3_INCOMPAT: Final = Incompat.FILETYPE | Incompat.RECOVER | Incompat.META_BG
_EXT3_RO_COMPAT: Final = RoCompat.SPARSE_SUPER | RoCompat.LARGE_FILE | RoCompat.BTREE_DIR
_NAMED_INCOMPAT: Final = {0x1: "compression", 0x8: "journal_dev", 0x1000: "dirdata"}
_NAMED_RO_COMPAT: Final = {0x80: "has_snapshot", 0x800: "replica", 0x4000: "shared_blocks"}

_STATE_CLEAN: Final = 0x1
_STATE_ERRORS: Final = 0x2
_CREATORS: Final = {0, 3, 4}
"""Linux, FreeBSD, Lites. The Hurd and Masix lay inodes out otherwise."""

# s_inodes_count to s_feature_ro_compat; the pads are fields that decide nothing here.
_HEAD: Final = struct.Struct("<II4xIIIIIIII4x4x2x2xHH2x2x4x4xII2x2xIH2xIII")
assert _HEAD.size == 0x68


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """What the superblock says, checked against itself and the size of the disk."""

    label: str
    uuid: str
    block_size: int
    block_count: int
    cluster_blocks: int
    """Blocks that are allocated together; 1 without bigalloc."""
    first_data_block: int
    blocks_per_group: int
    inodes_per_group: int
    group_count: int
    inode_count: int
    inode_size: int
    first_inode: int
    descriptor_size: int
    reserved_descriptor_blocks: int
    first_meta_group: int
    backup_groups: tuple[int, int]
    compat: Compat
    incompat: Incompat
    ro_compat: RoCompat
    has_checksums: bool
    """All metadata has CRC-32C checksums."""
    has_huge_files: bool
    has_large_directories: bool
    checksum_seed: int
    """CRC-32C of what comes first in every checksum of metadata_csum."""
    journal_inode: int
    hidden_inodes: tuple[int, ...]
    """Files that have no name: resize, quota and orphan file; the journal is not among them."""
    mmp_block: int
    is_clean: bool
    has_errors: bool

    @property
    def has_descriptor_checksums(self) -> bool:
        """Whether group descriptors have checksums, and so flags that mean anything."""
        return bool(self.ro_compat & (RoCompat.GDT_CSUM | RoCompat.METADATA_CSUM))

    @property
    def kind(self) -> str:
        """`ext2`, `ext3` or `ext4`, told by the features as `blkid` tells it."""
        is_old = not self.incompat & ~_EXT3_INCOMPAT and not self.ro_compat & ~_EXT3_RO_COMPAT
        if not is_old:
            return "ext4"
        return "ext3" if Compat.HAS_JOURNAL in self.compat else "ext2"

    def group_start(self, group: int) -> int:
        """Return the first block of a group."""
        return self.first_data_block + group * self.blocks_per_group

    def group_blocks(self, group: int) -> int:
        """Return how many blocks a group has: the last one may have fewer."""
        return min(self.blocks_per_group, self.block_count - self.group_start(group))

    def has_superblock(self, group: int) -> bool:
        """Whether a group begins with a copy of the superblock."""
        if group == 0:
            return True
        if Compat.SPARSE_SUPER2 in self.compat:
            return group in self.backup_groups
        if group == 1 or RoCompat.SPARSE_SUPER not in self.ro_compat:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))


def read_superblock(disk: Disk) -> Superblock:
    """Return the superblock; raise `UnresolvedError` if it is damaged or not understood."""
    if disk.size < SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES:
        raise UnresolvedError("too small to hold a superblock")
    raw = disk.pread(offset=SUPERBLOCK_OFFSET, length=SUPERBLOCK_BYTES)
    superblock = _parse(raw)
    _check_geometry(superblock, disk_size=disk.size)
    return superblock


def _parse(raw: bytes) -> Superblock:
    (
        inode_count,
        blocks_low,
        _free_blocks,
        _free_inodes,
        first_data_block,
        log_block_size,
        log_cluster_size,
        blocks_per_group,
        clusters_per_group,
        inodes_per_group,
        magic,
        state,
        creator,
        revision,
        first_inode,
        inode_size,
        compat,
        incompat,
        ro_compat,
    ) = _HEAD.unpack_from(raw)
    if magic != _MAGIC:
        raise UnresolvedError("the superblock's magic number is gone")
    if revision == 0:
        compat = incompat = ro_compat = 0
        first_inode, inode_size = 11, 128
    elif revision != 1:
        raise UnresolvedError(f"revision {revision} of the format is unknown")
    _check_features(incompat, ro_compat)
    if creator not in _CREATORS:
        raise UnresolvedError(f"made by operating system {creator}, whose inodes are not read")
    if log_block_size > 6:
        raise UnresolvedError(f"a block size of 2^{log_block_size} KiB is beyond what there is")
    if ro_compat & RoCompat.METADATA_CSUM:
        if raw[0x175] != 1:
            raise UnresolvedError(f"checksums of unknown type {raw[0x175]}")
        if _u32(raw, _CHECKSUM_AT) != ~crc32c(raw[:_CHECKSUM_AT]) & 0xFFFFFFFF:
            raise UnresolvedError("the superblock's checksum is wrong")
        if ro_compat & RoCompat.GDT_CSUM:
            raise UnresolvedError("metadata_csum and uninit_bg exclude each other, and both are on")

    is_64bit = bool(incompat & Incompat.BIT64)
    cluster_blocks = 1
    if ro_compat & RoCompat.BIGALLOC:
        if not log_block_size <= log_cluster_size <= 20:
            raise UnresolvedError(f"a cluster size of 2^{log_cluster_size} KiB makes no sense")
        cluster_blocks = 1 << (log_cluster_size - log_block_size)
        if clusters_per_group * cluster_blocks != blocks_per_group:
            raise UnresolvedError("clusters and blocks per group contradict each other")
    block_count = blocks_low | (_u32(raw, 0x150) << 32 if is_64bit else 0)
    if not (blocks_per_group and inodes_per_group and block_count > first_data_block):
        raise UnresolvedError("the superblock gives no blocks or no inodes")
    uuid_bytes = raw[0x68:0x78]
    if incompat & Incompat.CSUM_SEED:
        checksum_seed = ~_u32(raw, 0x270) & 0xFFFFFFFF
    else:
        checksum_seed = crc32c(uuid_bytes)
    return Superblock(
        label=raw[0x78:0x88].split(b"\0")[0].decode(errors="replace"),
        uuid=str(uuid.UUID(bytes=uuid_bytes)) if any(uuid_bytes) else "",
        block_size=1024 << log_block_size,
        block_count=block_count,
        cluster_blocks=cluster_blocks,
        first_data_block=first_data_block,
        blocks_per_group=blocks_per_group,
        inodes_per_group=inodes_per_group,
        group_count=-(-(block_count - first_data_block) // blocks_per_group),
        inode_count=inode_count,
        inode_size=inode_size,
        first_inode=first_inode,
        descriptor_size=_u16(raw, 0xFE) if is_64bit else 32,
        reserved_descriptor_blocks=_u16(raw, 0xCE) if compat & Compat.RESIZE_INODE else 0,
        first_meta_group=_u32(raw, 0x104),
        backup_groups=(_u32(raw, 0x24C), _u32(raw, 0x250)),
        compat=Compat(compat),
        incompat=Incompat(incompat),
        ro_compat=RoCompat(ro_compat),
        has_checksums=bool(ro_compat & RoCompat.METADATA_CSUM),
        has_huge_files=bool(ro_compat & RoCompat.HUGE_FILE),
        has_large_directories=bool(incompat & Incompat.LARGEDIR),
        checksum_seed=checksum_seed,
        journal_inode=_u32(raw, 0xE0),
        hidden_inodes=_hidden_inodes(raw, compat, ro_compat),
        mmp_block=_u64(raw, 0x168) if incompat & Incompat.MMP else 0,
        is_clean=bool(state & _STATE_CLEAN),
        has_errors=bool(state & _STATE_ERRORS),
    )


def _hidden_inodes(raw: bytes, compat: int, ro_compat: int) -> tuple[int, ...]:
    numbers = [7] if compat & Compat.RESIZE_INODE else []
    if ro_compat & RoCompat.QUOTA:
        numbers += [_u32(raw, 0x240), _u32(raw, 0x244)]
    if ro_compat & RoCompat.PROJECT:
        numbers.append(_u32(raw, 0x26C))
    if compat & Compat.ORPHAN_FILE:
        numbers.append(_u32(raw, 0x280))
    return tuple(number for number in numbers if number)


def _check_features(incompat: int, ro_compat: int) -> None:
    unknown = _names(incompat & ~_mask(Incompat), _NAMED_INCOMPAT, "incompat")
    unknown += _names(ro_compat & ~_mask(RoCompat), _NAMED_RO_COMPAT, "ro_compat")
    if unknown:
        raise UnresolvedError("it has features that are not understood: " + ", ".join(unknown))


def _check_geometry(superblock: Superblock, *, disk_size: int) -> None:
    block_size = superblock.block_size
    if superblock.block_count * block_size > disk_size:
        raise UnresolvedError(
            f"the filesystem is {superblock.block_count * block_size} bytes long, and what it lies "
            f"on has {disk_size}"
        )
    bits = block_size * 8
    inode_size = superblock.inode_size
    descriptor_size = superblock.descriptor_size
    contradictions = (
        superblock.first_data_block
        != int(block_size == 1024 and RoCompat.BIGALLOC not in superblock.ro_compat),
        superblock.blocks_per_group > bits * superblock.cluster_blocks,
        superblock.blocks_per_group % 8 != 0,
        superblock.inodes_per_group > bits,
        superblock.inode_count != superblock.inodes_per_group * superblock.group_count,
        not 128 <= inode_size <= block_size or inode_size & (inode_size - 1) != 0,
        Incompat.BIT64 in superblock.incompat
        and (not 64 <= descriptor_size <= 1024 or descriptor_size & (descriptor_size - 1) != 0),
        superblock.mmp_block >= superblock.block_count,
        superblock.first_inode > superblock.inode_count,
    )
    if any(contradictions):
        raise UnresolvedError("the superblock's numbers contradict each other")
    if superblock.group_count > _GROUP_COUNT_MAX:
        raise UnresolvedError(
            f"{superblock.group_count} groups are more than the {_GROUP_COUNT_MAX} that are read"
        )


def _mask(flags: type[IntFlag]) -> int:
    return sum(flag.value for flag in flags)


def _names(unknown: int, names: dict[int, str], which: str) -> list[str]:
    bits = [1 << bit for bit in range(32) if unknown >> bit & 1]
    return [names.get(bit, f"{which} {bit:#x}") for bit in bits]


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1


def _u16(raw: bytes, offset: int) -> int:
    return int.from_bytes(raw[offset : offset + 2], "little")


def _u32(raw: bytes, offset: int) -> int:
    return int.from_bytes(raw[offset : offset + 4], "little")


def _u64(raw: bytes, offset: int) -> int:
    return int.from_bytes(raw[offset : offset + 8], "little")
