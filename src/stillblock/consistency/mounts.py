"""Which disk a mount sits on, proven by reading: nothing is written, and nothing is believed.

The kernel tells a mount's block device and what that is made of: partitions, device mapper, loops.
It cannot tell where a network block device or a FUSE file leads. So a few reads of a length and at
offsets that nobody could guess are made where the kernel's knowledge ends, past the page cache, and
the volume looks whether they arrive. A copy of the disk, or a snapshot that is mounted, may have
the same content as the volume, but its reads arrive elsewhere.
"""

from __future__ import annotations

import mmap
import os
import secrets
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from stillblock.errors import FreezeRefusedError, QuiesceError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Device = tuple[int, int]
"""Major and minor number."""

_PROBES: Final = 4
_TRIES: Final = 3
_UNIT: Final = 4096
"""Offsets and lengths of probes: what every device reads past the page cache."""
_DEPTH_MAX: Final = 16
_IMAGES_KIND: Final = "fuse.stillblock "
"""The type of trees of images in the kernel's table."""
_UNNAMED_MAJOR: Final = 0
"""Of filesystems with a device number of their own, such as btrfs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Where the kernel tells about mounts and disks; tests put their own trees here."""

    sys_dev_block: Path = Path("/sys/dev/block")
    dev: Path = Path("/dev")
    mountinfo: Path = Path("/proc/self/mountinfo")
    fdinfo: Path = Path("/proc/self/fdinfo")


class WatchedReads(Protocol):
    """A volume that can tell where it is read."""

    def watch_reads(self, *, length: int) -> None:
        """Remember reads of just this length; 0: none."""

    def reads_seen(self) -> list[int]:
        """Return their offsets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A mounted filesystem, held by an open directory: it can neither be unmounted nor replaced."""

    fd: int
    path: Path
    kind: str
    """ext4, xfs ..."""
    device: Device
    """The filesystem's own number."""
    source: str
    is_read_only: bool

    def close(self) -> None:
        """Let it go."""
        os.close(self.fd)


def open_mount(path: Path, system: System) -> Mount:
    """Open the mount that a path lies on; the mount is found by the open file, not by its name."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        info = dict(
            line.split(":", 1)
            for line in (system.fdinfo / str(fd)).read_text().splitlines()
            if ":" in line
        )
        wanted = info["mnt_id"].strip()
        for line in system.mountinfo.read_text(errors="surrogateescape").splitlines():
            # proc(5): id parent major:minor root mount-point options [tags] - type source options
            head, _, tail = line.partition(" - ")
            fields, rest = head.split(" "), tail.split(" ")
            if fields[0] != wanted:
                continue
            major, _, minor = fields[2].partition(":")
            options = {*fields[5].split(","), *rest[2].split(",")}
            return Mount(
                fd=fd,
                path=Path(_unescape(fields[4])),
                kind=rest[0],
                device=(int(major), int(minor)),
                source=_unescape(rest[1]),
                is_read_only="ro" in options,
            )
        raise FreezeRefusedError(f"{path} lies on no mount that the kernel lists")
    except BaseException:
        os.close(fd)
        raise


def open_checked(
    path: Path,
    volume: WatchedReads,
    *,
    volume_name: str,
    own_places: Mapping[str, Path],
    timeout_s: float,
    system: System | None = None,
) -> Mount:
    """Return the mount at a mount point, proven to sit on the volume and safe to freeze.

    `own_places` are directories that we write to. Raise `FreezeRefusedError`, or `QuiesceError` if
    the disk does not answer in time.
    """
    known = system or System()

    def check() -> Mount:
        mount = open_mount(path, known)
        try:
            _check_usable(mount, path)
            for what, place in own_places.items():
                _refuse_own(mount, what, place, known)
            prove_on_volume(mount, volume, volume_name=volume_name, system=known)
        except BaseException:
            mount.close()
            raise
        return mount

    try:
        return _bounded(check, timeout_s, what=f"looking at {path}")
    except OSError as error:
        raise FreezeRefusedError(f"{path} cannot be looked at: {error.strerror}") from error


def _check_usable(mount: Mount, path: Path) -> None:
    if mount.path != path.resolve():
        raise FreezeRefusedError(
            f"{path} is not a mount point, it lies on {mount.path}",
            hint=f"name the mount point: --freeze-mount {mount.path}",
        )
    if mount.is_read_only:
        raise FreezeRefusedError(
            f"{path} is mounted read-only: freezing it would hold nothing still"
        )


def _refuse_own(mount: Mount, what: str, place: Path, system: System) -> None:
    """Raise if we write to a place that would be frozen too: we would wait for ourselves."""
    device = mount.device
    for _ in range(_DEPTH_MAX):
        existing = place
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        beneath = open_mount(existing if existing.is_dir() else existing.parent, system)
        beneath.close()
        if beneath.device == device:
            raise FreezeRefusedError(
                f"{mount.path} holds the {what} {place}: frozen, it would stop us too",
                hint="move that to another disk, or do not freeze this filesystem",
            )
        backing = [leaf for leaf in _leaves(beneath, system) if stat.S_ISREG(leaf.stat().st_mode)]
        if not backing:
            return
        place = backing[0]


def prove_on_volume(
    mount: Mount, volume: WatchedReads, *, volume_name: str, system: System
) -> None:
    """Raise `FreezeRefusedError` unless all of a mount's disk is this volume."""
    leaves = _leaves(mount, system)
    if not leaves:
        raise FreezeRefusedError(
            f"{mount.path} ({mount.kind} of {mount.source}) lies on no block device"
        )
    for leaf in leaves:
        if _is_image(leaf, system):
            # Whoever answers reads of it is who asks: killed meanwhile, it would never end.
            raise FreezeRefusedError(
                f"{mount.path} is a mount of an image, {leaf}, and not of the live disk"
            )
        if not any(_arrives(leaf, volume) for _ in range(_TRIES)):
            raise FreezeRefusedError(
                f"{mount.path} is not known to sit on volume {volume_name}: reads of {leaf} do not "
                "arrive there",
                hint="name a mount of what the volume's own export serves, in this mount namespace",
            )


