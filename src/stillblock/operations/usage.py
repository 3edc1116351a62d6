"""How full a volume's store is, what happens when it is full, and what to say as it fills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from stillblock.errors import UsageError
from stillblock.model import (
    USAGE_CRITICAL_PERCENT,
    USAGE_WARNING_PERCENT,
    OnFull,
    StoreUsage,
    UsageLevel,
    format_size,
)

if TYPE_CHECKING:
    from stillblock.operations.volume import OpenVolume

STORE_LIMIT_BYTES_MIN: Final = 4 * 1024 * 1024
"""A smaller store could not hold its own records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRequest:
    """What to change; None stays as it is."""

    on_full: OnFull | None = None
    limit_bytes: int | None = None
    """0: no limit."""


def usage_level(*, percent: int, is_full: bool, failure: str = "") -> UsageLevel:
    """Return how serious it is."""
    if failure:
        return UsageLevel.FAILED
    if is_full:
        return UsageLevel.FULL
    if percent >= USAGE_CRITICAL_PERCENT:
        return UsageLevel.CRITICAL
    return UsageLevel.WARNING if percent >= USAGE_WARNING_PERCENT else UsageLevel.OK


def store_usage(volume: OpenVolume) -> StoreUsage:
    """Return how full the store is; a level other than `ok` is worth a warning."""
    found = volume.engine.store_usage()
    percent = 100 * found.used_bytes // max(1, found.capacity_bytes)
    return StoreUsage(
        volume=volume.name,
        on_full=OnFull(found.on_full),
        limit_bytes=found.limit_bytes or None,
        used_bytes=found.used_bytes,
        capacity_bytes=found.capacity_bytes,
        percent=percent,
        level=usage_level(percent=percent, is_full=found.is_full, failure=found.failure),
        held_writes=found.held_writes,
        failure=found.failure,
    )


def check_limit(limit_bytes: int) -> None:
    """Raise `UsageError` for a limit that no store could keep to; 0 is none."""
    if 0 < limit_bytes < STORE_LIMIT_BYTES_MIN:
        raise UsageError(
            f"a store limit of {format_size(limit_bytes)} is too small; at least "
            f"{format_size(STORE_LIMIT_BYTES_MIN)} are needed, and 0 means none"
        )


def set_policy(volume: OpenVolume, request: PolicyRequest) -> StoreUsage:
    """Change what happens when the store is full; in force, and durable, when this returns."""
    if request.limit_bytes is not None:
        check_limit(request.limit_bytes)
    with volume.lock:
        now = store_usage(volume)
        on_full = now.on_full if request.on_full is None else request.on_full
        limit_bytes = now.limit_bytes or 0
        if request.limit_bytes is not None:
            limit_bytes = request.limit_bytes
        volume.engine.set_store_policy(on_full=on_full.value, limit_bytes=limit_bytes)
    volume.event("store_policy_changed", on_full=str(on_full), limit_bytes=limit_bytes)
    return store_usage(volume)


def describe(usage: StoreUsage) -> str:
    """Return a line about a store that somebody should look at; empty if all is well."""
    room = f"{format_size(usage.used_bytes)} of {format_size(usage.capacity_bytes)}"
    what = {
        UsageLevel.OK: "",
        UsageLevel.WARNING: f"the store takes {usage.percent} % ({room})",
        UsageLevel.CRITICAL: f"the store takes {usage.percent} % ({room}) and is nearly full",
        UsageLevel.FULL: f"the store is full ({room}): {_CONSEQUENCE[usage.on_full]}",
        UsageLevel.FAILED: f"the store fails: {usage.failure}; first changes are refused",
    }[usage.level]
    if not what:
        return ""
    held = f", {usage.held_writes} writes wait" if usage.held_writes else ""
    return f"{usage.volume}: {what}{held}; delete a snapshot, give it room or raise --store-limit"


_CONSEQUENCE: Final = {
    OnFull.DEGRADE: "writes go on, snapshots lose what changes",
    OnFull.HOLD: "first changes wait, snapshots stay whole",
    OnFull.FAIL: "first changes fail, snapshots stay whole",
}


class StoreWatch:
    """Writes down as events when a store's level changes and when snapshots lose blocks."""

    def __init__(self) -> None:
        self._levels: dict[str, UsageLevel] = {}
        self._lost: dict[str, int] = {}

    def look(self, volume: OpenVolume) -> StoreUsage:
        """Compare with the last time; cheap enough to be called every few seconds."""
        usage = store_usage(volume)
        before = self._levels.get(volume.name, UsageLevel.OK)
        self._levels[volume.name] = usage.level
        if usage.level is not before:
            volume.event(
                f"store_{usage.level}",
                percent=usage.percent,
                used_bytes=usage.used_bytes,
                capacity_bytes=usage.capacity_bytes,
                on_full=str(usage.on_full),
            )
        lost = volume.engine.statistics().get("lost_blocks", 0)
        more = lost - self._lost.get(volume.name, 0)
        self._lost[volume.name] = lost
        if more > 0:
            volume.event("snapshot_blocks_lost", lost_bytes=more * volume.engine.block_size)
        return usage
