"""The library face: volumes, snapshots and views in this process, without NBD. See docs/api.md."""

from __future__ import annotations

import io
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self

from stillblock import native
from stillblock.config import Config
from stillblock.errors import LockedError, UsageError
from stillblock.model import (
    BLOCK_SIZE_DEFAULT,
    PAUSE_LIMIT_MS_DEFAULT,
    CloneInfo,
    Consistency,
    Extents,
    OnFull,
    Quiet,
    Receipt,
    RuleTerm,
    SnapshotInfo,
    StoreUsage,
    check_name,
)
from stillblock.operations import (
    bookmarks,
    clones,
    groups,
    narrowing,
    restore,
    snapshots,
    usage,
    volumes,
)
from stillblock.operations.volume import EngineOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from typing_extensions import Buffer

    from stillblock.operations.volume import OpenVolume

Level = Literal["barrier", "idle", "filesystem", "application"]
"""How consistent a snapshot should be."""
_PIECE_BYTES: Final = 8 * 1024 * 1024
"""Long reads are made in pieces of this size: memory stays bounded, calls stay few."""


def create(
    name: str,
    *,
    origin: str | Path,
    store: str | Path | None = None,
    block_size: int = BLOCK_SIZE_DEFAULT,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    include_low: Iterable[str] = (),
    store_policy: native.OnFull = "degrade",
    store_limit: int = 0,
    state_dir: str | Path | None = None,
) -> None:
    """Make a volume of a raw file or block device; raise a `RefusedError` where it would harm.

    `include`, `include_low` and `exclude` are its standing rules, in this order. `store_policy` is
    what happens when the store is full, `store_limit` the bytes it may take (0: what its filesystem
    has).
    """
    config = _config(state_dir)
    request = volumes.AddRequest(
        name=name,
        origin=Path(origin),
        store=None if store is None else Path(store),
        block_size=block_size,
        rules=_terms(include, exclude, include_low),
        on_full=OnFull(store_policy),
        store_limit_bytes=store_limit,
    )
    volumes.add_volume(config, volumes.plan_add(config, request))


def open(  # noqa: A001 - it reads as stillblock.open
    name: str,
    *,
    state_dir: str | Path | None = None,
    cache: native.Cache = "writeback",
    direct: bool = False,
    recover: native.Recovery = "refuse",
) -> Volume:
    """Open a volume that nobody serves; raise `LockedError` if somebody does.

    `recover` decides about writes that a killed server had acknowledged.
    """
    from stillblock.service.client import find_server  # noqa: PLC0415 - only to explain

    config = _config(state_dir)
    check_name(name, what="volume")
    if find_server(config, name) is not None:
        raise LockedError(
            f"{name} is served by another process",
            hint=f"use its NBD exports, or stop it with `stillblock volume release {name}`",
        )
    options = EngineOptions(cache=cache, direct=direct, recover=recover)
    return Volume(volumes.open_volume(config, name, options))


def snapshot_group(
    members: Mapping[Volume, str | None],
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    include_low: Iterable[str] = (),
    only_these: bool = False,
    pause_limit_ms: int = PAUSE_LIMIT_MS_DEFAULT,
    description: str = "",
    consistency: Level | None = None,
    or_barrier: bool | None = None,
    quiet: native.Holds | None = None,
    wait: bool = True,
) -> tuple[Snapshot, ...]:
    """Take a snapshot of each volume at one instant: all are durable when this returns, or none is.

    `members` are from 2 to 64 open volumes, each with the name of its snapshot or None; the
    snapshots come back in this order. What was acknowledged on one volume before a write to another
    was sent is in if that write is. Everything else as in `Volume.snapshot`, for each of them.
    """
    request = groups.GroupRequest(
        members=tuple(
            groups.MemberRequest(volume=volume.name, name=name) for volume, name in members.items()
        ),
        terms=_terms(include, exclude, include_low),
        only_these=only_these,
        pause_limit_ms=pause_limit_ms,
        description=description,
        consistency=None if consistency is None else Consistency(consistency),
        or_barrier=or_barrier,
        quiet=None if quiet is None else Quiet(quiet),
    )
    opened = [volume._opened for volume in members]  # noqa: SLF001 - one module
    receipts = groups.create_group(opened, request).receipts
    taken = tuple(
        Snapshot(volume, receipt.snapshot)
        for volume, receipt in zip(members, receipts, strict=True)
    )
    for snapshot in taken if wait else ():
        snapshot.wait_final()
    return taken


