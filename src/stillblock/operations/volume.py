"""A volume open in this process: the engine's volume with names, rules and receipts."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, Self

from stillblock import native, selection
from stillblock.catalog import Catalog
from stillblock.consistency import leftover
from stillblock.errors import (
    CatalogError,
    LockedError,
    NameTakenError,
    NotFoundError,
    NotServedError,
    OriginChangedError,
    RecoveryNeededError,
)
from stillblock.extents import total_bytes
from stillblock.model import (
    LATEST,
    BookmarkRecord,
    ExportInfo,
    SnapshotPurpose,
    SnapshotRecord,
    SnapshotState,
    VolumeConfig,
    VolumeEntry,
    VolumeInfo,
    check_new_name,
    free_name,
    is_id_prefix,
    name_for_instant,
)
from stillblock.operations import registry, verification
from stillblock.operations.instants import Instants
from stillblock.operations.narrowing import Narrowings
from stillblock.operations.records import (
    bookmark_record,
    encode_settings,
    encode_snapshot,
    snapshot_record,
)
from stillblock.operations.registry import read_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stillblock.config import Config
    from stillblock.model import Extents
    from stillblock.operations.promotion import Promotion
    from stillblock.operations.verification import Verification

_LOG: Final = logging.getLogger("stillblock.operations")
_THAW_LEFT_S: Final = 2.0
"""How long an opening waits for what was left frozen; then it is thawed beside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How the engine runs a volume while it is open."""

    cache: native.Cache = "writeback"
    direct: bool = False
    buffer_dir: Path | None = None
    buffer_bytes: int = native.BUFFER_BYTES_DEFAULT
    recover: native.Recovery = "refuse"


class ExportHooks(Protocol):
    """What has to follow when snapshots come and go; a server of exports implements it."""

    def withdraw(self, volume: OpenVolume, snapshot: Snapshot, *, force: bool) -> None:
        """Let go of a snapshot that is about to be deleted; raise `InUseError` unless forced."""

    def reconcile(self, volume: OpenVolume) -> None:
        """Offer what the volume has now. Never raises for the sake of what is already committed."""

    def retire(self, volume: OpenVolume) -> None:
        """Let go of the volume altogether: it is about to be closed for good."""

    def closed(self, volume: OpenVolume) -> None:
        """Take note that it is closed for good."""

    def exports(self, volume: OpenVolume) -> tuple[ExportInfo, ...]:
        """Return what clients can ask for."""

    def holders(self, volume: OpenVolume, epoch: native.Epoch) -> int:
        """Return how many clients, views and restores really use a snapshot."""

    def withdraw_clone(self, volume: OpenVolume, number: int, *, force: bool) -> None:
        """Close a clone that is about to change or go; raise `InUseError` unless forced."""

    def clone_clients(self, volume: OpenVolume) -> dict[int, int]:
        """Return how many clients use each clone, by its number."""

    def show_images(self, volume: OpenVolume, directory: str) -> None:
        """Show images of everything there is as files in a directory."""

    def shows_images(self, volume: OpenVolume, directory: str) -> bool:
        """Whether they are shown there, and answered for."""

    def image_path(
        self, volume: OpenVolume, reference: str, place: str, pieces: Extents | None
    ) -> str:
        """Return which file below such a directory shows a place; it is there from now on."""

    def clone_disk(self, volume: OpenVolume, reference: str) -> native.Clone:
        """Return a clone as it is now, to read."""


class NoExports:
    """For a volume that nobody serves."""

    def withdraw(self, volume: OpenVolume, snapshot: Snapshot, *, force: bool) -> None:
        """Nothing to let go of."""

    def reconcile(self, volume: OpenVolume) -> None:
        """Nothing to offer."""

    def retire(self, volume: OpenVolume) -> None:
        """Nothing to let go of."""

    def closed(self, volume: OpenVolume) -> None:
        """Nobody to tell."""

    def exports(self, volume: OpenVolume) -> tuple[ExportInfo, ...]:  # noqa: ARG002
        """Return nothing."""
        return ()

    def holders(self, volume: OpenVolume, epoch: native.Epoch) -> int:  # noqa: ARG002
        """Return what the engine says."""
        return epoch.in_use

    def withdraw_clone(self, volume: OpenVolume, number: int, *, force: bool) -> None:
        """Nothing to close."""

    def clone_clients(self, volume: OpenVolume) -> dict[int, int]:  # noqa: ARG002
        """Return nobody."""
        return {}

    def show_images(self, volume: OpenVolume, directory: str) -> None:  # noqa: ARG002
        """Refuse."""
        raise _not_served(volume)

    def shows_images(self, volume: OpenVolume, directory: str) -> bool:  # noqa: ARG002
        """Nothing is shown."""
        return False

    def image_path(
        self,
        volume: OpenVolume,
        reference: str,  # noqa: ARG002
        place: str,  # noqa: ARG002
        pieces: Extents | None,  # noqa: ARG002
    ) -> str:
        """Refuse."""
        raise _not_served(volume)

    def clone_disk(self, volume: OpenVolume, reference: str) -> native.Clone:  # noqa: ARG002
        """Refuse."""
        raise _not_served(volume)


def _not_served(volume: OpenVolume) -> NotServedError:
    return NotServedError(
        f"{volume.name} is not served, so nobody can show its images",
        hint=f"start `stillblock serve {volume.name}` and leave it running",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A snapshot: what the engine knows and what we wrote beside it."""

    epoch: native.Epoch
    record: SnapshotRecord

    @property
    def is_readable(self) -> bool:
        """Whether there is something to read: it exists, its header too, and it is final."""
        return self.record.is_final and not self.epoch.damage and not self.epoch.undecided

    @property
    def state(self) -> SnapshotState:
        """The worst that is known of it."""
        if self.epoch.undecided:
            return SnapshotState.UNDECIDED
        if self.epoch.damage or self.epoch.damaged:
            return SnapshotState.DAMAGED
        if self.epoch.lost:
            return SnapshotState.PARTIAL
        if self.epoch.is_suspect:
            return SnapshotState.SUSPECT
        return SnapshotState.OK if self.record.is_final else SnapshotState.NARROWING


