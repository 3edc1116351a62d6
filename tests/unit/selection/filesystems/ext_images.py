"""ext2/3/4 images and what e2fsprogs, which is independent of us, says about them."""

import re
from pathlib import Path

from stillblock.extents import normalise
from stillblock.model import Extents
from unit.selection.filesystems.mounting import run

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
