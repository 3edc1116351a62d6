"""btrfs structures: superblock, chunks, tree blocks, items, each checked when it is read.

Source: the btrfs documentation, "On-disk Format" (btrfs.readthedocs.io). All integers are
little-endian. Logical addresses are of a space of its own, which chunks map to the device.
"""

import hashlib
import operator
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from stillblock.model import Extent
from stillblock.native import crc32c
from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.filesystems.filesystem import UnresolvedError

SUPERBLOCK_AT: Final = 64 << 10
MIRRORS_AT: Final = (SUPERBLOCK_AT, 64 << 20, 256 << 30)
"""Where superblocks lie; nothing else does in the 64 KiB from each, chunks or not."""
MIRROR_BYTES: Final = 64 << 10
CHUNKS_MAX: Final = 1 << 20

# Object ids and item types.
CHUNK_TREE_OBJECTS: Final = 256
DEVICE_ITEMS: Final = 1
DEVICE_ITEM: Final = 216
CHUNK_ITEM: Final = 228

CHUNK_DATA: Final = 0x1
_PROFILES: Final = 0x7F8
_PROFILE_DUP: Final = 0x20

_SUPERBLOCK_BYTES: Final = 4096
_SUPERBLOCK: Final = struct.Struct("<32s16sQQ8sQQQQ8xQQ8xQIIIIIQ8xQQHBBB98s256s16x16s")
_SYSTEM_CHUNKS_AT: Final = 811
_SYSTEM_CHUNKS_BYTES_MAX: Final = 2048
_DEVICE: Final = struct.Struct("<QQQ12x8xQ8x4x2x16s16s")
assert _DEVICE.size == 98
_FLAGS_HARMLESS: Final = 0x3
"""Written; relocated. Others: a seed of other filesystems, an image of metadata only, a change of
the uuid or the checksums that was not finished."""

_INCOMPAT_KNOWN: Final = (
    0x1  # back references of both kinds
    | 0x2  # a default subvolume was chosen
    | 0x4  # data and metadata in the same chunks
    | 0x8  # lzo
    | 0x10  # zstd
    | 0x20  # blocks larger than a page
    | 0x40  # many names of one file in one directory
    | 0x80  # RAID5, RAID6: chunks tell
    | 0x100  # skinny metadata items
    | 0x200  # holes need no item
    | 0x400  # metadata has a uuid of its own
    | 0x800  # RAID1 with three or four copies: chunks tell
    | 0x10000  # simple quotas
)
_INCOMPAT_METADATA_UUID: Final = 0x400
# Free space tree, whether it is valid, fs-verity, block group tree.
_RO_COMPAT_KNOWN: Final = 0xF
_RO_COMPAT_BLOCK_GROUP_TREE: Final = 0x8

_CHUNK: Final = struct.Struct("<QQQQ12xHH")
_STRIPE: Final = struct.Struct("<QQ16s")
_KEY: Final = struct.Struct("<QBQ")
_HEADER: Final = struct.Struct("<32s16sQQ16sQQIB")
HEADER_BYTES: Final = 101
_LEAF_ITEM: Final = struct.Struct("<QBQII")
_POINTER: Final = struct.Struct("<QBQQQ")
assert _HEADER.size == HEADER_BYTES

Key = tuple[int, int, int]
"""Object id, item type, offset: what trees are sorted by."""
Item = tuple[int, int, int, int, int]
"""A key, then of a leaf: (place, length) of its data; of others: (address, generation) below."""


def _crc(data: bytes) -> bytes:
    return crc32c(data).to_bytes(4, "little")


_CHECKSUMS: Final[dict[int, Callable[[bytes], bytes]]] = {
    0: _crc,
    2: lambda data: hashlib.sha256(data).digest(),
    3: lambda data: hashlib.blake2b(data, digest_size=32).digest(),
}
_CHECKSUM_XXHASH: Final = 1


class Chunk(NamedTuple):
    """A range of logical addresses and where its copies lie."""

    start: int
    length: int
    flags: int
    copies: tuple[int, ...]

    @property
    def end(self) -> int:
        """The address after it."""
        return self.start + self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """What the first superblock says, checked to be possible."""

    uuid: bytes
    metadata_uuid: bytes
    """What every tree block carries."""
    label: str
    generation: int
    root: int
    root_level: int
    chunk_root: int
    chunk_root_level: int
    chunk_root_generation: int
    log_root: int
    """Address of the tree of logs; 0: nothing was synced since the commit."""
    log_level: int
    sector_size: int
    node_size: int
    device: int
    device_uuid: bytes
    device_bytes: int
    checksum: Callable[[bytes], bytes]
    has_block_group_tree: bool
    system_chunks: tuple[Chunk, ...]


