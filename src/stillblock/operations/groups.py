"""Groups: snapshots of several volumes with one instant, all of them or none."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from stillblock import native
from stillblock.consistency.quiesce import quiesced_together, take_together
from stillblock.errors import UsageError
from stillblock.model import (
    PAUSE_LIMIT_MS_DEFAULT,
    Consistency,
    Receipt,
    RuleTerm,
    SnapshotGroup,
)
from stillblock.operations.snapshots import (
    SnapshotPlan,
    SnapshotRequest,
    draft_snapshot,
    keep_snapshot,
    not_held,
    note_created,
    plan_snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stillblock.consistency.quiesce import Moment
    from stillblock.operations.snapshots import Draft
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
    return GroupPlan(
        plans=tuple(
            plan_snapshot(volume, request.of(member.name or common))
            for volume, member in zip(volumes, request.members, strict=True)
        )
    )


def create_group(volumes: Sequence[OpenVolume], request: GroupRequest) -> GroupReceipt:
    """Take a snapshot of each volume at one instant; all are durable when this returns, or none is.

    `volumes` are those of `request.members`, in their order. Everything else is as for
    `create_snapshot`; if one of them cannot be taken as asked, none is.
    """
    check_members(request)
    with ExitStack() as held:
        # In one order, whatever the request's: two groups must not wait for one another.
        for volume in sorted(volumes, key=lambda volume: volume.engine.uuid):
            held.enter_context(volume.lock)
        plans = plan_group(volumes, request).plans
        group = SnapshotGroup(
            id=uuid.uuid4().hex, members=tuple(f"{plan.volume}@{plan.name}" for plan in plans)
        )
        drafts = tuple(
            draft_snapshot(volume, plan, request.of(plan.name), group=group)
            for volume, plan in zip(volumes, plans, strict=True)
        )
        parts = [(d.occasion, v.engine) for d, v in zip(drafts, volumes, strict=True)]
        with quiesced_together(parts) as moments:
            instants = take_together(
                moments,
                lambda quiet_ms, passed: native.snapshot_group(
                    group.id, _members(volumes, drafts, moments, quiet_ms), passed=passed
                ),
            )
            outcomes = tuple(moment.outcome() for moment in moments)
        taken = tuple(zip(volumes, drafts, instants, outcomes, strict=True))
        short = [(v, outcome) for v, draft, _, outcome in taken if draft.falls_short(outcome)]
        if short:
            # Right, but not what was asked for.
            for volume, _, instant, _ in taken:
                volume.engine.delete_snapshot(epoch=instant.epoch)
            raise not_held(*short[0])
        receipts = tuple(keep_snapshot(*part) for part in taken)
    for volume, draft, receipt in zip(volumes, drafts, receipts, strict=True):
        note_created(volume, draft, receipt)
    return GroupReceipt(group=group, receipts=receipts)


def _members(
    volumes: Sequence[OpenVolume],
    drafts: Sequence[Draft],
    moments: Sequence[Moment],
    quiet_ms: Sequence[int | None],
) -> list[native.GroupMember]:
    return [
        native.GroupMember(
            volume=volume.engine,
            selection=draft.plan.extents,
            low=draft.plan.low,
            meta=draft.meta(moment),
            pause_limit_ms=draft.plan.pause_limit_ms,
            quiet_ms=quiet,
        )
        for volume, draft, moment, quiet in zip(volumes, drafts, moments, quiet_ms, strict=True)
    ]


def _common_name(volumes: Sequence[OpenVolume]) -> str:
    """Return a name made of the UTC time that is free in all of them."""
    names = {volume.free_name() for volume in volumes}
    # The longest has the highest number behind the time; a second may have begun in between.
    name = max(names, key=lambda name: (len(name), name))
    for volume in volumes:
        volume.check_name_free(name, what="snapshot")
    return name
