"""The serve process: volumes open, NBD clients on one side, the control API on the other.

It starts in an order in which each step can be undone, and stops in the reverse one: no more
requests, no more clients, every write on the origin, sockets gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import uvicorn

from stillblock.config import checked_socket_path
from stillblock.errors import InUseError, SocketPathError, StillblockError, UsageError
from stillblock.mounting.records import LOCK_S
from stillblock.operations import mounts
from stillblock.operations.clones import try_expire
from stillblock.operations.narrowing import resume_narrowing
from stillblock.operations.usage import StoreWatch
from stillblock.operations.volume import EngineOptions, OpenVolume, Snapshot
from stillblock.operations.volumes import Released
from stillblock.service.app import create_app
from stillblock.service.client import is_listening
from stillblock.service.exports import ExportServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from stillblock import native
    from stillblock.config import Config
    from stillblock.model import ExportInfo, Extents

_LOG: Final = logging.getLogger("stillblock.service")
STOP_STREAMS_S: Final = 3
"""How long open event streams and running requests may hold up a stop."""
_PRIVATE_SOCKET: Final = 0o600
_BACKLOG: Final = 64
_PORT_MAX: Final = 65535
_STORE_WATCH_S: Final = 2.0
"""How often it is looked how full stores are: far longer than a look takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixListener:
    """NBD clients come to this socket."""

    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpListener:
    """NBD clients come to this loopback port; 0 means any free one."""

    host: str
    port: int


Listener = UnixListener | TcpListener


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How to serve."""

    engine: EngineOptions = field(default_factory=EngineOptions)
    listeners: tuple[Listener, ...] = ()
    """None: a Unix socket in the run directory, called after the first volume."""
    excluded_reads: native.ExcludedReads = "zeros"
    is_read_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What is served, once it is."""

    volumes: tuple[str, ...]
    exports: tuple[ExportInfo, ...]
    nbd_sockets: tuple[str, ...]
    tcp_ports: tuple[int, ...]
    control_sockets: tuple[str, ...]


def parse_listener(text: str) -> Listener:
    """Return the listener that `/run/web.nbd`, `unix:web.nbd`, `127.0.0.1:10809` or `:0` means."""
    if text.startswith("unix:") or "/" in text:
        path = Path(text.removeprefix("unix:")).expanduser().absolute()
        return UnixListener(path=checked_socket_path(path))
    host, colon, port_text = text.removeprefix("tcp:").rpartition(":")
    if not colon or not port_text.isdecimal() or int(port_text) > _PORT_MAX:
        raise UsageError(f"{text!r} is neither a socket's path nor HOST:PORT")
    host = host.strip("[]") or "127.0.0.1"
    if not _is_loopback(host):
        raise UsageError(
            f"{text!r}: NBD is not encrypted here, so only loopback addresses are served",
            hint="use 127.0.0.1 and a tunnel such as `ssh -L`",
        )
    return TcpListener(host=host, port=int(port_text))


def serve(
    config: Config,
    names: tuple[str, ...],
    options: ServeOptions,
    *,
    on_ready: Callable[[Ready], None],
) -> tuple[Released, ...]:
    """Serve volumes until a signal or until the last one is released; return how each was left."""
    if len(set(names)) != len(names):
        raise UsageError(f"a volume is named twice: {' '.join(names)}")
    config.ensure()
    # Until the loop handles signals: a SIGTERM while starting undoes what was started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    host = VolumeHost(config, options)
    with host:
        host.start(names)
        asyncio.run(host.run(on_ready=on_ready))
    return tuple(host.released)


