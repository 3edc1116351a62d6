"""Snapshots: take, list, show, rename, protect, compare, delete."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from stillblock import selection
from stillblock.consistency import quiet
from stillblock.consistency.quiesce import Moment, quiesced
from stillblock.errors import ProtectedError, QuiesceError, StillblockError, UsageError
from stillblock.extents import total_bytes
from stillblock.model import (
    PAUSE_LIMIT_MS_DEFAULT,
    PAUSE_LIMIT_MS_MAX,
    Changes,
    Consistency,
    ConsistencySettings,
    Extents,
    LeftOut,
    Quiescing,
    Quiet,
    Receipt,
    RuleTerm,
    SnapshotGroup,
    SnapshotInfo,
    SnapshotRecord,
    TermOutcome,
)
from stillblock.operations.clones import clone_counts, clones_of, drop_clones_of
from stillblock.operations.consistency import occasion, ranges_to_watch, settings_for
from stillblock.operations.narrowing import wait_final
from stillblock.operations.receipts import (
    Instant,
    digest_of,
    left_out_of,
    sealed,
    versions,
    with_left_out,
)
from stillblock.operations.records import encode_snapshot, new_id
from stillblock.operations.rules import RulesRequest, effective_rules, explain_terms
from stillblock.operations.undecided import ask_again
from stillblock.operations.volume import OpenVolume, Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from stillblock import native
    from stillblock.consistency.quiesce import Occasion


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRequest:
    """A snapshot to take."""

    name: str | None = None
    """None: named by the UTC time."""
    terms: tuple[RuleTerm, ...] = ()
    only_these: bool = False
    pause_limit_ms: int = PAUSE_LIMIT_MS_DEFAULT
    description: str = ""
    consistency: Consistency | None = None
    """None: the volume's standing level."""
    or_barrier: bool | None = None
    """Whether to fall back where the level cannot be reached; None: as the volume says."""
    quiet: Quiet | None = None
    """Which writers wait; None: as the volume says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotPlan:
    """What a snapshot would hold if it were taken now."""

    volume: str
    name: str
    size_bytes: int
    rules: tuple[RuleTerm, ...]
    terms: tuple[TermOutcome, ...]
    extents: Extents
    selected_bytes: int
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    pause_limit_ms: int
    low: Extents = ()
    """What of it is given up first when the store is full."""
    consistency: ConsistencySettings = field(default_factory=ConsistencySettings)
    pending: str = ""
    """What the frozen view has to tell: the snapshot then holds less. Empty: it holds this."""
    is_default: bool = False
    """Nobody gave rules: these are what is left out by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotTarget:
    """One snapshot by name, id prefix or `latest`."""

    snapshot: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RenameRequest:
    """A snapshot and its new name."""

    snapshot: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectRequest:
    """A snapshot, and whether deletion should be refused."""

    snapshot: str
    is_protected: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteRequest:
    """A snapshot to delete, also while clients use it if forced."""

    snapshot: str
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletePlan:
    """What deleting a snapshot would do."""

    snapshot: SnapshotInfo
    frees_bytes: int
    keeps_bookmark: bool
    clones: tuple[str, ...] = ()
    """Clones of it, by name: it is refused unless forced, and they go with it then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    """A snapshot that is gone."""

    volume: str
    name: str
    freed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangesRequest:
    """Two instants; the later one None means now."""

    since: str
    until: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotList:
    """The snapshots of a volume, oldest first."""

    volume: str
    snapshots: tuple[SnapshotInfo, ...]


def plan_snapshot(volume: OpenVolume, request: SnapshotRequest) -> SnapshotPlan:
    """Resolve the rules on the live disk and check the name; change nothing."""
    settings = settings_for(
        volume, level=request.consistency, or_barrier=request.or_barrier, quiet=request.quiet
    )
    return _planned(volume, request, settings)


def _planned(
    volume: OpenVolume, request: SnapshotRequest, consistency: ConsistencySettings
) -> SnapshotPlan:
    if not 0 < request.pause_limit_ms <= PAUSE_LIMIT_MS_MAX:
        raise UsageError(
            f"pause limit {request.pause_limit_ms} ms is out of range (1 to {PAUSE_LIMIT_MS_MAX})"
        )
    if request.name is not None:
        volume.check_name_free(request.name, what="snapshot")
    return _resolved(
        volume,
        request,
        name=request.name or volume.free_name(),
        consistency=consistency,
    )


def _resolved(
    volume: OpenVolume,
    request: SnapshotRequest,
    *,
    name: str,
    consistency: ConsistencySettings,
    known: selection.Known | None = None,
) -> SnapshotPlan:
    """Return what a snapshot would hold by the rules and the disk as they are now."""
    known = known or selection.Known()
    rules = effective_rules(
        volume, RulesRequest(terms=request.terms, only_these=request.only_these), known=known
    )
    explained = explain_terms(volume, rules.terms, known=known)
    return SnapshotPlan(
        volume=volume.name,
        name=name,
        size_bytes=explained.size_bytes,
        rules=rules.terms,
        terms=explained.outcomes(),
        extents=explained.extents,
        selected_bytes=explained.selected_bytes,
        left_out=explained.left_out,
        notes=explained.notes,
        pause_limit_ms=request.pause_limit_ms,
        low=explained.low,
        consistency=consistency,
        pending=explained.pending,
        is_default=rules.is_default,
    )


def create_snapshot(volume: OpenVolume, request: SnapshotRequest) -> Receipt:
    """Take a snapshot; it is durable when this returns. Raise `PauseTimeoutError` past the limit.

    Ranges, partitions and volumes are resolved right before the instant, when everybody holds
    still: they hold from the first write after it.
    What needs a filesystem is resolved afterwards, in a thread: until then the receipt is not
    final, and the snapshot can be neither read nor restored.
    Raise `QuiesceError`, `NotQuietError` or `FreezeRefusedError`, with nothing taken, if the level
    of consistency cannot be reached and no fallback is wanted; `ClosedError` if the volume closes
    while a quiet moment is waited for.
    """
    settings = settings_for(
        volume, level=request.consistency, or_barrier=request.or_barrier, quiet=request.quiet
    )
    with ExitStack() as held:
        # Others work on while this waits for its turn, for hooks and for a quiet moment.
        if settings.level is not Consistency.BARRIER:
            held.enter_context(volume.instants.turn())
        with volume.lock:
            plan = _planned(volume, request, settings)
            taking = Taking(volume, request, plan, held, waits=has_to_wait(plan))
        with quiesced(taking.occasion(), volume.engine) as moment:
            instant, record = quiet.take(
                moment,
                lambda quiet_ms, passed: taking.take(moment, quiet_ms=quiet_ms, passed=passed),
            )
            quiescing = moment.outcome()
        if falls_short(taking.plan, quiescing):
            # Right, but not what was asked for.
            volume.engine.delete_snapshot(epoch=instant.epoch)
            raise not_held(volume, quiescing.asked, quiescing.shortfall)
        receipt = keep_snapshot(volume, record, instant, quiescing)
    note_created(volume, receipt)
    return receipt


def has_to_wait(plan: SnapshotPlan) -> bool:
    """Return whether somebody has to hold still, or a quiet moment to come, before the instant."""
    return plan.consistency.level is not Consistency.BARRIER


def falls_short(plan: SnapshotPlan, quiescing: Quiescing) -> bool:
    """Return whether a snapshot is less consistent than it may be."""
    return bool(quiescing.shortfall) and not plan.consistency.or_barrier


def not_held(volume: OpenVolume, asked: Consistency, shortfall: str) -> QuiesceError:
    """Return the error for a level that was not held until the instant."""
    return QuiesceError(
        f"{volume.name}: {asked} was not held until the instant: {shortfall}; nothing was taken",
        hint="raise the limit, or add --or-barrier to keep such a snapshot",
    )


def keep_snapshot(
    volume: OpenVolume, record: SnapshotRecord, instant: native.Instant, quiescing: Quiescing
) -> Receipt:
    """Write down how a snapshot that is committed came about, and let its narrowing begin."""
    # The length of the pause is known only now; a crash here loses the number.
    record = replace(
        _with_quiescing(record, quiescing),
        pause_ns=instant.pause_ns,
        in_flight=instant.in_flight,
        commit_ns=instant.commit_ns,
    )
    if record.is_final:
        extents = volume.engine.selection(epoch=instant.epoch)
        record = sealed(record, Instant.of(instant), extents)
    try:
        volume.store_record(instant.epoch, record)
    finally:  # it is there, whatever could not be written beside it
        volume.hooks.reconcile(volume)
        if not record.is_final:
            volume.narrowings.start(volume, volume.snapshot(record.id))
    return read_receipt(volume, SnapshotTarget(snapshot=record.id))


def note_created(volume: OpenVolume, receipt: Receipt) -> None:
    """Record the event."""
    info = receipt.snapshot
    volume.event(
        "snapshot_created",
        snapshot=info.name,
        selected_bytes=info.selected_bytes,
        pause_ns=receipt.pause_ns or 0,
        consistency=receipt.consistency,
        **({} if info.group is None else {"group": info.group.id}),
    )


class Taking:
    """A snapshot between its plan and its instant: minutes may pass, and then the disk is another.

    What it selects is what the rules mean at the instant, not what they meant when it was asked
    for. Nothing is asked of readers while filesystems are frozen, for that takes long.
    """

    def __init__(
        self,
        volume: OpenVolume,
        request: SnapshotRequest,
        plan: SnapshotPlan,
        held: ExitStack,
        *,
        waits: bool,
    ) -> None:
        """Reserve the name. Under the volume's lock, which `held` keeps from the instant on, and
        from now on if nothing has to be waited for, here or on another volume of its group.
        """
        self.plan = plan
        self._volume = volume
        self._request = request
        self._held = held
        self._known: selection.Known | None = None
        self._waits = waits
        if waits:
            volume.instants.coming = plan.name
        else:
            self._hold()

    def prepare(self) -> None:
        """Do what takes long, before anything is frozen."""
        self._hold()
        self._known = selection.Known()
        self._look_again()

    def occasion(self) -> Occasion:
        """Return what its instant is prepared with."""
        return occasion(
            self._volume,
            snapshot=self.plan.name,
            settings=self.plan.consistency,
            selection=self.plan.extents,
            before_freeze=self.prepare,
        )

    def take(
        self, moment: Moment, *, quiet_ms: int | None, passed: Callable[[], None]
    ) -> tuple[native.Instant, SnapshotRecord]:
        """Take it. Raise `NotQuietError` where it was not quiet, or other ranges have to be."""
        with self._volume.lock:
            record = self.settle(moment)
            instant = self._volume.engine.snapshot(
                selection=self.plan.extents,
                low=self.plan.low,
                meta=first_meta(record, moment),
                pause_limit_ms=self.plan.pause_limit_ms,
                quiet_ms=quiet_ms,
                holds=self.plan.consistency.quiet.value,
                passed=passed,
            )
            self.hold()
        return instant, record

    def settle(self, moment: Moment, *, group: SnapshotGroup | None = None) -> SnapshotRecord:
        """Return what is written of it, with `plan` as of now. Under the volume's lock.

        Raise `NotQuietError` where other ranges have to be quiet than were.
        """
        if self._waits:
            self._look_again()
            moment.require_quiet(ranges_to_watch(self._volume, self.plan.extents))
        return _record_of(self.plan, self._request, group)

    def hold(self) -> None:
        """Keep the lock: it is there, and nobody finds it before its record is whole."""
        self._hold()

    def _look_again(self) -> None:
        plan = self.plan
        self.plan = _resolved(
            self._volume,
            self._request,
            name=plan.name,
            consistency=plan.consistency,
            known=self._known,
        )

    def _hold(self) -> None:
        self._held.enter_context(self._volume.lock)


def first_meta(record: SnapshotRecord, moment: Moment) -> bytes:
    """Return what is written with the instant, before anybody knows how it went."""
    return encode_snapshot(_with_quiescing(record, moment.undecided))


def _record_of(
    plan: SnapshotPlan, request: SnapshotRequest, group: SnapshotGroup | None
) -> SnapshotRecord:
    record = SnapshotRecord(
        name=plan.name,
        id=new_id(),
        description=request.description,
        rules=plan.rules,
        terms=plan.terms,
        pending=plan.pending,
        is_default=plan.is_default,
        notes=plan.notes,
        versions=versions(),
        group=group,
    )
    return with_left_out(record, plan.left_out)


def _with_quiescing(record: SnapshotRecord, quiescing: Quiescing) -> SnapshotRecord:
    return replace(record, consistency=str(quiescing.reached), quiescing=quiescing)


def list_snapshots(volume: OpenVolume) -> SnapshotList:
    """Return every snapshot, oldest first."""
    ask_again(volume)
    counts = clone_counts(volume)
    return SnapshotList(
        volume=volume.name,
        snapshots=tuple(
            replace(snapshot_info(volume, s), clone_count=counts.get(s.epoch.epoch, 0))
            for s in volume.snapshots()
        ),
    )


def show_snapshot(volume: OpenVolume, target: SnapshotTarget) -> SnapshotInfo:
    """Return one snapshot."""
    ask_again(volume)
    snapshot = volume.snapshot(target.snapshot)
    count = clone_counts(volume).get(snapshot.epoch.epoch, 0)
    return replace(snapshot_info(volume, snapshot), clone_count=count)


def read_receipt(volume: OpenVolume, target: SnapshotTarget) -> Receipt:
    """Return the record of a snapshot."""
    snapshot = volume.snapshot(target.snapshot)
    record, epoch = snapshot.record, snapshot.epoch
    # What a snapshot without its header selects is not known; its state says so.
    extents = () if epoch.damage else volume.engine.selection(epoch=epoch.epoch)
    can_be_checked = record.digest != "" and not epoch.damage
    return Receipt(
        snapshot=snapshot_info(volume, snapshot),
        rules=record.rules,
        terms=record.terms,
        extents=extents,
        left_out=left_out_of(record),
        lost=tuple(snapshot.epoch.lost),
        damaged=tuple(snapshot.epoch.damaged),
        consistency=record.consistency,
        quiescing=record.quiescing,
        pause_ns=record.pause_ns,
        in_flight=record.in_flight,
        commit_ns=record.commit_ns,
        is_default=record.is_default,
        notes=record.notes,
        failure=record.failure,
        narrowed_unix_ns=record.narrowed_unix_ns,
        versions=record.versions,
        digest=record.digest,
        is_intact=not can_be_checked
        or digest_of(record, Instant.of(epoch), extents) == record.digest,
        verification=record.verification,
    )


def rename_snapshot(volume: OpenVolume, request: RenameRequest) -> SnapshotInfo:
    """Give a snapshot another name; clients of its export by the old name must reconnect."""
    with volume.lock:
        snapshot = volume.snapshot(request.snapshot)
        volume.check_name_free(request.name, what="snapshot", epoch=snapshot.epoch.epoch)
        try:
            volume.hooks.withdraw(volume, snapshot, force=False)
            volume.store_record(snapshot.epoch.epoch, replace(snapshot.record, name=request.name))
        finally:
            volume.hooks.reconcile(volume)
    volume.event("snapshot_renamed", snapshot=snapshot.record.name, to=request.name)
    return show_snapshot(volume, SnapshotTarget(snapshot=request.name))


def protect_snapshot(volume: OpenVolume, request: ProtectRequest) -> SnapshotInfo:
    """Refuse deletion from now on, or allow it again."""
    with volume.lock:
        snapshot = volume.snapshot(request.snapshot)
        volume.store_record(
            snapshot.epoch.epoch, replace(snapshot.record, is_protected=request.is_protected)
        )
    kind = "snapshot_protected" if request.is_protected else "snapshot_unprotected"
    volume.event(kind, snapshot=snapshot.record.name)
    return show_snapshot(volume, SnapshotTarget(snapshot=snapshot.record.name))


def plan_delete(volume: OpenVolume, target: SnapshotTarget) -> DeletePlan:
    """Return what deleting would free; raise `ProtectedError` if it is protected."""
    snapshot = volume.snapshot(target.snapshot)
    if snapshot.record.is_protected:
        name = f"{volume.name}@{snapshot.record.name}"
        raise ProtectedError(
            f"{name} is protected from deletion",
            hint=f"`stillblock snapshot protect {name} --off` allows it again",
        )
    clones = clones_of(volume, epoch=snapshot.epoch.epoch)
    return DeletePlan(
        snapshot=snapshot_info(volume, snapshot),
        frees_bytes=snapshot.epoch.exclusive_bytes
        + sum(clone.entry.allocated_bytes for clone in clones),
        keeps_bookmark=snapshot.epoch.has_bookmark,
        clones=tuple(clone.record.name for clone in clones),
    )


def delete_snapshot(volume: OpenVolume, request: DeleteRequest) -> Deleted:
    """Delete a snapshot; raise `InUseError` if clients hold it or it has clones, unless forced."""
    with volume.lock:
        plan_delete(volume, SnapshotTarget(snapshot=request.snapshot))
        snapshot = volume.snapshot(request.snapshot)
        epoch = snapshot.epoch.epoch
        # Until it is final nobody reads it but its narrowing, which ends with it.
        volume.narrowings.cancel(epoch)
        force = request.force or not snapshot.record.is_final
        try:
            freed_bytes = drop_clones_of(volume, snapshot, force=request.force)
            volume.hooks.withdraw(volume, snapshot, force=force)
            freed_bytes += volume.engine.delete_snapshot(epoch=epoch, force=force)
        except StillblockError:
            if not snapshot.record.is_final:
                volume.narrowings.restart(volume, snapshot)
            raise
        finally:
            volume.hooks.reconcile(volume)
    volume.event("snapshot_deleted", snapshot=snapshot.record.name, freed_bytes=freed_bytes)
    return Deleted(volume=volume.name, name=snapshot.record.name, freed_bytes=freed_bytes)


def changes(volume: OpenVolume, request: ChangesRequest) -> Changes:
    """Return what changed since one instant until another, or until now."""
    since, since_name = _final_instant(volume, request.since)
    until, until_name = (
        (None, None) if request.until is None else _final_instant(volume, request.until)
    )
    if until is not None and until < since:
        raise UsageError(
            f"{volume.name}@{since_name} is newer than {volume.name}@{until_name}; "
            "name the older one first"
        )
    extents = volume.engine.changed(since=since, until=until)
    newly: Extents = ()
    if until is not None:
        newly = volume.engine.newly_selected(since=since, until=until)
    return Changes(
        volume=volume.name,
        since=since_name,
        until=until_name,
        extents=extents,
        changed_bytes=total_bytes(extents),
        newly_selected=newly,
        newly_selected_bytes=total_bytes(newly),
    )


def _final_instant(volume: OpenVolume, name: str) -> tuple[int, str]:
    """Return (epoch, name) of an instant whose selection changes no more."""
    epoch, shown = volume.instant(name)
    for snapshot in volume.snapshots():
        if snapshot.epoch.epoch == epoch:
            wait_final(volume, snapshot)
    return epoch, shown


def snapshot_info(volume: OpenVolume, snapshot: Snapshot) -> SnapshotInfo:
    """Return a snapshot as lists show it."""
    epoch: native.Epoch = snapshot.epoch
    record = snapshot.record
    return SnapshotInfo(
        volume=volume.name,
        name=record.name,
        id=record.id,
        epoch=epoch.epoch,
        created_unix_ns=epoch.created_unix_ns,
        size_bytes=epoch.size_bytes,
        selected_bytes=epoch.selected_bytes,
        preserved_bytes=epoch.preserved_bytes,
        exclusive_bytes=epoch.exclusive_bytes,
        purpose=record.purpose,
        is_protected=record.is_protected,
        has_bookmark=epoch.has_bookmark,
        is_suspect=epoch.is_suspect,
        suspect_reason=epoch.suspect_reason,
        lost_bytes=total_bytes(tuple(epoch.lost)),
        holders=volume.hooks.holders(volume, epoch),
        description=record.description,
        is_partial=bool(epoch.lost),
        lost=tuple(epoch.lost),
        lost_at_source=tuple(epoch.lost_at_source),
        low_bytes=total_bytes(volume.engine.low(epoch=epoch.epoch)),
        state=snapshot.state,
        damaged_bytes=total_bytes(tuple(epoch.damaged)),
        damage=epoch.damage,
        accepted=epoch.accepted,
        consistency=record.consistency,
        shortfall="" if record.quiescing is None else record.quiescing.shortfall,
        is_final=record.is_final,
        group=record.group,
        undecided=epoch.undecided,
        verified=None if record.verification is None else record.verification.outcome,
    )
