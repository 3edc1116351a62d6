"""Partition tables: what is read, what is refused, what is no table at all."""

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillblock.errors import OriginIOError, RuleError
from stillblock.selection import PartitionTable, PartitionTableError, read_partitions
from stillblock.selection.gpt import ENTRY_COUNT_MAX
from stillblock.selection.mbr import LOGICAL_COUNT_MAX
from unit.selection.partition_images import (
    EFI,
    LINUX,
    MIB,
    SWAP,
    BytesDisk,
    GptPart,
    blank,
    boot_record,
    fat_boot_sector,
    gpt_disk,
    logical_disk,
    mbr_disk,
    mbr_entry,
    protective_mbr,
    put_record,
    reseal_gpt,
    reseal_header,
)

TWO_PARTS = {1: GptPart(2048, 4095, type=EFI, name="ESP"), 2: GptPart(4096, 6143, name="data")}


def table_of(disk: BytesDisk) -> PartitionTable:
    table = read_partitions(disk)
    assert table is not None
    return table


def refusal_of(disk: BytesDisk) -> str:
    with pytest.raises(PartitionTableError) as caught:
        read_partitions(disk)
    return str(caught.value)


# GPT ------------------------------------------------------------------------------------------


def test_a_gpt_partition_has_its_last_sector() -> None:
    """EndingLBA is inclusive. A parser that takes it for the end loses the last sector of every
    partition; a widely used one did, and left that sector unprotected."""
    disk = gpt_disk({1: GptPart(2048, 2048), 2: GptPart(4096, 6143)})
    assert [p.extent for p in table_of(disk).partitions] == [
        (2048 * 512, 2049 * 512),
        (4096 * 512, 6144 * 512),
    ]


def test_a_gpt_is_read_with_all_its_fields() -> None:
    unique = "90c5ca8f-0000-4000-8000-00000000abcd"
    disk = gpt_disk({3: GptPart(2048, 4095, type=SWAP, name="Tausch", uuid=unique, attributes=5)})
    table = table_of(disk)
    assert (table.kind, table.sector_size, table.notes) == ("gpt", 512, ())
    assert table.disk_id == "11111111-2222-3333-4444-555555555555"
    (partition,) = table.partitions
    assert (partition.number, partition.name, partition.type) == (3, "Tausch", SWAP)
    assert partition.uuid == unique
    assert partition.flags == ("required", "legacy-boot")


def test_a_gpt_with_4096_byte_sectors_is_recognised_by_where_its_header_is() -> None:
    disk = gpt_disk({1: GptPart(256, 511)}, sector_size=4096)
    table = table_of(disk)
    assert table.sector_size == 4096
    assert table.partitions[0].extent == (MIB, 2 * MIB)


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("place", ["header", "entries"])
def test_a_damaged_primary_gpt_gives_way_to_the_backup_with_a_note(
    sector_size: int, place: str
) -> None:
    disk = gpt_disk({1: GptPart(300, 400, name="data")}, sector_size=sector_size)
    disk.content[sector_size + 40 if place == "header" else 2 * sector_size + 33] ^= 1
    table = table_of(disk)
    assert [p.name for p in table.partitions] == ["data"]
    assert "primary GPT is damaged" in table.notes[0]
    assert "CRC" in table.notes[0]


def test_a_wiped_primary_gpt_gives_way_to_the_backup() -> None:
    disk = gpt_disk(TWO_PARTS)
    disk.content[512 : 34 * 512] = bytes(33 * 512)
    assert [p.number for p in table_of(disk).partitions] == [1, 2]


def test_a_damaged_backup_gpt_is_noted() -> None:
    disk = gpt_disk(TWO_PARTS)
    disk.content[-512] ^= 1
    table = table_of(disk)
    assert len(table.partitions) == 2
    assert "backup GPT is not usable" in table.notes[0]


def test_a_backup_that_says_something_else_is_noted_and_the_primary_holds() -> None:
    disk = gpt_disk(TWO_PARTS)
    other = gpt_disk({1: GptPart(2048, 6143)})
    disk.content[-33 * 512 :] = other.content[-33 * 512 :]
    table = table_of(disk)
    assert len(table.partitions) == 2
    assert "something else" in table.notes[0]


