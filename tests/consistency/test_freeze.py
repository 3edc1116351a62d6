"""Freezing a filesystem on the served disk: real mounts, real kernel, everything killed in turn."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mounted import Mounted, formatted, mounted
from processes import running, status_of, wait_gone, wait_until
from serving import MIB, Served, run, try_run
from stillblock.consistency import guard, leftover
from stillblock.consistency.freeze import MountFreeze
from stillblock.consistency.mounts import System, open_mount
from stillblock.errors import QuiesceError
from stillblock.operations.consistency import ConsistencyRequest

pytestmark = [
    pytest.mark.needs("nbdfuse", "losetup", "mkfs.ext4", "e2fsck", "fusermount3"),
    pytest.mark.slow,
]


def take(served: Served, name: str, disk: Mounted, *words: str) -> dict:
    with served.session() as session:
        session.set_consistency(ConsistencyRequest(mounts=(str(disk.point),)))
    level = ["--consistency", "filesystem"]
    return served.cli("snapshot", "create", f"web@{name}", *level, *words, "--json").json


def freeze_only(served: Served, point: Path, **more: object) -> None:
    with served.session() as session:
        session.set_consistency(ConsistencyRequest(mounts=(str(point),), **more))


@pytest.mark.parametrize("kind", ["ext4", pytest.param("xfs", marks=pytest.mark.long)])
def test_a_frozen_filesystem_needs_no_repair_in_the_snapshot(kind, tmp_path, require_tool):
    check = ["xfs_repair", "-n"] if kind == "xfs" else ["e2fsck", "-f", "-n"]
    require_tool(check[0])
    with formatted(kind) as served:
        served.start()
        with mounted(served) as disk:
            disk.write("durable", b"a" * MIB)
            # Not synced: it is in the page cache, and only a freeze brings it to the disk.
            (disk.point / "cached").write_bytes(b"b" * MIB)
            receipt = take(served, "frozen", disk)
            served.snapshot("barrier", "--consistency", "barrier")
            assert disk.can_write()
        quiescing = receipt["quiescing"]
        assert (quiescing["asked"], quiescing["reached"]) == ("filesystem", "filesystem")
        assert [s["kind"] for s in quiescing["steps"]] == ["freeze", "thaw"]
        assert all(s["what"] == str(disk.point) and s["is_ok"] for s in quiescing["steps"])
        assert receipt["consistency"] == "filesystem"
        image = tmp_path / "frozen.img"
        image.write_bytes(served.read("frozen"))
        point = tmp_path / "point"
        point.mkdir()
        if kind == "ext4":
            run(*check, str(image))
        else:
            # XFS leaves a record in its log on purpose, for files deleted while they were open.
            run("mount", "-o", "loop", str(image), str(point))
            run("umount", str(point))
            run(*check, str(image))
            image.write_bytes(served.read("frozen"))
        # Read-only and without recovery it is whole.
        options = "loop,ro,norecovery" if kind == "xfs" else "loop,ro,noload"
        run("mount", "-o", options, str(image), str(point))
        try:
            assert (point / "durable").read_bytes() == b"a" * MIB
            assert (point / "cached").read_bytes() == b"b" * MIB
        finally:
            run("umount", str(point))


def test_a_mount_of_a_snapshot_or_of_a_copy_is_refused(tmp_path):
    with formatted() as served:
        served.start()
        served.snapshot("old", "--consistency", "barrier")
        copy = tmp_path / "copy.img"
        copy.write_bytes(served.origin.read_bytes())
        point = tmp_path / "point"
        point.mkdir()
        run("mount", "-o", "loop", str(copy), str(point))
        try:
            freeze_only(served, point)
            ran = served.try_cli("snapshot", "create", "web@x", "--consistency", "filesystem")
            assert ran.code == 1
            assert "not known to sit on volume web" in ran.err
        finally:
            run("umount", str(point))
        with mounted(served, "ro", "noload", snapshot="old") as disk:
            freeze_only(served, disk.point)
            ran = served.try_cli("snapshot", "create", "web@x", "--consistency", "filesystem")
            assert ran.code == 1
            assert "read-only" in ran.err
        assert [s["name"] for s in served.cli("snapshot", "list", "--json").json["snapshots"]] == [
            "old"
        ]


def test_what_is_no_mount_point_is_refused_and_a_fallback_says_so(tmp_path):
    with formatted() as served:
        served.start()
        with mounted(served) as disk:
            below = disk.point / "below"
            below.mkdir()
            freeze_only(served, below)
            ran = served.try_cli("snapshot", "create", "web@x", "--consistency", "filesystem")
            assert ran.code == 1
            assert f"is not a mount point, it lies on {disk.point}" in ran.err
            ran = served.cli(
                "snapshot", "create", "web@x", "--consistency", "filesystem", "--or-barrier"
            )
            assert "barrier-consistent, not filesystem" in ran.err
            receipt = served.cli("snapshot", "receipt", "web@x", "--json").json
            assert receipt["consistency"] == "barrier"
            assert "not a mount point" in receipt["quiescing"]["shortfall"]


def test_a_filesystem_that_holds_our_own_store_is_refused():
    with formatted() as served:
        served.start()
        with mounted(served) as disk:
            inner = disk.point / "inner.img"
            inner.write_bytes(bytes(MIB))
            store = disk.point / "store"
            served.cli("volume", "add", "inner", "--origin", str(inner), "--store", str(store))
            freeze_only(served, disk.point)
            ran = served.try_cli("snapshot", "create", "web@x", "--consistency", "filesystem")
            assert ran.code == 1
            assert f"holds the store of inner {store}" in ran.err
            assert disk.can_write()


class Freezing:
    """A freeze held by a hook-like client that talks to the guard program itself."""

    def __init__(self, disk: Mounted, limit_ms: int) -> None:
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fd = os.open(disk.point, os.O_RDONLY | os.O_DIRECTORY)
        before = set(running("guard.py"))
        words = [str(theirs.fileno()), str(self.fd), str(limit_ms)]
        subprocess.run(
            [sys.executable, "-I", "-S", guard.__file__, *words],
            pass_fds=(theirs.fileno(), self.fd),
            start_new_session=True,
            check=True,
        )
        theirs.close()
        self.ours.settimeout(30)
        assert "frozen" in json.loads(self.ours.recv(4096))
        found = [pid for pid in running("guard.py") if pid not in before]
        # The freezer is a child of the guard.
        parents = {pid: int(status_of(pid)[1]) for pid in found}
        self.freezer = next(pid for pid in found if parents[pid] in found)
        self.guard = parents[self.freezer]

    def close(self) -> None:
        self.ours.close()
        os.close(self.fd)


@pytest.mark.parametrize("killed", ["server", "guard", "freezer", "stopped guard"])
def test_whoever_is_killed_nothing_stays_frozen_beyond_the_limit(killed):
    limit_s = 2.0
    with formatted() as served:
        served.start()
        with mounted(served) as disk:
            freezing = Freezing(disk, int(limit_s * 1000))
            begun = time.monotonic()
            try:
                assert not disk.can_write(timeout_s=0.3)
                if killed == "server":
                    freezing.ours.close()
                elif killed == "guard":
                    os.kill(freezing.guard, signal.SIGKILL)
                elif killed == "freezer":
                    os.kill(freezing.freezer, signal.SIGKILL)
                    freezing.ours.send(b"{}")
                elif killed == "stopped guard":
                    os.kill(freezing.guard, signal.SIGSTOP)
                assert disk.can_write()
                took = time.monotonic() - begun
                slack = 2.0
                assert took < limit_s + slack
                if killed in {"server", "guard"}:
                    assert took < limit_s
                if killed == "stopped guard":
                    os.kill(freezing.guard, signal.SIGCONT)
                assert wait_gone([freezing.guard, freezing.freezer])
            finally:
                freezing.close()


def test_a_server_killed_while_it_freezes_leaves_nothing_frozen_and_no_snapshot(tmp_path):
    hooks = tmp_path / "hooks"
    hooks.mkdir(mode=0o755)
    mark = tmp_path / "after-ran"
    hook = hooks / "wait"
    hook.write_text(f"#!/bin/sh\n[ $1 = after ] && echo $STILLBLOCK_SNAPSHOT > {mark}\nexit 0\n")
    hook.chmod(0o755)
    with formatted() as served:
        served.start()
        with mounted(served) as disk:
            (disk.point / "dirty").write_bytes(b"d" * 8 * MIB)
            before = set(running("guard.py"))
            freeze_only(served, disk.point, hooks=str(hooks), freeze_limit_ms=3000)
            asking = subprocess.Popen(
                [
                    *(sys.executable, "-m", "stillblock", "snapshot", "create", "web@x"),
                    *("--consistency", "application"),
                ],
                env=served.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            until = time.monotonic() + 20
            while not set(running("guard.py")) - before and asking.poll() is None:
                assert time.monotonic() < until
            served.kill()
            asking.wait(timeout=20)
            assert wait_gone([pid for pid in running("guard.py") if pid not in before])
            assert wait_until(mark.exists), "the after-hook ran without the server"
        served.start()
        names = [s["name"] for s in served.cli("snapshot", "list", "--json").json["snapshots"]]
        assert names in ([], ["x"])
        if names:
            receipt = served.cli("snapshot", "receipt", "web@x", "--json").json
            assert receipt["consistency"] in {"barrier", "application"}


def test_what_all_of_them_left_frozen_is_thawed_by_the_next_server(tmp_path):
    """As when a service manager kills a whole control group."""
    with formatted() as served:
        served.start()
        with mounted(served) as disk:
            freezing = Freezing(disk, 60_000)
            try:
                note = served.folder / "s" / "run" / "web.frozen"
                leftover.note(note, leftover.Frozen(mounts=(str(disk.point),)))
                served.kill()
                for pid in (freezing.freezer, freezing.guard):
                    os.kill(pid, signal.SIGSTOP)
                for pid in (freezing.freezer, freezing.guard):
                    os.kill(pid, signal.SIGKILL)
                assert wait_gone([freezing.freezer, freezing.guard])
                assert try_run("fsfreeze", "--freeze", str(disk.point)).code != 0, "still frozen"
                served.start()
                assert wait_until(lambda: not note.exists())
                # It is not frozen: thawing it once more is an error.
                assert try_run("fsfreeze", "--unfreeze", str(disk.point)).code != 0
                events = served.cli("events", "web", "--json").out
                assert "thawed_what_was_left_frozen" in events
            finally:
                try_run("fsfreeze", "--unfreeze", str(disk.point))
                freezing.close()


def test_a_freeze_that_hangs_is_given_up_and_thawed_when_it_comes():
    """The write in flight that FIFREEZE waits for is to a disk whose FUSE process stands still."""
    with formatted() as served:
        served.start()
        # Without barriers the sync before the freeze needs no answer of the disk.
        with mounted(served, "barrier=0") as disk:
            disk.write("file", b"f" * MIB)
            run("sync", "-f", str(disk.point))
            hang(disk)


def hang(disk: Mounted) -> None:
    mount = open_mount(disk.point, System())
    disk.fuse.send_signal(signal.SIGSTOP)
    writer = subprocess.Popen(
        [
            *("dd", "if=/dev/zero", f"of={disk.point}/file", "bs=4096", "count=1"),
            *("oflag=direct", "conv=notrunc"),
        ],
        stderr=subprocess.DEVNULL,
    )
    assert wait_until(lambda: status_of(writer.pid)[0] == "D"), "the direct write waits"
    before = set(running("guard.py"))
    begun = time.monotonic()
    with pytest.raises(QuiesceError, match="longer than the limit of 1500 ms"):
        MountFreeze(mount, limit_ms=1500).begin()
    assert time.monotonic() - begun < 6
    left = [pid for pid in running("guard.py") if pid not in before]
    assert left, "the freeze still hangs, and its guard waits for it"
    disk.fuse.send_signal(signal.SIGCONT)
    writer.wait(timeout=20)
    assert wait_gone(left)
    assert disk.can_write()
    mount.close()
