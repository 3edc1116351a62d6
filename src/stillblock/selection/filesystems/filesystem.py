"""What every filesystem reader offers, and the walk that is the same for all of them.

Offsets and sizes are bytes. `start` of a run and all extents count from the start of the
filesystem, whatever it lies on; callers translate them to the disk.
"""

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Final, NamedTuple, Protocol

from stillblock.errors import Blame, StillblockError
from stillblock.model import Extents
from stillblock.selection.disk import Disk, read_exactly

DEPTH_MAX: Final = 512
"""Directories inside one another: a path of 4096 bytes has fewer than 2048, a real tree some 30."""


class UnresolvedError(StillblockError):
    """Something on the disk is damaged, unsupported or not settled: nothing may be left out by it.

    The message is the reason, as receipts tell it.
    """

    code: ClassVar[str] = "unresolved"
    blame: ClassVar[Blame] = Blame.DISK


class FileKind(StrEnum):
    """What a directory entry leads to."""

    REGULAR = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    OTHER = "other"
    """Devices, sockets, FIFOs, and what only one filesystem knows, such as a reparse point."""

    @classmethod
    def of_mode(cls, mode: int) -> "FileKind":
        """Return what an inode's mode says; whatever is no file, directory or link is `OTHER`."""
        if stat.S_ISREG(mode):
            return cls.REGULAR
        if stat.S_ISDIR(mode):
            return cls.DIRECTORY
        return cls.SYMLINK if stat.S_ISLNK(mode) else cls.OTHER


class Run(NamedTuple):
    """A piece of a file: `length` bytes from `offset` of the file lie at `start`."""

    offset: int
    length: int
    start: int | None
    """None: nothing is allocated, it reads as zeros."""
    is_unwritten: bool = False
    """Allocated, but reads as zeros whatever lies there."""
    is_encoded: bool = False
    """What lies there is no copy of the file's bytes: compressed. `length` is that on the disk."""


class Layout(NamedTuple):
    """Where a reader of a regular file gets its bytes; what is in neither reads as zeros."""

    runs: tuple[Run, ...] = ()
    """Ascending, disjoint, within the size; what lies at them is the file's, byte for byte."""
    by_reader: Extents = ()
    """Ranges of the file that only `Filesystem.read` gives: they are in no place of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A file, directory or link: what its names lead to."""

    number: int
    """Tells it from every other node of the filesystem: inode, MFT entry, place of its entry."""
    generation: int = 0
    """Differs when a number was given to another file since; 0 where there is no such thing."""
    kind: FileKind
    size: int
    """Bytes a reader of the file gets."""
    links: int = 1
    """Names it has, as the filesystem says."""
    mode: int = 0
    """Permission bits; 0 where the filesystem has none."""
    uid: int = 0
    gid: int = 0
    modified_ns: int = 0
    """Since 1970, UTC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Which filesystem it is."""

    kind: str
    """`ext2`, `ext3`, `ext4`, `xfs`, `btrfs`, `ntfs`, `fat12`, `fat16`, `fat32`, `exfat`."""
    label: str
    uuid: str
    """As `blkid` prints it; empty where there is none."""
    block_size: int
    size: int
    """Bytes that the filesystem says it has; what lies beyond belongs to nobody it knows."""
    is_case_sensitive: bool = True


