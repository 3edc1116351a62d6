"""Block devices of snapshots, clones and the live disk."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from disks import partitioned
from processes import wait_until
from serving import MIB, pattern, run, try_run, volume_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("rooted")]


def attached(served, *words: str) -> tuple[Path, dict[str, object]]:
    told = served.here("attach", *words, "--json").json["mount"]
    return Path(told["device"]), told


def is_read_only(device: Path) -> bool:
    return run("blockdev", "--getro", str(device)).out.strip() == "1"


@pytest.mark.needs("losetup", "blockdev")
def test_snapshots_clones_and_the_live_disk_are_block_devices(place, tmp_path):
    if list(Path("/sys/block").glob("nbd*")):
        pytest.skip("host: this kernel has NBD, so no loop device is made")
    disk = tmp_path / "disk.img"
    partitioned(disk, pattern(3, 2 * MIB), size=4 * MIB)
    with volume_of(disk, str(place)) as served:
        served.start()
        served.snapshot("monday", "--only-these", "--include", "all")
        served.here("clone", "create", "web@monday+x")
        monday, told = attached(served, "web@monday")
        assert stat.S_ISBLK(monday.stat().st_mode)
        assert is_read_only(monday)
        assert told["is_read_only"] is True
        assert monday.read_bytes() == served.read("monday")
        part, _ = attached(served, "web@monday", "--partition", "1")
        assert part.read_bytes() == pattern(3, 2 * MIB)
        clone, _ = attached(served, "web@monday+x")
        assert not is_read_only(clone)
        with clone.open("r+b") as file:
            file.write(b"through the device")
            os.fsync(file.fileno())
        assert served.read("monday+x")[:18] == b"through the device"
        run("blkdiscard", "--offset", str(MIB), "--length", str(MIB), str(clone))
        assert served.read("monday+x")[MIB : 2 * MIB] == bytes(MIB)
        refused = served.try_cli("attach", "web")
        assert refused.code == 1
        assert "--read-only" in refused.err
        live, _ = attached(served, "web", "--read-only")
        assert is_read_only(live)
        assert live.read_bytes() == served.read() == served.read("monday")
        listed = served.here("mount", "--json").json["mounts"]
        assert {one["where"] for one in listed} == {str(d) for d in (monday, part, clone, live)}
        wrong = served.try_cli("unmount", "web@monday+x")
        assert wrong.code == 1, "a device is detached, not unmounted"
        assert served.try_cli("volume", "release", "web").code == 1
        served.here("detach", str(monday))
        assert str(place) not in try_run("losetup", "--list", str(monday)).out
        # Somebody detached one by hand: nothing of it is left, and the rest stays.
        run("losetup", "--detach", str(part))
        records = served.folder / "s" / "mounts"
        assert wait_until(lambda: len(list(records.glob("*.json"))) == 3)  # with the tree
        assert clone.read_bytes()[:18] == b"through the device"
        served.here("detach", "web@monday+x")
        served.here("detach", "web")
        assert wait_until(lambda: not list(records.glob("*.json")))
        assert served.read("monday") == disk.read_bytes()
        served.stop()


def test_the_kernels_nbd_is_asked_for_by_the_servers_socket(served, place, monkeypatch):
    """Where there is such a device: what is run, and what is written down of it."""
    from stillblock.mounting import kernel

    ran: list[tuple[str, ...]] = []
    real = kernel.command

    def command(*words: str, what: str) -> str:
        if words[0] != "nbd-client":
            return real(*words, what=what)
        ran.append(words)
        return ""

    monkeypatch.setattr(kernel, "free_nbd", lambda _: "/dev/nbd5")
    monkeypatch.setattr(kernel, "nbd_pid", lambda _, __: 4321 if len(ran) % 2 else None)
    monkeypatch.setattr(kernel, "command", command)
    monkeypatch.setattr("shutil.which", lambda _: "/usr/sbin/nbd-client")
    served.here("snapshot", "create", "web@monday")
    device, told = attached(served, "web@monday")
    assert (str(device), told["filesystem"], told["is_read_only"]) == ("/dev/nbd5", "nbd", True)
    assert ran == [
        ("nbd-client", "-unix", served.socket, "/dev/nbd5", "-name", "web@monday", "-readonly")
    ]
    served.here("detach", "/dev/nbd5")
    assert ran[1:] == [("nbd-client", "-d", "/dev/nbd5")]
    assert served.here("mount", "--json").json["mounts"] == []
