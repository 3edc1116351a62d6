"""The journal of ext3 and ext4, applied in memory: as e2fsck and the kernel do it.

A copy of the backing file of a mounted filesystem is what its disk holds at that moment. Nothing is
synced or frozen before it is taken but the files themselves.
"""

import itertools
import os
import re
import shutil
from pathlib import Path

import pytest

from stillblock.extents import intersect, normalise, subtract, total_bytes
from stillblock.model import Extents
from stillblock.native import crc32c
from stillblock.selection.filesystems import (
    UnresolvedError,
    ext_journal,
    open_filesystem,
    walk,
)
from stillblock.selection.filesystems.ext_journal import apply_journal
from stillblock.selection.filesystems.ext_superblock import read_superblock
from unit.selection.filesystems.ext_images import (
    MAGIC,
    blocks_by_debugfs,
    dumped,
    field,
    free_in,
    make,
)
from unit.selection.filesystems.mounting import (
    MIB,
    FileDisk,
    blocks_of,
    copy_sparse,
    digest,
    fiemap,
    mounted,
    run,
    told,
)
from unit.selection.filesystems.reading import content_by_runs, files_of
from unit.selection.filesystems.trees import sync, write

pytestmark = [pytest.mark.needs("mkfs.ext4", "dumpe2fs", "debugfs", "e2fsck"), pytest.mark.slow]

LIVE = {
    "ext4": (("-b", "4096"), ""),
    "ext4, 1 KiB": (("-b", "1024"), ""),
    "no checksums": (("-b", "1024", "-O", "^metadata_csum,^uninit_bg,^64bit"), ""),
    "oldest checksums": (("-b", "1024", "-O", "^metadata_csum"), "journal_checksum"),
    "ext3": (("-t", "ext3", "-b", "1024"), ""),
    "data journalled": (("-b", "1024"), "data=journal"),
    "bigalloc": (("-O", "bigalloc"), ""),
}


def replayed(copy: Path) -> Path:
    """The copy after the filesystem's own replay, and no further repair."""
    result = copy_sparse(copy, copy.with_suffix(".replayed"))
    run("e2fsck", "-y", "-E", "journal_only", result)
    return result


