"""XFS: every file is found where it lies, and only what is free is called free, replayed or not."""

import functools
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stillblock.extents import intersect, normalise, subtract, total_bytes, union
from stillblock.native import crc32c
from stillblock.selection.filesystems import (
    FileKind,
    Filesystem,
    UnresolvedError,
    open_filesystem,
    read_runs,
    walk,
)
from unit.selection.filesystems.churn import Churn
from unit.selection.filesystems.damage_cases import Damageable, DamagedDisk, check_damages, see
from unit.selection.filesystems.leaving_out import assert_only_what_is_left_out_is_missed
from unit.selection.filesystems.mounting import (
    MIB,
    FileDisk,
    Told,
    blocks_of,
    copy_frozen,
    copy_sparse,
    digest,
    mounted,
    run,
)
from unit.selection.filesystems.reader_contract import assert_odd_things_are_what_they_are
from unit.selection.filesystems.reading import files_of, places, runs_of
from unit.selection.filesystems.trees import Grown, grow_tree, grown_in, sync, write
from unit.selection.filesystems.xfs_images import (
    VARIANTS,
    change,
    crumble,
    field,
    free_by_xfs_db,
    make,
    small_image,
    with_checksum,
    xfs_db,
)

pytestmark = [pytest.mark.needs("mkfs.xfs", "xfs_db", "xfs_repair"), pytest.mark.slow]

