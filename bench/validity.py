"""What makes a run void: figures that may be looked at and must not be quoted."""

from collections.abc import Iterable

from bench.estimate import median
from bench.results import Results, Run
from bench.units import format_size

ROUNDS_MIN = 5
OTHERS_CORES_MAX = 0.15
"""Cores used by other processes just before the run, and during it as the median of its sessions;
kernel threads count as others."""
OTHERS_CORES_MAX_ON_DISK = 0.5
"""On a disk the kernel's own threads write back what the servers wrote."""
SYNC_US_MIN = 30.0
"""A sync that costs less reached no disk."""

ON_DISK = frozenset({"sync", "direct"})


def void_reasons(run: Run) -> list[str]:
    """Why no figure of this run may be quoted; empty if they may."""
    seen = run.conditions
    reasons = []
    if seen.round_count < ROUNDS_MIN:
        reasons.append(f"{seen.round_count} rounds, fewer than {ROUNDS_MIN}")
    before = seen.others_before_cores
    if before > OTHERS_CORES_MAX:
        reasons.append(
            f"other processes used {before:.2f} cores before it, more than {OTHERS_CORES_MAX}"
        )
    others = median(session.figures.get("others_cores") for session in run.sessions)
    limit = OTHERS_CORES_MAX_ON_DISK if run.kind in ON_DISK else OTHERS_CORES_MAX
    if others is not None and others > limit:
        reasons.append(f"other processes used {others:.2f} cores during it, more than {limit}")
    if run.kind in ON_DISK and seen.filesystem == "tmpfs":
        reasons.append("the scratch directory is in memory, not on a disk")
    if run.kind == "sync" and is_sync_free(run):
        reasons.append(f"a sync takes less than {SYNC_US_MIN:.0f} us: it reaches no disk")
    damaged = sorted({s.target for s in run.sessions if s.is_view_intact is False})
    if damaged:
        reasons.append(f"the snapshot of {', '.join(damaged)} did not read as the disk was")
    return reasons


def is_sync_free(run: Run) -> bool:
    """Whether a sync cost nothing, so that goals about flushes say nothing."""
    return run.conditions.sync_cost.get("origin_us_1", SYNC_US_MIN) < SYNC_US_MIN


def void_by_kind(results: Results) -> dict[str, list[str]]:
    """The void runs with their reasons."""
    found = {kind: void_reasons(run) for kind, run in results.runs.items()}
    return {kind: reasons for kind, reasons in found.items() if reasons}


def failures(runs: Iterable[Run]) -> list[str]:
    """Everything that failed, one line each, without repeating a failure of several rounds."""
    lines = [
        f"{run.kind}: {session.target} {row}: {reason}"
        for run in runs
        for session in run.sessions
        for row, reason in session.failures.items()
    ]
    return list(dict.fromkeys(lines))


def describe_conditions(run: Run) -> str:
    """One line about the circumstances of a run."""
    seen = run.conditions
    cache = "O_DIRECT" if seen.is_direct else "page cache"
    return (
        f"{run.kind}: {seen.round_count} rounds, {format_size(seen.size_bytes)} disk, "
        f"{seen.seconds:g} s a steady row, {seen.filesystem}, {cache}, QEMU aio={seen.qemu_aio}"
    )
