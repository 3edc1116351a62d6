"""exFAT against what exfat-fuse, fsck.exfat and partclone say of the same images."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stillblock.extents import intersect, normalise, subtract, total_bytes
from stillblock.selection.filesystems import (
    Filesystem,
    UnresolvedError,
    open_filesystem,
    walk,
)
from unit.selection.filesystems.damage_cases import Damageable, check_damages
from unit.selection.filesystems.fuse import (
    free_by_partclone,
    left_out_with,
    looped,
    mounted,
    patched,
    without,
)
from unit.selection.filesystems.mounting import MIB, FileDisk, contents, digest, run
from unit.selection.filesystems.reader_contract import (
    assert_all_else_is_whole,
    assert_all_files_are_read,
    assert_files_read_the_same_in_pieces,
    assert_free_is_nobodys,
    assert_identity_is_what_blkid_prints,
    assert_unresolved_or_held,
)
from unit.selection.filesystems.reading import content_by_runs, files_of

pytestmark = [
    pytest.mark.needs("mkfs.exfat", "mount.exfat-fuse", "fsck.exfat", "losetup"),
    pytest.mark.slow,
]

SIZE = 32 * MIB
ODD_NAMES = ("snow ☃", "😀", "x" * 255, "semi;colon", "15 characters..", "UPPER lower")


def make(image: Path, *options: str, size: int = SIZE) -> Path:
    with image.open("wb") as file:
        file.truncate(size)
    run("mkfs.exfat", "-L", "Stills", *options, image)
    return image


@contextmanager
def mount(image: Path) -> Iterator[Path]:
    with (
        looped(image) as device,
        mounted(
            device,
            driver="mount.exfat-fuse",
            options="rw",
            point=image.with_suffix(".mount"),
        ) as top,
    ):
        yield top


def fill(top: Path) -> None:
    tree = top / "tree"
    (tree / "many").mkdir(parents=True)
    for number in range(200):
        (tree / "many" / f"file {number:03}").write_bytes(os.urandom(number * 53))
    (tree / "empty").touch()
    (tree / "one cluster").write_bytes(os.urandom(4096))
    for name in ODD_NAMES:
        (tree / name).write_bytes(os.urandom(5000))
    (tree / "large").write_bytes(os.urandom(3 * MIB + 17))
    deep = tree.joinpath(*(f"level {depth}" for depth in range(20)))
    deep.mkdir(parents=True)
    (deep / "bottom").write_bytes(os.urandom(6000))
    with (tree / "grown").open("wb") as file:
        file.write(os.urandom(10_000))
        file.truncate(100_000)
    opened = [(tree / f"in turns {number}").open("wb", buffering=0) for number in range(4)]
    for _ in range(50):
        for file in opened:
            file.write(os.urandom(4096))
            os.fsync(file.fileno())
    for file in opened:
        file.close()
    for number in range(1, 200, 2):
        (tree / "many" / f"file {number:03}").unlink()
    (tree / "in gaps").write_bytes(os.urandom(MIB))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("exfat") / "tree.img")


@pytest.fixture(scope="module")
def truth(image: Path) -> dict[str, str]:
    with mount(image) as top:
        fill(top)
    with mount(image) as top:
        return contents(top)


@pytest.fixture
def disk(image: Path, truth: dict[str, str]) -> FileDisk:
    return FileDisk(image)


@pytest.fixture
def filesystem(disk: FileDisk) -> Filesystem:
    return open_filesystem(disk)


@pytest.mark.needs("blkid")
def test_identity_is_what_blkid_prints(image: Path, filesystem: Filesystem):
    assert_identity_is_what_blkid_prints(filesystem, image, kind="exfat", size=SIZE)


def test_every_file_reads_the_same_by_its_runs(
    truth: dict[str, str], disk: FileDisk, filesystem: Filesystem
):
    assert_all_files_are_read(disk, filesystem, truth)


def test_every_file_reads_the_same_in_odd_pieces(truth: dict[str, str], filesystem: Filesystem):
    assert_files_read_the_same_in_pieces(filesystem, truth, piece_bytes=300_007)


def test_both_kinds_of_allocation_are_there(filesystem: Filesystem):
    found = files_of(filesystem)
    assert len(filesystem.runs(found["/tree/in turns 1"])) > 10
    assert len(filesystem.runs(found["/tree/many/file 100"])) == 1


def test_the_tree_is_sound_to_begin_with(image: Path, truth: dict[str, str]):
    run("fsck.exfat", "-n", image)


@pytest.mark.needs("partclone.exfat")
def test_free_is_what_partclone_says(image: Path, filesystem: Filesystem):
    free = filesystem.free()
    theirs = free_by_partclone(image, kind="exfat")
    assert subtract(free, theirs) == ()
    # It takes the sectors past the last cluster for free too.
    assert total_bytes(subtract(theirs, free)) < 4096


def test_free_is_nobodys(filesystem: Filesystem):
    assert_free_is_nobodys(filesystem, more_than_bytes=8 * MIB)


def test_directories_and_all_before_the_clusters_are_kept(image: Path, filesystem: Filesystem):
    fixed = filesystem.fixed()
    assert fixed[0][0] == 0
    place = image.read_bytes().index("bottom".encode("utf-16-le"))
    assert intersect(((place, place + 12),), fixed)


def test_all_else_is_whole_without_free_space_and_some_files(
    image: Path, truth: dict[str, str], filesystem: Filesystem
):
    out = set(list(truth)[::2])
    copy = without(image, left_out_with(filesystem, out), name="without.img")
    run("fsck.exfat", "-n", copy)
    with mount(copy) as top:
        found = contents(top)
    assert_all_else_is_whole(found, truth, out)


def test_files_just_fsynced_on_a_mounted_volume_are_held(tmp_path: Path):
    image = make(tmp_path / "live.img")
    copy = tmp_path / "copy.img"
    with mount(image) as top:
        (top / "before").write_bytes(os.urandom(2 * MIB))
        (top / "before").unlink()
        descriptors, truth = [], {}
        for number in range(60):
            path = top / f"{number:02}"
            descriptors.append(os.open(path, os.O_CREAT | os.O_RDWR))
            data = os.urandom(20_000 + 3000 * number)
            os.write(descriptors[-1], data)
            os.fsync(descriptors[-1])
            truth[f"/{number:02}"] = digest(data)
        copy.write_bytes(image.read_bytes())
        for descriptor in descriptors:
            os.close(descriptor)
    assert_unresolved_or_held(copy, truth, mount)


# Made by hand -----------------------------------------------------------------------------------


def small_volume(folder: Path) -> Path:
    """Some files in a directory, one of which is not contiguous."""
    image = make(folder / "small.img", "-c", "512", "-b", "4096", size=2 * MIB)
    with mount(image) as top:
        (top / "directory").mkdir()
        for number in range(16):
            (top / "directory" / f"file {number}").write_bytes(os.urandom(number * 300))
        with (top / "one").open("wb") as one, (top / "other").open("wb") as other:
            for _ in range(10):
                for file in (one, other):
                    file.write(os.urandom(512))
                    file.flush()
                    os.fsync(file.fileno())
    return image


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_volume(tmp_path_factory.mktemp("exfat"))


def stream_entry(image: Path, path: str) -> int:
    """Where the stream entry of a file is: before its name's."""
    content = image.read_bytes()
    name = Path(path).name.encode("utf-16-le")
    place = content.index(b"\xc1\x00" + name) - 32
    assert content[place] == 0xC0
    return place


