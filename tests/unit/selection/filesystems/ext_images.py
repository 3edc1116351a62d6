"""ext2/3/4 images and what e2fsprogs, which is independent of us, says about them."""

import os
import random
import re
from pathlib import Path

from stillblock.extents import normalise
from stillblock.model import Extents
from unit.selection.filesystems.mounting import MIB, mounted, run
from unit.selection.filesystems.trees import write

VARIANTS = {
    "ext2": ("-t", "ext2", "-b", "1024"),
    "ext2, 4 KiB": ("-t", "ext2", "-b", "4096"),
    "ext3": ("-t", "ext3", "-b", "1024"),
    "ext4, 1 KiB": ("-t", "ext4", "-b", "1024"),
    "ext4, 2 KiB": ("-t", "ext4", "-b", "2048"),
    "ext4, 4 KiB": ("-t", "ext4", "-b", "4096"),
    "small inodes": ("-t", "ext4", "-I", "128"),
    "32 bits": ("-t", "ext4", "-O", "^64bit"),
    "uninit_bg": ("-t", "ext4", "-b", "1024", "-O", "^metadata_csum,uninit_bg"),
    "no checksums": ("-t", "ext4", "-b", "1024", "-O", "^metadata_csum,^uninit_bg"),
    "bigalloc": ("-t", "ext4", "-b", "4096", "-O", "bigalloc", "-C", "65536"),
    "bigalloc, 1 KiB": ("-t", "ext4", "-b", "1024", "-O", "bigalloc,^resize_inode"),
    "inline_data": ("-t", "ext4", "-O", "inline_data"),
    "meta_bg": ("-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode"),
    "no flex_bg": ("-t", "ext4", "-b", "1024", "-O", "^flex_bg"),
    "no journal": ("-t", "ext4", "-O", "^has_journal"),
    "sparse_super2": ("-t", "ext4", "-b", "1024", "-O", "sparse_super2"),
    "every group a backup": ("-t", "ext4", "-b", "1024", "-O", "^sparse_super,^resize_inode"),
    "orphan_file": ("-t", "ext4", "-O", "orphan_file"),
    "small groups": ("-t", "ext4", "-b", "1024", "-g", "1024", "-G", "4"),
}


def make(image: Path, *options: str, size: int) -> Path:
    with image.open("wb") as file:
        file.truncate(size)
    run(
        "mkfs.ext4",
        "-q",
        "-F",
        "-E",
        "hash_seed=1b4e28ba-2fa1-11d2-883f-0016d3cca427",
        *options,
        image,
    )
    return image


def dumped(image: Path) -> str:
    return run("dumpe2fs", image)


def field(dump: str, name: str) -> str:
    found = re.search(rf"^{re.escape(name)}:\s*(.*)$", dump, re.MULTILINE)
    assert found, f"dumpe2fs says nothing about {name}"
    return found[1]


def free_in(dump: str) -> Extents:
    """What dumpe2fs lists as free, in bytes; with clusters it names the first block of each."""
    size = int(field(dump, "Block size"))
    unit = int(field(dump, "Cluster size")) if "\nCluster size:" in dump else size
    found = []
    for blocks in re.findall(r"^  Free blocks: ([-\d, ]+)$", dump, re.MULTILINE):
        for words in blocks.replace(" ", "").split(","):
            first, _, last = words.partition("-")
            found.append((int(first) * size, int(last or first) * size + unit))
    return normalise(found)


def tables_in(dump: str) -> Extents:
    """Superblocks, group descriptors, bitmaps and inode tables as dumpe2fs lists them, in bytes."""
    size = int(field(dump, "Block size"))
    pattern = (
        r"(?:superblock at|Group descriptors? at|Reserved GDT blocks at|bitmap at|Inode table at) "
        r"(\d+)(?:-(\d+))?"
    )
    return normalise(
        (int(first) * size, (int(last or first) + 1) * size)
        for first, last in re.findall(pattern, dump)
    )


def blocks_by_debugfs(image: Path, name: str) -> list[int]:
    """The blocks of a file, and those that lead to them, as debugfs lists them."""
    return [int(word) for word in run("debugfs", "-R", f"blocks {name}", image).split()]


MAGIC = bytes.fromhex("c03b3998")
"""What each block of a journal begins with that is not a copy."""
SMALL = {
    "ext2": (("-t", "ext2", "-b", "1024"), False),
    "ext3, in use": (("-t", "ext3", "-b", "1024", "-J", "size=1"), True),
    "ext4": (("-t", "ext4", "-b", "1024", "-O", "^has_journal,inline_data"), False),
    "ext4, in use": (("-t", "ext4", "-b", "1024", "-J", "size=1"), True),
    "uninit_bg": (
        ("-t", "ext4", "-b", "1024", "-O", "^metadata_csum,uninit_bg,^has_journal"),
        False,
    ),
}


def small_image(folder: Path, name: str) -> bytes:
    """A filesystem of 4 MiB with a little of everything, as it is in use or after."""
    options, is_in_use = SMALL[name]
    image = make(folder / "small", *options, "-N", "256", size=4 * MIB)
    with mounted(image) as top:
        dice = random.Random(3)
        for folder_name in ("one", "two", "two/three"):
            (top / folder_name).mkdir()
        for index in range(40):
            where = top / ("one", "two", "two/three")[index % 3]
            write(where / f"file {index}", dice.randbytes(dice.choice((0, 40, 900, 3000, 20_000))))
        write(top / "sparse", b"x" * 3000, at=400_000)
        write(top / "large", dice.randbytes(500_000))
        (top / "one" / "link").symlink_to("../" * 30 + "two")
        os.setxattr(top / "large", "user.attribute", dice.randbytes(300))
        os.sync()
        for index in range(10):
            with (top / f"late {index}").open("wb") as file:
                file.write(dice.randbytes(4000))
                os.fsync(file.fileno())
        if is_in_use:
            return image.read_bytes()
    return image.read_bytes()


def invisible(content: bytes) -> Extents:
    """Where damage to a journal makes another that is sound, as if less had been committed.

    That is the last transaction, which may as well not have got its commit, and without checksums
    the number of the first. The kernel's replay ends there too: what is read is what it would make
    of the disk.
    """
    headers = [
        (int.from_bytes(content[at + 8 : at + 12], "big"), at)
        for at in range(0, len(content), 1024)
        if content[at : at + 4] == MAGIC
    ]
    last = max((number for number, _ in headers), default=0)
    found = []
    for number, at in headers:
        if content[at + 7] in (3, 4):
            found.append((at + 0x18, at + 0x1C))
        elif number == last:
            found.append((at, at + 1024))
    return normalise(found)
