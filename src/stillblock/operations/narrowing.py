"""Narrowing: terms that need a filesystem are resolved on the frozen view, after the instant.

Until then a snapshot selects all that its rules could mean, its record says `is_final: false`, and
nobody reads it. The last step is one decision of the engine: selection, receipt and priorities
together. Whatever interrupts the work leaves the snapshot as it was after its instant, and the next
opening of the volume begins anew; resolving the same frozen view again gives the same.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from stillblock.errors import (
    ClosedError,
    NarrowingError,
    NotFoundError,
    StillblockError,
)
from stillblock.extents import intersect, subtract, total_bytes
from stillblock.model import LeftOut
from stillblock.operations.disks import FrozenDisk
from stillblock.operations.receipts import Instant, sealed, versions, with_left_out
from stillblock.operations.records import encode_snapshot
from stillblock.operations.rules import Explanation, explain_frozen

if TYPE_CHECKING:
    from stillblock.model import Extents, SnapshotRecord
    from stillblock.operations.volume import OpenVolume, Snapshot

_LOG: Final = logging.getLogger("stillblock.operations")
WAIT_MS_MAX: Final = 10_000
"""One request to wait lasts at most this long, so that a stop is not held up."""
LET_SETTLE_S: Final = 10.0
"""How long a verb that needs a final selection waits for it before it refuses."""
STOP_WAIT_S: Final = 5.0
"""How long a volume that closes waits for narrowings: they do no harm if they end later."""
NOT_SELECTED: Final = "not selected at the instant"


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitNarrowingRequest:
    """Wait until a snapshot is final, at most so long."""

    snapshot: str
    timeout_ms: int = WAIT_MS_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowingProgress:
    """How far the narrowing of a snapshot is."""

    volume: str
    snapshot: str
    is_final: bool
    is_running: bool
    reading: str = ""
    """What of the disk is being read."""
    done: int = 0
    """Filesystems, or bytes where zeros are looked for."""
    total: int = 0
    failure: str = ""
    """Why it stopped before the end; the next opening of the volume tries again."""


class Narrowing:
    """One narrowing under way, in a thread of its own."""

    def __init__(self, volume: OpenVolume, snapshot: Snapshot) -> None:
        self.epoch = snapshot.epoch.epoch
        self.failure = ""
        self.at: tuple[str, int, int] = ("", 0, 0)
        """What is being read, and how much of how much is done."""
        self._volume = volume
        self._name = snapshot.record.name
        self._rules, self._pending = snapshot.record.rules, snapshot.record.pending
        self._cancelled = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="narrowing", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def cancel(self) -> None:
        """Stop soon: the snapshot stays as it is."""
        self._cancelled.set()

    def wait(self, timeout_s: float | None) -> bool:
        """Return whether it ended within the time."""
        return self._ended.wait(timeout_s)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return not self._ended.is_set()

    def _run(self) -> None:
        try:
            found, failure = self._resolve()
            if not self._cancelled.is_set():
                self._settle(found, failure)
        except (ClosedError, NotFoundError):
            self._cancelled.set()  # the volume was closed, or the snapshot deleted
        except StillblockError as error:
            self.failure = str(error)
            _LOG.warning("not narrowed: %s@%s: %s", self._volume.name, self._name, error)
            self._volume.event("narrowing_failed", snapshot=self._name, error=self.failure)
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"  # our fault; whoever waits is told
            raise
        finally:
            self._ended.set()

    def _note(self, reading: str, done: int, total: int) -> None:
        if self._cancelled.is_set():
            raise ClosedError("nobody waits for the rules to be resolved any more")
        self.at = (reading, done, total)

    def _resolve(self) -> tuple[Explanation | None, str]:
        """Return what the rules mean on the frozen view, or nothing and why that is not known."""
        view = self._volume.engine.view(epoch=self.epoch, excluded_reads="error")
        try:
            disk = FrozenDisk(view, is_cancelled=self._cancelled.is_set)
            found = explain_frozen(
                disk,
                self._rules,
                self._pending,
                volume=self._volume.name,
                progress=self._note,
            )
        except (ClosedError, NotFoundError):
            raise
        except StillblockError as error:
            # Fail closed: what could not be resolved stays included, and the receipt says so.
            return None, str(error)
        finally:
            view.close()
        return found, ""

    def _settle(self, found: Explanation | None, failure: str) -> None:
        """Make it final, in one decision."""
        volume, engine = self._volume, self._volume.engine
        with volume.lock:
            snapshot = _of_epoch(volume, self.epoch)
            if snapshot.record.is_final:
                return
            record, extents = _settled(volume, snapshot, found, failure)
            try:
                freed_bytes = engine.narrow(
                    epoch=self.epoch,
                    selection=extents,
                    low=engine.low(epoch=self.epoch) if found is None else found.low,
                    meta=encode_snapshot(record),
                )
            except ClosedError:
                raise
            except StillblockError as error:
                if not _of_epoch(volume, self.epoch).record.is_final:
                    raise
                # It is decided; the space is owed, and the engine's upkeep goes on with it.
                freed_bytes = 0
                volume.event("space_not_freed", snapshot=record.name, error=str(error))
            volume.hooks.reconcile(volume)
        volume.event(
            "snapshot_narrowed",
            snapshot=record.name,
            selected_bytes=total_bytes(extents),
            freed_bytes=freed_bytes,
        )


class Narrowings:
    """The narrowings of one volume that is open here. Thread-safe."""

    def __init__(self) -> None:
        self._jobs: dict[int, Narrowing] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def start(self, volume: OpenVolume, snapshot: Snapshot) -> Narrowing | None:
        """Begin to narrow a snapshot, unless that is under way; None once the volume closes."""
        with self._lock:
            if self._is_closed:
                return None
            job = self._jobs.get(snapshot.epoch.epoch)
            if job is None or not job.is_running:
                job = self._jobs[snapshot.epoch.epoch] = Narrowing(volume, snapshot)
                job.start()
            return job

    def restart(self, volume: OpenVolume, snapshot: Snapshot) -> None:
        """Begin anew what was cancelled for the sake of a deletion that failed."""
        job = self.of(snapshot.epoch.epoch)
        if job is not None:
            job.wait(STOP_WAIT_S)
        self.start(volume, snapshot)

    def of(self, epoch: int) -> Narrowing | None:
        """Return the latest narrowing of a snapshot."""
        with self._lock:
            return self._jobs.get(epoch)

    def cancel(self, epoch: int) -> None:
        """Stop that of a snapshot which is about to go."""
        if (job := self.of(epoch)) is not None:
            job.cancel()

    def finish(self) -> None:
        """Wait until none is under way."""
        for job in tuple(self._jobs.values()):
            job.wait(None)

    def stop(self) -> None:
        """Stop all, and wait a little until they did; none begins any more.

        One whose reader computes notices at its next read of the disk, which is closed by then.
        """
        with self._lock:
            self._is_closed = True
            jobs = tuple(self._jobs.values())
        for job in jobs:
            job.cancel()
        deadline = time.monotonic() + STOP_WAIT_S
        for job in jobs:
            job.wait(max(0.0, deadline - time.monotonic()))


def resume_narrowing(volume: OpenVolume) -> None:
    """Go on with what an earlier process left: narrow what is not final, drop what was a probe."""
    for epoch in volume.probes():
        volume.engine.delete_snapshot(epoch=epoch, force=True)
    for snapshot in volume.snapshots():
        # One that may not exist is left alone: nothing of it can be read.
        if not snapshot.record.is_final and not snapshot.epoch.undecided:
            volume.narrowings.start(volume, snapshot)


def wait_narrowing(volume: OpenVolume, request: WaitNarrowingRequest) -> NarrowingProgress:
    """Wait until a snapshot is final or the time is over; return how far it is then."""
    snapshot = volume.snapshot(request.snapshot)
    job = volume.narrowings.of(snapshot.epoch.epoch)
    if job is not None:
        job.wait(max(0, min(request.timeout_ms, WAIT_MS_MAX)) / 1000)
        snapshot = volume.snapshot(snapshot.record.id)
    reading, done, total = ("", 0, 0) if job is None else job.at
    return NarrowingProgress(
        reading=reading,
        done=done,
        total=total,
        volume=volume.name,
        snapshot=snapshot.record.name,
        is_final=snapshot.record.is_final,
        is_running=job is not None and job.is_running,
        failure="" if job is None else job.failure,
    )


def wait_final(
    volume: OpenVolume, snapshot: Snapshot, *, timeout_s: float | None = LET_SETTLE_S
) -> Snapshot:
    """Return the snapshot once its selection is final; raise `NarrowingError` if that takes long.

    Not under the volume's lock: the narrowing needs it for its last step.
    """
    if snapshot.record.is_final:
        return snapshot
    job = volume.narrowings.of(snapshot.epoch.epoch)
    if job is not None:
        job.wait(timeout_s)
        snapshot = volume.snapshot(snapshot.record.id)
    if snapshot.record.is_final:
        return snapshot
    name = f"{volume.name}@{snapshot.record.name}"
    why = f": {job.failure}" if job is not None and job.failure else ""
    raise NarrowingError(
        f"{name} is still being narrowed to what its rules mean{why}",
        hint=f"`stillblock snapshot show {name}` tells when it is final; try again then",
    )


def _of_epoch(volume: OpenVolume, epoch: int) -> Snapshot:
    for snapshot in volume.snapshots():
        if snapshot.epoch.epoch == epoch:
            return snapshot
    raise NotFoundError(f"{volume.name}: the snapshot was deleted while it was narrowed")


def _settled(
    volume: OpenVolume, snapshot: Snapshot, found: Explanation | None, failure: str
) -> tuple[SnapshotRecord, Extents]:
    """Return the final record and selection."""
    epoch = snapshot.epoch
    held = volume.engine.selection(epoch=epoch.epoch)
    record = replace(
        snapshot.record,
        pending="",
        failure=failure,
        narrowed_unix_ns=time.time_ns(),
        versions=versions(),
    )
    extents = held
    if found is not None:
        extents = intersect(found.extents, held)
        # What was not held from the first write on may have changed: it cannot come back.
        missing = subtract(found.extents, held)
        left_out = [*found.left_out]
        left_out += (LeftOut(start=s, end=e, because=NOT_SELECTED) for s, e in missing)
        left_out.sort(key=lambda part: part.start)
        record = replace(record, terms=found.outcomes(), notes=found.notes)
        record = with_left_out(record, left_out)
    return sealed(record, Instant.of(epoch), extents), extents
