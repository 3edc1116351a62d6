"""Just enough of an NBD client: connect, read, write deep, flush.

Simple replies only: the benchmark wants a client that costs little and hides nothing.
"""

import contextlib
import socket
import struct
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from bench.errors import PeerError
from bench.process import ServerProcess, tail

TIMEOUT_S = 60.0
FLUSH_TIMEOUT_S = 600.0
READY_TIMEOUT_S = 30.0
PIECE_BYTES = 1 << 20

REQUEST_MAGIC = 0x25609513
READ, WRITE, DISCONNECT, FLUSH = 0, 1, 2, 3
SIMPLE_REPLY = struct.Struct(">IIQ")
_REQUEST = struct.Struct(">IHHQQI")
_OPT_GO = 7
_REP_ACK, _REP_INFO, _REP_ERROR = 1, 3, 1 << 31
_FLAG_SEND_FLUSH = 1 << 2


def request(command: int, *, cookie: int = 1, offset: int = 0, length: int = 0) -> bytes:
    """The header of a request."""
    return _REQUEST.pack(REQUEST_MAGIC, 0, command, cookie, offset, length)


def unix_uri(socket_path: object, export: str = "") -> str:
    """The URI of an export on a Unix socket."""
    return f"nbd+unix:///{urllib.parse.quote(export, safe='@')}?socket={socket_path}"


class NbdClient:
    """One connection to one export of a Unix-socket server."""

    def __init__(self, uri: str, *, timeout_s: float = TIMEOUT_S) -> None:
        parts = urllib.parse.urlsplit(uri)
        query = dict(urllib.parse.parse_qsl(parts.query))
        if parts.scheme != "nbd+unix" or "socket" not in query:
            raise PeerError(f"{uri}: the benchmark speaks to Unix sockets only")
        self.size_bytes = 0
        self._flags = 0
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout_s)
        try:
            self.socket.connect(query["socket"])
            self._negotiate(urllib.parse.unquote(parts.path[1:]))
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def pread(self, *, offset: int, length: int) -> bytes:
        """Read one range; raise PeerError if the server refuses."""
        self.socket.sendall(request(READ, offset=offset, length=length))
        self._expect_success(f"read of {length} bytes at {offset}")
        return self._receive(length)

    def pwrite(self, data: bytes, *, offset: int) -> None:
        """Write one range; raise PeerError if the server refuses."""
        self.socket.sendall(request(WRITE, offset=offset, length=len(data)) + data)
        self._expect_success(f"write of {len(data)} bytes at {offset}")

    def pread_many(
        self, ranges: Sequence[tuple[int, int]], *, depth: int
    ) -> Iterator[tuple[int, bytes]]:
        """Read ranges `(start, end)` with `depth` requests in flight; yield (start, data)."""
        sent = received = 0
        while received < len(ranges):
            while sent < len(ranges) and sent - received < depth:
                start, end = ranges[sent]
                self.socket.sendall(request(READ, cookie=sent, offset=start, length=end - start))
                sent += 1
            _, error, cookie = SIMPLE_REPLY.unpack(self._receive(SIMPLE_REPLY.size))
            start, end = ranges[cookie]
            if error:
                raise PeerError(f"read of {end - start} bytes at {start}: error {error}")
            yield start, self._receive(end - start)
            received += 1

    def flush(self) -> None:
        """Make all acknowledged writes durable, if the server offers that."""
        if self._flags & _FLAG_SEND_FLUSH:
            self.socket.sendall(request(FLUSH))
            self._expect_success("flush")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.sendall(request(DISCONNECT))
        self.socket.close()

    def _negotiate(self, export: str) -> None:
        if self._receive(16) != b"NBDMAGICIHAVEOPT":
            raise PeerError("not a newstyle NBD server")
        (flags,) = struct.unpack(">H", self._receive(2))
        name = export.encode()
        option = struct.pack(">III", _OPT_GO, 6 + len(name), len(name)) + name + bytes(2)
        self.socket.sendall(struct.pack(">I", flags & 3) + b"IHAVEOPT" + option)
        while True:
            _, _, kind, length = struct.unpack(">QIII", self._receive(20))
            body = self._receive(length)
            if kind == _REP_ACK:
                return
            if kind & _REP_ERROR:
                raise PeerError(f"export {export!r}: {body.decode('utf-8', 'replace')} ({kind:#x})")
            if kind == _REP_INFO and body[:2] == bytes(2):
                self.size_bytes, self._flags = struct.unpack(">QH", body[2:12])

    def _expect_success(self, what: str) -> None:
        _, error, _ = SIMPLE_REPLY.unpack(self._receive(SIMPLE_REPLY.size))
        if error:
            raise PeerError(f"{what}: error {error}")

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        done = 0
        while done < length:
            count = self.socket.recv_into(view[done:])
            if not count:
                raise OSError("the server hung up")
            done += count
        return bytes(data)


def wait_until_served(
    uri: str, *, process: ServerProcess, timeout_s: float = READY_TIMEOUT_S
) -> None:
    """Return when the export answers; else raise PeerError with the server's last words."""
    deadline = time.monotonic() + timeout_s
    reason: Exception | None = None
    while time.monotonic() < deadline:
        code = process.exit_code()
        if code is not None:
            raise PeerError(f"the server ended with {code}: {tail(process.log)}")
        try:
            NbdClient(uri).close()
        except (OSError, PeerError) as error:
            reason = error
            time.sleep(0.005)
        else:
            return
    raise PeerError(f"no answer at {uri} within {timeout_s:.0f} s: {reason}; {tail(process.log)}")


def flush(uri: str) -> None:
    """Flush through a connection of its own, so that work put off counts for the workload that
    caused it."""
    with NbdClient(uri, timeout_s=FLUSH_TIMEOUT_S) as client:
        client.flush()
