"""A store with regions tells what changed, as its page says that its records mean."""

from __future__ import annotations

import hashlib

import pytest

from compat.layout import PAGE, journal_records, seal_journal_record, segment, table

BLOCK = 4096
REGION = 256
NEEDED = 16


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def descriptors(golden):
    """What is told of regions and changes, in order, by epoch."""
    told: dict[int, list[tuple[str, range]]] = {}
    for path in golden.segments():
        found = segment(path.read_bytes(), block_size=BLOCK)
        for batch in found.batches:
            for d in batch.descriptors:
                blocks = range(d.first_block, d.first_block + d.block_count)
                told.setdefault(int(found.header["epoch"]), []).append((d.kind, blocks))
    return told


def changed_by_the_page(told: list[tuple[str, range]]) -> set[int]:
    """What counts as changed in an epoch where nothing but its records is known."""
    changed: set[int] = set()
    open_blocks: set[int] = set()
    for kind, blocks in told:
        if kind == "REGION":
            assert blocks.start // REGION == (blocks.stop - 1) // REGION, "within a mebibyte"
            open_blocks.update(blocks)
        elif kind == "REGION_END":
            open_blocks.difference_update(blocks)
        elif kind != "DONE":
            changed.update(blocks)
    return changed | open_blocks


def blocks_of(extents) -> list[int]:
    return [b for start, end in extents for b in range(start // BLOCK, end // BLOCK)]


def check(golden, since_base: list[int], **options) -> None:
    expected = golden.expected
    with golden.open(**options) as volume:
        assert digest(volume.pread(offset=0, length=volume.size)) == expected["live"]
        (middle,) = volume.snapshots()
        (base,) = volume.bookmarks()
        assert (middle.name, middle.id, base.name) == ("middle", expected["middle"]["id"], "base")
        assert middle.info.lost_bytes == 0
        with middle.view() as view:
            selected = view.readall()[: NEEDED * BLOCK]
        assert digest(selected) == expected["middle"]["selected"]
        assert blocks_of(volume.changed_since(base)) == since_base
        assert blocks_of(middle.changed_since(base)) == expected["from_base_to_middle"]
        assert blocks_of(volume.changed_since(middle)) == expected["since_middle"]


def test_what_changed_is_exact_after_a_clean_stop(golden_v3):
    check(golden_v3, golden_v3.expected["since_base"])


def test_regions_that_a_power_cut_left_open_count_whole(cut_v3):
    data = bytearray(cut_v3.journal.read_bytes())
    (opened,) = (record for record in journal_records(bytes(data)) if record.name == "Opened")
    start = opened.at + table("journal.md", "Record").length
    data[start : start + 16] = b"\xb0" * 16  # another boot than any
    record = data[opened.at : start + len(opened.payload)]
    seal_journal_record(record)
    data[opened.at : opened.at + len(record)] = record
    cut_v3.journal.write_bytes(data)
    check(cut_v3, cut_v3.expected["since_base_after_a_cut"])


def test_regions_count_whole_where_the_write_buffer_is_given_up(cut_v3):
    check(cut_v3, cut_v3.expected["since_base_after_a_cut"], recover="discard")


@pytest.mark.parametrize("name", ["golden_v3", "cut_v3"])
def test_the_records_say_it_as_the_page_says(name, request):
    golden = request.getfixturevalue(name)
    told = descriptors(golden)
    kinds = {kind for of_epoch in told.values() for kind, _ in of_epoch}
    assert {"REGION", "REGION_END", "CHANGED", "PRESERVE"} <= kinds
    assert sorted(changed_by_the_page(told[1])) == golden.expected["from_base_to_middle"]
    key = "since_base" if name == "golden_v3" else "since_base_after_a_cut"
    both = changed_by_the_page(told[1]) | changed_by_the_page(told[2])
    assert sorted(both) == golden.expected[key]


def test_its_segments_have_a_version_that_programs_without_regions_refuse(golden_v3):
    layout = table("log.md", "Segment header")
    headers = [layout.decode(path.read_bytes()[:PAGE]) for path in golden_v3.segments()]
    assert {header["version"] for header in headers} == {3}
