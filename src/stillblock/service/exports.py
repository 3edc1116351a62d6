"""Exports follow what there is: the live disk as `web`, each snapshot as `web@monday`, each clone
as `web@monday+rehearsal`.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from stillblock import native
from stillblock.errors import InUseError, NotFoundError, StillblockError
from stillblock.model import ExportInfo, format_instant, format_size
from stillblock.operations.clones import Clone, clones_of, is_promoted
from stillblock.operations.disks import SnapshotDisk
from stillblock.service.image_tree import ImageTree

if TYPE_CHECKING:
    from stillblock.model import Extents
    from stillblock.operations.volume import OpenVolume, Snapshot

_LOG: Final = logging.getLogger("stillblock.service")

SELECTED_CONTEXT: Final = "x-stillblock:selected"
CHANGED_CONTEXT: Final = "x-stillblock:changed:"
DIRTY_CONTEXT: Final = "qemu:dirty-bitmap:"
"""What existing backup clients ask for: what a copy of that instant lacks, newly selected blocks
included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """An instant with a name: a snapshot or a bookmark."""

    name: str
    epoch: int


@dataclass(slots=True, kw_only=True)
class _Offered:
    contexts: list[native.ContextSpec]
    epoch: int | None
    """None: the live disk."""
    view: native.View | None
    clone: native.Clone | None = None
    """Of a clone, whose epoch is that of its snapshot."""
    is_failed: bool = False
    """Whether it is a clone that takes no more writes."""

    created_unix_ns: int = 0

    def close(self) -> None:
        """Let go of what it shows; what was written to a clone is durable then."""
        if self.view is not None:
            self.view.close()
        if self.clone is not None:
            self.clone.close()


def contexts_of_volume(instants: tuple[Instant, ...]) -> list[native.ContextSpec]:
    """Return the contexts of the live disk: what changed since each instant; still growing."""
    return [spec for instant in instants for spec in _changed_since(instant)]


def contexts_of_snapshot(epoch: int, instants: tuple[Instant, ...]) -> list[native.ContextSpec]:
    """Return the contexts of a snapshot: its selection, what changed since each older instant."""
    older = [instant for instant in instants if instant.epoch < epoch]
    changed = [spec for instant in older for spec in _changed_since(instant)]
    return [(SELECTED_CONTEXT, "selected", 0), *changed]


def instants_of(volume: OpenVolume) -> tuple[Instant, ...]:
    """Return every named instant of a volume, oldest first, each name once; final ones only."""
    final = (s for s in volume.snapshots() if s.record.is_final)
    found = [Instant(name=s.record.name, epoch=s.epoch.epoch) for s in final]
    found += [Instant(name=b.record.name, epoch=b.epoch.epoch) for b in volume.bookmarks()]
    return tuple(sorted(set(found), key=lambda instant: (instant.epoch, instant.name)))


def unix_uri(export: str, socket_path: str) -> str:
    """Return the NBD URI of an export on a Unix socket."""
    return f"nbd+unix:///{quote(export, safe='@+')}?socket={quote(socket_path)}"


def tcp_uri(export: str, host: str, port: int) -> str:
    """Return the NBD URI of an export on TCP."""
    shown = f"[{host}]" if ":" in host else host
    return f"nbd://{shown}:{port}/{quote(export, safe='@+')}"


