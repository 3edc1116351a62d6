"""Clones: writable views on snapshots. Make, list, show, reset, delete, let expire."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from stillblock.errors import (
    InUseError,
    NameTakenError,
    NotFoundError,
    StillblockError,
    StoreDamagedError,
    UsageError,
)
from stillblock.model import (
    CloneInfo,
    CloneRecord,
    CloneState,
    check_new_name,
    free_name,
    is_id_prefix,
    name_for_instant,
)
from stillblock.operations.narrowing import wait_final
from stillblock.operations.records import clone_record, encode_clone, new_id

if TYPE_CHECKING:
    from stillblock import native
    from stillblock.operations.volume import OpenVolume, Snapshot

_NS: Final = 1_000_000_000
LIFETIME_S_MAX: Final = 100 * 366 * 86_400
"""A clone that is to live longer needs no expiry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloneRequest:
    """A clone to make of a snapshot."""

    snapshot: str
    name: str | None = None
    """None: named by the UTC time."""
    lifetime_s: int | None = None
    """It goes by itself after so many seconds, once nobody uses it; None: never."""
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloneTarget:
    """One clone of a snapshot, by names or id prefixes."""

    snapshot: str
    clone: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CloneChange:
    """A clone to reset or delete, also while clients use it if forced."""

    snapshot: str
    clone: str
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CloneList:
    """The clones of a volume, oldest first, and what they take."""

    volume: str
    clones: tuple[CloneInfo, ...]
    stored_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CloneChanged:
    """A clone that was reset or deleted."""

    clone: CloneInfo
    freed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Clone:
    """A clone: what the engine knows and what we wrote beside it."""

    entry: native.CloneEntry
    record: CloneRecord

    def is_expired(self, now_ns: int) -> bool:
        """Whether its time is over."""
        expires = self.record.expires_unix_ns
        return expires is not None and expires <= now_ns


def clones_of(volume: OpenVolume, *, epoch: int | None = None) -> tuple[Clone, ...]:
    """Return every clone of a volume, or of one snapshot, oldest first."""
    found = (Clone(entry=e, record=clone_record(e.number, e.meta)) for e in volume.engine.clones())
    mine = (clone for clone in found if epoch is None or clone.entry.epoch == epoch)
    return tuple(sorted(mine, key=lambda clone: (clone.entry.created_unix_ns, clone.entry.number)))


def find_clone(volume: OpenVolume, target: CloneTarget) -> Clone:
    """Find a clone by name or unique id prefix; `?` is the snapshot of one that has none."""
    if target.snapshot == "?":
        there = {s.epoch.epoch for s in volume.snapshots()}
        found = [c for c in clones_of(volume) if c.entry.epoch not in there]
        shown = f"{volume.name}@?"
    else:
        snapshot = volume.snapshot(target.snapshot)
        found = list(clones_of(volume, epoch=snapshot.epoch.epoch))
        shown = f"{volume.name}@{snapshot.record.name}"
    named = [c for c in found if c.record.name == target.clone]
    matches = named or [c for c in found if is_id_prefix(target.clone, c.record.id)]
    if len(matches) == 1:
        return matches[0]
    raise NotFoundError(
        f"{shown} has no clone {target.clone}",
        hint=f"`stillblock clone list {volume.name}` shows its {len(found)}",
    )


def create_clone(volume: OpenVolume, request: CloneRequest) -> CloneInfo:
    """Make a clone; it is durable, and offered to clients, when this returns.

    Costs some kilobytes until it is written. Raise `NarrowingError` while the snapshot selects
    more than it will: what it lets go of later would change under the clone.
    """
    lifetime = request.lifetime_s
    if lifetime is not None and not 0 < lifetime <= LIFETIME_S_MAX:
        raise UsageError(f"a clone lives from 1 to {LIFETIME_S_MAX} seconds, or without a limit")
    final_id = wait_final(volume, volume.snapshot(request.snapshot)).record.id
    with volume.lock:
        snapshot = volume.snapshot(final_id)
        epoch = snapshot.epoch.epoch
        shown = f"{volume.name}@{snapshot.record.name}"
        if snapshot.epoch.damage:
            raise StoreDamagedError(f"{shown} cannot be cloned: {snapshot.epoch.damage}")
        taken = {clone.record.name for clone in clones_of(volume, epoch=epoch)}
        name = request.name
        if name is None:
            name = free_name(name_for_instant(time.time_ns()), taken)
        check_new_name(name, what="clone")
        if name in taken:
            raise NameTakenError(f"{shown} has a clone {name} already")
        expires = None if lifetime is None else time.time_ns() + lifetime * _NS
        record = CloneRecord(
            name=name, id=new_id(), expires_unix_ns=expires, description=request.description
        )
        number = volume.engine.create_clone(epoch=epoch, meta=encode_clone(record))
        volume.hooks.reconcile(volume)
        made = _numbered(volume, number)
    volume.event("clone_created", snapshot=snapshot.record.name, clone=name)
    return made


def list_clones(volume: OpenVolume) -> CloneList:
    """Return every clone of a volume."""
    found = _infos(volume, clones_of(volume))
    return CloneList(
        volume=volume.name, clones=found, stored_bytes=sum(info.stored_bytes for info in found)
    )


def show_clone(volume: OpenVolume, target: CloneTarget) -> CloneInfo:
    """Return one clone."""
    return clone_info(volume, find_clone(volume, target))


