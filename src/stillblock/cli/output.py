"""What commands print: results for people or as JSON, remarks and questions on standard error."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stillblock import codec
from stillblock.errors import (
    Blame,
    CancelledError,
    ConfirmationNeededError,
    StillblockError,
)
from stillblock.model import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from stillblock.cli.options import Change, Common
    from stillblock.model import LeftOut, RuleTerm, TermOutcome
    from stillblock.operations.held import Held

_WIDE = 4000
"""Columns for output that goes to a file or a pipe: nothing is wrapped or cut there."""
_LEFT_OUT_SHOWN_MAX = 8
_REASONS_SHOWN_MAX = 8
DEFAULT_TOLD = (
    "free space and swap are left out; `stillblock rules set {volume} --all` keeps everything"
)


class OutputError(StillblockError):
    """Standard output does not take what it is given."""

    code = "output"
    blame = Blame.PEER


class Output:
    """Where one command prints."""

    def __init__(self, common: Common) -> None:
        self.is_json = common.json
        self.is_quiet = common.quiet
        self._out = Console(
            highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _WIDE
        )
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)

    @property
    def shows_progress(self) -> bool:
        """Whether somebody watches."""
        return self.err.is_terminal and not (self.is_json or self.is_quiet)

    def result(self, kind: str, value: object, render: Callable[[Output], None]) -> None:
        """Print a result: the envelope with --json, else as `render` does."""
        if self.is_json:
            self.json(kind, value)
        else:
            render(self)

    def json(self, kind: str, value: object) -> None:
        """Print one envelope on one line."""
        print(json.dumps(codec.to_json(codec.document(kind, value))), flush=True)

    def line(self, text: str = "") -> None:
        """Print one line of a result."""
        self._out.print(Text(text))

    def lines(self, texts: Sequence[str]) -> None:
        """Print many lines of a result at once."""
        if texts:
            print("\n".join(texts), flush=True)

    def pairs(self, rows: Iterable[tuple[str, str]]) -> None:
        """Print names and values, aligned; rows without a value are left out."""
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            if value:
                table.add_row(name, Text(value))
        self._print(table)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
        """Print a table; a column whose name begins with `>` is aligned to the right."""
        if not rows:
            self.remark(empty)
            return
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column in columns:
            name = column.removeprefix(">")
            justify: Any = "right" if column.startswith(">") else "left"
            table.add_column(name, justify=justify, no_wrap=not sys.stdout.isatty())
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._print(table)

    def _print(self, table: Table) -> None:
        """Print a table without the blanks that rich puts at the ends of lines."""
        with self._out.capture() as capture:
            self._out.print(table)
        print("\n".join(line.rstrip() for line in capture.get().splitlines()), flush=True)

    @contextmanager
    def working(self, text: str) -> Iterator[Callable[[str], None]]:
        """Show that something goes on, where somebody watches; gives what changes the words."""
        if not self.shows_progress:
            yield lambda _: None
            return
        with self.err.status(Text(text)) as status:
            yield lambda changed: status.update(Text(changed))

    def remark(self, text: str) -> None:
        """Say something that is not the result."""
        if not self.is_quiet and not self.is_json:
            self.err.print(Text(text, style="dim"))

    def warn(self, text: str) -> None:
        """Say something that must not be missed."""
        if not self.is_json:
            self.err.print(Text(f"warning: {text}", style="yellow"))

    def confirm(self, change: Change, question: str) -> None:
        """Ask on a terminal; without one raise `ConfirmationNeededError` unless `--yes`."""
        if change.yes:
            return
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise ConfirmationNeededError(
                f"{question} There is no terminal to ask on", hint="add --yes to do it"
            )
        self.err.print(Text(f"{question} [y/N] "), end="")
        answer = sys.stdin.readline().strip().lower()
        if answer not in {"y", "yes"}:
            raise CancelledError("nothing was changed")


def write_content(data: bytes | memoryview) -> None:
    """Write content to standard output; raise `OutputError` if it is full.

    A reader that left is `BrokenPipeError`, as everywhere.
    """
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is left in its buffer would fail once more at the end of the process.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        raise OutputError(f"standard output: {error.strerror}") from error


def warn_if_suspect(output: Output, held: Held) -> None:
    """Say that what is read may not be what the disk was."""
    if held.suspect_reason:
        output.warn(f"{held.reference} is SUSPECT: {held.suspect_reason}")


def age(unix_ns: int, *, now_ns: int | None = None) -> str:
    """Return how long ago, in one unit: `12 s`, `5 min`, `3 h`, `9 d`."""
    seconds = max(0, ((time.time_ns() if now_ns is None else now_ns) - unix_ns) // 1_000_000_000)
    for length, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def percent(part: int, whole: int) -> str:
    """Return a share: `42 %`, `0.3 %`."""
    if part == whole:
        return "100 %"
    # Rounded down: what is not all must not read as all.
    return f"{part * 1000 // whole / 10:g} %"


def counted(count: int, what: str) -> str:
    """Return a number with its noun: `1 extent`, `2 extents`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def size_exact(size_bytes: int) -> str:
    """Return a size to read and the exact bytes."""
    return f"{format_size(size_bytes)} ({size_bytes} bytes)"


