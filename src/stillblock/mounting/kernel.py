"""What the kernel says of mounts and loop devices, and the system's commands that change them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillblock.errors import FuseError, MountError

if TYPE_CHECKING:
    from collections.abc import Sequence

FUSE_KIND: Final = "fuse.stillblock"
"""The type of our trees in the kernel's table."""
COMMAND_S: Final = 60.0
"""Mounting may replay a journal, unmounting write a cache out; more means that it hangs."""
_KERNEL_KINDS: Final = frozenset({"ext4", "xfs", "btrfs", "vfat", "ntfs3"})
"""Filesystems that no process serves."""
_FUSE_DEVICE: Final = "/dev/fuse"
_SUBTYPE: Final = FUSE_KIND.partition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class MountPoint:
    """A line of the kernel's table."""

    path: str
    kind: str
    source: str
    is_read_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A loop device that is in use."""

    device: str
    backing: str
    """The file, as the kernel names it now."""
    sequence: int = 0
    """The kernel's `diskseq`: another one each time that it is attached; 0 before Linux 5.15."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Where the kernel tells; tests put trees of their own here."""

    mountinfo: Path = Path("/proc/self/mountinfo")
    sys_block: Path = Path("/sys/block")
    filesystems: Path = Path("/proc/filesystems")
    boot_id: Path = Path("/proc/sys/kernel/random/boot_id")


def mount_points(system: System) -> tuple[MountPoint, ...]:
    """Return the table of mounts, in the order in which they were made."""
    return parse_mountinfo(system.mountinfo.read_text(errors="surrogateescape"))


def parse_mountinfo(text: str) -> tuple[MountPoint, ...]:
    """Return what a table says; proc(5): id parent dev root point options [tags] - type source."""
    found = []
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        fields, rest = head.split(" "), tail.split(" ")
        if len(fields) > 5 and len(rest) > 1:
            options = {*fields[5].split(","), *(rest[2].split(",") if len(rest) > 2 else ())}
            found.append(
                MountPoint(
                    path=unescape(fields[4]),
                    kind=rest[0],
                    source=unescape(rest[1]),
                    is_read_only="ro" in options,
                )
            )
    return tuple(found)


def unescape(text: str) -> str:
    """Undo the kernel's octal escapes for blanks in paths."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def loops(system: System) -> tuple[Loop, ...]:
    """Return every loop device in use."""
    found = []
    for path in sorted(system.sys_block.glob("loop*/loop/backing_file")):
        try:
            backing = path.read_text(errors="surrogateescape").rstrip("\n")
        except OSError:
            continue  # detached just now
        name = path.parent.parent.name
        found.append(
            Loop(device=f"/dev/{name}", backing=backing, sequence=disk_sequence(system, name))
        )
    return tuple(found)


def disk_sequence(system: System, device: str) -> int:
    """Return the kernel's number of what is attached to a block device now; 0: it gives none."""
    try:
        return int((system.sys_block / Path(device).name / "diskseq").read_text())
    except (OSError, ValueError):
        return 0


def boot_id(system: System) -> str:
    """Return which start of this machine it is: what was attached before is gone."""
    return system.boot_id.read_text().strip()


def kernel_filesystems(system: System) -> frozenset[str]:
    """Return the names of filesystems that the kernel has now; others may be loaded when needed."""
    lines = system.filesystems.read_text().splitlines()
    return frozenset(line.split("\t")[-1] for line in lines)


def nbd_pid(system: System, device: str) -> int | None:
    """Return who connected a kernel NBD device; None if nobody did."""
    try:
        return int((system.sys_block / Path(device).name / "pid").read_text())
    except (OSError, ValueError):
        return None


def free_nbd(system: System) -> str | None:
    """Return a kernel NBD device that nobody uses; None where there is none."""
    for path in sorted(system.sys_block.glob("nbd*")):
        if not (path / "pid").exists():
            return f"/dev/{path.name}"
    return None


