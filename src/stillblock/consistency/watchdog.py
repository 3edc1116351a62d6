"""Start a program that outlives us, and talk with it: the server's end of the three programs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stillblock.errors import QuiesceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MESSAGE_BYTES_MAX: Final = 128 * 1024
"""Less than a Unix socket takes in one packet."""
REPLY_S: Final = 2.0
"""How long after its limit one that freezes may take to say so, on a busy machine."""
THAW_REPLY_S: Final = 15.0
"""How long one may take to thaw when asked."""
_START_S: Final = 30.0
"""A Python that starts on a very busy machine; the program's own limit begins afterwards."""
_HERE: Final = Path(__file__).parent


class Watchdog:
    """A program of this package in a process of its own; its socket's end tells it that we died."""

    def __init__(
        self,
        program: str,
        words: Sequence[str],
        *,
        fds: tuple[int, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it; in front of the words stands its end of the socket."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        self.is_gone = False
        command = [sys.executable, "-I", "-S", str(_HERE / program), str(theirs.fileno()), *words]
        try:
            subprocess.run(
                command,
                cwd="/",
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *fds),
                start_new_session=True,
                timeout=_START_S,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            ours.close()
            raise QuiesceError(f"the watchdog {program} did not start: {error}") from error
        finally:
            theirs.close()

    def send(self, **message: object) -> None:
        """Tell it something; what it had to say before it went can still be received."""
        try:
            self._socket.sendall(json.dumps(message).encode())
        except OSError:
            pass  # receive() meets the end

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the next message; None when it is gone (`is_gone`) or says nothing in time."""
        deadline = time.monotonic() + timeout_s
        while (rest_s := deadline - time.monotonic()) > 0:
            self._socket.settimeout(rest_s)
            try:
                data = self._socket.recv(MESSAGE_BYTES_MAX)
            except TimeoutError:
                return None
            except ConnectionResetError:
                continue  # it went without reading what we sent; what it sent is still there
            if not data:
                self.is_gone = True
                return None
            found: dict[str, Any] = json.loads(data)
            return found
        return None

    def close(self) -> None:
        """End the conversation; if it has something to undo, it does so now."""
        self._socket.close()
