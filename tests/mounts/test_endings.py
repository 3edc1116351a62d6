"""Whoever is killed or stopped with something mounted: afterwards nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from disks import partitioned
from mounted import clear, formatted, ours
from processes import wait_until
from serving import MIB, Served, pattern, volume_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180), pytest.mark.usefixtures("rooted")]


@pytest.fixture(scope="module")
def made() -> Iterator[Served]:
    """An ext4 disk with a snapshot and a clone."""
    with formatted("ext4") as served:
        served.start()
        served.snapshot("monday", "--only-these", "--include", "all")
        served.here("clone", "create", "web@monday+x")
        yield served
        if served.process is not None:
            served.stop()
        clear(served.folder)


@pytest.fixture
def disk(made: Served) -> Iterator[Served]:
    """It, served, with nothing mounted."""
    if made.process is None:
        made.start()
    yield made
    clear(made.folder)


def everything(served: Served, place: Path) -> dict[str, Path]:
    """Mount all there is to mount."""
    points = {name: place / name for name in ("images", "ro", "throw", "x")}
    for point in points.values():
        point.mkdir(exist_ok=True)
    served.here("mount", "--images", "web", str(points["images"]))
    served.here("mount", "web@monday", str(points["ro"]))
    served.here("mount", "web@monday", str(points["throw"]), "--writable")
    served.here("mount", "web@monday+x", str(points["x"]))
    served.here("attach", "web@monday")
    (points["x"] / "kept").write_text("kept")
    (points["throw"] / "lost").write_text("lost")
    return points


def clones(served: Served) -> list[str]:
    return [c["name"] for c in served.here("clone", "list", "web", "--json").json["clones"]]


def check_clean(served: Served, place: Path) -> None:
    assert ours(place) == ([], [])
    assert ours(served.folder) == ([], [])
    assert not list((served.folder / "s" / "mounts").glob("*.json"))
    assert not (served.folder / "s" / "run" / "images" / "web").exists()


def test_a_server_that_was_killed_cleans_up_when_it_starts_again(disk, place):
    points = everything(disk, place)
    held = os.open(points["x"] / "kept", os.O_RDONLY)  # somebody still uses one of them
    try:
        disk.kill()
        listed = disk.try_cli("mount", "--json")
        assert listed.code == 3
        assert not any(one["is_whole"] for one in listed.json["mounts"])
        doctor = disk.try_cli("doctor", "--json")
        assert doctor.out, doctor.err
        checks = {check["name"]: check for check in doctor.json["checks"]}
        assert f"web@monday at {points['ro']}" in checks["mounts"]["finding"]
        disk.start()
        assert clones(disk) == ["x"]
        assert disk.here("mount", "--json").json["mounts"] == []
        assert ours(place)[0] == []
    finally:
        os.close(held)
    assert wait_until(lambda: ours(disk.folder) == ([], []))
    check_clean(disk, place)
    disk.here("mount", "web@monday+x", str(points["x"]))
    disk.here("unmount", str(points["x"]))


def test_a_stop_unmounts_and_what_was_written_to_a_clone_is_kept(disk, place):
    before = disk.read(), disk.read("monday")
    points = everything(disk, place)
    refused = disk.try_cli("volume", "release", "web")
    assert refused.code == 1
    assert "--force" in refused.err
    ended = disk.stop()
    assert ended.code == 0, ended.err
    check_clean(disk, place)
    disk.start()
    assert clones(disk) == ["x"]
    disk.here("mount", "web@monday+x", str(points["x"]))
    assert (points["x"] / "kept").read_text() == "kept"
    assert (disk.read(), disk.read("monday")) == before
    held = os.open(points["x"], os.O_RDONLY)
    try:
        busy = disk.try_cli("unmount", str(points["x"]))
        assert busy.code == 1
        assert "is in use" in busy.err
        assert (points["x"] / "kept").read_text() == "kept"
        (points["x"] / "more").write_text("synced by force")
        disk.here("volume", "release", "web", "--force")
    finally:
        os.close(held)
    assert disk.process is not None
    disk.process.wait(timeout=30)
    disk.process.communicate()
    disk.process = None
    assert wait_until(lambda: ours(disk.folder) == ([], []))
    check_clean(disk, place)
    disk.start()
    disk.here("mount", "web@monday+x", str(points["x"]), "--read-only")
    assert (points["x"] / "more").read_text() == "synced by force"
    disk.here("unmount", "web@monday+x")


@pytest.mark.long
def test_mounts_of_a_killed_server_can_be_unmounted_without_one(disk, place):
    points = everything(disk, place)
    disk.kill()
    for point in points.values():
        disk.here("unmount", str(point))
    disk.here("detach", "web@monday")
    check_clean(disk, place)
    disk.start()
    assert clones(disk) == ["x"]


def test_a_clone_is_written_in_one_place_and_kept_while_anybody_may_use_it(disk, place):
    """A second mount is refused; a mount that is covered or bound elsewhere is no end of it."""
    points = [place / name for name in ("a", "b", "w", "bound")]
    for path in points:
        path.mkdir()
    a, b, w, bound = map(str, points)
    disk.here("mount", "web@monday+x", a)
    for words in (("mount", "web@monday+x", b), ("mount", "web@monday+x", b, "--read-only")):
        refused = disk.try_cli(*words)
        assert refused.code == 1
        assert f"at {a} already" in refused.err
    assert "already" in disk.try_cli("attach", "web@monday+x").err
    disk.here("unmount", a)
    with disk.client("monday+x"):
        assert "1 clients" in disk.try_cli("mount", "web@monday+x", a).err
    disk.here("mount", "web@monday", w, "--writable")
    (points[2] / "kept").write_text("kept")
    subprocess.run(["mount", "--bind", w, bound], check=True)
    busy = disk.try_cli("unmount", w)
    assert busy.code == 1
    assert "used elsewhere" in busy.err
    assert not os.path.ismount(w)
    assert len(clones(disk)) == 2
    assert (points[3] / "kept").read_text() == "kept"
    (points[3] / "more").write_text("more")
    subprocess.run(["umount", bound], check=True)
    # The server looks every other second.
    assert wait_until(lambda: not list((disk.folder / "s" / "mounts").glob("*.json")))
    check_clean(disk, place)
    assert clones(disk) == ["x"]


def test_a_clone_that_was_partitioned_anew_is_mounted_where_its_table_says_now(place, tmp_path):
    origin = tmp_path / "disk.img"
    partitioned(origin, pattern(1, 2 * MIB), size=8 * MIB)
    with volume_of(origin, str(place)) as served:
        served.start()
        served.snapshot("monday", "--only-these", "--include", "all")
        served.here("clone", "create", "web@monday+x")
        first = served.here("attach", "web@monday+x", "--partition", "1", "--json").json["mount"]
        served.here("detach", first["device"])
        with served.client("monday+x") as client:
            extent = (3 * MIB // 512).to_bytes(4, "little") + (MIB // 512).to_bytes(4, "little")
            client.pwrite(extent, offset=446 + 8)  # of the first partition, in the MBR
            client.pwrite(pattern(2, MIB), offset=3 * MIB)
            client.flush()
        second = served.here("attach", "web@monday+x", "--partition", "1", "--json").json["mount"]
        assert Path(second["device"]).read_bytes() == pattern(2, MIB)
        served.here("detach", second["device"])
        served.stop()


def test_a_command_that_is_told_to_end_undoes_what_it_began(disk, place):
    point = place / "ro"
    point.mkdir()
    (point / "mine").touch()
    refused = disk.try_cli("mount", "web@monday", str(point))
    assert refused.code == 1
    assert "is not empty" in refused.err
    (point / "mine").unlink()
    script = f"""
