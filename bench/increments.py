"""Copying what changed: one percent of the disk rewritten, then only that read out, by stillblock
and by QEMU."""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import fields, fio, registry
from bench.errors import PeerError
from bench.machine import disk_usage_bytes
from bench.nbd import PIECE_BYTES, NbdClient
from bench.peers import StorageDaemon, tool
from bench.process import run_tool
from bench.results import Session
from bench.rounds import interleave, visit_of
from bench.session import measure
from bench.stillblock_target import Stillblock
from bench.targets import Place, Target
from bench.units import BLOCK_BYTES, KIB, MIB

CHANGED_SHARE = 0.01
READ_DEPTH = 32
BITMAP_GRANULARITIES_BYTES = (64 * KIB, 4 * KIB)
DIRTY = 1


def measure_increments(
    names: Sequence[str], *, place: Place, round_count: int
) -> Iterator[Session]:
    """Seconds and bytes out of an incremental copy after one percent changed in 4 KiB blocks."""

    def rows_of(target: Target) -> dict[str, dict[str, float]]:
        if isinstance(target, Stillblock):
            return _export_changed(target)
        if isinstance(target, StorageDaemon):
            return _backup_bitmaps(target)
        return {}

    wanted = [name for name in names if name in (registry.OURS, registry.QSD_RAW)]
    visit = visit_of(place, rows_of)
    yield from interleave(wanted, round_count=round_count, label="incr", visit=visit)


def _change(target: Target) -> dict[str, float]:
    size_bytes = target.place.size_bytes
    job = fio.Job(
        uri=target.uri,
        pattern="randwrite",
        request_bytes=BLOCK_BYTES,
        depth=READ_DEPTH,
        offset=0,
        length=size_bytes,
        request_count=int(size_bytes // BLOCK_BYTES * CHANGED_SHARE),
    )
    return measure(target, job, settles=True)


def _export_changed(target: Stillblock) -> dict[str, dict[str, float]]:
    """A second snapshot, its changed set by block status, and those blocks read over NBD into a
    sparse file."""
    target.take_snapshot(1)
    rows = {"incr_change": _change(target)}
    out = target.place.scratch / "increment.raw"
    begin = time.perf_counter()
    target.take_snapshot(2)
    uri = target.snapshot_uri(2)
    changed = _dirty_extents(uri, context=target.changed_context(1))
    _copy_extents(uri, changed, out=out, size_bytes=target.place.size_bytes)
    elapsed_s = time.perf_counter() - begin
    rows["incr_export"] = {"seconds": elapsed_s, "out_mib": disk_usage_bytes(out) / MIB}
    out.unlink()
    return rows


def _dirty_extents(uri: str, *, context: str) -> list[tuple[int, int]]:
    nbdinfo = tool("nbdinfo", package="libnbd-bin")
    printed = run_tool([nbdinfo, "--json", f"--map={context}", uri])
    extents = []
    for value in fields.sequence(json.loads(printed), "nbdinfo"):
        entry = fields.mapping(value, "extent")
        start = fields.integer(entry.get("offset"), "offset")
        length = fields.integer(entry.get("length"), "length")
        if fields.integer(entry.get("type"), "type") & DIRTY:
            extents.append((start, start + length))
    if not extents:
        raise PeerError(f"{context} shows no change after one percent was rewritten")
    return extents


def _copy_extents(
    uri: str, extents: Sequence[tuple[int, int]], *, out: Path, size_bytes: int
) -> None:
    pieces = [
        (offset, min(offset + PIECE_BYTES, end))
        for start, end in extents
        for offset in range(start, end, PIECE_BYTES)
    ]
    with out.open("wb", buffering=0) as file, NbdClient(uri) as client:
        file.truncate(size_bytes)
        for offset, data in client.pread_many(pieces, depth=READ_DEPTH):
            file.seek(offset)
            file.write(data)


def _backup_bitmaps(target: StorageDaemon) -> dict[str, dict[str, float]]:
    """QEMU's incremental backup with a bitmap of each granularity, and a full read of the export
    beside it."""
    for granularity in BITMAP_GRANULARITIES_BYTES:
        target.call(
            "block-dirty-bitmap-add", node="top", name=_bitmap(granularity), granularity=granularity
        )
    rows = {"incr_change": _change(target)}
    for granularity in BITMAP_GRANULARITIES_BYTES:
        out = target.directory / "increment.qcow2"
        begin = time.perf_counter()
        target.backup_changed(bitmap=_bitmap(granularity), out=out)
        rows[f"incr_{_bitmap(granularity)}"] = {
            "seconds": time.perf_counter() - begin,
            "out_mib": disk_usage_bytes(out) / MIB,
        }
        out.unlink()
    if shutil.which("nbdcopy"):
        begin = time.perf_counter()
        run_tool(["nbdcopy", target.uri, "null:"])
        rows["incr_full_read"] = {"seconds": time.perf_counter() - begin}
    return rows


def _bitmap(granularity: int) -> str:
    return f"bitmap{granularity // KIB}k"
