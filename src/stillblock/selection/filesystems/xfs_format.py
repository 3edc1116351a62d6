"""XFS structures: superblock and geometry, inodes, extents, B+tree blocks, each checked when read.

Source: XFS Algorithms & Data Structures, 3rd edition (kernel.org), version 5. All integers are
big-endian, but for checksums. Everything that is read here has a CRC-32C, the uuid of its
filesystem and its own address: what has moved, is stale or is another filesystem's is not believed.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from stillblock.native import crc32c
from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.filesystems.filesystem import UnresolvedError

SUPERBLOCK_BYTES: Final = 264
AG_COUNT_MAX: Final = 1 << 20
"""Allocation groups: an EiB of them at their largest size."""
TREE_LEVELS_MAX: Final = 12
"""Levels of a B+tree; the smallest blocks, half full, need 9 for all addresses there are."""

# sb_features_incompat. Each is about a structure that this reader knows, or does not use.
_KNOWN_INCOMPAT: Final = (
    0x01  # ftype
    | 0x02  # sparse inodes
    | 0x04  # meta uuid
    | 0x08  # bigtime
    | 0x20  # nrext64
    | 0x40  # exchange range
    | 0x80  # parent pointers
)
_INCOMPAT_NEEDS_REPAIR: Final = 0x10
_INCOMPAT_META_UUID: Final = 0x04
_INCOMPAT_FTYPE: Final = 0x01
# sb_features_ro_compat: finobt, rmapbt, reflink, inobtcount. Later ones may keep space elsewhere.
_KNOWN_RO_COMPAT: Final = 0x0F
_VERSION_ASCII_CI: Final = 0x4000

_SUPERBLOCK: Final = struct.Struct(">4sIQ16x16sQQ20xII4xIHHHH12sBBBBBxB65xBxH16xIII24x16s")
assert _SUPERBLOCK.size == SUPERBLOCK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """What the first sector says, checked to be possible."""

    block_size: int
    block_log: int
    sector_size: int
    block_count: int
    ag_blocks: int
    """Blocks of every allocation group but the last, which may be shorter."""
    ag_count: int
    ag_block_log: int
    """Bits of a block number within its group."""
    inode_size: int
    inode_log: int
    """Bits of an inode's place within its block."""
    root: int
    log_start: int
    """Filesystem block."""
    log_blocks: int
    log_sector_size: int
    directory_block_size: int
    label: str
    uuid: bytes
    meta_uuid: bytes
    """What every structure carries; the uuid that users see may have been changed."""
    has_types: bool
    """Directory entries tell the type of what they lead to."""
    log_incompat: int
    is_case_sensitive: bool

    def ag_length(self, ag: int) -> int:
        """Blocks of an allocation group."""
        if ag + 1 < self.ag_count:
            return self.ag_blocks
        return self.block_count - (self.ag_count - 1) * self.ag_blocks

    def place(self, block: int, count: int, *, what: str) -> int:
        """Return the byte where a filesystem block lies; `count` blocks must be in its group."""
        ag = block >> self.ag_block_log
        within = block & ((1 << self.ag_block_log) - 1)
        if ag >= self.ag_count or within + count > self.ag_length(ag):
            raise UnresolvedError(f"XFS: {what} lies at block {block}, outside the filesystem")
        return (ag * self.ag_blocks + within) << self.block_log

    def inode_place(self, number: int) -> int:
        """Return the byte where an inode lies."""
        block = number >> self.inode_log
        within = number & ((1 << self.inode_log) - 1)
        return self.place(block, 1, what=f"inode {number}") + within * self.inode_size