def test_a_grown_disk_is_noted() -> None:
    disk = gpt_disk(TWO_PARTS)
    disk.content += bytes(MIB)
    assert table_of(disk).notes == (
        "the backup GPT is not at the end of the disk: the disk was grown",
    )


def test_a_gpt_damaged_in_both_places_is_refused() -> None:
    disk = gpt_disk(TWO_PARTS)
    disk.content[512 + 40] ^= 1
    disk.content[-512 + 40] ^= 1
    message = refusal_of(disk)
    assert "primary (512-byte sectors): its header's CRC is wrong" in message
    assert "backup (512-byte sectors)" in message


def test_a_gpt_disk_cut_short_is_refused() -> None:
    disk = gpt_disk(TWO_PARTS)
    del disk.content[3 * MIB :]
    assert "not on this disk" in refusal_of(disk)


def test_a_protective_mbr_without_any_gpt_is_refused() -> None:
    disk = blank(MIB)
    disk.content[:512] = protective_mbr()
    assert "none is found" in refusal_of(disk)


def test_a_gpt_without_protective_mbr_is_refused() -> None:
    disk = gpt_disk(TWO_PARTS, mbr=bytes(512))
    assert "no protective MBR" in refusal_of(disk)


def test_a_stale_gpt_behind_a_real_mbr_does_not_hold() -> None:
    disk = gpt_disk(TWO_PARTS, mbr=boot_record(mbr_entry(start=2048, count=2048)))
    table = table_of(disk)
    assert table.kind == "mbr"
    assert any("does not hold" in note for note in table.notes)


def test_in_a_hybrid_mbr_the_gpt_holds() -> None:
    disk = gpt_disk(TWO_PARTS, mbr=protective_mbr(mbr_entry(start=4096, count=2048)))
    table = table_of(disk)
    assert table.kind == "gpt"
    assert len(table.partitions) == 2
    assert "hybrid" in table.notes[-1]


def test_two_whole_gpts_of_different_sector_sizes_are_refused() -> None:
    disk = gpt_disk({1: GptPart(2048, 4095)})
    other = gpt_disk({1: GptPart(256, 511)}, sector_size=4096)
    # Its entries are moved behind those of the other, so that both are whole.
    disk.content[32768 : 32768 + 16384] = other.content[8192 : 8192 + 16384]
    disk.content[4096 : 4096 + 92] = other.content[4096 : 4096 + 92]
    struct.pack_into("<Q", disk.content, 4096 + 72, 8)
    reseal_header(disk, offset=4096)
    # The first one's entries now hold the second one's header: they move too.
    disk.content[65536 : 65536 + 16384] = disk.content[1024 : 1024 + 16384]
    struct.pack_into("<Q", disk.content, 512 + 72, 128)
    reseal_gpt(disk)
    assert "two whole GPT headers" in refusal_of(disk)


def test_overlapping_gpt_partitions_are_refused() -> None:
    disk = gpt_disk({1: GptPart(2048, 4096), 2: GptPart(4096, 6143)})
    assert "part:1 linux 1 MiB and part:2 linux 1 MiB overlap by 512 B" in refusal_of(disk)


def test_a_gpt_partition_past_the_end_is_refused() -> None:
    disk = gpt_disk({1: GptPart(2048, 100_000)})
    assert "past the end of the disk" in refusal_of(disk)


def test_a_gpt_partition_that_ends_before_it_starts_is_refused() -> None:
    assert "cannot be" in refusal_of(gpt_disk({1: GptPart(4096, 2048)}))


def test_a_gpt_partition_outside_the_usable_blocks_is_noted() -> None:
    table = table_of(gpt_disk({1: GptPart(10, 4000)}))
    assert "is not within the blocks" in table.notes[0]


