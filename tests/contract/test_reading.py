"""What a reference names is read alike, in this process and through the one that serves it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillblock import native
from stillblock.errors import NotFoundError, UsageError
from stillblock.model import Reference, RuleTerm
from stillblock.operations.clones import CloneRequest
from stillblock.operations.snapshots import SnapshotRequest
from stillblock.service.nbd import NbdDisk, NbdError
from stillblock.service.reading import held
from stillblock.service.session import Session

SIZE = 1 << 20
K = 1024
RULES = (
    RuleTerm(include=False, text="256K-512K"),
    RuleTerm(include=False, text="700K+4K"),
)


def test_a_snapshot_and_its_clone_are_what_the_disk_was(session: Session, origin: Path) -> None:
    before = origin.read_bytes()
    session.create_snapshot(SnapshotRequest(name="monday", terms=RULES))
    session.create_clone(CloneRequest(snapshot="monday", name="x"))
    for text in ("web@monday", "web@latest", "web@monday+x"):
        with held(session, Reference.parse(text)) as found:
            assert found.size == SIZE
            assert found.reference == text.replace("latest", "monday")
            assert found.pread(offset=100, length=200 * K) == before[100 : 100 + 200 * K]
            assert found.pread(offset=SIZE - 5, length=50) == before[-5:]
            flags = found.extents(offset=0, length=SIZE)
            assert (flags[0][0], flags[-1][1]) == (0, SIZE)
            missing = [(s, e) for s, e, f in flags if f & native.NOT_SELECTED]
            assert missing == [(256 * K, 512 * K), (700 * K, 704 * K)]
            holes = [(s, e) for s, e, f in flags if f & native.HOLE]
            assert holes == missing
            refusal = found.refusal(((699 * K, 701 * K),))
            assert refusal is not None
            assert refusal.reason == "left out by 700K+4K"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("web", UsageError),
        ("web@nix", NotFoundError),
        ("web@monday+nix", NotFoundError),
    ],
)
def test_what_is_not_there_or_does_not_stand_still_is_not_opened(
    session: Session, text: str, error: type[Exception]
) -> None:
    session.create_snapshot(SnapshotRequest(name="monday"))
    with pytest.raises(error), held(session, Reference.parse(text)):
        pass


def test_a_snapshot_is_held_while_it_is_read(session: Session) -> None:
    session.create_snapshot(SnapshotRequest(name="monday"))
    with held(session, Reference.parse("web@monday")):
        assert session.show_snapshot("monday").holders == 1
    session.delete_snapshot("monday")


def test_a_server_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NbdError, match="no server at"):
        NbdDisk(f"nbd+unix:///web?socket={tmp_path / 'none'}")
