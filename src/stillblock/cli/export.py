"""The command export: a snapshot or clone as an image."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Parameter

from stillblock.cli.options import Common
from stillblock.cli.output import Output, percent
from stillblock.errors import ExitCode, StillblockError, UsageError
from stillblock.extents import clip, total_bytes
from stillblock.model import Reference, format_size
from stillblock.operations.exporting import (
    Exported,
    RawImage,
    copy_data,
    plan_export,
    stream,
)
from stillblock.service.qemu_images import FORMATS, QemuImage
from stillblock.service.reading import open_reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from stillblock.operations.exporting import ExportPlan
    from stillblock.operations.held import Held

_COMMON: Final = Common()
_TELL_S: Final = 0.2
_RAW: Final = frozenset({"raw", "img"})
_STANDARD_OUTPUT: Final = "-"

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
    with open_reference(common.config(), reference) as held:
        plan = plan_export(held, allow_lost=allow_lost)
        if dry_run:
            output.result("export-plan", plan, lambda out: out.line(f"would copy {_words(plan)}"))
            return ExitCode.OK
        if target == _STANDARD_OUTPUT:
            _to_standard_output(output, held, plan)
            return ExitCode.PARTIAL if plan.lost else ExitCode.OK
        path = Path(target).expanduser().absolute()
        if not path.parent.is_dir():
            raise UsageError(f"{path.parent} is no directory that is there")
        verified = 0
        with output.working(f"exporting {held.reference}") as tell:
            told = _progress(held.reference, tell)
            if chosen == "raw":
                verified = _to_raw(output, held, plan, path, resume=resume, told=told)
            else:
                with QemuImage(path, plan, form=chosen) as image:
                    copy_data(held, plan, image, told=told)
                    image.finish()
        done = Exported(
            reference=held.reference,
            target=str(path),
            format=chosen,
            size_bytes=plan.size_bytes,
            data_bytes=plan.data_bytes,
            left_out_bytes=plan.left_out_bytes,
            lost_bytes=total_bytes(plan.lost),
            verified_bytes=verified,
        )
    output.result("exported", done, lambda out: _render(out, done, plan))
    return ExitCode.PARTIAL if plan.lost else ExitCode.OK


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


def _to_raw(
    output: Output,
    held: Held,
    plan: ExportPlan,
    path: Path,
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
        image.finish()
    except BaseException:
        if image.close():
            with suppress(StillblockError):
                output.warn(f"{image.partial} stays; the same command with --resume goes on")
        raise
    image.close()
    return total_bytes(clip(plan.data, start=0, end=start))


def _to_standard_output(output: Output, held: Held, plan: ExportPlan) -> None:
    if sys.stdout.isatty():
        raise UsageError("an image is nothing for a terminal; redirect it")
    if output.is_json:
        raise UsageError("standard output has the image; --json needs a file to export to")
    stream(held, plan, sys.stdout.buffer.write)
    sys.stdout.buffer.flush()
    output.remark(f"exported {_words(plan)}")


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
    if plan.lost:
        words.append(f"{format_size(total_bytes(plan.lost))} are holes, LOST")
    return "; ".join(words)


def _render(out: Output, done: Exported, plan: ExportPlan) -> None:
    again = (
        f", {format_size(done.verified_bytes)} of them were there" if done.verified_bytes else ""
    )
    out.line(f"{done.target}: {_words(plan)}{again}")
