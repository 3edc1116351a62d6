"""Files of a snapshot or clone without a mount: ls, cat, cp."""

from __future__ import annotations

import base64
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter

from stillblock.cli.options import Common
from stillblock.cli.output import Output, counted
from stillblock.errors import ExitCode, StillblockError, UsageError
from stillblock.model import Reference, format_instant, format_size
from stillblock.operations.copying import copy_out
from stillblock.operations.held import Refusal
from stillblock.operations.trees import SnapshotFiles, kind_of
from stillblock.selection.filesystems.filesystem import DEPTH_MAX, FileKind
from stillblock.selection.survey import shown
from stillblock.selection.workers import is_of_disk
from stillblock.service.reading import open_reference

if TYPE_CHECKING:
    from stillblock.operations.copying import Copied
    from stillblock.operations.trees import FilesystemInfo, Tree
    from stillblock.selection.files import Entry
    from stillblock.selection.filesystems.filesystem import Node

_COMMON: Final = Common()
_JSON_BYTES_MAX: Final = 64 << 20
"""Content of a file within a JSON document; larger ones are for a file."""
_REFUSED_SHOWN_MAX: Final = 20
_TELL_S: Final = 0.2

PathRef = Annotated[
    str, Parameter(help="VOL@SNAP:/path; with several filesystems VOL@SNAP:NAME:/path.")
]
Recursive = Annotated[bool, Parameter(name=("--recursive", "-r"))]


def ls(
    ref: Annotated[
        str,
        Parameter(
            help="VOL@SNAP:/path, with several filesystems VOL@SNAP:NAME:/path; VOL@SNAP alone "
            "lists the filesystems."
        ),
    ],
    /,
    *,
    long: Annotated[bool, Parameter(name=("--long", "-l"))] = False,
    recursive: Annotated[bool, Parameter(name=("--recursive", "-R"))] = False,
    common: Common = _COMMON,
) -> int:
    """List files of a snapshot or clone, without a mount and without root.

    NAME is a label, a uuid, a partition's number or vg/lv, as in rules. Read are ext2/3/4, XFS,
    btrfs, NTFS, FAT and exFAT, with their journals applied in memory. Characters that a terminal
    would act on are escaped. A directory that cannot be read is said, and the rest listed:
    exit code 3.

    Parameters
    ----------
    long
        Mode, owner, size and time too, where links lead, and what the snapshot does not hold.
    recursive
        All that is below, too. With --json one document a directory.
    """
    output = Output(common)
    reference = Reference.parse(ref)
    with open_reference(common.config(), reference) as held:
        files = SnapshotFiles(held)
        if reference.path is None:
            _list_filesystems(output, held.reference, files)
            return ExitCode.OK
        with files.tree(reference.place) as tree:
            found = tree.find(reference.path)
            listing = _Listing(output, tree, is_long=long)
            if found.node.kind is FileKind.DIRECTORY:
                listing.directory(found.name, found.node, is_recursive=recursive)
            else:
                listing.one(found)
    return ExitCode.PARTIAL if listing.is_partial else ExitCode.OK


def cat(
    *refs: Annotated[str, Parameter(help="VOL@SNAP:/path; as many as needed.")],
    common: Common = _COMMON,
) -> None:
    """Write files of a snapshot or clone to standard output.

    Links are followed within the filesystem. A file that the snapshot does not hold, or not all
    of, is refused with the rule that left it out before a byte of it is written. With --json the
    content is in base64, up to 64 MiB.
    """
    output = Output(common)
    if not refs:
        raise UsageError("say which file: stillblock cat VOL@SNAP:/path")
    for ref in refs:
        with _opened(common, ref) as (reference, tree):
            found = tree.find(reference.path or "/", follows=True)
            _require_file(tree, found)
            content = tree.content(found.name, found.node)
            if output.is_json:
                if content.size > _JSON_BYTES_MAX:
                    raise UsageError(
                        f"{ref} has {format_size(content.size)}, too much for JSON; copy it"
                    )
                whole = b"".join(content.read())
                text = base64.b64encode(whole).decode("ascii")
                document = {"file": _described(found, found.name), "content_base64": text}
                output.json("file-content", document)
                continue
            for piece in content.read():
                sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()


