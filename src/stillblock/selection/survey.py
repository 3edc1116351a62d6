"""One walk of a filesystem for all terms that concern it: who claims which bytes.

A byte may be claimed by several files (hard links, reflinks, damage), by metadata, or by nobody
when it is free. Whether it is left out is decided elsewhere, once, from all its claims: a byte is
left out only if everything that claims it is. What a survey returns is therefore in groups of files
that the same terms mean, and what of them somebody claims whom no term means is `contested`.

Runs in a worker. Extents are bytes from the start of the filesystem.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from heapq import nlargest
from typing import Final

from stillblock.errors import OriginIOError
from stillblock.extents import intersect, normalise, subtract, union, whole
from stillblock.model import Extents
from stillblock.selection.filesystems.filesystem import (
    FileKind,
    Filesystem,
    Identity,
    Node,
    Run,
    UnresolvedError,
    walk,
)
from stillblock.selection.filesystems.signatures import swap_page_bytes
from stillblock.selection.globs import Glob, Standing, TreeMatcher

TEXT_LENGTH_MAX: Final = 400
"""Characters of a reason or label that are kept."""

GROUPS_MAX: Final = 4096
"""Sets of terms that mean the same files: rarely more than there are terms."""
PIECES_MAX: Final = 1_000_000
"""Extents of files that are told; a parent needs some 150 bytes for each."""
FREE_PIECES_MAX: Final = 500_000
"""Extents of free space that are told: the largest. What is not told stays."""
_SHARING: Final = frozenset({"xfs", "btrfs"})
"""Filesystems in which files may share blocks."""
SWAP_FILE_BYTES_MIN: Final = 10 * 4096
"""mkswap makes none smaller."""
_SWAP_HEAD_BYTES: Final = 65536
_SWAP_NAMES: Final = re.compile(r"swap[^/]*(/[^/]+)?\Z")
"""Where swap files usually are: /swapfile, /swap.img, /swap/1; their content decides."""
_START_BITS: Final = 64
_END_MASK: Final = (1 << _START_BITS) - 1


class TermKind(StrEnum):
    """What a term asks of a filesystem."""

    PATH = "path"
    SWAP = "swap"
    FREE = "free"


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyTerm:
    """A term, as far as a filesystem is concerned."""

    kind: TermKind
    glob: str = ""
    """Of a path term."""
    filesystem: str = ""
    """Of a path term: the one filesystem it speaks of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyRequest:
    """What to look for."""

    place_name: str
    """`part:2`, `lv:vg/root`, `disk`: terms may name the filesystem so."""
    terms: tuple[SurveyTerm, ...]
    wants_metadata: bool = False
    """Whether inclusions of paths need to know what is neither file nor free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What files have that the same terms mean."""

    terms: tuple[int, ...]
    extents: Extents


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What one term came to in one filesystem."""

    file_count: int = 0
    """Names of regular files that it means."""
    file_bytes: int = 0
    """What they have allocated; a file with two names counts twice."""
    unmapped_count: int = 0
    """Files that it means and of which nobody knows where they lie."""
    unmapped_reason: str = ""
    """Of the first."""
    linked_count: int = 0
    """Files that have names which were not found: an exclusion keeps them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What terms mean in one filesystem."""

    identity: Identity
    caveats: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()
    contested: Extents = ()
    """Of the groups' extents, what is claimed by files that no term means, or by metadata."""
    free: Extents = ()
    """Allocated to nobody, by the map and by every file's runs."""
    metadata: Extents = ()
    """What is neither a file's nor free, if asked for."""
    tallies: tuple[Tally, ...] = ()
    """For each term of the request."""
    files_reason: str = ""
    """Why nothing is known of files."""
    free_reason: str = ""
    """Why nothing is known of free space."""


def shown(text: str) -> str:
    """Return text of a stranger, cut, with nothing in it that a terminal would act on."""
    cut = text if len(text) <= TEXT_LENGTH_MAX else text[:TEXT_LENGTH_MAX] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def place_name_of(name: str) -> str | None:
    """Return which place a partition's number or `vg/lv` names; None: it is a label or uuid."""
    if re.fullmatch(r"[0-9]{1,4}|[A-Za-z0-9+_.-]+/[A-Za-z0-9+_.-]+", name) is None:
        return None
    return f"lv:{name}" if "/" in name else f"part:{int(name)}"


def is_named(name: str, *, identity: Identity, place_name: str) -> bool:
    """Whether a filesystem is meant by a label, a uuid, a partition's number or `vg/lv`."""
    if (wanted := place_name_of(name)) is not None:
        return place_name == wanted
    # Who asks knows a label only as it is shown; to show it twice changes nothing.
    return shown(name) == shown(identity.label) or (name.lower() == identity.uuid.lower() != "")


