"""NTFS against what ntfs-3g and partclone say of the same images."""

import os
import struct
from pathlib import Path

import pytest

from stillblock.extents import normalise, subtract, total_bytes
from stillblock.selection.filesystems import (
    FileKind,
    Filesystem,
    UnresolvedError,
    open_filesystem,
    walk,
)
from unit.selection.filesystems.damage_cases import Damageable, check_damages
from unit.selection.filesystems.fuse import (
    free_by_partclone,
    left_out_with,
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
from unit.selection.filesystems.reading import content_by_runs, data_extents, files_of

pytestmark = [pytest.mark.needs("mkfs.ntfs", "ntfs-3g"), pytest.mark.slow]

ODD_NAMES = ("new\nline", "snow☃", "x" * 255, "trailing dot.", "colon;semi", "😀")
COMPRESSED_ATTRIBUTE = 0x800
TAG_MOUNT_POINT, TAG_WOF = 0xA0000003, 0x80000017


def make(image: Path, *, size: int = 96 * MIB, options: tuple[str, ...] = ()) -> Path:
    with image.open("wb") as file:
        file.truncate(size)
    run("mkfs.ntfs", "-F", "-f", "-q", "-L", "Stills", *options, image)
    return image


def mount(image: Path, options: str = "streams_interface=windows,compression"):
    return mounted(image, driver="ntfs-3g", options=options)


def fill(top: Path) -> None:
    """A tree with every way that NTFS keeps data."""
    tree = top / "tree"
    (tree / "many").mkdir(parents=True)
    for number in range(300):
        (tree / "many" / f"file {number:03}").write_bytes(os.urandom(number * 37))
    (tree / "empty").touch()
    (tree / "one cluster").write_bytes(os.urandom(4096))
    (tree / "large").write_bytes(os.urandom(9 * MIB + 17))
    for name in ODD_NAMES:
        (tree / name).write_bytes(os.urandom(5000))
    with (tree / "sparse").open("wb") as file:
        file.write(b"begin" * 1000)
        file.seek(3 * MIB)
        file.write(os.urandom(70_000))
        file.truncate(7 * MIB)
    deep = tree.joinpath(*(f"level {depth}" for depth in range(40)))
    deep.mkdir(parents=True)
    (deep / "bottom").write_bytes(os.urandom(6000))
    (tree / "first name").write_bytes(os.urandom(20_000))
    os.link(tree / "first name", tree / "second name")
    os.link(tree / "first name", deep / "third name")
    (tree / "a long name.with ending").write_bytes(os.urandom(8000))
    os.setxattr(tree / "a long name.with ending", "system.ntfs_dos_name", b"ALONGN~1.WIT")
    (tree / "streams").write_bytes(os.urandom(30_000))
    for name in ("one", "two"):
        Path(f"{tree / 'streams'}:{name}").write_bytes(os.urandom(50_000))
    Path(f"{tree / 'empty'}:hidden").write_bytes(os.urandom(12_000))
    grow_in_turns(tree, count=4, pieces=60)


def grow_in_turns(top: Path, *, count: int, pieces: int) -> None:
    """Files whose clusters alternate, so that each is in as many pieces as it has clusters."""
    opened = [(top / f"in turns {number}").open("wb", buffering=0) for number in range(count)]
    for _ in range(pieces):
        for file in opened:
            file.write(os.urandom(4096))
    for file in opened:
        file.close()


def leave_gaps(top: Path) -> int:
    """Fill the volume with files of a cluster, remove every other one, and return how many."""
    (top / "filler").mkdir()
    number = 0
    try:
        while True:
            (top / "filler" / f"{number}").write_bytes(b"x" * 1024)
            number += 1
    except OSError:
        (top / "filler" / f"{number}").unlink(missing_ok=True)
    for odd in range(1, number, 2):
        (top / "filler" / f"{odd}").unlink()
    return number // 2


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("ntfs") / "tree.img")


@pytest.fixture(scope="module")
def truth(image: Path) -> dict[str, str]:
    """Fill the image; its files and their digests, by ntfs-3g after a second mount."""
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


# Identity -------------------------------------------------------------------------------------


@pytest.mark.needs("blkid")
def test_identity_is_what_blkid_prints(image: Path, filesystem: Filesystem):
    assert_identity_is_what_blkid_prints(filesystem, image, kind="ntfs", size=96 * MIB)


