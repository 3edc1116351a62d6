"""What became of files, told from what two trees and the changed blocks say."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from stillblock.errors import OriginIOError
from stillblock.extents import Ranges
from stillblock.model import Extents
from stillblock.operations.file_changes import Change, _is_same, _Walk, extents_within
from stillblock.operations.held import Refusal, Why
from stillblock.selection.files import Entry
from stillblock.selection.filesystems import FileKind, Node, Run, UnresolvedError
from stillblock.selection.filesystems.filesystem import Layout
from stillblock.selection.places import Place
from stillblock.service.nbd import NbdError

ROOT = Node(number=2, kind=FileKind.DIRECTORY, size=0, mode=0o755)
FILE = Node(number=10, kind=FileKind.REGULAR, size=8192, mode=0o644, modified_ns=5)
EXCLUDED = Refusal(why=Why.EXCLUDED, reason="left out by path:/f")


def file(name: str = "f", node: Node = FILE, *, changed: int = 0, digest: str = "a") -> Entry:
    return Entry(name, node, None, changed, digest)


@dataclass
class FakeTree:
    """A top directory with files that all lie at byte 0 of `content`."""

    here: list[Entry]
    content: bytes = bytes(8192)
    refusal: Refusal | None = None
    error: Exception | None = None
    worker: FakeTree = field(init=False)

    def __post_init__(self) -> None:
        self.worker = self

    def find(self, path: str) -> Entry:
        return Entry(path, ROOT)

    def entries(self, path: str, _: Node) -> list[Entry]:
        if self.error is not None:
            raise self.error
        return self.here if path == "/" else []

    def layout(self, node: Node) -> Layout | Refusal:
        return self.refusal or Layout((Run(0, node.size, 0),))

    def read(self, *, start: int, length: int) -> bytes:
        if self.refusal is not None:
            raise OriginIOError(self.refusal.reason)
        return self.content[start : start + length]


def compared(
    before: FakeTree, after: FakeTree, *, changed: Extents = ((0, 4096),)
) -> list[tuple[str, Change, str]]:
    walk = _Walk(before, after, Ranges(changed), lambda _: None)  # type: ignore[arg-type]
    walk.run()
    assert not walk.skipped
    return [(change.path, change.change, change.note) for change in walk.changes]


def change_of(was: Entry, is_now: Entry, **trees: object) -> Change | None:
    before = FakeTree([was], **trees.get("before", {}))  # type: ignore[call-overload]
    after = FakeTree([is_now], **trees.get("after", {}))  # type: ignore[call-overload]
    told = compared(before, after)
    assert len(told) <= 1
    return told[0][1] if told else None


@pytest.mark.parametrize(
    ("was", "is_now", "change"),
    [
        (file(), file(), None),
        (file(), file(node=replace(FILE, size=9000)), Change.CHANGED),
        (file(), file(node=replace(FILE, modified_ns=6), changed=4096), Change.CHANGED),
        (file(), file(node=replace(FILE, modified_ns=6)), Change.METADATA),
        (file(), file(node=replace(FILE, mode=0o600)), Change.METADATA),
        (file(), file(node=replace(FILE, uid=7)), Change.METADATA),
        (file(), file(node=replace(FILE, links=2)), Change.METADATA),
        # Blocks were written, the time is what it was, and the bytes are the same.
        (file(), file(changed=4096), None),
        (file(), file(changed=4096, node=replace(FILE, mode=0o600)), Change.METADATA),
        # Nobody knows where the bytes are; only times tell.
        (file()._replace(reason="compressed"), file(), None),
        (
            file()._replace(reason="compressed"),
            file(node=replace(FILE, modified_ns=6)),
            Change.UNKNOWN,
        ),
    ],
)
def test_what_became_of_a_file(was: Entry, is_now: Entry, change: Change | None) -> None:
    assert change_of(was, is_now) is change


def test_a_file_whose_time_was_put_back_is_told_by_its_bytes() -> None:
    other = {"after": {"content": bytes(100) + b"x" + bytes(8091)}}
    assert change_of(file(), file(changed=4096), **other) is Change.CHANGED
    # Beyond what changed nothing is read: it lies where it lay.
    beyond = {"after": {"content": bytes(5000) + b"x" + bytes(3191)}}
    assert change_of(file(), file(changed=4096), **beyond) is None


def test_what_is_not_held_is_not_guessed() -> None:
    newer = file(node=replace(FILE, modified_ns=6))
    for side in ("before", "after"):
        lacking = {side: {"refusal": EXCLUDED}}
        assert change_of(file(), newer, **lacking) is Change.UNKNOWN
        assert change_of(file(), file(), **lacking) is None
    trees = FakeTree([file()], refusal=EXCLUDED), FakeTree([newer])
    assert compared(*trees) == [("/f", Change.UNKNOWN, "left out by path:/f")]


def test_names_come_go_and_change_their_kind() -> None:
    link = Entry("l", replace(FILE, kind=FileKind.SYMLINK), "a")
    folder = Entry("d", replace(ROOT, number=5))
    before = FakeTree([file("gone"), link, folder, file("both")])
    after = FakeTree(
        [
            file("new"),
            link._replace(target="b"),
            folder._replace(node=replace(folder.node, modified_ns=9)),
            folder._replace(name="both"),
        ]
    )
    assert [told[:2] for told in compared(before, after)] == [
        ("/both", Change.WENT),
        ("/both", Change.APPEARED),
        ("/gone", Change.WENT),
        ("/l", Change.CHANGED),
        ("/new", Change.APPEARED),
    ]


def test_a_directory_that_cannot_be_read_is_said_and_a_server_that_is_gone_ends_it() -> None:
    walk = _Walk(
        FakeTree([file()]),  # type: ignore[arg-type]
        FakeTree([], error=UnresolvedError("directory 2 is damaged")),  # type: ignore[arg-type]
        Ranges(()),
        lambda _: None,
    )
    walk.run()
    assert (walk.changes, walk.skipped) == ([], ["directory 2 is damaged"])
    walk.after = FakeTree([], error=NbdError("gone"))  # type: ignore[assignment]
    with pytest.raises(NbdError):
        walk.run()


def test_extents_of_a_disk_are_found_in_a_place_of_several_pieces() -> None:
    place = Place(name="lv:vg/root", pieces=((1000, 2000), (5000, 6000), (100, 200)))
    assert extents_within(place, ((0, 150), (1500, 5500))) == ((500, 1500), (2000, 2050))
    for start, end in ((0, 10_000), (1990, 5010)):
        inside = extents_within(place, ((start, end),))
        assert place.disk_extents(inside) == tuple(
            (max(start, s), min(end, e))
            for s, e in sorted(place.pieces)
            if max(start, s) < min(end, e)
        )


@pytest.mark.parametrize("cuts", [(), (1,), (3, 4, 9)])
def test_bytes_are_compared_however_they_come_in_pieces(cuts: tuple[int, ...]) -> None:
    data = b"0123456789"

    def pieces(of: bytes):
        return iter([of[a:b] for a, b in pairwise((0, *cuts, len(of)))])

    assert _is_same(pieces(data), iter([data]))
    assert not _is_same(pieces(data), iter([data[:-1] + b"x"]))
    assert not _is_same(pieces(data), iter([data + b"x"]))