class Volume:
    """A volume open in this process. Thread-safe; every call releases the GIL while it waits."""

    def __init__(self, opened: OpenVolume) -> None:
        self._opened = opened
        self._views: weakref.WeakSet[View] = weakref.WeakSet()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Volume {self.name}>"

    def close(self) -> None:
        """Stop cleanly: views are closed, the origin is a complete raw disk.

        A snapshot that is not final yet is narrowed when the volume is opened again.
        """
        for view in tuple(self._views):
            view.close()
        self._opened.close()

    @property
    def name(self) -> str:
        """What it is called."""
        return self._opened.name

    @property
    def size(self) -> int:
        """The live disk's size in bytes."""
        return self._opened.engine.size_bytes

    @property
    def block_size(self) -> int:
        """The unit of tracking and preserving."""
        return self._opened.engine.block_size

    # The live disk

    def pread(self, *, offset: int, length: int) -> bytes:
        """Read the live disk."""
        return self._opened.engine.pread(offset=offset, length=length)

    def pwrite(
        self, data: bytes | bytearray | memoryview, *, offset: int, fua: bool = False
    ) -> None:
        """Write the live disk; durable after the next `flush`, or at once with `fua`."""
        self._opened.engine.pwrite(data, offset=offset, fua=fua)

    def write_zeroes(self, *, offset: int, length: int) -> None:
        """Zero a range of the live disk."""
        self._opened.engine.write_zeroes(offset=offset, length=length)

    def trim(self, *, offset: int, length: int) -> None:
        """Tell that a range of the live disk is not needed any more."""
        self._opened.engine.trim(offset=offset, length=length)

    def flush(self) -> None:
        """Make every write before this durable."""
        self._opened.engine.flush()

    # The store

    @property
    def store_usage(self) -> StoreUsage:
        """How full the store is, and what happens when it is."""
        return usage.store_usage(self._opened)

    def set_store_policy(
        self, policy: native.OnFull | None = None, *, limit: int | None = None
    ) -> StoreUsage:
        """Change what happens when the store is full, or the bytes it may take; 0 is no limit."""
        on_full = None if policy is None else OnFull(policy)
        request = usage.PolicyRequest(on_full=on_full, limit_bytes=limit)
        return usage.set_policy(self._opened, request)

    # Snapshots and bookmarks

    def snapshot(
        self,
        name: str | None = None,
        *,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        include_low: Iterable[str] = (),
        only_these: bool = False,
        pause_limit_ms: int = PAUSE_LIMIT_MS_DEFAULT,
        description: str = "",
        consistency: Level | None = None,
        or_barrier: bool | None = None,
        quiet: native.Holds | None = None,
        wait: bool = True,
    ) -> Snapshot:
        """Take a snapshot, durable when this returns; without a name, named by the UTC time.

        The terms follow the volume's standing rules, the inclusions first; with `only_these` they
        stand alone. What only `include_low` selects is given up first when the store is full. With
        `wait` its selection is final: files and free space are resolved after the instant.
        `consistency`, `or_barrier` and `quiet` (which writers wait: those of the whole "device", or
        of "selected" blocks) stand in for the volume's standing ones. Raise `RuleError`,
        `NameTakenError`, `PauseTimeoutError` when writes could not be held within the limit,
        `QuiesceError`, `NotQuietError`, `FreezeRefusedError` when the level cannot be reached, or
        `ClosedError` when the volume is closed while a quiet moment is waited for.
        """
        receipt = snapshots.create_snapshot(
            self._opened,
            snapshots.SnapshotRequest(
                name=name,
                terms=_terms(include, exclude, include_low),
                only_these=only_these,
                pause_limit_ms=pause_limit_ms,
                description=description,
                consistency=None if consistency is None else Consistency(consistency),
                or_barrier=or_barrier,
                quiet=None if quiet is None else Quiet(quiet),
            ),
        )
        taken = Snapshot(self, receipt.snapshot)
        if wait:
            taken.wait_final()
        return taken

    def snapshots(self) -> tuple[Snapshot, ...]:
        """Return every snapshot, oldest first."""
        return tuple(Snapshot(self, i) for i in snapshots.list_snapshots(self._opened).snapshots)

    def find(self, name: str) -> Snapshot:
        """Return a snapshot by name, unique id prefix or `latest`; raise `NotFoundError`."""
        target = snapshots.SnapshotTarget(snapshot=name)
        return Snapshot(self, snapshots.show_snapshot(self._opened, target))

    def bookmarks(self) -> tuple[Bookmark, ...]:
        """Return every bookmark, oldest first."""
        return tuple(
            Bookmark(self, info.name) for info in bookmarks.list_bookmarks(self._opened).bookmarks
        )

    def changed_since(self, since: Snapshot | Bookmark) -> Extents:
        """Return what changed from an instant until now, among the blocks it tracks."""
        request = snapshots.ChangesRequest(since=_instant_name(since))
        return snapshots.changes(self._opened, request).extents

    def _view(self, epoch: int, excluded_reads: native.ExcludedReads) -> View:
        view = View(self._opened.engine.view(epoch=epoch, excluded_reads=excluded_reads))
        self._views.add(view)
        return view


