"""What a forecast makes of changes and of who they belong to."""

from __future__ import annotations

from stillblock.operations.forecast import _escaped, _judged
from stillblock.selection.census import take_census
from stillblock.selection.workers import Worker
from unit.selection.fake_filesystems import FakeFile, FakeFilesystem
from unit.selection.partition_images import MIB, blank

DAY_NS = 86_400 * 10**9
BLOCK = 4096


def blocks(start, count):
    return ((start * BLOCK, (start + count) * BLOCK),)


def test_changes_are_counted_after_each_instant_and_scaled_to_a_day():
    changes = [blocks(0, 10), blocks(5, 10)]
    named = [("path:/var/cache", blocks(0, 8)), ("free", blocks(14, 100)), ("swap", blocks(90, 1))]
    found = _judged("web", changes, named, span_ns=2 * DAY_NS, notes=())
    assert (found.changed_bytes, found.bytes_a_day) == (20 * BLOCK, 10 * BLOCK)
    told = [(c.term, c.changed_bytes, c.bytes_a_day, c.share) for c in found.candidates]
    assert told == [
        ("path:/var/cache", 11 * BLOCK, 11 * BLOCK // 2, 0.55),
        ("free", BLOCK, BLOCK // 2, 0.05),
    ]


def test_a_directory_that_is_all_of_the_one_above_is_told_alone():
    named = [("path:/var", blocks(0, 10)), ("path:/var/log", blocks(0, 10))]
    found = _judged("web", [blocks(0, 10)], named, span_ns=DAY_NS, notes=())
    assert [c.term for c in found.candidates] == ["path:/var/log"]


def test_nothing_is_forecast_of_nothing():
    found = _judged("web", [], [], span_ns=0, notes=())
    assert (found.bytes_a_day, found.candidates) == (0, ())


def test_a_strangers_name_is_a_glob_that_means_it():
    assert _escaped("/a*b[c]?\\d") == "/a\\*b\\[c]\\?\\\\d"
    assert _escaped("/\x1b[2J\udcff") == "/?\\[2J?"


def test_a_census_tells_two_levels_the_largest_first():
    filesystem = FakeFilesystem(
        {
            "/swapfile": FakeFile([(8192, 12288)]),
            "/var/cache/a": FakeFile([(16384, 32768)]),
            "/var/cache/deep/b": FakeFile([(32768, 36864)]),
            "/var/log/c": FakeFile([(40960, 45056)]),
            "/tmp/broken": FakeFile(error="nobody knows"),
        },
        free_extents=((65536, 131072),),
    )
    found = take_census(filesystem)
    assert [(part.path, part.extents) for part in found.parts] == [
        ("/var", ((16384, 36864), (40960, 45056))),
        ("/var/cache", ((16384, 36864),)),
        ("/swapfile", ((8192, 12288),)),
        ("/var/log", ((40960, 45056),)),
    ]
    assert found.free == ((65536, 131072),)


def test_a_worker_takes_a_census_and_names_come_through_as_they_are():
    reader = "unit.selection.worker_readers:open_good"
    with Worker(blank(MIB), reader=reader) as worker:
        found = worker.census()
    assert {part.path: part.extents for part in found.parts} == {
        "/a": ((4096, 8192),),
        "/b\udcff\n": ((8192, 12288),),
    }
    assert found.free == ((16384, 32768),)
