"""What a reader says of a filesystem's files: which there are, where they lie, what they hold."""

from collections.abc import Iterable

from stillblock.extents import normalise
from stillblock.model import Extents
from stillblock.selection.disk import Disk
from stillblock.selection.filesystems import (
    FileKind,
    Filesystem,
    Node,
    Run,
    read_runs,
    walk,
)


def files_of(filesystem: Filesystem) -> dict[str, Node]:
    return {path: node for path, node in walk(filesystem) if node.kind is FileKind.REGULAR}


def runs_of(filesystem: Filesystem) -> dict[str, tuple[Run, ...]]:
    return {path: filesystem.runs(node) for path, node in files_of(filesystem).items()}


def places(runs: Iterable[Run]) -> Extents:
    """Where on the disk runs lie; holes lie nowhere."""
    return normalise((run.start, run.start + run.length) for run in runs if run.start is not None)


def data_extents(filesystem: Filesystem, node: Node) -> Extents:
    """Where on the disk a file's data lies."""
    return places(filesystem.runs(node))


def content_by_runs(disk: Disk, filesystem: Filesystem, node: Node) -> bytes:
    """A file's bytes from where its runs say they are; read plainly if they are in metadata."""
    content = bytearray(node.size)
    layout = filesystem.layout(node)
    for run in layout.runs:
        assert run.start is not None, "a layout has no holes"
        if not run.is_unwritten:
            piece = disk.pread(offset=run.start, length=run.length)
            content[run.offset : run.offset + run.length] = piece
    for start, end in layout.by_reader:
        content[start:end] = filesystem.read(node, offset=start, length=end - start)
    runs = filesystem.runs(node)
    if runs and not layout.by_reader:
        by_runs = read_runs(disk, runs, size=node.size, offset=0, length=node.size)
        assert by_runs == content, "a layout is the runs of what users see"
    return bytes(content)
