"""Rules to blocks: what the user says matters, resolved on a disk to extents and reasons.

    rules = Rules.parse([("exclude", "part:type=swap"), ("exclude", "path:/var/cache/**")])
    resolution = resolve(rules, disk, block_size=4096)            # before the instant
    if resolution.pending is not None:
        resolution = resolve_frozen(resolution.pending, view)     # on the frozen view
    resolution.extents

The language is described in docs/rules.md. Importing this package is cheap, for each worker does
so: the rest is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stillblock.model import Unresolved
    from stillblock.selection.confinement import Limits, can_filter_calls
    from stillblock.selection.disk import Disk
    from stillblock.selection.facts import Known, Phase
    from stillblock.selection.frozen import resolve_frozen
    from stillblock.selection.partition_table import Partition, PartitionTable, PartitionTableError
    from stillblock.selection.partitions import read_partitions
    from stillblock.selection.presets import Preset, Presets
    from stillblock.selection.resolution import (
        ExcludedExtent,
        Pending,
        Resolution,
        TermResult,
        resolve,
    )
    from stillblock.selection.rules import Rules, Term, default_rules
    from stillblock.selection.workers import WorkerReaders

__all__ = [
    "Disk",
    "ExcludedExtent",
    "Known",
    "Limits",
    "Partition",
    "PartitionTable",
    "PartitionTableError",
    "Pending",
    "Phase",
    "Preset",
    "Presets",
    "Resolution",
    "Rules",
    "Term",
    "TermResult",
    "Unresolved",
    "WorkerReaders",
    "can_filter_calls",
    "default_rules",
    "read_partitions",
    "resolve",
    "resolve_frozen",
]

_MODULES = {
    "confinement": ("Limits", "can_filter_calls"),
    "disk": ("Disk",),
    "facts": ("Known", "Phase", "Unresolved"),
    "frozen": ("resolve_frozen",),
    "partition_table": ("Partition", "PartitionTable", "PartitionTableError"),
    "partitions": ("read_partitions",),
    "resolution": ("ExcludedExtent", "Pending", "Resolution", "TermResult", "resolve"),
    "presets": ("Preset", "Presets"),
    "rules": ("Rules", "Term", "default_rules"),
    "workers": ("WorkerReaders",),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"stillblock.selection.{module}"), name)
    raise AttributeError(f"module 'stillblock.selection' has no attribute {name!r}")
