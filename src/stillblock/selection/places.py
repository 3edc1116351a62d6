"""Places: what a disk is made of, down to the stretches that may hold a filesystem each.

The whole disk, its partitions, the logical volumes on them. What cannot be told apart for certain
is opaque: it is kept whole, and a note says why.
"""

from dataclasses import dataclass, replace
from typing import Final

from stillblock.errors import OriginIOError
from stillblock.extents import normalise, total_bytes
from stillblock.model import Extent, Extents
from stillblock.selection.disk import Disk, MappedDisk, read_exactly, to_disk
from stillblock.selection.filesystems.signatures import (
    RAID_MAGIC,
    SWAP_PAGE_BYTES_MAX,
    Content,
    identify,
    swap_page_bytes,
)
from stillblock.selection.lvm import (
    ParseText,
    PhysicalVolume,
    read_groups,
    read_physical_volume,
)
from stillblock.selection.lvm_text import LvmTextError
from stillblock.selection.partition_table import PartitionTableError, printable
from stillblock.selection.partitions import PartitionTable, read_partitions

FILESYSTEMS: Final = frozenset(
    {Content.EXT, Content.XFS, Content.BTRFS, Content.NTFS, Content.FAT, Content.EXFAT}
)
"""Contents that a reader may understand."""
PHYSICAL_VOLUMES_MAX: Final = 64
"""On one disk: the text of each is kept until all are read."""
_RAID_RESERVED: Final = 64 * 1024
"""What metadata 0.90 keeps free at the end of a member."""
WHOLE_DISK: Final = "disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One stretch of the disk that holds one thing; places that are not opaque do not overlap."""

    name: str
    """`disk`, `part:2` or `lv:vg/root`."""
    pieces: tuple[Extent, ...]
    """Where it lies on the disk, in its own order."""
    content: Content | None = None
    """None: nothing known, or no telling."""
    opaque_reason: str = ""
    """Why nothing in it can be told apart; empty for filesystems and swap."""

    @property
    def extents(self) -> Extents:
        """Where it lies, in the order of the disk."""
        return normalise(self.pieces)

    @property
    def is_filesystem(self) -> bool:
        """Whether it looks like a filesystem that has a reader."""
        return self.content in FILESYSTEMS and not self.opaque_reason

    @property
    def is_swap(self) -> bool:
        """Whether it is a swap area."""
        return self.content is Content.SWAP and not self.opaque_reason

    @property
    def number(self) -> int | None:
        """The partition's number, if it is one."""
        kind, _, number = self.name.partition(":")
        return int(number) if kind == "part" else None

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return total_bytes(self.extents)

    def disk(self, disk: Disk) -> MappedDisk:
        """Return the place as a disk of its own."""
        return MappedDisk(disk, self.pieces)

    def disk_extents(self, extents: Extents) -> Extents:
        """Return where extents of the place lie on the disk."""
        return to_disk(self.pieces, extents)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """All places of a disk."""

    places: tuple[Place, ...]
    groups: tuple[tuple[str, Extents], ...] = ()
    """Where the physical volumes of each LVM volume group lie, as far as they can be read."""
    notes: tuple[str, ...] = ()
    """What is opaque, and why."""

    @property
    def filesystems(self) -> tuple[Place, ...]:
        """Those that look like a filesystem."""
        return tuple(place for place in self.places if place.is_filesystem)

    @property
    def swap(self) -> tuple[Place, ...]:
        """Those that are swap areas."""
        return tuple(place for place in self.places if place.is_swap)


def read_places(disk: Disk, *, parse: ParseText) -> Places:
    """Return what the disk is made of; never raises for what lies there.

    `parse` reads the text of LVM2 volume groups.
    A place whose ends cannot be read is opaque. Raise `OriginIOError` if not even the partition
    table can be.
    """
    if disk.size == 0:
        return Places(places=())
    whole = _identified(Place(name=WHOLE_DISK, pieces=((0, disk.size),)), disk)
    try:
        table = read_partitions(disk)
    except PartitionTableError as error:
        opaque = replace(whole, content=None, opaque_reason=error.message)
        return Places(places=(opaque,), notes=_notes([opaque]))
    if table is None:
        found = [whole]
    elif whole.content is not None or whole.opaque_reason:
        # Left over from before or after the table was made; only one of the two can hold.
        what = whole.opaque_reason or f"it holds {whole.content} as well as a partition table"
        opaque = replace(whole, content=None, opaque_reason=f"{what}, and only one can hold")
        return Places(places=(opaque,), notes=_notes([opaque]))
    else:
        found = _partitions(disk, table)
    return _with_logical_volumes(disk, found, parse)


