"""What terms may ask about a disk, and what they answer."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from stillblock.errors import OriginIOError, RuleError
from stillblock.model import Extents, Unresolved
from stillblock.selection.disk import Disk
from stillblock.selection.filesystems import Content, Identity, UnresolvedError
from stillblock.selection.lvm_text import LvmTextError, Section
from stillblock.selection.partition_table import printable
from stillblock.selection.partitions import PartitionTable, read_partitions
from stillblock.selection.places import Place, Places, read_places
from stillblock.selection.survey import Survey, SurveyRequest, is_named, place_name_of
from stillblock.selection.workers import ASKING_S_MAX, WorkerReaders


class Phase(StrEnum):
    """When a term's meaning is known."""

    INSTANT = "instant"
    """Before the instant: it holds from the first write after it."""
    FROZEN = "frozen"
    """On the frozen view, after the instant: until then what it may leave out stays selected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What a term means on one disk before the instant, and what the user should know about it."""

    extents: Extents
    """The bytes it means, as far as is known."""
    kept: Extents = ()
    """Of them, what an exclusion keeps all the same, such as the header of a swap area."""
    frozen: Extents = ()
    """Where the rest of its meaning may lie, to be resolved on the frozen view."""
    unresolved: tuple[tuple[Unresolved, Extents], ...] = ()
    """Where it could not be resolved: an inclusion takes these bytes."""
    note: str = ""


class Readers(Protocol):
    """Reads what strangers wrote; in processes of their own, or in tests at once."""

    def identify(self, disk: Disk, *, content: Content) -> Identity:
        """Return which filesystem lies on a disk; raise `UnresolvedError`."""

    def survey(self, disk: Disk, *, content: Content, request: SurveyRequest) -> Survey:
        """Return what terms mean in the filesystem on a disk; raise `UnresolvedError`."""

    def parse_lvm(self, text: str) -> Section:
        """Return what the text of a volume group says; raise `LvmTextError`."""


@dataclass(frozen=True, slots=True)
class Known:
    """What readers said of a disk, for somebody who looks at it again a moment later.

    Only what readers say, which takes long: what lies where is always read anew.
    """

    identities: dict[Place, Identity | Unresolved] = field(default_factory=dict)
    groups: "dict[str, Section | LvmTextError]" = field(default_factory=dict)
    """By the text that describes an LVM2 volume group, what it says."""


class DiskFacts:
    """What terms may ask about a disk. Reads what it lacks when a term first needs it."""

    def __init__(
        self, disk: Disk, readers: Readers | None = None, known: Known | None = None
    ) -> None:
        """Take what is known already; what is found out is added to it."""
        self._disk = disk
        self._readers = readers or WorkerReaders(total_s=ASKING_S_MAX)
        self._known = known or Known()
        self._table: PartitionTable | None = None
        self._is_table_read = False
        self._places: Places | None = None

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        return self._disk.size

    @property
    def notes(self) -> tuple[str, ...]:
        """What the readers of table and places noted, if a term needed them."""
        table_notes = self._table.notes if self._table else ()
        return table_notes + (self._places.notes if self._places else ())

    def table(self) -> PartitionTable:
        """Return the partition table; raise `RuleError` if there is none or it is damaged."""
        if not self._is_table_read:
            self._table = read_partitions(self._disk)
            self._is_table_read = True
        if self._table is None:
            raise RuleError("the disk has no partition table", hint="use all or a byte range")
        return self._table

    @property
    def places(self) -> Places:
        """What the disk is made of."""
        if self._places is None:
            self._places = read_places(self._disk, parse=self._parse_lvm)
        return self._places

    def _parse_lvm(self, text: str) -> Section:
        found = self._known.groups.get(text)
        if found is None:
            try:
                found = self._readers.parse_lvm(text)
            except LvmTextError as error:
                found = error
            self._known.groups[text] = found
        if isinstance(found, LvmTextError):
            raise LvmTextError(found.message)
        return found

    @property
    def known_places(self) -> tuple[Place, ...]:
        """The places, if a term needed them."""
        return self._places.places if self._places else ()

    def identity(self, place: Place) -> Identity | Unresolved:
        """Return which filesystem lies at a place, or why that is not known."""
        found = self._known.identities.get(place)
        if found is None:
            assert place.content is not None, "only a place with a filesystem is asked about"
            try:
                found = self._readers.identify(place.disk(self._disk), content=place.content)
            except (UnresolvedError, OriginIOError) as error:
                found = Unresolved(place=place.name, reason=error.message)
            self._known.identities[place] = found
        return found

    def filesystems_named(self, name: str) -> tuple[list[Place], list[tuple[Unresolved, Place]]]:
        """Return the filesystems of a name, and those that could not be asked and may have it too.

        Raise `RuleError` if there is none and all could be asked.
        """
        if (wanted := place_name_of(name)) is not None:
            return [self._filesystem_at(wanted)], []
        found: list[Place] = []
        silent: list[tuple[Unresolved, Place]] = []
        labels: list[str] = []
        for place in self.places.filesystems:
            identity = self.identity(place)
            if isinstance(identity, Unresolved):
                silent.append((identity, place))
            elif is_named(name, identity=identity, place_name=place.name):
                found.append(place)
            else:
                label = f" {printable(identity.label)}" if identity.label else ""
                labels.append(f"{place.name} {identity.kind}{label} {identity.uuid}".rstrip())
        if not found and not silent:
            raise RuleError(
                f"there is no filesystem with label or uuid {printable(name)}",
                hint=f"the disk has {', '.join(labels[:20]) or 'no filesystem that is known'}",
            )
        return found, silent

    def _filesystem_at(self, wanted: str) -> Place:
        for place in self.places.places:
            if place.name == wanted and place.is_filesystem:
                return place
            if place.name == wanted:
                what = place.opaque_reason or f"it holds {place.content or 'nothing known'}"
                raise RuleError(f"{wanted} has no filesystem that is read here: {what}")
        found = ", ".join(place.name for place in self.places.places[:20])
        raise RuleError(f"there is no {wanted}", hint=f"the disk has {found or 'nothing known'}")
