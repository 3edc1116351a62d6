"""Results as tables: of plain text for a terminal, of Markdown for the documentation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.estimate import Estimate, estimate, median
from bench.goals import Outcome, Verdict, count
from bench.registry import NBDKIT, QEMU_NBD, QSD_RAW, raw_name_of
from bench.results import Cell, Machine, Results, Run, ratios, values
from bench.validity import describe_conditions, failures, void_by_kind
from bench.workloads import ROW_NAMES

LARGE_REQUEST_KB = 20
"""Rows with larger requests are shown in MB/s."""
ROWS_OF_REQUESTS = ("io", "sync", "direct")
NOTHING = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A title and rows of text; the first row is the head."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    text_columns: frozenset[int] = frozenset({0})
    """Columns of words, set to the left; figures stand to the right."""


Show = Callable[[Run, Cell], str]


def as_text(table: Table) -> str:
    """Columns aligned for a terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(*table.rows, strict=True)]
    lines = [f"## {table.title}"]
    for row in table.rows:
        cells = [
            cell.ljust(width) if column in table.text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def as_markdown(table: Table) -> str:
    """The same as a Markdown table."""
    head, *body = table.rows
    align = ["---" if i in table.text_columns else "---:" for i in range(len(head))]
    lines = [f"### {table.title}", "", *(f"| {' | '.join(row)} |" for row in (head, align, *body))]
    return "\n".join(lines)


def overview_tables(results: Results) -> list[Table]:
    """One table a run: ratios with their spread and server CPU per request in one cell."""
    tables = []
    for kind, run in results.runs.items():
        tables += [_overview(run)] if kind in ROWS_OF_REQUESTS else _figure_table(run)
    return tables


def result_tables(results: Results) -> list[Table]:
    """Every table that the runs give, in the order in which they are read."""
    tables = []
    for kind in ROWS_OF_REQUESTS:
        run = results.run(kind)
        if run is not None:
            tables += _request_tables(run)
    for kind in ("stall", "stalls", "mem", "snap", "incr"):
        run = results.run(kind)
        if run is not None:
            tables += _figure_table(run)
    return tables


def goal_table(outcomes: Sequence[Outcome], *, is_complete: bool = True) -> Table:
    """One line a goal; those that were not measured are left out unless it `is_complete`."""
    rows = [("#", "goal", "must", "aim", "figure (95 % interval)", "verdict", "also")]
    for outcome in outcomes:
        if outcome.verdict is Verdict.NOT_MEASURED and not is_complete:
            continue
        goal, sign = outcome.goal, "" if outcome.goal.is_floor else "<= "
        aim = NOTHING if goal.aim is None else f"{sign}{goal.aim:g}"
        figure = interval_text(outcome.measured, digits=goal.digits)
        verdict = outcome.verdict.value
        rows.append(
            (goal.number, goal.what, f"{sign}{goal.must:g}", aim, figure, verdict, outcome.remark)
        )
    totals = ", ".join(f"{number} {name}" for name, number in count(outcomes).items())
    return Table(title=f"Goals ({totals})", rows=tuple(rows), text_columns=frozenset({0, 1, 5, 6}))


def caveat_lines(results: Results) -> list[str]:
    """What a reader must know before quoting anything: void runs and failures."""
    lines = [
        f"VOID {kind}: {why}" for kind, reasons in void_by_kind(results).items() for why in reasons
    ]
    return lines + [f"FAILED {line}" for line in failures(results.runs.values())]


def context_lines(results: Results) -> list[str]:
    """The machine and the circumstances of each run."""
    runs = [describe_conditions(run) for run in results.runs.values()]
    return [machine_line(results.machine), version_line(results.machine), *runs]


def machine_line(machine: Machine) -> str:
    """The machine in one line."""
    return (
        f"{machine.cpu_count} x {machine.processor}, {machine.memory_gib:g} GiB, "
        f"Linux {machine.kernel}"
    )


def version_line(machine: Machine) -> str:
    """The versions of all tools in one line."""
    return "; ".join(machine.versions.values())


def interval_text(measured: Estimate | None, *, digits: int = 2) -> str:
    """`2.31 (2.10-2.44)`, or a dash."""
    if measured is None:
        return NOTHING
    low, high = f"{measured.low:.{digits}f}", f"{measured.high:.{digits}f}"
    return f"{measured.median:.{digits}f} ({low}-{high})"


def _base_of(run: Run) -> str:
    """What the others are compared with: a peer without snapshots if one was measured."""
    measured = list(dict.fromkeys(s.target for s in run.sessions if s.rows))
    preferred = [name for name in (QSD_RAW, QEMU_NBD, NBDKIT) if name in measured]
    return next(iter([*preferred, *measured, *run.targets()]))


def _rows_in_order(run: Run) -> list[str]:
    order = {name: index for index, name in enumerate(ROW_NAMES)}
    return sorted(run.rows(), key=lambda row: order.get(row, len(order)))


def _overview(run: Run) -> Table:
    names = run.targets()
    base = _base_of(run)

    def show(seen: Run, cell: Cell) -> str:
        cpu = _plain("cpu_us_per_request", 1)(seen, cell)
        speed = _throughput if cell.target == base else _against(base, "iops")
        shown = speed(seen, cell)
        return shown if cpu == NOTHING else f"{shown}, {cpu} us"

    title = f"throughput against {base} (95 % interval), server CPU per request"
    return _grid(run, title, show, rows=_rows_in_order(run), names=names)


def _request_tables(run: Run) -> list[Table]:
    names = run.targets()
    base = _base_of(run)
    rows = _rows_in_order(run)
    shown: list[tuple[str, Show]] = [
        ("throughput, requests/s or MB/s, and its spread", _throughput),
        (f"throughput against {base}", _against(base, "iops")),
        ("throughput against the same server without a snapshot", _against_own("iops")),
        (
            "server CPU, us per request (first writes: until flushed)",
            _plain("cpu_us_per_request", 1),
        ),
        (f"server CPU per request against {base}", _against(base, "cpu_us_per_request")),
        (
            "server CPU per request against the same server without a snapshot",
            _against_own("cpu_us_per_request"),
        ),
        ("latency, p50 / p99 / p99.9 us", _latency),
        ("latency p99 against the same server without a snapshot", _against_own("p99_us")),
        ("bytes kept per write", _plain("kept_bytes_per_request", 0)),
    ]
    tables = [_grid(run, title, show, rows=rows, names=names) for title, show in shown]
    every = [*tables, _session_table(run, names)]
    return [table for table in every if len(table.rows) > 1]


def _grid(run: Run, title: str, show: Show, *, rows: Sequence[str], names: Sequence[str]) -> Table:
    lines: list[tuple[str, ...]] = [("row", *names)]
    for row in rows:
        cells = [show(run, Cell(target=name, row=row)) for name in names]
        if any(cell != NOTHING for cell in cells):
            lines.append((row, *cells))
    return Table(title=f"{run.kind}: {title}", rows=tuple(lines))


def _throughput(run: Run, cell: Cell) -> str:
    found = values(run, cell, "iops")
    if not found:
        return NOTHING
    per_s, mb_per_s = median(found) or 0.0, median(values(run, cell, "mb_per_s")) or 0.0
    spread = (max(found) - min(found)) / max(per_s, 1e-9) * 100
    is_large = mb_per_s * 1e3 / max(per_s, 1e-9) > LARGE_REQUEST_KB
    return f"{mb_per_s:.0f} MB/s ~{spread:.0f}%" if is_large else f"{per_s:.0f} ~{spread:.0f}%"


def _latency(run: Run, cell: Cell) -> str:
    found = [median(values(run, cell, name)) for name in ("p50_us", "p99_us", "p999_us")]
    if all(value is None for value in found):
        return NOTHING
    return "/".join(NOTHING if value is None else f"{value:.0f}" for value in found)


def _plain(figure: str, digits: int) -> Show:
    def show(run: Run, cell: Cell) -> str:
        value = median(values(run, cell, figure))
        return NOTHING if value is None else f"{value:.{digits}f}"

    return show


def _against(base: str, figure: str) -> Show:
    def show(run: Run, cell: Cell) -> str:
        bottom = Cell(target=base, row=cell.row)
        return interval_text(estimate(ratios(run, cell, bottom, figure)))

    return show


def _against_own(figure: str) -> Show:
    def show(run: Run, cell: Cell) -> str:
        own = raw_name_of(cell.target, run.targets())
        if own is None:
            return NOTHING
        return interval_text(estimate(ratios(run, cell, Cell(target=own, row=cell.row), figure)))

    return show


_SESSION_FIGURES: Mapping[str, int] = {
    "snapshot_ms": 1,
    "view_ready_ms": 1,
    "peak_rss_mib": 0,
    "pss_mib": 0,
    "store_mib": 0,
    "others_cores": 2,
}


def _session_table(run: Run, names: Sequence[str]) -> Table:
    lines: list[tuple[str, ...]] = [("figure", *names)]
    for figure, digits in _SESSION_FIGURES.items():
        found = [median(s.figures.get(figure) for s in run.of(name).values()) for name in names]
        lines.append((figure, *(NOTHING if v is None else f"{v:.{digits}f}" for v in found)))
    intact = []
    for name in names:
        seen = [s.is_view_intact for s in run.of(name).values() if s.is_view_intact is not None]
        intact.append(NOTHING if not seen else "yes" if all(seen) else "NO")
    lines.append(("view intact", *intact))
    return Table(title=f"{run.kind}: each server over a session", rows=tuple(lines))


def _figure_table(run: Run) -> list[Table]:
    """All figures of a run that is not about requests: one line for each target, row and figure."""
    lines: list[tuple[str, ...]] = [("target", "row", "figure", "median (95 % interval)")]
    for name in run.targets():
        sessions = run.of(name).values()
        for row in dict.fromkeys(row for s in sessions for row in s.rows):
            for figure in dict.fromkeys(f for s in sessions for f in s.rows.get(row, {})):
                measured = estimate(values(run, Cell(target=name, row=row), figure))
                lines.append((name, row, figure, interval_text(measured)))
    words = frozenset({0, 1, 2})
    table = Table(title=run.kind, rows=tuple(lines), text_columns=words)
    return [table] if len(lines) > 1 else []
