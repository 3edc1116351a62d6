"""A snapshot and a clone as files: the server's own FUSE tree and nbdfuse, beside each other.

Both show the same exports of the same server. fio reads and writes through each in turn, pass by
pass; what counts is the ratio of the medians, which a machine that is not quiet shifts least.
"""

import random
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import fio, machine, registry
from bench.errors import PeerError
from bench.marks import Mark, mark_table, say
from bench.nbd import unix_uri
from bench.process import ServerProcess, run_tool, tail
from bench.stillblock_target import VOLUME, Stillblock
from bench.tables import as_text
from bench.targets import Place
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
    place = Place(scratch=scratch, image=origin, is_direct=False, qemu_aio="threads")
    server = Stillblock(registry.parse(registry.OURS), place=place)
    with ExitStack() as stack:
        stack.callback(server.stop)
        server.start()
        server.command("snapshot", "create", f"{VOLUME}@monday", "--only-these", "--include", "all")
        server.command("clone", "create", f"{VOLUME}@monday+x")
        server.command("mount", "--images", VOLUME, str(tree))
        theirs = {}
        for number, export in enumerate(("monday", "monday+x")):
            path = scratch / f"nbdfuse{number}" / "disk"
            path.parent.mkdir()
            uri = unix_uri(server.socket_path, f"{VOLUME}@{export}")
            shown = ServerProcess(["nbdfuse", str(path), uri], log=scratch / "nbdfuse.log")
            stack.callback(shown.stop)
            until = time.monotonic() + WAIT_S
            while not path.exists():
                if shown.exit_code() is not None or time.monotonic() > until:
                    raise PeerError(f"nbdfuse does not show {uri}: {tail(shown.log)}")
                time.sleep(0.02)
            theirs[export] = path
        yield {export: tree / f"@{export}.raw" for export in theirs}, theirs


def _fio(path: Path, pattern: str, size: str, jobs: int, seconds: float) -> float:
    """Return MiB a second, past the page cache: what it holds is neither's doing."""
    line = [
        *("fio", "--output-format=json", "--name=j", f"--filename={path}", "--ioengine=psync"),
        *("--direct=1", f"--rw={pattern}", f"--bs={size}", f"--numjobs={jobs}", "--thread"),
        *("--group_reporting", "--time_based", f"--runtime={seconds:g}", f"--size={SIZE_BYTES}"),
        # It would truncate and lay out a file: this one is there, and keeps its size.
        *("--allow_file_create=0", "--randrepeat=0", "--overwrite=1", "--fallocate=none"),
    ]
    return fio.parse(run_tool(line))["mb_per_s"] * 1e6 / MIB
