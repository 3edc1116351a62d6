"""Questions about files: what paths lead to, what directories hold, what no worker may say."""

from array import array

import pytest

from stillblock.errors import OriginIOError
from stillblock.selection.confinement import Limits
from stillblock.selection.file_questions import batch_of, found_of, layout_of, node_of, row_of
from stillblock.selection.file_worker import RENEWALS_MAX, FileWorker
from stillblock.selection.files import BATCH_MAX, Files, Missing
from stillblock.selection.filesystems import Content, FileKind, Node, Run, UnresolvedError
from stillblock.selection.filesystems.cache import CachedDisk
from stillblock.selection.filesystems.filesystem import laid_out
from stillblock.selection.filesystems.opening import READERS
from stillblock.selection.wire import WireError
from unit.selection.fake_filesystems import FakeFile, FakeFilesystem
from unit.selection.partition_images import MIB, blank


def link(target: str) -> FakeFile:
    return FakeFile(kind=FileKind.SYMLINK, head=target.encode(), size=len(target))


TREE = FakeFilesystem(
    {
        "/etc/fstab": FakeFile([(4096, 8192)]),
        "/etc/up": link("../etc/fstab"),
        "/etc/out": link("../../../../etc/fstab"),
        "/absolute": link("/etc/fstab"),
        "/folder": link("etc"),
        "/loop": link("loop"),
        "/nowhere": link("not/there"),
        "/Case": FakeFile(),
    }
)


def found(path: str, *, follows: bool = False) -> str:
    entry = Files(TREE).find(path, follows=follows)
    return entry.reason if isinstance(entry, Missing) else entry.name


@pytest.mark.parametrize(
    ("path", "leads_to"),
    [
        ("/", "/"),
        ("/etc/./fstab", "/etc/fstab"),
        ("/etc/../etc//fstab", "/etc/fstab"),
        ("/../../..", "/"),
        ("/folder/fstab", "/etc/fstab"),
        ("/folder/up", "/etc/up"),
        ("/folder/", "/etc"),
        ("/folder", "/folder"),
        ("/absolute", "/absolute"),
        ("/loop", "/loop"),
    ],
)
def test_a_path_leads_through_links_to_a_name(path: str, leads_to: str) -> None:
    assert found(path) == leads_to


