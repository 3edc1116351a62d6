"""The catalog: volumes, events, migrations."""

import sqlite3

import pytest

from stillblock.catalog import Catalog
from stillblock.errors import (
    CatalogError,
    NameTakenError,
    NotFoundError,
    UnsupportedVersionError,
)
from stillblock.model import VolumeEntry

WEB = VolumeEntry(name="web", uuid="u1", origin="/o/web.img", store="/s/web")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "catalog.sqlite"


def test_a_volume_is_remembered_across_openings(path):
    with Catalog(path) as catalog:
        catalog.add(WEB)
    with Catalog(path) as catalog:
        assert catalog.volume("web") == WEB
        catalog.remove("web")
        assert catalog.volumes() == ()


@pytest.mark.parametrize(
    "other",
    [
        VolumeEntry(name="web", uuid="u2", origin="/o/x", store="/s/x"),
        VolumeEntry(name="x", uuid="u1", origin="/o/x", store="/s/x"),
        VolumeEntry(name="x", uuid="u2", origin="/o/x", store="/s/web"),
    ],
    ids=["name", "uuid", "store"],
)
def test_a_volume_is_known_once(path, other):
    with Catalog(path) as catalog:
        catalog.add(WEB)
        with pytest.raises(NameTakenError, match="web"):
            catalog.add(other)
        assert catalog.volumes() == (WEB,)


def test_a_missing_volume_is_reported_with_those_there_are(path):
    with Catalog(path) as catalog:
        catalog.add(WEB)
        with pytest.raises(NotFoundError, match=r"no volume data .*known: web"):
            catalog.volume("data")


def test_events_come_back_in_order_and_by_volume(path):
    with Catalog(path) as catalog:
        first = catalog.record("web", "snapshot_created", snapshot="monday", selected_bytes=5)
        catalog.record("data", "volume_added")
        last = catalog.record("web", "snapshot_deleted", snapshot="monday")
        assert catalog.events(volume="web") == (first, last)
        assert catalog.events(volume="web", after_id=first.id) == (last,)
        assert catalog.events(volume="web", count_max=1) == (last,)
        assert catalog.last_event_id() == last.id


def test_a_catalog_of_a_newer_version_is_refused(path):
    with Catalog(path):
        pass
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(UnsupportedVersionError, match="99"):
        Catalog(path)


def test_a_damaged_catalog_says_how_to_rebuild_it(path):
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(CatalogError, match="volume import"):
        Catalog(path)
