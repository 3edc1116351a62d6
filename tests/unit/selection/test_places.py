"""What a disk is made of: partitions, logical volumes, what they hold, and what is opaque."""

import random
import struct
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillblock.selection import places as selection_places
from stillblock.selection.disk import MappedDisk, to_disk
from stillblock.selection.filesystems import Content
from stillblock.selection.lvm_text import LvmTextError, parse_lvm_text
from stillblock.selection.places import Place, Places
from unit.selection.lvm_images import (
    OTHER_ID,
    PV_ID,
    group_text,
    lvm2_volume,
    physical_volume,
    reseal_text,
    segment,
    volume,
)
from unit.selection.partition_images import (
    MIB,
    BytesDisk,
    FailingDisk,
    GptPart,
    blank,
    gpt_disk,
    logical_disk,
    mbr_disk,
    mbr_entry,
)

read_places = partial(selection_places.read_places, parse=parse_lvm_text)
"""With the text of volume groups read at once; that workers do it is tested with them."""

EXTENT = 64 * 1024


def put_ext(content: bytearray, offset: int) -> None:
    content[offset + 1080 : offset + 1082] = b"\x53\xef"


def put_swap(content: bytearray, offset: int) -> None:
    content[offset + 1024 : offset + 1028] = (1).to_bytes(4, "little")
    content[offset + 4086 : offset + 4096] = b"SWAPSPACE2"


def of(places: Places, name: str) -> Place:
    (found,) = (place for place in places.places if place.name == name)
    return found


def pieces_of(content: bytearray) -> dict[str, tuple[tuple[int, int], ...]]:
    return {place.name: place.pieces for place in read_places(BytesDisk(content)).places}


# Partitions -----------------------------------------------------------------------------------


def test_partitions_are_told_by_what_they_hold() -> None:
    disk = gpt_disk({1: GptPart(2048, 4095), 3: GptPart(4096, 6143), 4: GptPart(6144, 7167)})
    put_ext(disk.content, MIB)
    put_swap(disk.content, 2 * MIB)
    places = read_places(disk)
    assert [place.name for place in places.places] == ["part:1", "part:3", "part:4"]
    assert [place.content for place in places.places] == [Content.EXT, Content.SWAP, None]
    assert [place.name for place in places.filesystems] == ["part:1"]
    assert [place.name for place in places.swap] == ["part:3"]
    assert of(places, "part:3").extents == ((2 * MIB, 3 * MIB),)
    assert of(places, "part:3").number == 3
    assert places.notes == ()


def test_logical_partitions_are_places_and_their_container_is_none() -> None:
    assert [place.name for place in read_places(logical_disk()).places] == [
        "part:1",
        "part:5",
        "part:6",
    ]


def test_a_filesystem_on_the_bare_disk_is_the_only_place() -> None:
    disk = blank(MIB)
    put_ext(disk.content, 0)
    (place,) = read_places(disk).places
    assert (place.name, place.content, place.extents) == ("disk", Content.EXT, ((0, MIB),))
    assert place.number is None


def test_a_filesystem_beside_a_partition_table_makes_the_disk_opaque() -> None:
    """One of the two is left over, and only the user knows which."""
    disk = mbr_disk(mbr_entry(start=2048, count=2048))
    put_ext(disk.content, MIB)
    put_ext(disk.content, 0)
    places = read_places(disk)
    assert places.filesystems == ()
    assert "it holds ext as well as a partition table" in places.notes[0]


def test_a_damaged_table_makes_the_disk_opaque_instead_of_failing() -> None:
    places = read_places(mbr_disk(mbr_entry(start=2048, count=100_000)))
    assert places.filesystems == ()
    assert "past the end of the disk" in places.notes[0]


def test_what_looks_like_two_things_is_opaque() -> None:
    disk = blank(MIB)
    put_ext(disk.content, 0)
    put_swap(disk.content, 0)
    places = read_places(disk)
    assert (places.filesystems, places.swap) == ((), ())
    assert "several things: ext, swap" in places.notes[0]