def read_superblock(disk: Disk) -> Superblock:
    """Return the superblock; raise `UnresolvedError` for what is not known or not possible."""
    if disk.size < SUPERBLOCK_AT + _SUPERBLOCK_BYTES:
        raise UnresolvedError(f"btrfs: {disk.size} bytes are too few for one")
    data = read_exactly(disk, offset=SUPERBLOCK_AT, length=_SUPERBLOCK_BYTES)
    (
        own_checksum,
        uuid_bytes,
        address,
        flags,
        magic,
        generation,
        root,
        chunk_root,
        log_root,
        _total_bytes,
        _used_bytes,
        device_count,
        sector_size,
        node_size,
        _leaf_size,
        _stripe_size,
        system_chunks_bytes,
        chunk_root_generation,
        ro_compat,
        incompat,
        checksum_type,
        root_level,
        chunk_root_level,
        log_level,
        device_item,
        label,
        metadata_uuid,
    ) = _SUPERBLOCK.unpack_from(data)
    if magic != b"_BHRfS_M" or address != SUPERBLOCK_AT:
        raise UnresolvedError("btrfs: no superblock")
    checksum = _CHECKSUMS.get(checksum_type)
    if checksum is None:
        name = "xxhash" if checksum_type == _CHECKSUM_XXHASH else f"type {checksum_type}"
        raise UnresolvedError(f"btrfs: its checksums ({name}) cannot be verified here")
    if not own_checksum.startswith(checksum(data[32:])):
        raise UnresolvedError("btrfs: the superblock's checksum does not match")
    if incompat & ~_INCOMPAT_KNOWN or ro_compat & ~_RO_COMPAT_KNOWN:
        raise UnresolvedError(
            "btrfs: has features that are not known here (incompatible "
            f"{incompat & ~_INCOMPAT_KNOWN:#x}, read-only compatible "
            f"{ro_compat & ~_RO_COMPAT_KNOWN:#x})"
        )
    if flags & ~_FLAGS_HARMLESS:
        raise UnresolvedError(f"btrfs: is in a state that is not read here ({flags:#x})")
    if device_count != 1:
        raise UnresolvedError(f"btrfs: lies on {device_count} devices, and one is read")
    device, device_bytes, _device_used, _generation, device_uuid, _ = _DEVICE.unpack(device_item)
    if device_bytes > disk.size:
        raise UnresolvedError(f"btrfs: has {device_bytes} bytes, but there are only {disk.size}")
    if (
        not _is_power_of_two(sector_size, 512, 65536)
        or not _is_power_of_two(node_size, 4096, 65536)
        or system_chunks_bytes > _SYSTEM_CHUNKS_BYTES_MAX
    ):
        raise UnresolvedError("btrfs: the superblock is impossible")
    return Superblock(
        uuid=uuid_bytes,
        metadata_uuid=metadata_uuid if incompat & _INCOMPAT_METADATA_UUID else uuid_bytes,
        label=label.split(b"\0")[0].decode("utf-8", "surrogateescape"),
        generation=generation,
        root=root,
        root_level=root_level,
        chunk_root=chunk_root,
        chunk_root_level=chunk_root_level,
        chunk_root_generation=chunk_root_generation,
        log_root=log_root,
        log_level=log_level,
        sector_size=sector_size,
        node_size=node_size,
        device=device,
        device_uuid=device_uuid,
        device_bytes=device_bytes,
        checksum=checksum,
        has_block_group_tree=bool(ro_compat & _RO_COMPAT_BLOCK_GROUP_TREE),
        system_chunks=tuple(
            _system_chunks(
                data[_SYSTEM_CHUNKS_AT : _SYSTEM_CHUNKS_AT + system_chunks_bytes],
                device=device,
                device_uuid=device_uuid,
                device_bytes=device_bytes,
            )
        ),
    )


def _is_power_of_two(value: int, least: int, most: int) -> bool:
    return least <= value <= most and not value & (value - 1)


