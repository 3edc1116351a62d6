"""A server process with everything it starts: its CPU time, its memory, its end."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.errors import PeerError

TERM_LIMIT_S = 20.0
KILL_LIMIT_S = 5.0
POLL_S = 0.01
LOG_TAIL_BYTES = 600


def run_tool(
    command: Sequence[str], *, timeout_s: float = 600.0, directory: Path | None = None
) -> str:
    """Run a program to its end and return what it printed; raise PeerError with its last words."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=directory,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"{command[0]}: no end within {timeout_s:.0f} s") from error
    if done.returncode:
        said = " | ".join((done.stderr or done.stdout).splitlines()[-3:])
        raise PeerError(f"{command[0]}: exit {done.returncode}: {said[-LOG_TAIL_BYTES:]}")
    return done.stdout


def tail(log: Path) -> str:
    """The last lines of a log, on one line, for an error message."""
    with contextlib.suppress(OSError):
        lines = log.read_bytes()[-LOG_TAIL_BYTES:].splitlines()[-3:]
        return b" | ".join(lines).decode("utf-8", "replace")
    return ""


class ServerProcess:
    """A server in a session of its own, so that wrappers and helpers count and stop with it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        with log.open("ab") as sink:
            self._child = subprocess.Popen(
                command,
                env=None if environment is None else {**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    def exit_code(self) -> int | None:
        """None while the first process runs."""
        return self._child.poll()

    def members(self) -> list[int]:
        """The living processes of the session."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    stat = _stat(int(entry.name))
                    if int(stat[3]) == self._child.pid and stat[0] != "Z":
                        found.append(int(entry.name))
        return found

    def cpu_s(self) -> float:
        """CPU seconds so far: of living processes by their own clocks, of ended helpers by clock
        ticks.

        /proc counts ticks of 10 ms, too coarse for a workload of a second; a process clock counts
        nanoseconds.
        """
        total_s = 0.0
        for pid in self.members():
            with contextlib.suppress(OSError):
                total_s += time.clock_gettime(_process_clock(pid))
                stat = _stat(pid)
                total_s += (int(stat[13]) + int(stat[14])) / os.sysconf("SC_CLK_TCK")
        return total_s

    def pss_kib(self) -> float:
        """Proportional set size; what the processes do not map (a closed memfd) is not seen."""
        return sum(pss_kib(pid) for pid in self.members())

    def peak_rss_kib(self) -> float:
        """The highest resident size of each process so far, added up."""
        total_kib = 0.0
        for pid in self.members():
            with contextlib.suppress(OSError):
                total_kib += _kib_of(Path(f"/proc/{pid}/status"), "VmHWM:")
        return total_kib

    def stop(self) -> None:
        """End the session: politely, then by force."""
        for number, limit_s in ((signal.SIGTERM, TERM_LIMIT_S), (signal.SIGKILL, KILL_LIMIT_S)):
            for pid in self.members():
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
            deadline = time.monotonic() + limit_s
            while self.members() and time.monotonic() < deadline:
                self._child.poll()
                time.sleep(POLL_S)
        self._child.wait()


def pss_kib(pid: int) -> float:
    """Proportional set size of one process; 0 if it is gone."""
    with contextlib.suppress(OSError):
        return _kib_of(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")
    return 0.0


def _kib_of(path: Path, key: str) -> float:
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return float(line.split()[1])
    return 0.0


def _process_clock(pid: int) -> int:
    # clock_getcpuclockid(3) as the kernel defines it: CPUCLOCK_SCHED of the whole process.
    return (~pid << 3) | 2


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the command's name, which may hold blanks and brackets."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
