"""The client of the control API: HTTP over the Unix socket of whichever process serves a volume."""

from __future__ import annotations

import errno
import http.client
import json
import socket
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote, urlencode

from stillblock import codec
from stillblock.errors import ControlError, NotFoundError, from_json
from stillblock.service.session import Session

if TYPE_CHECKING:
    from pathlib import Path

    from stillblock.config import Config
    from stillblock.model import CloneInfo, SnapshotInfo
    from stillblock.operations.held import Readable
    from stillblock.service.verbs import Verb

Q = TypeVar("Q")
R = TypeVar("R")

CONNECT_TIMEOUT_S: Final = 5.0
"""A Unix socket connects at once, unless its process is stopped."""
REPLY_TIMEOUT_S: Final = 600.0
"""Stopping a volume may have to write a whole buffer to a slow disk; more means it hangs."""
_ERROR_STATUS_MIN: Final = 400


class RemoteSession(Session):
    """A volume that another process serves. Thread-safe: each call has its own connection."""

    def __init__(self, socket_path: Path, volume: str) -> None:
        self.volume = volume
        self._socket_path = socket_path

    def call(self, verb: Verb[Q, R], request: Q) -> R:
        """Ask the serving process to run a verb."""
        fields: dict[str, Any] = codec.to_json(request)
        path = f"/v1/volumes/{quote(self.volume)}{verb.path}"
        for name in list(fields):
            marker = "{" + name + "}"
            if marker in path:
                path = path.replace(marker, quote(str(fields.pop(name)), safe=""))
        body: bytes | None = None
        if verb.method in {"GET", "DELETE"}:
            query = {name: _scalar(value) for name, value in fields.items() if value is not None}
            path += f"?{urlencode(query)}" if query else ""
        else:
            body = json.dumps(fields).encode()
        return codec.from_json(verb.result, fetch(self._socket_path, verb.method, path, body=body))

    def open_disk(self, snapshot: SnapshotInfo, clone: CloneInfo | None = None) -> Readable:
        """Connect to its export like any NBD client."""
        from stillblock.service.nbd import NbdDisk  # noqa: PLC0415 - only to read

        name = snapshot.reference if clone is None else clone.reference
        uris = [export.uri for export in self.exports().exports if export.name == name]
        if not uris or not uris[0]:
            raise NotFoundError(f"{name} is not offered to clients")
        return NbdDisk(uris[0])

    def close(self) -> None:
        """Nothing to end: the volume stays with its process."""

    @property
    def is_remote(self) -> bool:
        """True: another process serves it."""
        return True


def find_server(config: Config, volume: str) -> Path | None:
    """Return the control socket of the process that serves the volume, None if nobody does.

    A socket that refuses was left by a process that is gone; it is cleaned away.
    """
    for path in config.control_sockets(volume):
        if is_listening(path):
            return path
    return None


def is_listening(path: Path) -> bool:
    """Return whether a process accepts on a Unix socket; remove a socket that nobody accepts on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno == errno.ECONNREFUSED and path.is_socket():
                path.unlink(missing_ok=True)
            elif error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.ECONNREFUSED}:
                raise ControlError(f"control socket {path}: {error.strerror or error}") from error
            return False
    return True


def fetch(socket_path: Path, method: str, path: str, *, body: bytes | None = None) -> object:
    """Send one request; return the JSON of the reply, raise what it reports."""
    connection = _UnixConnection(socket_path)
    try:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ControlError(
            f"the serve process at {socket_path} did not answer {method} {path}: {error}",
            hint="`stillblock status` shows what is served",
        ) from error
    finally:
        connection.close()
    try:
        document = json.loads(data)
    except ValueError as error:
        raise ControlError(
            f"the serve process at {socket_path} answered {response.status} without JSON"
        ) from error
    if response.status >= _ERROR_STATUS_MIN:
        raise from_json(document.get("error") if isinstance(document, dict) else document)
    found: object = document
    return found


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=REPLY_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_TIMEOUT_S)
        self.sock.connect(str(self._path))
        self.sock.settimeout(REPLY_TIMEOUT_S)


def _scalar(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
