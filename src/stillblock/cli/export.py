"""The command export: a snapshot or clone as an image."""

from __future__ import annotations

import signal
import stat
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Parameter

from stillblock.cli.options import Common
from stillblock.cli.output import Output, percent, warn_if_suspect, write_content
from stillblock.errors import ExitCode, InUseError, RefusedError, StillblockError, UsageError
from stillblock.extents import clip, total_bytes
from stillblock.model import Reference, format_size
from stillblock.operations import origins
from stillblock.operations.exporting import (
    Exported,
    ExportError,
    RawImage,
    copy_data,
    plan_export,
    stream,
)
from stillblock.service.qemu_images import FORMATS, QemuImage
from stillblock.service.reading import held as opened
from stillblock.service.session import open_session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stillblock.operations.exporting import ExportPlan
    from stillblock.operations.held import Held
    from stillblock.service.session import Session

_COMMON: Final = Common()
_TELL_S: Final = 0.2
_RAW: Final = frozenset({"raw", "img"})
_STANDARD_OUTPUT: Final = "-"
_STDOUT: Final = Path("/proc/self/fd/1")
_SECTOR_BYTES: Final = 512
_LEAVE_S: Final = 1.0
"""A server takes a moment to see that a client left."""

Form = Literal["raw", "qcow2", "vmdk", "vdi", "vhdx"]


def export(
    ref: Annotated[str, Parameter(help="VOL@SNAP or VOL@SNAP+CLONE.")],
    target: Annotated[
        str,
        Parameter(
            help="OUT.raw, OUT.img, OUT.qcow2, or - for standard output (raw).",
            allow_leading_hyphen=True,
        ),
    ],
    /,
    *,
    form: Annotated[
        Form | None,
        Parameter(name="--format", help="The format, if the name does not end with it."),
    ] = None,
    resume: bool = False,
    allow_lost: bool = False,
    dry_run: bool = False,
    common: Common = _COMMON,
) -> int:
    """Write a snapshot or clone as an image of its own.

    Only data is written: what the snapshot does not select, and what is zeros, are holes. The image
    has its name once it is whole and durable; until then it is OUT.partial. What is lost is an
    error. Formats other than raw are written by QEMU (qemu-utils).

    Parameters
    ----------
    resume
        Go on with a raw export that was broken off. Beside OUT.partial lies a list of its steps of
        64 MiB with their digests; each step is read again, and all from the first one on that does
        not come to its digest is exported again. It is refused if it is of another instant. A
        clone, which may have changed, cannot be resumed.
    allow_lost
        Export also what has lost blocks, with holes in their place: exit code 3.
    dry_run
        Print how much would be copied, and do nothing.
    """
    output = Output(common)
    reference = Reference.parse(ref)
    if reference.path is not None:
        raise UsageError(
            f"{ref!r} is a file; an image is of a whole disk", hint="`cp` copies files"
        )
    chosen = _format_of(target, form)
    if resume and (chosen != "raw" or target == _STANDARD_OUTPUT):
        raise UsageError("only an export to a raw image can be resumed")
    path = None if target == _STANDARD_OUTPUT else Path(target).expanduser().absolute()
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no directory that is there")
    if path is None and not dry_run:
        _check_standard_output(output)
    if reference.repository is not None:
        raise UsageError(f"{reference}: backups are not read yet; name a snapshot")
    with _cleaning_up(), open_session(common.config(), reference.volume) as session:
        check_place(session, _STDOUT if path is None else path)
        if reference.snapshot is not None:
            # By id from here on: a name could mean another snapshot by then.
            instant = session.receipt(reference.snapshot).snapshot.id
            reference = replace(reference, snapshot=instant)
        standstill = Standstill(session, reference)
        with opened(session, reference) as held:
            warn_if_suspect(output, held)
            plan = plan_export(held, allow_lost=allow_lost)
            if dry_run:
                output.result(
                    "export-plan", plan, lambda out: out.line(f"would copy {_words(plan)}")
                )
                return ExitCode.OK
            if path is None:
                stream(held, plan, write_content)
                standstill.check()
                output.remark(f"exported {_words(plan)}")
                return ExitCode.PARTIAL if plan.is_doubtful else ExitCode.OK
            with output.working(f"exporting {held.reference}") as tell:
                verified = _to_file(
                    output, held, plan, path, standstill, form=chosen, resume=resume, tell=tell
                )
    done = Exported(
        reference=plan.reference,
        target=str(path),
        format=chosen,
        size_bytes=plan.size_bytes,
        data_bytes=plan.data_bytes,
        left_out_bytes=plan.left_out_bytes,
        lost_bytes=total_bytes(plan.lost),
        verified_bytes=verified,
        suspect_reason=plan.suspect_reason,
    )
    output.result("exported", done, lambda out: _render(out, done, plan))
    return ExitCode.PARTIAL if plan.is_doubtful else ExitCode.OK


@contextmanager
def _cleaning_up() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does: what was begun is undone or can be resumed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_place(session: Session, path: Path) -> None:
    """Raise `RefusedError` if writing there would harm the volume: its store, its own disk."""
    volume = session.show_volume()
    origin = Path(volume.origin)
    if path.exists():
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            return  # a pipe, a terminal
        if origins.key_of(path) in origins.footprint(origin, origins.System()).reach:
            raise RefusedError(f"{path.resolve()} is the disk of {volume.name} itself")
        if stat.S_ISBLK(mode):
            return
    path = path.resolve()
    if path.is_relative_to(Path(volume.store).resolve()):
        raise RefusedError(
            f"{path} lies in the store of {volume.name}", hint="choose another directory"
        )
    origins.refuse_on_volume(path.parent, origin, origins.System(), what="image")


