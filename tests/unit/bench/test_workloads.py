"""Rows, regions, names and sizes."""

from itertools import combinations, pairwise

import pytest

from bench import registry, stalls
from bench.cli import main
from bench.errors import UsageError
from bench.instants import Window, scattered_extents, stall_figures
from bench.memory import Observed, Placement, Plan, marks, offsets
from bench.targets import Role, TargetName, quarters
from bench.units import MIB, format_size, parse_size
from bench.workloads import ROW_NAMES, ROWS, ForSeconds, Mode, rows_for

SIZE = 1 << 30


def test_row_names_are_unique():
    assert len(set(ROW_NAMES)) == len(ROW_NAMES)


def test_no_two_first_write_rows_share_a_block():
    regions = [row.region(SIZE) for row in ROWS if row.is_first_write and "uw" not in row.name]
    for (first, first_length), (second, second_length) in combinations(regions, 2):
        assert first + first_length <= second or second + second_length <= first


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_region_lies_on_the_disk_in_whole_blocks(row):
    offset, length = row.region(SIZE)
    assert 0 <= offset < offset + length <= SIZE
    assert offset % 4096 == length % 4096 == 0


def test_undesignated_rows_write_nothing_that_the_half_role_selects():
    for row in ROWS:
        if row.name.startswith("uw"):
            offset, length = row.region(SIZE)
            for start, end in quarters(SIZE):
                assert offset + length <= start or offset >= end


