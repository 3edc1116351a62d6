"""Which partitions a disk has: GPT or MBR, decided by what sector 0 says.

A table that is damaged or contradicts itself is an error, never a smaller table: a term that relied
on it could leave out what the user meant to keep.
"""

from dataclasses import replace

from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.gpt import has_primary_header, read_gpt
from stillblock.selection.mbr import (
    BOOT_RECORD_BYTES,
    is_hybrid,
    is_protective,
    parse_boot_record,
    read_mbr,
)
from stillblock.selection.partition_table import Partition, PartitionTable, PartitionTableError

__all__ = ["Partition", "PartitionTable", "PartitionTableError", "read_partitions"]


def read_partitions(disk: Disk) -> PartitionTable | None:
    """Return the disk's partition table, or None if it has none.

    None means that sector 0 is no table: blank, or a filesystem on the whole disk. Raise
    `PartitionTableError` if there is one that cannot be relied on. Reads at most some MiB.
    """
    if disk.size < BOOT_RECORD_BYTES:
        return None
    record = read_exactly(disk, offset=0, length=BOOT_RECORD_BYTES)
    entries = parse_boot_record(record)
    if entries is not None and is_protective(entries):
        table = read_gpt(disk)
        if is_hybrid(entries):
            note = "the MBR lists partitions too (a hybrid MBR); the GPT holds"
            return replace(table, notes=(*table.notes, note))
        return table
    table_of_mbr = read_mbr(disk, record, entries) if entries is not None else None
    if not has_primary_header(disk):
        return table_of_mbr
    if table_of_mbr is None:
        raise PartitionTableError(
            "a GPT header is there but no protective MBR in sector 0, without which systems do not "
            "see the partitions",
            hint="repair the table, or say what to keep in bytes",
        )
    note = "a GPT header is there too; without a protective MBR it does not hold"
    return replace(table_of_mbr, notes=(*table_of_mbr.notes, note))
