"""Master boot records and extended (logical) partitions.

The primary table is the legacy MBR of the UEFI specification 2.10, section 5.2.1: four entries of
16 bytes at offset 446, a signature at 510. Extended partitions have no standard of their own. What
Linux, Windows and DOS agree on is read here: each extended boot record (EBR) looks like an MBR, one
entry is a logical partition relative to the EBR itself, another links to the next EBR relative to
the start of the whole extended partition.

Sector 0 is whatever a guest wrote there: loops, lengths and counts are bounded, and a boot sector
of a filesystem, which ends in the same two bytes, is not taken for a table.
"""

import struct
from dataclasses import dataclass
from typing import Final

from stillblock.model import format_size
from stillblock.selection.disk import SECTOR_SIZES, Disk, read_exactly
from stillblock.selection.partition_table import (
    Partition,
    PartitionTable,
    PartitionTableError,
    refuse_overlaps,
    refuse_past_end,
)
from stillblock.selection.partition_types import (
    MBR_EXTENDED_CODES,
    MBR_PROTECTIVE_CODE,
    mbr_type,
)

BOOT_RECORD_BYTES: Final = 512
"""An MBR or EBR fills 512 bytes whatever the sector size."""
LOGICAL_COUNT_MAX: Final = 256
"""EBRs followed before the chain is refused: Linux numbers at most 256 partitions a disk."""

