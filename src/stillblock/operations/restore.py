"""Restore in place: the disk reads as restored at once, and a safety snapshot can undo it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from stillblock import native, selection
from stillblock.errors import RestoreRunningError, RuleError
from stillblock.extents import clip, intersect, normalise, subtract, total_bytes, union
from stillblock.model import (
    PAUSE_LIMIT_MS_DEFAULT,
    Extents,
    LeftOut,
    RestoreProgress,
    RuleTerm,
    SnapshotPurpose,
    SnapshotRecord,
    format_size,
)
from stillblock.operations.disks import SnapshotDisk
from stillblock.operations.narrowing import wait_final
from stillblock.operations.receipts import versions, with_left_out
from stillblock.operations.records import encode_snapshot, new_id
from stillblock.operations.rules import EVERYTHING, expanded, explain_on, explain_terms
from stillblock.operations.volume import OpenVolume, Snapshot
from stillblock.selection.presets import PREFIX

if TYPE_CHECKING:
    from stillblock.operations.rules import Explanation
    from stillblock.selection import Disk

WAIT_MS_MAX: Final = 10_000
"""One request to wait lasts at most this long, so that a stop is not held up."""
_OUTSIDE: Final = "outside any partition"
_NOT_NARROWED: Final = "a restore begins at this instant, which must be undone whole"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreRequest:
    """A snapshot to put back, or the parts of it that terms name."""

    snapshot: str
    only: tuple[RuleTerm, ...] = ()
    pause_limit_ms: int = PAUSE_LIMIT_MS_DEFAULT


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePart:
    """What a restore writes in one partition, or outside of all."""

    label: str
    extents: Extents
    write_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePlan:
    """What a restore would write now; clients may change more until it runs."""

    volume: str
    snapshot: str
    extents: Extents
    write_bytes: int
    parts: tuple[RestorePart, ...]
    safety_name: str
    safety_bytes: int
    unselected_bytes: int
    """Bytes of the request that the snapshot does not hold: they stay as they are."""
    lost_bytes: int
    """Bytes that the snapshot lost: they stay as they are."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitRequest:
    """Wait until no restore runs, at most so long."""

    timeout_ms: int = WAIT_MS_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    snapshot: Snapshot
    request: Extents
    standing: Explanation
    """What the safety snapshot would keep if nothing were restored."""
    safety_selection: Extents
    plan: RestorePlan


def plan_restore(volume: OpenVolume, request: RestoreRequest) -> RestorePlan:
    """Return what a restore would write, by partition; change nothing."""
    return _prepare(volume, _of_final(volume, request)).plan


def start_restore(volume: OpenVolume, request: RestoreRequest) -> RestoreProgress:
    """Start a restore. When this returns the disk reads as restored; copying goes on behind it."""
    request = _of_final(volume, request)
    with volume.lock:
        if volume.engine.restore_status() is not None:
            raise RestoreRunningError(
                f"a restore runs on {volume.name} already",
                hint=f"`stillblock restore status {volume.name}` shows how far it is",
            )
        prepared = _prepare(volume, request)
        plan = prepared.plan
        explained = prepared.standing
        kept = prepared.safety_selection
        record = SnapshotRecord(
            name=plan.safety_name,
            id=new_id(),
            purpose=SnapshotPurpose.SAFETY,
            description=f"before restoring {volume.name}@{plan.snapshot}",
            rules=explained.rules,
            terms=explained.outcomes(),
            notes=explained.notes,
            failure="" if explained.is_final else _NOT_NARROWED,
            versions=versions(),
        )
        record = with_left_out(record, _without(explained.left_out, kept))
        status = volume.engine.restore(
            epoch=prepared.snapshot.epoch.epoch,
            request=prepared.request,
            safety_selection=kept,
            safety_low=intersect(explained.low, kept),
            meta=encode_snapshot(record),
            pause_limit_ms=request.pause_limit_ms,
        )
        # Once more, in the journal: it must not vanish if its header rots.
        volume.store_record(status.safety_epoch, record)
        volume.hooks.reconcile(volume)
    volume.event("restore_started", snapshot=plan.snapshot, write_bytes=status.total_bytes)
    return _progress(volume, status, is_running=True)


def restore_status(volume: OpenVolume) -> RestoreProgress:
    """Return how far a restore is."""
    status = volume.engine.restore_status()
    if status is None:
        return RestoreProgress(volume=volume.name, is_running=False)
    return _progress(volume, status, is_running=True)


def wait_restore(volume: OpenVolume, request: WaitRequest) -> RestoreProgress:
    """Wait until no restore runs or the time is over; return how far it is then."""
    volume.engine.restore_wait(timeout_ms=max(0, min(request.timeout_ms, WAIT_MS_MAX)))
    return restore_status(volume)


