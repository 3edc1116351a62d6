"""LVM2: which logical volumes lie on the physical volumes of one disk, and where.

Written from the on-disk layout that LVM2 documents in `lib/format_text/layout.h` and that
`vgcfgbackup` shows: label, physical volume header, metadata area header, text, all with checksums.

Only linear volumes are mapped. Whatever else holds or shares extents (snapshots, thin pools,
mirrors, RAID, caches), volumes that reach beyond this disk, and volumes that these are made of are
named with the reason why they are opaque.
"""

import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

from stillblock.model import Extent
from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.lvm_text import (
    TEXT_BYTES_MAX,
    LvmTextError,
    Section,
    Value,
)
from stillblock.selection.partition_table import printable

_SECTOR: Final = 512
"""LVM2 counts in sectors of 512 bytes whatever the disk has."""
_LABEL_SECTORS: Final = 4
_AREA_HEADER_BYTES: Final = 512
_AREA_MAGIC: Final = b" LVM2 x[5A%r0N*>"
_AREAS_MAX: Final = 8
"""Data and metadata areas in a header: LVM2 makes one and at most two."""
_CHECKSUM_START: Final = 0xF597A6CF
_IGNORED: Final = 1
"""Flag of a metadata area that LVM2 does not keep up."""
_SEGMENTS_MAX: Final = 100_000
_PLAIN_STATUS: Final = frozenset(
    {"READ", "WRITE", "VISIBLE", "FIXED_MINOR", "WRITE_LOCKED", "NOTSYNCED"}
)
"""What a volume's status may say without a change of where its data lies."""


ParseText: TypeAlias = Callable[[str], Section]
"""Reads the text of a volume group; raises `LvmTextError`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalVolume:
    """A logical volume: `pieces` on the disk in the volume's order, or the reason for none."""

    group: str
    name: str
    pieces: tuple[Extent, ...]
    opaque_reason: str = ""

    @property
    def full_name(self) -> str:
        """`vg/lv`."""
        return f"{self.group}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhysicalVolume:
    """A stretch of disk with an LVM2 label, read: its own id and what its metadata says."""

    start: int
    """Where it begins on the disk."""
    end: int
    id: str
    text: str | None
    """None: it keeps no copy of the metadata."""


class LvmError(LvmTextError):
    """A label, header or metadata area is damaged or says what LVM2 would not."""


def read_physical_volume(disk: Disk, *, start: int) -> PhysicalVolume:
    """Return what a physical volume says of itself; `start` is where it begins on the whole disk.

    Raise `LvmError` if any part of it fails its checksum or points outside.
    """
    head = read_exactly(disk, offset=0, length=min(_LABEL_SECTORS * _SECTOR, disk.size))
    label = _label(head)
    (offset,) = struct.unpack_from("<I", label, 20)
    if not 32 <= offset <= _SECTOR - 40:
        raise LvmError(f"the LVM2 label says that its header begins at {offset}")
    identity = label[offset : offset + 32]
    cursor = offset + 40
    _, cursor = _areas(label, cursor)
    metadata_areas, _ = _areas(label, cursor)
    texts = [text for area in metadata_areas if (text := _area_text(disk, *area)) is not None]
    # Two copies that differ were left by an update that did not end: neither is known to hold.
    if len(set(texts)) > 1:
        raise LvmError("the two copies of the LVM2 metadata differ")
    return PhysicalVolume(
        start=start,
        end=start + disk.size,
        id=identity.decode("latin-1"),
        text=texts[0] if texts else None,
    )


