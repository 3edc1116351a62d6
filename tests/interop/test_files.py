"""Files of a snapshot without a mount, against the kernel's view of the same snapshot."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from filesystems import KINDS, SECRET, TOOLS, Kind, loop_mounted, make_disk, start_of
from serving import MIB, Served, run, volume_of
from stillblock.config import Config
from stillblock.errors import ExcludedError
from stillblock.model import Reference
from stillblock.operations.clones import CloneRequest
from stillblock.operations.copying import Copied, copy_out
from stillblock.operations.trees import SnapshotFiles, Tree
from stillblock.service.reading import open_reference

pytestmark = [pytest.mark.needs(*TOOLS), pytest.mark.slow]

RULES = ("--exclude", "path:/var/cache/**", "--exclude", "free")
CACHE = {f"/var/cache/c{number}" for number in range(4)}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    """A served disk, whose live side was overwritten since the snapshot, and a copy of that."""
    folder = tmp_path_factory.mktemp("files")
    make_disk(folder / "disk.img")
    with (
        tempfile.TemporaryDirectory(prefix="sb-") as short,
        volume_of(folder / "disk.img", short) as served,
    ):
        served.start()
        served.snapshot("monday", *RULES)
        with served.client() as client:
            for kind in KINDS:
                client.pwrite(b"\xee" * MIB, offset=start_of(kind))
            client.flush()
        copy = folder / "copy.img"
        run("nbdcopy", served.uri("monday"), str(copy))
        yield served, copy


@contextmanager
def opened(served: Served, text: str) -> Iterator[Tree]:
    """A filesystem as the commands open it, without a process for each."""
    reference = Reference.parse(text)
    config = Config.load(state_dir=served.folder / "s")
    with (
        open_reference(config, reference) as held,
        SnapshotFiles(held).tree(reference.place) as tree,
    ):
        yield tree


@pytest.fixture(scope="module")
def copies(
    disk: tuple[Served, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Copied, Path]]:
    """All of each filesystem, as `cp -r` copies it."""
    found = {}
    for kind in KINDS:
        to = tmp_path_factory.mktemp("copies") / kind.name
        with opened(disk[0], f"web@monday:{kind.number}:/") as tree:
            found[kind.name] = (copy_out(tree, "/", to, is_recursive=True), to)
    return found


def told(top: Path, kind: Kind) -> dict[str, tuple[object, ...]]:
    """What each path of a tree is: kind, mode, time, size or target, links and content."""
    found: dict[str, tuple[object, ...]] = {}
    for path in top.rglob("*"):
        status = path.lstat()
        # What has no modes gets some from whoever mounts it, and whoever copies it.
        mode: object = stat.S_IMODE(status.st_mode) if kind.has_modes else ""
        owner: object = (status.st_uid, status.st_gid) if kind.has_modes else ""
        what: tuple[object, ...] = (mode, owner, status.st_mtime_ns)
        if path.is_symlink():
            what = ("link", str(path.readlink()))
        elif path.is_dir():
            what = ("directory", *what)
        elif path.is_file():
            # On btrfs what is left out reads as an error, for its checksum stays.
            content = b"" if f"/{path.relative_to(top)}" in CACHE else path.read_bytes()
            what = ("file", *what, status.st_nlink, content)
        else:
            what = ("other",)
        found[f"/{path.relative_to(top)}"] = what
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_copied_tree_is_what_the_kernel_shows_of_the_snapshot(
    disk: tuple[Served, Path], copies: dict[str, tuple[Copied, Path]], kind: Kind
) -> None:
    if kind.name == "vfat" and "vfat" not in Path("/proc/filesystems").read_text():
        pytest.skip("host: no vfat in this kernel; mtools judges it below")
    _, copy = disk
    done, out = copies[kind.name]
    options = {"xfs": ["ro", "norecovery"], "ext4": ["ro", "noload"]}.get(kind.name, ["ro"])
    with loop_mounted(copy, kind, *options) as top:
        expected = told(top, kind)
    refused = {refused.path: refused.reason for refused in done.refused}
    others = {path for path, what in expected.items() if what == ("other",)}
    assert refused.keys() == CACHE | others
    assert {refused[path] for path in CACHE} == {"left out by path:/var/cache/**"}
    got = told(out, kind)
    assert got.keys() == expected.keys() - refused.keys()
    wrong = [path for path, what in got.items() if what != expected[path]]
    if kind.name == "ntfs":
        # ntfs-3g makes links that only it takes for links (docs/filesystems.md).
        wrong = [path for path in wrong if expected[path][0] != "link"]
    assert wrong == []


@pytest.mark.parametrize("kind", [k for k in KINDS if k.has_holes], ids=lambda kind: kind.name)
def test_holes_stay_holes_and_what_was_never_written_reads_as_zeros(
    copies: dict[str, tuple[Copied, Path]], kind: Kind
) -> None:
    _, out = copies[kind.name]
    sparse = (out / "srv/sparse").stat()
    assert sparse.st_size == 5 * MIB
    assert sparse.st_blocks * 512 < MIB
    if kind.has_modes:
        preallocated = (out / "srv/preallocated").read_bytes()
        assert preallocated == b"begun" * 1000 + bytes(MIB - 5000)


@pytest.mark.needs("mcopy")
def test_files_of_fat_are_those_that_mtools_finds(
    disk: tuple[Served, Path], copies: dict[str, tuple[Copied, Path]], tmp_path: Path
) -> None:
    _, copy = disk
    (kind,) = (kind for kind in KINDS if kind.name == "vfat")
    _, out = copies["vfat"]
    (tmp_path / "expected").mkdir()
    inside = f"{copy}@@{start_of(kind)}"
    run("mcopy", "-s", "-m", "-i", inside, "::/*", str(tmp_path / "expected"))
    expected = {p: p.read_bytes() for p in (tmp_path / "expected").rglob("*") if p.is_file()}
    assert len(expected) > 60
    for path, content in expected.items():
        inner = path.relative_to(tmp_path / "expected")
        if f"/{inner}" not in CACHE:
            assert (out / inner).read_bytes() == content, inner


def test_the_commands_as_people_type_them(disk: tuple[Served, Path], tmp_path: Path) -> None:
    served, _ = disk
    listed = served.cli("ls", "web@latest", "--json").json["filesystems"]
    assert [(info["place"], info["label"]) for info in listed] == [
        ("part:1", "root"),
        ("part:2", "data"),
        ("part:3", "pool"),
        ("part:4", "win"),
        ("part:5", "ESP"),
    ]
    ran = served.try_cli("ls", "web@monday:/etc")
    assert ran.code == 2
    assert 'has 5 filesystems: part:1 ext4 "root"' in ran.err
    assert "web@monday:1:/path" in ran.err
    names = served.cli("ls", "web@monday:root:/").out
    assert "\x1b" not in names
    assert "escape\\x1b[31m\\nline\n" in names
    long = served.cli("ls", "-l", "web@monday:root:/var/cache").out
    assert long.count("left out by path:/var/cache/**") == 4
    rows = served.cli("ls", "-R", "web@monday:data:/", "--json").out.splitlines()
    assert len(rows) == 7  # directories
    assert served.cli("cat", "web@monday:data:/folder/link").out == "tiny\n"
    refused = served.try_cli("cat", "web@monday:data:/var/cache/c1")
    assert (refused.code, refused.out) == (1, "")
    assert "web@monday:data:/var/cache/c1: left out by path:/var/cache/**" in refused.err
    partly = served.try_cli("cp", "-r", "web@monday:4:/var", str(tmp_path), "--json")
    assert partly.code == 3
    assert {refused["why"] for refused in partly.json["refused"]} == {"excluded"}
    assert SECRET not in b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_a_volume_that_nobody_serves_gives_the_same_files_and_so_does_its_clone(
    disk: tuple[Served, Path],
) -> None:
    served, _ = disk

    def content(text: str) -> bytes:
        with opened(served, f"{text}:root:/") as tree:
            found = tree.find("/srv/data/file 7")
            with pytest.raises(ExcludedError, match=r"c1: left out by path:/var/cache/\*\*"):
                tree.content("/var/cache/c1", tree.find("/var/cache/c1").node)
            return b"".join(tree.content(found.name, found.node).read())

    with served.session() as session:
        session.create_clone(CloneRequest(snapshot="monday", name="try"))
    there = (content("web@monday"), content("web@monday+try"))
    served.stop()
    try:
        alone = (content("web@monday"), content("web@monday+try"))
    finally:
        served.start()
    assert there == alone
    assert len(set(there)) == 1
    assert there[0]
