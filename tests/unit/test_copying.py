"""Copying out of a tree of strangers' names: nothing lands elsewhere, nothing half."""

from __future__ import annotations

import base64
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from stillblock.errors import (
    ExcludedError,
    NotFoundError,
    OriginIOError,
    SnapshotLostError,
    UsageError,
)
from stillblock.operations import copying
from stillblock.operations.copying import CopyError, copy_out
from stillblock.operations.held import Refusal, Why
from stillblock.selection.files import Entry
from stillblock.selection.filesystems import FileKind, Node, UnresolvedError
from stillblock.selection.filesystems.filesystem import DEPTH_MAX, Layout
from stillblock.service.nbd import NbdError


@dataclass
class File:
    content: bytes = b""
    refusal: Refusal | None = None
    error: Exception | None = None
    """Raised behind the first half."""
    number: int = 0
    links: int = 1
    mode: int = 0o644
    target: str | None = None
    kind: FileKind = FileKind.REGULAR


@dataclass
class FakeTree:
    """Paths and what they are; directories are made up from them."""

    files: dict[str, File]
    has_modes: bool = True
    bad_directories: tuple[str, ...] = ()
    read: list[str] = field(default_factory=list)
    suspect_reason: str = "written by others"

    @property
    def held(self) -> FakeTree:
        """Nothing more is asked of it."""
        return self

    def path(self, inner: str) -> str:
        return f"web@monday:{inner}"

    def reference(self, inner: str) -> str:
        return f"web@monday:{inner}"

    def find(self, path: str, *, follows: bool = False) -> Entry:
        path = os.path.normpath(path)
        for entry, full in self._all():
            if full == path and follows and entry.target is not None:
                return self.find(entry.target, follows=True)
            if full == path:
                return entry._replace(name=full)
        raise NotFoundError(f"no {path}")

    def entries(self, path: str, directory: Node) -> list[Entry]:
        if path in self.bad_directories:
            raise UnresolvedError("it is damaged")
        base = path.rstrip("/")
        return [e for e, full in self._all() if full.rpartition("/")[0] == base and full != "/"]

    def layout(self, node: Node) -> Layout | Refusal:
        file = self._file(node)
        return file.refusal or Layout()

    def _file(self, node: Node) -> File:
        return next(f for f in self.files.values() if f.number == node.number)

    def _all(self) -> Iterator[tuple[Entry, str]]:
        paths = {"/"}
        for path in self.files:
            parts = path.split("/")
            paths |= {"/".join(parts[:depth]) for depth in range(2, len(parts))}
        for path in sorted(paths | self.files.keys()):
            place = 10_000 + sorted(paths).index(path) if path in paths else 0
            file = self.files.get(path, File(kind=FileKind.DIRECTORY, mode=0o750, number=place))
            node = Node(
                number=file.number,
                kind=file.kind,
                size=len(file.content),
                links=file.links,
                mode=file.mode,
                uid=os.geteuid(),
                gid=os.getegid(),
                modified_ns=1_600_000_000_123_456_789,
            )
            yield Entry(path.rpartition("/")[2] or "/", node, file.target), path


def tree(files: dict[str, File], **more: object) -> FakeTree:
    for index, file in enumerate(files.values()):
        file.number = file.number or 100 + index
    return FakeTree(files, **more)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _content(monkeypatch: pytest.MonkeyPatch) -> None:
    class Content:
        def __init__(self, of: FakeTree, path: str, node: Node, _: Layout) -> None:
            self._file = of._file(node)
            of.read.append(path)

        @property
        def size(self) -> int:
            return len(self._file.content)

        def chunks(self) -> Iterator[tuple[int, bytes]]:
            half = len(self._file.content) // 2
            yield 0, self._file.content[:half]
            if self._file.error is not None:
                raise self._file.error
            yield half, self._file.content[half:]

    monkeypatch.setattr(copying, "Content", Content)


def copied(
    of: FakeTree, path: str, to: Path, *, is_recursive: bool = True, preserves: bool = False
) -> copying.Copied:
    as_real: Any = of
    return copy_out(as_real, path, to, is_recursive=is_recursive, preserves=preserves)