@pytest.mark.parametrize(
    ("offset", "layout", "value"),
    [
        (80, "<I", ENTRY_COUNT_MAX + 1),
        (80, "<I", 0xFFFFFFFF),
        (84, "<I", 0xFFFFFFFF),
        (84, "<I", 0),
        (84, "<I", 100),
        (72, "<Q", 2**64 - 1),
        (72, "<Q", 0),
        (12, "<I", 0xFFFFFFFF),
        (24, "<Q", 7),
        (48, "<Q", 2**63),
        (8, "<I", 0x00020000),
    ],
)
def test_a_sealed_header_that_demands_the_impossible_is_not_believed(
    offset: int, layout: str, value: int
) -> None:
    disk = gpt_disk(TWO_PARTS)
    for header in (512, len(disk.content) - 512):
        struct.pack_into(layout, disk.content, header + offset, value)
        reseal_header(disk, offset=header)
    refusal_of(disk)
    assert max(length for _, length in disk.reads) <= 4 * MIB


def test_gpt_entries_of_256_bytes_are_read() -> None:
    disk = gpt_disk({2: GptPart(2048, 4095, name="wide")}, entry_bytes=256)
    assert [(p.number, p.name) for p in table_of(disk).partitions] == [(2, "wide")]


def test_a_name_from_the_disk_cannot_act_on_the_terminal() -> None:
    disk = gpt_disk({1: GptPart(2048, 4095, name='x\x1b[2J"')})
    (partition,) = table_of(disk).partitions
    assert partition.name == 'x\x1b[2J"'
    assert partition.label == 'part:1 "x\\x1b[2J\\"" linux 1 MiB'


# MBR ------------------------------------------------------------------------------------------


def test_an_mbr_is_read_with_all_its_fields() -> None:
    disk = mbr_disk(
        mbr_entry(status=0x80, start=2048, count=2048),
        bytes(16),
        mbr_entry(type=0x82, start=4096, count=4096),
    )
    table = table_of(disk)
    assert (table.kind, table.disk_id, table.notes) == ("mbr", "90a1b2c3", ())
    boot, swap = table.partitions
    assert (boot.number, boot.extent, boot.flags) == (1, (MIB, 2 * MIB), ("active",))
    assert (swap.number, swap.type, swap.uuid) == (3, "0x82", "90a1b2c3-03")


def test_an_mbr_without_disk_signature_gives_no_uuids() -> None:
    disk = mbr_disk(mbr_entry(start=2048, count=6144), signature=0)
    assert table_of(disk).partitions[0].uuid == ""


def test_logical_partitions_count_from_five() -> None:
    table = table_of(logical_disk())
    assert [(p.number, p.extent, p.flags) for p in table.partitions] == [
        (1, (MIB, 2 * MIB), ("active",)),
        (2, (2 * MIB, 8 * MIB), ("extended",)),
        (5, (3 * MIB, 4 * MIB), ("logical",)),
        (6, (5 * MIB, 6 * MIB), ("logical",)),
    ]
    assert table.covered == ((MIB, 2 * MIB), (3 * MIB, 4 * MIB), (5 * MIB, 6 * MIB))


def test_the_first_logical_record_tells_4096_byte_sectors() -> None:
    table = table_of(logical_disk(sector_size=4096))
    assert table.sector_size == 4096
    assert [p.extent for p in table.partitions if "logical" in p.flags] == [
        (3 * MIB, 4 * MIB),
        (5 * MIB, 6 * MIB),
    ]


def test_an_extended_partition_that_was_never_written_is_empty() -> None:
    disk = mbr_disk(mbr_entry(type=0x0F, start=2048, count=6144))
    table = table_of(disk)
    assert [p.number for p in table.partitions] == [1]
    assert "never written" in table.notes[0]


def test_an_empty_record_in_the_chain_takes_no_number() -> None:
    disk = logical_disk()
    put_record(disk, 2 * MIB, bytes(16), mbr_entry(type=0x05, start=4096, count=4096))
    assert [p.number for p in table_of(disk).partitions] == [1, 2, 5]


def test_a_loop_of_logical_partitions_is_refused() -> None:
    disk = logical_disk()
    put_record(
        disk, 4 * MIB, mbr_entry(start=2048, count=2048), mbr_entry(type=0x05, start=4096, count=1)
    )
    assert "comes back to byte 4194304" in refusal_of(disk)


