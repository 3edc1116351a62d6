"""Verifying what a store keeps: structure at once, content in the background at a chosen pace."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from stillblock.errors import ClosedError, InUseError, NotFoundError, StillblockError, UsageError
from stillblock.extents import total_bytes
from stillblock.model import (
    CloneInfo,
    CloneState,
    DamagedCopy,
    Extents,
    SnapshotState,
    StoreUsage,
    UsageLevel,
)
from stillblock.operations import clones, usage

if TYPE_CHECKING:
    from stillblock import native
    from stillblock.operations.volume import OpenVolume

SHARE_ALL: Final = 10_000
"""A share of the content is counted in parts of this many."""
STEP_BYTES_MAX: Final = 8 << 20
"""Between two steps a verification can be cancelled, and its progress is seen."""
STEPS_A_SECOND: Final = 10
"""With a rate: short steps, so that a client's read waits for a little one only."""
WAIT_MS_MAX: Final = 5_000
"""A wait is one request of the control API; longer ones are repeated."""


class VerifyKind(StrEnum):
    """Who asked for a verification."""

    NONE = "none"
    """There was none since the volume was opened."""
    CHECK = "check"
    SCRUB = "scrub"


class Verdict(StrEnum):
    """What a check comes to."""

    OK = "ok"
    WARNING = "warning"
    """Nothing is gone, or what is gone was told when it went; somebody should look."""
    DAMAGE = "damage"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something in the store that is not as it was written."""

    is_lost: bool
    """False: the other of two copies serves."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFinding:
    """A snapshot that is not whole."""

    snapshot: str
    state: SnapshotState
    reason: str
    damaged: Extents
    lost: Extents


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What is wrong with a volume's store, as far as is known."""

    volume: str
    verdict: Verdict
    findings: tuple[Finding, ...]
    snapshots: tuple[SnapshotFinding, ...]
    advice: tuple[str, ...]
    clones: tuple[CloneInfo, ...] = ()
    """Those that cannot be used as they should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """Content to verify."""

    share: int = SHARE_ALL
    """How much of it, in parts of 10000; which part differs from time to time."""
    bytes_per_s: int | None = None
    """None: as fast as it goes."""
    purpose: VerifyKind = VerifyKind.SCRUB


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitVerifyRequest:
    """How long to wait for a verification to end."""

    timeout_ms: int = WAIT_MS_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyProgress:
    """How far the latest verification is."""

    volume: str
    purpose: VerifyKind = VerifyKind.NONE
    is_running: bool = False
    is_cancelled: bool = False
    done_bytes: int = 0
    total_bytes: int = 0
    damaged_blocks: int = 0
    failure: str = ""
    """Why it stopped before its end; empty if it did not."""


class Verification:
    """One verification, in a thread of its own."""

    def __init__(self, volume: OpenVolume, request: VerifyRequest) -> None:
        self._volume = volume
        self._request = request
        seed = random.SystemRandom().getrandbits(32)
        self._check = volume.engine.check_content(share=request.share, seed=seed)
        self._cancelled = threading.Event()
        self._ended = threading.Event()
        self._failure = ""
        self._thread = threading.Thread(target=self._run, name="verification", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def cancel(self) -> None:
        """Stop soon, and wait until it did."""
        self._cancelled.set()
        self._thread.join()

    def wait(self, timeout_s: float) -> bool:
        """Return whether it ended within the time."""
        return self._ended.wait(timeout_s)

    def progress(self) -> VerifyProgress:
        """Return how far it is."""
        is_running = not self._ended.is_set()
        return VerifyProgress(
            volume=self._volume.name,
            purpose=self._request.purpose,
            is_running=is_running,
            is_cancelled=self._cancelled.is_set() and not self._is_done(),
            done_bytes=self._check.done_bytes,
            total_bytes=self._check.total_bytes,
            damaged_blocks=self._check.damaged_blocks(),
            failure=self._failure,
        )

    def _is_done(self) -> bool:
        return self._check.done_bytes == self._check.total_bytes

    def _run(self) -> None:
        try:
            self._steps()
        except ClosedError:
            self._cancelled.set()
        except StillblockError as error:
            self._failure = str(error)
        finally:
            self._conclude()
            self._ended.set()

    def _steps(self) -> None:
        rate = self._request.bytes_per_s
        step = (
            STEP_BYTES_MAX if rate is None else max(1, min(STEP_BYTES_MAX, rate // STEPS_A_SECOND))
        )
        began = time.monotonic()
        while not self._cancelled.is_set() and self._check.step(bytes_max=step):
            if rate is not None:
                due = self._check.done_bytes / rate
                self._cancelled.wait(max(0.0, due - (time.monotonic() - began)))

    def _conclude(self) -> None:
        """Keep what was found, and when all was read."""
        is_whole = self._is_done() and self._request.share == SHARE_ALL and not self._failure
        found = self._check.damaged_blocks()
        try:
            remember(self._volume, is_whole=is_whole)
        except StillblockError as error:
            self._failure = self._failure or f"what was found could not be kept: {error}"
        self._volume.event(
            f"{self._request.purpose}_ended",
            done_bytes=self._check.done_bytes,
            total_bytes=self._check.total_bytes,
            damaged_blocks=found,
            failure=self._failure,
        )
        if found:
            for snapshot in self._volume.snapshots():
                damaged = tuple(snapshot.epoch.damaged)
                if damaged:
                    self._volume.event(
                        "damage_found",
                        snapshot=snapshot.record.name,
                        damaged_bytes=total_bytes(damaged),
                        first_byte=damaged[0][0],
                    )


def remember(volume: OpenVolume, *, is_whole: bool) -> None:
    """Keep in the store which content is known to be rotten, and when all of it was read."""
    with volume.lock:
        settings = volume.settings()
        damaged = tuple(
            DamagedCopy(epoch=epoch, start=start, end=end)
            for epoch, extents in volume.engine.damaged()
            for start, end in extents
        )
        verified = time.time_ns() if is_whole else settings.last_verified_unix_ns
        changed = replace(settings, damaged=damaged, last_verified_unix_ns=verified)
        if changed != settings:
            volume.store_settings(changed)


def check_structure(volume: OpenVolume) -> CheckReport:
    """Look at everything but content; say of each snapshot what is known to be wrong with it."""
    findings = tuple(
        Finding(is_lost=is_lost, message=message)
        for is_lost, message in volume.engine.check_structure()
    )
    return judge(volume, findings)


def judge(volume: OpenVolume, findings: tuple[Finding, ...]) -> CheckReport:
    """Return what findings and the state of every snapshot come to.

    What is no damage and should be looked at, such as the room in the store, is a warning here.
    """
    snapshots = tuple(
        SnapshotFinding(
            snapshot=s.record.name,
            state=s.state,
            reason=s.epoch.undecided or s.epoch.damage or s.epoch.suspect_reason,
            damaged=tuple(s.epoch.damaged),
            lost=tuple(s.epoch.lost),
        )
        for s in volume.snapshots()
        if s.state not in {SnapshotState.OK, SnapshotState.NARROWING}
    )
    is_damaged = any(f.is_lost for f in findings)
    is_damaged |= any(s.state is SnapshotState.DAMAGED for s in snapshots)
    ill = tuple(c for c in clones.list_clones(volume).clones if c.state is not CloneState.OK)
    is_damaged |= any(c.state is CloneState.DAMAGED for c in ill)
    verdict = Verdict.OK
    room = usage.store_usage(volume)
    if findings or snapshots or ill or room.level is not UsageLevel.OK:
        verdict = Verdict.DAMAGE if is_damaged else Verdict.WARNING
    return CheckReport(
        volume=volume.name,
        verdict=verdict,
        findings=findings,
        snapshots=snapshots,
        advice=tuple(_advice(volume.name, findings, snapshots, room, ill)),
        clones=ill,
    )


def _advice(
    name: str,
    findings: tuple[Finding, ...],
    snapshots: tuple[SnapshotFinding, ...],
    room: StoreUsage,
    ill: tuple[CloneInfo, ...],
) -> list[str]:
    advice: list[str] = []
    states = {s.state for s in snapshots}
    if any(not f.is_lost for f in findings):
        advice.append("one copy is left of some records: check the store's disk, nothing is lost")
    if any(f.is_lost for f in findings):
        advice.append(
            "check the store's disk, then open the volume anew: what is gone reads as errors, "
            "everything else is right"
        )
    if SnapshotState.DAMAGED in states:
        advice.append(
            "copy out what can be read of a damaged snapshot, then delete it; the live disk is "
            "not concerned"
        )
    if SnapshotState.SUSPECT in states:
        advice.append(
            f"compare a suspect snapshot with what you know; `stillblock volume recover {name} "
            "--accept-origin` takes the origin as it is"
        )
    states_of_clones = {clone.state for clone in ill}
    if CloneState.DAMAGED in states_of_clones:
        advice.append("delete a damaged clone and make another; its snapshot is not concerned")
    if CloneState.FAILED in states_of_clones:
        advice.append(
            "a sync of a failed clone failed: copy out of it what you need, check the store's "
            "disk, then reset or delete it"
        )
    if text := usage.describe(room):
        advice.append(text)
    return advice


def start_verification(volume: OpenVolume, request: VerifyRequest) -> VerifyProgress:
    """Start to verify content; raise `InUseError` if that runs already."""
    if not 0 < request.share <= SHARE_ALL:
        raise UsageError("a share of the content is more than 0 % and at most 100 %")
    if request.bytes_per_s is not None and request.bytes_per_s < 1:
        raise UsageError("a rate is at least one byte a second")
    with volume.lock:
        running = volume.verification
        if running is not None and running.progress().is_running:
            raise InUseError(
                f"a {running.progress().purpose} of {volume.name} runs already",
                hint=f"`stillblock volume scrub {volume.name} --cancel` stops it",
            )
        volume.verification = Verification(volume, request)
        volume.verification.start()
        return volume.verification.progress()


def verification_status(volume: OpenVolume) -> VerifyProgress:
    """Return how far the latest verification is."""
    running = volume.verification
    return VerifyProgress(volume=volume.name) if running is None else running.progress()


def wait_verification(volume: OpenVolume, request: WaitVerifyRequest) -> VerifyProgress:
    """Wait until it ended or the time is over; return how far it is then."""
    running = volume.verification
    if running is not None:
        running.wait(max(0, min(request.timeout_ms, WAIT_MS_MAX)) / 1000)
    return verification_status(volume)


def cancel_verification(volume: OpenVolume) -> VerifyProgress:
    """Stop it; what it found so far is kept. Raise `NotFoundError` if none runs."""
    running = volume.verification
    if running is None or not running.progress().is_running:
        raise NotFoundError(f"no verification of {volume.name} runs")
    running.cancel()
    return running.progress()


def damaged_copies(settings_damaged: tuple[DamagedCopy, ...]) -> list[tuple[int, Extents]]:
    """Return what a store remembers as the engine takes it."""
    found: dict[int, list[tuple[int, int]]] = {}
    for copy in settings_damaged:
        found.setdefault(copy.epoch, []).append((copy.start, copy.end))
    return [(epoch, tuple(extents)) for epoch, extents in found.items()]


def remember_damage(engine: native.Volume, settings_damaged: tuple[DamagedCopy, ...]) -> None:
    """Tell a volume that was just opened what earlier checks found."""
    size_bytes = engine.size_bytes
    kept = tuple(c for c in settings_damaged if c.end <= size_bytes)
    if kept:
        engine.note_damaged(damaged_copies(kept))
