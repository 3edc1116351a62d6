"""What a worker and its parent say to each other: frames over one socket, both ways.

    kind u8, three zeros, payload length u32, payload      little-endian

The parent asks (`SETUP` once, then `IDENTIFY`, `SURVEY`, `CENSUS`, the questions about files from
`FIND` to `TOUCHED`, or `LVM` with the text that describes a volume group) and waits; the worker
asks for bytes of the disk (`READ`) as often as it likes and then gives the `ANSWER`, or `FAILED`.
An answer is a JSON document and behind it the extents that it counts: pairs of u64; that of
`CONTENT` is bytes of a file. `HOLD_AGAINST` asks with such a document. Both sides bound what they
take.
"""

import json
import struct
import sys
from array import array
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Final

from stillblock.errors import StillblockError
from stillblock.model import Extents

HEADER: Final = struct.Struct("<B3xI")
READ: Final = struct.Struct("<QI")
READ_BYTES_MAX: Final = 1 << 20
"""What one `READ` may ask for."""
DOCUMENT_BYTES_MAX: Final = 16 << 20
"""JSON in a frame: a thousand terms of 4096 characters fit."""
FRAME_BYTES_MAX: Final = 64 << 20
"""A frame: a document and three million extents."""


class Kind(IntEnum):
    """What a frame is."""

    SETUP = 1
    IDENTIFY = 2
    SURVEY = 3
    READ = 4
    DATA = 5
    READ_FAILED = 6
    ANSWER = 7
    FAILED = 8
    CENSUS = 9
    LVM = 10
    FIND = 11
    LIST = 12
    LAYOUT = 13
    CONTENT = 14
    HOLD_AGAINST = 15
    TOUCHED = 16


class WireError(StillblockError):
    """The other side broke the protocol, or is gone."""

    code = "wire"


def frame(kind: Kind, payload: bytes) -> bytes:
    """Return a frame; raise `WireError` if it is too long to be taken."""
    if len(payload) > FRAME_BYTES_MAX:
        raise WireError(f"an answer of {len(payload)} bytes is too long")
    return HEADER.pack(kind, len(payload)) + payload


def receive(take: Callable[[int], bytes]) -> tuple[Kind, bytes]:
    """Return the next frame; `take` gives exactly as many bytes as it is asked for."""
    number, length = HEADER.unpack(take(HEADER.size))
    try:
        kind = Kind(number)
    except ValueError as error:
        raise WireError(f"a frame of unknown kind {number}") from error
    if length > FRAME_BYTES_MAX:
        raise WireError(f"a frame of {length} bytes is too long")
    return kind, take(length)


def pack_document(document: object, extents: Iterable[Extents] = ()) -> bytes:
    """Return a document and the extents behind it."""
    text = json.dumps(document).encode("ascii")
    numbers = array("Q")
    for several in extents:
        for start, end in several:
            numbers.append(start)
            numbers.append(end)
    if sys.byteorder == "big":
        numbers.byteswap()
    return struct.pack("<I", len(text)) + text + numbers.tobytes()


def unpack_document(payload: bytes) -> "tuple[object, array[int]]":
    """Return a document, and the numbers behind it; raise `WireError`."""
    if len(payload) < 4:
        raise WireError("a document without a length")
    (length,) = struct.unpack_from("<I", payload)
    if length > min(DOCUMENT_BYTES_MAX, len(payload) - 4) or (len(payload) - 4 - length) % 16:
        raise WireError("a document that does not fit its frame")
    try:
        document: object = json.loads(payload[4 : 4 + length].decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise WireError("a document that is no JSON") from error
    numbers = array("Q")
    numbers.frombytes(payload[4 + length :])
    if sys.byteorder == "big":
        numbers.byteswap()
    return document, numbers