@pytest.mark.parametrize("path", ["/absolute", "/etc/up", "/etc/out", "/folder/out"])
def test_a_link_is_followed_if_asked_and_never_out_of_the_filesystem(path: str) -> None:
    assert found(path, follows=True) == "/etc/fstab"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/etc/shadow", "there is no shadow in /etc"),
        ("/case", "there is no case in /"),
        ("/etc/fstab/x", "/etc/fstab is no directory"),
        ("/etc/fstab/", "/etc/fstab is no directory"),
        ("/loop", "/loop leads through more than 40 links"),
        ("/nowhere", "there is no not in /"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(path: str, reason: str) -> None:
    assert found(path, follows=True) == reason


def test_where_names_ignore_case_the_exact_one_comes_first() -> None:
    files = Files(
        FakeFilesystem({"/README": FakeFile(), "/readme": FakeFile()}, is_case_sensitive=False)
    )
    for path, name in (("/readme", "/readme"), ("/README", "/README"), ("/Readme", "/README")):
        entry = files.find(path, follows=False)
        assert not isinstance(entry, Missing)
        assert entry.name == name


def test_a_large_directory_comes_in_batches_and_a_batch_can_be_asked_for_again() -> None:
    count = BATCH_MAX + 10
    files = Files(FakeFilesystem({f"/f{i}": FakeFile() for i in range(count)}))
    root = FakeFilesystem().root()
    first, is_end = files.batch(root, position=0)
    assert (len(first), is_end) == (BATCH_MAX, False)
    rest, is_end = files.batch(root, position=BATCH_MAX)
    assert (len(rest), is_end) == (10, True)
    again, is_end = files.batch(root, position=BATCH_MAX)
    assert (again, is_end) == (rest, True)
    assert len({entry.name for entry in (*first, *rest)}) == count


def test_files_are_held_against_what_changed() -> None:
    filesystem = FakeFilesystem(
        {
            "/a": FakeFile([(8192, 12288), (20480, 24576)], size=12288),
            "/b": FakeFile([(12288, 16384)]),
            "/c": FakeFile([(8192, 12288)]),
            "/broken": FakeFile(error="compressed"),
        },
        free_extents=((40960, 49152), (20480, 24576)),
    )
    files = Files(filesystem)
    files.hold_against(((0, 4096), (10000, 13000), (20480, 45000)))
    entries = {entry.name: entry for entry in files.batch(filesystem.root(), position=0)[0]}
    assert {name: entry.changed_bytes for name, entry in entries.items()} == {
        "a": (12288 - 10000) + 4096,
        "b": 13000 - 12288,
        "c": 12288 - 10000,
        "broken": 0,
    }
    assert entries["broken"].reason == "compressed"
    assert entries["a"].digest != entries["c"].digest != entries["b"].digest
    # What a file has is no free space, whatever the map says.
    assert files.touched() == (((10000, 13000), (20480, 24576)), ((40960, 45000),))


def test_one_copy_of_each_piece_is_laid_out_to_the_size_and_no_further() -> None:
    runs = (
        Run(0, 4096, 100),
        Run(0, 4096, 9000),
        Run(8192, 4096, None),
        Run(12288, 8192, 300, is_unwritten=True),
        Run(20480, 4096, 50_000),
    )
    assert laid_out(runs, size=13000).runs == (
        Run(0, 4096, 100),
        Run(12288, 712, 300, is_unwritten=True),
    )


@pytest.mark.parametrize(
    "runs", [(Run(0, 4096, 1, is_encoded=True),), (Run(0, 8192, 1), Run(4096, 4096, 2))]
)
def test_what_is_not_the_files_own_bytes_is_never_laid_out(runs: tuple[Run, ...]) -> None:
    with pytest.raises(UnresolvedError):
        laid_out(runs, size=MIB)


# What a worker says -------------------------------------------------------------------------------

NODE = Node(number=7, kind=FileKind.REGULAR, size=10_000, modified_ns=-5)


def entry_row(name: object = "a", node: object = None, target: object = None) -> list[object]:
    return [name, row_of(NODE) if node is None else node, target, 0, "", ""]


def test_what_a_worker_says_comes_through() -> None:
    assert node_of(row_of(NODE)) == NODE
    entries, is_end = batch_of({"entries": [entry_row("no\udcffutf8")], "is_end": True})
    assert (entries[0].name, entries[0].node, is_end) == ("no\udcffutf8", NODE, True)
    numbers = array("Q", [0, 4096, 8192, 0, 4096, 5904, 65536, 1, 100, 200])
    layout = layout_of({"counts": [4, 1]}, numbers, node=NODE, size=MIB)
    assert layout.runs == (Run(0, 4096, 8192), Run(4096, 5904, 65536, is_unwritten=True))
    assert layout.by_reader == ((100, 200),)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "a\0b", "x" * 2000, 7, None])
def test_no_worker_gives_a_name_that_leads_elsewhere(name: object) -> None:
    with pytest.raises(WireError):
        batch_of({"entries": [entry_row(name)], "is_end": True})


@pytest.mark.parametrize(
    "row",
    [
        [],
        None,
        [7, 0, "file", 1, 1, 0, 0, 0],
        [7, 0, "tree", 1, 1, 0, 0, 0, 0],
        [7, 0, "file", -1, 1, 0, 0, 0, 0],
        [7, 0, "file", 1 << 63, 1, 0, 0, 0, 0],
        [7, 0, "file", 1, 1, 0o170000, 0, 0, 0],
        [7, 0, "file", 1, 1, 0, 1 << 32, 0, 0],
        [7, 0, "file", True, 1, 0, 0, 0, 0],
    ],
)
def test_no_worker_gives_a_node_that_cannot_be(row: object) -> None:
    with pytest.raises(WireError):
        node_of(row)


