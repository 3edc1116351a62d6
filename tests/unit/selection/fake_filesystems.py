"""Filesystems made up in memory: files with runs, free space, and everything that can be wrong.

What is tested with them is what terms make of a filesystem, not how one is read.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from stillblock.model import Extents
from stillblock.selection.disk import Disk
from stillblock.selection.filesystems import (
    Content,
    FileKind,
    Identity,
    Node,
    Run,
    UnresolvedError,
)
from stillblock.selection.filesystems.filesystem import Layout, laid_out
from stillblock.selection.lvm_text import Section, parse_lvm_text
from stillblock.selection.survey import Survey, SurveyRequest, survey
from unit.selection.partition_images import MIB, BytesDisk, GptPart, gpt_disk


@dataclass
class FakeFile:
    """A regular file; `extents` follow one another in it."""

    extents: list[tuple[int, int]] = field(default_factory=list)
    number: int = 0
    links: int = 1
    mode: int = 0o644
    uid: int = 1000
    size: int | None = None
    head: bytes = b""
    error: str = ""
    kind: FileKind = FileKind.REGULAR


@dataclass
class FakeFilesystem:
    """`files` by path; directories are made up from the paths."""

    files: dict[str, FakeFile] = field(default_factory=dict)
    free_extents: Extents = ()
    fixed_extents: Extents = ((0, 4096),)
    size: int = MIB
    kind: str = "ext4"
    label: str = ""
    uuid: str = ""
    is_case_sensitive: bool = True
    caveats: tuple[str, ...] = ()
    free_error: str = ""
    tree_error: str = ""
    open_error: str = ""
    surveys: int = 0

    def __post_init__(self) -> None:
        for index, file in enumerate(self.files.values()):
            file.number = file.number or 1000 + index

    @property
    def identity(self) -> Identity:
        return Identity(
            kind=self.kind,
            label=self.label,
            uuid=self.uuid,
            block_size=4096,
            size=self.size,
            is_case_sensitive=self.is_case_sensitive,
        )

    def root(self) -> Node:
        return Node(number=2, kind=FileKind.DIRECTORY, size=0)

    def children(self, directory: Node) -> Iterable[tuple[str, Node]]:
        if self.tree_error:
            raise UnresolvedError(self.tree_error)
        base = "/" if directory.number == 2 else self._directory(directory.number)
        seen = set()
        for path, file in self.files.items():
            if not path.startswith(base):
                continue
            name, slash, _ = path[len(base) :].partition("/")
            if slash and name not in seen:
                seen.add(name)
                number = -1 - self._directories().index(f"{base}{name}/")
                yield name, Node(number=number, kind=FileKind.DIRECTORY, size=0)
            elif not slash:
                yield name, self._node(file)

    def _directories(self) -> list[str]:
        found = []
        for path in self.files:
            parts = path.split("/")
            found += ["/".join(parts[:depth]) + "/" for depth in range(2, len(parts))]
        return sorted(set(found))

    def _directory(self, number: int) -> str:
        return self._directories()[-1 - number]

    def _node(self, file: FakeFile) -> Node:
        size = sum(end - start for start, end in file.extents) if file.size is None else file.size
        return Node(
            number=file.number,
            kind=file.kind,
            size=size,
            links=file.links,
            mode=file.mode,
            uid=file.uid,
        )

    def _file(self, node: Node) -> FakeFile:
        return next(file for file in self.files.values() if file.number == node.number)

    def runs(self, node: Node) -> tuple[Run, ...]:
        file = self._file(node)
        if file.error:
            raise UnresolvedError(file.error)
        found = []
        offset = 0
        for start, end in file.extents:
            found += [Run(offset, end - start, start), Run(offset + end - start, 4096, None)]
            offset += end - start + 4096
        return tuple(found)

    def layout(self, node: Node) -> Layout:
        return laid_out(self.runs(node), size=node.size)

    def read(self, node: Node, *, offset: int, length: int) -> bytes:
        return self._file(node).head[offset : offset + length]

    def free(self) -> Extents:
        if self.free_error:
            raise UnresolvedError(self.free_error)
        return self.free_extents

    def fixed(self) -> Extents:
        return self.fixed_extents


def swap_head(page: int = 4096) -> bytes:
    head = bytearray(page)
    head[1024] = 1
    head[page - 10 :] = b"SWAPSPACE2"
    return bytes(head)


class FakeReaders:
    """Reads the made-up filesystems at once. Which one a disk holds is written at its byte 8."""

    def __init__(self, filesystems: list[FakeFilesystem]) -> None:
        self.filesystems = filesystems
        self.identified: list[str] = []
        """The labels of those that were asked which they are."""
        self.parsed_count = 0

    def identify(self, disk: Disk, *, content: Content) -> Identity:
        identity = self._open(disk).identity
        self.identified.append(identity.label)
        return identity

    def survey(self, disk: Disk, *, content: Content, request: SurveyRequest) -> Survey:
        filesystem = self._open(disk)
        filesystem.surveys += 1
        return survey(filesystem, request)

    def parse_lvm(self, text: str) -> Section:
        self.parsed_count += 1
        return parse_lvm_text(text)

    def _open(self, disk: Disk) -> FakeFilesystem:
        filesystem = self.filesystems[disk.pread(offset=8, length=1)[0]]
        if filesystem.open_error:
            raise UnresolvedError(filesystem.open_error)
        return filesystem


def partitioned(*filesystems: FakeFilesystem, swap: bool = False) -> tuple[BytesDisk, FakeReaders]:
    """A disk with a partition of 1 MiB for each, from 1 MiB on, and one of swap behind them."""
    count = len(filesystems) + swap
    parts = {number: GptPart(number * 2048, number * 2048 + 2047) for number in range(1, count + 1)}
    disk = gpt_disk(parts, size=(count + 2) * MIB)
    for index in range(len(filesystems)):
        put_filesystem(disk, (index + 1) * MIB, index)
    if swap:
        start = count * MIB
        disk.content[start : start + 4096] = swap_head()
    return disk, FakeReaders(list(filesystems))


def put_filesystem(disk: BytesDisk, start: int, index: int) -> None:
    """Let a stretch of disk look like ext, and be the filesystem of that index."""
    disk.content[start + 1080 : start + 1082] = b"\x53\xef"
    disk.content[start + 8] = index
