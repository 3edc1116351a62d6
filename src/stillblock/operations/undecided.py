"""Snapshots of groups whose end is not known here: ask again, keep them on somebody's word, and do
not throw away the store that others still have to ask.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stillblock import native
from stillblock.errors import InUseError, StillblockError, StoreFullError, StoreIOError
from stillblock.model import format_instant
from stillblock.operations.narrowing import resume_narrowing
from stillblock.operations.receipts import Instant, sealed
from stillblock.operations.records import encode_snapshot
from stillblock.operations.registry import open_catalog

if TYPE_CHECKING:
    from stillblock.config import Config
    from stillblock.operations.volume import OpenVolume, Snapshot

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepRequest:
    """Why somebody keeps snapshots of which nobody can tell whether their groups exist."""

    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Snapshots that are there from now on, whatever became of the others of their groups."""

    volume: str
    snapshots: tuple[str, ...]
    note: str


def ask_again(volume: OpenVolume) -> None:
    """Ask other stores about what is undecided; nothing where nothing is. For those who look.

    What cannot be written down now stays undecided, and is asked for again.
    """
    if not _undecided(volume):
        return
    with volume.lock:
        try:
            volume.engine.settle_groups(volume.other_stores())
        except (StoreIOError, StoreFullError) as error:
            _LOG.warning("groups not settled: volume=%s: %s", volume.name, error)
        volume.hooks.reconcile(volume)
    resume_narrowing(volume)


def keep_undecided(volume: OpenVolume, request: KeepRequest) -> Kept:
    """Keep all that is undecided, on somebody's word, once others were asked once more.

    Raise `UndecidedError` for one whose group is known to have failed.
    """
    ask_again(volume)
    note = f"kept {format_instant(time.time_ns())}"
    note += f": {request.note}" if request.note else ""
    kept = []
    with volume.lock:
        for snapshot in _undecided(volume):
            record = snapshot.record
            if record.group is not None:
                record = replace(record, group=replace(record.group, kept=note))
            if record.digest:
                extents = volume.engine.selection(epoch=snapshot.epoch.epoch)
                record = sealed(record, Instant.of(snapshot.epoch), extents)
            meta = encode_snapshot(record)
            volume.engine.keep_undecided(epoch=snapshot.epoch.epoch, meta=meta)
            kept.append(record.name)
        volume.hooks.reconcile(volume)
    resume_narrowing(volume)
    if kept:
        volume.event("undecided_kept", snapshots=len(kept), note=request.note)
    return Kept(volume=volume.name, snapshots=tuple(kept), note=note)


def _undecided(volume: OpenVolume) -> tuple[Snapshot, ...]:
    return tuple(s for s in volume.snapshots() if s.epoch.undecided)


def check_nobody_asks(config: Config, name: str) -> None:
    """Raise `InUseError` if another volume on the list has to ask this one's store.

    A store that cannot be read now may have to as well: nobody can tell, and it is logged.
    """
    with open_catalog(config) as catalog:
        entry = catalog.volume(name)
        others = [other for other in catalog.volumes() if other.name != name]
    uuid = native.peek(Path(entry.store))[0]
    waiting = []
    for other in others:
        try:
            is_waiting = uuid in native.waits_for(Path(other.store))
        except StillblockError as error:
            _LOG.warning("not asked before a store is removed: volume=%s: %s", other.name, error)
            continue
        if is_waiting:
            waiting.append(other.name)
    if waiting:
        raise InUseError(
            f"only the store of {name} knows whether snapshots of {', '.join(waiting)} exist: they "
            "are of one group, which was interrupted",
            hint="; ".join(f"`stillblock snapshot list {other}` asks it" for other in waiting)
            + "; then remove it, or --keep-store",
        )