class Snapshot:
    """A snapshot of an open volume."""

    def __init__(self, volume: Volume, info: SnapshotInfo) -> None:
        self._volume = volume
        self._taken = info

    def __repr__(self) -> str:
        return f"<Snapshot {self._taken.reference}>"

    @property
    def name(self) -> str:
        """What it is called now."""
        return self.info.name

    @property
    def id(self) -> str:
        """What stays when it is renamed."""
        return self._taken.id

    @property
    def info(self) -> SnapshotInfo:
        """What is true of it now: sizes, protection, holders."""
        target = snapshots.SnapshotTarget(snapshot=self.id)
        return snapshots.show_snapshot(self._volume._opened, target)  # noqa: SLF001 - one module

    @property
    def receipt(self) -> Receipt:
        """The record: rules, resolved extents, what was left out and why, consistency, when."""
        target = snapshots.SnapshotTarget(snapshot=self.id)
        return snapshots.read_receipt(self._volume._opened, target)  # noqa: SLF001

    def view(self, *, excluded_reads: native.ExcludedReads = "zeros") -> View:
        """Open it for reading. The view holds the snapshot until it is closed.

        Raise `NarrowingError` if its selection is not final after some seconds.
        """
        self.wait_final(timeout_s=narrowing.LET_SETTLE_S)
        return self._volume._view(self._taken.epoch, excluded_reads)  # noqa: SLF001

    def wait_final(self, *, timeout_s: float | None = None) -> None:
        """Wait until its selection is final; raise `NarrowingError` if the time is over."""
        opened = self._volume._opened  # noqa: SLF001 - one module
        narrowing.wait_final(opened, opened.snapshot(self.id), timeout_s=timeout_s)

    def changed_since(self, other: Snapshot | Bookmark) -> Extents:
        """Return what changed from an older instant to this one, among the blocks that tracks."""
        request = snapshots.ChangesRequest(since=_instant_name(other), until=self.id)
        return snapshots.changes(self._volume._opened, request).extents  # noqa: SLF001

    def newly_selected_since(self, other: Snapshot | Bookmark) -> Extents:
        """Return what this selects and an older instant did not hold: an increment needs it too."""
        request = snapshots.ChangesRequest(since=_instant_name(other), until=self.id)
        return snapshots.changes(self._volume._opened, request).newly_selected  # noqa: SLF001

    def bookmark(self, name: str | None = None) -> Bookmark:
        """Keep tracking what changes after this, also once it is deleted."""
        request = bookmarks.BookmarkRequest(snapshot=self.id, name=name)
        made = bookmarks.create_bookmark(self._volume._opened, request)  # noqa: SLF001
        return Bookmark(self._volume, made.name)

    def clone(self, name: str | None = None) -> Clone:
        """Make a writable view on it: a disk of its own, which changes neither this nor others."""
        request = clones.CloneRequest(snapshot=self.id, name=name)
        made = clones.create_clone(self._volume._opened, request)  # noqa: SLF001
        return Clone(self._volume, self.id, made)

    def clones(self) -> tuple[Clone, ...]:
        """Return its clones, oldest first."""
        opened, epoch = self._volume._opened, self._taken.epoch  # noqa: SLF001
        found = clones.list_clones(opened).clones
        return tuple(Clone(self._volume, self.id, info) for info in found if info.epoch == epoch)

    def rename(self, name: str) -> None:
        """Give it another name."""
        request = snapshots.RenameRequest(snapshot=self.id, name=name)
        snapshots.rename_snapshot(self._volume._opened, request)  # noqa: SLF001

    def protect(self, *, is_protected: bool = True) -> None:
        """Refuse to delete it from now on, or allow it again."""
        request = snapshots.ProtectRequest(snapshot=self.id, is_protected=is_protected)
        snapshots.protect_snapshot(self._volume._opened, request)  # noqa: SLF001

    def delete(self, *, force: bool = False) -> int:
        """Delete it; return the bytes freed. Raise `InUseError` while views hold it."""
        request = snapshots.DeleteRequest(snapshot=self.id, force=force)
        return snapshots.delete_snapshot(self._volume._opened, request).freed_bytes  # noqa: SLF001

    def restore(self, *, only: Iterable[str] = (), wait: bool = True) -> Snapshot:
        """Put it back in place, or what `only` names of it; return the snapshot that undoes that.

        The disk reads as restored at once; with `wait` all is on the origin when this returns.
        """
        opened = self._volume._opened  # noqa: SLF001
        request = restore.RestoreRequest(snapshot=self.id, only=_terms(only, ()))
        progress = restore.start_restore(opened, request)
        safety = self._volume.find(progress.safety or "")
        while wait and progress.is_running:
            progress = restore.wait_restore(opened, restore.WaitRequest())
        return safety


