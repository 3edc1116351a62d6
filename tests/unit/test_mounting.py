"""What is ours among mounts and loop devices, what is left alone, and how each is mounted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stillblock.errors import InUseError, MountError, RefusedError, StateError
from stillblock.mounting import records
from stillblock.mounting.kernel import Loop, MountPoint, parse_mountinfo
from stillblock.mounting.leftovers import check_free, find, in_order, undo
from stillblock.mounting.options import how_to_mount, kernel_version, needs_new_fsid
from stillblock.mounting.records import MountKind, MountRecord

IMAGE = "/run/s/web.images/@monday.raw"
FILESYSTEM = MountRecord(
    id="aa",
    volume="web",
    what=MountKind.FILESYSTEM,
    reference="web@monday",
    directory="/mnt/x",
    image=IMAGE,
    device="/dev/loop3",
)
TREE = MountRecord(
    id="bb",
    volume="web",
    what=MountKind.IMAGES,
    reference="web",
    directory="/run/s/web.images",
    is_private=True,
)
NBD = MountRecord(
    id="cc",
    volume="web",
    what=MountKind.DEVICE,
    reference="web",
    device="/dev/nbd0",
    device_pid=77,
)


def point(path: str, source: str, kind: str = "ext4") -> MountPoint:
    return MountPoint(path=path, kind=kind, source=source, is_read_only=True)


def loop(number: int, backing: str = IMAGE) -> Loop:
    return Loop(device=f"/dev/loop{number}", backing=backing)


def there(*known, mounts=(), loops=(), pid=None):
    """What is found of each record: (mount, loop, nbd), True where it is."""
    found = find(known, mounts=mounts, loops=loops, nbd_pid=lambda _: pid)
    return [(f.mount is not None, f.loop is not None, f.nbd is not None) for f in found]


def test_a_mount_is_ours_if_its_loop_device_lies_on_our_image():
    ours = point("/mnt/x", "/dev/loop3")
    assert there(FILESYSTEM, mounts=[ours], loops=[loop(3)]) == [(True, True, False)]
    # The device was given to somebody else's file since.
    assert there(FILESYSTEM, mounts=[ours], loops=[loop(3, "/home/you/disk.img")]) == [
        (False, False, False)
    ]
    # Somebody mounted something else at the directory, or over ours.
    other = point("/mnt/x", "/dev/sda1")
    assert there(FILESYSTEM, mounts=[other], loops=[loop(3)]) == [(False, True, False)]
    assert there(FILESYSTEM, mounts=[ours, other], loops=[loop(3)]) == [(False, True, False)]
    # A user's own loop device on the same image of a tree that a user sees.
    theirs = loop(4, "/home/you/still/@monday.raw")
    assert there(FILESYSTEM, mounts=[ours], loops=[theirs]) == [(False, False, False)]


def test_a_loop_device_is_known_again_whatever_the_kernel_calls_its_file_by_now():
    """After a kill the name is marked as deleted; below a detached tree it is cut short."""
    for backing in (f"{IMAGE} (deleted)", "/@monday.raw (deleted)", "/@monday.raw"):
        assert there(FILESYSTEM, loops=[loop(3, backing)]) == [(False, True, False)], backing
    killed = replace(FILESYSTEM, device="")
    assert there(killed, loops=[loop(3, f"{IMAGE} (deleted)")]) == [(False, True, False)]
    for other in ("/@monday.raw", "/@tuesday.raw", "/x/web.images/@monday.raw (deleted)"):
        assert there(killed, loops=[loop(3, other)]) == [(False, False, False)], other
    assert there(FILESYSTEM, loops=[loop(4, "/@monday.raw")]) == [(False, False, False)]


def test_a_loop_device_that_was_not_written_down_any_more_is_found_by_its_image():
    killed = replace(FILESYSTEM, device="")
    assert there(killed, loops=[loop(5)]) == [(False, True, False)]
    # Two mounts of one snapshot: each has its own.
    second = replace(FILESYSTEM, id="dd", directory="/mnt/y")
    assert there(killed, second, loops=[loop(3)]) == [(False, False, False), (False, True, False)]
    found = find(
        (killed, replace(killed, id="ee")), mounts=(), loops=[loop(1), loop(2)], nbd_pid=lambda _: 1
    )
    assert sorted(f.loop.device for f in found if f.loop) == ["/dev/loop1", "/dev/loop2"]


def test_a_loop_device_is_ours_by_the_kernels_number_of_it_and_by_nothing_else():
    numbered = replace(FILESYSTEM, device_sequence=41, boot_id="now")
    ours = point("/mnt/x", "/dev/loop3")
    for backing in (IMAGE, "/a name that says nothing (deleted)"):
        mine = replace(loop(3, backing), sequence=41)
        assert there(numbered, mounts=[ours], loops=[mine]) == [(True, True, False)]
        theirs = replace(mine, sequence=42)
        assert there(numbered, mounts=[ours], loops=[theirs]) == [(False, False, False)]
    mine = replace(loop(3), sequence=41)
    for boot, is_there in (("now", True), ("another", False)):
        (found,) = find(
            (numbered,), mounts=[ours], loops=[mine], nbd_pid=lambda _: None, boot_id=boot
        )
        assert found.is_whole is is_there
        assert found.is_gone is not is_there


def test_what_may_be_ours_is_left_alone_and_not_forgotten(tmp_path: Path):
    (found,) = find(
        (FILESYSTEM,),
        mounts=[point("/mnt/x", "/dev/loop3")],
        loops=[loop(3, "/some/other (deleted)")],
        nbd_pid=lambda _: None,
    )
    assert not found.is_gone
    records.write(tmp_path, FILESYSTEM)
    dropped: list[MountRecord] = []
    with pytest.raises(MountError, match="/dev/loop3 is mounted at /mnt/x"):
        undo(found, tmp_path, force=True, drop_clone=dropped.append)
    assert records.read(tmp_path) == (FILESYSTEM,)
    assert dropped == []


def test_nothing_is_written_beside_others_that_would_not_see_it():
    wanted = replace(FILESYSTEM, id="new", reference="web@monday+x", device="", pieces=((10, 20),))
    other = replace(wanted, id="old", device="/dev/loop5", is_read_only=False)
    check_free(wanted, (wanted,), connections=0)
    for pieces in ((), ((0, 11),), ((0, 5), (19, 30))):
        with pytest.raises(InUseError, match="already"):
            check_free(wanted, (replace(other, pieces=pieces), wanted), connections=1)
    check_free(wanted, (replace(other, pieces=((20, 30),)), wanted), connections=1)
    check_free(wanted, (replace(other, reference="web@monday+y"), wanted), connections=0)
    check_free(wanted, (replace(other, is_read_only=True), wanted), connections=1)
    with pytest.raises(InUseError, match="already"):
        written = replace(wanted, is_read_only=False)
        check_free(written, (replace(other, is_read_only=True), wanted), connections=1)
    with pytest.raises(InUseError, match="1 clients"):
        check_free(wanted, (replace(other, is_read_only=True), wanted), connections=2)
    # A throw-away clone is nobody else's, and its snapshot never changes.
    own = replace(wanted, reference="web@monday", clone="mount-new", is_read_only=False)
    check_free(own, (replace(other, reference="web@monday"),), connections=0)


def test_a_tree_is_ours_by_its_type_and_source():
    ours = point("/run/s/web.images", "stillblock:web", "fuse.stillblock")
    assert there(TREE, mounts=[ours]) == [(True, False, False)]
    for other in (
        point("/run/s/web.images", "stillblock:db", "fuse.stillblock"),
        point("/run/s/web.images", "stillblock:web", "fuse.sshfs"),
        point("/run/s/other", "stillblock:web", "fuse.stillblock"),
    ):
        assert there(TREE, mounts=[other]) == [(False, False, False)]


def test_an_nbd_device_is_ours_while_who_connected_it_is():
    assert there(NBD, pid=77) == [(False, False, True)]
    assert there(NBD, pid=78) == [(False, False, False)]
    assert there(NBD, pid=None) == [(False, False, False)]
    assert there(replace(NBD, device_pid=None), pid=None) == [(False, False, False)]


def test_what_lies_on_a_tree_is_undone_before_it():
    found = find((TREE, NBD, FILESYSTEM), mounts=(), loops=(), nbd_pid=lambda _: None)
    assert [f.record.id for f in in_order(found)] == ["aa", "cc", "bb"]


def test_paths_with_blanks_are_read_from_the_kernels_table():
    text = (
        r"36 35 8:1 / /mnt/a\040b\134c rw,nosuid shared:1 - ext4 /dev/loop0 ro,x" "\nbroken line\n"
    )
    (found,) = parse_mountinfo(text)
    assert found == MountPoint(
        path="/mnt/a b\\c", kind="ext4", source="/dev/loop0", is_read_only=True
    )


def test_records_come_back_and_one_that_cannot_be_read_is_said(tmp_path: Path):
    folder = tmp_path / "mounts"
    records.write(folder, FILESYSTEM)
    records.write(folder, replace(TREE, created_unix_ns=5))
    records.write(folder, replace(FILESYSTEM, device="/dev/loop9"))
    assert records.read(folder) == (
        replace(FILESYSTEM, device="/dev/loop9"),
        replace(TREE, created_unix_ns=5),
    )
    assert records.read(folder, volume="db") == ()
    records.remove(folder, FILESYSTEM)
    records.remove(folder, FILESYSTEM)
    assert [record.id for record in records.read(folder)] == ["bb"]
    # One that cannot be read stops what is done for its own volume, and nothing else.
    (folder / "db@x.json").write_text(json.dumps({"id": 3}))
    for volume in (None, "db"):
        with pytest.raises(StateError, match="losetup"):
            records.read(folder, volume=volume)
    for wanted in ({"volume": "web"}, {"skips": True}):
        assert [record.id for record in records.read(folder, **wanted)] == ["bb"]
    (folder / "x.json").write_text("{}")
    with pytest.raises(StateError, match="losetup"):
        records.read(folder, volume="web")


def test_two_do_not_make_mounts_at_once(tmp_path: Path):
    with (
        records.locked(tmp_path),
        pytest.raises(InUseError, match="another mount"),
        records.locked(tmp_path, timeout_s=0),
    ):
        pass
    with records.locked(tmp_path, timeout_s=0):
        pass


def test_a_command_keeps_the_lock_when_whoever_started_it_was_killed(tmp_path: Path):
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    script = f"""
import os, signal, subprocess
from pathlib import Path
from stillblock.mounting import kernel, records
real = subprocess.Popen.wait
def wait(self, *_):
    os.kill(os.getpid(), signal.SIGKILL)
