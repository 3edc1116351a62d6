"""What this system offers to stillblock, and what is wrong with the state directory."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillblock import native
from stillblock.catalog import Catalog
from stillblock.errors import StillblockError
from stillblock.model import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stillblock.config import Config
    from stillblock.model import VolumeEntry

_ALIGN_BYTES: Final = 4096
_LOCKED_BYTES_WANTED: Final = native.BUFFER_BYTES_DEFAULT
_TOOLS: Final = (
    ("nbdinfo", "libnbd-bin"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdfuse", "libnbd-bin"),
    ("qemu-img", "qemu-utils"),
    ("nbd-client", "nbd-client"),
)


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    MISSING = "missing"
    """Something useful is not there; everything else works."""
    BROKEN = "broken"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding."""

    name: str
    level: Level
    finding: str
    advice: str = ""


def examine(config: Config) -> tuple[Check, ...]:
    """Return every finding; changes nothing that outlives it."""
    with_volumes = _catalog(config)
    return (
        *with_volumes[0],
        *(check for entry in with_volumes[1] for check in _volume(entry)),
        _direct_io(config.state_dir),
        _nowait(config.state_dir),
        _shared_memory(),
        _memlock(),
        _device("kernel NBD client", Path("/sys/module/nbd"), "as root: modprobe nbd"),
        _device("FUSE", Path("/dev/fuse"), "install fuse3, to mount through nbdfuse"),
        *_tools(),
    )


def _catalog(config: Config) -> tuple[list[Check], tuple[VolumeEntry, ...]]:
    found = [
        Check(name="state directory", level=Level.OK, finding=str(config.state_dir)),
        Check(name="sockets", level=Level.OK, finding=str(config.run_dir)),
    ]
    try:
        with Catalog(config.catalog_path) as catalog:
            entries = catalog.volumes()
    except StillblockError as error:
        found.append(
            Check(
                name="catalog",
                level=Level.BROKEN,
                finding=error.message,
                advice=error.hint or "",
            )
        )
        return found, ()
    finding = f"{len(entries)} volume{'' if len(entries) == 1 else 's'}"
    found.append(Check(name="catalog", level=Level.OK, finding=finding))
    return found, entries


def _volume(entry: VolumeEntry) -> Iterator[Check]:
    name = f"volume {entry.name}"
    try:
        uuid, _, _, _ = native.peek(Path(entry.store))
    except StillblockError as error:
        advice = "mount what holds the store, or `volume import` it from where it is now"
        yield Check(name=name, level=Level.BROKEN, finding=str(error), advice=advice)
        return
    if uuid != entry.uuid:
        yield Check(
            name=name,
            level=Level.BROKEN,
            finding=f"{entry.store} holds another volume, {uuid}",
            advice=f"`volume remove --keep-store {entry.name}`, then `volume import`",
        )
    elif not Path(entry.origin).exists():
        yield Check(name=name, level=Level.BROKEN, finding=f"origin {entry.origin} does not exist")
    else:
        free_bytes = shutil.disk_usage(entry.store).free
        yield Check(name=name, level=Level.OK, finding=f"store has {format_size(free_bytes)} free")


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
