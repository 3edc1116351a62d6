"""The command line: which run, on which targets, with which limits; then tables and the goals."""

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import (
    clones,
    images,
    increments,
    instants,
    machine,
    memory,
    registry,
    report,
    rounds,
    scale,
    stalls,
    words,
)
from bench.errors import BenchError, UsageError
from bench.goals import Judge, judge
from bench.results import Conditions, Results, Run, Session, load, merge, save
from bench.session import Options
from bench.tables import (
    Table,
    as_text,
    caveat_lines,
    context_lines,
    goal_table,
    overview_tables,
    result_tables,
)
from bench.targets import Place
from bench.units import GIB, MIB, parse_size
from bench.workloads import ROW_NAMES, VIEW_ROWS, Mode

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 130, 143
WATCHES = {"stall": instants.watch_receipts, "stalls": stalls.watch_writes}
RUN_KINDS = ("io", "sync", "direct", "stall", "stalls", "mem", "snap", "incr")
ALL_KINDS = ("io", "sync", "direct", "stall", "mem", "incr")
ON_DISK = frozenset({"sync", "direct"})
SPARSE_DISK = frozenset({"stall", "stalls", "mem", "snap"})
SIZE_MULTIPLE_BYTES = 16 * MIB
FULL_SIZE_BYTES = 4 * GIB
QUICK_SIZE_BYTES = GIB
QUICK_TARGETS = (
    *(registry.QEMU_NBD, registry.NBDKIT, registry.QSD_CBW),
    *(registry.OURS_RAW, registry.OURS),
)
QUICK_ROWS = frozenset(
    (
        *("fw1m_seq_pre", "rr4k_q1", "rr4k_q32", "rw4k_q1", "rw4k_q32"),
        *("fw64k_seq", "fw1m_seq", "fw4k_q1", "fw4k_q32", *VIEW_ROWS),
    )
)
DEFAULT_ARGUMENTS = ("all", "--quick")
"""What `make bench` runs: the first marks, on memory-backed scratch, in minutes."""
SPARSE_SCRATCH_BYTES = 2 * GIB
"""Stores of a sparse disk hold what a writer on 256 MiB can make them keep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked to be measured."""

    kinds: tuple[str, ...]
    targets: tuple[str, ...]
    round_count: int
    size_bytes: int
    options: Options
    directory: Path | None
    disk: Path | None
    is_direct: bool
    qemu_aio: str | None
    snapshot_count: int
    sparse_bytes: int
    memory_plans: tuple[tuple[int, int], ...]
    json_path: Path | None


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    # So that a stopped benchmark ends its servers and takes its scratch away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    given = _parser().parse_args(arguments or DEFAULT_ARGUMENTS)
    try:
        handle: Callable[[argparse.Namespace], int] = given.handle
        return handle(given)
    except UsageError as error:
        print(f"bench: {error}", file=sys.stderr)
        return EXIT_USAGE
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("bench: interrupted; finished sessions are in the --json file", file=sys.stderr)
        return EXIT_INTERRUPTED


# -- commands


def _measure(given: argparse.Namespace) -> int:
    asked = _request(given)
    machine.require_client_tools()
    asked = dataclasses.replace(asked, targets=tuple(registry.available(asked.targets)))
    if not asked.targets:
        raise UsageError("none of the targets can be measured here")
    results = Results(machine=machine.describe(), runs={})
    for kind in asked.kinds:
        if kind in ON_DISK and (asked.disk or asked.directory) is None:
            print(f"# {kind}: left out: it needs --disk DIR", file=sys.stderr)
            continue
        for run in _run_kind(kind, asked):
            results = Results(machine=results.machine, runs={**results.runs, kind: run})
            if asked.json_path is not None:
                save(results, asked.json_path)
    tables = result_tables(results) if given.full else overview_tables(results)
    _print(results, tables, by=Judge(given.judge))
    return EXIT_OK


def _goals(given: argparse.Namespace) -> int:
    results = merge(load(path) for path in given.files)
    _print(results, [], by=Judge(given.judge), is_complete=True)
    return EXIT_OK


def _report(given: argparse.Namespace) -> int:
    results = merge(load(path) for path in given.files)
    block = report.as_document(results, judge(results, by=Judge(given.judge)))
    if given.write is None:
        print(block)
    else:
        report.write_block(given.write, block)
    return EXIT_OK


def _memory(given: argparse.Namespace) -> int:
    plan = memory.Plan(
        size_bytes=parse_size(given.size),
        preserved_count=given.blocks,
        placement=memory.Placement(given.placement),
        snapshot_count=given.snapshots,
    )
    return EXIT_OK if memory.measure(plan, parent=given.dir) else EXIT_FAILED