class Clone:
    """A writable view on a snapshot, as a disk. Thread-safe. Its writes outlive the program."""

    def __init__(self, volume: Volume, snapshot_id: str, info: CloneInfo) -> None:
        self._volume = volume
        self._snapshot_id = snapshot_id
        self._made = info
        self._disk: native.Clone | None = None

    def __repr__(self) -> str:
        return f"<Clone {self._made.reference}>"

    @property
    def name(self) -> str:
        """What it is called."""
        return self._made.name

    @property
    def size(self) -> int:
        """Size in bytes, that of the disk at the instant."""
        return self._made.size_bytes

    @property
    def info(self) -> CloneInfo:
        """What is true of it now: how much was written, what it takes, its state."""
        target = clones.CloneTarget(snapshot=self._snapshot_id, clone=self._made.id)
        return clones.show_clone(self._volume._opened, target)  # noqa: SLF001 - one module

    def pread(self, *, offset: int, length: int) -> bytes:
        """Read what was written, else what the snapshot holds."""
        return self._open().pread(offset=offset, length=length)

    def pwrite(
        self, data: bytes | bytearray | memoryview, *, offset: int, fua: bool = False
    ) -> None:
        """Write; durable after the next `flush`, or at once with `fua`."""
        self._open().pwrite(data, offset=offset, fua=fua)

    def write_zeroes(self, *, offset: int, length: int) -> None:
        """Zero a range."""
        self._open().write_zeroes(offset=offset, length=length)

    def trim(self, *, offset: int, length: int) -> None:
        """Give back the room of what was written to a range; it may read as zeros then."""
        self._open().trim(offset=offset, length=length)

    def flush(self) -> None:
        """Make every write before this durable."""
        self._open().flush()

    def close(self) -> None:
        """Make every write durable, and let the snapshot go until it is used again."""
        disk, self._disk = self._disk, None
        if disk is not None:
            disk.close()

    def reset(self) -> int:
        """Let it be its snapshot again; return the bytes freed."""
        self.close()
        return clones.reset_clone(self._volume._opened, self._change()).freed_bytes  # noqa: SLF001

    def delete(self) -> int:
        """Delete it and what was written to it; return the bytes freed."""
        self.close()
        return clones.delete_clone(self._volume._opened, self._change()).freed_bytes  # noqa: SLF001

    def _open(self) -> native.Clone:
        if self._disk is None:
            self._disk = self._volume._opened.engine.open_clone(  # noqa: SLF001 - one module
                number=self._made.number
            )
        return self._disk

    def _change(self) -> clones.CloneChange:
        return clones.CloneChange(snapshot=self._snapshot_id, clone=self._made.id)


