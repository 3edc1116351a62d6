"""QEMU's machine protocol, as far as taking and dropping snapshots needs it."""

import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from bench import fields
from bench.errors import PeerError

CONNECT_TIMEOUT_S = 5.0
JOB_TIMEOUT_S = 600.0


class Qmp:
    """A monitor connection; commands are answered in order, events are kept until waited for."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(JOB_TIMEOUT_S)
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    self._socket.close()
                    raise PeerError("qemu-storage-daemon: no monitor answers") from error
                time.sleep(0.01)
        self._stream = self._socket.makefile("rw", encoding="utf-8")
        self._events: list[Mapping[str, object]] = []
        self._message()
        self.call("qmp_capabilities", {})

    def call(self, command: str, arguments: Mapping[str, object]) -> object:
        """Run one command and return its answer; raise PeerError with QEMU's reason."""
        self._stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._stream.flush()
        while True:
            message = self._message()
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                reason = fields.mapping(message["error"], "error").get("desc")
                raise PeerError(f"{command}: {reason}")
            else:
                return message.get("return")

    def wait_event(self, name: str) -> Mapping[str, object]:
        """The next event of that name, with its data."""
        while True:
            for index, event in enumerate(self._events):
                if event["event"] == name:
                    return fields.mapping(self._events.pop(index).get("data", {}), name)
            self._events.append(self._message())

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

    def _message(self) -> Mapping[str, object]:
        line = self._stream.readline()
        if not line:
            raise PeerError("qemu-storage-daemon closed its monitor")
        return fields.mapping(json.loads(line), "monitor message")