def _scale(given: argparse.Namespace) -> int:
    plan = scale.Plan(
        epoch_count=given.epochs, zero_count=given.zeros, payload_count=given.payloads
    )
    if min(plan.epoch_count, plan.zero_count, plan.payload_count) < 1:
        raise UsageError("--epochs, --zeros and --payloads must be at least 1")
    return EXIT_OK if scale.measure(plan, parent=given.dir) else EXIT_FAILED


def _clones(given: argparse.Namespace) -> int:
    plan = clones.Plan(clone_count=given.count, round_count=given.rounds)
    if min(plan.clone_count, plan.round_count) < 1:
        raise UsageError("--count and --rounds must be at least 1")
    return EXIT_OK if clones.measure(plan, parent=given.dir) else EXIT_FAILED


def _images(given: argparse.Namespace) -> int:
    plan = images.Plan(round_count=given.rounds, seconds=given.seconds)
    if plan.round_count < 1 or plan.seconds <= 0:
        raise UsageError("--rounds must be at least 1, --seconds more than 0")
    return EXIT_OK if images.measure(plan, parent=given.dir) else EXIT_FAILED


def _words(given: argparse.Namespace) -> int:
    kinds = tuple(given.filesystems.split(","))
    if unknown := sorted(set(kinds) - set(words.FILESYSTEMS)):
        raise UsageError(f"{unknown[0]} is none of {', '.join(words.FILESYSTEMS)}")
    plan = words.Plan(file_count=given.files, filesystems=kinds, round_count=given.rounds)
    return EXIT_OK if words.measure(plan, parent=given.dir) else EXIT_FAILED


def _print(
    results: Results, tables: Sequence[Table], *, by: Judge, is_complete: bool = False
) -> None:
    for line in context_lines(results):
        print(f"# {line}")
    last = goal_table(judge(results, by=by), is_complete=is_complete)
    for table in (*tables, last):
        print(f"\n{as_text(table)}")
    for line in caveat_lines(results):
        print(line)


# -- runs


def _run_kind(kind: str, asked: Request) -> Iterator[Run]:
    """The run after every session, so that an interrupted benchmark leaves what it has."""
    is_on_disk = kind in ON_DISK
    parent = asked.disk or asked.directory if is_on_disk else asked.directory
    if parent is None and not asked.is_direct:
        parent = machine.memory_scratch()
    is_direct = asked.is_direct or kind == "direct"
    needed = SPARSE_SCRATCH_BYTES if kind in SPARSE_DISK else int(asked.size_bytes * 2.25)
    others_cores = machine.others_now_cores()
    with machine.scratch_directory(parent, needed_bytes=needed) as scratch:
        place = Place(
            scratch=scratch,
            image=scratch / "disk.img",
            is_direct=is_direct,
            qemu_aio=asked.qemu_aio or ("io_uring" if is_direct else "threads"),
        )
        if is_on_disk and machine.filesystem_of(scratch) == "tmpfs":
            raise UsageError(f"{kind} wants a disk, and its directory is in memory")
        if kind not in SPARSE_DISK:
            machine.fill(place.image, asked.size_bytes)
        cost = rounds.sync_cost(place) if kind == "sync" else None
        seen: list[Session] = []
        for session in _sessions(kind, asked, place):
            seen.append(_without_path(session, scratch))
            found = _conditions(place, asked, kind=kind, others_cores=others_cores, cost=cost)
            yield Run(kind=kind, conditions=found, sessions=tuple(seen))
        if cost is not None:
            cost = rounds.mean_cost(cost, rounds.sync_cost(place))
            found = _conditions(place, asked, kind=kind, others_cores=others_cores, cost=cost)
            yield Run(kind=kind, conditions=found, sessions=tuple(seen))


def _without_path(session: Session, scratch: Path) -> Session:
    """The session with no trace of where its scratch directory was: results are published."""
    told = {row: why.replace(str(scratch), "SCRATCH") for row, why in session.failures.items()}
    return dataclasses.replace(session, failures=told)


def _sessions(kind: str, asked: Request, place: Place) -> Iterator[Session]:
    names, round_count = asked.targets, asked.round_count
    if kind in WATCHES:
        return instants.watch_snapshots(
            names,
            label=kind,
            watch=WATCHES[kind],
            place=place,
            size_bytes=asked.sparse_bytes,
            snapshot_count=asked.snapshot_count,
            round_count=round_count,
        )
    if kind == "mem":
        return instants.measure_memory(
            names,
            place=place,
            size_bytes=asked.sparse_bytes,
            plans=asked.memory_plans,
            round_count=round_count,
        )
    if kind == "snap":
        return instants.measure_snapshot_times(names, place=place, round_count=round_count)
    if kind == "incr":
        return increments.measure_increments(names, place=place, round_count=round_count)
    return rounds.measure_rows(
        names, place=place, mode=Mode(kind), options=asked.options, round_count=round_count
    )


