"""Files of one filesystem: what a path leads to, what a directory holds, where bytes are.

Runs in a worker; `file_questions` says how question and answer travel.
"""

from bisect import bisect_right
from collections.abc import Iterator
from hashlib import blake2b
from struct import Struct
from typing import Final, NamedTuple

from stillblock.errors import OriginIOError
from stillblock.extents import intersect, normalise, subtract
from stillblock.model import Extent, Extents
from stillblock.selection.filesystems.filesystem import (
    FileKind,
    Filesystem,
    Layout,
    Node,
    Run,
    UnresolvedError,
)

BATCH_MAX: Final = 2048
"""Entries in one answer: some 400 KiB of JSON."""
LINKS_MAX: Final = 40
"""Links followed for one path; the kernel's limit."""
TARGET_BYTES_MAX: Final = 4096
TOUCHED_MAX: Final = 2_000_000
"""Extents of files kept in mind: some 200 MiB of a worker's memory."""
_READ_BYTES: Final = 1 << 20
_RUN: Final = Struct("<QQQB")


class Entry(NamedTuple):
    """A name in a directory, and what it leads to."""

    name: str
    node: Node
    target: str | None = None
    """Where a link leads, as `os.fsdecode` has it; None of anything else, or if it is not read."""
    changed_bytes: int = 0
    """Of a file, how much of it lies in the extents that were asked about."""
    digest: str = ""
    """Of a file, if it was asked about: of where its bytes are, and of those in no own place."""
    reason: str = ""
    """Why it is not known where its bytes are."""


class Missing(NamedTuple):
    """A path that leads nowhere, and why."""

    reason: str


