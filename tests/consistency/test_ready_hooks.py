"""The hooks that come with the package: what they are, where they go, and how they fail."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from stillblock.consistency import hooks
from stillblock.errors import NameTakenError, NotFoundError, RefusedError
from stillblock.operations.hooks import install_hooks, ready_hooks

NAMES = ["mariadb", "postgresql", "redis", "sqlite"]


def test_each_says_what_it_does_and_which_settings_it_takes():
    found = ready_hooks()
    assert [hook.name for hook in found] == NAMES
    assert all(hook.summary.endswith(".") and hook.settings for hook in found)


def test_what_was_installed_is_found_by_the_runner_and_nothing_is_replaced(tmp_path):
    folder = tmp_path / "hooks"
    install_hooks(("sqlite", "redis"), folder)
    assert [path.name for path in hooks.find(folder)] == ["redis", "sqlite"]
    assert (folder / "settings").stat().st_mode & 0o777 == 0o600
    assert hooks.settings(folder) == {}
    (folder / "settings").write_text("A=b\n")
    install_hooks(("mariadb",), folder)
    assert hooks.settings(folder) == {"A": "b"}
    with pytest.raises(NameTakenError, match="not replaced"):
        install_hooks(("sqlite",), folder)
    with pytest.raises(NotFoundError, match="no hook oracle"):
        install_hooks(("oracle",), folder)


def test_a_directory_that_others_could_change_is_refused(tmp_path):
    folder = tmp_path / "hooks"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(RefusedError, match="chmod go-w"):
        install_hooks(("sqlite",), folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_without_its_server_a_hook_fails_before_and_says_why(name, tmp_path):
    install_hooks((name,), tmp_path / "hooks")
    environment = os.environ | {
        "STILLBLOCK_VOLUME": "web",
        "STILLBLOCK_LIMIT_MS": "2000",
        "HOOK_STATE": str(tmp_path),
        "PGHOST": str(tmp_path),
        "REDIS_FLAGS": f"-s {tmp_path}/none",
        "MYSQL_FLAGS": f"--no-defaults -S {tmp_path}/none",
        "SQLITE_DATABASES": str(tmp_path / "none.db"),
    }

    def run(phase: str) -> subprocess.CompletedProcess[bytes]:
        command = [str(tmp_path / "hooks" / name), phase]
        return subprocess.run(
            command, env=environment, capture_output=True, timeout=30, check=False
        )

    ran = run("before")
    assert ran.returncode != 0
    assert ran.stdout + ran.stderr
    run("after")
    left = {path.name for path in Path(tmp_path).iterdir()}
    assert left == {"hooks"}, "nothing of it stays behind"
