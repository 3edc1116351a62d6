"""FAT12, FAT16 and FAT32 against what mtools, fsck.fat and partclone say of the same images."""

import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from stillblock.extents import intersect, normalise, total_bytes
from stillblock.selection.filesystems import (
    Filesystem,
    UnresolvedError,
    open_filesystem,
    walk,
)
from unit.selection.filesystems.damage_cases import Damageable, check_damages
from unit.selection.filesystems.fuse import free_by_partclone, left_out_with, patched, without
from unit.selection.filesystems.mounting import MIB, FileDisk, contents, run
from unit.selection.filesystems.reader_contract import (
    assert_all_else_is_whole,
    assert_all_files_are_read,
    assert_files_read_the_same_in_pieces,
    assert_free_is_nobodys,
    assert_identity_is_what_blkid_prints,
    blkid,
)
from unit.selection.filesystems.reading import content_by_runs, data_extents, files_of

pytestmark = pytest.mark.needs("mkfs.fat", "mcopy", "mdel", "fsck.fat")

NAMES = (
    "SHORT.TXT",
    "lower.txt",
    "A long name, with a comma.text",
    "snow ☃ man",
    "x" * 200,
    "noext",
)
KINDS = {"fat12": ("12", 2), "fat16": ("16", 4), "fat32": ("32", 36)}


def make(image: Path, kind: str, *options: str) -> Path:
    bits, mebibytes = KINDS[kind]
    with image.open("wb") as file:
        file.truncate(mebibytes * MIB)
    run("mkfs.fat", "-F", bits, "-n", "STILLS", "-i", "1234abcd", "-s", "1", *options, image)
    return image


def mtool(command: str, image: Path, *words: str | Path) -> str:
    return run(command, "-i", image, *words, env={**os.environ, "MTOOLS_SKIP_CHECK": "1"})


def fill(image: Path, source: Path) -> None:
    """A tree; then files removed and written so that others lie in many pieces."""
    tree = source / "tree"
    (tree / "many").mkdir(parents=True)
    for number in range(60):
        (tree / "many" / f"file {number:03}").write_bytes(os.urandom(number * 173))
    for name in NAMES:
        (tree / name).write_bytes(os.urandom(3000))
    (tree / "empty").touch()
    (tree / "one sector").write_bytes(os.urandom(512))
    deep = tree.joinpath(*(f"level {depth}" for depth in range(12)))
    deep.mkdir(parents=True)
    (deep / "bottom").write_bytes(os.urandom(6000))
    mtool("mcopy", image, "-s", tree, "::/tree")
    for number in range(1, 60, 2):
        mtool("mdel", image, f"::/tree/many/file {number:03}")
    (source / "in gaps").write_bytes(os.urandom(200_000))
    # A small volume is filled beyond the gaps first: FAT's tools go round.
    mtool("mcopy", image, source / "in gaps", "::/in gaps")


