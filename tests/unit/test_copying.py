"""Copying out of a tree of strangers' names: nothing lands elsewhere, nothing half."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stillblock.errors import ExcludedError, NotFoundError, OriginIOError, UsageError
from stillblock.operations import copying
from stillblock.operations.copying import CopyError, copy_out
from stillblock.operations.held import Refusal, Why
from stillblock.selection.files import Entry
from stillblock.selection.filesystems import FileKind, Node, UnresolvedError
from stillblock.selection.filesystems.filesystem import Layout
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

    def path(self, inner: str) -> str:
        return f"web@monday:{inner}"

    def find(self, path: str, *, follows: bool = False) -> Entry:
        for entry, full in self._all():
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
            file = self.files.get(path, File(kind=FileKind.DIRECTORY, mode=0o750))
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


def copied(of: FakeTree, path: str, to: Path, *, is_recursive: bool = True) -> copying.Copied:
    return copy_out(of, path, to, is_recursive=is_recursive)  # type: ignore[arg-type]


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


def test_without_the_owner_nothing_runs_as_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    copied(tree({"/d/su": File(b"x", mode=0o6755)}), "/d", tmp_path)
    assert stat.S_IMODE((tmp_path / "d/su").stat().st_mode) == 0o755


def test_files_without_modes_get_those_of_new_files(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        copied(tree({"/d/a": File(b"x", mode=0)}, has_modes=False), "/d", tmp_path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "d/a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o750
