"""Groups: snapshots of several volumes with one instant, all of them or none."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from stillblock import native
from stillblock.consistency.quiesce import check_mix, quiesced_together
from stillblock.consistency.quiet import take_together
from stillblock.errors import QuiesceError, StillblockError, UsageError
from stillblock.model import (
    PAUSE_LIMIT_MS_DEFAULT,
    Consistency,
    Quiet,
    Receipt,
    RuleTerm,
    SnapshotGroup,
)
from stillblock.operations.snapshots import (
    SnapshotPlan,
    SnapshotRequest,
    Taking,
    falls_short,
    first_meta,
    has_to_wait,
    keep_snapshot,
    not_held,
    note_created,
    plan_snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stillblock.consistency.quiesce import Moment
    from stillblock.model import Quiescing, SnapshotRecord
    from stillblock.operations.volume import OpenVolume

MEMBERS_MAX: Final = 64
"""As the engine has it: far more than one process serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberRequest:
    """One snapshot of a group."""

    volume: str
    name: str | None = None
    """None: named by the UTC time, as all members without a name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """Snapshots to take at one instant; what is not said of one of them goes for all."""

    members: tuple[MemberRequest, ...]
    terms: tuple[RuleTerm, ...] = ()
    only_these: bool = False
    pause_limit_ms: int = PAUSE_LIMIT_MS_DEFAULT
    description: str = ""
    consistency: Consistency | None = None
    """None: the standing level of each volume."""
    or_barrier: bool | None = None
    quiet: Quiet | None = None

    def of(self, name: str | None) -> SnapshotRequest:
        """Return what is asked for one of them."""
        return SnapshotRequest(
            name=name,
            terms=self.terms,
            only_these=self.only_these,
            pause_limit_ms=self.pause_limit_ms,
            description=self.description,
            consistency=self.consistency,
            or_barrier=self.or_barrier,
            quiet=self.quiet,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """What the snapshots of a group would hold if they were taken now."""

    plans: tuple[SnapshotPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReceipt:
    """Snapshots that were taken at one instant, in the order they were asked for."""

    group: SnapshotGroup
    receipts: tuple[Receipt, ...]


def check_members(request: GroupRequest) -> None:
    """Raise `UsageError` unless there are several volumes, each once."""
    names = [member.volume for member in request.members]
    if not 2 <= len(names) <= MEMBERS_MAX:
        raise UsageError(f"a group has from 2 to {MEMBERS_MAX} volumes; {len(names)} are named")
    if len(set(names)) != len(names):
        raise UsageError(f"a volume is named twice in a group: {' '.join(names)}")


def plan_group(volumes: Sequence[OpenVolume], request: GroupRequest) -> GroupPlan:
    """Resolve the rules of each on the live disks and check the names; change nothing."""
    check_members(request)
    common = _common_name(volumes)
    plans = tuple(
        plan_snapshot(volume, request.of(member.name or common))
        for volume, member in zip(volumes, request.members, strict=True)
    )
    check_mix([plan.consistency.level for plan in plans])
    return GroupPlan(plans=plans)


def create_group(volumes: Sequence[OpenVolume], request: GroupRequest) -> GroupReceipt:
    """Take a snapshot of each volume at one instant; all are durable when this returns, or none is.

    `volumes` are those of `request.members`, in their order. Everything else is as for
    `create_snapshot`; if one of them cannot be taken as asked, none is.
    """
    check_members(request)
    with ExitStack() as held:
        # In one order, whatever the request's: two groups must not wait for one another.
        for volume in sorted(volumes, key=lambda volume: volume.engine.uuid):
            held.enter_context(volume.instants.turn())
        parts = _parts(volumes, request, held)
        around = [(part.taking.occasion(), part.volume.engine) for part in parts]
        with quiesced_together(around) as moments:
            group, taken = take_together(
                moments, lambda quiet_ms, passed: _take(parts, moments, quiet_ms, passed)
            )
            outcomes = tuple(moment.outcome() for moment in moments)
        receipts = _keep_all(parts, taken, outcomes)
    for volume, receipt in zip(volumes, receipts, strict=True):
        note_created(volume, receipt)
    _check_ended_well(parts, group, outcomes)
    return GroupReceipt(group=group, receipts=receipts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One volume of a group whose instant is being prepared."""

    volume: OpenVolume
    taking: Taking


