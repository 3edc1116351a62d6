"""Steps through the library, each in a fresh process (bench/memory_probe.py, words_probe.py)."""

import sys
from pathlib import Path

from bench import fields
from bench.process import run_tool

REPOSITORY = Path(__file__).resolve().parent.parent
STEP_TIMEOUT_S = 1800.0


def run_probe(step: str, store: Path, *rest: str) -> dict[str, float]:
    """Do one step on a volume and return its figures; raise PeerError like `run_module`."""
    return run_module("bench.memory_probe", step, str(store), *rest)


def run_module(module: str, *words: str) -> dict[str, float]:
    """Run a module that prints figures; raise PeerError with the process's last words."""
    command = [sys.executable, "-m", module, *words]
    printed = run_tool(command, timeout_s=STEP_TIMEOUT_S, directory=REPOSITORY)
    return fields.numbers(printed, module)