def cp(
    ref: PathRef,
    destination: Annotated[Path, Parameter(help="A directory to copy into, or a new name.")],
    /,
    *,
    recursive: Recursive = False,
    common: Common = _COMMON,
) -> int:
    """Copy a file of a snapshot or clone, or a tree, without a mount and without root.

    Modes, times, holes, hard and symbolic links are kept, owners only for root. Each file is
    written under another name and renamed when it is whole. A file that the snapshot does not hold
    is refused with the rule that left it out, never written as zeros. A tree is copied as far as
    possible; what was refused is listed: exit code 3.

    Parameters
    ----------
    recursive
        A directory with all that is in it; links are copied as links.
    """
    output = Output(common)
    with _opened(common, ref) as (reference, tree), output.working(f"copying {ref}") as tell:
        next_s = 0.0

        def told(path: str, copied_bytes: int) -> None:
            nonlocal next_s
            if (now := time.monotonic()) >= next_s:
                next_s = now + _TELL_S
                tell(f"{format_size(copied_bytes)} copied: {tree.path(path)}")

        copied = copy_out(
            tree,
            reference.path or "/",
            destination.expanduser(),
            is_recursive=recursive,
            told=told,
        )
    output.result("copied", copied, lambda out: _render_copied(out, copied))
    return ExitCode.PARTIAL if copied.refused else ExitCode.OK


@contextmanager
def _opened(common: Common, ref: str) -> Iterator[tuple[Reference, Tree]]:

    reference = Reference.parse(ref)
    if reference.path is None:
        raise UsageError(f"{ref!r} names no file; write {ref}:/path")
    with (
        open_reference(common.config(), reference) as held,
        SnapshotFiles(held).tree(reference.place) as tree,
    ):
        yield reference, tree


def _require_file(tree: Tree, found: Entry) -> None:

    if found.node.kind is FileKind.DIRECTORY:
        raise UsageError(f"{tree.path(found.name)} is a directory")
    if found.node.kind is not FileKind.REGULAR:
        raise UsageError(f"{tree.path(found.name)} is no regular file, but {found.node.kind}")


def _render_copied(out: Output, copied: Copied) -> None:

    what = [
        counted(copied.file_count, "file"),
        counted(copied.directory_count, "directory").replace("directorys", "directories"),
        counted(copied.link_count, "link"),
    ]
    told = ", ".join(word for word in what if not word.startswith("0 "))
    out.line(f"{copied.target}: {told or 'nothing'}, {format_size(copied.copied_bytes)}")
    for refused in copied.refused[:_REFUSED_SHOWN_MAX]:
        out.warn(f"not copied: {shown(refused.path)}: {shown(refused.reason)} ({refused.why})")
    more = len(copied.refused) + copied.unnamed - _REFUSED_SHOWN_MAX
    if more > 0:
        out.warn(f"and {more} more; --json lists them")


# Listings ---------------------------------------------------------------------------------------