def _is_image(leaf: Path, system: System) -> bool:
    """Whether it is a file of a tree of images, told by the path alone: nothing is read."""
    lines = system.mountinfo.read_text(errors="surrogateescape").splitlines()
    trees = (line.partition(" - ") for line in lines)
    points = (head.split(" ")[4] for head, _, tail in trees if tail.startswith(_IMAGES_KIND))
    return any(leaf.is_relative_to(_unescape(point)) for point in points)


def _arrives(leaf: Path, volume: WatchedReads) -> bool:
    """Read where nobody else would, and look whether the volume saw all of it, in the same place.

    The disk may begin anywhere on the volume: a partition is exported as a disk by some.
    """
    fd = os.open(leaf, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        length = _UNIT * (2 * secrets.randbelow(6) + 3)
        if size < 4 * length:
            return False
        places = (size - length) // _UNIT
        offsets = [_UNIT * secrets.randbelow(places) for _ in range(_PROBES)]
        volume.watch_reads(length=length)
        try:
            with mmap.mmap(-1, length) as buffer:
                for offset in offsets:
                    os.preadv(fd, [buffer], offset)
            seen = set(volume.reads_seen())
        finally:
            volume.watch_reads(length=0)
    finally:
        os.close(fd)
    bases = {start - offsets[0] for start in seen}
    return any(all(offset + base in seen for offset in offsets) for base in bases)


def _leaves(mount: Mount, system: System) -> list[Path]:
    """Return what a mount's device consists of in the end: block devices, or files behind loops."""
    device = mount.device
    if device[0] == _UNNAMED_MAJOR:
        try:
            found = Path(mount.source).stat()
        except OSError:
            return []
        if not stat.S_ISBLK(found.st_mode):
            return []
        device = os.major(found.st_rdev), os.minor(found.st_rdev)
    leaves: list[Path] = []
    waiting, known = [system.sys_dev_block / f"{device[0]}:{device[1]}"], set()
    while waiting:
        directory = waiting.pop().resolve()
        if directory in known:
            continue
        known.add(directory)
        beneath = list(directory.glob("slaves/*"))
        if (directory / "partition").exists():
            beneath.append(directory.parent)
        backing = directory / "loop" / "backing_file"
        if beneath:
            waiting += beneath
        elif backing.exists():
            leaves.append(Path(backing.read_text(errors="surrogateescape").rstrip("\n")))
        else:
            leaves.append(system.dev / directory.name.replace("!", "/"))
    return leaves


def _bounded(work: Callable[[], Mount], timeout_s: float, *, what: str) -> Mount:
    """Run something that a dead disk could hold up for ever; a thread of its own waits for that."""
    results: list[Mount] = []
    errors: list[BaseException] = []
    lock, is_over = threading.Lock(), False

    def run() -> None:
        try:
            mount = work()
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            errors.append(error)
            return
        with lock:
            if is_over:
                mount.close()
            else:
                results.append(mount)

    thread = threading.Thread(target=run, name="mount-check", daemon=True)
    thread.start()
    thread.join(timeout_s)
    with lock:
        is_over = not results
    if errors:
        raise errors[0]
    if results:
        return results[0]
    raise QuiesceError(f"{what} took longer than {timeout_s:.1f} s: its disk does not answer")


def _unescape(text: str) -> str:
    """Undo the kernel's octal escapes for blanks in paths."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
