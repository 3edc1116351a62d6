"""Check, scrub, an accepted origin: the same for a volume that is served and one that is not."""

from __future__ import annotations

import pytest

from stillblock.errors import InUseError, NotFoundError, StoreDamagedError, UsageError
from stillblock.model import SnapshotState, UsageLevel
from stillblock.operations.snapshots import SnapshotRequest
from stillblock.operations.usage import PolicyRequest, set_policy, store_usage
from stillblock.operations.verification import (
    SHARE_ALL,
    Verdict,
    VerifyKind,
    VerifyRequest,
    check_structure,
)
from stillblock.operations.volume import OpenVolume
from stillblock.service.session import open_session

BLOCK = 4096


@pytest.fixture
def kept(config, volume, request):
    """A snapshot with preserved content, one byte of which rots if the test asks for it."""
    with OpenVolume.open(config, volume) as opened:
        opened.engine.snapshot(selection=((0, 1 << 20),), meta=b"", pause_limit_ms=2000)
        for block in (3, 4, 9):
            opened.engine.pwrite(b"new!" * (BLOCK // 4), offset=block * BLOCK)
        store = opened.engine.store
    if getattr(request, "param", "") == "rotten":
        from pathlib import Path

        (segment,) = (Path(store) / "log").iterdir()
        data = bytearray(segment.read_bytes())
        at = data.index(bytes([4]) * BLOCK)  # block 4 held 4s
        data[at + 100] ^= 1
        segment.write_bytes(data)
    return volume


def verify(session, **words):
    progress = session.start_verification(VerifyRequest(**words))
    while progress.is_running:
        progress = session.wait_verification(timeout_ms=1000)
    return progress


def test_a_sound_store_is_found_sound_and_the_date_is_kept(kept, session):
    assert session.show_volume().last_verified_unix_ns is None
    progress = verify(session)
    assert (progress.done_bytes, progress.total_bytes) == (3 * BLOCK, 3 * BLOCK)
    assert (progress.damaged_blocks, progress.failure) == (0, "")
    report = session.check_structure()
    assert (report.verdict, report.findings, report.snapshots) == (Verdict.OK, (), ())
    assert session.show_volume().last_verified_unix_ns is not None


@pytest.mark.parametrize("kept", ["rotten"], indirect=True)
def test_rotten_content_is_found_told_and_remembered(kept, session, config, request):
    assert session.list_snapshots().snapshots[0].state is SnapshotState.OK  # nobody looked yet
    assert session.check_structure().verdict is Verdict.OK
    assert verify(session).damaged_blocks == 1
    (info,) = session.list_snapshots().snapshots
    assert (info.state, info.damaged_bytes, info.lost_bytes) == (SnapshotState.DAMAGED, BLOCK, 0)
    assert session.receipt(info.name).damaged == ((4 * BLOCK, 5 * BLOCK),)
    report = session.check_structure()
    assert report.verdict is Verdict.DAMAGE
    assert report.snapshots[0].damaged == ((4 * BLOCK, 5 * BLOCK),)
    assert report.advice
    assert session.show_volume().damaged_bytes == BLOCK
    if session.is_remote:
        request.getfixturevalue("host").stop()
        return
    session.close()
    with open_session(config, kept) as again:
        assert again.list_snapshots().snapshots[0].state is SnapshotState.DAMAGED
        again.delete_snapshot(info.name)
        assert again.check_structure().verdict is Verdict.OK
        assert again.show_volume().damaged_bytes == 0


@pytest.mark.parametrize("kept", ["rotten"], indirect=True)
def test_content_that_a_reader_finds_rotten_is_damage_from_then_on(kept, config):
    with OpenVolume.open(config, kept) as volume:
        (snapshot,) = volume.snapshots()
        view = volume.engine.view(epoch=snapshot.epoch.epoch)
        with pytest.raises(StoreDamagedError, match="block 4"):
            view.pread(offset=4 * BLOCK, length=BLOCK)
        assert view.pread(offset=3 * BLOCK, length=BLOCK) == bytes([3]) * BLOCK
        view.close()
        assert volume.snapshots()[0].state is SnapshotState.DAMAGED


def test_a_slow_scrub_can_be_seen_and_cancelled_and_there_is_only_one(kept, session):
    with pytest.raises(NotFoundError):
        session.cancel_verification()
    started = session.start_verification(VerifyRequest(bytes_per_s=1))
    assert started.is_running
    assert started.purpose is VerifyKind.SCRUB
    with pytest.raises(InUseError, match="scrub"):
        session.start_verification(VerifyRequest())
    assert session.verification_status().is_running
    last = session.cancel_verification()
    assert (last.is_running, last.is_cancelled) == (False, True)
    assert last.done_bytes < last.total_bytes
    assert session.show_volume().last_verified_unix_ns is None


def test_a_part_of_the_content_is_no_verification_of_all(kept, session):
    progress = verify(session, share=1)
    assert progress.total_bytes < 3 * BLOCK
    assert session.show_volume().last_verified_unix_ns is None
    with pytest.raises(UsageError):
        session.start_verification(VerifyRequest(share=0))
    with pytest.raises(UsageError):
        session.start_verification(VerifyRequest(share=SHARE_ALL + 1))


def test_an_origin_that_others_wrote_to_is_accepted_with_a_note(config, volume, origin):
    with open_session(config, volume) as session:
        session.create_snapshot(SnapshotRequest(name="monday"))
    with origin.open("r+b") as disk:
        disk.write(b"outside")
    with open_session(config, volume) as session:
        assert session.show_snapshot("monday").state is SnapshotState.SUSPECT
        assert session.check_structure().verdict is Verdict.WARNING
        done = session.accept_origin(note="a file server's label")
        assert (done.snapshots, done.still_suspect) == (("monday",), ())
    with open_session(config, volume) as session:
        info = session.show_snapshot("monday")
        assert (info.state, info.is_suspect) == (SnapshotState.OK, False)
        assert "outside" in info.accepted
        assert "a file server's label" in info.accepted
        assert session.accept_origin().snapshots == ()


def test_a_store_that_fills_up_is_a_warning_of_the_check(config, volume):
    with OpenVolume.open(config, volume) as opened:
        assert check_structure(opened).verdict is Verdict.OK
        set_policy(opened, PolicyRequest(limit_bytes=4 << 20))
        byte = 1
        while store_usage(opened).level is UsageLevel.OK:
            opened.engine.snapshot(selection=((0, 1 << 20),), meta=b"", pause_limit_ms=2000)
            opened.engine.pwrite(bytes([byte]) * (1 << 19), offset=0)
            opened.engine.flush()
            byte += 1
        report = check_structure(opened)
        assert (report.verdict, report.findings) == (Verdict.WARNING, ())
        (advice,) = report.advice
        assert "the store" in advice
        assert "delete a snapshot" in advice
