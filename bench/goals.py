"""The verdict on each goal from saved runs.

Goals about ourselves (3, 4, 5, 7, 9) are judged by server CPU per request, which is steadier than
throughput on a machine with few cores, with the throughput beside it; `Judge.IOPS` turns that
round. The others are throughput or latency by nature.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench.estimate import Estimate, estimate, median
from bench.goal_table import GOALS, Goal
from bench.registry import OURS, QSD_CBW
from bench.results import Cell, Results, values
from bench.validity import is_sync_free, void_reasons

LIMIT_MARGIN = 1.2
"""A sync goal that beats its limit by more than this is a server that does not sync."""


class Judge(enum.Enum):
    """What judges the goals against ourselves."""

    CPU = "cpu"
    IOPS = "iops"


class Verdict(enum.Enum):
    """What became of a goal."""

    AIM = "pass, aim"
    PASS = "pass"  # noqa: S105 - a verdict
    SHORT = "short"
    NOT_MEASURED = "not measured"
    VOID = "void"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A goal with its figure and the verdict."""

    goal: Goal
    measured: Estimate | None
    verdict: Verdict
    remark: str


def judge(results: Results, *, by: Judge = Judge.CPU) -> list[Outcome]:
    """The verdict on every goal."""
    return [_judge(_turned(goal, by), results) for goal in GOALS]


def count(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many goals passed (aimed or not), fell short, were void or not measured."""
    totals: dict[str, int] = {}
    for outcome in outcomes:
        name = outcome.verdict.value.split(",")[0]
        totals[name] = totals.get(name, 0) + 1
    return totals


def _turned(goal: Goal, by: Judge) -> Goal:
    if by is Judge.CPU or not goal.is_judged_by_cpu or goal.beside is None:
        return goal
    return replace(goal, quantity=goal.beside, beside=goal.quantity, beside_label="by CPU")


def _judge(goal: Goal, results: Results) -> Outcome:
    run = results.run(goal.run)
    measured = estimate(goal.quantity.measured(results, goal.run))
    remarks = _remarks(goal, results, measured)
    if run is not None and goal.run == "sync" and is_sync_free(run):
        verdict = Verdict.VOID
        remarks = ["a sync is free here"]
    elif run is None or measured is None:
        verdict = Verdict.NOT_MEASURED
    elif not goal.is_reached(goal.must, measured):
        verdict = Verdict.SHORT
    else:
        verdict = Verdict.AIM if goal.is_reached(goal.aim, measured) else Verdict.PASS
        if goal.is_median_short(measured):
            remarks.insert(0, "median short")
    if run is not None and measured is not None and void_reasons(run):
        remarks.append("run void")
    return Outcome(goal=goal, measured=measured, verdict=verdict, remark="; ".join(remarks))


def _remarks(goal: Goal, results: Results, measured: Estimate | None) -> list[str]:
    if measured is None:
        return []
    remarks = []
    if goal.beside is not None:
        beside = median(goal.beside.measured(results, goal.run))
        if beside is not None:
            remarks.append(f"{goal.beside_label} {beside:.{goal.digits}f}")
    run = results.run(goal.run)
    assert run is not None
    if goal.run == "sync" and goal.remark_figure in run.conditions.sync_cost:
        limit = run.conditions.sync_cost[goal.remark_figure]
        remarks.append(f"limit {limit:.2f}")
        if measured.median > LIMIT_MARGIN * limit:
            remarks.append("limit exceeded: is the store synced?")
    if goal.run == "stall":
        shown = (
            (OURS, "p99_ms", "ours"),
            (QSD_CBW, "p99_ms", "QEMU"),
            (OURS, "quiet_p99_ms", "quiet"),
        )
        for target, figure, label in shown:
            value = median(values(run, Cell(target=target, row="stall"), figure))
            if value is not None:
                remarks.append(f"{label} {value:.1f} ms")
    if goal.run == "direct":
        remarks.append("O_DIRECT")
    return remarks
