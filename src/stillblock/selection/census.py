"""Which directories the bytes of a filesystem belong to: what a forecast counts changes by.

Runs in a worker, like a survey. Nothing is left out because of a census, so what it cannot place it
passes over.
"""

from dataclasses import dataclass
from typing import Final

from stillblock.extents import normalise, total_bytes
from stillblock.model import Extent, Extents
from stillblock.selection.filesystems.filesystem import (
    FileKind,
    Filesystem,
    UnresolvedError,
    walk,
)

PARTS_MAX: Final = 200
"""Directories told of: those that hold most. A person looks at ten."""
_DEPTH: Final = 2
_KEYS_MAX: Final = 100_000
"""Directories kept in mind while walking; one with more beside each other is counted whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A directory's whole tree, or a file in the top directory."""

    path: str
    extents: Extents


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """The largest parts of a filesystem, first and second level, and its free space."""

    parts: tuple[Part, ...]
    free: Extents = ()


def take_census(filesystem: Filesystem) -> Census:
    """Return who has most; raise `UnresolvedError` if the tree cannot be seen."""
    found: dict[str, list[Extent]] = {}
    for path, node in walk(filesystem):
        if node.kind is not FileKind.REGULAR:
            continue
        try:
            runs = filesystem.runs(node)
        except UnresolvedError:
            continue
        extents = [(r.start, r.start + r.length) for r in runs if r.start is not None and r.length]
        for key in _keys(path):
            if key in found or len(found) < _KEYS_MAX:
                found.setdefault(key, []).extend(extents)
    parts = [Part(path=path, extents=normalise(extents)) for path, extents in found.items()]
    parts.sort(key=lambda part: (-total_bytes(part.extents), part.path))
    try:
        free = filesystem.free()
    except UnresolvedError:
        free = ()
    return Census(parts=tuple(parts[:PARTS_MAX]), free=free)


def _keys(path: str) -> tuple[str, ...]:
    """Return the directories of the first levels that a file is in; itself if it is in none."""
    names = path.split("/")[1:-1]
    if not names:
        return (path,)
    return tuple("/" + "/".join(names[:depth]) for depth in range(1, min(len(names), _DEPTH) + 1))
