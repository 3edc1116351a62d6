"""`stillblock mount`, `unmount`, `attach` and `detach`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from stillblock.cli.options import Common, volume_of
from stillblock.cli.output import Output
from stillblock.errors import ExitCode, UsageError
from stillblock.model import Reference, format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stillblock.operations.mounts import MountInfo
    from stillblock.service.mounting import Mounted

_COMMON: Final = Common()
_FORCE: Final = Parameter(help="Although it is in use: its users get errors from then on.")
_READ_ONLY: Final = Parameter(help="A clone or live disk, too, is not to be written.")
_PARTITION: Final = Parameter(
    help="Which filesystem: a partition's number, VG/LV, a label or a uuid; default: the only one."
)


def mount(
    ref: Annotated[
        str | None,
        Parameter(help="VOL@SNAP or VOL@SNAP+CLONE; with --images VOL. Without it: list mounts."),
    ] = None,
    directory: Annotated[Path | None, Parameter(help="Where: an empty directory.")] = None,
    /,
    *,
    images: bool = False,
    partition: Annotated[str | None, _PARTITION] = None,
    writable: bool = False,
    replay: bool = False,
    read_only: Annotated[bool, _READ_ONLY] = False,
    common: Common = _COMMON,
) -> int:
    """Mount a filesystem of a snapshot or clone, or show all of them as files; or list mounts.

    A snapshot is mounted read-only as it is: no journal is replayed, and the live filesystem may be
    mounted beside it. A clone is mounted for writing. Needs root; --images does not. The volume has
    to be served. Exit code 3 of a list: something of a mount is gone; `unmount` clears it away.

    Parameters
    ----------
    images
        Show the live disk, every snapshot and every clone as files, which come and go with them.
        Clones can be written there.
    writable
        Mount a clone for writing that is thrown away with the mount.
    replay
        The same, read-only: the journal is replayed first.
    """
    from stillblock.service import mounting  # noqa: PLC0415 - only to mount

    output = Output(common)
    if ref is None:
        if images or writable or replay or read_only or partition:
            raise UsageError("say what to mount and where: stillblock mount VOL@SNAP DIR")
        return _list(output, common)
    if directory is None:
        raise UsageError(f"say where to mount it: stillblock mount {ref} DIR")
    if images:
        if partition or writable or replay or read_only:
            raise UsageError("--images shows everything as it is and takes no other option")
        mounted = mounting.mount_images(common.config(), volume_of(ref), directory)
    else:
        mounted = mounting.mount_filesystem(
            common.config(),
            _reference(ref),
            directory,
            partition=partition,
            is_writable=writable,
            replays=replay,
            is_read_only=read_only,
        )
    output.result("mounted", mounted, lambda out: out.line(_told(mounted)))
    _remark(output, mounted)
    return ExitCode.OK


def _list(output: Output, common: Common) -> int:
    from stillblock.service.mounting import list_mounts  # noqa: PLC0415

    found = list_mounts(common.config())
    rows = [
        (
            one.reference,
            one.where,
            str(one.what) if not one.filesystem else one.filesystem,
            "ro" if one.is_read_only else "rw",
            ", ".join(
                filter(
                    None,
                    (
                        "" if one.is_whole else "GONE",
                        "clone of its own" if one.has_own_clone else "",
                    ),
                )
            ),
        )
        for one in found
    ]
    columns = ("WHAT", "WHERE", "TYPE", "MODE", "NOTES")
    output.result(
        "mounts", {"mounts": found}, lambda out: out.table(columns, rows, empty="nothing mounted")
    )
    return ExitCode.OK if all(one.is_whole for one in found) else ExitCode.PARTIAL


def unmount(
    where: Annotated[str, Parameter(help="The directory, or what was mounted: all of it then.")],
    /,
    *,
    force: Annotated[bool, _FORCE] = False,
    common: Common = _COMMON,
) -> None:
    """Unmount what `mount` mounted, and clear away what lay under it."""
    from stillblock.mounting.records import MountKind  # noqa: PLC0415
    from stillblock.service.mounting import unmount as end  # noqa: PLC0415

    output = Output(common)
    kinds = (MountKind.IMAGES, MountKind.FILESYSTEM)
    ended = end(common.config(), where, kinds=kinds, force=force)
    output.result(
        "unmounted",
        {"mounts": ended},
        lambda out: _ended(out, "unmounted", ended),
    )


def attach(
    ref: Annotated[str, Parameter(help="VOL@SNAP, VOL@SNAP+CLONE, or VOL for the live disk.")],
    /,
    *,
    partition: Annotated[str | None, _PARTITION] = None,
    read_only: Annotated[bool, _READ_ONLY] = False,
    common: Common = _COMMON,
) -> None:
    """Make a snapshot, clone or live disk a block device. Needs root, and the volume served.

    Through the kernel's NBD where there is one; else as a loop device on its image, which cannot
    write to the live disk.
    """
    from stillblock.service import mounting  # noqa: PLC0415

    output = Output(common)
    mounted = mounting.attach(
        common.config(), _reference(ref), partition=partition, is_read_only=read_only
    )
    output.result("attached", mounted, lambda out: out.line(mounted.mount.device))
    by_nbd = mounted.mount.filesystem == "nbd"
    output.remark(
        f"{mounted.mount.reference} is {mounted.mount.device}, "
        + ("by the kernel's NBD" if by_nbd else "a loop device: the kernel has no free NBD device")
        + (", read-only" if mounted.mount.is_read_only else "")
    )
    _remark(output, mounted)


def detach(
    where: Annotated[str, Parameter(help="The device, or what was attached: all of it then.")],
    /,
    *,
    common: Common = _COMMON,
) -> None:
    """Detach what `attach` attached; a device in use goes with its last user."""
    from stillblock.mounting.records import MountKind  # noqa: PLC0415
    from stillblock.service.mounting import unmount as end  # noqa: PLC0415

    output = Output(common)
    ended = end(common.config(), where, kinds=(MountKind.DEVICE,))
    output.result(
        "detached",
        {"mounts": ended},
        lambda out: _ended(out, "detached", ended),
    )


def _ended(out: Output, done: str, mounts: Sequence[MountInfo]) -> None:
    for one in mounts:
        out.line(f"{done} {one.where} ({one.reference})")


def _reference(text: str) -> Reference:
    reference = Reference.parse(text)
    if reference.path or reference.repository:
        raise UsageError(
            f"{text!r} names more than a snapshot or clone: VOL@SNAP or VOL@SNAP+CLONE"
        )
    return reference


def _told(mounted: Mounted) -> str:
    one = mounted.mount
    how = "read-only" if one.is_read_only else "writable"
    if mounted.source is None:
        return f"images of {one.reference} at {one.where}: clones writable, the rest read-only"
    own = ", on a clone that goes with it" if one.has_own_clone else ""
    return f"{one.reference} {mounted.source.place} at {one.where}, {how}{own}"


def _remark(output: Output, mounted: Mounted) -> None:
    """Say once what a reader would not find there (P9)."""
    source = mounted.source
    if source is None:
        output.remark("what a snapshot left out reads as zeros: `stillblock snapshot receipt`")
        return
    if source.left_out_bytes:
        has_files = any(":" in text for text in source.because)
        output.remark(
            f"the snapshot leaves out {format_size(source.left_out_bytes)} here "
            f"({', '.join(source.because)}): it reads as zeros"
            + (", also where a file still has its size" if has_files else "")
        )
    if source.lost_bytes:
        output.warn(f"{format_size(source.lost_bytes)} of {source.reference} were lost: I/O errors")
    if source.note:
        output.warn(source.note)
