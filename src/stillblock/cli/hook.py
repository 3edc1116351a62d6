"""`stillblock hook`: list, install."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from stillblock.cli.app import new_app
from stillblock.cli.options import Common
from stillblock.cli.output import Output
from stillblock.errors import UsageError
from stillblock.operations.hooks import install_hooks, ready_hooks

app = new_app("hook")

_COMMON: Final = Common()


@app.command(name="list")
def list_(*, common: Common = _COMMON) -> None:
    """List the hooks that come with stillblock, and the settings that they take."""
    output = Output(common)
    found = ready_hooks()

    def render(out: Output) -> None:
        for hook in found:
            out.line(f"{hook.name}: {hook.summary}")
            out.line(f"  settings: {hook.settings}")

    output.result("hook-list", {"hooks": found}, render)


@app.command
def install(*names: str, into: Path, common: Common = _COMMON) -> None:
    """Copy hooks that come with stillblock into a directory, for `volume set --hooks`.

    Parameters
    ----------
    names
        Which ones, as `hook list` calls them.
    into
        The directory; it is made if need be. What is there already is not replaced.
    """
    if not names:
        raise UsageError("say which hooks to install; `stillblock hook list` shows them")
    output = Output(common)
    done = install_hooks(names, into.absolute())
    output.result(
        "hooks-installed", done, lambda out: out.line(f"{', '.join(names)}: in {done.directory}")
    )
    output.remark(f"next: say in {done.settings} what they need to know, then")
    output.remark(f"stillblock volume set VOL --hooks {done.directory} --consistency application")
