"""Waiting for a quiet moment, falling back, and giving it up; mostly without a server."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

import stillblock
from consistency.writers import Writer
from processes import wait_until
from serving import volume as served_volume
from stillblock.errors import (
    ClosedError,
    NameTakenError,
    NotQuietError,
    StillblockError,
    UsageError,
)
from stillblock.model import Consistency
from stillblock.operations.consistency import ConsistencyRequest, set_consistency


def settle(volume, **fields):
    if "level" in fields:
        fields["level"] = Consistency(fields["level"])
    return set_consistency(volume._opened, ConsistencyRequest(**fields))


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


# While it is waited for ---------------------------------------------------------------------------


@contextmanager
def waiting(volume, name="calm"):
    """Wait for a quiet moment that does not come before the test is over; yield what came of it."""
    settle(volume, quiet_ms=60_000, idle_limit_ms=600_000)
    raised = []

    def ask():
        try:
            volume.snapshot(name, consistency="idle")
        except StillblockError as error:
            raised.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert wait_until(lambda: volume._opened.engine.quiet_ns() is not None)
    try:
        yield raised
    finally:
        volume.close()
        asking.join(20)
        assert not asking.is_alive()


def test_others_work_on_while_a_quiet_moment_is_waited_for(volume):
    volume.snapshot("early")
    with waiting(volume) as raised:
        volume.pwrite(b"x" * 4096, offset=0)
        assert [snapshot.name for snapshot in volume.snapshots()] == ["early"]
        settle(volume, quiet_ms=100)  # for the next
        early = volume.find("early")
        early.protect(is_protected=False)
        early.bookmark()
        early.rename("earlier")
        volume.find("earlier").restore()
        volume.find("earlier").delete()
        assert volume.snapshot("meanwhile", consistency="barrier").receipt.consistency == "barrier"
        assert not raised, "it waits still"


def test_the_name_of_a_snapshot_that_is_being_taken_is_taken(volume):
    early = volume.snapshot("early")
    with waiting(volume):
        with pytest.raises(NameTakenError, match="web@calm is being taken"):
            early.rename("calm")
        with pytest.raises(NameTakenError, match="web@calm is being taken"):
            early.bookmark("calm")


def test_a_volume_that_closes_waits_for_no_quiet_moment(volume):
    with waiting(volume) as raised:
        begun = time.monotonic()
        volume.close()
        assert time.monotonic() - begun < 10
    (error,) = raised
    assert isinstance(error, ClosedError)
    assert "nothing was taken" in error.message
    with stillblock.open("web") as again:
        assert again.snapshots() == ()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "release"])
def test_a_server_that_stops_tells_whoever_waits_for_a_quiet_moment(how):
    with served_volume(bytes(1 << 20)) as served:
        served.start()
        served.cli("volume", "set", "web", "--quiet-time", "60000", "--idle-limit", "600000")
        words = ("snapshot", "create", "web@calm", "--consistency", "idle")
        asking = subprocess.Popen(
            [sys.executable, "-m", "stillblock", *words],
            env=served.environment,
            stderr=subprocess.PIPE,
            text=True,
        )

        def is_waiting():
            """Whether the server has begun, which takes the name."""
            planned = served.try_cli("snapshot", "create", "web@calm", "--dry-run")
            return "being taken" in planned.err

        assert wait_until(is_waiting)
        assert served.cli("snapshot", "list", "web", "--json").json["snapshots"] == []
        with served.client() as client:
            client.pwrite(b"x" * 4096, offset=0)
        begun = time.monotonic()
        if how == "stop":
            assert served.stop().code == 0
        else:
            served.cli("volume", "release", "web")
        assert time.monotonic() - begun < 15
        _, said = asking.communicate(timeout=20)
        assert asking.returncode == 1
        assert "web is being closed while a quiet moment was waited for; nothing was taken" in said
        assert served.origin.read_bytes()[:4096] == b"x" * 4096
