"""btrfs: every file is found where its copies lie, and only what is free is called free."""

import functools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stillblock.extents import intersect, normalise, subtract, total_bytes, union, whole
from stillblock.selection.files import Files
from stillblock.selection.filesystems import (
    UnresolvedError,
    open_filesystem,
    read_runs,
    walk,
)
from unit.selection.filesystems.btrfs_images import (
    VARIANTS,
    change_superblock,
    chunks_of,
    extents_of,
    make,
    physical,
    small_image,
    superblock_of,
    used_by_dump,
    with_checksum,
)
from unit.selection.filesystems.churn import Churn
from unit.selection.filesystems.damage_cases import Damageable, DamagedDisk, check_damages, see
from unit.selection.filesystems.leaving_out import assert_only_what_is_left_out_is_missed, overwrite
from unit.selection.filesystems.mounting import (
    MIB,
    FileDisk,
    Told,
    copy_frozen,
    copy_sparse,
    digest,
    mounted,
    regular_files,
    run,
    told,
)
from unit.selection.filesystems.reader_contract import assert_odd_things_are_what_they_are
from unit.selection.filesystems.reading import files_of, places, runs_of
from unit.selection.filesystems.trees import Grown, grow_tree, grown_in, sync, write

pytestmark = [pytest.mark.needs("mkfs.btrfs", "btrfs"), pytest.mark.slow]


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Callable[[str], Grown]:
    """`grown(variant)`: made once for all tests, which leave it as it is."""
    folder = tmp_path_factory.mktemp("grown")

    @functools.cache
    def grow(variant: str) -> Grown:
        image = make(folder / variant, *VARIANTS[variant])
        return grown_in(image, fill=grow_tree)

    return grow


def pieces(offset: int, start: int, length: int) -> Iterator[tuple[int, int]]:
    return ((offset + at, start + at) for at in range(0, length, 4096))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_file_is_found_where_the_kernel_put_it(grown, variant):
    image, files, maps = grown(variant)
    disk = FileDisk(image)
    filesystem = open_filesystem(disk)
    found = files_of(filesystem)
    chunks = chunks_of(image)

    assert set(found) == set(files)
    for path, node in found.items():
        runs = filesystem.runs(node)
        content = filesystem.read(node, offset=0, length=node.size)
        seen = Told(
            digest(content),
            node.size,
            node.links,
            node.mode,
            node.uid,
            node.modified_ns,
            node.number & ((1 << 40) - 1),
        )
        assert seen == files[path], path
        # The kernel tells logical addresses.
        mapped = {
            piece
            for run in maps[path]
            for copy in physical(chunks, run.start)
            for piece in pieces(run.offset, copy, run.length)
        }
        assert {p for run in runs for p in pieces(run.offset, run.start, run.length)} == mapped


def test_each_copy_of_a_files_data_is_one_of_its_runs(grown):
    image, files, _ = grown("two copies of data")
    disk = FileDisk(image)
    filesystem = open_filesystem(disk)
    node = dict(walk(filesystem))["/huge"]
    runs = filesystem.runs(node)
    for copies in (runs[0::2], runs[1::2]):
        content = read_runs(disk, copies, size=node.size, offset=0, length=node.size)
        assert digest(content) == files["/huge"].digest
    assert total_bytes(places(runs)) >= 2 * node.size


@pytest.mark.parametrize("variant", VARIANTS)
def test_free_is_what_no_extent_has(grown, variant):
    image = grown(variant).image
    assert open_filesystem(FileDisk(image)).free() == subtract(
        whole(256 * MIB), used_by_dump(image)
    )


def test_a_filesystem_whose_free_space_was_overwritten_is_as_good_as_before(grown, tmp_path):
    image, files, _ = grown("as mkfs makes it")
    copy = copy_sparse(image, tmp_path / "copy")
    free = open_filesystem(FileDisk(copy)).free()
    overwrite(copy, free)

    run("btrfs", "check", "--check-data-csum", copy)
    with mounted(copy) as top:
        assert told(top) == files


def test_links_and_folders_are_what_they_are(grown):
    image = grown("as mkfs makes it").image
    filesystem = open_filesystem(FileDisk(image))

    assert_odd_things_are_what_they_are(filesystem)
    assert filesystem.identity.label == "stills"
    uuid = superblock_of(image).split("fsid")[1].split()[0]
    assert filesystem.identity.uuid == uuid


