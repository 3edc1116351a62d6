"""The demo's disk: a sparse raw image with a GPT, a swap partition and ext4 with real files.

Everything is made without root. The partition table and the swap area are written here, byte by
byte; the filesystem is made by mkfs.ext4 in its place inside the image.
"""

import os
import random
import shutil
import struct
import subprocess
import sysconfig
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SECTOR_BYTES: Final = 512
PAGE_BYTES: Final = 4096
MIB: Final = 1 << 20

SWAP_TYPE: Final = uuid.UUID("0657fd6d-a4ab-43c4-84e5-0933c84b4f4f")
LINUX_TYPE: Final = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")

ENTRY_COUNT: Final = 128
ENTRY_BYTES: Final = 128
TABLE_SECTORS: Final = ENTRY_COUNT * ENTRY_BYTES // SECTOR_BYTES
HEADER_BYTES: Final = 92

# What of Python's library goes into the filesystem: plenty of files, made by people, a few MiB.
LIBRARY_LEAVES_OUT: Final = {"__pycache__", "site-packages", "dist-packages", "test", "tests"}
LIBRARY_BYTES_MAX: Final = 24 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One entry of the table; `start` and `end` in bytes, half-open."""

    name: str
    kind: uuid.UUID
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """How long it is."""
        return self.end - self.start


class ToolMissing(Exception):  # noqa: N818 - a state of the machine, not a fault
    """A command that the demo cannot do without."""


def e2fsprogs(command: str) -> str:
    """Return the path of one of e2fsprogs' commands, also where only root looks for commands."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = shutil.which(command, path=path)
    if found is None:
        raise ToolMissing(
            f"{command} is missing, the demo makes a real filesystem with it: "
            "apt-get install e2fsprogs"
        )
    return found


def layout(*, size_bytes: int) -> tuple[Partition, Partition]:
    """Return swap (an eighth of the disk) and a filesystem, aligned to MiB as installers do."""
    swap_end = MIB + size_bytes // 8 // MIB * MIB
    return (
        Partition(name="swap", kind=SWAP_TYPE, start=MIB, end=swap_end),
        Partition(name="files", kind=LINUX_TYPE, start=swap_end, end=size_bytes - MIB),
    )


def gpt(
    partitions: Sequence[Partition], *, size_bytes: int, seed: int
) -> tuple[tuple[int, bytes], ...]:
    """Return the pieces of a partition table as (offset, bytes): protective MBR, both copies.

    UEFI specification, chapter 5: 128 entries of 128 bytes, little-endian, CRC-32 of the entries
    and of the header with its own field zero.
    """
    last_lba = size_bytes // SECTOR_BYTES - 1
    identifiers = random.Random(seed)
    entries = b"".join(_gpt_entry(partition, identifiers) for partition in partitions)
    entries = entries.ljust(ENTRY_COUNT * ENTRY_BYTES, b"\0")
    disk_id = uuid.UUID(int=identifiers.getrandbits(128), version=4)

    def header(*, own_lba: int, other_lba: int, entries_lba: int) -> bytes:
        fields = struct.Struct("<8sIIIIQQQQ16sQIII")
        values = [
            b"EFI PART", 0x10000, HEADER_BYTES, 0, 0, own_lba, other_lba,
            2 + TABLE_SECTORS, last_lba - TABLE_SECTORS - 1, disk_id.bytes_le,
            entries_lba, ENTRY_COUNT, ENTRY_BYTES, zlib.crc32(entries),
        ]  # fmt: skip
        values[3] = zlib.crc32(fields.pack(*values))
        return fields.pack(*values).ljust(SECTOR_BYTES, b"\0")

    first = header(own_lba=1, other_lba=last_lba, entries_lba=2)
    second_entries_lba = last_lba - TABLE_SECTORS
    second = header(own_lba=last_lba, other_lba=1, entries_lba=second_entries_lba)
    return (
        (0, _protective_mbr(last_lba) + first + entries),
        (second_entries_lba * SECTOR_BYTES, entries + second),
    )


def _gpt_entry(partition: Partition, identifiers: random.Random) -> bytes:
    return struct.pack(
        "<16s16sQQQ72s",
        partition.kind.bytes_le,
        uuid.UUID(int=identifiers.getrandbits(128), version=4).bytes_le,
        partition.start // SECTOR_BYTES,
        partition.end // SECTOR_BYTES - 1,  # the last one, inclusive
        0,
        partition.name.encode("utf-16-le"),
    )


def _protective_mbr(last_lba: int) -> bytes:
    entry = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff" * 3, 1, min(last_lba, 0xFFFFFFFF))
    return (b"\0" * 446 + entry).ljust(510, b"\0") + b"\x55\xaa"


def swap_header(*, size_bytes: int, seed: int) -> bytes:
    """Return the first page of a swap area, as mkswap writes it: version 1, no bad pages."""
    page = bytearray(PAGE_BYTES)
    identifier = random.Random(seed).randbytes(16)
    struct.pack_into("<III", page, 1024, 1, size_bytes // PAGE_BYTES - 1, 0)
    page[1036:1052] = identifier
    page[1052:1068] = b"swap".ljust(16, b"\0")
    page[-10:] = b"SWAPSPACE2"
    return bytes(page)


def swap_pages(*, page_count: int, seed: int) -> bytes:
    """Return what programs left in swap: bytes that nobody will ever want back."""
    return random.Random(seed).randbytes(page_count * PAGE_BYTES)


def gather_library(into: Path) -> int:
    """Copy the sources of Python's standard library, up to a limit; return the number of files."""
    library = Path(sysconfig.get_path("stdlib"))
    file_count = total_bytes = 0
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(set(folders) - LIBRARY_LEAVES_OUT)
        target = into / Path(folder).relative_to(library)
        for name in sorted(names):
            source = Path(folder, name)
            if not name.endswith(".py") or not source.is_file():
                continue
            total_bytes += source.stat().st_size
            if total_bytes > LIBRARY_BYTES_MAX:
                return file_count
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / name)
            file_count += 1
    return file_count


def mkfs_command(*, image: str, partition: Partition, files: str) -> list[str]:
    """Return the command that makes the filesystem in its place and fills it."""
    return [
        "mkfs.ext4", "-q", "-F", "-L", partition.name, "-b", str(PAGE_BYTES), "-d", files,
        "-E", f"offset={partition.start}", image, f"{partition.size_bytes // 1024}k",
    ]  # fmt: skip


def make_disk(
    image: Path, *, size_bytes: int, files: Path, seed: int
) -> tuple[Partition, Partition]:
    """Write the whole disk; return its swap and its filesystem partition."""
    swap, filesystem = layout(size_bytes=size_bytes)
    with image.open("wb") as disk:
        disk.truncate(size_bytes)
        for offset, data in gpt((swap, filesystem), size_bytes=size_bytes, seed=seed):
            disk.seek(offset)
            disk.write(data)
        disk.seek(swap.start)
        disk.write(swap_header(size_bytes=swap.size_bytes, seed=seed))
        disk.write(swap_pages(page_count=swap.size_bytes // PAGE_BYTES // 4, seed=seed))
    command = mkfs_command(image=str(image), partition=filesystem, files=str(files))
    command[0] = e2fsprogs(command[0])
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise RuntimeError(f"mkfs.ext4 failed: {made.stderr.strip()}")
    return swap, filesystem
