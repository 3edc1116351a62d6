"""How the demo tells its story: steps, the commands as a user types them, proofs, small tables."""

import shlex
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

QUIET_CHARACTERS: Final = frozenset(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_@%+=:,./-"
)


def typed(words: Sequence[str]) -> str:
    """Return a command as one would type it: quoted only where the shell needs it."""
    return " ".join(
        word if word and set(word) <= QUIET_CHARACTERS else shlex.quote(word) for word in words
    )


class Narrator:
    """Writes the story to a console; with a quiet console it only counts."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._step = 0

    def title(self, text: str) -> None:
        """Say what this is."""
        self._console.print(f"[bold]{escape(text)}[/]")

    def step(self, text: str) -> None:
        """Begin the next part."""
        self._step += 1
        self._console.print()
        self._console.print(f"[bold cyan]{self._step}[/]  [bold]{escape(text)}[/]")

    def command(self, words: Sequence[str], *, note: str = "", is_beside: bool = False) -> None:
        """Show a command before it runs; `is_beside`: it runs beside what follows."""
        ampersand = " &" if is_beside else ""
        comment = f"  [dim]# {escape(note)}[/]" if note else ""
        self._show(f"[green]$[/] {escape(typed(words))}{ampersand}{comment}")

    def output(self, text: str) -> None:
        """Show what a command printed, or the part of it that matters."""
        for line in text.splitlines():
            self._show(f"[dim]{escape(line.rstrip())}[/]")

    def remark(self, text: str) -> None:
        """Say what happens without a command."""
        self._show(escape(text))

    def proof(self, claim: str, *, detail: str = "") -> None:
        """Say what was just found to hold."""
        aside = f"  [dim]{escape(detail)}[/]" if detail else ""
        self._show(f"[bold green]✓[/] {escape(claim)}{aside}")

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show a few numbers."""
        table = Table(
            title=title, title_justify="left", title_style="bold", show_header=False, box=None,
            padding=(0, 2, 0, 0),
        )  # fmt: skip
        table.add_column(style="dim")
        table.add_column(justify="right")
        for name, value in rows:
            table.add_row(escape(name), escape(value))
        self._console.print()
        self._console.print(table)

    def closing(self, text: str) -> None:
        """End the story."""
        self._console.print()
        self._console.print(f"[bold green]{escape(text)}[/]")

    def _show(self, markup: str) -> None:
        # Commands are there to be copied: the terminal may wrap them, we do not.
        self._console.print(f"   {markup}", soft_wrap=True)


def sized(size_bytes: int) -> str:
    """Return a size in the unit that reads best."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
