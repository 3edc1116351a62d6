"""The hooks that come with the package, and putting them where a volume runs them."""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stillblock import consistency
from stillblock.consistency.hooks import SETTINGS
from stillblock.errors import NameTakenError, NotFoundError, RefusedError

_READY: Final = Path(consistency.__file__).parent / "ready"
_EXECUTABLE: Final = 0o755
_PRIVATE: Final = 0o600
_SETTINGS_HEAD: Final = "# NAME=value, a line each, for the environment of the hooks\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyHook:
    """A hook that comes with the package."""

    name: str
    summary: str
    settings: str
    """Which variables of the settings file it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """Hooks that were put into a directory."""

    directory: str
    hooks: tuple[str, ...]
    settings: str
    """The file for what they need to know; made if it was not there."""


def ready_hooks() -> tuple[ReadyHook, ...]:
    """Return what comes with the package, by name."""
    return tuple(_describe(path) for path in sorted(_READY.iterdir()) if path.is_file())


def _describe(path: Path) -> ReadyHook:
    """Read the comment a hook begins with: summary, details, settings, in paragraphs."""
    lines: list[str] = []
    for line in path.read_text().splitlines()[1:]:
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    paragraphs = [" ".join(part.split()) for part in "\n".join(lines).split("\n\n")]
    told = next(p.removeprefix("settings: ") for p in paragraphs if p.startswith("settings: "))
    return ReadyHook(name=path.name, summary=paragraphs[0], settings=told)


def install_hooks(names: tuple[str, ...], directory: Path) -> Installed:
    """Copy ready-made hooks into a directory, which is made if need be; never over a file."""
    known = {hook.name for hook in ready_hooks()}
    for name in names:
        if name not in known:
            raise NotFoundError(f"no hook {name} comes with it", hint=f"there are {sorted(known)}")
        if (directory / name).exists():
            raise NameTakenError(f"{directory / name} is there already; it was not replaced")
    try:
        directory.mkdir(mode=_EXECUTABLE, parents=True, exist_ok=True)
        if directory.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise RefusedError(
                f"{directory} can be changed by others; hooks run with the server's rights",
                hint=f"chmod go-w {directory}",
            )
        for name in names:
            shutil.copyfile(_READY / name, directory / name)
            (directory / name).chmod(_EXECUTABLE)
        settings = directory / SETTINGS
        if not settings.exists():
            made = os.open(settings, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _PRIVATE)
            with os.fdopen(made, "w") as file:
                file.write(_SETTINGS_HEAD)
    except OSError as error:
        raise RefusedError(f"hooks cannot be put into {directory}: {error.strerror}") from error
    return Installed(directory=str(directory), hooks=names, settings=str(settings))
