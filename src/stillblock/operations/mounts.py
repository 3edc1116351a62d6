"""Mounts as the server has its part in them: trees of images, what is to be mounted, their end.

The server shows files; it never mounts a filesystem that lies on them, for a process that waits for
itself cannot even be killed. Whoever asked does that, and it is written down for us to clean up.
"""

from __future__ import annotations

import os
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillblock.errors import (
    InUseError,
    NotFoundError,
    RefusedError,
    RuleError,
    StillblockError,
    StoreOnVolumeError,
    UsageError,
)
from stillblock.extents import intersect, total_bytes, whole
from stillblock.model import Extents, Reference, format_size
from stillblock.mounting import kernel, leftovers, records
from stillblock.mounting.leftovers import Found
from stillblock.mounting.records import MountKind, MountRecord
from stillblock.operations.clones import CloneChange, CloneTarget, delete_clone, find_clone
from stillblock.operations.disks import SnapshotDisk
from stillblock.operations.narrowing import wait_final
from stillblock.operations.receipts import left_out_by_reason
from stillblock.selection.facts import DiskFacts
from stillblock.selection.filesystems.signatures import Content
from stillblock.selection.places import WHOLE_DISK, Place

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stillblock.operations.volume import OpenVolume, Snapshot

_BTRFS_FSID_AT: Final = 65536 + 32
"""`struct btrfs_super_block`: the fsid, behind the checksum."""
_FSID_BYTES: Final = 16
_REASONS_MAX: Final = 4
_PLACES_MAX: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesRequest:
    """A directory in which images are to be shown as files."""

    directory: str
    owner: str = ""
    """The process that they are shown for, as `records.process_id` names it; empty: they stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesShown:
    """Where images are shown."""

    volume: str
    directory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRequest:
    """What is to be mounted or attached."""

    snapshot: str | None = None
    """None: the live disk."""
    clone: str | None = None
    partition: str | None = None
    """`2`, `vg/root`, a label or uuid; None: the only filesystem."""
    is_whole: bool = False
    """The disk, whatever is on it."""
    directory: str = ""
    """Where it is to be mounted: a place that would hide something of ours is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MountSource:
    """A file that can be mounted, and what has to be known of it."""

    reference: str
    image: str
    place: str
    """`disk`, `part:2` or `lv:vg/root`."""
    content: str | None
    """Which family of filesystems; None: not known here."""
    fsid: str = ""
    """Of btrfs, which the kernel tells its filesystems apart by."""
    size_bytes: int
    pieces: Extents = ()
    """Which ranges of the disk it is, (start, end) in bytes; empty: all of it."""
    left_out_bytes: int = 0
    """What of the place the snapshot does not hold; it reads as zeros, or as errors."""
    because: tuple[str, ...] = ()
    """The terms that left most of it out."""
    lost_bytes: int = 0
    note: str = ""
    """Why it may not be what it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MountInfo:
    """One mount, as lists show it."""

    volume: str
    what: MountKind
    reference: str
    where: str
    device: str
    filesystem: str
    is_read_only: bool
    has_own_clone: bool
    """Whether it lies on a clone that goes with it."""
    is_whole: bool
    """Whether all of it is there, and somebody answers for it."""


def info_of(found: Found) -> MountInfo:
    """Return a mount as lists show it."""
    record = found.record
    return MountInfo(
        volume=record.volume,
        what=record.what,
        reference=record.reference,
        where=record.where,
        device=record.device,
        filesystem=record.filesystem,
        is_read_only=record.is_read_only,
        has_own_clone=bool(record.clone),
        is_whole=found.is_whole,
    )


# Trees


def show_images(volume: OpenVolume, request: ImagesRequest) -> ImagesShown:
    """Show images of everything there is as files, until it is unmounted or the server stops."""
    directory = checked_directory(volume, request.directory)
    _show(volume, directory, is_private=False, owner=request.owner)
    volume.event("images_shown", directory=directory)
    return ImagesShown(volume=volume.name, directory=directory)


def _show(volume: OpenVolume, directory: str, *, is_private: bool, owner: str = "") -> None:
    record = MountRecord(
        id=records.new_id(),
        volume=volume.name,
        what=MountKind.IMAGES,
        reference=volume.name,
        directory=directory,
        filesystem="fuse",
        is_read_only=False,
        is_private=is_private,
        owner=owner,
        boot_id=kernel.boot_id(kernel.System()),
        created_unix_ns=time.time_ns(),
    )
    records.write(volume.mounts_dir, record)
    try:
        volume.hooks.show_images(volume, directory)
    except BaseException:
        records.remove(volume.mounts_dir, record)
        raise


def _ensure_private(volume: OpenVolume) -> str:
    """Return the directory of the tree that mounts lie on."""
    directory = str(volume.images_dir)
    with volume.lock:
        top = {mount.path: mount.source for mount in kernel.mount_points(kernel.System())}
        is_there = top.get(directory) == kernel.tree_source(volume.name)
        if not is_there or not volume.hooks.shows_images(volume, directory):
            volume.images_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            _show(volume, directory, is_private=True)
    return directory


def checked_directory(volume: OpenVolume, text: str) -> str:
    """Return the path of a directory that may be mounted over; raise if it would hide ours."""
    directory = os.path.normpath(text)
    if not Path(text).is_absolute():
        raise UsageError(f"{text!r} is no absolute path")
    for mount in kernel.mount_points(kernel.System()):
        if mount.path == directory:
            raise InUseError(f"something is mounted at {directory} already")
        # Before anything is looked at there: we would wait for our own answer, and could not even
        # be killed while we do.
        if mount.kind == kernel.FUSE_KIND and Path(directory).is_relative_to(mount.path):
            raise UsageError(f"{directory} lies among images, where nothing can be mounted")
    if os.path.realpath(directory) != directory:
        raise UsageError(f"{directory} leads through a link; name {os.path.realpath(directory)}")
    if not Path(directory).is_dir():
        raise NotFoundError(f"{directory} is no directory", hint=f"mkdir -p {directory}")
    places = volume.own_places() | {"origin": Path(volume.engine.origin)}
    for what, place in places.items():
        if Path(os.path.realpath(place)).is_relative_to(directory):
            raise StoreOnVolumeError(
                f"a mount at {directory} would hide the {what}, {place}",
                hint="mount on an empty directory of its own",
            )
    try:
        has_entries = bool(os.listdir(directory))
    except OSError as error:
        raise RefusedError(f"{directory} cannot be read: {error.strerror}") from error
    if has_entries:
        raise RefusedError(
            f"{directory} is not empty, and a mount would hide what is there",
            hint="mount on an empty directory of its own",
        )
    return directory


# What is to be mounted


def mount_source(volume: OpenVolume, request: SourceRequest) -> MountSource:
    """Return the file to mount or attach, shown in a tree of our own."""
    if request.directory:
        checked_directory(volume, request.directory)
    if request.snapshot is None:
        if not request.is_whole:
            raise RefusedError(
                f"{volume.name} is in use: its filesystems change under whoever mounts them",
                hint=f"take a snapshot: stillblock snapshot create {volume.name}@now",
            )
        return _whole(volume, volume.name, volume.engine.size_bytes)
    snapshot = wait_final(volume, volume.snapshot(request.snapshot))
    reference = f"{volume.name}@{snapshot.record.name}"
    clone = None
    if request.clone is not None:
        clone = find_clone(volume, CloneTarget(snapshot=snapshot.record.id, clone=request.clone))
        reference += f"+{clone.record.name}"
    if request.is_whole and request.partition is None:
        return _described(snapshot, _whole(volume, reference, snapshot.epoch.size_bytes))
    with _readable(volume, snapshot, reference if clone else None) as disk:
        place = _chosen(DiskFacts(disk), request.partition, reference)
        fsid = b""
        if place.content is Content.BTRFS:
            fsid = place.disk(disk).pread(offset=_BTRFS_FSID_AT, length=_FSID_BYTES)
    pieces = None if place.name == WHOLE_DISK else place.pieces
    source = MountSource(
        reference=reference,
        image=_image(volume, reference, place.name, pieces),
        place=place.name,
        content=None if place.content is None else str(place.content),
        fsid=str(uuid.UUID(bytes=fsid)) if fsid else "",
        size_bytes=place.size,
        pieces=pieces or (),
    )
    return _described(snapshot, source, place.extents)


@contextmanager
def _readable(volume: OpenVolume, snapshot: Snapshot, clone: str | None) -> Iterator[SnapshotDisk]:
    """Give a snapshot or clone as its tables are read: those it left out are the live disk's."""
    if clone is not None:
        yield SnapshotDisk(volume.hooks.clone_disk(volume, clone), volume.engine)
        return
    view = volume.engine.view(epoch=snapshot.epoch.epoch, excluded_reads="zeros")
    try:
        yield SnapshotDisk(view, volume.engine)
    finally:
        view.close()


