"""The catalog: an SQLite index of known volumes and of what happened to them.

It can be lost without harm: names, rules and receipts live in each volume's store, stores in the
state directory are found again by themselves, and `volume import STORE` puts any other back on the
list. Only the event history is gone then.
"""

from __future__ import annotations

import json
import sqlite3
import time
import zlib
from contextlib import closing, contextmanager
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Self

from stillblock.errors import CatalogError, NameTakenError, NotFoundError, UnsupportedVersionError
from stillblock.model import Event, VolumeEntry

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

EVENTS_KEPT_MAX: Final = 100_000
"""A line a minute for two months; older events go first."""
BUSY_TIMEOUT_S: Final = 10.0
"""Transactions here are one row; a longer wait means a process that hangs."""

_ADOPTED: Final = 0x5342_4C4B
"""SQLite's application id, set once the stores in the state directory were looked for."""
_REBUILD: Final = (
    "it is only an index: `stillblock doctor --repair` moves it away and lists the stores in the "
    "state directory anew; `stillblock volume import` lists those elsewhere"
)

_MIGRATIONS: Final[tuple[str, ...]] = (
    # 1: volumes and events.
    """
    CREATE TABLE volume (
        name TEXT PRIMARY KEY,
        uuid TEXT NOT NULL UNIQUE,
        origin TEXT NOT NULL,
        store TEXT NOT NULL UNIQUE
    ) STRICT;
    CREATE TABLE event (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        unix_ns INTEGER NOT NULL,
        volume TEXT NOT NULL,
        kind TEXT NOT NULL,
        detail TEXT NOT NULL
    ) STRICT;
    CREATE INDEX event_by_volume ON event (volume, id);
    """,
    # 2: volumes that are being made or removed, and a checksum a row: SQLite has none of its own.
    """
    ALTER TABLE volume ADD COLUMN state TEXT NOT NULL DEFAULT 'ready';
    ALTER TABLE volume ADD COLUMN checksum TEXT NOT NULL DEFAULT '';
    """,
)


class EntryState(StrEnum):
    """Where a volume is between its first and its last moment on the list."""

    ADDING = "adding"
    """Its store is being made; without one it never was."""
    IMPORTED = "imported"
    """The user said where its origin is; the store learns it when it is first opened here."""
    READY = "ready"
    REMOVING = "removing"
    """Its store is being deleted, and will be."""


_LISTED: Final = frozenset({EntryState.IMPORTED, EntryState.READY})