APPLIED = ("its log was applied in memory",)


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Callable[[str], Grown]:
    """`grown(variant)`: made once for all tests, which leave it as it is."""
    folder = tmp_path_factory.mktemp("grown")

    @functools.cache
    def grow(variant: str) -> Grown:
        def fill(top: Path) -> None:
            grow_tree(top)
            crumble(top / "crumbs", pieces=1500)

        return grown_in(make(folder / variant, *VARIANTS[variant]), fill=fill)

    return grow


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_file_is_found_where_the_kernel_put_it(grown, variant):
    image, files, maps = grown(variant)
    disk = FileDisk(image)
    filesystem = open_filesystem(disk)
    size = filesystem.identity.block_size
    found = files_of(filesystem)

    assert set(found) == set(files)
    assert filesystem.caveats == ()
    for path, node in found.items():
        runs = filesystem.runs(node)
        content = read_runs(disk, runs, size=node.size, offset=0, length=node.size)
        seen = Told(
            digest(content),
            node.size,
            node.links,
            node.mode,
            node.uid,
            node.modified_ns,
            node.number,
        )
        assert seen == files[path], path
        # What the kernel holds beyond a file's end it gives back when it unmounts.
        end = -(-node.size // size) * size
        mapped = {block for block in blocks_of(maps[path], block_size=size) if block[0] < end}
        ours = {block for block in blocks_of(runs, block_size=size) if block[0] < end}
        assert ours == mapped, path


@pytest.mark.parametrize("variant", VARIANTS)
def test_free_is_what_the_filesystems_own_tool_says_but_for_the_groups_free_lists(grown, variant):
    image = grown(variant).image
    filesystem = open_filesystem(FileDisk(image))
    everything, listed = free_by_xfs_db(image)

    free = filesystem.free()

    assert union(free, listed) == everything
    assert intersect(free, listed) == ()
    assert intersect(free, filesystem.fixed()) == ()


def test_links_and_folders_are_what_they_are(grown):
    image = grown("as mkfs makes it").image
    filesystem = open_filesystem(FileDisk(image))

    assert_odd_things_are_what_they_are(filesystem)
    assert filesystem.identity.label == "stills"
    uuid = xfs_db(image, "uuid").split()[-1]
    assert filesystem.identity.uuid == uuid


def test_large_directories_of_every_form_are_read_whole(tmp_path):
    image = make(tmp_path / "image", "-b", "size=1024")
    names: dict[str, set[str]] = {}
    with mounted(image) as top:
        for count in (3, 20, 300, 3000):
            folder = top / f"{count}"
            folder.mkdir()
            for i in range(count):
                (folder / f"{'name' * 8}{i}").touch()
            for i in range(0, count, 7):
                (folder / f"{'name' * 8}{i}").unlink()
            names[folder.name] = {entry.name for entry in folder.iterdir()}
    filesystem = open_filesystem(FileDisk(image))
    nodes = dict(walk(filesystem))

    for folder, expected in names.items():
        assert {name for name, _ in filesystem.children(nodes[f"/{folder}"])} == expected


def test_files_that_share_extents_all_claim_them(tmp_path):
    image = make(tmp_path / "image")
    with mounted(image) as top:
        write(top / "original", random.Random(1).randbytes(200_000))
        run("cp", "--reflink=always", top / "original", top / "clone")
        write(top / "clone", b"own", at=100_000)
        os.sync()
    runs = runs_of(open_filesystem(FileDisk(image)))
    original, clone = (places(runs[path]) for path in ("/original", "/clone"))

    assert total_bytes(intersect(original, clone)) >= 190_000
    assert total_bytes(subtract(clone, original)) == 4096


# The log ----------------------------------------------------------------------------------------


def replayed(image: Path) -> tuple[Path, Filesystem]:
    """A copy that the kernel mounted, and so recovered."""
    copy = copy_sparse(image, image.with_suffix(".replayed"))
    with mounted(copy):
        pass
    return copy, open_filesystem(FileDisk(copy))


def assert_is_as_replayed(image: Path) -> None:
    """What is read of an image with changes in its log is what the kernel's recovery leaves."""
    filesystem = open_filesystem(FileDisk(image))
    tree = {path: nameable(filesystem, node) for path, node in walk(filesystem)}
    copy, recovered = replayed(image)

    assert tree == {path: nameable(recovered, node) for path, node in walk(recovered)}
    held = [run for runs in runs_of(recovered).values() for run in runs]
    taken = subtract(filesystem.free(), recovered.free())
    # Recovery gives space back; it takes some only to fill the groups' free lists and trees.
    assert intersect(taken, places(held)) == ()
    assert total_bytes(taken) <= 64 * filesystem.identity.block_size
    copy.unlink()


def nameable(filesystem: Filesystem, node) -> tuple[object, ...]:
    content: object = None
    if node.kind is FileKind.REGULAR:
        content = filesystem.runs(node)
    elif node.kind is FileKind.SYMLINK:
        content = filesystem.read(node, offset=0, length=4096)
    size = node.size if node.kind is not FileKind.DIRECTORY else 0
    return (node.number, node.generation, node.kind, size, node.links, node.mode, content)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_log_is_applied_as_the_kernel_does(tmp_path, variant):
    image = make(tmp_path / "image", *VARIANTS[variant])
    copies = []
    with mounted(image) as top:
        churn = Churn(top, seed=5, can_clone=variant != "old features")
        for i in range(2):
            churn.run(150)
            copies.append(copy_sparse(image, tmp_path / f"copy{i}"))
    for copy in copies:
        assert_is_as_replayed(copy)


def test_a_log_that_went_round_is_applied(tmp_path):
    image = make(tmp_path / "image", "-b", "size=1024", "-l", "size=6m,su=32k", size=96 * MIB)
    with mounted(image) as top:
        churn = Churn(top, seed=6)
        # Each takes a stripe of 32 KiB.
        for i in range(250):
            write(top / f"round{i}", b"x")
            sync(top / f"round{i}")
            if i % 10 == 0:
                churn.run(5)
        copy = copy_sparse(image, tmp_path / "copy")
    start, _ = log_place(copy)
    words = FileDisk(copy).pread(offset=start, length=8)
    cycle = int.from_bytes(words[4:] if words[:4] == b"\xfe\xed\xba\xbe" else words[:4], "big")
    assert cycle > 1, "the log went round"

    assert_is_as_replayed(copy)


def test_files_just_written_are_held_while_mounted_and_free_space_is_given_when_frozen(tmp_path):
    image = make(tmp_path / "image")
    dice = random.Random(8)
    with mounted(image) as top:
        for i in range(60):
            write(top / f"file{i}", dice.randbytes(3000 * i + 1))
            sync(top / f"file{i}")
        live = copy_sparse(image, tmp_path / "live")
        frozen = copy_frozen(image, top, tmp_path / "frozen")
    data = [run for runs in runs_of(replayed(live)[1]).values() for run in runs]
    assert len(data) >= 60
    assert total_bytes(places(data)) >= sum(3000 * i for i in range(60))

    for copy, caveats in ((live, APPLIED), (frozen, ())):
        filesystem = open_filesystem(FileDisk(copy))
        free = filesystem.free()
        assert intersect(free, places(data)) == ()
        assert total_bytes(free) > 200 * MIB
        assert filesystem.caveats == caveats


@pytest.mark.parametrize("seed", range(2))
def test_what_is_left_out_of_a_busy_filesystem_is_missed_by_no_other_file(tmp_path, seed):
    """A third of the files and all free space are overwritten; recovery gives all other files."""
    image = make(tmp_path / "image")
    with mounted(image) as top:
        Churn(top, seed=seed).run(250)
        live = copy_sparse(image, tmp_path / "live")
    run("xfs_repair", "-n", assert_only_what_is_left_out_is_missed(live))


@pytest.fixture(scope="module")
def unsettled(tmp_path_factory) -> Path:
    """A small image whose log holds changes."""
    return small_image(tmp_path_factory.mktemp("unsettled"), is_settled=False)


def log_place(image: Path) -> tuple[int, int]:
    superblock = xfs_db(image, "sb 0", "print logstart logblocks agblklog agblocks blocksize")
    size = field(superblock, "blocksize")
    ag, block = divmod(field(superblock, "logstart"), 1 << field(superblock, "agblklog"))
    start = (ag * field(superblock, "agblocks") + block) * size
    return start, start + field(superblock, "logblocks") * size


def test_damage_in_the_log_is_noticed_or_harmless(unsettled):
    content = unsettled.read_bytes()
    start, end = log_place(unsettled)
    used = [
        (at, at + 512)
        for at in range(start, end, 512)
        if content[at : at + 4] not in (bytes(4), b"\0\0\0\0")
    ]
    image = Damageable(content=content, places=normalise(used))
    check_damages(image, seed=21, count=60)


def test_a_log_made_to_deceive_with_right_checksums_is_read_to_its_end(unsettled):
    """What such a log says is believed, as recovery would: it may only not break the reader."""
    content = unsettled.read_bytes()
    start, end = log_place(unsettled)
    records = []
    for at in range(start, end, 512):
        if content.startswith(b"\xfe\xed\xba\xbe", at):
            blocks = 1 + int.from_bytes(content[at + 12 : at + 16], "big") // 512
            record = content[at : at + blocks * 512]
            if log_checksum(record) == record[32:36]:
                records.append((at, record))
    assert len(records) > 3
    dice = random.Random(24)
    seen = 0
    for case in range(150):
        at, record = dice.choice(records)
        changed = bytearray(record)
        for _ in range(dice.choice((1, 1, 3))):
            telling = [i for i in range(524, len(record)) if record[i] and i % 512 >= 4]
            i = dice.choice(telling)
            if dice.random() < 0.5:
                changed[i] ^= 1 << dice.randrange(8)
            else:
                number = dice.choice((0, 1, 2, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
                width = min(dice.choice((2, 4)), 512 - i % 512)
                changed[i : i + width] = number.to_bytes(4, "little")[:width]
        changed[32:36] = log_checksum(bytes(changed))
        try:
            see(DamagedDisk(content, {at: bytes(changed)}))
            seen += 1
        except UnresolvedError:
            pass
        except Exception as error:
            raise AssertionError(f"case {case} at {at:#x}: {error!r}") from error
    assert 0 < seen < 150


def log_checksum(record: bytes) -> bytes:
    """Of a record with one header block: all but the header's padding and the checksum itself."""
    crc = crc32c(record[36:328], crc32c(bytes(4), crc32c(record[:32])))
    return crc32c(record[512:], crc).to_bytes(4, "little")


# Damage -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settled(tmp_path_factory) -> Path:
    """A small image that was unmounted."""
    return small_image(tmp_path_factory.mktemp("settled"), is_settled=True)


CHECKSUMS = {
    b"XFSB": (512, 224),
    b"XAGF": (512, 216),
    b"AB3B": (4096, 52),
    b"BMA3": (4096, 64),
    b"XDB3": (4096, 4),
    b"XDD3": (4096, 4),
    b"IN": (512, 100),
}


def structures(content: bytes, log: tuple[int, int]) -> list[tuple[int, int, int]]:
    """(where, bytes, where its checksum is) of the metadata that a reader believes."""
    found = []
    for at in range(0, len(content), 512):
        if log[0] <= at < log[1]:
            continue
        magic = next((m for m in CHECKSUMS if content.startswith(m, at)), None)
        if magic is not None and (magic != b"IN" or content[at + 4] == 3):
            size, checksum = CHECKSUMS[magic]
            if with_checksum(content[at : at + size], checksum) == content[at : at + size]:
                found.append((at, size, checksum))
    return found


def test_damage_to_metadata_is_noticed_or_harmless(settled):
    content = settled.read_bytes()
    places = [(at, at + size) for at, size, _ in structures(content, log_place(settled))]
    assert len(places) > 60
    image = Damageable(content=content, places=normalise(places))
    check_damages(image, seed=22, count=700)


def test_metadata_made_to_deceive_with_right_checksums_gives_nothing_away(settled):
    """Somebody who writes the disk can make checksums right: then only what is said counts."""
    content = settled.read_bytes()
    known = structures(content, log_place(settled))
    in_use = [s for s in known if content[s[0] : s[0] + 2] != b"IN" or content[s[0] + 2] != 0]

    def cases() -> Iterator[tuple[int, bytes]]:
        dice = random.Random(23)
        while True:
            start, size, checksum = dice.choice(in_use)
            whole = bytearray(content[start : start + size])
            telling = [at for at in range(size) if whole[at]]
            at = dice.choice(telling)
            match dice.randrange(4):
                case 0:
                    whole[at] ^= 1 << dice.randrange(8)
                case 1:
                    whole[at] = dice.randrange(256)
                case 2:
                    number = dice.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF))
                    whole[at : at + 4] = number.to_bytes(4, "big")[: size - at]
                case _:
                    other, other_size, _ = dice.choice(in_use)
                    length = min(dice.choice((4, 8, 16)), size - at)
                    from_at = dice.randrange(max(1, other_size - length))
                    whole[at : at + length] = content[other + from_at : other + from_at + length]
            yield start, with_checksum(bytes(whole[:size]), checksum)

    sound = see(DamagedDisk(content))
    kept = union(sound.all_data, sound.fixed)
    owners = {number: sound.data[path] or () for path, number in sound.numbers.items()}
    seen = 0
    for case, (at, damage) in zip(range(500), cases(), strict=False):
        try:
            sight = see(DamagedDisk(content, {at: damage}))
        except UnresolvedError:
            continue
        seen += 1
        assert intersect(sight.left_out_as_free, kept) == (), case
        for path, number in sight.numbers.items():
            # A name that leads to another file is no damage: somebody renamed it.
            foreign = normalise(
                extent for owner, own in owners.items() if owner != number for extent in own
            )
            lost = intersect(sight.left_out_with(path), union(foreign, sound.fixed))
            assert lost == (), f"case {case}: {path!r} would take {lost} with it"
    assert seen > 50, "most of an inode is about other things than its extents"


# What is refused --------------------------------------------------------------------------------


def patch_superblock(image: Path, *, at: int, by: bytes) -> None:
    change(image, start=0, length=512, checksum=224, at=at, by=by)


@pytest.mark.parametrize(
    ("at", "by", "reason"),
    [
        (216, (0x1000 | 0x3).to_bytes(4, "big"), "not known"),
        (216, (0x100 | 0x3).to_bytes(4, "big"), "not known"),
        (212, (0x100 | 0x5).to_bytes(4, "big"), "not known"),
        (216, (0x10 | 0x3).to_bytes(4, "big"), "xfs_repair"),
        (100, (0xB4A4).to_bytes(2, "big"), "version 4"),
        (8, (1 << 40).to_bytes(8, "big"), "impossible"),
        (84, (0).to_bytes(4, "big"), "impossible"),
        (124, b"\x3f", "impossible"),
        (126, b"\1", "being made"),
    ],
)
def test_what_is_not_understood_is_refused(settled, tmp_path, at, by, reason):
    image = copy_sparse(settled, tmp_path / "image")
    patch_superblock(image, at=at, by=by)
    with pytest.raises(UnresolvedError, match=reason):
        open_filesystem(FileDisk(image))


def test_a_disk_that_was_cut_short_is_refused(settled, tmp_path):
    image = copy_sparse(settled, tmp_path / "image")
    os.truncate(image, 63 * MIB)
    with pytest.raises(UnresolvedError, match="there are only"):
        open_filesystem(FileDisk(image))


def test_a_log_on_another_device_leaves_its_filesystem_unresolved(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"")
    os.truncate(log, 64 * MIB)
    image = make(tmp_path / "image", "-l", f"logdev={log},size=32m")
    filesystem = open_filesystem(FileDisk(image))

    assert filesystem.identity.label == "stills"
    assert filesystem.fixed()[0][0] == 0
    with pytest.raises(UnresolvedError, match="another device"):
        filesystem.free()
    with pytest.raises(UnresolvedError, match="another device"):
        filesystem.root()


def test_a_file_on_a_realtime_device_is_refused_and_others_are_not(settled, tmp_path):
    image = copy_sparse(settled, tmp_path / "image")
    filesystem = open_filesystem(FileDisk(image))
    node = next(node for path, node in walk(filesystem) if path == "/folder/file")
    superblock = xfs_db(image, "sb 0", "print inopblog blocksize inodesize")
    block, within = divmod(node.number, 1 << field(superblock, "inopblog"))
    start = block * field(superblock, "blocksize") + within * field(superblock, "inodesize")
    change(image, start=start, length=512, checksum=100, at=90, by=struct.pack(">H", 1))

    filesystem = open_filesystem(FileDisk(image))
    with pytest.raises(UnresolvedError, match="realtime"):
        filesystem.runs(node)
    assert len(filesystem.runs(dict(walk(filesystem))["/other/file"])) == 1


def test_a_log_record_written_in_part_leaves_its_filesystem_unresolved(unsettled, tmp_path):
    image = copy_sparse(unsettled, tmp_path / "image")
    start, end = log_place(image)
    content = FileDisk(image).pread(offset=start, length=end - start)
    # The last record of the newest cycle: its last block still holds what was there before.
    records = [
        at for at in range(0, len(content), 512) if content.startswith(b"\xfe\xed\xba\xbe", at)
    ]
    last = max(records, key=lambda at: content[at + 16 : at + 24])
    length = int.from_bytes(content[last + 12 : last + 16], "big")
    with image.open("r+b") as file:
        file.seek(start + last + length)
        file.write(bytes(512))

    with pytest.raises(UnresolvedError, match="log"):
        open_filesystem(FileDisk(image)).free()