import os, signal, sys
from stillblock.mounting import kernel
real = kernel.attach_loop
def attach(*words, **options):
    device = real(*words, **options)
    os.kill(os.getpid(), signal.SIGTERM)
    return device
kernel.attach_loop = attach
from stillblock.cli import main
sys.argv = ["stillblock", "mount", "web@monday", {str(point)!r}, "--writable"]
sys.exit(main())
"""
    words = [sys.executable, "-c", script]
    ended = subprocess.run(words, env=disk.environment, cwd=disk.folder, check=False)
    assert ended.returncode != 0
    assert clones(disk) == ["x"]
    assert not [loop for loop in ours(disk.folder)[1] if "mount-" in loop]
    assert wait_until(lambda: not list((disk.folder / "s" / "mounts").glob("*.json")))
    check_clean(disk, place)


def test_a_volume_is_removed_only_once_its_mounts_are_gone(place, tmp_path):
    origin = tmp_path / "disk.img"
    origin.write_bytes(pattern(1, 4 * MIB))
    with volume_of(origin, str(place)) as served:
        served.start()
        served.snapshot("monday", "--only-these", "--include", "all")
        device = served.here("attach", "web@monday", "--json").json["mount"]["device"]
        served.kill()
        refused = served.try_cli("volume", "remove", "web", "--keep-store", "--yes")
        assert refused.code == 1
        assert f"web@monday at {device}" in refused.err
        served.here("detach", device)
        served.here("volume", "remove", "web", "--keep-store", "--yes")
        assert ours(served.folder) == ([], [])
        assert not list((served.folder / "s" / "mounts").glob("*.json"))


@pytest.mark.parametrize(
    "step",
    [
        "attach_loop",
        *(
            pytest.param(s, marks=pytest.mark.long)
            for s in ("create_clone", "mount_source", "mount")
        ),
    ],
)
def test_a_command_killed_at_any_step_is_cleaned_up_by_the_server(disk, place, step):
    point = place / "ro"
    point.mkdir()
    script = f"""
import os, signal, sys
from stillblock.mounting import kernel
from stillblock.service import client, session
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
def after(place, name):
    real = getattr(place, name)
    def run(*words, **options):
        real(*words, **options)
        die()
    setattr(place, name, run)
place = session.Session if {step!r} in ("create_clone", "mount_source") else kernel
after(place, {step!r})
from stillblock.cli import main
sys.argv = ["stillblock", "mount", "web@monday", {str(point)!r}, "--writable"]
main()
"""
    killed = subprocess.run(
        [sys.executable, "-c", script], env=disk.environment, cwd=disk.folder, check=False
    )
    assert killed.returncode == -signal.SIGKILL, step
    # A mount that is whole stays, whoever made it: it is what was asked for.
    if step == "mount":
        disk.here("unmount", str(point))
    assert wait_until(lambda: not list((disk.folder / "s" / "mounts").glob("*.json"))), step
    check_clean(disk, place)
    assert clones(disk) == ["x"], step