class Catalog:
    """The open catalog of one state directory. Not shared between threads; opening is cheap."""

    def __init__(self, path: Path) -> None:
        """Open the catalog, making or migrating it as needed."""
        self._path = path
        with self._translated():
            self._connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
            self._execute("PRAGMA journal_mode=WAL")
            self._execute("PRAGMA synchronous=FULL")
            self._migrate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    # Volumes

    @property
    def is_new(self) -> bool:
        """Whether nobody looked yet which stores there are already."""
        with self._translated():
            return int(self._execute("PRAGMA application_id").fetchone()[0]) != _ADOPTED

    def note_adopted(self) -> None:
        """Write down that somebody looked."""
        with self._translated():
            self._execute(f"PRAGMA application_id = {_ADOPTED}")

    def add(self, entry: VolumeEntry, state: EntryState = EntryState.READY) -> None:
        """Remember a volume; raise `NameTakenError` if its name, uuid or store is known.

        One that is only being added has no uuid yet.
        """
        uuid = entry.uuid or f"{EntryState.ADDING}:{entry.name}"
        with self._transaction():
            for known, _ in self._rows():
                if known.name == entry.name:
                    raise NameTakenError(
                        f"there is a volume {entry.name} already, with store {known.store}",
                        hint="choose another name",
                    )
                if known.uuid == entry.uuid or known.store == entry.store:
                    raise NameTakenError(
                        f"store {entry.store} is known already as volume {known.name}"
                    )
            self._insert(replace(entry, uuid=uuid), state)

    def update(self, entry: VolumeEntry, state: EntryState = EntryState.READY) -> None:
        """Replace what is known of the volume of this name."""
        with self._transaction():
            self._execute("DELETE FROM volume WHERE name = ?", entry.name)
            self._insert(entry, state)

    def _insert(self, entry: VolumeEntry, state: EntryState) -> None:
        fields = (entry.name, entry.uuid, entry.origin, entry.store, str(state))
        self._execute(
            "INSERT INTO volume (name, uuid, origin, store, state, checksum)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            *fields,
            _checksum(fields),
        )

    def remove(self, name: str) -> None:
        """Forget a volume."""
        with self._transaction():
            self._execute("DELETE FROM volume WHERE name = ?", name)

    def volumes(self) -> tuple[VolumeEntry, ...]:
        """Return every known volume by name."""
        return tuple(entry for entry, state in self._rows() if state in _LISTED)

    def unfinished(self) -> tuple[tuple[VolumeEntry, EntryState], ...]:
        """Return what a process that is gone, or still runs, began to add or remove."""
        return tuple((e, state) for e, state in self._rows() if state not in _LISTED)

    def is_imported(self, name: str) -> bool:
        """Whether the volume was imported and not opened here yet."""
        rows = self._rows()
        return any(e.name == name and state is EntryState.IMPORTED for e, state in rows)

    def _rows(self) -> list[tuple[VolumeEntry, EntryState]]:
        with self._translated():
            rows = self._execute(
                "SELECT name, uuid, origin, store, state, checksum FROM volume ORDER BY name"
            ).fetchall()
        found: list[tuple[VolumeEntry, EntryState]] = []
        for *fields, checksum in rows:
            if not all(isinstance(f, str) for f in fields) or _checksum(fields) != checksum:
                raise CatalogError(
                    f"catalog {self._path} is damaged: the entry of volume {fields[0]} fails its "
                    "checksum",
                    hint=_REBUILD,
                )
            name, uuid, origin, store, state = fields
            entry = VolumeEntry(name=name, uuid=uuid, origin=origin, store=store)
            found.append((entry, EntryState(state)))
        return found

    def volume(self, name: str) -> VolumeEntry:
        """Return one volume; raise `NotFoundError` that lists what there is."""
        known = self.volumes()
        for entry in known:
            if entry.name == name:
                return entry
        names = ", ".join(entry.name for entry in known) or "none yet"
        raise NotFoundError(
            f"no volume {name} in {self._path.parent} (known: {names})",
            hint="add it with `stillblock volume add`, or `volume import` its store",
        )

    # Events

    def record(self, volume: str, kind: str, **detail: str | int | bool) -> Event:
        """Write down that something happened to a volume."""
        unix_ns = time.time_ns()
        with self._transaction():
            cursor = self._execute(
                "INSERT INTO event (unix_ns, volume, kind, detail) VALUES (?, ?, ?, ?)",
                unix_ns,
                volume,
                kind,
                json.dumps(detail, sort_keys=True),
            )
            event_id = cursor.lastrowid or 0
            self._execute("DELETE FROM event WHERE id <= ?", event_id - EVENTS_KEPT_MAX)
        return Event(id=event_id, unix_ns=unix_ns, volume=volume, action=kind, detail=dict(detail))

    def events(
        self, *, volume: str | None = None, after_id: int = 0, count_max: int = 1000
    ) -> tuple[Event, ...]:
        """Return the newest `count_max` events after an id, oldest of them first."""
        with self._translated():
            rows = self._execute(
                "SELECT id, unix_ns, volume, kind, detail FROM event"
                " WHERE id > ? AND (? IS NULL OR volume = ?) ORDER BY id DESC LIMIT ?",
                after_id,
                volume,
                volume,
                count_max,
            ).fetchall()
        return tuple(
            Event(id=i, unix_ns=t, volume=v, action=k, detail=_detail(d))
            for i, t, v, k, d in reversed(rows)
        )

    def last_event_id(self) -> int:
        """Return the newest event's id, 0 if there is none."""
        with self._translated():
            row = self._execute("SELECT max(id) FROM event").fetchone()
        return int(row[0] or 0)

    def check(self) -> str:
        """Return what SQLite finds wrong with the file; empty if nothing is."""
        with self._translated():
            rows = self._execute("PRAGMA quick_check").fetchall()
        words = "; ".join(str(row[0]) for row in rows)
        return "" if words == "ok" else words

    def _execute(self, statement: str, *values: str | int | None) -> sqlite3.Cursor:
        return self._connection.execute(statement, values)

    def _migrate(self) -> None:
        version = int(self._execute("PRAGMA user_version").fetchone()[0])
        if version > len(_MIGRATIONS):
            raise UnsupportedVersionError(
                f"{self._path} has version {version}, this stillblock knows {len(_MIGRATIONS)}",
                hint=f"use the newer stillblock, or: {_REBUILD}",
            )
        if version == len(_MIGRATIONS):
            return
        self._execute("BEGIN IMMEDIATE")
        try:
            # Look again: another process may have migrated while we waited for the lock.
            version = int(self._execute("PRAGMA user_version").fetchone()[0])
            if version > 0:
                self._execute(f"PRAGMA application_id = {_ADOPTED}")
            for number, script in enumerate(_MIGRATIONS[version:], start=version + 1):
                for statement in filter(str.strip, script.split(";")):
                    self._execute(statement)
                self._execute(f"PRAGMA user_version = {number}")
            rows = self._execute("SELECT name, uuid, origin, store, state FROM volume").fetchall()
            for row in rows:
                self._execute(
                    "UPDATE volume SET checksum = ? WHERE name = ?", _checksum(row), row[0]
                )
            self._execute("COMMIT")
        except BaseException:
            self._execute("ROLLBACK")
            raise

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._translated():
            self._execute("BEGIN IMMEDIATE")
        try:
            with self._translated():
                yield
                self._execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._execute("ROLLBACK")
            raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise CatalogError(
                f"catalog {self._path}: {error}",
                hint=_REBUILD,
            ) from error


def salvage(path: Path) -> tuple[VolumeEntry, ...]:
    """Return what can be read of a damaged catalog; the reader verifies each entry."""
    found: list[VolumeEntry] = []
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as connection:
            for row in connection.execute("SELECT name, uuid, origin, store FROM volume"):
                if all(isinstance(field, str) for field in row):
                    name, uuid, origin, store = row
                    found.append(VolumeEntry(name=name, uuid=uuid, origin=origin, store=store))
    except (sqlite3.Error, UnicodeDecodeError):
        pass  # what was read before is all there is
    return tuple(found)


def _checksum(fields: Sequence[str]) -> str:
    return f"{zlib.crc32(chr(0).join(fields).encode()):08x}"


def _detail(text: str) -> dict[str, str | int | bool]:
    """Read an event's detail; the history is a courtesy, and a rotten line of it hides no other."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"unreadable": text}