def _parts(
    volumes: Sequence[OpenVolume], request: GroupRequest, held: ExitStack
) -> tuple[_Part, ...]:
    """Reserve the names."""
    with ExitStack() as locks:
        for volume in volumes:
            locks.enter_context(volume.lock)
        plans = plan_group(volumes, request).plans
        waits = any(has_to_wait(plan) for plan in plans)
        return tuple(
            _Part(
                volume=volume,
                taking=Taking(volume, request.of(plan.name), plan, held, waits=waits),
            )
            for volume, plan in zip(volumes, plans, strict=True)
        )


def _take(
    parts: Sequence[_Part],
    moments: Sequence[Moment],
    quiet_ms: Sequence[int | None],
    passed: Callable[[], None],
) -> tuple[SnapshotGroup, tuple[tuple[SnapshotRecord, native.Instant], ...]]:
    """Take all. Raise `NotQuietError` where it was not quiet, or other ranges have to be;
    `QuiesceError`, with nothing taken, if somebody did not hold still until the instant.
    """
    # Of this try: what is said of another one must never be taken for it.
    group = SnapshotGroup(
        id=uuid.uuid4().hex,
        members=tuple(f"{part.volume.name}@{part.taking.plan.name}" for part in parts),
    )
    objections: list[QuiesceError] = []

    def objects() -> str | None:
        for part, moment in zip(parts, moments, strict=True):
            if why := moment.objection():
                asked = part.taking.plan.consistency.level
                objections.append(not_held(part.volume, asked, why))
        return objections[0].message if objections else None

    with ExitStack() as locks:
        for part in parts:
            locks.enter_context(part.volume.lock)
        records = [
            part.taking.settle(moment, group=group)
            for part, moment in zip(parts, moments, strict=True)
        ]
        members = [
            native.GroupMember(
                volume=part.volume.engine,
                selection=part.taking.plan.extents,
                low=part.taking.plan.low,
                meta=first_meta(record, moment),
                pause_limit_ms=part.taking.plan.pause_limit_ms,
                quiet_ms=quiet,
                holds=part.taking.plan.consistency.quiet.value,
            )
            for part, record, moment, quiet in zip(parts, records, moments, quiet_ms, strict=True)
        ]
        try:
            instants = native.snapshot_group(group.id, members, passed=passed, objects=objects)
        except QuiesceError as error:
            raise (objections[0] if objections else error) from error
        for part in parts:
            part.taking.hold()
        return group, tuple(zip(records, instants, strict=True))


def _keep_all(
    parts: Sequence[_Part],
    taken: Sequence[tuple[SnapshotRecord, native.Instant]],
    outcomes: Sequence[Quiescing],
) -> tuple[Receipt, ...]:
    """Write down how each came about; raise the first error once all were tried."""
    receipts, failures = [], []
    for part, (record, instant), outcome in zip(parts, taken, outcomes, strict=True):
        try:
            receipts.append(keep_snapshot(part.volume, record, instant, outcome))
        except StillblockError as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return tuple(receipts)


def _check_ended_well(
    parts: Sequence[_Part], group: SnapshotGroup, outcomes: Sequence[Quiescing]
) -> None:
    """Raise `QuiesceError` if a hook failed after the instant: the snapshots are there by then."""
    for part, outcome in zip(parts, outcomes, strict=True):
        if falls_short(part.taking.plan, outcome):
            raise QuiesceError(
                f"{part.volume.name}: {outcome.shortfall}; {', '.join(group.members)} were taken "
                "before, and their receipts say it",
                hint="look whether the application goes on; delete them if they are of no use",
            )


def _common_name(volumes: Sequence[OpenVolume]) -> str:
    """Return a name made of the UTC time that is free in all of them."""
    names = {volume.free_name() for volume in volumes}
    # The longest has the highest number behind the time; a second may have begun in between.
    name = max(names, key=lambda name: (len(name), name))
    for volume in volumes:
        volume.check_name_free(name, what="snapshot")
    return name
