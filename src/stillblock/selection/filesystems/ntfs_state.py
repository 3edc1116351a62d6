"""Whether an NTFS volume's structures are complete as they lie on disk, without its log.

A volume in use under Windows is not: what its log holds may be missing in place. There is no reader
of that log here, so such a volume is unresolved until it was unmounted or checked.
"""

from typing import Final

from stillblock.selection.filesystems.filesystem import UnresolvedError
from stillblock.selection.filesystems.ntfs_records import Stream, join_sectors

_DIRTY, _CHECKING = 0x0001, 0x4000
_PAGE_SIZES: Final = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_NOBODY: Final = 0xFFFF
_CLEAN: Final = 0x0002
_BLANK_CHECK_BYTES: Final = 1 << 20

_WAKE: Final = b"wake"
"""What Windows writes over a hibernation file's beginning once it has resumed from it."""


def check_volume_flags(information: bytes) -> None:
    """Raise `UnresolvedError` if $VOLUME_INFORMATION says that a check is due."""
    version = (information[8], information[9])
    flags = int.from_bytes(information[10:12], "little")
    if version not in ((3, 0), (3, 1)):
        raise UnresolvedError(f"it is NTFS {version[0]}.{version[1]}, which is not supported")
    if flags & (_DIRTY | _CHECKING):
        raise UnresolvedError("NTFS says that it is dirty; let chkdsk look at it")


def check_log(log: Stream) -> None:
    """Raise `UnresolvedError` unless the $LogFile is empty or was closed.

    Its first two pages are restart areas, of which the one with the higher LSN counts.
    """
    head = log.read(offset=0, length=4)
    if head == b"\xff\xff\xff\xff":
        # As ntfs-3g and mkntfs leave it: all of it, or it is something else.
        for offset in range(0, log.size, _BLANK_CHECK_BYTES):
            data = log.read(offset=offset, length=_BLANK_CHECK_BYTES)
            if data.count(b"\xff") != len(data):
                raise UnresolvedError("its log is damaged; let chkdsk look at it")
        return
    areas = [area for page in _restart_pages(log) if (area := _restart_area(page)) is not None]
    if not areas:
        raise UnresolvedError("its log has no restart area; let chkdsk look at it")
    _, is_closed = max(areas)
    if not is_closed:
        raise UnresolvedError(
            "its log holds changes that may not be in place yet: it is in use, or was not unmounted"
        )


def _restart_pages(log: Stream) -> list[bytes]:
    pages: list[bytes] = []
    for page_size in _PAGE_SIZES:
        for offset in (0, page_size):
            raw = log.read(offset=offset, length=page_size)
            if len(raw) < page_size or raw[:4] not in (b"RSTR", b"CHKD"):
                continue
            if int.from_bytes(raw[16:20], "little") == page_size:
                pages.append(bytes(join_sectors(raw, magic=raw[:4], what="its log's restart page")))
    return pages


def _restart_area(page: bytes) -> tuple[int, bool] | None:
    """Return the LSN of a restart area, and whether the log was closed then."""
    begin = int.from_bytes(page[24:26], "little")
    if begin & 7 or not 24 <= begin <= 512 - 48:
        return None
    area = page[begin : begin + 48]
    lsn = int.from_bytes(area[0:8], "little")
    client = int.from_bytes(area[12:14], "little")
    flags = int.from_bytes(area[14:16], "little")
    return lsn, client == _NOBODY or bool(flags & _CLEAN)


def check_hibernation(head: bytes) -> None:
    """Raise `UnresolvedError` if a hibernation file, of which this is the head, is in force.

    Windows then has the volume's structures in memory, which the file holds (fast startup too).
    """
    if head.strip(b"\0") and head[:4].lower() != _WAKE:
        raise UnresolvedError(
            "Windows is hibernated and keeps changes of it in memory; shut it down without fast "
            "startup"
        )
