"""What was frozen when server and guards were killed together, thawed by the next server.

A guard outlives the server, and others outlive a guard; but a service manager can kill all of them
at once. So what is going to be frozen is written down before, beside the sockets, and the note goes
away with the thaw.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stillblock.consistency import agent, guard

_LOG: Final = logging.getLogger("stillblock.consistency")
_AGENT_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """What may be frozen."""

    mounts: tuple[str, ...] = ()
    agent: str | None = None


def note(path: Path, frozen: Frozen) -> None:
    """Write down what is going to be frozen; it need not survive the machine, which thaws all."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"mounts": frozen.mounts, "agent": frozen.agent}))
    fresh.replace(path)


def forget(path: Path) -> None:
    """Nothing is frozen any more."""
    path.unlink(missing_ok=True)


def thaw(path: Path) -> tuple[str, ...]:
    """Thaw what a note tells of, which nobody else can be at work on; return what was frozen.

    A note that cannot be read is of no use to anybody, and goes.
    """
    try:
        found = json.loads(path.read_text())
        mounts, socket = [str(m) for m in found["mounts"]], found["agent"]
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        _LOG.warning("note of frozen filesystems not read: path=%s: %s", path, error)
        forget(path)
        return ()
    thawed = [mount for mount in mounts if _thaw_mount(mount)]
    if isinstance(socket, str):
        problem = agent.thaw(socket, for_s=_AGENT_S)
        if problem:
            _LOG.warning("guest not known to be thawed: agent=%s: %s", socket, problem)
        else:
            thawed.append(socket)
    forget(path)
    return tuple(thawed)


def _thaw_mount(mount: str) -> bool:
    try:
        fd = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False  # it is gone, and a filesystem that is not mounted is not frozen
    try:
        return guard.thaw(fd) == 0
    finally:
        os.close(fd)
