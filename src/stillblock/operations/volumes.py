"""Volumes: add, list, remove, release, resize."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stillblock import native, selection
from stillblock.catalog import EntryState
from stillblock.errors import (
    CatalogError,
    NameTakenError,
    StillblockError,
    StoreDamagedError,
    StoreNotEmptyError,
    UsageError,
)
from stillblock.model import (
    BLOCK_SIZE_DEFAULT,
    BLOCK_SIZE_MAX,
    BLOCK_SIZE_MIN,
    OnFull,
    RuleTerm,
    VolumeConfig,
    VolumeEntry,
    VolumeListing,
    VolumeState,
    check_name,
    check_new_name,
)
from stillblock.mounting.records import LOCK_S
from stillblock.operations import mounts, origins
from stillblock.operations.clones import try_expire
from stillblock.operations.disks import open_raw
from stillblock.operations.narrowing import resume_narrowing
from stillblock.operations.records import encode_settings
from stillblock.operations.registry import (
    JOURNAL,
    delete_store,
    discard_skeleton,
    open_catalog,
    registering,
)
from stillblock.operations.rules import default_rules, expanded, explain_on
from stillblock.operations.undecided import check_nobody_asks
from stillblock.operations.usage import check_limit
from stillblock.operations.volume import EngineOptions, OpenVolume

if TYPE_CHECKING:
    from collections.abc import Callable

    from stillblock.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class AddRequest:
    """A volume to make of a raw file or block device."""

    name: str
    origin: Path
    store: Path | None = None
    """None: under the state directory."""
    block_size: int = BLOCK_SIZE_DEFAULT
    rules: tuple[RuleTerm, ...] = ()
    on_full: OnFull = OnFull.DEGRADE
    store_limit_bytes: int = 0
    """0: as much as its filesystem has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddPlan:
    """A volume that can be made, checked."""

    name: str
    origin: str
    store: str
    size_bytes: int
    block_size: int
    rules: tuple[RuleTerm, ...]
    selected_bytes: int
    """What a snapshot under the standing rules would select now, at most."""
    on_full: OnFull = OnFull.DEGRADE
    store_limit_bytes: int = 0
    default: tuple[RuleTerm, ...] = ()
    """What is left out while nobody gives rules; none where there is nothing to be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovePlan:
    """What removing a volume would delete; its origin stays as it is."""

    name: str
    origin: str
    store: str
    snapshots: tuple[str, ...]
    deletes_store: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """A volume that was stopped cleanly: its origin is a complete raw disk."""

    volume: str
    origin: str
    size_bytes: int
    recovered: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resized:
    """A volume that took over its origin's present length."""

    volume: str
    size_bytes: int
    size_bytes_before: int


def plan_add(config: Config, request: AddRequest, system: origins.System | None = None) -> AddPlan:
    """Check everything that could make the new volume harmful; change nothing."""
    system = system or origins.System()
    check_new_name(request.name, what="volume")
    _check_block_size(request.block_size)
    check_limit(request.store_limit_bytes)
    origin, store = (
        origins.absolute(request.origin),
        origins.absolute(request.store or config.default_store(request.name)),
    )
    size_bytes = origins.check_origin(origin)
    with open_catalog(config) as catalog:
        known = catalog.volumes()
    _check_name_new(request.name, known)
    origins.refuse_taken(origin, known, system)
    origins.refuse_on_volume(store, origin, system, what="store")
    origins.refuse_on_volume(config.state_dir, origin, system, what="state directory")
    origins.refuse_mounted(origin, system)
    origins.refuse_image(origin, system)
    origins.refuse_on_image(store, system, what="store")
    _check_store_new(store)
    rules = expanded(request.rules, selection.Presets(config.presets_dir))
    with open_raw(origin) as disk:
        explained = explain_on(disk, rules, volume=request.name, block_size=request.block_size)
        default = () if rules else default_rules(disk)
    return AddPlan(
        name=request.name,
        origin=str(origin),
        store=str(store),
        size_bytes=size_bytes,
        block_size=request.block_size,
        rules=rules,
        default=default,
        selected_bytes=explained.selected_bytes,
        on_full=request.on_full,
        store_limit_bytes=request.store_limit_bytes,
    )


def add_volume(config: Config, plan: AddPlan) -> VolumeEntry:
    """Make the store and put the volume on the list."""
    settings = VolumeConfig(name=plan.name, created_unix_ns=time.time_ns(), rules=plan.rules)
    store = Path(plan.store)
    entry = VolumeEntry(name=plan.name, uuid="", origin=plan.origin, store=plan.store)
    with registering(config), open_catalog(config) as catalog:
        catalog.add(entry, EntryState.ADDING)
        try:
            store.parent.mkdir(parents=True, exist_ok=True)
            uuid = native.create_volume(
                store=store,
                origin=Path(plan.origin),
                block_size=plan.block_size,
                meta=encode_settings(settings),
                on_full=plan.on_full.value,
                limit_bytes=plan.store_limit_bytes,
            )
        except BaseException:
            discard_skeleton(store)
            catalog.remove(plan.name)
            raise
        entry = replace(entry, uuid=uuid)
        catalog.update(entry)
        catalog.record(plan.name, "volume_added", origin=plan.origin, store=plan.store)
    return entry


def list_volumes(config: Config, is_served: Callable[[str], bool]) -> tuple[VolumeListing, ...]:
    """Return every known volume, without opening any."""
    with open_catalog(config) as catalog:
        known = catalog.volumes()
    return tuple(_listing(entry, is_served=is_served(entry.name)) for entry in known)


