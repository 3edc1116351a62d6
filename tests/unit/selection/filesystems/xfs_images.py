"""XFS images, and what xfs_db says of them."""

import os
import random
import re
from pathlib import Path

from stillblock.extents import normalise
from stillblock.model import Extents
from stillblock.native import crc32c
from unit.selection.filesystems.churn import Churn
from unit.selection.filesystems.mounting import MIB, copy_sparse, mounted, run
from unit.selection.filesystems.trees import write

VARIANTS = {
    "as mkfs makes it": (),
    "1 KiB blocks, reverse map": ("-b", "size=1024", "-m", "rmapbt=1"),
    "2 KiB blocks, large counts": ("-b", "size=2048", "-i", "nrext64=1"),
    "large inodes and directory blocks": ("-i", "size=1024", "-n", "size=8192"),
    "old features": ("-m", "bigtime=0,reflink=0,finobt=0,inobtcount=0", "-i", "sparse=0"),
    "4 KiB sectors, many groups": ("-s", "size=4096", "-d", "agcount=12"),
}
_TESTING = {"TEST_DIR": "1", "TEST_DEV": "1", "QA_CHECK_FS": "1"}
"""With these, which the filesystem's own tests set, mkfs makes one of less than 300 MiB."""


def make(image: Path, *options: str, size: int = 300 * MIB) -> Path:
    with image.open("wb") as file:
        file.truncate(size)
    command = ("mkfs.xfs", "-q", "-f", "-L", "stills", *options, image)
    run(*command, env=os.environ | _TESTING)
    return image


def small_image(folder: Path, *, is_settled: bool) -> Path:
    """A small image that was unmounted, or one whose log holds changes."""
    image = make(folder / "mounted", "-d", "agcount=1", "-l", "size=12m", size=64 * MIB)
    with mounted(image) as top:
        for i in range(40):
            write(top / f"{'name' * 10}{i}", random.Random(i).randbytes(700 * i))
        for name in ("folder", "other"):
            (top / name).mkdir()
            write(top / name / "file", b"content" * 1000)
        crumble(top / "crumbs", pieces=300)
        if not is_settled:
            os.sync()
            Churn(top, seed=3).run(60)
            run("sync", "--file-system", top)
            return copy_sparse(image, folder / "unsettled")
    return image


def crumble(path: Path, *, pieces: int) -> None:
    """A file with so many extents that their map is a tree."""
    block = 4096
    with path.open("wb") as file:
        for piece in range(pieces):
            file.seek(2 * piece * block)
            file.write(piece.to_bytes(4, "big") * (block // 4))


def xfs_db(image: Path, *commands: str) -> str:
    options = [word for command in commands for word in ("-c", command)]
    return run("xfs_db", "-r", *options, image)


def field(text: str, name: str) -> int:
    found = re.search(rf"^{re.escape(name)} = (\d+)", text, re.MULTILINE)
    assert found is not None, f"xfs_db did not print {name}: {text}"
    return int(found[1])


def free_by_xfs_db(image: Path) -> tuple[Extents, Extents]:
    """(free space by block number, blocks in the groups' free lists), as xfs_db walks them."""
    superblock = xfs_db(image, "sb 0", "print blocksize agblocks agcount")
    size = field(superblock, "blocksize")
    stride = field(superblock, "agblocks") * size
    everything = [
        (int(ag) * stride + int(block) * size, int(ag) * stride + (int(block) + int(count)) * size)
        for ag, block, count in re.findall(
            r"^ +(\d+) +(\d+) +(\d+)$", xfs_db(image, "freesp -d"), re.MULTILINE
        )
    ]
    listed = []
    for ag in range(field(superblock, "agcount")):
        header = xfs_db(image, f"agf {ag}", "print flfirst fllast flcount")
        first, last, count = (field(header, name) for name in ("flfirst", "fllast", "flcount"))
        entries = re.findall(r"(\d+):(\d+|null)", xfs_db(image, f"agfl {ag}", "print bno"))
        indexes = [(first + i) % len(entries) for i in range(count)]
        assert (first + count - 1) % len(entries) == last, "the list is a ring"
        listed += [
            (ag * stride + int(block) * size, ag * stride + (int(block) + 1) * size)
            for block in (entries[i][1] for i in indexes)
        ]
    return normalise(everything), normalise(listed)


def with_checksum(data: bytes, at: int) -> bytes:
    """A structure with the right CRC-32C at `at`."""
    crc = crc32c(data[at + 4 :], crc32c(bytes(4), crc32c(data[:at])))
    return data[:at] + crc.to_bytes(4, "little") + data[at + 4 :]


def change(image: Path, *, start: int, length: int, checksum: int, at: int, by: bytes) -> None:
    """Write bytes at `at` of the structure that lies at `start`, and make its checksum right."""
    with image.open("r+b") as file:
        file.seek(start)
        data = file.read(length)
        data = with_checksum(data[:at] + by + data[at + len(by) :], checksum)
        file.seek(start)
        file.write(data)