def rules_text(rules: Sequence[RuleTerm], *, none: str = "all") -> str:
    """Return rules on one line; no rules select all."""
    return ", ".join(map(str, rules)) or none


def extents_rows(extents: Sequence[tuple[int, int]]) -> list[tuple[str, str, str]]:
    """Return rows of start, end and size."""
    return [(str(start), str(end), format_size(end - start)) for start, end in extents]


def show_left_out(output: Output, left_out: Sequence[LeftOut]) -> None:
    """Print what is left out and why, the reasons with most bytes first."""
    by_reason: dict[str, int] = {}
    for part in left_out:
        by_reason[part.because] = by_reason.get(part.because, 0) + part.end - part.start
    rows = sorted(by_reason.items(), key=lambda item: -item[1])
    for because, size_bytes in rows[:_LEFT_OUT_SHOWN_MAX]:
        output.line(f"left out {format_size(size_bytes)}: {because}")
    if len(rows) > _LEFT_OUT_SHOWN_MAX:
        output.line(f"and {len(rows) - _LEFT_OUT_SHOWN_MAX} more reasons")


def show_terms(output: Output, terms: Sequence[TermOutcome]) -> None:
    """Print what each term came to; files and extents only if a term is about files."""
    has_files = any(term.file_count for term in terms)
    columns = ["", "TERM", ">FILES", ">EXTENTS", ">MATCHES", ">DECIDES", "NOTE"]
    rows: list[Sequence[str]] = [
        (
            term.action,
            term.text,
            str(term.file_count or ""),
            str(term.extent_count or ""),
            format_size(term.matched_bytes),
            format_size(term.contributed_bytes),
            term.note,
        )
        for term in terms
    ]
    if not has_files:
        columns = [*columns[:2], *columns[4:]]
        rows = [(*row[:2], *row[4:]) for row in rows]
    output.table(columns, rows, empty="")


def show_unresolved(output: Output, terms: Sequence[TermOutcome], failure: str = "") -> None:
    """Print what could not be resolved, where and why; all of that is included."""
    if failure:
        output.line(f"no term about files or free space was resolved, all is included: {failure}")
    found = dict.fromkeys(
        f"{term.action} {term.text} could not be resolved on {where.place}: {where.reason}"
        for term in terms
        for where in term.unresolved
    )
    for text in list(found)[:_REASONS_SHOWN_MAX]:
        output.line(text)
    if len(found) > _REASONS_SHOWN_MAX:
        output.line(f"and {len(found) - _REASONS_SHOWN_MAX} more; --json lists all")
