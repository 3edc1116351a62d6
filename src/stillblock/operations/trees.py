"""The files of a snapshot: which filesystems it has, what is in them, and each file's bytes.

Nothing is mounted, and nothing is given that the snapshot does not hold (docs/adr/0015).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from stillblock.errors import NotFoundError, StillblockError, UsageError
from stillblock.extents import normalise, subtract
from stillblock.model import Unresolved
from stillblock.operations.held import Refusal, Why
from stillblock.selection.disk import read_exactly
from stillblock.selection.facts import DiskFacts
from stillblock.selection.file_worker import FileWorker
from stillblock.selection.files import Missing
from stillblock.selection.filesystems.filesystem import FileKind, UnresolvedError
from stillblock.selection.partition_table import printable
from stillblock.selection.survey import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stillblock.model import Extents
    from stillblock.operations.held import Held
    from stillblock.selection.files import Entry
    from stillblock.selection.filesystems.filesystem import Identity, Layout, Node
    from stillblock.selection.places import Place

_CHUNK_BYTES: Final = 1 << 20
_HEAD_BYTES: Final = 4096
"""Where most signatures are."""
_WITHOUT_MODES: Final = frozenset({"ntfs", "fat12", "fat16", "fat32", "exfat"})


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesystemInfo:
    """A place of a disk and what it holds, as lists and JSON show it."""

    place: str
    """`part:2`, `lv:vg/root` or `disk`: how a path names it, `part:` and `lv:` may be left out."""
    kind: str
    """`ext4`, `xfs`; for what is no filesystem that is read, what its signature says."""
    label: str = ""
    uuid: str = ""
    size_bytes: int = 0
    is_read: bool = False
    note: str = ""
    """Why it is not read."""


class SnapshotFiles:
    """The filesystems of a snapshot or clone."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._facts = DiskFacts(_Peeked(held))

    def filesystems(self) -> tuple[FilesystemInfo, ...]:
        """Return all places of the disk, in its order."""
        return tuple(self._info(place) for place in self._facts.places.places)

    def tree(self, name: str | None) -> Tree:
        """Return a filesystem by name as rules have it; without one, the only one there is."""
        place = self._only() if name is None else self._named(name)
        identity = self._facts.identity(place)
        if isinstance(identity, Unresolved):
            raise UnresolvedError(
                f"{self._held.reference}: {place.name} is not read: {identity.reason}",
                hint="make a clone and mount that",
            )
        prefix = self._held.reference if name is None else f"{self._held.reference}:{name}"
        return Tree(self._held, place, identity, prefix=prefix)

    def tree_at(self, place_name: str) -> Tree | None:
        """Return the filesystem of a place, None if nothing is read there."""
        for place in self._facts.places.filesystems:
            if place.name != place_name:
                continue
            identity = self._facts.identity(place)
            if not isinstance(identity, Unresolved):
                prefix = f"{self._held.reference}:{place.name}"
                return Tree(self._held, place, identity, prefix=prefix)
        return None

    @property
    def places(self) -> tuple[Place, ...]:
        """What the disk is made of."""
        return self._facts.places.places

    def why_unknown(self, place: Place) -> str:
        """Return why it is not known what a place holds; empty if it is, or nothing known is."""
        if place.content is not None or place.opaque_reason:
            return place.opaque_reason
        refusal = self._held.refusal(place.disk_extents(((0, _HEAD_BYTES),)))
        return "" if refusal is None else f"its beginning is not held: {refusal.reason}"

    def _only(self) -> Place:
        there = self._facts.places.filesystems
        if len(there) == 1:
            return there[0]
        reference = self._held.reference
        found = ", ".join(map(_words, self.filesystems()[:20]))
        if there:
            example = there[0].name.partition(":")[2] or there[0].name
            raise UsageError(
                f"{reference} has {len(there)} filesystems: {found}",
                hint=f"say which, {reference}:{example}:/path",
            )
        raise NotFoundError(
            f"{reference} has no filesystem that is read here; it has {found or 'nothing known'}"
        )

    def _named(self, name: str) -> Place:
        for place in self._facts.places.filesystems:
            if place.name == name:
                return place
        found, silent = self._facts.filesystems_named(name)
        if len(found) > 1:
            raise UsageError(
                f"{self._held.reference} has {len(found)} filesystems called {printable(name)}",
                hint=f"name it by its place: {', '.join(place.name for place in found)}",
            )
        if found:
            return found[0]
        reasons = "; ".join(f"{each.place}: {each.reason}" for each, _ in silent)
        raise UnresolvedError(
            f"{self._held.reference}: whether a filesystem is called {printable(name)} is not "
            f"known: {reasons}"
        )

    def _info(self, place: Place) -> FilesystemInfo:
        kind = "" if place.content is None else str(place.content)
        if not place.is_filesystem:
            note = self.why_unknown(place)
            return FilesystemInfo(place=place.name, kind=kind, size_bytes=place.size, note=note)
        identity = self._facts.identity(place)
        if isinstance(identity, Unresolved):
            return FilesystemInfo(
                place=place.name, kind=kind, size_bytes=place.size, note=identity.reason
            )
        return FilesystemInfo(
            place=place.name,
            kind=identity.kind,
            label=identity.label,
            uuid=identity.uuid,
            size_bytes=identity.size,
            is_read=True,
        )


