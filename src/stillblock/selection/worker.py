"""A worker: the process that reads one filesystem, or one text, for a parent that reads the disk.

It imports what it needs, gives up every right, and only then sees the first byte of the disk. What
it is asked and answers is in wire.py; who starts it is in workers.py.
"""

import codecs
import gc
import json
import os
from collections import OrderedDict
from contextlib import suppress
from typing import Final, NoReturn

from stillblock import codec
from stillblock.errors import OriginIOError, StillblockError
from stillblock.model import format_size
from stillblock.selection.census import Census, take_census
from stillblock.selection.confinement import Limits, confine
from stillblock.selection.file_questions import answer_about_files
from stillblock.selection.files import Files
from stillblock.selection.filesystems.filesystem import Filesystem
from stillblock.selection.filesystems.opening import Reader, load_reader
from stillblock.selection.lvm_text import parse_lvm_text
from stillblock.selection.survey import Survey, SurveyRequest, survey
from stillblock.selection.wire import (
    READ,
    READ_BYTES_MAX,
    Kind,
    WireError,
    frame,
    pack_document,
    receive,
)

_CHUNK_BYTES: Final = 64 * 1024
_CHUNKS_MAX: Final = 512
"""32 MiB of what was read are kept: a question to the parent costs more than looking here."""
_WHOLE_BYTES_MIN: Final = 256 * 1024
"""Reads as long as this are not kept: who asks for so much goes through it once."""
_COLLECT_EVERY: Final = 100_000
"""Objects made between looks for cycles: a tree has many nodes and no cycles."""
_ENCODINGS: Final = ("utf-16-le", "utf-16-be", "latin-1", "ascii", "utf-8", "cp437", "cp850")
"""Encodings of names; a codec is a module, and none can be imported later."""


def main(descriptor: int) -> NoReturn:
    """Serve requests on a socket until it closes. Never returns: no exit handler runs."""
    channel = _Channel(descriptor)
    status = 1
    try:
        kind, payload = channel.receive()
        if kind is not Kind.SETUP:
            raise WireError("the first frame sets up")
        setup = json.loads(payload)
        reader = load_reader(setup["reader"]) if setup["reader"] else None
        for encoding in _ENCODINGS:
            codecs.lookup(encoding)
        limits = codec.from_json(Limits, setup["limits"])
        gc.freeze()
        gc.set_threshold(_COLLECT_EVERY)
        confine(limits)
        _serve(channel, reader, _RemoteDisk(channel, setup["size"]), limits)
        status = 0
    except WireError:
        pass  # the parent is gone, and with it everyone who could be told
    finally:
        os._exit(status)


def _serve(channel: "_Channel", reader: Reader | None, disk: "_RemoteDisk", limits: Limits) -> None:
    filesystem: Filesystem | None = None
    files: Files | None = None
    while True:
        kind, payload = channel.receive()
        try:
            if kind is Kind.LVM:
                answer = pack_document(parse_lvm_text(payload.decode("utf-8", "surrogateescape")))
            elif reader is None:
                raise WireError(f"{kind.name} needs a reader")
            else:
                if filesystem is None:
                    filesystem = reader(disk)
                    files = Files(filesystem)
                assert files is not None, "both are made at once"
                answer = _answer(filesystem, files, kind, payload)
        except WireError:
            raise
        except MemoryError:
            memory = format_size(limits.memory_bytes)
            channel.send(Kind.FAILED, f"reading it needs more memory than {memory}".encode())
        except StillblockError as error:
            channel.send(Kind.FAILED, error.message.encode("utf-8", "replace")[:4096])
        except Exception as error:  # noqa: BLE001  # a reader's defect, found by what it read
            text = f"its reader failed with {type(error).__name__}: {error}"
            channel.send(Kind.FAILED, text.encode("utf-8", "replace")[:4096])
        else:
            channel.send(Kind.ANSWER, answer)


