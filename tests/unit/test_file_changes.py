"""What became of files, told from what two trees and the changed blocks say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NoReturn, Self

import pytest

from stillblock.cli import file_diff
from stillblock.cli.options import Common
from stillblock.cli.output import Output
from stillblock.errors import OriginIOError, UsageError
from stillblock.extents import Ranges, intersect
from stillblock.model import Extents, Reference
from stillblock.operations.file_changes import (
    ELSEWHERE,
    Change,
    FileDiff,
    FilesystemChanges,
    _is_same,
    _Walk,
    compare_files,
)
from stillblock.operations.held import Held, Refusal, Why
from stillblock.operations.trees import extents_within
from stillblock.selection.files import Entry
from stillblock.selection.filesystems import FileKind, Node, Run, UnresolvedError
from stillblock.selection.filesystems.filesystem import Identity, Layout
from stillblock.selection.filesystems.signatures import Content
from stillblock.selection.places import Place
from stillblock.service.nbd import NbdError
from unit.test_held import RECEIPT, FakeDisk

ROOT = Node(number=2, kind=FileKind.DIRECTORY, size=0, mode=0o755)
FILE = Node(number=10, kind=FileKind.REGULAR, size=8192, mode=0o644, modified_ns=5)
IDENTITY = Identity(kind="ext4", label="", uuid="1", block_size=4096, size=8192)
PLACE = Place(name="part:1", pieces=((0, 8192),), content=Content.EXT)
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
    left_out_of_it: Extents = ()
    top: Node = ROOT
    place: Place = PLACE
    identity: Identity = IDENTITY
    worker: FakeTree = field(init=False)

    def __post_init__(self) -> None:
        self.worker = self

    def path(self, inner: str) -> str:
        return f"web@monday:{inner}"

    def find(self, path: str) -> Entry:
        return Entry(path, self.top)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def hold_against(self, changed: Extents) -> None:
        self.changed = changed

    def touched(self) -> tuple[Extents, Extents]:
        return self.changed, ()

    @property
    def may_lack_files(self) -> bool:
        return self.refusal is not None

    def left_out(self, extents: Extents) -> Extents:
        return intersect(extents, self.left_out_of_it)

    def entries(self, path: str, _: Node) -> list[Entry]:
        if self.error is not None:
            raise self.error
        return self.here if path == "/" else []

    def layout(self, node: Node) -> Layout | Refusal:
        return self.refusal or Layout((Run(0, node.size, 0),))

    def read(self, *, start: int, length: int) -> bytes:
        if self.refusal is not None and not self.left_out_of_it:
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
        # Nobody knows where the bytes are.
        (file()._replace(reason="compressed"), file(), Change.UNKNOWN),
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


def test_what_only_the_time_tells_is_counted() -> None:
    def counted(was: Entry, is_now: Entry, **lacking: object) -> tuple[int, int]:
        before = FakeTree([was], refusal=EXCLUDED, **lacking)  # type: ignore[arg-type]
        after = FakeTree([is_now], content=bytes(5000) + b"x" * 3192)
        walk = _Walk(before, after, Ranges(((0, 8192),)), lambda _: None)  # type: ignore[arg-type]
        walk.run()
        return walk.told_by_time_only, len(walk.changes)

    assert counted(file(), file()) == (1, 0)
    # What is held of a block that changed is compared all the same.
    assert counted(file(), file(changed=8192), left_out_of_it=((4096, 8192),)) == (1, 0)
    assert counted(file(), file(changed=8192), left_out_of_it=((6000, 8192),)) == (0, 1)


def test_a_tree_that_leads_back_to_itself_ends() -> None:
    inside = [Entry("d", ROOT), Entry("e", replace(ROOT, number=5))]
    trees = FakeTree(inside), FakeTree(inside)
    for tree in trees:
        tree.entries = lambda *_: inside  # type: ignore[method-assign]
    walk = _Walk(*trees, Ranges(()), lambda _: None)  # type: ignore[arg-type]
    walk.run()
    assert [text.partition(" ")[0] for text in walk.skipped] == [
        f"web@monday:{path}" for path in ("/d", "/e/d", "/e/e")
    ]


def test_the_top_is_compared_too() -> None:
    after = FakeTree([], top=replace(ROOT, mode=0o700))
    assert compared(FakeTree([]), after) == [("/", Change.METADATA, "")]


def test_trees_and_changes_are_of_the_same_instants(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule may make another `latest` at any time."""
    asked: list[tuple[str, str]] = []

    class Session:
        volume = "web"

        def changes(self, *, since: str, until: str) -> NoReturn:
            asked.append((since, until))
            raise UsageError("enough")

    @contextmanager
    def held(_: Session, reference: Reference) -> Iterator[Held]:
        info = replace(RECEIPT.snapshot, id=f"id of {reference.snapshot}")
        yield Held(FakeDisk(), replace(RECEIPT, snapshot=info))

    monkeypatch.setattr(file_diff, "held", held)
    with pytest.raises(UsageError, match="enough"):
        file_diff.diff_files(
            Output(Common()),
            Session(),  # type: ignore[arg-type]
            since="monday",
            until="latest",
            is_summary=False,
        )
    assert asked == [("id of monday", "id of latest")]


