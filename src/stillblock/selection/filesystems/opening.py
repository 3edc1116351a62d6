"""From bytes to the reader that understands them.

Readers are imported when needed: a worker reads one filesystem and should start at once.
"""
# ruff: noqa: PLC0415

from stillblock.selection.disk import Disk
from stillblock.selection.filesystems.filesystem import Filesystem, UnresolvedError
from stillblock.selection.filesystems.signatures import Content, identify


def open_filesystem(disk: Disk) -> Filesystem:
    """Return the filesystem on a disk, partition or volume.

    Raise `UnresolvedError`, which says why, if there is none that is understood.
    """
    signature = identify(disk)
    if len(signature.found) > 1:
        raise UnresolvedError("it looks like several things: " + ", ".join(signature.found))
    if signature.content is None:
        raise UnresolvedError("nothing known lies here")
    return _open(signature.content, disk)


def _open(content: Content, disk: Disk) -> Filesystem:
    match content:
        case Content.EXT:
            from stillblock.selection.filesystems.ext import open_ext

            return open_ext(disk)
        case Content.XFS:
            from stillblock.selection.filesystems.xfs import open_xfs

            return open_xfs(disk)
        case Content.BTRFS:
            from stillblock.selection.filesystems.btrfs import open_btrfs

            return open_btrfs(disk)
        case Content.NTFS:
            from stillblock.selection.filesystems.ntfs import open_ntfs

            return open_ntfs(disk)
        case Content.FAT:
            from stillblock.selection.filesystems.fat import open_fat

            return open_fat(disk)
        case Content.EXFAT:
            from stillblock.selection.filesystems.exfat import open_exfat

            return open_exfat(disk)
        case _:
            raise UnresolvedError(f"it is {content}, which is opaque")