def resealed(image: Path, place: int, change: dict[int, bytes], name: str) -> Path:
    """Change a stream entry, and make the checksum of its set right again."""
    content = image.read_bytes()
    entries = bytearray(content[place - 32 : place - 32 + 32 * (1 + content[place - 31])])
    for offset, data in change.items():
        entries[32 + offset : 32 + offset + len(data)] = data
    checksum = 0
    for index, byte in enumerate(entries):
        if index not in (2, 3):
            checksum = ((checksum << 15 | checksum >> 1) + byte) & 0xFFFF
    entries[2:4] = checksum.to_bytes(2, "little")
    return patched(image, {place - 32: bytes(entries)}, name=name)


def test_what_was_never_written_reads_as_zeros(small: Path):
    place = stream_entry(small, "file 15")
    copy = resealed(small, place, {8: struct.pack("<Q", 1000)}, "valid.img")
    disk = FileDisk(copy)
    filesystem = open_filesystem(disk)
    node = files_of(filesystem)["/directory/file 15"]
    assert node.size == 4500
    content = content_by_runs(disk, filesystem, node)
    with mount(small) as top:
        assert content[:1000] == (top / "directory" / "file 15").read_bytes()[:1000]
    assert content[1000:] == bytes(3500)
    assert filesystem.read(node, offset=0, length=5000) == content


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({20: struct.pack("<I", 2)}, "where another file lies|unknown|damaged"),
        ({20: struct.pack("<I", 0xFFFFFF)}, "outside|leads to"),
        ({24: struct.pack("<Q", MIB), 8: struct.pack("<Q", MIB)}, "another|free|clusters for"),
        ({8: struct.pack("<Q", 4501)}, "damaged stream"),
        ({1: b"\x01"}, "leads to"),
    ],
)
def test_a_file_that_lies_where_it_cannot_leaves_nothing_out(
    small: Path, change: dict[int, bytes], reason: str
):
    place = stream_entry(small, "file 15")
    assert_unresolved(resealed(small, place, change, "wrong.img"), reason)


