"""Filesystems of a snapshot by name, and files whose blocks lie in pieces all over the disk."""

from __future__ import annotations

import random
import subprocess
from dataclasses import replace

import pytest

from stillblock.errors import ExcludedError, NotFoundError, UsageError
from stillblock.extents import normalise, subtract
from stillblock.model import Extents, LeftOut
from stillblock.operations.held import Held, Refusal, Why
from stillblock.operations.trees import SnapshotFiles, Tree
from stillblock.selection.filesystems import Content, UnresolvedError
from stillblock.selection.places import Place
from unit.selection.fake_filesystems import swap_head
from unit.selection.partition_images import MIB, GptPart, gpt_disk
from unit.test_held import RECEIPT

SIZE = 8 * MIB
HALF = SIZE // 2


class Disk:
    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size_bytes = len(content)

    def pread(self, *, offset: int, length: int) -> bytes:
        return self._content[offset : offset + length]

    def extents(self, *, offset: int, length: int) -> list[tuple[int, int, int]]:
        return [(offset, offset + length, 0)]

    def close(self) -> None:
        """Nothing is open."""


def held(content: bytes, *, without: Extents = (), because: str = "part:9") -> Held:
    left_out = tuple(LeftOut(start=s, end=e, because=because) for s, e in without)
    selected = subtract(((0, len(content)),), without)
    receipt = replace(RECEIPT, extents=selected, left_out=left_out, lost=())
    return Held(Disk(content), receipt)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, require_tool) -> tuple[bytes, dict[str, bytes]]:
    """An ext4 filesystem, and its files."""
    require_tool("mkfs.ext4")
    folder = tmp_path_factory.mktemp("trees")
    dice = random.Random(1)
    files = {f"/d/f{i}": dice.randbytes(dice.randint(1, 200_000)) for i in range(30)}
    for path, content in files.items():
        place = folder / "root" / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    made = folder / "image"
    words = [
        "mkfs.ext4",
        "-q",
        "-L",
        "same",
        "-d",
        str(folder / "root"),
        str(made),
        f"{SIZE >> 10}k",
    ]
    subprocess.run(words, check=True, capture_output=True)
    return made.read_bytes(), files


def disk_of(image: bytes, *, count: int) -> bytes:
    """A GPT with so many partitions that hold the filesystem, and one of swap behind them."""
    sectors = SIZE // 512
    parts = {n + 1: GptPart(2048 + n * sectors, 2047 + (n + 1) * sectors) for n in range(count)}
    first = 2048 + count * sectors
    parts[count + 1] = GptPart(first, first + 2047)
    disk = gpt_disk(parts, size=count * SIZE + 4 * MIB)
    for n in range(count):
        disk.content[MIB + n * SIZE : MIB + (n + 1) * SIZE] = image
    disk.content[first * 512 : first * 512 + 4096] = swap_head()
    return bytes(disk.content)


