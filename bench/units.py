"""Sizes as people write them."""

from bench.errors import UsageError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK_BYTES = 4096
_SUFFIXES = {"K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int:
    """Bytes of `4096`, `64K`, `16M`, `4G` or `1T` (1024 units, an `iB` may follow); raise
    UsageError."""
    short = text.upper().removesuffix("IB")
    shift = _SUFFIXES.get(short[-1:], 0)
    digits = short[:-1] if shift else short
    if not digits.isdecimal():
        raise UsageError(f"not a size: {text!r}; write bytes or a number with K, M, G or T")
    return int(digits) << shift


def format_size(size_bytes: int) -> str:
    """The shortest exact form in 1024 units: `4G`, `96M`, `1000`."""
    for suffix, shift in reversed(_SUFFIXES.items()):
        if size_bytes and size_bytes % (1 << shift) == 0:
            return f"{size_bytes >> shift}{suffix}"
    return str(size_bytes)
