"""Disks with real filesystems, made by the filesystems' own tools and without root."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Final

from serving import BLOCK, MIB, Served, run

PARTITION_AT: Final = MIB
MARKER: Final = b"this must be nowhere in a store. " * 124
"""4092 bytes that no other test writes; files of it are what rules leave out."""
SECRET: Final = MARKER[:1024]


def make_tree(root: Path, *, seed: int = 1, count: int = 40) -> dict[str, bytes]:
    """Fill a directory; return the content of every file by its path."""
    dice = random.Random(seed)
    files = {f"/home/h{i}": dice.randbytes(dice.randint(1, 60_000)) for i in range(count)}
    files |= {f"/var/cache/c{i}": secret(dice, blocks=dice.randint(1, 12)) for i in range(count)}
    files["/var/cache/apt/list"] = dice.randbytes(9000)
    files["/home/notes.tmp"] = secret(dice, blocks=5)
    files["/home/empty"] = b""
    for path, content in files.items():
        place = root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return files


def secret(dice: random.Random, *, blocks: int) -> bytes:
    """Return blocks that all hold the marker, and no two of which are the same."""
    return b"".join((MARKER + dice.randbytes(4))[:4096] for _ in range(blocks))


def ext4_disk(folder: Path, *, size: int = 24 * MIB) -> tuple[Path, dict[str, bytes]]:
    """Return a disk of one ext4 partition with 4 KiB blocks, and its files."""
    tree = folder / "tree"
    files = make_tree(tree)
    filesystem = folder / "filesystem"
    with filesystem.open("wb") as file:
        os.truncate(file.fileno(), size - 2 * MIB)
    run("mkfs.ext4", "-q", "-b", "4096", "-L", "root", "-d", str(tree), str(filesystem))
    disk = folder / "disk.img"
    partitioned(disk, filesystem.read_bytes(), size=size)
    return disk, files


def partitioned(disk: Path, filesystem: bytes, *, size: int) -> None:
    """Write a disk with an MBR and one partition, from 1 MiB to 1 MiB before the end."""
    content = bytearray(size)
    content[PARTITION_AT : PARTITION_AT + len(filesystem)] = filesystem
    content[446:462] = bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (
        (PARTITION_AT // 512).to_bytes(4, "little") + (len(filesystem) // 512).to_bytes(4, "little")
    )
    content[440:444] = b"\x21\x43\x65\x87"
    content[510:512] = b"\x55\xaa"
    disk.write_bytes(content)


def secret_blocks(content: bytes) -> list[int]:
    """Return where on a disk the blocks begin that hold the secret."""
    return [at for at in range(0, len(content), BLOCK) if content.startswith(SECRET, at)]


def overwrite_everything(served: Served) -> None:
    with served.client() as client:
        for at in range(0, client.size_bytes, MIB):
            client.pwrite(b"\xee" * MIB, offset=at)
        client.flush()


def read_file(disk: Path, path: str) -> bytes:
    """Return a file of the partition, by the filesystem's own debugger."""
    out = disk.with_name("debugfs.out")
    run("debugfs", "-R", f"dump {path} {out}", f"{disk}?offset={PARTITION_AT}")
    return out.read_bytes()
