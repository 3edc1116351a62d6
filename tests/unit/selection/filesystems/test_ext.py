"""ext2, ext3, ext4: every file is found where it lies, and only what is free is called free."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stillblock.extents import intersect, normalise, subtract
from stillblock.selection.filesystems import (
    FileKind,
    UnresolvedError,
    open_filesystem,
    read_runs,
    walk,
)
from unit.selection.filesystems.ext_images import (
    VARIANTS,
    blocks_by_debugfs,
    dumped,
    field,
    free_in,
    make,
    tables_in,
)
from unit.selection.filesystems.mounting import (
    MIB,
    FileDisk,
    blocks_of,
    copy_frozen,
    copy_sparse,
    digest,
    mounted,
    run,
)
from unit.selection.filesystems.reader_contract import assert_odd_things_are_what_they_are
from unit.selection.filesystems.reading import files_of
from unit.selection.filesystems.trees import Grown, grow_tree, grown_in, write

pytestmark = [pytest.mark.needs("mkfs.ext4", "dumpe2fs", "debugfs", "e2fsck"), pytest.mark.slow]


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Callable[..., Grown]:
    """`grown(*options)`: made once for all tests, which leave it as it is."""
    folder = tmp_path_factory.mktemp("grown")

    @functools.cache
    def grow(*options: str) -> Grown:
        image = make(folder / "-".join(options).replace("/", ""), *options, size=96 * MIB)
        return grown_in(image, fill=grow_tree)

    return grow


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_file_is_found_where_the_kernel_put_it(grown, options):
    image, files, maps = grown(*options)
    disk = FileDisk(image)
    filesystem = open_filesystem(disk)
    size = filesystem.identity.block_size
    found = files_of(filesystem)

    assert found.keys() == files.keys()
    inline = 0
    for path, node in found.items():
        known = files[path]
        runs = filesystem.runs(node)
        assert blocks_of(runs, block_size=size) == blocks_of(maps[path], block_size=size), path
        content = filesystem.read(node, offset=0, length=node.size)
        assert digest(content) == known.digest, path
        raw = read_runs(disk, runs, size=node.size, offset=0, length=node.size)
        inline += raw != content
        assert raw == content or not runs, path
        assert (node.size, node.links, node.mode) == (known.size, known.links, known.mode), path
        assert (node.uid, node.number) == (known.uid, known.number), path
        # 128-byte inodes have whole seconds.
        assert node.modified_ns in (known.modified_ns, known.modified_ns // 10**9 * 10**9), path
    assert bool(inline) == ("inline_data" in options)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_free_map_is_that_of_dumpe2fs(grown, options):
    image, _, _ = grown(*options)
    filesystem = open_filesystem(FileDisk(image))
    dump = dumped(image)

    free, fixed = filesystem.free(), filesystem.fixed()
    assert free == free_in(dump)
    assert not subtract(tables_in(dump), fixed), "tables that are not fixed"
    assert not intersect(free, fixed)
    for path, node in walk(filesystem):
        if node.kind is FileKind.REGULAR:
            taken = normalise((run.start, run.start + run.length) for run in filesystem.runs(node))
            assert not intersect(taken, free), path
            assert not intersect(taken, fixed), path


def test_an_identity_is_that_of_blkid(tmp_path):
    for kind in ("ext2", "ext3", "ext4"):
        image = make(tmp_path / kind, "-t", kind, "-L", "A label", size=16 * MIB)
        identity = open_filesystem(FileDisk(image)).identity
        said = run("blkid", "-p", "-o", "export", image)
        assert f"TYPE={identity.kind}\n" in said
        assert f"UUID={identity.uuid}\n" in said
        assert (identity.label, identity.is_case_sensitive) == ("A label", True)
        assert identity.size == 16 * MIB


def test_links_lead_where_they_say_and_other_things_are_no_files(grown):
    image, _, _ = grown("-t", "ext4", "-O", "inline_data")
    assert_odd_things_are_what_they_are(open_filesystem(FileDisk(image)))


def test_a_large_indexed_directory_is_read_whole(tmp_path):
    image = make(tmp_path / "image", "-b", "1024", "-N", "20000", size=64 * MIB)
    with mounted(image) as top:
        for index in range(6000):
            (top / f"{'x' * 60}{index}").touch()
    names = {name for name, _ in walk(open_filesystem(FileDisk(image)))}
    assert len([name for name in names if name.startswith("/x")]) == 6000


def test_the_journal_and_the_files_without_names_are_fixed(tmp_path):
    """Their blocks are in no file of the tree; a rule must not reach them."""
    image = make(tmp_path / "image", "-O", "quota,orphan_file", "-b", "1024", size=64 * MIB)
    fixed = open_filesystem(FileDisk(image)).fixed()
    dump = dumped(image)
    orphans = field(dump, "Orphan file inode")
    for number in ("7", "8", field(dump, "User quota inode"), orphans):
        blocks = blocks_by_debugfs(image, f"<{number}>")
        assert blocks
        taken = normalise((block * 1024, (block + 1) * 1024) for block in blocks)
        assert not subtract(taken, fixed), number


def test_names_match_in_any_case_where_the_filesystem_says_so(tmp_path):
    image = make(tmp_path / "image", "-O", "casefold", size=16 * MIB)
    assert not open_filesystem(FileDisk(image)).identity.is_case_sensitive


# What is refused -----------------------------------------------------------------------------


def refusal(image: Path) -> str:
    with pytest.raises(UnresolvedError) as caught:
        filesystem = open_filesystem(FileDisk(image))
        for _, node in walk(filesystem):
            if node.kind is FileKind.REGULAR:
                filesystem.runs(node)
        filesystem.fixed()
        filesystem.free()
    return str(caught.value)


def patch(image: Path, offset: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)


PLAIN = ("-b", "1024", "-O", "^metadata_csum,^uninit_bg,^has_journal")


@pytest.mark.parametrize(
    ("offset", "data", "words"),
    [
        (0x60, (0x2 | 0x40 | 0x1).to_bytes(4, "little"), "compression"),
        (0x60, (0x2 | 0x40 | 0x80000000).to_bytes(4, "little"), "incompat 0x80000000"),
        (0x64, (0x1 | 0x4000).to_bytes(4, "little"), "shared_blocks"),
        (0x64, (0x80000000).to_bytes(4, "little"), "ro_compat 0x80000000"),
        (0x3A, (0).to_bytes(2, "little"), "not unmounted"),
        (0x3A, (3).to_bytes(2, "little"), "e2fsck"),
        (0x48, (1).to_bytes(4, "little"), "operating system 1"),
        (0x18, (9).to_bytes(4, "little"), "block size"),
        (0x20, (1 << 20).to_bytes(4, "little"), "contradict"),
        (0x28, (12345).to_bytes(4, "little"), "contradict"),
        (0x58, (130).to_bytes(2, "little"), "contradict"),
        (0x4C, (7).to_bytes(4, "little"), "revision 7"),
    ],
)
def test_a_superblock_that_is_not_understood_is_refused(tmp_path, offset, data, words):
    image = make(tmp_path / "image", *PLAIN, size=8 * MIB)
    patch(image, 1024 + offset, data)
    assert words in refusal(image)


def test_an_image_smaller_than_the_filesystem_is_refused(tmp_path):
    image = make(tmp_path / "image", size=16 * MIB)
    os.truncate(image, 16 * MIB - 4096)
    assert "has 16773120" in refusal(image)


def test_a_wrong_checksum_is_refused(tmp_path):
    """One bit in each kind of metadata; nothing else would tell that these are damaged."""
    image = make(tmp_path / "image", "-b", "1024", size=16 * MIB)
    with mounted(image) as top:
        write(top / "file", b"x" * 5000)
        (top / "directory").mkdir()
    dump = dumped(image)
    disk = FileDisk(image)
    nodes = dict(walk(open_filesystem(disk)))
    bitmap = int(dump.split("Block bitmap at ")[1].split()[0]) * 1024
    table = int(dump.split("Inode table at ")[1].split("-")[0]) * 1024
    inode = table + (nodes["/file"].number - 1) * int(field(dump, "Inode size"))
    blocks = blocks_by_debugfs(image, "/directory")
    for place, words in (
        (1024 + 0x30, "superblock's checksum"),
        (2048 + 12, "descriptor is wrong"),
        (bitmap + 1000, "block bitmap is wrong"),
        (inode + 0x10, f"inode {nodes['/file'].number} is wrong"),
        (blocks[0] * 1024 + 600, "one of its blocks is wrong"),
    ):
        damaged = copy_sparse(image, tmp_path / "damaged")
        patch(damaged, place, bytes([disk.pread(offset=place, length=1)[0] ^ 1]))
        assert words in refusal(damaged)


@pytest.mark.parametrize(
    ("flag", "words"),
    [(0x800, "encrypted"), (0x4, "compressed"), (0x100000, "sealed")],
)
def test_a_file_whose_data_is_not_plain_has_no_known_runs(tmp_path, flag, words):
    image = make(tmp_path / "image", *PLAIN, size=8 * MIB)
    with mounted(image) as top:
        write(top / "file", b"x" * 5000)
        write(top / "other", b"y" * 5000)
    run("debugfs", "-w", "-R", f"set_inode_field /file flags {0x80000 | flag:#x}", image)
    filesystem = open_filesystem(FileDisk(image))
    nodes = dict(walk(filesystem))
    with pytest.raises(UnresolvedError, match=words):
        filesystem.runs(nodes["/file"])
    assert filesystem.runs(nodes["/other"])


@pytest.mark.parametrize(
    ("field_of_inode", "to", "words"),
    [
        ("block[0]", "other", "two owners"),
        ("block[IND]", "other", "two owners"),
        ("block[0]", "directory", "two owners"),
        ("block[0]", "table", "tables"),
        ("block[0]", "free", "maps call free"),
        ("block[0]", "beyond", "none of its own"),
        ("blocks", "few", "more blocks than it has"),
    ],
)
def test_without_checksums_a_pointer_that_leads_astray_is_noticed(
    tmp_path, field_of_inode, to, words
):
    """The block's true owner tells: it may be a directory, which claims nothing otherwise."""
    image = make(tmp_path / "image", "-t", "ext2", "-b", "1024", size=8 * MIB)
    with mounted(image) as top:
        write(top / "file", b"x" * 30_000)
        write(top / "other", bytes(5000))
        (top / "directory").mkdir()
    free = free_in(dumped(image))
    value = {
        "other": blocks_by_debugfs(image, "/other")[1],
        "directory": blocks_by_debugfs(image, "/directory")[0],
        "table": int(dumped(image).split("Inode table at ")[1].split("-")[0]),
        "free": free[-1][0] // 1024,
        "beyond": 8 * 1024,
        "few": 4,
    }[to]
    assert open_filesystem(FileDisk(image)).free() == free
    run("debugfs", "-w", "-R", f"set_inode_field /file {field_of_inode} {value}", image)
    filesystem = open_filesystem(FileDisk(image))
    with pytest.raises(UnresolvedError, match=words):
        filesystem.free()
    nodes = dict(walk(filesystem))
    with pytest.raises(UnresolvedError, match=words):
        filesystem.runs(nodes["/other"])