def _conditions(
    place: Place,
    asked: Request,
    *,
    kind: str,
    others_cores: float,
    cost: Mapping[str, float] | None,
) -> Conditions:
    return Conditions(
        filesystem=machine.filesystem_of(place.scratch),
        is_direct=place.is_direct,
        qemu_aio=place.qemu_aio,
        others_before_cores=others_cores,
        size_bytes=asked.sparse_bytes if kind in SPARSE_DISK else asked.size_bytes,
        seconds=asked.options.seconds,
        scale=asked.options.scale,
        round_count=asked.round_count,
        sync_cost=cost or {},
    )


# -- arguments


def _request(given: argparse.Namespace) -> Request:
    kinds = ALL_KINDS if given.what == "all" else (given.what,)
    targets: tuple[str, ...] = registry.DEFAULT_TARGETS
    if given.quick:
        targets, kinds = QUICK_TARGETS, ("io",) if given.what == "all" else kinds
    if given.targets:
        targets = tuple(name for name in given.targets.split(",") if name)
    for name in targets:
        registry.parse(name)
    default_bytes = QUICK_SIZE_BYTES if given.quick else FULL_SIZE_BYTES
    size_bytes = parse_size(given.size) if given.size else default_bytes
    if size_bytes == 0 or size_bytes % SIZE_MULTIPLE_BYTES:
        raise UsageError("--size must be a multiple of 16M")
    if given.rounds < 1:
        raise UsageError("--rounds must be at least 1")
    only = frozenset(name for name in (given.only or "").split(",") if name)
    if unknown := only - {*ROW_NAMES, "view"}:
        raise UsageError(f"no such row: {', '.join(sorted(unknown))}; rows: {', '.join(ROW_NAMES)}")
    return Request(
        kinds=kinds,
        targets=targets,
        round_count=given.rounds,
        size_bytes=size_bytes,
        options=Options(
            seconds=given.seconds or (1.0 if given.quick else 2.0),
            scale=given.scale,
            burst_bytes=parse_size(given.burst),
            only=only or (QUICK_ROWS if given.quick else frozenset()),
            is_verified=not given.no_verify,
        ),
        directory=given.dir,
        disk=given.disk,
        is_direct=given.direct,
        qemu_aio=given.qemu_aio,
        snapshot_count=given.snapshots,
        sparse_bytes=parse_size(given.sparse_size),
        memory_plans=_memory_plans(given.mem_snapshots),
        json_path=given.json,
    )


def _memory_plans(text: str) -> tuple[tuple[int, int], ...]:
    plans = []
    for part in text.split(","):
        extents, colon, snapshots = part.partition(":")
        if not colon or not extents.isdecimal() or not snapshots.isdecimal() or int(snapshots) < 1:
            raise UsageError(f"--mem-snapshots wants EXTENTS:SNAPSHOTS,..., not {part!r}")
        plans.append((int(extents), int(snapshots)))
    return tuple(plans)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="stillblock beside its peers; quote ratios only."
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    judge_options = argparse.ArgumentParser(add_help=False)
    judge_options.add_argument(
        "--judge",
        choices=[by.value for by in Judge],
        default=Judge.CPU.value,
        help="what judges the goals against ourselves (default: cpu)",
    )
    for kind, summary in _SUMMARIES.items():
        run = commands.add_parser(kind, help=summary, description=summary, parents=[judge_options])
        _add_run_options(run)
        run.set_defaults(handle=_measure)
    goals = commands.add_parser("goals", help="the goals from saved runs", parents=[judge_options])
    goals.add_argument("files", nargs="+", type=Path, help="results; later files win")
    goals.set_defaults(handle=_goals)
    told = commands.add_parser("report", help="saved runs as Markdown", parents=[judge_options])
    told.add_argument("files", nargs="+", type=Path, help="results; later files win")
    told.add_argument("--write", type=Path, metavar="FILE", help="replace the block in this file")
    told.set_defaults(handle=_report)
    _add_memory_command(commands)
    _add_scale_command(commands)
    _add_words_command(commands)
    _add_clones_command(commands)
    _add_images_command(commands)
    return parser


