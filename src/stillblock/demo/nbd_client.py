"""A small NBD client: read, write and flush one export.

The demo writes to the disk as any client would, over the socket. It brings this client along
because it must run where no client tool is installed, and because no stock tool writes scattered
blocks. It shares no code with the server: fixed newstyle negotiation, `NBD_OPT_GO`, simple replies,
one request at a time. See the NBD protocol document, "Newstyle negotiation" and "Transmission
phase".
"""

import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from stillblock.demo.comparison import chunks

NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698

FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1
OPT_GO: Final = 7
REP_ACK: Final = 1
REP_INFO: Final = 3
REP_ERROR: Final = 1 << 31
INFO_EXPORT: Final = 0

FLAG_READ_ONLY: Final = 1 << 1
FLAG_SEND_FLUSH: Final = 1 << 2

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3

REQUEST_BYTES_MAX: Final = 1 << 20
"""Every server takes requests of this size; the protocol's default limit is 32 MiB."""
OPTION_REPLY_BYTES_MAX: Final = 1 << 16
TIMEOUT_S: Final = 30.0
"""A server that says nothing for this long is taken for dead."""


class NbdError(Exception):
    """The server refused, or what it sent is not NBD."""


class NbdClient:
    """One connection to one export; usable in a `with` statement."""

    def __init__(self, *, socket_path: str, export: str) -> None:
        self.export = export
        self.size_bytes = 0
        self.transmission_flags = 0
        self._cookie = 0
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT_S)
        try:
            self._socket.connect(socket_path)
            self._negotiate()
        except BaseException:
            self._socket.close()
            raise

    @property
    def is_read_only(self) -> bool:
        """Whether the server refuses writes to this export."""
        return bool(self.transmission_flags & FLAG_READ_ONLY)

    def pread(self, *, offset: int, length: int) -> bytes:
        """Return `length` bytes; larger reads are split."""
        pieces = []
        for start in range(offset, offset + length, REQUEST_BYTES_MAX):
            size = min(REQUEST_BYTES_MAX, offset + length - start)
            self._request(CMD_READ, offset=start, length=size)
            pieces.append(self._receive(size))
        return b"".join(pieces)

    def copy_to(self, image: Path) -> None:
        """Write all of the export to a file."""
        with image.open("wb") as out:
            for start, end in chunks(0, self.size_bytes):
                out.write(self.pread(offset=start, length=end - start))

    def pwrite(self, data: bytes | memoryview, *, offset: int) -> None:
        """Write all of `data`; it is acknowledged, not yet durable, on return."""
        view = memoryview(data)
        for start in range(0, len(view), REQUEST_BYTES_MAX):
            piece = view[start : start + REQUEST_BYTES_MAX]
            self._request(CMD_WRITE, offset=offset + start, length=len(piece), payload=piece)

    def flush(self) -> None:
        """Make every acknowledged write durable."""
        if self.transmission_flags & FLAG_SEND_FLUSH:
            self._request(CMD_FLUSH, offset=0, length=0)

    def close(self) -> None:
        """Tell the server and hang up; it owes no reply."""
        try:
            self._send(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0))
        except OSError:
            pass  # a server that is already gone needs no goodbye
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _negotiate(self) -> None:
        magic, option_magic, handshake = struct.unpack(">QQH", self._receive(18))
        if (magic, option_magic) != (NBDMAGIC, IHAVEOPT):
            raise NbdError(f"{self.export}: not an NBD server of the newstyle kind")
        if not handshake & FLAG_FIXED_NEWSTYLE:
            raise NbdError(f"{self.export}: the server does not speak fixed newstyle")
        flags = handshake & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)
        name = self.export.encode()
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        option = struct.pack(">QII", IHAVEOPT, OPT_GO, len(data)) + data
        self._send(struct.pack(">I", flags) + option)
        while True:
            magic, option_code, reply, length = struct.unpack(">QIII", self._receive(20))
            if (magic, option_code) != (REPLY_MAGIC, OPT_GO) or length > OPTION_REPLY_BYTES_MAX:
                raise NbdError(f"{self.export}: the server's reply to GO makes no sense")
            body = self._receive(length)
            if reply == REP_ACK:
                return
            if reply & REP_ERROR:
                words = body.decode(errors="replace") or f"error {reply & ~REP_ERROR}"
                raise NbdError(f"{self.export}: the server refused: {words}")
            if reply == REP_INFO and body[:2] == struct.pack(">H", INFO_EXPORT):
                self.size_bytes, self.transmission_flags = struct.unpack(">QH", body[2:])

    def _request(
        self, command: int, *, offset: int, length: int, payload: bytes | memoryview = b""
    ) -> None:
        """Send one request and take the head of its reply; a read's data follows it."""
        self._cookie += 1
        head = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, command, self._cookie, offset, length)
        self._send(head)
        if payload:
            self._send(payload)
        magic, errno, cookie = struct.unpack(">IIQ", self._receive(16))
        if (magic, cookie) != (SIMPLE_REPLY_MAGIC, self._cookie):
            raise NbdError(f"{self.export}: the server's reply makes no sense")
        if errno:
            verb = {CMD_READ: "read", CMD_WRITE: "write", CMD_FLUSH: "flush"}[command]
            raise NbdError(f"{self.export}: {verb} of {length} at {offset}: error {errno}")

    def _send(self, data: bytes | memoryview) -> None:
        self._socket.sendall(data)

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        done = 0
        while done < length:
            count = self._socket.recv_into(view[done:])
            if count == 0:
                raise NbdError(f"{self.export}: the server hung up after {done} of {length} bytes")
            done += count
        return bytes(data)
