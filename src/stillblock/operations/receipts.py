"""Receipts: what a snapshot does not hold, and why; and proof that nobody changed that since."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Final

from stillblock import codec
from stillblock.errors import StoreDamagedError
from stillblock.extents import intersect, total_bytes
from stillblock.model import Extent, Extents, LeftOut, PackedLeftOut, SnapshotRecord
from stillblock.packing import PackingError, pack, unpack
from stillblock.selection.resolution import RESOLUTION_VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stillblock import native

_PLAIN_MAX: Final = 64
"""Extents that a record lists in words; more are packed: free space has tens of thousands."""
_OF_THE_MOMENT: Final = ("name", "is_protected", "description", "digest", "verification")
"""What may change while the snapshot stays what it is."""
_EMPTY: Final[tuple[object, ...]] = (None, "", [], {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """What the engine knows of an instant and never changes."""

    epoch: int
    size_bytes: int
    created_unix_ns: int

    @classmethod
    def of(cls, told: native.Epoch | native.Instant) -> Instant:
        """Return it of an instant that was just taken, or of a snapshot that is there."""
        return cls(
            epoch=told.epoch, size_bytes=told.size_bytes, created_unix_ns=told.created_unix_ns
        )


def versions() -> dict[str, str]:
    """Return the versions of what resolves rules here."""
    return {"stillblock": metadata.version("stillblock"), "resolver": str(RESOLUTION_VERSION)}


def with_left_out(record: SnapshotRecord, left_out: Sequence[LeftOut]) -> SnapshotRecord:
    """Return the record with what is left out, packed where that is long."""
    if len(left_out) <= _PLAIN_MAX:
        return replace(record, left_out=tuple(left_out), left_out_packed=())
    packed = tuple(
        PackedLeftOut(because=because, extents=pack(tuple(sorted(extents))))
        for because, extents in _by_reason(left_out).items()
    )
    return replace(record, left_out=(), left_out_packed=packed)


def left_out_of(record: SnapshotRecord) -> tuple[LeftOut, ...]:
    """Return what a record says is left out, in the order of the disk."""
    if not record.left_out_packed:
        return record.left_out
    try:
        found = [
            LeftOut(start=start, end=end, because=part.because)
            for part in record.left_out_packed
            for start, end in unpack(part.extents)
        ]
    except PackingError as error:
        raise StoreDamagedError(f"the record of snapshot {record.name}: {error}") from error
    found.sort(key=lambda part: part.start)
    return tuple(found)


def left_out_by_reason(record: SnapshotRecord, within: Extents) -> Counter[str]:
    """Return how many bytes of an area are left out, by the term that did it."""
    by_reason = _by_reason(left_out_of(record)).items()
    return +Counter({because: total_bytes(intersect(tuple(e), within)) for because, e in by_reason})


def _by_reason(left_out: Sequence[LeftOut]) -> dict[str, list[Extent]]:
    found: defaultdict[str, list[Extent]] = defaultdict(list)
    for part in left_out:
        found[part.because].append((part.start, part.end))
    return found


def sealed(record: SnapshotRecord, instant: Instant, extents: Extents) -> SnapshotRecord:
    """Return the record with the digest of what it, the instant and the selection say."""
    return replace(record, digest=digest_of(record, instant, extents))


def _without_empty(value: object) -> object:
    """Leave out what says nothing, so that a field which is added later changes no older digest."""
    if isinstance(value, dict):
        kept = {key: _without_empty(item) for key, item in value.items()}
        return {k: v for k, v in kept.items() if v is not False and v not in _EMPTY}
    if isinstance(value, list):
        return [_without_empty(item) for item in value]
    return value


def digest_of(record: SnapshotRecord, instant: Instant, extents: Extents) -> str:
    """Return the digest; the same for the same receipt, whatever the snapshot is called by now."""
    told = codec.to_json(record)
    for field in _OF_THE_MOMENT:
        del told[field]
    told |= codec.to_json(instant) | {"extents": [list(extent) for extent in extents]}
    text = json.dumps(_without_empty(told), separators=(",", ":"), sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
