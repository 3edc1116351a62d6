"""The frozen view to the final selection: terms of files, free space, swap files and zeros.

Whatever cannot be resolved is kept, and said.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from stillblock.errors import StillblockError
from stillblock.extents import intersect, normalise, subtract, total_bytes, union, whole
from stillblock.model import Extent, Extents, Unresolved
from stillblock.selection.decision import Claim, Decision, decide_with_doubt
from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.facts import Readers
from stillblock.selection.file_terms import SWAP_HEADER_BYTES, Paths
from stillblock.selection.filesystems import UnresolvedError
from stillblock.selection.filesystems.signatures import Content, identify
from stillblock.selection.places import Place, is_swap_area
from stillblock.selection.resolution import (
    Pending,
    PendingTerm,
    Resolution,
    TermResult,
    term_note,
)
from stillblock.selection.survey import Survey, SurveyRequest, SurveyTerm, TermKind, is_named
from stillblock.selection.terms import parse_term
from stillblock.selection.workers import WorkerReaders, is_of_disk

Progress = Callable[[str, int, int], None]
"""Called with what is being read, how many of its bytes or steps are done, and of how many."""
ZERO_PIECES_MAX: Final = 500_000
"""Extents of zeros that are told: some 100 MiB until all is decided. What is not told stays."""
_READ_BYTES: Final = 1 << 20
_ZEROS: Final = bytes(_READ_BYTES)


def resolve_frozen(
    pending: Pending,
    view: Disk,
    *,
    readers: Readers | None = None,
    progress: Progress | None = None,
) -> Resolution:
    """Return the final selection; never more than at the instant.

    `view` is the disk at the instant; reading what it does not hold must raise, never give other
    bytes. Raise what it raises when it is not the disk's fault, such as a volume that was closed.
    """
    return _Narrowing(
        pending, view, readers or WorkerReaders(), progress or (lambda *_: None)
    ).resolution()


@dataclass(slots=True)
class _Findings:
    """What was found of one term."""

    matched: Extents
    """The bytes it matches whoever claims them."""
    doubted: Extents = ()
    """Of a low inclusion: bytes that it may match. They are selected, and not given up first."""
    claimed: list[Extent] = field(default_factory=list)
    """Bytes it matches by a claim."""
    file_count: int = 0
    unresolved: list[Unresolved] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _Narrowing:
    def __init__(self, pending: Pending, view: Disk, readers: Readers, progress: Progress) -> None:
        self._pending = pending
        self._view = view
        self._readers = readers
        self._progress = progress
        self._instant = pending.decide()
        self._claims: list[Claim] = []
        self._notes: list[str] = []
        self._found = [
            _Findings(
                matched=pending_term.sure if pending_term.term.is_low else pending_term.certain,
                doubted=subtract(pending_term.certain, pending_term.sure)
                if pending_term.term.is_low
                else (),
                unresolved=[unresolved for unresolved, _ in pending_term.match.unresolved],
            )
            for pending_term in pending.terms
        ]
        self._is_name_found: set[int] = set()

    def resolution(self) -> Resolution:
        """Read what there is to read, then decide."""
        filesystems = [place for place in self._pending.places if place.is_filesystem]
        for step, place in enumerate(filesystems):
            self._progress(place.name, step, len(filesystems))
            self._survey(place)
        for place in self._pending.places:
            if place.is_swap:
                self._look_again(place)
        if self._pending.is_zero_open:
            self._find_zeros()
        decision = self._decide()
        assert not subtract(decision.selected, self._instant.selected), "narrowing never widens"
        return Resolution(
            disk_size=self._pending.disk_size,
            block_size=self._pending.block_size,
            extents=decision.selected,
            low=decision.low,
            terms=tuple(
                self._result(index, contributed)
                for index, contributed in enumerate(decision.contributed_bytes)
            ),
            excluded=decision.excluded,
            notes=(*self._pending.notes, *self._notes),
        )

    def _decide(self, zeros: "Extents | None" = None) -> Decision:
        """Decide with what was found, and blocks of zeros if they are given."""
        sure = [
            union(found.matched, zeros)
            if zeros is not None and pending_term.kind == "zero"
            else found.matched
            for pending_term, found in zip(self._pending.terms, self._found, strict=True)
        ]
        return decide_with_doubt(
            self._pending.rules,
            [
                union(extents, found.doubted)
                for extents, found in zip(sure, self._found, strict=True)
            ],
            sure,
            size=self._pending.disk_size,
            block_size=self._pending.block_size,
            claims=self._claims,
        )

    def _result(self, index: int, contributed_bytes: int) -> TermResult:
        pending_term, found = self._pending.terms[index], self._found[index]
        extents = union(union(found.matched, found.doubted), normalise(found.claimed))
        notes = list(found.notes)
        if pending_term.kind == "path" and not found.file_count and not found.unresolved:
            notes.append(self._why_no_file(index, pending_term))
        return TermResult(
            include=pending_term.term.include,
            text=pending_term.term.text,
            extents=extents,
            contributed_bytes=contributed_bytes,
            phase=pending_term.phase,
            file_count=found.file_count,
            unresolved=tuple(found.unresolved),
            note=term_note(
                pending_term.term,
                pending_term.match.note,
                *notes,
                is_overridden=not contributed_bytes and bool(extents),
            ),
            is_low=pending_term.term.is_low,
        )

    def _why_no_file(self, index: int, pending_term: PendingTerm) -> str:
        surveyed = {place.name for place in self._pending.places if place.is_filesystem}
        if not surveyed:
            return "other terms decide all of its filesystems"
        if _paths(pending_term).filesystem and index not in self._is_name_found:
            return "no filesystem of that name was there at the instant"
        return "no file matched"

    # Filesystems ------------------------------------------------------------------------------

    def _survey(self, place: Place) -> None:
        concerned = [
            index
            for index, pending_term in enumerate(self._pending.terms)
            if pending_term.kind in set(TermKind)
            and intersect(pending_term.match.frozen, place.extents)
        ]
        request = SurveyRequest(
            place_name=place.name,
            terms=tuple(_survey_term(self._pending.terms[index]) for index in concerned),
            wants_metadata=self._is_metadata_in_question(place)
            and any(self._is_path_inclusion(index) for index in concerned),
        )
        assert place.content is not None, "a filesystem has a content"
        try:
            survey = self._readers.survey(
                place.disk(self._view), content=place.content, request=request
            )
        except UnresolvedError as error:
            for index in concerned:
                self._give_up(index, place, error.message)
            return
        self._notes += (f"{place.name}: {caveat}" for caveat in survey.caveats)
        for local, index in enumerate(concerned):
            self._tally(place, survey, request.terms[local], local=local, index=index)
        self._claim(place, survey, concerned)

    def _tally(
        self, place: Place, survey: Survey, term: SurveyTerm, *, local: int, index: int
    ) -> None:
        tally, found = survey.tallies[local], self._found[index]
        if term.filesystem and is_named(
            term.filesystem, identity=survey.identity, place_name=place.name
        ):
            self._is_name_found.add(index)
        elif term.filesystem:
            return
        reason = survey.free_reason if term.kind is TermKind.FREE else survey.files_reason
        if reason:
            self._give_up(index, place, reason)
            return
        found.file_count += tally.file_count
        if tally.unmapped_count:
            reason = f"{tally.unmapped_count} files could not be placed: {tally.unmapped_reason}"
            if self._pending.terms[index].term.include:
                self._give_up(index, place, reason)
            else:
                found.unresolved.append(Unresolved(place=place.name, reason=reason))
        if tally.linked_count and not self._pending.terms[index].term.include:
            found.notes.append(
                f"{tally.linked_count} files have names elsewhere that were not found, and stay"
            )

    def _give_up(self, index: int, place: Place, reason: str) -> None:
        """Let an exclusion leave nothing out of a place, and an inclusion take all of it."""
        found = self._found[index]
        found.unresolved.append(Unresolved(place=place.name, reason=reason))
        term = self._pending.terms[index].term
        if term.is_low:
            found.doubted = union(found.doubted, place.extents)
        elif term.include:
            found.matched = union(found.matched, place.extents)

    def _claim(self, place: Place, survey: Survey, concerned: Sequence[int]) -> None:
        """Translate what is claimed in the filesystem to the disk."""
        for group in survey.groups:
            extents = place.disk_extents(group.extents)
            self._add_claim(extents, tuple(concerned[local] for local in group.terms))
        self._add_claim(place.disk_extents(survey.contested), ())
        free = tuple(index for index in concerned if self._pending.terms[index].kind == "free")
        self._add_claim(place.disk_extents(survey.free), free)
        if survey.metadata:
            # Past the end of the filesystem may be more of it, such as a second boot sector.
            beyond = subtract(whole(place.size), whole(survey.identity.size))
            readable = tuple(
                index
                for local, index in enumerate(concerned)
                if self._is_path_inclusion(index) and survey.tallies[local].file_count
            )
            extents = place.disk_extents(union(survey.metadata, beyond))
            self._add_claim(extents, readable)
            # Metadata that a file needs which matters is metadata that matters.
            high = tuple(i for i in readable if not self._pending.terms[i].term.is_low)
            if high and high != readable:
                self._add_claim(extents, high)

    def _add_claim(self, extents: Extents, terms: tuple[int, ...]) -> None:
        if not extents:
            return
        self._claims.append(Claim(extents=extents, terms=terms))
        for index in terms:
            self._found[index].claimed += extents

    def _is_metadata_in_question(self, place: Place) -> bool:
        """Whether what no file claims is left out, unless an inclusion of files takes it."""
        terms = self._pending.terms
        return terms[0].term.include or any(
            not pending_term.term.include
            and (pending_term.kind == "zero" or intersect(pending_term.certain, place.extents))
            for pending_term in terms
        )

    def _is_path_inclusion(self, index: int) -> bool:
        pending_term = self._pending.terms[index]
        return pending_term.kind == "path" and pending_term.term.include

    # Swap areas -------------------------------------------------------------------------------

    def _look_again(self, place: Place) -> None:
        """See whether what was left out as swap was swap at the instant; its header was kept."""
        head = place.disk_extents(((0, SWAP_HEADER_BYTES),))
        if subtract(head, self._instant.selected):
            return  # other terms leave it out whatever it holds
        header = replace(place, pieces=head)
        try:
            content = identify(header.disk(self._view)).content
            if content is Content.SWAP and not is_swap_area(header.disk(self._view)):
                content = None
            found = f"{content or 'nothing known'} at the instant"
        except StillblockError as error:
            if not is_of_disk(error):
                raise
            content, found = None, f"unreadable: {error.message}"
        if content is Content.SWAP:
            return
        unresolved = Unresolved(
            place=place.name,
            reason=f"it was swap before the instant and {found}; it was left out all the same",
        )
        for pending_term, findings in zip(self._pending.terms, self._found, strict=True):
            if pending_term.kind == "swap" and not pending_term.term.include:
                findings.unresolved.append(unresolved)

    # Zeros ------------------------------------------------------------------------------------

    def _find_zeros(self) -> None:
        """Read the blocks whose fate depends on it, and only those."""
        size, block_size = self._pending.disk_size, self._pending.block_size
        without, with_all = self._decide().kept, self._decide(whole(size)).kept
        candidates = union(subtract(without, with_all), subtract(with_all, without))
        zero: list[Extent] = []
        unknown: list[Extent] = []
        reasons: list[str] = []
        failure_count, failure = 0, ""
        done, total = 0, total_bytes(candidates)
        for start, end in _portions(candidates):
            if len(zero) >= ZERO_PIECES_MAX:
                unknown += intersect(candidates, ((start, size),))
                reasons.append(
                    f"there are more than {ZERO_PIECES_MAX} pieces of zeros, which were not looked "
                    f"for any more from byte {start} on"
                )
                break
            self._progress("zero", done, total)
            try:
                data = read_exactly(self._view, offset=start, length=end - start)
                _add(zero, _zeros_in(data, start, block_size))
            except StillblockError as error:
                if not is_of_disk(error):
                    raise
                _add(unknown, [(start, end)])
                failure_count, failure = failure_count + 1, failure or error.message
            done += end - start
        if failure_count:
            reasons.append(f"{failure_count} reads failed, the first with: {failure}")
        for pending_term, found in zip(self._pending.terms, self._found, strict=True):
            if pending_term.kind != "zero":
                continue
            found.matched = normalise(zero)
            if pending_term.term.is_low:
                found.doubted = normalise(unknown)
            elif pending_term.term.include:
                found.matched = normalise(zero + unknown)
            found.unresolved += (Unresolved(place="disk", reason=reason) for reason in reasons)


def _portions(extents: Extents) -> Iterator[Extent]:
    """Yield what to read at a time, each within one aligned stretch of the disk."""
    for start, end in extents:
        position = start
        while position < end:
            stop = min(end, position - position % _READ_BYTES + _READ_BYTES)
            yield position, stop
            position = stop


def _add(found: list[Extent], extents: list[Extent]) -> None:
    """Append extents that lie behind those found; the first may touch the last, and joins it."""
    if found and extents and found[-1][1] == extents[0][0]:
        extents[0] = (found.pop()[0], extents[0][1])
    found += extents


def _zeros_in(data: bytes, start: int, block_size: int) -> list[Extent]:
    """Return which parts of blocks in `data`, which lies at `start`, are zero."""
    if data == _ZEROS[: len(data)]:
        return [(start, start + len(data))]
    found: list[Extent] = []
    position = 0
    while position < len(data):
        stop = min(len(data), position + block_size - (start + position) % block_size)
        if data[position:stop] == _ZEROS[: stop - position]:
            found.append((start + position, start + stop))
        position = stop
    return found


def _survey_term(pending_term: PendingTerm) -> SurveyTerm:
    if pending_term.kind != "path":
        return SurveyTerm(kind=TermKind(pending_term.kind))
    paths = _paths(pending_term)
    return SurveyTerm(kind=TermKind.PATH, glob=paths.glob.text, filesystem=paths.filesystem)


def _paths(pending_term: PendingTerm) -> Paths:
    _, meaning = parse_term(pending_term.term.text)
    assert isinstance(meaning, Paths), "the kind says so"
    return meaning