def _system_chunks(
    data: bytes, *, device: int, device_uuid: bytes, device_bytes: int
) -> list[Chunk]:
    """Return the chunks that hold the chunk tree: without them nothing else can be found."""
    chunks = []
    at = 0
    while at < len(data):
        if at + _KEY.size + _CHUNK.size > len(data):
            raise UnresolvedError("btrfs: the superblock's chunks are damaged")
        object_id, kind, address = _KEY.unpack_from(data, at)
        at += _KEY.size
        if (object_id, kind) != (CHUNK_TREE_OBJECTS, CHUNK_ITEM):
            raise UnresolvedError("btrfs: the superblock's chunks are damaged")
        stripe_count = _CHUNK.unpack_from(data, at)[4]
        size = _CHUNK.size + stripe_count * _STRIPE.size
        chunks.append(
            parse_chunk(
                address,
                data[at : at + size],
                device=device,
                device_uuid=device_uuid,
                device_bytes=device_bytes,
            )
        )
        at += size
    return chunks


def parse_chunk(
    address: int, data: bytes, *, device: int, device_uuid: bytes, device_bytes: int
) -> Chunk:
    """Return a chunk that lies on this device once, or twice (DUP); raise for any other."""
    if len(data) < _CHUNK.size:
        raise UnresolvedError(f"btrfs: chunk {address} is damaged")
    length, _owner, _stripe_length, flags, count, _ = _CHUNK.unpack_from(data)
    profile = flags & _PROFILES
    if profile not in {0, _PROFILE_DUP}:
        raise UnresolvedError(f"btrfs: chunk {address} is striped or mirrored ({profile:#x})")
    stripes = [
        _STRIPE.unpack_from(data, _CHUNK.size + i * _STRIPE.size)
        for i in range(count)
        if len(data) >= _CHUNK.size + (i + 1) * _STRIPE.size
    ]
    if (
        len(stripes) != (2 if profile else 1)
        or len(data) != _CHUNK.size + count * _STRIPE.size
        or length == 0
        or address + length >= 1 << 63
        or any(
            own_device != device or own_uuid != device_uuid or start + length > device_bytes
            for own_device, start, own_uuid in stripes
        )
    ):
        raise UnresolvedError(f"btrfs: chunk {address} is not on this device, or is damaged")
    return Chunk(address, length, flags, tuple(start for _, start, _ in stripes))


class ChunkMap:
    """Logical addresses to places on the device."""

    def __init__(self, chunks: list[Chunk]) -> None:
        """Take chunks; raise `UnresolvedError` if two share an address or a place."""
        self.chunks: Final = tuple(sorted(chunks))
        self._starts = [chunk.start for chunk in self.chunks]
        _require_disjoint((chunk.start, chunk.end) for chunk in self.chunks)
        _require_disjoint(
            sorted((copy, copy + chunk.length) for chunk in self.chunks for copy in chunk.copies)
        )

    def chunk(self, address: int, length: int, *, what: str) -> Chunk:
        """Return the chunk that holds a range."""
        at = bisect_right(self._starts, address) - 1
        if at >= 0 and length > 0:
            chunk = self.chunks[at]
            if address + length <= chunk.end:
                return chunk
        raise UnresolvedError(f"btrfs: {what} lies at address {address}, where nothing is")

    def places(self, address: int, length: int, *, what: str) -> tuple[int, ...]:
        """Return where the copies of a range lie."""
        chunk = self.chunk(address, length, what=what)
        return tuple(copy + (address - chunk.start) for copy in chunk.copies)


def _require_disjoint(ranges: Iterable[Extent]) -> None:
    end = 0
    for start, stop in ranges:
        if start < end:
            raise UnresolvedError("btrfs: two chunks overlap")
        end = stop


class Block(NamedTuple):
    """A tree block; level 0 is a leaf."""

    level: int
    generation: int
    items: list[Item]
    data: bytes

    def value(self, item: Item) -> bytes:
        """Return an item's data, of a leaf."""
        start = HEADER_BYTES + item[3]
        return self.data[start : start + item[4]]


def parse_block(superblock: Superblock, address: int, data: bytes) -> Block | None:
    """Return the tree block in `node_size` bytes; None if they are not the one at that address."""
    own_checksum, own_uuid, own_address, _, _, generation, _, count, level = _HEADER.unpack_from(
        data
    )
    if (
        own_address != address
        or own_uuid != superblock.metadata_uuid
        or not own_checksum.startswith(superblock.checksum(data[32:]))
    ):
        return None
    layout = _POINTER if level else _LEAF_ITEM
    end = HEADER_BYTES + count * layout.size
    if end > len(data):
        return None
    items = list(layout.iter_unpack(data[HEADER_BYTES:end]))
    keys = [item[:3] for item in items]
    if not all(map(operator.lt, keys, keys[1:])):
        return None
    if level == 0 and any(
        HEADER_BYTES + place < end or HEADER_BYTES + place + length > len(data)
        for _, _, _, place, length in items
    ):
        return None
    return Block(level, generation, items, data)