@pytest.fixture(scope="module", params=KINDS)
def image(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp(request.param)
    image = make(top / "tree.img", request.param)
    (top / "source").mkdir()
    fill(image, top / "source")
    return image


@pytest.fixture(scope="module")
def truth(image: Path) -> dict[str, str]:
    """What mtools reads back."""
    out = image.with_name("out")
    out.mkdir()
    mtool("mcopy", image, "-s", "-n", "::/tree", "::/in gaps", out)
    return contents(out)


@pytest.fixture
def disk(image: Path) -> FileDisk:
    return FileDisk(image)


@pytest.fixture
def filesystem(disk: FileDisk) -> Filesystem:
    return open_filesystem(disk)


@pytest.mark.needs("blkid")
def test_identity_is_what_blkid_prints(image: Path, filesystem: Filesystem):
    kind = blkid(image)["VERSION"].lower()
    assert_identity_is_what_blkid_prints(filesystem, image, kind=kind, size=image.stat().st_size)


def test_every_file_reads_the_same_by_its_runs(
    truth: dict[str, str], disk: FileDisk, filesystem: Filesystem
):
    assert_all_files_are_read(disk, filesystem, truth)


def test_every_file_reads_the_same_in_odd_pieces(truth: dict[str, str], filesystem: Filesystem):
    assert_files_read_the_same_in_pieces(filesystem, truth, piece_bytes=7001)


def test_the_tree_is_sound_to_begin_with(image: Path):
    run("fsck.fat", "-n", image)


@pytest.mark.needs("partclone.fat")
def test_free_is_what_partclone_says(image: Path, filesystem: Filesystem):
    if filesystem.identity.kind == "fat12":
        return  # partclone reads FAT12 wrongly: mdir judges below
    assert filesystem.free() == free_by_partclone(image, kind="fat")


@pytest.mark.needs("mdir")
def test_as_much_is_free_as_mdir_says(image: Path, filesystem: Filesystem):
    (line,) = (line for line in mtool("mdir", image, "::/").splitlines() if "bytes free" in line)
    told = int("".join(character for character in line if character.isdigit()))
    assert total_bytes(filesystem.free()) == told


def test_free_is_nobodys(filesystem: Filesystem):
    assert_free_is_nobodys(filesystem, more_than_bytes=256 * 1024)


def test_all_before_the_clusters_and_all_directories_are_kept(image: Path, filesystem: Filesystem):
    fixed = filesystem.fixed()
    content = image.read_bytes()
    assert fixed[0][0] == 0
    for entry in (b"FILE00~1   ", b"BOTTOM     "):
        place = content.index(entry)
        assert intersect(((place, place + 32),), fixed) == ((place, place + 32),)


def test_all_else_is_whole_without_free_space_and_some_files(
    image: Path, truth: dict[str, str], filesystem: Filesystem, tmp_path: Path
):
    out = set(list(truth)[::2])
    copy = without(image, left_out_with(filesystem, out), name="without.img")
    run("fsck.fat", "-n", copy)
    mtool("mcopy", copy, "-s", "-n", "::/tree", "::/in gaps", tmp_path)
    found = contents(tmp_path)
    assert_all_else_is_whole(found, truth, out)


# Chains made by hand ----------------------------------------------------------------------------


END, BAD, FREE = 0x0FFFFFFF, 0x0FFFFFF7, 0
"""Values in the table; those of FAT12 and FAT16 are their lower bits."""


def link(
    image: Path, kind: str, links: Mapping[int, int], *, copies: Sequence[int] = (0, 1)
) -> None:
    """Write entries of the table: which cluster follows which."""
    content = bytearray(image.read_bytes())
    reserved = struct.unpack_from("<H", content, 14)[0] * 512
    sectors = struct.unpack_from("<H", content, 22)[0] or struct.unpack_from("<I", content, 36)[0]
    for copy in copies:
        table = reserved + copy * sectors * 512
        for cluster, following in links.items():
            match kind:
                case "fat12":
                    at = table + cluster * 3 // 2
                    value = struct.unpack_from("<H", content, at)[0]
                    if cluster % 2:
                        value = value & 0x000F | (following & 0xFFF) << 4
                    else:
                        value = value & 0xF000 | following & 0xFFF
                    struct.pack_into("<H", content, at, value)
                case "fat16":
                    struct.pack_into("<H", content, table + 2 * cluster, following & 0xFFFF)
                case _:
                    # The upper four bits are reserved: what they say must not matter.
                    struct.pack_into("<I", content, table + 4 * cluster, following | 0xA0000000)
    image.write_bytes(content)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def first(kind: str) -> int:
    """The first cluster of FIRST: FAT32 has its root directory in cluster 2."""
    return 3 if kind == "fat32" else 2


@pytest.fixture
def small(kind: str, tmp_path: Path) -> Path:
    """FIRST and SECOND, each of four clusters of 512 bytes, one behind the other."""
    image = make(tmp_path / "small.img", kind)
    for name in ("FIRST", "SECOND"):
        (tmp_path / name).write_bytes(os.urandom(2048 - 100))
        mtool("mcopy", image, tmp_path / name, f"::/{name}")
    return image


@pytest.mark.parametrize(
    ("steps", "run_count"),
    [((0, 1, 2, 3), 1), ((0, 3, 2, 1), 4), ((0, 2, 1, 3), 4), ((0, 1, 3, 2), 3)],
)
def test_chains_that_step_back_are_followed(
    small: Path, kind: str, first: int, steps: tuple[int, ...], run_count: int
):
    clusters = [first + step for step in steps]
    link(small, kind, dict(zip(clusters, [*clusters[1:], END], strict=True)))
    mtool("mcopy", small, "-n", "::/FIRST", small.with_name("out"))
    disk = FileDisk(small)
    filesystem = open_filesystem(disk)
    node = files_of(filesystem)["/FIRST"]
    assert content_by_runs(disk, filesystem, node) == small.with_name("out").read_bytes()
    assert len(filesystem.runs(node)) == run_count


@pytest.mark.parametrize(
    ("links", "reason"),
    [
        ({3: 1}, "loop"),
        ({1: 5}, "where another file lies"),
        ({2: END}, "longer than its chain"),
        ({1: BAD}, "leads to"),
        ({1: FREE}, "leads to 0x0"),
    ],
)
def test_a_chain_that_is_wrong_leaves_nothing_out(
    small: Path, kind: str, first: int, links: dict[int, int], reason: str
):
    values = (END, BAD, FREE)
    link(
        small,
        kind,
        {first + step: to if to in values else first + to for step, to in links.items()},
    )
    assert_unresolved(small, reason)


def assert_unresolved(image: Path, match: str) -> None:
    filesystem = open_filesystem(FileDisk(image))
    node = files_of(filesystem)["/SECOND"]
    for ask in (filesystem.free, filesystem.fixed, lambda: filesystem.runs(node)):
        with pytest.raises(UnresolvedError, match=match):
            ask()


def test_a_file_keeps_clusters_past_its_size(small: Path, kind: str, first: int):
    link(small, kind, {first + 3: first + 9, first + 9: END})
    filesystem = open_filesystem(FileDisk(small))
    node = files_of(filesystem)["/FIRST"]
    assert total_bytes(data_extents(filesystem, node)) == 5 * 512
    assert len(filesystem.read(node, offset=0, length=4096)) == 2048 - 100


def test_a_lost_chain_is_not_free(small: Path, kind: str, first: int):
    before = open_filesystem(FileDisk(small)).free()
    link(small, kind, {first + 20: first + 21, first + 21: END, first + 30: BAD})
    after = open_filesystem(FileDisk(small)).free()
    assert total_bytes(before) - total_bytes(after) == 3 * 512


@pytest.mark.parametrize("copy", [0, 1])
def test_only_what_both_copies_have_free_is_free(small: Path, kind: str, first: int, copy: int):
    before = open_filesystem(FileDisk(small)).free()
    link(small, kind, {first + 20: END}, copies=(copy,))
    after = open_filesystem(FileDisk(small)).free()
    assert total_bytes(before) - total_bytes(after) == 512


@pytest.mark.parametrize("copy", [0, 1])
def test_a_chain_in_which_the_copies_differ_leaves_nothing_out(
    small: Path, kind: str, first: int, copy: int
):
    link(small, kind, {first + 1: first + 9, first + 9: END}, copies=(copy,))
    assert_unresolved(small, "copies of the FAT differ")


# Names ------------------------------------------------------------------------------------------


def test_a_long_name_of_another_file_is_not_taken(small: Path, tmp_path: Path):
    (tmp_path / "content").write_bytes(b"content")
    mtool("mcopy", small, tmp_path / "content", "::/a long name.text")
    content = small.read_bytes()
    place = content.index(b"ALONGN~1TEX")
    # As a system that knows short names only renames it.
    renamed = patched(small, {place: b"OTHERNAMETX"}, name="renamed.img")
    assert "/OTHERNAM.ETX" in files_of(open_filesystem(FileDisk(renamed)))
    paths = [path for path, _ in walk(open_filesystem(FileDisk(small)))]
    assert "/a long name.text" in paths
    assert not [path for path in paths if "~1" in path]


def test_small_letters_of_a_short_name_are_those_that_mtools_shows(small: Path, tmp_path: Path):
    (tmp_path / "content").write_bytes(b"content")
    for name in ("one.txt", "TWO.txt", "three.TXT", "FOUR.TXT", "Five.txt"):
        mtool("mcopy", small, tmp_path / "content", f"::/{name}")
    told = set(mtool("mdir", small, "-b", "::/").split())
    found = {f"::{path}" for path in files_of(open_filesystem(FileDisk(small)))}
    assert found == told


# Damage -----------------------------------------------------------------------------------------


def damageable(folder: Path, kind: str) -> Damageable:
    """A small volume with long and short names in two directories."""
    image = make(folder / "tree.img", kind)
    tree = folder / "tree"
    (tree / "inner").mkdir(parents=True)
    for number in range(12):
        (tree / f"long name {number}").write_bytes(os.urandom(number * 300))
        (tree / "inner" / f"N{number}").write_bytes(os.urandom(number * 200))
    mtool("mcopy", image, "-s", tree, "::/tree")
    filesystem = open_filesystem(FileDisk(image))
    (table, *_), directories = filesystem.fixed(), filesystem.fixed()
    boot = (0, 512)
    used = [
        (start, min(end, start + 200 * 2)) for start, end in ((512, table[1]), *directories[1:])
    ]
    return Damageable(
        content=image.read_bytes(),
        places=normalise([boot, *used]),
        # A name that changed is another name: without a checksum nobody can tell.
        is_invisible=lambda path, sound: path not in sound.data,
    )


@pytest.mark.slow
def test_no_damage_to_the_structures_makes_a_file_anothers(kind: str, tmp_path: Path):
    seen = check_damages(damageable(tmp_path, kind), seed=20261123, count=400)
    assert seen > 40
