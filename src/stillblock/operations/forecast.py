"""What leaving things out would save: changes so far, by the directories they fell into."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from stillblock.extents import intersect, normalise, round_out, total_bytes, union
from stillblock.operations.disks import LiveDisk
from stillblock.operations.explaining import disk_at_rest
from stillblock.selection import WorkerReaders
from stillblock.selection.facts import DiskFacts
from stillblock.selection.filesystems import UnresolvedError
from stillblock.selection.places import Place

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stillblock import selection
    from stillblock.model import Extents
    from stillblock.operations.volume import OpenVolume

CANDIDATES_MAX: Final = 12
SHARE_MIN: Final = 0.005
"""What is less of all changes is not worth a term."""
_SAME: Final = 0.9
"""A directory that is nearly all of the one above it is told instead of that."""
_DAY_NS: Final = 86_400 * 10**9
_GLOB_CHARACTERS: Final = "\\*?["


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A term that could be excluded, and what that would have saved."""

    term: str
    changed_bytes: int
    bytes_a_day: int
    share: float
    """Of all that changed, from 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What changed since the oldest snapshot or bookmark, and where."""

    volume: str
    span_ns: int
    """From the oldest instant until now; 0: there is none to count from."""
    instant_count: int
    changed_bytes: int
    """First changes after each instant, summed: what preserving them costs."""
    bytes_a_day: int
    candidates: tuple[Candidate, ...]
    """The largest first. They overlap: a directory is part of the one above it."""
    notes: tuple[str, ...] = ()


def forecast(volume: OpenVolume) -> Forecast:
    """Return what excluding each directory, free space and swap would save a day.

    Counted are the changes between instants that are still known; what was excluded all along is
    not among them. Files are looked up where they lie now.
    """
    changes, since_ns = _changes(volume)
    span_ns = time.time_ns() - since_ns if changes else 0
    if not any(changes):
        return _judged(volume.name, changes, (), span_ns=span_ns, notes=())
    places = DiskFacts(LiveDisk(volume.engine)).places
    concerned = tuple(place for place in places.filesystems if _touches(changes, place))
    named, notes = _parts(volume, concerned, is_alone=len(places.filesystems) == 1)
    named += [("swap", place.extents) for place in places.swap]
    return _judged(volume.name, changes, _joined(named), span_ns=span_ns, notes=notes)


def _changes(volume: OpenVolume) -> tuple[list[Extents], int]:
    """Return what changed after each instant until the next, and when the first was."""
    final = [s.epoch for s in volume.snapshots() if s.is_readable]
    instants = {epoch.epoch: epoch for epoch in final}
    instants |= {b.epoch.epoch: b.epoch for b in volume.bookmarks()}
    numbers = sorted(instants)
    found = [
        volume.engine.changed(since=since, until=until)
        for since, until in itertools.pairwise((*numbers, None))
        if since is not None
    ]
    return found, instants[numbers[0]].created_unix_ns if numbers else 0


def _touches(changes: Iterable[Extents], place: Place) -> bool:
    return any(intersect(changed, place.extents) for changed in changes)


def _parts(
    volume: OpenVolume, places: Sequence[Place], *, is_alone: bool
) -> tuple[list[tuple[str, Extents]], tuple[str, ...]]:
    """Return terms with the extents they mean now, and what could not be read."""
    found: list[tuple[str, Extents]] = []
    notes: list[str] = []
    if not places:
        return found, ()
    wanted = normalise(extent for place in places for extent in place.extents)
    rounded = round_out(wanted, block_size=volume.engine.block_size, size=volume.engine.size_bytes)
    readers = WorkerReaders()
    with disk_at_rest(volume, rounded) as disk:
        for place in places:
            try:
                found += _of_place(place, disk, readers, is_alone=is_alone)
            except UnresolvedError as error:
                notes.append(f"nothing is known of the files on {place.name}: {error.message}")
    return found, tuple(notes)


def _of_place(
    place: Place, disk: selection.Disk, readers: WorkerReaders, *, is_alone: bool
) -> list[tuple[str, Extents]]:
    assert place.content is not None, "only filesystems are asked"
    census = readers.census(place.disk(disk), content=place.content)
    _, _, name = place.name.partition(":")
    prefix = "path:" if is_alone or not name else f"path:{name}:"
    found = [
        (prefix + _escaped(part.path), place.disk_extents(part.extents)) for part in census.parts
    ]
    return [*found, ("free", place.disk_extents(census.free))]


def _escaped(path: str) -> str:
    """Return a path as a glob that means it: a stranger chose the name, and people will read it."""
    return "".join(
        f"\\{c}" if c in _GLOB_CHARACTERS else c if c.isprintable() else "?" for c in path
    )


def _joined(named: Iterable[tuple[str, Extents]]) -> list[tuple[str, Extents]]:
    """Return each term once: free space and swap of every place are one."""
    found: dict[str, Extents] = {}
    for term, extents in named:
        found[term] = union(found.get(term, ()), extents)
    return list(found.items())


def _judged(
    name: str,
    changes: Sequence[Extents],
    named: Iterable[tuple[str, Extents]],
    *,
    span_ns: int,
    notes: tuple[str, ...],
) -> Forecast:
    """Return what changes come to. Pure."""
    everything = sum(map(total_bytes, changes))
    counted = {
        term: sum(total_bytes(intersect(changed, extents)) for changed in changes)
        for term, extents in named
    }
    worth = {t: n for t, n in counted.items() if n and n >= SHARE_MIN * everything}
    kept = {
        term: count
        for term, count in worth.items()
        if not any(
            below.startswith(f"{term}/") and other >= _SAME * count
            for below, other in worth.items()
        )
    }
    ordered = sorted(kept.items(), key=lambda item: (-item[1], item[0]))

    def a_day(changed_bytes: int) -> int:
        return changed_bytes * _DAY_NS // span_ns if span_ns > 0 else 0

    return Forecast(
        volume=name,
        span_ns=span_ns,
        instant_count=len(changes),
        changed_bytes=everything,
        bytes_a_day=a_day(everything),
        candidates=tuple(
            Candidate(
                term=term,
                changed_bytes=count,
                bytes_a_day=a_day(count),
                share=count / everything,
            )
            for term, count in ordered[:CANDIDATES_MAX]
        ),
        notes=notes,
    )
