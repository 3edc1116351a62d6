"""Rules on a disk: which blocks, decided by whom, what is left out and why."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillblock.errors import RuleError
from stillblock.selection import PartitionTableError, Resolution, Rules, resolve
from unit.selection.partition_images import (
    EFI,
    MIB,
    SWAP,
    BytesDisk,
    GptPart,
    blank,
    fat_boot_sector,
    gpt_disk,
    logical_disk,
    mbr_disk,
    mbr_entry,
)

SIZE = 4 * MIB


def rules_of(*terms: str) -> Rules:
    """`+all` includes, `-part:2` excludes."""
    return Rules.parse([("include" if term[0] == "+" else "exclude", term[1:]) for term in terms])


def resolved(disk: BytesDisk, *terms: str, block_size: int = 4096) -> Resolution:
    return resolve(rules_of(*terms), disk, block_size=block_size)


def refusal_of(disk: BytesDisk, *terms: str) -> str:
    with pytest.raises(RuleError) as caught:
        resolved(disk, *terms)
    return str(caught.value)


@pytest.fixture
def disk() -> BytesDisk:
    """1 MiB-2 MiB the ESP, 2 MiB-3 MiB data, 3 MiB-3.5 MiB swap."""
    return gpt_disk(
        {
            1: GptPart(2048, 4095, type=EFI, name="ESP"),
            2: GptPart(4096, 6143, name="data", uuid="90c5ca8f-0000-4000-8000-00000000abcd"),
            5: GptPart(6144, 7167, type=SWAP),
        }
    )


# What rules mean ------------------------------------------------------------------------------


def test_no_rules_mean_all(disk: BytesDisk) -> None:
    result = resolved(disk)
    assert result.extents == ((0, SIZE),)
    assert (result.terms, result.excluded) == ((), ())


def test_a_list_that_starts_with_an_exclusion_starts_from_all(disk: BytesDisk) -> None:
    result = resolved(disk, "-1MiB-2MiB")
    assert result.extents == ((0, MIB), (2 * MIB, SIZE))
    assert [(left.start, left.end, left.because) for left in result.excluded] == [
        (MIB, 2 * MIB, "1MiB-2MiB")
    ]


def test_a_list_that_starts_with_an_inclusion_starts_from_nothing(disk: BytesDisk) -> None:
    result = resolved(disk, "+1MiB-2MiB")
    assert result.extents == ((MIB, 2 * MIB),)
    assert {left.because for left in result.excluded} == {"not included by any term"}


def test_the_last_match_wins(disk: BytesDisk) -> None:
    result = resolved(disk, "+all", "-1MiB-3MiB", "+2MiB+512KiB")
    assert result.extents == ((0, MIB), (2 * MIB, 2 * MIB + MIB // 2), (3 * MIB, SIZE))
    assert [term.contributed_bytes for term in result.terms] == [
        2 * MIB,
        MIB + MIB // 2,
        MIB // 2,
    ]
    assert [term.bytes for term in result.terms] == [SIZE, 2 * MIB, MIB // 2]


def test_a_term_that_later_ones_override_wholly_says_so(disk: BytesDisk) -> None:
    result = resolved(disk, "-1MiB-2MiB", "+all")
    assert result.terms[0].contributed_bytes == 0
    assert result.terms[0].note == "later terms decide all of it"


@pytest.mark.parametrize(
    ("text", "extent"),
    [
        ("1MiB-2MiB", (MIB, 2 * MIB)),
        ("1MiB+64KiB", (MIB, MIB + 65536)),
        ("2048s+8s", (MIB, MIB + 4096)),
        ("8s-16s", (4096, 8192)),
        ("3MiB-", (3 * MIB, SIZE)),
        ("0-4194304", (0, SIZE)),
        ("all", (0, SIZE)),
        ("part:1", (MIB, 2 * MIB)),
        ("part:5", (3 * MIB, 3 * MIB + MIB // 2)),
        ("part:name=data", (2 * MIB, 3 * MIB)),
        ("part:type=swap", (3 * MIB, 3 * MIB + MIB // 2)),
        (f"part:type={SWAP.upper()}", (3 * MIB, 3 * MIB + MIB // 2)),
        ("part:uuid=90C5CA8F-0000-4000-8000-00000000ABCD", (2 * MIB, 3 * MIB)),
    ],
)
def test_a_term_means_its_bytes(disk: BytesDisk, text: str, extent: tuple[int, int]) -> None:
    assert resolved(disk, f"+{text}").extents == (extent,)


def test_unpartitioned_is_tables_gaps_and_tail(disk: BytesDisk) -> None:
    assert resolved(disk, "+unpartitioned").extents == ((0, MIB), (3 * MIB + MIB // 2, SIZE))


def test_unpartitioned_holds_the_tables_between_logical_partitions() -> None:
    assert resolved(logical_disk(), "+unpartitioned").extents == (
        (0, MIB),
        (2 * MIB, 3 * MIB),
        (4 * MIB, 5 * MIB),
        (6 * MIB, 10 * MIB),
    )


def test_an_extended_partition_means_all_of_it_and_says_what_is_inside() -> None:
    result = resolved(logical_disk(), "-part:2")
    assert result.extents == ((0, 2 * MIB), (8 * MIB, 10 * MIB))
    assert "part:5 swap 1 MiB, part:6 linux 1 MiB" in result.terms[0].note


def test_an_mbr_partition_is_found_by_code_and_by_uuid() -> None:
    for text in ("part:type=0x82", "part:type=swap", "part:uuid=90a1b2c3-05", "part:5"):
        assert resolved(logical_disk(), f"+{text}").extents == ((3 * MIB, 4 * MIB),)


def test_several_partitions_that_match_are_all_meant_and_listed() -> None:
    disk = gpt_disk({1: GptPart(2048, 4095, name="x"), 2: GptPart(6144, 7167, name="x")})
    result = resolved(disk, "+part:name=x")
    assert result.extents == ((MIB, 2 * MIB), (3 * MIB, 3 * MIB + MIB // 2))
    assert result.terms[0].note == 'means part:1 "x" linux 1 MiB, part:2 "x" linux 512 KiB'


# Rounding -------------------------------------------------------------------------------------


def test_a_block_with_one_included_byte_is_selected_whole() -> None:
    result = resolved(blank(16384), "+4097-4098")
    assert result.extents == ((4096, 8192),)
    assert result.terms[0].contributed_bytes == 1


def test_an_exclusion_smaller_than_a_block_leaves_nothing_out() -> None:
    result = resolved(blank(16384), "-4097-8191")
    assert result.extents == ((0, 16384),)
    assert result.excluded == ()
    assert result.terms[0].contributed_bytes == 4094


def test_the_last_block_is_cut_by_the_end_of_the_disk() -> None:
    result = resolved(blank(10_000), "+9000-")
    assert result.extents == ((8192, 10_000),)
    assert result.selected_bytes == 1808


def test_order_does_not_depend_on_the_block_size() -> None:
    """Rounding each term instead of the result would let the exclusion swallow the inclusion."""
    result = resolved(blank(16384), "+0-4100", "-4096-8192", "+4100-4101")
    assert result.extents == ((0, 8192),)


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1MiB-5MiB", ["the range ends at byte 5242880", "4194304 (4 MiB)", "START-"]),
        ("4MiB-", ["the range starts at byte 4194304"]),
        ("8MiB+1", ["the range starts at byte 8388608"]),
        ("part:9", ["no partition 9 in the disk's gpt table", 'part:1 "ESP" efi 1 MiB']),
        ("part:name=Data", ['no partition named "Data"', 'part:2 "data" linux 1 MiB']),
        ("part:type=lvm", ["no partition of type lvm", "part:5 swap 512 KiB"]),
        ("part:uuid=90a1b2c3-01", ["no partition with uuid 90a1b2c3-01"]),
    ],
)
@pytest.mark.parametrize("sign", ["+", "-"])
def test_a_term_that_means_nothing_here_is_refused_by_name(
    disk: BytesDisk, text: str, words: list[str], sign: str
) -> None:
    message = refusal_of(disk, "+all", sign + text)
    assert message.startswith(f'"{text}": ')
    for word in words:
        assert word in message


@pytest.mark.parametrize("text", ["part:1", "unpartitioned", "part:type=linux"])
def test_a_filesystem_on_the_whole_disk_has_no_partition_table(text: str) -> None:
    disk = blank(SIZE)
    disk.content[:512] = fat_boot_sector()
    assert refusal_of(disk, f"+{text}") == (
        f'"{text}": the disk has no partition table; use all or a byte range'
    )


def test_an_empty_table_is_said_to_be_empty() -> None:
    assert "no partitions at all" in refusal_of(mbr_disk(), "+part:1")


def test_a_long_list_of_partitions_is_cut() -> None:
    disk = gpt_disk({number: GptPart(100 + number, 100 + number) for number in range(1, 101)})
    assert "and 80 more" in refusal_of(disk, "+part:128")


def test_a_damaged_table_is_refused_only_where_a_term_needs_it() -> None:
    disk = mbr_disk(mbr_entry(start=2048, count=100_000))
    with pytest.raises(PartitionTableError, match=r'"part:1": part:1 linux .* past the end'):
        resolved(disk, "+part:1")
    disk.reads.clear()
    assert resolved(disk, "-1MiB-2MiB").selected_bytes == 3 * MIB
    assert disk.reads == []


def test_rules_that_select_nothing_are_refused(disk: BytesDisk) -> None:
    message = refusal_of(disk, "+part:1", "-all")
    assert "select nothing of the disk's 4 MiB: include part:1, exclude all" in message
    assert 'the last exclusion is "all"' in message


@pytest.mark.parametrize("terms", [(), ("+all",), ("-all",)])
def test_an_empty_disk_is_refused(terms: tuple[str, ...]) -> None:
    assert "the disk is empty (0 bytes)" in refusal_of(blank(0), *terms)


# What is recorded -----------------------------------------------------------------------------


def test_touching_exclusions_keep_their_own_reasons() -> None:
    result = resolved(blank(SIZE), "-1MiB-2MiB", "-2MiB-3MiB")
    assert [(left.start, left.end, left.because) for left in result.excluded] == [
        (MIB, 2 * MIB, "1MiB-2MiB"),
        (2 * MIB, 3 * MIB, "2MiB-3MiB"),
    ]


def test_notes_about_the_table_reach_the_resolution(disk: BytesDisk) -> None:
    disk.content[512 + 40] ^= 1
    assert "primary GPT is damaged" in resolved(disk, "-part:type=swap").notes[0]
    assert resolved(disk, "-0-1MiB").notes == ()


def test_the_table_is_read_once_for_all_terms(disk: BytesDisk) -> None:
    resolved(disk, "+part:1")
    once = len(disk.reads)
    disk.reads.clear()
    resolved(disk, "+part:1", "+part:2", "-part:type=swap", "+unpartitioned")
    assert len(disk.reads) == once


def test_a_resolution_is_json(disk: BytesDisk) -> None:
    document = json.loads(json.dumps(resolved(disk, "+all", "-part:type=swap").to_json()))
    assert document["version"] == 1
    assert document["extents"] == [[0, 3 * MIB], [3 * MIB + MIB // 2, SIZE]]
    assert document["terms"][1] == {
        "include": False,
        "text": "part:type=swap",
        "bytes": MIB // 2,
        "contributed_bytes": MIB // 2,
        "extents": [[3 * MIB, 3 * MIB + MIB // 2]],
        "phase": "instant",
        "file_count": 0,
        "unresolved": [],
        "note": "",
    }
    assert (document["is_final"], document["unresolved"]) == (True, [])
    assert document["excluded"] == [
        {"start": 3 * MIB, "end": 3 * MIB + MIB // 2, "because": "part:type=swap"}
    ]


# The model ------------------------------------------------------------------------------------

DISK_BYTES = 120


@st.composite
def range_terms(draw: st.DrawFn) -> tuple[bool, int, int]:
    start = draw(st.integers(0, DISK_BYTES - 1))
    return draw(st.booleans()), start, draw(st.integers(start + 1, DISK_BYTES))


@given(st.lists(range_terms(), max_size=8), st.integers(1, 16))
def test_rules_mean_what_deciding_each_byte_alone_means(
    terms: list[tuple[bool, int, int]], block_size: int
) -> None:
    base = not terms or not terms[0][0]
    decider: list[int | None] = [None] * DISK_BYTES
    for index, (_, start, end) in enumerate(terms):
        decider[start:end] = [index] * (end - start)
    byte_in = [base if index is None else terms[index][0] for index in decider]
    block_in = [any(byte_in[b : b + block_size]) for b in range(0, DISK_BYTES, block_size)]
    expected = {byte for byte in range(DISK_BYTES) if block_in[byte // block_size]}
    rules = rules_of(*(f"{'+' if include else '-'}{s}-{e}" for include, s, e in terms))

    if not expected:
        with pytest.raises(RuleError, match="select nothing"):
            resolve(rules, blank(DISK_BYTES), block_size=block_size)
        return
    result = resolve(rules, blank(DISK_BYTES), block_size=block_size)

    assert {byte for start, end in result.extents for byte in range(start, end)} == expected
    assert [term.contributed_bytes for term in result.terms] == [
        decider.count(index) for index in range(len(terms))
    ]
    left_out = {
        byte: left.because for left in result.excluded for byte in range(left.start, left.end)
    }
    reasons = {None: "not included by any term"} | {
        index: f"{start}-{end}" for index, (_, start, end) in enumerate(terms)
    }
    assert left_out == {byte: reasons[decider[byte]] for byte in set(range(DISK_BYTES)) - expected}
    assert sum(left.end - left.start for left in result.excluded) == len(left_out)