def check_bytes(copy: Path, oracle: Path) -> int:
    """Check that all the disk reads as after replay, but for the journal and the superblock's
    counters; return how many blocks the journal changes."""
    disk = FileDisk(copy)
    superblock = read_superblock(disk)
    overlay = apply_journal(disk, superblock).disk
    expected = FileDisk(oracle)
    size = superblock.block_size
    skipped = set(blocks_by_debugfs(oracle, "<8>")) | {1024 // size}
    changed = 0
    for block in range(superblock.block_count):
        if block in skipped:
            continue
        data = overlay.pread(offset=block * size, length=size)
        assert data == expected.pread(offset=block * size, length=size), f"block {block}"
        changed += data != disk.pread(offset=block * size, length=size)
    return changed


def check_maps(copy: Path, oracle: Path) -> Extents:
    """Check free space and every file against the kernel's view of `oracle`; return their data."""
    disk = FileDisk(copy)
    filesystem = open_filesystem(disk)
    size = filesystem.identity.block_size
    free = filesystem.free()
    assert free == free_in(dumped(oracle))
    with mounted(oracle, options="ro") as top:
        files = told(top)
        maps = {path: fiemap(top / path[1:]) for path in files}
    found = files_of(filesystem)
    assert found.keys() == files.keys()
    taken = []
    for path, node in found.items():
        runs = filesystem.runs(node)
        assert blocks_of(runs, block_size=size) == blocks_of(maps[path], block_size=size), path
        content = filesystem.read(node, offset=0, length=node.size)
        assert digest(content) == files[path].digest, path
        assert content_by_runs(disk, filesystem, node) == content, path
        taken += [(run.start, run.start + run.length) for run in runs]
    assert not intersect(normalise(taken), free)
    return normalise(taken)


def fsynced(path: Path, data: bytes) -> None:
    write(path, data)
    sync(path)


@pytest.mark.parametrize(("options", "how"), LIVE.values(), ids=LIVE)
def test_files_just_fsynced_on_a_mounted_disk_are_in_use(tmp_path, options, how):
    """Without the journal the maps on the disk say that those blocks are free."""
    image = make(tmp_path / "image", *options, size=32 * MIB)
    with mounted(image, options=how) as top:
        for index in range(60):
            # Blocks that begin with the journal's magic number are escaped in it.
            fsynced(top / f"file {index}", MAGIC + os.urandom(20_000 + index * 1000))
        copy = copy_sparse(image, tmp_path / "copy")
    raw_free = free_in(dumped(copy))
    oracle = replayed(copy)
    assert check_bytes(copy, oracle) > 0
    taken = check_maps(copy, oracle)
    assert total_bytes(taken) > 60 * 20_000
    assert total_bytes(intersect(taken, raw_free)) > 60 * 20_000, "the raw maps were right already"
    assert "journal was applied in memory" in open_filesystem(FileDisk(copy)).caveats[0]


@pytest.mark.parametrize("options", [("-b", "1024"), ("-b", "1024", "-t", "ext3")], ids=str)
def test_a_log_that_goes_round_is_read_to_its_end(tmp_path, options):
    """The smallest journal there is, with files and directories that come and go: revocations."""
    image = make(tmp_path / "image", *options, "-J", "size=1", size=24 * MIB)
    starts = []
    with mounted(image) as top:
        for turn in range(4):
            for index in range(40):
                folder = top / f"folder {index}"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                for name in range(12):
                    write(folder / f"{'n' * 100}{name}", os.urandom(3000))
                fsynced(folder / "last", os.urandom(9000))
            copy = copy_sparse(image, tmp_path / f"copy{turn}")
            oracle = replayed(copy)
            check_bytes(copy, oracle)
            check_maps(copy, oracle)
            starts.append(int(field(dumped(copy), "Journal start")))
    assert any(later < earlier for earlier, later in itertools.pairwise(starts)), starts


def test_a_file_deleted_but_open_keeps_its_blocks(tmp_path):
    image = make(tmp_path / "image", size=64 * MIB)
    with mounted(image) as top, (top / "gone").open("w+b") as file:
        file.write(os.urandom(MIB))
        os.fsync(file.fileno())
        blocks = fiemap(top / "gone")
        (top / "gone").unlink()
        fsynced(top / "other", b"x" * 5000)
        copy = copy_sparse(image, tmp_path / "copy")
    filesystem = open_filesystem(FileDisk(copy))
    assert "/gone" not in dict(walk(filesystem))
    taken = normalise((run.start, run.start + run.length) for run in blocks)
    assert total_bytes(taken) == MIB
    assert not intersect(taken, filesystem.free())


# Journals made by hand --------------------------------------------------------------------------


def journalled(tmp_path: Path, *commands: str, version: int = 3, options=("-b", "1024")) -> Path:
    """An image with transactions of our own: `B` stands for a block that holds a file's data."""
    image = make(tmp_path / "image", *options, size=24 * MIB)
    with mounted(image) as top:
        write(top / "file", b"old!" * 256 * 8)
    block = blocks_by_debugfs(image, "/file")[0]
    for name, content in (("one", b"one."), ("two", b"two."), ("magic", MAGIC)):
        (tmp_path / name).write_bytes(content * 256 * 3)
    lines = [re.sub(r"\bB(\d?)\b", lambda m: str(block + int(m[1] or 0)), c) for c in commands]
    opening = f"journal_open {'-c' if version > 1 else ''} -v {version}"
    (tmp_path / "script").write_text("\n".join([opening, *lines, "journal_close\n"]))
    run("sh", "-c", f"cd '{tmp_path}' && debugfs -w -f script image")
    rewind(image, has_checksums=version > 1)
    return image


def journal_place(image: Path) -> int:
    """Where the journal's superblock lies, with blocks of 1 KiB."""
    return min(blocks_by_debugfs(image, "<8>")) * 1024


def rewind(image: Path, *, has_checksums: bool) -> None:
    """Let the journal start with its first transaction: debugfs leaves only the last to replay."""
    disk = FileDisk(image)
    place = journal_place(image)
    first = disk.pread(offset=place + 1024, length=12)
    assert first[:4] == MAGIC
    change_superblock(image, 0x18, first[8:] + (1).to_bytes(4, "big"), has_checksums=has_checksums)


def change_superblock(image: Path, at: int, new: bytes, *, has_checksums: bool = True) -> None:
    """Write to the journal's superblock as its owner would."""
    place = journal_place(image)
    with image.open("r+b") as file:
        file.seek(place)
        raw = bytearray(file.read(1024))
        raw[at : at + len(new)] = new
        if has_checksums:
            raw[0xFC:0x100] = bytes(4)
            raw[0xFC:0x100] = (~crc32c(bytes(raw)) & 0xFFFFFFFF).to_bytes(4, "big")
        file.seek(place)
        file.write(raw)


UNCHECKED = ("-b", "1024", "-O", "^metadata_csum,^64bit")
# How many blocks replay changes, and what is written.
CASES = {
    "one copy": (1, ["journal_write -b B one"]),
    "the last copy counts": (1, ["journal_write -b B one", "journal_write -b B two"]),
    "several": (3, ["journal_write -b B,B1,B2 one", "journal_write -b B1 two"]),
    "escaped": (2, ["journal_write -b B magic", "journal_write -b B1 one"]),
    "revoked": (1, ["journal_write -b B,B1 one", "journal_write -r B"]),
    "revoked, then logged anew": (
        1,
        ["journal_write -b B one", "journal_write -r B", "journal_write -b B two"],
    ),
    "revoked and logged in one": (2, ["journal_write -b B one", "journal_write -b B1,B2 -r B two"]),
}


@pytest.mark.parametrize(("expected", "commands"), CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("version", "options"),
    [(3, ("-b", "1024")), (2, ("-b", "1024")), (3, ("-b", "1024", "-O", "^64bit")), (1, UNCHECKED)],
    ids=["v3", "v2", "v3, 32 bits", "v1"],
)
def test_a_journal_made_by_hand_is_replayed_as_e2fsck_does(
    tmp_path, commands, expected, version, options
):
    image = journalled(tmp_path, *commands, version=version, options=options)
    changed = check_bytes(image, replayed(image))
    assert changed == expected


def test_revocations_count_before_the_journal_says_that_it_has_any(tmp_path):
    """JBD2 sets the flag in memory with the first of them; the disk hears of it some time later."""
    image = journalled(tmp_path, "journal_write -b B,B1 one", "journal_write -r B")
    place = journal_place(image)
    features = int.from_bytes(FileDisk(image).pread(offset=place + 0x28, length=4), "big")
    assert features & 1
    change_superblock(image, 0x28, (features & ~1).to_bytes(4, "big"))
    assert check_bytes(image, replayed(image)) == 1


# What is refused --------------------------------------------------------------------------------


def log_blocks(image: Path) -> list[tuple[int, int]]:
    """(kind, place) of each block of the log with a header, from its start."""
    disk = FileDisk(image)
    places = [block * 1024 for block in blocks_by_debugfs(image, "<8>")]
    found = []
    for place in sorted(places)[1:]:
        header = disk.pread(offset=place, length=8)
        if header[:4] == MAGIC:
            found.append((int.from_bytes(header[4:], "big"), place))
    return found


def refusal(image: Path) -> str:
    with pytest.raises(UnresolvedError) as caught:
        open_filesystem(FileDisk(image))
    return str(caught.value)


def flip(image: Path, place: int) -> None:
    with image.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x40]))


