"""Write docs/cli.md from the program: `python -m stillblock.cli.reference > docs/cli.md`.

A test compares the two, so the page cannot fall behind.
"""

from __future__ import annotations

import re
import sys
from typing import Final

from stillblock.cli.app import build
from stillblock.errors import ExitCode

_MEANINGS: Final = {
    ExitCode.OK: "done",
    ExitCode.FAILED: "failed; the message says why and what now",
    ExitCode.USAGE: "the request makes no sense, or needs `--yes`; nothing was done",
    ExitCode.PARTIAL: "done in part, or with a warning",
    ExitCode.DAMAGE: "damage was found",
    ExitCode.NO_REPOSITORY: "no such repository",
    ExitCode.LOCKED: "another process has it open; try again later",
    ExitCode.KEY: "the key or password is wrong or missing",
    ExitCode.SNAPSHOT_LOST: "the snapshot lost something it should hold",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
}
_INTRODUCTION: Final = """# Command line

Made from the program by `python -m stillblock.cli.reference > docs/cli.md`; do not edit.

## What holds everywhere

- A `REF` is `VOL`, `VOL@SNAP` or `VOL@SNAP+CLONE`. `VOL@latest` is the newest snapshot, safety
  snapshots of restores aside. `REF:/path` is a file in it, `REF:NAME:/path` in one filesystem of
  several: NAME is a label, a uuid, a partition's number or `vg/lv`. Snapshots and bookmarks are
  also found by the first four or more digits of their id.
- Names are 1 to 64 of `A-Z a-z 0-9 . _ -` and start with a letter or digit.
- Sizes are bytes (`4096`), in units of 1024 (`64K`, `4GiB`) or sectors of 512 bytes (`512s`).
- `--state-dir PATH`: where the list of volumes and, by default, their stores are. Else
  `$STILLBLOCK_STATE`, else `/var/lib/stillblock` for root, else `stillblock` in the XDG state home.
- `--json`: one JSON object on standard output, `{"schema": "stillblock/1", "kind": ...}`; one a
  line for long work and for events. Sizes are integers, in bytes. Fields are only ever added. An
  error is `{"kind": "error", "error": {...}}` on standard error.
- `--quiet`: results only.
- `--yes`, `--dry-run`: what destroys or overwrites prints its plan and asks on a terminal; without
  a terminal it needs `--yes`. `--dry-run` prints the plan and does nothing.
- `--force` means only: although it is in use.
- Progress is on standard error, when that is a terminal. `NO_COLOR` is honoured.
  `STILLBLOCK_DEBUG=1` shows tracebacks.

| exit code | meaning |
| --- | --- |
"""
_SHARED: Final = re.compile(r"^\* `--(state-dir PATH|json|quiet|yes|dry-run)`: .*\n", re.MULTILINE)


def reference() -> str:
    """Return the page."""
    codes = "".join(f"| {int(code)} | {meaning} |\n" for code, meaning in _MEANINGS.items())
    page = build().generate_docs(heading_level=1, usage_name="stillblock")
    _, _, commands = page.partition("\n## stillblock serve\n")
    commands = _SHARED.sub("", "\n## stillblock serve\n" + commands)
    commands = re.sub(r"^\*\*Common options\*\*:\n\n?", "", commands, flags=re.MULTILINE)
    commands = commands.replace("RULETERM...", "TERM")
    # cyclopts names the module that Python was started with, not the program, below the root.
    commands = re.sub(r"^(stillblock [a-z ]+) -m [\w.]+ ?", r"\1 ", commands, flags=re.MULTILINE)
    commands = re.sub(r" *\n", "\n", commands)
    commands = re.sub(r"\n{3,}", "\n\n", commands)
    return _INTRODUCTION + codes + commands.rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
