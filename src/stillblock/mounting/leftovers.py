"""Which mounts and loop devices are ours, by record and by proof; and their end."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillblock.errors import InUseError, MountError
from stillblock.mounting import kernel, records
from stillblock.mounting.records import MountKind, MountRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stillblock.mounting.kernel import Loop, MountPoint, System

_DELETED: Final = " (deleted)"
_DETACH_S: Final = 2.0
"""How long a loop device may take to go after its mount, and who looks at new devices with it."""
_POLL_S: Final = 0.02
_LOG: Final = logging.getLogger("stillblock.mounting")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What is there of a record, proven to be its own."""

    record: MountRecord
    mount: MountPoint | None = None
    loop: Loop | None = None
    nbd: str | None = None
    doubt: str = ""
    """What may be its own and cannot be proven to be: nothing is undone then."""

    @property
    def is_whole(self) -> bool:
        """Whether all of it is there."""
        if self.record.what is MountKind.DEVICE:
            return self.loop is not None or self.nbd is not None
        if self.record.what is MountKind.FILESYSTEM:
            return self.mount is not None and self.loop is not None
        return self.mount is not None

    @property
    def is_gone(self) -> bool:
        """Whether nothing of it is there."""
        return self.mount is None and self.loop is None and self.nbd is None and not self.doubt


def find(
    known: Sequence[MountRecord],
    *,
    mounts: Sequence[MountPoint],
    loops: Sequence[Loop],
    nbd_pid: Callable[[str], int | None],
    boot_id: str = "",
) -> tuple[Found, ...]:
    """Return what there is of each record.

    A loop device is a record's if the kernel's number of it is the one written down; before that
    is known, if it lies on the record's image, which is in a tree that only we use, and no other
    record names it. A mount is a record's if it is the topmost at its directory and its source is
    that loop device, or the volume's tree. Of an earlier start of the machine nothing is there.
    """
    top = {mount.path: mount for mount in mounts}
    named = {record.device for record in known if record.device}
    found = []
    for record in known:
        if record.boot_id and boot_id and record.boot_id != boot_id:
            found.append(Found(record=record))
            continue
        loop = nbd = mount = None
        doubt = ""
        if record.image:
            loop = _loop_of(record, loops, named)
            if loop is not None:
                named.add(loop.device)
            elif record.device and not record.device_sequence:
                at = [mount.path for mount in mounts if mount.source == record.device]
                doubt = f"{record.device} is mounted at {at[0]}, perhaps for it" if at else ""
        elif record.what is MountKind.DEVICE and record.device:
            pid = nbd_pid(record.device)
            nbd = record.device if pid is not None and pid == record.device_pid else None
        candidate = top.get(record.directory)
        if candidate is not None:
            if record.what is MountKind.IMAGES:
                is_ours = (
                    candidate.kind == kernel.FUSE_KIND
                    and candidate.source == kernel.tree_source(record.volume)
                )
            else:
                is_ours = loop is not None and candidate.source == loop.device
            mount = candidate if is_ours else None
        found.append(Found(record=record, mount=mount, loop=loop, nbd=nbd, doubt=doubt))
    return tuple(found)


def _loop_of(record: MountRecord, loops: Sequence[Loop], named: set[str]) -> Loop | None:
    if not record.device:
        return next(
            (loop for loop in loops if loop.device not in named and _lies_on(loop, record)), None
        )
    for loop in loops:
        if loop.device == record.device:
            is_same = (
                loop.sequence == record.device_sequence
                if record.device_sequence
                else _lies_on(loop, record)
            )
            return loop if is_same else None
    return None


def _lies_on(loop: Loop, record: MountRecord) -> bool:
    """Whether a loop device lies on a record's image, whatever became of its name.

    The kernel adds a mark to a name that it does not find any more, as after a server was killed;
    and of a tree that was detached it tells the path below it, which proves no more than that the
    device is still the one that was written down.
    """
    backing = loop.backing.removesuffix(_DELETED)
    if backing == record.image:
        return True
    is_below = backing.startswith(("/@", "/disk.")) and record.image.endswith(backing)
    return is_below and loop.device == record.device


def look(known: Sequence[MountRecord], system: System) -> tuple[Found, ...]:
    """Return what there is of each record now."""
    return find(
        known,
        mounts=kernel.mount_points(system),
        loops=kernel.loops(system),
        nbd_pid=lambda device: kernel.nbd_pid(system, device),
        boot_id=kernel.boot_id(system),
    )