def test_a_wrong_checksum_leaves_nothing_out(small: Path):
    place = stream_entry(small, "file 15")
    assert_unresolved(patched(small, {place + 8: b"\x07"}, name="wrong.img"), "wrong checksum")


def test_a_file_in_free_space_leaves_nothing_out(small: Path):
    content = small.read_bytes()
    (heap,) = struct.unpack_from("<I", content, 88)
    bitmap = heap * 512
    assert content[bitmap] == 0xFF, "the bitmap is the first thing in the clusters"
    assert_unresolved(patched(small, {bitmap + 5: b"\0"}, name="wrong.img"), "gives space as free")


def assert_unresolved(image: Path, match: str) -> None:
    filesystem = open_filesystem(FileDisk(image))
    for ask in (filesystem.free, filesystem.fixed):
        with pytest.raises(UnresolvedError, match=match):
            ask()


def test_a_boot_region_with_a_wrong_checksum_is_refused(small: Path):
    with pytest.raises(UnresolvedError, match="checksum of its boot region"):
        open_filesystem(FileDisk(patched(small, {600: b"\x01"}, name="boot.img")))


def test_two_tables_are_refused(small: Path):
    content = bytearray(small.read_bytes())
    content[110] = 2
    checksum = 0
    for index in range(11 * 512):
        if index not in (106, 107, 112):
            checksum = ((checksum << 31 | checksum >> 1) + content[index]) & 0xFFFFFFFF
    sums = checksum.to_bytes(4, "little") * 128
    copy = patched(small, {110: b"\x02", 11 * 512: sums}, name="texfat.img")
    with pytest.raises(UnresolvedError, match="TexFAT"):
        open_filesystem(FileDisk(copy))


def damageable(image: Path) -> Damageable:
    """Where the structures of a small volume lie."""
    filesystem = open_filesystem(FileDisk(image))
    assert len(list(walk(filesystem))) > 16
    (head, *directories) = filesystem.fixed()
    content = image.read_bytes()
    (table,) = struct.unpack_from("<I", content, 80)
    places = [(0, 512), (table * 512, table * 512 + 400)]
    places += [(start, end) for start, end in directories if end - start < 5000]
    places.append((head[1] - 512, head[1]))
    return Damageable(content=content, places=normalise(places))


def test_no_damage_to_the_structures_makes_a_file_anothers(small: Path):
    seen = check_damages(damageable(small), seed=20261123, count=800)
    assert seen > 30, "checksums catch most of it, and the rest is what this is about"