class VolumeHost:
    """The volumes of one process. Owns them from `start` until the context ends."""

    def __init__(self, config: Config, options: ServeOptions) -> None:
        self._config = config
        self._options = options
        self._volumes: dict[str, OpenVolume] = {}
        self._exports = ExportServer(
            excluded_reads=options.excluded_reads, is_read_only=options.is_read_only
        )
        self._undo = ExitStack()
        self._control: list[tuple[Path, socket.socket]] = []
        self._nbd_sockets: list[str] = []
        self._tcp_ports: list[int] = []
        self._is_stopping = False
        self._server: _ControlServer | None = None
        self.released: list[Released] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @property
    def config(self) -> Config:
        """Where things are."""
        return self._config

    @property
    def is_stopping(self) -> bool:
        """Whether streams should end."""
        return self._is_stopping

    def volumes(self) -> Mapping[str, OpenVolume]:
        """Return the volumes served now."""
        return self._volumes

    def start(self, names: tuple[str, ...]) -> None:
        """Open, export and listen; on an error everything done so far is undone by the context."""
        for name in names:
            volume = OpenVolume.open(self._config, name, self._options.engine)
            self._volumes[name] = volume
            self._undo.callback(self._close, volume)
            self._clean_mounts(volume)
        self._undo.callback(self._exports.stop)
        # Before that: who unmounts still writes.
        self._undo.callback(self._end_mounts)
        for name, volume in self._volumes.items():
            self._exports.start(volume)
            volume.hooks = _Hooks(self, self._exports)
            resume_narrowing(volume)
            try_expire(volume)
            if len(names) == 1:
                self._exports.server.set_default(name)
        default = UnixListener(path=self._config.nbd_socket(names[0]))
        for listener in self._options.listeners or (default,):
            self._listen(listener)
        for name in names:
            self._listen_for_control(name)
        for volume in self._volumes.values():
            volume.event("serve_started", size_bytes=volume.engine.size_bytes)

    def ready(self) -> Ready:
        """Return what is served."""
        return Ready(
            volumes=tuple(self._volumes),
            exports=tuple(
                export for v in self._volumes.values() for export in self._exports.exports(v)
            ),
            nbd_sockets=tuple(self._nbd_sockets),
            tcp_ports=tuple(self._tcp_ports),
            control_sockets=tuple(str(path) for path, _ in self._control),
        )

    async def run(
        self,
        *,
        on_ready: Callable[[Ready], None] = lambda _: None,
        handles_signals: bool = True,
    ) -> None:
        """Answer the control API until told to stop, then stop cleanly.

        `on_ready` is called once requests are answered and signals mean a clean stop.
        """
        settings = uvicorn.Config(
            create_app(self),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=STOP_STREAMS_S,
        )
        self._server = _ControlServer(settings, on_started=lambda: on_ready(self.ready()))
        self._server.should_exit = self._is_stopping  # asked to stop while starting
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM) if handles_signals else ():
            loop.add_signal_handler(number, self.stop)
        watching = asyncio.create_task(self._watch_stores())
        try:
            await self._server.serve(sockets=[listening for _, listening in self._control])
        finally:
            watching.cancel()
            # While the loop runs, a further signal only calls `stop`: it breaks nothing off.
            await asyncio.to_thread(self._undo.close)

    async def _watch_stores(self) -> None:
        """Write down when a store fills up and has room again; remove clones that expired."""
        watch = StoreWatch()
        while True:
            for volume in tuple(self._volumes.values()):
                try:
                    await asyncio.to_thread(watch.look, volume)
                    await asyncio.to_thread(try_expire, volume)
                    await asyncio.to_thread(_clean_gone, volume)
                except StillblockError as error:
                    _LOG.warning("store not looked at: volume=%s: %s", volume.name, error)
            await asyncio.sleep(_STORE_WATCH_S)

    def stop(self) -> None:
        """Ask for a clean stop; asking again changes nothing, for half a stop would help nobody."""
        self._is_stopping = True
        for volume in tuple(self._volumes.values()):
            volume.instants.give_up()  # now, so that whoever asked for it still gets the answer
        if self._server is not None:
            self._server.should_exit = True

    def forget(self, volume: OpenVolume) -> None:
        """Drop a volume that is being released. Its socket stays open for the reply under way."""
        self._volumes.pop(volume.name, None)
        _unlink(self._config.control_socket(volume.name))

    def _end_mounts(self) -> None:
        for volume in self._volumes.values():
            self._clean_mounts(volume)

    def _clean_mounts(self, volume: OpenVolume) -> None:
        """Make an end of all mounts of a volume: those left over, or those there are at a stop."""
        try:
            for what in mounts.clean(volume, is_over=True, timeout_s=LOCK_S):
                _LOG.warning("unmounted: %s", what)
        except StillblockError as error:
            _LOG.warning("mounts not cleaned up: volume=%s: %s", volume.name, error)
            volume.event("unmount_failed", where="", error=str(error))

    def _close(self, volume: OpenVolume) -> None:
        if volume.name not in self._volumes:
            return  # released on request
        engine = volume.engine
        released = Released(volume=volume.name, origin=engine.origin, size_bytes=engine.size_bytes)
        volume.close()
        volume.event("serve_stopped", origin=released.origin)
        self.released.append(released)

    def _listen(self, listener: Listener) -> None:
        if isinstance(listener, TcpListener):
            port = self._exports.server.listen_tcp(listener.host, listener.port)
            self._exports.add_port(listener.host, port)
            self._tcp_ports.append(port)
            return
        path = listener.path
        if is_listening(path):
            raise InUseError(f"another process listens on {path}", hint="choose another --listen")
        if path.exists():
            raise SocketPathError(f"{path} exists and is not a socket")
        self._exports.server.listen_unix(path)
        self._undo.callback(_unlink, path)
        self._exports.add_socket(str(path))
        self._nbd_sockets.append(str(path))

    def _listen_for_control(self, name: str) -> None:
        path = self._config.control_socket(name)
        # The engine's lock on the store is ours, so a socket found here belongs to nobody. Bound
        # under another name and moved into place, so that nobody meets it before it accepts.
        fresh = checked_socket_path(path.with_suffix(".new"))
        _unlink(fresh)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._undo.callback(listening.close)
        listening.bind(str(fresh))
        fresh.chmod(_PRIVATE_SOCKET)
        listening.listen(_BACKLOG)
        fresh.replace(path)
        self._undo.callback(_unlink, path)
        self._control.append((path, listening))


