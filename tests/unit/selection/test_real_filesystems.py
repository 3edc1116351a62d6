"""Terms on filesystems that other programs made, through real workers.

What is left out is judged by its bytes: each file is full of a marker of its own.
"""

import os
import subprocess
from pathlib import Path

import pytest

from stillblock.selection import Resolution, Rules, resolve, resolve_frozen
from unit.selection.filesystems.mounting import mounted
from unit.selection.filesystems.xfs_images import make as make_xfs
from unit.selection.partition_images import MIB, BytesDisk, GptPart, gpt_disk

SIZE = 64 * MIB
MARKERS = {
    "/var/cache/big": b"CACHE",
    "/var/cache/apt/list": b"APTLS",
    "/home/user/notes": b"NOTES",
    "/home/user/a.tmp": b"TEMPA",
    "/home/user/b.tmp": b"TEMPB",
}
PAGE = 4096
SECTOR = 512


def page_of(marker: bytes) -> bytes:
    """A page whose sectors are all alike, for filesystems align files to less than pages."""
    return marker.ljust(8, b".") * (PAGE // 8)


def fill(root: Path) -> None:
    for path, marker in MARKERS.items():
        file = root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(page_of(marker) * (300 if "big" in path else 20))
    swap = root / "swapfile"
    swap.write_bytes(page_of(b"SWAPD") * 200)
    subprocess.run(["mkswap", "-q", swap], check=True, capture_output=True)
    swap.chmod(0o600)


def ext4(path: Path, root: Path) -> None:
    os.link(root / "home/user/b.tmp", root / "home/user/b")
    subprocess.run(["mkfs.ext4", "-q", "-d", root, path, f"{SIZE >> 10}k"], check=True)


def fat(path: Path, root: Path) -> None:
    subprocess.run(["mkfs.vfat", "-C", path, str(SIZE >> 10)], check=True, capture_output=True)
    for entry in root.iterdir():
        subprocess.run(["mcopy", "-s", "-i", path, entry, "::/"], check=True)


def xfs(path: Path, root: Path) -> None:
    make_xfs(path, size=SIZE)
    with mounted(path) as top:
        subprocess.run(["cp", "-a", f"{root}/.", top], check=True)


def btrfs(path: Path, root: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    subprocess.run(["mkfs.btrfs", "-q", "--mixed", "--rootdir", root, path], check=True)


MAKERS = {
    "ext4": (ext4, "mkfs.ext4"),
    "fat": (fat, "mkfs.vfat", "mcopy"),
    "xfs": (xfs, "mkfs.xfs"),
    "btrfs": (btrfs, "mkfs.btrfs"),
}


@pytest.fixture(params=MAKERS)
def disk(request: pytest.FixtureRequest, tmp_path: Path, require_tool) -> BytesDisk:
    """The filesystem on partition 2 of three; 3 is swap."""
    make, *tools = MAKERS[request.param]
    for tool in (*tools, "mkswap"):
        require_tool(tool)
    fill(tmp_path / "root")
    image = tmp_path / "filesystem"
    make(image, tmp_path / "root")
    area = tmp_path / "area"
    area.write_bytes(page_of(b"AREAS") * 256)
    subprocess.run(["mkswap", "-q", area], check=True, capture_output=True)
    sectors = SIZE // 512
    found = gpt_disk(
        {
            1: GptPart(2048, 4095),
            2: GptPart(4096, 4095 + sectors),
            3: GptPart(4096 + sectors, 4096 + sectors + 2047),
        },
        size=SIZE + 4 * MIB,
    )
    found.content[2 * MIB : 2 * MIB + SIZE] = image.read_bytes()
    found.content[2 * MIB + SIZE : 3 * MIB + SIZE] = area.read_bytes()
    return found


def resolved(disk: BytesDisk, *pairs: tuple[str, str]) -> Resolution:
    instant = resolve(Rules.parse(pairs), disk, block_size=SECTOR)
    assert instant.pending is not None
    return resolve_frozen(instant.pending, disk)


def is_ext(disk: BytesDisk) -> bool:
    return disk.content[2 * MIB + 1080 : 2 * MIB + 1082] == b"\x53\xef"


def is_btrfs(disk: BytesDisk) -> bool:
    return disk.content[2 * MIB + 65600 : 2 * MIB + 65608] == b"_BHRfS_M"


def pages_of(disk: BytesDisk, resolution: Resolution, marker: bytes) -> tuple[int, int]:
    """How much of a marker is selected and how much is left out, in pages."""
    sector = page_of(marker)[:SECTOR]

    def count(start: int, end: int) -> int:
        return sum(disk.content[at : at + SECTOR] == sector for at in range(start, end, SECTOR))

    selected = sum(count(*extent) for extent in resolution.extents)
    excluded = sum(count(part.start, part.end) for part in resolution.excluded)
    assert selected * SECTOR % PAGE == excluded * SECTOR % PAGE == 0
    return selected * SECTOR // PAGE, excluded * SECTOR // PAGE


def test_files_are_left_out_by_their_bytes_and_nothing_else_is(disk: BytesDisk) -> None:
    final = resolved(
        disk,
        ("exclude", "path:/var/cache/**"),
        ("include", "path:2:/var/cache/apt"),
        ("exclude", "path:/**/*.tmp"),
    )
    assert final.unresolved == ()
    assert pages_of(disk, final, b"CACHE") == (0, 300)
    assert pages_of(disk, final, b"APTLS") == (20, 0)
    assert pages_of(disk, final, b"NOTES") == (20, 0)
    assert pages_of(disk, final, b"TEMPA") == (0, 20)
    # On ext4 it has a second name, which no term means.
    is_linked = is_ext(disk)
    assert pages_of(disk, final, b"TEMPB") == ((20, 0) if is_linked else (0, 20))
    assert sum(part.end - part.start for part in final.excluded) == PAGE * (
        320 if is_linked else 340
    )


def test_swap_and_free_space_go_and_every_file_stays(disk: BytesDisk) -> None:
    final = resolved(disk, ("exclude", "swap"), ("exclude", "free"))
    assert final.unresolved == ()
    for marker in MARKERS.values():
        assert pages_of(disk, final, marker)[1] == 0
    assert pages_of(disk, final, b"SWAPD") == (0, 199)
    assert pages_of(disk, final, b"AREAS") == (15, 240)
    assert final.terms[0].file_count == 1
    assert final.terms[1].contributed_bytes > SIZE // 2


def test_one_file_alone_comes_with_what_makes_it_readable(disk: BytesDisk, tmp_path: Path) -> None:
    """Everything else is zeroed, as readers of the snapshot see it; others' tools then read it."""
    final = resolved(disk, ("include", "path:/home/user/notes"))
    assert pages_of(disk, final, b"NOTES") == (20, 0)
    assert pages_of(disk, final, b"CACHE") == (0, 300)
    for part in final.excluded:
        disk.content[part.start : part.end] = bytes(part.end - part.start)
    image = tmp_path / "restored"
    image.write_bytes(disk.content[2 * MIB : 2 * MIB + SIZE])
    out = tmp_path / "notes"
    if image.read_bytes().startswith(b"XFSB") or is_btrfs(disk):
        with mounted(image) as top:
            assert (top / "home/user/notes").read_bytes() == page_of(b"NOTES") * 20
        return
    if is_ext(disk):
        subprocess.run(["e2fsck", "-fn", image], check=True, capture_output=True)
        command = ["debugfs", "-R", f"dump /home/user/notes {out}", str(image)]
    else:
        subprocess.run(["fsck.fat", "-n", image], check=True, capture_output=True)
        command = ["mcopy", "-i", str(image), "::/home/user/notes", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    assert out.read_bytes() == page_of(b"NOTES") * 20
