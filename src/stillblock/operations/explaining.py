"""What rules come to on the disk as it is now: on a snapshot taken for it where clients write."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from stillblock import selection
from stillblock.model import PAUSE_LIMIT_MS_DEFAULT, SnapshotPurpose, SnapshotRecord
from stillblock.operations.disks import FrozenDisk, LiveDisk
from stillblock.operations.records import encode_snapshot, new_id
from stillblock.operations.rules import (
    Explanation,
    RulesRequest,
    effective_rules,
    explain_frozen,
    explain_terms,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stillblock.model import Extents
    from stillblock.operations.volume import OpenVolume


def explain(volume: OpenVolume, request: RulesRequest) -> Explanation:
    """Return what a snapshot with these terms would select now, without keeping one.

    Files and free space of a disk in use cannot be told from the disk as it changes under the
    reader: a snapshot is taken for it, as any is, and deleted again.
    """
    known = selection.Known()
    rules = effective_rules(volume, request, known=known)
    found = replace(explain_terms(volume, rules.terms, known=known), is_default=rules.is_default)
    if found.is_final:
        return found
    with disk_at_rest(volume, found.extents) as disk:
        told = explain_frozen(disk, found.rules, found.pending, volume=volume.name)
    return replace(told, is_default=rules.is_default)


@contextmanager
def disk_at_rest(volume: OpenVolume, extents: Extents) -> Iterator[selection.Disk]:
    """Give what these extents hold now, while it does not change: a snapshot where clients write.

    The rest of the disk may be an error to read. Nothing is left of the snapshot afterwards.
    """
    if not volume.is_served:
        yield LiveDisk(volume.engine)
        return
    record = SnapshotRecord(name="probe", id=new_id(), purpose=SnapshotPurpose.PROBE)
    engine = volume.engine
    instant = engine.snapshot(
        selection=extents,
        low=extents,
        meta=encode_snapshot(record),
        pause_limit_ms=PAUSE_LIMIT_MS_DEFAULT,
    )
    try:
        view = engine.view(epoch=instant.epoch, excluded_reads="error")
        try:
            yield FrozenDisk(view, is_cancelled=lambda: False)
        finally:
            view.close()
    finally:
        engine.delete_snapshot(epoch=instant.epoch, force=True)