def test_names_without_their_key_are_letters(tmp_path):
    """As ciphertext they may hold slashes, which would make them names of something else."""
    image = make(tmp_path / "image", *PLAIN, size=8 * MIB)
    with mounted(image) as top:
        (top / "secret").mkdir()
        write(top / "secret" / "AAAA", b"x")
    block = blocks_by_debugfs(image, "/secret")[0]
    patch(image, block * 1024 + 24 + 8, b"a/..")
    assert "holds the name" in refusal(image)
    run("debugfs", "-w", "-R", "set_inode_field /secret flags 0x80800", image)
    assert "/secret/YS8uLg" in dict(walk(open_filesystem(FileDisk(image))))


def test_a_mounted_filesystem_without_a_journal_is_refused(tmp_path):
    image = make(tmp_path / "image", "-t", "ext2", size=16 * MIB)
    with mounted(image) as top:
        write(top / "file", b"x" * 5000)
        run("sync", "-f", top)
        assert "not unmounted" in refusal(image)
    assert "/file" in dict(walk(open_filesystem(FileDisk(image))))


def test_a_frozen_filesystem_says_what_is_free_without_a_caveat(tmp_path):
    image = make(tmp_path / "image", size=64 * MIB)
    with mounted(image) as top:
        write(top / "file", os.urandom(3 * MIB))
        frozen = copy_frozen(image, top, tmp_path / "frozen")
    filesystem = open_filesystem(FileDisk(frozen))
    assert filesystem.caveats == ()
    assert filesystem.free() == free_in(dumped(frozen))
    assert sum(end - start for start, end in filesystem.free()) > 40 * MIB
