"""The order of things around an instant: hooks, freezes, the instant, thaws, hooks.

`quiesced` is the way in, and `quiesced_together` for a group of volumes. Freezes come before the
gate closes, so that what they write passes through the volume like any write; thaws begin as soon
as the gate is open again, while the snapshot is still being made durable. Whatever happens in
between, everybody is let go (`release`).
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from stillblock.consistency import leftover
from stillblock.consistency.applications import Applications
from stillblock.consistency.freeze import MountFreeze
from stillblock.consistency.guest import GuestFreeze
from stillblock.consistency.leftover import Frozen
from stillblock.consistency.mounts import Mount, WatchedReads, open_checked
from stillblock.consistency.release import JUDGE_S, Release
from stillblock.errors import (
    ClosedError,
    NotQuietError,
    QuiesceError,
    RefusedError,
    StillblockError,
    UsageError,
)
from stillblock.model import (
    Consistency,
    ConsistencySettings,
    Extents,
    QuiesceStep,
    Quiescing,
    Quiet,
    StepKind,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

LIMIT_MS_MIN: Final = 10
LIMIT_MS_MAX: Final = 600_000
"""Ten minutes: nobody should hold an application still for longer by accident."""
_MOUNTS_MAX: Final = 16
_NS_PER_MS: Final = 1_000_000
_DETAIL_CHARS_MAX: Final = 16 * 1024
"""Of what all steps say so much is kept, or for each step"""
_DETAIL_CHARS_MIN: Final = 200
"""so much: a record is kept in the journal, whose entries have a limit."""
_UNDECIDED: Final = "the server ended before it could be said"


class WatchedVolume(WatchedReads, Protocol):
    """A volume that can tell how quiet it is, and where it is read."""

    def watch_writes(self, *, ranges: Extents | None = None) -> None:
        """Look at writes of these ranges, or of the whole disk, from now on."""

    def unwatch_writes(self) -> None:
        """Look no more."""

    def quiet_ns(self) -> int | None:
        """Return how long no watched write came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Occasion:
    """What an instant is for."""

    volume: str
    snapshot: str
    settings: ConsistencySettings
    """The standing ones, with the level and the fallback that were asked for this time."""
    own_places: Mapping[str, Path] = field(default_factory=dict)
    """Directories that we write to: what holds one of them is never frozen."""
    note: Path | None = None
    """Where it is written down what is frozen, for the next server."""
    selection: Extents | None = None
    """`idle`: the ranges that have to be quiet; None: the whole disk."""
    before_freeze: Callable[[], None] = lambda: None
    """Called once hooks have run, before anything is frozen: what may have to wait for others."""
    is_closing: threading.Event = field(default_factory=threading.Event)
    """Set once nobody may wait for a quiet moment any longer."""


def check_settings(settings: ConsistencySettings) -> None:
    """Raise `UsageError` for settings that could not work."""
    limits = {
        "quiet time": settings.quiet_ms,
        "idle limit": settings.idle_limit_ms,
        "freeze limit": settings.freeze_limit_ms,
        "hook limit": settings.hook_limit_ms,
    }
    for what, value in limits.items():
        if not LIMIT_MS_MIN <= value <= LIMIT_MS_MAX:
            raise UsageError(f"{what} {value} ms is out of range ({LIMIT_MS_MIN}-{LIMIT_MS_MAX})")
    paths = [*settings.mounts, *filter(None, (settings.agent, settings.hooks))]
    for path in paths:
        if not Path(path).is_absolute():
            raise UsageError(f"{path} is not an absolute path; the server has its own directory")
    if len(settings.mounts) > _MOUNTS_MAX:
        raise UsageError(f"{len(settings.mounts)} mounts to freeze; {_MOUNTS_MAX} may be")
    if settings.agent_mounts and settings.agent is None:
        raise UsageError("mount points of a guest are given, but no agent to freeze them")
    is_frozen = bool(settings.mounts or settings.agent)
    if settings.level is Consistency.FILESYSTEM and not is_frozen:
        raise UsageError(
            "consistency filesystem needs to know what to freeze: --freeze-mount or --guest-agent"
        )
    if settings.level is Consistency.APPLICATION and settings.hooks is None:
        raise UsageError("consistency application needs a directory of hooks: --hooks")


