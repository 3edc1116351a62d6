"""Partition tables made by hand, byte by byte: tests do not trust the parser's own tables."""

import struct
import uuid
import zlib
from dataclasses import dataclass, field

from stillblock.errors import OriginIOError

MIB = 1 << 20
LINUX = "0fc63daf-8483-4772-8e79-3d69d8477de4"
SWAP = "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f"
EFI = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"


@dataclass
class BytesDisk:
    """A disk in memory that counts how often it is read."""

    content: bytearray
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.content)

    def pread(self, *, offset: int, length: int) -> bytes:
        assert offset >= 0
        assert offset + length <= self.size, "the protocol allows reads inside the disk only"
        self.reads.append((offset, length))
        return bytes(self.content[offset : offset + length])


class FailingDisk:
    """A disk that fails, as told, where a read touches the bytes that are bad."""

    def __init__(
        self, disk: BytesDisk, bad: tuple[int, int], error: Exception | None = None
    ) -> None:
        self._disk, self._bad = disk, bad
        self._error = error or OriginIOError("bad sector")

    @property
    def size(self) -> int:
        return self._disk.size

    def pread(self, *, offset: int, length: int) -> bytes:
        if offset < self._bad[1] and self._bad[0] < offset + length:
            raise self._error
        return self._disk.pread(offset=offset, length=length)


def blank(size: int) -> BytesDisk:
    return BytesDisk(bytearray(size))


@dataclass(frozen=True)
class GptPart:
    first: int
    last: int
    type: str = LINUX
    name: str = ""
    uuid: str = ""
    attributes: int = 0


def mbr_entry(*, status: int = 0, type: int = 0x83, start: int, count: int) -> bytes:  # noqa: A002
    return struct.pack("<B3xB3xII", status, type, start, count)


def boot_record(*entries: bytes, signature: int = 0) -> bytes:
    table = b"".join(entries).ljust(64, b"\0")
    return bytes(440) + struct.pack("<I", signature) + bytes(2) + table + b"\x55\xaa"


def protective_mbr(*more: bytes) -> bytes:
    return boot_record(mbr_entry(type=0xEE, start=1, count=0xFFFFFFFF), *more)


def gpt_disk(
    parts: dict[int, GptPart],
    *,
    size: int = 4 * MIB,
    sector_size: int = 512,
    entry_count: int = 128,
    entry_bytes: int = 128,
    mbr: bytes | None = None,
) -> BytesDisk:
    """A disk with a whole GPT; `parts` by number."""
    disk = blank(size)
    array = bytearray(entry_count * entry_bytes)
    for number, part in parts.items():
        struct.pack_into(
            "<16s16sQQQ72s",
            array,
            (number - 1) * entry_bytes,
            uuid.UUID(part.type).bytes_le,
            uuid.UUID(part.uuid).bytes_le if part.uuid else uuid.UUID(int=number).bytes_le,
            part.first,
            part.last,
            part.attributes,
            part.name.encode("utf-16-le"),
        )
    last = size // sector_size - 1
    array_sectors = -(-len(array) // sector_size)
    disk.content[:512] = mbr if mbr is not None else protective_mbr()
    for lba, alternate, entries_lba in ((1, last, 2), (last, 1, last - array_sectors)):
        header = gpt_header(
            my_lba=lba,
            alternate_lba=alternate,
            first_usable=2 + array_sectors,
            last_usable=last - array_sectors - 1,
            entries_lba=entries_lba,
            entry_count=entry_count,
            entry_bytes=entry_bytes,
            entries_crc=zlib.crc32(array),
        )
        disk.content[lba * sector_size : lba * sector_size + len(header)] = header
        disk.content[entries_lba * sector_size : entries_lba * sector_size + len(array)] = array
    return disk


def gpt_header(
    *,
    my_lba: int,
    alternate_lba: int,
    first_usable: int,
    last_usable: int,
    entries_lba: int,
    entry_count: int,
    entry_bytes: int,
    entries_crc: int,
) -> bytes:
    def packed(crc: int) -> bytes:
        return struct.pack(
            "<8sIIIIQQQQ16sQIII",
            b"EFI PART",
            0x00010000,
            92,
            crc,
            0,
            my_lba,
            alternate_lba,
            first_usable,
            last_usable,
            uuid.UUID("11111111-2222-3333-4444-555555555555").bytes_le,
            entries_lba,
            entry_count,
            entry_bytes,
            entries_crc,
        )

    return packed(zlib.crc32(packed(0)))


def reseal_header(disk: BytesDisk, *, offset: int) -> None:
    """Make the CRC of a header right again after a test changed its fields."""
    header = bytearray(disk.content[offset : offset + 92])
    header[16:20] = bytes(4)
    struct.pack_into("<I", disk.content, offset + 16, zlib.crc32(header))


def reseal_gpt(disk: BytesDisk, *, offset: int = 512, sector_size: int = 512) -> None:
    """Make both CRCs right again after a test changed the entries."""
    entries_lba, count, size = struct.unpack_from("<QII", disk.content, offset + 72)
    array = disk.content[entries_lba * sector_size :][: count * size]
    struct.pack_into("<I", disk.content, offset + 88, zlib.crc32(array))
    reseal_header(disk, offset=offset)


def mbr_disk(*entries: bytes, size: int = 4 * MIB, signature: int = 0x90A1B2C3) -> BytesDisk:
    disk = blank(size)
    disk.content[:512] = boot_record(*entries, signature=signature)
    return disk


def logical_disk(*, sector_size: int = 512) -> BytesDisk:
    """1 MiB-2 MiB primary; 2 MiB-8 MiB extended with logical ones of 1 MiB at 3 MiB and 5 MiB."""
    mib = MIB // sector_size
    disk = mbr_disk(
        mbr_entry(status=0x80, start=mib, count=mib),
        mbr_entry(type=0x05, start=2 * mib, count=6 * mib),
        size=10 * MIB,
    )
    put_record(
        disk,
        2 * MIB,
        mbr_entry(type=0x82, start=mib, count=mib),
        mbr_entry(type=0x05, start=2 * mib, count=2 * mib),
    )
    put_record(disk, 4 * MIB, mbr_entry(start=mib, count=mib))
    return disk


def put_record(disk: BytesDisk, offset: int, *entries: bytes) -> None:
    disk.content[offset : offset + 512] = boot_record(*entries)


def fat_boot_sector() -> bytes:
    """Sector 0 of a FAT filesystem on a whole disk, as the FAT specification lays it out."""
    start = struct.pack(
        "<3s8sHBHBHHBHHHII",
        b"\xeb\x3c\x90",
        b"mkfs.fat",
        512,
        4,
        4,
        2,
        512,
        8192,
        0xF8,
        8,
        32,
        2,
        0,
        0,
    )
    return start.ljust(510, b"\0") + b"\x55\xaa"
