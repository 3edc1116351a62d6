"""Rules to blocks: what the user says matters, resolved on a disk to extents and reasons."""

from stillblock.selection.disk import Disk
from stillblock.selection.partition_table import Partition, PartitionTable, PartitionTableError
from stillblock.selection.partitions import read_partitions

__all__ = ["Disk", "Partition", "PartitionTable", "PartitionTableError", "read_partitions"]
