"""FAT12, FAT16 and FAT32 in their pieces: the boot sector and the table of cluster chains.

Source: Microsoft, "FAT: General Overview of On-Disk Format", 1.03.
"""

import re
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.filesystems.allocation import FREE_RUNS_MAX
from stillblock.selection.filesystems.filesystem import UnresolvedError

FIRST_CLUSTER: Final = 2
_CLUSTERS_MAX: Final = {12: 0xFF4, 16: 0xFFF4, 32: 0x0FFFFFF4}
_FAT12_CLUSTERS_MAX: Final = 4084
_ENTRY_MASKS: Final = {12: 0xFFF, 16: 0xFFFF, 32: 0x0FFFFFFF}
"""The upper four bits of FAT32 are reserved and say nothing."""
_ENTRIES_AT_ONCE: Final = 12 * 1024
"""Even, so that a piece of a FAT12 begins at a byte."""
_PIECES_KEPT: Final = 128
_CONTRADICTS: Final = 1 << 32
"""In place of an entry in which the copies of the table differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableShape:
    """Where the table lies, and how to read it."""

    bits: int
    """Of an entry: 12, 16 or 32."""
    mask: int
    """The bits of them that count."""
    end: int
    """Values from here on end a chain."""
    offset: int
    """In bytes."""
    size: int
    """In bytes, of one copy."""
    copies: int
    cluster_count: int
    """The clusters are numbered from 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BootSector:
    """What the boot sector says; offsets and sizes in bytes."""

    bits: int
    cluster_size: int
    cluster_count: int
    table: TableShape
    root_offset: int
    """FAT12 and FAT16: where the root directory is; it has no clusters."""
    root_size: int
    root_cluster: int
    """FAT32: where the root directory begins."""
    data_offset: int
    size: int
    serial: int
    label: bytes

    def place(self, cluster: int) -> int:
        """Return where a cluster begins."""
        return self.data_offset + (cluster - FIRST_CLUSTER) * self.cluster_size


