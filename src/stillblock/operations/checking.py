"""What `snapshot verify` asks of the server: which filesystems a snapshot has, and a word kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stillblock.model import CheckOutcome, SnapshotInfo, SnapshotVerification
from stillblock.operations.disks import SnapshotDisk
from stillblock.operations.narrowing import wait_final
from stillblock.operations.receipts import left_out_by_reason
from stillblock.operations.snapshots import SnapshotTarget, show_snapshot
from stillblock.selection.facts import DiskFacts

if TYPE_CHECKING:
    from stillblock.operations.volume import OpenVolume


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesystemPlace:
    """A filesystem of a snapshot, and how much of it the snapshot holds."""

    place: str
    """`disk`, `part:2` or `lv:vg/root`."""
    content: str
    size_bytes: int
    left_out_bytes: int

    @property
    def partition(self) -> str | None:
        """What `--partition` calls it; None: it is the whole disk."""
        return self.place.partition(":")[2] or None


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesystemList:
    """Every filesystem of a snapshot, in the order of the disk."""

    snapshot: str
    places: tuple[FilesystemPlace, ...]
    notes: tuple[str, ...] = ()
    """What to know of its tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationRequest:
    """What a snapshot's filesystems came to."""

    snapshot: str
    """Its id: it may have another name by now."""
    verification: SnapshotVerification


def list_filesystems(volume: OpenVolume, target: SnapshotTarget) -> FilesystemList:
    """Return the filesystems of a snapshot; waits until its selection is final."""
    snapshot = wait_final(volume, volume.snapshot(target.snapshot))
    view = volume.engine.view(epoch=snapshot.epoch.epoch, excluded_reads="zeros")
    try:
        facts = DiskFacts(SnapshotDisk(view, volume.engine))
        places = tuple(
            FilesystemPlace(
                place=place.name,
                content=str(place.content),
                size_bytes=place.size,
                left_out_bytes=left_out_by_reason(snapshot.record, place.extents).total(),
            )
            for place in facts.places.places
            if place.is_filesystem
        )
        notes = facts.notes
    finally:
        view.close()
    return FilesystemList(snapshot=snapshot.record.name, places=places, notes=notes)


def keep_verification(volume: OpenVolume, request: VerificationRequest) -> SnapshotInfo:
    """Keep in a snapshot's receipt what its filesystems came to."""
    with volume.lock:
        snapshot = volume.snapshot(request.snapshot)
        record = replace(snapshot.record, verification=request.verification)
        volume.store_record(snapshot.epoch.epoch, record)
    volume.event(
        "snapshot_verified", snapshot=record.name, outcome=str(request.verification.outcome)
    )
    return show_snapshot(volume, SnapshotTarget(snapshot=record.id))


def worst(outcomes: tuple[CheckOutcome, ...]) -> CheckOutcome:
    """Return what several outcomes come to together; nothing that was looked at is unchecked."""
    order = tuple(CheckOutcome)
    found = max(outcomes, key=order.index, default=CheckOutcome.UNCHECKED)
    return CheckOutcome.UNCHECKED if found is CheckOutcome.LEFT_OUT else found
