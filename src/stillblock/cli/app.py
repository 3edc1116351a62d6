"""The program: which commands there are. Each is imported only when it is used.

cyclopts and not typer, for two reasons: it hands options of several names to one converter in the
order they were written, which include and exclude terms need, and it imports commands lazily.
"""

from __future__ import annotations

from typing import Final

from cyclopts import App, Group, Parameter

COMMANDS: Final = Group.create_ordered("Start here")
USES: Final = Group.create_ordered("Use a snapshot")
NOUNS: Final = Group.create_ordered("Things to work on")

_HELP: Final = (
    "Snapshots of exactly the blocks you choose, of a disk that stays in use.\n\n"
    "A REF is VOL, VOL@SNAP or VOL@SNAP+CLONE; VOL@latest is the newest snapshot. Sizes are in "
    "units of 1024: 64K, 4GiB, 512s (sectors).\n\n"
    "Exit codes: 0 ok, 1 failed, 2 usage, 3 partial, 4 damage, 11 locked, 13 snapshot lost, "
    "130 interrupted."
)
_EPILOGUE: Final = (
    "Begin with:\n\n"
    "  stillblock volume add web --origin disk.img\n\n"
    "  stillblock serve web\n\n"
    "  stillblock snapshot create web@monday --exclude part:type=swap"
)

_ROOT: Final = {
    "serve": "Serve volumes to NBD clients until stopped.",
    "status": "What is served, to whom, and how far a restore is.",
    "run": "Run a command on a throw-away clone of a snapshot: a rehearsal.",
    "events": "What happened, one line an event.",
    "doctor": "What this system offers, and what is wrong with it.",
    "demo": "See it work on a real filesystem, in half a minute and without root.",
    "completion": "Print the completion script of a shell.",
}
_USES: Final = {
    "ls": "List files of a snapshot or clone, without a mount.",
    "cat": "Write files of a snapshot or clone to standard output.",
    "cp": "Copy files out of a snapshot or clone, without a mount.",
    "export": "Write a snapshot or clone as a raw or qcow2 image.",
}
_MOUNT: Final = {
    "mount": "Mount a filesystem of a snapshot or clone, or show disks as files; list mounts.",
    "unmount": "Unmount it, and clear away what lay under it.",
    "attach": "Make a snapshot, clone or live disk a block device.",
    "detach": "Make an end of that.",
}
"""Of `cli/mount.py`."""
_NOUNS: Final = {
    "volume": "A raw file or block device and all that is kept about it.",
    "rules": "Which blocks matter: the standing rules of a volume.",
    "snapshot": "A volume's chosen blocks as they were at one instant.",
    "bookmark": "What is left of a snapshot for increments: what changed since.",
    "clone": "A writable view on a snapshot, which never changes with it.",
    "restore": "Put a snapshot back in place.",
    "hook": "What runs before and after an instant: the hooks that come with stillblock.",
}

SUMMARIES: Final = {**_ROOT, **_MOUNT, **_USES, **_NOUNS}


def new_app(name: str, *, is_root: bool = False) -> App:
    """Return an app with the house's settings."""
    return App(
        name=name,
        help=_HELP if is_root else _NOUNS[name],
        help_format="plaintext",
        help_epilogue=_EPILOGUE if is_root else None,
        version_flags=["--version"] if is_root else [],
        version=_version if is_root else None,
        default_parameter=Parameter(negative=(), show_default=False),
        result_action="return_value",
    )


def build() -> App:
    """Return the program."""
    app = new_app("stillblock", is_root=True)
    for name, summary in _ROOT.items():
        app.command(f"stillblock.cli.root:{name}", name=name, help=summary, group=COMMANDS)
    for name, summary in _MOUNT.items():
        app.command(f"stillblock.cli.mount:{name}", name=name, help=summary, group=USES)
    for name, summary in _USES.items():
        module = "export" if name == "export" else "files"
        app.command(f"stillblock.cli.{module}:{name}", name=name, help=summary, group=USES)
    for name, summary in _NOUNS.items():
        app.command(f"stillblock.cli.{name}:app", name=name, help=summary, group=NOUNS)
    return app


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    try:
        return f"stillblock {version('stillblock')}"
    except PackageNotFoundError:
        return "stillblock (not installed)"
