"""What a session does, wherever the volume is open: the same tests for both kinds."""

import pytest

from stillblock.errors import (
    NameTakenError,
    NotFoundError,
    ProtectedError,
    RuleError,
    UsageError,
)
from stillblock.model import OnFull, RuleTerm, SnapshotPurpose, UsageLevel
from stillblock.operations.restore import RestoreRequest
from stillblock.operations.rules import RulesRequest
from stillblock.operations.snapshots import SnapshotRequest
from stillblock.operations.usage import PolicyRequest

MIB = 1024 * 1024
WITHOUT_FIRST_HALF = (RuleTerm(include=False, text="0-512K"),)


def take(session, name=None, **fields):
    return session.create_snapshot(SnapshotRequest(name=name, **fields))


def test_a_snapshot_is_listed_with_its_receipt(session):
    receipt = take(session, "monday", terms=WITHOUT_FIRST_HALF, description="before the move")
    assert receipt.extents == ((MIB // 2, MIB),)
    assert [(p.start, p.end, p.because) for p in receipt.left_out] == [(0, MIB // 2, "0-512K")]
    assert receipt.rules == WITHOUT_FIRST_HALF
    assert receipt.consistency == "barrier"
    assert receipt.pause_ns is not None
    assert receipt.snapshot.description == "before the move"
    assert session.receipt("monday") == receipt
    assert session.list_snapshots().snapshots == (receipt.snapshot,)
    assert session.show_snapshot("monday") == receipt.snapshot


def test_a_snapshot_without_a_name_is_named_by_the_time_and_never_twice(session):
    names = [take(session).snapshot.name for _ in range(3)]
    assert len(set(names)) == 3
    assert all(name.startswith("20") and "Z" in name for name in names)


def test_a_plan_says_what_would_be_taken_and_takes_nothing(session):
    request = SnapshotRequest(name="monday", terms=WITHOUT_FIRST_HALF)
    plan = session.plan_snapshot(request)
    assert (plan.name, plan.selected_bytes, plan.size_bytes) == ("monday", MIB // 2, MIB)
    assert session.list_snapshots().snapshots == ()


def test_a_snapshot_is_found_by_id_prefix_and_as_latest(session):
    first, second = take(session, "a").snapshot, take(session, "b").snapshot
    assert session.show_snapshot(first.id[:8]).name == "a"
    assert session.show_snapshot("latest").id == second.id


def test_a_name_is_given_once(session):
    take(session, "monday")
    with pytest.raises(NameTakenError, match="monday"):
        take(session, "monday")
    take(session, "tuesday")
    with pytest.raises(NameTakenError):
        session.rename_snapshot("tuesday", name="monday")


@pytest.mark.parametrize("name", ["latest", "a b", "", "x" * 65])
def test_a_bad_name_is_refused_before_anything_happens(session, name):
    with pytest.raises(UsageError):
        take(session, name)
    assert session.list_snapshots().snapshots == ()


def test_a_snapshot_that_is_not_there_is_said_to_be_missing(session):
    with pytest.raises(NotFoundError, match="wednesday"):
        session.show_snapshot("wednesday")


def test_a_pause_limit_out_of_range_is_refused(session):
    with pytest.raises(UsageError, match="pause limit"):
        take(session, "monday", pause_limit_ms=0)


def test_a_snapshot_is_renamed_and_keeps_its_id(session):
    before = take(session, "monday").snapshot
    after = session.rename_snapshot("monday", name="first")
    assert (after.name, after.id) == ("first", before.id)
    with pytest.raises(NotFoundError):
        session.show_snapshot("monday")


def test_a_protected_snapshot_is_not_deleted_until_it_is_not(session):
    take(session, "monday")
    assert session.protect_snapshot("monday").is_protected
    with pytest.raises(ProtectedError, match="--off"):
        session.plan_delete("monday")
    with pytest.raises(ProtectedError):
        session.delete_snapshot("monday", force=True)
    session.protect_snapshot("monday", is_protected=False)
    assert session.delete_snapshot("monday").name == "monday"
    assert session.list_snapshots().snapshots == ()


def test_standing_rules_come_first_and_only_these_replaces_them(session):
    session.set_rules(RulesRequest(terms=WITHOUT_FIRST_HALF))
    more = (RuleTerm(include=False, text="768K-1M"),)
    assert take(session, "both", terms=more).extents == ((MIB // 2, MIB * 3 // 4),)
    assert take(session, "alone", terms=more, only_these=True).extents == ((0, MIB * 3 // 4),)
    session.add_rules(RulesRequest(terms=more))
    assert session.show_rules().rules == WITHOUT_FIRST_HALF + more
    session.set_rules(RulesRequest())
    assert take(session, "all").extents == ((0, MIB),)


def test_rules_that_mean_nothing_here_are_refused_and_not_kept(session):
    with pytest.raises(RuleError, match="2M"):
        session.set_rules(RulesRequest(terms=(RuleTerm(include=True, text="1M-2M"),)))
    assert session.show_rules().rules == ()


def test_rules_are_explained_without_being_taken(session):
    found = session.explain(RulesRequest(terms=WITHOUT_FIRST_HALF))
    assert (found.selected_bytes, found.left_out_bytes) == (MIB // 2, MIB // 2)
    assert found.terms[0].extents == ((0, MIB // 2),)
    assert session.show_rules().rules == ()


def test_a_bookmark_outlives_its_snapshot(session):
    take(session, "monday")
    made = session.create_bookmark("monday")
    assert (made.name, made.baseline_bytes, made.has_snapshot) == ("monday", MIB, True)
    session.delete_snapshot("monday")
    (left,) = session.list_bookmarks().bookmarks
    assert (left.name, left.has_snapshot) == ("monday", False)
    assert session.changes(since="monday").changed_bytes == 0
    with pytest.raises(NameTakenError, match="bookmark"):
        take(session, "monday")
    assert session.delete_bookmark("monday").id == made.id
    assert session.list_bookmarks().bookmarks == ()


def test_a_snapshot_has_one_bookmark(session):
    take(session, "monday")
    session.create_bookmark("monday", name="mark")
    with pytest.raises(NameTakenError):
        session.create_bookmark("monday", name="other")


def test_changes_run_from_old_to_new(session):
    take(session, "a")
    take(session, "b")
    assert session.changes(since="a", until="b").extents == ()
    with pytest.raises(UsageError, match="older one first"):
        session.changes(since="b", until="a")


def test_what_an_older_instant_did_not_hold_is_newly_selected(session):
    take(session, "a", terms=WITHOUT_FIRST_HALF)
    session.create_bookmark("a")
    take(session, "b")
    take(session, "c", terms=(RuleTerm(include=False, text="256K-1M"),))
    first_half = ((0, MIB // 2),)
    assert session.changes(since="a", until="b").newly_selected == first_half
    assert session.changes(since="a", until="b").newly_selected_bytes == MIB // 2
    assert session.changes(since="a", until="c").newly_selected == ((0, MIB // 4),)
    assert session.changes(since="b", until="c").newly_selected == ()
    assert session.changes(since="a").newly_selected == ()
    session.delete_snapshot("a")  # its bookmark still knows what it held
    assert session.changes(since="a", until="b").newly_selected == first_half


def test_a_restore_is_planned_and_leaves_a_safety_snapshot(session):
    take(session, "monday")
    request = RestoreRequest(snapshot="monday")
    plan = session.plan_restore(request)
    assert (plan.write_bytes, plan.extents, plan.warnings) == (0, (), ())
    assert session.list_snapshots().snapshots[1:] == ()
    progress = session.start_restore(request)
    while progress.is_running:
        progress = session.wait_restore(timeout_ms=1000)
    assert not session.restore_status().is_running
    _, safety = session.list_snapshots().snapshots
    assert safety.purpose is SnapshotPurpose.SAFETY
    assert safety.name.startswith("before-restore-")
    assert session.show_snapshot("latest").name == "monday"


def test_only_what_a_term_names_is_restored(session):
    take(session, "monday", terms=WITHOUT_FIRST_HALF)
    only = (RuleTerm(include=True, text="256K-768K"),)
    plan = session.plan_restore(RestoreRequest(snapshot="monday", only=only))
    assert plan.unselected_bytes == MIB // 4


def test_a_preset_of_the_users_own_says_what_is_restored(session, config):
    take(session, "monday", terms=WITHOUT_FIRST_HALF)
    config.presets_dir.mkdir()
    (config.presets_dir / "mine.toml").write_text('terms = ["include 256K-768K"]')
    only = (RuleTerm(include=True, text="preset:mine"),)
    plan = session.plan_restore(RestoreRequest(snapshot="monday", only=only))
    assert plan.unselected_bytes == MIB // 4


def test_the_volume_is_described(session):
    take(session, "monday")
    info = session.show_volume()
    assert (info.name, info.size_bytes, info.block_size) == ("web", MIB, 4096)
    assert (info.snapshot_count, info.bookmark_count) == (1, 0)
    assert info.is_served == session.is_remote
    assert session.statistics().volume == "web"


def test_the_policy_of_a_full_store_is_changed_in_parts_and_told(session):
    before = session.store_usage()
    assert (before.on_full, before.limit_bytes) == (OnFull.DEGRADE, None)
    session.set_store_policy(PolicyRequest(on_full=OnFull.HOLD))
    usage = session.set_store_policy(PolicyRequest(limit_bytes=64 * MIB))
    assert (usage.on_full, usage.limit_bytes) == (OnFull.HOLD, 64 * MIB)
    assert usage.used_bytes < usage.capacity_bytes <= 64 * MIB
    assert usage.level is UsageLevel.OK
    assert session.set_store_policy(PolicyRequest(limit_bytes=0)).limit_bytes is None
    with pytest.raises(UsageError, match="too small"):
        session.set_store_policy(PolicyRequest(limit_bytes=MIB))


def test_what_only_low_terms_select_is_told(session):
    low = RuleTerm(include=True, text="0-512K", is_low=True)
    terms = (RuleTerm(include=True, text="0-64K"), RuleTerm(include=True, text="512K-1M"))
    snapshot = take(session, "monday", terms=(low, *terms)).snapshot
    assert (snapshot.selected_bytes, snapshot.low_bytes) == (MIB, MIB // 2 - 65536)
    assert (snapshot.is_partial, snapshot.lost) == (False, ())
    assert session.receipt("monday").rules[0] == low


def test_growth_of_the_origin_is_taken_over(session, origin):
    with origin.open("r+b") as disk:
        disk.truncate(2 * MIB)
    done = session.resize()
    assert (done.size_bytes_before, done.size_bytes) == (MIB, 2 * MIB)


def test_a_release_leaves_the_origin_to_others(session, config, origin):
    before = origin.read_bytes()
    done = session.release()
    assert (done.volume, done.size_bytes) == ("web", MIB)
    assert origin.read_bytes() == before
    assert not list(config.run_dir.glob("*.sock"))