def plan_remove(config: Config, name: str, *, keep_store: bool = False) -> RemovePlan:
    """Return what removing would delete; raise `LockedError` while somebody serves the volume."""
    with open_catalog(config) as catalog:
        entry = catalog.volume(name)
    snapshots: tuple[str, ...] = ()
    if not keep_store and Path(entry.store).exists():
        check_nobody_asks(config, name)
        with OpenVolume.open(config, name) as volume:
            snapshots = tuple(s.record.name for s in volume.snapshots())
    return RemovePlan(
        name=name,
        origin=entry.origin,
        store=entry.store,
        snapshots=snapshots,
        deletes_store=not keep_store,
    )


def remove_volume(config: Config, plan: RemovePlan) -> RemovePlan:
    """Take the volume off the list and, as planned, delete its store. The origin is complete."""
    store = Path(plan.store)
    with registering(config), open_catalog(config) as catalog:
        if plan.deletes_store and store.exists():
            check_nobody_asks(config, plan.name)
            # Opening proves that nobody serves it; closing completes the origin.
            with OpenVolume.open(config, plan.name):
                mounts.end_removed(config.mounts_dir, plan.name)
            catalog.update(catalog.volume(plan.name), EntryState.REMOVING)
            delete_store(store)
        elif (store / JOURNAL).exists():
            _complete_origin(config, plan.name, store)
        else:
            mounts.end_removed(config.mounts_dir, plan.name)
        catalog.remove(plan.name)
        catalog.record(plan.name, "volume_removed", deleted_store=plan.deletes_store)
    return plan


def _complete_origin(config: Config, name: str, store: Path) -> None:
    """Close a volume that is only taken off the list; a store that is damaged may be let go of."""
    try:
        with OpenVolume.open(config, name):
            mounts.end_removed(config.mounts_dir, name)
    except (StoreDamagedError, CatalogError):
        native.check_unused(store)
        mounts.end_removed(config.mounts_dir, name)


def open_volume(config: Config, name: str, options: EngineOptions | None = None) -> OpenVolume:
    """Open a volume to work with it, and go on with what an earlier process left to narrow."""
    volume = OpenVolume.open(config, name, options)
    try:
        resume_narrowing(volume)
        try_expire(volume)
    except BaseException:
        volume.close()
        raise
    return volume


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRequest:
    """A clean stop."""

    force: bool = False
    """Also while something of the volume is mounted: it is unmounted first."""


def release_volume(volume: OpenVolume, request: ReleaseRequest) -> Released:
    """Stop cleanly: everything is on the origin when this returns.

    Raise `InUseError` while something of the volume is mounted, unless forced.
    """
    if not request.force:
        mounts.check_unmounted(volume)
    mounts.clean(volume, is_over=True, timeout_s=LOCK_S)
    # Its clients stay until then: a filesystem of theirs may be frozen for an instant.
    volume.instants.stop()
    with volume.lock:
        done = released(volume)
        volume.hooks.retire(volume)
    volume.close()
    volume.event("volume_released", origin=done.origin)
    volume.hooks.closed(volume)
    return done


def resize_volume(volume: OpenVolume) -> Resized:
    """Take over the origin's present length."""
    with volume.lock:
        before = volume.engine.size_bytes
        after = volume.engine.resize()
        volume.hooks.reconcile(volume)
    volume.event("volume_resized", size_bytes=after, size_bytes_before=before)
    return Resized(volume=volume.name, size_bytes=after, size_bytes_before=before)


def released(volume: OpenVolume, *, recovered: str = "") -> Released:
    """Return how a volume is left that is about to be closed."""
    return Released(
        volume=volume.name,
        origin=volume.engine.origin,
        size_bytes=volume.engine.size_bytes,
        recovered=recovered,
    )


def _listing(entry: VolumeEntry, *, is_served: bool) -> VolumeListing:
    state, size_bytes, note, origin = VolumeState.STOPPED, None, "", entry.origin
    try:
        uuid, origin, _, _ = native.peek(Path(entry.store))
        if uuid != entry.uuid:
            raise CatalogError(f"{entry.store} holds another volume, {uuid}")
        with open_raw(Path(origin)) as disk:
            size_bytes = disk.size
    except StillblockError as error:
        state, note = VolumeState.MISSING, str(error)
    return VolumeListing(
        name=entry.name,
        uuid=entry.uuid,
        origin=origin,
        store=entry.store,
        state=VolumeState.SERVED if is_served else state,
        size_bytes=size_bytes,
        note=note,
    )


def _check_block_size(block_size: int) -> None:
    is_power_of_two = block_size > 0 and block_size & (block_size - 1) == 0
    if not (is_power_of_two and BLOCK_SIZE_MIN <= block_size <= BLOCK_SIZE_MAX):
        raise UsageError(
            f"block size {block_size} is not a power of two from {BLOCK_SIZE_MIN} to "
            f"{BLOCK_SIZE_MAX}"
        )


def _check_name_new(name: str, known: tuple[VolumeEntry, ...]) -> None:
    check_name(name, what="volume")
    for entry in known:
        if entry.name == name:
            raise NameTakenError(f"there is a volume {name} already, of {entry.origin}")


def _check_store_new(store: Path) -> None:
    if not store.exists():
        return
    if not store.is_dir():
        raise StoreNotEmptyError(f"store {store} exists and is not a directory")
    count = sum(1 for _ in store.iterdir())
    if count:
        raise StoreNotEmptyError(
            f"store {store} is not empty ({count} entries)",
            hint=f"`stillblock volume import {store}` if it is a volume's store",
        )
