"""Freeze a guest through its QEMU guest agent, and thaw it whatever happens: a program of its own.

    python -I -S agent.py CONTROL_FD SOCKET LIMIT_MS [MOUNT...]

An agent has one client at a time, so whoever freezes has to be the one who thaws: this process. It
thaws when the server asks, when the server is gone, and when the limit has passed; if it is killed,
the server thaws with a connection of its own. The guest is a stranger: it may not answer, answer
late, or answer nonsense. Whatever it says before it has repeated the number we sent it last belongs
to an earlier conversation (`guest-sync-delimited`, QEMU's qga/qapi-schema.json).

Messages are those of guard.py; `frozen` comes with `count`, the number of filesystems.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import select
import signal
import socket
import sys
import time

_DELIMITER = b"\xff"
_REPLY_BYTES_MAX = 1 << 16
_PIECE_BYTES = 4096
_THAW_FOR_S = 600.0
"""How long an agent that does not answer is asked to thaw; its guest is dead or rebooted then."""
_THAW_TRY_S = 5.0
_RETRY_S = 0.2
_MESSAGE_BYTES = 256
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)


class AgentError(Exception):
    """The agent refused, or said something that is no answer."""


class Agent:
    """A conversation with a guest agent. Every call ends by its deadline (monotonic seconds)."""

    def __init__(self, path: str, *, deadline_s: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(_left(deadline_s))
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise
        self._rest = b""

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def synchronize(self, *, deadline_s: float) -> None:
        """Make sure that the next answer is to our next question."""
        number = secrets.randbelow(1 << 31)
        # The delimiter in front ends whatever somebody left half said.
        self._send("guest-sync-delimited", {"id": number}, deadline_s, before=_DELIMITER)
        while True:
            self._read_past_delimiter(deadline_s)
            try:
                if self._answer(deadline_s) == number:
                    return
            except AgentError:
                continue  # an answer to the half sentence, or to somebody else

    def call(
        self, name: str, arguments: dict[str, object] | None = None, *, deadline_s: float
    ) -> object:
        """Ask, and return the answer; raise `AgentError`, or `TimeoutError`."""
        self._send(name, arguments or {}, deadline_s)
        return self._answer(deadline_s)

    def _send(
        self, name: str, arguments: dict[str, object], deadline_s: float, *, before: bytes = b""
    ) -> None:
        question: dict[str, object] = {"execute": name}
        if arguments:
            question["arguments"] = arguments
        self._socket.settimeout(_left(deadline_s))
        self._socket.sendall(before + json.dumps(question).encode() + b"\n")

    def _more(self, deadline_s: float) -> None:
        self._socket.settimeout(_left(deadline_s))
        data = self._socket.recv(_PIECE_BYTES)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "the guest agent hung up")
        self._rest += data

    def _read_past_delimiter(self, deadline_s: float) -> None:
        while _DELIMITER not in self._rest:
            self._rest = b""
            self._more(deadline_s)
        self._rest = self._rest.rpartition(_DELIMITER)[2]

    def _answer(self, deadline_s: float) -> object:
        while b"\n" not in self._rest:
            if len(self._rest) > _REPLY_BYTES_MAX:
                raise AgentError(f"the guest agent's answer is longer than {_REPLY_BYTES_MAX}")
            self._more(deadline_s)
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            said = json.loads(line.rpartition(_DELIMITER)[2])
        except (ValueError, RecursionError) as error:
            raise AgentError(f"the guest agent's answer is no JSON: {line[:80]!r}") from error
        if isinstance(said, dict) and "return" in said:
            return said["return"]
        described = said.get("error") if isinstance(said, dict) else None
        words = described.get("desc") if isinstance(described, dict) else None
        raise AgentError(f"the guest agent refused: {str(words or line[:200])[:200]}")


def _left(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError(errno.ETIMEDOUT, "the guest agent did not answer in time")
    return left_s


def freeze(agent: Agent, mounts: list[str], *, deadline_s: float) -> int:
    """Freeze all filesystems of the guest, or those named; return how many were. Synchronized."""
    if mounts:
        arguments: dict[str, object] = {"mountpoints": mounts}
        count = agent.call("guest-fsfreeze-freeze-list", arguments, deadline_s=deadline_s)
    else:
        count = agent.call("guest-fsfreeze-freeze", deadline_s=deadline_s)
    if not isinstance(count, int):
        raise AgentError(f"the guest agent did not say how many it froze: {count!r:.80}")
    return count


def thaw(path: str, agent: Agent | None = None, *, for_s: float = _THAW_FOR_S) -> str:
    """Thaw the guest, by this conversation or a new one; return what hinders, empty if thawed.

    An answer alone is not believed: the agent has to say that it is thawed.
    """
    until_s = time.monotonic() + for_s
    problem = "it was not asked"
    while time.monotonic() < until_s:
        deadline_s = min(until_s, time.monotonic() + _THAW_TRY_S)
        try:
            if agent is None:
                agent = Agent(path, deadline_s=deadline_s)
            agent.synchronize(deadline_s=deadline_s)
            agent.call("guest-fsfreeze-thaw", deadline_s=deadline_s)
            status = agent.call("guest-fsfreeze-status", deadline_s=deadline_s)
            if status == "thawed":
                agent.close()
                return ""
            problem = f"the guest agent says it is {status!r:.40}"
        except AgentError as error:
            problem = str(error)
        except OSError as error:
            problem = error.strerror or str(error)
            if agent is not None and not isinstance(error, TimeoutError):
                agent.close()
                agent = None
        time.sleep(_RETRY_S)
    if agent is not None:
        agent.close()
    return problem


def _detach() -> None:
    if os.fork():
        os._exit(0)
    os.setsid()
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)


def _tell(control: int, **message: object) -> None:
    try:
        os.write(control, json.dumps(message).encode())
    except OSError:
        pass  # the server is gone, which the end of the socket tells too


def main(control: int, path: str, limit_ms: int, mounts: list[str]) -> None:
    """Freeze, wait, thaw."""
    deadline_s = time.monotonic() + limit_ms / 1000
    _detach()
    agent, problem, count, is_asked = None, "", 0, False
    begun_ns = time.monotonic_ns()
    try:
        agent = Agent(path, deadline_s=deadline_s)
        begun_ns = time.monotonic_ns()
        agent.synchronize(deadline_s=deadline_s)
        is_asked = True
        count = freeze(agent, mounts, deadline_s=deadline_s)
    except (OSError, AgentError) as error:
        problem = str(error.strerror or error) if isinstance(error, OSError) else str(error)
    if problem or count == 0:
        _tell(control, failed=problem or "the guest agent froze no filesystem")
        # It may have frozen some, or may still come to it.
        if agent is not None and is_asked:
            thaw(path, agent)
        return
    _tell(control, frozen=begun_ns, count=count)
    why = "the limit had passed"
    rest_s = max(0.0, deadline_s - time.monotonic())
    if select.select([control], [], [], rest_s)[0]:
        why = "asked" if os.read(control, _MESSAGE_BYTES) else "the server was gone"
    thawing_ns = time.monotonic_ns()
    _tell(control, thawing=thawing_ns, why=why)
    problem = thaw(path, agent)
    _tell(control, thawed=thawing_ns, why=why, problem=problem)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
