"""The command line: a file for each noun; results on standard output, all else on error."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    from stillblock.cli.running import run  # noqa: PLC0415 - importing the package stays cheap

    return run(arguments)