def check_free(wanted: MountRecord, known: Sequence[MountRecord], *, connections: int) -> None:
    """Raise `InUseError` if `wanted` and somebody else would write, or cache what is written.

    Each block device has a cache of its own, so two on the same bytes never see what the other
    writes, and a filesystem would be destroyed. `connections` are all there are to the export.
    """
    others = [one for one in known if one.id != wanted.id and one.source == wanted.source]
    others = [one for one in others if one.what is not MountKind.IMAGES]
    for one in others:
        if not (one.is_read_only and wanted.is_read_only) and _overlap(one, wanted):
            raise InUseError(
                f"{wanted.source} is mounted or attached at {one.where or 'a place left over'} "
                "already, and two that are written do not see each other's changes",
                hint=f"`stillblock {'unmount' if one.directory else 'detach'}` it first",
            )
    clients = connections - sum(bool(one.device) for one in others)
    if clients > 0:
        raise InUseError(
            f"{wanted.source} has {clients} clients or readers of its image, which would not see "
            "what is written here, nor the other way round",
            hint="disconnect them first: `stillblock exports` counts them",
        )


def _overlap(one: MountRecord, other: MountRecord) -> bool:
    if not one.pieces or not other.pieces:
        return True
    return any(
        start < stop and begin < end for start, end in one.pieces for begin, stop in other.pieces
    )


def undo(
    found: Found,
    folder: Path,
    *,
    force: bool,
    drop_clone: Callable[[MountRecord], None],
) -> None:
    """Make an end of a mount: unmount, detach, drop the throw-away clone, forget the record.

    In use it raises `InUseError` with nothing undone, unless forced: what was written is synced,
    and its users get errors. A loop device that is used somewhere that we do not see, as under
    another mount or in another namespace, keeps its clone and its record also then. Raise
    `MountError` for what cannot be undone; the record stays then.
    """
    record = found.record
    if found.doubt:
        raise MountError(
            f"{record.reference} at {record.where} is left as it is: {found.doubt}",
            hint="look at `findmnt` and `losetup`, and undo it by hand",
        )
    is_cut = found.mount is not None and _unmount(found, force=force)
    if found.loop is not None:
        _detach(found, found.loop, is_cut=is_cut)
    if found.nbd is not None:
        kernel.command("nbd-client", "-d", found.nbd, what=f"detaching {found.nbd}")
    if record.clone:
        drop_clone(record)
    if record.what is MountKind.IMAGES and record.is_private:
        with contextlib.suppress(OSError):
            Path(record.directory).rmdir()
    records.remove(folder, record)


def _detach(found: Found, loop: Loop, *, is_cut: bool) -> None:
    """Detach a loop device; raise `InUseError` if it is used, unless its users were cut off."""

    def is_there() -> bool:
        # Gone with its mount, as a rule, and given to somebody else perhaps.
        return any(
            one.device == loop.device and one.sequence == loop.sequence
            for one in kernel.loops(kernel.System())
        )

    if not is_there():
        return
    try:
        kernel.detach_loop(loop.device)
    except MountError:
        if is_there():
            raise
    # A device is its users': it goes with the last of them, as does a mount that was taken away.
    if is_cut or (found.record.what is MountKind.DEVICE and not found.record.clone):
        return
    deadline = time.monotonic() + _DETACH_S
    while is_there():
        if time.monotonic() >= deadline:
            raise InUseError(
                f"{found.record.reference} at {found.record.where} is unmounted there, and its "
                f"{loop.device} is still used elsewhere: its end comes with its last user",
                hint=f"`findmnt -S {loop.device}` in each mount namespace shows where",
            )
        time.sleep(_POLL_S)


def _unmount(found: Found, *, force: bool) -> bool:
    """Unmount; return whether it was taken away from somebody who uses it."""
    directory = found.record.directory
    try:
        kernel.unmount(directory)
    except MountError as error:
        if not force:
            raise InUseError(
                f"{found.record.reference} at {directory} is in use: {error.message}",
                hint="`fuser -vm` shows by whom; --force takes it away from them",
            ) from error
        if found.record.what is MountKind.FILESYSTEM and not found.record.is_read_only:
            try:
                kernel.sync(directory)
            except MountError as failure:
                _LOG.warning("not synced: %s", failure)
        kernel.unmount(directory, lazily=True)
        return True
    return False


def in_order(found: Sequence[Found]) -> tuple[Found, ...]:
    """Return them in the order in which they can be undone: trees last, private ones after all."""
    ranks = {MountKind.FILESYSTEM: 0, MountKind.DEVICE: 1, MountKind.IMAGES: 2}
    return tuple(sorted(found, key=lambda one: (ranks[one.record.what], one.record.is_private)))
