"""Which files changed from one snapshot to a later one, and whose the other changed bytes are.

Two trees are walked side by side, a directory at a time. What changed in blocks is known before, so
a file is read only where that leaves a doubt (docs/adr/0015).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from stillblock.errors import StillblockError
from stillblock.extents import Ranges, intersect, subtract, total_bytes, union
from stillblock.model import format_size
from stillblock.operations.held import Refusal
from stillblock.operations.trees import extents_within
from stillblock.selection.filesystems.filesystem import FileKind
from stillblock.selection.workers import is_of_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stillblock.model import Extent, Extents
    from stillblock.operations.trees import SnapshotFiles, Tree
    from stillblock.selection.files import Entry
    from stillblock.selection.filesystems.filesystem import Node
    from stillblock.selection.places import Place


class Change(StrEnum):
    """What became of a file."""

    APPEARED = "appeared"
    WENT = "went"
    CHANGED = "changed"
    """Its content, or blocks of it were written and it has another time."""
    METADATA = "metadata"
    """Mode, owner, time, number of names, or which inode it is; not its content."""
    UNKNOWN = "unknown"
    """Nobody can tell: not all of it is held by both snapshots, or it is not understood."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileChange:
    """One file, link or directory."""

    path: str
    kind: FileKind
    change: Change
    size_before: int | None
    """None: it was not there."""
    size_after: int | None
    changed_bytes: int = 0
    """Of what it has now, in blocks that changed or were not held before."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesystemChanges:
    """What changed in one place of the disk. Bytes are those that changed or were not held."""

    place: str
    kind: str = ""
    label: str = ""
    changes: tuple[FileChange, ...] = ()
    file_bytes: int = 0
    """Of files, in either snapshot."""
    metadata_bytes: int = 0
    """Of the filesystem itself: neither a file's nor free."""
    free_bytes: int = 0
    """Free in the later snapshot."""
    other_bytes: int = 0
    """Where nothing is told apart: swap, what is opaque, what lies between partitions."""
    reason: str = ""
    """Why nothing is told apart."""
    skipped: tuple[str, ...] = ()
    """Why a directory could not be compared, or all of the filesystem."""
    told_by_time_only: int = 0
    """Names that are not listed as changed only because size and time are what they were: not all
    of the file is held by both snapshots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDiff:
    """What changed from one snapshot to a later one, by files."""

    volume: str
    since: str
    until: str
    changed_bytes: int
    newly_selected_bytes: int
    """Not held before: an empty block that a file took since, or what rules left out."""
    places: tuple[FilesystemChanges, ...]
    suspect_reasons: tuple[str, ...] = ()
    """Why the bytes of either may be others than those of its instant, or changes be unknown."""

    @property
    def is_partial(self) -> bool:
        """Whether something could not be compared, or not be relied on."""
        return bool(self.suspect_reasons) or any(
            place.skipped or any(c.change is Change.UNKNOWN for c in place.changes)
            for place in self.places
        )


_WENT: Final = "its filesystem is not there in the later snapshot"
ELSEWHERE: Final = "elsewhere"
"""Tables, gaps, what LVM2 writes for itself."""
_COMPARED_BYTES: Final = 1 << 20


def compare_files(
    before: SnapshotFiles,
    after: SnapshotFiles,
    changed: Extents,
    *,
    newly_selected: Extents = (),
    told: Callable[[str], None] | None = None,
) -> tuple[FilesystemChanges, ...]:
    """Return what changed place by place.

    `changed` are the extents of the disk that changed of what the older snapshot holds,
    `newly_selected` those that only the later one holds. `told` hears the path that is looked at.
    """
    found: list[FilesystemChanges] = []
    rest = union(changed, newly_selected)
    were = {place.name: place for place in before.places}
    for place in after.places:
        was = were.pop(place.name, None)
        mine = intersect(rest, place.extents)
        rest = subtract(rest, place.extents)
        if place.is_filesystem and mine:
            found.append(_compare_place(before, after, (was, place), mine, told=told))
        elif not place.is_filesystem:
            reason = after.why_unknown(place)
            if was is not None and was.is_filesystem:
                reason = reason or _WENT
            if mine or (reason and not place.opaque_reason):
                found.append(_untold(place, mine, reason))
    for place in were.values():
        mine = intersect(rest, place.extents)
        rest = subtract(rest, place.extents)
        if place.is_filesystem:
            found.append(_untold(place, mine, _WENT))
        elif mine:
            found.append(_untold(place, mine, before.why_unknown(place)))
    if rest:
        found.append(FilesystemChanges(place=ELSEWHERE, other_bytes=total_bytes(rest)))
    return tuple(found)


def _why_not_compared(there: Place | None, place: Place) -> str:
    """Return why two places are not of one filesystem; empty if they may be."""
    if there is None or not there.is_filesystem:
        return "there was no filesystem here that is read"
    if there.pieces == place.pieces:
        return ""
    if there.size != place.size:
        return f"it was {format_size(there.size)} large, and is {format_size(place.size)}"
    return "it lay elsewhere on the disk"


def _untold(place: Place, changed: Extents, reason: str) -> FilesystemChanges:
    return FilesystemChanges(
        place=place.name,
        kind="" if place.content is None else str(place.content),
        other_bytes=total_bytes(changed),
        reason=reason,
        skipped=(reason,) if reason else (),
    )


def _compare_place(
    before: SnapshotFiles,
    after: SnapshotFiles,
    pair: tuple[Place | None, Place],
    changed: Extents,
    *,
    told: Callable[[str], None] | None,
) -> FilesystemChanges:
    """Compare one filesystem, by its place in either snapshot."""
    there, place = pair
    reason = _why_not_compared(*pair)
    if reason or there is None:
        return _untold(place, changed, reason)
    inside = extents_within(place, changed)
    try:
        with before.tree_at(there) as old, after.tree_at(place) as new:
            if (old.identity.kind, old.identity.uuid) != (new.identity.kind, new.identity.uuid):
                was = f"{old.identity.kind} {old.identity.uuid}"
                return _untold(place, changed, f"it was another filesystem: {was}")
            walk = _Walk(old, new, Ranges(inside), told or (lambda _: None))
            old.worker.hold_against(inside)
            new.worker.hold_against(inside)
            walk.run()
            touched_before, _ = old.worker.touched()
            touched_after, free = new.worker.touched()
            identity = new.identity
    except StillblockError as error:
        if not is_of_disk(error):
            raise
        return _untold(place, changed, error.message)
    of_files = union(touched_before, touched_after)
    of_nobody = subtract(inside, of_files)
    free_bytes = total_bytes(intersect(free, of_nobody))
    return FilesystemChanges(
        place=place.name,
        kind=identity.kind,
        label=identity.label,
        changes=tuple(walk.changes),
        file_bytes=total_bytes(of_files),
        metadata_bytes=total_bytes(of_nobody) - free_bytes,
        free_bytes=free_bytes,
        skipped=tuple(walk.skipped),
        told_by_time_only=walk.told_by_time_only,
    )


@dataclass(slots=True)
class _Walk:
    """One walk through two trees of the same filesystem."""

    before: Tree
    after: Tree
    changed: Ranges
    told: Callable[[str], None]
    changes: list[FileChange] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    told_by_time_only: int = 0

    def run(self) -> None:
        """Compare the top and everything below it."""
        roots = self.before.find("/"), self.after.find("/")
        self._compare("/", *roots)
        waiting: list[tuple[str, Node | None, Node | None]]
        waiting = [("/", roots[0].node, roots[1].node)]
        # A directory has one place in a tree, or a damaged tree would have no end.
        entered: set[tuple[bool, int]] = set()
        while waiting:
            path, old, new = waiting.pop()
            self.told(path)
            here = {(tree, n.number) for tree, n in ((False, old), (True, new)) if n is not None}
            if here & entered:
                where = (self.before if new is None else self.after).path(path)
                self.skipped.append(f"{where} is in two places, or inside itself: it is damaged")
                continue
            entered |= here
            waiting += reversed(self._directory(path, old, new))

    def _directory(
        self, path: str, old: Node | None, new: Node | None
    ) -> list[tuple[str, Node | None, Node | None]]:
        """Compare what two directories hold; return the directories in them."""
        try:
            there = {} if old is None else {e.name: e for e in self.before.entries(path, old)}
            here = {} if new is None else {e.name: e for e in self.after.entries(path, new)}
        except StillblockError as error:
            if not is_of_disk(error):
                raise
            self.skipped.append(error.message)
            return []
        below: list[tuple[str, Node | None, Node | None]] = []
        base = path.rstrip("/")
        for name in sorted(there.keys() | here.keys()):
            was, is_now = there.get(name), here.get(name)
            inner = f"{base}/{name}"
            if was is not None and is_now is not None and was.node.kind is not is_now.node.kind:
                # One thing went, and another took its name.
                self._compare(inner, was, None)
                self._compare(inner, None, is_now)
            else:
                self._compare(inner, was, is_now)
            folders = (_folder(was), _folder(is_now))
            if folders != (None, None):
                below.append((inner, *folders))
        return below

    def _compare(self, path: str, was: Entry | None, is_now: Entry | None) -> None:
        some = is_now or was
        assert some is not None, "a name is there or was"
        if was is None or is_now is None:
            change: Change | None = Change.APPEARED if was is None else Change.WENT
            note = some.reason
        elif some.node.kind is FileKind.REGULAR:
            change, note = self._file(path, was, is_now)
        elif some.node.kind is FileKind.SYMLINK and was.target != is_now.target:
            change, note = Change.CHANGED, ""
        else:
            change, note = _metadata(was.node, is_now.node), ""
        if change is None:
            return
        is_folder = some.node.kind is FileKind.DIRECTORY
        self.changes.append(
            FileChange(
                path=path,
                kind=some.node.kind,
                change=change,
                size_before=None if was is None or is_folder else was.node.size,
                size_after=None if is_now is None or is_folder else is_now.node.size,
                changed_bytes=0 if is_now is None else is_now.changed_bytes,
                note=note,
            )
        )

    def _file(self, path: str, was: Entry, is_now: Entry) -> tuple[Change | None, str]:
        """Return what became of a file that both trees have."""
        metadata = _metadata(was.node, is_now.node)
        has_new_time = was.node.modified_ns != is_now.node.modified_ns
        if was.node.size != is_now.node.size:
            return Change.CHANGED, ""
        if reason := is_now.reason or was.reason:
            # Where its bytes are is not known, so neither is whether they changed; a time can be
            # put back, or not have been written out yet.
            return Change.UNKNOWN, reason
        if is_now.changed_bytes or was.changed_bytes or was.digest != is_now.digest:
            if has_new_time:
                return Change.CHANGED, ""
            return self._by_content(path, was, is_now, metadata)
        # Its blocks did not change, as far as they are held.
        if refusal := self._refusal(was.node, is_now.node):
            if has_new_time:
                return Change.UNKNOWN, refusal.reason
            self.told_by_time_only += 1
        return metadata, ""

    def _refusal(self, was: Node, is_now: Node) -> Refusal | None:
        """Return why not all of a file is held by both snapshots; None if it is."""
        for tree, node in ((self.before, was), (self.after, is_now)):
            if tree.may_lack_files and isinstance(refusal := tree.layout(node), Refusal):
                return refusal
        return None

    def _by_content(
        self, path: str, was: Entry, is_now: Entry, metadata: Change | None
    ) -> tuple[Change | None, str]:
        """Return whether a file's bytes differ: its blocks changed, and its time did not."""
        try:
            if was.digest == is_now.digest:
                # It lies where it lay: what did not change of its blocks did not change of it. Of
                # those that one snapshot does not hold, its time is all that tells.
                refusal = self._refusal(was.node, is_now.node)
                is_same = self._are_changed_parts_same(is_now.node, is_held=refusal is None)
                self.told_by_time_only += refusal is not None and is_same
            else:
                old = self.before.content(path, was.node)
                new = self.after.content(path, is_now.node)
                is_same = _is_same(old.read(), new.read())
        except StillblockError as error:
            if not is_of_disk(error):
                raise
            return Change.UNKNOWN, error.message
        return (metadata, "") if is_same else (Change.CHANGED, "")

    def _are_changed_parts_same(self, node: Node, *, is_held: bool) -> bool:
        """Return whether what changed of a file is the same, as far as it is held."""
        trees = self.before, self.after
        for run in self.after.worker.layout(node).runs:
            if run.is_unwritten or run.start is None:
                continue
            for start, end in self.changed.within((run.start, run.start + run.length)):
                for at, stop in self._pieces(start, end, is_held=is_held):
                    old, new = (tree.read(start=at, length=stop - at) for tree in trees)
                    if old != new:
                        return False
        return True

    def _pieces(self, start: int, end: int, *, is_held: bool) -> Iterator[Extent]:
        """Yield pieces to compare; what rules left out of either snapshot is left out."""
        for at in range(start, end, _COMPARED_BYTES):
            piece = ((at, min(end, at + _COMPARED_BYTES)),)
            gone = union(*(tree.left_out(piece) for tree in (self.before, self.after)))
            yield from piece if is_held else subtract(piece, gone)


def _folder(entry: Entry | None) -> Node | None:
    return entry.node if entry is not None and entry.node.kind is FileKind.DIRECTORY else None


def _metadata(old: Node, new: Node) -> Change | None:
    """Return whether metadata changed that people set; a directory's time tells of its names."""
    if old.kind is FileKind.DIRECTORY:
        is_same = (old.mode, old.uid, old.gid) == (new.mode, new.uid, new.gid)
    else:
        is_same = _told_of(old) == _told_of(new)
    return None if is_same else Change.METADATA


def _told_of(node: Node) -> tuple[int, ...]:
    number = (node.number, node.generation)
    return (*number, node.mode, node.uid, node.gid, node.links, node.modified_ns)


def _is_same(old: Iterator[bytes], new: Iterator[bytes]) -> bool:
    """Whether two files of one size hold the same bytes, however they come in pieces."""
    a = b = b""
    while True:
        a = a or next(old, b"")
        b = b or next(new, b"")
        if not a or not b:
            return not a and not b
        count = min(len(a), len(b))
        if a[:count] != b[:count]:
            return False
        a, b = a[count:], b[count:]
