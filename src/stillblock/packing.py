"""Many extents in few bytes: how records keep lists that would be megabytes of JSON.

A unit that divides every number; then, for each extent, how far it begins behind the end of the one
before and its length, in units; as integers of seven bits a byte, the low ones first, the highest
bit set if more follow. Compressed (zlib, RFC 1950), then base64.
"""

import base64
import binascii
import math
import zlib
from collections.abc import Iterator
from typing import Final

from stillblock.model import Extents

_UNPACKED_BYTES_MAX: Final = 256 << 20
"""No record of ours unpacks to more: it would not have fitted the journal."""
_VARINT_BITS_MAX: Final = 63


class PackingError(ValueError):
    """The text is not what `pack` wrote."""


def pack(extents: Extents) -> str:
    """Return normal extents as text."""
    unit = math.gcd(*(number for extent in extents for number in extent)) or 1
    out = bytearray()
    _put(out, unit)
    end = 0
    for start, stop in extents:
        _put(out, (start - end) // unit)
        _put(out, (stop - start) // unit)
        end = stop
    return base64.b64encode(zlib.compress(bytes(out), 6)).decode()


def unpack(text: str) -> Extents:
    """Return the extents in a text; raise `PackingError` if it is none of ours."""
    try:
        decompressor = zlib.decompressobj()
        data = decompressor.decompress(base64.b64decode(text, validate=True), _UNPACKED_BYTES_MAX)
    except (binascii.Error, zlib.error) as error:
        raise PackingError(f"packed extents are damaged: {error}") from error
    if not decompressor.eof:
        raise PackingError("packed extents end early, or are too long")
    numbers = _numbers(data)
    unit = next(numbers, 0)
    found: list[tuple[int, int]] = []
    end = 0
    for gap in numbers:
        length = next(numbers, 0)
        start = end + gap * unit
        end = start + length * unit
        if start >= end:
            raise PackingError("packed extents hold an empty one")
        found.append((start, end))
    return tuple(found)


def _put(out: bytearray, value: int) -> None:
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _numbers(data: bytes) -> Iterator[int]:
    value = shift = 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        if byte & 0x80:
            shift += 7
            if shift > _VARINT_BITS_MAX:
                raise PackingError("packed extents hold a number that is too large")
            continue
        yield value
        value = shift = 0
    if shift:
        raise PackingError("packed extents end within a number")
