"""The catalog: an SQLite index of known volumes and of what happened to them.

It can be lost without harm: names, rules and receipts live in each volume's store, and
`volume import STORE` puts a volume back on the list. Only the event history is gone then.
"""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Self

from stillblock.errors import CatalogError, NameTakenError, NotFoundError, UnsupportedVersionError
from stillblock.model import Event, VolumeEntry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

EVENTS_KEPT_MAX: Final = 100_000
"""A line a minute for two months; older events go first."""
BUSY_TIMEOUT_S: Final = 10.0
"""Transactions here are one row; a longer wait means a process that hangs."""

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
)


class Catalog:
    """The open catalog of one state directory. Not shared between threads; opening is cheap."""

    def __init__(self, path: Path) -> None:
        """Open the catalog, making or migrating it as needed."""
        self._path = path
        with self._translated():
            self._connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
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

    def add(self, entry: VolumeEntry) -> None:
        """Remember a volume; raise `NameTakenError` if its name, uuid or store is known."""
        with self._transaction():
            for known in self.volumes():
                if known.name == entry.name:
                    raise NameTakenError(
                        f"there is a volume {entry.name} already, with store {known.store}",
                        hint="choose another name",
                    )
                if known.uuid == entry.uuid or known.store == entry.store:
                    raise NameTakenError(
                        f"store {entry.store} is known already as volume {known.name}"
                    )
            self._connection.execute(
                "INSERT INTO volume (name, uuid, origin, store) VALUES (?, ?, ?, ?)",
                (entry.name, entry.uuid, entry.origin, entry.store),
            )

    def remove(self, name: str) -> None:
        """Forget a volume."""
        with self._transaction():
            self._connection.execute("DELETE FROM volume WHERE name = ?", (name,))

    def volumes(self) -> tuple[VolumeEntry, ...]:
        """Return every known volume by name."""
        with self._translated():
            rows = self._connection.execute(
                "SELECT name, uuid, origin, store FROM volume ORDER BY name"
            ).fetchall()
        return tuple(VolumeEntry(name=n, uuid=u, origin=o, store=s) for n, u, o, s in rows)

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
            cursor = self._connection.execute(
                "INSERT INTO event (unix_ns, volume, kind, detail) VALUES (?, ?, ?, ?)",
                (unix_ns, volume, kind, json.dumps(detail, sort_keys=True)),
            )
            event_id = cursor.lastrowid or 0
            self._connection.execute(
                "DELETE FROM event WHERE id <= ?", (event_id - EVENTS_KEPT_MAX,)
            )
        return Event(id=event_id, unix_ns=unix_ns, volume=volume, action=kind, detail=dict(detail))

    def events(
        self, *, volume: str | None = None, after_id: int = 0, count_max: int = 1000
    ) -> tuple[Event, ...]:
        """Return the newest `count_max` events after an id, oldest of them first."""
        with self._translated():
            rows = self._connection.execute(
                "SELECT id, unix_ns, volume, kind, detail FROM event"
                " WHERE id > ? AND (? IS NULL OR volume = ?) ORDER BY id DESC LIMIT ?",
                (after_id, volume, volume, count_max),
            ).fetchall()
        return tuple(
            Event(id=i, unix_ns=t, volume=v, action=k, detail=json.loads(d))
            for i, t, v, k, d in reversed(rows)
        )

    def last_event_id(self) -> int:
        """Return the newest event's id, 0 if there is none."""
        with self._translated():
            row = self._connection.execute("SELECT max(id) FROM event").fetchone()
        return int(row[0] or 0)

    def _migrate(self) -> None:
        version = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
        if version > len(_MIGRATIONS):
            raise UnsupportedVersionError(
                f"{self._path} has version {version}, this stillblock knows {len(_MIGRATIONS)}",
                hint="use the newer stillblock, or move the file away and `volume import` the "
                "stores",
            )
        if version == len(_MIGRATIONS):
            return
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            # Look again: another process may have migrated while we waited for the lock.
            version = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
            for number, script in enumerate(_MIGRATIONS[version:], start=version + 1):
                for statement in filter(str.strip, script.split(";")):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {number}")
            self._connection.execute("COMMIT")
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._translated():
            self._connection.execute("BEGIN IMMEDIATE")
        try:
            with self._translated():
                yield
                self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise CatalogError(
                f"catalog {self._path}: {error}",
                hint="it is only an index: move it away and `stillblock volume import` each store",
            ) from error
