"""The edge of every reader of our own: what a damaged number leads to becomes one error."""

import struct
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from stillblock.selection.filesystems.filesystem import UnresolvedError

T = TypeVar("T")


_SENSELESS: Final = (
    ArithmeticError,
    LookupError,
    MemoryError,
    RecursionError,
    ValueError,
    struct.error,
)
"""What Python raises for numbers that cannot be."""


class damage_is_unresolved:  # noqa: N801, entered like contextlib.suppress
    """Turn what Python raises for senseless numbers into `UnresolvedError`.

    Readers check what they rely on; this is for what a check forgot. A disk's own errors pass.
    """

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        """Say what is read, for the error."""
        self._what = what

    def __enter__(self) -> None:
        """Begin. It runs for every file: a class is five times as fast as a generator."""

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object
    ) -> None:
        """Raise `UnresolvedError` in the place of what it is made of."""
        if isinstance(error, _SENSELESS):
            raise UnresolvedError(
                f"{self._what} is damaged: {type(error).__name__}: {error}"
            ) from error


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
