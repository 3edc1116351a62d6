"""Terms in order to bytes: which term decides each byte, and what is left out.

The last term that matches a byte decides it. Most bytes have one claim, by nobody in particular:
the terms that match it are those whose extents hold it. The bytes of files, of free space and of
metadata in a surveyed filesystem have claims of their own, each with further terms that match it; a
byte is left out only if every claim on it says so (docs/adr/0008-designation-by-files.md).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from stillblock.extents import intersect, normalise, round_out, subtract, total_bytes, union, whole
from stillblock.model import Extent, Extents, LeftOut, RuleTerm

NOT_INCLUDED = "not included by any term"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Bytes of the disk that something has, and the terms that mean it beside those whose extents
    hold the bytes.
    """

    extents: Extents
    terms: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a list of terms comes to, byte by byte and then in blocks."""

    kept: Extents
    """The selected bytes, exactly."""
    selected: Extents
    """The same in whole blocks; the last may be cut by the end of the disk."""
    low: Extents
    """Of the selected, in whole blocks: what only low inclusions select."""
    contributed_bytes: tuple[int, ...]
    """For each term, what it decided. Before rounding to blocks."""
    excluded: tuple[LeftOut, ...]


def decide(
    terms: Sequence[RuleTerm],
    matches: Sequence[Extents],
    *,
    size: int,
    block_size: int,
    claims: Sequence[Claim] = (),
) -> Decision:
    """Return which bytes of `[0, size)` the terms select; `matches` are the extents of each."""
    tally = _Tally(terms=terms, matches=matches)
    claimed = normalise(extent for claim in claims for extent in claim.extents)
    tally.add(Claim(extents=subtract(whole(size), claimed)))
    for claim in claims:
        tally.add(claim)
    kept = normalise(extent for _, extents in tally.included for extent in extents)
    high = normalise(
        extent
        for index, extents in tally.included
        if index is None or not terms[index].is_low
        for extent in extents
    )
    contributed = [0] * len(terms)
    for index, extents in _apart(tally.included):
        if index is not None:
            contributed[index] = total_bytes(extents)
    left_out: list[tuple[Extent, str]] = []
    for index, extents in _apart(tally.excluded):
        gone = subtract(extents, kept)
        left_out += [
            (extent, NOT_INCLUDED if index is None else terms[index].text) for extent in gone
        ]
        if index is not None:
            contributed[index] = total_bytes(gone)
    selected = round_out(kept, block_size=block_size, size=size)
    # A block with one byte that matters is one that matters.
    mattering = round_out(high, block_size=block_size, size=size)
    return Decision(
        kept=kept,
        selected=selected,
        low=subtract(selected, mattering),
        contributed_bytes=tuple(contributed),
        excluded=_excluded(left_out, selected),
    )


def decide_with_doubt(
    terms: Sequence[RuleTerm],
    matches: Sequence[Extents],
    sure: Sequence[Extents],
    *,
    size: int,
    block_size: int,
    claims: Sequence[Claim] = (),
) -> Decision:
    """As `decide`, but what a low inclusion may match without being `sure` is not given up first.

    A store that is full loses low blocks for good, so doubt must select and must not lower.
    """
    decision = decide(terms, matches, size=size, block_size=block_size, claims=claims)
    if all(a == b for a, b in zip(matches, sure, strict=True)):
        return decision
    low = decide(terms, sure, size=size, block_size=block_size, claims=claims).low
    return replace(decision, low=low)


@dataclass(slots=True)
class _Tally:
    """What every claim says, by the term that decided; None where no term matches."""

    terms: Sequence[RuleTerm]
    matches: Sequence[Extents]
    included: list[tuple[int | None, Extents]] = field(default_factory=list)
    excluded: list[tuple[int | None, Extents]] = field(default_factory=list)

    def add(self, claim: Claim) -> None:
        """Let the terms decide one claim."""
        undecided = claim.extents
        meant = frozenset(claim.terms)
        # Backwards: the last term that matches a byte decides it, whatever stands before.
        for index in range(len(self.terms) - 1, -1, -1):
            if not undecided:
                return
            if index in meant:
                self._note(index, undecided, include=self.terms[index].include)
                return
            if self.matches[index]:
                decided = intersect(self.matches[index], undecided)
                undecided = subtract(undecided, decided)
                self._note(index, decided, include=self.terms[index].include)
        starts_from_all = not self.terms or not self.terms[0].include
        self._note(None, undecided, include=starts_from_all)

    def _note(self, index: int | None, extents: Extents, *, include: bool) -> None:
        if extents:
            (self.included if include else self.excluded).append((index, extents))


def _apart(
    decided: Iterable[tuple[int | None, Extents]],
) -> Iterable[tuple[int | None, Extents]]:
    """Return what each term decided, disjoint: of several claims on a byte the last term counts."""
    by_index: dict[int | None, list[Extent]] = {}
    for index, extents in decided:
        by_index.setdefault(index, []).extend(extents)
    taken: Extents = ()
    result: list[tuple[int | None, Extents]] = []
    for index in sorted(by_index, key=lambda index: -1 if index is None else index, reverse=True):
        extents = subtract(normalise(by_index[index]), taken)
        taken = union(taken, extents)
        result.append((index, extents))
    return result


def _excluded(left_out: list[tuple[Extent, str]], selected: Extents) -> tuple[LeftOut, ...]:
    """Return what is left out after rounding, with the reason, in the order of the disk."""
    left_out.sort()
    # Left out extents are disjoint but may touch, where two terms meet: they stay apart here.
    result: list[LeftOut] = []
    kept = iter(subtract(tuple(extent for extent, _ in left_out), selected))
    rest = next(kept, None)
    for (_, end), because in left_out:
        while rest is not None and rest[0] < end:
            result.append(LeftOut(start=rest[0], end=rest[1], because=because))
            rest = next(kept, None)
    return tuple(result)
