"""Questions about files on the wire: how a worker answers them, and how its parent reads that.

A node travels as the list of its fields, an entry as [name, node, target, changed bytes, digest,
reason]. Runs are pairs of u64 behind a document: offset and length, then start and 1 if unwritten.
"""

import json
from array import array
from collections.abc import Sequence
from typing import Final

from stillblock.model import Extent, Extents
from stillblock.selection.files import BATCH_MAX, TARGET_BYTES_MAX, Entry, Files, Missing
from stillblock.selection.filesystems.filesystem import FileKind, Layout, Node, Run
from stillblock.selection.wire import Kind, WireError, pack_document, unpack_document

CONTENT_BYTES_MAX: Final = 1 << 20
"""What one question for bytes may ask for."""
TEXT_LENGTH_MAX: Final = 4096
_NAME_BYTES_MAX: Final = 1024
"""NTFS has names of 255 UTF-16 units; links lead further (`TARGET_BYTES_MAX`)."""
_KINDS: Final = {str(kind): kind for kind in FileKind}


def answer_about_files(files: Files, kind: Kind, payload: bytes) -> bytes:
    """Answer a question, in the worker."""
    match kind:
        case Kind.FIND:
            asked = json.loads(payload)
            found = files.find(asked["path"], follows=asked["follows"])
            if isinstance(found, Missing):
                return pack_document({"missing": found.reason})
            return pack_document({"entry": _row(found)})
        case Kind.LIST:
            asked = json.loads(payload)
            entries, is_end = files.batch(node_of(asked["node"]), position=asked["position"])
            return pack_document({"entries": [_row(entry) for entry in entries], "is_end": is_end})
        case Kind.LAYOUT:
            layout = files.layout(node_of(json.loads(payload)["node"]))
            runs: list[Extent] = []
            for run in layout.runs:
                assert run.start is not None, "a layout has no holes"
                runs += [(run.offset, run.length), (run.start, int(run.is_unwritten))]
            document = {"counts": [len(runs), len(layout.by_reader)]}
            return pack_document(document, (tuple(runs), layout.by_reader))
        case Kind.CONTENT:
            asked = json.loads(payload)
            node = node_of(asked["node"])
            return files.read(node, offset=asked["offset"], length=asked["length"])
        case Kind.HOLD_AGAINST:
            _, numbers = unpack_document(payload)
            files.hold_against(tuple(zip(numbers[::2], numbers[1::2], strict=True)))
            return pack_document({})
        case Kind.TOUCHED:
            touched, free = files.touched()
            return pack_document({"counts": [len(touched), len(free)]}, (touched, free))
        case _:
            raise WireError(f"{kind.name} is no request")


def _row(entry: Entry) -> list[object]:
    return [entry.name, row_of(entry.node), *entry[2:]]


def row_of(node: Node) -> list[object]:
    """Return a node as it travels."""
    return [
        node.number,
        node.generation,
        str(node.kind),
        node.size,
        node.links,
        node.mode,
        node.uid,
        node.gid,
        node.modified_ns,
    ]


# What a worker says is held to its form -----------------------------------------------------------


def node_of(row: object) -> Node:
    """Return a node; raise `WireError` if it is none."""
    if not isinstance(row, list) or len(row) != 9 or row[2] not in _KINDS:
        raise WireError("a node that is none")
    numbers = [value for index, value in enumerate(row) if index != 2]
    if any(type(value) is not int for value in numbers) or min(numbers[:-1]) < 0:
        raise WireError("a node with fields that are no numbers")
    number, generation, kind, size, links, mode, uid, gid, modified_ns = row
    if size >= 1 << 63 or mode > 0o7777 or max(uid, gid) >= 1 << 32:
        raise WireError("a node with numbers that cannot be")
    return Node(
        number=number,
        generation=generation,
        kind=_KINDS[kind],
        size=size,
        links=links,
        mode=mode,
        uid=uid,
        gid=gid,
        modified_ns=modified_ns,
    )


def found_of(document: object) -> Entry | Missing:
    """Return what a path leads to, or why nowhere."""
    if isinstance(document, dict):
        if isinstance(missing := document.get("missing"), str):
            return Missing(missing[:TEXT_LENGTH_MAX])
        return _entry_of(document.get("entry"), is_path=True)
    raise WireError("neither an entry nor why there is none")


def batch_of(document: object) -> tuple[list[Entry], bool]:
    """Return entries of a directory and whether they are the last."""
    if isinstance(document, dict):
        rows, is_end = document.get("entries"), document.get("is_end")
        if isinstance(rows, list) and isinstance(is_end, bool) and len(rows) <= BATCH_MAX:
            return [_entry_of(row, is_path=False) for row in rows], is_end
    raise WireError("a listing that is none")


def layout_of(document: object, numbers: "array[int]", *, node: Node, size: int) -> Layout:
    """Return where bytes are: of the file, and inside a filesystem of `size` bytes."""
    run_count, _ = counts_of(document, numbers, count=2)
    if run_count % 2:
        raise WireError("a layout that does not fit its counts")
    runs: list[Run] = []
    end = 0
    for at in range(0, run_count * 2, 4):
        offset, length, start, is_unwritten = numbers[at : at + 4]
        if offset < end or not 0 < length <= node.size - offset or start + length > size:
            raise WireError("a file with pieces out of order, beyond its size or elsewhere")
        runs.append(Run(offset, length, start, bool(is_unwritten)))
        end = offset + length
    by_reader = extents_of(numbers[run_count * 2 :], size=node.size)
    return Layout(tuple(runs), by_reader)


def counts_of(document: object, numbers: Sequence[int], *, count: int) -> tuple[int, ...]:
    """Return how many extents of each kind an answer has."""
    counts = document.get("counts") if isinstance(document, dict) else None
    if (
        not isinstance(counts, list)
        or len(counts) != count
        or any(type(value) is not int or value < 0 for value in counts)
        or sum(counts) * 2 != len(numbers)
    ):
        raise WireError("other extents than it counts")
    return tuple(counts)


def extents_of(numbers: Sequence[int], *, size: int) -> Extents:
    """Return normal extents within `size`."""
    found: list[Extent] = []
    last = -1
    for start, end in zip(numbers[::2], numbers[1::2], strict=True):
        if not last < start < end <= size:
            raise WireError("extents out of order or outside")
        found.append((start, end))
        last = end
    return tuple(found)


def _entry_of(row: object, *, is_path: bool) -> Entry:
    if not isinstance(row, list) or len(row) != 6:
        raise WireError("an entry that is none")
    name, node, target, changed_bytes, digest, reason = row
    is_text = isinstance(name, str) and isinstance(digest, str) and isinstance(reason, str)
    if not is_text or not isinstance(target, str | None) or type(changed_bytes) is not int:
        raise WireError("an entry with fields of other kinds")
    if not is_path and not is_name(name):
        raise WireError("a name that is none")
    if target is not None and len(target) > TARGET_BYTES_MAX:
        raise WireError("a link that leads too far")
    return Entry(name, node_of(node), target, changed_bytes, digest[:64], reason[:TEXT_LENGTH_MAX])


def is_name(name: str) -> bool:
    """Whether it can be a name in a directory, and leads nowhere else."""
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        return False
    return len(name) <= _NAME_BYTES_MAX
