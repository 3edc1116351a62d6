"""nbdinfo: what an export says about itself."""

from __future__ import annotations

import json

import pytest

from interop.conftest import CHANGED, EXCLUDED, ZEROED
from serving import BLOCK, MIB, run

pytestmark = [pytest.mark.needs("nbdinfo", "qemu-io"), pytest.mark.slow]


def mapped(uri, context=None):
    """(start, end, type) of each extent."""
    option = "--map" if context is None else f"--map={context}"
    extents = json.loads(run("nbdinfo", "--json", option, uri).out)
    return [(e["offset"], e["offset"] + e["length"], e["type"]) for e in extents]


def test_the_live_disk_is_writable_and_a_snapshot_is_not(week):
    served, _ = week
    (live,) = json.loads(run("nbdinfo", "--json", served.uri()).out)["exports"]
    (snapshot,) = json.loads(run("nbdinfo", "--json", served.uri("monday")).out)["exports"]
    assert live["export-size"] == snapshot["export-size"] == 4 * MIB
    assert not live["is_read_only"]
    assert live["can_trim"]
    assert live["can_zero"]
    assert snapshot["is_read_only"]
    assert not snapshot["can_trim"]
    for export in (live, snapshot):
        assert export["can_multi_conn"]
        assert export["can_flush"]
        assert export["can_fua"]
        assert export["can_df"]
        assert export["block_size_minimum"] == 1
        assert export["block_size_preferred"] == BLOCK


def test_the_list_names_the_disk_and_its_snapshots_with_their_contexts(week):
    served, _ = week
    listed = json.loads(run("nbdinfo", "--json", "--list", served.uri()).out)["exports"]
    contexts = {export["export-name"]: export["contexts"] for export in listed}
    assert set(contexts) == {"web", "web@monday", "web@tuesday"}
    assert "qemu:dirty-bitmap:tuesday" in contexts["web"]
    assert "x-stillblock:selected" not in contexts["web"]
    assert contexts["web@monday"] == ["base:allocation", "x-stillblock:selected"]
    assert "x-stillblock:changed:monday" in contexts["web@tuesday"]


def test_what_a_snapshot_leaves_out_and_what_was_zeroed_are_holes(week):
    served, _ = week
    assert mapped(served.uri("monday")) == [
        (0, EXCLUDED.start, 0),
        (EXCLUDED.start, EXCLUDED.stop, 3),
        (EXCLUDED.stop, 4 * MIB, 0),
    ]
    assert (ZEROED.start, ZEROED.stop, 3) in mapped(served.uri("tuesday"))


def test_the_selection_is_a_map(week):
    served, _ = week
    assert mapped(served.uri("monday"), "x-stillblock:selected") == [
        (0, EXCLUDED.start, 1),
        (EXCLUDED.start, EXCLUDED.stop, 0),
        (EXCLUDED.stop, 4 * MIB, 1),
    ]


def test_what_changed_between_two_snapshots_and_what_is_newly_selected_are_told_apart(week):
    served, _ = week
    found = mapped(served.uri("tuesday"), "x-stillblock:changed:monday")
    assert [extent for extent in found if extent[2]] == [
        (CHANGED.start, CHANGED.stop, 1),
        (EXCLUDED.start, EXCLUDED.stop, 2),
        (ZEROED.start, ZEROED.stop, 1),
    ]


def test_newly_selected_blocks_are_dirty(week):
    served, _ = week
    found = mapped(served.uri("tuesday"), "qemu:dirty-bitmap:monday")
    assert [extent for extent in found if extent[2]] == [
        (CHANGED.start, CHANGED.stop, 1),
        (EXCLUDED.start, EXCLUDED.stop, 1),
        (ZEROED.start, ZEROED.stop, 1),
    ]


def test_what_changed_up_to_now_is_a_map_of_the_live_disk(week):
    served, _ = week
    since_monday = [e[:2] for e in mapped(served.uri(), "x-stillblock:changed:monday") if e[2]]
    since_tuesday = [e[:2] for e in mapped(served.uri(), "x-stillblock:changed:tuesday") if e[2]]
    assert since_tuesday == [(0, BLOCK)]
    assert since_monday == [(0, BLOCK), (CHANGED.start, CHANGED.stop), (ZEROED.start, ZEROED.stop)]


def test_a_snapshot_that_is_deleted_leaves_the_list_and_the_contexts(served):
    served.snapshot("a")
    served.snapshot("b")
    served.cli("snapshot", "delete", "web@a", "--yes")
    listed = json.loads(run("nbdinfo", "--json", "--list", served.uri()).out)["exports"]
    assert {export["export-name"] for export in listed} == {"web", "web@b"}
    assert not [c for export in listed for c in export["contexts"] if c.endswith(":a")]
