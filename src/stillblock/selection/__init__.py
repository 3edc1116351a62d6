"""Rules to blocks: what the user says matters, resolved on a disk to extents and reasons.

    rules = Rules.parse([("exclude", "part:type=swap"), ("exclude", "1GiB-2GiB")])
    resolution = resolve(rules, disk, block_size=4096)
    resolution.extents

The language is described in docs/rules.md.
"""

from stillblock.selection.disk import Disk
from stillblock.selection.partition_table import Partition, PartitionTable, PartitionTableError
from stillblock.selection.partitions import read_partitions
from stillblock.selection.resolution import ExcludedExtent, Resolution, TermResult, resolve
from stillblock.selection.rules import Rules, Term
from stillblock.selection.terms import Phase

__all__ = [
    "Disk",
    "ExcludedExtent",
    "Partition",
    "PartitionTable",
    "PartitionTableError",
    "Phase",
    "Resolution",
    "Rules",
    "Term",
    "TermResult",
    "read_partitions",
    "resolve",
]
