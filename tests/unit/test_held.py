"""What a snapshot holds, why not, and what is given in the place of what it does not."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest

from stillblock import native
from stillblock.errors import ExcludedError, OriginIOError, SnapshotLostError
from stillblock.extents import intersect, subtract
from stillblock.model import Extents, LeftOut, Receipt, SnapshotInfo, SnapshotPurpose
from stillblock.operations.held import Held, Why

SIZE = 1 << 20
K = 1024
CONTENT = random.Random(3).randbytes(SIZE)
SELECTED: Extents = ((0, 64 * K), (128 * K, 256 * K), (512 * K, SIZE))
LEFT_OUT = (
    LeftOut(start=64 * K, end=96 * K, because="path:/var/cache/**"),
    LeftOut(start=96 * K, end=100 * K, because="free"),
    LeftOut(start=100 * K, end=128 * K, because="path:/var/cache/**"),
    LeftOut(start=256 * K, end=300 * K, because="zero"),
    LeftOut(start=300 * K, end=400 * K, because="free"),
)
LOST: Extents = ((600 * K, 608 * K),)


@dataclass
class FakeDisk:
    """A snapshot, or with `own` a clone, that fails where nothing should be read."""

    own: Extents = ()
    is_clone: bool = False
    size_bytes: int = SIZE

    def pread(self, *, offset: int, length: int) -> bytes:
        asked = ((offset, offset + length),)
        held = (*SELECTED, *self.own)
        assert not subtract(asked, tuple(sorted(held))), "nobody reads what is not selected"
        if subtract(intersect(asked, LOST), self.own):
            raise OriginIOError("error 5")
        return CONTENT[offset : offset + length]

    def extents(self, *, offset: int, length: int) -> list[tuple[int, int, int]]:
        assert self.is_clone, "a snapshot's receipt tells"
        window = ((offset, offset + length),)
        held = intersect(window, tuple(sorted((*SELECTED, *self.own))))
        missing = subtract(window, held)
        told = [(s, e, 0) for s, e in held] + [(s, e, native.NOT_SELECTED) for s, e in missing]
        return sorted(told)

    def close(self) -> None:
        """Nothing is open."""


INFO = SnapshotInfo(
    volume="web",
    name="monday",
    id="0" * 16,
    epoch=1,
    created_unix_ns=0,
    size_bytes=SIZE,
    selected_bytes=0,
    preserved_bytes=0,
    exclusive_bytes=0,
    purpose=SnapshotPurpose.USER,
    is_protected=False,
    has_bookmark=False,
    is_suspect=False,
    suspect_reason="",
    lost_bytes=0,
    holders=0,
)
RECEIPT = Receipt(
    snapshot=INFO,
    rules=(),
    terms=(),
    extents=SELECTED,
    left_out=LEFT_OUT,
    lost=LOST,
    damaged=(),
    consistency="barrier",
    quiescing=None,
    pause_ns=None,
    in_flight=None,
    commit_ns=None,
)


@pytest.fixture(params=["snapshot", "clone"])
def held(request: pytest.FixtureRequest) -> Held:
    if request.param == "snapshot":
        return Held(FakeDisk(), RECEIPT)
    return Held(FakeDisk(is_clone=True), RECEIPT, clone="web@monday+x")


def test_what_is_held_is_read_and_cut_at_the_end(held: Held) -> None:
    assert held.pread(offset=1000, length=5000) == CONTENT[1000:6000]
    assert held.pread(offset=SIZE - 10, length=100) == CONTENT[-10:]
    assert held.pread(offset=SIZE, length=100) == b""
    assert held.refusal(((0, 64 * K), (130 * K, 131 * K))) is None


@pytest.mark.parametrize(
    ("extents", "reason"),
    [
        (((65 * K, 66 * K),), "left out by path:/var/cache/**"),
        (((0, 66 * K),), "left out by path:/var/cache/**"),
        (((90 * K, 110 * K),), "left out by path:/var/cache/**"),  # most of it
        (((96 * K, 97 * K),), "left out by free"),
        (((450 * K, 451 * K),), "not included by any term"),
        (((390 * K, 512 * K),), "not included by any term"),
        (((256 * K, 301 * K),), "left out by free"),  # zeros are no reason beside it
        (((130 * K, 131 * K), (64 * K - 1, 64 * K + 1)), "left out by path:/var/cache/**"),
    ],
)
def test_what_rules_left_out_is_refused_with_the_rule(
    held: Held, extents: Extents, reason: str
) -> None:
    refusal = held.refusal(extents)
    assert refusal is not None
    assert (refusal.why, refusal.reason) == (Why.EXCLUDED, reason)
    assert isinstance(refusal.error("a file"), ExcludedError)
    with pytest.raises(OriginIOError, match="are not held"):
        held.pread(offset=extents[-1][0], length=extents[-1][1] - extents[-1][0])


def test_blocks_that_were_left_out_for_being_zero_read_as_zeros(held: Held) -> None:
    assert held.refusal(((250 * K, 300 * K),)) is None
    expected = CONTENT[250 * K : 256 * K] + bytes(20 * K)
    assert held.pread(offset=250 * K, length=26 * K) == expected


def test_looking_for_signatures_takes_what_is_left_out_for_zeros(held: Held) -> None:
    expected = CONTENT[63 * K : 64 * K] + bytes(64 * K) + CONTENT[128 * K : 129 * K]
    assert held.peek(offset=63 * K, length=66 * K) == expected


def test_what_is_lost_is_refused(held: Held) -> None:
    refusal = held.refusal(((599 * K, 700 * K),))
    assert refusal is not None
    assert (refusal.why, refusal.reason) == (Why.LOST, "8 KiB of it are lost")
    assert isinstance(refusal.error("a file"), SnapshotLostError)
    assert held.refusal(((608 * K, 700 * K),)) is None


def test_what_was_written_to_a_clone_is_held_and_not_lost() -> None:
    own = ((72 * K, 76 * K), (600 * K, 604 * K))
    clone = Held(FakeDisk(own=own, is_clone=True), RECEIPT, clone="web@monday+x")
    assert clone.refusal(((72 * K, 76 * K),)) is None
    assert clone.pread(offset=73 * K, length=K) == CONTENT[73 * K : 74 * K]
    assert clone.refusal(((72 * K, 77 * K),)) is not None
    assert clone.refusal(((600 * K, 604 * K),)) is None
    assert clone.lost(((0, SIZE),)) == ((604 * K, 608 * K),)
    assert clone.reference == "web@monday+x"


def test_a_snapshot_with_a_hundred_thousand_pieces_is_asked_quickly() -> None:
    """Each question looks at its place, not at all there is."""
    pieces = tuple((at * 8 * K, at * 8 * K + 4 * K) for at in range(100_000))
    receipt = replace(RECEIPT, extents=pieces, left_out=(), lost=())
    held = Held(FakeDisk(size_bytes=800_000 * K), receipt)
    asked = [held.refusal(((at * 8 * K, at * 8 * K + 4 * K),)) for at in range(0, 100_000, 2)]
    assert not any(asked)
