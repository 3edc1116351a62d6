"""What every reader must be right about, judged by what others say of the same image."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from stillblock.extents import intersect, total_bytes
from stillblock.model import Extents
from stillblock.selection.disk import Disk
from stillblock.selection.filesystems import (
    FileKind,
    Filesystem,
    UnresolvedError,
    open_filesystem,
    walk,
)
from unit.selection.filesystems.mounting import FileDisk, contents, digest, run
from unit.selection.filesystems.reading import content_by_runs, data_extents, files_of


def blkid(image: Path) -> dict[str, str]:
    """What blkid prints of an image."""
    lines = run("blkid", "-p", "-o", "export", image).splitlines()
    return dict(line.split("=", 1) for line in lines)


def assert_identity_is_what_blkid_prints(
    filesystem: Filesystem, image: Path, *, kind: str, size: int
) -> None:
    """Of a filesystem whose names match in any case; blkid has several words for a kind."""
    told = blkid(image)
    identity = filesystem.identity
    assert (identity.kind, identity.label, identity.uuid) == (kind, told["LABEL"], told["UUID"])
    assert identity.size == size
    assert not identity.is_case_sensitive


def assert_all_files_are_read(disk: Disk, filesystem: Filesystem, truth: dict[str, str]) -> None:
    assert {
        path: digest(content_by_runs(disk, filesystem, node))
        for path, node in files_of(filesystem).items()
    } == truth


def assert_files_read_the_same_in_pieces(
    filesystem: Filesystem, truth: dict[str, str], *, piece_bytes: int
) -> None:
    for path, node in files_of(filesystem).items():
        data = b"".join(
            filesystem.read(node, offset=offset, length=piece_bytes)
            for offset in range(0, node.size + 1, piece_bytes)
        )
        assert digest(data) == truth[path], path


def assert_has_no_file(free: Extents, filesystem: Filesystem) -> None:
    for path, node in files_of(filesystem).items():
        assert intersect(free, data_extents(filesystem, node)) == (), path


def assert_free_is_nobodys(filesystem: Filesystem, *, more_than_bytes: int) -> None:
    free = filesystem.free()
    assert total_bytes(free) > more_than_bytes
    assert intersect(free, filesystem.fixed()) == ()
    assert_has_no_file(free, filesystem)


def assert_all_else_is_whole(found: dict[str, str], truth: dict[str, str], out: set[str]) -> None:
    """Of a copy without free space and without the files that are out."""
    assert found.keys() == truth.keys()
    assert {path: found[path] for path in truth if path not in out} == {
        path: truth[path] for path in truth if path not in out
    }
    assert any(found[path] != truth[path] for path in out), "something must have been left out"


def assert_unresolved_or_held(
    copy: Path, truth: dict[str, str], mount: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    """Of a copy of a mounted volume: what the driver finds after a mount was not free before."""
    try:
        free = open_filesystem(FileDisk(copy)).free()
    except UnresolvedError as error:
        print(f"unresolved: {error}")
        return
    with mount(copy) as top:
        assert contents(top) == truth, "the driver must find them, or the test says nothing"
    assert_has_no_file(free, open_filesystem(FileDisk(copy)))


def assert_odd_things_are_what_they_are(filesystem: Filesystem) -> None:
    """The links, the pipe and the folder of `trees.grow_tree`."""
    nodes = dict(walk(filesystem))
    for path, target in (("short link", b"../tiny"), ("long link", b"/" + b"long/" * 100)):
        link = nodes[f"/odd/{path}"]
        assert link.kind is FileKind.SYMLINK
        assert filesystem.read(link, offset=0, length=4096) == target
    assert nodes["/odd/pipe"].kind is FileKind.OTHER
    assert nodes["/odd"].kind is FileKind.DIRECTORY
    assert nodes["/first name"] == nodes["/odd/second name"]
    assert nodes["/odd"].mode == 0o755
