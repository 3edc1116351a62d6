"""Bringing in a store that is not on the list: moved here, or forgotten by a lost catalog."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stillblock import native
from stillblock.catalog import EntryState
from stillblock.errors import (
    NotFoundError,
    OriginChangedError,
    RecoveryNeededError,
    StillblockError,
    UsageError,
)
from stillblock.model import VolumeEntry, check_new_name, format_size
from stillblock.operations import origins
from stillblock.operations.records import snapshot_record
from stillblock.operations.registry import open_catalog, read_settings, registering
from stillblock.operations.volume import OpenVolume

if TYPE_CHECKING:
    from stillblock.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportRequest:
    """A store to put on the list."""

    store: Path
    name: str | None = None
    """None: as the store says."""
    origin: Path | None = None
    """None: where the store says it is."""
    accept_origin: bool = False
    """Also if it is not the disk that was closed and a restore is to go on on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSnapshot:
    """A snapshot that the store holds."""

    name: str
    epoch: int
    damage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportPlan:
    """What is in the store, and whether the origin fits it."""

    name: str
    uuid: str
    origin: str
    store: str
    size_bytes: int
    snapshots: tuple[FoundSnapshot, ...]
    bookmark_count: int
    left_as: str
    is_same_origin: bool
    """The very disk that the volume was closed with; else its snapshots will be suspect."""
    notes: tuple[str, ...]


def plan_import(
    config: Config, request: ImportRequest, system: origins.System | None = None
) -> ImportPlan:
    """Look at store and origin; change nothing. Raise what makes them no pair."""
    store = origins.absolute(request.store)
    given = None if request.origin is None else origins.absolute(request.origin)
    found = native.inspect(store, origin=given)
    settings = read_settings(found.meta, fallback_name=store.name)
    name = check_new_name(request.name or settings.name, what="volume")
    origin = Path(found.origin)
    _check_origin(store, origin, found, request)
    with open_catalog(config) as catalog:
        others = tuple(e for e in catalog.volumes() if e.uuid != found.uuid)
    origins.refuse_taken(origin, others, system or origins.System())
    origins.refuse_image(origin, system or origins.System())
    origins.refuse_on_image(store, system or origins.System(), what="store")
    return ImportPlan(
        name=name,
        uuid=found.uuid,
        origin=str(origin),
        store=str(store),
        size_bytes=found.size_bytes,
        snapshots=tuple(
            FoundSnapshot(name=snapshot_record(epoch, meta).name, epoch=epoch, damage=damage)
            for epoch, has_snapshot, _, meta, damage in found.epochs
            if has_snapshot
        ),
        bookmark_count=sum(has_bookmark for _, _, has_bookmark, _, _ in found.epochs),
        left_as=found.left_as,
        is_same_origin=_is_same(found),
        notes=tuple(_notes(found)),
    )


def import_volume(config: Config, plan: ImportPlan) -> VolumeEntry:
    """Put the store on the list, and let it know where its origin is now.

    A volume that was not closed is left as it is: the first opening recovers it, or asks.
    """
    entry = VolumeEntry(name=plan.name, uuid=plan.uuid, origin=plan.origin, store=plan.store)
    with registering(config), open_catalog(config) as catalog:
        catalog.add(entry, EntryState.IMPORTED)
        catalog.record(plan.name, "volume_imported", store=plan.store)
        try:
            with OpenVolume.open(config, plan.name):
                pass
        except RecoveryNeededError:
            return entry  # `volume recover` asks
        except StillblockError:
            # What cannot be opened is not brought in; the store stays what it was.
            catalog.remove(plan.name)
            raise
    return entry


def _check_origin(
    store: Path, origin: Path, found: native.Inspection, request: ImportRequest
) -> None:
    if found.found is None:
        raise NotFoundError(
            f"the origin of {store}, {origin}, does not exist or cannot be read",
            hint="say where it is now with --origin",
        )
    inode, size_bytes, _ = found.found
    if inode and not origin.is_file():
        raise UsageError(f"{origin} is neither a file nor a block device")
    if size_bytes < found.size_bytes or (request.origin and size_bytes > found.size_bytes):
        raise OriginChangedError(
            f"{origin} does not fit {store}: it has {size_bytes} bytes "
            f"({format_size(size_bytes)}), the volume has {found.size_bytes} "
            f"({format_size(found.size_bytes)})",
            hint="say which disk it is with --origin",
        )
    if found.is_restoring and not _is_same(found) and not request.accept_origin:
        raise OriginChangedError(
            f"{origin} is not the disk that was closed with {store}, and a restore is to go on: it "
            "would be written to",
            hint="bring the disk itself, or say --accept-origin if it is a faithful copy",
        )


def _is_same(found: native.Inspection) -> bool:
    return found.left_as == "closed" and (found.closed is None or found.closed == found.found)


def _notes(found: native.Inspection) -> list[str]:
    notes: list[str] = []
    if found.left_as == "closed" and not _is_same(found):
        notes.append(
            "the origin is another file than the one that was closed, or was written since: its "
            "snapshots are suspect; if it is a faithful copy, `volume recover --accept-origin`"
        )
    if found.left_as == "interrupted":
        notes.append("the volume was not closed: what was not flushed is gone, as by a power cut")
    if found.left_as == "killed":
        notes.append("its server was killed here; `volume recover` decides if an opening cannot")
    if found.is_restoring:
        notes.append("a restore goes on")
    if found.origin_failure:
        notes.append(f"its origin failed: {found.origin_failure}")
    return notes
