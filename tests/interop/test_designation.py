"""A disk with a real filesystem, mounted by the kernel: what rules in words keep and leave out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from disks import PARTITION_AT, ext4_disk, overwrite_everything
from mounted import as_file
from serving import MIB, Served, run, try_run, volume_of

pytestmark = [
    pytest.mark.needs("mkfs.ext4", "e2fsck", "debugfs", "nbdcopy", "nbdfuse", "fusermount3"),
    pytest.mark.slow,
]


AT = f"offset={PARTITION_AT}"


@contextmanager
def loop_mounted(image: Path, *options: str) -> Iterator[Path]:
    """Mount a filesystem; skip where the host does not let us."""
    if os.geteuid() != 0:
        pytest.skip("host: mounting needs root")
    with tempfile.TemporaryDirectory(prefix="sb-mnt-") as folder:
        words = ",".join(("loop", *options))
        ran = try_run("mount", "-o", words, str(image), folder)
        if ran.code != 0:
            pytest.skip(f"host: mount is not allowed here: {ran.err.strip()}")
        try:
            yield Path(folder)
        finally:
            run("umount", folder)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[tuple[Served, dict[str, bytes]]]:
    """A served disk with one ext4 partition, and the content of its files."""
    disk, files = ext4_disk(tmp_path, size=48 * MIB)
    with tempfile.TemporaryDirectory(prefix="sb-") as folder, volume_of(disk, folder) as served:
        yield served.start(), files


def copy_of(served: Served, snapshot: str, folder: Path) -> Path:
    """Return a copy of a snapshot's filesystem; its journal is replayed, and it is clean then."""
    copy, filesystem = folder / f"{snapshot}.img", folder / f"{snapshot}.ext4"
    run("nbdcopy", served.uri(snapshot), str(copy))
    filesystem.write_bytes(copy.read_bytes()[PARTITION_AT:-MIB])
    replayed = try_run("e2fsck", "-p", str(filesystem))
    assert replayed.code in {0, 1}, replayed.out + replayed.err
    run("e2fsck", "-f", "-n", str(filesystem))
    return filesystem


def preserved(served: Served, name: str) -> int:
    shown = served.cli("snapshot", "show", f"web@{name}", "--json").json["snapshot"]
    return int(shown["preserved_bytes"])


def test_every_file_that_rules_keep_outlives_the_disk(scene, tmp_path):
    served, files = scene
    served.cli(
        *("rules", "set", "web", "--exclude", "free", "--exclude", "path:/var/cache/**"),
        *("--include", "path:/var/cache/apt/**", "--exclude", "path:/**/*.tmp"),
    )
    served.snapshot("a")
    overwrite_everything(served)
    copy = copy_of(served, "a", tmp_path)
    with loop_mounted(copy, "ro") as top:
        for path, content in files.items():
            found = (top / path.lstrip("/")).read_bytes()
            if path.endswith(".tmp") or path.startswith("/var/cache/c"):
                assert len(found) == len(content), path
                assert not any(found), f"{path} was left out and reads as zeros"
            else:
                assert found == content, path


def test_files_that_were_just_synced_are_kept_when_free_space_is_left_out(scene, tmp_path):
    """The maps on the disk know nothing of them: the journal does."""
    served, files = scene
    written = {f"new{i}": os.urandom(120_000 + i) for i in range(60)}
    with as_file(served) as (live, _), loop_mounted(live, AT) as top:
        for name, content in written.items():
            with (top / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        served.snapshot("busy", "--exclude", "free")
        busy = served.cli("snapshot", "receipt", "web@busy", "--json").json
        run("fsfreeze", "--freeze", str(top))
        try:
            served.snapshot("frozen", "--exclude", "free")
        finally:
            run("fsfreeze", "--unfreeze", str(top))
    overwrite_everything(served)
    for name in ("busy", "frozen"):
        with loop_mounted(copy_of(served, name, tmp_path), "ro") as top:
            for path, content in (files | written).items():
                assert (top / path.lstrip("/")).read_bytes() == content, f"{name}: {path}"
    frozen = served.cli("snapshot", "receipt", "web@frozen", "--json").json
    assert sum(part["end"] - part["start"] for part in frozen["left_out"]) > 20 * MIB
    assert busy["terms"][0]["unresolved"] == []


def test_new_files_cost_nothing_but_metadata_once_free_space_is_left_out(scene):
    served, _ = scene
    with as_file(served) as (live, _), loop_mounted(live, AT) as top:
        # Zeros cost nothing; free space of a disk that was in use holds what was deleted.
        with (top / "old").open("wb") as file, suppress(OSError):
            while file.write(os.urandom(MIB)):
                file.flush()
        run("sync", "--file-system", str(top))
        (top / "old").unlink()
        run("sync", "--file-system", str(top))
        served.snapshot("all", "--include", "all")
        served.snapshot("without", "--exclude", "free")
        for number in range(20):
            (top / f"fill{number}").write_bytes(os.urandom(MIB))
        run("sync", "--file-system", str(top))
        cost = {name: preserved(served, name) for name in ("all", "without")}
    print(f"20 MiB of new files preserve {cost['all']} bytes, {cost['without']} without free space")
    assert cost["all"] > 15 * MIB
    assert cost["without"] < MIB
