"""Copying files out of a snapshot: each appears whole or not at all, and nothing elsewhere.

Names in a snapshot are strangers' words. Each directory of a copy is held open while it is filled,
and everything below is reached through it by one name, never through a link.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from stillblock.errors import StillblockError, UsageError
from stillblock.operations.held import Refusal, Why
from stillblock.operations.trees import Content, why_of
from stillblock.selection.files import base64_of, encoded
from stillblock.selection.filesystems.filesystem import DEPTH_MAX, FileKind, Node
from stillblock.selection.survey import shown
from stillblock.selection.workers import is_of_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stillblock.operations.trees import Tree
    from stillblock.selection.files import Entry

_PRIVATE: Final = 0o600
_PRIVATE_DIRECTORY: Final = 0o700
_SET_ID: Final = stat.S_ISUID | stat.S_ISGID
_NAME_BYTES_MAX: Final = 255
_HOPELESS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS})
"""What would fail for every further file too."""
_NOT_TAKEN: Final = frozenset({errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
"""What a filesystem says that has no owners or modes, or leaves them to somebody else."""
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class CopyError(StillblockError):
    """A copy could not be written where it should go; nothing half stands there."""

    code = "copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Something that was not copied, and why."""

    path: str
    why: Why
    reason: str
    path_base64: str = ""
    """The bytes of a path that is no UTF-8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What came of a copy."""

    source: str
    target: str
    file_count: int = 0
    directory_count: int = 0
    link_count: int = 0
    """Symbolic links, and further names of files that were copied."""
    copied_bytes: int = 0
    """Data; holes cost nothing."""
    refused: tuple[Refused, ...] = ()
    unnamed: int = 0
    """How many more were refused than are listed."""
    not_kept: tuple[str, ...] = ()
    """What the destination does not take: `owners`, `modes`, `times`."""
    suspect_reason: str = ""
    """Why the snapshot may not be what the disk was; empty if it is."""


REFUSED_MAX: Final = 10_000
"""Refusals that are kept to be listed; all are counted."""


def copy_out(
    tree: Tree,
    path: str,
    destination: Path,
    *,
    is_recursive: bool,
    preserves: bool = False,
    told: Callable[[str, int], None] | None = None,
) -> Copied:
    """Copy what a path leads to into a directory, or to the new or old name that is given.

    A file, link or tree; modes, times, holes and hard links are kept, and if it `preserves` owners
    and set-user-id and set-group-id bits, which needs root. In a directory it has the name that
    `path` ends with. `told` hears the path and the bytes so far. Raise what refuses a single file;
    of a tree the rest is copied, and what was refused is in the answer.
    """
    if preserves and os.geteuid() != 0:
        raise UsageError("only root can give copies their owners")
    found = tree.find(path, follows=not is_recursive)
    if found.node.kind is FileKind.DIRECTORY and not is_recursive:
        raise UsageError(f"{tree.path(path)} is a directory", hint="add -r to copy all of it")
    folder, name = _target(destination, path, found.node)
    with _opened(folder) as descriptor:
        copy = _Copy(tree, told or (lambda *_: None), preserves=preserves, top=descriptor)
        copy.run(found, name)
    return replace(
        copy.result(),
        source=tree.reference(found.name),
        target=str(folder if name is None else folder / os.fsdecode(name)),
        suspect_reason=tree.held.suspect_reason,
    )