class Files:
    """Answers questions about one filesystem; remembers where the last listing stopped."""

    def __init__(self, filesystem: Filesystem) -> None:
        self._filesystem = filesystem
        self._listed: tuple[Node, int, Iterator[tuple[str, Node]]] | None = None
        self._changed: Extents | None = None
        self._starts: list[int] = []
        self._touched: list[Extent] = []

    # One path -----------------------------------------------------------------------------------

    def find(self, path: str, *, follows: bool) -> Entry | Missing:
        """Return what a path leads to, through links; the last one is followed if asked to.

        The entry's name is the path without links. Links that lead to `/` begin at the filesystem's
        top, and none leads out of it. Where it ignores case, an exact name still comes first.
        """
        trail: list[tuple[str, Node]] = [("", self._filesystem.root())]
        waiting = _parts(path)
        follows = follows or path.endswith("/")
        link_count = 0
        while waiting:
            part = waiting.pop()
            directory = "/".join(name for name, _ in trail) or "/"
            if part == "..":
                del trail[max(1, len(trail) - 1) :]
                continue
            if trail[-1][1].kind is not FileKind.DIRECTORY:
                return Missing(f"{directory} is no directory")
            found = self._child(trail[-1][1], part)
            if found is None:
                return Missing(f"there is no {part} in {directory}")
            if found[1].kind is not FileKind.SYMLINK or not (waiting or follows):
                trail.append(found)
                continue
            link_count += 1
            if link_count > LINKS_MAX:
                return Missing(f"{path} leads through more than {LINKS_MAX} links")
            target = self._target(found[1])
            if target.startswith("/"):
                del trail[1:]
            waiting += _parts(target)
        if path.endswith("/") and trail[-1][1].kind is not FileKind.DIRECTORY:
            return Missing(f"{path.rstrip('/')} is no directory")
        return self._entry("/".join(name for name, _ in trail) or "/", trail[-1][1])

    def _child(self, directory: Node, name: str) -> tuple[str, Node] | None:
        is_case_sensitive = self._filesystem.identity.is_case_sensitive
        folded: tuple[str, Node] | None = None
        for found, node in self._filesystem.children(directory):
            if found == name:
                return found, node
            if not (is_case_sensitive or folded) and found.casefold() == name.casefold():
                folded = found, node
        return folded

    def _target(self, node: Node) -> str:
        target = self._filesystem.read(node, offset=0, length=TARGET_BYTES_MAX)
        return target.decode("utf-8", "surrogateescape")

    # Directories --------------------------------------------------------------------------------

    def batch(self, directory: Node, *, position: int) -> tuple[list[Entry], bool]:
        """Return entries of a directory from the given one on, and whether those are all."""
        listed, self._listed = self._listed, None
        if listed is not None and listed[:2] == (directory, position):
            children = listed[2]
        else:
            children = iter(self._filesystem.children(directory))
            for _ in range(position):
                next(children, None)
        found: list[Entry] = []
        for name, node in children:
            found.append(self._entry(name, node))
            if len(found) == BATCH_MAX:
                self._listed = (directory, position + len(found), children)
                return found, False
        return found, True

    def _entry(self, name: str, node: Node) -> Entry:
        try:
            if node.kind is FileKind.SYMLINK:
                return Entry(name, node, self._target(node))
            if self._changed is None or node.kind is not FileKind.REGULAR:
                return Entry(name, node)
            layout = self._filesystem.layout(node)
            changed_bytes = sum(self._touch(run) for run in layout.runs)
            return Entry(name, node, None, changed_bytes, self._digest(node, layout))
        except (UnresolvedError, OriginIOError) as error:
            return Entry(name, node, reason=error.message)

    # One file -----------------------------------------------------------------------------------

    def layout(self, node: Node) -> Layout:
        """Return where a regular file's bytes are."""
        return self._filesystem.layout(node)

    def read(self, node: Node, *, offset: int, length: int) -> bytes:
        """Return bytes of a file, or of a link's target, that are in no place of their own."""
        return self._filesystem.read(node, offset=offset, length=length)

    # Changes ------------------------------------------------------------------------------------

    def hold_against(self, changed: Extents) -> None:
        """Tell from now on of each file in a listing what lies in these extents, and its digest."""
        self._changed = changed
        self._starts = [start for start, _ in changed]
        self._touched = []

    def touched(self) -> tuple[Extents, Extents]:
        """Return what of the extents files were seen to have, and what of the rest is free."""
        touched = normalise(self._touched)
        assert self._changed is not None, "asked for so that files are held against them"
        try:
            free = intersect(self._filesystem.free(), self._changed)
        except (UnresolvedError, OriginIOError):
            free = ()
        return touched, subtract(free, touched)

    def _touch(self, run: Run) -> int:
        """Note what of a run changed; return how many bytes."""
        assert self._changed is not None, "files are held against what changed"
        assert run.start is not None, "a layout has no holes"
        end = run.start + run.length
        count = 0
        for index in range(max(0, bisect_right(self._starts, run.start) - 1), len(self._changed)):
            start, stop = self._changed[index]
            if start >= end:
                break
            part = (max(start, run.start), min(stop, end))
            if part[0] < part[1]:
                self._touched.append(part)
                count += part[1] - part[0]
        if len(self._touched) > TOUCHED_MAX:
            self._touched = list(normalise(self._touched))
            if len(self._touched) > TOUCHED_MAX // 2:
                raise UnresolvedError(f"what changed lies in more than {TOUCHED_MAX // 2} pieces")
        return 0 if run.is_unwritten else count

    def _digest(self, node: Node, layout: Layout) -> str:
        digest = blake2b(digest_size=12)
        for run in layout.runs:
            digest.update(_RUN.pack(run.offset, run.length, run.start or 0, run.is_unwritten))
        for start, end in layout.by_reader:
            for offset in range(start, end, _READ_BYTES):
                length = min(_READ_BYTES, end - offset)
                digest.update(self.read(node, offset=offset, length=length))
        return digest.hexdigest()


def _parts(path: str) -> list[str]:
    """Return the names of a path, the first one last."""
    return [part for part in reversed(path.split("/")) if part not in {"", "."}]
