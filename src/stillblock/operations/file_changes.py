"""Which files changed from one snapshot to a later one, and whose the other changed bytes are.

Two trees are walked side by side, a directory at a time. What changed in blocks is known before, so
a file is read only where that leaves a doubt (docs/adr/0015).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from stillblock.errors import StillblockError
from stillblock.extents import Ranges, intersect, normalise, subtract, total_bytes, union
from stillblock.operations.held import Refusal
from stillblock.selection.filesystems.filesystem import FileKind
from stillblock.selection.workers import is_of_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stillblock.model import Extents
    from stillblock.operations.trees import SnapshotFiles, Tree
    from stillblock.selection.files import Entry
    from stillblock.selection.filesystems.filesystem import Node
    from stillblock.selection.places import Place


class Change(StrEnum):
    """What became of a file."""

    APPEARED = "appeared"
    WENT = "went"
    CHANGED = "changed"
    """Its content; its metadata as well, mostly."""
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

    @property
    def is_partial(self) -> bool:
        """Whether something could not be compared."""
        return any(
            place.skipped or any(c.change is Change.UNKNOWN for c in place.changes)
            for place in self.places
        )


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
    for place in after.places:
        mine = intersect(rest, place.extents)
        rest = subtract(rest, place.extents)
        if place.is_filesystem and mine:
            pair = before.tree_at(place.name), after.tree_at(place.name)
            reason = _why_not_compared(*pair)
            old, new = pair
            if reason or old is None or new is None:
                found.append(_untold(place, mine, reason, new))
            else:
                walk = _Walk(
                    old,
                    new,
                    Ranges(extents_within(place, intersect(changed, place.extents))),
                    told or (lambda _: None),
                )
                found.append(_compared(walk, place, mine))
        elif not place.is_filesystem:
            reason = after.why_unknown(place)
            if mine or reason:
                found.append(_untold(place, mine, reason, None))
    if rest:
        found.append(FilesystemChanges(place=ELSEWHERE, other_bytes=total_bytes(rest)))
    return tuple(found)


def _why_not_compared(old: Tree | None, new: Tree | None) -> str:
    if new is None:
        return "its filesystem is not read in the later snapshot"
    if old is None:
        return "there is no filesystem here that is read in the older snapshot"
    if (old.identity.kind, old.identity.uuid) != (new.identity.kind, new.identity.uuid):
        return f"it was another filesystem: {old.identity.kind} {old.identity.uuid}"
    return "it lay elsewhere on the disk" if old.place.pieces != new.place.pieces else ""


def _untold(place: Place, changed: Extents, reason: str, tree: Tree | None) -> FilesystemChanges:
    content = "" if place.content is None else str(place.content)
    return FilesystemChanges(
        place=place.name,
        kind=content if tree is None else tree.identity.kind,
        label="" if tree is None else tree.identity.label,
        other_bytes=total_bytes(changed),
        reason=reason,
        skipped=(reason,) if place.is_filesystem else (),
    )


def _compared(walk: _Walk, place: Place, changed: Extents) -> FilesystemChanges:
    """Walk through both trees; `changed` are extents of the disk in that place."""
    old, new = walk.before, walk.after
    inside = extents_within(place, changed)
    with ExitStack() as stack:
        stack.enter_context(old)
        stack.enter_context(new)
        try:
            old.worker.hold_against(inside)
            new.worker.hold_against(inside)
            walk.run()
            touched_before, _ = old.worker.touched()
            touched_after, free = new.worker.touched()
        except StillblockError as error:
            if not is_of_disk(error):
                raise
            return _untold(place, changed, error.message, new)
    of_files = union(touched_before, touched_after)
    of_nobody = subtract(inside, of_files)
    free_bytes = total_bytes(intersect(free, of_nobody))
    return FilesystemChanges(
        place=place.name,
        kind=new.identity.kind,
        label=new.identity.label,
        changes=tuple(walk.changes),
        file_bytes=total_bytes(of_files),
        metadata_bytes=total_bytes(of_nobody) - free_bytes,
        free_bytes=free_bytes,
        skipped=tuple(walk.skipped),
    )


def extents_within(place: Place, extents: Extents) -> Extents:
    """Return extents of the disk as extents of a place on it; what lies elsewhere is left out."""
    bases = accumulate((end - start for start, end in place.pieces), initial=0)
    return normalise(
        (base + start - piece[0], base + end - piece[0])
        for base, piece in zip(bases, place.pieces, strict=False)
        for start, end in intersect((piece,), extents)
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

    def run(self) -> None:
        """Compare everything below the top."""
        roots = self.before.find("/").node, self.after.find("/").node
        waiting: list[tuple[str, Node | None, Node | None]] = [("/", *roots)]
        while waiting:
            path, old, new = waiting.pop()
            self.told(path)
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
            # Where its bytes are is not known, so neither is whether they changed.
            return (Change.UNKNOWN, reason) if has_new_time else (metadata, "")
        if is_now.changed_bytes or was.changed_bytes or was.digest != is_now.digest:
            if has_new_time:
                return Change.CHANGED, ""
            return self._by_content(path, was, is_now, metadata)
        if has_new_time:
            # Its blocks did not change, as far as they are held.
            for tree, entry in ((self.before, was), (self.after, is_now)):
                refusal = tree.layout(entry.node)
                if isinstance(refusal, Refusal):
                    return Change.UNKNOWN, refusal.reason
        return metadata, ""

    def _by_content(
        self, path: str, was: Entry, is_now: Entry, metadata: Change | None
    ) -> tuple[Change | None, str]:
        """Return whether a file's bytes differ: its blocks changed, and its time did not."""
        try:
            if was.digest == is_now.digest:
                # It lies where it lay: what did not change of its blocks did not change of it. Of
                # those that were not held before, its time is all that tells.
                is_same = self._are_changed_parts_same(is_now.node)
            else:
                old = self.before.content(path, was.node)
                new = self.after.content(path, is_now.node)
                is_same = _is_same(old.read(), new.read())
        except StillblockError as error:
            if not is_of_disk(error):
                raise
            return Change.UNKNOWN, error.message
        return (metadata, "") if is_same else (Change.CHANGED, "")

    def _are_changed_parts_same(self, node: Node) -> bool:
        for run in self.after.worker.layout(node).runs:
            if run.is_unwritten or run.start is None:
                continue
            for start, end in self.changed.within((run.start, run.start + run.length)):
                for at in range(start, end, _COMPARED_BYTES):
                    length = min(_COMPARED_BYTES, end - at)
                    if self.before.read(start=at, length=length) != self.after.read(
                        start=at, length=length
                    ):
                        return False
        return True


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
