"""What recovery of XFS would do with its log, done in memory: the disk below stays as it is.

Source: XFS Algorithms & Data Structures, "Journaling Log"; the rules of recovery, such as that the
newer of disk and log wins by its log sequence number, are those that the structures' `lsn` is for.

Only what the reader looks at has to come out as recovery leaves it: superblock, groups' headers,
trees of free space and of extents, directories, links, inodes. Recovery goes on to finish what was
begun and logged as an intent, and frees files that had lost their last name. That only gives space
back, which is no loss to those who leave out less; other intents map space anew and are refused.
"""

import struct
from collections import Counter
from collections.abc import Iterator
from typing import Final

from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.filesystems.filesystem import UnresolvedError
from stillblock.selection.filesystems.xfs_format import (
    FLAG2_BIGTIME,
    INODE_CORE_BYTES,
    Superblock,
    checksum_of,
    has_checksum,
    read_superblock,
)
from stillblock.selection.filesystems.xfs_log import Item, Log, Transaction

PATCHED_BYTES_MAX: Final = 64 << 20
"""Metadata that the log changed; kept in memory as long as the filesystem is read."""
_PAGE: Final = 4096

_BUFFER: Final = 0x123C
_INODE: Final = 0x123B
_CREATE: Final = 0x123F
_QUOTA: Final = (0x123D, 0x123E)
# An intent, and what tells that it was done. Finishing these two only gives space back.
_HARMLESS_INTENTS: Final = {0x1236: 0x1237, 0x1240: 0x1241}
# Reference counts, mappings, attributes, exchanges of mappings.
_OTHER_INTENTS: Final = {0x1242: 0x1243, 0x1244: 0x1245, 0x1246: 0x1247, 0x1248: 0x1249}
_DONE: Final = {done: intent for intent, done in (_HARMLESS_INTENTS | _OTHER_INTENTS).items()}

_BUFFER_HEADER: Final = struct.Struct("<HHHHqI")
_IS_UNLINKED_LIST: Final = 0x01
"""Of a buffer of inodes: only the chain of nameless inodes changed in it, which nobody reads."""
_IS_CANCELLED: Final = 0x02
_IS_QUOTA: Final = 0x1C
_CHUNK: Final = 128
_BUFFER_BYTES_MAX: Final = 64 << 10

_INODE_HEADER: Final = struct.Struct("<HHIHH4xQ16xqii")
_HAS_FORK_DATA: Final = 0x02 | 0x04
_HAS_FORK_ROOT: Final = 0x08
_HAS_NEW_OWNER: Final = 0x200
_FORK_ROOT_HEADER_BYTES: Final = 72
# The core in the log is that of the disk in the byte order of the machine.
_CORE_FIELDS: Final = "2sHBB2xIIIHHQQQQQQIIHBBIHHIIIQQQI12xQQ16s"
_CORE_LOGGED: Final = struct.Struct("<" + _CORE_FIELDS)
_CORE_ON_DISK: Final = struct.Struct(">" + _CORE_FIELDS)
assert _CORE_LOGGED.size == INODE_CORE_BYTES
_CORE_TIMES: Final = (10, 11, 12, 30)
_CORE_FLAGS2: Final = 28
_CORE_LSN: Final = 27

_CREATE_FIELDS: Final = struct.Struct(">IIIIII")

# Where in a structure, by the magic number it begins with: checksum, log sequence number, uuid.
_LAYOUTS: Final = {
    b"XFSB": (224, 240, 32),
    b"XAGF": (216, 208, 64),
    b"XAGI": (312, 320, 296),
    b"XAFL": (32, 24, 8),
    b"AB3B": (52, 16, 24),
    b"AB3C": (52, 16, 24),
    b"RMB3": (52, 16, 24),
    b"R3FC": (52, 16, 24),
    b"IAB3": (52, 16, 24),
    b"FIB3": (52, 16, 24),
    b"BMA3": (64, 32, 40),
    b"XDB3": (4, 16, 24),
    b"XDD3": (4, 16, 24),
    b"XDF3": (4, 16, 24),
    b"XSLM": (12, 48, 16),
}
# The same for those with a 16-bit one at byte 8: nodes and leaves of directories and attributes.
_HASHED_MAGICS: Final = frozenset({b"\x3d\xf1", b"\x3d\xff", b"\x3e\xbe", b"\x3b\xee"})
_HASHED_LAYOUT: Final = (12, 24, 32)


