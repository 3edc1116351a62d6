"""Dataclasses to JSON and back."""

import dataclasses
import json
import typing

import pytest

from stillblock import codec
from stillblock.errors import UnsupportedVersionError
from stillblock.model import LeftOut, RuleTerm, SnapshotPurpose, SnapshotRecord, VolumeConfig
from stillblock.service.verbs import all_verbs

RECORD = SnapshotRecord(
    name="monday",
    id="0123456789abcdef",
    purpose=SnapshotPurpose.SAFETY,
    rules=(RuleTerm(include=False, text="part:2"),),
    left_out=(LeftOut(start=0, end=4096, because="part:2"),),
    pause_ns=7,
)


def test_a_record_comes_back_as_it_was():
    assert codec.load("record", SnapshotRecord, codec.dump("record", RECORD)) == RECORD


def test_fields_of_a_later_version_are_ignored_and_missing_ones_take_their_default():
    text = json.dumps(
        {"schema": "stillblock/1", "kind": "v", "name": "web", "new": 1, "created_unix_ns": 5}
    )
    assert codec.load("v", VolumeConfig, text.encode()) == VolumeConfig(
        name="web", created_unix_ns=5
    )


def test_a_later_schema_is_refused_as_such():
    with pytest.raises(UnsupportedVersionError, match="stillblock/2"):
        codec.load("v", VolumeConfig, b'{"schema": "stillblock/2", "kind": "v"}')


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "object"),
        (b"{}", "schema"),
        (b'{"schema": "stillblock/1", "kind": "w"}', "kind"),
        (b'{"schema": "stillblock/1", "kind": "v"}', "name is missing"),
        (b'{"schema": "stillblock/1", "kind": "v", "name": 3, "created_unix_ns": 1}', "name"),
        (b'{"schema": "stillblock/1", "kind": "v", "name": "w", "created_unix_ns": true}', "int"),
    ],
)
def test_malformed_bytes_are_refused_with_the_place(data, words):
    with pytest.raises(codec.CodecError, match=words):
        codec.load("v", VolumeConfig, data)


@pytest.mark.parametrize("verb", all_verbs(), ids=lambda verb: verb.name)
def test_the_codec_can_read_every_request_and_result_of_the_api(verb):
    waiting, seen = [verb.request, verb.result], set()
    while waiting:
        hint = waiting.pop()
        if hint in seen:
            continue
        seen.add(hint)
        if dataclasses.is_dataclass(hint):
            waiting += typing.get_type_hints(hint).values()
        else:
            waiting += [a for a in typing.get_args(hint) if a is not Ellipsis]
    assert not [h for h in seen if isinstance(h, str)]