subprocess.Popen.wait = wait
with records.locked(Path({str(tmp_path)!r})) as lock:
    kernel.command("cat", {str(fifo)!r}, what="reading", lock=lock)
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(InUseError), records.locked(tmp_path, timeout_s=0):
        pass
    fifo.write_text("end")
    with records.locked(tmp_path, timeout_s=30):
        pass


@pytest.mark.parametrize(
    ("content", "kind", "more"),
    [
        ("ext", "ext4", {"noload"}),
        ("xfs", "xfs", {"nouuid", "norecovery"}),
        ("btrfs", "btrfs", {"rescue=nologreplay"}),
        ("ntfs", "ntfs-3g", {"norecover"}),
        ("fat", "vfat", set()),
        ("exfat", "exfat", set()),
        (None, None, set()),
    ],
)
def test_read_only_replays_nothing_and_gives_no_rights(content, kind, more):
    how = how_to_mount(content, is_writable=False, has_ntfs_3g=True)
    # What has no owners is for whoever mounts it alone.
    always = {"nosuid", "nodev"} | ({"umask=077"} if content in ("ntfs", "fat", "exfat") else set())
    assert (how.kind, set(how.options)) == (kind, {"ro"} | always | more)
    assert not how.is_device_writable
    replayed = how_to_mount(content, is_writable=False, replays=True, has_ntfs_3g=True)
    assert replayed.is_device_writable
    assert set(replayed.options) == {"ro"} | always | (more & {"nouuid"})
    written = how_to_mount(content, is_writable=True, has_ntfs_3g=True)
    assert set(written.options) == {"rw"} | always | (more & {"nouuid"})


def test_ntfs_is_mounted_by_whichever_is_there():
    by_kernel = how_to_mount("ntfs", is_writable=False, filesystems={"ntfs3"}, has_ntfs_3g=True)
    assert by_kernel.kind == "ntfs3"
    assert "norecover" not in by_kernel.options
    assert how_to_mount("ntfs", is_writable=False).kind == "ntfs3"  # a module may be loaded


def test_an_old_kernel_never_sees_two_btrfs_with_one_fsid():
    old = {"kernel_release": "6.1.0-13-amd64", "reference": "web@monday"}
    with pytest.raises(RefusedError, match="--writable"):
        needs_new_fsid(**old, is_fsid_known=True, has_own_clone=False)
    assert needs_new_fsid(**old, is_fsid_known=True, has_own_clone=True)
    assert not needs_new_fsid(**old, is_fsid_known=False, has_own_clone=False)
    new = old | {"kernel_release": "6.7.0-rc1"}
    assert not needs_new_fsid(**new, is_fsid_known=True, has_own_clone=False)
    assert [kernel_version(text) for text in ("6.18.44-x", "7.0", "odd")] == [
        (6, 18),
        (7, 0),
        (0, 0),
    ]
