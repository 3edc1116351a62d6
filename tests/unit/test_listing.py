"""What ls prints of trees that are damaged, or hold what no list has words for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from stillblock.cli.files import _Listing, _unwinding
from stillblock.cli.options import Common
from stillblock.cli.output import Output
from stillblock.selection.files import Entry
from stillblock.selection.filesystems import FileKind, Node
from stillblock.selection.filesystems.filesystem import DEPTH_MAX


def directory(number: int) -> Node:
    return Node(number=number, kind=FileKind.DIRECTORY, size=0)


@dataclass
class FakeTree:
    """Directories by number, and what is in them."""

    listings: dict[int, list[Entry]] = field(default_factory=dict)
    has_modes: bool = True
    suspect: str = ""
    listed: list[str] = field(default_factory=list)

    @property
    def held(self) -> SimpleNamespace:
        return SimpleNamespace(suspect_reason=self.suspect)

    @property
    def place(self) -> SimpleNamespace:
        return SimpleNamespace(name="part:1")

    def path(self, inner: str) -> str:
        return f"web@monday:{inner}"

    def entries(self, path: str, node: Node) -> list[Entry]:
        self.listed.append(path)
        return self.listings.get(node.number, [Entry("d", directory(node.number + 1))])


def listing(tree: FakeTree, *, is_long: bool = False, is_json: bool = False) -> _Listing:
    return _Listing(Output(Common(json=is_json)), tree, is_long=is_long)  # type: ignore[arg-type]


def test_a_directory_inside_itself_is_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    both = [Entry("a", directory(1)), Entry("b", directory(2))]
    tree = FakeTree({1: both, 2: both})
    shown = listing(tree)
    shown.directory("/", directory(1), is_recursive=True)
    assert tree.listed == ["/", "/b"]
    assert shown.is_partial
    assert capsys.readouterr().err.count("in two places, or inside itself") == 3
    listing(tree, is_json=True).directory("/", directory(1), is_recursive=True)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["directory"] for each in told if each["not_listed"]] == ["/a", "/b/a", "/b/b"]


def test_a_tree_without_end_is_listed_as_deep_as_trees_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = FakeTree()
    shown = listing(tree)
    shown.directory("/", directory(1), is_recursive=True)
    assert len(tree.listed) == DEPTH_MAX + 1
    assert shown.is_partial
    assert "too deep" in capsys.readouterr().err


def test_years_that_no_calendar_has_and_links_that_are_not_read_are_listed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    far = Node(number=5, kind=FileKind.DIRECTORY, size=0, modified_ns=1 << 62 << 30)
    lost = Entry("lost", Node(number=6, kind=FileKind.SYMLINK, size=5), reason="it is\x1b damaged")
    tree = FakeTree({1: [Entry("far", far), lost]}, suspect="others wrote to it")
    plain = listing(tree)
    plain.directory("/", directory(1), is_recursive=False)
    assert not plain.is_partial
    long = listing(tree, is_long=True)
    long.directory("/", directory(1), is_recursive=False)
    assert long.is_partial
    out = capsys.readouterr().out
    assert " ? " in out
    assert "it is\\x1b damaged" in out
    machine = listing(tree, is_json=True)
    machine.directory("/", directory(1), is_recursive=False)
    assert machine.is_partial
    document = json.loads(capsys.readouterr().out)
    assert document["suspect_reason"] == "others wrote to it"
    assert document["entries"][1]["reason"] == "it is\x1b damaged"


def test_a_full_standard_output_is_no_defect_of_ours() -> None:
    # In a process of its own: descriptor 1 is given up by it.
    program = """
import sys
from stillblock.cli.output import OutputError, write_content
try:
    write_content(b"x" * 100_000)
except OutputError as error:
    print(error, file=sys.stderr)
"""
    with Path("/dev/full").open("wb") as full:
        ran = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
    assert ran.stderr == "standard output: No space left on device\n"


def test_a_signal_that_ends_a_copy_unwinds_it() -> None:
    # Whatever another test of this process has made of it.
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), _unwinding():
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 5)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