class ExportServer:
    """The NBD server of a serve process, with what it offers for each volume."""

    def __init__(self, *, excluded_reads: native.ExcludedReads, is_read_only: bool) -> None:
        self._server = native.Server()
        self._excluded_reads: native.ExcludedReads = excluded_reads
        self._is_read_only = is_read_only
        self._offered: dict[str, _Offered] = {}
        self._trees: dict[str, ImageTree] = {}
        """Of volumes whose images somebody asked for."""
        self._sockets: list[str] = []
        self._ports: list[tuple[str, int]] = []
        self._is_stopped = False
        self._lock = threading.RLock()

    @property
    def server(self) -> native.Server:
        """The server itself, to listen with."""
        return self._server

    def add_socket(self, path: str) -> None:
        """Remember where clients can connect."""
        self._sockets.append(path)

    def add_port(self, host: str, port: int) -> None:
        """Remember where clients can connect."""
        self._ports.append((host, port))

    def uris(self, export: str) -> tuple[str, ...]:
        """Return every URI that leads to an export."""
        return (
            *(unix_uri(export, path) for path in self._sockets),
            *(tcp_uri(export, host, port) for host, port in self._ports),
        )

    # ExportHooks

    def withdraw(self, volume: OpenVolume, snapshot: Snapshot, *, force: bool) -> None:
        """Withdraw a snapshot's export, and every context that speaks of it."""
        epoch = snapshot.epoch.epoch
        with self._lock:
            for name in self._names_of(volume):
                if self._offered[name].epoch == epoch:
                    self._remove(volume, name, force=force)
            instants = tuple(i for i in instants_of(volume) if i.epoch != epoch)
            bookmarks = {b.epoch.epoch: b.record.name for b in volume.bookmarks()}
            if epoch in bookmarks:
                instants += (Instant(name=bookmarks[epoch], epoch=epoch),)
            self._set_contexts(volume, instants)

    def reconcile(self, volume: OpenVolume) -> None:
        """Offer what the volume has now; log what cannot be offered."""
        with self._lock:
            if self._is_stopped:
                return  # a copy that ends with the server would have its clone offered again
            try:
                self._reconcile(volume)
            except StillblockError as error:
                _LOG.exception("exports not up to date: volume=%s", volume.name)
                volume.event("exports_failed", error=str(error))

    def retire(self, volume: OpenVolume) -> None:
        """Withdraw everything of a volume; its clients are cut."""
        with self._lock:
            for name in sorted(self._names_of(volume), reverse=True):
                self._remove(volume, name, force=True)

    def exports(self, volume: OpenVolume) -> tuple[ExportInfo, ...]:
        """Return what clients can ask for."""
        with self._lock:
            clients = self._clients(volume)
            return tuple(
                ExportInfo(
                    name=name,
                    uri=next(iter(self.uris(name)), ""),
                    is_read_only=self._is_read_only_export(self._offered[name]),
                    contexts=tuple(spec[0] for spec in self._offered[name].contexts),
                    connections=clients.count(name),
                )
                for name in sorted(self._names_of(volume))
            )

    def holders(self, volume: OpenVolume, epoch: native.Epoch) -> int:
        """Return who uses a snapshot: clients count, the view that only waits for them does not."""
        with self._lock:
            mine = [n for n in self._names_of(volume) if self._offered[n].epoch == epoch.epoch]
            clients = sum(self._clients(volume).count(name) for name in mine)
            return max(0, epoch.in_use - len(mine)) + clients

    def withdraw_clone(self, volume: OpenVolume, number: int, *, force: bool) -> None:
        """Close a clone; raise `InUseError` if clients use it, unless forced."""
        with self._lock:
            for name, clone in self._clones_of(volume):
                if clone.number == number:
                    self._remove(volume, name, force=force)

    def clone_clients(self, volume: OpenVolume) -> dict[int, int]:
        """Return how many clients use each clone, by its number."""
        with self._lock:
            clients = self._clients(volume)
            return {clone.number: clients.count(name) for name, clone in self._clones_of(volume)}

    # Images

    def show_images(self, volume: OpenVolume, directory: str) -> None:
        """Show images of everything there is as files in a directory."""
        with self._lock:
            tree = self._trees.get(volume.name)
            if tree is None:
                tree = self._trees[volume.name] = ImageTree(volume.name, self._server)
                for name in self._names_of(volume):
                    self._show(volume, tree, name)
            tree.show(directory)

    def shows_images(self, volume: OpenVolume, directory: str) -> bool:
        """Whether they are shown there, and answered for."""
        with self._lock:
            tree = self._trees.get(volume.name)
            return tree is not None and tree.is_shown(directory)

    def image_path(
        self, volume: OpenVolume, reference: str, place: str, pieces: Extents | None
    ) -> str:
        """Return which file below such a directory shows a place; it is there from now on."""
        with self._lock:
            return self._trees[volume.name].path(reference, place, pieces)

    def clone_disk(self, volume: OpenVolume, reference: str) -> native.Clone:
        """Return a clone as it is now, to read."""
        with self._lock:
            offered = self._offered.get(reference)
            if offered is None or offered.clone is None:
                raise NotFoundError(
                    f"{reference} is not offered to clients",
                    hint=f"`stillblock clone list {volume.name}` tells why",
                )
            return offered.clone

    def _show(self, volume: OpenVolume, tree: ImageTree, name: str) -> None:
        """Show an export as files; one that cannot be keeps nobody from anything else."""
        offered = self._offered[name]
        readable = offered.clone or offered.view
        access: native.Access = "watched" if offered.epoch is None else "constant"
        if offered.clone is not None:
            access = "watched" if offered.is_failed else "writable"
        try:
            tree.add(
                name,
                access=access,
                created_unix_ns=offered.created_unix_ns,
                disk=None if readable is None else SnapshotDisk(readable, volume.engine),
            )
        except StillblockError as error:
            _LOG.exception("image not shown: export=%s", name)
            volume.event("image_failed", export=name, error=str(error))

    # Life

    def start(self, volume: OpenVolume) -> None:
        """Offer a volume and its snapshots; raise what prevents it."""
        with self._lock:
            contexts = contexts_of_volume(instants_of(volume))
            self._server.add_volume(
                volume.name,
                volume.engine,
                description=f"live disk of {volume.name}, {format_size(volume.engine.size_bytes)}",
                contexts=contexts,
                read_only=self._is_read_only,
            )
            made = volume.settings().created_unix_ns
            self._offered[volume.name] = _Offered(
                contexts=contexts, epoch=None, view=None, created_unix_ns=made
            )
            self._reconcile(volume)

    def stop(self) -> None:
        """Finish what is in flight, then let every snapshot go."""
        with self._lock:
            self._is_stopped = True
            self._server.stop()
            # A tree that could not be unmounted is still asked: it has to say that all is over.
            for tree in self._trees.values():
                tree.end()
            for name, offered in self._offered.items():
                _close(name, offered)
            self._offered.clear()
            self._trees.clear()

    def _reconcile(self, volume: OpenVolume) -> None:
        # Of a snapshot without its header nothing can be read, nor of one that may not exist; one
        # that is narrowed selects more than it will.
        there = (s for s in volume.snapshots() if s.is_readable)
        snapshots = {f"{volume.name}@{s.record.name}": s for s in there}
        instants = instants_of(volume)
        by_epoch: dict[int | None, str] = {s.epoch.epoch: name for name, s in snapshots.items()}
        usable = (c for c in clones_of(volume) if not c.entry.damage and c.entry.epoch in by_epoch)
        clones = {
            f"{by_epoch[c.entry.epoch]}+{c.record.name}": c
            for c in usable
            if not is_promoted(volume, c)
        }
        for name in self._names_of(volume):
            if name != volume.name and name not in snapshots and name not in clones:
                self._remove(volume, name, force=True)
        there_before = set(self._offered)
        for name, snapshot in snapshots.items():
            if name not in self._offered:
                self._add_view(volume, name, snapshot, instants)
        for name, clone in clones.items():
            if name not in self._offered:
                self._try_add_clone(volume, name, clone)
        tree = self._trees.get(volume.name)
        for name in self._names_of(volume) if tree is not None else ():
            if name not in there_before and tree is not None:
                self._show(volume, tree, name)
        self._set_contexts(volume, instants)

    def _try_add_clone(self, volume: OpenVolume, name: str, clone: Clone) -> None:
        """Offer a clone; one that cannot be opened keeps nobody from anything else."""
        try:
            opened = volume.engine.open_clone(
                number=clone.entry.number, excluded_reads=self._excluded_reads
            )
            try:
                self._add_clone(name, clone, opened)
            except StillblockError:
                opened.close()
                raise
        except StillblockError as error:
            _LOG.exception("clone not offered: export=%s", name)
            volume.event("clone_failed", clone=clone.record.name, error=str(error))

    def _add_clone(self, name: str, clone: Clone, opened: native.Clone) -> None:
        contexts: list[native.ContextSpec] = [(SELECTED_CONTEXT, "selected", 0)]
        self._server.add_clone(
            name,
            opened,
            description=f"writable clone, made {format_instant(clone.entry.created_unix_ns)}",
            contexts=contexts,
            read_only=bool(clone.entry.failure),
        )
        self._offered[name] = _Offered(
            contexts=contexts,
            epoch=clone.entry.epoch,
            view=None,
            clone=opened,
            is_failed=bool(clone.entry.failure),
            created_unix_ns=clone.entry.created_unix_ns,
        )

    def _clients(self, volume: OpenVolume) -> list[str]:
        """Return the export of each client, and of each image that is open."""
        found = [export for export, _, _ in self._server.connections()]
        tree = self._trees.get(volume.name)
        for export, opens in tree.opens().items() if tree is not None else ():
            found += [export] * opens
        return found

    def _clones_of(self, volume: OpenVolume) -> list[tuple[str, native.Clone]]:
        found = ((name, self._offered[name].clone) for name in self._names_of(volume))
        return [(name, clone) for name, clone in found if clone is not None]

    def _is_read_only_export(self, offered: _Offered) -> bool:
        if offered.clone is not None:
            return False
        return self._is_read_only or offered.epoch is not None

    def _add_view(
        self, volume: OpenVolume, name: str, snapshot: Snapshot, instants: tuple[Instant, ...]
    ) -> None:
        epoch = snapshot.epoch.epoch
        contexts = contexts_of_snapshot(epoch, instants)
        view = volume.engine.view(epoch=epoch, excluded_reads=self._excluded_reads)
        suspect = ", suspect" if snapshot.epoch.is_suspect else ""
        description = f"snapshot of {format_instant(snapshot.epoch.created_unix_ns)}{suspect}"
        try:
            self._server.add_view(name, view, description=description, contexts=contexts)
        except StillblockError:
            view.close()
            raise
        self._offered[name] = _Offered(
            contexts=contexts,
            epoch=epoch,
            view=view,
            created_unix_ns=snapshot.epoch.created_unix_ns,
        )

    def _set_contexts(self, volume: OpenVolume, instants: tuple[Instant, ...]) -> None:
        for name in self._names_of(volume):
            offered = self._offered[name]
            if offered.clone is not None:
                continue
            if offered.epoch is None:
                contexts = contexts_of_volume(instants)
            else:
                contexts = contexts_of_snapshot(offered.epoch, instants)
            if contexts != offered.contexts:
                self._server.set_contexts(name, contexts)
                offered.contexts = contexts

    def _remove(self, volume: OpenVolume, name: str, *, force: bool) -> None:
        tree = self._trees.get(volume.name)
        if tree is not None:
            tree.remove(name, force=force)
        try:
            self._server.remove(name, force=force)
        except InUseError:
            if tree is not None and not force:
                self._show(volume, tree, name)
            raise
        _close(name, self._offered.pop(name))

    def _names_of(self, volume: OpenVolume) -> list[str]:
        prefix = f"{volume.name}@"
        return [n for n in self._offered if n == volume.name or n.startswith(prefix)]


def _changed_since(instant: Instant) -> tuple[native.ContextSpec, native.ContextSpec]:
    return (
        (CHANGED_CONTEXT + instant.name, "changed", instant.epoch),
        (DIRTY_CONTEXT + instant.name, "dirty", instant.epoch),
    )


def _close(name: str, offered: _Offered) -> None:
    """Let go of what was offered. A clone that cannot be made durable says so in the store."""
    try:
        offered.close()
    except StillblockError:
        _LOG.exception("not closed in order: export=%s", name)
