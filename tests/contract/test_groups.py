"""Groups: one instant of several volumes, with a server and without one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillblock import codec
from stillblock.config import Config
from stillblock.errors import (
    InUseError,
    NameTakenError,
    NotQuietError,
    QuiesceError,
    UndecidedError,
    UsageError,
)
from stillblock.model import Consistency, Quiet, RuleTerm, SnapshotState
from stillblock.operations import recovery, volumes
from stillblock.operations.consistency import ConsistencyRequest
from stillblock.operations.groups import GroupRequest, MemberRequest
from stillblock.operations.snapshots import SnapshotRequest
from stillblock.service.groups import GroupSession
from stillblock.service.serve import ServeOptions, VolumeHost
from stillblock.service.session import open_session

NAMES = ("data", "wal", "more")
DISK_BYTES = 64 * 4096


@pytest.fixture
def three(config: Config, tmp_path: Path) -> tuple[str, ...]:
    for number, name in enumerate(NAMES):
        origin = tmp_path / f"{name}.img"
        origin.write_bytes(bytes([number + 1]) * DISK_BYTES)
        request = volumes.AddRequest(name=name, origin=origin)
        volumes.add_volume(config, volumes.plan_add(config, request))
    return NAMES


def serving(config: Config, names: tuple[str, ...]) -> Iterator[None]:
    host = VolumeHost(config, ServeOptions())
    with host:
        host.start(names)
        thread = threading.Thread(target=lambda: asyncio.run(host.run(handles_signals=False)))
        thread.start()
        yield
        host.stop()
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture(params=["local", "remote"])
def reachable(
    request: pytest.FixtureRequest, config: Config, three: tuple[str, ...]
) -> Iterator[str]:
    if request.param == "remote":
        for _ in serving(config, three):
            yield request.param
    else:
        yield request.param


def asked(*members: str, **others: object) -> GroupRequest:
    named = [member.partition("@")[::2] for member in members]
    return GroupRequest(
        members=tuple(MemberRequest(volume=v, name=n or None) for v, n in named),
        **others,  # type: ignore[arg-type]
    )


def listed(config: Config, name: str) -> list[str]:
    with open_session(config, name) as session:
        return [s.name for s in session.list_snapshots().snapshots]


def test_a_group_is_on_every_volume_and_each_says_of_the_others(config: Config, reachable: str):
    request = asked("wal@now", "data@then", description="both")
    with GroupSession(config, request) as group:
        assert all(s.is_remote == (reachable == "remote") for s in group.sessions.values())
        taken = group.create()
    assert taken.group.members == ("wal@now", "data@then")
    assert [r.snapshot.reference for r in taken.receipts] == ["wal@now", "data@then"]
    for receipt in taken.receipts:
        assert receipt.snapshot.group == taken.group
        assert (receipt.in_flight, receipt.consistency) == (0, "barrier")
    with open_session(config, "data") as session:
        again = session.show_snapshot("then")
        assert (again.group, again.description, again.undecided) == (taken.group, "both", "")
        assert again.state is SnapshotState.OK
        assert session.receipt("then").is_intact
    assert listed(config, "more") == []


def test_members_without_a_name_get_the_same_one(config: Config, reachable: str):
    with GroupSession(config, asked("data", "wal")) as group:
        taken = group.create()
    assert len({receipt.snapshot.name for receipt in taken.receipts}) == 1
    assert reachable


def test_a_name_that_one_volume_has_already_leaves_all_without(config: Config, reachable: str):
    with open_session(config, "wal") as session:
        session.create_snapshot(SnapshotRequest(name="now"))
    with GroupSession(config, asked("data@now", "wal@now")) as group, pytest.raises(NameTakenError):
        group.create()
    assert (listed(config, "data"), listed(config, "wal")) == ([], ["now"])
    assert reachable


def test_a_plan_takes_nothing(config: Config, reachable: str):
    terms = (RuleTerm(include=False, text="0-8KiB"),)
    with GroupSession(config, asked("data@now", "wal@now", terms=terms)) as group:
        plans = group.plan().plans
    assert [plan.selected_bytes for plan in plans] == [DISK_BYTES - 8192] * 2
    assert (listed(config, "data"), listed(config, "wal")) == ([], [])
    assert reachable


def test_if_one_volume_cannot_be_quiesced_none_has_a_snapshot(
    config: Config, reachable: str, tmp_path: Path
):
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    hook = hooks / "fails"
    hook.write_text(f'#!/bin/sh\necho "$STILLBLOCK_VOLUME $1" >> {tmp_path}/called\nexit 7\n')
    hook.chmod(0o700)
    with open_session(config, "wal") as session:
        session.set_consistency(ConsistencyRequest(level=Consistency.APPLICATION, hooks=str(hooks)))
    with GroupSession(config, asked("data@now", "wal@now")) as group, pytest.raises(QuiesceError):
        group.create()
    assert (listed(config, "data"), listed(config, "wal")) == ([], [])
    assert (tmp_path / "called").read_text().splitlines() == ["wal before", "wal after"]
    with GroupSession(config, asked("data@now", "wal@now", or_barrier=True)) as group:
        taken = group.create()
    assert [bool(r.snapshot.shortfall) for r in taken.receipts] == [False, True]
    assert reachable


def hooks_of(config: Config, name: str, folder: Path, script: str, *, limit_ms: int) -> None:
    """Have snapshots of a volume prepared by a hook."""
    folder.mkdir()
    hook = folder / "hook"
    hook.write_text(f"#!/bin/sh\n{script}\n")
    hook.chmod(0o700)
    with open_session(config, name) as session:
        session.set_consistency(
            ConsistencyRequest(
                level=Consistency.APPLICATION, hooks=str(folder), hook_limit_ms=limit_ms
            )
        )


def test_if_one_did_not_hold_still_until_the_instant_none_has_a_snapshot(
    config: Config, three: tuple[str, ...], tmp_path: Path
):
    """The hooks of `data` end by themselves, and only then do those of `wal` come to their end."""
    ended = tmp_path / "ended"
    after = f'[ "$1" = before ] || : > {ended}'
    until = f'[ "$1" = after ] || while [ ! -e {ended} ]; do sleep 0.02; done'
    hooks_of(config, "data", tmp_path / "data", after, limit_ms=300)
    hooks_of(config, "wal", tmp_path / "wal", until, limit_ms=20_000)
    group = GroupSession(config, asked("data@now", "wal@now"))
    with group, pytest.raises(QuiesceError, match=r"data: application was not held .*hooks ended"):
        group.create()
    assert (listed(config, "data"), listed(config, "wal")) == ([], [])
    ended.unlink()
    with GroupSession(config, asked("data@now", "wal@now", or_barrier=True)) as group:
        taken = group.create()
    assert [bool(r.snapshot.shortfall) for r in taken.receipts] == [True, False]
    assert three


def test_a_hook_that_fails_after_the_instant_is_told_and_all_have_their_snapshots(
    config: Config, three: tuple[str, ...], tmp_path: Path
):
    hooks_of(config, "wal", tmp_path / "wal", '[ "$1" = before ]', limit_ms=20_000)
    group = GroupSession(config, asked("data@now", "wal@now"))
    with group, pytest.raises(QuiesceError, match="data@now, wal@now were taken"):
        group.create()
    assert (listed(config, "data"), listed(config, "wal")) == (["now"], ["now"])
    with open_session(config, "wal") as session:
        assert "hooks failed after the instant" in session.show_snapshot("now").shortfall
    assert three


def test_nobody_is_held_still_while_another_waits_for_a_quiet_moment(
    config: Config, three: tuple[str, ...], tmp_path: Path
):
    called = tmp_path / "called"
    hooks_of(config, "wal", tmp_path / "wal", f": > {called}", limit_ms=20_000)
    with open_session(config, "data") as session:
        session.set_consistency(ConsistencyRequest(level=Consistency.IDLE))
    for ask in (GroupSession.plan, GroupSession.create):
        group = GroupSession(config, asked("data@now", "wal@now"))
        with group, pytest.raises(UsageError, match="waits for a quiet moment") as refused:
            ask(group)
        assert "--consistency" in str(refused.value)
    assert not called.exists()
    assert (listed(config, "data"), listed(config, "wal")) == ([], [])
    assert three


@pytest.fixture
def apart(config: Config, three: tuple[str, ...]) -> tuple[str, str, Path]:
    """A group of which one member does not know the end; both, and the store that does."""
    assert three
    with GroupSession(config, asked("data@now", "wal@now")) as group:
        group.create()
    with volumes.open_catalog(config) as catalog:
        entries = sorted((catalog.volume(v) for v in ("data", "wal")), key=lambda e: e.uuid)
    knows, asks = entries
    journal = Path(asks.store) / "journal"
    content = journal.read_bytes()
    kinds = {
        at: content[at + 16] for at in range(0, len(content), 512) if content[at:][:4] == b"SBJR"
    }
    journal.write_bytes(content[: next(at for at, kind in kinds.items() if kind == 27)])
    plan = recovery.plan_recover(config, asks.name, how="discard")
    away = Path(knows.store).rename(Path(knows.store).with_name("away"))
    recovery.recover_volume(config, plan, how="discard")
    return knows.name, asks.name, away


def test_a_member_is_served_undecided_and_asks_again_when_somebody_looks(
    config: Config, apart: tuple[str, str, Path]
):
    knows, asks, away = apart
    for _ in serving(config, (asks,)):
        with open_session(config, asks) as session:
            shown = session.show_snapshot("now")
            assert shown.state is SnapshotState.UNDECIDED
            with pytest.raises(UndecidedError):
                session.rename_snapshot("now", name="then")
            away.rename(away.with_name(knows))
            (again,) = session.list_snapshots().snapshots
            assert (again.state, again.undecided) == (SnapshotState.OK, "")


def test_the_store_that_others_have_to_ask_is_not_removed(
    config: Config, apart: tuple[str, str, Path]
):
    knows, asks, away = apart
    away.rename(away.with_name(knows))
    with pytest.raises(InUseError, match=f"snapshots of {asks} exist"):
        volumes.plan_remove(config, knows)
    assert listed(config, asks) == ["now"]
    volumes.remove_volume(config, volumes.plan_remove(config, knows))
    with open_session(config, asks) as session:
        assert session.show_snapshot("now").state is SnapshotState.OK


def test_a_snapshot_of_which_nobody_can_tell_is_kept_with_a_note(
    config: Config, apart: tuple[str, str, Path]
):
    _, asks, _ = apart
    for _ in serving(config, (asks,)):
        with open_session(config, asks) as session:
            kept = session.keep_undecided(note="the other disk burned")
            assert kept.snapshots == ("now",)
            shown = session.show_snapshot("now")
            assert shown.state is SnapshotState.OK
            assert shown.group is not None
            assert shown.group.kept.endswith(": the other disk burned")
            assert session.keep_undecided().snapshots == ()
            assert session.receipt("now").is_intact


def test_a_group_waits_until_all_that_ask_for_it_are_quiet(config: Config, reachable: str):
    with open_session(config, "wal") as session:
        session.set_consistency(ConsistencyRequest(level=Consistency.IDLE, quiet_ms=20))
    with GroupSession(config, asked("data@now", "wal@now")) as group:
        first, second = group.create().receipts
    assert (first.consistency, second.consistency) == ("barrier", "idle")
    with open_session(config, "wal") as session:
        session.set_consistency(ConsistencyRequest(quiet_ms=500, idle_limit_ms=20))
    with GroupSession(config, asked("data@b", "wal@b")) as group, pytest.raises(NotQuietError):
        group.create()
    assert (listed(config, "data"), listed(config, "wal")) == (["now"], ["now"])
    assert reachable


def test_who_waits_is_asked_for_once_or_kept_and_is_in_the_receipt(config: Config, reachable: str):
    with GroupSession(config, asked("data@a", "wal@a", quiet=Quiet.SELECTED)) as group:
        taken = group.create()
    assert [r.quiescing and r.quiescing.is_quiet_selected for r in taken.receipts] == [True] * 2
    with open_session(config, "more") as session:
        first = session.create_snapshot(SnapshotRequest(name="a"))
        assert session.set_consistency(ConsistencyRequest(quiet=Quiet.SELECTED)).settings.quiet
        kept = session.create_snapshot(SnapshotRequest(name="b"))
        other = session.create_snapshot(SnapshotRequest(name="c", quiet=Quiet.DEVICE))
        told = [r.quiescing and r.quiescing.is_quiet_selected for r in (first, kept, other)]
        assert told == [False, True, False]
        assert all(session.receipt(name).is_intact for name in "abc")
    assert reachable


@pytest.mark.parametrize("members", [("data@a",), ("data@a", "data@b")])
def test_a_group_needs_several_volumes_each_once(
    config: Config, three: tuple[str, ...], members: tuple[str, ...]
):
    with pytest.raises(UsageError):
        GroupSession(config, asked(*members))
    assert three


def test_a_group_needs_one_process(config: Config, three: tuple[str, ...]):
    for _ in serving(config, ("data", "more")):
        with (
            pytest.raises(UsageError, match="wal is not"),
            GroupSession(config, asked("data", "wal")),
        ):
            pass
        for _ in serving(config, ("wal",)):
            group = GroupSession(config, asked("data", "wal"))
            with group, pytest.raises(UsageError, match="one instant needs one process"):
                group.create()
    assert three


def test_a_group_of_a_plan_and_its_receipts_go_through_json():
    request = asked("data@now", "wal", or_barrier=True)
    assert codec.from_json(GroupRequest, codec.to_json(request)) == request
