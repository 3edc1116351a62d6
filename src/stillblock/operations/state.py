"""What is wrong with the state directory, and putting right what can be without a doubt."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillblock import native
from stillblock.catalog import Catalog, salvage
from stillblock.errors import CatalogError, LockedError, NameTakenError, StillblockError
from stillblock.model import VolumeEntry, format_size
from stillblock.operations.findings import Check, Level
from stillblock.operations.registry import JOURNAL, adopt, open_catalog, read_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stillblock.config import Config

_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_PRIVATE: Final = 0o700
_BUFFER: Final = re.compile(r"stillblock-([0-9a-f]{32})\.buffer")
_FREE_BYTES_LOW: Final = 256 << 20
"""Four segments of a log: less fills within seconds."""
_REPAIR: Final = "`stillblock doctor --repair`"
_SHM: Final = Path("/dev/shm")  # noqa: S108 - the tmpfs itself is what is examined


def examine_state(config: Config, is_served: Callable[[str], bool]) -> Iterator[Check]:
    """Return every finding about the state directory, the catalog and the volumes in it."""
    yield from _directories(config)
    yield from _sockets(config)
    try:
        with open_catalog(config) as catalog:
            entries, unfinished, fault = catalog.volumes(), catalog.unfinished(), catalog.check()
    except StillblockError as error:
        advice = _REPAIR if isinstance(error, CatalogError) else error.hint or ""
        yield Check(name="catalog", level=Level.BROKEN, finding=error.message, advice=advice)
        return
    if fault:
        yield Check(name="catalog", level=Level.BROKEN, finding=fault, advice=_REPAIR)
    else:
        finding = f"{len(entries)} volume{'' if len(entries) == 1 else 's'}"
        yield Check(name="catalog", level=Level.OK, finding=finding)
    for entry, state in unfinished:
        yield Check(
            name=f"volume {entry.name}",
            level=Level.WARNING,
            finding=f"{state}: another process is at it",
            advice="the next command finishes it once that process is gone",
        )
    for entry in entries:
        yield from _volume(entry, is_served=is_served(entry.name))
    known = {entry.store for entry in entries} | {entry.store for entry, _ in unfinished}
    yield from _strays(config, known)
    for path, advice in _buffers(entries, is_served):
        yield Check(
            name="write buffer",
            level=Level.WARNING,
            finding=f"{path} ({format_size(path.stat().st_size)}) is left over",
            advice=advice,
        )


def _directories(config: Config) -> Iterator[Check]:
    for name, path in (("state directory", config.state_dir), ("sockets", config.run_dir)):
        mode = path.stat().st_mode
        owner = path.stat().st_uid
        if owner != os.getuid():
            yield Check(name=name, level=Level.BROKEN, finding=f"{path} belongs to another user")
        elif mode & _OTHERS & ~(stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH):
            yield Check(
                name=name,
                level=Level.WARNING,
                finding=f"others may write to {path} (mode {stat.S_IMODE(mode):o})",
                advice=_REPAIR,
            )
        else:
            yield Check(name=name, level=Level.OK, finding=str(path))
    yield _free_space("free space for the catalog", config.state_dir)


def _free_space(name: str, path: Path) -> Check:
    free_bytes = shutil.disk_usage(path).free
    if free_bytes == 0:
        return Check(
            name=name,
            level=Level.BROKEN,
            finding=f"none left on the filesystem of {path}",
            advice="free some, or delete snapshots: what changes now is lost to them",
        )
    if free_bytes < _FREE_BYTES_LOW:
        return Check(
            name=name,
            level=Level.WARNING,
            finding=f"{format_size(free_bytes)} left on the filesystem of {path}",
            advice="free some, or delete snapshots, before it is full",
        )
    return Check(name=name, level=Level.OK, finding=f"{format_size(free_bytes)} free")


def _volume(entry: VolumeEntry, *, is_served: bool) -> Iterator[Check]:
    name, store = f"volume {entry.name}", Path(entry.store)
    try:
        uuid, origin, _, _ = native.peek(store)
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
        return
    if not Path(origin).exists():
        yield Check(
            name=name,
            level=Level.BROKEN,
            finding=f"origin {origin} does not exist",
            advice=f"attach it, or `volume remove --keep-store {entry.name}` and `volume import` "
            "with --origin",
        )
        return
    yield _free_space(f"{name}: room in the store", store)
    if not is_served:
        yield from _stopped(name, entry)


def _stopped(name: str, entry: VolumeEntry) -> Iterator[Check]:
    try:
        found = native.inspect(Path(entry.store))
    except LockedError:
        return  # a command works on it
    except StillblockError as error:
        yield Check(name=name, level=Level.BROKEN, finding=str(error), advice=error.hint or "")
        return
    damaged = sum(bool(damage) for _, _, _, _, damage in found.epochs)
    if damaged:
        yield Check(
            name=name,
            level=Level.BROKEN,
            finding=f"{damaged} snapshots are damaged",
            advice=f"`stillblock volume check {entry.name}`",
        )
    if found.origin_failure:
        yield Check(
            name=name,
            level=Level.BROKEN,
            finding=f"its origin failed: {found.origin_failure}",
            advice=f"check the device, then `stillblock volume recover {entry.name} --discard`",
        )
    elif found.left_as == "killed" and (found.is_touched or found.left_in in {"lost", "newer"}):
        yield Check(
            name=name,
            level=Level.WARNING,
            finding="its server was killed, and somebody has to decide about its last writes",
            advice=f"`stillblock volume recover {entry.name} --replay --dry-run` lists them",
        )
    elif found.left_as != "closed":
        yield Check(
            name=name,
            level=Level.WARNING,
            finding="it was not closed: the origin alone may not be complete",
            advice=f"`stillblock volume release {entry.name}` completes it",
        )


def _strays(config: Config, known: set[str]) -> Iterator[Check]:
    stores = config.state_dir / "stores"
    for path in sorted(stores.iterdir()) if stores.is_dir() else ():
        if str(path) in known:
            continue
        is_store = (path / JOURNAL).exists()
        yield Check(
            name="store",
            level=Level.WARNING,
            finding=f"{path} is {'not on the list' if is_store else 'no store: it has no journal'}",
            advice=f"{_REPAIR}, or `volume import` it under a name of your choice"
            if is_store
            else "look at it, and delete it if you do not know it",
        )


def _sockets(config: Config) -> Iterator[Check]:
    for path in stale_sockets(config):
        finding = f"nobody listens on {path}"
        yield Check(name="sockets", level=Level.WARNING, finding=finding, advice=_REPAIR)


def stale_sockets(config: Config) -> tuple[Path, ...]:
    """Return the sockets that processes left which are gone."""
    paths = (path for run_dir in config.run_dirs for path in sorted(run_dir.glob("*")))
    return tuple(path for path in paths if path.is_socket() and not _is_answered(path))


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True  # busy or not ours: none of our business
    return True


def _buffers(
    entries: tuple[VolumeEntry, ...], is_served: Callable[[str], bool]
) -> Iterator[tuple[Path, str]]:
    """Return write buffers in memory that nobody uses, each with what to do about it."""
    by_uuid = {entry.uuid: entry for entry in entries}
    places = [Path(p) for p in (os.environ.get("XDG_RUNTIME_DIR"),) if p] + [_SHM]
    for path in (p for place in places if place.is_dir() for p in sorted(place.iterdir())):
        match = _BUFFER.fullmatch(path.name)
        if match is None or path.stat().st_uid != os.getuid():
            continue
        entry = by_uuid.get(match[1])
        if entry is None:
            yield path, "of a volume that is not on this list: import it, or delete the file"
        elif not is_served(entry.name) and _is_closed(entry):
            yield path, _REPAIR
    # That of a volume that was killed is its memory, and told with the volume.


def _is_closed(entry: VolumeEntry) -> bool:
    try:
        return native.inspect(Path(entry.store)).left_as == "closed"
    except StillblockError:
        return False


def repair_state(config: Config, is_served: Callable[[str], bool]) -> tuple[str, ...]:
    """Put right what can be put right without a doubt; return what was done."""
    done: list[str] = []
    for path in (config.state_dir, config.run_dir):
        if path.stat().st_uid == os.getuid() and path.stat().st_mode & (
            stat.S_IWGRP | stat.S_IWOTH
        ):
            path.chmod(_PRIVATE)
            done.append(f"closed {path} to others")
    for path in stale_sockets(config):
        path.unlink(missing_ok=True)
        done.append(f"removed the socket {path}")
    done += _rebuild(config)
    with open_catalog(config) as catalog:
        done += [f"put {e.name} back on the list, store {e.store}" for e in adopt(config, catalog)]
        entries = catalog.volumes()
    for path, advice in tuple(_buffers(entries, is_served)):
        if advice == _REPAIR:
            path.unlink(missing_ok=True)
            done.append(f"removed the write buffer {path} of a volume that is closed")
    return tuple(done)


def _rebuild(config: Config) -> list[str]:
    """Replace a catalog that cannot be read; a newer one is not touched."""
    try:
        with Catalog(config.catalog_path) as catalog:
            catalog.volumes()
            catalog.unfinished()
            if not catalog.check():
                return []
    except CatalogError:
        pass
    entries = salvage(config.catalog_path)
    aside = config.catalog_path.with_suffix(f".damaged-{time.time_ns()}")
    config.catalog_path.replace(aside)
    for ending in ("-wal", "-shm"):
        config.catalog_path.with_name(config.catalog_path.name + ending).unlink(missing_ok=True)
    done = [f"moved the damaged catalog to {aside}"]
    with open_catalog(config) as catalog:
        done += [f"found {entry.name}, store {entry.store}" for entry in catalog.volumes()]
        for entry in entries:
            done += _take_back(catalog, entry)
    return done


def _take_back(catalog: Catalog, entry: VolumeEntry) -> list[str]:
    """Take over an entry that could be read, if its store says the same."""
    try:
        uuid, origin, _, meta = native.peek(Path(entry.store))
        name = read_settings(meta, fallback_name=entry.name).name
        catalog.add(VolumeEntry(name=name, uuid=uuid, origin=origin, store=entry.store))
    except NameTakenError:
        return []  # found by itself
    except StillblockError as error:
        return [f"{entry.name} is left off the list: {error}"]
    return [f"found {name}, store {entry.store}"]