def test_luks_is_opaque_and_said_to_be() -> None:
    disk = blank(MIB)
    disk.content[:6] = b"LUKS\xba\xbe"
    assert read_places(disk).notes == (
        '"disk" is opaque and kept whole: it holds luks, which is opaque',
    )


def test_an_empty_disk_has_no_places() -> None:
    assert read_places(blank(0)).places == ()


# LVM2 -----------------------------------------------------------------------------------------


@pytest.mark.needs("lvm", "losetup")
def test_volumes_that_lvm2_wrote_lie_where_its_text_says(tmp_path: Path) -> None:
    """Segments out of order, as after an extension; read back through the mapped disk."""
    image = tmp_path / "pv.img"

    def described(name: str, *segments: tuple[int, int, int]) -> str:
        parts = "\n".join(
            f"segment{index + 1} {{\nstart_extent = {start}\nextent_count = {count}\n"
            f'type = "striped"\nstripe_count = 1\nstripes = [ "pv0", {pe} ]\n}}'
            for index, (start, count, pe) in enumerate(segments)
        )
        identity = f"{name:A<6}-AAAA-AAAA-AAAA-AAAA-AAAA-AAAAAA"
        return (
            f'{name} {{\nid = "{identity}"\nstatus = ["READ", "WRITE", "VISIBLE"]\nflags = []\n'
            f"segment_count = {len(segments)}\n{parts}\n}}"
        )

    lvm2_volume(
        image, described("root", (0, 5, 8), (5, 4, 0)) + "\n" + described("home", (0, 3, 20))
    )
    content = bytearray(image.read_bytes())
    # Mark every extent with its own number: the first data lies at 1 MiB.
    for extent in range(63):
        struct.pack_into("<I", content, (1 + extent) * MIB + 512 * 1024, extent)
    places = read_places(BytesDisk(content))
    root = of(places, "lv:vg0/root")
    assert root.pieces == ((9 * MIB, 14 * MIB), (1 * MIB, 5 * MIB))
    assert of(places, "lv:vg0/home").pieces == ((21 * MIB, 24 * MIB),)
    assert places.groups == (("vg0", ((0, 64 * MIB),)),)
    mapped = root.disk(BytesDisk(content))
    assert mapped.size == 9 * MIB
    order = [
        struct.unpack("<I", mapped.pread(offset=n * MIB + 512 * 1024, length=4))[0]
        for n in range(9)
    ]
    assert order == [8, 9, 10, 11, 12, 0, 1, 2, 3]


@pytest.mark.parametrize("at", [512, 60_000, 65_500])
def test_metadata_is_read_from_its_ring(at: int) -> None:
    text = group_text(volume("root", segment(0, 4, "pv0", 2)))
    assert pieces_of(physical_volume(text, at=at))["lv:vg0/root"] == (
        (MIB + 2 * EXTENT, MIB + 6 * EXTENT),
    )


def two_partitions(first: bytearray, second: bytearray) -> BytesDisk:
    disk = gpt_disk(
        {1: GptPart(2048, 2048 + 16383), 2: GptPart(20480, 20480 + 16383)}, size=20 * MIB
    )
    disk.content[MIB : MIB + len(first)] = first
    disk.content[10 * MIB : 10 * MIB + len(second)] = second
    return disk


def test_a_volume_over_two_partitions_of_the_disk_is_mapped() -> None:
    text = group_text(
        volume("data", segment(0, 2, "pv1", 0), segment(2, 3, "pv0", 5)), ids=(PV_ID, OTHER_ID)
    )
    disk = two_partitions(physical_volume(text), physical_volume(None, identity=OTHER_ID))
    data = of(read_places(disk), "lv:vg0/data")
    assert data.pieces == (
        (11 * MIB, 11 * MIB + 2 * EXTENT),
        (2 * MIB + 5 * EXTENT, 2 * MIB + 8 * EXTENT),
    )


