"""Clones as a session knows them, wherever the volume is open."""

import time

import pytest

from stillblock.errors import (
    InUseError,
    NameTakenError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from stillblock.model import CloneState, RuleTerm
from stillblock.operations import clones
from stillblock.operations.clones import CloneRequest
from stillblock.operations.promotion import ImageWriteError, PromoteRequest
from stillblock.operations.snapshots import SnapshotRequest, create_snapshot
from stillblock.operations.volume import OpenVolume

KIB = 1024
HALF = 512 * KIB


def take(session, name="monday", **fields):
    return session.create_snapshot(SnapshotRequest(name=name, **fields)).snapshot


def clone(session, name="rehearsal", snapshot="monday", **fields):
    return session.create_clone(CloneRequest(snapshot=snapshot, name=name, **fields))


def test_a_clone_is_listed_with_its_snapshot_and_costs_kilobytes(session):
    snapshot = take(session)
    made = clone(session, description="before the upgrade")
    assert made.reference == "web@monday+rehearsal"
    assert (made.size_bytes, made.own_bytes, made.state) == (1024 * KIB, 0, CloneState.OK)
    assert made.stored_bytes <= 64 * KIB
    assert made.epoch == snapshot.epoch
    found = session.list_clones()
    assert found.clones == (made,)
    assert found.stored_bytes == made.stored_bytes
    assert session.show_clone("monday", "rehearsal") == made
    assert session.show_clone("monday", made.id[:8]) == made
    assert session.show_snapshot("monday").clone_count == 1
    assert session.list_snapshots().snapshots[0].clone_count == 1
    assert session.show_volume().clone_count == 1


def test_a_name_belongs_to_one_clone_of_a_snapshot(session):
    take(session)
    take(session, "tuesday")
    clone(session)
    with pytest.raises(NameTakenError, match="rehearsal"):
        clone(session)
    clone(session, snapshot="tuesday")
    names = {clone(session, name=None).name for _ in range(3)}
    assert len(names) == 3
    with pytest.raises(UsageError):
        clone(session, "latest")


def test_a_clone_needs_a_snapshot_that_is_there(session):
    with pytest.raises(NotFoundError):
        clone(session)
    take(session)
    with pytest.raises(NotFoundError, match="no clone"):
        session.show_clone("monday", "rehearsal")


def test_a_snapshot_with_clones_is_not_deleted_without_saying_so(session):
    take(session)
    clone(session)
    clone(session, "other")
    plan = session.plan_delete("monday")
    assert plan.clones == ("rehearsal", "other")
    with pytest.raises(InUseError, match="2 clones: rehearsal, other"):
        session.delete_snapshot("monday")
    assert len(session.list_clones().clones) == 2
    session.delete_snapshot("monday", force=True)
    assert session.list_clones().clones == ()
    assert session.list_snapshots().snapshots == ()


def test_a_deleted_clone_leaves_its_snapshot_and_the_others(session):
    take(session)
    clone(session)
    other = clone(session, "other")
    gone = session.delete_clone("monday", "rehearsal")
    assert gone.clone.name == "rehearsal"
    assert gone.freed_bytes == gone.clone.stored_bytes
    assert session.list_clones().clones == (other,)
    session.delete_clone("monday", "other")
    session.delete_snapshot("monday")


def test_a_renamed_snapshot_keeps_its_clones(session):
    take(session)
    made = clone(session)
    session.rename_snapshot("monday", name="first")
    assert session.list_clones().clones[0].reference == "web@first+rehearsal"
    assert session.list_clones().clones[0].id == made.id


def test_a_lifetime_is_told_and_has_to_make_sense(session):
    take(session)
    before = time.time_ns()
    made = clone(session, lifetime_s=3600)
    assert made.expires_unix_ns is not None
    assert before <= made.expires_unix_ns - 3600 * 10**9 <= time.time_ns()
    for seconds in (0, -1, clones.LIFETIME_S_MAX + 1):
        with pytest.raises(UsageError):
            clone(session, "other", lifetime_s=seconds)


def test_a_clone_whose_time_is_over_goes_when_nobody_uses_it(config, volume):
    with OpenVolume.open(config, volume) as opened:
        create_snapshot(opened, SnapshotRequest(name="monday"))
        for name, lifetime in (("short", 60), ("long", 7200), ("ever", None)):
            request = CloneRequest(snapshot="monday", name=name, lifetime_s=lifetime)
            clones.create_clone(opened, request)
        assert clones.expire(opened) == ()
        later = time.time_ns() + 3600 * 10**9
        assert clones.expire(opened, now_ns=later) == ("web@monday+short",)
        left = [info.name for info in clones.list_clones(opened).clones]
        assert left == ["long", "ever"]


def test_what_was_written_to_a_clone_stays_and_is_forgotten_by_a_reset(config, volume, origin):
    content = origin.read_bytes()
    with OpenVolume.open(config, volume) as opened:
        terms = (RuleTerm(include=False, text="512K-"),)
        create_snapshot(opened, SnapshotRequest(name="monday", terms=terms))
        made = clones.create_clone(opened, CloneRequest(snapshot="monday", name="x"))
        disk = opened.engine.open_clone(number=made.number)
        disk.pwrite(b"new" * 1000, offset=5000)
        assert disk.pread(offset=0, length=5000) == content[:5000]
        assert disk.pread(offset=8000, length=HALF - 8000) == content[8000:HALF]
        assert disk.pread(offset=HALF, length=HALF) == bytes(HALF)
    with OpenVolume.open(config, volume) as opened:
        info = clones.show_clone(opened, clones.CloneTarget(snapshot="monday", clone="x"))
        assert info.own_bytes == 4096
        disk = opened.engine.open_clone(number=made.number)
        assert disk.pread(offset=5000, length=3000) == b"new" * 1000
        disk.close()
        change = clones.CloneChange(snapshot="monday", clone="x")
        assert clones.reset_clone(opened, change).freed_bytes >= 4096
        disk = opened.engine.open_clone(number=made.number)
        assert disk.pread(offset=0, length=HALF) == content[:HALF]
    assert origin.read_bytes() == content


def test_a_promoted_clone_is_a_raw_image_of_its_own(session, tmp_path, origin):
    take(session, terms=(RuleTerm(include=False, text="0-64K"),))
    clone(session)
    target = tmp_path / "new.img"
    request = PromoteRequest(snapshot="monday", clone="rehearsal", path=str(target))
    session.start_promotion(request)
    while (progress := session.wait_promotion(timeout_ms=1000)).is_running:
        pass
    assert (progress.is_done, progress.failure) == (True, "")
    assert progress.left_out_bytes == 64 * KIB
    assert target.read_bytes() == bytes(64 * KIB) + origin.read_bytes()[64 * KIB :]
    assert [path.name for path in tmp_path.glob("new.img*")] == ["new.img"]
    with pytest.raises(RefusedError, match="exists"):
        session.start_promotion(request)
    assert [c.state for c in session.list_clones().clones] == [CloneState.OK]


def test_an_image_needs_a_place_to_be(session, tmp_path):
    take(session)
    clone(session)
    for path in ("relative.img", str(tmp_path / "nowhere" / "new.img")):
        request = PromoteRequest(snapshot="monday", clone="rehearsal", path=path)
        with pytest.raises((UsageError, ImageWriteError), match=r"path|made"):
            session.start_promotion(request)
    assert not session.wait_promotion(timeout_ms=1).is_running
    session.delete_clone("monday", "rehearsal")
