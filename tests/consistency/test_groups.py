"""Groups on a real server: causality over two volumes, and kill -9."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mounted import formatted, mounted
from serving import BLOCK, Served, volume
from stillblock.config import Config
from stillblock.demo.nbd_client import NbdClient, NbdError
from stillblock.errors import StillblockError
from stillblock.model import Consistency
from stillblock.operations.consistency import ConsistencyRequest
from stillblock.operations.groups import GroupReceipt, GroupRequest, MemberRequest
from stillblock.service.groups import GroupSession

CLIENTS = 4
SNAPSHOTS = 24
KILLS = 4
NAMES = ("data", "wal")
NUMBER = struct.Struct("<Q")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@contextlib.contextmanager
def two_volumes() -> Iterator[Served]:
    """`data`, and beside it in the same state directory `wal`."""
    with volume(bytes(CLIENTS * BLOCK), name="data") as served:
        other = served.folder / "wal.img"
        other.write_bytes(bytes(CLIENTS * BLOCK))
        served.cli("volume", "add", "wal", "--origin", str(other))
        yield served


def client_of(served: Served, name: str) -> NbdClient:
    return NbdClient(socket_path=served.socket, export=name)


class Client(threading.Thread):
    """Counts on, on one volume and then on the other, as each write is acknowledged.

    So the two differ by one at any one moment. What it knows of others goes through nobody else.
    """

    def __init__(self, served: Served, which: int, begin: int = 0) -> None:
        super().__init__()
        self.served, self.which = served, which
        self.number = begin
        self.is_stopping = threading.Event()
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            self._run()
        except (NbdError, OSError):
            pass  # killed, where that is the test
        except BaseException as error:  # noqa: BLE001 - told by the test's thread
            self.problem = error

    def _run(self) -> None:
        dice = random.Random(self.which)
        with client_of(self.served, "data") as data, client_of(self.served, "wal") as wal:
            while not self.is_stopping.is_set():
                number = self.number + 1
                target = (wal, data)[number % 2]
                target.pwrite(NUMBER.pack(number).ljust(BLOCK, b"\0"), offset=self.which * BLOCK)
                self.number = number
                if dice.random() < 0.01:
                    target.flush()


def take(served: Served, name: str) -> GroupReceipt:
    request = GroupRequest(members=tuple(MemberRequest(volume=v, name=name) for v in NAMES))
    with GroupSession(Config.load(state_dir=served.folder / "s"), request) as group:
        return group.create()


def numbers(served: Served, export: str) -> list[int]:
    with client_of(served, export) as client:
        content = client.pread(offset=0, length=CLIENTS * BLOCK)
    return [NUMBER.unpack_from(content, which * BLOCK)[0] for which in range(CLIENTS)]


def check_of_one_moment(served: Served, name: str) -> list[tuple[int, int]]:
    pairs = list(zip(*(numbers(served, f"{v}@{name}") for v in NAMES), strict=True))
    for one, other in pairs:
        assert abs(one - other) <= 1, f"{name}: an effect on one volume without its cause: {pairs}"
    return pairs


def test_an_effect_on_one_volume_is_in_only_with_its_cause_on_the_other():
    with two_volumes() as served:
        served.start("wal")
        clients = [Client(served, which) for which in range(CLIENTS)]
        for client in clients:
            client.start()
        taken = []
        for number in range(SNAPSHOTS):
            before = [client.number for client in clients]
            receipt = take(served, f"s{number}")
            taken.append((f"s{number}", before, [client.number + 1 for client in clients]))
            assert [r.snapshot.group for r in receipt.receipts] == [receipt.group] * 2
            enough = [client.number + 20 for client in clients]
            while any(c.number < e for c, e in zip(clients, enough, strict=True)):
                assert all(client.is_alive() for client in clients)
                time.sleep(0.001)
        for client in clients:
            client.is_stopping.set()
        for client in clients:
            client.join(30)
            assert client.problem is None
        for name, before, after in taken:
            pairs = check_of_one_moment(served, name)
            for pair, low, high in zip(pairs, before, after, strict=True):
                assert max(pair) >= low, "acknowledged before, and not in"
                assert max(pair) <= high, "sent after, and in"


def test_after_a_kill_at_any_time_both_have_the_snapshot_or_neither():
    dice = random.Random(5)
    with two_volumes() as served:
        acknowledged: list[str] = []
        begin = [0] * CLIENTS
        for kill in range(KILLS):
            served.name = "data"
            served.start("wal")
            clients = [Client(served, which, begin[which]) for which in range(CLIENTS)]
            for client in clients:
                client.start()
            killer = threading.Timer(0.05 + dice.random() * 0.4, served.kill)
            killer.start()
            with contextlib.suppress(StillblockError):
                for number in range(1000):
                    take(served, f"k{kill}-{number}")
                    acknowledged.append(f"k{kill}-{number}")
            killer.join()
            for client in clients:
                client.join(30)
                assert client.problem is None
            listed = check_after_kill(served, order=NAMES[:: dice.choice([1, -1])])
            assert set(acknowledged) <= listed
            begin = [client.number + client.number % 2 + 2 for client in clients]


def check_after_kill(served: Served, order: tuple[str, ...]) -> set[str]:
    """Serve both again, in either order, and compare what they have."""
    served.name = order[0]
    served.start(order[1])
    found = []
    for name in NAMES:
        served.name = name
        with served.session() as session:
            listed = session.list_snapshots().snapshots
        assert not any(s.undecided for s in listed)
        found.append({s.name for s in listed})
    assert found[0] == found[1]
    for name in found[0]:
        check_of_one_moment(served, name)
    assert served.stop().code == 0
    return found[0]


@pytest.mark.needs("nbdfuse", "losetup", "mkfs.ext4", "fusermount3")
def test_a_frozen_member_holds_nobody_longer_than_its_instant_takes(tmp_path: Path):
    """Thawing ext4 writes its superblock and waits for it: the group must not wait for that."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    hook = hooks / "hook"
    hook.write_text("#!/bin/sh\ntrue\n")
    hook.chmod(0o700)
    with formatted() as served:
        other = served.folder / "wal.img"
        other.write_bytes(bytes(CLIENTS * BLOCK))
        served.cli("volume", "add", "wal", "--origin", str(other))
        served.start("wal")
        with mounted(served) as disk:
            (disk.point / "file").write_bytes(b"a" * BLOCK)
            with served.session() as session:
                session.set_consistency(
                    ConsistencyRequest(
                        mounts=(str(disk.point),), hooks=str(hooks), freeze_limit_ms=10_000
                    )
                )
            with client_of(served, "wal") as wal:
                flusher = Flusher(wal)
                flusher.start()
                for level in ("filesystem", "application"):
                    with served.session() as session:
                        session.set_consistency(ConsistencyRequest(level=Consistency(level)))
                    members = ("web", "wal")
                    request = GroupRequest(
                        members=tuple(MemberRequest(volume=v, name=level) for v in members)
                    )
                    with GroupSession(Config.load(state_dir=served.folder / "s"), request) as group:
                        taken = group.create()
                    web = taken.receipts[0]
                    assert (web.consistency, web.snapshot.shortfall) == (level, "")
                    assert web.quiescing is not None
                    kinds = [str(step.kind) for step in web.quiescing.steps]
                    assert kinds.index("freeze") < kinds.index("thaw")
                    assert disk.can_write()
                flusher.is_stopping.set()
                flusher.join(60)
                assert flusher.longest_s < 5, "a client of the other waited for the thaw"