def survey(filesystem: Filesystem, request: SurveyRequest) -> Survey:
    """Return who claims what, in one walk.

    Raise `UnresolvedError` if the filesystem cannot even say which one it is. Memory is some 100
    bytes for each extent of a file that does not touch its neighbour's.
    """
    identity = filesystem.identity
    caveats = filesystem.caveats
    walked = _Walk(filesystem, identity, request)
    reason = ""
    fixed: Extents = ()
    try:
        fixed = filesystem.fixed()
        walked.run()
    except (UnresolvedError, OriginIOError) as error:
        reason = error.message
    wants_free = request.wants_metadata or walked.has(TermKind.FREE)
    free, free_reason = _free(filesystem) if wants_free and not reason else ((), reason)
    if reason:
        return Survey(
            identity=identity,
            caveats=caveats,
            tallies=tuple(Tally() for _ in request.terms),
            files_reason=reason,
            free_reason=reason if wants_free else "",
        )
    by_mask = {mask: _normal(packed) for mask, packed in walked.extents.items()}
    in_files = normalise(extent for extents in by_mask.values() for extent in extents)
    free = subtract(subtract(free, in_files), fixed)
    metadata: Extents = ()
    if request.wants_metadata:
        metadata = subtract(subtract(whole(identity.size), subtract(in_files, fixed)), free)
    unmeant = by_mask.pop(0, ())
    meant = normalise(extent for extents in by_mask.values() for extent in extents)
    contested = intersect(union(unmeant, fixed), meant)
    piece_count = sum(map(len, by_mask.values())) + len(contested) + len(metadata)
    if piece_count > PIECES_MAX:
        reason = f"its files lie in {piece_count} pieces, more than {PIECES_MAX} are not told apart"
    elif walked.unplaced_count and identity.kind in _SHARING:
        reason = (
            f"{walked.unplaced_count} files could not be placed, and may share what others have: "
            f"{walked.unplaced_reason}"
        )
    if reason:
        by_mask, contested, metadata = {}, (), ()
    told_free = _largest(free, FREE_PIECES_MAX) if walked.has(TermKind.FREE) else ()
    if len(told_free) < len(free) and told_free:
        caveats += (f"only the {len(told_free)} largest pieces of free space are left out",)
    return Survey(
        identity=identity,
        caveats=caveats,
        groups=tuple(
            Group(terms=_bits(mask), extents=extents) for mask, extents in by_mask.items()
        ),
        contested=contested,
        free=told_free,
        metadata=metadata,
        tallies=tuple(
            Tally(
                file_count=count.files,
                file_bytes=count.bytes,
                unmapped_count=count.unmapped,
                unmapped_reason=count.reason,
                linked_count=count.linked,
            )
            for count in walked.counts
        ),
        files_reason=reason,
        free_reason=free_reason,
    )


def _largest(extents: Extents, count: int) -> Extents:
    """Return the largest of them, at most so many, in their order."""
    if len(extents) <= count:
        return extents
    return tuple(sorted(nlargest(count, extents, key=lambda extent: extent[1] - extent[0])))


def _free(filesystem: Filesystem) -> tuple[Extents, str]:
    try:
        return filesystem.free(), ""
    except (UnresolvedError, OriginIOError) as error:
        return (), error.message


@dataclass(slots=True)
class _Count:
    files: int = 0
    bytes: int = 0
    unmapped: int = 0
    reason: str = ""
    linked: int = 0


@dataclass(slots=True)
class _Linked:
    """A file with several names: what is known of them so far."""

    node: Node
    seen: int = 0
    mask: int = 0
    """Terms that mean one of its names."""


