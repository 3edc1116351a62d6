"""The golden volume, unpacked where a test may change it."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import stillblock
from stillblock.config import Config
from stillblock.operations.imports import ImportRequest, import_volume, plan_import


@dataclass(frozen=True)
class Golden:
    """A copy of the golden volume."""

    directory: Path
    expected: dict[str, Any]

    @property
    def origin(self) -> Path:
        return self.directory / "disk.img"

    @property
    def store(self) -> Path:
        return self.directory / "store"

    @property
    def journal(self) -> Path:
        return self.store / "journal"

    def segments(self) -> list[Path]:
        return sorted((self.store / "log").glob("*.seg"))

    def open(self, **options: Any) -> stillblock.Volume:
        """Import it, as a user does with a store that was moved here, and open it."""
        config = Config.load()
        config.ensure()
        request = ImportRequest(store=self.store, origin=self.origin)
        import_volume(config, plan_import(config, request))
        return stillblock.open("web", **options)


def unpacked(name: str, tmp_path: Path, archive_name: str = "volume.tar.xz") -> Golden:
    packed, directory = Path(__file__).parent / name, tmp_path / "golden"
    with tarfile.open(packed / archive_name) as archive:
        archive.extractall(directory, filter="data")
    expected = json.loads((packed / "expected.json").read_text(encoding="utf-8"))
    return Golden(directory=directory, expected=expected)


@pytest.fixture
def golden(tmp_path: Path) -> Golden:
    return unpacked("store-v1", tmp_path)


@pytest.fixture
def golden_v2(tmp_path: Path) -> Golden:
    """With index files and merged segments."""
    return unpacked("store-v2", tmp_path)


@pytest.fixture
def golden_clones(tmp_path: Path) -> Golden:
    """With clones."""
    return unpacked("clones-v1", tmp_path)


@pytest.fixture
def golden_v3(tmp_path: Path) -> Golden:
    """With regions, all of them closed."""
    return unpacked("store-v3", tmp_path)


@pytest.fixture
def cut_v3(tmp_path: Path) -> Golden:
    """The same after a power cut, with regions left open."""
    return unpacked("store-v3", tmp_path, "cut.tar.xz")