def _whole(volume: OpenVolume, reference: str, size_bytes: int) -> MountSource:
    return MountSource(
        reference=reference,
        image=_image(volume, reference, WHOLE_DISK, None),
        place=WHOLE_DISK,
        content=None,
        size_bytes=size_bytes,
    )


def _image(volume: OpenVolume, reference: str, place: str, pieces: Extents | None) -> str:
    directory = _ensure_private(volume)
    return f"{directory}/{volume.hooks.image_path(volume, reference, place, pieces)}"


def _described(
    snapshot: Snapshot,
    source: MountSource,
    within: Extents | None = None,
) -> MountSource:
    """Say what of the place is not held, and why (P9)."""
    size = snapshot.epoch.size_bytes
    area = whole(size) if within is None else within
    by_reason = left_out_by_reason(snapshot.record, area)
    note = ""
    if snapshot.epoch.is_suspect:
        note = f"{source.reference} is suspect: {snapshot.epoch.suspect_reason}"
    return replace(
        source,
        left_out_bytes=by_reason.total(),
        because=tuple(text for text, _ in by_reason.most_common(_REASONS_MAX)),
        lost_bytes=total_bytes(intersect(tuple(snapshot.epoch.lost), area)),
        note=note,
    )


def _chosen(facts: DiskFacts, wanted: str | None, reference: str) -> Place:
    """Return the one place that is meant; the error for several lists them."""
    if wanted is not None:
        return _named(facts, wanted, reference)
    places = [place for place in facts.places.places if _may_mount(place)]
    known = [place for place in places if place.is_filesystem]
    if len(known) == 1 or len(places) == 1:
        return (known or places)[0]
    if not places:
        raise NotFoundError(
            f"{reference} has no filesystem that can be mounted",
            hint="; ".join(facts.places.notes)
            or f"`stillblock attach {reference}` gives the disk as a device",
        )
    listed = ", ".join(
        f"{_option(place)} ({place.content or 'unknown'}, {format_size(place.size)})"
        for place in (known or places)[:_PLACES_MAX]
    )
    raise UsageError(
        f"{reference} has {len(known or places)} filesystems",
        hint=f"say which with --partition: {listed}",
    )


