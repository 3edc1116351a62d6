"""`stillblock bookmark`: create, list, delete."""

from __future__ import annotations

from typing import Final

from stillblock.cli.app import new_app
from stillblock.cli.options import (
    BookmarkRef,
    Change,
    Common,
    SnapshotRef,
    VolumeName,
    snapshot_of,
    volume_of,
)
from stillblock.cli.output import Output, age
from stillblock.model import format_instant, format_size
from stillblock.service.session import open_session

app = new_app("bookmark")

_COMMON: Final = Common()
_CHANGE: Final = Change()


@app.command
def create(ref: SnapshotRef, name: str | None = None, /, *, common: Common = _COMMON) -> None:
    """Track what changes after a snapshot, also once it is deleted; preserves nothing.

    Parameters
    ----------
    name
        What to call the bookmark; default: as the snapshot.
    """
    output = Output(common)
    volume, snapshot = snapshot_of(ref)
    with open_session(common.config(), volume) as session:
        made = session.create_bookmark(snapshot, name=name)
    output.result(
        "bookmark",
        {"bookmark": made},
        lambda out: out.line(
            f"bookmark {made.volume}@{made.name} of {format_instant(made.instant_unix_ns)}, "
            f"tracks {format_size(made.baseline_bytes)}"
        ),
    )


@app.command(name="list")
def list_(volume: VolumeName, /, *, common: Common = _COMMON) -> None:
    """List the bookmarks of a volume."""
    output = Output(common)
    with open_session(common.config(), volume_of(volume)) as session:
        found = session.list_bookmarks()
    rows = [
        (
            f"{b.volume}@{b.name}",
            format_instant(b.instant_unix_ns),
            age(b.instant_unix_ns),
            format_size(b.baseline_bytes),
            b.of_snapshot if b.has_snapshot else f"{b.of_snapshot} (deleted)",
        )
        for b in found.bookmarks
    ]
    columns = ("BOOKMARK", "INSTANT", ">AGE", ">TRACKS", "OF SNAPSHOT")
    output.result(
        "bookmark-list", found, lambda out: out.table(columns, rows, empty="no bookmarks yet")
    )


@app.command
def delete(ref: BookmarkRef, /, *, change: Change = _CHANGE) -> None:
    """Stop tracking since a bookmark; the next increment from it has to be a full copy."""
    output = Output(change)
    volume, name = snapshot_of(ref)
    with open_session(change.config(), volume) as session:
        gone = session.show_bookmark(name)
        if change.dry_run:
            output.result(
                "bookmark-delete-plan",
                {"bookmark": gone},
                lambda out: out.line(f"would delete bookmark {volume}@{gone.name}"),
            )
            return
        output.confirm(change, f"Delete bookmark {volume}@{gone.name}?")
        session.delete_bookmark(gone.id)
    output.result(
        "bookmark-deleted",
        {"bookmark": gone},
        lambda out: out.line(f"deleted bookmark {volume}@{gone.name}"),
    )
