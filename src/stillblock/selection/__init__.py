"""Rules to blocks: what the user says matters, resolved on a disk to extents and reasons.

    rules = Rules.parse([("exclude", "part:type=swap"), ("exclude", "path:/var/cache/**")])
    resolution = resolve(rules, disk, block_size=4096)            # before the instant
    if resolution.pending is not None:
        resolution = resolve_frozen(resolution.pending, view)     # on the frozen view
    resolution.extents

The language is described in docs/rules.md.
"""

from stillblock.selection.confinement import Limits
from stillblock.selection.disk import Disk
from stillblock.selection.facts import Phase, Unresolved
from stillblock.selection.frozen import resolve_frozen
from stillblock.selection.partition_table import Partition, PartitionTable, PartitionTableError
from stillblock.selection.partitions import read_partitions
from stillblock.selection.resolution import (
    ExcludedExtent,
    Pending,
    Resolution,
    TermResult,
    resolve,
)
from stillblock.selection.rules import Rules, Term
from stillblock.selection.workers import WorkerReaders

__all__ = [
    "Disk",
    "ExcludedExtent",
    "Limits",
    "Partition",
    "PartitionTable",
    "PartitionTableError",
    "Pending",
    "Phase",
    "Resolution",
    "Rules",
    "Term",
    "TermResult",
    "Unresolved",
    "WorkerReaders",
    "read_partitions",
    "resolve",
    "resolve_frozen",
]