@dataclass(frozen=True, slots=True, kw_only=True)
class Bookmark:
    """A bookmark: what the engine knows and what we wrote beside it."""

    epoch: native.Epoch
    record: BookmarkRecord


class OpenVolume:
    """One volume, locked by this process until closed. Thread-safe."""

    def __init__(self, config: Config, entry: VolumeEntry, engine: native.Volume) -> None:
        self.engine = engine
        self.hooks: ExportHooks = NoExports()
        self.lock = threading.RLock()
        """Held by whatever changes names, so that two requests cannot both find one free."""
        self._config = config
        self._entry = entry
        self.verification: Verification | None = None
        """The latest one; it ends with the volume."""
        self.promotion: Promotion | None = None
        """The latest one; it ends with the volume."""
        self.narrowings = Narrowings()
        """Those under way; they end with the volume."""
        self.instants = Instants(entry.name)
        """The one being prepared; what it waits for ends with the volume."""
        self._is_closed = False
        self._buffer_dir: Path | None = None

    @classmethod
    def open(cls, config: Config, name: str, options: EngineOptions | None = None) -> Self:
        """Open a volume of the catalog; the message of a refusal says what to do."""
        chosen = options or EngineOptions()
        with _advice(name):
            entry, origin = registry.locate(config, name)
            engine = native.Volume.open(
                Path(entry.store),
                origin=Path(origin),
                cache=chosen.cache,
                direct=chosen.direct,
                buffer_dir=chosen.buffer_dir,
                buffer_bytes=chosen.buffer_bytes,
                recover=chosen.recover,
                peers=_other_stores(config, name),
            )
        volume = cls(config, entry, engine)
        volume._buffer_dir = chosen.buffer_dir
        try:
            settings = volume.settings()
            if settings.name != name:  # imported under another name
                volume.store_settings(replace(settings, name=name))
            verification.remember_damage(engine, settings.damaged)
            registry.follow(config, entry, engine.origin)
            volume.thaw_left()
        except BaseException:
            volume.close()
            raise
        return volume

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop cleanly; the origin is a complete raw disk afterwards.

        A narrowing under way is broken off: the next opening begins it anew. A snapshot that waits
        for a quiet moment is given up; one whose hooks run or that holds something still is taken.
        """
        # Not under the lock: what they found is kept under it.
        self.instants.stop()
        if self.verification is not None:
            self.verification.cancel()
        if self.promotion is not None:
            self.promotion.cancel()
        self.narrowings.stop()
        with self.lock:
            if not self._is_closed:
                self._is_closed = True
                self.engine.close()

    @property
    def name(self) -> str:
        """The volume's name in this state directory."""
        return self._entry.name

    @property
    def presets(self) -> selection.Presets:
        """The presets that rules of this volume may name."""
        return selection.Presets(self._config.presets_dir)

    @property
    def is_served(self) -> bool:
        """Whether clients may be writing to it."""
        return not isinstance(self.hooks, NoExports)

    @property
    def mounts_dir(self) -> Path:
        """Where it is written down what is mounted."""
        return self._config.mounts_dir

    @property
    def images_dir(self) -> Path:
        """Where its images are shown as files for mounts to lie on."""
        return self._config.images_dir(self.name)

    @property
    def frozen_note(self) -> Path:
        """Where it is written down what is frozen for an instant."""
        return self._config.run_dir / f"{self.name}.frozen"

    def thaw_left(self) -> None:
        """Thaw what a server that was killed with all its guards left frozen."""
        if not self.frozen_note.exists():
            return

        def work() -> None:
            for what in leftover.thaw(self.frozen_note):
                self.event("thawed_what_was_left_frozen", what=what)

        # A thaw writes to this very disk, whose clients may be waiting for us to serve it.
        thread = threading.Thread(target=work, name="thaw-left", daemon=True)
        thread.start()
        thread.join(_THAW_LEFT_S)

    def own_places(self) -> dict[str, Path]:
        """Return every directory that we write to on behalf of any volume, by what it is."""
        places = {
            "state directory": self._config.state_dir,
            "socket directory": self._config.run_dir,
            "store": Path(self._entry.store),
        }
        if self._buffer_dir is not None:
            places["write buffer"] = self._buffer_dir
        with Catalog(self._config.catalog_path) as catalog:
            for entry in catalog.volumes():
                places[f"store of {entry.name}"] = Path(entry.store)
        return places

    def other_stores(self) -> tuple[Path, ...]:
        """Return the stores of all other volumes on the list."""
        return _other_stores(self._config, self.name)

    # What the store remembers

    def settings(self) -> VolumeConfig:
        """Return what the store remembers about the volume."""
        return read_settings(self.engine.meta(), fallback_name=self.name)

    def store_settings(self, settings: VolumeConfig) -> None:
        """Replace it, durably."""
        self.engine.set_meta(encode_settings(settings))

    def info(self) -> VolumeInfo:
        """Return what `volume show` tells."""
        settings = self.settings()
        epochs, clones = self.engine.epochs(), self.engine.clones()
        return VolumeInfo(
            name=self.name,
            uuid=self.engine.uuid,
            origin=self.engine.origin,
            store=self.engine.store,
            size_bytes=self.engine.size_bytes,
            block_size=self.engine.block_size,
            created_unix_ns=settings.created_unix_ns,
            rules=settings.rules,
            snapshot_count=len(self.snapshots()),
            bookmark_count=sum(epoch.has_bookmark for epoch in epochs),
            store_bytes=self.engine.store_bytes(),
            is_served=self.is_served,
            suspect_reason=next((e.suspect_reason for e in epochs if e.is_suspect), ""),
            last_verified_unix_ns=settings.last_verified_unix_ns,
            damaged_bytes=sum(total_bytes(extents) for _, extents in self.engine.damaged()),
            clone_count=len(clones),
            clones_bytes=sum(clone.allocated_bytes for clone in clones),
        )

    # Snapshots and bookmarks by name

    def snapshots(self) -> tuple[Snapshot, ...]:
        """Return every snapshot, oldest first; those taken to explain rules are nobody's."""
        found = (
            Snapshot(epoch=epoch, record=snapshot_record(epoch.epoch, epoch.meta))
            for epoch in self.engine.epochs()
            if epoch.has_snapshot
        )
        return tuple(s for s in found if s.record.purpose is not SnapshotPurpose.PROBE)

    def probes(self) -> tuple[int, ...]:
        """Return the epochs of snapshots that were taken to explain rules, and are still there."""
        return tuple(
            epoch.epoch
            for epoch in self.engine.epochs()
            if epoch.has_snapshot
            and snapshot_record(epoch.epoch, epoch.meta).purpose is SnapshotPurpose.PROBE
        )

    def bookmarks(self) -> tuple[Bookmark, ...]:
        """Return every bookmark, oldest first."""
        return tuple(
            Bookmark(epoch=epoch, record=bookmark_record(epoch))
            for epoch in self.engine.epochs()
            if epoch.has_bookmark
        )

    def snapshot(self, name: str) -> Snapshot:
        """Find a snapshot by name, by unique id prefix, or the newest of the user's as `latest`."""
        found = self.snapshots()
        if name == LATEST:
            mine = [s for s in found if s.record.purpose is SnapshotPurpose.USER]
            if mine:
                return mine[-1]
            raise NotFoundError(f"{self.name} has no snapshot yet")
        for snapshot in found:
            if snapshot.record.name == name:
                return snapshot
        matches = [s for s in found if is_id_prefix(name, s.record.id)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            ids = ", ".join(s.record.id for s in matches)
            raise NotFoundError(f"{self.name}@{name}: {len(matches)} ids start so: {ids}")
        raise NotFoundError(
            f"{self.name} has no snapshot {name}",
            hint=f"`stillblock snapshot list {self.name}` shows its {len(found)}",
        )

    def bookmark(self, name: str) -> Bookmark:
        """Find a bookmark by name or unique id prefix."""
        found = self.bookmarks()
        named = [b for b in found if b.record.name == name]
        matches = named or [b for b in found if is_id_prefix(name, b.record.id)]
        if len(matches) == 1:
            return matches[0]
        raise NotFoundError(
            f"{self.name} has no bookmark {name}",
            hint=f"`stillblock bookmark list {self.name}` shows its {len(found)}",
        )

    def instant(self, name: str) -> tuple[int, str]:
        """Return (epoch, name) of the snapshot or else the bookmark of that name."""
        try:
            snapshot = self.snapshot(name)
        except NotFoundError as error:
            try:
                bookmark = self.bookmark(name)
            except NotFoundError:
                raise error from None
            return bookmark.epoch.epoch, bookmark.record.name
        return snapshot.epoch.epoch, snapshot.record.name

    def check_name_free(self, name: str, *, what: str, epoch: int | None = None) -> None:
        """Raise `NameTakenError` if another instant than `epoch` has the name.

        A bookmark may be called like its own snapshot: both mean the same instant.
        """
        check_new_name(name, what=what)
        if name == self.instants.coming:
            raise NameTakenError(f"a snapshot {self.name}@{name} is being taken")
        taken = [(s.record.name, s.epoch.epoch, "snapshot") for s in self.snapshots()]
        taken += [(b.record.name, b.epoch.epoch, "bookmark") for b in self.bookmarks()]
        for other, other_epoch, kind in taken:
            if other == name and other_epoch != epoch:
                raise NameTakenError(f"{self.name} has a {kind} {name} already")

    def free_name(self, *, prefix: str = "") -> str:
        """Return a name made of the UTC time that no snapshot or bookmark has."""
        taken = {s.record.name for s in self.snapshots()}
        taken |= {b.record.name for b in self.bookmarks()}
        taken.add(self.instants.coming)
        return free_name(prefix + name_for_instant(time.time_ns()), taken)

    def store_record(self, epoch: int, record: SnapshotRecord) -> None:
        """Replace what we wrote beside a snapshot, durably."""
        self.engine.set_epoch_meta(epoch=epoch, meta=encode_snapshot(record))

    def event(self, kind: str, **detail: str | int | bool) -> None:
        """Write down what happened; the history is a courtesy and never fails what it is about."""
        try:
            with Catalog(self._config.catalog_path) as catalog:
                catalog.record(self.name, kind, **detail)
        except CatalogError as error:
            _LOG.warning("event not recorded: volume=%s kind=%s: %s", self.name, kind, error)


def _other_stores(config: Config, name: str) -> tuple[Path, ...]:
    with Catalog(config.catalog_path) as catalog:
        return tuple(Path(entry.store) for entry in catalog.volumes() if entry.name != name)


@contextmanager
def _advice(name: str) -> Iterator[None]:
    """Add to an engine's refusal what the user can do about it."""
    try:
        yield
    except RecoveryNeededError as error:
        error.hint = (
            f"`stillblock volume recover {name} --replay` keeps the writes that were "
            "acknowledged, `--discard` drops them as a power cut would"
        )
        raise
    except LockedError as error:
        error.hint = f"`stillblock status` shows whether {name} is served"
        raise
    except OriginChangedError as error:
        error.hint = f"`stillblock volume show {name}` tells which origin it expects"
        raise
