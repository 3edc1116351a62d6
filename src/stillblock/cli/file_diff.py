"""`snapshot diff --files`: which files changed, for people and as JSON."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from stillblock.cli.output import Output, counted
from stillblock.errors import ExitCode
from stillblock.model import Reference, format_size
from stillblock.operations.file_changes import Change, FileChange, FileDiff, compare_files
from stillblock.operations.trees import SnapshotFiles
from stillblock.selection.filesystems.filesystem import FileKind
from stillblock.selection.partition_table import printable
from stillblock.selection.survey import shown
from stillblock.service.reading import held

if TYPE_CHECKING:
    from stillblock.operations.file_changes import FilesystemChanges
    from stillblock.service.session import Session

_TELL_S: Final = 0.2


def diff_files(
    output: Output, session: Session, *, since: str, until: str, is_summary: bool
) -> ExitCode:
    """Print which files changed from one snapshot to another; exit code 3 if some may have."""
    changes = session.changes(since=since, until=until)
    volume = session.volume
    with (
        held(session, Reference(volume=volume, snapshot=since)) as before,
        held(session, Reference(volume=volume, snapshot=until)) as after,
        output.working(f"comparing {before.reference} and {after.reference}") as tell,
    ):
        next_s = 0.0

        def told(path: str) -> None:
            nonlocal next_s
            if (now := time.monotonic()) >= next_s:
                next_s = now + _TELL_S
                tell(f"comparing {shown(path)}")

        found = FileDiff(
            volume=volume,
            since=before.receipt.snapshot.name,
            until=after.receipt.snapshot.name,
            changed_bytes=changes.changed_bytes,
            newly_selected_bytes=changes.newly_selected_bytes,
            places=compare_files(
                SnapshotFiles(before),
                SnapshotFiles(after),
                changes.extents,
                newly_selected=changes.newly_selected,
                told=told,
            ),
        )
    output.result("file-changes", found, lambda out: _render(out, found, is_summary=is_summary))
    return ExitCode.PARTIAL if found.is_partial else ExitCode.OK


def _render(out: Output, found: FileDiff, *, is_summary: bool) -> None:
    for place in found.places:
        out.line(_title(place))
        if not is_summary:
            rows = [_row(change) for change in place.changes]
            if rows:
                columns = ("CHANGE", ">BEFORE", ">AFTER", ">CHANGED", "PATH", "NOTE")
                out.table(columns, rows, empty="")
        for skipped in place.skipped if not place.reason else ():
            out.warn(f"not compared: {shown(skipped)}")
        out.line(_sum(place))
        out.line()
    out.line(
        f"{format_size(found.changed_bytes)} changed from {found.volume}@{found.since} to "
        f"{found.volume}@{found.until}, and {format_size(found.newly_selected_bytes)} were not "
        "held before"
    )


def _title(place: FilesystemChanges) -> str:
    label = f" {printable(place.label)}" if place.label else ""
    return f"{shown(place.place)} {place.kind}{label}".rstrip()


def _row(change: FileChange) -> tuple[str, ...]:
    ending = {FileKind.DIRECTORY: "/", FileKind.SYMLINK: "@"}.get(change.kind, "")
    return (
        str(change.change),
        "" if change.size_before is None else format_size(change.size_before),
        "" if change.size_after is None else format_size(change.size_after),
        format_size(change.changed_bytes) if change.changed_bytes else "",
        shown(change.path) + ending,
        shown(change.note),
    )


def _sum(place: FilesystemChanges) -> str:
    if place.reason or place.other_bytes:
        reason = f": {shown(place.reason)}" if place.reason else ""
        return f"{format_size(place.other_bytes)}, not told apart{reason}"
    counts = {change: sum(c.change is change for c in place.changes) for change in Change}
    words = [f"{count} {change}" for change, count in counts.items() if count]
    what = ", ".join(words) or "no file changed"
    return (
        f"{counted(len(place.changes), 'name')}: {what}; {format_size(place.file_bytes)} of files, "
        f"{format_size(place.metadata_bytes)} of the filesystem itself, "
        f"{format_size(place.free_bytes)} free"
    )