def _named(facts: DiskFacts, wanted: str, reference: str) -> Place:
    for place in facts.places.places:
        if wanted in {_option(place), place.name}:
            if not _may_mount(place):
                what = place.opaque_reason or f"it holds {place.content}"
                raise RefusedError(
                    f"{reference}: {place.name} cannot be mounted: {what}",
                    hint=f"`stillblock attach {reference}` gives it as a device",
                )
            return place
    try:
        named, _ = facts.filesystems_named(wanted)
    except RuleError as error:
        raise NotFoundError(f"{reference}: {error.message}", hint=error.hint) from error
    if len(named) == 1:
        return named[0]
    raise UsageError(
        f"{reference}: {len(named)} filesystems are called {wanted}",
        hint="say the partition's number: " + ", ".join(_option(place) for place in named),
    )


def _may_mount(place: Place) -> bool:
    """Whether the kernel may find a filesystem there: also one that we do not know."""
    return place.is_filesystem or (place.content is None and not place.opaque_reason)


def _option(place: Place) -> str:
    return place.name.partition(":")[2] or place.name


# Their end


def live_mounts(volume: OpenVolume) -> tuple[Found, ...]:
    """Return what is mounted of a volume; trees that only other mounts use are not counted."""
    known = records.read(volume.mounts_dir, volume=volume.name)
    found = leftovers.look(known, kernel.System()) if known else ()
    return tuple(one for one in found if not one.record.is_private and not one.is_gone)


