"""The order in which everybody is let go after an instant of several volumes."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest

from stillblock.consistency.release import Release


@dataclass
class Held:
    """Notes what is asked of it; a thaw waits for `may_thaw`."""

    name: str
    order: list[str]
    fails: str = ""
    may_thaw: threading.Event = field(default_factory=threading.Event)

    def judge(self) -> None:
        self._note("judge")

    def thaw(self) -> None:
        assert self.may_thaw.wait(10)
        self._note("thaw")

    def let_applications_go(self) -> None:
        self._note("go")

    def end_applications(self) -> None:
        self._note("end")

    def _note(self, what: str) -> None:
        self.order.append(f"{what} {self.name}")
        if what == self.fails:
            raise OSError(f"{what} of {self.name} failed")


def two(**fails: str) -> tuple[Release, list[str], list[Held]]:
    order: list[str] = []
    held = [Held(name, order, fails=fails.get(name, "")) for name in ("data", "wal")]
    release = Release()
    release.of(held)
    return release, order, held


def test_all_thaw_before_any_application_goes_on_and_all_go_on_before_any_is_waited_for():
    release, order, (data, wal) = two()
    release.begin()
    # Whoever decides waits for no thaw: it may have to wait for the decision.
    assert release.wait_judged()
    assert sorted(order) == ["judge data", "judge wal"]
    # One that takes long to thaw keeps no other frozen.
    wal.may_thaw.set()
    while order[2:] != ["thaw wal"]:
        assert release.has_begun
    data.may_thaw.set()
    release.finish()
    assert order[2:] == ["thaw wal", "thaw data", "go data", "go wal", "end data", "end wal"]
    release.finish()
    assert len(order) == 8, "once"


def test_without_an_instant_they_are_let_go_in_the_end():
    release, order, held = two()
    for one in held:
        one.may_thaw.set()
    release.finish()
    assert not release.has_begun
    assert sorted(order[2:4]) == ["thaw data", "thaw wal"]
    assert order[4:] == ["go data", "go wal", "end data", "end wal"]


@pytest.mark.parametrize("what", ["judge", "thaw", "go", "end"])
def test_one_that_fails_is_told_and_keeps_nobody_from_going_on(what: str):
    release, order, held = two(data=what)
    for one in held:
        one.may_thaw.set()
    release.begin()
    with pytest.raises(OSError, match=f"{what} of data failed"):
        release.finish()
    assert bool(release.problem) == (what == "judge"), "then nobody knows who held still"
    assert len(order) == 8
