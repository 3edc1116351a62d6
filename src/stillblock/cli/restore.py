"""`stillblock restore`: run, status."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from stillblock.cli.app import new_app
from stillblock.cli.options import (
    Change,
    Common,
    OnlyTerms,
    SnapshotRef,
    VolumeName,
    only_terms,
    snapshot_of,
    volume_of,
)
from stillblock.cli.output import Output, counted, percent
from stillblock.errors import ExitCode
from stillblock.model import PAUSE_LIMIT_MS_DEFAULT, RestoreProgress, format_size
from stillblock.operations.restore import RestorePlan, RestoreRequest
from stillblock.service.session import open_session

if TYPE_CHECKING:
    from stillblock.service.session import Session

app = new_app("restore")

_COMMON: Final = Common()
_CHANGE: Final = Change()
_WAIT_MS: Final = 250
"""How often progress is shown: four times a second looks alive and costs nothing."""
_JSON_WAIT_MS: Final = 1000


@app.command
def run(
    ref: SnapshotRef,
    /,
    *,
    only: OnlyTerms = (),
    pause_limit: Annotated[int, Parameter(name="--pause-limit")] = PAUSE_LIMIT_MS_DEFAULT,
    wait: Annotated[bool, Parameter(negative="--no-wait")] = True,
    change: Change = _CHANGE,
) -> int:
    """Put a snapshot back in place; a safety snapshot taken with it can undo that.

    The disk reads as restored at once, while the copying goes on. Whatever has the disk mounted
    must be stopped first: its memory holds what the disk no longer does.

    Parameters
    ----------
    pause_limit
        Longest time in milliseconds that writes may be held at the instant.
    wait
        Wait until all is copied; --no-wait leaves that to the serve process.
    """
    output = Output(change)
    volume, name = snapshot_of(ref)
    with open_session(change.config(), volume) as session:
        plan = session.plan_restore(
            RestoreRequest(snapshot=name, only=only_terms(only), pause_limit_ms=pause_limit)
        )
        for warning in plan.warnings:
            output.warn(warning)
        if change.dry_run:
            output.result("restore-plan", plan, lambda out: _render(out, plan))
            return ExitCode.OK
        if output.is_json:
            output.json("restore-plan", plan)
        elif not change.yes or not output.is_quiet:
            _render(output, plan)
        output.confirm(change, f"Overwrite these blocks of {volume}?")
        request = RestoreRequest(
            snapshot=plan.snapshot, only=only_terms(only), pause_limit_ms=pause_limit
        )
        started = session.start_restore(request)
        last = _wait(session, output, started) if wait or not session.is_remote else started
    _conclude(output, plan, last)
    return ExitCode.PARTIAL if plan.lost_bytes else ExitCode.OK


@app.command
def status(volume: VolumeName, /, *, common: Common = _COMMON) -> None:
    """Show how far a restore is."""
    output = Output(common)
    with open_session(common.config(), volume_of(volume)) as session:
        found = session.restore_status()
    output.result("restore-progress", found, lambda out: out.line(describe(found)))


def describe(found: RestoreProgress) -> str:
    """Return one line about a restore."""
    if not found.is_running:
        return f"no restore runs on {found.volume}"
    return (
        f"restoring {found.volume}@{found.source}: {format_size(found.done_bytes)} of "
        f"{format_size(found.total_bytes)} ({percent(found.done_bytes, found.total_bytes)})"
    )


def _wait(session: Session, output: Output, started: RestoreProgress) -> RestoreProgress:
    last = started
    if not output.shows_progress:
        while last.is_running:
            if output.is_json:
                output.json("restore-progress", last)
            last = session.wait_restore(timeout_ms=_JSON_WAIT_MS)
        return last
    from rich.progress import Progress  # noqa: PLC0415 - only when somebody watches

    with Progress(console=output.err, transient=True) as progress:
        task = progress.add_task("restoring", total=started.total_bytes)
        while last.is_running:
            progress.update(task, completed=last.done_bytes)
            last = session.wait_restore(timeout_ms=_WAIT_MS)
    return last


def _conclude(output: Output, plan: RestorePlan, last: RestoreProgress) -> None:
    if output.is_json:
        output.json("restore-progress", last)
        return
    if last.is_running:
        output.line(describe(last))
    else:
        output.line(f"{plan.volume} is as it was at {plan.snapshot}")
    safety = last.safety or plan.safety_name
    output.remark(f"undo: stillblock restore run {plan.volume}@{safety}")


def _render(out: Output, plan: RestorePlan) -> None:
    out.line(
        f"restore {plan.volume}@{plan.snapshot}: writes {format_size(plan.write_bytes)} "
        f"in {counted(len(plan.extents), 'extent')}"
    )
    rows = [(p.label, str(len(p.extents)), format_size(p.write_bytes)) for p in plan.parts]
    if rows:
        out.table(("WHERE", ">EXTENTS", ">WRITES"), rows, empty="")
    if plan.unselected_bytes:
        out.line(f"{format_size(plan.unselected_bytes)} are not in the snapshot and stay")
