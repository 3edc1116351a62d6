"""A volume's standing wishes about its instants, and what one instant is prepared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from stillblock.consistency.quiesce import Occasion, check_settings
from stillblock.errors import UsageError
from stillblock.model import Consistency, ConsistencySettings, Extents, Quiet

if TYPE_CHECKING:
    from collections.abc import Callable

    from stillblock.operations.volume import OpenVolume

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsistencyRequest:
    """What to change; None stays as it is. Times in milliseconds."""

    level: Consistency | None = None
    or_barrier: bool | None = None
    quiet: Quiet | None = None
    quiet_ms: int | None = None
    idle_limit_ms: int | None = None
    mounts: tuple[str, ...] | None = None
    agent: str | None = None
    """Empty: none."""
    agent_mounts: tuple[str, ...] | None = None
    freeze_limit_ms: int | None = None
    hooks: str | None = None
    """Empty: none."""
    hook_limit_ms: int | None = None

    def applied_to(self, settings: ConsistencySettings) -> ConsistencySettings:
        """Return the settings with the changes."""
        changed = replace(
            settings,
            level=_or(self.level, settings.level),
            or_barrier=_or(self.or_barrier, settings.or_barrier),
            quiet=_or(self.quiet, settings.quiet),
            quiet_ms=_or(self.quiet_ms, settings.quiet_ms),
            idle_limit_ms=_or(self.idle_limit_ms, settings.idle_limit_ms),
            freeze_limit_ms=_or(self.freeze_limit_ms, settings.freeze_limit_ms),
            hook_limit_ms=_or(self.hook_limit_ms, settings.hook_limit_ms),
        )
        if self.mounts is not None:
            changed = replace(changed, mounts=tuple(filter(None, self.mounts)))
        if self.agent is not None:
            changed = replace(changed, agent=self.agent or None)
        if self.agent_mounts is not None:
            changed = replace(changed, agent_mounts=tuple(filter(None, self.agent_mounts)))
        if self.hooks is not None:
            changed = replace(changed, hooks=self.hooks or None)
        return changed


def _or(wanted: T | None, standing: T) -> T:
    return standing if wanted is None else wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingConsistency:
    """A volume's standing wishes."""

    volume: str
    settings: ConsistencySettings


def show_consistency(volume: OpenVolume) -> StandingConsistency:
    """Return what snapshots are taken with if they do not say otherwise."""
    return StandingConsistency(volume=volume.name, settings=volume.settings().consistency)


def set_consistency(volume: OpenVolume, request: ConsistencyRequest) -> StandingConsistency:
    """Change it, durably; the next instant is prepared so."""
    with volume.lock:
        before = volume.settings()
        settings = request.applied_to(before.consistency)
        check_settings(settings)
        volume.store_settings(replace(before, consistency=settings))
    volume.event("consistency_changed", level=str(settings.level), or_barrier=settings.or_barrier)
    return show_consistency(volume)


def settings_for(
    volume: OpenVolume,
    *,
    level: Consistency | None,
    or_barrier: bool | None,
    quiet: Quiet | None,
) -> ConsistencySettings:
    """Return the standing settings with what one snapshot wants; raise `UsageError` if bad."""
    wanted = ConsistencyRequest(level=level, or_barrier=or_barrier, quiet=quiet)
    settings = wanted.applied_to(volume.settings().consistency)
    try:
        check_settings(settings)
    except UsageError as error:
        if error.hint is None:
            error.hint = f"`stillblock volume set {volume.name}` keeps it for all snapshots"
        raise
    return settings


def ranges_to_watch(volume: OpenVolume, selection: Extents) -> Extents | None:
    """Return what has to be quiet for a snapshot at a quiet moment; None: the whole disk."""
    return None if selection == ((0, volume.engine.size_bytes),) else selection


def occasion(
    volume: OpenVolume,
    *,
    snapshot: str,
    settings: ConsistencySettings,
    selection: Extents,
    before_freeze: Callable[[], None],
) -> Occasion:
    """Return what an instant is prepared with."""
    return Occasion(
        volume=volume.name,
        snapshot=snapshot,
        settings=settings,
        own_places=volume.own_places(),
        note=volume.frozen_note,
        selection=ranges_to_watch(volume, selection),
        before_freeze=before_freeze,
        is_closing=volume.instants.is_closing,
    )
