"""What a snapshot selects is what its rules mean at the instant, not when it was asked for."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

import stillblock
from consistency.writers import Writer
from processes import wait_until
from serving import MIB, run
from stillblock.errors import NotQuietError, RuleError, StillblockError
from stillblock.model import RuleTerm
from stillblock.operations.consistency import ConsistencyRequest, set_consistency
from stillblock.operations.rules import RulesRequest, add_rules
from unit.selection.partition_images import mbr_disk, mbr_entry

SECTORS = MIB // 512


def table(*parts: tuple[int, int]) -> bytes:
    """The first sector of a disk whose partitions lie there, in MiB."""
    entries = (
        mbr_entry(start=start * SECTORS, count=(end - start) * SECTORS) for start, end in parts
    )
    return bytes(mbr_disk(*entries).content[:512])


class Asking:
    """A snapshot that is asked for in a thread."""

    def __init__(self, volume: stillblock.Volume, **fields) -> None:
        self._volume, self._fields = volume, fields
        self.taken: list[stillblock.Snapshot] = []
        self.raised: list[StillblockError] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.taken.append(self._volume.snapshot("x", **self._fields))
        except StillblockError as error:
            self.raised.append(error)

    def outcome(self) -> stillblock.Snapshot:
        """Return the snapshot, or raise what kept it from being taken."""
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self.raised:
            raise self.raised[0]
        return self.taken[0]


class Hook:
    """A hook that runs until it is told to go on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "hooks"
        self.folder.mkdir(mode=0o755)
        self._begun, self._goes_on, self.after = (folder / name for name in ("b", "g", "after"))
        os.mkfifo(self._begun)
        os.mkfifo(self._goes_on)
        hook = self.folder / "hook"
        hook.write_text(
            f"#!/bin/sh\nif [ $1 = after ]; then touch {self.after}; exit; fi\n"
            f"echo > {self._begun}; read line < {self._goes_on}\n"
        )
        hook.chmod(0o755)

    def wait_begun(self) -> None:
        self._begun.read_text()

    def go_on(self) -> None:
        self._goes_on.write_text("\n")


@pytest.fixture
def hook(tmp_path, volume):
    made = Hook(tmp_path)
    set_consistency(volume._opened, ConsistencyRequest(hooks=str(made.folder)))
    return made


def test_a_partition_that_is_moved_while_a_hook_runs_is_kept_where_it_is_then(volume, hook):
    volume.pwrite(table((1, 2)), offset=0)
    asking = Asking(volume, include=["part:1"], only_these=True, consistency="application")
    hook.wait_begun()
    volume.pwrite(table((2, 3)), offset=0)
    volume.pwrite(b"moved" * 1000, offset=2 * MIB)
    hook.go_on()
    snapshot = asking.outcome()
    volume.pwrite(b"later" * 1000, offset=2 * MIB)

    assert snapshot.receipt.extents == ((2 * MIB, 3 * MIB),)
    assert [(part.start, part.end) for part in snapshot.receipt.left_out] == [
        (0, 2 * MIB),
        (3 * MIB, 4 * MIB),
    ]
    with snapshot.view() as view:
        assert view.pread(offset=2 * MIB, length=5000) == b"moved" * 1000


def test_a_partition_that_is_gone_when_the_hook_has_run_gives_no_snapshot(volume, hook):
    volume.pwrite(table((1, 2)), offset=0)
    asking = Asking(volume, exclude=["part:1"], consistency="application")
    hook.wait_begun()
    volume.pwrite(bytes(512), offset=0)
    hook.go_on()
    with pytest.raises(RuleError, match="no partition table"):
        asking.outcome()
    assert volume.snapshots() == ()
    assert hook.after.exists(), "whom the hook held was let go"


def test_rules_that_are_added_while_a_hook_runs_hold_for_the_instant(volume, hook):
    asking = Asking(volume, consistency="application")
    hook.wait_begun()
    only = RuleTerm(include=True, text="1MiB-2MiB")
    add_rules(volume._opened, RulesRequest(terms=(only,)))
    hook.go_on()
    receipt = asking.outcome().receipt
    assert receipt.rules == (only,)
    assert receipt.extents == ((MIB, 2 * MIB),)


@pytest.mark.needs("mkfs.ext4")
def test_a_label_is_that_of_the_filesystem_which_has_it_when_the_hook_has_run(
    volume, hook, tmp_path
):
    def filesystem(label: str) -> bytes:
        image = tmp_path / "image"
        image.write_bytes(bytes(MIB))
        run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-L", label, str(image))
        return image.read_bytes()

    volume.pwrite(table((1, 2), (2, 3)), offset=0)
    volume.pwrite(filesystem("scratch"), offset=MIB)
    volume.pwrite(filesystem("work"), offset=2 * MIB)
    asking = Asking(volume, exclude=["fs:scratch"], consistency="application")
    hook.wait_begun()
    volume.pwrite(filesystem("work"), offset=MIB)
    volume.pwrite(filesystem("scratch"), offset=2 * MIB)
    hook.go_on()
    assert asking.outcome().receipt.extents == ((0, 2 * MIB), (3 * MIB, 4 * MIB))


def ask_in_a_busy_partition(volume: stillblock.Volume, *, idle_limit_ms: int) -> Asking:
    """Ask for a quiet moment of part:1 at 1 MiB, which is moved to 2 MiB while that is waited for.

    Nobody writes to the old place any more when this returns.
    """
    set_consistency(volume._opened, ConsistencyRequest(quiet_ms=200, idle_limit_ms=idle_limit_ms))
    volume.pwrite(table((1, 2)), offset=0)
    with Writer(volume, MIB):
        asking = Asking(volume, include=["part:1"], only_these=True, consistency="idle")
        assert wait_until(lambda: volume._opened.engine.quiet_ns() is not None)
        volume.pwrite(table((2, 3)), offset=0)
    return asking


def test_the_place_that_a_partition_was_moved_to_has_to_be_quiet(volume):
    with Writer(volume, 2 * MIB):
        asking = ask_in_a_busy_partition(volume, idle_limit_ms=3000)
        with pytest.raises(NotQuietError, match="nothing was taken"):
            asking.outcome()
    assert volume.snapshots() == ()


def test_a_partition_that_is_moved_while_a_quiet_moment_is_waited_for_is_kept_there(volume):
    receipt = ask_in_a_busy_partition(volume, idle_limit_ms=60_000).outcome().receipt
    assert receipt.consistency == "idle"
    assert receipt.extents == ((2 * MIB, 3 * MIB),)
