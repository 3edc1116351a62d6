"""Bookmarks: what is left of a snapshot for increments, without its preserved blocks."""

from __future__ import annotations

import time
from dataclasses import dataclass

from stillblock.errors import NameTakenError
from stillblock.extents import total_bytes
from stillblock.model import BookmarkInfo, BookmarkRecord
from stillblock.operations.narrowing import wait_final
from stillblock.operations.records import encode_bookmark, new_id
from stillblock.operations.volume import Bookmark, OpenVolume


@dataclass(frozen=True, slots=True, kw_only=True)
class BookmarkRequest:
    """A bookmark to make at a snapshot; without a name it has the snapshot's."""

    snapshot: str
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BookmarkTarget:
    """One bookmark by name or id prefix."""

    bookmark: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BookmarkList:
    """The bookmarks of a volume, oldest first."""

    volume: str
    bookmarks: tuple[BookmarkInfo, ...]


def create_bookmark(volume: OpenVolume, request: BookmarkRequest) -> BookmarkInfo:
    """Track what changes after a snapshot, also once it is deleted.

    Raise `NarrowingError` while it selects more than it will: the bookmark would hold that against
    every later increment.
    """
    # By its id from here on: `latest` may mean another by the time the lock is had.
    final_id = wait_final(volume, volume.snapshot(request.snapshot)).record.id
    with volume.lock:
        snapshot = volume.snapshot(final_id)
        epoch = snapshot.epoch.epoch
        if snapshot.epoch.has_bookmark:
            raise NameTakenError(f"{volume.name}@{snapshot.record.name} has a bookmark already")
        name = request.name or snapshot.record.name
        volume.check_name_free(name, what="bookmark", epoch=epoch)
        record = BookmarkRecord(
            name=name,
            id=new_id(),
            of_snapshot=snapshot.record.name,
            created_unix_ns=time.time_ns(),
        )
        volume.engine.bookmark(epoch=epoch, meta=encode_bookmark(record))
        volume.hooks.reconcile(volume)
        made = _info(volume, volume.bookmark(name))
    volume.event("bookmark_created", bookmark=name, snapshot=snapshot.record.name)
    return made


def list_bookmarks(volume: OpenVolume) -> BookmarkList:
    """Return every bookmark, oldest first."""
    return BookmarkList(
        volume=volume.name, bookmarks=tuple(_info(volume, b) for b in volume.bookmarks())
    )


def show_bookmark(volume: OpenVolume, target: BookmarkTarget) -> BookmarkInfo:
    """Return one bookmark."""
    return _info(volume, volume.bookmark(target.bookmark))


def delete_bookmark(volume: OpenVolume, target: BookmarkTarget) -> BookmarkInfo:
    """Stop tracking since a bookmark; return what it was."""
    with volume.lock:
        bookmark = volume.bookmark(target.bookmark)
        gone = _info(volume, bookmark)
        volume.engine.delete_bookmark(epoch=bookmark.epoch.epoch)
        volume.hooks.reconcile(volume)
    volume.event("bookmark_deleted", bookmark=gone.name)
    return gone


def _info(volume: OpenVolume, bookmark: Bookmark) -> BookmarkInfo:
    epoch = bookmark.epoch
    baseline = volume.engine.selection(epoch=epoch.epoch)
    return BookmarkInfo(
        volume=volume.name,
        name=bookmark.record.name,
        id=bookmark.record.id,
        epoch=epoch.epoch,
        instant_unix_ns=epoch.created_unix_ns,
        of_snapshot=bookmark.record.of_snapshot,
        baseline_bytes=total_bytes(baseline),
        has_snapshot=epoch.has_snapshot,
    )
