"""What an origin really is: its format, its other names, who uses it. Refuses what would harm.

Two paths can be one disk: by a symlink, a loop device, a partition, a device-mapper table. Each
disk has its *own* keys (the same bytes under other names) and its *reach* (own, what it consists
of, what is made of it). Two origins clash when the own keys of one are within the reach of the
other; so a disk clashes with its partitions, and two partitions of one disk do not.
"""

from __future__ import annotations

import os
import shlex
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillblock.errors import (
    ImageNotRawError,
    NotFoundError,
    OriginMountedError,
    OriginTakenError,
    RefusedError,
    StoreOnVolumeError,
)
from stillblock.operations.disks import open_raw

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stillblock.model import VolumeEntry

Key = tuple[str, int, int]
"""`("block", major, minor)` or `("file", device, inode)`."""

_TREE_SOURCE: Final = "stillblock:"
"""What trees of images have as their source in the kernel's table."""
_VHD_FOOTER_BYTES: Final = 512
_VHD_COOKIE: Final = b"conectix"
_VHD_VERSION: Final = b"\x00\x01\x00\x00"
_VDI_MAGIC_OFFSET: Final = 0x40
_VDI_MAGIC: Final = struct.pack("<I", 0xBEDA107F)
_HEAD_BYTES: Final = 512
_MAGICS: Final[tuple[tuple[bytes, str], ...]] = (
    # What the first bytes are, and what qemu-img calls the format.
    (b"QFI\xfb\x00\x00\x00\x01", "qcow"),
    (b"QFI\xfb", "qcow2"),
    (b"QED\x00", "qed"),
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk"),
    (b"vhdxfile", "vhdx"),
    (_VHD_COOKIE, "vpc"),
    (b"WithoutFreeSpace", "parallels"),
    (b"WithouFreSpacExt", "parallels"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Where the kernel tells about disks; tests put their own trees here."""

    sys_dev_block: Path = Path("/sys/dev/block")
    sys_block: Path = Path("/sys/block")
    mountinfo: Path = Path("/proc/self/mountinfo")
    swaps: Path = Path("/proc/swaps")


def absolute(path: Path) -> Path:
    """Return an absolute path that keeps its symlinks: a device's id is steadier than its name."""
    return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100


def image_format(head: bytes, tail: bytes) -> str | None:
    """Return what qemu-img calls the image, or None if nothing says that it is not raw.

    `head` is the first 512 bytes, `tail` the last 512: a fixed VHD is raw data with a footer.
    """
    for magic, name in _MAGICS:
        if head.startswith(magic):
            return name
    if head[_VDI_MAGIC_OFFSET : _VDI_MAGIC_OFFSET + 4] == _VDI_MAGIC:
        return "vdi"
    if tail.startswith(_VHD_COOKIE) and tail[12:16] == _VHD_VERSION:
        return "vpc"
    return None


def check_origin(origin: Path) -> int:
    """Return the size in bytes of a usable raw file or device; raise a `RefusedError` otherwise."""
    try:
        mode = origin.stat().st_mode
    except FileNotFoundError as error:
        raise NotFoundError(f"origin {origin} does not exist") from error
    except OSError as error:
        raise RefusedError(f"origin {origin} cannot be looked at: {error.strerror}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise RefusedError(f"origin {origin} is neither a regular file nor a block device")
    with open_raw(origin) as disk:
        if disk.size == 0:
            raise RefusedError(
                f"origin {origin} is empty (0 bytes)",
                hint=f"make it with its size, for example `truncate -s 10G {origin}`",
            )
        head = disk.pread(offset=0, length=_HEAD_BYTES)
        tail_start = max(0, disk.size - _VHD_FOOTER_BYTES)
        found = image_format(head, disk.pread(offset=tail_start, length=_VHD_FOOTER_BYTES))
        if found is not None:
            raw = origin.with_suffix(".raw")
            command = ["qemu-img", "convert", "-f", found, "-O", "raw", str(origin), str(raw)]
            raise ImageNotRawError(
                f"origin {origin} is a {found} image, not a raw disk",
                hint=f"convert it: {shlex.join(command)}",
            )
        return disk.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """The names under which a disk's bytes can be reached."""

    own: frozenset[Key]
    reach: frozenset[Key]

    def clashes_with(self, other: Footprint) -> bool:
        """Whether writing one could change the other."""
        return bool(self.own & other.reach or other.own & self.reach)


def footprint(path: Path, system: System) -> Footprint:
    """Return the names of the disk at a path; nothing if the path does not exist."""
    key = key_of(path)
    if key is None:
        return Footprint(own=frozenset(), reach=frozenset())
    own = {key}
    if key[0] == "file":
        own |= {loop for loop, file in _loops(system).items() if file == key}
    else:
        backing = _loops(system).get(key)
        own |= {backing} if backing else set()
        if backing:
            own |= {loop for loop, file in _loops(system).items() if file == backing}
    reach = set(own)
    for name in own:
        reach |= _closure(name, system, made_of=True) | _closure(name, system, made_of=False)
    return Footprint(own=frozenset(own), reach=frozenset(reach))


def key_of(path: Path) -> Key | None:
    """Return the key of what a path leads to; symlinks are followed."""
    try:
        found = path.stat()
    except OSError:
        return None
    if stat.S_ISBLK(found.st_mode):
        return "block", os.major(found.st_rdev), os.minor(found.st_rdev)
    return "file", found.st_dev, found.st_ino


def refuse_taken(origin: Path, volumes: Iterable[VolumeEntry], system: System) -> None:
    """Raise `OriginTakenError` if the disk is, holds or is part of another volume's origin."""
    mine = footprint(origin, system)
    for volume in volumes:
        if mine.clashes_with(footprint(Path(volume.origin), system)):
            same = key_of(origin) == key_of(Path(volume.origin))
            how = "is" if same else "shares its blocks with"
            raise OriginTakenError(
                f"{origin} {how} the origin of volume {volume.name} ({volume.origin})",
                hint="one volume can have any number of snapshots with rules of their own",
            )


def refuse_mounted(origin: Path, system: System) -> None:
    """Raise `OriginMountedError` if the disk, or something made of it, is mounted or swap."""
    reach = footprint(origin, system).reach
    for device, source, mount_point in _mounts(system):
        if device in reach or (source.startswith("/") and key_of(Path(source)) in reach):
            raise OriginMountedError(
                f"{origin} is mounted at {mount_point}; writes past stillblock would not be seen",
                hint=f"unmount it, serve the volume, then mount it again through NBD: umount "
                f"{mount_point}",
            )
    for swap in _swaps(system):
        if key_of(swap) in reach:
            raise OriginMountedError(
                f"{origin} is in use as swap ({swap})", hint=f"first run: swapoff {swap}"
            )


def refuse_image(origin: Path, system: System) -> None:
    """Raise `RefusedError` if the disk is an image that a server shows, or a device on one.

    A server that waits for its own answer can neither go on nor be killed.
    """
    if _is_shown(footprint(origin, system).reach, system):
        raise RefusedError(
            f"{origin} is an image that a server shows of a volume",
            hint="make a disk of its own of it: `stillblock clone promote`, or copy it",
        )


def refuse_on_image(directory: Path, system: System, *, what: str) -> None:
    """Raise `StoreOnVolumeError` if the directory lies on a filesystem of such an image."""
    reach = set[Key]()
    for key in _beneath(directory, system):
        backing = _loops(system).get(key)
        reach |= {key, backing} if backing else {key}
    if _is_shown(reach, system):
        raise StoreOnVolumeError(
            f"the {what} {directory} lies on a snapshot or clone that a server shows",
            hint="choose a directory on a disk of this machine",
        )


def _is_shown(reach: Iterable[Key], system: System) -> bool:
    """Whether one of them is a file in a tree of images."""
    trees = {device for device, source, _ in _mounts(system) if source.startswith(_TREE_SOURCE)}
    return any(
        kind == "file" and ("block", os.major(device), os.minor(device)) in trees
        for kind, device, _ in reach
    )


def refuse_on_volume(directory: Path, origin: Path, system: System, *, what: str) -> None:
    """Raise `StoreOnVolumeError` if the directory lies on the disk that will be served."""
    below = _beneath(directory, system)
    if below & footprint(origin, system).reach:
        raise StoreOnVolumeError(
            f"the {what} {directory} lies on {origin} itself; a write to one would cause another",
            hint="choose a directory on another disk",
        )


def _beneath(directory: Path, system: System) -> set[Key]:
    """Return what a directory, or what is there of its path, lies on."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    device = existing.stat().st_dev
    below: set[Key] = {("block", os.major(device), os.minor(device))}
    # A filesystem with a device number of its own (btrfs) names its disk only in mountinfo.
    resolved = existing.resolve()
    points = [m for m in _mounts(system) if resolved.is_relative_to(m[2])]
    if points:
        source = max(points, key=lambda m: len(m[2]))[1]
        key = key_of(Path(source)) if source.startswith("/") else None
        below |= {key} if key else set()
    return below


def _mounts(system: System) -> list[tuple[Key, str, str]]:
    """Return (device, source, mount point) of every mount."""
    found: list[tuple[Key, str, str]] = []
    for line in _lines(system.mountinfo):
        # proc(5): id parent major:minor root mount-point options [tags] - type source super-options
        head, separator, tail = line.partition(" - ")
        fields, rest = head.split(" "), tail.split(" ")
        if not separator or len(fields) < 5 or len(rest) < 2:
            continue
        major, _, minor = fields[2].partition(":")
        found.append((("block", int(major), int(minor)), _unescape(rest[1]), _unescape(fields[4])))
    return found


def _swaps(system: System) -> list[Path]:
    return [Path(_unescape(line.split()[0])) for line in _lines(system.swaps)[1:] if line.split()]


def _loops(system: System) -> dict[Key, Key]:
    """Return the backing file of every loop device in use."""
    found: dict[Key, Key] = {}
    for backing in system.sys_block.glob("loop*/loop/backing_file"):
        device = _device_of(backing.parent.parent)
        lines = _lines(backing)
        key = key_of(Path(lines[0])) if lines else None
        if device is not None and key is not None:
            found[device] = key
    return found


def _closure(start: Key, system: System, *, made_of: bool) -> set[Key]:
    """Follow partitions, holders and slaves one way: to what it is made of, or to what is on it."""
    found: set[Key] = set()
    waiting = [start]
    while waiting:
        key = waiting.pop()
        if key[0] != "block":
            continue
        directory = system.sys_dev_block / f"{key[1]}:{key[2]}"
        try:
            directory = directory.resolve(strict=True)
        except OSError:
            continue
        relatives = list(directory.glob("slaves/*" if made_of else "holders/*"))
        if made_of and (directory / "partition").exists():
            relatives.append(directory.parent)
        if not made_of:
            relatives += [p.parent for p in directory.glob("*/partition")]
        for relative in relatives:
            device = _device_of(relative)
            if device is not None and device not in found:
                found.add(device)
                waiting.append(device)
    return found


def _device_of(directory: Path) -> Key | None:
    lines = _lines(directory / "dev")
    if not lines:
        return None
    major, _, minor = lines[0].partition(":")
    return "block", int(major), int(minor)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescape(text: str) -> str:
    """Undo the kernel's octal escapes for blanks in paths."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
