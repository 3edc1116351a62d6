"""Files and free space are resolved after the instant: what that looks like from outside."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from disks import ext4_disk, secret_blocks
from stillblock.errors import (
    NarrowingError,
    NotFoundError,
    RuleError,
    StillblockError,
    StoreIOError,
)
from stillblock.extents import complement, intersect, total_bytes
from stillblock.model import RuleTerm, SnapshotState
from stillblock.operations import bookmarks, narrowing, restore
from stillblock.operations.restore import RestoreRequest
from stillblock.operations.rules import EVERYTHING, RulesRequest, set_rules
from stillblock.operations.snapshots import SnapshotRequest, create_snapshot
from stillblock.operations.volume import OpenVolume
from stillblock.service.session import LocalSession, open_session

pytestmark = pytest.mark.needs("mkfs.ext4", "debugfs")


def excluding(*texts):
    return tuple(RuleTerm(include=False, text=text) for text in texts)


CACHE = excluding("path:/var/cache/**")
DEFAULT = excluding("free", "swap")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    disk, _ = ext4_disk(tmp_path_factory.mktemp("disk"))
    return disk


@pytest.fixture
def origin(made, tmp_path):
    return Path(shutil.copy(made, tmp_path / "disk.img"))


@pytest.fixture
def opened(config, volume):
    """The volume, open in this process, to look beneath the session."""
    with OpenVolume.open(config, volume) as found:
        yield found


def take(session, name, *, wait=True, **fields):
    return session.create_snapshot(SnapshotRequest(name=name, **fields), wait=wait)


def where_the_secret_is(origin):
    """Return the blocks of the disk that hold the marker."""
    return tuple((at, at + 4096) for at in secret_blocks(origin.read_bytes()))


@pytest.fixture
def stalled(monkeypatch):
    """Narrowing that waits until it is told to go on."""
    begun, go_on = threading.Event(), threading.Event()
    real = narrowing.explain_frozen

    def wait_then(*arguments, **keywords):
        begun.set()
        assert go_on.wait(30)
        return real(*arguments, **keywords)

    monkeypatch.setattr(narrowing, "explain_frozen", wait_then)
    monkeypatch.setattr(narrowing.wait_final, "__kwdefaults__", {"timeout_s": 0.05})
    yield begun, go_on
    go_on.set()


def test_when_nobody_gave_rules_free_space_and_swap_are_left_out_and_that_is_said(session):
    receipt = take(session, "a")
    assert (receipt.rules, receipt.is_default) == (DEFAULT, True)
    assert {part.because for part in receipt.left_out} == {"free"}
    assert receipt.snapshot.is_final
    assert total_bytes(receipt.extents) < receipt.snapshot.size_bytes
    assert session.show_rules().default == DEFAULT


def test_everything_is_kept_once_somebody_says_so_and_that_is_remembered(session):
    session.set_rules(RulesRequest(terms=EVERYTHING))
    for name in ("a", "b"):
        receipt = take(session, name)
        assert (receipt.is_default, receipt.left_out) == (False, ())
        assert receipt.extents == ((0, receipt.snapshot.size_bytes),)
    assert not take(session, "c", terms=EVERYTHING).left_out
    session.set_rules(RulesRequest())
    assert take(session, "d").is_default


def test_a_term_for_one_snapshot_is_somebody_saying_something(session):
    receipt = take(session, "a", terms=excluding("0-1MiB"))
    assert not receipt.is_default
    assert {part.because for part in receipt.left_out} == {"0-1MiB"}


def test_files_are_left_out_and_the_receipt_tells_how_many_and_where(session, origin):
    secret = where_the_secret_is(origin)
    rules = (*CACHE, RuleTerm(include=True, text="path:/var/cache/apt/**"))
    receipt = take(session, "a", terms=(*rules, *excluding("path:/**/*.tmp")))
    assert intersect(receipt.extents, secret) == ()
    left_out = tuple((part.start, part.end) for part in receipt.left_out)
    assert total_bytes(left_out) == total_bytes(secret)
    assert [term.file_count for term in receipt.terms] == [41, 1, 1]
    assert [term.unresolved for term in receipt.terms] == [(), (), ()]
    assert receipt.narrowed_unix_ns >= receipt.snapshot.created_unix_ns
    assert receipt.versions["stillblock"]
    assert receipt.digest.startswith("sha256:")
    assert receipt.is_intact
    assert session.receipt("a") == receipt


def test_what_is_selected_reads_as_it_was_and_the_rest_as_zeros(opened, origin):
    before = origin.read_bytes()
    session = LocalSession(opened)
    receipt = take(session, "a", terms=excluding("free", "path:/var/cache/**"))
    expected = bytearray(before)
    for start, end in complement(receipt.extents, size=len(before)):
        expected[start:end] = bytes(end - start)
    for start in range(0, len(before), 1 << 20):
        opened.engine.pwrite(b"\xee" * (1 << 20), offset=start)
    view = opened.engine.view(epoch=receipt.snapshot.epoch)
    assert view.pread(offset=0, length=len(before)) == expected
    view.close()


def test_until_it_is_final_a_snapshot_is_listed_and_nothing_else(session, stalled):
    begun, go_on = stalled
    session.set_rules(RulesRequest(terms=CACHE))
    receipt = take(session, "a", wait=False)
    assert begun.wait(30)
    assert not receipt.snapshot.is_final
    assert receipt.snapshot.state is SnapshotState.NARROWING
    assert receipt.extents == ((0, receipt.snapshot.size_bytes),), "all that may be meant"
    (listed,) = session.list_snapshots().snapshots
    assert (listed.name, listed.state) == ("a", SnapshotState.NARROWING)
    assert "web@a" not in [export.name for export in session.exports().exports]
    refused = [
        lambda: session.create_bookmark("a"),
        lambda: session.start_restore(RestoreRequest(snapshot="a")),
        lambda: session.changes(since="a"),
    ]
    for attempt in refused:
        with pytest.raises(NarrowingError, match="web@a"):
            attempt()
    assert session.rename_snapshot("a", name="b").name == "b"
    session.protect_snapshot("b")
    go_on.set()
    final = session.wait_final(session.receipt("b"))
    assert (final.snapshot.name, final.snapshot.is_protected) == ("b", True)
    assert final.snapshot.state is SnapshotState.OK
    assert {part.because for part in final.left_out} == {"path:/var/cache/**"}
    assert session.create_bookmark("b").baseline_bytes == final.snapshot.selected_bytes
    if session.is_remote:
        assert "web@b" in [export.name for export in session.exports().exports]


def test_a_snapshot_is_deleted_while_it_is_narrowed(session, stalled):
    begun, go_on = stalled
    take(session, "a", wait=False, terms=CACHE)
    assert begun.wait(30)
    session.delete_snapshot("a")
    assert session.list_snapshots().snapshots == ()
    go_on.set()
    again = take(session, "a", terms=CACHE)
    assert again.snapshot.is_final
    assert [s.name for s in session.list_snapshots().snapshots] == ["a"]


def test_a_volume_closes_while_a_reader_is_busy_and_the_next_opening_goes_on(
    config, volume, stalled, monkeypatch
):
    begun, go_on = stalled
    monkeypatch.setattr(narrowing, "STOP_WAIT_S", 0.1)
    opened = OpenVolume.open(config, volume)
    take(LocalSession(opened), "a", wait=False, terms=CACHE)
    assert begun.wait(30)
    opened.close()
    go_on.set()
    with open_session(config, volume) as session:
        final = session.wait_final(session.receipt("a"))
    assert {part.because for part in final.left_out} == {"path:/var/cache/**"}


def test_what_cannot_be_resolved_is_kept_and_the_receipt_says_why(session, monkeypatch):
    def fail(*_, **__):
        raise StillblockError("the reader met a dragon")

    monkeypatch.setattr(narrowing, "explain_frozen", fail)
    receipt = take(session, "a", terms=(*CACHE, *excluding("0-512KiB")))
    assert receipt.snapshot.is_final
    assert "dragon" in receipt.failure
    assert [(p.start, p.end, p.because) for p in receipt.left_out] == [(0, 1 << 19, "0-512KiB")]


def test_a_damaged_filesystem_is_kept_whole_and_the_receipt_says_so(config, volume, origin):
    with origin.open("r+b") as disk:
        disk.seek((1 << 20) + 1024 + 24)
        disk.write(b"\xff\xff\xff\xff")  # a block size of 2 to the power of four billion
    with open_session(config, volume) as session:
        receipt = take(session, "a", terms=(*CACHE, *excluding("free")))
    assert receipt.extents == ((0, receipt.snapshot.size_bytes),)
    assert [[where.place for where in term.unresolved] for term in receipt.terms] == [
        ["part:1"],
        ["part:1"],
    ]


def test_explaining_rules_tells_what_a_snapshot_would_hold_and_leaves_nothing(session):
    found = session.explain(RulesRequest(terms=CACHE))
    (term,) = found.terms
    assert term.file_count == 41
    assert session.list_snapshots().snapshots == ()
    assert session.show_volume().snapshot_count == 0
    receipt = take(session, "a", terms=CACHE)
    assert receipt.extents == found.extents
    assert receipt.left_out == found.left_out


def test_a_plan_says_that_it_is_an_upper_bound(session):
    plan = session.plan_snapshot(SnapshotRequest(name="a", terms=CACHE))
    assert plan.pending
    assert plan.selected_bytes == plan.size_bytes


def test_rules_that_change_leave_older_snapshots_and_receipts_alone(session):
    session.set_rules(RulesRequest(terms=CACHE))
    first = take(session, "first")
    session.set_rules(RulesRequest(terms=excluding("free")))
    second = take(session, "second")
    assert session.receipt("first") == first
    assert {part.because for part in first.left_out} == {"path:/var/cache/**"}
    assert {part.because for part in second.left_out} == {"free"}


def test_a_filesystem_whose_metadata_is_left_out_by_range_keeps_its_files(session):
    """Zeros in place of what the snapshot does not hold would say that everything is free."""
    receipt = take(session, "a", terms=excluding("1MiB+1MiB", "free"))
    assert {part.because for part in receipt.left_out} == {"1MiB+1MiB"}
    ((where,),) = [term.unresolved for term in receipt.terms if term.text == "free"]
    assert where.place == "part:1"
    assert where.reason


def test_a_receipt_that_was_changed_does_not_come_to_its_digest(opened):
    session = LocalSession(opened)
    receipt = take(session, "a", terms=CACHE)
    snapshot = opened.snapshot("a")
    forged = replace(snapshot.record, rules=EVERYTHING)
    opened.store_record(snapshot.epoch.epoch, forged)
    assert not session.receipt("a").is_intact
    opened.store_record(snapshot.epoch.epoch, replace(snapshot.record, description="a remark"))
    assert session.receipt("a").is_intact
    assert session.receipt("a").digest == receipt.digest


def test_a_snapshot_that_is_not_there_is_not_waited_for(session):
    with pytest.raises(NotFoundError):
        session.wait_narrowing("nothing")


def test_a_disk_without_a_filesystem_is_kept_whole_without_a_word(config, volume, origin):
    origin.write_bytes(b"neither a table nor a filesystem" * (origin.stat().st_size // 32))
    with open_session(config, volume) as session:
        receipt = take(session, "a", wait=False)
    assert receipt.snapshot.is_final, "there is nothing to wait for"
    assert (receipt.rules, receipt.is_default, receipt.left_out) == ((), False, ())


@pytest.mark.parametrize("text", ["path:/home/**", "free", "zero"])
def test_a_restore_of_files_is_refused_rather_than_done_to_all_of_the_filesystem(session, text):
    take(session, "a")
    only = (RuleTerm(include=True, text=text),)
    with pytest.raises(RuleError, match="not files"):
        session.start_restore(RestoreRequest(snapshot="a", only=only))
    assert not session.restore_status().is_running
    named = RestoreRequest(snapshot="a", only=(RuleTerm(include=True, text="fs:root"),))
    assert session.plan_restore(named).write_bytes == 0


def test_a_forecast_without_changes_has_nothing_to_tell(session):
    assert session.forecast().instant_count == 0
    session.set_rules(RulesRequest(terms=EVERYTHING))
    take(session, "a")
    seen = session.forecast()
    assert (seen.changed_bytes, seen.candidates) == (0, ())


def test_a_forecast_finds_the_directory_that_changes(opened, origin):
    session = LocalSession(opened)
    session.set_rules(RulesRequest(terms=EVERYTHING))
    take(session, "a")
    secret = where_the_secret_is(origin)
    for start, end in secret:
        opened.engine.pwrite(b"\xcc" * (end - start), offset=start)
    opened.engine.pwrite(b"\xcc" * 4096, offset=0 + 24 * (1 << 20) - 4096)
    seen = session.forecast()
    assert seen.changed_bytes == total_bytes(secret) + 4096
    assert seen.notes == ()
    best = seen.candidates[0]
    assert best.term == "path:/var/cache"
    assert best.share > 0.9
    saved = session.explain(RulesRequest(terms=excluding(best.term)))
    assert total_bytes(intersect(secret, saved.extents)) <= 5 * 4096, "only notes.tmp is left"
    assert session.show_volume().snapshot_count == 1


@pytest.fixture
def latest_changes(opened, monkeypatch):
    """Whenever somebody has waited for `latest` to be final, another snapshot is the latest."""
    begun, go_on = threading.Event(), threading.Event()
    real = narrowing.wait_final

    def wait_then_take(volume, snapshot, **keywords):
        found = real(volume, snapshot, **keywords)
        if not begun.is_set():
            begun.set()
            frozen = narrowing.explain_frozen

            def explain_later(*arguments, **named):
                assert go_on.wait(30)
                return frozen(*arguments, **named)

            monkeypatch.setattr(narrowing, "explain_frozen", explain_later)
            create_snapshot(volume, SnapshotRequest(name="newer"))
            assert not volume.snapshot("latest").record.is_final
        return found

    for module in (bookmarks, restore):
        monkeypatch.setattr(module, "wait_final", wait_then_take)
    yield
    go_on.set()


def test_a_bookmark_of_the_latest_never_holds_more_than_a_final_snapshot(opened, latest_changes):
    """`latest` was looked up again once the lock was had: a snapshot that is not final then lent
    the bookmark its wide selection, and what was narrowed away missed every later increment (P5).
    """
    create_snapshot(opened, SnapshotRequest(name="older"))
    made = bookmarks.create_bookmark(opened, bookmarks.BookmarkRequest(snapshot="latest"))
    assert made.of_snapshot == "older"


def test_a_restore_of_the_latest_is_of_the_one_that_was_final(opened, latest_changes):
    create_snapshot(opened, SnapshotRequest(name="older"))
    plan = restore.plan_restore(opened, RestoreRequest(snapshot="latest"))
    assert plan.snapshot == "older"


def test_an_error_after_the_decision_does_not_make_a_final_snapshot_look_undecided(
    opened, monkeypatch
):
    """Giving space back can fail when the narrowing is durable: the snapshot is final all the same,
    and its export has to be offered.
    """
    offered = []
    monkeypatch.setattr(opened.hooks, "reconcile", lambda volume: offered.append(volume.name))
    engine = opened.engine

    class FailsBehind:
        def __getattr__(self, name):
            return getattr(engine, name)

        def narrow(self, **keywords):
            engine.narrow(**keywords)
            offered.clear()
            raise StoreIOError("giving space back: I/O error")

    monkeypatch.setattr(opened, "engine", FailsBehind())
    create_snapshot(opened, SnapshotRequest(name="a"))
    opened.narrowings.finish()
    assert opened.snapshot("a").record.is_final
    assert offered == [opened.name]
    assert opened.narrowings.of(opened.snapshot("a").epoch.epoch).failure == ""


def test_a_disk_that_lost_its_partition_table_is_restored_all_the_same(opened):
    """The standing rules name partitions that the damaged disk does not have any more; they are
    only for the snapshot that can undo the restore, which then keeps everything.
    """
    rules = (RuleTerm(include=True, text="part:1"), RuleTerm(include=True, text="unpartitioned"))
    set_rules(opened, RulesRequest(terms=rules))
    create_snapshot(opened, SnapshotRequest(name="a"))
    before = opened.engine.pread(offset=0, length=4096)
    opened.engine.pwrite(bytes(1 << 20), offset=0)
    restore.start_restore(opened, RestoreRequest(snapshot="a"))
    assert opened.engine.pread(offset=0, length=4096) == before
    opened.engine.restore_wait(timeout_ms=10_000)
    (safety,) = [s for s in opened.snapshots() if s.record.name.startswith("before-restore")]
    assert (
        total_bytes(opened.engine.selection(epoch=safety.epoch.epoch)) == opened.engine.size_bytes
    )
    assert "part:1" in safety.record.notes[-1]