def test_damage_anywhere_in_the_log_is_refused(tmp_path):
    image = journalled(tmp_path, "journal_write -b B,B1 one", "journal_write -b B2 -r B two")
    blocks = dict(log_blocks(image))
    assert set(blocks) >= {1, 2, 5}
    descriptor, commit, revocation = blocks[1], blocks[2], blocks[5]
    superblock = journal_place(image)
    for place, words in (
        (descriptor + 14, "descriptor"),
        (descriptor + 1024 + 100, "copy"),
        (commit + 52, "commit"),
        (revocation + 17, "revocation"),
        (superblock + 0x30, "journal's superblock"),
    ):
        damaged = copy_sparse(image, tmp_path / "damaged")
        flip(damaged, place)
        said = refusal(damaged)
        assert words in said, said


def test_a_transaction_without_its_commit_is_not_replayed(tmp_path):
    image = journalled(tmp_path, "journal_write -b B one", "journal_write -b B1 two")
    last = [place for kind, place in log_blocks(image) if kind == 2][1]
    with image.open("r+b") as file:
        file.seek(last)
        file.write(bytes(1024))
    assert check_bytes(image, replayed(image)) == 1


def test_a_journal_that_stopped_with_an_error_is_refused(tmp_path):
    image = journalled(tmp_path, "journal_write -b B one", options=UNCHECKED, version=1)
    superblock = journal_place(image)
    flip(image, superblock + 0x23)
    assert "stopped by an error" in refusal(image)


