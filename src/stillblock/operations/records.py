"""What we write beside instants and volumes in the store: our values as opaque bytes."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

from stillblock import codec
from stillblock.errors import StillblockError
from stillblock.model import BookmarkRecord, CloneRecord, SnapshotRecord
from stillblock.operations.registry import VOLUME_KIND

if TYPE_CHECKING:
    from stillblock import native
    from stillblock.model import VolumeConfig

_SNAPSHOT_KIND: Final = "snapshot-record"
_BOOKMARK_KIND: Final = "bookmark-record"
_CLONE_KIND: Final = "clone-record"


def new_id() -> str:
    """Return an id for something new."""
    return secrets.token_hex(8)


def encode_settings(settings: VolumeConfig) -> bytes:
    """Return a volume's settings as the store keeps them."""
    return codec.dump(VOLUME_KIND, settings)


def encode_snapshot(record: SnapshotRecord) -> bytes:
    """Return a snapshot's record as the store keeps it."""
    return codec.dump(_SNAPSHOT_KIND, record)


def encode_bookmark(record: BookmarkRecord) -> bytes:
    """Return a bookmark's record as the store keeps it."""
    return codec.dump(_BOOKMARK_KIND, record)


def encode_clone(record: CloneRecord) -> bytes:
    """Return a clone's record as the store keeps it."""
    return codec.dump(_CLONE_KIND, record)


def clone_record(number: int, meta: bytes) -> CloneRecord:
    """Read a record; a clone whose record is not ours stays reachable, by its number."""
    try:
        return codec.load(_CLONE_KIND, CloneRecord, meta)
    except StillblockError:
        return CloneRecord(name=f"clone-{number}", id=f"{number:016x}")


def snapshot_record(epoch: int, meta: bytes) -> SnapshotRecord:
    """Read a record; a snapshot whose record is not ours stays reachable, by its number."""
    try:
        return codec.load(_SNAPSHOT_KIND, SnapshotRecord, meta)
    except StillblockError:
        return SnapshotRecord(name=f"epoch-{epoch}", id=f"{epoch:016x}")


def bookmark_record(epoch: native.Epoch) -> BookmarkRecord:
    """Read a bookmark's record, or make one of its number."""
    try:
        return codec.load(_BOOKMARK_KIND, BookmarkRecord, epoch.bookmark_meta)
    except StillblockError:
        name = f"epoch-{epoch.epoch}"
        return BookmarkRecord(
            name=name, id=f"{epoch.epoch:016x}", of_snapshot=name, created_unix_ns=0
        )
