"""Real database servers on a mounted disk; a writer that notes what was acknowledged; checks."""

from __future__ import annotations

import abc
import os
import pwd
import shutil
import sqlite3
import subprocess
import threading
import time
from pathlib import Path

from processes import wait_until
from serving import run, try_run

START_S = 60.0
POSTGRES_USER = "postgres"


def postgres_program(name: str) -> str | None:
    """The newest of the versions beside each other, which are not on the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


class Database(abc.ABC):
    """A server whose files are in one directory."""

    commands: tuple[str, ...]

    def __init__(self, folder: Path, sockets: Path) -> None:
        self.folder, self.sockets = folder, sockets
        self.process: subprocess.Popen[bytes] | None = None

    @abc.abstractmethod
    def create(self) -> None:
        """Make an empty database with one table, stopped."""

    @abc.abstractmethod
    def start(self) -> None:
        """Start on what is there, recovering it."""

    @abc.abstractmethod
    def client(self) -> Client:
        """Connect."""

    @abc.abstractmethod
    def settings(self) -> dict[str, str]:
        """What the ready-made hook needs to know."""

    @abc.abstractmethod
    def check(self) -> None:
        """Let the database look for damage in itself."""

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=START_S)
            self.process = None

    def wait_for(self, *words: str) -> None:
        until = time.monotonic() + START_S
        while try_run(*words).code != 0:
            assert self.process is not None
            assert self.process.poll() is None, f"{self.process.args} ended"
            assert time.monotonic() < until, f"no answer: {words}"
            time.sleep(0.1)


class Client(abc.ABC):
    """A connection."""

    @abc.abstractmethod
    def insert(self, number: int) -> None:
        """Insert a row in a transaction of its own; returns when it is acknowledged."""

    @abc.abstractmethod
    def numbers(self) -> set[int]:
        """Every row."""

    @abc.abstractmethod
    def close(self) -> None:
        """Disconnect."""


class LineClient(Client):
    """A command-line client that is fed line by line."""

    def __init__(self, words: list[str], insert: str, select: str) -> None:
        self._insert, self._select = insert, select
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def insert(self, number: int) -> None:
        answer = self._ask(self._insert.format(n=number))
        assert answer in {str(number), "OK", "1"}, f"{number}: {answer}"

    def numbers(self) -> set[int]:
        return {int(word) for word in self._ask(self._select).split(",") if word}

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=START_S)
        assert self._process.stdout is not None
        self._process.stdout.close()


class PostgreSQL(Database):
    commands = ("psql",)

    def _as_postgres(self, *words: str) -> list[str]:
        return ["runuser", "-u", POSTGRES_USER, "--", *words]

    def create(self) -> None:
        data = self.folder / "pg"
        data.mkdir(mode=0o700)
        owner = pwd.getpwnam(POSTGRES_USER)
        os.chown(data, owner.pw_uid, owner.pw_gid)
        initdb = postgres_program("initdb")
        assert initdb
        run(*self._as_postgres(initdb, "-D", str(data), "-A", "trust", "--wal-segsize=1"))
        with (data / "postgresql.conf").open("a") as settings:
            settings.write("listen_addresses=''\nmax_wal_size=32MB\nmin_wal_size=4MB\n")
        self.start()
        self._query("CREATE EXTENSION amcheck; CREATE TABLE t (n bigint PRIMARY KEY, pad text)")
        self.stop()

    def start(self) -> None:
        data = self.folder / "pg"
        (data / "postmaster.pid").unlink(missing_ok=True)
        owner = pwd.getpwnam(POSTGRES_USER)
        os.chown(self.sockets, owner.pw_uid, owner.pw_gid)
        program = postgres_program("postgres")
        assert program
        self.process = subprocess.Popen(
            [program, "-D", str(data), "-k", str(self.sockets)],
            user=owner.pw_uid,
            group=owner.pw_gid,
            extra_groups=[],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.wait_for(*self._psql(), "-c", "SELECT 1")

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(2)  # SIGINT: cut clients, shut down
            self.process.wait(timeout=START_S)
            self.process = None

    def _psql(self) -> list[str]:
        words = ["psql", "-X", "-q", "-A", "-t", "-h", str(self.sockets), "-U", POSTGRES_USER]
        return [*words, "-d", "postgres"]

    def _query(self, text: str) -> None:
        run(*self._psql(), "-v", "ON_ERROR_STOP=1", "-c", text)

    def client(self) -> Client:
        insert = "INSERT INTO t VALUES ({n}, repeat('x', 500)) RETURNING n;"
        return LineClient(self._psql(), insert, "SELECT string_agg(n::text, ',') FROM t;")

    def settings(self) -> dict[str, str]:
        return {"PGHOST": str(self.sockets), "PGUSER": POSTGRES_USER}

    def check(self) -> None:
        program = postgres_program("pg_amcheck")
        assert program
        where = ["-h", str(self.sockets), "-U", POSTGRES_USER, "-d", "postgres"]
        run(program, *where, "--heapallindexed", "--install-missing")


class MariaDB(Database):
    commands = ("mariadbd", "mariadb", "mariadb-install-db")
    engine = "InnoDB"
    engines: tuple[str, ...] = ("InnoDB", "Aria")

    def _socket(self) -> str:
        return str(self.sockets / "my.sock")

    def create(self) -> None:
        data = str(self.folder / "my")
        run(
            *("mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root"),
            *("--auth-root-authentication-method=normal", "--innodb-log-file-size=8M"),
            "--skip-test-db",
        )
        self.start()
        for engine in self.engines:
            self._query(
                f"CREATE TABLE test.{engine} (n BIGINT PRIMARY KEY, pad TEXT) ENGINE={engine}"
            )
        self.stop()

    def start(self) -> None:
        data = self.folder / "my"
        self.process = subprocess.Popen(
            [
                *("mariadbd", "--no-defaults", f"--datadir={data}", "--user=root"),
                *(f"--socket={self._socket()}", "--skip-networking"),
                *("--innodb-log-file-size=8M", "--innodb-buffer-pool-size=16M"),
                *(f"--pid-file={self.sockets}/my.pid", "--aria-log-file-size=8M"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.wait_for(*self._words(), "-e", "CREATE DATABASE IF NOT EXISTS test")

    def _words(self) -> list[str]:
        return ["mariadb", "--no-defaults", "-S", self._socket(), "-u", "root", "-N", "-B"]

    def _query(self, text: str) -> str:
        return run(*self._words(), "-e", text).out

    def client(self) -> Client:
        table = f"test.{self.engine}"
        insert = f"INSERT INTO {table} VALUES ({{n}}, REPEAT('x', 500)); SELECT {{n}};"
        longest = "SET SESSION group_concat_max_len=100000000;"
        select = f"{longest} SELECT GROUP_CONCAT(n) FROM {table};"
        return LineClient([*self._words(), "--unbuffered"], insert, select)

    def settings(self) -> dict[str, str]:
        return {
            "MYSQL_FLAGS": f"--no-defaults -S {self._socket()} -u root",
            "HOOK_STATE": str(self.sockets),
        }

    def check(self) -> None:
        for engine in self.engines:
            verdict = self._query(f"CHECK TABLE test.{engine} EXTENDED").split("\t")
            assert verdict[-1].strip() == "OK", verdict


class Redis(Database):
    commands = ("redis-server", "redis-cli")
    persistence = ("--appendonly", "yes", "--appendfsync", "always")

    def _socket(self) -> str:
        return str(self.sockets / "redis.sock")

    def create(self) -> None:
        (self.folder / "redis").mkdir()

    def start(self) -> None:
        words = ["redis-server", "--port", "0", "--unixsocket", self._socket()]
        words += ["--dir", str(self.folder / "redis"), "--save", "", *self.persistence]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.wait_for("redis-cli", "-s", self._socket(), "PING")
        ping = ("redis-cli", "-s", self._socket(), "PING")
        assert wait_until(lambda: "PONG" in run(*ping).out, START_S), "it is loading"

    def client(self) -> Client:
        eval_all = "EVAL \"return table.concat(redis.call('KEYS','*'), ',')\" 0"
        return LineClient(["redis-cli", "-s", self._socket(), "--raw"], "SET {n} x", eval_all)

    def settings(self) -> dict[str, str]:
        return {"REDIS_FLAGS": f"-s {self._socket()}"}

    def check(self) -> None:
        parts = sorted((self.folder / "redis" / "appendonlydir").glob("*.manifest"))
        assert parts
        run("redis-check-aof", str(parts[0]))


class SQLite(Database):
    commands = ("sqlite3",)
    synchronous = "FULL"

    @property
    def path(self) -> Path:
        return self.folder / "data.db"

    def create(self) -> None:
        with sqlite3.connect(self.path) as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, pad TEXT)")
        database.close()

    def start(self) -> None:
        """It is a file."""

    def client(self) -> Client:
        return SQLiteClient(self.path, self.synchronous)

    def settings(self) -> dict[str, str]:
        return {"SQLITE_DATABASES": str(self.path)}

    def check(self) -> None:
        assert run("sqlite3", str(self.path), "PRAGMA integrity_check").out.strip() == "ok"


class SQLiteClient(Client):
    def __init__(self, path: Path, synchronous: str) -> None:
        # The writer's thread is another one than that which closes.
        self._database = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False, timeout=60
        )
        self._database.execute(f"PRAGMA synchronous={synchronous}")

    def insert(self, number: int) -> None:
        self._database.execute("INSERT INTO t VALUES (?, ?)", (number, "x" * 500))

    def numbers(self) -> set[int]:
        return {row[0] for row in self._database.execute("SELECT n FROM t")}

    def close(self) -> None:
        self._database.close()


class MariaDBWithoutTransactions(MariaDB):
    """MyISAM acknowledges what it has in memory."""

    engine = "MyISAM"
    engines = ("InnoDB", "Aria", "MyISAM")


class RedisEverySecond(Redis):
    """It acknowledges up to a second before it syncs."""

    persistence = ("--appendonly", "yes", "--appendfsync", "everysec")


class RedisWithDumps(Redis):
    """It acknowledges what is in memory until the next dump."""

    persistence = ("--appendonly", "no")

    def check(self) -> None:
        run("redis-check-rdb", str(self.folder / "redis" / "dump.rdb"))


class SQLiteNormal(SQLite):
    """In WAL mode a commit is acknowledged before it is synced."""

    synchronous = "NORMAL"


class Writer(threading.Thread):
    """Inserts one row after the other; `acknowledged` is the last one whose commit came back."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self._client = client
        self._is_stopping = threading.Event()
        self.acknowledged = 0
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._is_stopping.is_set():
                self._client.insert(self.acknowledged + 1)
                self.acknowledged += 1
        except BaseException as error:  # noqa: BLE001 - told by the test's thread
            self.problem = error

    def wait_more(self, count: int) -> None:
        """Wait until so many more rows are acknowledged."""
        wanted = self.acknowledged + count
        until = time.monotonic() + START_S
        while self.acknowledged < wanted:
            assert self.problem is None, self.problem
            assert time.monotonic() < until, "the writer stands still"
            time.sleep(0.005)

    def stop(self) -> None:
        self._is_stopping.set()
        self.join(START_S)
        self._client.close()
        assert self.problem is None, self.problem