def there(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_tree_is_copied_with_modes_times_and_links(tmp_path: Path) -> None:
    of = tree(
        {
            "/etc/a": File(b"aaaa", number=7, links=2, mode=0o640),
            "/etc/deep/b": File(b"aaaa", number=7, links=2, mode=0o640),
            "/etc/link": File(kind=FileKind.SYMLINK, target="../../../etc/passwd"),
        }
    )
    done = copied(of, "/etc", tmp_path)
    assert (done.file_count, done.directory_count, done.link_count) == (1, 2, 2)
    assert there(tmp_path) == {"etc", "etc/a", "etc/deep", "etc/deep/b", "etc/link"}
    found = (tmp_path / "etc/a").stat()
    assert (found.st_nlink, found.st_mtime_ns) == (2, 1_600_000_000_123_456_789)
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert (tmp_path / "etc").stat().st_mtime_ns == 1_600_000_000_123_456_789
    assert stat.S_IMODE((tmp_path / "etc/deep").stat().st_mode) == 0o750
    assert (tmp_path / "etc/link").readlink() == Path("../../../etc/passwd")
    assert of.read == ["/etc/a"]
    assert done.suspect_reason == "written by others"


def test_a_file_goes_into_a_directory_or_to_a_name_and_takes_the_place_of_another(
    tmp_path: Path,
) -> None:
    of = tree({"/etc/fstab": File(b"new")})
    copied(of, "/etc/fstab", tmp_path, is_recursive=False)
    (tmp_path / "other").write_bytes(b"old and longer")
    done = copied(of, "/etc/fstab", tmp_path / "other", is_recursive=False)
    assert done.target == str(tmp_path / "other")
    assert (tmp_path / "fstab").read_bytes() == (tmp_path / "other").read_bytes() == b"new"
    assert there(tmp_path) == {"fstab", "other"}


def test_nothing_is_written_through_a_link_in_the_destination(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "victim").write_bytes(b"untouched")
    (inside / "d").mkdir()
    (inside / "d" / "file").symlink_to(outside / "victim")
    (inside / "d" / "folder").symlink_to(outside)
    of = tree({"/d/file": File(b"stranger"), "/d/folder/victim": File(b"stranger")})
    done = copied(of, "/d", inside)
    assert (outside / "victim").read_bytes() == b"untouched"
    assert there(outside) == {"victim"}
    # A link of the name of a file gives way to it; one of the name of a directory does not.
    assert not (inside / "d/file").is_symlink()
    assert (inside / "d/file").read_bytes() == b"stranger"
    assert [(r.path, r.why) for r in done.refused] == [("/d/folder", Why.UNSUPPORTED)]
    assert "is no directory" in done.refused[0].reason


def test_a_link_that_a_tree_makes_leads_no_later_file_of_it_elsewhere(tmp_path: Path) -> None:
    """A hostile directory may hold one name twice: first a link, then a directory."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    of = tree({"/d/x": File(kind=FileKind.SYMLINK, target=str(outside)), "/d/x/f": File(b"bad")})
    entries = [e for e, full in of._all() if full == "/d/x"]
    folder = entries[0]._replace(node=Node(number=1, kind=FileKind.DIRECTORY, size=0), target=None)
    of.entries = lambda path, _: {  # type: ignore[method-assign]
        "/d": [*entries, folder],
        "/d/x": [e for e, full in FakeTree(of.files)._all() if full == "/d/x/f"],
    }[path]
    copied(of, "/d", inside)
    assert there(outside) == set()


def test_names_that_are_no_utf8_or_hold_control_characters_stay_what_they_are(
    tmp_path: Path,
) -> None:
    names = [os.fsdecode(b"no\xffutf8"), "escape\x1b[31m\nline", "-rf", "…"]
    done = copied(tree({f"/d/{name}": File(b"x") for name in names}), "/d", tmp_path)
    assert sorted(os.listdir(os.fsencode(tmp_path / "d"))) == sorted(map(os.fsencode, names))
    assert not done.refused


def test_a_name_too_long_for_this_system_is_refused_and_the_rest_copied(tmp_path: Path) -> None:
    done = copied(tree({"/d/" + "ü" * 200: File(b"x"), "/d/a": File(b"y")}), "/d", tmp_path)
    assert there(tmp_path) == {"d", "d/a"}
    assert done.refused[0].reason == "the name is too long for this system"


REFUSAL = Refusal(why=Why.EXCLUDED, reason="left out by path:/d/*")


def test_a_tree_goes_on_past_what_is_refused_and_lists_it(tmp_path: Path) -> None:
    of = tree(
        {
            "/d/a": File(b"a"),
            "/d/excluded": File(b"never", refusal=REFUSAL),
            "/d/broken": File(b"half of this", error=OriginIOError("bad sector")),
            "/d/pipe": File(kind=FileKind.OTHER),
            "/d/damaged/x": File(b"x"),
            "/d/lost link": File(kind=FileKind.SYMLINK),
            "/d/z": File(b"z"),
        },
        bad_directories=("/d/damaged",),
    )
    done = copied(of, "/d", tmp_path)
    assert there(tmp_path) == {"d", "d/a", "d/z"}
    assert {r.path: r.why for r in done.refused} == {
        "/d/excluded": Why.EXCLUDED,
        "/d/broken": Why.UNREADABLE,
        "/d/pipe": Why.UNSUPPORTED,
        "/d/damaged": Why.UNRESOLVED,
        "/d/lost link": Why.UNRESOLVED,
    }
    assert "/d/excluded" not in of.read


def test_a_file_that_is_refused_or_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")
    of = tree({"/a": File(b"new", refusal=REFUSAL), "/b": File(b"new", error=OriginIOError("bad"))})
    with pytest.raises(ExcludedError, match=r"web@monday:/a: left out by path:/d/\*"):
        copied(of, "/a", tmp_path / "a", is_recursive=False)
    with pytest.raises(OriginIOError):
        copied(of, "/b", tmp_path / "a", is_recursive=False)
    assert (tmp_path / "a").read_bytes() == b"before"
    assert there(tmp_path) == {"a"}


def test_a_server_that_is_gone_ends_a_copy(tmp_path: Path) -> None:
    of = tree({"/d/a": File(b"xx", error=NbdError("the server is gone")), "/d/b": File(b"y")})
    with pytest.raises(NbdError):
        copied(of, "/d", tmp_path)
    assert there(tmp_path) == {"d"}


@pytest.mark.parametrize(
    ("path", "to", "error"),
    [
        ("/d", "x", UsageError),
        ("/d/a", "not/there/x", CopyError),
        ("/nix", "x", NotFoundError),
    ],
)
def test_what_cannot_be_meant_is_an_error(
    tmp_path: Path, path: str, to: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        copied(tree({"/d/a": File(b"x")}), path, tmp_path / to, is_recursive=False)
    assert there(tmp_path) == set()


def test_a_directory_in_the_place_of_a_file_stays(tmp_path: Path) -> None:
    (tmp_path / "d" / "a").mkdir(parents=True)
    done = copied(tree({"/d/a": File(b"x")}), "/d", tmp_path)
    assert done.refused[0].reason == "a is a directory; it is not overwritten"
    assert there(tmp_path) == {"d", "d/a"}


def test_the_top_of_a_filesystem_fills_the_directory_that_is_given(tmp_path: Path) -> None:
    copied(tree({"/etc/a": File(b"x")}), "/", tmp_path / "new")
    assert there(tmp_path) == {"new", "new/etc", "new/etc/a"}
    (tmp_path / "old").mkdir()
    copied(tree({"/etc/a": File(b"x")}), "/", tmp_path / "old")
    assert there(tmp_path / "old") == {"etc", "etc/a"}


@pytest.mark.parametrize("uid", [0, 1000])
def test_nothing_runs_as_its_owner_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    given: list[int] = []
    monkeypatch.setattr(os, "fchown", lambda _, uid, __: given.append(uid))
    of = tree({"/d/su": File(b"x", mode=0o6755)})
    copied(of, "/d", tmp_path)
    assert stat.S_IMODE((tmp_path / "d/su").stat().st_mode) == 0o755
    assert given == []
    if uid:
        with pytest.raises(UsageError, match="only root"):
            copied(of, "/d", tmp_path, preserves=True)
        return
    copied(of, "/d", tmp_path / "all", preserves=True)
    assert stat.S_IMODE((tmp_path / "all/su").stat().st_mode) == 0o6755
    assert len(given) == 2


def test_files_without_modes_get_those_of_new_files(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        copied(tree({"/d/a": File(b"x", mode=0)}, has_modes=False), "/d", tmp_path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "d/a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o750


# What a stranger's tree may try, and what a destination may refuse -------------------------------


def directory(number: int) -> Node:
    return Node(number=number, kind=FileKind.DIRECTORY, size=0, mode=0o755)


def test_a_copy_has_the_name_that_was_asked_for_and_not_the_one_behind_a_link(
    tmp_path: Path,
) -> None:
    (tmp_path / ".bashrc").write_bytes(b"my own")
    of = tree(
        {
            "/readme.txt": File(kind=FileKind.SYMLINK, target="/x/.bashrc"),
            "/x/.bashrc": File(b"stranger"),
        }
    )
    done = copied(of, "/readme.txt", tmp_path, is_recursive=False)
    assert (tmp_path / ".bashrc").read_bytes() == b"my own"
    assert (tmp_path / "readme.txt").read_bytes() == b"stranger"
    assert (done.source, done.target) == ("web@monday:/x/.bashrc", f"{tmp_path}/readme.txt")


@pytest.mark.parametrize("path", ["/x/.ssh/..", "/x/.", "/x/"])
def test_a_path_without_a_name_of_its_own_gives_what_is_in_it(tmp_path: Path, path: str) -> None:
    copied(tree({"/x/.ssh/keys": File(b"k")}), path, tmp_path)
    assert there(tmp_path / ("x" if path == "/x/" else "")) >= {".ssh", ".ssh/keys"}


def test_directories_that_were_there_stay_as_they_are(tmp_path: Path) -> None:
    of = tree({"/d/a": File(b"x"), "/d/e/b": File(b"y")})
    for path in (tmp_path, tmp_path / "d"):
        path.mkdir(exist_ok=True)
        path.chmod(0o700)
        os.utime(path, ns=(5, 5))
    copied(of, "/", tmp_path)
    assert stat.S_IMODE((tmp_path / "d/e").stat().st_mode) == 0o750
    for path in (tmp_path, tmp_path / "d"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert path.stat().st_mtime_ns != 1_600_000_000_123_456_789


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../outside", "a\0b", "\ud800"])
def test_a_name_that_leads_elsewhere_is_refused_whoever_gave_it(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    of = tree({"/d/a": File(b"x"), "/d/z": File(b"z")})
    (hostile, last) = of.entries("/d", directory(1))
    of.entries = lambda _, node: (  # type: ignore[method-assign]
        [] if node.number == 9 else [Entry(name, directory(9)), hostile._replace(name=name), last]
    )
    done = copied(of, "/d", inside)
    assert there(tmp_path) == {"inside", "inside/d", "inside/d/z"}
    assert len(done.refused) == 2


def test_a_directory_that_leads_back_to_itself_ends(tmp_path: Path) -> None:
    of = tree({"/d/f": File(b"x")})
    of.entries = lambda _, node: [  # type: ignore[method-assign]
        Entry("there", directory(1)),
        Entry("back", directory(2)),
        *([FakeTree.entries(of, "/d", node)[0]] if node.number != 1 else []),
    ]
    done = copied(of, "/d", tmp_path)
    assert there(tmp_path / "d") == {"f", "there", "there/back", "there/back/f"}
    assert {refused.path for refused in done.refused} == {
        "/d/back",
        "/d/there/there",
        "/d/there/back/there",
        "/d/there/back/back",
    }


def test_a_tree_without_end_is_copied_as_deep_as_trees_are(tmp_path: Path) -> None:
    of = tree({"/d/f": File(b"x")})
    of.entries = lambda _, node: [  # type: ignore[method-assign]
        Entry("d", directory(node.number + 1))
    ]
    done = copied(of, "/d", tmp_path)
    assert done.directory_count == DEPTH_MAX
    assert [refused.reason for refused in done.refused] == ["the tree is too deep"]


@pytest.mark.parametrize("path", ["/d/a", "/d/deep/a", "/d/deep/er/still/a"])
def test_a_full_disk_ends_a_copy_wherever_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    of = tree({path: File(b"xx"), "/d/z": File(b"yy")})
    with pytest.raises(CopyError, match="No space left"):
        copied(of, "/d", tmp_path)
    assert of.read == [path]
    assert not [name for name in there(tmp_path) if "partial" in name]


def test_what_this_system_has_no_word_for_is_refused_and_the_rest_copied(tmp_path: Path) -> None:
    of = tree(
        {
            "/d/nul": File(kind=FileKind.SYMLINK, target="a\0b"),
            "/d/surrogate": File(kind=FileKind.SYMLINK, target="\ud800"),
            "/d/z": File(b"z"),
        }
    )
    done = copied(of, "/d", tmp_path)
    assert {refused.path for refused in done.refused} == {"/d/nul", "/d/surrogate"}
    assert there(tmp_path) == {"d", "d/z"}


def test_a_name_that_is_there_twice_replaces_nothing_of_the_copy(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a").write_bytes(b"before")
    of = tree({"/d/a": File(b"first"), "/d/b": File(b"second"), "/d/c": File(b"third")})
    first, second, third = of.entries("/d", directory(1))
    of.entries = lambda _, node: (  # type: ignore[method-assign]
        [third]
        if node.number in {7, 8}
        else [
            first,
            second._replace(name="a"),
            Entry("sub", directory(7)),
            Entry("sub", directory(8)),
        ]
    )
    done = copied(of, "/d", tmp_path)
    assert (tmp_path / "d/a").read_bytes() == b"first"
    assert [refused.path for refused in done.refused] == ["/d/a", "/d/sub"]
    assert (done.file_count, done.directory_count) == (2, 2)


def test_a_second_copy_replaces_all_names_of_a_file(tmp_path: Path) -> None:
    names = {name: File(b"x", number=7, links=2) for name in ("/d/a", "/d/b")}
    for _ in range(2):
        done = copied(tree(dict(names)), "/d", tmp_path)
        assert not done.refused
    assert (tmp_path / "d/a").stat().st_nlink == 2
    assert there(tmp_path) == {"d", "d/a", "d/b"}


def test_a_destination_without_owners_and_modes_gets_the_content_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for name in ("chown", "fchown", "fchmod"):
        monkeypatch.setattr(os, name, refuse)
    link = File(kind=FileKind.SYMLINK, target="a")
    of = tree({"/d/a": File(b"x", mode=0o4755), "/d/b": File(b"y"), "/d/c": link})
    done = copied(of, "/d", tmp_path, preserves=True)
    assert there(tmp_path) == {"d", "d/a", "d/b", "d/c"}
    assert (done.refused, done.not_kept) == ((), ("modes", "owners"))
    assert not (tmp_path / "d/a").stat().st_mode & stat.S_ISUID


def test_a_single_file_and_its_name_are_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[bool, bool]] = []

    def fsync(descriptor: int) -> None:
        has_name = (tmp_path / "a").exists()
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), has_name))

    monkeypatch.setattr(os, "fsync", fsync)
    copied(tree({"/a": File(b"x")}), "/a", tmp_path, is_recursive=False)
    assert synced == [(False, False), (True, True)]


def test_names_keep_their_bytes_whatever_the_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = tree({"/d/ü": File(b"x"), "/d/…": File(kind=FileKind.SYMLINK, target="ü")})
    with monkeypatch.context() as patched:
        latin = lambda name: name.encode("latin-1", "surrogateescape")  # noqa: E731
        patched.setattr(os, "fsencode", lambda n: latin(n) if isinstance(n, str) else n)
        done = copied(of, "/d", tmp_path)
    assert not done.refused
    folder = os.fsencode(tmp_path / "d")
    assert sorted(os.listdir(folder)) == sorted(["ü".encode(), "…".encode()])
    assert (tmp_path / "d/…").readlink() == Path("ü")


def test_a_program_is_told_paths_as_they_are(tmp_path: Path) -> None:
    name = os.fsdecode(b"no\xffutf8")
    of = tree({f"/d\n/{name}": File(b"x", refusal=REFUSAL), "/d\n/plain": File(refusal=REFUSAL)})
    done = copied(of, "/d\n", tmp_path)
    assert (done.source, done.target) == ("web@monday:/d\n", f"{tmp_path}/d\n")
    told = {refused.path: refused.path_base64 for refused in done.refused}
    assert told["/d\n/plain"] == ""
    assert base64.b64decode(told[f"/d\n/{name}"]) == b"/d\n/no\xffutf8"


def test_why_a_link_is_refused_is_nothing_that_a_terminal_acts_on(tmp_path: Path) -> None:
    of = tree({"/a": File(kind=FileKind.SYMLINK)})
    entry = of.find("/a")._replace(reason="damaged\x1b[2J")
    of.find = lambda path, *, follows=False: entry  # type: ignore[method-assign]
    with pytest.raises(OriginIOError, match=r"damaged\\x1b\[2J"):
        copied(of, "/a", tmp_path)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (SnapshotLostError("gone"), Why.LOST),
        (OriginIOError("bad"), Why.UNREADABLE),
        (UnresolvedError("odd"), Why.UNRESOLVED),
    ],
)
def test_what_broke_off_is_refused_as_what_it_was(
    tmp_path: Path, error: Exception, why: Why
) -> None:
    done = copied(tree({"/d/a": File(b"xx", error=error)}), "/d", tmp_path)
    assert [refused.why for refused in done.refused] == [why]