def _of_final(volume: OpenVolume, request: RestoreRequest) -> RestoreRequest:
    """Wait until the snapshot is final, and name it by its id: `latest` may mean another later."""
    found = wait_final(volume, volume.snapshot(request.snapshot))
    return replace(request, snapshot=found.record.id)


def _terms_of(request: RestoreRequest, presets: selection.Presets) -> tuple[RuleTerm, ...]:
    """Return what is to be restored, with presets replaced: they say themselves what they mean."""
    named = (
        replace(term, include=False) if term.text.strip().startswith(PREFIX) else term
        for term in request.only
    )
    return expanded(tuple(named), presets)


def _standing(volume: OpenVolume) -> Explanation:
    """Return what the standing rules come to now; everything where they mean nothing any more.

    The disk is often restored because it is damaged, and then it may have no partition that a rule
    could name. The snapshot that undoes the restore keeps it whole.
    """
    try:
        return explain_terms(volume, volume.settings().rules)
    except RuleError as error:
        note = f"all is kept, for the standing rules mean nothing on the disk as it is: {error}"
        whole = explain_terms(volume, EVERYTHING)
        return replace(whole, notes=(*whole.notes, note))


def _prepare(volume: OpenVolume, request: RestoreRequest) -> _Prepared:
    snapshot = volume.snapshot(request.snapshot)
    epoch = snapshot.epoch.epoch
    held = volume.engine.selection(epoch=epoch)
    view = volume.engine.view(epoch=epoch)
    try:
        disk = SnapshotDisk(view, volume.engine)
        asked = held
        if request.only:
            only = _terms_of(request, volume.presets)
            named = explain_on(
                disk,
                only,
                volume=volume.name,
                block_size=volume.engine.block_size,
            )
            if not named.is_final:
                # Before the frozen view is read a file term means all that it could mean.
                raise RuleError(
                    "a restore in place takes ranges, partitions, volumes and whole filesystems, "
                    f"not files: {', '.join(term.text for term in only)}",
                    hint="mount the snapshot's export read-only and copy the files from there",
                )
            asked = named.extents
        wanted = intersect(asked, held)
        extents = volume.engine.restore_plan(epoch=epoch, request=wanted)
        parts = _by_partition(disk, extents)
    finally:
        view.close()
    standing = _standing(volume)
    safety = union(standing.extents, clip(extents, start=0, end=volume.engine.size_bytes))
    lost_bytes = total_bytes(intersect(normalise(snapshot.epoch.lost), wanted))
    plan = RestorePlan(
        volume=volume.name,
        snapshot=snapshot.record.name,
        extents=extents,
        write_bytes=total_bytes(extents),
        parts=parts,
        safety_name=volume.free_name(prefix="before-restore-"),
        safety_bytes=total_bytes(safety),
        unselected_bytes=total_bytes(subtract(asked, held)),
        lost_bytes=lost_bytes,
        warnings=_warnings(snapshot, lost_bytes),
    )
    return _Prepared(
        snapshot=snapshot,
        request=wanted,
        standing=standing,
        safety_selection=safety,
        plan=plan,
    )


def _warnings(snapshot: Snapshot, lost_bytes: int) -> tuple[str, ...]:
    found: list[str] = []
    if lost_bytes:
        found.append(f"{format_size(lost_bytes)} were lost and stay as they are now")
    if snapshot.epoch.is_suspect:
        found.append(f"the snapshot is suspect: {snapshot.epoch.suspect_reason}")
    return tuple(found)


def _by_partition(disk: Disk, extents: Extents) -> tuple[RestorePart, ...]:
    """Divide extents by the partitions of the disk; one part if there is no table to go by."""
    try:
        table = selection.read_partitions(disk)
    except RuleError:
        table = None
    partitions = [] if table is None else [p for p in table.partitions if not p.is_container]
    parts: list[tuple[str, Extents]] = []
    rest = extents
    for partition in partitions:
        inside = intersect(extents, (partition.extent,))
        rest = subtract(rest, inside)
        parts.append((partition.label, inside))
    parts.append((_OUTSIDE if partitions else "whole disk", rest))
    return tuple(
        RestorePart(label=label, extents=found, write_bytes=total_bytes(found))
        for label, found in parts
        if found
    )


def _without(left_out: tuple[LeftOut, ...], kept: Extents) -> tuple[LeftOut, ...]:
    """Return what is left out once more is kept than the rules alone say."""
    return tuple(
        LeftOut(start=start, end=end, because=part.because)
        for part in left_out
        for start, end in subtract(((part.start, part.end),), kept)
    )


def _progress(
    volume: OpenVolume, status: native.RestoreStatus, *, is_running: bool
) -> RestoreProgress:
    names = {s.epoch.epoch: s.record.name for s in volume.snapshots()}
    return RestoreProgress(
        volume=volume.name,
        is_running=is_running,
        source=names.get(status.source_epoch),
        safety=names.get(status.safety_epoch),
        total_bytes=status.total_bytes,
        done_bytes=status.done_bytes,
    )