@dataclass(slots=True)
class _Walk:
    """The walk and what it gathers."""

    filesystem: Filesystem
    identity: Identity
    request: SurveyRequest
    extents: dict[int, list[int]] = field(default_factory=dict)
    """By the terms that mean it, as bits: start << 64 | end of each run."""
    counts: list[_Count] = field(init=False)
    unplaced_count: int = 0
    """Files of which nobody knows where they lie, whether a term means them or not."""
    unplaced_reason: str = ""
    _linked: dict[int, _Linked] = field(default_factory=dict)
    _swap_mask: int = 0
    _kinds: frozenset[TermKind] = frozenset()

    def __post_init__(self) -> None:
        self.counts = [_Count() for _ in self.request.terms]
        kinds = set()
        for index, term in enumerate(self.request.terms):
            if self._concerns(term):
                kinds.add(term.kind)
                if term.kind is TermKind.SWAP:
                    self._swap_mask |= 1 << index
        self._kinds = frozenset(kinds)

    def has(self, kind: TermKind) -> bool:
        """Whether a term of that kind concerns this filesystem."""
        return kind in self._kinds

    def run(self) -> None:
        """Walk; raise `UnresolvedError` if the tree cannot be seen whole."""
        if not self._kinds:
            return
        bit_of: list[int] = []
        globs: list[Glob] = []
        for index, term in enumerate(self.request.terms):
            if term.kind is TermKind.PATH and self._concerns(term):
                bit_of.append(index)
                globs.append(Glob.parse(term.glob))
        matcher = TreeMatcher(globs, is_case_sensitive=self.identity.is_case_sensitive)
        mask_of: dict[int, int] = {}
        # The directories that lead to where the walk is, by the path before their names.
        stack: list[tuple[str, Standing]] = [("", matcher.root())]
        for path, node in walk(self.filesystem):
            if path == "/":
                continue
            parent, _, name = path.rpartition("/")
            while stack[-1][0] != parent:
                stack.pop()
                if not stack:
                    raise UnresolvedError(f"the name {name[:40]!r} holds a slash")
            if node.kind is FileKind.DIRECTORY:
                stack.append((path, matcher.enter(stack[-1][1], name)))
            elif node.kind is FileKind.REGULAR:
                matched = matcher.match(stack[-1][1], name)
                mask = mask_of.get(matched)
                if mask is None:
                    mask = mask_of[matched] = sum(1 << bit_of[bit] for bit in _bits(matched))
                self._take(path, node, mask)
        self._take_hidden_names()

    def _concerns(self, term: SurveyTerm) -> bool:
        return not term.filesystem or is_named(
            term.filesystem, identity=self.identity, place_name=self.request.place_name
        )

    def _take(self, path: str, node: Node, mask: int) -> None:
        """Note the claims of one name of a file."""
        runs, reason = self._runs(node)
        if reason:
            self.unplaced_count += 1
            self.unplaced_reason = self.unplaced_reason or reason
        swap_page = 0
        if self._swap_mask and not reason:
            swap_page = self._swap_page(path, node)
        meaning = mask | self._swap_mask if swap_page else mask
        size = 0
        for run in runs:
            assert run.start is not None, "holes were dropped"
            size += run.length
            if swap_page and run.offset < swap_page:
                # The header stays: what is restored is a swap file still.
                head = min(run.length, swap_page - run.offset)
                self._claim(mask, run.start, run.start + head)
                self._claim(meaning, run.start + head, run.start + run.length)
            else:
                self._claim(meaning, run.start, run.start + run.length)
        for bit in _bits(meaning):
            count = self.counts[bit]
            count.files += 1
            count.bytes += size
            if reason:
                count.unmapped += 1
                count.reason = count.reason or reason
        if node.links > 1:
            linked = self._linked.setdefault(node.number, _Linked(node))
            linked.seen += 1
            linked.mask |= meaning

    def _take_hidden_names(self) -> None:
        """Let names that were not found claim what no term means: they may lie anywhere."""
        for linked in self._linked.values():
            if linked.mask and linked.seen < linked.node.links:
                for run in self._runs(linked.node)[0]:
                    assert run.start is not None, "holes were dropped"
                    self._claim(0, run.start, run.start + run.length)
                for bit in _bits(linked.mask):
                    self.counts[bit].linked += 1

    def _runs(self, node: Node) -> tuple[list[Run], str]:
        """Return what a file has on the disk, or nothing and why that is not known."""
        try:
            runs = [
                run for run in self.filesystem.runs(node) if run.start is not None and run.length
            ]
        except UnresolvedError as error:
            return [], error.message
        for run in runs:
            assert run.start is not None, "holes were dropped"
            if run.start < 0 or run.length < 0 or run.start + run.length > self.identity.size:
                return [], "its data is said to lie outside the filesystem"
        return runs, ""

    def _claim(self, mask: int, start: int, end: int) -> None:
        if start >= end:
            return
        claimed = self.extents.get(mask)
        if claimed is None:
            if len(self.extents) >= GROUPS_MAX:
                raise UnresolvedError(f"the terms divide its files in more than {GROUPS_MAX} ways")
            claimed = self.extents[mask] = []
        if claimed and claimed[-1] & _END_MASK == start:
            claimed[-1] += end - start
        else:
            claimed.append(start << _START_BITS | end)

    def _swap_page(self, path: str, node: Node) -> int:
        """Return the page size of a swap file, 0 if it is none.

        Read are only those that are where swap files usually are, or as closed as they must be.
        """
        if node.size < SWAP_FILE_BYTES_MIN:
            return 0
        is_closed = node.uid == 0 and node.mode != 0 and node.mode & 0o077 == 0
        if not (is_closed and node.size % 4096 == 0) and not _SWAP_NAMES.search(path):
            return 0
        try:
            head = self.filesystem.read(node, offset=0, length=_SWAP_HEAD_BYTES)
        except UnresolvedError:
            return 0  # what cannot be read is not known to be swap
        return swap_page_bytes(head) or 0


def _normal(packed: list[int]) -> Extents:
    packed.sort()
    return normalise((item >> _START_BITS, item & _END_MASK) for item in packed)


def _bits(mask: int) -> tuple[int, ...]:
    return tuple(_each_bit(mask))


def _each_bit(mask: int) -> Iterable[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