class Bookmark:
    """What is left of a snapshot for increments."""

    def __init__(self, volume: Volume, name: str) -> None:
        self._volume = volume
        self.name = name

    def __repr__(self) -> str:
        return f"<Bookmark {self._volume.name}@{self.name}>"

    def delete(self) -> None:
        """Stop tracking since it."""
        target = bookmarks.BookmarkTarget(bookmark=self.name)
        bookmarks.delete_bookmark(self._volume._opened, target)  # noqa: SLF001 - one module


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewExtent:
    """A range of a view whose bytes are of one kind."""

    start: int
    end: int
    is_selected: bool
    """False: the snapshot left it out; it reads as zeros, whatever was there."""
    is_zero: bool
    is_lost: bool
    """True: the original could not be kept; reading it raises `SnapshotLostError`."""


class View(io.RawIOBase):
    """A snapshot as a seekable binary file. `pread` is thread-safe; the file position is not."""

    def __init__(self, inner: native.View) -> None:
        super().__init__()
        self._inner = inner
        self._position = 0

    @property
    def size(self) -> int:
        """The disk's size at the instant."""
        return self._inner.size_bytes

    def pread(self, *, offset: int, length: int) -> bytes:
        """Read at an offset; past the end is a `UsageError`."""
        self._check_open()
        return self._inner.pread(offset=offset, length=length)

    def extents(self, *, offset: int = 0, length: int | None = None) -> tuple[ViewExtent, ...]:
        """Return what kind of bytes lie where, in order."""
        self._check_open()
        span = self.size - offset if length is None else length
        return tuple(
            ViewExtent(
                start=start,
                end=end,
                is_selected=not flags & native.NOT_SELECTED,
                is_zero=bool(flags & native.ZERO),
                is_lost=bool(flags & native.LOST),
            )
            for start, end, flags in self._inner.extents(offset=offset, length=span)
        )

    # io.RawIOBase

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in the file."""
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move the position; return it."""
        self._check_open()
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}
        if whence not in bases:
            raise ValueError(f"whence {whence} is none of 0, 1, 2")
        position = bases[whence] + offset
        if position < 0:
            raise ValueError(f"position {position} is before the start")
        self._position = position
        return position

    def readinto(self, buffer: Buffer, /) -> int:
        """Read into a buffer from the position on; return how much, 0 at the end."""
        target = memoryview(buffer).cast("B")
        data = self._next(len(target))
        target[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """Read from the position to the end."""
        parts: list[bytes] = []
        while part := self._next(_PIECE_BYTES):
            parts.append(part)
        return b"".join(parts)

    def close(self) -> None:
        """Let the snapshot go."""
        if not self.closed:
            self._inner.close()
        super().close()

    def _next(self, length: int) -> bytes:
        self._check_open()
        span = min(length, _PIECE_BYTES, max(0, self.size - self._position))
        if span == 0:
            return b""
        data = self._inner.pread(offset=self._position, length=span)
        self._position += len(data)
        return data

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on a closed view")


def _config(state_dir: str | Path | None) -> Config:
    config = Config.load(state_dir=None if state_dir is None else Path(state_dir))
    config.ensure()
    return config


def _terms(
    include: Iterable[str], exclude: Iterable[str], include_low: Iterable[str] = ()
) -> tuple[RuleTerm, ...]:
    for given in (include, exclude, include_low):
        if isinstance(given, str):
            raise UsageError(f"{given!r} should be a list of terms: [{given!r}]")
    return tuple(
        RuleTerm(include=is_included, text=text, is_low=is_low)
        for is_included, is_low, texts in (
            (True, False, include),
            (True, True, include_low),
            (False, False, exclude),
        )
        for text in texts
    )


def _instant_name(instant: Snapshot | Bookmark) -> str:
    return instant.id if isinstance(instant, Snapshot) else instant.name