def test_the_density_of_sparse_first_writes_does_not_depend_on_the_size():
    row = next(row for row in ROWS if row.name == "fw4k_q32")
    small, large = (row.request_count(size, scale=1.0) for size in (SIZE, 4 * SIZE))
    assert (small, large) == (SIZE // 4 // 4096 // 8, SIZE // 4096 // 8)


def test_steady_rows_are_limited_by_time_alone():
    for row in ROWS:
        if isinstance(row.amount, ForSeconds):
            assert row.is_timed()
            assert row.request_count(SIZE, scale=1.0) is None


def test_rows_are_chosen_by_mode_role_and_name():
    assert [row.name for row in rows_for(Mode.DIRECT, Role.RAW)] == ["rr4k_q1", "rr4k_q32"]
    assert [row.name for row in rows_for(Mode.IO, Role.SEVERAL)] == ["fw4k_q1", "fw4k_q32"]
    only = rows_for(Mode.IO, Role.RAW, only=frozenset({"sr1m"}))
    assert [row.name for row in only] == ["sr1m"]


@pytest.mark.parametrize(
    ("text", "role", "count"),
    [
        ("stillblock", Role.SNAPSHOT, 1),
        ("stillblock@raw", Role.RAW, 0),
        ("stillblock@half", Role.HALF, 1),
        ("stillblock@k8", Role.SEVERAL, 8),
        ("qsd-cbw", Role.SNAPSHOT, 1),
        ("nbdkit", Role.RAW, 0),
    ],
)
def test_a_target_name_tells_the_role_and_the_number_of_snapshots(text, role, count):
    parsed = registry.parse(text)
    assert (parsed.role, parsed.snapshot_count) == (role, count)


@pytest.mark.parametrize(
    "text", ["vendor", "nbdkit@half", "stillblock@k1", "stillblock@", "qsd-raw@k8"]
)
def test_a_role_that_a_server_cannot_play_is_refused(text):
    with pytest.raises(UsageError):
        registry.parse(text)


def test_an_unknown_suffix_is_refused():
    with pytest.raises(UsageError, match="no such role"):
        TargetName.parse("stillblock@x", plain_role=Role.RAW)


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("4096", 4096), ("64K", 65536), ("16MiB", 16 * MIB), ("4g", 4 << 30)]
)
def test_sizes_are_read_in_1024_units(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5G", "4X", "0x10"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError):
        parse_size(text)


@pytest.mark.parametrize("size_bytes", [0, 1000, 4096, 96 * MIB, 1 << 40])
def test_a_formatted_size_reads_back_exactly(size_bytes):
    assert parse_size(format_size(size_bytes)) == size_bytes


def test_a_size_that_is_no_multiple_of_sixteen_mebibytes_is_a_usage_error(capsys):
    assert main(["io", "--size", "1000"]) == 2
    assert "multiple of 16M" in capsys.readouterr().err


def test_an_unknown_row_is_a_usage_error_that_lists_the_rows(capsys):
    assert main(["io", "--only", "nonsense"]) == 2
    assert "fw4k_q32" in capsys.readouterr().err


def test_a_stall_is_the_longest_gap_that_touches_the_snapshot():
    stamps = [0.0, 0.25, 0.5, 0.75, 1.0, 1.01, 1.05, 1.06, 2.0]
    found = stall_figures(stamps, [Window(begin_s=1.02, end_s=1.03)])
    assert found["max_ms"] == pytest.approx(940.0)
    assert found["quiet_p99_ms"] == pytest.approx(250.0)


def test_a_clients_stall_is_its_longest_write_under_way_around_the_snapshot():
    # 4 ms from 10.000 on, 50 ms from 10.010 on, and 900 ms long before.
    log = ["9500, 900000000, 1, 4096, 0, 0\n", "10004, 4000000, 1, 4096, 0, 0\n"]
    log.append("10060, 50000000, 1, 4096, 4096, 0\n")
    found = stalls.stall_figures(list(stalls.writes_of(log)), [Window(begin_s=10.02, end_s=10.03)])
    assert found["max_ms"] == pytest.approx(50.0)
    assert found["quiet_p99_ms"] == pytest.approx(0.0)


def test_scattered_extents_are_in_order_and_apart():
    extents = scattered_extents(1 << 38, count=1000, seed=1)
    assert len(extents) == 1000
    for (_, end), (start, _) in pairwise(extents):
        assert end <= start
    assert extents != scattered_extents(1 << 38, count=1000, seed=2)


def plan(placement=Placement.SCATTERED, count=1000):
    return Plan(size_bytes=1 << 30, preserved_count=count, placement=placement, snapshot_count=3)


def observed(**changed):
    given = {
        "empty_bytes": 0.0,
        "bits_bytes": 0.0,
        "full_bytes": 0.0,
        "kept_bytes": 0.0,
        "cold_open_s": 1.0,
        "warm_open_s": 1.0,
        "pause_ms_max": 1.0,
        "snapshot_ms_max": 1.0,
    }
    return Observed(**{**given, **changed})


def per_block(found):
    return next(mark for mark in found if "per preserved block, bytes" in mark.what)


def test_two_bits_a_block_are_a_64th_of_a_mebibyte_for_each_256_mebibytes():
    assert plan().bitmap_bytes == (1 << 30) // 4096 // 4


def test_memory_of_scattered_blocks_is_counted_beyond_the_two_bits():
    full = float(plan().bitmap_bytes + 24 * 1000)
    assert per_block(marks(plan(), observed(full_bytes=full))).figure == 24.0


def test_memory_of_clustered_blocks_is_counted_beyond_the_snapshot():
    chosen = plan(Placement.CLUSTERED)
    found = marks(chosen, observed(bits_bytes=4096.0, full_bytes=4096.0 + 25_000))
    assert per_block(found).figure == 25.0
    assert not per_block(found).is_kept


def test_a_pause_beyond_twenty_milliseconds_breaks_its_mark():
    found = marks(plan(), observed(pause_ms_max=20.5))
    assert [mark.what for mark in found if not mark.is_kept] == [
        "pause of an idle snapshot, longest, ms"
    ]


@pytest.mark.parametrize("placement", Placement)
def test_preserved_blocks_are_distinct_whole_blocks_on_the_volume(placement):
    places = offsets(plan(placement))
    assert len(set(places)) == 1000
    assert all(place % 4096 == 0 and place < 1 << 30 for place in places)


def test_more_blocks_than_the_volume_has_are_refused():
    with pytest.raises(UsageError, match="--blocks"):
        offsets(plan(count=(1 << 18) + 1))