def check_unmounted(volume: OpenVolume) -> None:
    """Raise `InUseError` while something of a volume is mounted."""
    found = live_mounts(volume)
    if found:
        listed = ", ".join(f"{one.record.reference} at {one.record.where}" for one in found)
        raise InUseError(
            f"{volume.name} is mounted: {listed}",
            hint="`stillblock unmount` each, or add --force: their users get errors then",
        )


def end_removed(folder: Path, name: str) -> None:
    """Make an end of what a server of a volume left, which is about to be removed.

    Nobody serves it. Raise `InUseError` while something of it is mounted.
    """
    if not any(folder.glob("*.json")):
        return
    with records.locked(folder):
        found = leftovers.look(records.read(folder, volume=name), kernel.System())
        there = [one for one in found if not one.record.is_private and not one.is_gone]
        if there:
            listed = ", ".join(f"{one.record.reference} at {one.record.where}" for one in there)
            raise InUseError(
                f"{name} is mounted: {listed}", hint="`stillblock unmount` or `detach` each first"
            )
        for one in leftovers.in_order(found):
            # Its clones go with it.
            leftovers.undo(one, folder, force=True, drop_clone=lambda _: None)


def clean(volume: OpenVolume, *, is_over: bool = False, timeout_s: float = 0) -> tuple[str, ...]:
    """Make an end of mounts of which something is gone, `is_over`: of all; return what was undone.

    What cannot be undone is an event, and is tried again. Raise `InUseError` if somebody makes or
    undoes a mount for longer than `timeout_s`.
    """
    folder = volume.mounts_dir
    if not any(folder.glob("*.json")):
        return ()
    undone = []
    with records.locked(folder, timeout_s=timeout_s):
        known = records.read(folder, volume=volume.name)
        for one in _to_end(volume, leftovers.look(known, kernel.System()), is_over=is_over):
            try:
                if one.record.is_private and _is_under_others(volume, is_over=is_over):
                    continue
                leftovers.undo(
                    one,
                    folder,
                    force=is_over or one.record.is_private,
                    drop_clone=lambda record: _drop_clone(volume, record, force=is_over),
                )
            except InUseError as error:
                # It is looked at every other second, and said once.
                if not one.record.is_held:
                    records.write(folder, replace(one.record, is_held=True))
                    volume.event("unmount_failed", where=one.record.where, error=str(error))
                continue
            except StillblockError as error:
                volume.event("unmount_failed", where=one.record.where, error=str(error))
                continue
            volume.event("unmounted", reference=one.record.reference, where=one.record.where)
            undone.append(f"{one.record.reference} at {one.record.where}")
    return tuple(undone)


def _to_end(volume: OpenVolume, found: Sequence[Found], *, is_over: bool) -> tuple[Found, ...]:
    trees = {
        one.record.directory
        for one in found
        if one.record.what is MountKind.IMAGES
        and one.mount is not None
        and volume.hooks.shows_images(volume, one.record.directory)
    }
    is_private_shown = str(volume.images_dir) in trees

    def is_live(one: Found) -> bool:
        if one.record.owner and not records.is_alive(one.record.owner):
            return False
        if one.record.what is MountKind.IMAGES:
            return one.record.directory in trees
        return one.is_whole and (is_private_shown or one.nbd is not None)

    live = [] if is_over else [one for one in found if is_live(one)]
    is_used = any(one.loop is not None for one in live)
    kept = [one for one in live if not one.record.is_private or is_used]
    return leftovers.in_order([one for one in found if one not in kept])


def _is_under_others(volume: OpenVolume, *, is_over: bool) -> bool:
    """Whether a loop device may be on the private tree that would not be known again without it.

    While its files are answered for, any keeps it; over, only one that is known by its path alone.
    """
    known = records.read(volume.mounts_dir, volume=volume.name)
    return any(
        one.doubt or (one.loop is not None and not (is_over and one.record.device_sequence))
        for one in leftovers.look(known, kernel.System())
    )


def _drop_clone(volume: OpenVolume, record: MountRecord, *, force: bool) -> None:
    snapshot = Reference.parse(record.reference).snapshot or ""
    try:
        delete_clone(volume, CloneChange(snapshot=snapshot, clone=record.clone, force=force))
    except NotFoundError:
        pass  # not made yet, or gone with its snapshot
