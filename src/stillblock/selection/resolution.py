"""Rules and a disk to a selection: which blocks, why, and what is left out and why.

In two steps. `resolve` runs before the instant: terms whose meaning is known then hold from the
first write; for the rest it selects whatever they might select, so that nothing is missed.
`resolve_frozen` runs on the frozen view and gives them their full meaning: what it selects is never
more.

Bytes are decided first, exactly; only then is the result rounded outward to blocks, so that a block
with one selected byte is selected and the order of terms never depends on the block size.
"""

from dataclasses import dataclass, replace
from typing import Final

from stillblock import codec
from stillblock.errors import RuleError
from stillblock.extents import intersect, subtract, total_bytes, union, whole
from stillblock.model import Extents, LeftOut, RuleTerm, Unresolved, format_size
from stillblock.selection.decision import Decision, decide_with_doubt
from stillblock.selection.disk import Disk
from stillblock.selection.facts import DiskFacts, Known, Match, Phase, Readers
from stillblock.selection.partition_table import printable
from stillblock.selection.places import Place
from stillblock.selection.rules import Rules
from stillblock.selection.terms import resolve_term

RESOLUTION_VERSION: Final = 1

ExcludedExtent = LeftOut
"""A byte range that is left out, and the term that did it; the model's, since receipts hold it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TermResult:
    """What one term came to."""

    include: bool
    text: str
    extents: Extents
    """All bytes it means, whatever later terms say of them. Before the instant, of a term that
    needs the frozen view: an exclusion's that are certain, an inclusion's that are possible.
    """
    contributed_bytes: int
    """Bytes that it decided: no later term matches them. Before rounding to blocks."""
    phase: Phase
    """When its meaning is known in full."""
    file_count: int = 0
    """Files it means, by name; on the frozen view."""
    unresolved: tuple[Unresolved, ...] = ()
    """Where it left nothing out, or took everything, because its meaning there is not known."""
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
            "file_count": self.file_count,
            "unresolved": codec.to_json(self.unresolved),
            "note": self.note,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingTerm:
    """A term, and what is known of it before the instant."""

    term: RuleTerm
    kind: str
    """Of the term: `path`, `swap`, `free`, `zero`, or one that was settled before the instant."""
    match: Match
    phase: Phase

    @property
    def certain(self) -> Extents:
        """The bytes it matches for certain."""
        if not self.term.include:
            return subtract(self.match.extents, self.match.kept)
        extents = self.match.extents
        for _, unknown in self.match.unresolved:
            extents = union(extents, unknown)
        return extents

    @property
    def cautious(self) -> Extents:
        """The bytes it is taken to match until the frozen view tells: none too few selected."""
        return union(self.certain, self.match.frozen) if self.term.include else self.certain

    @property
    def sure(self) -> Extents:
        """As `cautious`, but of a low inclusion only what it means without a doubt: a doubt
        selects, and never lowers.
        """
        return self.match.extents if self.term.is_low else self.cautious


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """What the frozen view still has to tell, and all that was settled before the instant.

    Plain data with a JSON form, so that narrowing goes on after a crash. The frozen view need not
    hold the partition table: what lay where is in here.
    """

    disk_size: int
    block_size: int
    terms: tuple[PendingTerm, ...]
    places: tuple[Place, ...]
    """Those with filesystems that a term may divide, and the swap areas that are left out."""
    is_zero_open: bool
    """Whether a term asks which blocks are zero."""
    notes: tuple[str, ...] = ()

    @property
    def rules(self) -> tuple[RuleTerm, ...]:
        """The terms as the user wrote them."""
        return tuple(pending.term for pending in self.terms)

    def decide(self) -> Decision:
        """Return the selection at the instant: at least what the frozen view will tell."""
        return decide_with_doubt(
            self.rules,
            [pending.cautious for pending in self.terms],
            [pending.sure for pending in self.terms],
            size=self.disk_size,
            block_size=self.block_size,
        )

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        document: dict[str, object] = codec.to_json(self)
        return document

    @classmethod
    def from_json(cls, document: object) -> "Pending":
        """Return what `to_json` gave; raise `CodecError` if it is something else."""
        return codec.from_json(cls, document)


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
    pending: Pending | None = None
    """What is still to be resolved on the frozen view; None: this is the final selection."""

    @property
    def is_final(self) -> bool:
        """Whether the selection is settled; else it holds at least what the final one will."""
        return self.pending is None

    @property
    def selected_bytes(self) -> int:
        """How many bytes are selected."""
        return total_bytes(self.extents)

    @property
    def unresolved(self) -> tuple[Unresolved, ...]:
        """Where terms could not be resolved, each once."""
        return tuple(dict.fromkeys(place for term in self.terms for place in term.unresolved))

    def to_json(self) -> dict[str, object]:
        """Return the JSON form; bytes are integers."""
        return {
            "version": RESOLUTION_VERSION,
            "disk_size": self.disk_size,
            "block_size": self.block_size,
            "is_final": self.is_final,
            "selected_bytes": self.selected_bytes,
            "extents": _extents_json(self.extents),
            "low": _extents_json(self.low),
            "terms": [term.to_json() for term in self.terms],
            "excluded": [
                {"start": left.start, "end": left.end, "because": left.because}
                for left in self.excluded
            ],
            "unresolved": codec.to_json(self.unresolved),
            "notes": list(self.notes),
        }


def resolve(
    rules: Rules,
    disk: Disk,
    *,
    block_size: int,
    readers: Readers | None = None,
    known: Known | None = None,
) -> Resolution:
    """Return what `rules` select on `disk` from the first write after the instant.

    Raise `RuleError` if a term means nothing here or all of them together select nothing, and
    `PartitionTableError` if a term needs a partition table that cannot be relied on. Reads only
    what the terms need: nothing for ranges, the table for partitions, the first 68 KiB of each
    place for files. A filesystem is opened only to learn its label, and not if that is `known`;
    all of them together for `ASKING_S_MAX` at most, and what is not asked may have any label.
    """
    facts = DiskFacts(disk, readers, known)
    terms: list[PendingTerm] = []
    for term in rules.terms:
        kind, match = resolve_term(term.text, facts)
        if kind.phase is Phase.FROZEN and not (match.extents or match.frozen):
            if term.include:
                raise RuleError(
                    f"{printable(term.text)}: there is no filesystem on this disk that is read "
                    "here, and nothing else it could mean",
                    hint=_say(facts.notes) or "use partitions or byte ranges",
                )
            match = replace(match, note="nothing on this disk that it could mean")
        terms.append(PendingTerm(term=term, kind=kind.name, match=match, phase=kind.phase))
    pending = Pending(
        disk_size=facts.size,
        block_size=block_size,
        terms=tuple(terms),
        places=facts.known_places,
        is_zero_open=True,
        notes=facts.notes,
    )
    decision = pending.decide()
    if not decision.selected:
        _refuse_nothing(rules, facts)
    pending = _without_settled(pending, decision)
    return Resolution(
        disk_size=facts.size,
        block_size=block_size,
        extents=decision.selected,
        low=decision.low,
        terms=tuple(
            _result(pending_term, extents=pending_term.cautious, contributed_bytes=contributed)
            for pending_term, contributed in zip(terms, decision.contributed_bytes, strict=True)
        ),
        excluded=decision.excluded,
        notes=facts.notes,
        pending=pending if pending.places or pending.is_zero_open else None,
    )


def _without_settled(pending: Pending, decision: Decision) -> Pending:
    """Return only what the frozen view can still change: no worker is started in vain."""
    # Bytes that no later term decides for certain, from the last term to the first.
    open_extents = whole(pending.disk_size)
    is_zero_open = False
    may_change: Extents = ()
    swap_left_out: Extents = ()
    for pending_term in reversed(pending.terms):
        changeable = intersect(pending_term.match.frozen, open_extents)
        if not pending_term.term.include:
            changeable = intersect(changeable, decision.selected)
        if pending_term.kind == "zero":
            is_zero_open = is_zero_open or bool(changeable)
        else:
            may_change = union(may_change, changeable)
        if pending_term.kind == "swap" and not pending_term.term.include:
            swap_left_out = union(swap_left_out, intersect(pending_term.certain, open_extents))
        open_extents = subtract(open_extents, pending_term.certain)
    return replace(
        pending,
        is_zero_open=is_zero_open,
        places=tuple(
            place
            for place in pending.places
            if (place.is_filesystem and intersect(place.extents, may_change))
            or (place.is_swap and intersect(place.extents, swap_left_out))
        ),
    )


def _result(pending_term: PendingTerm, *, extents: Extents, contributed_bytes: int) -> TermResult:
    term, match = pending_term.term, pending_term.match
    return TermResult(
        include=term.include,
        text=term.text,
        extents=extents,
        contributed_bytes=contributed_bytes,
        phase=pending_term.phase,
        unresolved=tuple(unresolved for unresolved, _ in match.unresolved),
        note=term_note(term, match.note, is_overridden=not contributed_bytes and bool(extents)),
        is_low=term.is_low,
    )


def term_note(term: RuleTerm, *notes: str, is_overridden: bool) -> str:
    """Return what is to be known of a term, in one line."""
    low = "given up first when the store is full" if term.is_low else ""
    overridden = "later terms decide all of it" if is_overridden else ""
    return _say((*notes, low, overridden))


def _say(notes: tuple[str, ...]) -> str:
    return "; ".join(filter(None, notes))


def _refuse_nothing(rules: Rules, facts: DiskFacts) -> None:
    if facts.size == 0:
        raise RuleError("there is nothing to select: the disk is empty (0 bytes)")
    # What no term matches is not selected, and every include lost to a later exclusion.
    last = next(term for term in reversed(rules.terms) if not term.include)
    raise RuleError(
        f"these rules select nothing of the disk's {format_size(facts.size)}: "
        f"{', '.join(map(str, rules.terms))}",
        hint=f"the last exclusion is {printable(last.text)}; add an include after it, or drop it",
    )


def _extents_json(extents: Extents) -> list[list[int]]:
    return [[start, end] for start, end in extents]