def _partitions(disk: Disk, table: PartitionTable) -> list[Place]:
    return [
        _identified(Place(name=f"part:{partition.number}", pieces=(partition.extent,)), disk)
        for partition in table.partitions
        if not partition.is_container
    ]


def _identified(place: Place, disk: Disk) -> Place:
    view = place.disk(disk)
    try:
        signature = identify(view)
        ends_as_raid = _ends_as_raid(view)
    except OriginIOError as error:
        return replace(place, opaque_reason=f"its ends cannot be read: {error.message}")
    reason = ""
    if len(signature.found) > 1:
        reason = "it looks like several things: " + ", ".join(signature.found)
    elif signature.content in (Content.LUKS, Content.RAID):
        reason = f"it holds {signature.content}, which is opaque"
    elif signature.content is not None and ends_as_raid:
        reason = "it ends with the superblock of an md RAID, which is opaque"
    elif signature.content is Content.SWAP and not is_swap_area(view):
        reason = "it has the signature of swap, but not its header"
    return replace(place, content=signature.content, opaque_reason=reason)


def is_swap_area(disk: Disk) -> bool:
    """Whether a disk begins with a whole header of swap, not only with its ten bytes of magic."""
    head = read_exactly(disk, offset=0, length=min(SWAP_PAGE_BYTES_MAX, disk.size))
    return swap_page_bytes(head) is not None


def _ends_as_raid(disk: Disk) -> bool:
    """Whether a member of an md RAID with metadata 0.90 or 1.0 lies here: theirs is at the end.

    Linux: `md_p.h` (MD_NEW_SIZE_SECTORS) and `super_1_load`.
    """
    old = (disk.size & ~(_RAID_RESERVED - 1)) - _RAID_RESERVED
    new = ((disk.size // 512 - 16) & ~7) * 512
    return any(
        read_exactly(disk, offset=offset, length=4) == RAID_MAGIC
        for offset in (old, new)
        if offset >= 0
    )


def _with_logical_volumes(disk: Disk, found: list[Place], parse: ParseText) -> Places:
    """Return the places with those that LVM2 makes of some of them."""
    physical: list[PhysicalVolume] = []
    places: list[Place] = []
    for place in found:
        if place.content is not Content.LVM or place.opaque_reason:
            places.append(place)
            continue
        if len(physical) == PHYSICAL_VOLUMES_MAX:
            reason = f"the disk has more than {PHYSICAL_VOLUMES_MAX} physical volumes"
            places.append(replace(place, opaque_reason=reason))
            continue
        try:
            physical.append(_physical_volume(place, disk))
        except (LvmTextError, OriginIOError) as error:
            places.append(replace(place, opaque_reason=error.message))
    try:
        groups = read_groups(physical, parse=parse)
    except LvmTextError as error:
        places += (
            replace(place, opaque_reason=error.message)
            for place in found
            if any(place.pieces[0][0] == volume.start for volume in physical)
        )
        return Places(places=tuple(places), notes=_notes(places))
    for volume in groups.volumes:
        place = Place(
            name=f"lv:{volume.full_name}",
            pieces=volume.pieces,
            opaque_reason=volume.opaque_reason,
        )
        places.append(_identified(place, disk) if volume.pieces else place)
    return Places(
        places=tuple(places),
        groups=tuple((name, normalise(extents)) for name, extents in groups.members.items()),
        notes=_notes(places),
    )


def _physical_volume(place: Place, disk: Disk) -> PhysicalVolume:
    """Read the metadata; once more where it does not fit, for it may be written this moment."""
    start = place.pieces[0][0]
    try:
        return read_physical_volume(place.disk(disk), start=start)
    except LvmTextError:
        return read_physical_volume(place.disk(disk), start=start)


def _notes(places: list[Place]) -> tuple[str, ...]:
    return tuple(
        f"{printable(place.name)} is opaque and kept whole: {place.opaque_reason}"
        for place in places
        if place.opaque_reason
    )
