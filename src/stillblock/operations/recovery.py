"""What a killed server left, and an origin that others wrote to: see it, decide, go on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stillblock import native
from stillblock.extents import total_bytes
from stillblock.model import Extents, format_instant
from stillblock.operations.registry import open_catalog
from stillblock.operations.volume import EngineOptions, OpenVolume
from stillblock.operations.volumes import Released, released

if TYPE_CHECKING:
    from stillblock.config import Config

Decision = Literal["replay", "discard"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """What recovering would do about the writes that a killed server had acknowledged."""

    volume: str
    origin: str
    how: Decision | None
    """None: nobody decided yet."""
    left_as: str
    """`closed`: there is nothing to decide; `killed`; `interrupted`: as after a power cut."""
    left_in: str
    """`buffer`: its writes are there; `lost`: they are gone; `newer`: of a newer version."""
    slots: int
    extents: Extents
    """The blocks they were to."""
    write_bytes: int
    differing: Extents
    """Those of which the origin holds something else now: replaying changes them."""
    differing_bytes: int
    alive_unix_ns: int
    is_touched: bool
    """The origin was written by others since: snapshots will be suspect either way."""
    origin_failure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptRequest:
    """Why somebody takes the origin as it is; kept beside each snapshot."""

    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """Snapshots that are not in doubt any more."""

    volume: str
    snapshots: tuple[str, ...]
    note: str
    still_suspect: tuple[str, ...]
    """Those that need records which are gone from the log: no note brings them back."""


def plan_recover(config: Config, name: str, *, how: Decision | None) -> RecoveryPlan:
    """Look at what was left; change nothing. Raise `LockedError` if somebody has it open."""
    with open_catalog(config) as catalog:
        entry = catalog.volume(name)
    found = native.inspect(Path(entry.store))
    extents, differing = tuple(found.left_blocks), tuple(found.differing_blocks)
    return RecoveryPlan(
        volume=name,
        origin=found.origin,
        how=how,
        left_as=found.left_as,
        left_in=found.left_in,
        slots=found.left_slots,
        extents=extents,
        write_bytes=total_bytes(extents),
        differing=differing,
        differing_bytes=total_bytes(differing),
        alive_unix_ns=found.alive_unix_ns,
        is_touched=found.is_touched,
        origin_failure=found.origin_failure,
    )


def recover_volume(config: Config, plan: RecoveryPlan, *, how: Decision) -> Released:
    """Do what was decided about the writes that a killed server left, then stop cleanly."""
    with OpenVolume.open(config, plan.volume, EngineOptions(recover=how)) as volume:
        done = released(volume, recovered=how)
        volume.event("volume_recovered", how=how, slots=plan.slots, write_bytes=plan.write_bytes)
    return done


def accept_origin(volume: OpenVolume, request: AcceptRequest) -> Accepted:
    """Take the origin as it is: snapshots that were in doubt for its sake are not any more."""
    with volume.lock:
        before = {s.epoch.epoch: s.record.name for s in volume.snapshots() if s.epoch.is_suspect}
        note = f"accepted {format_instant(time.time_ns())}"
        note += f": {request.note}" if request.note else ""
        volume.engine.accept_origin(note)
        after = {s.epoch.epoch for s in volume.snapshots() if s.epoch.is_suspect}
        volume.hooks.reconcile(volume)
    accepted = tuple(name for epoch, name in before.items() if epoch not in after)
    if accepted:
        volume.event("origin_accepted", snapshots=len(accepted), note=request.note)
    return Accepted(
        volume=volume.name,
        snapshots=accepted,
        note=note,
        still_suspect=tuple(name for epoch, name in before.items() if epoch in after),
    )
