"""The journal of ext3 and ext4 (JBD2), applied in memory: what its own replay would put in place.

A mounted filesystem's maps are in its journal long before they are where they belong. This reads
the committed transactions from the tail of the log and makes a disk on which each journalled block
is read from its last committed copy. Only the places are kept in memory, not the blocks.

Anything in the log that is not as JBD2 writes it is `UnresolvedError`, even where the kernel would
take it for the end of the log: to stop early is to believe older maps.

Format: the Linux kernel's Documentation/filesystems/ext4, "Journal (jbd2)"; big-endian.
"""

import struct
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from stillblock.model import Extent
from stillblock.native import crc32c
from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.filesystems.ext_groups import Groups
from stillblock.selection.filesystems.ext_inode import BlockMap, parse_inode
from stillblock.selection.filesystems.ext_superblock import Incompat, Superblock
from stillblock.selection.filesystems.filesystem import Run, UnresolvedError

_MAGIC: Final = 0xC03B3998
_MAGIC_BYTES: Final = _MAGIC.to_bytes(4, "big")
_DESCRIPTOR, _COMMIT, _SUPERBLOCK_V1, _SUPERBLOCK_V2, _REVOKE = 1, 2, 3, 4, 5
_HEADER: Final = struct.Struct(">III")
_JOURNAL_BLOCKS_MIN: Final = 1024
_BLOCK_COUNT_MAX: Final = 1 << 20
"""Journalled blocks whose places are kept: 4 GiB of journal, some 150 MiB of memory."""
_SUPERBLOCK_BYTES: Final = 1024
_PIECE_BYTES: Final = 1024 * 1024
"""Of the log, looked through at once."""
_CHECKSUM_AT: Final = 0xFC

_COMPAT_CHECKSUM: Final = 0x1
_REVOKES, _BIT64, _ASYNC_COMMIT, _CSUM_V2, _CSUM_V3, _FAST_COMMIT = 1, 2, 4, 8, 16, 32
_KNOWN: Final = _REVOKES | _BIT64 | _ASYNC_COMMIT | _CSUM_V2 | _CSUM_V3 | _FAST_COMMIT

_TAG_ESCAPED, _TAG_SAME_UUID, _TAG_DELETED, _TAG_LAST = 1, 2, 4, 8
_CHECKSUM_NONE, _CHECKSUM_CRC32 = 0, 1
_FAST_COMMIT_BLOCKS_DEFAULT: Final = 256
_FAST_COMMIT_HEAD: Final = struct.Struct("<HHII")
_FAST_COMMIT_HEAD_TAG: Final = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """A filesystem's disk with its journal applied, and what to say about it."""

    disk: Disk
    caveats: tuple[str, ...]


