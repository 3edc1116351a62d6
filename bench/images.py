"""A snapshot and a clone as files: the server's own FUSE tree and nbdfuse, beside each other.

Both show the same exports of the same server. fio reads and writes through each in turn, pass by
pass; what counts is the ratio of the medians, which a machine that is not quiet shifts least.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import fields, machine
from bench.errors import PeerError
from bench.marks import Mark, mark_table, say
from bench.tables import as_text
from bench.units import GIB, MIB

SIZE_BYTES = 256 * MIB
WAIT_S = 20.0
JOBS = (
    ("read 1 MiB in order", "read", "1M", 1, "monday"),
    ("read 4 KiB at random, one at a time", "randread", "4k", 1, "monday"),
    ("read 4 KiB at random, 16 at a time", "randread", "4k", 16, "monday"),
    ("write 4 KiB at random to a clone, 16 at a time", "randwrite", "4k", 16, "monday+x"),
)
"""What it is called, fio's pattern, request size, processes, of which export."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How often each is measured, and for how long."""

    round_count: int
    seconds: float


def measure(plan: Plan, *, parent: Path | None) -> bool:
    """Print a table; return whether every mark is kept."""
    with machine.scratch_directory(parent, needed_bytes=GIB) as scratch, ExitStack() as stack:
        ours, theirs = stack.enter_context(_shown(scratch))
        marks = []
        for what, pattern, size, jobs, export in JOBS:
            say(what)
            rates: tuple[list[float], list[float]] = ([], [])
            for number in range(plan.round_count):
                order = (0, 1) if number % 2 == 0 else (1, 0)
                for which in order:
                    path = (ours, theirs)[which][export]
                    rates[which].append(_fio(path, pattern, size, jobs, plan.seconds))
            mine, other = (statistics.median(found) for found in rates)
            marks.append(Mark(what=f"{what}: tree, MiB/s", figure=mine, most=None))
            marks.append(Mark(what=f"{what}: nbdfuse, MiB/s", figure=other, most=None))
            # As a time, so that more is worse: the tree must not take longer than nbdfuse.
            marks.append(Mark(what=f"{what}: time, times", figure=other / mine, most=1.0))
    title = f"images of {SIZE_BYTES // MIB} MiB by the server's tree and by nbdfuse"
    print(as_text(mark_table(title, marks)))
    return all(mark.is_kept for mark in marks)


@contextmanager
def _shown(scratch: Path) -> Iterator[tuple[dict[str, Path], dict[str, Path]]]:
    """Give the files of both, by export."""
    origin, tree = scratch / "disk.img", scratch / "tree"
    origin.write_bytes(random.Random(1).randbytes(MIB) * (SIZE_BYTES // MIB))
    tree.mkdir()
    with ExitStack() as stack:
        _command(scratch, "volume", "add", "web", "--origin", str(origin))
        server = subprocess.Popen(
            [sys.executable, "-m", "stillblock", "serve", "web", "--json"],
            env=_environment(scratch),
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(_end, server, signal.SIGTERM)
        assert server.stdout is not None
        socket = json.loads(server.stdout.readline())["serve"]["nbd_sockets"][0]
        _command(scratch, "snapshot", "create", "web@monday", "--only-these", "--include", "all")
        _command(scratch, "clone", "create", "web@monday+x")
        _command(scratch, "mount", "--images", "web", str(tree))
        theirs = {}
        for number, export in enumerate(("monday", "monday+x")):
            path = scratch / f"nbdfuse{number}" / "disk"
            path.parent.mkdir()
            uri = f"nbd+unix:///web@{export}?socket={socket}"
            shown = subprocess.Popen(["nbdfuse", str(path), uri])
            stack.callback(_end, shown, signal.SIGTERM)
            until = time.monotonic() + WAIT_S
            while not path.exists():
                if shown.poll() is not None or time.monotonic() > until:
                    raise PeerError(f"nbdfuse does not show {uri}")
                time.sleep(0.02)
            theirs[export] = path
        yield {export: tree / f"@{export}.raw" for export in theirs}, theirs


def _end(process: subprocess.Popen[str] | subprocess.Popen[bytes], number: signal.Signals) -> None:
    process.send_signal(number)
    process.wait(WAIT_S)


def _environment(scratch: Path) -> dict[str, str]:
    return os.environ | {"STILLBLOCK_STATE": str(scratch / "state")}


def _command(scratch: Path, *words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "stillblock", *words],
        env=_environment(scratch),
        stdout=subprocess.DEVNULL,
        check=True,
    )


def _fio(path: Path, pattern: str, size: str, jobs: int, seconds: float) -> float:
    """Return MiB a second, past the page cache: what it holds is neither's doing."""
    line = [
        *("fio", "--output-format=json", "--name=j", f"--filename={path}", "--ioengine=psync"),
        *("--direct=1", f"--rw={pattern}", f"--bs={size}", f"--numjobs={jobs}", "--thread"),
        *("--group_reporting", "--time_based", f"--runtime={seconds:g}", f"--size={SIZE_BYTES}"),
        # It would truncate and lay out a file: this one is there, and keeps its size.
        *("--allow_file_create=0", "--randrepeat=0", "--overwrite=1", "--fallocate=none"),
    ]
    ran = subprocess.run(line, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise PeerError(f"fio on {path}: {ran.stderr or ran.stdout}")
    report = json.loads(ran.stdout[ran.stdout.index("{") :])
    job = fields.mapping(fields.sequence(report["jobs"], "fio jobs")[0], "fio job")
    side = fields.mapping(job["write" if "write" in pattern else "read"], "side")
    return fields.number(side.get("bw_bytes"), "bw_bytes") / MIB