def test_one_filesystem_needs_no_name_and_swap_is_none(
    image: tuple[bytes, dict[str, bytes]],
) -> None:
    files = SnapshotFiles(held(disk_of(image[0], count=1)))
    with files.tree(None) as tree:
        assert tree.find("/d/f1").node.size == len(image[1]["/d/f1"])
    told = {info.place: (info.kind, info.is_read) for info in files.filesystems()}
    assert told == {"part:1": ("ext4", True), "part:2": ("swap", False)}


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        (None, UsageError, r"has 2 filesystems: part:1 ext4 \"same\" .*web@monday:1:/path"),
        (
            "same",
            UsageError,
            r"2 filesystems called \"same\"; name it by its place: part:1, part:2",
        ),
        ("other", UsageError, r"no filesystem with label or uuid \"other\".*part:1 ext4"),
        ("3", UsageError, "part:3 has no filesystem that is read here: it holds swap"),
        ("7", UsageError, "there is no part:7; the disk has part:1, part:2"),
    ],
)
def test_a_name_that_means_not_one_is_refused_and_told_what_there_is(
    image: tuple[bytes, dict[str, bytes]], name: str | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        SnapshotFiles(held(disk_of(image[0], count=2))).tree(name)


@pytest.mark.parametrize("name", ["2", "part:2"])
def test_a_place_is_named_by_its_number_or_as_messages_show_it(
    image: tuple[bytes, dict[str, bytes]], name: str
) -> None:
    files = SnapshotFiles(held(disk_of(image[0], count=2)))
    tree = files.tree(name)
    assert tree.place.name == "part:2"
    assert tree.path("/a") == f"web@monday:{name}:/a"


def test_a_disk_without_a_filesystem_says_what_it_has() -> None:
    with pytest.raises(NotFoundError, match="no filesystem that is read here; it has disk nothing"):
        SnapshotFiles(held(bytes(MIB))).tree(None)


def test_a_partition_that_was_left_out_says_by_which_rule(
    image: tuple[bytes, dict[str, bytes]],
) -> None:
    files = SnapshotFiles(
        held(disk_of(image[0], count=2), without=((MIB, MIB + SIZE),), because="part:1")
    )
    first, second, _ = files.filesystems()
    assert first.note == "its beginning is not held: left out by part:1"
    assert second.is_read
    with files.tree(None) as tree:
        assert tree.place.name == "part:2"


def test_a_filesystem_whose_metadata_is_not_held_is_not_read(
    image: tuple[bytes, dict[str, bytes]],
) -> None:
    """Group descriptors behind the superblock: zeros would be taken for an empty filesystem."""
    files = SnapshotFiles(held(image[0], without=((4096, HALF),)))
    with (
        pytest.raises(UnresolvedError, match=r"left out by part:9|not read"),
        files.tree(None) as t,
    ):
        t.find("/d/f1")


# A filesystem in pieces, as on a logical volume ---------------------------------------------------

PIECES = ((HALF + MIB, SIZE + MIB), (MIB, HALF + MIB))


def in_pieces(image: bytes) -> bytes:
    return bytes(MIB) + image[HALF:] + image[:HALF] + bytes(MIB)


def tree_in_pieces(source: Held) -> Tree:
    place = Place(name="lv:vg/root", pieces=PIECES, content=Content.EXT)
    return Tree(source, place, prefix="web@monday:vg/root")


def test_files_are_put_together_from_pieces_of_the_disk(
    image: tuple[bytes, dict[str, bytes]],
) -> None:
    content, files = image
    with tree_in_pieces(held(in_pieces(content))) as tree:
        names = [entry.name for entry in tree.entries("/d", tree.find("/d").node)]
        assert names == sorted(path[3:] for path in files)
        for path, expected in files.items():
            found = tree.content(path, tree.find(path).node)
            assert b"".join(found.read()) == expected, path


def test_a_block_that_is_left_out_is_found_where_it_lies_on_the_disk(
    image: tuple[bytes, dict[str, bytes]],
) -> None:
    content, files = image
    whole = held(in_pieces(content))
    with tree_in_pieces(whole) as tree:
        placed = {}
        for path in files:
            layout = tree.layout(tree.find(path).node)
            assert not isinstance(layout, Refusal)
            runs = normalise((r.start, r.start + r.length) for r in layout.runs if r.start)
            placed[path] = tree.place.disk_extents(runs)
    gone = placed["/d/f7"][-1]
    partly = held(in_pieces(content), without=((gone[1] - 4096 - gone[1] % 4096, gone[1]),))
    with tree_in_pieces(partly) as tree:
        with pytest.raises(ExcludedError, match="web@monday:vg/root:/d/f7: left out by part:9"):
            tree.content("/d/f7", tree.find("/d/f7").node)
        refused = [p for p in files if isinstance(tree.layout(tree.find(p).node), Refusal)]
        refusal = tree.layout(tree.find("/d/f7").node)
    assert "/d/f7" in refused
    assert len(refused) <= 2, "a neighbour may share the block, nobody else"
    assert isinstance(refusal, Refusal)
    assert refusal.why is Why.EXCLUDED