@pytest.mark.parametrize(
    ("counts", "numbers"),
    [
        ([2, 0], [0, 4096, MIB - 100, 0]),  # outside the filesystem
        ([2, 0], [0, 10_001, 0, 0]),  # beyond the file
        ([4, 0], [4096, 10, 0, 0, 0, 10, 0, 0]),  # out of order
        ([4, 0], [0, 20, 0, 0, 10, 20, 0, 0]),  # overlapping
        ([2, 0], [0, 0, 0, 0]),  # empty
        ([0, 1], [9000, 10_001]),
        ([2, 1], [0, 10, 0, 0]),  # fewer than it counts
        ([1, 0], [0, 10]),
        ([-1, 1], []),
        (None, []),
    ],
)
def test_no_worker_places_a_file_where_it_cannot_be(counts: object, numbers: list[int]) -> None:
    with pytest.raises(WireError):
        layout_of({"counts": counts}, array("Q", numbers), node=NODE, size=MIB)


@pytest.mark.parametrize("document", [None, {}, {"missing": 7}, {"entry": []}, {"entry": "x"}])
def test_an_answer_about_a_path_has_its_form(document: object) -> None:
    with pytest.raises(WireError):
        found_of(document)


# Real workers -------------------------------------------------------------------------------------


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch):
    def choose(name: str, *, wall_s: float = 60.0) -> FileWorker:
        monkeypatch.setitem(READERS, Content.EXT, f"unit.selection.worker_readers:open_{name}")
        return FileWorker(blank(MIB), Content.EXT, limits=Limits(wall_s=wall_s))

    return choose


def test_a_worker_is_asked_again_and_again(reader) -> None:
    with reader("good") as worker:
        entry = worker.find("/a", follows=False)
        assert not isinstance(entry, Missing)
        assert worker.find("/c", follows=False) == Missing("there is no c in /")
        assert [e.name for e in worker.entries(FakeFilesystem().root())] == ["a", "b\udcff\n"]
        assert worker.layout(entry.node).runs == (Run(0, 4096, 4096),)
        with pytest.raises(UnresolvedError, match="gave 0 bytes of a file instead of 5"):
            worker.content(entry.node, offset=0, length=5)
        worker.hold_against(((0, 5000),))
        assert [e.changed_bytes for e in worker.entries(FakeFilesystem().root())] == [904, 0]
        assert worker.touched() == (((4096, 5000),), ())


def test_a_worker_that_hung_is_replaced_a_few_times_and_then_left_alone(reader) -> None:
    with reader("hanging", wall_s=0.2) as worker:
        for _ in range(RENEWALS_MAX + 1):
            with pytest.raises(UnresolvedError, match="did not end within"):
                worker.find("/a", follows=False)
        with pytest.raises(UnresolvedError, match="is left alone"):
            worker.find("/a", follows=False)


def test_a_worker_that_says_no_is_the_same_one_for_the_next_question(reader) -> None:
    with reader("good") as worker:
        process = worker._process
        with pytest.raises(UnresolvedError):
            worker.layout(Node(number=999, kind=FileKind.REGULAR, size=1))
        assert not isinstance(worker.find("/a", follows=False), Missing)
        assert worker._process is process


def test_an_error_of_the_disk_near_metadata_does_not_hide_it() -> None:
    """What rules leave out lies between what a filesystem needs, and readers read ahead."""

    class Holey:
        size = 1 << 20

        def pread(self, *, offset: int, length: int) -> bytes:
            if offset < 5000 and offset + length > 4096:
                raise OriginIOError("left out")
            return bytes([7]) * length

    cached = CachedDisk(Holey())
    assert cached.pread(offset=0, length=4096) == bytes([7]) * 4096
    assert cached.pread(offset=8192, length=100) == bytes([7]) * 100
    assert cached.pread(offset=131_000, length=500) == bytes([7]) * 500
    with pytest.raises(OriginIOError):
        cached.pread(offset=4000, length=200)
