"""Where state and sockets are."""

from pathlib import Path

import pytest

from stillblock.config import SOCKET_PATH_BYTES_MAX, Config, checked_socket_path
from stillblock.errors import SocketPathError, StateError


def test_root_has_the_system_state_directory():
    config = Config.load(environment={}, uid=0)
    assert config.state_dir == Path("/var/lib/stillblock")
    assert config.run_dirs == (Path("/var/lib/stillblock/run"),)


def test_a_user_has_an_xdg_state_directory():
    config = Config.load(environment={"XDG_STATE_HOME": "/x/state"}, uid=12345)
    assert config.state_dir == Path("/x/state/stillblock")


def test_an_option_wins_over_the_environment(tmp_path):
    environment = {"STILLBLOCK_STATE": str(tmp_path / "environment")}
    assert Config.load(environment=environment, uid=0).state_dir == tmp_path / "environment"
    option = Config.load(state_dir=tmp_path / "option", environment=environment, uid=0)
    assert option.state_dir == tmp_path / "option"


def test_two_state_directories_never_share_a_socket(tmp_path):
    environment = {"XDG_RUNTIME_DIR": str(tmp_path)}
    sockets = {
        Config.load(state_dir=tmp_path / name, environment=environment, uid=5).control_socket("web")
        for name in ("a", "b")
    }
    assert len(sockets) == 2


def test_a_client_looks_where_a_server_without_its_environment_would_be(tmp_path):
    with_runtime = Config.load(
        state_dir=tmp_path / "s", environment={"XDG_RUNTIME_DIR": str(tmp_path)}, uid=54321
    )
    without = Config.load(state_dir=tmp_path / "s", environment={}, uid=54321)
    assert without.control_socket("web") in with_runtime.control_sockets("web")


def test_a_socket_path_that_is_too_long_says_so():
    assert checked_socket_path(Path("/" + "x" * (SOCKET_PATH_BYTES_MAX - 1)))
    with pytest.raises(SocketPathError, match="--state-dir"):
        checked_socket_path(Path("/" + "x" * SOCKET_PATH_BYTES_MAX))


def test_directories_are_made_for_this_user_only(tmp_path):
    config = Config.load(state_dir=tmp_path / "deep" / "state", environment={}, uid=0)
    config.ensure()
    assert config.state_dir.stat().st_mode & 0o777 == 0o700
    assert config.run_dir.stat().st_mode & 0o777 == 0o700


def test_a_state_directory_that_cannot_be_made_says_what_to_set(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="STILLBLOCK_STATE"):
        Config.load(state_dir=tmp_path / "file" / "state", environment={}, uid=0).ensure()