class JournalDisk:
    """A disk on which some blocks are read from their copies in the journal."""

    def __init__(self, disk: Disk, *, block_size: int, copies: dict[int, int]) -> None:
        """Make one; `copies` maps a block to the copy's block, as `~block` if it is escaped."""
        self._disk = disk
        self._block_size = block_size
        self._copies = copies
        self._sorted: list[int] | None = None

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self._disk.size

    def pread(self, *, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`."""
        block_size, copies = self._block_size, self._copies
        first, end = offset // block_size, -(-(offset + length) // block_size)
        journalled = [block for block in range(first, end) if block in copies]
        if not journalled:
            return read_exactly(self._disk, offset=offset, length=length)
        data = bytearray(read_exactly(self._disk, offset=offset, length=length))
        for block in journalled:
            start = block * block_size
            begin, stop = max(start, offset), min(start + block_size, offset + length)
            copy = self._copy(copies[block])
            data[begin - offset : stop - offset] = copy[begin - start : stop - start]
        return bytes(data)

    def journalled(self, start: int, end: int) -> list[Extent]:
        """Return the parts of `[start, end)` that are read from copies, block by block."""
        if self._sorted is None:
            self._sorted = sorted(self._copies)
        block_size = self._block_size
        first = bisect_left(self._sorted, start // block_size)
        last = bisect_left(self._sorted, -(-end // block_size))
        return [
            (max(start, block * block_size), min(end, (block + 1) * block_size))
            for block in self._sorted[first:last]
        ]

    def _copy(self, place: int) -> bytes:
        is_escaped = place < 0
        start = (~place if is_escaped else place) * self._block_size
        copy = read_exactly(self._disk, offset=start, length=self._block_size)
        return _MAGIC_BYTES + copy[4:] if is_escaped else copy


def apply_journal(disk: Disk, superblock: Superblock) -> Overlay:
    """Return the disk as the filesystem's own replay would leave it.

    Raise `UnresolvedError` if the journal is elsewhere, damaged, or holds what is not understood.
    """
    needs_replay = Incompat.RECOVER in superblock.incompat
    if superblock.journal_inode == 0:
        if needs_replay:
            raise UnresolvedError("its journal lies on another device and has not been replayed")
        return Overlay(disk=disk, caveats=())
    log = _Log(disk, superblock)
    if not needs_replay:
        if log.start:
            raise UnresolvedError("its journal is not empty, although its superblock says so")
        return Overlay(disk=disk, caveats=())
    copies = log.replay()
    if not copies:
        return Overlay(disk=disk, caveats=())
    caveat = (
        f"its journal was applied in memory: {log.transaction_count} transactions, "
        f"{len(copies)} blocks"
    )
    overlay = JournalDisk(disk, block_size=superblock.block_size, copies=copies)
    return Overlay(disk=overlay, caveats=(caveat,))


@dataclass(slots=True)
class _Transaction:
    """What a transaction has logged before its commit block was seen."""

    tags: list[tuple[int, int]] = field(default_factory=list)
    """(block, its copy's block, as `~block` if it is escaped)."""
    revoked: list[int] = field(default_factory=list)
    crc: int = 0
    """Of its descriptors and copies, as the oldest kind of checksum has it."""


class _Log:
    """The log inside a journal inode."""

    def __init__(self, disk: Disk, superblock: Superblock) -> None:
        """Find the journal's blocks, read and check its superblock."""
        self._disk = disk
        self._superblock = superblock
        self._block_size = superblock.block_size
        number = superblock.journal_inode
        # The journal inode itself is not journalled while the filesystem is in use.
        place = Groups(disk, superblock).inode_offset(number)
        raw = disk.pread(offset=place, length=superblock.inode_size)
        inode = parse_inode(number, raw, superblock)
        self._runs = BlockMap(disk, superblock).runs(inode)
        self._block_count = _contiguous_bytes(self._runs) // self._block_size
        self.transaction_count = 0
        self._parse_superblock(self._read(0)[:_SUPERBLOCK_BYTES])

    def _parse_superblock(self, raw: bytes) -> None:
        magic, kind, _ = _HEADER.unpack_from(raw)
        block_size, count, first, sequence, start, error = struct.unpack_from(">6I", raw, 12)
        if magic != _MAGIC or kind not in (_SUPERBLOCK_V1, _SUPERBLOCK_V2):
            raise UnresolvedError("its journal has no superblock")
        compat, incompat, ro_compat = struct.unpack_from(">3I", raw, 0x24)
        if kind == _SUPERBLOCK_V1:
            compat = incompat = ro_compat = 0
        if compat & ~_COMPAT_CHECKSUM or incompat & ~_KNOWN or ro_compat:
            raise UnresolvedError("its journal has features that are not understood")
        if incompat & _CSUM_V2 and incompat & _CSUM_V3:
            raise UnresolvedError("its journal says that it has two kinds of checksums")
        self._seed: int | None = None
        if incompat & (_CSUM_V2 | _CSUM_V3):
            covered = raw[:_CHECKSUM_AT] + bytes(4) + raw[_CHECKSUM_AT + 4 :]
            stored = int.from_bytes(raw[_CHECKSUM_AT : _CHECKSUM_AT + 4], "big")
            if raw[0x50] != 4 or ~crc32c(covered) & 0xFFFFFFFF != stored:
                raise UnresolvedError("the checksum of its journal's superblock is wrong")
            self._seed = crc32c(raw[0x30:0x40])
        if error:
            raise UnresolvedError("its journal was stopped by an error; check it with e2fsck")
        if block_size != self._block_size or not 1 <= first < count <= self._block_count:
            raise UnresolvedError("its journal's superblock contradicts the filesystem's")
        self._end: int = count
        self._fast_commit_start = 0
        if incompat & _FAST_COMMIT:
            fast = int.from_bytes(raw[0x54:0x58], "big") or _FAST_COMMIT_BLOCKS_DEFAULT
            if count - fast < _JOURNAL_BLOCKS_MIN:
                raise UnresolvedError("its journal's fast commits leave no room for others")
            self._end = count - fast
            # One block between the two areas stays unused.
            self._fast_commit_start = self._end + 1
        if start and not first <= start < self._end:
            raise UnresolvedError("its journal starts outside of itself")
        self._has_transaction_checksums = bool(compat & _COMPAT_CHECKSUM) and self._seed is None
        self._incompat = incompat
        self._first: int = first
        self._sequence: int = sequence
        self.start = start
        """Where the oldest transaction begins; 0 if the log is empty."""

    # Replay -----------------------------------------------------------------------------------

    def replay(self) -> dict[int, int]:
        """Return where the last committed copy of each journalled block lies."""
        if self.start == 0:
            self._check_end(self._sequence)
            self._check_fast_commits(self._sequence)
            return {}
        copies: dict[int, tuple[int, int]] = {}
        revoked: dict[int, int] = {}
        for index, transaction in enumerate(self._transactions()):
            self.transaction_count += 1
            for block, copy in transaction.tags:
                copies[block] = (index, copy)
            for block in transaction.revoked:
                revoked[block] = index
            if len(copies) + len(revoked) > _BLOCK_COUNT_MAX:
                raise UnresolvedError(f"its journal holds more than {_BLOCK_COUNT_MAX} blocks")
        # A revoked block stays as it is unless a later transaction logged it anew.
        return {
            block: copy for block, (index, copy) in copies.items() if revoked.get(block, -1) < index
        }

    def _transactions(self) -> Iterator[_Transaction]:
        """Yield the committed transactions, oldest first."""
        transaction = _Transaction()
        sequence = self._sequence
        position = self.start
        read = 0
        while True:
            block = self._read(position)
            magic, kind, number = _HEADER.unpack_from(block)
            if magic != _MAGIC or number != sequence:
                break
            consumed = 1
            if kind == _DESCRIPTOR:
                consumed += self._descriptor(transaction, block, position, sequence)
            elif kind == _REVOKE:
                self._revoke(transaction, block)
            elif kind == _COMMIT:
                self._check_commit(transaction, block)
                yield transaction
                transaction = _Transaction()
                sequence = (sequence + 1) & 0xFFFFFFFF
            else:
                raise self._damaged(f"block {position} is of kind {kind}")
            read += consumed
            if read > self._end - self._first:
                raise self._damaged("it goes round more than once")
            position = self._wrapped(position + consumed)
        self._check_end(sequence)
        self._check_fast_commits(sequence)

    def _check_end(self, sequence: int) -> None:
        """Raise if the log goes on after the transaction before `sequence`, where it seemed to end.

        What is left of earlier rounds has lower numbers, and the transaction that was being written
        has that number and no commit. Anything else says that a block before it is damaged.
        """
        for position, block_start in self._magic_places():
            _, kind, number = _HEADER.unpack(block_start)
            ahead = (number - sequence) & 0xFFFFFFFF
            if 0 < ahead < 1 << 31 or (ahead == 0 and kind == _COMMIT):
                raise self._damaged(
                    f"it seems to end before transaction {sequence}, and block {position} is of "
                    f"transaction {number}"
                )

    def _magic_places(self) -> Iterator[tuple[int, bytes]]:
        """Yield the position and header of every block of the log that begins with the number."""
        size = self._block_size
        for run in self._runs:
            assert run.start is not None
            for begin in range(0, run.length, _PIECE_BYTES):
                length = min(_PIECE_BYTES, run.length - begin)
                piece = self._disk.pread(offset=run.start + begin, length=length)
                at = piece.find(_MAGIC_BYTES)
                while at >= 0:
                    position, within = divmod(run.offset + begin + at, size)
                    if within == 0 and self._first <= position < self._end:
                        yield position, piece[at : at + _HEADER.size]
                    at = piece.find(_MAGIC_BYTES, at + 1)

    def _descriptor(
        self, transaction: _Transaction, block: bytes, position: int, sequence: int
    ) -> int:
        """Take in the copies that a descriptor block announces; return how many follow it."""
        self._check_tail(block, position)
        self._sum_up(transaction, block)
        count = 0
        for target, flags, checksum in self._tags(block, position):
            count += 1
            place = self._wrapped(position + count)
            copy = self._read(place)
            self._check_copy(copy, sequence, checksum, place)
            self._sum_up(transaction, copy)
            if not self._superblock.first_data_block <= target < self._superblock.block_count:
                raise self._damaged(f"it has a copy of block {target}, which there is not")
            if flags & _TAG_DELETED:
                continue
            physical = self._place(place) // self._block_size
            transaction.tags.append((target, ~physical if flags & _TAG_ESCAPED else physical))
            if len(transaction.tags) > _BLOCK_COUNT_MAX:
                raise UnresolvedError(f"its journal holds more than {_BLOCK_COUNT_MAX} blocks")
        return count

    def _tags(self, block: bytes, position: int) -> Iterator[tuple[int, int, int]]:
        """Yield (block, flags, checksum) of each tag of a descriptor block."""
        has_high = bool(self._incompat & _BIT64)
        end = len(block) - (4 if self._seed is not None else 0)
        if self._incompat & _CSUM_V3:
            layout, size = struct.Struct(">IIII"), 16
        else:
            layout = struct.Struct(">IHHI" if has_high else ">IHH")
            size = layout.size + (2 if self._incompat & _CSUM_V2 else 0)
        at = _HEADER.size
        while at + size <= end:
            fields = layout.unpack_from(block, at)
            if self._incompat & _CSUM_V3:
                target, flags, high, checksum = fields
            else:
                target, checksum, flags, *rest = fields
                high = rest[0] if rest else 0
            yield target | (high << 32 if has_high else 0), flags, checksum
            at += size + (0 if flags & _TAG_SAME_UUID else 16)
            if flags & _TAG_LAST:
                return
        raise self._damaged(f"the descriptor in block {position} does not end")

    def _revoke(self, transaction: _Transaction, block: bytes) -> None:
        self._check_tail(block, None)
        size = 8 if self._incompat & _BIT64 else 4
        used = int.from_bytes(block[12:16], "big")
        end = len(block) - (4 if self._seed is not None else 0)
        # The journal may not say yet that it has revocations: JBD2 sets that flag in memory with
        # the first one, and writes it when it next moves the tail.
        if not 16 <= used <= end or (used - 16) % size:
            raise self._damaged("it takes back what it does not say")
        for at in range(16, used, size):
            transaction.revoked.append(int.from_bytes(block[at : at + size], "big"))
        if len(transaction.revoked) > _BLOCK_COUNT_MAX:
            raise UnresolvedError(f"its journal holds more than {_BLOCK_COUNT_MAX} blocks")

    # Checksums --------------------------------------------------------------------------------

    def _check_tail(self, block: bytes, position: int | None) -> None:
        if self._seed is None:
            return
        stored = int.from_bytes(block[-4:], "big")
        if ~crc32c(block[:-4] + bytes(4), self._seed) & 0xFFFFFFFF != stored:
            where = "a revocation" if position is None else f"the descriptor in block {position}"
            raise self._damaged(f"the checksum of {where} is wrong")

    def _check_copy(self, copy: bytes, sequence: int, checksum: int, place: int) -> None:
        if self._seed is None:
            return
        found = ~crc32c(copy, crc32c(sequence.to_bytes(4, "big"), self._seed)) & 0xFFFFFFFF
        if self._incompat & _CSUM_V2:
            found &= 0xFFFF
        if found != checksum:
            raise self._damaged(f"the checksum of the copy in block {place} is wrong")

    def _check_commit(self, transaction: _Transaction, block: bytes) -> None:
        stored = int.from_bytes(block[16:20], "big")
        if self._seed is not None:
            covered = block[:16] + bytes(4) + block[20:]
            if ~crc32c(covered, self._seed) & 0xFFFFFFFF != stored:
                raise self._damaged("the checksum of a commit is wrong")
        elif self._has_transaction_checksums:
            kind, size = block[12], block[13]
            is_right = (kind, size) == (_CHECKSUM_CRC32, 4) and stored == _mirrored(transaction.crc)
            # A transaction may be written without: then nothing but zeros is there.
            if not is_right and (kind, size, stored) != (_CHECKSUM_NONE, 0, 0):
                raise self._damaged("the checksum of a transaction is wrong")

    def _sum_up(self, transaction: _Transaction, block: bytes) -> None:
        if self._has_transaction_checksums:
            transaction.crc = zlib.crc32(block.translate(_REVERSED), transaction.crc)

    def _check_fast_commits(self, sequence: int) -> None:
        """Refuse fast commits that replay would go on with after the transaction before `sequence`.

        Those with a number from before the log's own are left over and mean nothing.
        """
        if not self._fast_commit_start:
            return
        block = self._read(self._fast_commit_start)
        tag, _, _, number = _FAST_COMMIT_HEAD.unpack_from(block)
        is_stale = (number - self._sequence) & 0xFFFFFFFF >= 1 << 31
        if tag == _FAST_COMMIT_HEAD_TAG and not is_stale:
            raise UnresolvedError(
                f"its journal holds fast commits after transaction {sequence}, which are not read"
            )

    # Places -----------------------------------------------------------------------------------

    def _wrapped(self, position: int) -> int:
        if position < self._end:
            return position
        if self._fast_commit_start:
            # Kernels have disagreed on where a log with fast commits goes round.
            raise UnresolvedError("its journal goes round, and has fast commits")
        return position - self._end + self._first

    def _place(self, position: int) -> int:
        """Return where a block of the log lies, in bytes."""
        offset = position * self._block_size
        run = self._runs[bisect_right(self._runs, offset, key=lambda run: run.offset) - 1]
        assert run.start is not None
        assert run.offset <= offset < run.offset + run.length
        return run.start + offset - run.offset

    def _read(self, position: int) -> bytes:
        return self._disk.pread(offset=self._place(position), length=self._block_size)

    def _damaged(self, what: str) -> UnresolvedError:
        return UnresolvedError(f"its journal is damaged: {what}")


def _contiguous_bytes(runs: tuple[Run, ...]) -> int:
    """Return how far a file reaches without a hole."""
    position = 0
    for run in runs:
        if run.offset != position or run.start is None or run.is_unwritten:
            break
        position += run.length
    if position == 0:
        raise UnresolvedError("its journal has no blocks")
    return position


_REVERSED: Final = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _mirrored(crc: int) -> int:
    """Return the CRC-32 that takes the highest bit first, given that of bytes with reversed bits.

    The oldest checksums of JBD2 are of that kind, and are not inverted in the end.
    """
    return int(f"{crc ^ 0xFFFFFFFF:032b}"[::-1], 2)
