"""A command line run in this process, and a serve process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from serving import Ran
from stillblock.cli import main

READY_S = 20.0
DISK_BYTES = 1024 * 1024


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STILLBLOCK_STATE", str(tmp_path / "s"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "s"


@pytest.fixture
def run(state: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`run("volume", "list")` returns the exit code and both outputs."""

    def runner(*words: str) -> Ran:
        capfd.readouterr()
        code = main(words)
        captured = capfd.readouterr()
        return Ran(code=code, out=captured.out, err=captured.err)

    return runner


@pytest.fixture
def web(run: Callable[..., Ran], tmp_path: Path) -> Path:
    """A volume `web`; its origin's path."""
    origin = tmp_path / "disk.img"
    origin.write_bytes(b"monday!!" * (DISK_BYTES // 8))
    assert run("volume", "add", "web", "--origin", str(origin)).code == 0
    return origin


@pytest.fixture
def serving(state: Path) -> Callable[..., Any]:
    """`with serving("web") as (process, lines)`: a serve process that is ready."""

    @contextmanager
    def serve(*words: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
        process = subprocess.Popen(
            [sys.executable, "-m", "stillblock", "serve", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "STILLBLOCK_STATE": str(state)},
        )
        try:
            yield process, [_first_line(process)]
        finally:
            if process.poll() is None:
                process.terminate()
            process.communicate(timeout=READY_S)

    return serve


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + READY_S
    line = process.stdout.readline()
    assert line, f"the server ended: {process.communicate()[1]}"
    assert time.monotonic() < deadline
    return line.rstrip("\n")
