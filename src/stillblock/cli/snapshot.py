"""`stillblock snapshot`: create, list, show, receipt, rename, delete, protect, diff."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from stillblock.cli.app import new_app
from stillblock.cli.options import (
    Change,
    Common,
    OptionalVolume,
    SnapshotRef,
    Terms,
    snapshot_of,
    volume_of,
)
from stillblock.cli.output import (
    DEFAULT_TOLD,
    Output,
    age,
    counted,
    extents_rows,
    percent,
    rules_text,
    show_left_out,
    show_terms,
    show_unresolved,
    size_exact,
)
from stillblock.errors import ExitCode, StillblockError, UsageError
from stillblock.extents import intersect, subtract
from stillblock.model import (
    PAUSE_LIMIT_MS_DEFAULT,
    Consistency,
    Quiet,
    Receipt,
    Reference,
    SnapshotInfo,
    SnapshotPurpose,
    SnapshotState,
    format_duration,
    format_instant,
    format_size,
)
from stillblock.operations.groups import GroupRequest, MemberRequest
from stillblock.service.session import open_session

if TYPE_CHECKING:
    from stillblock.config import Config
    from stillblock.operations.narrowing import NarrowingProgress
    from stillblock.operations.snapshots import SnapshotPlan
    from stillblock.service.session import Session

app = new_app("snapshot")

_COMMON: Final = Common()
_CHANGE: Final = Change()
_LOST_SHOWN_MAX: Final = 32
_NOT_FINAL: Final = "narrowing: it selects more than its rules say until they are resolved"
_WHO_WAITED: Final = "writers of selected blocks; others went on"
_CHANGED: Final = "it does not come to its digest: it is not what was written down"


@app.command
def create(
    ref: str,
    /,
    *others: str,
    terms: Terms = (),
    only_these: bool = False,
    pause_limit: Annotated[int, Parameter(name="--pause-limit")] = PAUSE_LIMIT_MS_DEFAULT,
    description: str = "",
    consistency: Consistency | None = None,
    or_barrier: bool | None = None,
    quiet: Quiet | None = None,
    wait: Annotated[bool, Parameter(negative="--no-wait")] = True,
    dry_run: bool = False,
    common: Common = _COMMON,
) -> None:
    """Take a snapshot of VOL@NAME, or of VOL under a name made of the UTC time.

    Of several volumes, served by one process or by none, it takes all at one instant or none. The
    instant is at once. What the rules say of files, swap files and free space is resolved
    afterwards on the frozen view, some seconds; then the snapshot can be read.

    Parameters
    ----------
    ref
        VOL@NAME or VOL.
    others
        More of these: a group, with one instant.
    only_these
        Use only the terms given here, not the volume's standing rules.
    pause_limit
        Longest time in milliseconds that writes may be held; past it nothing is taken.
    description
        A remark to keep with it.
    consistency
        How consistent; default: as `volume set` says. barrier: as after a power cut; idle: at a
        quiet moment; filesystem: with filesystems or the guest frozen; application: with hooks.
    or_barrier
        Where that cannot be reached, take a barrier snapshot that says so, instead of none.
    quiet
        Which writers wait for the instant; default: as `volume set` says. device: all of them;
        selected: those of blocks that the snapshot selects when it is taken.
    wait
        Wait until the rules are resolved; else a serve process goes on by itself.
    dry_run
        Print what it would hold, and take nothing.
    """
    output = Output(common)
    asked = GroupRequest(
        members=tuple(_member(text) for text in (ref, *others)),
        terms=terms,
        only_these=only_these,
        pause_limit_ms=pause_limit,
        description=description,
        consistency=consistency,
        or_barrier=or_barrier,
        quiet=quiet,
    )
    if others:
        create_together(output, common.config(), asked, wait=wait, dry_run=dry_run)
        return
    request, volume = asked.of(asked.members[0].name), asked.members[0].volume
    with open_session(common.config(), volume) as session:
        if dry_run:
            plan = session.plan_snapshot(request)
            output.result("snapshot-plan", plan, lambda out: _render_plan(out, plan))
            for note in plan.notes:
                output.warn(note)
            return
        receipt = session.create_snapshot(request, wait=False)
        if wait:
            receipt = _resolved(output, session, receipt)
    output.result("receipt", receipt, lambda out: _render_created(out, receipt))
    _remark(output, receipt)


def _member(text: str) -> MemberRequest:
    reference = Reference.parse(text)
    if reference.clone or reference.repository or reference.path:
        raise UsageError(f"{text!r} should be VOL or VOL@NAME")
    return MemberRequest(volume=reference.volume, name=reference.snapshot)


def create_together(
    output: Output, config: Config, request: GroupRequest, *, wait: bool, dry_run: bool
) -> None:
    """Take snapshots of several volumes at one instant, and say how it went."""
    from stillblock.service.groups import GroupSession  # noqa: PLC0415 - only for several

    with GroupSession(config, request) as group:
        if dry_run:
            plans = group.plan()

            def render_plans(out: Output) -> None:
                for plan in plans.plans:
                    _render_plan(out, plan)

            output.result("group-plan", plans, render_plans)
            for note in dict.fromkeys(note for plan in plans.plans for note in plan.notes):
                output.warn(note)
            return
        taken = group.create()
        if wait:
            receipts = tuple(
                _resolved(output, group.sessions[r.snapshot.volume], r) for r in taken.receipts
            )
            taken = replace(taken, receipts=receipts)

    def render(out: Output) -> None:
        for receipt in taken.receipts:
            _render_created(out, receipt)
        out.line(f"one instant, group {taken.group.id}")

    output.result("group", taken, render)
    for receipt in taken.receipts:
        _remark(output, receipt)


def _resolved(output: Output, session: Session, receipt: Receipt) -> Receipt:
    """Return the receipt once the snapshot is final; tell how far it is."""
    if receipt.snapshot.is_final:
        return receipt
    text = f"{receipt.snapshot.reference} is taken; resolving its rules"
    with output.working(text) as say:
        return session.wait_final(receipt, told=lambda progress: say(f"{text}{_reading(progress)}"))


def _remark(output: Output, receipt: Receipt) -> None:
    """Say what somebody may not have meant."""
    found = receipt.quiescing
    if found is not None and found.shortfall:
        output.warn(
            f"{receipt.snapshot.reference} is {found.reached}-consistent, "
            f"not {found.asked}: {found.shortfall}"
        )
    if receipt.is_default:
        told = DEFAULT_TOLD.format(volume=receipt.snapshot.volume)
        output.remark(f"nobody gave rules: {told}")


@app.command(name="list")
def list_(volume: OptionalVolume = None, /, *, common: Common = _COMMON) -> int:
    """List the snapshots of a volume, or of every volume that can be opened."""
    output, config = Output(common), common.config()
    found: list[SnapshotInfo] = []
    code = ExitCode.OK
    for name in _volumes(volume, common):
        try:
            with open_session(config, name) as session:
                found += session.list_snapshots().snapshots
        except StillblockError as error:
            if volume is not None:
                raise
            output.warn(str(error))
            code = ExitCode.PARTIAL
    rows = [
        (
            s.reference,
            format_instant(s.created_unix_ns),
            age(s.created_unix_ns),
            format_size(s.selected_bytes),
            format_size(s.preserved_bytes),
            format_size(s.exclusive_bytes),
            _flags(s),
        )
        for s in found
    ]
    columns = ("SNAPSHOT", "TAKEN", ">AGE", ">SELECTED", ">PRESERVED", ">OWN", "NOTES")
    output.result(
        "snapshot-list",
        {"snapshots": found},
        lambda out: out.table(columns, rows, empty="no snapshots yet"),
    )
    return code


@app.command
def show(ref: SnapshotRef, /, *, common: Common = _COMMON) -> None:
    """Show one snapshot."""
    output = Output(common)
    volume, name = snapshot_of(ref)
    with open_session(common.config(), volume) as session:
        info = session.show_snapshot(name)
        uri = next((e.uri for e in session.exports().exports if e.name == info.reference), "")
    output.result(
        "snapshot", {"snapshot": info, "uri": uri}, lambda out: _render_info(out, info, uri)
    )


@app.command
def receipt(ref: SnapshotRef, /, *, extents: bool = False, common: Common = _COMMON) -> None:
    """Show the record of a snapshot: rules, what was left out and why, how consistent, when.

    Parameters
    ----------
    extents
        List every selected extent.
    """
    output = Output(common)
    volume, name = snapshot_of(ref)
    with open_session(common.config(), volume) as session:
        found = session.receipt(name)
    output.result("receipt", found, lambda out: _render_receipt(out, found, with_extents=extents))


@app.command
def rename(ref: SnapshotRef, name: str, /, *, common: Common = _COMMON) -> None:
    """Give a snapshot another name; readers of its export must have left.

    Parameters
    ----------
    name
        The new name.
    """
    output = Output(common)
    volume, old = snapshot_of(ref)
    with open_session(common.config(), volume) as session:
        info = session.rename_snapshot(old, name=name.removeprefix(f"{volume}@"))
    output.result("snapshot", {"snapshot": info}, lambda out: out.line(info.reference))


@app.command
def protect(ref: SnapshotRef, /, *, off: bool = False, common: Common = _COMMON) -> None:
    """Refuse to delete a snapshot from now on.

    Parameters
    ----------
    off
        Allow it again.
    """
    output = Output(common)
    volume, name = snapshot_of(ref)
    with open_session(common.config(), volume) as session:
        info = session.protect_snapshot(name, is_protected=not off)
    state = "protected" if info.is_protected else "not protected"
    output.result(
        "snapshot", {"snapshot": info}, lambda out: out.line(f"{info.reference} is {state}")
    )


@app.command
def delete(
    *refs: str,
    force: Annotated[
        bool, Parameter(help="Also while clients use it or it has clones: both go.")
    ] = False,
    change: Change = _CHANGE,
) -> None:
    """Delete snapshots; what only they needed is freed.

    Parameters
    ----------
    refs
        The snapshots, VOL@SNAP.
    """
    if not refs:
        raise UsageError("say which snapshot to delete: VOL@SNAP")
    output, config = Output(change), change.config()
    targets = [snapshot_of(ref) for ref in refs]
    plans = []
    for volume, name in targets:
        with open_session(config, volume) as session:
            plans.append(session.plan_delete(name))

    def render(out: Output) -> None:
        for plan in plans:
            info = plan.snapshot
            out.line(
                f"{info.reference} of {format_instant(info.created_unix_ns)}: "
                f"frees {format_size(plan.frees_bytes)}{_holders(info)}"
            )
            if plan.clones:
                with_it = "go with it" if force else "keep it, unless forced"
                out.line(f"  its clones {with_it}: {', '.join(plan.clones)}")

    if change.dry_run:
        output.result("snapshot-delete-plan", {"plans": plans}, render)
        return
    if not change.yes and not output.is_json:
        render(output)
    output.confirm(change, f"Delete {counted(len(plans), 'snapshot')}?")
    deleted = []
    for plan in plans:
        with open_session(config, plan.snapshot.volume) as session:
            # By id: a name could mean another snapshot by now.
            deleted.append(session.delete_snapshot(plan.snapshot.id, force=force))

    def render_deleted(out: Output) -> None:
        for gone in deleted:
            out.line(f"deleted {gone.volume}@{gone.name}, freed {format_size(gone.freed_bytes)}")

    output.result("snapshots-deleted", {"deleted": deleted}, render_deleted)


@app.command
def diff(
    ref: str,
    until: str | None = None,
    /,
    *,
    files: bool = False,
    summary: bool = False,
    common: Common = _COMMON,
) -> int:
    """Show what changed since a snapshot or bookmark, until a later one or until now.

    Parameters
    ----------
    ref
        The older instant, VOL@SNAP.
    until
        The later one, VOL@SNAP; default: now.
    files
        Which files changed, in their content or in metadata only, appeared or went, between two
        snapshots; exit code 3 if of some nobody can tell.
    summary
        Print the sum only.
    """
    output = Output(common)
    volume, since = snapshot_of(ref)
    later = None
    if until is not None:
        other, later = snapshot_of(until) if "@" in until else (volume, until)
        if other != volume:
            raise UsageError(f"{ref} and {until} are of different volumes")
    with open_session(common.config(), volume) as session:
        if files:
            from stillblock.cli.file_diff import diff_files  # noqa: PLC0415 - only for files

            if later is None:
                raise UsageError("files are compared between two snapshots; name the later one too")
            return diff_files(output, session, since=since, until=later, is_summary=summary)
        found = session.changes(since=since, until=later)

    def render(out: Output) -> None:
        end = f"{volume}@{found.until}" if found.until else "now"
        if found.extents and not summary:
            out.table((">START", ">END", ">SIZE"), extents_rows(found.extents), empty="")
            out.line()
        out.line(
            f"{format_size(found.changed_bytes)} changed from {volume}@{found.since} to {end}, "
            f"in {counted(len(found.extents), 'extent')}"
        )
        if found.newly_selected and not summary:
            out.line()
            out.table((">START", ">END", ">SIZE"), extents_rows(found.newly_selected), empty="")
            out.line()
        if found.newly_selected:
            out.line(
                f"{format_size(found.newly_selected_bytes)} newly selected: {volume}@{found.since} "
                "did not hold it, so an increment needs all of it"
            )

    output.result("changes", found, render)
    return ExitCode.OK


def _reading(progress: NarrowingProgress) -> str:
    """Return how far it is: filesystems are counted, zeros are looked for in bytes."""
    if not progress.total:
        return ""
    if progress.reading == "zero":
        return f": zeros, {percent(progress.done, progress.total)}"
    return f": {progress.reading}, {progress.done + 1} of {progress.total}"


def _volumes(volume: str | None, common: Common) -> list[str]:
    if volume is not None:
        return [volume_of(volume)]
    from stillblock.operations.registry import open_catalog  # noqa: PLC0415

    with open_catalog(common.config()) as catalog:
        return [entry.name for entry in catalog.volumes()]


def _flags(info: SnapshotInfo) -> str:
    notes = [
        "" if info.consistency == Consistency.BARRIER else info.consistency,
        "LESS CONSISTENT than asked" if info.shortfall else "",
        f"group {info.group.id[:8]}" if info.group is not None else "",
        "protected" if info.is_protected else "",
        "narrowing" if info.state is SnapshotState.NARROWING else "",
        "before a restore" if info.purpose is SnapshotPurpose.SAFETY else "",
        "bookmarked" if info.has_bookmark else "",
        counted(info.clone_count, "clone") if info.clone_count else "",
        f"PARTIAL, LOST {format_size(info.lost_bytes)}" if info.is_partial else "",
        f"DAMAGED {format_size(info.damaged_bytes)}" if info.damaged_bytes else "",
        "DAMAGED" if info.damage else "",
        "UNDECIDED" if info.undecided else "",
        "SUSPECT" if info.is_suspect else "",
    ]
    return ", ".join(filter(None, notes))


def _holders(info: SnapshotInfo) -> str:
    return f", in use by {counted(info.holders, 'reader')}" if info.holders else ""


def _render_plan(out: Output, plan: SnapshotPlan) -> None:
    share = percent(plan.selected_bytes, plan.size_bytes)
    out.line(f"would take {plan.volume}@{plan.name}: {rules_text(plan.rules)}")
    out.line(
        f"selected {format_size(plan.selected_bytes)} of {format_size(plan.size_bytes)} ({share})"
    )
    show_left_out(out, plan.left_out)
    if plan.pending:
        out.line("at most: files, swap and free space are told on the frozen view, afterwards")


def _render_created(out: Output, receipt: Receipt) -> None:
    info = receipt.snapshot
    pause = "" if receipt.pause_ns is None else f", writers waited {_pause(receipt)}"
    out.line(f"{info.reference} taken {format_instant(info.created_unix_ns)}{pause}")
    share = percent(info.selected_bytes, info.size_bytes)
    out.line(
        f"selected {format_size(info.selected_bytes)} of {format_size(info.size_bytes)} ({share})"
    )
    show_left_out(out, receipt.left_out)
    if not info.is_final:
        out.line(f"more is left out soon: `stillblock snapshot receipt {info.reference}`")
    show_unresolved(out, receipt.terms, receipt.failure)


def _render_info(out: Output, info: SnapshotInfo, uri: str) -> None:
    out.pairs(
        (
            ("snapshot", info.reference),
            ("id", info.id),
            ("taken", f"{format_instant(info.created_unix_ns)} ({age(info.created_unix_ns)} ago)"),
            ("disk size", size_exact(info.size_bytes)),
            ("state", str(info.state)),
            ("selected", size_exact(info.selected_bytes)),
            ("preserved", f"{size_exact(info.preserved_bytes)}, shared ones included"),
            ("own", f"{size_exact(info.exclusive_bytes)}, freed by deleting it"),
            ("lost", size_exact(info.lost_bytes) if info.lost_bytes else ""),
            ("damaged", size_exact(info.damaged_bytes) if info.damaged_bytes else ""),
            ("DAMAGED", info.damage),
            ("UNDECIDED", info.undecided),
            ("SUSPECT", info.suspect_reason),
            ("matters less", size_exact(info.low_bytes) if info.low_bytes else ""),
            ("accepted", info.accepted),
            ("one instant with", _others(info)),
            ("consistency", info.consistency),
            ("LESS than asked", info.shortfall),
            ("notes", _flags(info)),
            ("description", info.description),
            ("read it at", uri),
        )
    )
    _render_lost(out, info)


def _render_receipt(out: Output, found: Receipt, *, with_extents: bool) -> None:
    info, at = found.snapshot, found.narrowed_unix_ns
    out.pairs(
        (
            ("snapshot", info.reference),
            ("id", info.id),
            ("instant", format_instant(info.created_unix_ns)),
            ("one instant with", _others(info)),
            ("consistency", _consistency(found)),
            ("writers waited", "" if found.pause_ns is None else _pause(found)),
            ("in flight", "" if found.in_flight is None else f"{found.in_flight} writes, all in"),
            ("who waited", _WHO_WAITED if _is_selected(found) else ""),
            ("durable after", "" if found.commit_ns is None else format_duration(found.commit_ns)),
            ("rules", rules_text(found.rules) + (" (the default)" if found.is_default else "")),
            ("state", "" if info.is_final else _NOT_FINAL),
            (
                "selected",
                f"{size_exact(info.selected_bytes)} in {counted(len(found.extents), 'extent')}",
            ),
            ("left out", size_exact(sum(part.end - part.start for part in found.left_out))),
            ("resolved", "" if at is None else format_instant(at)),
            ("resolved by", ", ".join(f"{k} {v}" for k, v in sorted(found.versions.items()))),
            ("digest", found.digest),
            ("CHANGED", "" if found.is_intact else _CHANGED),
            ("lost", size_exact(info.lost_bytes) if info.lost_bytes else ""),
            ("damaged", size_exact(info.damaged_bytes) if info.damaged_bytes else ""),
            ("DAMAGED", info.damage),
            ("UNDECIDED", info.undecided),
            ("SUSPECT", info.suspect_reason),
            ("accepted", info.accepted),
        )
    )
    if found.terms:
        out.line()
        show_terms(out, found.terms)
    if found.quiescing is not None and found.quiescing.steps:
        out.line()
        out.table(
            ("STEP", "OF", ">TOOK", "RESULT"),
            [
                (
                    str(step.kind),
                    step.what,
                    format_duration(step.duration_ns),
                    step.detail if step.is_ok else f"FAILED: {step.detail}",
                )
                for step in found.quiescing.steps
            ],
            empty="",
        )
    out.line()
    if found.left_out:
        out.line("What is not in this snapshot, and why:")
        show_left_out(out, found.left_out)
    else:
        out.line("Nothing is left out of this snapshot.")
    show_unresolved(out, found.terms, found.failure)
    for note in found.notes:
        out.line(f"note: {note}")
    _render_lost(out, info)
    if with_extents:
        out.line()
        out.table((">START", ">END", ">SIZE"), extents_rows(found.extents), empty="no extents")


def _render_lost(out: Output, info: SnapshotInfo) -> None:
    if not info.lost:
        return
    out.line()
    out.line("PARTIAL: these extents are lost and give errors; everything else is right")
    at_source = intersect(info.lost, info.lost_at_source)
    rows = [(extent, "the store had no room") for extent in subtract(info.lost, at_source)]
    rows += [(extent, "lost at source: the origin could not be read") for extent in at_source]
    rows.sort()
    shown = rows[:_LOST_SHOWN_MAX]
    out.table(
        (">START", ">END", ">SIZE", "WHY"),
        [
            (*words, why)
            for words, (_, why) in zip(extents_rows([e for e, _ in shown]), shown, strict=True)
        ],
        empty="",
    )
    if len(rows) > len(shown):
        out.line(f"and {len(rows) - len(shown)} more; --json lists all")


def _consistency(found: Receipt) -> str:
    if found.quiescing is None or not found.quiescing.shortfall:
        return found.consistency
    return f"{found.consistency}, not {found.quiescing.asked}: {found.quiescing.shortfall}"


def _is_selected(found: Receipt) -> bool:
    return found.quiescing is not None and found.quiescing.is_quiet_selected


def _others(info: SnapshotInfo) -> str:
    """Return the rest of its group, as they were called at the instant, and which group it is."""
    if info.group is None:
        return ""
    prefix = f"{info.volume}@"
    others = [member for member in info.group.members if not member.startswith(prefix)]
    kept = f"; this one {info.group.kept}" if info.group.kept else ""
    return f"{', '.join(others)} (group {info.group.id}{kept})"


def _pause(found: Receipt) -> str:
    return format_duration(found.pause_ns or 0)