class _Listing:
    """What `ls` prints of one filesystem."""

    def __init__(self, output: Output, tree: Tree, *, is_long: bool) -> None:
        self._output = output
        self._tree = tree
        self._is_long = is_long
        self.is_partial = False

    def one(self, found: Entry) -> None:
        """List something that is no directory."""
        base = found.name.rpartition("/")[0] or "/"
        self._print(base, [found._replace(name=found.name.rpartition("/")[2])])

    def directory(self, path: str, node: Node, *, is_recursive: bool) -> None:
        """List a directory, and what is below it if asked to, each directory before its own."""
        waiting = [(path, node)]
        is_first = True
        while waiting:
            where, directory = waiting.pop()
            try:
                entries = self._tree.entries(where, directory)
            except StillblockError as error:
                if is_first or not is_of_disk(error):
                    raise
                self.is_partial = True
                self._output.warn(str(error))
                continue
            if is_recursive and not self._output.is_json:
                self._output.line(("" if is_first else "\n") + f"{shown(where)}:")
            is_first = False
            self._print(where, entries)
            if is_recursive:
                base = where.rstrip("/")
                below = [
                    (f"{base}/{e.name}", e.node)
                    for e in entries
                    if e.node.kind is FileKind.DIRECTORY
                ]
                if below and where.count("/") > DEPTH_MAX:
                    raise UsageError(f"{self._tree.path(where)}: the tree is too deep")
                waiting += reversed(below)

    def _print(self, where: str, entries: list[Entry]) -> None:

        base = where.rstrip("/")
        held = {entry.name: self._held(entry) for entry in entries}
        if self._output.is_json:
            rows = [_described(e, f"{base}/{e.name}") | held[e.name] for e in entries]
            document = {"filesystem": self._tree.place.name, "directory": where, "entries": rows}
            self._output.json("listing", document)
        elif not self._is_long:
            for entry in entries:
                self._output.line(shown(entry.name))
        else:
            columns = ("MODE", ">LINKS", ">OWNER", ">SIZE", "CHANGED", "NAME", "NOT HELD")
            rows_long = [self._long(entry, held[entry.name]) for entry in entries]
            self._output.table(columns, rows_long, empty="empty")

    def _held(self, entry: Entry) -> dict[str, str]:
        """Return why a file is not held, if somebody wants to know."""
        if not self._is_long or entry.node.kind is not FileKind.REGULAR:
            return {}
        found = self._tree.layout(entry.node)
        if isinstance(found, Refusal):
            return {"not_held": str(found.why), "reason": found.reason}
        return {"not_held": "", "reason": ""}

    def _long(self, entry: Entry, held: dict[str, str]) -> tuple[str, ...]:

        node = entry.node
        has_modes = self._tree.has_modes
        mode = stat.filemode(node.mode)[1:] if has_modes else ""
        target = "" if entry.target is None else f" -> {shown(entry.target)}"
        return (
            kind_of(node) + mode,
            str(node.links),
            f"{node.uid}:{node.gid}" if has_modes else "",
            str(node.size),
            format_instant(node.modified_ns) if node.modified_ns else "",
            shown(entry.name) + target,
            shown(held.get("reason", "")),
        )


def _described(entry: Entry, path: str) -> dict[str, Any]:
    """Return an entry as JSON shows it; a name that is no UTF-8 also as its bytes."""
    node = entry.node
    document: dict[str, Any] = {
        "name": path.rpartition("/")[2] or "/",
        "path": path,
        "kind": str(node.kind),
        "size": node.size,
        "links": node.links,
        "mode": node.mode,
        "uid": node.uid,
        "gid": node.gid,
        "modified_ns": node.modified_ns,
        "target": entry.target,
    }
    raw = os.fsencode(path)
    try:
        raw.decode()
    except UnicodeDecodeError:
        document["path_base64"] = base64.b64encode(raw).decode("ascii")
    return document


def _list_filesystems(output: Output, reference: str, files: SnapshotFiles) -> None:
    found = files.filesystems()
    rows = [
        (info.place, info.kind, shown(info.label), info.uuid, _size(info), info.note)
        for info in found
    ]
    columns = ("PLACE", "HOLDS", "LABEL", "UUID", ">SIZE", "NOT READ")
    output.result(
        "filesystems",
        {"snapshot": reference, "filesystems": found},
        lambda out: out.table(columns, rows, empty="nothing known lies on it"),
    )


def _size(info: FilesystemInfo) -> str:
    return format_size(info.size_bytes) if info.size_bytes else ""
