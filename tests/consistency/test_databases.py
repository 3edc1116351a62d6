"""Real databases on the served disk, written to all the while: every snapshot recovers, whole."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from databases import (
    Database,
    MariaDB,
    MariaDBWithoutTransactions,
    PostgreSQL,
    Redis,
    RedisEverySecond,
    RedisWithDumps,
    SQLite,
    SQLiteNormal,
    Writer,
    postgres_program,
)
from mounted import SIZE, formatted, mounted
from serving import MIB, Served, run
from stillblock.model import Consistency
from stillblock.operations.consistency import ConsistencyRequest
from stillblock.operations.hooks import install_hooks
from stillblock.operations.snapshots import SnapshotRequest

T = TypeVar("T")

HOOKS: dict[type[Database], str] = {
    PostgreSQL: "postgresql",
    MariaDB: "mariadb",
    Redis: "redis",
    SQLite: "sqlite",
}
DISK: dict[type[Database], int] = {
    PostgreSQL: 256 * MIB,
    MariaDB: 384 * MIB,
    Redis: 64 * MIB,
    SQLite: 64 * MIB,
}

pytestmark = [
    pytest.mark.needs("nbdfuse", "losetup", "mkfs.ext4", "fusermount3", "runuser", "nbdcopy"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]


def of(table: dict[type[Database], T], kind: type[Database]) -> T:
    """Look up a kind or what it is a kind of."""
    return next(table[base] for base in kind.__mro__ if base in table)


def hooks_of(kind: type[Database], database: Database, folder: Path) -> Path:
    made = folder / "hooks"
    install_hooks((of(HOOKS, kind),), made)
    lines = [f"{name}={value}" for name, value in database.settings().items()]
    (made / "settings").write_text("\n".join(lines) + "\n")
    return made


def take(served: Served, name: str, level: Consistency) -> tuple[str, ...]:
    """Take one; return the hooks and freezes that were part of it."""
    # A disk with a busy writer has no quiet moment: it is a barrier then, and says so.
    is_idle = level is Consistency.IDLE
    with served.session() as session:
        request = SnapshotRequest(name=name, consistency=level, or_barrier=is_idle)
        receipt = session.create_snapshot(request)
    assert receipt.quiescing is not None
    assert receipt.quiescing.asked is level
    if not is_idle:
        assert receipt.quiescing.reached is level, receipt.quiescing
    return tuple(str(step.kind) for step in receipt.quiescing.steps)


def exercise(
    kind: type[Database],
    filesystem: str,
    rounds: int,
    tmp_path: Path,
    *,
    levels: tuple[Consistency, ...] = tuple(Consistency),
    freezes: bool = True,
) -> None:
    with formatted(filesystem, size=max(of(DISK, kind), SIZE[filesystem])) as served:
        served.start()
        taken: list[tuple[str, int]] = []
        with tempfile.TemporaryDirectory(prefix="sb-db-") as sockets:
            Path(sockets).chmod(0o755)
            with mounted(served) as disk:
                disk.point.chmod(0o755)
                database = kind(disk.point, Path(sockets))
                database.create()
                database.start()
                hooks = hooks_of(kind, database, tmp_path)
                with served.session() as session:
                    session.set_consistency(
                        ConsistencyRequest(
                            mounts=(str(disk.point),) if freezes else (),
                            hooks=str(hooks),
                            quiet_ms=50,
                            idle_limit_ms=200,
                            freeze_limit_ms=30_000,
                        )
                    )
                writer = Writer(database.client())
                writer.start()
                try:
                    for number in range(rounds):
                        for level in levels:
                            writer.wait_more(20)
                            name, before = f"{level}-{number}", writer.acknowledged
                            steps = take(served, name, level)
                            taken.append((name, before))
                            if level is Consistency.APPLICATION:
                                assert "hook-before" in steps
                                assert ("freeze" in steps) is freezes
                    writer.wait_more(5)
                finally:
                    writer.stop()
                    database.stop()
            for name, before in taken:
                with copied(served, name) as point:
                    recover(kind(point, Path(sockets)), before, name)


@contextmanager
def copied(served: Served, name: str) -> Iterator[Path]:
    """Mount a writable copy of a snapshot; the filesystem replays its journal."""
    with tempfile.TemporaryDirectory(prefix="sb-copy-") as made:
        folder = Path(made)
        folder.chmod(0o755)  # servers that use the mount are other users
        point = folder / "point"
        point.mkdir()
        run("nbdcopy", served.uri(name), str(folder / "copy.img"))
        run("mount", "-o", "loop", str(folder / "copy.img"), str(point))
        try:
            yield point
        finally:
            run("umount", str(point))


def recover(database: Database, before: int, name: str) -> None:
    """Let a database recover on a copy, and compare with what was acknowledged."""
    database.start()
    try:
        client = database.client()
        found = client.numbers()
        client.close()
        missing = set(range(1, before + 1)) - found
        assert not missing, f"{name}: {len(missing)} of {before} acknowledged rows are missing"
        assert found == set(range(1, len(found) + 1)), f"{name}: a row without those before it"
        database.check()
    finally:
        database.stop()


def require(kind: type[Database], require_tool) -> None:
    for command in kind.commands:
        require_tool(command)
    if kind is PostgreSQL and postgres_program("postgres") is None:
        require_tool("postgres")


@pytest.mark.parametrize("kind", [SQLite, pytest.param(PostgreSQL, marks=pytest.mark.long)])
def test_every_acknowledged_row_is_in_every_snapshot(kind, tmp_path, require_tool):
    require(kind, require_tool)
    exercise(kind, "ext4", 1, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
@pytest.mark.parametrize("kind", [SQLite, PostgreSQL, MariaDB, Redis])
def test_many_snapshots_at_each_level_recover(kind, filesystem, tmp_path, require_tool):
    require(kind, require_tool)
    exercise(kind, filesystem, 3, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", [SQLiteNormal, MariaDBWithoutTransactions, RedisEverySecond, RedisWithDumps]
)
def test_a_hook_alone_brings_in_what_was_acknowledged_from_memory(kind, tmp_path, require_tool):
    """Without it, each of these loses acknowledged rows in a power cut, and in a barrier."""
    require(kind, require_tool)
    exercise(kind, "ext4", 5, tmp_path, levels=(Consistency.APPLICATION,), freezes=False)