def _label(head: bytes) -> bytes:
    for index in range(len(head) // _SECTOR):
        sector = head[index * _SECTOR : (index + 1) * _SECTOR]
        if sector[:8] != b"LABELONE":
            continue
        number, crc = struct.unpack_from("<QI", sector, 8)
        if number != index or crc != _checksum(sector[20:]) or sector[24:32] != b"LVM2 001":
            raise LvmError("the LVM2 label is damaged")
        return sector
    raise LvmError("there is no LVM2 label")


def _areas(label: bytes, cursor: int) -> tuple[list[tuple[int, int]], int]:
    """Return a list of (offset, length) up to its zero, and where the next one begins."""
    areas: list[tuple[int, int]] = []
    while cursor + 16 <= len(label) and len(areas) <= _AREAS_MAX:
        offset, length = struct.unpack_from("<QQ", label, cursor)
        cursor += 16
        if offset == 0:
            return areas, cursor
        areas.append((offset, length))
    raise LvmError("the LVM2 header lists areas without an end")


def _area_text(disk: Disk, area_offset: int, area_length: int) -> str | None:
    """Return the text in a metadata area, which is a ring behind its header."""
    if area_length < 2 * _AREA_HEADER_BYTES or area_offset + area_length > disk.size:
        raise LvmError("the LVM2 metadata area does not lie on its physical volume")
    header = read_exactly(disk, offset=area_offset, length=_AREA_HEADER_BYTES)
    crc, magic, version, start, length = struct.unpack_from("<I16sIQQ", header)
    if crc != _checksum(header[4:]) or magic != _AREA_MAGIC or version != 1:
        raise LvmError("the header of the LVM2 metadata area is damaged")
    if (start, length) != (area_offset, area_length):
        raise LvmError("the LVM2 metadata area lies elsewhere than it says")
    offset, size, text_crc, flags = struct.unpack_from("<QQII", header, 40)
    if flags & _IGNORED or offset == 0:
        return None
    ring = area_length - _AREA_HEADER_BYTES
    if not _AREA_HEADER_BYTES <= offset < area_length or not 0 < size <= min(ring, TEXT_BYTES_MAX):
        raise LvmError("the LVM2 metadata lies outside its area")
    first = min(size, area_length - offset)
    text = read_exactly(disk, offset=area_offset + offset, length=first)
    if first < size:
        rest = area_offset + _AREA_HEADER_BYTES
        text += read_exactly(disk, offset=rest, length=size - first)
    if _checksum(text) != text_crc:
        raise LvmError("the LVM2 metadata fails its checksum")
    return text.decode("utf-8", "surrogateescape")


def _checksum(data: bytes) -> int:
    """LVM2's: the usual CRC-32 polynomial with another start and no inversions."""
    return zlib.crc32(data, _CHECKSUM_START ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


# Volume groups ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeGroups:
    """What the metadata on physical volumes says of the groups that they belong to."""

    volumes: tuple[LogicalVolume, ...]
    members: dict[str, tuple[Extent, ...]]
    """Where the physical volumes of each group lie, by the group's name."""


def read_groups(volumes: Sequence[PhysicalVolume], *, parse: ParseText) -> VolumeGroups:
    """Return what the groups are made of whose physical volumes these are.

    `parse` reads the text in which a group is described. Raise `LvmTextError` if that cannot be
    read, contradicts itself, or its copies one another: where nothing is known of a group, all of
    its physical volumes are opaque.
    """
    # Most physical volumes of a group hold the same text, and one may be long: read it once.
    texts = dict.fromkeys(volume.text for volume in volumes if volume.text is not None)
    groups = {text: _group(parse(text)) for text in texts}
    return VolumeGroups(
        volumes=_logical_volumes(groups.values(), volumes), members=_members(groups, volumes)
    )


def _logical_volumes(
    groups: Iterable[tuple[str, Section]], volumes: Sequence[PhysicalVolume]
) -> tuple[LogicalVolume, ...]:
    newest: dict[str, tuple[int, str, Section]] = {}
    for name, group in groups:
        identity, sequence = _string(group, "id"), _number(group, "seqno")
        known = newest.get(identity)
        if known is not None and known[0] == sequence:
            raise LvmError(f"two versions of volume group {name} have the number {sequence}")
        if known is None or known[0] < sequence:
            newest[identity] = (sequence, name, group)
    names = [name for _, name, _ in newest.values()]
    if len(names) != len(set(names)):
        raise LvmError(f"two volume groups have the name {names[0]}")
    found: list[LogicalVolume] = []
    for _, name, group in newest.values():
        found += _volumes_of(name, group, volumes)
    _refuse_overlaps(found, of="two volume groups")
    return tuple(found)


def _members(
    groups: dict[str, tuple[str, Section]], volumes: Sequence[PhysicalVolume]
) -> dict[str, tuple[Extent, ...]]:
    found: dict[str, set[Extent]] = {}
    for volume in volumes:
        if volume.text is None:
            continue
        name, group = groups[volume.text]
        members = found.setdefault(name, set())
        members.add((volume.start, volume.end))
        # A member may hold no copy of the text, which names it all the same.
        for _, _, member in _present(_section(group, "physical_volumes"), volumes):
            members.add((member.start, member.end))
    return {name: tuple(sorted(extents)) for name, extents in found.items()}


def _group(top: Section) -> tuple[str, Section]:
    groups = [(key, value) for key, value in top.items() if isinstance(value, dict)]
    if len(groups) != 1:
        raise LvmError(f"the LVM2 metadata describes {len(groups)} volume groups")
    return groups[0]


def _volumes_of(
    group_name: str, group: Section, volumes: Sequence[PhysicalVolume]
) -> Iterable[LogicalVolume]:
    extent_bytes = _number(group, "extent_size") * _SECTOR
    if extent_bytes <= 0:
        raise LvmError(f"volume group {group_name} has extents of {extent_bytes} bytes")
    places = _places(_section(group, "physical_volumes"), volumes)
    sections = _section(group, "logical_volumes") if "logical_volumes" in group else {}
    described = {name: s for name, s in sections.items() if isinstance(s, dict)}
    used = _used_by_others(described.values())
    found = []
    for name, section in described.items():
        reason = "it is part of a snapshot, pool, cache or mirror" if name in used else ""
        pieces: tuple[Extent, ...] = ()
        if not reason:
            pieces, reason = _linear(section, places, extent_bytes)
        found.append(
            LogicalVolume(group=group_name, name=name, pieces=pieces, opaque_reason=reason)
        )
    _refuse_overlaps(found, of=group_name)
    return found


def _refuse_overlaps(volumes: Iterable[LogicalVolume], *, of: str) -> None:
    every = sorted(piece for volume in volumes for piece in volume.pieces)
    if any(after[0] < before[1] for before, after in pairwise(every)):
        raise LvmError(f"logical volumes of {of} overlap")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a physical volume's extents begin on the disk, and how many there are."""

    start: int
    end: int
    extent_count: int


def _places(section: Section, volumes: Sequence[PhysicalVolume]) -> dict[str, _Place]:
    if len({volume.id for volume in volumes}) != len(volumes):
        raise LvmError("two physical volumes have the same id")
    places = {}
    for name, described, volume in _present(section, volumes):
        if "MISSING" not in _words(described.get("status")):
            places[name] = _Place(
                start=volume.start + _number(described, "pe_start") * _SECTOR,
                end=volume.end,
                extent_count=_number(described, "pe_count"),
            )
    return places


def _present(
    section: Section, volumes: Sequence[PhysicalVolume]
) -> Iterable[tuple[str, Section, PhysicalVolume]]:
    """Yield the name and description of each physical volume of a group that is among these."""
    by_id = {volume.id: volume for volume in volumes}
    for name, described in section.items():
        if isinstance(described, dict):
            volume = by_id.get(_string(described, "id").replace("-", ""))
            if volume is not None:
                yield name, described, volume


def _used_by_others(sections: Iterable[Section]) -> set[str]:
    """Return every name that a segment which is not linear mentions: an origin, a pool, a log."""
    names: set[str] = set()
    for section in sections:
        for segment in section.values():
            if isinstance(segment, dict) and not _is_linear(segment):
                for value in segment.values():
                    items = value if isinstance(value, list) else [value]
                    names.update(item for item in items if isinstance(item, str))
    return names


def _is_linear(segment: Section) -> bool:
    kind = segment.get("type")
    return kind == "linear" or (kind == "striped" and segment.get("stripe_count") == 1)


def _linear(
    section: Section, places: dict[str, _Place], extent_bytes: int
) -> tuple[tuple[Extent, ...], str]:
    """Return the pieces of a volume, or none and why."""
    status = _words(section.get("status"))
    if "VISIBLE" not in status:
        return (), "it is hidden: something else is made of it"
    if strange := sorted(status - _PLAIN_STATUS):
        return (), f"its status is {printable(', '.join(strange)[:80])}"
    segments = [value for value in section.values() if isinstance(value, dict)]
    if len(segments) != _number(section, "segment_count") or len(segments) > _SEGMENTS_MAX:
        raise LvmError("a logical volume has another number of segments than it says")
    pieces: list[Extent] = []
    position = 0
    for segment in sorted(segments, key=lambda segment: _number(segment, "start_extent")):
        if not _is_linear(segment):
            return (), f"it has a segment of type {printable(str(segment.get('type'))[:40])}"
        count = _number(segment, "extent_count")
        stripes = segment.get("stripes")
        if (
            _number(segment, "start_extent") != position
            or count <= 0
            or not isinstance(stripes, list)
            or len(stripes) != 2
            or not isinstance(stripes[0], str)
            or not isinstance(stripes[1], int)
            or stripes[1] < 0
        ):
            raise LvmError("a segment of a logical volume is malformed")
        place = places.get(stripes[0])
        if place is None:
            return (), f"part of it lies on {printable(stripes[0][:40])}, which is not on this disk"
        start = place.start + stripes[1] * extent_bytes
        end = start + count * extent_bytes
        if stripes[1] + count > place.extent_count or end > place.end:
            raise LvmError("a segment of a logical volume ends past its physical volume")
        pieces.append((start, end))
        position += count
    if not pieces:
        return (), "it has no segments"
    return tuple(pieces), ""


def _section(section: Section, key: str) -> Section:
    value = section.get(key)
    if not isinstance(value, dict):
        raise LvmError(f"the LVM2 metadata has no {key}")
    return value


def _number(section: Section, key: str) -> int:
    value = section.get(key)
    if not isinstance(value, int) or value < 0:
        raise LvmError(f"the LVM2 metadata has no number {key}")
    return value


def _string(section: Section, key: str) -> str:
    value = section.get(key)
    if not isinstance(value, str):
        raise LvmError(f"the LVM2 metadata has no {key}")
    return value


def _words(value: "Value | Section | None") -> frozenset[str]:
    items = value if isinstance(value, list) else [value]
    return frozenset(item for item in items if isinstance(item, str))
