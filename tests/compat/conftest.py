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

GOLDEN = Path(__file__).parent / "store-v1"


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


@pytest.fixture
def golden(tmp_path: Path) -> Golden:
    directory = tmp_path / "golden"
    with tarfile.open(GOLDEN / "volume.tar.xz") as archive:
        archive.extractall(directory, filter="data")
    expected = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
    return Golden(directory=directory, expected=expected)
