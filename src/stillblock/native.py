"""The only gateway to the Rust core: the same calls, with our error classes. No logic here."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from stillblock import _native
from stillblock.errors import StillblockError, from_native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from stillblock.model import Extents

Instant = _native.Instant
Epoch = _native.Epoch
CloneEntry = _native.CloneEntry
RestoreStatus = _native.RestoreStatus
Inspection = _native.Inspection
ImageMount = _native.ImageMount
StoreUsage = _native.StoreUsage
crc32c = _native.crc32c
plain_file = _native.plain_file

Cache = Literal["writeback", "writethrough"]
Recovery = Literal["refuse", "replay", "discard"]
Holds = Literal["device", "selected"]
OnFull = Literal["degrade", "hold", "fail"]
ExcludedReads = Literal["zeros", "error"]
ContextKind = Literal["selected", "changed", "dirty"]
ContextSpec = tuple[str, ContextKind, int]
"""What clients call a metadata context, what it shows, since which epoch (0 for "selected")."""

Access = Literal["constant", "watched", "writable"]
FileSpec = tuple[str, "Sequence[tuple[int, int]] | None"]
"""A file of an image tree: its path, of one or two names; the ranges that make it, None: all."""

BUFFER_BYTES_DEFAULT = 64 * 1024 * 1024

HOLE, ZERO, NOT_SELECTED, LOST = 1, 2, 4, 8
"""Flags of `View.extents`."""


@contextmanager
def _translated() -> Iterator[None]:
    """Raise the class of our own for an error of the core."""
    try:
        yield
    except _native.NativeError as error:
        raise _translate(error) from error


def _translate(error: _native.NativeError) -> StillblockError:
    kind, message, *_ = (*(str(argument) for argument in error.args), "", "")
    return from_native(kind, message or kind)


def create_volume(
    *,
    store: Path,
    origin: Path,
    block_size: int,
    meta: bytes,
    on_full: OnFull = "degrade",
    limit_bytes: int = 0,
) -> str:
    """Make a new store for the origin; return the volume's uuid."""
    with _translated():
        return _native.Volume.create(
            store=str(store),
            origin=str(origin),
            block_size=block_size,
            meta=meta,
            on_full=on_full,
            limit_bytes=limit_bytes,
        )


def peek(store: Path) -> tuple[str, str, int, bytes]:
    """Return (uuid, origin path, block size, meta) of a store, even while it is served."""
    with _translated():
        return _native.Volume.peek(store=str(store))


def waits_for(store: Path) -> tuple[str, ...]:
    """Return the uuids of volumes whose stores decide groups that this one has no end of.

    Even while it is served.
    """
    with _translated():
        return tuple(_native.Volume.waits_for(store=str(store)))


def inspect(store: Path, *, origin: Path | None = None) -> Inspection:
    """Look at a store that nobody has open, and at its origin; change nothing."""
    with _translated():
        return _native.Volume.inspect(
            store=str(store), origin=None if origin is None else str(origin)
        )


def check_unused(store: Path) -> None:
    """Raise `LockedError` if somebody has the store open, whatever is in it."""
    with _translated():
        _native.Volume.check_unused(store=str(store))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMember:
    """One volume's part in a group, as for `Volume.snapshot`."""

    volume: Volume
    selection: Extents
    low: Extents
    meta: bytes
    pause_limit_ms: int
    quiet_ms: int | None = None
    holds: Holds = "device"


def snapshot_group(
    group_id: str,
    members: Sequence[GroupMember],
    *,
    passed: Callable[[], object] | None = None,
    objects: Callable[[], str | None] | None = None,
) -> list[Instant]:
    """Take one snapshot of each volume, all at one instant, or none; in the order of the members.

    From 2 to 64 volumes, each once. `group_id` has 32 hexadecimal digits and is never used again,
    nor for a second try. `objects` is asked once everything is durable but the decision, while
    first changes of all members wait: why there are to be no snapshots, or None. Raise
    `QuiesceError` with that, or what `Volume.snapshot` raises.
    """
    with _translated():
        return _native.Volume.snapshot_group(
            group_id=group_id,
            members=[
                (m.volume.inner, m.selection, m.low, m.meta, m.pause_limit_ms, m.quiet_ms, m.holds)
                for m in members
            ],
            passed=passed,
            objects=objects,
        )


