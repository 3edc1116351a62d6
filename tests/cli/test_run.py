"""`stillblock run`: a command on a throw-away clone, on a served volume and on one that is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mounted import require_fuse
from processes import wait_until
from serving import MIB, Served, pattern, volume

SIZE = 4 * MIB
CONTENT = pattern(1, SIZE)
COMPARE = """
import os, sys
with open(os.environ["STILLBLOCK_IMAGE"], "r+b") as image:
    content = image.read()
    assert content == open(sys.argv[1], "rb").read()
    image.seek(5000)
    image.write(b"rehearsed" * 100)
    image.flush()
    os.fsync(image.fileno())
    image.seek(5000)
    assert image.read(900) == b"rehearsed" * 100
    print(os.environ["STILLBLOCK_URI"])
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture(params=["served", "stopped"])
def week(request: pytest.FixtureRequest) -> Iterator[Served]:
    with volume(CONTENT) as made:
        made.snapshot("monday")
        if request.param == "served":
            made.start()
        yield made


def events(served: Served) -> list[dict[str, object]]:
    lines = served.cli("events", "web", "--json").out.splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.needs("fusermount3")
@pytest.mark.parametrize("code", [0, 7])
def test_a_command_changes_a_clone_and_its_verdict_is_ours(week: Served, tmp_path: Path, code: int):
    require_fuse()
    expected = tmp_path / "expected"
    expected.write_bytes(CONTENT)
    words = [sys.executable, "-c", COMPARE, str(expected), str(code)]
    ran = week.try_cli("run", "web@monday", "--", *words)
    assert ran.code == code, ran
    assert "web@monday+" in ran.out
    assert f"ended with {code}" in ran.err
    assert week.cli("clone", "list", "web", "--json").json["clones"] == []
    last = [event for event in events(week) if event["action"] == "rehearsal_ended"]
    detail = last[0]["detail"]
    assert isinstance(detail, dict)
    assert (detail["exit_code"], detail["written_bytes"]) == (code, 4096)
    if week.process is not None:
        week.stop()
    assert week.origin.read_bytes() == CONTENT


def test_without_a_file_the_uri_is_enough_and_a_clone_can_be_kept(week: Served):
    script = "import os; print('IMAGE' in str(os.environ.get('STILLBLOCK_IMAGE')))"
    ran = week.cli(
        "run", "web@monday", "--no-image", "--keep", "--json", "--", sys.executable, "-c", script
    )
    first, second = ran.out.splitlines()
    assert first == "False"
    verdict = json.loads(second)
    (kept,) = week.cli("clone", "list", "web", "--json").json["clones"]
    assert verdict["kept"] == f"web@monday+{kept['name']}"
    assert kept["expires_unix_ns"] is None


def test_a_command_that_is_not_there_leaves_no_clone(week: Served):
    ran = week.try_cli("run", "web@monday", "--no-image", "--", "no-such-command-anywhere")
    assert ran.code == 1
    assert "no-such-command-anywhere cannot be run" in ran.err
    assert week.cli("clone", "list", "web", "--json").json["clones"] == []
    assert week.try_cli("run", "web@monday").code == 2


@pytest.mark.slow
def test_a_rehearsal_that_is_killed_leaves_no_file_behind(week: Served):
    require_fuse()
    script = "import os; print(os.environ['STILLBLOCK_IMAGE'], flush=True); input()"
    words = ["run", "web@monday", "--", sys.executable, "-c", script]
    running = subprocess.Popen(
        [sys.executable, "-m", "stillblock", *words],
        env=week.environment,
        cwd=week.folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    image = Path(running.stdout.readline().strip())
    assert image.stat().st_size == SIZE
    running.kill()
    running.communicate()
    if week.process is None:
        week.start()  # the rehearsal was the server: the next one cleans up
    assert wait_until(lambda: str(image.parent) not in Path("/proc/self/mountinfo").read_text())
    # The record goes last.
    assert wait_until(lambda: not list((week.folder / "s" / "mounts").glob("*.json")))
    image.parent.rmdir()
