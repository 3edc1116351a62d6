"""Run a volume's hooks before and after an instant: a program of its own.

    python -I -S hooks.py CONTROL_FD DIRECTORY LIMIT_MS HOLD_MS

Each executable of the directory is run in the order of the names with the word `before`, and in the
reverse order with `after`: when the server asks, when the server is gone, when HOLD_MS have passed.
A hook whose `before` was begun gets its `after`, also if it failed. The environment says which
volume and snapshot. A hook that takes longer than LIMIT_MS is killed with all its children that
stayed in its session.

To the server: `{"step": name, "phase": word, "took_ns": n, "problem": text, "said": text}` for each
run, `{"ready": true}`, `{"holding": true}` when asked with the word `hold`, then before the first
`after` `{"ending": monotonic_ns, "why": word}`, and after the last one
`{"done": monotonic_ns, "why": word}`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

SAID_BYTES_MAX = 4096
"""Of a hook's output so much is kept: the end."""
SETTINGS = "settings"
"""A file of `NAME=value` lines in the directory, for the hooks' environment."""
_HOOKS_MAX = 64
_MESSAGE_BYTES = 256
_POLL_S = 0.02
_DRAIN_TIMES = 64
"""A hook that never stops to talk must not keep us from looking at the clock."""
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class HooksError(Exception):
    """The directory is not what it should be."""


def find(directory: Path) -> list[Path]:
    """Return the hooks in order; raise `HooksError` if others than their owner could change them.

    They run with the server's rights.
    """
    try:
        entries = sorted(directory.iterdir())
        _check_owner(directory)
        found = []
        for entry in entries:
            if entry.name.startswith(".") or not entry.is_file():
                continue
            if entry.name == SETTINGS or os.access(entry, os.X_OK):
                _check_owner(entry)
            if entry.name != SETTINGS and os.access(entry, os.X_OK):
                found.append(entry)
    except OSError as error:
        raise HooksError(f"hooks in {directory}: {error.strerror}") from error
    if not found:
        raise HooksError(f"there is no executable in the hook directory {directory}")
    if len(found) > _HOOKS_MAX:
        raise HooksError(f"{directory} has {len(found)} hooks, {_HOOKS_MAX} may be")
    return found


def _check_owner(path: Path) -> None:
    status = path.stat()
    if status.st_uid not in {0, os.geteuid()} or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise HooksError(
            f"{path} can be changed by others than its owner, and hooks run with the server's "
            f"rights: chown it to the server's user and chmod go-w {path}"
        )


def settings(directory: Path) -> dict[str, str]:
    """Return what the settings file says; raise `HooksError` for a line that is none."""
    path = directory / SETTINGS
    if not path.is_file():
        return {}
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise HooksError(f"{path} line {number} is not NAME=value: {text[:80]}")
        found[name] = value
    return found


def run(hook: Path, phase: str, environment: dict[str, str], limit_ms: int) -> dict[str, object]:
    """Run one hook; return its message for the server."""
    begun_ns = time.monotonic_ns()
    deadline_ns = begun_ns + limit_ms * 1_000_000
    said, problem = b"", ""
    out, out_in = os.pipe()
    os.set_blocking(out, False)
    try:
        process = subprocess.Popen(
            [str(hook), phase],
            cwd="/",
            env={**environment, "STILLBLOCK_PHASE": phase},
            stdin=subprocess.DEVNULL,
            stdout=out_in,
            stderr=out_in,
            start_new_session=True,
        )
    except OSError as error:
        process, problem = None, f"it did not start: {error.strerror}"
    os.close(out_in)
    while process is not None:
        is_over = process.poll() is not None
        # Its children may keep the pipe open for longer; what ends is the hook.
        said = (said + _drain(out))[-SAID_BYTES_MAX:]
        if is_over:
            if process.returncode != 0:
                problem = f"it ended with {process.returncode}"
            break
        if time.monotonic_ns() >= deadline_ns:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            said = (said + _drain(out))[-SAID_BYTES_MAX:]
            problem = f"it took longer than {limit_ms} ms and was killed"
            break
        time.sleep(_POLL_S)
    os.close(out)
    return {
        "step": hook.name,
        "phase": phase,
        "took_ns": time.monotonic_ns() - begun_ns,
        "problem": problem,
        "said": said.decode(errors="replace").strip(),
    }


def _drain(out: int) -> bytes:
    data = b""
    for _ in range(_DRAIN_TIMES):
        try:
            piece = os.read(out, SAID_BYTES_MAX)
        except BlockingIOError:
            return data
        data = (data + piece)[-SAID_BYTES_MAX:]
        if not piece:
            break
    return data


def run_after(
    hooks: list[Path], environment: dict[str, str], limit_ms: int
) -> list[dict[str, object]]:
    """Run the hooks with `after`, the last first; one that fails does not keep others from it."""
    return [run(hook, "after", environment, limit_ms) for hook in reversed(hooks)]


def _tell(control: int, **message: object) -> None:
    try:
        os.write(control, json.dumps(message).encode())
    except OSError:
        pass  # the server is gone, which the end of the socket tells too


def _hold(control: int, until_s: float) -> str:
    """Wait; return why it is over."""
    while select.select([control], [], [], max(0.0, until_s - time.monotonic()))[0]:
        said = os.read(control, _MESSAGE_BYTES)
        if b'"hold"' not in said:
            return "asked" if said else "the server was gone"
        _tell(control, holding=True)
    return "the limit had passed"


def main(control: int, directory: Path, limit_ms: int, hold_ms: int) -> None:
    """Run `before`, wait, run `after`."""
    if os.fork():
        os._exit(0)
    os.setsid()
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    begun: list[Path] = []
    environment = dict(os.environ)
    why = ""
    try:
        environment |= settings(directory)
        for hook in find(directory):
            begun.append(hook)
            _tell(control, starts=hook.name)
            message = run(hook, "before", environment, limit_ms)
            _tell(control, **message)
            if message["problem"]:
                why = "a hook failed"
                break
    except HooksError as error:
        why = str(error)
    if not why:
        _tell(control, ready=True)
        why = _hold(control, time.monotonic() + hold_ms / 1000)
    ended_ns = time.monotonic_ns()
    _tell(control, ending=ended_ns, why=why)
    for message in run_after(begun, environment, limit_ms):
        _tell(control, **message)
    _tell(control, done=ended_ns, why=why)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
