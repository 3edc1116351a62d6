"""Every filesystem that rules know files of: what is kept outlives the disk, and is sound."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from disks import PARTITION_AT, make_tree, overwrite_everything, partitioned
from serving import MIB, run, try_run, volume_of

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Kind:
    """How a filesystem is made, mounted and checked."""

    name: str
    size: int
    make: tuple[str, ...]
    mount: tuple[str, ...]
    """The image and the mount point follow."""
    check: tuple[str, ...]
    needs_device: bool = False
    excluded_reads: bool = True
    """Files that were left out read as zeros; else they give an error, for their sums are wrong."""

    @property
    def tools(self) -> tuple[str, ...]:
        return (self.make[0], self.mount[0], self.check[0])


KINDS = (
    Kind(
        "xfs",
        320 * MIB,
        ("mkfs.xfs", "-q"),
        ("mount", "-o", "loop,nouuid"),
        ("xfs_repair", "-n"),
    ),
    Kind(
        "btrfs",
        128 * MIB,
        ("mkfs.btrfs", "-q"),
        ("mount", "-o", "loop"),
        ("btrfs", "check"),
        excluded_reads=False,
    ),
    Kind(
        "ntfs",
        48 * MIB,
        ("mkfs.ntfs", "-q", "-F", "-f"),
        ("ntfs-3g",),
        ("ntfsfix", "--no-action"),
    ),
    Kind(
        "exfat",
        48 * MIB,
        ("mkfs.exfat",),
        ("mount.exfat-fuse",),
        ("fsck.exfat", "-n"),
        needs_device=True,
    ),
)


@contextmanager
def device_of(image: Path) -> Iterator[Path]:
    device = run("losetup", "--find", "--show", str(image)).out.strip()
    try:
        yield Path(device)
    finally:
        run("losetup", "--detach", device)


@contextmanager
def mounted(kind: Kind, image: Path) -> Iterator[Path]:
    """Mount; skip where the host does not let us."""
    if os.geteuid() != 0:
        pytest.skip("host: mounting needs root")
    with tempfile.TemporaryDirectory(prefix="sb-mnt-") as folder:

        @contextmanager
        def attach(what: Path) -> Iterator[Path]:
            ran = try_run(*kind.mount, str(what), folder)
            if ran.code != 0:
                pytest.skip(f"host: {kind.name} cannot be mounted here: {ran.err.strip()}")
            try:
                yield Path(folder)
            finally:
                run("umount", folder)

        if kind.needs_device:
            with device_of(image) as device, attach(device) as top:
                yield top
        else:
            with attach(image) as top:
                yield top


def read_or_none(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def the_story(
    tmp_path: Path,
    filesystem: Path,
    files: dict[str, bytes],
    sound_files_of: Callable[[Path], Callable[[str], bytes | None]],
    *,
    excluded_reads: bool,
) -> None:
    """Serve it in a partition, snapshot, overwrite, and compare what a copy of that has."""
    size = filesystem.stat().st_size + 2 * MIB
    disk = tmp_path / "disk.img"
    partitioned(disk, filesystem.read_bytes(), size=size)
    terms = ["--exclude", "free", "--exclude", "path:/var/cache/**"]
    terms += ["--include", "path:/var/cache/apt/**", "--exclude", "path:/**/*.tmp"]
    with tempfile.TemporaryDirectory(prefix="sb-") as folder, volume_of(disk, folder) as served:
        served.start()
        served.snapshot("a", *terms)
        receipt = served.cli("snapshot", "receipt", "web@a", "--json").json
        assert [term["unresolved"] for term in receipt["terms"]] == [[], [], [], []]
        assert [term["file_count"] for term in receipt["terms"][1:]] == [41, 1, 1]
        overwrite_everything(served)
        copy = tmp_path / "copy.img"
        run("nbdcopy", served.uri("a"), str(copy))
    found = tmp_path / "found.img"
    found.write_bytes(copy.read_bytes()[PARTITION_AT : size - MIB])
    read = sound_files_of(found)
    for path, content in files.items():
        if path.endswith(".tmp") or path.startswith("/var/cache/c"):
            found_content = read(path)
            # What lies within metadata stays, and so do clusters in one block with something kept.
            if found_content is None:
                assert not excluded_reads, path
            else:
                assert is_left_out_in_part(found_content, content), path
        else:
            assert read(path) == content, path
    secret = [path for path in files if path.startswith("/var/cache/c")]
    gone = sum(read(path) != files[path] for path in secret)
    assert gone > len(secret) // 2, "most was left out"


def is_left_out_in_part(found: bytes, content: bytes) -> bool:
    """Whether each sector is what it was, or zeros."""
    sectors = range(0, len(content), 512)
    return len(found) == len(content) and all(
        found[at : at + 512] in (content[at : at + 512], bytes(len(content[at : at + 512])))
        for at in sectors
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.needs("nbdcopy", "losetup")
def test_files_that_rules_keep_outlive_the_disk(kind, tmp_path, require_tool):
    for tool in kind.tools:
        require_tool(tool)
    filesystem = tmp_path / "filesystem"
    with filesystem.open("wb") as file:
        file.truncate(kind.size)
    run(*kind.make, str(filesystem))
    with mounted(kind, filesystem) as top:
        files = make_tree(top)
        run("sync", "--file-system", str(top))

    def sound_files_of(image: Path) -> Callable[[str], bytes | None]:
        run(*kind.check, str(image))
        with mounted(kind, image) as top:
            found = {path: read_or_none(top / path.lstrip("/")) for path in files}
        return found.__getitem__

    the_story(tmp_path, filesystem, files, sound_files_of, excluded_reads=kind.excluded_reads)


@pytest.mark.needs("nbdcopy", "mkfs.fat", "mcopy", "fsck.fat")
def test_files_that_rules_keep_of_fat_outlive_the_disk(tmp_path):
    filesystem, tree = tmp_path / "filesystem", tmp_path / "tree"
    files = make_tree(tree)
    with filesystem.open("wb") as file:
        file.truncate(40 * MIB)
    run("mkfs.fat", "-F", "32", str(filesystem))
    copied = [str(path) for path in sorted(tree.iterdir())]
    mtool("mcopy", filesystem, "-s", *copied, "::/")

    def sound_files_of(image: Path) -> Callable[[str], bytes | None]:
        run("fsck.fat", "-n", str(image))
        out = tmp_path / "out"
        out.mkdir()
        mtool("mcopy", image, "-s", "-n", "::/home", "::/var", str(out))
        return lambda path: read_or_none(out / path.lstrip("/"))

    the_story(tmp_path, filesystem, files, sound_files_of, excluded_reads=True)


def mtool(tool: str, image: Path, *words: str) -> None:
    subprocess.run(
        [tool, "-i", str(image), *words],
        check=True,
        capture_output=True,
        env=os.environ | {"MTOOLS_SKIP_CHECK": "1"},
    )
