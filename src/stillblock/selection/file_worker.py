"""A worker that is asked about files, as often as somebody wants to know; see `files`.

Like every worker it fails closed: whatever it does wrong becomes `UnresolvedError`.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, TypeVar

from stillblock.model import Extents
from stillblock.selection.confinement import Limits
from stillblock.selection.disk import Disk
from stillblock.selection.file_questions import (
    CONTENT_BYTES_MAX,
    batch_of,
    counts_of,
    extents_of,
    found_of,
    layout_of,
    row_of,
)
from stillblock.selection.files import Entry, Missing
from stillblock.selection.filesystems.filesystem import Layout, Node, UnresolvedError
from stillblock.selection.filesystems.opening import READERS
from stillblock.selection.filesystems.signatures import Content
from stillblock.selection.wire import Kind, pack_document, unpack_document
from stillblock.selection.workers import Worker

FILES_LIMITS: Final = Limits(cpu_s=7 * 86_400)
"""A copy of a large tree takes hours of one worker. One question has the usual time, on the
clock."""
RENEWALS_MAX: Final = 3
"""Times that a worker which crashed or hung is replaced, so that one bad file costs one file."""

T = TypeVar("T")


class FileWorker(Worker):
    """Answers questions about the files of one filesystem until it is closed."""

    def __init__(self, disk: Disk, content: Content, *, limits: Limits = FILES_LIMITS) -> None:
        """Say what to read; `content` is what its signature says."""
        super().__init__(disk, reader=READERS[content], limits=limits)
        self._size = disk.size
        self._changed: Extents | None = None
        self._renewals_left = RENEWALS_MAX

    def find(self, path: str, *, follows: bool) -> Entry | Missing:
        """Return what a path leads to; the entry's name is the path without links."""
        document, _ = self._request(Kind.FIND, {"path": path, "follows": follows})
        return self._checked(lambda: found_of(document))

    def entries(self, directory: Node) -> Iterator[Entry]:
        """Yield what a directory holds, in its own order."""
        position = 0
        while True:
            asked = {"node": row_of(directory), "position": position}
            document, _ = self._request(Kind.LIST, asked)
            found, is_end = self._checked(partial(batch_of, document))
            yield from found
            position += len(found)
            if is_end or not found:
                return

    def layout(self, node: Node) -> Layout:
        """Return where a regular file's bytes are, from the start of the filesystem."""
        document, numbers = self._request(Kind.LAYOUT, {"node": row_of(node)})
        return self._checked(lambda: layout_of(document, numbers, node=node, size=self._size))

    def content(self, node: Node, *, offset: int, length: int) -> bytes:
        """Return bytes of a file that are in no place of their own."""
        parts: list[bytes] = []
        while length > 0:
            count = min(length, CONTENT_BYTES_MAX)
            asked = {"node": row_of(node), "offset": offset, "length": count}
            data = self._ask(Kind.CONTENT, json.dumps(asked).encode("ascii"), bytes)
            if len(data) != count:
                raise UnresolvedError(
                    f"its reader gave {len(data)} bytes of a file instead of {count}"
                )
            parts.append(data)
            offset += count
            length -= count
        return b"".join(parts)

    def hold_against(self, changed: Extents) -> None:
        """Let listings tell from now on what of each file lies in these extents."""
        self._changed = changed
        self._ask(Kind.HOLD_AGAINST, pack_document({}, (changed,)), unpack_document)

    def touched(self) -> tuple[Extents, Extents]:
        """Return what of those extents the files listed since have, and what else is free."""
        document, numbers = self._request(Kind.TOUCHED, {})

        def read() -> tuple[Extents, Extents]:
            count, _ = counts_of(document, numbers, count=2)
            return (
                extents_of(numbers[: 2 * count], size=self._size),
                extents_of(numbers[2 * count :], size=self._size),
            )

        return self._checked(read)

    def _ask(self, kind: Kind, asked: bytes, unpack: Callable[[bytes], T]) -> T:
        """Ask; a worker that failed at a question does not hear the next one."""
        if self.is_ended:
            self._renew()
        try:
            return super()._ask(kind, asked, unpack)
        except UnresolvedError as error:
            # A reader that said why it does not answer is whole; any other is in the middle of it.
            if error.__cause__ is not None:
                self.__exit__()
            raise
        except BaseException:
            self.__exit__()
            raise

    def _renew(self) -> None:
        if self._renewals_left == 0:
            raise UnresolvedError(f"its reader failed {RENEWALS_MAX + 1} times, and is left alone")
        self._renewals_left -= 1
        self.__enter__()
        if self._changed is not None:
            document = pack_document({}, (self._changed,))
            super()._ask(Kind.HOLD_AGAINST, document, unpack_document)