def test_the_newest_metadata_of_a_group_holds() -> None:
    ids = (PV_ID, OTHER_ID)
    old = group_text(volume("data", segment(0, 1, "pv0", 0)), seqno=3, ids=ids)
    new = group_text(volume("data", segment(0, 1, "pv0", 7)), seqno=4, ids=ids)
    disk = two_partitions(physical_volume(old), physical_volume(new, identity=OTHER_ID))
    assert of(read_places(disk), "lv:vg0/data").pieces == (
        (2 * MIB + 7 * EXTENT, 2 * MIB + 8 * EXTENT),
    )


def test_a_volume_that_reaches_beyond_the_disk_is_opaque() -> None:
    text = group_text(
        volume("far", segment(0, 2, "pv0", 0), segment(2, 3, "pv1", 5)),
        volume("near", segment(0, 2, "pv0", 10)),
        ids=(PV_ID, OTHER_ID),
    )
    places = read_places(BytesDisk(physical_volume(text)))
    assert of(places, "lv:vg0/far").opaque_reason == (
        'part of it lies on "pv1", which is not on this disk'
    )
    assert of(places, "lv:vg0/near").pieces


@pytest.mark.parametrize(
    ("volumes", "reason"),
    [
        (
            (
                volume("root", segment(0, 2, "pv0", 0)),
                volume("keep", segment(0, 2, "pv0", 4)),
                volume(
                    "snapshot0",
                    "segment1 { start_extent = 0 extent_count = 2 "
                    'type = "snapshot" chunk_size = 8 origin = "root" cow_store = "keep" }',
                    status='"READ", "WRITE"',
                ),
            ),
            "part of a snapshot",
        ),
        (
            (
                volume(
                    "root",
                    'segment1 { start_extent = 0 extent_count = 2 type = "thin" '
                    'thin_pool = "pool" transaction_id = 0 device_id = 1 }',
                ),
            ),
            'a segment of type "thin"',
        ),
        (
            (
                volume(
                    "root",
                    'segment1 { start_extent = 0 extent_count = 2 type = "striped" '
                    'stripe_count = 2 stripe_size = 128 stripes = ["pv0", 0, "pv0", 4] }',
                ),
            ),
            'a segment of type "striped"',
        ),
        ((volume("root", segment(0, 2, "pv0", 0), status='"READ", "WRITE"'),), "hidden"),
        (
            (volume("root", segment(0, 2, "pv0", 0), status='"READ", "VISIBLE", "PVMOVE"'),),
            'its status is "PVMOVE"',
        ),
    ],
)
def test_what_is_not_linear_is_opaque_with_its_reason(
    volumes: tuple[str, ...], reason: str
) -> None:
    content = physical_volume(group_text(*volumes))
    put_ext(content, MIB)
    places = read_places(BytesDisk(content))
    assert reason in of(places, "lv:vg0/root").opaque_reason
    assert places.filesystems == ()


def test_a_snapshot_makes_its_store_opaque_too() -> None:
    text = group_text(
        volume("root", segment(0, 2, "pv0", 0)),
        volume("store", segment(0, 2, "pv0", 4)),
        volume(
            "snapshot0",
            'segment1 { start_extent = 0 extent_count = 2 type = "snapshot" origin = "root" '
            'cow_store = "store" }',
        ),
    )
    places = read_places(BytesDisk(physical_volume(text)))
    assert of(places, "lv:vg0/store").opaque_reason