class PatchedDisk:
    """A disk with some of its bytes replaced in memory."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._pages: dict[int, bytearray] = {}
        self.size: Final = disk.size

    def pread(self, *, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`, all of them inside `size`."""
        data = read_exactly(self._disk, offset=offset, length=length)
        first, last = offset // _PAGE, (offset + length - 1) // _PAGE
        if not any(page in self._pages for page in range(first, last + 1)):
            return data
        patched = bytearray(data)
        for index in range(first, last + 1):
            page = self._pages.get(index)
            if page is not None:
                begin = max(offset, index * _PAGE)
                end = min(offset + length, index * _PAGE + len(page))
                patched[begin - offset : end - offset] = page[
                    begin - index * _PAGE : end - index * _PAGE
                ]
        return bytes(patched)

    def patch(self, data: bytes | bytearray, *, offset: int) -> None:
        """Replace bytes."""
        end = offset + len(data)
        for index in range(offset // _PAGE, -(-end // _PAGE)):
            start = index * _PAGE
            page = self._pages.get(index)
            if page is None:
                if len(self._pages) * _PAGE >= PATCHED_BYTES_MAX:
                    raise UnresolvedError(
                        f"XFS: its log changed more than {PATCHED_BYTES_MAX >> 20} MiB of metadata "
                        "that may not be in place yet; freeze it during the snapshot"
                    )
                length = min(_PAGE, self.size - start)
                page = bytearray(read_exactly(self._disk, offset=start, length=length))
                self._pages[index] = page
            begin, stop = max(start, offset), min(start + _PAGE, end)
            page[begin - start : stop - start] = data[begin - offset : stop - offset]


def settle(disk: Disk, superblock: Superblock) -> tuple[Disk, tuple[str, ...]]:
    """Return the disk as recovery would leave it, and what is worth telling of that."""
    log = Log(disk, superblock)
    if log.is_clean:
        return disk, ()
    if superblock.log_incompat:
        raise UnresolvedError(
            f"XFS: its log has features that are not known here ({superblock.log_incompat:#x})"
        )
    recovery = _Recovery(disk, superblock)
    try:
        for transaction in log.transactions():
            recovery.look_at(transaction)
        recovery.require_intents_done()
        for transaction in log.transactions():
            recovery.apply(transaction)
        recovery.finish()
    except (struct.error, IndexError) as error:
        raise UnresolvedError("XFS: its log holds an item that is not understood") from error
    if read_superblock(recovery.disk) != superblock:
        raise UnresolvedError("XFS: its log changes its geometry; freeze it during the snapshot")
    if not recovery.has_changes:
        return disk, ()
    return recovery.disk, ("its log was applied in memory",)


class _Recovery:
    """Two passes over the transactions: what was cancelled or left open; then the changes."""

    def __init__(self, disk: Disk, superblock: Superblock) -> None:
        self.disk: Final = PatchedDisk(disk)
        self.has_changes = False
        self._superblock = superblock
        self._cancelled: Counter[tuple[int, int]] = Counter()
        self._intents: set[tuple[int, bytes]] = set()
        self._buffers: dict[int, int] = {}
        """Bytes of each buffer that was changed, by where it lies."""

    # First pass ---------------------------------------------------------------------------------

    def look_at(self, transaction: Transaction) -> None:
        for item in transaction.items:
            if len(item.regions) != item.region_count:
                raise UnresolvedError("XFS: its log holds part of an item")
            kind = item.kind
            if kind == _BUFFER:
                place, length, flags = self._buffer(item)
                if flags & _IS_CANCELLED:
                    self._cancelled[place, length] += 1
            elif kind in _HARMLESS_INTENTS or kind in _OTHER_INTENTS:
                self._intents.add((kind, self._intent_id(item)))
            elif kind in _DONE:
                self._intents.discard((_DONE[kind], self._intent_id(item)))
            elif kind not in {_INODE, _CREATE, *_QUOTA}:
                raise UnresolvedError(f"XFS: its log holds items of kind {kind:#x}")

    def require_intents_done(self) -> None:
        if any(kind in _OTHER_INTENTS for kind, _ in self._intents):
            raise UnresolvedError(
                "XFS: its log holds a change that is not finished; freeze it during the snapshot"
            )

    @staticmethod
    def _intent_id(item: Item) -> bytes:
        if len(item.regions[0]) < 16:
            raise UnresolvedError("XFS: its log holds part of an item")
        return bytes(item.regions[0][8:16])

    # Second pass --------------------------------------------------------------------------------

    def apply(self, transaction: Transaction) -> None:
        """Do as recovery does: buffers, then inodes, then what ends the life of buffers."""
        ordered = (
            *(item for item in transaction.items if item.kind in {_BUFFER, _CREATE}),
            *(item for item in transaction.items if item.kind == _INODE),
        )
        ended: list[tuple[int, int]] = []
        for item in ordered:
            if item.kind == _BUFFER:
                place, length, flags = self._buffer(item)
                if flags & _IS_CANCELLED:
                    ended.append((place, length))
                elif not flags & (_IS_UNLINKED_LIST | _IS_QUOTA):
                    self._apply_buffer(item, place, length, transaction.lsn)
            elif item.kind == _CREATE:
                self._create_inodes(item)
            else:
                self._apply_inode(item, transaction.lsn)
        for buffer in ended:
            self._cancelled[buffer] -= 1

    def finish(self) -> None:
        """Give the changed buffers the checksums that recovery writes them with."""
        for place, length in self._buffers.items():
            data = read_exactly(self.disk, offset=place, length=length)
            layout = _layout(data)
            if layout is not None:
                self.disk.patch(checksum_of(data, layout[0]), offset=place + layout[0])

    def _buffer(self, item: Item) -> tuple[int, int, int]:
        """Return (place, bytes, flags) of a buffer item."""
        _, _, flags, length, block, _ = _BUFFER_HEADER.unpack_from(item.regions[0])
        place, length = self._stretch(block, length)
        return place, length, flags

    def _stretch(self, block: int, count: int) -> tuple[int, int]:
        """Return (place, bytes) of 512-byte blocks that lie within the filesystem."""
        size = self._superblock.block_count * self._superblock.block_size
        if block < 0 or not 0 < count * 512 <= _BUFFER_BYTES_MAX or (block + count) * 512 > size:
            raise UnresolvedError("XFS: its log names blocks outside the filesystem")
        return block * 512, count * 512

    def _apply_buffer(self, item: Item, place: int, length: int, lsn: int) -> None:
        if self._cancelled[place, length] > 0:
            return
        data = bytearray(read_exactly(self.disk, offset=place, length=length))
        if place not in self._buffers:
            own_lsn = self._lsn_of(data, place)
            if own_lsn > lsn:
                return
        for at, region in _changes(item):
            if at + len(region) > length:
                raise UnresolvedError("XFS: its log changes a buffer beyond its end")
            data[at : at + len(region)] = region
        self.disk.patch(data, offset=place)
        self._buffers[place] = length
        # Counters in the superblock are what a freeze leaves in the log.
        self.has_changes |= place != 0

    def _lsn_of(self, data: bytearray, place: int) -> int:
        """Return how new a structure on the disk is; 0 if it is none of this filesystem."""
        layout = _layout(data)
        if layout is None:
            return 0
        checksum_at, lsn_at, uuid_at = layout
        is_superblock = place == 0
        own_uuid = data[uuid_at : uuid_at + 16]
        if not is_superblock and own_uuid != self._superblock.meta_uuid:
            return 0
        if not has_checksum(data, checksum_at):
            raise UnresolvedError(f"XFS: the metadata at byte {place} is damaged")
        lsn = int.from_bytes(data[lsn_at : lsn_at + 8], "big")
        return 0 if lsn == (1 << 64) - 1 else lsn

    def _create_inodes(self, item: Item) -> None:
        """Make a chunk of inodes that are free."""
        superblock = self._superblock
        ag, block, count, size, length, generation = _CREATE_FIELDS.unpack_from(item.regions[0], 4)
        if (
            size != superblock.inode_size
            or not 0 < count <= 4096
            or length << superblock.inode_log != count
            or ag >= superblock.ag_count
            or block >= 1 << superblock.ag_block_log
        ):
            raise UnresolvedError("XFS: its log makes inodes that are not possible")
        place = superblock.place(ag << superblock.ag_block_log | block, length, what="new inodes")
        end = place + count * size
        for (at, length), count_left in self._cancelled.items():
            if count_left > 0 and at < end and place < at + length:
                return
        first = (ag << superblock.ag_block_log | block) << superblock.inode_log
        chunk = bytearray(count * size)
        for i in range(count):
            core = bytearray(size)
            core[0:2] = b"IN"
            core[4] = 3
            core[92:96] = generation.to_bytes(4, "big")
            core[96:100] = b"\xff" * 4
            core[152:160] = (first + i).to_bytes(8, "big")
            core[160:176] = superblock.meta_uuid
            core[100:104] = checksum_of(core, 100)
            chunk[i * size : (i + 1) * size] = core
        self.disk.patch(chunk, offset=place)
        self.has_changes = True

    def _apply_inode(self, item: Item, lsn: int) -> None:
        superblock = self._superblock
        if len(item.regions[0]) != _INODE_HEADER.size or item.region_count < 2:
            raise UnresolvedError("XFS: its log holds an inode that is not understood")
        _, _, fields, _, _, number, block, block_count, offset = _INODE_HEADER.unpack(
            item.regions[0]
        )
        buffer_place, length = self._stretch(block, block_count)
        if self._cancelled[buffer_place, length] > 0:
            return
        place = superblock.inode_place(number)
        if place != buffer_place + offset or not 0 <= offset < length:
            raise UnresolvedError(f"XFS: its log has inode {number} in another place")
        data = bytearray(read_exactly(self.disk, offset=place, length=superblock.inode_size))
        if data[:2] != b"IN" or not has_checksum(data, 100):
            raise UnresolvedError(f"XFS: inode {number} is damaged")
        own_lsn = int.from_bytes(data[112:120], "big")
        if own_lsn != (1 << 64) - 1 and own_lsn > lsn:
            return
        core = _core(item.regions[1], lsn)
        if core[152:160] != number.to_bytes(8, "big") or fields & _HAS_NEW_OWNER:
            raise UnresolvedError(f"XFS: its log has an inode {number} that is not understood")
        data[: len(core)] = core
        end = INODE_CORE_BYTES + data[82] * 8 if data[82] else superblock.inode_size
        if fields & (_HAS_FORK_DATA | _HAS_FORK_ROOT):
            fork = bytes(item.regions[2])
            if fields & _HAS_FORK_ROOT:
                fork = _fork_root(fork, end - INODE_CORE_BYTES)
            if INODE_CORE_BYTES + len(fork) > min(end, superblock.inode_size):
                raise UnresolvedError(f"XFS: its log has an inode {number} that is too long")
            data[INODE_CORE_BYTES : INODE_CORE_BYTES + len(fork)] = fork
        data[100:104] = checksum_of(data, 100)
        self.disk.patch(data, offset=place)
        self.has_changes = True


def _layout(data: bytes | bytearray) -> tuple[int, int, int] | None:
    """Return where checksum, log sequence number and uuid of a structure lie, if it is known."""
    layout = _LAYOUTS.get(bytes(data[:4]))
    if layout is None and bytes(data[8:10]) in _HASHED_MAGICS:
        return _HASHED_LAYOUT
    return layout


def _changes(item: Item) -> Iterator[tuple[int, bytearray]]:
    """Yield (offset, bytes) of what changed in a buffer: runs of set bits, 128 bytes each."""
    head = item.regions[0]
    words = _BUFFER_HEADER.unpack_from(head)[5]
    bits = int.from_bytes(head[_BUFFER_HEADER.size : _BUFFER_HEADER.size + 4 * words], "little")
    bit = 0
    for region in item.regions[1:]:
        count = len(region) // _CHUNK
        while bits >> bit and not bits >> bit & 1:
            bit += 1
        if count == 0 or bits >> bit & ((1 << count) - 1) != (1 << count) - 1:
            raise UnresolvedError("XFS: its log holds a buffer that is not understood")
        yield bit * _CHUNK, region[: count * _CHUNK]
        bit += count
    if bits >> bit:
        raise UnresolvedError("XFS: its log holds a buffer that is not understood")


def _core(logged: bytearray, lsn: int) -> bytes:
    """Return an inode's core as the disk has it, from what the log has."""
    values = list(_CORE_LOGGED.unpack_from(logged))
    if values[0] != b"NI":
        raise UnresolvedError("XFS: its log holds an inode that is none")
    values[0] = b"IN"
    if not values[_CORE_FLAGS2] & FLAG2_BIGTIME:
        # Seconds and nanoseconds are two numbers, each in the machine's order.
        for i in _CORE_TIMES:
            values[i] = (values[i] & 0xFFFFFFFF) << 32 | values[i] >> 32
    values[_CORE_LSN] = lsn
    return _CORE_ON_DISK.pack(*values)


def _fork_root(logged: bytes, fork_bytes: int) -> bytes:
    """Return the root of a tree of extents as an inode holds it, from the block the log has."""
    held = (len(logged) - _FORK_ROOT_HEADER_BYTES) // 16
    room = (fork_bytes - 4) // 16
    level, count = struct.unpack_from(">HH", logged, 4)
    if not 0 < count <= min(held, room):
        raise UnresolvedError("XFS: its log holds a tree of extents that is not understood")
    root = bytearray(4 + 16 * room)
    struct.pack_into(">HH", root, 0, level, count)
    keys_at = _FORK_ROOT_HEADER_BYTES
    root[4 : 4 + 8 * count] = logged[keys_at : keys_at + 8 * count]
    pointers_at = keys_at + 8 * held
    root[4 + 8 * room : 4 + 8 * room + 8 * count] = logged[pointers_at : pointers_at + 8 * count]
    return bytes(root)