# Places -----------------------------------------------------------------------------------------


@dataclass
class FakeSnapshot:
    places: tuple[Place, ...]
    tree: FakeTree | None = None
    reason: str = ""

    def tree_at(self, place: Place) -> FakeTree:
        assert place in self.places
        assert self.tree is not None
        return self.tree

    def why_unknown(self, place: Place) -> str:
        return place.opaque_reason or self.reason


def places_of(
    before: FakeSnapshot, after: FakeSnapshot, **changes: Extents
) -> tuple[FilesystemChanges, ...]:
    changed, newly = changes.get("changed", ()), changes.get("newly", ())
    return compare_files(before, after, changed, newly_selected=newly)  # type: ignore[arg-type]


def is_partial(places: tuple[FilesystemChanges, ...], **more: tuple[str, ...]) -> bool:
    diff = FileDiff(
        volume="web",
        since="a",
        until="b",
        changed_bytes=0,
        newly_selected_bytes=0,
        places=places,
        **more,
    )
    return diff.is_partial


def test_blocks_that_were_known_zeros_and_left_out_are_compared() -> None:
    before = FakeSnapshot((PLACE,), FakeTree([file(changed=4096)]))
    after = FakeSnapshot((PLACE,), FakeTree([file(changed=4096)], content=b"x" * 8192))
    (place,) = places_of(before, after, newly=((0, 4096),))
    assert [(change.path, change.change) for change in place.changes] == [("/f", Change.CHANGED)]


def test_filesystems_that_went_are_said() -> None:
    there = FakeSnapshot((PLACE,), FakeTree([file()]))
    for after in (FakeSnapshot(()), FakeSnapshot((Place(name="part:1", pieces=((0, 4096),)),))):
        for changed in ((), ((0, 4096), (9000, 9100))):
            found = places_of(there, after, changed=changed)
            assert found[0].place == "part:1"
            assert "not there in the later snapshot" in found[0].reason
            assert is_partial(found)
            assert sum(place.other_bytes for place in found) == sum(e - s for s, e in changed)
    assert [place.place for place in found] == ["part:1", ELSEWHERE]


def test_a_filesystem_that_grew_says_so() -> None:
    grown = replace(PLACE, pieces=((0, 16384),))
    found = places_of(
        FakeSnapshot((PLACE,), FakeTree([file()])),
        FakeSnapshot((grown,), FakeTree([file()], place=grown)),
        changed=((0, 4096),),
    )
    assert found[0].reason == "it was 8 KiB large, and is 16 KiB"
    assert is_partial(found)


def test_what_nobody_can_tell_is_partial_and_what_is_known_unchanged_is_not() -> None:
    luks = Place(name="part:1", pieces=((0, 8192),), opaque_reason="LUKS")
    dark = Place(name="part:1", pieces=((0, 8192),))
    for place, reason, changed, partial in (
        (luks, "", (), False),
        (luks, "", ((0, 4096),), True),
        (dark, "its beginning is not held", (), True),
        (dark, "", ((0, 4096),), False),
    ):
        both = FakeSnapshot((place,), reason=reason)
        assert is_partial(places_of(both, both, changed=changed)) is partial
    assert is_partial((), suspect_reasons=("web@a is suspect",))


def test_names_come_go_and_change_their_kind() -> None:
    link = Entry("l", replace(FILE, kind=FileKind.SYMLINK), "a")
    folder = Entry("d", replace(ROOT, number=5))
    before = FakeTree([file("gone"), link, folder, file("both")])
    after = FakeTree(
        [
            file("new"),
            link._replace(target="b"),
            folder._replace(node=replace(folder.node, modified_ns=9)),
            Entry("both", replace(ROOT, number=6)),
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
    gone = FakeTree([], error=NbdError("gone"))
    walk = _Walk(FakeTree([]), gone, Ranges(()), lambda _: None)  # type: ignore[arg-type]
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