def _target(destination: Path, path: str, node: Node) -> tuple[Path, bytes | None]:
    """Return the directory to write in and the name to give; None: what is in it goes there."""
    if not destination.is_dir():
        if destination.name in {"", ".."}:
            raise UsageError(f"{destination} is no name for a copy")
        if not destination.parent.is_dir():
            raise CopyError(f"{destination.parent} is no directory that is there")
        return destination.parent, os.fsencode(destination.name)
    # As it was asked for: the name behind a link is the choice of whoever made the link.
    asked = path.rstrip("/").rpartition("/")[2]
    if asked not in {"", ".", ".."}:
        return destination, encoded(asked)
    if node.kind is FileKind.DIRECTORY:
        return destination, None
    raise UsageError(f"{path} does not end with a name; say how the copy is called")


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    # The destination is the user's own word: links that lead there are followed.
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CopyError(f"{folder}: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class _Level:
    """A directory that is being filled."""

    descriptor: int
    name: bytes | None
    """None: the one that the copy goes to."""
    path: str
    entries: Iterator[Entry]
    node: Node | None
    """What it gets mode and time of in the end; None: it was there, and stays as it is."""
    made: set[tuple[int, int]] = field(default_factory=set)
    """What the copy put there, by device and inode."""


@dataclass(slots=True, kw_only=True)
class _Counts:
    """How much was copied."""

    files: int = 0
    directories: int = 0
    links: int = 0
    copied_bytes: int = 0


class _Copy:
    """One copy under way."""

    def __init__(
        self, tree: Tree, told: Callable[[str, int], None], *, preserves: bool, top: int
    ) -> None:
        """Begin; `top` is where it goes, open."""
        self._tree = tree
        self._told = told
        self._preserves = preserves and tree.has_modes
        self._top = top
        self._counts = _Counts()
        self._refused: list[Refused] = []
        self._unnamed = 0
        self._not_kept: set[str] = set()
        self._levels: list[_Level] = []
        self._entered: set[int] = set()
        """Numbers of directories: each has one place, or a damaged tree would have no end."""
        self._names: dict[int, tuple[tuple[bytes, ...], bytes]] = {}
        """Of files with several names: where the first one is, from the top of the copy."""

    def result(self) -> Copied:
        """Return what came of it."""
        return Copied(
            source="",
            target="",
            file_count=self._counts.files,
            directory_count=self._counts.directories,
            link_count=self._counts.links,
            copied_bytes=self._counts.copied_bytes,
            refused=tuple(self._refused),
            unnamed=self._unnamed,
            not_kept=tuple(sorted(self._not_kept)),
        )

    def run(self, found: Entry, name: bytes | None) -> None:
        """Copy what was found to a name, or without one what is in it; and all below."""
        try:
            if name is None:
                entries = iter(self._tree.entries(found.name, found.node))
                self._entered.add(found.node.number)
                self._levels.append(_Level(os.dup(self._top), None, found.name, entries, None))
            else:
                self._entry(self._top, name, found, found.name)
            while self._levels:
                level = self._levels[-1]
                entry = next(level.entries, None)
                if entry is None:
                    self._leave()
                else:
                    path = f"{level.path.rstrip('/')}/{entry.name}"
                    self._entry(level.descriptor, None, entry, path)
        finally:
            for level in self._levels:
                os.close(level.descriptor)

    def _entry(self, folder: int, name: bytes | None, entry: Entry, path: str) -> None:
        """Copy one entry into an open directory; below the first, what is refused is noted."""
        self._told(path, self._counts.copied_bytes)
        try:
            if name is None:
                name = encoded(entry.name)
            if name in {b"", b".", b".."} or b"/" in name or b"\0" in name:
                raise CopyError("the name leads elsewhere: it is damaged")
            if len(name) > _NAME_BYTES_MAX:
                raise CopyError("the name is too long for this system")
            match entry.node.kind:
                case FileKind.DIRECTORY:
                    self._enter(folder, name, entry.node, path)
                case FileKind.REGULAR:
                    self._file(folder, name, entry.node, path)
                case FileKind.SYMLINK:
                    self._link(folder, name, entry, path)
                case _:
                    reason = "a device, socket, FIFO or special file"
                    self._refuse(path, Refusal(why=Why.UNSUPPORTED, reason=reason))
        except CopyError as error:
            if not self._levels:
                raise
            self._refuse(path, Refusal(why=Why.UNSUPPORTED, reason=error.message))
        except OSError as error:
            reason = error.strerror or str(error)
            if not self._levels or error.errno in _HOPELESS:
                raise self._not_written(path, error) from error
            self._refuse(path, Refusal(why=Why.UNSUPPORTED, reason=reason))
        except (ValueError, OverflowError) as error:
            reason = f"this system has no such name, link or time: {error}"
            self._refuse(path, Refusal(why=Why.UNSUPPORTED, reason=reason))

    def _not_written(self, path: str, error: OSError) -> CopyError:
        reason = error.strerror or str(error)
        return CopyError(f"{self._tree.path(path)} could not be written: {reason}")

    def _refuse(self, path: str, refusal: Refusal) -> None:
        if not self._levels:
            shown_refusal = replace(refusal, reason=shown(refusal.reason))
            raise shown_refusal.error(self._tree.path(path))
        if len(self._refused) == REFUSED_MAX:
            self._unnamed += 1
            return
        self._refused.append(
            Refused(path=path, why=refusal.why, reason=refusal.reason, path_base64=base64_of(path))
        )

    def _refuse_if_of_disk(self, path: str, error: StillblockError) -> None:
        """Note what concerns one file; raise what concerns all, such as a server that is gone."""
        if not self._levels or not is_of_disk(error):
            raise error
        self._refuse(path, Refusal(why=why_of(error), reason=error.message))

    # Directories --------------------------------------------------------------------------------

    def _enter(self, folder: int, name: bytes, node: Node, path: str) -> None:
        if node.number in self._entered:
            raise CopyError("the directory is in two places, or inside itself: it is damaged")
        if len(self._levels) >= DEPTH_MAX:
            raise CopyError("the tree is too deep")
        try:
            entries = self._tree.entries(path, node)
        except StillblockError as error:
            self._refuse_if_of_disk(path, error)
            return
        is_new = True
        try:
            os.mkdir(name, _PRIVATE_DIRECTORY, dir_fd=folder)
        except FileExistsError:
            is_new = False  # it is filled up, as cp does; anything else fails to open
        try:
            descriptor = os.open(name, _FOLDER, dir_fd=folder)
        except OSError as error:
            if is_new:
                with suppress(OSError):
                    os.rmdir(name, dir_fd=folder)
            if error.errno in {errno.ENOTDIR, errno.ELOOP}:
                raise CopyError(
                    f"{shown(os.fsdecode(name))} is there already, and is no directory"
                ) from error
            raise
        try:
            self._require_other(name, there := os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        self._note_made(there)
        self._entered.add(node.number)
        own = node if is_new else None
        self._levels.append(_Level(descriptor, name, path, iter(entries), own))

    def _leave(self) -> None:
        level = self._levels[-1]
        if level.node is not None:
            try:
                self._dress(level.descriptor, level.node, default=0o777)
            except OSError as error:
                raise self._not_written(level.path, error) from error
        self._levels.pop()
        os.close(level.descriptor)
        self._counts.directories += 1

    def _require_other(self, name: bytes, there: os.stat_result) -> None:
        """Refuse a name that leads to what the copy itself put there."""
        if self._levels and (there.st_dev, there.st_ino) in self._levels[-1].made:
            raise CopyError(
                f"{shown(os.fsdecode(name))} was just copied: the tree has the name twice, or the "
                "destination does not tell it from another one"
            )

    def _note_made(self, there: os.stat_result) -> None:
        if self._levels:
            self._levels[-1].made.add((there.st_dev, there.st_ino))

    # Files --------------------------------------------------------------------------------------

    def _file(self, folder: int, name: bytes, node: Node, path: str) -> None:
        if node.links > 1 and self._linked(folder, name, node):
            return
        layout = self._tree.layout(node)
        if isinstance(layout, Refusal):
            self._refuse(path, layout)
            return
        content = Content(self._tree, path, node, layout)
        partial = _new_name()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with ExitStack() as stack:
            stack.callback(_remove, partial, folder)
            descriptor = os.open(partial, flags, _PRIVATE, dir_fd=folder)
            try:
                try:
                    self._write(descriptor, content, path)
                except StillblockError as error:
                    self._refuse_if_of_disk(path, error)
                    return
                self._dress(descriptor, node, default=0o666)
                if not self._levels:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._put(partial, name, folder)
        if not self._levels:
            _sync_folder(folder)
        self._counts.files += 1
        if node.links > 1:
            trail = tuple(level.name for level in self._levels if level.name is not None)
            self._names[node.number] = (trail, name)

    def _write(self, descriptor: int, content: Content, path: str) -> None:
        os.ftruncate(descriptor, content.size)
        for offset, data in content.chunks():
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, memoryview(data)[done:], offset + done)
            self._counts.copied_bytes += len(data)
            self._told(path, self._counts.copied_bytes)

    def _linked(self, folder: int, name: bytes, node: Node) -> bool:
        """Give a file that was copied already another name; False if it was not."""
        known = self._names.get(node.number)
        if known is None:
            return False
        partial = _new_name()
        there = os.dup(self._top)
        try:
            for part in known[0]:
                below = os.open(part, _FOLDER, dir_fd=there)
                os.close(there)
                there = below
            os.link(known[1], partial, src_dir_fd=there, dst_dir_fd=folder, follow_symlinks=False)
        except OSError:
            return False  # no links here, or none by us: then it is a copy of its own
        finally:
            os.close(there)
        with ExitStack() as stack:
            stack.callback(_remove, partial, folder)
            self._put(partial, name, folder)
        self._counts.links += 1
        return True

    def _link(self, folder: int, name: bytes, entry: Entry, path: str) -> None:
        if entry.target is None:
            reason = entry.reason or "where it leads is not known"
            self._refuse(path, Refusal(why=Why.UNRESOLVED, reason=reason))
            return
        partial = _new_name()
        with ExitStack() as stack:
            stack.callback(_remove, partial, folder)
            os.symlink(encoded(entry.target), partial, dir_fd=folder)
            node = entry.node
            if self._preserves:
                with self._keeping("owners"):
                    os.chown(partial, node.uid, node.gid, dir_fd=folder, follow_symlinks=False)
            if node.modified_ns:
                times = (node.modified_ns, node.modified_ns)
                with self._keeping("times"):
                    os.utime(partial, ns=times, dir_fd=folder, follow_symlinks=False)
            self._put(partial, name, folder)
        self._counts.links += 1

    def _dress(self, descriptor: int, node: Node, *, default: int) -> None:
        """Give a copy its mode and time, and its owner where that is asked for."""
        # What runs as its owner would run as us.
        mode = node.mode & ~_SET_ID if self._tree.has_modes else default & ~_umask()
        if self._preserves:
            with self._keeping("owners"):
                os.fchown(descriptor, node.uid, node.gid)
                mode = node.mode
        with self._keeping("modes"):
            os.fchmod(descriptor, mode)
        if node.modified_ns:
            with self._keeping("times"):
                os.utime(descriptor, ns=(node.modified_ns, node.modified_ns))

    @contextmanager
    def _keeping(self, what: str) -> Iterator[None]:
        """Go on where the destination does not take it, and say so in the end."""
        try:
            yield
        except OSError as error:
            if error.errno not in _NOT_TAKEN:
                raise
            self._not_kept.add(what)

    def _put(self, partial: bytes, name: bytes, folder: int) -> None:
        """Give what is whole its name, in the place of a file or link of that name."""
        with suppress(FileNotFoundError):
            there = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISDIR(there.st_mode):
                raise CopyError(f"{shown(os.fsdecode(name))} is a directory; it is not overwritten")
            self._require_other(name, there)
        self._note_made(os.stat(partial, dir_fd=folder, follow_symlinks=False))
        # A hard link to itself would be left beside itself by a rename.
        os.rename(partial, name, src_dir_fd=folder, dst_dir_fd=folder)


def _new_name() -> bytes:
    """Return a name for what is not whole yet."""
    return os.fsencode(f".stillblock-{secrets.token_hex(8)}.partial")


def _remove(partial: bytes, folder: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(partial, dir_fd=folder)


def _sync_folder(folder: int) -> None:
    """Make a name durable, where that is for us to do."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _NOT_TAKEN:
            raise


def _umask() -> int:
    """Return the mask of this process; asking for it is setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