def test_subvolumes_and_snapshots_are_folders_and_claim_what_they_share(tmp_path):
    image = make(tmp_path / "image")
    with mounted(image) as top:
        write(top / "file", random.Random(1).randbytes(100_000))
        run("btrfs", "subvolume", "create", top / "mails")
        write(top / "mails" / "mail", random.Random(2).randbytes(300_000))
        run("btrfs", "subvolume", "create", top / "mails" / "inner")
        write(top / "mails" / "inner" / "deep", random.Random(3).randbytes(100_000))
        run("btrfs", "subvolume", "snapshot", top / "mails", top / "yesterday")
        write(top / "mails" / "mail", b"new" * 4096, at=8192)
        run("btrfs", "subvolume", "create", top / "gone")
        write(top / "gone" / "file", random.Random(4).randbytes(100_000))
        run("btrfs", "subvolume", "delete", top / "gone")
        os.sync()
        expected = set(told(top))
    filesystem = open_filesystem(FileDisk(image))
    files = runs_of(filesystem)

    # A snapshot does not hold the subvolumes that were below: it has empty folders in their place.
    assert (
        set(files) == expected == {"/file", "/mails/mail", "/mails/inner/deep", "/yesterday/mail"}
    )
    now, before = places(files["/mails/mail"]), places(files["/yesterday/mail"])
    assert total_bytes(before) >= 300_000
    assert 270_000 < total_bytes(intersect(now, before)) < total_bytes(before)
    numbers = [node.number for _, node in walk(filesystem)]
    assert len(set(numbers)) == len(numbers)


def test_compressed_files_claim_what_their_pieces_take(tmp_path):
    image = make(tmp_path / "image")
    with mounted(image, options="compress-force=zstd") as top:
        write(top / "text", b"the same again " * 100_000)
        write(top / "noise", random.Random(1).randbytes(500_000))
        run("cp", "--reflink=always", top / "text", top / "other text")
        os.sync()
        inodes = {path: file.number for path, file in told(top).items()}
    filesystem = open_filesystem(FileDisk(image))
    nodes = dict(walk(filesystem))

    for path, inode in inodes.items():
        assert places(filesystem.runs(nodes[path])) == extents_of(image, inode) != ()
    text = filesystem.runs(nodes["/text"])
    assert all(run.is_encoded for run in text)
    assert 0 < total_bytes(places(text)) < 200_000
    assert places(text) == places(filesystem.runs(nodes["/other text"]))
    with pytest.raises(UnresolvedError, match="compressed"):
        filesystem.read(nodes["/text"], offset=0, length=1)
    assert filesystem.free() == subtract(whole(256 * MIB), used_by_dump(image))


# In use -----------------------------------------------------------------------------------------


def test_files_just_synced_are_held_while_mounted_and_free_space_is_given_when_frozen(tmp_path):
    image = make(tmp_path / "image")
    dice = random.Random(8)
    with mounted(image) as top:
        run("sync", "--file-system", top)
        for i in range(60):
            path = top / f"file{i}"
            write(path, dice.randbytes(3000 * i + 4096))
            sync(path)
        live = copy_sparse(image, tmp_path / "live")
        frozen = copy_frozen(image, top, tmp_path / "frozen")
    replayed = copy_sparse(live, tmp_path / "replayed")
    with mounted(replayed):
        pass
    data = places(
        run for runs in runs_of(open_filesystem(FileDisk(replayed))).values() for run in runs
    )
    assert total_bytes(data) >= sum(3000 * i + 4096 for i in range(60))

    for copy, log in ((live, 1), (frozen, 0)):
        filesystem = open_filesystem(FileDisk(copy))
        free = filesystem.free()
        assert intersect(free, data) == ()
        assert total_bytes(free) > 200 * MIB
        assert len(filesystem.caveats) == 1 + log
    filesystem = open_filesystem(FileDisk(live))
    committed = places(run for runs in runs_of(filesystem).values() for run in runs)
    assert subtract(data, union(filesystem.fixed(), committed)) == ()
    assert subtract(data, committed) != (), "the log has them"


@pytest.mark.parametrize("seed", range(3))
def test_whatever_was_synced_since_the_commit_survives_what_is_left_out(tmp_path, seed):
    """A third of the files and all free space are overwritten; all other files are as replayed."""
    image = make(tmp_path / "image")
    with mounted(image, options="commit=300") as top:
        churn = Churn(top, seed=seed)
        churn.run(100)
        run("btrfs", "filesystem", "sync", top)
        dice = random.Random(seed)
        for path in dice.sample(regular_files(top), 12):
            # A page written anew, an extent shared with a new file, a file made: each synced.
            write(path, dice.randbytes(5000), at=dice.randrange(20) * 4096)
            run("cp", "--reflink=always", path, clone := path.with_name(f"synced{path.name[:20]}"))
            write(fresh := path.with_name(f"fresh{path.name[:20]}"), dice.randbytes(30_000))
            for synced in (path, clone, fresh):
                sync(synced)
        live = copy_sparse(image, tmp_path / "live")
    assert len(open_filesystem(FileDisk(live)).caveats) == 2, "there is a log"

    run("btrfs", "check", assert_only_what_is_left_out_is_missed(live))


