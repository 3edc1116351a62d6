"""A small NBD client: how a command reads a snapshot that another process serves.

One request at a time over one connection, with structured replies and the two metadata contexts
that tell holes from what a snapshot does not select. The NBD protocol document, "Fixed newstyle
negotiation", "Transmission phase" and "Metadata querying".
"""

from __future__ import annotations

import socket
import struct
from typing import Final, Self
from urllib.parse import parse_qs, unquote, urlsplit

from stillblock import native
from stillblock.errors import Blame, OriginIOError, StillblockError
from stillblock.service.exports import SELECTED_CONTEXT

ALLOCATION_CONTEXT: Final = "base:allocation"
REQUEST_BYTES_MAX: Final = 1 << 20
"""Every server takes requests of this size."""
STATUS_BYTES_MAX: Final = 1 << 31
"""Lengths of status requests have 32 bits."""
_REPLY_BYTES_MAX: Final = 32 << 20
_PORT: Final = 10809
_TIMEOUT_S: Final = 300.0
"""A read may wait for a slow disk, and a write for the space of a full one."""

_NBDMAGIC: Final = 0x4E42444D41474943
_IHAVEOPT: Final = 0x49484156454F5054
_OPTION_REPLY: Final = 0x3E889045565A9
_REQUEST: Final = 0x25609513
_SIMPLE_REPLY: Final = 0x67446698
_STRUCTURED_REPLY: Final = 0x668E33EF
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPT_GO, _OPT_STRUCTURED_REPLY, _OPT_SET_META_CONTEXT = 7, 8, 10
_REP_ACK, _REP_INFO, _REP_META_CONTEXT, _REP_ERROR = 1, 3, 4, 1 << 31
_INFO_EXPORT: Final = 0
_CMD_READ, _CMD_WRITE, _CMD_DISC, _CMD_FLUSH, _CMD_STATUS = 0, 1, 2, 3, 7
_VERBS: Final = {_CMD_READ: "read", _CMD_WRITE: "write", _CMD_FLUSH: "flush", _CMD_STATUS: "status"}
_DONE: Final = 1
_DATA, _HOLE, _STATUS, _ERROR = 1, 2, 5, 0x8000


class NbdError(StillblockError):
    """An NBD server refused, went away, or sent what is not NBD."""

    code = "nbd"
    blame = Blame.PEER


