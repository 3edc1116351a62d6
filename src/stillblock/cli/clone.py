"""`stillblock clone`: create, list, show, reset, delete, promote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

from cyclopts import Parameter, Token

from stillblock.cli.app import new_app
from stillblock.cli.options import Change, CloneRef, Common, VolumeName, clone_of, volume_of
from stillblock.cli.output import Output, age, percent, size_exact
from stillblock.errors import ExitCode, StillblockError, UsageError
from stillblock.model import (
    CloneInfo,
    CloneState,
    Reference,
    format_instant,
    format_size,
    parse_duration,
)
from stillblock.operations.clones import CloneRequest
from stillblock.operations.promotion import (
    ImageWriteError,
    PromoteProgress,
    PromoteRequest,
)
from stillblock.service.session import Session, open_session

app = new_app("clone")

_COMMON: Final = Common()
_CHANGE: Final = Change()
_TELL_MS: Final = 1000


def _to_seconds(_: type, tokens: Sequence[Token]) -> int:
    try:
        return parse_duration(tokens[0].value)
    except UsageError as error:
        raise ValueError(str(error)) from error


@app.command
def create(
    ref: Annotated[str, Parameter(help="What to make, VOL@SNAP+CLONE; or VOL@SNAP: by the time.")],
    /,
    *,
    lifetime: Annotated[
        int | None,
        Parameter(
            name="--for",
            converter=_to_seconds,
            n_tokens=1,
            accepts_keys=False,
            help="It goes by itself after this time, once nobody uses it: 90s, 30m, 2h, 7d.",
        ),
    ] = None,
    description: str = "",
    common: Common = _COMMON,
) -> None:
    """Make a writable view on a snapshot; neither the snapshot nor the disk ever change with it.

    A served volume exports it as VOL@SNAP+CLONE at once. It costs some kilobytes until it is
    written.

    Parameters
    ----------
    description
        A note to find again in lists.
    """
    output = Output(common)
    reference = Reference.parse(ref)
    if reference.snapshot is None or reference.repository or reference.path:
        raise UsageError(f"{ref!r} names no snapshot to clone; write VOL@SNAP+CLONE")
    request = CloneRequest(
        snapshot=reference.snapshot,
        name=reference.clone,
        lifetime_s=lifetime,
        description=description,
    )
    with open_session(common.config(), reference.volume) as session:
        made = session.create_clone(request)
        uri = _uri(session, made)

    def render(out: Output) -> None:
        out.line(f"clone {made.reference} of {format_size(made.size_bytes)}{_until(made)}")
        out.line(uri or f"`stillblock serve {made.volume}` offers it to clients")

    output.result("clone", {"clone": made, "uri": uri}, render)


@app.command(name="list")
def list_(volume: VolumeName, /, *, common: Common = _COMMON) -> int:
    """List the clones of a volume and what they take (exit code 3: one of them cannot be used)."""
    output = Output(common)
    with open_session(common.config(), volume_of(volume)) as session:
        found = session.list_clones()
    rows = [
        (
            c.reference,
            age(c.created_unix_ns),
            "" if c.expires_unix_ns is None else format_instant(c.expires_unix_ns),
            format_size(c.own_bytes),
            format_size(c.stored_bytes),
            str(c.connections),
            _notes(c),
        )
        for c in found.clones
    ]
    columns = ("CLONE", ">AGE", "EXPIRES", ">WRITTEN", ">STORED", ">CLIENTS", "NOTES")
    output.result("clone-list", found, lambda out: out.table(columns, rows, empty="no clones yet"))
    is_ok = all(c.state is CloneState.OK for c in found.clones)
    return ExitCode.OK if is_ok else ExitCode.PARTIAL


@app.command
def show(ref: CloneRef, /, *, common: Common = _COMMON) -> None:
    """Show one clone."""
    output = Output(common)
    volume, snapshot, clone = clone_of(ref)
    with open_session(common.config(), volume) as session:
        info = session.show_clone(snapshot, clone)
        uri = _uri(session, info)

    def render(out: Output) -> None:
        expires = info.expires_unix_ns
        made = format_instant(info.created_unix_ns)
        out.pairs(
            (
                ("clone", info.reference),
                ("id", info.id),
                ("made", f"{made} ({age(info.created_unix_ns)} ago)"),
                ("expires", "" if expires is None else format_instant(expires)),
                ("disk size", size_exact(info.size_bytes)),
                ("written", size_exact(info.own_bytes)),
                ("stored", f"{size_exact(info.stored_bytes)}, freed by deleting it"),
                ("clients", str(info.connections) if info.connections else ""),
                ("state", str(info.state)),
                ("WRONG", info.reason),
                ("description", info.description),
                ("use it at", uri),
            )
        )

    output.result("clone", {"clone": info, "uri": uri}, render)


@app.command
def reset(
    ref: CloneRef,
    /,
    *,
    force: Annotated[bool, Parameter(help="Also while clients use it: they are cut.")] = False,
    change: Change = _CHANGE,
) -> None:
    """Forget what was written to a clone: it is its snapshot again."""
    output = Output(change)
    volume, snapshot, clone = clone_of(ref)
    with open_session(change.config(), volume) as session:
        info = session.show_clone(snapshot, clone)
        what = f"{info.reference}: {format_size(info.own_bytes)} written to it"
        if change.dry_run:
            _planned(output, "clone-reset-plan", info, f"would reset {what}")
            return
        output.confirm(change, f"Reset {what}?")
        # By id: a name could mean another clone by now.
        done = session.reset_clone(snapshot, info.id, force=force)
    output.result(
        "clone-reset",
        done,
        lambda out: out.line(
            f"reset {done.clone.reference}, freed {format_size(done.freed_bytes)}"
        ),
    )


@app.command
def delete(
    ref: CloneRef,
    /,
    *,
    force: Annotated[bool, Parameter(help="Also while clients use it: they are cut.")] = False,
    change: Change = _CHANGE,
) -> None:
    """Delete a clone and what was written to it."""
    output = Output(change)
    volume, snapshot, clone = clone_of(ref)
    with open_session(change.config(), volume) as session:
        info = session.show_clone(snapshot, clone)
        what = f"{info.reference}: frees {format_size(info.stored_bytes)}"
        if change.dry_run:
            _planned(output, "clone-delete-plan", info, f"would delete {what}")
            return
        output.confirm(change, f"Delete {what}?")
        done = session.delete_clone(snapshot, info.id, force=force)
    output.result(
        "clone-deleted",
        done,
        lambda out: out.line(
            f"deleted {done.clone.reference}, freed {format_size(done.freed_bytes)}"
        ),
    )


@app.command
def promote(
    ref: CloneRef,
    /,
    *,
    to: Annotated[Path, Parameter(help="The image to make; it must not exist.")],
    force: Annotated[bool, Parameter(help="Also while clients use it: they are cut.")] = False,
    common: Common = _COMMON,
) -> int:
    """Make a clone a disk of its own: a new raw image with all that it holds.

    The clone stays, and is not offered to clients meanwhile. What neither its snapshot selects nor
    was written since is a hole in the image: exit code 3 then.
    """
    output = Output(common)
    volume, snapshot, clone = clone_of(ref)
    path = str(to.expanduser().absolute())
    request = PromoteRequest(snapshot=snapshot, clone=clone, path=path, force=force)
    with open_session(common.config(), volume) as session:
        try:
            session.start_promotion(request)
            with output.working(f"copying {ref}") as tell:
                progress = session.wait_promotion(timeout_ms=_TELL_MS)
                while progress.is_running:
                    share = percent(progress.done_bytes, progress.total_bytes)
                    tell(f"copying {progress.clone}: {share}")
                    progress = session.wait_promotion(timeout_ms=_TELL_MS)
        except KeyboardInterrupt:
            _break_off(session)
            raise
    if not progress.is_done:
        raise ImageWriteError(f"{progress.clone} was not copied: {progress.failure}")
    output.result("clone-promoted", progress, lambda out: _render_promoted(out, progress))
    return ExitCode.PARTIAL if progress.left_out_bytes else ExitCode.OK


def _break_off(session: Session) -> None:
    try:
        session.cancel_promotion()
    except StillblockError:
        pass  # it had ended


def _render_promoted(out: Output, progress: PromoteProgress) -> None:
    out.line(f"{progress.path} is what {progress.clone} is: {format_size(progress.done_bytes)}")
    if progress.left_out_bytes:
        out.line(
            f"{format_size(progress.left_out_bytes)} are holes: the snapshot does not hold them"
        )


def _planned(output: Output, kind: str, info: CloneInfo, text: str) -> None:
    output.result(kind, {"clone": info}, lambda out: out.line(text))


def _uri(session: Session, info: CloneInfo) -> str:
    if not session.is_remote:
        return ""
    return next((e.uri for e in session.exports().exports if e.name == info.reference), "")


def _until(info: CloneInfo) -> str:
    expires = info.expires_unix_ns
    return "" if expires is None else f", until {format_instant(expires)}"


def _notes(info: CloneInfo) -> str:
    state = {CloneState.OK: "", CloneState.FAILED: "FAILED", CloneState.DAMAGED: "DAMAGED"}
    notes = (state[info.state], info.reason, info.description)
    return ", ".join(filter(None, notes))
