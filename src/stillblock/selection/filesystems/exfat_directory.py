"""exFAT in its pieces: the boot region and the entries of directories.

Source: Microsoft, "exFAT file system specification", revision 1.00.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Final, NamedTuple

from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.filesystems.dos_time import seconds_of
from stillblock.selection.filesystems.fat_table import FIRST_CLUSTER, TableShape
from stillblock.selection.filesystems.filesystem import UnresolvedError
from stillblock.selection.filesystems.names import checked_name, text_of_utf16

ENTRY_BYTES: Final = 32
_IN_USE: Final = 0x80
BITMAP, _UPCASE, LABEL, FILE = 0x81, 0x82, 0x83, 0x85
_STREAM, _NAME = 0xC0, 0xC1
_CRITICAL_PRIMARIES: Final = range(0x80, 0xA0)
_SECONDARIES: Final = range(0xC0, 0x100)
_CRITICAL_SECONDARIES: Final = range(0xC0, 0xE0)
_DIRECTORY: Final = 0x10
HAS_CLUSTERS, IS_CONTIGUOUS = 1, 2

_BOOT: Final = Struct("<QQIIIIIIHHBBB")
_BOOT_SECTORS: Final = 12
_BOOT_UNSUMMED: Final = (106, 107, 112)
"""Flags and the percentage in use change without a new checksum."""
_ACTIVE_SECOND: Final = 1
_STREAM_ENTRY: Final = Struct("<BBxBHxxQ4xIQ")
_LABEL_CHARACTERS_MAX: Final = 11
_NAME_PART: Final = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class BootRegion:
    """What the boot sector says; offsets and sizes in bytes."""

    cluster_size: int
    cluster_count: int
    table: TableShape
    heap_offset: int
    """Where the first cluster, number 2, is."""
    root_cluster: int
    serial: int
    size: int

    def place(self, cluster: int) -> int:
        """Return where a cluster begins."""
        return self.heap_offset + (cluster - FIRST_CLUSTER) * self.cluster_size


def read_boot_region(disk: Disk) -> BootRegion:
    """Return what the main boot region says, its checksum verified."""
    sector = read_exactly(disk, offset=0, length=512)
    (
        _, sector_count, table_at, table_sectors, heap_at, cluster_count, root, serial,
        revision, flags, sector_shift, cluster_shift, tables,
    ) = _BOOT.unpack_from(sector, 64)  # fmt: skip
    if sector[510:512] != b"\x55\xaa" or any(sector[11:64]) or not 9 <= sector_shift <= 12:
        raise UnresolvedError("its exFAT boot sector is damaged or of an unknown kind")
    sector_size = 1 << sector_shift
    if disk.size < _BOOT_SECTORS * sector_size:
        raise UnresolvedError("it is too small for exFAT")
    region = read_exactly(disk, offset=0, length=_BOOT_SECTORS * sector_size)
    summed, sums = region[:-sector_size], region[-sector_size:]
    if sums != _boot_checksum(summed).to_bytes(4, "little") * (sector_size // 4):
        raise UnresolvedError("the checksum of its boot region is wrong: it is damaged")
    if revision >> 8 != 1:
        raise UnresolvedError(f"it is exFAT {revision >> 8}.{revision & 0xFF}, not supported")
    if tables != 1 or flags & _ACTIVE_SECOND:
        raise UnresolvedError("it is TexFAT, with two tables, which is not supported")
    if (
        cluster_shift > 25 - sector_shift
        or not 0 < cluster_count <= 0xFFFFFFF5
        or table_at < 24
        or table_at + table_sectors > heap_at
        or table_sectors << sector_shift < (cluster_count + FIRST_CLUSTER) * 4
        or heap_at + (cluster_count << cluster_shift) > sector_count
        or not FIRST_CLUSTER <= root < cluster_count + FIRST_CLUSTER
    ):
        raise UnresolvedError("its exFAT boot sector is damaged: the sizes contradict")
    return BootRegion(
        cluster_size=sector_size << cluster_shift,
        cluster_count=cluster_count,
        table=TableShape(
            bits=32,
            mask=0xFFFFFFFF,
            end=0xFFFFFFFF,
            offset=table_at * sector_size,
            size=table_sectors * sector_size,
            copies=1,
            cluster_count=cluster_count,
        ),
        heap_offset=heap_at * sector_size,
        root_cluster=root,
        serial=serial,
        size=sector_count * sector_size,
    )


def _boot_checksum(data: bytes) -> int:
    checksum = 0
    for index, byte in enumerate(data):
        if index not in _BOOT_UNSUMMED:
            checksum = ((checksum << 31 | checksum >> 1) + byte) & 0xFFFFFFFF
    return checksum


class Allocation(NamedTuple):
    """Clusters that a directory entry gives to something."""

    cluster: int
    """0 if there are none."""
    length: int
    """In bytes."""
    is_contiguous: bool
    """The table says nothing of these clusters: they follow each other."""


class Item(NamedTuple):
    """A file or directory, or what the system keeps in clusters."""

    kind: int
    """Type of its first entry; `FILE` for files and directories."""
    name: str
    place: int
    """Where its stream entry lies, which alone says where its data is."""
    is_directory: bool
    data: Allocation
    valid_length: int
    modified_ns: int
    others: tuple[Allocation, ...]
    """What belongs to it and is no data: a vendor's."""