class NbdDisk:
    """One connection to one export; usable in a `with` statement. Not thread-safe."""

    def __init__(self, uri: str) -> None:
        """Connect to an export by its URI; raise `NbdError` if that fails."""
        self._export, self._socket = _connect(uri)
        self._contexts: dict[int, str] = {}
        self._is_structured = False
        self._cookie = 0
        self._doing = ""
        """What the server is asked, for errors."""
        self._size_bytes = 0
        try:
            self._negotiate()
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size_bytes(self) -> int:
        """The disk's size."""
        return self._size_bytes

    def close(self) -> None:
        """Tell the server and hang up; it owes no reply."""
        try:
            self._send(struct.pack(">IHHQQI", _REQUEST, 0, _CMD_DISC, 0, 0, 0))
        except NbdError:
            pass  # a server that is gone needs no goodbye
        self._socket.close()

    def pread(self, *, offset: int, length: int) -> bytes:
        """Return `length` bytes; raise `OriginIOError` if the server cannot read them."""
        parts: list[bytes] = []
        for start in range(offset, offset + length, REQUEST_BYTES_MAX):
            size = min(REQUEST_BYTES_MAX, offset + length - start)
            self._request(_CMD_READ, offset=start, length=size)
            parts.append(self._read_reply(offset=start, length=size))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pwrite(self, data: bytes | memoryview, *, offset: int) -> None:
        """Write all of `data`; durable after the next flush."""
        rest = memoryview(data)
        while rest:
            piece = rest[:REQUEST_BYTES_MAX]
            self._request(_CMD_WRITE, offset=offset, length=len(piece), payload=piece)
            self._plain_reply()
            offset += len(piece)
            rest = rest[len(piece) :]

    def flush(self) -> None:
        """Make every write before this durable."""
        self._request(_CMD_FLUSH, offset=0, length=0)
        self._plain_reply()

    def extents(self, *, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Return (start, end, flags) of a range, flags as of `native.View.extents`; none is lost.

        Without the contexts all is data, and selected.
        """
        found: list[tuple[int, int, int]] = []
        end = offset + length
        while offset < end:
            for piece in self._status(offset=offset, length=min(STATUS_BYTES_MAX, end - offset)):
                if found and found[-1][1:] == (piece[0], piece[2]):
                    found[-1] = (found[-1][0], piece[1], piece[2])
                else:
                    found.append(piece)
            offset = found[-1][1]
        return found

    def _status(self, *, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Return what the server says of the beginning of a range, in one reply."""
        if not self._contexts:
            return [(offset, offset + length, 0)]
        self._request(_CMD_STATUS, offset=offset, length=length)
        told: dict[str, list[tuple[int, int]]] = {}
        is_done = False
        while not is_done:
            is_done, kind, payload = self._chunk()
            if kind == _STATUS and len(payload) >= 12 and len(payload) % 8 == 4:
                name = self._contexts.get(int.from_bytes(payload[:4], "big"))
                if name is None:
                    raise self._nonsense()
                pairs = list(struct.iter_unpack(">II", payload[4:]))
                if any(size == 0 for size, _ in pairs):
                    raise self._nonsense()
                told[name] = pairs
        if told.keys() != set(self._contexts.values()):
            raise self._nonsense()
        return _overlaid(told, offset, offset + length)

    # Negotiation --------------------------------------------------------------------------------

    def _negotiate(self) -> None:
        magic, option_magic, handshake = struct.unpack(">QQH", self._receive(18))
        if (magic, option_magic) != (_NBDMAGIC, _IHAVEOPT) or not handshake & _FIXED_NEWSTYLE:
            raise NbdError(f"{self._export}: no NBD server of the fixed newstyle kind")
        self._send(struct.pack(">I", handshake & (_FIXED_NEWSTYLE | _NO_ZEROES)))
        name = self._export.encode()
        if self._option(_OPT_STRUCTURED_REPLY, b"") is not None:
            self._is_structured = True
            queries = [text.encode() for text in (ALLOCATION_CONTEXT, SELECTED_CONTEXT)]
            asked = b"".join(struct.pack(">I", len(query)) + query for query in queries)
            head = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
            for kind, body in self._option(_OPT_SET_META_CONTEXT, head + asked) or ():
                if kind == _REP_META_CONTEXT and len(body) > 4:
                    self._contexts[int.from_bytes(body[:4], "big")] = body[4:].decode()
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        answers = self._option(_OPT_GO, data, is_needed=True) or ()
        for kind, body in answers:
            if kind == _REP_INFO and body[:2] == struct.pack(">H", _INFO_EXPORT):
                self._size_bytes, _ = struct.unpack(">QH", body[2:])

    def _option(
        self, option: int, data: bytes, *, is_needed: bool = False
    ) -> list[tuple[int, bytes]] | None:
        """Return the replies to an option, None if the server has it not."""
        self._send(struct.pack(">QII", _IHAVEOPT, option, len(data)) + data)
        found: list[tuple[int, bytes]] = []
        while True:
            magic, code, reply, length = struct.unpack(">QIII", self._receive(20))
            if (magic, code) != (_OPTION_REPLY, option) or length > _REPLY_BYTES_MAX:
                raise self._nonsense()
            body = self._receive(length)
            if reply == _REP_ACK:
                return found
            if reply & _REP_ERROR:
                if not is_needed:
                    return None
                words = body.decode(errors="replace") or f"error {reply & ~_REP_ERROR}"
                raise NbdError(f"{self._export}: the server refused: {words}")
            found.append((reply, body))

    # Transmission -------------------------------------------------------------------------------

    def _request(
        self, command: int, *, offset: int, length: int, payload: memoryview | None = None
    ) -> None:
        self._cookie += 1
        self._doing = f"{_VERBS[command]} of {length} bytes at {offset}"
        self._send(struct.pack(">IHHQQI", _REQUEST, 0, command, self._cookie, offset, length))
        if payload is not None:
            self._send(payload)

    def _read_reply(self, *, offset: int, length: int) -> bytes:
        if not self._is_structured:
            self._plain_reply()
            return self._receive(length)
        data = bytearray(length)
        missing = length
        is_done = False
        while not is_done:
            is_done, kind, payload = self._chunk()
            if kind not in {_DATA, _HOLE}:
                continue
            if len(payload) < 8 or (kind == _HOLE and len(payload) != 12):
                raise self._nonsense()
            at = int.from_bytes(payload[:8], "big") - offset
            count = len(payload) - 8 if kind == _DATA else int.from_bytes(payload[8:], "big")
            if at < 0 or at + count > length:
                raise self._nonsense()
            if kind == _DATA:
                data[at : at + count] = payload[8:]
            missing -= count
        if missing:
            raise self._nonsense()
        return bytes(data)

    def _plain_reply(self) -> None:
        """Take the reply to a request that carries no data, or is a read without chunks."""
        if self._is_structured:
            magic = int.from_bytes(self._receive(4), "big")
            if magic == _STRUCTURED_REPLY:
                self._chunk_after_magic()
                return
            head = self._receive(12)
        else:
            magic, head = int.from_bytes(self._receive(4), "big"), self._receive(12)
        errno, cookie = struct.unpack(">IQ", head)
        if (magic, cookie) != (_SIMPLE_REPLY, self._cookie):
            raise self._nonsense()
        if errno:
            raise self._failed(f"error {errno}")

    def _chunk(self) -> tuple[bool, int, bytes]:
        """Return (is the last, kind, payload); raise what the server reports."""
        magic = int.from_bytes(self._receive(4), "big")
        if magic == _SIMPLE_REPLY:
            errno, _ = struct.unpack(">IQ", self._receive(12))
            raise self._failed(f"error {errno}")
        if magic != _STRUCTURED_REPLY:
            raise self._nonsense()
        return self._chunk_after_magic()

    def _chunk_after_magic(self) -> tuple[bool, int, bytes]:
        flags, kind, cookie, size = struct.unpack(">HHQI", self._receive(16))
        if cookie != self._cookie or size > _REPLY_BYTES_MAX:
            raise self._nonsense()
        payload = self._receive(size)
        if kind & _ERROR:
            if not flags & _DONE:
                raise self._nonsense()  # more would follow, and we are at no good place to go on
            words = payload[6:].decode(errors="replace")
            number = int.from_bytes(payload[:4], "big")
            raise self._failed(words or f"error {number}")
        return bool(flags & _DONE), kind, payload

    def _failed(self, words: str) -> OriginIOError:
        return OriginIOError(f"{self._export}: {self._doing}: {words}")

    def _nonsense(self) -> NbdError:
        return NbdError(f"{self._export}: the server's reply makes no sense")

    def _send(self, data: bytes | memoryview) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise NbdError(f"{self._export}: the server is gone: {error}") from error

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        done = 0
        while done < length:
            try:
                count = self._socket.recv_into(view[done:])
            except OSError as error:
                raise NbdError(f"{self._export}: the server is gone: {error}") from error
            if count == 0:
                raise NbdError(f"{self._export}: the server hung up")
            done += count
        return bytes(data)


def _overlaid(
    told: dict[str, list[tuple[int, int]]], start: int, end: int
) -> list[tuple[int, int, int]]:
    """Return one map of all contexts, as far as each of them goes."""
    edges = {start}
    reach = end
    for pairs in told.values():
        position = start
        for size, _ in pairs:
            position += size
            edges.add(min(position, end))
        reach = min(reach, position)
    bounds = sorted(edge for edge in edges if edge <= reach)
    flags = [0] * (len(bounds) - 1)
    for name, pairs in told.items():
        index, position = 0, start
        for size, value in pairs:
            position += size
            while index < len(flags) and bounds[index] < position:
                flags[index] |= _flags(name, value)
                index += 1
    return list(zip(bounds[:-1], bounds[1:], flags, strict=True))


def _flags(context: str, value: int) -> int:
    if context == ALLOCATION_CONTEXT:
        return value & (native.HOLE | native.ZERO)
    return 0 if value & 1 else native.NOT_SELECTED


def _connect(uri: str) -> tuple[str, socket.socket]:
    """Return the export's name and a connection."""
    parts = urlsplit(uri)
    export = unquote(parts.path.removeprefix("/"))
    is_unix = parts.scheme == "nbd+unix"
    made = socket.socket(socket.AF_UNIX) if is_unix else None
    try:
        if made is not None:
            made.settimeout(_TIMEOUT_S)
            made.connect(parse_qs(parts.query).get("socket", [""])[0])
            return export, made
        made = socket.create_connection((parts.hostname or "", parts.port or _PORT))
        made.settimeout(_TIMEOUT_S)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        if made is not None:
            made.close()
        raise NbdError(f"{export}: no server at {uri}: {error.strerror or error}") from error
    return export, made
