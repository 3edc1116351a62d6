"""`stillblock volume recover`, `check` and `scrub`: after a fault, or before one is noticed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from stillblock.cli.options import Change, Common, Size, VolumeName, volume_of
from stillblock.cli.output import Output, age, counted, extents_rows, percent
from stillblock.errors import ExitCode, InUseError, RefusedError, StillblockError, UsageError
from stillblock.model import SnapshotState, format_instant, format_size
from stillblock.operations import recovery
from stillblock.operations.verification import (
    SHARE_ALL,
    CheckReport,
    Verdict,
    VerifyKind,
    VerifyProgress,
    VerifyRequest,
)
from stillblock.service.client import find_server
from stillblock.service.session import open_session

if TYPE_CHECKING:
    from stillblock.service.session import Session

_COMMON: Final = Common()
_CHANGE: Final = Change()
_WAIT_MS: Final = 200
"""While somebody watches; a progress bar looks alive at five steps a second."""
_QUIET_WAIT_MS: Final = 2_000
_EXTENTS_SHOWN_MAX: Final = 20
_EXIT: Final = {
    Verdict.OK: ExitCode.OK,
    Verdict.WARNING: ExitCode.PARTIAL,
    Verdict.DAMAGE: ExitCode.DAMAGE,
}


def recover(
    volume: VolumeName,
    /,
    *,
    replay: bool = False,
    discard: bool = False,
    accept_origin: bool = False,
    keep_undecided: bool = False,
    note: str = "",
    change: Change = _CHANGE,
) -> None:
    """Decide about what a killed server left, or about snapshots in doubt.

    Says first which blocks it is about, and how many of them the origin holds otherwise now.

    Parameters
    ----------
    replay
        Put the writes on the origin: clients see every acknowledged write.
    discard
        Drop them, as a power cut would.
    accept_origin
        Take the origin as it is: snapshots that are suspect because others wrote to it are not any
        more. Their receipts keep the doubt and the note.
    keep_undecided
        Keep snapshots of groups that were interrupted, though the store that knows whether the
        groups exist cannot be asked any more. They are exact; the others may be gone.
    note
        Why, with --accept-origin and --keep-undecided.
    """
    decisions = replay + discard + accept_origin + keep_undecided
    if decisions != 1 and not (decisions == 0 and change.dry_run):
        raise UsageError(
            "say one of --replay, --discard, --accept-origin and --keep-undecided",
            hint="--dry-run alone shows what there is to decide about",
        )
    output, config, name = Output(change), change.config(), volume_of(volume)
    if accept_origin:
        with open_session(config, name) as session:
            _accept(session, output, change, note)
        return
    if keep_undecided:
        with open_session(config, name) as session:
            _keep(session, output, change, note)
        return
    if find_server(config, name) is not None:
        raise InUseError(f"{name} is served: there is nothing to recover")
    how: recovery.Decision | None = "replay" if replay else "discard" if discard else None
    plan = recovery.plan_recover(config, name, how=how)
    if how is None or change.dry_run:
        output.result("volume-recover-plan", plan, lambda out: _render_plan(out, plan))
        return
    if plan.left_in == "newer" and replay:
        raise RefusedError(
            f"the write buffer of {name} is of a newer stillblock",
            hint="recover it with that one, or give its writes up with --discard",
        )
    if plan.left_in == "lost" and replay:
        raise RefusedError(
            f"the write buffer of {name} is gone: there is nothing to replay",
            hint="--discard accepts that acknowledged writes that were not flushed are lost",
        )
    if _has_question(plan):
        if not change.yes and not output.is_json:
            _render_plan(output, plan)
        output.confirm(change, _question(plan))
    done = recovery.recover_volume(config, plan, how=how)

    def render(out: Output) -> None:
        what = {"replay": "written to", "discard": "dropped for"}[how]
        if plan.slots:
            out.line(f"{counted(plan.slots, 'buffered write')} {what} {plan.origin}")
        out.line(f"released {done.volume}: {done.origin} is complete, any tool can use it")

    output.result("volume-released", done, render)
    if plan.is_touched:
        output.warn(
            f"others wrote to {plan.origin} after the server was killed: snapshots are suspect; "
            f"compare them, then `stillblock volume recover {name} --accept-origin`"
        )


def _has_question(plan: recovery.RecoveryPlan) -> bool:
    """Whether something is lost or overwritten that nobody can bring back."""
    loses = plan.how == "discard" and (plan.slots > 0 or plan.left_in in {"lost", "newer"})
    return loses or (plan.is_touched and plan.differing_bytes > 0)


def _question(plan: recovery.RecoveryPlan) -> str:
    if plan.left_in != "buffer":
        return f"Accept that writes {plan.volume} acknowledged and nobody flushed are lost?"
    if plan.how == "discard":
        return f"Give up {format_size(plan.write_bytes)} that were acknowledged?"
    return f"Write {format_size(plan.differing_bytes)} over what {plan.origin} holds now?"


def _render_plan(out: Output, plan: recovery.RecoveryPlan) -> None:
    if plan.left_as == "closed":
        out.line(f"{plan.volume} was closed: there is nothing to recover")
        return
    if plan.left_as == "interrupted":
        out.line(f"{plan.volume} was not closed before the machine stopped: its buffer is gone")
        return
    known = {
        "nothing": "no write buffer outlived it: every acknowledged write is on the origin",
        "lost": "its write buffer is gone: acknowledged writes that were not flushed are lost",
        "newer": "its write buffer is of a newer stillblock",
        "buffer": f"{counted(plan.slots, 'write')} to {format_size(plan.write_bytes)} are in its "
        "write buffer",
    }[plan.left_in]
    out.line(f"the server of {plan.volume} was killed; {known}")
    if plan.left_in != "buffer":
        return
    touched = "was written by others since" if plan.is_touched else "was not written since"
    out.line(f"{plan.origin} {touched}; last alive {format_instant(plan.alive_unix_ns)}")
    out.line(
        f"of these blocks, {format_size(plan.differing_bytes)} are otherwise on the origin now"
    )
    if plan.differing:
        out.table(
            (">START", ">END", ">SIZE"), extents_rows(plan.differing[:_EXTENTS_SHOWN_MAX]), empty=""
        )
    if len(plan.differing) > _EXTENTS_SHOWN_MAX:
        out.line(f"and {len(plan.differing) - _EXTENTS_SHOWN_MAX} more; --json lists all")


def _accept(session: Session, output: Output, change: Change, note: str) -> None:
    listed = session.list_snapshots().snapshots
    doubted = [s for s in listed if s.is_suspect]

    def render(out: Output) -> None:
        if not doubted:
            out.line(f"no snapshot of {session.volume} is suspect")
        for snapshot in doubted:
            out.line(f"{snapshot.reference}: {snapshot.suspect_reason}")

    if change.dry_run:
        output.result("origin-accept-plan", {"snapshots": doubted}, render)
        return
    if doubted:
        if not change.yes and not output.is_json:
            render(output)
        output.confirm(change, f"Take {counted(len(doubted), 'snapshot')} as right?")
    done = session.accept_origin(note=note)

    def render_done(out: Output) -> None:
        out.line(
            f"{session.volume}: {counted(len(done.snapshots), 'snapshot')} suspect no more"
            + (f", {len(done.still_suspect)} still" if done.still_suspect else "")
        )

    output.result("origin-accepted", done, render_done)


def _keep(session: Session, output: Output, change: Change, note: str) -> None:
    # Whoever lists asks once more.
    undecided = [s for s in session.list_snapshots().snapshots if s.undecided]

    def render(out: Output) -> None:
        if not undecided:
            out.line(f"no snapshot of {session.volume} is undecided")
        for snapshot in undecided:
            out.line(f"{snapshot.reference}: {snapshot.undecided}")

    if change.dry_run:
        output.result("keep-undecided-plan", {"snapshots": undecided}, render)
        return
    if undecided:
        if not change.yes and not output.is_json:
            render(output)
        what = counted(len(undecided), "snapshot")
        output.confirm(change, f"Keep {what}, whatever became of the others?")
    done = session.keep_undecided(note=note)

    def render_done(out: Output) -> None:
        out.line(f"{session.volume}: {counted(len(done.snapshots), 'snapshot')} kept")

    output.result("undecided-kept", done, render_done)


def check(
    volume: VolumeName,
    /,
    *,
    data: bool = False,
    data_subset: Annotated[
        str | None, Parameter(help="Read this share of it, another one each time: 5%.")
    ] = None,
    common: Common = _COMMON,
) -> int:
    """Check a volume's store, served or not: what is damaged, which snapshots it concerns.

    Looks at the journal, at every header and both copies of all records. Exit code 0: nothing is
    wrong; 3: somebody should look; 4: something is gone.

    Parameters
    ----------
    data
        Read all preserved content too, and compare it with its checksums.
    """
    output, name = Output(common), volume_of(volume)
    share = _share(data_subset) if data_subset is not None else SHARE_ALL
    with open_session(common.config(), name) as session:
        progress = None
        if data or data_subset is not None:
            request = VerifyRequest(share=share, purpose=VerifyKind.CHECK)
            progress = _run(session, output, session.start_verification(request))
        report = session.check_structure()
    output.result(
        "volume-check",
        {"report": report, "content": progress},
        lambda out: _render_report(out, report, progress),
    )
    if progress is not None and (progress.failure or progress.is_cancelled):
        why = progress.failure or "somebody cancelled it"
        output.warn(f"not all content was read: {why}")
        return max(_EXIT[report.verdict], ExitCode.PARTIAL)
    return _EXIT[report.verdict]


def scrub(
    volume: VolumeName,
    /,
    *,
    rate: Annotated[Size | None, Parameter(help="Read no more than this a second: 50MiB.")] = None,
    wait: Annotated[bool, Parameter(help="Wait for its end, and say what it found.")] = False,
    cancel: Annotated[bool, Parameter(help="Stop the one that runs.")] = False,
    common: Common = _COMMON,
) -> int:
    """Read all preserved content of a served volume in the background, and verify it.

    `stillblock status` shows how far it is, `events` what it found, `volume show` when all was last
    verified.
    """
    output, config, name = Output(common), common.config(), volume_of(volume)
    if find_server(config, name) is None:
        raise RefusedError(
            f"{name} is not served: there is no background to work in",
            hint=f"`stillblock volume check {name} --data` reads it now",
        )
    with open_session(config, name) as session:
        if cancel:
            last = session.cancel_verification()
        else:
            last = session.start_verification(VerifyRequest(bytes_per_s=rate))
            if wait:
                last = _run(session, output, last)
    output.result("volume-scrub", last, lambda out: out.line(describe(last)))
    if last.failure:
        output.warn(last.failure)
        return ExitCode.PARTIAL
    return ExitCode.DAMAGE if last.damaged_blocks else ExitCode.OK


def describe(found: VerifyProgress) -> str:
    """Return one line about a verification."""
    if found.purpose is VerifyKind.NONE:
        return f"nothing of {found.volume} was verified since it was opened"
    how = "runs" if found.is_running else "cancelled" if found.is_cancelled else "ended"
    whole = found.total_bytes == 0
    share = "100 %" if whole else percent(found.done_bytes, found.total_bytes)
    damaged = counted(found.damaged_blocks, "damaged block")
    return (
        f"{found.purpose} of {found.volume} {how}: {format_size(found.done_bytes)} of "
        f"{format_size(found.total_bytes)} read ({share}), {damaged}"
    )


def _share(text: str) -> int:
    number = text.strip().removesuffix("%")
    try:
        share = round(float(number) * SHARE_ALL / 100)
    except ValueError:
        share = 0
    if not text.strip().endswith("%") or not 0 < share <= SHARE_ALL:
        raise UsageError(f"{text!r} is no share of the content; write 5%")
    return share


def _run(session: Session, output: Output, started: VerifyProgress) -> VerifyProgress:
    """Wait for the end; an interruption cancels it, and what was found so far is kept."""
    try:
        return _watch(session, output, started)
    except KeyboardInterrupt:
        try:
            session.cancel_verification()
        except StillblockError as error:
            output.warn(str(error))
        raise


def _watch(session: Session, output: Output, started: VerifyProgress) -> VerifyProgress:
    last = started
    if not output.shows_progress:
        while last.is_running:
            last = session.wait_verification(timeout_ms=_QUIET_WAIT_MS)
            if output.is_json:
                output.json("verification-progress", last)
        return last
    from rich.progress import Progress  # noqa: PLC0415 - only when somebody watches

    with Progress(console=output.err, transient=True) as progress:
        task = progress.add_task("verifying", total=started.total_bytes or None)
        while last.is_running:
            progress.update(task, completed=last.done_bytes)
            last = session.wait_verification(timeout_ms=_WAIT_MS)
    return last


def _render_report(out: Output, report: CheckReport, progress: VerifyProgress | None) -> None:
    for finding in report.findings:
        out.line(f"{'LOST' if finding.is_lost else 'one copy left'}: {finding.message}")
    for found in report.snapshots:
        reference = f"{report.volume}@{found.snapshot}"
        out.line(f"{reference}: {found.state}" + (f", {found.reason}" if found.reason else ""))
        extents = found.damaged if found.state is SnapshotState.DAMAGED else found.lost
        if extents:
            out.table(
                (">START", ">END", ">SIZE"), extents_rows(extents[:_EXTENTS_SHOWN_MAX]), empty=""
            )
        if len(extents) > _EXTENTS_SHOWN_MAX:
            out.line(f"and {len(extents) - _EXTENTS_SHOWN_MAX} more; --json lists all")
    for clone in report.clones:
        out.line(f"clone {clone.reference}: {clone.state}, {clone.reason}")
    for advice in report.advice:
        out.line(advice)
    if progress is not None:
        out.line(describe(progress))
    words = {
        Verdict.OK: "nothing is wrong",
        Verdict.WARNING: "nothing new is gone; see above",
        Verdict.DAMAGE: "DAMAGED; see above",
    }
    read = "" if progress else " (content was not read: --data)"
    out.line(f"{report.volume}: {words[report.verdict]}{read}")


def verified_text(unix_ns: int | None) -> str:
    """Return when all content was last verified."""
    if unix_ns is None:
        return "never"
    return f"{format_instant(unix_ns)} ({age(unix_ns)} ago)"
