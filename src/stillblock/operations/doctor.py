"""What this system offers to stillblock, and what is wrong with the state directory."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillblock import native, selection
from stillblock.errors import StateError
from stillblock.model import format_size
from stillblock.mounting import records
from stillblock.operations.findings import Check, Level
from stillblock.operations.state import examine_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stillblock.config import Config

_ALIGN_BYTES: Final = 4096
_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
"""fallocate(2)"""
_LOCKED_BYTES_WANTED: Final = native.BUFFER_BYTES_DEFAULT
_TOOLS: Final = (
    ("nbdinfo", "libnbd-bin"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdfuse", "libnbd-bin"),
    ("qemu-img", "qemu-utils"),
    ("nbd-client", "nbd-client"),
)


def examine(config: Config, is_served: Callable[[str], bool]) -> tuple[Check, ...]:
    """Return every finding; changes nothing that outlives it."""
    return (
        *examine_state(config, is_served),
        _direct_io(config.state_dir),
        _nowait(config.state_dir),
        _punching(config.state_dir),
        _shared_memory(),
        _memlock(),
        _call_filter(),
        _device("kernel NBD client", Path("/sys/module/nbd"), "as root: modprobe nbd"),
        _device("FUSE", Path("/dev/fuse"), "install fuse3, to mount and to see disks as files"),
        _device("loop devices", Path("/dev/loop-control"), "as root, to mount: modprobe loop"),
        _mounts(config, is_served),
        *_tools(),
    )


def _direct_io(directory: Path) -> Check:
    name = "direct I/O in the state directory"
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as probe:
            os.close(os.open(probe.name, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        level = Level.MISSING if error.errno == errno.EINVAL else Level.BROKEN
        return Check(
            name=name,
            level=level,
            finding=error.strerror or str(error),
            advice="the page cache is used; put stores on a disk's filesystem for --direct",
        )
    return Check(name=name, level=Level.OK, finding="works")


def _nowait(directory: Path) -> Check:
    name = "cached reads without waiting (RWF_NOWAIT)"
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as probe:
            probe.write(bytes(_ALIGN_BYTES))
            probe.flush()
            os.preadv(probe.fileno(), [bytearray(_ALIGN_BYTES)], 0, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno != errno.EAGAIN:
            return Check(name=name, level=Level.MISSING, finding=error.strerror or str(error))
    return Check(name=name, level=Level.OK, finding="works")


def _punching(directory: Path) -> Check:
    """Whether the space of preserved content can be given back."""
    name = "punching holes in the state directory"
    with tempfile.NamedTemporaryFile(dir=directory) as probe:
        os.posix_fallocate(probe.fileno(), 0, 4 * _ALIGN_BYTES)
        libc = ctypes.CDLL(None, use_errno=True)
        offset, length = ctypes.c_int64(_ALIGN_BYTES), ctypes.c_int64(_ALIGN_BYTES)
        if libc.fallocate64(probe.fileno(), _PUNCH_HOLE | _KEEP_SIZE, offset, length) == 0:
            return Check(name=name, level=Level.OK, finding="works")
        return Check(
            name=name,
            level=Level.MISSING,
            finding=os.strerror(ctypes.get_errno()),
            advice="deleting a snapshot frees whole log segments only; use ext4, XFS or Btrfs",
        )


def _shared_memory() -> Check:
    name = "memory for the write buffer (/dev/shm)"
    directory = Path("/dev/shm")  # noqa: S108 - the tmpfs itself is what is examined
    if not os.access(directory, os.W_OK):
        return Check(
            name=name,
            level=Level.MISSING,
            finding="no tmpfs that can be written",
            advice="writes go through at once; mount a tmpfs and name it with --buffer-dir",
        )
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < native.BUFFER_BYTES_DEFAULT:
        return Check(
            name=name,
            level=Level.MISSING,
            finding=f"only {format_size(free_bytes)} free",
            advice="enlarge it, or use a smaller --buffer-size",
        )
    return Check(name=name, level=Level.OK, finding=f"{format_size(free_bytes)} free")


def _memlock() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= _LOCKED_BYTES_WANTED or os.geteuid() == 0:
        shown = "unlimited" if soft == resource.RLIM_INFINITY else format_size(soft)
        return Check(name="locked memory", level=Level.OK, finding=shown)
    return Check(
        name="locked memory",
        level=Level.MISSING,
        finding=f"limit {format_size(soft)}",
        advice="raise LimitMEMLOCK, or the buffer may be swapped out",
    )


def _call_filter() -> Check:
    name = "filter of system calls for filesystem readers (seccomp)"
    if selection.can_filter_calls():
        return Check(name=name, level=Level.OK, finding="works")
    return Check(
        name=name,
        level=Level.MISSING,
        finding="not on this kernel or processor",
        advice="readers run with limits on memory, time and descriptors only",
    )


def _mounts(config: Config, is_served: Callable[[str], bool]) -> Check:
    """Whether somebody answers for what is mounted."""
    try:
        known = [record for record in records.read(config.mounts_dir) if not record.is_private]
    except StateError as error:
        return Check(
            name="mounts", level=Level.WARNING, finding=error.message, advice=error.hint or ""
        )
    dead = [record for record in known if not is_served(record.volume)]
    if not dead:
        return Check(name="mounts", level=Level.OK, finding=f"{len(known)}")
    return Check(
        name="mounts",
        level=Level.WARNING,
        finding="nobody answers for " + ", ".join(f"{r.reference} at {r.where}" for r in dead),
        advice="serve the volume again, or `stillblock unmount` each",
    )


def _device(name: str, path: Path, advice: str) -> Check:
    if path.exists():
        return Check(name=name, level=Level.OK, finding=str(path))
    return Check(name=name, level=Level.MISSING, finding=f"no {path}", advice=advice)


def _tools() -> Iterator[Check]:
    for tool, package in _TOOLS:
        path = shutil.which(tool)
        if path:
            yield Check(name=tool, level=Level.OK, finding=path)
        else:
            yield Check(
                name=tool, level=Level.MISSING, finding="not found", advice=f"install {package}"
            )
