"""What makes a run void."""

import dataclasses

import pytest

from bench.results import Conditions, Run, Session
from bench.validity import failures, void_reasons

QUIET = Conditions(
    filesystem="ext2/ext3",
    is_direct=False,
    qemu_aio="threads",
    others_before_cores=0.1,
    size_bytes=1 << 30,
    seconds=1.0,
    scale=1.0,
    round_count=5,
    sync_cost={"origin_us_1": 145.0},
)


def run(*, kind="io", sessions=(), **changed):
    conditions = dataclasses.replace(QUIET, **changed)
    return Run(kind=kind, conditions=conditions, sessions=tuple(sessions))


def session(*, others=0.0, **given):
    return Session(target="qsd-cbw", round_index=0, figures={"others_cores": others}, **given)


@pytest.mark.parametrize("kind", ["io", "sync", "direct", "stall"])
def test_a_quiet_run_of_five_rounds_is_not_void(kind):
    assert void_reasons(run(kind=kind, sessions=[session()])) == []


def test_fewer_than_five_rounds_are_void():
    assert "4 rounds" in void_reasons(run(round_count=4))[0]


def test_other_processes_before_the_run_are_void():
    assert "1.20 cores before it" in void_reasons(run(others_before_cores=1.2))[0]


def test_other_processes_during_most_sessions_are_void():
    busy = [session(others=0.6), session(others=0.6), session(others=0.0)]
    assert "0.60 cores during it" in void_reasons(run(sessions=busy))[0]


def test_other_processes_during_one_session_of_three_are_not_void():
    busy = [session(others=0.6), session(others=0.0), session(others=0.0)]
    assert void_reasons(run(sessions=busy)) == []


def test_write_back_by_the_kernel_is_allowed_on_a_disk():
    assert void_reasons(run(kind="sync", sessions=[session(others=0.3)])) == []


def test_a_free_sync_is_void_for_sync_alone():
    free = {"origin_us_1": 1.5}
    assert "reaches no disk" in void_reasons(run(kind="sync", sync_cost=free))[0]
    assert void_reasons(run(kind="io", sync_cost=free)) == []


@pytest.mark.parametrize("kind", ["sync", "direct"])
def test_a_disk_run_in_memory_is_void(kind):
    assert "in memory" in void_reasons(run(kind=kind, filesystem="tmpfs"))[0]


def test_a_snapshot_that_did_not_read_as_the_disk_was_is_void():
    damaged = [session(is_view_intact=True), session(is_view_intact=False)]
    assert "qsd-cbw" in void_reasons(run(sessions=damaged))[0]


def test_the_same_failure_in_every_round_is_told_once():
    failed = [session(failures={"fw4k_q1": "no room"}) for _ in range(3)]
    assert failures([run(sessions=failed)]) == ["io: qsd-cbw fw4k_q1: no room"]
