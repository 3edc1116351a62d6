"""Error classes: codes, exit codes, and the way over JSON and back."""

import re
from pathlib import Path

import pytest

from stillblock import errors

ALL = sorted(errors.by_code().items())


def test_every_kind_the_core_reports_has_a_class():
    stub = Path(errors.__file__).with_name("_native.pyi").read_text()
    text = re.search(r"class NativeError.*?\"\"\"(.*?)\"\"\"", stub, re.DOTALL)
    assert text is not None
    kinds = set(re.findall(r'"(\w+)"', text[1]))
    assert kinds == errors.native_kinds()
    for kind in kinds:
        assert errors.from_native(kind, "words").code == kind


def test_a_kind_nobody_knows_is_our_defect():
    error = errors.from_native("gremlins", "words")
    assert isinstance(error, errors.InternalError)
    assert "gremlins" in str(error)


def test_no_two_classes_share_a_code():
    found, waiting = [], [errors.StillblockError]
    while waiting:
        error_class = waiting.pop()
        found.append(error_class.code)
        waiting += [c for c in error_class.__subclasses__() if c.__module__ == errors.__name__]
    assert len(found) == len(set(found))


@pytest.mark.parametrize(("code", "error_class"), ALL)
def test_an_error_comes_back_from_json_as_its_class(code, error_class):
    back = errors.from_json(error_class("words", hint="advice").to_json())
    assert type(back) is error_class
    assert back.code == code
    assert str(back) == "words; advice"


def test_an_error_of_a_newer_server_keeps_its_severity():
    back = errors.from_json(
        {"code": "new", "message": "m", "exit_code": 4, "blame": "disk", "is_retryable": True}
    )
    assert (back.code, back.exit_code, back.blame, back.is_retryable) == ("new", 4, "disk", True)


@pytest.mark.parametrize("document", [None, [], {}, {"code": 3}, "text"])
def test_what_is_no_error_is_a_control_error(document):
    assert isinstance(errors.from_json(document), errors.ControlError)


def test_exit_codes_are_those_of_the_table():
    assert errors.UsageError("x").exit_code == 2
    assert errors.RuleError("x").exit_code == 2
    assert errors.StoreDamagedError("x").exit_code == 4
    assert errors.LockedError("x").exit_code == 11
    assert errors.SnapshotLostError("x").exit_code == 13
    assert errors.OriginIOError("x").exit_code == 1