class _WritableDisk:
    """What the live disk and clones have in common. Offsets and lengths are in bytes."""

    __slots__ = ("inner",)
    inner: _native.Volume | _native.Clone

    def pread(self, *, offset: int, length: int) -> bytes:
        """Read."""
        with _translated():
            return self.inner.pread(offset=offset, length=length)

    def pwrite(
        self, data: bytes | bytearray | memoryview, *, offset: int, fua: bool = False
    ) -> None:
        """Write; durable when a later `flush` returns, or at once with `fua`."""
        with _translated():
            self.inner.pwrite(data, offset=offset, fua=fua)

    def write_zeroes(
        self, *, offset: int, length: int, may_punch: bool = True, fua: bool = False
    ) -> None:
        """Zero a range."""
        with _translated():
            self.inner.write_zeroes(offset=offset, length=length, may_punch=may_punch, fua=fua)

    def trim(self, *, offset: int, length: int) -> None:
        """Give back the space of what a range holds."""
        with _translated():
            self.inner.trim(offset=offset, length=length)

    def flush(self) -> None:
        """Make every write before this durable."""
        with _translated():
            self.inner.flush()


class Volume(_WritableDisk):
    """One origin with its store, open in this process. Thread-safe."""

    __slots__ = ()
    inner: _native.Volume

    def __init__(self, inner: _native.Volume) -> None:
        self.inner = inner

    @classmethod
    def open(
        cls,
        store: Path,
        *,
        origin: Path | None = None,
        cache: Cache = "writeback",
        direct: bool = False,
        buffer_dir: Path | None = None,
        buffer_bytes: int = BUFFER_BYTES_DEFAULT,
        recover: Recovery = "refuse",
        peers: Sequence[Path] = (),
    ) -> Self:
        """Open and lock the volume; raise `LockedError`, `RecoveryNeededError` and their like.

        `peers` are stores of other volumes: asked about groups whose end this one does not know.
        """
        with _translated():
            return cls(
                _native.Volume.open(
                    store=str(store),
                    origin=None if origin is None else str(origin),
                    cache=cache,
                    direct=direct,
                    buffer_dir=None if buffer_dir is None else str(buffer_dir),
                    buffer_bytes=buffer_bytes,
                    recover=recover,
                    peers=[str(peer) for peer in peers],
                )
            )

    def settle_groups(self, places: Sequence[Path]) -> int:
        """Ask again about snapshots of which it is not known whether they exist, and write it down.

        `places` are stores to look in, beside where the deciding one was. Return how many are left.
        """
        with _translated():
            return self.inner.settle_groups(places=[str(place) for place in places])

    def keep_undecided(self, *, epoch: int, meta: bytes) -> None:
        """Keep a snapshot of which nobody can tell any more whether it exists; `meta` replaces its.

        Raise `UndecidedError` if its group is known to have failed, `NotFoundError` if it is not
        undecided.
        """
        with _translated():
            self.inner.keep_undecided(epoch=epoch, meta=meta)

    def accept_origin(self, note: str) -> int:
        """Take the origin as it is; return how many snapshots and bookmarks were in doubt."""
        with _translated():
            return self.inner.accept_origin(note)

    def check_structure(self) -> tuple[tuple[bool, str], ...]:
        """Return (is lost, what) for all in journal and log that is not as it was written."""
        with _translated():
            return tuple(self.inner.check_structure())

    def check_content(self, *, share: int, seed: int) -> ContentCheck:
        """Prepare to verify preserved content, or a share of it in parts of 10000."""
        with _translated():
            return ContentCheck(self.inner.check_content(share=share, seed=seed))

    def damaged(self) -> tuple[tuple[int, Extents], ...]:
        """Return the rotten content that some snapshot reads, by the epoch it was preserved in."""
        with _translated():
            return tuple((epoch, tuple(extents)) for epoch, extents in self.inner.damaged())

    def note_damaged(self, found: Sequence[tuple[int, Extents]]) -> None:
        """Remember what an earlier process found."""
        with _translated():
            self.inner.note_damaged(found)

    @property
    def uuid(self) -> str:
        """The volume's uuid in hexadecimal."""
        return self.inner.uuid

    @property
    def origin(self) -> str:
        """The path of the raw file or device with the live data."""
        return self.inner.origin

    @property
    def store(self) -> str:
        """The path of the directory that holds everything else."""
        return self.inner.store

    @property
    def size_bytes(self) -> int:
        """The live size."""
        with _translated():
            return self.inner.size_bytes

    @property
    def block_size(self) -> int:
        """The unit of tracking and preserving."""
        return self.inner.block_size

    def meta(self) -> bytes:
        """Return what we keep about the volume in its store."""
        with _translated():
            return self.inner.meta()

    def set_meta(self, meta: bytes) -> None:
        """Replace it, durably."""
        with _translated():
            self.inner.set_meta(meta)

    def snapshot(
        self,
        *,
        selection: Extents,
        low: Extents = (),
        meta: bytes,
        pause_limit_ms: int,
        quiet_ms: int | None = None,
        holds: Holds = "device",
        passed: Callable[[], object] | None = None,
    ) -> Instant:
        """Take an instant; durable when it returns. `low` is given up first on a full store.

        With `quiet_ms` only if no watched write came for so long, else `NotQuietError`. `passed`
        is called once writes go on again, before the snapshot is durable. `holds`: all writers
        wait, or those of selected blocks.
        """
        with _translated():
            return self.inner.snapshot(
                selection=selection,
                low=low,
                meta=meta,
                pause_limit_ms=pause_limit_ms,
                quiet_ms=quiet_ms,
                holds=holds,
                passed=passed,
            )

    def watch_writes(self, *, ranges: Extents | None = None) -> None:
        """Look at writes of these ranges, or of the whole disk, from now on."""
        with _translated():
            self.inner.watch_writes(ranges=ranges)

    def unwatch_writes(self) -> None:
        """Look no more."""
        with _translated():
            self.inner.unwatch_writes()

    def quiet_ns(self) -> int | None:
        """Return how long no watched write came; None if nobody watches."""
        with _translated():
            return self.inner.quiet_ns()

    def watch_reads(self, *, length: int) -> None:
        """Remember where the live disk is read by requests of just this length; 0: no more."""
        with _translated():
            self.inner.watch_reads(length=length)

    def reads_seen(self) -> list[int]:
        """Return the offsets of such reads."""
        with _translated():
            return self.inner.reads_seen()

    def epochs(self) -> list[Epoch]:
        """Return every instant the store knows, oldest first."""
        with _translated():
            return self.inner.epochs()

    def set_epoch_meta(self, *, epoch: int, meta: bytes) -> None:
        """Replace what we keep about a snapshot, durably."""
        with _translated():
            self.inner.set_epoch_meta(epoch=epoch, meta=meta)

    def selection(self, *, epoch: int) -> Extents:
        """Return what a snapshot selects, else its bookmark's baseline."""
        with _translated():
            return tuple(self.inner.selection(epoch=epoch))

    def narrow(self, *, epoch: int, selection: Extents, low: Extents = (), meta: bytes) -> int:
        """Select less, and replace `low` and what we keep about a snapshot, in one decision.

        Return the bytes freed. Content that nobody selects any more is then neither in the store
        nor in the write buffer.
        """
        with _translated():
            return self.inner.narrow(epoch=epoch, selection=selection, low=low, meta=meta)

    def delete_snapshot(self, *, epoch: int, force: bool = False) -> int:
        """Delete; return the bytes freed."""
        with _translated():
            return self.inner.delete_snapshot(epoch=epoch, force=force)

    def bookmark(self, *, epoch: int, meta: bytes) -> None:
        """Keep tracking what changes after this snapshot, even once it is deleted."""
        with _translated():
            self.inner.bookmark(epoch=epoch, meta=meta)

    def delete_bookmark(self, *, epoch: int) -> None:
        """Stop that."""
        with _translated():
            self.inner.delete_bookmark(epoch=epoch)

    def changed(self, *, since: int, until: int | None = None) -> Extents:
        """Return what changed from one instant to another or to now."""
        with _translated():
            return tuple(self.inner.changed(since=since, until=until))

    def newly_selected(self, *, since: int, until: int) -> Extents:
        """Return what the later instant selects and the earlier one did not hold."""
        with _translated():
            return tuple(self.inner.newly_selected(since=since, until=until))

    def view(self, *, epoch: int, excluded_reads: ExcludedReads = "zeros") -> View:
        """Open a snapshot for reading; holds it until closed."""
        with _translated():
            return View(self.inner.view(epoch=epoch, excluded_reads=excluded_reads))

    def create_clone(self, *, epoch: int, meta: bytes) -> int:
        """Make a writable view on a snapshot; return its number. Durable when it returns."""
        with _translated():
            return self.inner.create_clone(epoch=epoch, meta=meta)

    def clones(self) -> list[CloneEntry]:
        """Return every clone the store has."""
        with _translated():
            return self.inner.clones()

    def open_clone(self, *, number: int, excluded_reads: ExcludedReads = "zeros") -> Clone:
        """Open a clone; holds its snapshot until closed."""
        with _translated():
            return Clone(self.inner.open_clone(number=number, excluded_reads=excluded_reads))

    def reset_clone(self, *, number: int) -> int:
        """Let a clone be its snapshot again; raise `InUseError` while it is open."""
        with _translated():
            return self.inner.reset_clone(number=number)

    def delete_clone(self, *, number: int) -> int:
        """Remove a clone; return the bytes given back. Raise `InUseError` while it is open."""
        with _translated():
            return self.inner.delete_clone(number=number)

    def set_clone_meta(self, *, number: int, meta: bytes) -> None:
        """Replace what we keep about a clone, durably."""
        with _translated():
            self.inner.set_clone_meta(number=number, meta=meta)

    def restore(
        self,
        *,
        epoch: int,
        request: Extents,
        safety_selection: Extents,
        safety_low: Extents = (),
        meta: bytes,
        pause_limit_ms: int,
    ) -> RestoreStatus:
        """Start a restore; the disk reads as restored when this returns."""
        with _translated():
            return self.inner.restore(
                epoch=epoch,
                request=request,
                safety_selection=safety_selection,
                safety_low=safety_low,
                meta=meta,
                pause_limit_ms=pause_limit_ms,
            )

    def restore_plan(self, *, epoch: int, request: Extents) -> Extents:
        """Return what `restore` would write now."""
        with _translated():
            return tuple(self.inner.restore_plan(epoch=epoch, request=request))

    def restore_status(self) -> RestoreStatus | None:
        """Return how far a restore is, or None if none runs."""
        with _translated():
            return self.inner.restore_status()

    def restore_wait(self, *, timeout_ms: int) -> bool:
        """Return whether no restore runs any more within the time."""
        with _translated():
            return self.inner.restore_wait(timeout_ms=timeout_ms)

    def resize(self) -> int:
        """Take over the origin's present length; return it."""
        with _translated():
            return self.inner.resize()

    def statistics(self) -> dict[str, int]:
        """Return the counters since the volume was opened."""
        with _translated():
            return self.inner.statistics().as_dict()

    def set_store_policy(self, *, on_full: OnFull, limit_bytes: int) -> None:
        """Decide what happens to first changes when the store is full; in force at once."""
        with _translated():
            self.inner.set_store_policy(on_full=on_full, limit_bytes=limit_bytes)

    def store_usage(self) -> StoreUsage:
        """Return how full the store is, and what happens when it is."""
        with _translated():
            return self.inner.store_usage()

    def low(self, *, epoch: int) -> Extents:
        """Return what of a snapshot's selection is given up first."""
        with _translated():
            return tuple(self.inner.low(epoch=epoch))

    def store_bytes(self) -> int:
        """Return the bytes kept for snapshots now."""
        with _translated():
            return self.inner.store_bytes()

    def close(self) -> None:
        """Stop cleanly: everything is on the origin when this returns."""
        with _translated():
            self.inner.close()


