"""Standing rules of a volume, and what rules come to on its disk now."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from stillblock import selection
from stillblock.extents import total_bytes
from stillblock.model import Extents, LeftOut, RuleTerm, TermOutcome
from stillblock.operations.disks import LiveDisk

if TYPE_CHECKING:
    from stillblock.operations.volume import OpenVolume


@dataclass(frozen=True, slots=True, kw_only=True)
class RulesRequest:
    """Terms to put in place of, or after, the standing ones."""

    terms: tuple[RuleTerm, ...] = ()
    only_these: bool = False
    """Start afresh instead of appending to the standing rules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingRules:
    """The rules every snapshot of a volume starts from; none means `all`."""

    volume: str
    rules: tuple[RuleTerm, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TermExplanation:
    """What one term matches, and how much of it is its last word."""

    include: bool
    text: str
    extents: Extents
    matched_bytes: int
    contributed_bytes: int
    note: str = ""
    is_low: bool = False

    @property
    def action(self) -> str:
        """`include`, `include-low` or `exclude`."""
        return RuleTerm(include=self.include, text=self.text, is_low=self.is_low).action


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What rules come to on the disk as it is now."""

    volume: str
    size_bytes: int
    rules: tuple[RuleTerm, ...]
    terms: tuple[TermExplanation, ...]
    extents: Extents
    selected_bytes: int
    left_out: tuple[LeftOut, ...]
    left_out_bytes: int
    low: Extents = ()
    """What of it is given up first when the store is full."""
    low_bytes: int = 0
    notes: tuple[str, ...] = ()
    """What to know about the disk, such as a damaged primary partition table."""

    def outcomes(self) -> tuple[TermOutcome, ...]:
        """Return the terms without their extents, as a receipt keeps them."""
        return tuple(
            TermOutcome(
                include=term.include,
                text=term.text,
                matched_bytes=term.matched_bytes,
                contributed_bytes=term.contributed_bytes,
                note=term.note,
                is_low=term.is_low,
            )
            for term in self.terms
        )


def show_rules(volume: OpenVolume) -> StandingRules:
    """Return the standing rules."""
    return StandingRules(volume=volume.name, rules=volume.settings().rules)


def change_rules(
    volume: OpenVolume, request: RulesRequest, *, how: Literal["set", "add"]
) -> StandingRules:
    """Replace or extend the standing rules, once they mean something on this disk."""
    with volume.lock:
        settings = volume.settings()
        rules = request.terms if how == "set" else settings.rules + request.terms
        explain_terms(volume, rules)
        volume.store_settings(replace(settings, rules=rules))
    volume.event("rules_changed", rules=", ".join(map(str, rules)) or "all")
    return show_rules(volume)


def set_rules(volume: OpenVolume, request: RulesRequest) -> StandingRules:
    """Replace the standing rules."""
    return change_rules(volume, request, how="set")


def add_rules(volume: OpenVolume, request: RulesRequest) -> StandingRules:
    """Append to the standing rules."""
    return change_rules(volume, request, how="add")


def effective_rules(volume: OpenVolume, request: RulesRequest) -> tuple[RuleTerm, ...]:
    """Return the rules a snapshot asked for with these terms would follow."""
    return request.terms if request.only_these else volume.settings().rules + request.terms


def explain(volume: OpenVolume, request: RulesRequest) -> Explanation:
    """Return what a snapshot with these terms would select now, without taking it."""
    return explain_terms(volume, effective_rules(volume, request))


def explain_terms(volume: OpenVolume, rules: tuple[RuleTerm, ...]) -> Explanation:
    """Return what a complete list of terms comes to on the live disk."""
    disk = LiveDisk(volume.engine)
    return explain_on(disk, rules, volume=volume.name, block_size=volume.engine.block_size)


def explain_on(
    disk: selection.Disk, rules: tuple[RuleTerm, ...], *, volume: str, block_size: int
) -> Explanation:
    """Return what a complete list of terms comes to on a disk; raise `RuleError`."""
    parsed = selection.Rules.parse([(term.action, term.text) for term in rules])
    resolved = selection.resolve(parsed, disk, block_size=block_size)
    left_out = tuple(
        LeftOut(start=part.start, end=part.end, because=part.because) for part in resolved.excluded
    )
    return Explanation(
        volume=volume,
        size_bytes=disk.size,
        rules=rules,
        terms=tuple(
            TermExplanation(
                include=term.include,
                text=term.text,
                extents=term.extents,
                matched_bytes=term.bytes,
                contributed_bytes=term.contributed_bytes,
                note=term.note,
                is_low=term.is_low,
            )
            for term in resolved.terms
        ),
        extents=resolved.extents,
        selected_bytes=resolved.selected_bytes,
        left_out=left_out,
        left_out_bytes=total_bytes(tuple((part.start, part.end) for part in left_out)),
        low=resolved.low,
        low_bytes=total_bytes(resolved.low),
        notes=resolved.notes,
    )