def read_superblock(disk: Disk) -> Superblock:
    """Return the superblock; raise `UnresolvedError` for what is not known or not possible."""
    if disk.size < 65536:
        raise UnresolvedError(f"XFS: {disk.size} bytes are too few for one")
    # No more than is a header's for certain: what lies behind it may be left out of a snapshot.
    head = read_exactly(disk, offset=0, length=_SUPERBLOCK.size)
    (
        magic,
        block_size,
        block_count,
        uuid_bytes,
        log_start,
        root,
        ag_blocks,
        ag_count,
        log_blocks,
        version,
        sector_size,
        inode_size,
        inodes_per_block,
        label,
        block_log,
        sector_log,
        inode_size_log,
        inode_log,
        ag_block_log,
        in_progress,
        directory_log,
        log_sector_size,
        ro_compat,
        incompat,
        log_incompat,
        meta_uuid,
    ) = _SUPERBLOCK.unpack_from(head)
    if magic != b"XFSB":
        raise UnresolvedError("XFS: no superblock")
    if version & 0xF != 5:
        raise UnresolvedError(
            f"XFS: version {version & 0xF} has no checksums, and only version 5 is read"
        )
    _require(9 <= sector_log <= 15 and sector_size == 1 << sector_log, f"sectors of {sector_size}")
    sector = read_exactly(disk, offset=0, length=sector_size)
    require_checksum(sector, 224, what="superblock")
    if incompat & _INCOMPAT_NEEDS_REPAIR:
        raise UnresolvedError("XFS: marked as in need of repair; run xfs_repair")
    unknown = incompat & ~_KNOWN_INCOMPAT
    if unknown or ro_compat & ~_KNOWN_RO_COMPAT:
        raise UnresolvedError(
            f"XFS: has features that are not known here (incompatible {unknown:#x}, read-only "
            f"compatible {ro_compat & ~_KNOWN_RO_COMPAT:#x})"
        )
    _require(10 <= block_log <= 16 and block_size == 1 << block_log, f"blocks of {block_size}")
    _require(sector_size <= block_size, f"sectors of {sector_size} in blocks of {block_size}")
    _require(
        9 <= inode_size_log <= 11
        and inode_size == 1 << inode_size_log
        and inode_size <= block_size
        and inode_log == block_log - inode_size_log
        and inodes_per_block == 1 << inode_log,
        f"inodes of {inode_size}",
    )
    _require(block_log + directory_log <= 16, f"directory blocks of 2^{directory_log} blocks")
    _require(
        64 <= ag_blocks <= 1 << 31
        and 0 < ag_count <= AG_COUNT_MAX
        and ag_block_log == (ag_blocks - 1).bit_length()
        and (ag_count - 1) * ag_blocks < block_count <= ag_count * ag_blocks,
        f"{block_count} blocks in {ag_count} groups of {ag_blocks}",
    )
    _require(not in_progress, "being made")
    if block_count * block_size > disk.size:
        raise UnresolvedError(
            f"XFS: has {block_count * block_size} bytes, but there are only {disk.size}"
        )
    return Superblock(
        block_size=block_size,
        block_log=block_log,
        sector_size=sector_size,
        block_count=block_count,
        ag_blocks=ag_blocks,
        ag_count=ag_count,
        ag_block_log=ag_block_log,
        inode_size=inode_size,
        inode_log=inode_log,
        root=root,
        log_start=log_start,
        log_blocks=log_blocks,
        log_sector_size=log_sector_size or 512,
        directory_block_size=block_size << directory_log,
        label=label.rstrip(b"\0").decode("utf-8", "surrogateescape"),
        uuid=uuid_bytes,
        meta_uuid=meta_uuid if incompat & _INCOMPAT_META_UUID else uuid_bytes,
        has_types=bool(incompat & _INCOMPAT_FTYPE),
        log_incompat=log_incompat,
        is_case_sensitive=not version & _VERSION_ASCII_CI,
    )


def _require(is_possible: bool, what: str) -> None:  # noqa: FBT001 - reads as an assertion
    if not is_possible:
        raise UnresolvedError(f"XFS: the superblock is impossible: {what}")


def checksum_of(data: bytes | bytearray, at: int) -> bytes:
    """Return the little-endian CRC-32C of `data` with zeros at `at`, where it belongs."""
    crc = crc32c(bytes(data[at + 4 :]), crc32c(bytes(4), crc32c(bytes(data[:at]))))
    return crc.to_bytes(4, "little")


def has_checksum(data: bytes | bytearray, at: int) -> bool:
    """Whether the checksum at `at` is that of `data`."""
    return checksum_of(data, at) == data[at : at + 4]


def require_checksum(data: bytes, at: int, *, what: str) -> None:
    """Raise `UnresolvedError` if the checksum at `at` is not that of `data`."""
    if not has_checksum(data, at):
        raise UnresolvedError(f"XFS: {what}: its checksum does not match")


# Inodes -----------------------------------------------------------------------------------------

INODE_CORE_BYTES: Final = 176
_INODE: Final = struct.Struct(">2sHBB2xIII4xQ8xQ8xQ12xI2xB7xHI24xQ24xQ16s")
assert _INODE.size == INODE_CORE_BYTES

FORMAT_LOCAL: Final = 1
FORMAT_EXTENTS: Final = 2
FORMAT_BTREE: Final = 3

_FLAG_REALTIME: Final = 0x1
FLAG2_BIGTIME: Final = 0x8
_FLAG2_NREXT64: Final = 0x10
_FLAG2_KNOWN: Final = 0x1F
_BIGTIME_EPOCH_NS: Final = 2**31 * 10**9
"""Big timestamps count nanoseconds from December 1901, where 32-bit seconds begin."""


class Inode(NamedTuple):
    """An inode in use, and its data fork as bytes."""

    number: int
    mode: int
    uid: int
    gid: int
    links: int
    size: int
    modified_ns: int
    generation: int
    format: int
    extent_count: int
    is_realtime: bool
    fork: bytes