class Standstill:
    """Sees that nobody uses a clone while it is copied: what is written meanwhile would be torn."""

    def __init__(self, session: Session, reference: Reference) -> None:
        """Look before it is opened; raise `InUseError` if somebody uses it now."""
        self._session = session
        self._reference = reference
        self._own_bytes = 0
        # Nobody else can use what is open in this process.
        if reference.clone is not None and session.is_remote:
            self._own_bytes = self._look(clients=0)

    def check(self) -> None:
        """Look before the image gets its name; raise `ExportError` if the clone was used."""
        if self._reference.clone is None or not self._session.is_remote:
            return
        try:
            is_same = self._look(clients=1) == self._own_bytes
        except InUseError as error:
            raise ExportError(f"{error.message}: the image is of no one moment") from error
        if not is_same:
            raise ExportError(
                f"{self._reference.clone} was written meanwhile: the image is of no one moment"
            )

    def _look(self, *, clients: int) -> int:
        """Return what was written to it; `clients` of its connections are ours."""
        snapshot, clone = self._reference.snapshot, self._reference.clone
        assert snapshot is not None, "a clone is of a snapshot"
        assert clone is not None, "asked of clones only"
        deadline = time.monotonic() + _LEAVE_S
        while (info := self._session.show_clone(snapshot, clone)).connections > clients:
            if time.monotonic() > deadline:
                raise InUseError(
                    f"{info.reference} is in use by {info.connections - clients} clients",
                    hint="unmount or disconnect it, or use `clone promote --force`",
                )
            time.sleep(_TELL_S / 10)
        return info.own_bytes


def _format_of(target: str, form: Form | None) -> str:
    if target == _STANDARD_OUTPUT:
        if form not in {None, "raw"}:
            raise UsageError(f"standard output takes a raw image only, not {form}")
        return "raw"
    if form is not None:
        return form
    ending = Path(target).suffix.removeprefix(".").lower()
    if ending in _RAW:
        return "raw"
    if ending in FORMATS:
        return ending
    raise UsageError(
        f"{target!r} does not end with a format ({', '.join((*sorted(_RAW), *FORMATS))})",
        hint="say which: --format raw",
    )


def _to_file(
    output: Output,
    held: Held,
    plan: ExportPlan,
    path: Path,
    standstill: Standstill,
    *,
    form: str,
    resume: bool,
    tell: Callable[[str], None],
) -> int:
    """Write an image; return how much of it was there already."""
    told = _progress(held.reference, tell)
    if form == "raw":
        return _to_raw(output, held, plan, path, standstill, resume=resume, told=told)
    if more := -plan.size_bytes % _SECTOR_BYTES:
        output.warn(f"{form} counts in sectors: the image is {more} bytes larger than the disk")
    with QemuImage(path, plan, form=form) as image:
        copy_data(held, plan, image, told=told)
        standstill.check()
        image.finish()
    return 0


def _to_raw(
    output: Output,
    held: Held,
    plan: ExportPlan,
    path: Path,
    standstill: Standstill,
    *,
    resume: bool,
    told: Callable[[int, int], None],
) -> int:
    """Write a raw image; return how much of it was there already."""
    snapshot = held.receipt.snapshot
    instant = None if held.is_clone else f"{snapshot.id} {snapshot.created_unix_ns}"
    image = RawImage(path, plan, instant=instant)
    try:
        start = image.open(resume=resume)
        copy_data(held, plan, image, start=start, told=told)
        standstill.check()
        image.finish()
    except BaseException:
        if image.close():
            with suppress(StillblockError):
                output.warn(f"{image.partial} stays; the same command with --resume goes on")
        raise
    image.close()
    return total_bytes(clip(plan.data, start=0, end=start))


def _check_standard_output(output: Output) -> None:
    if sys.stdout.isatty():
        raise UsageError("an image is nothing for a terminal; redirect it")
    if output.is_json:
        raise UsageError("standard output has the image; --json needs a file to export to")


def _progress(reference: str, tell: Callable[[str], None]) -> Callable[[int, int], None]:
    next_s = 0.0

    def told(done: int, total: int) -> None:
        nonlocal next_s
        if (now := time.monotonic()) >= next_s:
            next_s = now + _TELL_S
            tell(f"exporting {reference}: {percent(done, total)} of {format_size(total)}")

    return told


def _words(plan: ExportPlan) -> str:
    data, size = format_size(plan.data_bytes), format_size(plan.size_bytes)
    words = [f"{data} of data of {plan.reference}, {size} large"]
    if plan.left_out_bytes:
        words.append(f"{format_size(plan.left_out_bytes)} are holes, left out by rules")
    if plan.suspect_reason:
        words.append("SUSPECT")
    if plan.lost:
        words.append(f"{format_size(total_bytes(plan.lost))} are holes, LOST")
    return "; ".join(words)


def _render(out: Output, done: Exported, plan: ExportPlan) -> None:
    again = (
        f", {format_size(done.verified_bytes)} of them were there" if done.verified_bytes else ""
    )
    out.line(f"{done.target}: {_words(plan)}{again}")
