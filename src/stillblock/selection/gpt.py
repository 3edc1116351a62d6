"""GUID partition tables: UEFI specification 2.10, section 5.3.

Layout, in logical blocks: a protective MBR in 0, the primary header in 1, its entries usually from
2; the backup entries and, in the very last block, the backup header. Headers and entries carry
CRC32. All of it is what a guest wrote: sizes and counts are bounded before anything is read.
"""

import struct
import uuid
import zlib
from dataclasses import dataclass
from typing import Final

from stillblock.selection.disk import SECTOR_SIZES, Disk, read_exactly
from stillblock.selection.partition_table import (
    Partition,
    PartitionTable,
    PartitionTableError,
    refuse_overlaps,
    refuse_past_end,
)

ENTRY_COUNT_MAX: Final = 1024
"""Entries read: tables have 128; Linux numbers at most 256 partitions a disk."""
ENTRY_BYTES_MAX: Final = 4096
"""Bytes an entry may have: the specification says 128 times a power of two; all tables use 128."""

_SIGNATURE: Final = b"EFI PART"
_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
_HEADER_CRC_OFFSET: Final = 16
_REVISION_MAJOR: Final = 1
_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
_NO_GUID: Final = bytes(16)
_ATTRIBUTES: Final = ((0, "required"), (1, "no-block-io"), (2, "legacy-boot"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A header whose CRC is right and whose fields lie on the disk; entries checked too."""

    sector_size: int
    alternate_lba: int
    first_usable_lba: int
    last_usable_lba: int
    disk_guid: bytes
    entries: bytes
    entry_bytes: int

    def says_the_same_as(self, other: "Header") -> bool:
        """Whether two headers describe the same partitions."""
        return (
            self.disk_guid == other.disk_guid
            and self.entry_bytes == other.entry_bytes
            and self.entries == other.entries
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Why a place has no usable header. `is_header` false: nothing there claims to be one."""

    is_header: bool
    reason: str


def read_gpt(disk: Disk) -> PartitionTable:
    """Return the table of a disk whose MBR is protective.

    A damaged primary is replaced by the backup, with a note. Raise `PartitionTableError` if neither
    is whole, or if what they say cannot be right.
    """
    header, notes = _choose_header(disk)
    partitions: list[Partition] = []
    for index in range(len(header.entries) // header.entry_bytes):
        partition, more = _parse_entry(header, index=index)
        if partition is None:
            continue
        refuse_past_end(partition, disk_size=disk.size)
        partitions.append(partition)
        notes += more
    table = tuple(partitions)
    refuse_overlaps(table)
    return PartitionTable(
        kind="gpt",
        sector_size=header.sector_size,
        disk_id=_guid(header.disk_guid),
        partitions=table,
        notes=notes,
    )


def has_primary_header(disk: Disk) -> bool:
    """Whether a whole primary header stands where one belongs."""
    return any(
        isinstance(_read_header(disk, sector_size=sector_size, lba=1), Header)
        for sector_size in SECTOR_SIZES
    )


def _choose_header(disk: Disk) -> tuple[Header, tuple[str, ...]]:
    primaries = {size: _read_header(disk, sector_size=size, lba=1) for size in SECTOR_SIZES}
    found = [header for header in primaries.values() if isinstance(header, Header)]
    if len(found) > 1:
        raise PartitionTableError(
            "there are two whole GPT headers, one for sectors of 512 bytes and one for 4096, and "
            "nothing tells which one is meant",
            hint="erase the stale one, or say what to keep in bytes",
        )
    if found:
        return found[0], _backup_notes(disk, found[0])

    backups = {
        size: _read_header(disk, sector_size=size, lba=_last_lba(disk, size))
        for size in SECTOR_SIZES
    }
    found = [header for header in backups.values() if isinstance(header, Header)]
    if len(found) == 1:
        damage = primaries[found[0].sector_size]
        assert isinstance(damage, Damage)
        note = (
            f"the primary GPT is damaged ({damage.reason}); the backup at the end of the disk was "
            "used: repair the table"
        )
        return found[0], (note,)
    reasons = [
        f"{place} ({size}-byte sectors): {damage.reason}"
        for place, damages in (("primary", primaries), ("backup", backups))
        for size, damage in damages.items()
        if isinstance(damage, Damage) and damage.is_header
    ]
    raise PartitionTableError(
        "the protective MBR says that there is a GPT, but no header of it is whole: "
        + ("; ".join(reasons) or "none is found at the start or at the end of the disk"),
        hint="repair the table, restore the missing end, or say what to keep in bytes",
    )


def _backup_notes(disk: Disk, primary: Header) -> tuple[str, ...]:
    backup = _read_header(disk, sector_size=primary.sector_size, lba=primary.alternate_lba)
    if isinstance(backup, Damage):
        return (f"the backup GPT is not usable ({backup.reason}); the primary was used",)
    if not primary.says_the_same_as(backup):
        return ("the backup GPT says something else than the primary, which was used",)
    if primary.alternate_lba != _last_lba(disk, primary.sector_size):
        return ("the backup GPT is not at the end of the disk: the disk was grown",)
    return ()


def _read_header(disk: Disk, *, sector_size: int, lba: int) -> Header | Damage:
    """Read the header at a block with its entries, and check it as section 5.3.2 demands."""
    last_lba = _last_lba(disk, sector_size)
    if not 1 <= lba <= last_lba:
        return Damage(is_header=False, reason=f"block {lba} is not on the disk")
    block = read_exactly(disk, offset=lba * sector_size, length=sector_size)
    (
        signature,
        revision,
        header_bytes,
        header_crc,
        _reserved,
        my_lba,
        alternate_lba,
        first_usable_lba,
        last_usable_lba,
        disk_guid,
        entries_lba,
        entry_count,
        entry_bytes,
        entries_crc,
    ) = _HEADER.unpack_from(block)
    if signature != _SIGNATURE:
        return Damage(is_header=False, reason="its signature is missing")
    if not _HEADER.size <= header_bytes <= sector_size:
        return Damage(is_header=True, reason=f"its header says it has {header_bytes} bytes")
    summed = bytearray(block[:header_bytes])
    summed[_HEADER_CRC_OFFSET : _HEADER_CRC_OFFSET + 4] = bytes(4)
    if zlib.crc32(summed) != header_crc:
        return Damage(is_header=True, reason="its header's CRC is wrong")
    if revision >> 16 != _REVISION_MAJOR:
        return Damage(is_header=True, reason=f"its revision {revision:#010x} is unknown")
    if my_lba != lba:
        return Damage(is_header=True, reason=f"its header is from block {my_lba}, not {lba}")
    if not first_usable_lba <= last_usable_lba <= last_lba:
        return Damage(
            is_header=True,
            reason=(
                f"its blocks {first_usable_lba} to {last_usable_lba} are not on this disk, whose "
                f"last is {last_lba}"
            ),
        )
    is_entry_size = 128 <= entry_bytes <= ENTRY_BYTES_MAX and entry_bytes.bit_count() == 1
    if not is_entry_size or entry_count > ENTRY_COUNT_MAX:
        return Damage(
            is_header=True,
            reason=(
                f"it has {entry_count} entries of {entry_bytes} bytes; at most {ENTRY_COUNT_MAX} "
                f"of 128 to {ENTRY_BYTES_MAX} are read"
            ),
        )
    array_bytes = entry_count * entry_bytes
    if entries_lba < 1 or entries_lba * sector_size + array_bytes > disk.size:
        return Damage(is_header=True, reason=f"its entries at block {entries_lba} are not on disk")
    entries = read_exactly(disk, offset=entries_lba * sector_size, length=array_bytes)
    if zlib.crc32(entries) != entries_crc:
        return Damage(is_header=True, reason="its entries' CRC is wrong")
    return Header(
        sector_size=sector_size,
        alternate_lba=alternate_lba,
        first_usable_lba=first_usable_lba,
        last_usable_lba=last_usable_lba,
        disk_guid=disk_guid,
        entries=entries,
        entry_bytes=entry_bytes,
    )


def _parse_entry(header: Header, *, index: int) -> tuple[Partition | None, tuple[str, ...]]:
    """Return the partition in a slot, or None for an unused one, and notes."""
    type_guid, unique_guid, first_lba, last_lba, attributes, name = _ENTRY.unpack_from(
        header.entries, index * header.entry_bytes
    )
    if type_guid == _NO_GUID:
        return None, ()
    number = index + 1
    if first_lba == 0 or last_lba < first_lba:
        raise PartitionTableError(
            f"part:{number} reaches from block {first_lba} to {last_lba}, which cannot be",
            hint="correct the table, or say what to keep in bytes",
        )
    partition = Partition(
        number=number,
        start=first_lba * header.sector_size,
        # EndingLBA is the last block of the partition, not the one after it (table 5-6).
        end=(last_lba + 1) * header.sector_size,
        type=_guid(type_guid),
        name=name.decode("utf-16-le", errors="replace").partition("\0")[0],
        uuid=_guid(unique_guid) if unique_guid != _NO_GUID else "",
        flags=tuple(flag for bit, flag in _ATTRIBUTES if attributes >> bit & 1),
    )
    if header.first_usable_lba <= first_lba and last_lba <= header.last_usable_lba:
        return partition, ()
    note = (
        f"{partition.label} is not within the blocks {header.first_usable_lba} to "
        f"{header.last_usable_lba} that the GPT keeps for partitions"
    )
    return partition, (note,)


def _last_lba(disk: Disk, sector_size: int) -> int:
    return disk.size // sector_size - 1


def _guid(raw: bytes) -> str:
    """Return a GUID as text; its first three fields are little-endian (UEFI 2.10, appendix A)."""
    return str(uuid.UUID(bytes_le=raw))
