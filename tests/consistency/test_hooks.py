"""Hooks around an instant: order, environment, failures, limits, and that `after` always comes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from processes import is_alive
from stillblock.errors import QuiesceError
from stillblock.operations.consistency import ConsistencyRequest, set_consistency

PAGE = 4096


class Hooks:
    """A directory of hooks that write down what was run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "hooks"
        self.folder.mkdir(mode=0o755)
        self.log = folder / "log"
        self.log.touch()

    def add(self, name: str, body: str = "") -> Path:
        path = self.folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $1" >> {self.log}\n{body}\n')
        path.chmod(0o755)
        return path

    def ran(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def hooks(tmp_path, volume):
    made = Hooks(tmp_path)
    settle(volume, hooks=str(made.folder))
    return made


def settle(volume, **fields):
    set_consistency(volume._opened, ConsistencyRequest(**fields))


def take(volume, name="x", **fields):
    return volume.snapshot(name, consistency="application", **fields).receipt


def test_hooks_run_in_order_before_and_in_reverse_after(volume, hooks):
    hooks.add("10-first")
    hooks.add("20-second")
    receipt = take(volume)
    assert hooks.ran() == [
        "10-first before",
        "20-second before",
        "20-second after",
        "10-first after",
    ]
    assert receipt.consistency == "application"
    assert [(str(s.kind), s.what) for s in receipt.quiescing.steps] == [
        ("hook-before", "10-first"),
        ("hook-before", "20-second"),
        ("hook-after", "20-second"),
        ("hook-after", "10-first"),
    ]


def test_what_is_no_executable_is_no_hook(volume, hooks):
    hooks.add("hook")
    (hooks.folder / "README").write_text("not run")
    (hooks.folder / ".hidden").write_text("#!/bin/sh\nexit 1\n")
    (hooks.folder / ".hidden").chmod(0o755)
    take(volume)
    assert hooks.ran() == ["hook before", "hook after"]


def test_a_hook_knows_volume_snapshot_phase_and_settings(volume, hooks):
    hooks.add(
        "env",
        'echo "$STILLBLOCK_VOLUME $STILLBLOCK_SNAPSHOT $STILLBLOCK_PHASE '
        f'$STILLBLOCK_LIMIT_MS $PORT" >> {hooks.log}',
    )
    (hooks.folder / "settings").write_text("# where it listens\nPORT=55 32\n")
    settle(volume, hook_limit_ms=7000)
    take(volume, "monday")
    assert hooks.ran() == [
        "env before",
        "web monday before 7000 55 32",
        "env after",
        "web monday after 7000 55 32",
    ]


def test_what_a_hook_changes_on_the_disk_before_is_in_and_after_is_not(volume, hooks, tmp_path):
    """The hook asks this process to write, and waits until it did."""
    for phase in ("before", "after"):
        os.mkfifo(tmp_path / f"{phase}-wanted")
        os.mkfifo(tmp_path / f"{phase}-done")
    hooks.add("write", f": > {tmp_path}/$1-wanted; cat {tmp_path}/$1-done")
    import threading

    def serve() -> None:
        for number, phase in enumerate(("before", "after")):
            (tmp_path / f"{phase}-wanted").read_bytes()
            volume.pwrite(bytes([number + 1]) * PAGE, offset=number * PAGE)
            (tmp_path / f"{phase}-done").write_bytes(b"written")

    thread = threading.Thread(target=serve)
    thread.start()
    taken = volume.snapshot("x", consistency="application")
    thread.join(20)
    with taken.view() as view:
        assert view.pread(offset=0, length=2 * PAGE) == b"\x01" * PAGE + bytes(PAGE)
    assert volume.pread(offset=PAGE, length=PAGE) == b"\x02" * PAGE


def test_a_failing_hook_means_no_snapshot_and_everybody_begun_is_ended(volume, hooks):
    hooks.add("1-good")
    hooks.add("2-bad", "echo no space for it; [ $1 = after ]")
    hooks.add("3-never")
    with pytest.raises(QuiesceError, match=r"hook 2-bad: it ended with 1; no space for it"):
        take(volume)
    assert volume.snapshots() == ()
    assert hooks.ran() == ["1-good before", "2-bad before", "2-bad after", "1-good after"]


def test_or_a_barrier_whose_receipt_has_what_the_hook_said(volume, hooks):
    hooks.add("bad", "echo no space for it; [ $1 = after ]")
    receipt = take(volume, or_barrier=True)
    assert receipt.consistency == "barrier"
    assert "no space for it" in receipt.quiescing.shortfall
    assert [s.is_ok for s in receipt.quiescing.steps] == [False, True]


def test_a_hook_that_fails_after_the_instant_means_no_snapshot_either(volume, hooks):
    """It may have lost what it held: MariaDB's locks for example."""
    hooks.add("loses", "[ $1 = before ]")
    with pytest.raises(QuiesceError, match="hooks failed after the instant: loses"):
        take(volume)
    assert volume.snapshots() == ()
    assert take(volume, or_barrier=True).consistency == "barrier"


def test_a_hook_that_takes_too_long_is_killed_with_its_children(volume, hooks, tmp_path):
    settle(volume, hook_limit_ms=500)
    hooks.add("slow", f"[ $1 = after ] && exit 0\nsleep 600 & echo $! > {tmp_path}/child; wait")
    with pytest.raises(QuiesceError, match="longer than 500 ms and was killed"):
        take(volume)
    child = int((tmp_path / "child").read_text())
    assert not is_alive(child)
    assert hooks.ran() == ["slow before", "slow after"]


def test_a_hook_may_leave_something_running_that_keeps_its_output_open(volume, hooks, tmp_path):
    hooks.add("holder", f"[ $1 = before ] && {{ sleep 600 & echo $! > {tmp_path}/child; }}; exit 0")
    begun = time.monotonic()
    assert take(volume).consistency == "application"
    assert time.monotonic() - begun < 20
    child = int((tmp_path / "child").read_text())
    assert is_alive(child)
    os.kill(child, signal.SIGKILL)


def test_output_without_end_is_cut_to_its_end(volume, hooks):
    hooks.add("talks", "[ $1 = after ] || { yes | head -c 300000; echo the-end; }")
    (before, _) = take(volume).quiescing.steps
    assert before.detail.endswith("the-end")
    assert len(before.detail) <= 4096


@pytest.mark.parametrize("what", ["directory", "hook", "settings"])
def test_hooks_that_others_could_change_are_not_run(volume, hooks, what):
    hook = hooks.add("hook")
    settings = hooks.folder / "settings"
    settings.write_text("A=1\n")
    {"directory": hooks.folder, "hook": hook, "settings": settings}[what].chmod(0o777)
    with pytest.raises(QuiesceError, match="can be changed by others"):
        take(volume)
    assert hooks.ran() == []


def test_an_empty_or_missing_directory_is_no_level(volume, hooks, tmp_path):
    with pytest.raises(QuiesceError, match="no executable"):
        take(volume)
    settle(volume, hooks=str(tmp_path / "missing"))
    with pytest.raises(QuiesceError, match="missing"):
        take(volume)


def test_a_killed_runner_does_not_keep_after_from_being_run(volume, hooks, tmp_path):
    """The hook kills the process that runs it."""
    hooks.add("kills", "[ $1 = after ] || kill -9 $PPID")
    with pytest.raises(QuiesceError, match="the process that runs hooks is gone"):
        take(volume)
    assert hooks.ran() == ["kills before", "kills after"]
    assert volume.snapshots() == ()