def reset_clone(volume: OpenVolume, request: CloneChange) -> CloneChanged:
    """Let a clone be its snapshot again; raise `InUseError` if clients use it, unless forced."""
    with volume.lock:
        clone = find_clone(volume, CloneTarget(snapshot=request.snapshot, clone=request.clone))
        check_not_promoted(volume, clone)
        try:
            volume.hooks.withdraw_clone(volume, clone.entry.number, force=request.force)
            freed_bytes = volume.engine.reset_clone(number=clone.entry.number)
        finally:
            volume.hooks.reconcile(volume)
        info = _numbered(volume, clone.entry.number)
    volume.event("clone_reset", snapshot=info.snapshot, clone=info.name, freed_bytes=freed_bytes)
    return CloneChanged(clone=info, freed_bytes=freed_bytes)


def delete_clone(volume: OpenVolume, request: CloneChange) -> CloneChanged:
    """Remove a clone and what was written to it; raise `InUseError` as `reset_clone` does."""
    with volume.lock:
        clone = find_clone(volume, CloneTarget(snapshot=request.snapshot, clone=request.clone))
        info = clone_info(volume, clone)
        freed_bytes = drop(volume, clone, force=request.force)
    volume.event("clone_deleted", snapshot=info.snapshot, clone=info.name, freed_bytes=freed_bytes)
    return CloneChanged(clone=info, freed_bytes=freed_bytes)


def drop(volume: OpenVolume, clone: Clone, *, force: bool) -> int:
    """Remove a clone; return the bytes freed. Under the volume's lock."""
    check_not_promoted(volume, clone)
    try:
        volume.hooks.withdraw_clone(volume, clone.entry.number, force=force)
        return volume.engine.delete_clone(number=clone.entry.number)
    finally:
        volume.hooks.reconcile(volume)


def drop_clones_of(volume: OpenVolume, snapshot: Snapshot, *, force: bool) -> int:
    """Remove the clones of a snapshot that is to go; return the bytes freed.

    Raise `InUseError`, with nothing removed, if there are any and it is not forced.
    """
    found = clones_of(volume, epoch=snapshot.epoch.epoch)
    if found and not force:
        names = ", ".join(clone.record.name for clone in found)
        raise InUseError(
            f"{volume.name}@{snapshot.record.name} has {len(found)} clones: {names}",
            hint="delete them first, or add --force to delete them with it",
        )
    freed_bytes = 0
    for clone in found:
        freed_bytes += drop(volume, clone, force=True)
        volume.event("clone_deleted", snapshot=snapshot.record.name, clone=clone.record.name)
    return freed_bytes


def expire(volume: OpenVolume, *, now_ns: int | None = None) -> tuple[str, ...]:
    """Remove the clones whose time is over and which nobody uses; return their names."""
    now = time.time_ns() if now_ns is None else now_ns
    gone = []
    with volume.lock:
        clients = volume.hooks.clone_clients(volume)
        for clone in clones_of(volume):
            number = clone.entry.number
            if not clone.is_expired(now) or clients.get(number) or is_promoted(volume, clone):
                continue
            info = clone_info(volume, clone)
            try:
                freed_bytes = drop(volume, clone, force=False)
            except InUseError:
                continue  # somebody came just now
            volume.event(
                "clone_expired", snapshot=info.snapshot, clone=info.name, freed_bytes=freed_bytes
            )
            gone.append(info.reference)
    return tuple(gone)


def try_expire(volume: OpenVolume) -> None:
    """As `expire`; what fails is written down, and tried again the next time."""
    try:
        expire(volume)
    except StillblockError as error:
        volume.event("clone_expiry_failed", error=str(error))


def is_promoted(volume: OpenVolume, clone: Clone) -> bool:
    """Whether it is being copied to an image now."""
    running = volume.promotion
    return (
        running is not None
        and running.number == clone.entry.number
        and running.progress().is_running
    )


def check_not_promoted(volume: OpenVolume, clone: Clone) -> None:
    """Raise `InUseError` while it is being copied to an image."""
    if is_promoted(volume, clone):
        raise InUseError(
            f"clone {clone.record.name} of {volume.name} is being copied to an image",
            hint="wait until that has ended",
        )


def clone_counts(volume: OpenVolume) -> dict[int, int]:
    """Return how many clones each snapshot has, by its epoch."""
    counts: dict[int, int] = {}
    for entry in volume.engine.clones():
        if entry.epoch is not None:
            counts[entry.epoch] = counts.get(entry.epoch, 0) + 1
    return counts


def clone_info(volume: OpenVolume, clone: Clone) -> CloneInfo:
    """Return a clone as lists show it."""
    return _infos(volume, (clone,))[0]


def _numbered(volume: OpenVolume, number: int) -> CloneInfo:
    return _infos(volume, tuple(c for c in clones_of(volume) if c.entry.number == number))[0]


def _infos(volume: OpenVolume, clones: tuple[Clone, ...]) -> tuple[CloneInfo, ...]:
    names = {s.epoch.epoch: s.record.name for s in volume.snapshots()}
    clients = volume.hooks.clone_clients(volume)
    return tuple(
        CloneInfo(
            volume=volume.name,
            snapshot="" if c.entry.epoch is None else names.get(c.entry.epoch, ""),
            name=c.record.name,
            id=c.record.id,
            number=c.entry.number,
            epoch=c.entry.epoch,
            created_unix_ns=c.entry.created_unix_ns,
            expires_unix_ns=c.record.expires_unix_ns,
            size_bytes=c.entry.size_bytes,
            own_bytes=c.entry.own_bytes,
            stored_bytes=c.entry.allocated_bytes,
            connections=clients.get(c.entry.number, 0),
            state=_state(c.entry),
            reason=c.entry.damage or c.entry.failure,
            description=c.record.description,
        )
        for c in clones
    )


def _state(entry: native.CloneEntry) -> CloneState:
    if entry.damage:
        return CloneState.DAMAGED
    return CloneState.FAILED if entry.failure else CloneState.OK