_SIGNATURE: Final = b"\x55\xaa"
_SIGNATURE_OFFSET: Final = 510
_DISK_SIGNATURE_OFFSET: Final = 440
_TABLE_OFFSET: Final = 446
_ENTRY: Final = struct.Struct("<B3sB3sII")
_STATUS_INACTIVE: Final = 0x00
_STATUS_ACTIVE: Final = 0x80
_FIRST_LOGICAL_NUMBER: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One 16-byte record, in sectors, as it stands on the disk."""

    slot: int
    status: int
    type: int
    start_sector: int
    sector_count: int

    @property
    def is_used(self) -> bool:
        """Whether the slot describes something."""
        return self.type != 0 and self.sector_count > 0

    @property
    def is_extended(self) -> bool:
        """Whether it holds logical partitions."""
        return self.is_used and self.type in MBR_EXTENDED_CODES


def parse_boot_record(record: bytes) -> tuple[Entry, ...] | None:
    """Return the four entries, or None if these 512 bytes cannot be a partition table."""
    assert len(record) == BOOT_RECORD_BYTES
    if record[_SIGNATURE_OFFSET:] != _SIGNATURE:
        return None
    entries = tuple(
        Entry(slot=slot, status=status, type=code, start_sector=start, sector_count=count)
        for slot, (status, _, code, _, start, count) in enumerate(
            _ENTRY.iter_unpack(record[_TABLE_OFFSET:_SIGNATURE_OFFSET])
        )
    )
    if any(entry.status not in (_STATUS_INACTIVE, _STATUS_ACTIVE) for entry in entries):
        return None
    if any(entry.is_used and entry.start_sector == 0 for entry in entries):
        return None
    return entries


def is_protective(entries: tuple[Entry, ...]) -> bool:
    """Whether an entry says that the disk has a GPT (UEFI 2.10, section 5.2.3)."""
    return any(entry.type == MBR_PROTECTIVE_CODE for entry in entries)


def is_hybrid(entries: tuple[Entry, ...]) -> bool:
    """Whether a protective MBR lists partitions of its own too."""
    return is_protective(entries) and any(
        entry.is_used and entry.type != MBR_PROTECTIVE_CODE for entry in entries
    )


def is_filesystem_boot_sector(record: bytes) -> bool:
    """Whether sector 0 is that of a FAT, exFAT or NTFS filesystem.

    Their boot sectors begin with a jump and describe the filesystem in the next bytes (Microsoft
    FAT specification, section 3.1; exFAT specification, section 3.1).
    """
    is_jump = record[0] == 0xE9 or (record[0] == 0xEB and record[2] == 0x90)
    if not is_jump:
        return False
    if record[3:11] in (b"NTFS    ", b"EXFAT   "):
        return True
    sector_bytes, cluster_sectors, reserved_sectors, fat_count = struct.unpack_from(
        "<HBHB", record, 11
    )
    media = record[21]
    return (
        sector_bytes in (512, 1024, 2048, 4096)
        and cluster_sectors.bit_count() == 1
        and reserved_sectors > 0
        and fat_count in (1, 2)
        and (media == 0xF0 or media >= 0xF8)
    )


def read_mbr(disk: Disk, record: bytes, entries: tuple[Entry, ...]) -> PartitionTable | None:
    """Return the table of a disk without GPT, or None if sector 0 belongs to a filesystem.

    Raise `PartitionTableError` if it is a table and cannot be right.
    """
    used = tuple(entry for entry in entries if entry.is_used)
    is_filesystem = is_filesystem_boot_sector(record)
    if is_filesystem and not used:
        return None
    signature = int.from_bytes(record[_DISK_SIGNATURE_OFFSET:][:4], "little")
    disk_id = f"{signature:08x}" if signature else ""
    sector_size = _sector_size(disk, used)
    try:
        primary = tuple(
            _partition(entry, number=entry.slot + 1, base=0, unit=sector_size, disk_id=disk_id)
            for entry in used
        )
        for partition in primary:
            refuse_past_end(partition, disk_size=disk.size)
        refuse_overlaps(primary)
    except PartitionTableError:
        # Boot code can look like entries by chance; entries that fit nowhere do not outweigh a
        # filesystem's description of itself.
        if is_filesystem:
            return None
        raise
    notes = _sector_size_notes(primary, sector_size=sector_size, disk_size=disk.size)
    notes += tuple(
        f"slot {entry.slot + 1} of the MBR has a size but type 0, unused: its bytes count as "
        "unpartitioned"
        for entry in entries
        if entry.type == 0 and entry.sector_count > 0
    )
    logical: tuple[Partition, ...] = ()
    containers = tuple(partition for partition in primary if partition.is_container)
    if len(containers) > 1:
        raise PartitionTableError(
            f"{containers[0].label} and {containers[1].label} are both extended partitions; "
            "a disk has one",
            hint="correct the table, or say what to keep in bytes",
        )
    if containers:
        logical, more = _read_logical(disk, containers[0], unit=sector_size, disk_id=disk_id)
        notes += more
    return PartitionTable(
        kind="mbr",
        sector_size=sector_size,
        disk_id=disk_id,
        partitions=primary + logical,
        notes=notes,
    )


def _partition(
    entry: Entry, *, number: int, base: int, unit: int, disk_id: str, flags: tuple[str, ...] = ()
) -> Partition:
    start = base + entry.start_sector * unit
    if entry.is_extended:
        flags += ("extended",)
    if entry.status == _STATUS_ACTIVE:
        flags += ("active",)
    return Partition(
        number=number,
        start=start,
        end=start + entry.sector_count * unit,
        type=mbr_type(entry.type),
        uuid=f"{disk_id}-{number:02x}" if disk_id else "",
        flags=flags,
    )


def _sector_size(disk: Disk, used: tuple[Entry, ...]) -> int:
    """Return the unit of the table. An MBR does not say it; where its first EBR lies does."""
    for entry in used:
        if not entry.is_extended:
            continue
        for unit in SECTOR_SIZES:
            offset = entry.start_sector * unit
            if offset + BOOT_RECORD_BYTES <= disk.size and parse_boot_record(
                read_exactly(disk, offset=offset, length=BOOT_RECORD_BYTES)
            ):
                return unit
    return SECTOR_SIZES[0]


def _sector_size_notes(
    primary: tuple[Partition, ...], *, sector_size: int, disk_size: int
) -> tuple[str, ...]:
    """Say so where 4096-byte sectors would fit as well as 512: the table itself cannot tell."""
    has_logical = any(partition.is_container for partition in primary)
    ratio = SECTOR_SIZES[-1] // sector_size
    last_end = max((partition.end for partition in primary), default=disk_size)
    if has_logical or ratio == 1 or last_end * ratio > disk_size:
        return ()
    note = (
        f"the MBR is read in sectors of {sector_size} bytes; if this disk has sectors of "
        f"{SECTOR_SIZES[-1]}, its partitions are elsewhere: say them in bytes"
    )
    return (note,)


def _read_logical(
    disk: Disk, container: Partition, *, unit: int, disk_id: str
) -> tuple[tuple[Partition, ...], tuple[str, ...]]:
    """Follow the chain of EBRs; return the logical partitions, and notes."""
    found: list[Partition] = []
    records: list[tuple[int, int]] = []
    seen: set[int] = set()
    offset: int | None = container.start
    while offset is not None:
        if len(seen) >= LOGICAL_COUNT_MAX:
            raise _chain_error(container, f"it has more than {LOGICAL_COUNT_MAX} records")
        if offset in seen:
            raise _chain_error(container, f"it comes back to byte {offset}")
        if not container.start <= offset <= container.end - BOOT_RECORD_BYTES:
            raise _chain_error(container, f"it leads to byte {offset}, outside")
        seen.add(offset)
        records.append((offset, offset + BOOT_RECORD_BYTES))
        record = read_exactly(disk, offset=offset, length=BOOT_RECORD_BYTES)
        if offset == container.start and not any(record):
            return (), (f"{container.label} is empty: its first record was never written",)
        entries = parse_boot_record(record)
        if entries is None:
            raise _chain_error(container, f"there is no record at byte {offset}")
        links = [entry for entry in entries if entry.is_extended]
        data = [entry for entry in entries if entry.is_used and not entry.is_extended]
        if len(links) > 1 or len(data) > 1:
            raise _chain_error(
                container,
                f"the record at byte {offset} has {len(data)} partitions and "
                f"{len(links)} links, at most one of each is possible",
            )
        for entry in data:
            partition = _partition(
                entry,
                number=_FIRST_LOGICAL_NUMBER + len(found),
                base=offset,
                unit=unit,
                disk_id=disk_id,
                flags=("logical",),
            )
            if partition.end > container.end:
                raise _chain_error(
                    container, f"{partition.label} ends at byte {partition.end}, outside"
                )
            found.append(partition)
        offset = container.start + links[0].start_sector * unit if links else None
    logical = tuple(found)
    refuse_overlaps(logical)
    _refuse_covered_records(container, logical, records)
    return logical, ()


def _refuse_covered_records(
    container: Partition, logical: tuple[Partition, ...], records: list[tuple[int, int]]
) -> None:
    """Raise if a partition covers an EBR: leaving it out would leave out the table."""
    for partition in logical:
        for start, end in records:
            if partition.start < end and start < partition.end:
                raise _chain_error(
                    container, f"{partition.label} covers the record at byte {start}"
                )


def _chain_error(container: Partition, what: str) -> PartitionTableError:
    return PartitionTableError(
        f"the chain of logical partitions in {container.label} (bytes {container.start}-"
        f"{container.end}, {format_size(container.end - container.start)}) is damaged: {what}",
        hint="correct the table, or say what to keep in bytes",
    )