class Moment:
    """An instant that is being prepared; `quiet` takes it, `outcome` tells how it went."""

    def __init__(self, occasion: Occasion, volume: WatchedVolume, letting_go: Release) -> None:
        self._occasion = occasion
        self._settings = occasion.settings
        self._volume = volume
        self._mounts: list[Mount] = []
        self._freezes: list[MountFreeze | GuestFreeze] = []
        self._applications: Applications | None = None
        self._steps: list[QuiesceStep] = []
        self._shortfalls: list[str] = []
        self._failures: list[str] = []
        """Of hooks after the instant: what it holds is as right as it can be told."""
        self._is_judged = False
        self._watched: Extents | None = None
        self._is_watching = False
        self._passed_ns: int | None = None
        self.letting_go = letting_go
        """Shared by all moments of one instant."""

    # Before

    def prepare_applications(self) -> None:
        """Bring applications to hold still. What fails is a shortfall, or ends it."""
        level, hooks = self._settings.level, self._settings.hooks
        if level is Consistency.APPLICATION and hooks is not None:
            with self._or_barrier():
                self._prepare_applications(Path(hooks))

    def prepare_freeze(self) -> None:
        """Do what may have to wait for others, before anything is frozen."""
        if self.is_freeze_wanted:
            with self._or_barrier():
                self._occasion.before_freeze()
        else:
            self._occasion.before_freeze()

    def look_at_mounts(self) -> None:
        """Open what is to be frozen: looking takes time, and reads. As `freeze`."""
        if self.is_freeze_wanted:
            with self._or_barrier():
                self._look_at_mounts()

    def freeze(self) -> None:
        """Bring filesystems to hold still. What fails is a shortfall, or ends it."""
        if self.is_freeze_wanted:
            with self._or_barrier():
                self._freeze()
        if self._shortfalls:
            # Half of it held still for nothing. Applications go on later: what they write then may
            # lie on a filesystem of another volume, which is frozen by now.
            self.thaw()

    @property
    def is_freeze_wanted(self) -> bool:
        """Whether filesystems are to be frozen, or a guest."""
        levels = {Consistency.FILESYSTEM, Consistency.APPLICATION}
        return self._settings.level in levels and not self._shortfalls

    def _prepare_applications(self, directory: Path) -> None:
        self._applications = Applications(
            directory,
            limit_ms=self._settings.hook_limit_ms,
            hold_ms=self._settings.hook_limit_ms,
            environment={
                "STILLBLOCK_VOLUME": self._occasion.volume,
                "STILLBLOCK_SNAPSHOT": self._occasion.snapshot,
                "STILLBLOCK_LIMIT_MS": str(self._settings.hook_limit_ms),
            },
        )
        try:
            self._applications.begin()
        finally:
            self._take_steps(self._applications)

    def _look_at_mounts(self) -> None:
        for path in self._settings.mounts:
            mount = open_checked(
                Path(path),
                self._volume,
                volume_name=self._occasion.volume,
                own_places=self._occasion.own_places,
                timeout_s=self._settings.freeze_limit_ms / 1000,
            )
            self._mounts.append(mount)

    def _freeze(self) -> None:
        limit_ms = self._settings.freeze_limit_ms
        freezes: list[MountFreeze | GuestFreeze] = [
            MountFreeze(mount, limit_ms=limit_ms) for mount in self._mounts
        ]
        if self._settings.agent is not None:
            freezes.append(
                GuestFreeze(
                    Path(self._settings.agent),
                    mounts=self._settings.agent_mounts,
                    limit_ms=limit_ms,
                )
            )
        if self._occasion.note is not None:
            frozen = Frozen(mounts=self._settings.mounts, agent=self._settings.agent)
            leftover.note(self._occasion.note, frozen)
        for freeze in freezes:
            begun_ns = time.monotonic_ns()
            try:
                self._steps.append(freeze.begin())
            except QuiesceError as error:
                took_ns = time.monotonic_ns() - begun_ns
                self._steps.append(
                    QuiesceStep(
                        kind=StepKind.FREEZE,
                        what=freeze.what,
                        duration_ns=took_ns,
                        is_ok=False,
                        detail=error.message,
                    )
                )
                raise
            self._freezes.append(freeze)

    @contextmanager
    def _or_barrier(self) -> Iterator[None]:
        try:
            yield
        except (QuiesceError, RefusedError) as error:
            if not self._settings.or_barrier:
                raise
            self._shortfalls.append(str(error))

    # The instant

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a quiet moment."""
        return self._settings.level is Consistency.IDLE

    @property
    def idle_limit_ns(self) -> int:
        """How long it waits for one."""
        return self._settings.idle_limit_ms * _NS_PER_MS

    @property
    def quiet_ms(self) -> int:
        """For how long nothing may have been written."""
        return self._settings.quiet_ms

    @property
    def is_closing(self) -> threading.Event:
        """Set once nobody may wait for a quiet moment any longer."""
        return self._occasion.is_closing

    def watch(self) -> None:
        """Look at the writes that have to be over."""
        self._watch(self._occasion.selection)

    def unwatch(self) -> None:
        """Look no more."""
        self._is_watching = False
        self._volume.unwatch_writes()

    def not_quiet_for_ns(self) -> int:
        """Return how much longer it has to be quiet; 0 or less: it was for long enough."""
        return self.quiet_ms * _NS_PER_MS - (self._volume.quiet_ns() or 0)

    def check_open(self) -> None:
        """Raise `ClosedError` if nobody may wait any longer."""
        if self.is_closing.is_set():
            raise ClosedError(
                f"{self._occasion.volume} is being closed while a quiet moment was waited for; "
                "nothing was taken"
            )

    def note_quiet(self, begun_ns: int) -> None:
        """Write down that there was a quiet moment."""
        self._note_idle(begun_ns, f"no write for {self.quiet_ms} ms")

    def note_never_quiet(self, begun_ns: int) -> None:
        """Write down that there was none; raise `NotQuietError` if nothing is to be taken then."""
        words = (
            f"there was no time of {self.quiet_ms} ms without a write within "
            f"{self._settings.idle_limit_ms} ms"
        )
        self._note_idle(begun_ns, words, is_ok=False)
        if not self._settings.or_barrier:
            raise NotQuietError(
                f"{self._occasion.volume}: {words}; nothing was taken",
                hint="ask for a shorter --quiet-time, a longer --idle-limit, or add --or-barrier",
            )
        self._shortfalls.append(words)

    def require_quiet(self, ranges: Extents | None) -> None:
        """For `snapshot`, which knows now what it selects: None is the whole disk.

        Raise `NotQuietError` if other ranges were watched: these are from now on, and it is called
        once more when they were quiet for long enough. Nothing at other levels than `idle`.
        """
        if self._is_watching and ranges != self._watched:
            self._watch(ranges)
            raise NotQuietError(f"{self._occasion.volume}: the selection moved meanwhile")

    def _watch(self, ranges: Extents | None) -> None:
        self._watched, self._is_watching = ranges, True
        self._volume.watch_writes(ranges=ranges)

    def _note_idle(self, begun_ns: int, detail: str, *, is_ok: bool = True) -> None:
        self._steps.append(
            QuiesceStep(
                kind=StepKind.IDLE,
                what=self._occasion.volume,
                duration_ns=time.monotonic_ns() - begun_ns,
                is_ok=is_ok,
                detail=detail,
            )
        )

    def passed(self) -> None:
        """Note that the instant is over."""
        self._passed_ns = time.monotonic_ns()

    # After

    @property
    def is_held(self) -> bool:
        """Whether anybody holds still."""
        return bool(self._freezes) or self._applications is not None

    def judge(self) -> None:
        """Ask whether all hold still to this moment, which begins the thaws and waits for none."""
        for freeze in reversed(self._freezes):
            freeze.ask_thaw()
            self._judge(freeze.thawed_ns, freeze.shortfall)
        if self._applications is not None:
            self._applications.probe()
            self._judge(self._applications.released_ns, self._applications.shortfall)
        self._is_judged = True

    def thaw(self) -> None:
        """Thaw everything."""
        freezes, self._freezes = self._freezes, []
        for freeze in reversed(freezes):
            known = freeze.shortfall
            step = freeze.end()
            if step is not None:
                self._steps.append(step)
            if not self._is_judged:
                self._judge(freeze.thawed_ns, freeze.shortfall)
            elif freeze.shortfall != known:
                # Only the thaw tells that somebody else had thawed it.
                self._failures.append(freeze.shortfall)
        mounts, self._mounts = self._mounts, []
        for mount in mounts:
            mount.close()
        # A freeze that failed is not in the list: its guard may still wait for it.
        if self._occasion.note is not None and not self._has_failed_freeze():
            leftover.forget(self._occasion.note)

    def let_applications_go(self) -> None:
        """Have applications go on."""
        if self._applications is not None:
            self._applications.let_go()

    def end_applications(self) -> None:
        """Wait until they do."""
        applications, self._applications = self._applications, None
        if applications is not None:
            applications.end()
            self._take_steps(applications)
            if applications.failure:
                self._failures.append(applications.failure)

    def _has_failed_freeze(self) -> bool:
        kinds = {StepKind.FREEZE, StepKind.THAW}
        return any(step.kind in kinds and not step.is_ok for step in self._steps)

    def _take_steps(self, applications: Applications) -> None:
        self._steps += applications.steps
        applications.steps = []

    def _judge(self, ended_ns: int | None, shortfall: str) -> None:
        """Who let go by itself did so in time only if the instant had passed by then."""
        is_late = self._passed_ns is not None and (ended_ns or 0) > self._passed_ns
        if shortfall and not is_late:
            self._shortfalls.append(shortfall)

    def objection(self) -> str:
        """Return why less was held until the instant than may be; empty if all was.

        Waits until that is known, which it is long before everybody goes on.
        """
        if self._settings.or_barrier or not self.letting_go.has_begun:
            return ""
        if not self.letting_go.wait_judged():
            return f"it is not known after {JUDGE_S:.0f} s whether everybody held still"
        if self.letting_go.problem:
            return f"it is not known whether everybody held still: {self.letting_go.problem}"
        return "; ".join(self._shortfalls)

    @property
    def undecided(self) -> Quiescing:
        """What to write down with the instant, while it is not known whether it was in time."""
        asked = self._settings.level
        is_barrier = asked is Consistency.BARRIER
        return Quiescing(
            asked=asked,
            reached=Consistency.BARRIER,
            is_quiet_selected=self._settings.quiet is Quiet.SELECTED,
            shortfall="" if is_barrier else "; ".join(self._shortfalls) or _UNDECIDED,
        )

    def outcome(self) -> Quiescing:
        """Return how it went, everybody being let go."""
        try:
            self.letting_go.finish()
        except (StillblockError, OSError, ValueError) as error:
            # The instant is over: what it took stays known, with this beside it.
            self._failures.append(f"not everybody was let go as they should be: {error}")
        asked = self._settings.level
        return Quiescing(
            asked=asked,
            reached=Consistency.BARRIER if self._shortfalls or self._failures else asked,
            shortfall="; ".join(self._shortfalls + self._failures),
            steps=_within_budget(self._steps),
            is_quiet_selected=self._settings.quiet is Quiet.SELECTED,
        )


def _within_budget(steps: list[QuiesceStep]) -> tuple[QuiesceStep, ...]:
    """Cut what was said, its beginning first, so that the record of a snapshot stays small."""
    share = max(_DETAIL_CHARS_MIN, _DETAIL_CHARS_MAX // max(1, len(steps)))
    return tuple(
        step if len(step.detail) <= share else replace(step, detail="..." + step.detail[-share:])
        for step in steps
    )


@contextmanager
def quiesced(occasion: Occasion, volume: WatchedVolume) -> Iterator[Moment]:
    """Prepare an instant, and let everybody go in the end.

    Raise `UsageError`, `FreezeRefusedError` or `QuiesceError`, with nothing held still, if the
    level cannot be reached and no fallback was asked for.
    """
    with quiesced_together(((occasion, volume),)) as (moment,):
        yield moment


@contextmanager
def quiesced_together(
    parts: Sequence[tuple[Occasion, WatchedVolume]],
) -> Iterator[tuple[Moment, ...]]:
    """Prepare one instant of several volumes, and let everybody go in the end.

    Each step is done for all volumes before the next one: applications hold still, since what they
    write meanwhile may lie on another volume of the group; then everything that takes long is done;
    then filesystems are frozen. No gate is closed yet, so no freeze waits for one of ours. Raises
    what `quiesced` raises.
    """
    for occasion, _ in parts:
        check_settings(occasion.settings)
    check_mix([occasion.settings.level for occasion, _ in parts])
    letting_go = Release()
    moments = tuple(Moment(occasion, volume, letting_go) for occasion, volume in parts)
    letting_go.of(moments)
    try:
        for moment in moments:
            moment.prepare_applications()
        if any(moment.is_freeze_wanted for moment in moments):
            for moment in moments:
                moment.prepare_freeze()
            for moment in moments:
                moment.look_at_mounts()
            for moment in moments:
                moment.freeze()
        yield moments
    finally:
        letting_go.finish()


def check_mix(levels: Sequence[Consistency]) -> None:
    """Raise `UsageError` for levels that cannot be held at one instant."""
    held = {Consistency.FILESYSTEM, Consistency.APPLICATION} & set(levels)
    if Consistency.IDLE in levels and held:
        raise UsageError(
            "one volume of a group waits for a quiet moment, which may take minutes, while "
            f"another would be held still ({', '.join(sorted(held))})",
            hint="ask for one level for all of them with --consistency",
        )
