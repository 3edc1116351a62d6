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


REFUSED_MAX: Final = 10_000
"""Refusals that are kept to be listed; all are counted."""


def copy_out(
    tree: Tree,
    path: str,
    destination: Path,
    *,
    is_recursive: bool,
    told: Callable[[str, int], None] | None = None,
) -> Copied:
    """Copy what a path leads to into a directory, or to the new or old name that is given.

    A file, link or tree; modes, times, holes and hard links are kept, owners where we are root.
    `told` hears the path and the bytes so far. Raise what refuses a single file; of a tree the rest
    is copied, and what was refused is in the answer.
    """
    found = tree.find(path, follows=not is_recursive)
    if found.node.kind is FileKind.DIRECTORY and not is_recursive:
        raise UsageError(f"{tree.path(path)} is a directory", hint="add -r to copy all of it")
    folder, name = _target(destination, found)
    with _opened(folder) as descriptor:
        copy = _Copy(tree, told or (lambda *_: None), top=descriptor)
        copy.entry(descriptor, found._replace(name=name), found.name)
    return replace(copy.result(), source=tree.path(found.name), target=shown(str(folder / name)))


def _target(destination: Path, found: Entry) -> tuple[Path, str]:
    """Return the directory to write in and the name to give."""
    if destination.is_dir():
        own = found.name.rpartition("/")[2]
        if own:
            return destination, own
        # The top of a filesystem has no name: its content goes into the directory itself.
        destination = destination.resolve()
    if destination.name in {"", ".."}:
        raise UsageError(f"{destination} is no name for a copy")
    if not destination.parent.is_dir():
        raise CopyError(f"{destination.parent} is no directory that is there")
    return destination.parent, destination.name


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
class _Copy:
    """One copy under way."""

    tree: Tree
    told: Callable[[str, int], None]
    top: int
    """Where the copy goes, open."""
    counts: dict[str, int] = field(default_factory=lambda: {"file": 0, "directory": 0, "link": 0})
    copied_bytes: int = 0
    refused: list[Refused] = field(default_factory=list)
    unnamed: int = 0
    _names: dict[int, tuple[tuple[bytes, ...], bytes]] = field(default_factory=dict)
    """Of files with several names: where the first one is, from the top of the copy."""
    _trail: list[tuple[int, bytes]] = field(default_factory=list)
    """Directories that are being filled: descriptor and name."""

    def result(self) -> Copied:
        """Return what came of it."""
        return Copied(
            source="",
            target="",
            file_count=self.counts["file"],
            directory_count=self.counts["directory"],
            link_count=self.counts["link"],
            copied_bytes=self.copied_bytes,
            refused=tuple(self.refused),
            unnamed=self.unnamed,
        )

    def entry(self, folder: int, entry: Entry, path: str) -> None:
        """Copy one entry into an open directory; below the first, what is refused is noted."""
        self.told(path, self.copied_bytes)
        try:
            name = os.fsencode(entry.name)
            if len(name) > _NAME_BYTES_MAX:
                raise CopyError("the name is too long for this system")
            match entry.node.kind:
                case FileKind.DIRECTORY:
                    self._directory(folder, name, entry.node, path)
                case FileKind.REGULAR:
                    self._file(folder, name, entry.node, path)
                case FileKind.SYMLINK:
                    self._link(folder, name, entry, path)
                case _:
                    reason = "a device, socket, FIFO or special file"
                    self._refuse(path, Refusal(why=Why.UNSUPPORTED, reason=reason))
        except CopyError as error:
            if not self._trail:
                raise
            self._refuse(path, Refusal(why=Why.UNSUPPORTED, reason=error.message))
        except OSError as error:
            reason = error.strerror or str(error)
            if not self._trail or error.errno in _HOPELESS:
                raise CopyError(f"{self.tree.path(path)} could not be written: {reason}") from error
            self._refuse(path, Refusal(why=Why.UNSUPPORTED, reason=reason))

    def _refuse(self, path: str, refusal: Refusal) -> None:
        if not self._trail:
            raise refusal.error(self.tree.path(path))
        if len(self.refused) == REFUSED_MAX:
            self.unnamed += 1
            return
        self.refused.append(Refused(path=path, why=refusal.why, reason=refusal.reason))

    def _refuse_if_of_disk(self, path: str, error: StillblockError) -> None:
        """Note what concerns one file; raise what concerns all, such as a server that is gone."""
        if not self._trail or not is_of_disk(error):
            raise error
        self._refuse(path, Refusal(why=why_of(error), reason=error.message))

    # Directories --------------------------------------------------------------------------------

    def _directory(self, folder: int, name: bytes, node: Node, path: str) -> None:
        if len(self._trail) >= DEPTH_MAX:
            raise CopyError("the tree is too deep")
        try:
            entries = self.tree.entries(path, node)
        except StillblockError as error:
            self._refuse_if_of_disk(path, error)
            return
        try:
            os.mkdir(name, _PRIVATE_DIRECTORY, dir_fd=folder)
        except FileExistsError:
            pass  # a directory is filled up, as cp does; anything else fails to open
        try:
            descriptor = os.open(name, _FOLDER, dir_fd=folder)
        except OSError as error:
            if error.errno in {errno.ENOTDIR, errno.ELOOP}:
                raise CopyError(
                    f"{shown(os.fsdecode(name))} is there already, and is no directory"
                ) from error
            raise
        self._trail.append((descriptor, name))
        try:
            base = path.rstrip("/")
            for entry in entries:
                self.entry(descriptor, entry, f"{base}/{entry.name}")
            self._dress(descriptor, node, default=0o777)
        finally:
            self._trail.pop()
            os.close(descriptor)
        self.counts["directory"] += 1

    # Files --------------------------------------------------------------------------------------

    def _file(self, folder: int, name: bytes, node: Node, path: str) -> None:
        if node.links > 1 and self._linked(folder, name, node):
            return
        layout = self.tree.layout(node)
        if isinstance(layout, Refusal):
            self._refuse(path, layout)
            return
        content = Content(self.tree, path, node, layout)
        partial = _new_name()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with ExitStack() as stack:
            descriptor = os.open(partial, flags, _PRIVATE, dir_fd=folder)
            stack.callback(_remove, partial, folder)
            try:
                try:
                    self._write(descriptor, content, path)
                except StillblockError as error:
                    self._refuse_if_of_disk(path, error)
                    return
                self._dress(descriptor, node, default=0o666)
                if not self._trail:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            _put(partial, name, folder)
        self.counts["file"] += 1
        if node.links > 1:
            self._names[node.number] = (tuple(part for _, part in self._trail), name)

    def _write(self, descriptor: int, content: Content, path: str) -> None:
        os.ftruncate(descriptor, content.size)
        for offset, data in content.chunks():
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, memoryview(data)[done:], offset + done)
            self.copied_bytes += len(data)
            self.told(path, self.copied_bytes)

    def _linked(self, folder: int, name: bytes, node: Node) -> bool:
        """Give a file that was copied already another name; False if it was not."""
        known = self._names.get(node.number)
        if known is None:
            return False
        partial = _new_name()
        with ExitStack() as stack:
            try:
                there = self.top
                for part in known[0]:
                    there = os.open(part, _FOLDER, dir_fd=there)
                    stack.callback(os.close, there)
                os.link(
                    known[1], partial, src_dir_fd=there, dst_dir_fd=folder, follow_symlinks=False
                )
            except OSError:
                return False  # no links here, or none by us: then it is a copy of its own
            stack.callback(_remove, partial, folder)
            _put(partial, name, folder)
        self.counts["link"] += 1
        return True

    def _link(self, folder: int, name: bytes, entry: Entry, path: str) -> None:
        if entry.target is None:
            reason = entry.reason or "where it leads is not known"
            self._refuse(path, Refusal(why=Why.UNRESOLVED, reason=reason))
            return
        partial = _new_name()
        with ExitStack() as stack:
            os.symlink(os.fsencode(entry.target), partial, dir_fd=folder)
            stack.callback(_remove, partial, folder)
            node = entry.node
            if os.geteuid() == 0 and self.tree.has_modes:
                os.chown(partial, node.uid, node.gid, dir_fd=folder, follow_symlinks=False)
            if node.modified_ns:
                times = (node.modified_ns, node.modified_ns)
                os.utime(partial, ns=times, dir_fd=folder, follow_symlinks=False)
            _put(partial, name, folder)
        self.counts["link"] += 1

    def _dress(self, descriptor: int, node: Node, *, default: int) -> None:
        """Give a copy its owner, mode and time."""
        mode = node.mode
        if not self.tree.has_modes:
            mode = default & ~_umask()
        elif os.geteuid() == 0:
            os.fchown(descriptor, node.uid, node.gid)
        else:
            # Without its owner, what runs as its owner would run as us.
            mode &= ~_SET_ID
        os.fchmod(descriptor, mode)
        if node.modified_ns:
            os.utime(descriptor, ns=(node.modified_ns, node.modified_ns))


def _put(partial: bytes, name: bytes, folder: int) -> None:
    """Give what is whole its name, in the place of a file or link of that name."""
    try:
        there = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        pass
    else:
        if stat.S_ISDIR(there.st_mode):
            raise CopyError(f"{shown(os.fsdecode(name))} is a directory; it is not overwritten")
    # A hard link to itself would be left beside itself by a rename.
    os.rename(partial, name, src_dir_fd=folder, dst_dir_fd=folder)


def _new_name() -> bytes:
    """Return a name for what is not whole yet."""
    return os.fsencode(f".stillblock-{secrets.token_hex(8)}.partial")


def _remove(partial: bytes, folder: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(partial, dir_fd=folder)


def _umask() -> int:
    """Return the mask of this process; asking for it is setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
