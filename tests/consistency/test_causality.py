"""What four clients saw in order is in a snapshot in that order."""

from __future__ import annotations

import random
import struct
import threading
import time
from collections import defaultdict
from dataclasses import dataclass

import pytest

from serving import BLOCK, Served, volume
from stillblock.model import Quiet, RuleTerm
from stillblock.operations.snapshots import SnapshotRequest

CLIENTS = 4
BLOCKS_EACH = 512
SNAPSHOTS = 24
STAMP = struct.Struct("<QQ")


@dataclass(frozen=True)
class Write:
    """A block as one request wrote it, with the times before it was sent and after its reply."""

    block: int
    number: int
    sent_ns: int
    acknowledged_ns: int


class Client(threading.Thread):
    """Stamps blocks of its own part over one connection: small, larger, and past the buffer."""

    def __init__(self, served: Served, which: int) -> None:
        super().__init__()
        self.served, self.which = served, which
        self.writes: list[Write] = []
        self.is_stopping = threading.Event()
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001 - told by the test's thread
            self.problem = error

    def _run(self) -> None:
        dice, number = random.Random(self.which), 0
        base = self.which * BLOCKS_EACH
        with self.served.client() as client:
            while not self.is_stopping.is_set():
                count = dice.choice([1, 1, 1, 1, 2, 5, 96])
                first = base + dice.randrange(BLOCKS_EACH - count)
                stamps = range(number + 1, number + 1 + count)
                data = b"".join(
                    STAMP.pack(first + at, stamp).ljust(BLOCK, b"\0")
                    for at, stamp in enumerate(stamps)
                )
                sent_ns = time.monotonic_ns()
                client.pwrite(data, offset=first * BLOCK)
                acknowledged_ns = time.monotonic_ns()
                self.writes += [
                    Write(first + at, stamp, sent_ns, acknowledged_ns)
                    for at, stamp in enumerate(stamps)
                ]
                number += count
                if dice.random() < 0.02:
                    client.flush()


@pytest.mark.slow
@pytest.mark.parametrize("quiet", list(Quiet))
def test_what_was_acknowledged_before_what_was_sent_is_in_before_it(quiet: Quiet):
    # Where only writers of selected blocks wait, those of the others are on their way meanwhile.
    selected = CLIENTS * BLOCKS_EACH // (2 if quiet is Quiet.SELECTED else 1)
    terms = (RuleTerm(include=True, text=f"0-{selected * BLOCK}"),)
    with volume(bytes(CLIENTS * BLOCKS_EACH * BLOCK)) as served:
        served.start()
        clients = [Client(served, which) for which in range(CLIENTS)]
        for client in clients:
            client.start()
        taken = []
        with served.session() as session:
            for number in range(SNAPSHOTS):
                called_ns = time.monotonic_ns()
                request = SnapshotRequest(name=f"s{number}", terms=terms, quiet=quiet)
                receipt = session.create_snapshot(request)
                taken.append((f"s{number}", called_ns, time.monotonic_ns(), receipt))
                # Half of the instants fall into the first changes of an epoch, half do not.
                enough = sum(len(client.writes) for client in clients) + (number % 2) * 500
                while sum(len(client.writes) for client in clients) < enough:
                    assert all(client.is_alive() for client in clients)
                    time.sleep(0.001)
        for client in clients:
            client.is_stopping.set()
        for client in clients:
            client.join(30)
            assert client.problem is None
        writes = [write for client in clients for write in client.writes]
        by_block = defaultdict(list)
        for write in writes:
            if write.block < selected:
                by_block[write.block].append(write)
        for name, called_ns, returned_ns, receipt in taken:
            check(served.read(name), by_block, called_ns, returned_ns)
            assert receipt.pause_ns is not None
            assert receipt.in_flight is not None


def check(
    content: bytes, by_block: dict[int, list[Write]], called_ns: int, returned_ns: int
) -> None:
    inside: list[Write] = []
    outside: list[Write] = []
    for block, writes in by_block.items():
        stamped, number = STAMP.unpack_from(content, block * BLOCK)
        assert (stamped, number) == (0, 0) or stamped == block
        assert number == 0 or number in {write.number for write in writes}
        for write in writes:
            (inside if write.number <= number else outside).append(write)
    assert all(write.acknowledged_ns >= called_ns for write in outside), "acknowledged before"
    assert all(write.sent_ns <= returned_ns for write in inside), "sent after"
    # If any write that is in was sent after one was acknowledged, that one is in.
    last_sent_ns = max((write.sent_ns for write in inside), default=0)
    assert all(write.acknowledged_ns >= last_sent_ns for write in outside), "an effect, no cause"
