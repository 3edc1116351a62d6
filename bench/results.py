"""What a run leaves behind: frozen values and their one JSON form."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench import fields
from bench.errors import BenchError, UsageError

FORMAT = "stillblock-bench"
VERSION = 1

Figures = Mapping[str, float]
"""Measured figures by name; the name ends in its unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One life of one server in one round."""

    target: str
    round_index: int
    rows: Mapping[str, Figures] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why a row has no figures; the key `session` stands for all of them."""
    figures: Figures = field(default_factory=dict)
    is_view_intact: bool | None = None
    """Whether the snapshot still read as the disk did at its instant; None if nobody looked."""

    def figure(self, row: str, name: str) -> float | None:
        """One figure of one row, None if it was not measured."""
        return self.rows.get(row, {}).get(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Under which circumstances a run was made."""

    filesystem: str
    is_direct: bool
    qemu_aio: str
    others_before_cores: float
    size_bytes: int
    seconds: float
    scale: float
    round_count: int
    sync_cost: Mapping[str, float] = field(default_factory=dict)
    """`sync` only: what an fdatasync costs on this disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All sessions of one kind of run."""

    kind: str
    conditions: Conditions
    sessions: tuple[Session, ...]

    def of(self, target: str) -> dict[int, Session]:
        """The sessions of one target by round."""
        return {s.round_index: s for s in self.sessions if s.target == target}

    def targets(self) -> list[str]:
        """Targets in the order in which they were visited."""
        return list(dict.fromkeys(s.target for s in self.sessions))

    def rows(self) -> list[str]:
        """Rows with at least one measurement, in the order in which they were run."""
        return list(dict.fromkeys(row for s in self.sessions for row in s.rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was measured on, as far as it explains figures."""

    kernel: str
    processor: str
    cpu_count: int
    memory_gib: float
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """One or several runs on one machine."""

    machine: Machine
    runs: Mapping[str, Run]

    def run(self, kind: str) -> Run | None:
        return self.runs.get(kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One row of one target."""

    target: str
    row: str


def values(run: Run | None, cell: Cell, figure: str) -> list[float]:
    """The figure in each round that has it."""
    if run is None:
        return []
    found = (session.figure(cell.row, figure) for session in run.of(cell.target).values())
    return [value for value in found if value is not None]


def ratios(run: Run | None, top: Cell, bottom: Cell, figure: str) -> list[float]:
    """The ratio of a figure within each round; rounds in which either side failed are left out."""
    if run is None:
        return []
    lower = run.of(bottom.target)
    found = []
    for round_index, session in sorted(run.of(top.target).items()):
        x = session.figure(top.row, figure)
        y = lower[round_index].figure(bottom.row, figure) if round_index in lower else None
        if x is not None and y:
            found.append(x / y)
    return found


def merge(parts: Iterable[Results]) -> Results:
    """One result of several files; where a kind of run occurs twice, the later one wins."""
    every = list(parts)
    if not every:
        raise UsageError("no results to read")
    runs = {kind: run for part in every for kind, run in part.runs.items()}
    return Results(machine=every[-1].machine, runs=runs)


def save(results: Results, path: Path) -> None:
    """Write the file whole or not at all: an interrupted run leaves the earlier one."""
    body = {"format": FORMAT, "version": VERSION, **asdict(results)}
    draft = path.with_name(path.name + ".part")
    draft.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def load(path: Path) -> Results:
    """Read a results file; raise UsageError if it is none."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as results: {error}") from error
    try:
        return _results(fields.mapping(parsed, "results"))
    except BenchError as error:
        raise UsageError(f"{path}: {error}") from error


def _results(body: Mapping[str, object]) -> Results:
    if body.get("format") != FORMAT or body.get("version") != VERSION:
        raise UsageError(f"not a {FORMAT} file of version {VERSION}")
    machine = fields.mapping(body.get("machine"), "machine")
    return Results(
        machine=Machine(
            kernel=fields.text(machine.get("kernel"), "kernel"),
            processor=fields.text(machine.get("processor"), "processor"),
            cpu_count=fields.integer(machine.get("cpu_count"), "cpu_count"),
            memory_gib=fields.number(machine.get("memory_gib"), "memory_gib"),
            versions=_texts(machine.get("versions"), "versions"),
        ),
        runs={
            kind: _run(fields.mapping(value, kind))
            for kind, value in fields.mapping(body.get("runs"), "runs").items()
        },
    )


def _run(body: Mapping[str, object]) -> Run:
    c = fields.mapping(body.get("conditions"), "conditions")
    return Run(
        kind=fields.text(body.get("kind"), "kind"),
        conditions=Conditions(
            filesystem=fields.text(c.get("filesystem"), "filesystem"),
            is_direct=bool(c.get("is_direct")),
            qemu_aio=fields.text(c.get("qemu_aio"), "qemu_aio"),
            others_before_cores=fields.number(c.get("others_before_cores"), "others_before_cores"),
            size_bytes=fields.integer(c.get("size_bytes"), "size_bytes"),
            seconds=fields.number(c.get("seconds"), "seconds"),
            scale=fields.number(c.get("scale"), "scale"),
            round_count=fields.integer(c.get("round_count"), "round_count"),
            sync_cost=_numbers(c.get("sync_cost"), "sync_cost"),
        ),
        sessions=tuple(
            _session(fields.mapping(value, "session"))
            for value in fields.sequence(body.get("sessions"), "sessions")
        ),
    )


def _session(body: Mapping[str, object]) -> Session:
    intact = body.get("is_view_intact")
    return Session(
        target=fields.text(body.get("target"), "target"),
        round_index=fields.integer(body.get("round_index"), "round_index"),
        rows={
            row: _numbers(value, row)
            for row, value in fields.mapping(body.get("rows"), "rows").items()
        },
        failures=_texts(body.get("failures"), "failures"),
        figures=_numbers(body.get("figures"), "figures"),
        is_view_intact=None if intact is None else bool(intact),
    )


def _numbers(value: object, what: str) -> dict[str, float]:
    return {k: fields.number(v, f"{what}.{k}") for k, v in fields.mapping(value, what).items()}


def _texts(value: object, what: str) -> dict[str, str]:
    return {k: fields.text(v, f"{what}.{k}") for k, v in fields.mapping(value, what).items()}