def command(*words: str, what: str, lock: int | None = None) -> str:
    """Run a command of the system; return what it printed, raise `MountError` with its words.

    `lock` is a descriptor that it holds as long as it lives: whoever waits for the lock finds what
    it does done, also if we are killed meanwhile.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                list(words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=() if lock is None else (lock,),
            )
        except FileNotFoundError as error:
            raise MountError(f"{what}: the command {words[0]} is not here") from error
        try:
            code = process.wait(COMMAND_S)
        except subprocess.TimeoutExpired as error:
            # Not waited for: one that waits for a dead disk in the kernel outlives a kill.
            process.kill()
            raise MountError(
                f"{what}: {words[0]} has not ended within {COMMAND_S:.0f} s"
            ) from error
        output.seek(0)
        said = output.read()
    if code != 0:
        raise MountError(f"{what}: {' '.join(said.split()) or f'{words[0]} ended with {code}'}")
    return said


def attach_loop(image: str, *, is_read_only: bool, lock: int | None = None) -> str:
    """Return a new loop device on a file."""
    options = ["--read-only"] if is_read_only else []
    words = ("losetup", "--find", "--show", *options, image)
    return command(*words, what=f"loop device on {image}", lock=lock).strip()


def detach_loop(device: str) -> None:
    """Detach a loop device; in use it goes with its last user."""
    command("losetup", "--detach", device, what=f"detaching {device}")


def mount(
    device: str,
    directory: str,
    *,
    kind: str | None,
    options: Sequence[str],
    lock: int | None = None,
) -> None:
    """Mount a filesystem; `kind` None: whatever it is."""
    of_kind = ["-t", kind] if kind else []
    joined = ",".join(options)
    words = ("mount", *of_kind, "-o", joined, device, directory)
    # A helper may stay as long as the mount does, and would hold the lock as long.
    held = lock if kind in _KERNEL_KINDS else None
    command(*words, what=f"mounting on {directory}", lock=held)


def unmount(directory: str, *, lazily: bool = False) -> None:
    """Unmount a directory; lazily: its users keep it until they are done."""
    if os.geteuid() == 0:
        # -i: the helpers of FUSE filesystems look at the directory first, which may be dead.
        how = ["--lazy"] if lazily else []
        command("umount", "-i", *how, directory, what=f"unmounting {directory}")
        return
    how = ["-z"] if lazily else []
    command("fusermount3", "-u", *how, "--", directory, what=f"unmounting {directory}")


def sync(directory: str) -> None:
    """Write out what the filesystem at a directory holds back."""
    command("sync", "--file-system", directory, what=f"syncing {directory}")


def tree_source(volume: str) -> str:
    """Return what the kernel's table calls the source of a volume's trees."""
    return f"stillblock:{volume}"


def mount_fuse(directory: str, *, volume: str) -> int:
    """Mount an image tree that nobody answers for yet; return the descriptor to answer on."""
    wanted = f"subtype={_SUBTYPE},default_permissions,nosuid,nodev"
    try:
        if os.geteuid() == 0:
            return _mount_fuse_as_root(directory, tree_source(volume), wanted)
        return _mount_fuse_as_user(directory, tree_source(volume), wanted)
    except OSError as error:
        raise FuseError(
            f"no files can be shown at {directory}: {error.strerror or error}",
            hint=f"it needs {_FUSE_DEVICE} (modprobe fuse), and fusermount3 without root",
        ) from error


def _mount_fuse_as_root(directory: str, source: str, wanted: str) -> int:
    device = os.open(_FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        mine = f"fd={device},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
        ran = subprocess.run(
            ["mount", "-i", "-t", "fuse", "-o", f"{mine},{wanted}", source, directory],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            pass_fds=[device],
            text=True,
            errors="replace",
        )
        if ran.returncode != 0:
            raise FuseError(f"no files can be shown at {directory}: {ran.stderr.strip()}")
    except BaseException:
        os.close(device)
        raise
    return device


def _mount_fuse_as_user(directory: str, source: str, wanted: str) -> int:
    if shutil.which("fusermount3") is None:
        raise FuseError(f"no files can be shown at {directory}: fusermount3 is not here")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ran = subprocess.run(
            ["fusermount3", "-o", f"fsname={source},{wanted}", "--", directory],
            env=os.environ | {"_FUSE_COMMFD": str(theirs.fileno())},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            pass_fds=[theirs.fileno()],
            text=True,
            errors="replace",
        )
        if ran.returncode != 0:
            raise FuseError(f"no files can be shown at {directory}: {ran.stderr.strip()}")
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise FuseError(f"no files can be shown at {directory}: fusermount3 gave no descriptor")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]
