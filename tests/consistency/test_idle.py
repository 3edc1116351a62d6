"""Waiting for a quiet moment, and falling back: in this process, on a volume without a server."""

from __future__ import annotations

import threading

import pytest

from stillblock.errors import NotQuietError, UsageError
from stillblock.model import Consistency
from stillblock.operations.consistency import ConsistencyRequest, set_consistency


def settle(volume, **fields):
    if "level" in fields:
        fields["level"] = Consistency(fields["level"])
    return set_consistency(volume._opened, ConsistencyRequest(**fields))


class Writer:
    """Writes one block again and again, without a break."""

    def __init__(self, volume, offset):
        self._stop = threading.Event()
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(volume, offset))

    def _run(self, volume, offset):
        while not self._stop.is_set():
            volume.pwrite(b"w" * 4096, offset=offset)
            self._first.set()

    def __enter__(self):
        self._thread.start()
        assert self._first.wait(20)
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self._stop.set()
        self._thread.join()


def test_a_quiet_disk_is_taken_when_it_was_quiet_for_long_enough(volume):
    settle(volume, quiet_ms=150)
    receipt = volume.snapshot("calm", consistency="idle").receipt
    assert receipt.consistency == "idle"
    assert receipt.in_flight == 0
    (step,) = receipt.quiescing.steps
    assert step.is_ok
    assert step.duration_ns >= 150_000_000


def test_a_disk_that_is_never_quiet_gives_no_snapshot(volume):
    settle(volume, quiet_ms=300, idle_limit_ms=600)
    with Writer(volume, 0), pytest.raises(NotQuietError, match="nothing was taken"):
        volume.snapshot("calm", consistency="idle")
    assert volume.snapshots() == ()
    volume.snapshot("calm", consistency="idle")


def test_or_a_barrier_that_says_so(volume):
    settle(volume, quiet_ms=300, idle_limit_ms=600)
    with Writer(volume, 0):
        receipt = volume.snapshot("calm", consistency="idle", or_barrier=True).receipt
    assert receipt.consistency == "barrier"
    assert str(receipt.quiescing.asked) == "idle"
    assert "without a write" in receipt.quiescing.shortfall
    assert [step.is_ok for step in receipt.quiescing.steps] == [False]


def test_only_the_selected_ranges_have_to_be_quiet(volume):
    settle(volume, quiet_ms=200, idle_limit_ms=20_000)
    with Writer(volume, 2 << 20):
        taken = volume.snapshot("calm", include=["0-1MiB"], only_these=True, consistency="idle")
    assert taken.receipt.consistency == "idle"


def test_it_is_taken_once_the_writer_pauses(volume):
    settle(volume, quiet_ms=100, idle_limit_ms=30_000)
    taken = []
    with Writer(volume, 0) as writer:
        thread = threading.Thread(
            target=lambda: taken.append(volume.snapshot("calm", consistency="idle"))
        )
        thread.start()
        writer.stop()
        thread.join(30)
    assert taken[0].receipt.consistency == "idle"


def test_the_standing_level_is_used_and_one_snapshot_may_differ(volume):
    settle(volume, level="idle", quiet_ms=50)
    assert volume.snapshot("a").receipt.consistency == "idle"
    assert volume.snapshot("b", consistency="barrier").receipt.consistency == "barrier"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"level": "filesystem"}, "what to freeze"),
        ({"level": "application"}, "--hooks"),
        ({"mounts": ("relative",)}, "not an absolute path"),
        ({"agent_mounts": ("/",)}, "no agent"),
        ({"quiet_ms": 1}, "out of range"),
        ({"freeze_limit_ms": 3_600_000}, "out of range"),
    ],
)
def test_settings_that_could_not_work_are_refused_and_nothing_is_changed(volume, fields, words):
    before = volume._opened.settings()
    with pytest.raises(UsageError, match=words):
        settle(volume, **fields)
    assert volume._opened.settings() == before


def test_a_level_without_its_settings_is_refused_when_it_is_asked_for(volume):
    with pytest.raises(UsageError, match="what to freeze"):
        volume.snapshot("x", consistency="filesystem", or_barrier=True)
    assert volume.snapshots() == ()
