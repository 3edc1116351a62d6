"""Keeping the catalog in step with the stores: it follows them, whatever happened to either.

A volume is made and removed in steps that are on record, so that whoever comes next finishes what a
killed process began. A catalog that was lost finds the stores in the state directory again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillblock import codec, native
from stillblock.catalog import Catalog, EntryState
from stillblock.errors import (
    CatalogError,
    NotFoundError,
    StillblockError,
    StoreDamagedError,
    UsageError,
)
from stillblock.model import VolumeConfig, VolumeEntry, check_new_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stillblock.config import Config

VOLUME_KIND: Final = "volume-config"
JOURNAL: Final = "journal"
_SKELETON: Final = frozenset({JOURNAL, "lock", "log"})
_NAMES_MAX: Final = 1000
"""Stores of one name in one state directory; more is not an accident."""


@contextmanager
def open_catalog(config: Config) -> Iterator[Catalog]:
    """Open the catalog, with what was interrupted finished and what was lost found again."""
    with Catalog(config.catalog_path) as catalog:
        if catalog.is_new:
            adopt(config, catalog)
            catalog.note_adopted()
        if catalog.unfinished():
            with _registering(config, is_patient=False) as is_ours:
                if is_ours:
                    finish(catalog)
        yield catalog


@contextmanager
def registering(config: Config) -> Iterator[None]:
    """Hold off whoever would take what is being done here for interrupted."""
    with _registering(config, is_patient=True):
        yield


@contextmanager
def _registering(config: Config, *, is_patient: bool) -> Iterator[bool]:
    # The lock goes with the process: what a killed one began is nobody's.
    with open(config.state_dir / "registry.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if is_patient else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def finish(catalog: Catalog) -> None:
    """Finish what a killed process began to add or remove."""
    for entry, state in catalog.unfinished():
        store = Path(entry.store)
        if state is EntryState.REMOVING:
            delete_store(store)
            catalog.remove(entry.name)
            catalog.record(entry.name, "volume_removed", deleted_store=True, resumed=True)
            continue
        uuid = _uuid_of(store)
        if uuid is None:
            discard_skeleton(store)
            catalog.remove(entry.name)
        else:
            catalog.update(replace(entry, uuid=uuid))
            catalog.record(entry.name, "volume_added", store=entry.store, resumed=True)


def _uuid_of(store: Path) -> str | None:
    """Return the uuid of a store that was made, None if its first record never became durable."""
    try:
        return native.peek(store)[0]
    except (NotFoundError, StoreDamagedError):
        return None


def discard_skeleton(store: Path) -> None:
    """Remove what is left of a store that was never made; anything else there is left alone."""
    if not store.is_dir() or not {p.name for p in store.iterdir()} <= _SKELETON:
        return
    if not any((store / "log").glob("*")):
        shutil.rmtree(store)


def delete_store(store: Path) -> None:
    """Delete a store. First its journal: a directory without one is no store."""
    if not store.exists():
        return
    (store / JOURNAL).unlink(missing_ok=True)
    descriptor = os.open(store, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(store)


def stores_in(config: Config) -> tuple[Path, ...]:
    """Return the stores that lie in the state directory."""
    journals = (config.state_dir / "stores").glob(f"*/{JOURNAL}")
    return tuple(sorted(path.parent for path in journals))


def adopt(config: Config, catalog: Catalog) -> tuple[VolumeEntry, ...]:
    """Put stores in the state directory that are not on the list back on it; return them.

    A store that cannot be read stays off the list; `doctor` tells which.
    """
    adopted: list[VolumeEntry] = []
    for store in stores_in(config):
        known = (*catalog.volumes(), *(entry for entry, _ in catalog.unfinished()))
        if any(entry.store == str(store) for entry in known):
            continue
        try:
            uuid, origin, _, meta = native.peek(store)
            name = _free_name(read_settings(meta, fallback_name=store.name).name, store, known)
        except StillblockError:
            continue
        if any(entry.uuid == uuid for entry in known):
            continue
        entry = VolumeEntry(name=name, uuid=uuid, origin=origin, store=str(store))
        catalog.add(entry)
        catalog.record(name, "volume_adopted", store=str(store))
        adopted.append(entry)
    return tuple(adopted)


def _free_name(wanted: str, store: Path, known: tuple[VolumeEntry, ...]) -> str:
    taken = {entry.name for entry in known}
    for name in (wanted, *(f"{store.name}-{n}" for n in range(2, _NAMES_MAX))):
        try:
            check_new_name(name, what="volume")
        except UsageError:
            continue
        if name not in taken:
            return name
    raise CatalogError(f"no free name for the store {store}")


def locate(config: Config, name: str) -> tuple[VolumeEntry, str]:
    """Return a volume's entry and where its origin is.

    The store decides: a catalog from yesterday may know another store of that name, or an origin
    that has been replaced since. Only of a volume that was just imported the user knows better.
    """
    with open_catalog(config) as catalog:
        entry = catalog.volume(name)
        is_imported = catalog.is_imported(name)
    uuid, origin, _, _ = native.peek(Path(entry.store))
    if uuid != entry.uuid:
        raise CatalogError(
            f"{entry.store} holds another volume than the catalog says ({uuid}, not {entry.uuid})",
            hint=f"`stillblock volume remove --keep-store {name}`, then `volume import` the store",
        )
    return entry, entry.origin if is_imported else origin


def follow(config: Config, entry: VolumeEntry, origin: str) -> None:
    """Note where the origin of an open volume is: its store knows it from now on."""
    with Catalog(config.catalog_path) as catalog:
        if entry.origin != origin or catalog.is_imported(entry.name):
            catalog.update(replace(entry, origin=origin))


def read_settings(meta: bytes, *, fallback_name: str) -> VolumeConfig:
    """Return the settings in a store; one made by the bare engine has none."""
    if not meta:
        return VolumeConfig(name=fallback_name, created_unix_ns=0)
    return codec.load(VOLUME_KIND, VolumeConfig, meta)
