"""What lies on a stretch of disk, told by the signatures that each format documents.

Magic numbers alone are believed only to name a thing; its reader checks the rest. Two that
contradict each other make the stretch unknown, and what is unknown is kept whole.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from stillblock.selection.disk import Disk, read_exactly

_PAGE_SIZES: Final = (4096, 8192, 16384, 32768, 65536)
"""Page sizes Linux has had: the swap signature ends the first page."""
SWAP_PAGE_BYTES_MAX: Final = _PAGE_SIZES[-1]
RAID_MAGIC: Final = b"\xfc\x4e\x2b\xa9"
"""Of Linux md's superblocks, of every version: 0xa92b4efc, little-endian."""
_HEAD_BYTES: Final = 64 * 1024 + 4096
"""Reaches the btrfs superblock, the furthest signature of all."""


class Content(StrEnum):
    """What a stretch of disk holds."""

    EXT = "ext"
    XFS = "xfs"
    BTRFS = "btrfs"
    NTFS = "ntfs"
    FAT = "fat"
    EXFAT = "exfat"
    SWAP = "swap"
    LVM = "lvm"
    LUKS = "luks"
    RAID = "raid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What was found: one thing, none, or several that contradict each other."""

    found: tuple[Content, ...]

    @property
    def content(self) -> Content | None:
        """The one thing that lies there; None if there is none or no telling."""
        return self.found[0] if len(self.found) == 1 else None


def identify(disk: Disk) -> Signature:
    """Return what lies on a disk, partition or volume, from its first 68 KiB."""
    head = read_exactly(disk, offset=0, length=min(_HEAD_BYTES, disk.size))

    def at(offset: int, magic: bytes) -> bool:
        return head[offset : offset + len(magic)] == magic

    tests = (
        (Content.EXT, at(1024 + 56, b"\x53\xef")),
        (Content.XFS, at(0, b"XFSB")),
        (Content.BTRFS, at(65536 + 64, b"_BHRfS_M")),
        (Content.NTFS, at(3, b"NTFS    ")),
        (Content.EXFAT, at(3, b"EXFAT   ")),
        (Content.FAT, _is_fat(head)),
        (Content.SWAP, any(at(page - 10, b"SWAPSPACE2") for page in _PAGE_SIZES)),
        (Content.LVM, any(at(sector * 512, b"LABELONE") for sector in range(4))),
        (Content.LUKS, at(0, b"LUKS\xba\xbe")),
        (Content.RAID, any(at(offset, RAID_MAGIC) for offset in (0, 4096))),
    )
    return Signature(found=tuple(content for content, is_there in tests if is_there))


def swap_page_bytes(head: bytes) -> int | None:
    """Return the page size of the swap area or file that begins so; None if it is none.

    `union swap_header` of Linux: the signature ends the first page, the version stands at 1024.
    """
    if head[1024:1028] not in (b"\1\0\0\0", b"\0\0\0\1"):
        return None
    return next((page for page in _PAGE_SIZES if head[page - 10 : page] == b"SWAPSPACE2"), None)


def _is_fat(head: bytes) -> bool:
    """Whether sector 0 is a FAT boot sector: the type string is not proof, so the geometry counts.

    Microsoft, FAT: General Overview of On-Disk Format, 1.03, "Boot Sector and BPB".
    """
    if len(head) < 512 or head[510:512] != b"\x55\xaa" or head[0] not in (0xEB, 0xE9):
        return False
    sector_size = int.from_bytes(head[11:13], "little")
    cluster_sectors = head[13]
    reserved = int.from_bytes(head[14:16], "little")
    fat_count = head[16]
    return (
        sector_size in (512, 1024, 2048, 4096)
        and cluster_sectors in (1, 2, 4, 8, 16, 32, 64, 128)
        and reserved > 0
        and fat_count in (1, 2)
        and (head[21] == 0xF0 or head[21] >= 0xF8)
    )
