"""A volume, and a session on it: local, or over the control socket of a serve process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillblock.config import Config
from stillblock.operations import volumes
from stillblock.service.serve import ServeOptions, VolumeHost
from stillblock.service.session import Session, open_session

DISK_BYTES = 1024 * 1024
BLOCK_BYTES = 4096


@pytest.fixture
def config(tmp_path: Path) -> Config:
    made = Config.load(state_dir=tmp_path / "s", environment={}, uid=0)
    made.ensure()
    return made


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([i % 251]) * BLOCK_BYTES for i in range(256)))
    return path


@pytest.fixture
def volume(config: Config, origin: Path) -> str:
    request = volumes.AddRequest(name="web", origin=origin)
    volumes.add_volume(config, volumes.plan_add(config, request))
    return "web"


@pytest.fixture
def host(config: Config, volume: str) -> Iterator[VolumeHost]:
    """A serve process in a thread of this one."""
    made = VolumeHost(config, ServeOptions())
    with made:
        made.start((volume,))
        thread = threading.Thread(target=lambda: asyncio.run(made.run(handles_signals=False)))
        thread.start()
        yield made
        made.stop()
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture(params=["local", "remote"])
def session(request: pytest.FixtureRequest, config: Config, volume: str) -> Iterator[Session]:
    if request.param == "remote":
        request.getfixturevalue("host")
    with open_session(config, volume) as opened:
        assert opened.is_remote == (request.param == "remote")
        yield opened
