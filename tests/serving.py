"""A volume in a state directory of its own, and the real `stillblock serve` process on it."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from stillblock import native
from stillblock.cli.running import run as run_command
from stillblock.config import Config
from stillblock.demo.nbd_client import NbdClient
from stillblock.service.session import Session, open_session

BLOCK: Final = 4096
MIB: Final = 1 << 20
STOP_S: Final = 30.0
COMMAND_S: Final = 60.0


def pattern(number: int, size: int) -> bytes:
    """Return bytes that differ from block to block and from number to number."""
    return random.Random(number).randbytes(size)


@dataclass(frozen=True)
class Ran:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Served:
    """One volume, `web` unless it says otherwise, and its process while it is served."""

    folder: Path
    origin: Path
    name: str = "web"
    process: subprocess.Popen[str] | None = None
    ready: dict[str, Any] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"STILLBLOCK_STATE": str(self.folder / "s"), "NO_COLOR": "1"}

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def socket(self) -> str:
        """The socket it said, when it was started last, that NBD clients can use."""
        return str(self.ready["serve"]["nbd_sockets"][0])

    @contextmanager
    def session(self) -> Iterator[Session]:
        """What the commands use, without a process for each."""
        with open_session(Config.load(state_dir=self.folder / "s"), self.name) as session:
            yield session

    def uri(self, snapshot: str | None = None) -> str:
        export = self.name if snapshot is None else f"{self.name}@{snapshot}"
        return f"nbd+unix:///{export}?socket={self.socket}"

    def try_cli(self, *words: str) -> Ran:
        """Run a command of ours as a user does, whatever comes of it."""
        ran = subprocess.run(
            [sys.executable, "-m", "stillblock", *words],
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        return Ran(code=ran.returncode, out=ran.stdout, err=ran.stderr)

    def here(self, *words: str) -> Ran:
        """Run a command of ours in this process, without the time that Python takes to start.

        It has to succeed.
        """
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = run_command([*words, "--state-dir", str(self.folder / "s")])
        ran = Ran(code=code, out=out.getvalue(), err=err.getvalue())
        assert code == 0, f"stillblock {' '.join(words)}: exit {code}\n{ran.out}{ran.err}"
        return ran

    def cli(self, *words: str) -> Ran:
        """Run a command of ours; it has to succeed."""
        ran = self.try_cli(*words)
        assert ran.code == 0, f"stillblock {' '.join(words)}: exit {ran.code}\n{ran.out}{ran.err}"
        return ran

    def snapshot(self, name: str, *terms: str) -> None:
        self.cli("snapshot", "create", f"{self.name}@{name}", *terms)

    def start(self, *words: str) -> Self:
        """Start serving; clients can come when this returns."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stillblock", "serve", self.name, "--json", *words],
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            _, words_of_it = self.process.communicate(timeout=STOP_S)
            raise AssertionError(f"the server ended at once: {words_of_it}")
        self.ready = json.loads(line)
        assert self.ready["kind"] == "ready"
        return self

    def kill(self) -> None:
        """End it as the machine's owner does who has lost patience."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=STOP_S)
        self.process = None

    def stop(self) -> Ran:
        """End it as Ctrl-C does; the origin is complete afterwards."""
        assert self.process is not None
        process, self.process = self.process, None
        process.terminate()
        out, err = process.communicate(timeout=STOP_S)
        return Ran(code=process.returncode, out=out, err=err)

    def drop_buffer(self) -> None:
        """Remove what a kill left in memory for a next server, 64 MiB, when there will be none."""
        uuid, _, _, _ = native.peek(self.store)
        for folder in (os.environ.get("XDG_RUNTIME_DIR"), "/dev/shm"):
            if folder:
                (Path(folder) / f"stillblock-{uuid}.buffer").unlink(missing_ok=True)

    def client(self, snapshot: str | None = None) -> NbdClient:
        export = self.name if snapshot is None else f"{self.name}@{snapshot}"
        return NbdClient(socket_path=self.socket, export=export)

    def read(self, snapshot: str | None = None) -> bytes:
        """Return all of an export."""
        with self.client(snapshot) as client:
            return client.pread(offset=0, length=client.size_bytes)


@contextmanager
def volume(
    content: bytes, *words: str, name: str = "web", parent: Path | None = None
) -> Iterator[Served]:
    """A volume with this content; whatever serves it at the end is killed."""
    # Not pytest's directory: a Unix socket's path has room for 107 bytes.
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sb-"))
        beside = stack.enter_context(tempfile.TemporaryDirectory(prefix="sb-", dir=parent))
        origin = Path(beside) / "disk.img"
        origin.write_bytes(content)
        yield stack.enter_context(volume_of(origin, folder, *words, name=name))


@contextmanager
def volume_of(origin: Path, folder: str, *words: str, name: str = "web") -> Iterator[Served]:
    """A volume of a disk that is there."""
    made = Served(folder=Path(folder), origin=origin, name=name)
    store = str(made.store)
    made.cli("volume", "add", name, "--origin", str(origin), "--store", store, *words)
    try:
        yield made
    finally:
        if made.process is not None:
            made.kill()
        made.drop_buffer()


def run(*words: str, timeout: float = COMMAND_S) -> Ran:
    """Run a client; it has to succeed."""
    ran = try_run(*words, timeout=timeout)
    assert ran.code == 0, f"{' '.join(words)}: exit {ran.code}\n{ran.out}{ran.err}"
    return ran


def try_run(*words: str, timeout: float = COMMAND_S) -> Ran:
    """Run a client, whatever comes of it."""
    ran = subprocess.run(
        list(words),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Ran(code=ran.returncode, out=ran.stdout, err=ran.stderr)
