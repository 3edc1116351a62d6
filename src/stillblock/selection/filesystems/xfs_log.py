"""The log of XFS: its head and tail, its records, the transactions that were committed in them.

Source: XFS Algorithms & Data Structures, "Journaling Log". Blocks of the log are of 512 bytes and
are counted without end here: block `b` of cycle `c` is number `c * blocks + b`. The first four
bytes of each are replaced by its cycle, which tells how far the log was written.

What recovery would read is read, in its order and with its rules; what it would have to judge, such
as a record that was written in part, makes the filesystem unresolved.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from stillblock.native import crc32c
from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.filesystems.filesystem import UnresolvedError
from stillblock.selection.filesystems.xfs_format import Superblock

_BLOCK: Final = 512
_UNSETTLED_BYTES_MAX: Final = 256 << 20
"""Records between tail and head: what is read, twice, to apply them."""
_IN_FLIGHT_BLOCKS: Final = 8 * (256 << 10) // _BLOCK
"""Eight buffers of 256 KiB may be on their way at once: holes lie no further before the head."""
_CYCLE_BYTES: Final = 32 << 10
"""Content whose cycle words one header block holds."""
_RECORD_BYTES_MAX: Final = 256 << 10
_OPEN_MAX: Final = 4096
"""Transactions that began and are not yet committed; the kernel has a few."""

_MAGIC: Final = b"\xfe\xed\xba\xbe"
_HEADER: Final = struct.Struct(">4sIIIQQ4xII256xI16sI")
_HEADER_SIZES: Final = (328, 324)
"""What the checksum covers of the header: with and without what 64-bit machines pad it by."""
_FORMAT_LITTLE: Final = 1
_OPERATION: Final = struct.Struct(">IIBBH")
_START, _COMMIT, _CONTINUE, _WAS_CONTINUED, _END, _UNMOUNT = 1, 2, 4, 8, 16, 32
_TRANSACTION_HEADER_BYTES: Final = 16
_REGIONS_MAX: Final = 1 << 18
_TRANSACTION_BYTES_MAX: Final = 64 << 20
"""The kernel commits before it has 32 MiB."""


@dataclass(slots=True)
class Item:
    """What a transaction did to one thing: regions, the first of which says which and how."""

    regions: list[bytearray] = field(default_factory=list)
    region_count: int = 0

    @property
    def kind(self) -> int:
        """The type of log item."""
        return int.from_bytes(self.regions[0][:2], "little")


@dataclass(slots=True)
class Transaction:
    """Items that hold together, in order."""

    lsn: int
    """Where the record lies in which it began."""
    header: bytearray = field(default_factory=bytearray)
    items: list[Item] = field(default_factory=list)
    size: int = 0
    """Bytes of all that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    place: int
    length: int
    """Blocks, header included."""
    tail: int
    operation_count: int
    lsn: int
    content: bytes