# Files ----------------------------------------------------------------------------------------


def test_every_file_is_found_once_for_each_name(truth: dict[str, str], filesystem: Filesystem):
    paths = [path for path, node in walk(filesystem) if node.kind is FileKind.REGULAR]
    assert sorted(paths) == sorted(truth)


def test_every_file_reads_the_same_by_its_runs(
    truth: dict[str, str], disk: FileDisk, filesystem: Filesystem
):
    assert_all_files_are_read(disk, filesystem, truth)


def test_every_file_reads_the_same_in_odd_pieces(truth: dict[str, str], filesystem: Filesystem):
    assert_files_read_the_same_in_pieces(filesystem, truth, piece_bytes=300_007)


def test_the_streams_of_a_file_are_its_data(filesystem: Filesystem):
    found = files_of(filesystem)
    three_streams = total_bytes(data_extents(filesystem, found["/tree/streams"]))
    assert three_streams == sum(-(-size // 4096) * 4096 for size in (30_000, 50_000, 50_000))
    assert total_bytes(data_extents(filesystem, found["/tree/empty"])) == 12_288


def test_names_of_a_hard_linked_file_lead_to_one_node(filesystem: Filesystem):
    found = files_of(filesystem)
    deep = next(path for path in found if path.endswith("third name"))
    nodes = {found[path] for path in ("/tree/first name", "/tree/second name", deep)}
    assert [node.links for node in nodes] == [3]


def test_a_short_name_is_no_second_path(filesystem: Filesystem):
    found = files_of(filesystem)
    assert found["/tree/a long name.with ending"].links == 1
    assert not [path for path in found if "ALONGN" in path]


def test_no_two_files_share_a_byte(filesystem: Filesystem):
    found = {node.number: node for node in files_of(filesystem).values()}
    extents = [data_extents(filesystem, node) for node in found.values()]
    assert total_bytes(normalise(e for of_one in extents for e in of_one)) == sum(
        map(total_bytes, extents)
    )


def read_whole(image: Path, truth: dict[str, str]) -> Filesystem:
    disk = FileDisk(image)
    filesystem = open_filesystem(disk)
    assert_all_files_are_read(disk, filesystem, truth)
    return filesystem


@pytest.mark.needs("ntfsinfo")
def test_files_in_very_many_pieces_are_read_through_their_attribute_lists(tmp_path: Path):
    image = make(tmp_path / "turns.img", size=32 * MIB)
    with mount(image) as top:
        grow_in_turns(top, count=3, pieces=800)
        truth = contents(top)
    assert has_attribute_list(image, "/in turns 1")
    filesystem = read_whole(image, truth)
    assert len(filesystem.runs(files_of(filesystem)["/in turns 1"])) > 500


@pytest.mark.needs("ntfsinfo")
def test_an_mft_in_very_many_pieces_is_read_through_its_attribute_list(tmp_path: Path):
    image = make(tmp_path / "gaps.img", size=8 * MIB, options=("-c", "1024"))
    with mount(image) as top:
        with pytest.raises(OSError):
            for number in range(leave_gaps(top) * 2):
                (top / "filler" / f"resident {number}").write_bytes(b"%d" % number)
        truth = contents(top)
    assert has_attribute_list(image, "$MFT")
    read_whole(image, truth)


def has_attribute_list(image: Path, name: str) -> bool:
    """Whether several MFT records hold a file's data."""
    told = run("ntfsinfo", "-F", name, image)
    records = {line for line in told.splitlines() if "attribute $DATA (0x80) from" in line}
    return len(records) > 1


@pytest.mark.needs("partclone.ntfs")
@pytest.mark.parametrize(
    ("options", "cluster_size"),
    [(("-c", "512"), 512), (("-c", "65536"), 65536), (("-s", "4096"), 4096)],
    ids=["small clusters", "large clusters", "sectors of 4 KiB"],
)
def test_other_sizes(tmp_path: Path, options: tuple[str, ...], cluster_size: int):
    image = make(tmp_path / "c.img", size=40 * MIB, options=options)
    with mount(image) as top:
        (top / "d").mkdir()
        for number in range(200):
            (top / "d" / f"{number}").write_bytes(os.urandom(number * 300))
        truth = contents(top)
    filesystem = read_whole(image, truth)
    assert filesystem.identity.block_size == cluster_size
    assert subtract(filesystem.free(), free_by_partclone(image, kind="ntfs")) == ()


@pytest.mark.needs("ntfsfallocate")
def test_what_lies_past_the_initialised_size_reads_as_zeros(tmp_path: Path):
    image = make(tmp_path / "pre.img", size=16 * MIB)
    with mount(image) as top:
        (top / "stale").write_bytes(b"stale" * MIB)
        (top / "stale").unlink()
        (top / "allocated").write_bytes(b"written")
    run("ntfsfallocate", "-l", str(3 * MIB), image, "allocated")
    with mount(image) as top:
        truth = contents(top)
    disk = FileDisk(image)
    filesystem = open_filesystem(disk)
    node = files_of(filesystem)["/allocated"]
    assert any(piece.is_unwritten for piece in filesystem.runs(node))
    assert digest(content_by_runs(disk, filesystem, node)) == truth["/allocated"]


# What is not a file's plain data ---------------------------------------------------------------


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = make(tmp_path_factory.mktemp("ntfs") / "special.img", size=32 * MIB)
    with mount(image) as top:
        (top / "packed").mkdir()
        (attributes,) = struct.unpack("<I", os.getxattr(top / "packed", "system.ntfs_attrib"))
        os.setxattr(
            top / "packed",
            "system.ntfs_attrib",
            struct.pack("<I", attributes | COMPRESSED_ATTRIBUTE),
        )
        (top / "packed" / "text").write_bytes(b"the same again " * 40_000)
        (top / "target").mkdir()
        (top / "target" / "inside").write_bytes(b"i" * 9000)
        (top / "junction").mkdir()
        set_reparse_point(top / "junction", TAG_MOUNT_POINT, mount_point("C:\\target"))
        (top / "system file").touch()
        set_reparse_point(top / "system file", TAG_WOF, struct.pack("<4I", 1, 2, 1, 0))
    return image


def mount_point(target: str) -> bytes:
    inner, shown = (text.encode("utf-16-le") for text in (f"\\??\\{target}", target))
    header = struct.pack("<4H", 0, len(inner), len(inner) + 2, len(shown))
    return header + inner + bytes(2) + shown + bytes(2)


def set_reparse_point(path: Path, tag: int, data: bytes) -> None:
    value = struct.pack("<IHH", tag, len(data), 0) + data
    os.setxattr(path, "system.ntfs_reparse_data", value)


def test_a_compressed_file_is_not_resolved(special: Path):
    filesystem = open_filesystem(FileDisk(special))
    with pytest.raises(UnresolvedError, match="compressed"):
        filesystem.runs(files_of(filesystem)["/packed/text"])


def test_a_file_that_windows_packed_is_not_resolved(special: Path):
    filesystem = open_filesystem(FileDisk(special))
    with pytest.raises(UnresolvedError, match="another form"):
        filesystem.runs(files_of(filesystem)["/system file"])


def test_an_encrypted_file_is_not_resolved(special: Path, tmp_path: Path):
    filesystem = open_filesystem(FileDisk(special))
    node = files_of(filesystem)["/target/inside"]
    filesystem.runs(node)
    copy = patched(special, {flags_offset(special, node.number): b"\0\x40"}, name="efs.img")
    filesystem = open_filesystem(FileDisk(copy))
    with pytest.raises(UnresolvedError, match="encrypted"):
        filesystem.runs(node)


def flags_offset(image: Path, record: int) -> int:
    """Where the flags of a file's data attribute are: its MFT here is one run, after the boot."""
    with image.open("rb") as file:
        content = file.read()
    cluster_size = 512 * content[0x0D]
    at = int.from_bytes(content[0x30:0x38], "little") * cluster_size + record * 1024
    at += int.from_bytes(content[at + 20 : at + 22], "little")
    while int.from_bytes(content[at : at + 4], "little") != 0x80:
        at += int.from_bytes(content[at + 4 : at + 8], "little")
    return at + 12


def test_a_junction_is_a_link_and_not_entered(special: Path):
    filesystem = open_filesystem(FileDisk(special))
    found = dict(walk(filesystem))
    assert found["/junction"].kind is FileKind.SYMLINK
    assert filesystem.read(found["/junction"], offset=0, length=100) == b"C:\\target"
    assert "/junction/inside" not in found


@pytest.mark.needs("ntfscluster")
def test_system_files_are_not_in_the_tree_and_always_stay(
    image: Path, truth: dict[str, str], filesystem: Filesystem
):
    assert not [path for path, _ in walk(filesystem) if path.startswith("/$")]
    for name in ("$MFT", "$MFTMirr", "$LogFile", "$Bitmap", "$Secure", "$UpCase"):
        places = clusters_of(image, name)
        assert places, f"ntfscluster must tell where {name} is"
        assert subtract(normalise(places), filesystem.fixed()) == (), name


def clusters_of(image: Path, name: str) -> list[tuple[int, int]]:
    """Where a file lies, by ntfscluster's tables of VCN, LCN and length."""
    rows = [line.split() for line in run("ntfscluster", "-F", name, image).splitlines()]
    return [
        (int(row[1]) * 4096, (int(row[1]) + int(row[2])) * 4096)
        for row in rows
        if len(row) == 3 and all(field.isdigit() for field in row)
    ]


# Free space -----------------------------------------------------------------------------------


@pytest.mark.needs("partclone.ntfs")
def test_free_is_what_partclone_says(image: Path, truth: dict[str, str], filesystem: Filesystem):
    free = filesystem.free()
    assert free == tuple(
        extent
        for extent in free_by_partclone(image, kind="ntfs")
        # The last sector, with the copy of the boot sector, is in no cluster.
        if extent[1] <= 96 * MIB - 4096
    )


def test_free_is_nobodys(filesystem: Filesystem):
    assert_free_is_nobodys(filesystem, more_than_bytes=40 * MIB)


def test_the_boot_sectors_are_kept(filesystem: Filesystem):
    fixed = filesystem.fixed()
    assert fixed[0][0] == 0
    assert fixed[-1] == (96 * MIB - 512, 96 * MIB)


@pytest.mark.needs("ntfsfix")
def test_all_else_is_whole_without_free_space_and_some_files(
    image: Path, truth: dict[str, str], filesystem: Filesystem
):
    names_of: dict[int, set[str]] = {}
    for path, node in files_of(filesystem).items():
        names_of.setdefault(node.number, set()).add(path)
    out = {path for paths in list(names_of.values())[::2] for path in paths}
    copy = without(image, left_out_with(filesystem, out), name="without.img")
    assert "processed successfully" in run("ntfsfix", "-n", copy)
    with mount(copy) as top:
        found = contents(top)
    assert_all_else_is_whole(found, truth, out)


# The volume in use ----------------------------------------------------------------------------


def test_files_just_fsynced_on_a_mounted_volume_are_held(tmp_path: Path):
    image = make(tmp_path / "live.img", size=64 * MIB)
    copy = tmp_path / "copy.img"
    with mount(image) as top:
        (top / "before").write_bytes(os.urandom(2 * MIB))
        (top / "before").unlink()
        descriptors, truth = [], {}
        for number in range(60):
            path = top / f"{number:02}"
            descriptors.append(os.open(path, os.O_CREAT | os.O_RDWR))
            data = os.urandom(40_000 + 3000 * number)
            os.write(descriptors[-1], data)
            os.fsync(descriptors[-1])
            truth[f"/{number:02}"] = digest(data)
        # Half of them are still open: what the driver writes when one is closed is not there.
        for descriptor in descriptors[::2]:
            os.close(descriptor)
        copy.write_bytes(image.read_bytes())
        for descriptor in descriptors[1::2]:
            os.close(descriptor)
    assert_unresolved_or_held(copy, truth, mount)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = make(tmp_path_factory.mktemp("ntfs") / "flat.img", size=8 * MIB)
    with mount(image) as top:
        (top / "hiberfil.sys").write_bytes(bytes(8192))
        (top / "file").write_bytes(os.urandom(50_000))
    return image


def place_of(image: Path, path: str) -> int:
    filesystem = open_filesystem(FileDisk(image))
    return data_extents(filesystem, files_of(filesystem)[path])[0][0]


def assert_unresolved(image: Path, match: str) -> None:
    filesystem = open_filesystem(FileDisk(image))
    assert filesystem.identity.label == "Stills", "its name is told all the same"
    for ask in (filesystem.root, filesystem.free, filesystem.fixed):
        with pytest.raises(UnresolvedError, match=match):
            ask()


def test_a_volume_that_says_it_is_dirty_is_not_resolved(flat: Path):
    # The value of $VOLUME_INFORMATION in the $MFT and its mirror: 8 bytes, version 3.1, flags.
    content, places, at = flat.read_bytes(), {}, 0
    while (at := content.find("Stills".encode("utf-16-le"), at) + 1) > 0:
        places[content.index(b"\x03\x01\x00\x00", at) + 2] = b"\x01"
    copy = patched(flat, places, name="dirty.img")
    assert "Volume Flags: 0x0001 DIRTY" in run("ntfsinfo", "-f", "-m", copy)
    assert_unresolved(copy, "dirty")


def test_a_volume_whose_mirror_differs_is_not_resolved(flat: Path):
    content = flat.read_bytes()
    place = content.rindex("Stills".encode("utf-16-le"))
    assert_unresolved(patched(flat, {place: b"s"}, name="mirror.img"), "mirror")


def test_a_hibernated_windows_is_not_resolved(flat: Path):
    open_filesystem(FileDisk(flat)).free()
    place = place_of(flat, "/hiberfil.sys")
    for head, is_resolved in ((b"wake", True), (b"hibr", False), (b"HIBR", False), (b"?", False)):
        copy = patched(flat, {place: head}, name="hibernated.img")
        if is_resolved:
            open_filesystem(FileDisk(copy)).free()
        else:
            assert_unresolved(copy, "hibernated")


NOBODY = 0xFFFF


@pytest.mark.needs("ntfscluster")
@pytest.mark.parametrize(
    ("newer", "older", "is_resolved"),
    [
        # Clients that have the log open, and flags, of which 2 says that it was closed.
        ((0, 0), (NOBODY, 0), False),
        ((0, 2), (0, 0), True),
        ((NOBODY, 0), (0, 0), True),
    ],
)
def test_the_log_says_whether_the_volume_was_closed(
    flat: Path, newer: tuple[int, int], older: tuple[int, int], is_resolved: bool
):
    ((start, _),) = clusters_of(flat, "$LogFile")
    for first, second in (((1000, *newer), (999, *older)), ((999, *older), (1000, *newer))):
        pages = restart_page(*first) + restart_page(*second)
        copy = patched(flat, {start: pages}, name="log.img")
        if is_resolved:
            assert open_filesystem(FileDisk(copy)).free()
        else:
            assert_unresolved(copy, "not be in place")


def test_a_log_of_unknown_content_is_not_resolved(flat: Path):
    ((start, _),) = clusters_of(flat, "$LogFile")
    assert_unresolved(patched(flat, {start + 70_000: b"?"}, name="log.img"), "log is damaged")
    assert_unresolved(patched(flat, {start: b"?"}, name="log.img"), "no restart area")


def restart_page(lsn: int, clients: int, flags: int) -> bytes:
    """A page of $LogFile by Microsoft's layout, its sectors marked with 7."""
    page = bytearray(4096)
    struct.pack_into("<4sHHQII6H", page, 0, b"RSTR", 30, 9, 0, 4096, 4096, 48, 1, 1, 7, 0, 0)
    struct.pack_into("<QHHHH", page, 48, lsn, 1, NOBODY, clients, flags)
    for end in range(510, 4096, 512):
        page[end : end + 2] = b"\x07\x00"
    return bytes(page)


# Damage ---------------------------------------------------------------------------------------


def damageable(folder: Path) -> Damageable:
    """A small volume with what a directory and an MFT record can have."""
    image = make(folder / "small.img", size=4 * MIB)
    with mount(image) as top:
        (top / "directory").mkdir()
        for number in range(40):
            (top / "directory" / f"file {number}").write_bytes(os.urandom(900 * number))
        os.link(top / "directory" / "file 9", top / "link")
        grow_in_turns(top, count=2, pieces=20)
        Path(f"{top / 'link'}:stream").write_bytes(os.urandom(9000))
    places = [(0, 512)]
    for name in ("$MFT", "$MFTMirr", "$Bitmap", ".", "directory"):
        places += clusters_of(image, name)
    return Damageable(content=image.read_bytes(), places=normalise(places))


@pytest.mark.needs("ntfscluster")
def test_no_damage_to_the_structures_makes_a_file_anothers(tmp_path: Path):
    seen = check_damages(damageable(tmp_path), seed=20261123, count=1000)
    assert seen > 100, "most of what is tried must not be refused at once, or nothing is tried"