def test_a_log_that_renames_a_file_leaves_its_filesystem_unresolved(tmp_path):
    image = make(tmp_path / "image")
    with mounted(image, options="commit=300") as top:
        write(top / "report", b"words" * 10_000)
        run("btrfs", "filesystem", "sync", top)
        write(top / "report", b"more", at=8192)
        (top / "report").rename(top / "archive")
        sync(top / "archive")
        live = copy_sparse(image, tmp_path / "live")
    replayed = copy_sparse(live, tmp_path / "replayed")
    with mounted(replayed) as top:
        assert {path.name for path in top.iterdir()} == {"archive"}, "the log has it"

    with pytest.raises(UnresolvedError, match="another name"):
        open_filesystem(FileDisk(live)).root()
    with pytest.raises(UnresolvedError, match="another name"):
        open_filesystem(FileDisk(live)).fixed()


def test_a_reader_of_files_gives_what_a_mount_finds_or_says_that_it_was_synced(tmp_path):
    image = make(tmp_path / "image")
    with mounted(image, options="commit=300") as top:
        for name in ("grown", "kept", "replaced", "gone", "sub/inner", "calm/file"):
            (top / name).parent.mkdir(exist_ok=True)
            write(top / name, name.encode() * 3000)
        run("btrfs", "filesystem", "sync", top)
        (top / "gone").unlink()
        write(top / "fresh", b"fresh" * 2000)
        write(top / "new of replaced", b"newer" * 2000)
        write(top / "grown", b"more" * 9000, at=4096)
        (top / "grown").chmod(0o600)
        write(top / "sub/fresh", b"fresh" * 2000)
        (top / "new of replaced").rename(top / "replaced")
        for path in ("fresh", "replaced", "grown", "sub/fresh"):
            sync(top / path)
        folder = os.open(top, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        live = copy_sparse(image, tmp_path / "live")
    replayed = copy_sparse(live, tmp_path / "replayed")
    with mounted(replayed) as top:
        found = {str(path.relative_to(top)): path for path in top.rglob("*") if path.is_file()}
        expected = {name: (path.stat().st_size, path.read_bytes()) for name, path in found.items()}
    assert expected.keys() >= {"fresh", "sub/fresh"}, "the log has them"
    assert "gone" not in expected, "the log has it"
    assert expected["replaced"][1].startswith(b"newer"), "the log has it"

    filesystem = open_filesystem(FileDisk(live))
    files = Files(filesystem)
    for name in ("fresh", "gone", "replaced", "sub/fresh"):
        with pytest.raises(UnresolvedError, match="synced since the last commit"):
            files.find(name, follows=True)
    for name in ("kept", "grown", "sub/inner", "calm/file"):
        entry = files.find(name, follows=True)
        assert entry.node.size == expected[name][0], name
        if name != "grown":
            content = filesystem.read(entry.node, offset=0, length=entry.node.size)
            assert content == expected[name][1]
    with pytest.raises(UnresolvedError, match="synced since the last commit"):
        files.layout(files.find("grown", follows=True).node)
    for path in ("/", "/sub"):
        with pytest.raises(UnresolvedError, match="synced since the last commit"):
            files.batch(files.find(path, follows=True).node, position=0)
    calm, _ = files.batch(files.find("/calm", follows=True).node, position=0)
    assert [entry.name for entry in calm] == ["file"]
    # What rules mean is as it was: a file of no commit has no name that could leave it out.
    assert "/kept" in dict(walk(filesystem))


def test_what_a_busy_filesystem_has_committed_is_what_a_mount_would_find(tmp_path):
    image = make(tmp_path / "image", "-m", "single", "-n", "4096")
    copies = []
    with mounted(image) as top:
        churn = Churn(top, seed=9)
        for i in range(3):
            churn.run(120)
            run("btrfs", "filesystem", "sync", top)
            copies.append(copy_sparse(image, tmp_path / f"copy{i}"))
    for copy in copies:
        before = FileDisk(copy_sparse(copy, copy.with_suffix(".before")))
        seen = open_filesystem(before)
        contents = {
            path: digest(seen.read(node, offset=0, length=node.size))
            for path, node in files_of(seen).items()
        }
        overwrite(copy, seen.free())
        with mounted(copy) as top:
            assert {path: file.digest for path, file in told(top).items()} == contents


# Damage -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settled(tmp_path_factory) -> Path:
    """A small image that was unmounted."""
    return small_image(tmp_path_factory.mktemp("settled"))


def tree_blocks(content: bytes) -> list[int]:
    """Where sound tree blocks lie: those of the last commit, and older ones."""
    fsid = content[65536 + 32 : 65536 + 48]
    return [
        at
        for at in range(MIB, len(content), 4096)
        if content.startswith(fsid, at + 32)
        and with_checksum(content[at : at + 4096]) == content[at : at + 4096]
    ]


def test_damage_to_metadata_is_noticed_or_harmless(settled):
    content = settled.read_bytes()
    blocks = [(at, at + 4096) for at in tree_blocks(content)]
    assert len(blocks) > 20
    image = Damageable(content=content, places=normalise([(65536, 65536 + 1000), *blocks]))
    check_damages(image, seed=31, count=500)


def test_metadata_made_to_deceive_with_right_checksums_gives_nothing_away(settled):
    """Somebody who writes the disk can make checksums right: then only what is said counts."""
    content = settled.read_bytes()
    blocks = [*tree_blocks(content), 65536]
    dice = random.Random(33)
    sound = see(DamagedDisk(content))
    kept = union(sound.all_data, sound.fixed)
    owners = {number: sound.data[path] or () for path, number in sound.numbers.items()}
    seen = 0
    for case in range(600):
        at = dice.choice(blocks)
        block = bytearray(content[at : at + 4096])
        telling = [i for i in range(32, 4096) if block[i]]
        i = dice.choice(telling)
        match dice.randrange(4):
            case 0:
                block[i] ^= 1 << dice.randrange(8)
            case 1:
                block[i] = dice.randrange(256)
            case 2:
                number = dice.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF))
                block[i : i + 4] = number.to_bytes(4, "little")[: 4096 - i]
            case _:
                length = min(dice.choice((4, 8, 17)), 4096 - i)
                source = dice.choice(blocks) + dice.choice(telling)
                block[i : i + length] = content[source : source + length]
        disk = DamagedDisk(content, {at: with_checksum(bytes(block[:4096]))})
        try:
            sight = see(disk)
        except UnresolvedError:
            continue
        seen += 1
        assert intersect(sight.left_out_as_free, kept) == (), case
        for path, number in sight.numbers.items():
            # A name that leads to another file is no damage: somebody renamed it.
            foreign = normalise(
                extent for owner, own in owners.items() if owner != number for extent in own
            )
            own = owners.get(number, ())
            lost = intersect(sight.left_out_with(path), subtract(union(foreign, sound.fixed), own))
            assert lost == (), f"case {case}: {path!r} would take {lost} with it"
    assert seen > 50, "most of an inode is about other things than its extents"


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "by", "reason"),
    [
        (188, (1 << 12).to_bytes(8, "little"), "not known"),
        (188, (1 << 40).to_bytes(8, "little"), "not known"),
        (180, (1 << 5).to_bytes(8, "little"), "not known"),
        (56, (1 << 32 | 1).to_bytes(8, "little"), "state"),
        (136, (2).to_bytes(8, "little"), "2 devices"),
        (196, (1).to_bytes(2, "little"), "xxhash"),
        (148, (3).to_bytes(4, "little"), "impossible"),
        (209, (1 << 40).to_bytes(8, "little"), "there are only"),
        (811, b"\0" * 8, "chunks are damaged"),
    ],
)
def test_what_is_not_understood_is_refused(settled, tmp_path, at, by, reason):
    image = copy_sparse(settled, tmp_path / "image")
    change_superblock(image, at=at, by=by)
    with pytest.raises(UnresolvedError, match=reason):
        open_filesystem(FileDisk(image))


def test_several_devices_are_refused(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.write_bytes(b"")
        os.truncate(path, 128 * MIB)
    run("mkfs.btrfs", "-q", "-d", "raid1", "-m", "raid1", first, second)
    with pytest.raises(UnresolvedError, match="2 devices"):
        open_filesystem(FileDisk(first))


def test_a_broken_copy_of_metadata_is_replaced_by_the_other(grown, tmp_path):
    image = copy_sparse(grown("as mkfs makes it").image, tmp_path / "image")
    sound = open_filesystem(FileDisk(image)).free()
    metadata = [(length, copies) for _, length, copies in chunks_of(image) if len(copies) == 2]
    assert metadata
    overwrite(image, normalise((copies[0], copies[0] + length) for length, copies in metadata))

    assert open_filesystem(FileDisk(image)).free() == sound
