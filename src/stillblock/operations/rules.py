"""Standing rules of a volume, and what rules come to on its disk now."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from stillblock import selection
from stillblock.extents import total_bytes
from stillblock.model import Extents, LeftOut, RuleTerm, TermOutcome, Unresolved
from stillblock.operations.disks import LiveDisk
from stillblock.selection.facts import DiskFacts

if TYPE_CHECKING:
    from collections.abc import Callable

    from stillblock.config import Config
    from stillblock.operations.volume import OpenVolume


EVERYTHING: Final = (RuleTerm(include=True, text="all"),)
"""Standing rules of somebody who wants no default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RulesRequest:
    """Terms to put in place of, or after, the standing ones."""

    terms: tuple[RuleTerm, ...] = ()
    only_these: bool = False
    """Start afresh instead of appending to the standing rules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingRules:
    """The rules every snapshot of a volume starts from."""

    volume: str
    rules: tuple[RuleTerm, ...]
    """None: nobody gave any, and the default holds."""
    default: tuple[RuleTerm, ...] = ()
    """What is left out by itself while nobody gives rules; none where nothing on the disk has free
    space or swap that can be told."""


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
    file_count: int = 0
    """Files it matches, by name."""
    unresolved: tuple[Unresolved, ...] = ()
    """Where it could not be resolved, and why: all of that is included."""

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
    pending: str = ""
    """What the frozen view still has to tell; empty: this is what a snapshot would hold."""
    is_default: bool = False
    """Nobody gave rules: these are what is left out by itself."""

    @property
    def is_final(self) -> bool:
        """Whether all terms are resolved."""
        return not self.pending

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
                file_count=term.file_count,
                extent_count=len(term.extents),
                unresolved=term.unresolved,
            )
            for term in self.terms
        )


def show_rules(volume: OpenVolume) -> StandingRules:
    """Return the standing rules."""
    rules = volume.settings().rules
    default = () if rules else default_rules(LiveDisk(volume.engine))
    return StandingRules(volume=volume.name, rules=rules, default=default)


def change_rules(
    volume: OpenVolume, request: RulesRequest, *, how: Literal["set", "add"]
) -> StandingRules:
    """Replace or extend the standing rules, once they mean something on this disk."""
    with volume.lock:
        settings = volume.settings()
        terms = expanded(request.terms, volume.presets)
        rules = terms if how == "set" else settings.rules + terms
        explain_terms(volume, rules)
        volume.store_settings(replace(settings, rules=rules))
    volume.event("rules_changed", rules=", ".join(map(str, rules)) or "default")
    return show_rules(volume)


def set_rules(volume: OpenVolume, request: RulesRequest) -> StandingRules:
    """Replace the standing rules; no terms bring the default back."""
    return change_rules(volume, request, how="set")


def add_rules(volume: OpenVolume, request: RulesRequest) -> StandingRules:
    """Append to the standing rules."""
    return change_rules(volume, request, how="add")


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectiveRules:
    """The rules that a snapshot follows, and whose they are."""

    terms: tuple[RuleTerm, ...]
    is_default: bool
    """Nobody gave any."""


def expanded(terms: tuple[RuleTerm, ...], presets: selection.Presets) -> tuple[RuleTerm, ...]:
    """Return terms with each preset replaced by its own; raise `RuleError`."""
    pairs = [(term.action, term.text) for term in terms]
    return selection.Rules.parse(pairs, presets=presets).terms


def list_presets(config: Config) -> tuple[selection.Preset, ...]:
    """Return the presets there are."""
    presets = selection.Presets(config.presets_dir)
    return tuple(presets.find(name) for name in presets.names())


def default_rules(
    disk: selection.Disk, *, known: selection.Known | None = None
) -> tuple[RuleTerm, ...]:
    """Return what is left out by itself: free space and swap, where there are any to be told.

    Nothing on a disk without a filesystem or swap area that is understood: no reader is started
    there in vain.
    """
    places = DiskFacts(disk, known=known).places
    return selection.default_rules().terms if places.filesystems or places.swap else ()


def effective_rules(
    volume: OpenVolume, request: RulesRequest, *, known: selection.Known | None = None
) -> EffectiveRules:
    """Return the rules a snapshot asked for with these terms would follow."""
    terms = expanded(request.terms, volume.presets)
    if request.only_these:
        return EffectiveRules(terms=terms, is_default=False)
    rules = volume.settings().rules + terms
    if rules:
        return EffectiveRules(terms=rules, is_default=False)
    default = default_rules(LiveDisk(volume.engine), known=known)
    return EffectiveRules(terms=default, is_default=bool(default))


def explain_terms(
    volume: OpenVolume, rules: tuple[RuleTerm, ...], *, known: selection.Known | None = None
) -> Explanation:
    """Return what terms come to on the live disk, as far as is known before an instant."""
    return explain_on(
        LiveDisk(volume.engine),
        rules,
        volume=volume.name,
        block_size=volume.engine.block_size,
        known=known,
    )


def explain_on(
    disk: selection.Disk,
    rules: tuple[RuleTerm, ...],
    *,
    volume: str,
    block_size: int,
    known: selection.Known | None = None,
) -> Explanation:
    """Return what terms come to on a disk before an instant; raise `RuleError`.

    Presets are `expanded` by then: which there are depends on who asks.
    """
    resolved = selection.resolve(
        selection.Rules(terms=rules), disk, block_size=block_size, known=known
    )
    return _explanation(resolved, rules, volume=volume)


def explain_frozen(
    disk: selection.Disk,
    rules: tuple[RuleTerm, ...],
    pending: str,
    *,
    volume: str,
    progress: Callable[[str, int, int], None] | None = None,
) -> Explanation:
    """Return what terms come to on a disk that holds still, given what they were before.

    Never raises for what lies there: what cannot be resolved is included, and says so. `progress`
    is told what is being read, and how much of how much is done.
    """
    left = selection.Pending.from_json(json.loads(pending))
    resolved = selection.resolve_frozen(left, disk, progress=progress)
    return _explanation(resolved, rules, volume=volume)


def _explanation(
    resolved: selection.Resolution, rules: tuple[RuleTerm, ...], *, volume: str
) -> Explanation:
    pending = resolved.pending
    return Explanation(
        volume=volume,
        size_bytes=resolved.disk_size,
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
                file_count=term.file_count,
                unresolved=term.unresolved,
            )
            for term in resolved.terms
        ),
        extents=resolved.extents,
        selected_bytes=resolved.selected_bytes,
        left_out=resolved.excluded,
        left_out_bytes=total_bytes(tuple((part.start, part.end) for part in resolved.excluded)),
        low=resolved.low,
        low_bytes=total_bytes(resolved.low),
        notes=resolved.notes,
        pending="" if pending is None else json.dumps(pending.to_json(), separators=(",", ":")),
    )