def test_a_logical_record_outside_its_extended_partition_is_refused() -> None:
    disk = logical_disk()
    put_record(disk, 4 * MIB, bytes(16), mbr_entry(type=0x05, start=6 * 2048, count=1))
    assert "outside" in refusal_of(disk)


def test_a_logical_partition_outside_its_extended_partition_is_refused() -> None:
    disk = logical_disk()
    put_record(disk, 4 * MIB, mbr_entry(start=2048, count=5 * 2048))
    assert "outside" in refusal_of(disk)


def test_a_logical_partition_over_a_record_is_refused() -> None:
    disk = logical_disk()
    put_record(
        disk,
        2 * MIB,
        mbr_entry(start=2048, count=2 * 2048),
        mbr_entry(type=0x05, start=4096, count=4096),
    )
    assert "covers the record" in refusal_of(disk)


def test_a_missing_record_in_the_chain_is_refused() -> None:
    disk = logical_disk()
    disk.content[4 * MIB : 4 * MIB + 512] = bytes(512)
    assert "no record at byte 4194304" in refusal_of(disk)


def test_an_endless_chain_of_logical_partitions_is_refused_after_a_bounded_number_of_reads() -> (
    None
):
    count = LOGICAL_COUNT_MAX + 10
    disk = mbr_disk(mbr_entry(type=0x05, start=2, count=2 * count + 2))
    for i in range(count):
        put_record(
            disk,
            1024 * (i + 1),
            mbr_entry(start=1, count=1),
            mbr_entry(type=0x05, start=2 * (i + 1), count=2),
        )
    assert "more than 256" in refusal_of(disk)
    assert len(disk.reads) < LOGICAL_COUNT_MAX + 10


def test_two_extended_partitions_are_refused() -> None:
    disk = mbr_disk(
        mbr_entry(type=0x05, start=2048, count=2048), mbr_entry(type=0x0F, start=4096, count=4096)
    )
    assert "both extended" in refusal_of(disk)


def test_an_mbr_partition_past_the_end_is_refused() -> None:
    message = refusal_of(mbr_disk(mbr_entry(start=2048, count=100_000)))
    assert "past the end of the disk (4194304 bytes, 4 MiB)" in message
    assert "cut short" in message


def test_overlapping_mbr_partitions_are_refused() -> None:
    disk = mbr_disk(mbr_entry(start=2048, count=4096), mbr_entry(start=4096, count=4096))
    assert "overlap by 1 MiB" in refusal_of(disk)


def test_an_mbr_that_would_fit_4096_byte_sectors_too_is_noted() -> None:
    disk = mbr_disk(mbr_entry(start=256, count=256))
    assert "read in sectors of 512" in table_of(disk).notes[0]


def test_a_slot_with_a_size_but_no_type_is_noted() -> None:
    disk = mbr_disk(mbr_entry(start=2048, count=2048), mbr_entry(type=0, start=4096, count=4096))
    table = table_of(disk)
    assert [p.number for p in table.partitions] == [1]
    assert any("slot 2" in note for note in table.notes)


def test_an_mbr_without_partitions_is_a_table() -> None:
    assert table_of(mbr_disk()).partitions == ()


# No table -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 4096, MIB])
def test_a_blank_disk_has_no_table(size: int) -> None:
    assert read_partitions(blank(size)) is None


def test_a_fat_filesystem_on_the_whole_disk_is_no_table() -> None:
    disk = blank(4 * MIB)
    disk.content[:512] = fat_boot_sector()
    assert read_partitions(disk) is None


@pytest.mark.parametrize(
    "entry",
    [
        mbr_entry(start=2048, count=0xFFFFFF),
        mbr_entry(start=0, count=100),
        mbr_entry(status=0x20, start=2048, count=100),
    ],
)
def test_boot_code_that_looks_like_entries_does_not_make_a_fat_a_table(entry: bytes) -> None:
    disk = blank(4 * MIB)
    disk.content[:512] = fat_boot_sector()
    disk.content[446:462] = entry
    assert read_partitions(disk) is None


