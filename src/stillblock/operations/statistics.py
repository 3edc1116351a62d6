"""Counters of an open volume, and what clients can ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stillblock.operations.volume import OpenVolume

from stillblock.model import ExportInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Counters since the volume was opened; sizes in bytes, times in nanoseconds."""

    volume: str
    store_bytes: int
    counters: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportList:
    """What NBD clients can ask for."""

    volume: str
    exports: tuple[ExportInfo, ...]


def read_statistics(volume: OpenVolume) -> Statistics:
    """Return the counters."""
    return Statistics(
        volume=volume.name,
        store_bytes=volume.engine.store_bytes(),
        counters=volume.engine.statistics(),
    )


def list_exports(volume: OpenVolume) -> ExportList:
    """Return the exports; none if nobody serves the volume."""
    return ExportList(volume=volume.name, exports=volume.hooks.exports(volume))
