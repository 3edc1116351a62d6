"""Finding the programs that hold still for us, to kill them, and waiting for what they do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

WAIT_S = 20.0


def running(program: str) -> list[int]:
    """The processes of a program of stillblock.consistency: guard.py, agent.py, hooks.py."""
    wanted = f"consistency/{program}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and is_alive(int(entry.name)):
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(word.endswith(wanted) for word in words):
                found.append(int(entry.name))
    return sorted(found)


def status_of(pid: int) -> list[str]:
    """State, parent and what follows them in /proc/PID/stat."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def is_alive(pid: int) -> bool:
    try:
        return status_of(pid)[0] != "Z"
    except OSError:
        return False


def wait_until(is_so: Callable[[], bool], timeout_s: float = WAIT_S) -> bool:
    """Wait until it is so; false if it is not for too long."""
    until = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def wait_gone(pids: list[int], timeout_s: float = WAIT_S) -> bool:
    """Wait until none of them is left; false if one is for too long."""
    return wait_until(lambda: not any(is_alive(pid) for pid in pids), timeout_s)