@pytest.mark.parametrize(
    ("volumes", "reason"),
    [
        ((volume("a", segment(0, 4, "pv0", 0)), volume("b", segment(0, 1, "pv0", 3))), "overlap"),
        ((volume("a", segment(0, 4, "pv0", 98)),), "ends past its physical volume"),
        ((volume("a", segment(1, 4, "pv0", 0)),), "malformed"),
        ((volume("a", segment(0, 0, "pv0", 0)),), "malformed"),
        ((volume("a", segment(0, 1, "pv0", 0)), volume("a", segment(0, 1, "pv0", 5))), "new name"),
        (('a { status = ["VISIBLE"] }',), "no number segment_count"),
    ],
)
def test_metadata_that_contradicts_itself_makes_its_volumes_opaque(
    volumes: tuple[str, ...], reason: str
) -> None:
    places = read_places(BytesDisk(physical_volume(group_text(*volumes))))
    (place,) = places.places
    assert (place.name, place.is_filesystem) == ("disk", False)
    assert reason in place.opaque_reason
    assert reason in places.notes[0]


@pytest.mark.parametrize(
    ("offset", "reason"),
    [
        (512 + 40, "label is damaged"),
        (4096 + 60, "header of the LVM2 metadata area is damaged"),
        (4096 + 512 + 30, "fails its checksum"),
    ],
)
def test_a_flipped_bit_makes_the_volume_opaque(offset: int, reason: str) -> None:
    content = physical_volume(group_text(volume("root", segment(0, 4, "pv0", 2))))
    content[offset] ^= 1
    (place,) = read_places(BytesDisk(content)).places
    assert reason in place.opaque_reason


def test_metadata_that_is_being_written_is_read_again() -> None:
    class Torn(BytesDisk):
        def pread(self, *, offset: int, length: int) -> bytes:
            data = super().pread(offset=offset, length=length)
            if offset == 4096 + 512 and len(self.reads) < 10:
                self.reads += [(0, 0)] * 10
                return bytes(length)
            return data

    disk = Torn(physical_volume(group_text(volume("root", segment(0, 4, "pv0", 2)))))
    assert of(read_places(disk), "lv:vg0/root").pieces


def test_two_versions_with_one_number_are_not_guessed_between() -> None:
    ids = (PV_ID, OTHER_ID)
    one = group_text(volume("data", segment(0, 1, "pv0", 0)), ids=ids)
    two = group_text(volume("data", segment(0, 1, "pv0", 7)), ids=ids)
    places = read_places(
        two_partitions(physical_volume(one), physical_volume(two, identity=OTHER_ID))
    )
    assert [place.name for place in places.places] == ["part:1", "part:2"]
    assert all("two versions" in place.opaque_reason for place in places.places)


def test_any_text_with_good_checksums_is_read_or_opaque() -> None:
    """A guest can write what it likes: only its own volumes become opaque, nothing else happens."""
    seed = random.Random(4)
    good = physical_volume(group_text(volume("root", segment(0, 4, "pv0", 2))))
    (size,) = struct.unpack_from("<Q", good, 4096 + 48)
    for _ in range(300):
        content = bytearray(good)
        for _ in range(seed.randint(1, 6)):
            place = 4096 + 512 + seed.randrange(size)
            content[place] = seed.choice(b'{}[]=",#\\ 0123456789abcpvx\0\xff')
        reseal_text(content)
        places = read_places(BytesDisk(content))
        # A group without volumes is one too: then there is no place at all.
        for found in places.places:
            assert all(0 <= start < end <= len(content) for start, end in found.pieces)


@given(st.text('{}[]=",#\\ \n09az_.-', max_size=60))
def test_any_text_is_metadata_or_an_error(text: str) -> None:
    try:
        parse_lvm_text(text)
    except LvmTextError:
        pass


def test_metadata_nested_without_an_end_is_refused() -> None:
    with pytest.raises(LvmTextError):
        parse_lvm_text("a {" * 10_000)