def parse_inode(superblock: Superblock, number: int, data: bytes) -> Inode:
    """Return the inode in its `inode_size` bytes."""
    (
        magic,
        mode,
        version,
        fork_format,
        uid,
        gid,
        links,
        extents_big,
        modified,
        size,
        extents_small,
        fork_offset,
        flags,
        generation,
        flags2,
        own_number,
        own_uuid,
    ) = _INODE.unpack_from(data)
    if (
        magic != b"IN"
        or version != 3
        or own_number != number
        or own_uuid != superblock.meta_uuid
        or not has_checksum(data, 100)
    ):
        raise UnresolvedError(f"XFS: inode {number} is damaged")
    if mode == 0 or flags2 & ~_FLAG2_KNOWN or size >= 1 << 63:
        what = "is free, but has a name" if mode == 0 else "is not understood"
        raise UnresolvedError(f"XFS: inode {number} {what}")
    end = INODE_CORE_BYTES + fork_offset * 8 if fork_offset else superblock.inode_size
    if end > superblock.inode_size:
        raise UnresolvedError(f"XFS: inode {number} has a data fork beyond its end")
    if flags2 & FLAG2_BIGTIME:
        modified_ns = modified - _BIGTIME_EPOCH_NS
    else:
        seconds = modified >> 32
        modified_ns = (seconds - ((seconds >> 31) << 32)) * 10**9 + (modified & 0xFFFFFFFF)
    return Inode(
        number,
        mode,
        uid,
        gid,
        links,
        size,
        modified_ns,
        generation,
        fork_format,
        extents_big if flags2 & _FLAG2_NREXT64 else extents_small,
        bool(flags & _FLAG_REALTIME),
        data[INODE_CORE_BYTES:end],
    )


# Extents ----------------------------------------------------------------------------------------


class FileExtent(NamedTuple):
    """A piece of a file; all in filesystem blocks."""

    offset: int
    block: int
    length: int
    is_unwritten: bool


def unpack_extents(data: bytes, count: int) -> list[FileExtent]:
    """Return `count` packed extents: 1 bit unwritten, 54 offset, 52 block, 21 count."""
    words = struct.unpack_from(f">{2 * count}Q", data)
    return [
        FileExtent(
            (high >> 9) & ((1 << 54) - 1),
            ((high & 0x1FF) << 43) | (low >> 21),
            low & 0x1FFFFF,
            bool(high >> 63),
        )
        for high, low in zip(words[::2], words[1::2], strict=True)
    ]


# B+tree blocks ----------------------------------------------------------------------------------

_LONG: Final = struct.Struct(">4sHHQQQQ16sQI4x")
_SHORT: Final = struct.Struct(">4sHHIIQQ16sII")
assert (_LONG.size, _SHORT.size) == (72, 56)


def tree_leaves(
    disk: Disk,
    superblock: Superblock,
    roots: list[tuple[int, int]],
    *,
    is_long: bool,
    owner: int,
    what: str,
) -> Iterator[bytes]:
    """Yield the records of each leaf below `roots`, which are (level, filesystem block), in order.

    `is_long`: a fork's tree (`BMA3`) of the inode `owner`; else free space by block (`AB3B`) of the
    group `owner`, whose root alone may be empty. A tree that leads in circles has its records out
    of order: callers check that, and so it ends.
    """
    if is_long:
        magic, layout, checksum_at, record, entry, pointer = b"BMA3", _LONG, 64, 16, 16, "Q"
    else:
        magic, layout, checksum_at, record, entry, pointer = b"AB3B", _SHORT, 52, 8, 12, "I"
    header = layout.size
    places_max = (superblock.block_size - header) // entry
    stack = roots[::-1]
    while stack:
        level, block = stack.pop()
        if not is_long:
            block |= owner << superblock.ag_block_log
        place = superblock.place(block, 1, what=what)
        data = read_exactly(disk, offset=place, length=superblock.block_size)
        found, own_level, count, _, _, address, _, own_uuid, own_owner, _ = layout.unpack_from(data)
        count_max = places_max if level else (superblock.block_size - header) // record
        count_min = 0 if not is_long and level == roots[0][0] == 0 else 1
        if (
            found != magic
            or own_level != level
            or not count_min <= count <= count_max
            or address * 512 != place
            or own_uuid != superblock.meta_uuid
            or own_owner != owner
            or not has_checksum(data, checksum_at)
        ):
            raise UnresolvedError(f"XFS: {what}: damaged tree block at byte {place}")
        if level == 0:
            yield data[header : header + count * record]
        else:
            at = header + places_max * 8
            children = struct.unpack_from(f">{count}{pointer}", data, at)
            stack.extend((level - 1, child) for child in reversed(children))
