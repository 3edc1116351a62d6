"""Taking an instant when it is time: at once, or when nothing is written for long enough."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, TypeVar

from stillblock.errors import NotQuietError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stillblock.consistency.quiesce import Moment

T = TypeVar("T")

_LOOK_S: Final = 0.05
"""How often it is looked whether one of several volumes closes."""


def take(moment: Moment, snapshot: Callable[[int | None, Callable[[], None]], T]) -> T:
    """Call `snapshot(quiet_ms, passed)` when it is time; raise `NotQuietError` if never.

    Raise `ClosedError` if that was waited for until the volume closes.
    """
    return take_together((moment,), lambda quiet_ms, passed: snapshot(quiet_ms[0], passed))


def take_together(
    moments: Sequence[Moment],
    snapshot: Callable[[tuple[int | None, ...], Callable[[], None]], T],
) -> T:
    """Call `snapshot(quiet_ms of each, passed)` when it is time for all of them.

    Raise `NotQuietError` if that time never comes, `ClosedError` if a volume closes before.
    """

    def passed() -> None:
        for moment in moments:
            moment.passed()
        if any(moment.is_held for moment in moments):
            moments[0].letting_go.begin()

    idle = [moment for moment in moments if moment.is_idle]
    if not idle:
        return snapshot((None,) * len(moments), passed)
    begun_ns = time.monotonic_ns()
    limit_ns = begun_ns + min(moment.idle_limit_ns for moment in idle)
    quiet_ms = tuple(moment.quiet_ms if moment.is_idle else None for moment in moments)
    try:
        for moment in idle:
            moment.watch()
        while _wait_quiet(moments, idle, limit_ns):
            try:
                taken = snapshot(quiet_ms, passed)
            except NotQuietError:
                continue
            for moment in idle:
                moment.note_quiet(begun_ns)
            return taken
    finally:
        for moment in idle:
            moment.unwatch()
    for moment in idle:
        moment.note_never_quiet(begun_ns)
    return snapshot((None,) * len(moments), passed)


def _wait_quiet(moments: Sequence[Moment], idle: Sequence[Moment], limit_ns: int) -> bool:
    """Wait until all have been quiet for long enough; false if the limit comes first."""
    while True:
        for moment in moments:
            moment.check_open()
        left_ns = max(moment.not_quiet_for_ns() for moment in idle)
        if left_ns <= 0:
            return time.monotonic_ns() < limit_ns
        if time.monotonic_ns() + left_ns >= limit_ns:
            return False
        # One of several may be closed meanwhile, and nothing waits for all their events.
        step_s = left_ns / 1e9 if len(moments) == 1 else min(left_ns / 1e9, _LOOK_S)
        moments[0].is_closing.wait(step_s)