class Log:
    """The log, between the tail and the head that recovery would find."""

    def __init__(self, disk: Disk, superblock: Superblock) -> None:
        if superblock.log_start == 0:
            raise UnresolvedError("XFS: its log is on another device")
        self._disk = disk
        self._uuid = superblock.uuid
        self._start = superblock.place(superblock.log_start, superblock.log_blocks, what="the log")
        self._blocks = superblock.log_blocks * superblock.block_size // _BLOCK
        if self._blocks < 64:
            raise UnresolvedError("XFS: its log is too small")
        self._head = self._find_head()
        last = self._last_record()
        is_clean = last.operation_count == 1 and bool(last.content[9] & _UNMOUNT)
        self._tail = self._head if is_clean else last.tail
        if not self._head - self._blocks <= self._tail <= self._head:
            raise self._damaged(last.place)
        if (self._head - self._tail) * _BLOCK > _UNSETTLED_BYTES_MAX:
            raise UnresolvedError(
                f"XFS: its log holds {(self._head - self._tail) * _BLOCK >> 20} MiB of changes "
                "that may not be in place yet, more than is read; freeze it during the snapshot"
            )

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing in it that may not be in place."""
        return self._tail == self._head

    def transactions(self) -> Iterator[Transaction]:
        """Yield what was committed from tail to head, in order."""
        running: dict[int, Transaction] = {}
        place = self._tail
        while place < self._head:
            record = self._record(place)
            place += record.length
            if place > self._head:
                raise self._damaged(record.place)
            yield from self._operations(record, running)

    # Where it begins and ends -------------------------------------------------------------------

    def _damaged(self, place: int) -> UnresolvedError:
        return UnresolvedError(
            f"XFS: its log is damaged or was being written at block {place % self._blocks}; "
            "freeze it during the snapshot"
        )

    def _read(self, place: int, count: int) -> bytes:
        """Return blocks of the log, from its end on from its beginning."""
        begin = place % self._blocks
        first = min(count, self._blocks - begin)
        data = read_exactly(self._disk, offset=self._start + begin * _BLOCK, length=first * _BLOCK)
        if first < count:
            data += read_exactly(self._disk, offset=self._start, length=(count - first) * _BLOCK)
        return data

    def _cycle(self, block: int) -> int:
        return _cycle_of(self._read(block, 1))

    def _find_head(self) -> int:
        """Return the first block that was not written in the newest cycle."""
        newest, oldest = self._cycle(0), self._cycle(self._blocks - 1)
        if newest == oldest and newest > 0:
            head = (newest + 1) * self._blocks
        elif newest == oldest + 1:
            low, high = 0, self._blocks - 1  # of the newest cycle, of the oldest
            while high - low > 1:
                middle = (low + high) // 2
                if self._cycle(middle) == newest:
                    low = middle
                else:
                    high = middle
            head = newest * self._blocks + high
        else:
            raise self._damaged(0)
        # Of writes that were under way at once a later one may have come first. Recovery ends at
        # the hole; but damage looks the same, and would take what was synced with it.
        scanned = min(_IN_FLIGHT_BLOCKS, self._blocks, head - self._blocks)
        begin = head - scanned
        data = self._read(begin, scanned)
        for i in range(scanned):
            if _cycle_of(data[i * _BLOCK : i * _BLOCK + 8]) != (begin + i) // self._blocks:
                raise self._damaged(begin + i)
        return head

    def _last_record(self) -> _Record:
        scanned = min(_RECORD_BYTES_MAX // _BLOCK + 8, self._blocks, self._head - self._blocks)
        data = self._read(self._head - scanned, scanned)
        at = max(
            (i for i in range(scanned) if data[i * _BLOCK : i * _BLOCK + 4] == _MAGIC), default=None
        )
        if at is None:
            raise self._damaged(self._head)
        record = self._record(self._head - scanned + at)
        if record.place + record.length != self._head:
            raise self._damaged(record.place)
        return record

    # Records and operations ---------------------------------------------------------------------

    def _record(self, place: int) -> _Record:
        """Return the record whose header is at a block, checked."""
        head = self._read(place, 1)
        (
            magic,
            cycle,
            version,
            length,
            lsn,
            tail_lsn,
            _previous,
            operation_count,
            content_format,
            own_uuid,
            buffer_size,
        ) = _HEADER.unpack_from(head)
        own_cycle, own_block = divmod(place, self._blocks)
        if (
            magic != _MAGIC
            or cycle != own_cycle
            or version != 2
            or not 0 < length <= _RECORD_BYTES_MAX
            or length % _BLOCK
            or lsn != own_cycle << 32 | own_block
            or own_uuid != self._uuid
        ):
            raise self._damaged(place)
        if content_format != _FORMAT_LITTLE:
            raise UnresolvedError("XFS: its log was written by a machine of another byte order")
        header_count = -(-min(buffer_size, _RECORD_BYTES_MAX) // _CYCLE_BYTES) or 1
        if length > header_count * _CYCLE_BYTES and operation_count != 1:
            raise self._damaged(place)
        block_count = header_count + length // _BLOCK
        data = self._read(place, block_count)
        self._require_checksum(place, data, header_count)
        return _Record(
            place=place,
            length=block_count,
            tail=(tail_lsn >> 32) * self._blocks + (tail_lsn & 0xFFFFFFFF),
            operation_count=operation_count,
            lsn=lsn,
            content=self._content(place, data, header_count),
        )

    def _require_checksum(self, place: int, data: bytes, header_count: int) -> None:
        content = data[header_count * _BLOCK :]
        if data[32:36] == bytes(4) and data[40:44] == b"\0\0\0\1" and content[9] & _UNMOUNT:
            # mkfs and xfs_repair write the mark of a clean log without one.
            return
        covered = min(-(-len(content) // _CYCLE_BYTES), header_count)
        for size in _HEADER_SIZES:
            crc = crc32c(data[36:size], crc32c(bytes(4), crc32c(data[:32])))
            for i in range(1, covered):
                crc = crc32c(data[i * _BLOCK : i * _BLOCK + 260], crc)
            if crc32c(content, crc).to_bytes(4, "little") == data[32:36]:
                return
        raise self._damaged(place)

    def _content(self, place: int, data: bytes, header_count: int) -> bytes:
        """Return what a record holds, with the words back that cycle numbers replaced."""
        content = bytearray(data[header_count * _BLOCK :])
        for i in range(len(content) // _BLOCK):
            at = i * _BLOCK
            cycle = int.from_bytes(content[at : at + 4], "big")
            if cycle != (place + header_count + i) // self._blocks:
                raise self._damaged(place)
            header, word = divmod(i, 64)
            if header < header_count:
                word_at = header * _BLOCK + word * 4 + (4 if header else 44)
                content[at : at + 4] = data[word_at : word_at + 4]
        return bytes(content)

    def _operations(
        self, record: _Record, running: dict[int, Transaction]
    ) -> Iterator[Transaction]:
        """Take in a record's operations; yield the transactions that they commit."""
        content = record.content
        at = 0
        for _ in range(record.operation_count):
            if at + _OPERATION.size > len(content):
                raise self._damaged(record.place)
            transaction_id, length, _client, flags, _ = _OPERATION.unpack_from(content, at)
            at += _OPERATION.size
            if at + length > len(content):
                raise self._damaged(record.place)
            region = content[at : at + length]
            at += length
            if flags & _START:
                if length or len(running) >= _OPEN_MAX:
                    raise self._damaged(record.place)
                running[transaction_id] = Transaction(lsn=record.lsn)
                continue
            transaction = running.get(transaction_id)
            if transaction is None:
                # It began before the tail: all it did is in place. Or an unmount's mark.
                continue
            if flags & _COMMIT:
                del running[transaction_id]
                yield transaction
            elif flags & _UNMOUNT or not _add_region(
                transaction, region, is_more=bool(flags & _WAS_CONTINUED)
            ):
                raise self._damaged(record.place)


def _cycle_of(block: bytes) -> int:
    at = 4 if block[:4] == _MAGIC else 0
    return int.from_bytes(block[at : at + 4], "big")


def _add_region(transaction: Transaction, region: bytes, *, is_more: bool) -> bool:
    """Append an operation's bytes to what a transaction has; whether that is possible."""
    transaction.size += len(region)
    if transaction.size > _TRANSACTION_BYTES_MAX:
        return False
    if is_more:
        if transaction.items:
            transaction.items[-1].regions[-1] += region
        else:
            transaction.header += region
            return len(transaction.header) <= _TRANSACTION_HEADER_BYTES
        return True
    if not transaction.header:
        transaction.header += region
        return 0 < len(region) <= _TRANSACTION_HEADER_BYTES
    item = transaction.items[-1] if transaction.items else None
    if item is None or len(item.regions) == item.region_count:
        if len(region) < 4:
            return False
        item = Item(region_count=int.from_bytes(region[2:4], "little"))
        transaction.items.append(item)
        if not 0 < item.region_count <= _REGIONS_MAX:
            return False
    item.regions.append(bytearray(region))
    return True
