"""Which mounts and loop devices are ours, by record and by proof; and their end."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillblock.errors import InUseError, MountError
from stillblock.mounting import kernel, records
from stillblock.mounting.records import MountKind, MountRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stillblock.mounting.kernel import Loop, MountPoint, System

_LOG: Final = logging.getLogger("stillblock.mounting")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What is there of a record, proven to be its own."""

    record: MountRecord
    mount: MountPoint | None = None
    loop: Loop | None = None
    nbd: str | None = None

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
        return self.mount is None and self.loop is None and self.nbd is None


def find(
    known: Sequence[MountRecord],
    *,
    mounts: Sequence[MountPoint],
    loops: Sequence[Loop],
    nbd_pid: Callable[[str], int | None],
) -> tuple[Found, ...]:
    """Return what there is of each record.

    A loop device is a record's if it lies on the record's image, which is in a tree that only we
    use, and no other record names it. A mount is a record's if it is the topmost at its directory
    and its source is that loop device, or the volume's tree.
    """
    top = {mount.path: mount for mount in mounts}
    named = {record.device for record in known if record.device}
    found = []
    for record in known:
        loop = nbd = mount = None
        if record.image:
            mine = [loop for loop in loops if loop.backing == record.image]
            exact = [loop for loop in mine if loop.device == record.device]
            unnamed = [loop for loop in mine if loop.device not in named]
            loop = next(iter(exact or ([] if record.device else unnamed)), None)
            if loop is not None:
                named.add(loop.device)
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
        found.append(Found(record=record, mount=mount, loop=loop, nbd=nbd))
    return tuple(found)


def look(known: Sequence[MountRecord], system: System) -> tuple[Found, ...]:
    """Return what there is of each record now."""
    return find(
        known,
        mounts=kernel.mount_points(system),
        loops=kernel.loops(system),
        nbd_pid=lambda device: kernel.nbd_pid(system, device),
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
    and its users get errors. Raise `MountError` for what cannot be undone; the record stays then.
    """
    record = found.record
    if found.mount is not None:
        _unmount(found, force=force)
    if found.loop is not None:
        kernel.detach_loop(found.loop.device)
    if found.nbd is not None:
        kernel.command("nbd-client", "-d", found.nbd, what=f"detaching {found.nbd}")
    if record.clone:
        drop_clone(record)
    if record.what is MountKind.IMAGES and record.is_private:
        with contextlib.suppress(OSError):
            Path(record.directory).rmdir()
    records.remove(folder, record)


def _unmount(found: Found, *, force: bool) -> None:
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


def in_order(found: Sequence[Found]) -> tuple[Found, ...]:
    """Return them in the order in which they can be undone: trees last, private ones after all."""
    ranks = {MountKind.FILESYSTEM: 0, MountKind.DEVICE: 1, MountKind.IMAGES: 2}
    return tuple(sorted(found, key=lambda one: (ranks[one.record.what], one.record.is_private)))