class ContentCheck:
    """Preserved content compared with its checksums, a step at a time."""

    __slots__ = ("inner",)

    def __init__(self, inner: _native.ContentCheck) -> None:
        self.inner = inner

    @property
    def total_bytes(self) -> int:
        """What there is to read."""
        return self.inner.total_bytes

    @property
    def done_bytes(self) -> int:
        """What was read."""
        return self.inner.done_bytes

    def step(self, *, bytes_max: int) -> bool:
        """Read so much more; return False once all is done."""
        with _translated():
            return self.inner.step(bytes_max)

    def damaged_blocks(self) -> int:
        """Return how many copies failed so far."""
        return self.inner.damaged_blocks()


class View:
    """A snapshot, readable; holds it until closed. Thread-safe."""

    __slots__ = ("inner",)

    def __init__(self, inner: _native.View) -> None:
        self.inner = inner

    @property
    def epoch(self) -> int:
        """Which snapshot this is."""
        return self.inner.epoch

    @property
    def size_bytes(self) -> int:
        """The disk's size at the instant."""
        return self.inner.size_bytes

    def pread(self, *, offset: int, length: int) -> bytes:
        """Read the disk as it was."""
        with _translated():
            return self.inner.pread(offset=offset, length=length)

    def extents(self, *, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Return (start, end, flags) for a range; see `HOLE`, `ZERO`, `NOT_SELECTED`, `LOST`."""
        with _translated():
            return self.inner.extents(offset=offset, length=length)

    def close(self) -> None:
        """Let the snapshot go."""
        with _translated():
            self.inner.close()


class Clone(_WritableDisk):
    """A writable view on a snapshot; holds the snapshot until closed. Thread-safe."""

    __slots__ = ()
    inner: _native.Clone

    def __init__(self, inner: _native.Clone) -> None:
        self.inner = inner

    @property
    def number(self) -> int:
        """Its number in the store."""
        return self.inner.number

    @property
    def size_bytes(self) -> int:
        """The disk's size, that of the snapshot."""
        return self.inner.size_bytes

    def extents(self, *, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Return (start, end, flags) for a range; see `HOLE`, `ZERO`, `NOT_SELECTED`, `LOST`."""
        with _translated():
            return self.inner.extents(offset=offset, length=length)

    def close(self) -> None:
        """Make what was written durable, and let the snapshot go."""
        with _translated():
            self.inner.close()


class Server:
    """The NBD server: listeners, connections, exports by name."""

    __slots__ = ("inner",)

    def __init__(self, *, connections_max: int = 64) -> None:
        with _translated():
            self.inner = _native.Server(connections_max=connections_max)

    def listen_unix(self, path: Path) -> None:
        """Accept clients on a Unix socket, mode 0600."""
        with _translated():
            self.inner.listen_unix(str(path))

    def listen_tcp(self, host: str, port: int) -> int:
        """Accept clients on TCP; return the port."""
        with _translated():
            return self.inner.listen_tcp(host, port)

    def add_volume(
        self,
        name: str,
        volume: Volume,
        *,
        description: str,
        contexts: Sequence[ContextSpec],
        read_only: bool = False,
    ) -> None:
        """Offer a live disk."""
        with _translated():
            self.inner.add_volume(
                name,
                volume.inner,
                description=description,
                contexts=contexts,
                read_only=read_only,
            )

    def add_view(
        self, name: str, view: View, *, description: str, contexts: Sequence[ContextSpec]
    ) -> None:
        """Offer a snapshot."""
        with _translated():
            self.inner.add_view(name, view.inner, description=description, contexts=contexts)

    def add_clone(
        self,
        name: str,
        clone: Clone,
        *,
        description: str,
        contexts: Sequence[ContextSpec],
        read_only: bool = False,
    ) -> None:
        """Offer a clone."""
        with _translated():
            self.inner.add_clone(
                name,
                clone.inner,
                description=description,
                contexts=contexts,
                read_only=read_only,
            )

    def set_contexts(self, name: str, contexts: Sequence[ContextSpec]) -> None:
        """Replace the metadata contexts of an export, for clients that come later."""
        with _translated():
            self.inner.set_contexts(name, contexts)

    def set_default(self, name: str | None) -> None:
        """Choose the export that the empty name means."""
        with _translated():
            self.inner.set_default(name)

    def remove(self, name: str, *, force: bool = False) -> int:
        """Withdraw an export; return the connections cut, raise `InUseError` unless forced."""
        with _translated():
            return self.inner.remove(name, force=force)

    def connections(self) -> list[tuple[str, str, int]]:
        """Return (export, peer, seconds connected) of every client."""
        with _translated():
            return self.inner.connections()

    def stop(self) -> None:
        """Finish what is in flight and close everything."""
        with _translated():
            self.inner.stop()


class Images:
    """Exports of a server as the files of a FUSE tree. Thread-safe."""

    __slots__ = ("inner",)

    def __init__(self) -> None:
        with _translated():
            self.inner = _native.Images()

    def add(
        self,
        name: str,
        server: Server,
        *,
        files: Sequence[FileSpec],
        access: Access,
        created_unix_ns: int,
    ) -> None:
        """Show the export of that name as these files; all of them or, on an error, none.

        `constant` content never changes, so the kernel keeps what it read; `watched` changes by
        others only; `writable` can be written by the files.
        """
        with _translated():
            self.inner.add(
                name, server.inner, files=files, access=access, created_unix_ns=created_unix_ns
            )

    def extend(self, name: str, *, files: Sequence[FileSpec]) -> None:
        """Show more files of an export."""
        with _translated():
            self.inner.extend(name, files=files)

    def remove(self, name: str, *, force: bool = False) -> int:
        """Take an export's files away and let go of it; return how often they were open.

        Raise `InUseError` if they are open, unless forced: then they give errors from now on.
        """
        with _translated():
            return self.inner.remove(name, force=force)

    def opens(self) -> dict[str, int]:
        """Return how often the files of each export are open."""
        with _translated():
            return self.inner.opens()

    def serve(self, device: int) -> ImageMount:
        """Answer for a mount on a descriptor of `/dev/fuse` until it is unmounted."""
        with _translated():
            return self.inner.serve(device)
