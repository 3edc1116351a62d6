"""btrfs images, and what btrfs-progs say of them."""

import random
import re
from pathlib import Path

from stillblock.extents import normalise
from stillblock.model import Extents
from stillblock.native import crc32c
from unit.selection.filesystems.mounting import MIB, mounted, run
from unit.selection.filesystems.trees import write

VARIANTS = {
    "as mkfs makes it": (),
    "one copy, small tree blocks": ("-m", "single", "-n", "4096"),
    "two copies of data": ("-d", "dup"),
    "data and metadata mixed": ("--mixed",),
    "old features": ("-O", "^no-holes,^skinny-metadata,^extref", "-R", "^free-space-tree"),
    "sha256": ("--checksum", "sha256"),
    "blake2": ("--checksum", "blake2"),
}


def make(image: Path, *options: str, size: int = 256 * MIB) -> Path:
    with image.open("wb") as file:
        file.truncate(size)
    run("mkfs.btrfs", "-q", "-f", "-L", "stills", *options, image)
    return image


def small_image(folder: Path) -> Path:
    """A small image that was unmounted, with a snapshot and a shared file."""
    image = make(folder / "image", "-m", "single", "-n", "4096", size=128 * MIB)
    with mounted(image) as top:
        for i in range(40):
            write(top / f"{'name' * 10}{i}", random.Random(i).randbytes(700 * i))
        run("btrfs", "subvolume", "create", top / "sub")
        write(top / "sub" / "file", random.Random(99).randbytes(50_000))
        run("btrfs", "subvolume", "snapshot", top / "sub", top / "snapshot")
        run("cp", "--reflink=always", top / "sub" / "file", top / "shared")
    return image


def dump(image: Path, tree: str) -> str:
    return run("btrfs", "inspect-internal", "dump-tree", "-t", tree, image)


def chunks_of(image: Path) -> list[tuple[int, int, list[int]]]:
    """(logical, length, where the copies lie)."""
    found: list[tuple[int, int, list[int]]] = []
    for line in dump(image, "chunk").splitlines():
        if key := re.search(r"key \(FIRST_CHUNK_TREE CHUNK_ITEM (\d+)\)", line):
            found.append((int(key[1]), 0, []))
        elif length := re.match(r"\s+length (\d+) owner", line):
            found[-1] = (found[-1][0], int(length[1]), found[-1][2])
        elif stripe := re.match(r"\s+stripe \d+ devid 1 offset (\d+)", line):
            found[-1][2].append(int(stripe[1]))
    return found


def physical(chunks: list[tuple[int, int, list[int]]], address: int) -> list[int]:
    for start, length, copies in chunks:
        if start <= address < start + length:
            return [copy + address - start for copy in copies]
    raise AssertionError(f"{address} is in no chunk")


def used_by_dump(image: Path) -> Extents:
    """What extent items hold, on the device, as btrfs-progs print them; and the superblocks."""
    chunks = chunks_of(image)
    (node_size,) = re.findall(r"^nodesize\s+(\d+)", superblock_of(image), re.MULTILINE)
    used = [(0, MIB), (64 * MIB, 64 * MIB + 65536)]
    for kind, address, size in re.findall(
        r"key \((?=\d+ (EXTENT_ITEM|METADATA_ITEM))(\d+) \w+ (\d+)\)", dump(image, "extent")
    ):
        length = int(size) if kind == "EXTENT_ITEM" else int(node_size)
        used += [(start, start + length) for start in physical(chunks, int(address))]
    return normalise(used)


def extents_of(image: Path, inode: int) -> Extents:
    """Where the extents of a file of subvolume 5 lie, whole, as btrfs-progs print them."""
    chunks = chunks_of(image)
    items = re.findall(
        rf"key \({inode} EXTENT_DATA \d+\).*\n.*\n\s+extent data disk byte (\d+) nr (\d+)",
        dump(image, "5"),
    )
    return normalise(
        (start, start + int(length))
        for address, length in items
        if int(address)
        for start in physical(chunks, int(address))
    )


def superblock_of(image: Path) -> str:
    return run("btrfs", "inspect-internal", "dump-super", image)


def with_checksum(block: bytes) -> bytes:
    """A superblock or tree block with the right CRC-32C."""
    return crc32c(block[32:]).to_bytes(4, "little") + block[4:]


def change_superblock(image: Path, *, at: int, by: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(65536)
        block = bytearray(file.read(4096))
        block[at : at + len(by)] = by
        file.seek(65536)
        file.write(with_checksum(bytes(block)))
