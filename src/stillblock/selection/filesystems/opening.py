"""From bytes to the reader that understands them."""

from collections.abc import Callable
from importlib import import_module
from typing import Final, TypeAlias

from stillblock.selection.disk import Disk
from stillblock.selection.filesystems.filesystem import Filesystem, UnresolvedError
from stillblock.selection.filesystems.signatures import Content, identify

Reader: TypeAlias = Callable[[Disk], Filesystem]
"""Opens the filesystem on a disk, or raises `UnresolvedError`."""

READERS: Final = {
    content: f"stillblock.selection.filesystems.{module}:open_{module}"
    for content, module in {
        Content.EXT: "ext",
        Content.XFS: "xfs",
        Content.BTRFS: "btrfs",
        Content.NTFS: "ntfs",
        Content.FAT: "fat",
        Content.EXFAT: "exfat",
    }.items()
}
"""Where the reader for a content is. Imported when needed: a worker reads one filesystem, starts at
once, and can import nothing later.
"""


def load_reader(name: str) -> Reader:
    """Import a reader by `module:function`."""
    module, _, function = name.partition(":")
    reader: Reader = getattr(import_module(module), function)
    return reader


def open_filesystem(disk: Disk) -> Filesystem:
    """Return the filesystem on a disk, partition or volume.

    Raise `UnresolvedError`, which says why, if there is none that is understood.
    """
    signature = identify(disk)
    if len(signature.found) > 1:
        raise UnresolvedError("it looks like several things: " + ", ".join(signature.found))
    if signature.content is None:
        raise UnresolvedError("nothing known lies here")
    if signature.content not in READERS:
        raise UnresolvedError(f"it is {signature.content}, which is opaque")
    return load_reader(READERS[signature.content])(disk)