_SUMMARIES = {
    "all": "io, sync, direct, stall, mem and incr, then the goals",
    "io": "the request rows, on memory-backed scratch unless --dir says otherwise",
    "sync": "first writes with a flush each and every 32, on a disk (--disk)",
    "direct": "random reads past the page cache, on a disk (--disk)",
    "stall": "the longest gap a writer sees while snapshots are taken",
    "stalls": "the longest write of four connections around each snapshot",
    "mem": "memory per further snapshot",
    "snap": "time to take a snapshot of sparse disks",
    "incr": "copying only what changed, after one percent did",
}


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="fewer than five are void (default: 5)")
    add("--quick", action="store_true", help="1G disk, 1 s rows, only what the first marks need")
    add("--seconds", type=float, help="length of a steady row (default: 2)")
    add("--scale", type=float, default=1.0, help="scales the number of sparse first writes")
    add("--size", help="of the disk, a multiple of 16M (default: 4G)")
    add("--dir", type=Path, help="scratch (default: memory-backed if there is such a directory)")
    add("--disk", type=Path, help="scratch on a disk, for sync and direct")
    add("--direct", action="store_true", help="O_DIRECT everywhere (needs --dir on a disk)")
    add("--targets", help=f"comma-separated (default: {','.join(registry.DEFAULT_TARGETS)})")
    add("--only", help="comma-separated rows; `view` stands for all view rows")
    add("--qemu-aio", choices=["threads", "io_uring", "native"], help="QEMU's I/O engine")
    add("--no-verify", action="store_true", help="do not prove the snapshot's content afterwards")
    add("--burst", default="16M", help="bytes in a burst that a write buffer may absorb")
    add("--snapshots", type=int, default=20, help="how many stall and stalls take (default: 20)")
    add("--sparse-size", default="256G", help="of the disk of stall and mem (default: 256G)")
    add("--mem-snapshots", default="10:32,100000:8", metavar="EXTENTS:SNAPSHOTS,...")
    add("--full", action="store_true", help="print every table, not one a run")
    add("--json", type=Path, metavar="FILE", help="save results, after every session")


def _add_memory_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "what a large volume costs: time to open, bytes per preserved block, idle pause"
    command = commands.add_parser("memory", help=summary, description=summary)
    add = command.add_argument
    add("--size", default="1T", help="of the sparse volume (default: 1T)")
    add("--blocks", type=int, default=1_000_000, help="blocks to preserve (default: 1000000)")
    places = [place.value for place in memory.Placement]
    add("--placement", choices=places, default="scattered", help="where they lie")
    add("--snapshots", type=int, default=20, help="idle snapshots to time (default: 20)")
    add("--dir", type=Path, help="scratch on a disk; needs 9 GiB at a million blocks")
    command.set_defaults(handle=_memory)


def _add_scale_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "what a store costs after years: time and memory to open it, reads of old snapshots"
    command = commands.add_parser("scale", help=summary, description=summary)
    add = command.add_argument
    add("--epochs", type=int, default=2000, help="live snapshots (default: 2000)")
    add("--zeros", type=int, default=49_000_000, help="zero originals (default: 49000000)")
    add("--payloads", type=int, default=1_000_000, help="originals with content (default: 1000000)")
    add("--dir", type=Path, help="scratch on a disk; needs 8 GiB at these counts")
    command.set_defaults(handle=_scale)


def _add_clones_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "what clones cost: making and opening many, what they take, reads through one"
    command = commands.add_parser("clones", help=summary, description=summary)
    add = command.add_argument
    add("--count", type=int, default=200, help="clones (default: 200)")
    add("--rounds", type=int, default=15, help="passes of reads, the best counts (default: 15)")
    add("--dir", type=Path, help="scratch; needs 1 GiB")
    command.set_defaults(handle=_clones)


def _add_images_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "snapshots and clones as files: the server's tree beside nbdfuse; needs FUSE"
    command = commands.add_parser("images", help=summary, description=summary)
    add = command.add_argument
    add("--rounds", type=int, default=5, help="passes through each (default: 5)")
    add("--seconds", type=float, default=2.0, help="how long a pass takes (default: 2)")
    add("--dir", type=Path, help="directory for the scratch files (default: memory)")
    command.set_defaults(handle=_images)


def _add_words_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "what rules of files cost: time and memory to resolve them on a full filesystem"
    command = commands.add_parser("words", help=summary, description=summary)
    add = command.add_argument
    add("--files", type=int, default=50_000, help="on each filesystem (default: 50000)")
    add("--filesystems", default=",".join(words.FILESYSTEMS), help="comma-separated")
    add("--rounds", type=int, default=3, help="the best counts (default: 3)")
    add("--dir", type=Path, help="scratch with room for the image and its files")
    command.set_defaults(handle=_words)