@pytest.mark.parametrize("oem", [b"NTFS    ", b"EXFAT   "])
def test_an_ntfs_or_exfat_on_the_whole_disk_is_no_table(oem: bytes) -> None:
    disk = blank(4 * MIB)
    disk.content[:512] = (b"\xeb\x52\x90" + oem).ljust(510, b"\0") + b"\x55\xaa"
    assert read_partitions(disk) is None


def test_a_boot_loader_with_a_jump_keeps_its_table() -> None:
    disk = mbr_disk(mbr_entry(start=2048, count=6144))
    disk.content[:3] = b"\xeb\x63\x90"
    assert len(table_of(disk).partitions) == 1


def test_a_disk_that_returns_too_little_is_not_padded() -> None:
    class Short(BytesDisk):
        def pread(self, *, offset: int, length: int) -> bytes:
            return super().pread(offset=offset, length=length)[:-1]

    with pytest.raises(OriginIOError, match="gave 511"):
        read_partitions(Short(bytearray(4096)))


# Hostile --------------------------------------------------------------------------------------


def assert_read_or_refused(disk: BytesDisk) -> None:
    """A guest can make us refuse, never crash, hang, over-read, or see partitions off the disk."""
    try:
        table = read_partitions(disk)
    except RuleError:
        table = None
    assert len(disk.reads) < 2 * LOGICAL_COUNT_MAX
    if table is not None:
        assert all(0 < p.start < p.end <= disk.size for p in table.partitions)
        plain = sorted(p.extent for p in table.partitions if not p.is_container)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(plain))


@given(st.binary(max_size=2048), st.booleans())
def test_random_bytes_are_refused_or_read_never_more(data: bytes, is_signed: bool) -> None:
    disk = BytesDisk(bytearray(data))
    if is_signed and disk.size >= 512:
        disk.content[510:512] = b"\x55\xaa"
    assert_read_or_refused(disk)


mutations = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8)


@given(mutations, st.sampled_from([512, 4096]), st.booleans())
def test_mutated_gpts_are_refused_or_read_never_more(
    changes: list[tuple[int, int]], sector_size: int, is_sealed: bool
) -> None:
    disk = gpt_disk(
        {1: GptPart(64, 70), 2: GptPart(71, 90)}, size=MIB, sector_size=sector_size, entry_count=8
    )
    for position, value in changes:
        # The header and the first two entries, where something can happen.
        disk.content[sector_size + position % (92 if position % 2 else sector_size + 256)] = value
    if is_sealed:
        entries_lba, count, size = struct.unpack_from("<QII", disk.content, sector_size + 72)
        if entries_lba < 1000 and count * size < MIB:
            reseal_gpt(disk, offset=sector_size, sector_size=sector_size)
        else:
            reseal_header(disk, offset=sector_size)
    assert_read_or_refused(disk)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 2, 3, 4]),
            st.integers(0, 3),
            st.integers(0, 15),
            st.integers(0, 255),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_mutated_chains_are_refused_or_read_never_more(
    changes: list[tuple[int, int, int, int]],
) -> None:
    disk = small_chain
    before = bytes(disk.content)
    disk.reads.clear()
    for record, slot, position, value in changes:
        disk.content[record * 1024 + 446 + slot * 16 + position] = value
    try:
        assert_read_or_refused(disk)
    finally:
        disk.content[:] = before


def _small_chain() -> BytesDisk:
    """Four logical partitions, with records close enough for one changed byte to matter."""
    disk = mbr_disk(mbr_entry(type=0x05, start=2, count=20), size=16384)
    for i in range(4):
        link = () if i == 3 else (mbr_entry(type=0x05, start=2 * (i + 1), count=2),)
        put_record(disk, 1024 * (i + 1), mbr_entry(start=1, count=1), *link)
    return disk


small_chain = _small_chain()


def test_the_small_chain_is_valid_before_it_is_mutated() -> None:
    assert [p.number for p in table_of(_small_chain()).partitions] == [1, 5, 6, 7, 8]
    assert LINUX in {p.type for p in table_of(gpt_disk({1: GptPart(64, 70)}, size=MIB)).partitions}
