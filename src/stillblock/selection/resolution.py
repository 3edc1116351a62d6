"""Rules and a disk to a selection: which blocks, why, and what is left out and why.

Bytes are decided first, exactly; only then is the result rounded outward to blocks, so that a block
with one selected byte is selected and the order of terms never depends on the block size.
"""

from dataclasses import dataclass
from typing import Final

from stillblock.errors import RuleError
from stillblock.extents import (
    intersect,
    normalise,
    round_out,
    subtract,
    total_bytes,
    whole,
)
from stillblock.model import Extent, Extents, LeftOut, format_size
from stillblock.selection.disk import Disk
from stillblock.selection.partition_table import printable
from stillblock.selection.rules import Rules
from stillblock.selection.terms import DiskFacts, Phase, resolve_term

RESOLUTION_VERSION: Final = 1
NOT_INCLUDED: Final = "not included by any term"

ExcludedExtent = LeftOut
"""A byte range that is left out, and the term that did it; the model's, since receipts hold it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TermResult:
    """What one term came to."""

    include: bool
    text: str
    extents: Extents
    """All bytes it means, whatever later terms say of them."""
    contributed_bytes: int
    """Bytes that it decided: no later term matches them. Before rounding to blocks."""
    phase: Phase
    note: str = ""
    is_low: bool = False

    @property
    def bytes(self) -> int:
        """How many bytes it means."""
        return total_bytes(self.extents)

    def to_json(self) -> dict[str, object]:
        """Return the JSON form; bytes are integers."""
        return {
            "include": self.include,
            "text": self.text,
            "bytes": self.bytes,
            "contributed_bytes": self.contributed_bytes,
            "extents": _extents_json(self.extents),
            "phase": str(self.phase),
            "note": self.note,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What rules mean on one disk. `extents` and `excluded` together are the whole disk."""

    disk_size: int
    block_size: int
    extents: Extents
    """The selected bytes, in whole blocks (the last may be cut by the end of the disk)."""
    terms: tuple[TermResult, ...]
    excluded: tuple[ExcludedExtent, ...]
    low: Extents = ()
    """Of the selected, in whole blocks: what only low inclusions select."""
    notes: tuple[str, ...] = ()
    """What a careful user should know about the disk, such as a damaged primary GPT."""

    @property
    def selected_bytes(self) -> int:
        """How many bytes are selected."""
        return total_bytes(self.extents)

    def to_json(self) -> dict[str, object]:
        """Return the JSON form; bytes are integers."""
        return {
            "version": RESOLUTION_VERSION,
            "disk_size": self.disk_size,
            "block_size": self.block_size,
            "selected_bytes": self.selected_bytes,
            "extents": _extents_json(self.extents),
            "low": _extents_json(self.low),
            "terms": [term.to_json() for term in self.terms],
            "excluded": [
                {"start": left.start, "end": left.end, "because": left.because}
                for left in self.excluded
            ],
            "notes": list(self.notes),
        }


def resolve(rules: Rules, disk: Disk, *, block_size: int) -> Resolution:
    """Return what `rules` select on `disk`.

    Raise `RuleError` if a term means nothing here or all of them together select nothing, and
    `PartitionTableError` if a term needs a partition table that cannot be relied on. Reads only
    what the terms need: nothing for ranges, the table for partitions.
    """
    facts = DiskFacts(disk)
    matches = [resolve_term(term.text, facts) for term in rules.terms]

    undecided = whole(facts.size)
    included: list[Extent] = []
    high: list[Extent] = []
    left_out: list[tuple[Extent, str]] = []
    results: list[TermResult] = []
    # Backwards: the last term that matches a byte decides it, whatever stands before.
    for term, (kind, match) in zip(reversed(rules.terms), reversed(matches), strict=True):
        decided = intersect(match.extents, undecided)
        undecided = subtract(undecided, match.extents)
        if term.include:
            included += decided
            if not term.is_low:
                high += decided
        else:
            left_out += [(extent, term.text) for extent in decided]
        note = match.note
        if term.is_low:
            note = "; ".join(filter(None, (note, "given up first when the store is full")))
        if not decided:
            note = "; ".join(filter(None, (note, "later terms decide all of it")))
        results.append(
            TermResult(
                include=term.include,
                text=term.text,
                extents=match.extents,
                contributed_bytes=total_bytes(decided),
                phase=kind.phase,
                note=note,
                is_low=term.is_low,
            )
        )
    if rules.starts_from_all:
        included += undecided
        high += undecided
    else:
        left_out += [(extent, NOT_INCLUDED) for extent in undecided]

    selected = round_out(normalise(included), block_size=block_size, size=facts.size)
    if not selected:
        _refuse_nothing(rules, facts)
    # A block with one byte that matters is one that matters.
    mattering = round_out(normalise(high), block_size=block_size, size=facts.size)
    return Resolution(
        disk_size=facts.size,
        block_size=block_size,
        extents=selected,
        low=subtract(selected, mattering),
        terms=tuple(reversed(results)),
        excluded=_excluded(left_out, selected),
        notes=facts.notes,
    )


def _excluded(left_out: list[tuple[Extent, str]], selected: Extents) -> tuple[ExcludedExtent, ...]:
    """Return what is left out after rounding, with the reason, in the order of the disk."""
    left_out.sort()
    # Left out extents are disjoint but may touch, where two terms meet: they stay apart here.
    result: list[ExcludedExtent] = []
    kept = iter(subtract(tuple(extent for extent, _ in left_out), selected))
    rest = next(kept, None)
    for (_, end), because in left_out:
        while rest is not None and rest[0] < end:
            result.append(ExcludedExtent(start=rest[0], end=rest[1], because=because))
            rest = next(kept, None)
    return tuple(result)


def _refuse_nothing(rules: Rules, facts: DiskFacts) -> None:
    if facts.size == 0:
        raise RuleError("there is nothing to select: the disk is empty (0 bytes)")
    # `undecided` and every include lost to a later exclusion, or there is no include at all.
    last = next(term for term in reversed(rules.terms) if not term.include)
    raise RuleError(
        f"these rules select nothing of the disk's {format_size(facts.size)}: "
        f"{', '.join(map(str, rules.terms))}",
        hint=f"the last exclusion is {printable(last.text)}; add an include after it, or drop it",
    )


def _extents_json(extents: Extents) -> list[list[int]]:
    return [[start, end] for start, end in extents]