class _Hooks:
    """The export server's hooks, and the host's own for a volume that is released."""

    def __init__(self, host: VolumeHost, exports: ExportServer) -> None:
        self._host = host
        self._exports = exports

    def withdraw(self, volume: OpenVolume, snapshot: Snapshot, *, force: bool) -> None:
        """Let go of a snapshot that is about to be deleted."""
        self._exports.withdraw(volume, snapshot, force=force)

    def reconcile(self, volume: OpenVolume) -> None:
        """Offer what the volume has now."""
        self._exports.reconcile(volume)

    def retire(self, volume: OpenVolume) -> None:
        """Let go of the volume altogether: no more requests, no more clients."""
        self._host.forget(volume)
        self._exports.retire(volume)

    def closed(self, volume: OpenVolume) -> None:  # noqa: ARG002
        """End the process with its last volume; only now, so that the reply can still go out."""
        if not self._host.volumes():
            self._host.stop()

    def exports(self, volume: OpenVolume) -> tuple[ExportInfo, ...]:
        """Return what clients can ask for."""
        return self._exports.exports(volume)

    def holders(self, volume: OpenVolume, epoch: native.Epoch) -> int:
        """Return how many clients, views and restores really use a snapshot."""
        return self._exports.holders(volume, epoch)

    def withdraw_clone(self, volume: OpenVolume, number: int, *, force: bool) -> None:
        """Close a clone that is about to change or go."""
        self._exports.withdraw_clone(volume, number, force=force)

    def clone_clients(self, volume: OpenVolume) -> dict[int, int]:
        """Return how many clients use each clone, by its number."""
        return self._exports.clone_clients(volume)

    def show_images(self, volume: OpenVolume, directory: str) -> None:
        """Show images of everything there is as files in a directory."""
        self._exports.show_images(volume, directory)

    def shows_images(self, volume: OpenVolume, directory: str) -> bool:
        """Whether they are shown there, and answered for."""
        return self._exports.shows_images(volume, directory)

    def image_path(
        self, volume: OpenVolume, reference: str, place: str, pieces: Extents | None
    ) -> str:
        """Return which file below such a directory shows a place; it is there from now on."""
        return self._exports.image_path(volume, reference, place, pieces)

    def clone_disk(self, volume: OpenVolume, reference: str) -> native.Clone:
        """Return a clone as it is now, to read."""
        return self._exports.clone_disk(volume, reference)


class _ControlServer(uvicorn.Server):
    """uvicorn without its signal handlers: the host decides when to stop, and how."""

    def __init__(self, settings: uvicorn.Config, *, on_started: Callable[[], None]) -> None:
        super().__init__(settings)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so."""
        await super().startup(sockets)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the host."""
        yield


def _clean_gone(volume: OpenVolume) -> None:
    """Make an end of mounts that somebody unmounted by hand, or was killed over."""
    try:
        mounts.clean(volume)
    except InUseError:
        pass  # one is being made: the next time


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _LOG.warning("socket not removed: path=%s: %s", path, error)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
