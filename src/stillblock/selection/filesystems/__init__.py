"""Filesystems read from raw bytes: which files there are, where their data lies, what is free.

    filesystem = open_filesystem(disk)
    for path, node in walk(filesystem):
        filesystem.runs(node)
    filesystem.free()

Every byte read here was written by somebody else's system. Readers check what they rely on, bound
what they do, and raise `UnresolvedError` where they do not understand: callers then include.
"""

from stillblock.selection.filesystems.filesystem import (
    FileKind,
    Filesystem,
    Identity,
    Node,
    Run,
    UnresolvedError,
    read_runs,
    walk,
)
from stillblock.selection.filesystems.opening import open_filesystem
from stillblock.selection.filesystems.signatures import Content, Signature, identify

__all__ = [
    "Content",
    "FileKind",
    "Filesystem",
    "Identity",
    "Node",
    "Run",
    "Signature",
    "UnresolvedError",
    "identify",
    "open_filesystem",
    "read_runs",
    "walk",
]
