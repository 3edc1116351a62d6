"""Mount, attach, unmount, detach: what the command does itself, beside the server that answers.

Each step is written down before it is taken, so that whoever comes after a kill can undo it.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillblock.errors import (
    InUseError,
    MountError,
    NotFoundError,
    NotServedError,
    RefusedError,
    StillblockError,
    UsageError,
)
from stillblock.model import Reference
from stillblock.mounting import kernel, leftovers, records
from stillblock.mounting.options import how_to_mount, needs_new_fsid
from stillblock.mounting.records import MountKind, MountRecord
from stillblock.operations.clones import CloneRequest
from stillblock.operations.mounts import MountInfo, MountSource, SourceRequest, info_of
from stillblock.service.client import RemoteSession, find_server
from stillblock.service.session import open_session

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stillblock.config import Config
    from stillblock.mounting.leftovers import Found
    from stillblock.service.session import Session

_LIFETIME_S: Final = 3600
"""What is left of a throw-away clone whose record was lost goes after this, once nobody uses it."""
_CLOSING_S: Final = 1.0
_POLL_S: Final = 0.05
_SYS_BTRFS: Final = Path("/sys/fs/btrfs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mounted:
    """What was mounted or attached."""

    mount: MountInfo
    source: MountSource | None = None
    """None: of images."""


def mount_images(
    config: Config, volume: str, directory: Path, *, is_for_us: bool = False
) -> Mounted:
    """Show everything that a served volume has as files in a directory. Needs no root.

    `is_for_us`: until this process ends, however it does.
    """
    session = _server(config, volume)
    owner = records.process_id(os.getpid()) if is_for_us else ""
    with records.locked(config.mounts_dir):
        shown = session.show_images(os.path.realpath(directory), owner=owner)
        found = _look(config, volume)
    for one in found:
        if one.record.directory == shown.directory and one.is_whole:
            return Mounted(mount=info_of(one))
    raise MountError(
        f"the server shows no files at {shown.directory} that can be seen from here",
        hint="it runs in a mount namespace of its own, as services with PrivateMounts do",
    )


def mount_filesystem(
    config: Config,
    reference: Reference,
    directory: Path,
    *,
    partition: str | None = None,
    is_writable: bool = False,
    replays: bool = False,
    is_read_only: bool = False,
) -> Mounted:
    """Mount a filesystem of a snapshot or clone; all or nothing.

    Of a snapshot read-only, and nothing replayed; `replays` and `is_writable` mount a clone that
    is thrown away with the mount. Of a clone read-write, unless `is_read_only`.
    """
    _need_root("mounting a filesystem")
    if reference.clone is not None and (is_writable or replays):
        raise UsageError(
            f"{reference} is a clone, and is mounted for writing as it is",
            hint="leave --writable and --replay to snapshots",
        )
    is_written = is_writable or (reference.clone is not None and not is_read_only)
    has_own_clone = is_writable or replays
    with _making(config, reference, MountKind.FILESYSTEM) as (session, making):
        target = os.path.realpath(directory)
        making.note(is_read_only=not is_written)
        clone = making.throw_away() if has_own_clone else reference.clone
        source = session.mount_source(
            SourceRequest(
                snapshot=reference.snapshot, clone=clone, partition=partition, directory=target
            )
        )
        how = how_to_mount(
            source.content,
            is_writable=is_written,
            replays=replays,
            filesystems=kernel.kernel_filesystems(making.system),
            has_ntfs_3g=shutil.which("mount.ntfs-3g") is not None,
        )
        has_new_fsid = bool(source.fsid) and needs_new_fsid(
            kernel_release=platform.release(),
            is_fsid_known=(_SYS_BTRFS / source.fsid).exists(),
            has_own_clone=has_own_clone,
            reference=source.reference,
        )
        making.note(
            directory=target,
            image=source.image,
            pieces=source.pieces,
            filesystem=how.kind or "",
        )
        making.check_free(source)
        device = making.attach_loop(source.image, is_read_only=not how.is_device_writable)
        if has_new_fsid:
            what = f"a new fsid for {device}"
            kernel.command("btrfstune", "-f", "-m", device, what=what, lock=making.lock)
        kernel.mount(
            device,
            making.record.directory,
            kind=how.kind,
            options=how.options,
            lock=making.lock,
        )
        # In use from now on, it goes with the mount, whoever unmounts it.
        kernel.detach_loop(device)
        return making.made(source)


def attach(
    config: Config,
    reference: Reference,
    *,
    partition: str | None = None,
    is_read_only: bool = False,
) -> Mounted:
    """Make a snapshot, clone or live disk a block device; all or nothing."""
    _need_root("attaching a block device")
    can_write = reference.clone is not None or reference.snapshot is None
    with _making(config, reference, MountKind.DEVICE) as (session, making):
        making.note(is_read_only=is_read_only or not can_write)
        source = session.mount_source(
            SourceRequest(
                snapshot=reference.snapshot,
                clone=reference.clone,
                partition=partition,
                is_whole=partition is None,
            )
        )
        making.note(pieces=source.pieces)
        making.check_free(source)
        device = kernel.free_nbd(making.system) if partition is None else None
        if device is not None and shutil.which("nbd-client") is not None:
            _attach_nbd(session, making, source, device)
            return making.made(source)
        if reference.snapshot is None and not is_read_only:
            raise RefusedError(
                f"{reference} can only be written through the kernel's NBD, which is not here",
                hint="modprobe nbd and install nbd-client, or add --read-only",
            )
        making.note(image=source.image)
        making.attach_loop(source.image, is_read_only=making.record.is_read_only)
        return making.made(source)


def _attach_nbd(session: Session, making: _Making, source: MountSource, device: str) -> None:
    uris = [e.uri for e in session.exports().exports if e.name == source.reference]
    path = next((uri.partition("?socket=")[2] for uri in uris if "?socket=" in uri), "")
    if not path:
        raise MountError(f"{source.reference} is served on no Unix socket, which nbd-client needs")
    making.note(device=device, filesystem="nbd")
    read_only = ["-readonly"] if making.record.is_read_only else []
    kernel.command(
        "nbd-client", "-unix", path, device, "-name", source.reference, *read_only,
        what=f"attaching {source.reference} to {device}",
    )  # fmt: skip
    making.note(device_pid=kernel.nbd_pid(making.system, device))


def list_mounts(config: Config) -> tuple[MountInfo, ...]:
    """Return everything that is mounted or attached, of all volumes; trees for others left out.

    It is whole if all of it is there and a server answers for it.
    """
    found = [one for one in _look(config, None) if not one.record.is_private]
    served = {name: find_server(config, name) for name in {one.record.volume for one in found}}
    infos = (info_of(one) for one in found)
    return tuple(replace(one, is_whole=one.is_whole and bool(served[one.volume])) for one in infos)


def unmount(
    config: Config, wanted: str, *, kinds: Sequence[MountKind], force: bool = False
) -> tuple[MountInfo, ...]:
    """Make an end of what is mounted at a directory or device, or of everything of a reference.

    Raise `InUseError` if it is in use, unless forced; `NotFoundError` if nothing is meant.
    """
    folder = config.mounts_dir
    place = os.path.realpath(wanted)
    with records.locked(folder):
        # One that cannot be read keeps nobody from unmounting the rest; the list names it.
        known = records.read(folder, skips=True)
        found = leftovers.look(known, kernel.System())
        meant = [
            one
            for one in found
            if one.record.what in kinds
            and not one.record.is_private
            and (one.record.where == place or one.record.reference == wanted)
        ]
        if not meant:
            raise NotFoundError(
                f"nothing of ours is at {wanted}, and no mount is called so",
                hint="`stillblock mount` lists them",
            )
        for one in leftovers.in_order(meant):
            leftovers.undo(
                one,
                folder,
                force=force,
                drop_clone=lambda record: _drop_clone(config, record),
            )
            if one.record.what is not MountKind.IMAGES:
                _end_private(config, one.record.volume)
    return tuple(info_of(one) for one in meant)


def _end_private(config: Config, volume: str) -> None:
    """Unmount the tree that only mounts lay on, with the last of them."""
    found = _look(config, volume)
    if any(one.record.what is not MountKind.IMAGES for one in found):
        return
    for one in found:
        if one.record.is_private:
            try:
                leftovers.undo(one, config.mounts_dir, force=False, drop_clone=lambda _: None)
            except StillblockError:
                pass  # its last user is only just closing it: the server ends it soon


def _drop_clone(config: Config, record: MountRecord) -> None:
    snapshot = Reference.parse(record.reference).snapshot or ""
    try:
        with open_session(config, record.volume) as session:
            session.delete_clone(snapshot, record.clone, force=True)
    except NotFoundError:
        pass  # not made yet, or gone with its snapshot or volume


def _look(config: Config, volume: str | None) -> tuple[Found, ...]:
    return leftovers.look(records.read(config.mounts_dir, volume=volume), kernel.System())


def _server(config: Config, volume: str) -> RemoteSession:
    socket_path = find_server(config, volume)
    if socket_path is None:
        raise NotServedError(
            f"{volume} is not served, so nobody can show what it holds",
            hint=f"start `stillblock serve {volume}` and leave it running",
        )
    return RemoteSession(socket_path, volume)


def _need_root(what: str) -> None:
    if os.geteuid() != 0:
        raise RefusedError(
            f"{what} needs root",
            hint="`stillblock mount --images VOL DIR` shows disks as files without it",
        )


class _Making:
    """A mount under construction: the record, kept in step with what was done."""

    def __init__(self, config: Config, session: Session, record: MountRecord, lock: int) -> None:
        self._folder = config.mounts_dir
        self._session = session
        self.system = kernel.System()
        self.lock = lock
        self.record = record

    def note(self, **changes: object) -> None:
        """Write down what is to be done next, or how it came out."""
        self.record = replace(self.record, **changes)  # type: ignore[arg-type]
        records.write(self._folder, self.record)

    def check_free(self, source: MountSource) -> None:
        """Raise `InUseError` if somebody uses the same bytes, of what can be written."""
        if not self.record.clone:
            # A clone by its name, whatever it was called: others are compared with it.
            self.note(reference=source.reference)
        record = self.record
        reference = Reference.parse(record.reference)
        is_written_here = reference.clone is not None or bool(record.clone)
        if not is_written_here and record.is_read_only:
            return  # a snapshot never changes, and of the live disk that is what is asked for
        deadline = time.monotonic() + _CLOSING_S
        while True:
            # Who has only just closed it may be counted for a moment.
            try:
                exports = self._session.exports().exports
                leftovers.check_free(
                    record,
                    records.read(self._folder, volume=record.volume),
                    connections=sum(e.connections for e in exports if e.name == record.source),
                )
                return
            except InUseError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_POLL_S)

    def attach_loop(self, image: str, *, is_read_only: bool) -> str:
        """Make a loop device on the image that was written down; return it."""
        device = kernel.attach_loop(image, is_read_only=is_read_only, lock=self.lock)
        self.note(device=device, device_sequence=kernel.disk_sequence(self.system, device))
        return device

    def throw_away(self) -> str:
        """Make a clone that goes with the mount; return its name."""
        snapshot = Reference.parse(self.record.reference).snapshot or ""
        name = f"mount-{self.record.id}"
        self.note(clone=name)
        self._session.create_clone(
            CloneRequest(
                snapshot=snapshot,
                name=name,
                lifetime_s=_LIFETIME_S,
                description="under a mount, and gone with it",
            )
        )
        return name

    def made(self, source: MountSource) -> Mounted:
        """Return what was made; raise `MountError` if it is not there."""
        (found,) = leftovers.look((self.record,), self.system)
        if not found.is_whole:
            raise MountError(f"{self.record.reference} was mounted, and is not there")
        return Mounted(mount=info_of(found), source=source)


@contextmanager
def _ends_orderly() -> Iterator[None]:
    """Let SIGTERM and SIGHUP undo what is under way, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not ours there
        return

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    # Who is started with one ignored, as by nohup, goes on.
    mine = [number for number, handler in before.items() if handler == signal.SIG_DFL]
    for number in mine:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _making(
    config: Config, reference: Reference, kind: MountKind
) -> Iterator[tuple[Session, _Making]]:
    """Make a mount under the lock; whatever goes wrong, nothing of it stays."""
    session = _server(config, reference.volume)
    shown = replace(reference, path=None)
    if reference.snapshot is not None:
        # By its own name: `latest` may be another one when the mount is undone.
        shown = replace(shown, snapshot=session.show_snapshot(reference.snapshot).name)
    with _ends_orderly(), records.locked(config.mounts_dir) as lock:
        making = _Making(
            config,
            session,
            MountRecord(
                id=records.new_id(),
                volume=reference.volume,
                what=kind,
                reference=str(shown),
                boot_id=kernel.boot_id(kernel.System()),
                created_unix_ns=time.time_ns(),
            ),
            lock,
        )
        making.note()
        try:
            yield session, making
        except BaseException:
            # Among all records: a device that another one names is not this one's.
            for found in _look(config, reference.volume):
                if found.record.id == making.record.id:
                    leftovers.undo(
                        found,
                        config.mounts_dir,
                        force=True,
                        drop_clone=lambda record: _drop_clone(config, record),
                    )
            _end_private(config, reference.volume)
            raise
