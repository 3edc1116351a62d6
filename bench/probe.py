"""Steps on a volume through the library, each in a fresh process (see bench/memory_probe.py)."""

import json
import sys
from pathlib import Path

from bench import fields
from bench.process import run_tool

REPOSITORY = Path(__file__).resolve().parent.parent
STEP_TIMEOUT_S = 1800.0


def run_probe(step: str, store: Path, *rest: str) -> dict[str, float]:
    """Do one step and return its figures; raise PeerError with the process's last words."""
    command = [sys.executable, "-m", "bench.memory_probe", step, str(store), *rest]
    printed = run_tool(command, timeout_s=STEP_TIMEOUT_S, directory=REPOSITORY)
    body = fields.mapping(json.loads(printed), "memory probe")
    return {key: fields.number(value, key) for key, value in body.items()}