def parse_boot_sector(sector: bytes) -> BootSector:
    """Return what it says; raise `UnresolvedError` for what cannot be or is not supported."""

    def number(at: int, width: int) -> int:
        return int.from_bytes(sector[at : at + width], "little")

    sector_size, per_cluster, reserved = number(11, 2), sector[13], number(14, 2)
    table_count, root_entries = sector[16], number(17, 2)
    sector_count = number(19, 2) or number(32, 4)
    is_fat32 = not number(22, 2)
    table_sectors = number(22, 2) or number(36, 4)
    if (
        sector[510:512] != b"\x55\xaa"
        or sector_size not in (512, 1024, 2048, 4096)
        or per_cluster not in (1, 2, 4, 8, 16, 32, 64, 128)
        or not reserved
        or table_count not in (1, 2)
        or not table_sectors
        or is_fat32 != (not root_entries)
    ):
        raise UnresolvedError("its FAT boot sector is damaged or of an unknown kind")
    root_sectors = -(-root_entries * 32 // sector_size)
    first_data = reserved + table_count * table_sectors + root_sectors
    cluster_count = (sector_count - first_data) // per_cluster
    bits = 32 if is_fat32 else 12 if cluster_count <= _FAT12_CLUSTERS_MAX else 16
    has_room = table_sectors * sector_size * 8 >= (cluster_count + FIRST_CLUSTER) * bits
    if not 0 < cluster_count <= _CLUSTERS_MAX[bits] or not has_room:
        raise UnresolvedError("its FAT boot sector is damaged: the sizes contradict")
    if is_fat32 and number(42, 2):
        raise UnresolvedError(f"it is FAT32 of version {number(42, 2):#x}, which is not supported")
    if is_fat32 and number(40, 2) & 0x80 and table_count > 1:
        raise UnresolvedError("its FAT is not mirrored, which is not supported")
    extended = 64 if is_fat32 else 36
    has_serial = sector[extended + 2] in (0x28, 0x29)
    return BootSector(
        bits=bits,
        cluster_size=per_cluster * sector_size,
        cluster_count=cluster_count,
        table=TableShape(
            bits=bits,
            mask=_ENTRY_MASKS[bits],
            end=_ENTRY_MASKS[bits] - 7,
            offset=reserved * sector_size,
            size=table_sectors * sector_size,
            copies=table_count,
            cluster_count=cluster_count,
        ),
        root_offset=(first_data - root_sectors) * sector_size,
        root_size=root_entries * 32,
        root_cluster=number(44, 4) if is_fat32 else 0,
        data_offset=first_data * sector_size,
        size=sector_count * sector_size,
        serial=number(extended + 3, 4) if has_serial else 0,
        label=sector[extended + 7 : extended + 18] if sector[extended + 2] == 0x29 else b"",
    )


class Table:
    """The file allocation table: for each cluster the next one of its chain."""

    def __init__(self, disk: Disk, shape: TableShape) -> None:
        self._disk = disk
        self._shape = shape
        self._pieces: dict[int, array[int]] = {}
        self._end = FIRST_CLUSTER + shape.cluster_count

    def chain(self, first: int) -> Iterator[tuple[int, int]]:
        """Yield a chain as runs of consecutive clusters: the first one and how many.

        Raise `UnresolvedError` where it leaves the filesystem, meets a free or bad cluster or the
        copies of the table differ, and when it is longer than the filesystem: a loop.
        """
        begin, length = first, 0
        left = self._shape.cluster_count
        cluster = first
        while True:
            if not FIRST_CLUSTER <= cluster < self._end:
                raise UnresolvedError(f"a chain of clusters leads to {cluster:#x}: it is damaged")
            if not left:
                raise UnresolvedError("a chain of clusters is a loop: it is damaged")
            left -= 1
            if cluster == begin + length:
                length += 1
            else:
                yield begin, length
                begin, length = cluster, 1
            following = self._entry(cluster)
            if following >= self._shape.end:
                if following == _CONTRADICTS:
                    raise UnresolvedError(f"the copies of the FAT differ at cluster {cluster}")
                yield begin, length
                return
            cluster = following

    def free_runs(self) -> list[tuple[int, int]]:
        """Return the half-open runs of clusters that every copy of the table says are free."""
        runs: list[tuple[int, int]] = []
        for first in range(0, self._end, _ENTRIES_AT_ONCE):
            piece = self._read_piece(first)
            is_used = bytes([entry != 0 for entry in piece]) if any(piece) else bytes(len(piece))
            for span in re.finditer(rb"\x00+", is_used):
                begin = max(first + span.start(), FIRST_CLUSTER)
                end = first + span.end()
                if runs and runs[-1][1] == begin:
                    runs[-1] = runs[-1][0], end
                elif begin < end:
                    runs.append((begin, end))
            if len(runs) > FREE_RUNS_MAX:
                raise UnresolvedError(
                    f"its free space is in more than {FREE_RUNS_MAX} pieces, too many to tell"
                )
        return runs

    def _entry(self, cluster: int) -> int:
        first = cluster - cluster % _ENTRIES_AT_ONCE
        piece = self._pieces.get(first)
        if piece is None:
            piece = self._read_piece(first)
            self._pieces[first] = piece
            if len(self._pieces) > _PIECES_KEPT:
                del self._pieces[next(iter(self._pieces))]
        return piece[cluster - first]

    def _read_piece(self, first: int) -> "array[int]":
        """Return the entries from `first`, the same in all copies or `_CONTRADICTS`."""
        shape = self._shape
        count = min(_ENTRIES_AT_ONCE, self._end - first)
        copies = [
            read_exactly(
                self._disk,
                offset=shape.offset + copy * shape.size + first * shape.bits // 8,
                length=-(-count * shape.bits // 8),
            )
            for copy in range(shape.copies)
        ]
        if not any(copy.strip(b"\0") for copy in copies):
            # Most of most tables: all free.
            return array("Q", bytes(8 * count))
        entries = self._decode(copies[0], count)
        if any(copy != copies[0] for copy in copies[1:]):
            for copy in copies[1:]:
                other = self._decode(copy, count)
                for index, entry in enumerate(other):
                    if entry != entries[index]:
                        entries[index] = _CONTRADICTS
        return entries

    def _decode(self, data: bytes, count: int) -> "array[int]":
        match self._shape.bits:
            case 12:
                data += bytes(-len(data) % 3)
                values = [
                    (
                        data[index] | (data[index + 1] & 15) << 8
                        if half == 0
                        else data[index + 1] >> 4 | data[index + 2] << 4
                    )
                    for index in range(0, len(data), 3)
                    for half in (0, 1)
                ][:count]
            case 16:
                values = [value for (value,) in struct.iter_unpack("<H", data)]
            case _:
                mask = self._shape.mask
                values = [value & mask for (value,) in struct.iter_unpack("<I", data)]
        return array("Q", values)
