"""The demo's terminal: a directory and state of its own, the commands it types, the server."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from stillblock.demo.disk import e2fsprogs
from stillblock.demo.narration import Narrator

START_TIMEOUT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 20.0
COMMAND_TIMEOUT_S: Final = 120.0
POLL_S: Final = 0.02


class DemoFailed(Exception):  # noqa: N818 - what did not hold, for the user to read
    """A command failed, or a proof did not hold. The message is a whole sentence."""


class Session:
    """Runs commands in the demo's directory, and shows them first."""

    def __init__(self, *, folder: Path, narrator: Narrator) -> None:
        self.folder = folder
        self._narrator = narrator
        self._environment = os.environ | {
            "STILLBLOCK_STATE": str(folder / "state"),
            # What the commands print is read or shown line by line.
            "COLUMNS": "400",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def shell(self, words: Sequence[str], *, note: str = "", is_shown: bool = True) -> str:
        """Run any command; return what it printed. It must succeed."""
        if is_shown:
            self._narrator.command(words, note=note)
        found = shutil.which(words[0])
        program = found or e2fsprogs(words[0])
        return self._run([program, *words[1:]], words)

    def stillblock(self, *words: str, note: str = "", is_shown: bool = True) -> str:
        """Run one of our own commands as the user types it; return what it printed."""
        if is_shown:
            self._narrator.command(["stillblock", *words], note=note)
        return self._run([*self._ourselves(), *words], ["stillblock", *words])

    def ask(self, *words: str) -> dict[str, Any]:
        """Run one of our own commands with `--json`, unshown; return the document."""
        shown = ["stillblock", *words, "--json"]
        text = self._run([*self._ourselves(), *words, "--json"], shown)
        try:
            document: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise DemoFailed(f"`{' '.join(shown)}` printed no JSON document: {error}") from error
        return document

    def start(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command that runs beside what follows."""
        self._narrator.command(words, is_beside=True)
        return subprocess.Popen(
            list(words), cwd=self.folder, env=self._environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    @contextlib.contextmanager
    def server(self, volume: str) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
        """Serve the volume from a process of its own; yield it and its NBD socket's path."""
        self._narrator.command(["stillblock", "serve", volume], is_beside=True)
        log = self.folder / "serve.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self._ourselves(), "serve", volume], cwd=self.folder, env=self._environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            yield process, self._wait_for_socket(process, volume=volume, log=log)
        finally:
            stop(process)

    def _wait_for_socket(
        self, process: "subprocess.Popen[bytes]", *, volume: str, log: Path
    ) -> str:
        pattern = re.compile(rf"nbd\+unix:///{re.escape(volume)}\?socket=(\S+)")
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            text = log.read_text(errors="replace")
            if (found := pattern.search(text)) and text.endswith("\n"):
                self._narrator.output(found.group())
                return urllib.parse.unquote(found.group(1))
            if process.poll() is not None:
                raise DemoFailed(f"the server stopped at once: {text.strip() or 'it said nothing'}")
            time.sleep(POLL_S)
        raise DemoFailed(f"the server was not ready after {START_TIMEOUT_S:.0f} s")

    @staticmethod
    def _ourselves() -> list[str]:
        # -P: the directory the demo runs in holds a copy of Python's library; never import it.
        return [sys.executable, "-P", "-m", "stillblock"]

    def _run(self, command: Sequence[str], shown: Sequence[str]) -> str:
        try:
            ran = subprocess.run(
                list(command), cwd=self.folder, env=self._environment, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise DemoFailed(
                f"`{' '.join(shown)}` did not end within {COMMAND_TIMEOUT_S:.0f} s"
            ) from error
        if ran.returncode:
            words = ran.stderr.strip() or ran.stdout.strip() or "it said nothing"
            raise DemoFailed(f"`{' '.join(shown)}` failed with exit {ran.returncode}: {words}")
        return ran.stdout


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process that we started: ask, wait, then insist."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