class Filesystem(Protocol):
    """One filesystem, read as its own system would after a crash: with its journal applied.

    A reader keeps at most some MiB in memory whatever the filesystem's size, trusts no number it
    read, and ends. Every method raises `UnresolvedError` for what it cannot rely on.
    """

    @property
    def identity(self) -> Identity:
        """Which one it is."""

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a careful user should know, such as that a journal was applied in memory."""

    def root(self) -> Node:
        """Return the top directory."""

    def children(self, directory: Node) -> Iterable[tuple[str, Node]]:
        """Yield the names in a directory, without `.` and `..`, and what they lead to.

        A name's bytes that are no UTF-8 become lone surrogates, as `os.fsdecode` makes them. System
        files that no user can name (such as NTFS metadata) are not among them. A reader that finds
        a directory damaged raises, for files it cannot see may lie anywhere.
        """

    def runs(self, node: Node) -> tuple[Run, ...]:
        """Return where a regular file's data lies: ascending by offset, disjoint, within its
        allocation (which may end past its size); holes may be given or left out.

        Where a filesystem keeps several copies, each has a run, with the same offset. Runs that
        are encoded may overlap others by offset, for one piece may hold more than the file uses.

        Raise `UnresolvedError` where that is not known or is not the file's alone to give:
        encrypted, or compressed where it cannot be told as encoded runs. A file whose data lies
        within metadata (inline, resident) has no runs.
        """

    def layout(self, node: Node) -> Layout:
        """Return where a regular file's bytes are, as its users see them, with the journal applied.

        Unlike `runs`: nothing of named streams or past the size, one copy, and what is neither a
        run nor the reader's reads as zeros. Raise `UnresolvedError` where the bytes cannot be had
        so: compressed, encrypted, or for any reason that `runs` has.
        """

    def read(self, node: Node, *, offset: int, length: int) -> bytes:
        """Return data of a regular file, or the target of a link; short at its end."""

    def free(self) -> Extents:
        """Return what the filesystem has not allocated, whole blocks of its own only."""

    def fixed(self) -> Extents:
        """Return metadata whose place is known without the maps, which nothing may leave out."""


def walk(filesystem: Filesystem) -> Iterator[tuple[str, Node]]:
    """Yield every path and what it leads to, `/` first, a directory before what it holds.

    A node with several names comes once for each. Raise `UnresolvedError` if a directory holds
    itself or the tree is deeper than `DEPTH_MAX`: no sound filesystem is so.
    """
    root = filesystem.root()
    yield "/", root
    entered = {root.number}
    stack: list[tuple[str, Iterator[tuple[str, Node]]]] = [("/", iter(filesystem.children(root)))]
    while stack:
        base, entries = stack[-1]
        for name, node in entries:
            yield base + name, node
            if node.kind is FileKind.DIRECTORY:
                if node.number in entered or len(stack) >= DEPTH_MAX:
                    what = "is inside itself" if node.number in entered else "lies too deep"
                    raise UnresolvedError(f"directory {base + name!r} {what}")
                entered.add(node.number)
                stack.append((f"{base}{name}/", iter(filesystem.children(node))))
                break
        else:
            stack.pop()


def add_run(found: list[Run], *, offset: int, length: int, start: int, written: int) -> None:
    """Append a piece of which only the first `written` bytes, if any, were ever written.

    The rest reads as zeros, whatever lies there.
    """
    written = min(length, max(0, written))
    if written:
        found.append(Run(offset, written, start))
    if written < length:
        found.append(Run(offset + written, length - written, start + written, is_unwritten=True))


def laid_out(runs: Iterable[Run], *, size: int, by_reader: Extents = ()) -> Layout:
    """Return the layout of a file of `size` bytes that lies in `runs`, one copy of each.

    Raise `UnresolvedError` for runs whose bytes are not the file's, or that overlap.
    """
    found: list[Run] = []
    end = 0
    for run in runs:
        if run.offset >= size or run.start is None:
            continue
        if run.is_encoded:
            raise UnresolvedError("it is compressed, which is not read")
        if found and run.offset == found[-1].offset:
            continue  # another copy of it
        if run.offset < end:
            raise UnresolvedError("its pieces overlap: it is damaged")
        end = run.offset + run.length
        found.append(run._replace(length=min(run.length, size - run.offset)))
    return Layout(runs=tuple(found), by_reader=by_reader)


def read_runs(disk: Disk, runs: Iterable[Run], *, size: int, offset: int, length: int) -> bytes:
    """Return bytes `[offset, offset + length)` of a file of `size` bytes that lies in `runs`."""
    length = max(0, min(length, size - offset))
    data = bytearray(length)
    for run in runs:
        begin = max(run.offset, offset)
        end = min(run.offset + run.length, offset + length)
        if begin >= end or run.start is None or run.is_unwritten:
            continue
        place = run.start + (begin - run.offset)
        data[begin - offset : end - offset] = read_exactly(disk, offset=place, length=end - begin)
    return bytes(data)