# Mapped disks ---------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.randoms(), st.data())
def test_a_mapped_disk_reads_and_translates_like_its_pieces_side_by_side(
    lengths: list[int], shuffle: random.Random, data: st.DataObject
) -> None:
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    pieces = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    shuffle.shuffle(pieces)
    below = BytesDisk(bytearray(range(sum(lengths))))
    expected = [byte for start, end in pieces for byte in range(start, end)]
    mapped = MappedDisk(below, tuple(pieces))
    start = data.draw(st.integers(0, len(expected)))
    end = data.draw(st.integers(start, len(expected)))
    assert mapped.size == len(expected)
    assert list(mapped.pread(offset=start, length=end - start)) == expected[start:end]
    translated = [byte for a, b in to_disk(tuple(pieces), ((start, end),)) for byte in range(a, b)]
    assert translated == sorted(expected[start:end])


# What was told wrongly once ---------------------------------------------------------------------


def test_no_text_makes_lvm_slow() -> None:
    """Whoever writes the disk writes this text; it was read in time that doubled with each mark."""
    with pytest.raises(LvmTextError):
        parse_lvm_text("#" * 100_000 + "\n!")


def two_physical_volumes(first: bytearray, second: bytearray) -> BytesDisk:
    parts = {1: GptPart(2048, 2048 * 9 - 1), 2: GptPart(2048 * 9, 2048 * 17 - 1)}
    disk = gpt_disk(parts, size=18 * MIB)
    disk.content[MIB : 9 * MIB] = first
    disk.content[9 * MIB : 17 * MIB] = second
    return disk


def test_a_group_has_its_members_without_a_copy_of_the_text_too() -> None:
    """Half of a striped volume lay on one, and an inclusion of the volume left it out."""
    text = group_text(volume("data", segment(0, 2, "pv0", 0)), ids=(PV_ID, OTHER_ID))
    disk = two_physical_volumes(physical_volume(text), physical_volume(None, identity=OTHER_ID))
    assert read_places(disk).groups == (("vg0", ((MIB, 17 * MIB),)),)


def test_logical_volumes_of_two_groups_that_overlap_are_opaque() -> None:
    first = group_text(volume("a", segment(0, 2, "pv0", 0)), ids=(PV_ID, OTHER_ID))
    second = group_text(volume("b", segment(0, 2, "pv0", 0)), ids=(PV_ID, OTHER_ID))
    second = second.replace("vg0 {", "vg1 {").replace('id = "group"', 'id = "another"')
    places = read_places(
        two_physical_volumes(physical_volume(first), physical_volume(second, identity=OTHER_ID))
    )
    assert {place.name for place in places.places} == {"part:1", "part:2"}
    assert all("overlap" in place.opaque_reason for place in places.places)


@pytest.mark.parametrize("at", [MIB - 64 * 1024, MIB - 8 * 1024])
def test_a_member_of_a_raid_is_opaque_where_its_superblock_is_at_the_end(at: int) -> None:
    disk = gpt_disk({1: GptPart(2048, 4095)}, size=3 * MIB)
    put_swap(disk.content, MIB)
    disk.content[MIB + at : MIB + at + 4] = b"\xfc\x4e\x2b\xa9"
    places = read_places(disk)
    assert "RAID" in of(places, "part:1").opaque_reason
    assert places.swap == ()


def test_ten_stale_bytes_are_no_swap() -> None:
    disk = gpt_disk({1: GptPart(2048, 4095)}, size=3 * MIB)
    disk.content[MIB + 4086 : MIB + 4096] = b"SWAPSPACE2"
    places = read_places(disk)
    assert places.swap == ()
    assert "header" in of(places, "part:1").opaque_reason


def test_a_place_whose_beginning_cannot_be_read_is_opaque() -> None:
    sound = gpt_disk({1: GptPart(2048, 4095), 2: GptPart(4096, 6143)}, size=4 * MIB)
    put_ext(sound.content, 2 * MIB)
    places = read_places(FailingDisk(sound, (MIB + 512, MIB + 513)))
    assert "bad sector" in of(places, "part:1").opaque_reason
    assert of(places, "part:2").content is Content.EXT