def _answer(filesystem: Filesystem, files: Files, kind: Kind, payload: bytes) -> bytes:
    match kind:
        case Kind.IDENTIFY:
            return pack_document(codec.to_json(filesystem.identity))
        case Kind.SURVEY:
            request = codec.from_json(SurveyRequest, json.loads(payload))
            return pack_survey(survey(filesystem, request))
        case Kind.CENSUS:
            return pack_census(take_census(filesystem))
        case _:
            return answer_about_files(files, kind, payload)


def pack_survey(found: Survey) -> bytes:
    """Return a survey as a document that counts its extents, and the extents."""
    extents = [*(group.extents for group in found.groups), found.contested, found.free]
    extents.append(found.metadata)
    document = {
        "identity": codec.to_json(found.identity),
        "caveats": list(found.caveats),
        "groups": [list(group.terms) for group in found.groups],
        "counts": [len(several) for several in extents],
        "tallies": codec.to_json(found.tallies),
        "files_reason": found.files_reason,
        "free_reason": found.free_reason,
    }
    return pack_document(document, extents)


def pack_census(found: Census) -> bytes:
    """Return a census as a document of paths that counts its extents, and the extents."""
    extents = [*(part.extents for part in found.parts), found.free]
    # As JSON escapes them, names that are no UTF-8 come through.
    document = {
        "paths": [part.path for part in found.parts],
        "counts": [len(several) for several in extents],
    }
    return pack_document(document, extents)


class _Channel:
    """Frames over a descriptor, by plain reads and writes: those need no further call."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, kind: Kind, payload: bytes) -> None:
        """Send one frame."""
        rest = memoryview(frame(kind, payload))
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            raise WireError("the parent is gone") from error

    def receive(self) -> tuple[Kind, bytes]:
        """Return the next frame; raise `WireError` if the parent is gone."""
        return receive(self._take)

    def _take(self, length: int) -> bytes:
        parts: list[bytes] = []
        while length > 0:
            part = os.read(self._descriptor, length)
            if not part:
                raise WireError("the parent is gone")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


class _RemoteDisk:
    """The disk, as far as the parent gives it out."""

    def __init__(self, channel: _Channel, size: int) -> None:
        self._channel = channel
        self._size = size
        self._chunks: OrderedDict[int, bytes | None] = OrderedDict()
        """None: not all of it can be read, and each piece is asked for by itself."""

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self._size

    def pread(self, *, offset: int, length: int) -> bytes:
        """Read; short at the end, and an error where the parent has one."""
        length = min(length, self._size - offset)
        if length <= 0 or offset < 0:
            return b""
        parts: list[bytes] = []
        while length > 0:
            part = self._part(offset=offset, length=length)
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _part(self, *, offset: int, length: int) -> bytes:
        """Return some of what lies at `offset`, at most `length` bytes."""
        if length >= _WHOLE_BYTES_MIN:
            # What cannot be read is told chunk by chunk.
            with suppress(OriginIOError):
                return self._ask(offset, min(length, READ_BYTES_MAX))
        within = offset % _CHUNK_BYTES
        chunk = self._chunk(offset - within)
        if chunk is None:
            # Something near it cannot be read; what was asked for perhaps can.
            return self._ask(offset, min(length, _CHUNK_BYTES - within))
        return chunk[within : within + length]

    def _chunk(self, start: int) -> bytes | None:
        if start in self._chunks:
            self._chunks.move_to_end(start)
            return self._chunks[start]
        chunk: bytes | None = None
        with suppress(OriginIOError):
            chunk = self._ask(start, min(_CHUNK_BYTES, self._size - start))
        self._chunks[start] = chunk
        if len(self._chunks) > _CHUNKS_MAX:
            self._chunks.popitem(last=False)
        return chunk

    def _ask(self, start: int, count: int) -> bytes:
        assert count <= READ_BYTES_MAX, "chunks are smaller"
        self._channel.send(Kind.READ, READ.pack(start, count))
        kind, payload = self._channel.receive()
        if kind is Kind.READ_FAILED:
            raise OriginIOError(payload.decode("utf-8", "replace"))
        if kind is not Kind.DATA or len(payload) != count:
            raise WireError("the parent answered a read with something else")
        return payload