class Flusher(threading.Thread):
    """Writes and flushes, and knows how long that took at worst."""

    def __init__(self, client: NbdClient) -> None:
        super().__init__()
        self.client = client
        self.is_stopping = threading.Event()
        self.longest_s = 0.0

    def run(self) -> None:
        number = 0
        while not self.is_stopping.is_set():
            number += 1
            began = time.monotonic()
            self.client.pwrite(NUMBER.pack(number).ljust(BLOCK, b"\0"), offset=0)
            self.client.flush()
            self.longest_s = max(self.longest_s, time.monotonic() - began)


def test_one_volume_whose_store_decides_elsewhere_says_so(tmp_path: Path):
    """The other journal's last word on the group is taken away, then the store that has it."""
    with two_volumes() as served:
        served.start("wal")
        take(served, "now")
        assert served.stop().code == 0
        state = served.folder / "s"
        stores = {"data": served.store, "wal": state / "stores" / "wal"}
        uuids = {v: uuid_of(served, v) for v in NAMES}
        first, last = sorted(NAMES, key=uuids.__getitem__)
        forget_the_decision(stores[last] / "journal")
        stores[first].rename(tmp_path / "away")
        served.cli("volume", "recover", last, "--discard", "--yes")
        shown = served.cli("snapshot", "show", f"{last}@now", "--json").json["snapshot"]
        assert shown["state"] == "undecided"
        assert str(stores[first]) in shown["undecided"]
        text = served.cli("snapshot", "list", last).out
        assert "UNDECIDED" in text
        diff = served.try_cli("snapshot", "diff", f"{last}@now", "--json")
        assert json.loads(diff.err)["error"]["code"] == "undecided"
        (tmp_path / "away").rename(stores[first])


def uuid_of(served: Served, name: str) -> str:
    return str(served.cli("volume", "show", name, "--json").json["volume"]["uuid"])


def forget_the_decision(journal: Path) -> None:
    """End a journal before its record GroupDecided, as a kill right before it would have."""
    content = journal.read_bytes()
    for start in range(0, len(content), 512):
        is_record = content[start : start + 4] == b"SBJR"
        if is_record and int.from_bytes(content[start + 16 : start + 20], "little") == 27:
            journal.write_bytes(content[:start])
            return
    raise AssertionError("the journal says nothing of a group")
