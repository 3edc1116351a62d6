"""Terms that need to know what lies on a disk: volumes, filesystems, files, free space, swap."""

import re
from dataclasses import dataclass
from typing import Final

from stillblock.errors import RuleError
from stillblock.extents import normalise, whole
from stillblock.model import Extents, Unresolved
from stillblock.selection.facts import DiskFacts, Match
from stillblock.selection.globs import Glob
from stillblock.selection.partition_table import printable
from stillblock.selection.places import Place

SWAP_HEADER_BYTES: Final = 64 * 1024
"""Of a swap area, always kept: a restored one is swap still, with its label and uuid. It is the
largest page there is, and what tells on the frozen view that the area was swap at the instant.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalVolumes:
    """`lv:vg/lv`: an LVM2 logical volume."""

    name: str

    @classmethod
    def parse(cls, text: str) -> "LogicalVolumes":
        """Return the matcher; raise `RuleError` if it is malformed."""
        name = text.removeprefix("lv:")
        if not re.fullmatch(r"[A-Za-z0-9+_.-]+/[A-Za-z0-9+_.-]+", name):
            raise RuleError("a logical volume is written lv:GROUP/VOLUME")
        return cls(name=name)

    def resolve(self, facts: DiskFacts) -> Match:
        """Return the volume; where it is opaque, its group is what an inclusion takes."""
        places = facts.places
        volumes = [place for place in places.places if place.name.startswith("lv:")]
        for place in volumes:
            if place.name != f"lv:{self.name}":
                continue
            if place.pieces:
                return Match(extents=place.extents)
            group = dict(places.groups)[self.name.partition("/")[0]]
            unresolved = Unresolved(place=place.name, reason=place.opaque_reason)
            return Match(extents=(), unresolved=((unresolved, group),))
        names = ", ".join(place.name for place in volumes[:20])
        raise RuleError(
            f"there is no logical volume {self.name}",
            hint=f"the disk has {names or 'no logical volumes that can be read'}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeFilesystems:
    """`fs:NAME`: all bytes of the filesystem with that label or uuid, or on that partition."""

    name: str

    @classmethod
    def parse(cls, text: str) -> "WholeFilesystems":
        """Return the matcher; raise `RuleError` if it is malformed."""
        name = text.removeprefix("fs:")
        if not name:
            raise RuleError("nothing stands after fs:", hint="write its label, uuid or number")
        return cls(name=name)

    def resolve(self, facts: DiskFacts) -> Match:
        """Return what they take; raise `RuleError` if there is none."""
        found, silent = facts.filesystems_named(self.name)
        return Match(
            extents=_all_of(found),
            unresolved=tuple((unresolved, place.extents) for unresolved, place in silent),
            note=_means(found),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """`path:GLOB` and `path:NAME:GLOB`: the data of files, in every filesystem or in one."""

    filesystem: str
    """Empty: every filesystem on the disk."""
    glob: Glob

    @classmethod
    def parse(cls, text: str) -> "Paths":
        """Return the matcher; raise `RuleError` if it is malformed."""
        rest = text.removeprefix("path:")
        if rest.startswith("/"):
            return cls(filesystem="", glob=Glob.parse(rest))
        name, colon, glob = rest.partition(":/")
        if not colon or not name:
            raise RuleError(
                f"{printable(rest)} is no path: it begins with / or with a filesystem's name",
                hint="write path:/var/cache/** or path:NAME:/var/cache/**",
            )
        return cls(filesystem=name, glob=Glob.parse("/" + glob))

    def resolve(self, facts: DiskFacts) -> Match:
        """Return where such files may lie; raise `RuleError` if a named filesystem is missing."""
        if not self.filesystem:
            return Match(extents=(), frozen=_all_of(facts.places.filesystems))
        found, silent = facts.filesystems_named(self.filesystem)
        return Match(
            extents=(),
            frozen=_all_of([*found, *(place for _, place in silent)]),
            note=_means(found),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """`swap`: partitions and volumes that hold swap, by content, and swap files."""

    def resolve(self, facts: DiskFacts) -> Match:
        """Return the areas but for their headers; files may lie in every filesystem."""
        areas = facts.places.swap
        return Match(
            extents=_all_of(areas),
            kept=normalise(
                piece for area in areas for piece in area.disk_extents(((0, SWAP_HEADER_BYTES),))
            ),
            frozen=_all_of(facts.places.filesystems),
            note="means " + ", ".join(area.name for area in areas) if areas else "",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Free:
    """`free`: what the filesystems have not allocated."""

    def resolve(self, facts: DiskFacts) -> Match:
        """Return where such space may lie."""
        return Match(extents=(), frozen=_all_of(facts.places.filesystems))


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero:
    """`zero`: blocks that hold nothing but zeros at the instant."""

    def resolve(self, facts: DiskFacts) -> Match:
        """Return the whole disk: any block may be zero."""
        return Match(extents=(), frozen=whole(facts.size))


def _all_of(places: "tuple[Place, ...] | list[Place]") -> Extents:
    return normalise(piece for place in places for piece in place.pieces)


def _means(places: list[Place]) -> str:
    if len(places) < 2:
        return ""
    return "means " + ", ".join(place.name for place in places[:20])