def test_a_journal_on_another_device_is_refused_if_it_has_to_be_replayed(tmp_path):
    image = journalled(tmp_path, "journal_write -b B one", options=UNCHECKED, version=1)
    with image.open("r+b") as file:
        file.seek(1024 + 0xE0)
        file.write(bytes(4))
    assert "another device" in refusal(image)


def test_a_journal_that_is_not_empty_although_nothing_needs_it_is_refused(tmp_path):
    image = journalled(tmp_path, "journal_write -b B one", options=UNCHECKED, version=1)
    with image.open("r+b") as file:
        file.seek(1024 + 0x60)
        features = file.read(1)[0]
        assert features & 0x4
        file.seek(1024 + 0x60)
        file.write(bytes([features & ~0x4]))
    assert "superblock says" in refusal(image)


def test_a_journal_to_replay_that_is_not_said_to_exist_is_refused(tmp_path):
    """Found by mutation: the bit for the journal was gone, and the maps were taken as they lay."""
    image = journalled(tmp_path, "journal_write -b B one", options=UNCHECKED, version=1)
    with image.open("r+b") as file:
        file.seek(1024 + 0x5C)
        features = file.read(1)[0]
        assert features & 0x4
        file.seek(1024 + 0x5C)
        file.write(bytes([features & ~0x4]))
    assert "says that it has none" in refusal(image)


def test_a_journal_beyond_what_memory_is_for_is_refused(tmp_path, monkeypatch):
    image = journalled(tmp_path, "journal_write -b B,B1,B2 one")
    monkeypatch.setattr(ext_journal, "_BLOCK_COUNT_MAX", 2)
    assert "more than 2 blocks" in refusal(image)


def test_fast_commits_are_refused(tmp_path):
    """They are another language in the same journal, for small changes such as these."""
    image = make(tmp_path / "image", "-O", "fast_commit", "-J", "size=8", size=96 * MIB)
    with mounted(image) as top:
        fsynced(top / "file", b"x" * 5000)
        run("sync", "-f", top)
        for index in range(5):
            fsynced(top / f"file {index}", b"y" * 5000)
        copy = copy_sparse(image, tmp_path / "copy")
    assert "fast commits" in refusal(copy)


def test_nothing_is_read_from_the_journal_of_a_frozen_filesystem(tmp_path):
    image = make(tmp_path / "image", size=64 * MIB)
    with mounted(image) as top:
        for index in range(20):
            write(top / f"file {index}", os.urandom(50_000))
        run("fsfreeze", "--freeze", top)
        try:
            copy = copy_sparse(image, tmp_path / "copy")
        finally:
            run("fsfreeze", "--unfreeze", top)
    oracle = copy_sparse(copy, tmp_path / "oracle")
    check_maps(copy, oracle)
    filesystem = open_filesystem(FileDisk(copy))
    assert filesystem.caveats == ()
    assert not subtract(filesystem.free(), free_in(dumped(copy)))
