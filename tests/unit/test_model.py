"""Sizes, names, references and extents."""

import pytest

from stillblock.errors import UsageError
from stillblock.model import (
    Reference,
    check_name,
    check_new_name,
    format_duration,
    format_instant,
    format_size,
    name_for_instant,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64K", 65536),
        ("64k", 65536),
        ("64KB", 65536),
        ("4GiB", 4 << 30),
        ("1 MiB", 1 << 20),
        ("512s", 262144),
        ("2T", 2 << 40),
    ],
)
def test_a_size_is_read_in_units_of_1024(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5G", "4XB", "0x10", "9999E", "1 2"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match=r"size|disk"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1024 * 1024 - 1, "1 MiB"),
        (5 << 30, "5 GiB"),
        (3 << 60, "3 EiB"),
    ],
)
def test_a_size_is_printed_in_the_unit_that_suits_it(size_bytes, text):
    assert format_size(size_bytes) == text


def test_durations_and_instants_are_printed_to_be_read():
    assert format_duration(180_000) == "180 us"
    assert format_duration(4_200_000) == "4.2 ms"
    assert format_duration(1_500_000_000) == "1.5 s"
    assert format_instant(1_764_000_001_000_000_000) == "2025-11-24T16:00:01Z"


def test_a_name_made_of_an_instant_is_a_valid_name():
    name = name_for_instant(1_764_000_001_000_000_000)
    assert name == "2025-11-24T16-00-01Z"
    assert check_name(name, what="snapshot") == name


@pytest.mark.parametrize("name", ["", "-web", ".web", "we b", "web@x", "a" * 65, "web/x", "wéb"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UsageError, match="volume name"):
        check_name(name, what="volume")


def test_nothing_new_can_be_called_latest():
    with pytest.raises(UsageError, match="newest"):
        check_new_name("latest", what="snapshot")


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("web", {"volume": "web"}),
        ("web@monday", {"volume": "web", "snapshot": "monday"}),
        ("web@latest", {"volume": "web", "snapshot": "latest"}),
        ("web@monday+try", {"volume": "web", "snapshot": "monday", "clone": "try"}),
        ("web@monday:/etc/fstab", {"volume": "web", "snapshot": "monday", "path": "/etc/fstab"}),
        ("safe:web@42", {"volume": "web", "snapshot": "42", "repository": "safe"}),
        ("web:/a:b@c", {"volume": "web", "path": "/a:b@c"}),
        ("web@m:2:/a", {"volume": "web", "snapshot": "m", "place": "2", "path": "/a"}),
        (
            "r:web@m:vg/root:/a:/b",
            {
                "repository": "r",
                "volume": "web",
                "snapshot": "m",
                "place": "vg/root",
                "path": "/a:/b",
            },
        ),
        (
            "web@m+c:my: label@x:/",
            {"volume": "web", "snapshot": "m", "clone": "c", "place": "my: label@x", "path": "/"},
        ),
    ],
)
def test_a_reference_is_read_and_printed_alike(text, fields):
    reference = Reference.parse(text)
    assert reference == Reference(**fields)
    assert str(reference) == text


@pytest.mark.parametrize(
    "text", ["", "@x", "web@", "web@a@b", "web@a+", "r:web@a+b", ":web", "web@a::/x", "web@a:2"]
)
def test_a_malformed_reference_is_refused(text):
    with pytest.raises(UsageError):
        Reference.parse(text)