def parse_stream(raw: bytes) -> tuple[Allocation, int]:
    """Return where a file's data lies and how much of it was written, from its stream entry."""
    kind, flags, _, _, valid, cluster, length = _STREAM_ENTRY.unpack(raw)
    has_data = bool(cluster)
    if (
        kind != _STREAM
        or valid > length
        or has_data != bool(length)
        or (has_data and not flags & HAS_CLUSTERS)
        or flags & ~(HAS_CLUSTERS | IS_CONTIGUOUS)
    ):
        raise UnresolvedError("a directory has a damaged stream entry")
    return Allocation(cluster, length, bool(flags & IS_CONTIGUOUS)), valid


def _allocation(raw: bytes) -> Allocation:
    """Return the clusters of an entry that has them where all such entries do."""
    cluster = int.from_bytes(raw[20:24], "little")
    length = int.from_bytes(raw[24:32], "little")
    return Allocation(cluster, length, is_contiguous=False)


def parse_directory(slots: Iterable[tuple[int, bytes]]) -> Iterator[Item]:
    """Yield what a directory's slots hold, each with its place on the disk.

    Raise `UnresolvedError` for what is not understood and not said to be harmless.
    """
    following = iter(slots)
    for place, raw in following:
        kind = raw[0]
        if kind == 0:
            return
        if not kind & _IN_USE:
            continue
        if kind == FILE:
            yield _parse_file(raw, following)
        elif kind in (BITMAP, _UPCASE):
            data = _allocation(raw)
            if kind == BITMAP and raw[1] & 1:
                raise UnresolvedError("it is TexFAT, with two bitmaps, which is not supported")
            yield Item(kind, "", place, False, data, data.length, 0, ())
        elif kind == LABEL:
            length = min(raw[1], _LABEL_CHARACTERS_MAX)
            label = text_of_utf16(raw[2 : 2 + 2 * length])
            yield Item(kind, label, place, False, Allocation(0, 0, False), 0, 0, ())
        elif kind in _CRITICAL_PRIMARIES or kind in _SECONDARIES:
            raise UnresolvedError(f"a directory has an entry of unknown type {kind:#x}")
        else:
            # A benign primary entry, such as the volume's GUID, with what belongs to it.
            for _ in range(raw[1] if kind != 0xA0 else 0):
                if next(following, (0, b"\0"))[1][0] not in _SECONDARIES:
                    raise UnresolvedError("a directory has an incomplete entry: it is damaged")


def _parse_file(primary: bytes, following: Iterator[tuple[int, bytes]]) -> Item:
    count = primary[1]
    entries = [entry for _, entry in zip(range(count), following, strict=False)]
    whole = primary + b"".join(raw for _, raw in entries)
    if count < 2 or len(entries) != count or _set_checksum(whole) != _stored_checksum(primary):
        raise UnresolvedError("a directory has a file entry with a wrong checksum: it is damaged")
    place, stream = entries[0]
    data, valid = parse_stream(stream)
    name_length = stream[3]
    name = b""
    others: list[Allocation] = []
    for _, raw in entries[1:]:
        if raw[0] == _NAME and not others:
            name += raw[2 : 2 + _NAME_PART]
        elif raw[0] in _CRITICAL_SECONDARIES or raw[0] not in _SECONDARIES:
            raise UnresolvedError(f"a file has an entry of unknown type {raw[0]:#x}")
        elif raw[1] & HAS_CLUSTERS:
            other = _allocation(raw)
            others.append(other._replace(is_contiguous=bool(raw[1] & IS_CONTIGUOUS)))
    if not name_length or not 2 * name_length <= len(name) < 2 * name_length + _NAME_PART:
        raise UnresolvedError("a directory has a file with a damaged name")
    return Item(
        kind=FILE,
        name=checked_name(text_of_utf16(name[: 2 * name_length])),
        place=place,
        is_directory=bool(primary[4] & _DIRECTORY),
        data=data,
        valid_length=valid,
        modified_ns=_modified_ns(primary),
        others=tuple(others),
    )


def _stored_checksum(primary: bytes) -> int:
    return int.from_bytes(primary[2:4], "little")


def _set_checksum(entries: bytes) -> int:
    checksum = 0
    for byte in entries[:2] + entries[4:]:
        checksum = ((checksum << 15 | checksum >> 1) + byte) & 0xFFFF
    return checksum


def _modified_ns(primary: bytes) -> int:
    """Return the time of the last change; local time is taken for UTC where no zone is given."""
    seconds = seconds_of(int.from_bytes(primary[12:16], "little"))
    if seconds is None:
        return 0
    zone = primary[23]
    quarters = (zone & 0x7F) - (0x80 if zone & 0x40 else 0) if zone & 0x80 else 0
    seconds -= quarters * 15 * 60
    return seconds * 1_000_000_000 + min(primary[21], 199) * 10_000_000
