"""The table of goals and the verdicts."""

import dataclasses

import pytest

from bench import registry
from bench.goal_table import FIRST_MARKS, GOALS
from bench.goals import Judge, Verdict, count, judge
from bench.results import Conditions, Machine, Results, Run, Session
from bench.workloads import ROW_NAMES

MACHINE = Machine(kernel="6.1", processor="any", cpu_count=2, memory_gib=8.0, versions={})
QUIET = Conditions(
    filesystem="tmpfs",
    is_direct=False,
    qemu_aio="threads",
    others_before_cores=0.0,
    size_bytes=1 << 30,
    seconds=1.0,
    scale=1.0,
    round_count=5,
)


def run(kind, *figures_by_target, conditions=QUIET):
    """A run of five equal rounds: (target, row, figures) each."""
    sessions = [
        Session(target=target, round_index=index, rows={row: figures})
        for index in range(5)
        for target, row, figures in figures_by_target
    ]
    return Run(kind=kind, conditions=conditions, sessions=tuple(sessions))


def results(*runs):
    return Results(machine=MACHINE, runs={r.kind: r for r in runs})


def outcome(found, number, *, what="", by=Judge.CPU):
    return next(o for o in judge(found, by=by) if o.goal.number == number and what in o.goal.what)


def first_writes(ours, peer):
    return results(run("io", ("stillblock", "fw4k_q32", ours), ("qsd-cbw", "fw4k_q32", peer)))


def test_there_are_nineteen_goals_and_four_first_marks():
    numbers = list(dict.fromkeys(goal.number for goal in GOALS))
    assert numbers == [f"M{n}" for n in range(1, 5)] + [str(n) for n in range(1, 20)]
    assert {goal.number for goal in FIRST_MARKS} == {"M1", "M2", "M3", "M4"}


def test_the_first_marks_ask_what_was_promised():
    found = [(goal.number, goal.must, goal.is_floor) for goal in FIRST_MARKS]
    assert list(dict.fromkeys(found)) == [
        ("M1", 4, True),
        ("M2", 2, True),
        ("M3", 1, True),
        ("M4", 0.3, False),
    ]


def test_an_aim_is_never_easier_than_what_must_hold():
    for goal in GOALS:
        if goal.aim is not None:
            assert goal.aim >= goal.must if goal.is_floor else goal.aim <= goal.must, goal


def test_every_goal_names_targets_and_rows_that_are_measured():
    rows = {*ROW_NAMES, "stall"}
    for goal in GOALS:
        for quantity in (goal.quantity, goal.beside):
            for cell in (quantity.top, quantity.bottom) if quantity else ():
                if cell is not None:
                    registry.parse(cell.target)
                    assert cell.row in rows or cell.row.startswith("mem_"), cell


def test_a_goal_without_figures_is_not_measured():
    assert {o.verdict for o in judge(results())} == {Verdict.NOT_MEASURED}


@pytest.mark.parametrize(
    ("iops", "verdict"),
    [(399.0, Verdict.SHORT), (400.0, Verdict.PASS), (600.0, Verdict.AIM)],
)
def test_a_floor_passes_from_its_mark_upwards(iops, verdict):
    assert outcome(first_writes({"iops": iops}, {"iops": 100.0}), "M1").verdict is verdict


@pytest.mark.parametrize(
    ("cpu_us", "verdict"), [(31.0, Verdict.SHORT), (30.0, Verdict.PASS), (20.0, Verdict.AIM)]
)
def test_a_ceiling_passes_from_its_mark_downwards(cpu_us, verdict):
    ours, peer = {"cpu_us_per_request": cpu_us}, {"cpu_us_per_request": 100.0}
    assert outcome(first_writes(ours, peer), "M4").verdict is verdict


def test_a_goal_that_only_the_interval_reaches_says_so():
    ours = [390.0, 395.0, 399.0, 430.0, 440.0]
    sessions = [
        Session(target=target, round_index=index, rows={"fw4k_q32": {"iops": iops}})
        for index, value in enumerate(ours)
        for target, iops in (("stillblock", value), ("qsd-cbw", 100.0))
    ]
    found = results(Run(kind="io", conditions=QUIET, sessions=tuple(sessions)))
    reached = outcome(found, "M1")
    assert reached.verdict is Verdict.PASS
    assert "median short" in reached.remark


def test_ratios_are_taken_within_a_round_and_not_across():
    sessions = [
        Session(target="stillblock", round_index=0, rows={"fw4k_q32": {"iops": 500.0}}),
        Session(target="qsd-cbw", round_index=1, rows={"fw4k_q32": {"iops": 100.0}}),
    ]
    found = results(Run(kind="io", conditions=QUIET, sessions=tuple(sessions)))
    assert outcome(found, "M1").verdict is Verdict.NOT_MEASURED


def test_goals_against_ourselves_are_judged_by_cpu_unless_throughput_is_asked_for():
    raw, ours = (
        {"iops": 100.0, "cpu_us_per_request": 10.0},
        {"iops": 50.0, "cpu_us_per_request": 10.0},
    )
    found = results(
        run("io", ("stillblock", "rw4k_q32", ours), ("stillblock@raw", "rw4k_q32", raw))
    )
    by_cpu = outcome(found, "3")
    assert by_cpu.verdict is Verdict.AIM
    assert "throughput 0.50" in by_cpu.remark
    by_iops = outcome(found, "3", by=Judge.IOPS)
    assert by_iops.verdict is Verdict.SHORT
    assert "by CPU 1.00" in by_iops.remark


def test_one_kept_byte_fails_the_goal_of_keeping_none():
    kept = {"kept_bytes_per_request": 1.0}
    found = results(run("io", ("stillblock@half", "uw4k_q32", kept)))
    assert outcome(found, "4", what="bytes kept").verdict is Verdict.SHORT


def sync_run(ratio, **cost):
    conditions = dataclasses.replace(QUIET, filesystem="ext2/ext3", sync_cost=cost)
    row = "fw4k_fsync1"
    return run(
        "sync",
        ("stillblock", row, {"iops": ratio * 100}),
        ("stillblock@raw", row, {"iops": 100.0}),
        conditions=conditions,
    )


def test_a_goal_about_flushes_is_void_where_a_sync_is_free():
    found = results(sync_run(0.9, origin_us_1=2.0, limit_1=0.5))
    assert outcome(found, "11").verdict is Verdict.VOID


def test_a_synced_server_that_beats_the_limit_is_asked_whether_it_syncs():
    found = outcome(results(sync_run(0.9, origin_us_1=150.0, limit_1=0.5)), "11")
    assert "limit exceeded" in found.remark


def test_a_figure_of_a_void_run_is_marked():
    noisy = dataclasses.replace(QUIET, others_before_cores=3.0)
    found = results(
        run(
            "io",
            ("stillblock", "fw4k_q32", {"iops": 900.0}),
            ("qsd-cbw", "fw4k_q32", {"iops": 100.0}),
            conditions=noisy,
        )
    )
    assert "run void" in outcome(found, "M1").remark


def test_passes_count_whether_aimed_or_not():
    totals = count(judge(first_writes({"iops": 500.0}, {"iops": 100.0})))
    assert totals["pass"] == 1
    assert totals["short"] == 1
