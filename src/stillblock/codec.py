"""Frozen dataclasses to JSON and back, by their type hints; the one codec for store, API and CLI.

Unknown fields are ignored and missing ones take their default, so that fields can be added within a
schema version; anything else that does not fit is a `CodecError` that names the path to it.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import types
import typing
from typing import Any, Final, TypeVar

from stillblock.errors import StillblockError, UnsupportedVersionError

SCHEMA: Final = "stillblock/1"
_SCHEMA_FAMILY: Final = "stillblock/"
_PLAIN: Final = frozenset({str, int, float, bool, types.NoneType})

T = TypeVar("T")


class CodecError(StillblockError):
    """JSON that does not have the shape it should."""

    code = "malformed"


def to_json(value: object) -> Any:
    """Return plain dicts, lists, strings, numbers and None for a value of our own."""
    if type(value) in _PLAIN:  # most of what there is: receipts hold tens of thousands of numbers
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: to_json(getattr(value, name)) for name in _names(type(value))}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form")


def from_json(hint: type[T], document: object) -> T:
    """Return the value of type `hint` that the JSON describes, else raise `CodecError`."""
    value: T = _decode(hint, document, "")
    return value


def document(kind: str, value: object) -> dict[str, Any]:
    """Return the one envelope: schema, kind, then the fields of the value."""
    body = to_json(value)
    if not isinstance(body, dict):
        body = {"items": body}
    assert not {"schema", "kind"} & body.keys(), "a field would hide the envelope's"
    return {"schema": SCHEMA, "kind": kind, **body}


def dump(kind: str, value: object) -> bytes:
    """Return an envelope as bytes, for the store."""
    return json.dumps(document(kind, value), separators=(",", ":"), sort_keys=True).encode()


def load(kind: str, hint: type[T], data: bytes) -> T:
    """Return the value in an envelope from the store."""
    try:
        found = json.loads(data)
    except ValueError as error:
        raise CodecError(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CodecError(f"expected an object with a schema, found {type(found).__name__}")
    schema = found.get("schema")
    if schema != SCHEMA:
        if isinstance(schema, str) and schema.startswith(_SCHEMA_FAMILY):
            raise UnsupportedVersionError(
                f"{kind} has schema {schema}, this version reads {SCHEMA}"
            )
        raise CodecError(f"schema is {schema!r}, expected {SCHEMA!r}")
    if found.get("kind") != kind:
        raise CodecError(f"kind is {found.get('kind')!r}, expected {kind!r}")
    return from_json(hint, found)


@functools.cache
def _names(owner: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(owner))


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def _decode(
    hint: Any,
    value: object,
    path: str,
) -> Any:
    if hint is int and type(value) is int:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _decode_dataclass(hint, value, path)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(hint, value, path)
    if origin is tuple:
        return _decode_tuple(hint, value, path)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(path, "an object", value)
        item = typing.get_args(hint)[1]
        return {str(key): _decode(item, found, f"{path}.{key}") for key, found in value.items()}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError as error:
            raise _wrong(path, "one of " + ", ".join(str(m.value) for m in hint), value) from error
    if hint in (int, str, bool, types.NoneType):
        if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
            return value
        raise _wrong(path, hint.__name__, value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise _wrong(path, str(hint), value)


def _decode_dataclass(hint: type, value: object, path: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(path, "an object", value)
    hints = _hints(hint)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(hint):
        if field.name in value:
            arguments[field.name] = _decode(
                hints[field.name], value[field.name], f"{path}.{field.name}"
            )
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise CodecError(f"{(path + '.' + field.name).lstrip('.')} is missing")
    return hint(**arguments)


def _decode_union(hint: Any, value: object, path: str) -> Any:
    options = typing.get_args(hint)
    if value is None and types.NoneType in options:
        return None
    errors: list[CodecError] = []
    for option in options:
        if option is types.NoneType:
            continue
        try:
            return _decode(option, value, path)
        except CodecError as error:
            errors.append(error)
    raise errors[0] if errors else _wrong(path, str(hint), value)


def _decode_tuple(hint: Any, value: object, path: str) -> Any:
    if not isinstance(value, list):
        raise _wrong(path, "a list", value)
    items = typing.get_args(hint)
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_decode(items[0], found, f"{path}[{i}]") for i, found in enumerate(value))
    if len(items) != len(value):
        raise _wrong(path, f"{len(items)} items", value)
    return tuple(
        _decode(item, found, f"{path}[{i}]")
        for i, (item, found) in enumerate(zip(items, value, strict=True))
    )


def _wrong(path: str, expected: str, value: object) -> CodecError:
    return CodecError(f"{path.lstrip('.') or 'value'} should be {expected}, is {value!r:.80}")
