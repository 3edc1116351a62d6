"""One step on a large volume in a process of its own, so that its memory is counted from nothing.

`python -m bench.memory_probe STEP STORE ...` prints one JSON object; bench/memory.py reads it.
"""

import array
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from bench.instants import scattered_extents
from bench.process import pss_kib
from bench.units import BLOCK_BYTES, KIB
from stillblock import native

PAUSE_LIMIT_MS = 2000
NEW_BLOCK = b"changed!" * (BLOCK_BYTES // 8)


def open_volume(store: Path) -> tuple[native.Volume, dict[str, float]]:
    """The volume, how long opening took and how much memory it costs."""
    before_kib = pss_kib(os.getpid())
    begin = time.perf_counter()
    volume = native.Volume.open(store)
    elapsed_s = time.perf_counter() - begin
    grown_bytes = (pss_kib(os.getpid()) - before_kib) * KIB
    return volume, {"open_s": elapsed_s, "open_pss_bytes": grown_bytes}


def take(volume: native.Volume) -> native.Instant:
    """A snapshot of everything."""
    selection = ((0, volume.size_bytes),)
    return volume.snapshot(selection=selection, meta=b"", pause_limit_ms=PAUSE_LIMIT_MS)


def preserve(volume: native.Volume, offsets: Iterable[int]) -> dict[str, float]:
    """Take a snapshot, then write every block once."""
    before_kib = pss_kib(os.getpid())
    take(volume)
    bits_bytes = (pss_kib(os.getpid()) - before_kib) * KIB
    kept_before = volume.store_bytes()
    begin = time.perf_counter()
    for offset in offsets:
        volume.pwrite(NEW_BLOCK, offset=offset)
    volume.flush()
    return {
        "bits_bytes": bits_bytes,
        "write_s": time.perf_counter() - begin,
        "kept_bytes": float(volume.store_bytes() - kept_before),
    }


def pause(volume: native.Volume, count: int) -> dict[str, float]:
    """Take snapshots of everything while nothing else happens."""
    pauses_ms, took_ms = [], []
    for _ in range(count):
        begin = time.perf_counter()
        instant = take(volume)
        took_ms.append((time.perf_counter() - begin) * 1e3)
        pauses_ms.append(instant.pause_ns / 1e6)
    return {"pause_ms_max": max(pauses_ms), "snapshot_ms_max": max(took_ms)}


def select(
    volume: native.Volume, *, extent_count: int, further: int, is_same: bool
) -> dict[str, float]:
    """Take snapshots of scattered extents; return the memory of each after the second.

    The first two are not counted: they warm up what is allocated once.
    """
    before_kib = 0.0
    for number in range(further + 2):
        seed = 0 if is_same else number
        extents = scattered_extents(volume.size_bytes, count=extent_count, seed=seed)
        volume.snapshot(selection=tuple(extents), meta=b"", pause_limit_ms=PAUSE_LIMIT_MS)
        del extents
        if number == 1:
            before_kib = pss_kib(os.getpid())
    return {"kib_per_snapshot": (pss_kib(os.getpid()) - before_kib) / further}


def main(arguments: list[str]) -> None:
    """Do one step: `create ORIGIN`, `open`, `preserve OFFSETS`, `pause COUNT`, or
    `select EXTENTS SNAPSHOTS same|different`."""
    step, store, *rest = arguments
    if step == "create":
        native.create_volume(
            store=Path(store), origin=Path(rest[0]), block_size=BLOCK_BYTES, meta=b""
        )
        print(json.dumps({}))
        return
    volume, figures = open_volume(Path(store))
    if step == "preserve":
        offsets = array.array("q")
        offsets.frombytes(Path(rest[0]).read_bytes())
        figures |= preserve(volume, offsets)
    elif step == "pause":
        figures |= pause(volume, int(rest[0]))
    elif step == "select":
        figures |= select(
            volume,
            extent_count=int(rest[0]),
            further=int(rest[1]),
            is_same=rest[2] == "same",
        )
    volume.close()
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
