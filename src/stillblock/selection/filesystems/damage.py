"""The edge of every reader of our own: what a damaged number leads to becomes one error."""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from stillblock.selection.filesystems.filesystem import UnresolvedError

T = TypeVar("T")


@contextmanager
def damage_is_unresolved(what: str) -> Iterator[None]:
    """Turn what Python raises for senseless numbers into `UnresolvedError`.

    Readers check what they rely on; this is for what a check forgot. A disk's own errors pass.
    """
    try:
        yield
    except (
        ArithmeticError,
        LookupError,
        MemoryError,
        RecursionError,
        ValueError,
        struct.error,
    ) as error:
        raise UnresolvedError(f"{what} is damaged: {type(error).__name__}: {error}") from error


class Verdict(Generic[T]):
    """What is found out once for a whole filesystem: a value, or why it is unresolved."""

    def __init__(self, find: Callable[[], T]) -> None:
        self._find = find
        self._value: list[T] = []
        self._error: UnresolvedError | None = None

    def __call__(self) -> T:
        """Return the value, or raise the error, of the first call."""
        if self._error is not None:
            raise UnresolvedError(self._error.message) from self._error
        if not self._value:
            try:
                self._value.append(self._find())
            except UnresolvedError as error:
                self._error = error
                raise
        return self._value[0]