class _Peeked:
    """A snapshot as it is looked through for what lies where."""

    def __init__(self, held: Held) -> None:
        self._held = held

    @property
    def size(self) -> int:
        """The disk's size at the instant."""
        return self._held.size

    def pread(self, *, offset: int, length: int) -> bytes:
        """Read; zeros for what is not selected."""
        return self._held.peek(offset=offset, length=length)


class Tree:
    """One filesystem of a snapshot, read in a worker from the first question to `close`."""

    def __init__(self, held: Held, place: Place, identity: Identity, *, prefix: str) -> None:
        """Take what is known of it; `prefix` is what messages write before a path in it."""
        assert place.content is not None, "a filesystem has a content"
        self.held: Final = held
        self.place: Final = place
        self.identity: Final = identity
        self._prefix = prefix
        self._disk = place.disk(held)
        self.worker: Final = FileWorker(self._disk, place.content)

    def __enter__(self) -> Self:
        self.worker.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self.worker.__exit__(*details)

    @property
    def has_modes(self) -> bool:
        """Whether its files have owners and permissions."""
        return self.identity.kind not in _WITHOUT_MODES

    def path(self, inner: str) -> str:
        """Return how messages name a path in it."""
        return shown(f"{self._prefix}:{inner}")

    def find(self, path: str, *, follows: bool = False) -> Entry:
        """Return what a path leads to, its name being the path without links."""
        with self._named(path):
            found = self.worker.find(path, follows=follows)
        if isinstance(found, Missing):
            raise NotFoundError(f"{self.path(path)}: {shown(found.reason)}")
        return found

    def entries(self, path: str, directory: Node) -> list[Entry]:
        """Return what a directory holds, by name."""
        with self._named(path):
            return sorted(self.worker.entries(directory), key=lambda entry: entry.name)

    def content(self, path: str, node: Node) -> Content:
        """Return a regular file to read; raise what refuses it, by name."""
        found = self.layout(node)
        if isinstance(found, Refusal):
            raise found.error(self.path(path))
        return Content(self, path, node, found)

    def layout(self, node: Node) -> Layout | Refusal:
        """Return where a regular file's bytes are, or why they cannot be had."""
        try:
            layout = self.worker.layout(node)
        except UnresolvedError as error:
            return Refusal(why=Why.UNRESOLVED, reason=error.message)
        extents = normalise(
            (run.start, run.start + run.length) for run in layout.runs if run.start is not None
        )
        return self.held.refusal(self.place.disk_extents(extents)) or layout

    def read(self, *, start: int, length: int) -> bytes:
        """Return bytes of the filesystem."""
        return read_exactly(self._disk, offset=start, length=length)

    def _named(self, path: str) -> _Named:
        return _Named(self.path(path))


class Content:
    """The bytes of one regular file, all of which the snapshot holds."""

    def __init__(self, tree: Tree, path: str, node: Node, layout: Layout) -> None:
        self._tree = tree
        self._path = path
        self._node = node
        self._layout = layout

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return self._node.size

    def data(self) -> Extents:
        """Return where the file has data; all else of it is holes."""
        written = normalise(
            (run.offset, run.offset + run.length)
            for run in self._layout.runs
            if not run.is_unwritten
        )
        return normalise(written + self._layout.by_reader)

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, data) of all that is no hole, ascending, at most a MiB at a time."""
        with _Named(self._tree.path(self._path)):
            by_reader = self._layout.by_reader
            pieces: list[tuple[int, int, int | None]] = [
                (start, end, None) for start, end in by_reader
            ]
            for run in self._layout.runs:
                if run.is_unwritten or run.start is None:
                    continue
                of_run = ((run.offset, run.offset + run.length),)
                pieces += (
                    (start, end, run.start + start - run.offset)
                    for start, end in (subtract(of_run, by_reader) if by_reader else of_run)
                )
            for start, end, place in sorted(pieces, key=lambda piece: piece[0]):
                for offset in range(start, end, _CHUNK_BYTES):
                    length = min(_CHUNK_BYTES, end - offset)
                    if place is None:
                        data = self._tree.worker.content(self._node, offset=offset, length=length)
                    else:
                        data = self._tree.read(start=place + offset - start, length=length)
                    yield offset, data

    def read(self) -> Iterator[bytes]:
        """Yield all of the file, holes as zeros."""
        position = 0
        for offset, data in self.chunks():
            yield from _zeros(offset - position)
            yield data
            position = offset + len(data)
        yield from _zeros(self.size - position)


class _Named:
    """Let an error that a filesystem's reader raises say where."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Raise the same error with the name in front."""
        if isinstance(error, UnresolvedError):
            raise type(error)(f"{self._where}: {error.message}", hint=error.hint) from error


def _zeros(count: int) -> Iterator[bytes]:
    for offset in range(0, count, _CHUNK_BYTES):
        yield bytes(min(_CHUNK_BYTES, count - offset))


def _words(info: FilesystemInfo) -> str:
    label = f" {printable(info.label)}" if info.label else ""
    return f"{info.place} {info.kind or 'nothing known'}{label} {info.uuid}".rstrip()


def kind_of(node: Node) -> str:
    """Return the letter of `ls -l` for what it is; `?` for what only one filesystem knows."""
    letters = {FileKind.REGULAR: "-", FileKind.DIRECTORY: "d", FileKind.SYMLINK: "l"}
    return letters.get(node.kind, "?")


def why_of(error: StillblockError) -> Why:
    """Return what kind of refusal an error is."""
    return Why.UNRESOLVED if isinstance(error, UnresolvedError) else Why.UNREADABLE
