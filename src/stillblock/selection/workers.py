"""Starts workers, reads the disk for them, and believes nothing they say without a check.

A filesystem that was made to take over its reader gains a process that can do nothing but answer;
so answers are held to their form and to the bounds of the filesystem, and reads to the disk.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, Self, TypeVar

import stillblock
from stillblock import codec
from stillblock.errors import Blame, ExcludedError, StillblockError
from stillblock.model import Extents
from stillblock.selection.census import PARTS_MAX, Census, Part
from stillblock.selection.confinement import Limits
from stillblock.selection.disk import Disk, read_exactly
from stillblock.selection.file_questions import extents_of
from stillblock.selection.filesystems.filesystem import Identity, UnresolvedError
from stillblock.selection.filesystems.opening import READERS
from stillblock.selection.filesystems.signatures import Content
from stillblock.selection.lvm_text import DEPTH_MAX as LVM_DEPTH_MAX
from stillblock.selection.lvm_text import LvmTextError, Section
from stillblock.selection.survey import Group, Survey, SurveyRequest, Tally, shown
from stillblock.selection.wire import (
    READ,
    READ_BYTES_MAX,
    Kind,
    WireError,
    frame,
    receive,
    unpack_document,
)

ASKING_S_MAX: Final = 120.0
"""For asking all filesystems of a disk which they are. Somebody waits, and the volume with him."""
READING_S_MAX: Final = 3600.0
"""For reading all filesystems of a disk, each of which has its own limit. A snapshot is final only
then; the largest disks that are honest need some minutes."""
_PATH_LENGTH_MAX: Final = 4096
"""Characters of a path: as long as one may be."""
_CAVEATS_MAX: Final = 20

T = TypeVar("T")


class WorkerReaders:
    """Reads each filesystem in a process of its own, which ends with the request.

    All requests together have `total_s`, from the first on: a disk may have a thousand partitions,
    and each may have been made to let its reader hang.
    """

    def __init__(self, limits: Limits | None = None, *, total_s: float = READING_S_MAX) -> None:
        self._limits = limits or Limits()
        self._total_s = total_s
        self._deadline: float | None = None

    def identify(self, disk: Disk, *, content: Content) -> Identity:
        """Return which filesystem lies on a disk; raise `UnresolvedError`."""
        with self._worker(disk, content) as worker:
            return worker.identify()

    def survey(self, disk: Disk, *, content: Content, request: SurveyRequest) -> Survey:
        """Return what terms mean in the filesystem on a disk; raise `UnresolvedError`."""
        with self._worker(disk, content) as worker:
            return worker.survey(request)

    def census(self, disk: Disk, *, content: Content) -> Census:
        """Return which directories most of it belongs to; raise `UnresolvedError`."""
        with self._worker(disk, content) as worker:
            return worker.census()

    def parse_lvm(self, text: str) -> Section:
        """Return what the text of a volume group says; raise `LvmTextError` if that is not told."""
        try:
            with self._worker(None, None) as worker:
                return worker.parse_lvm(text)
        except UnresolvedError as error:
            raise LvmTextError(error.message) from error

    def _worker(self, disk: Disk | None, content: Content | None) -> "Worker":
        """Return one that ends with the time for all; raise `UnresolvedError` if that is over."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._total_s
        left_s = round(self._deadline - now, 1)
        if left_s <= 0:
            raise UnresolvedError(f"the {self._total_s:g} s for all readers together were over")
        limits = replace(self._limits, wall_s=min(self._limits.wall_s, left_s))
        return Worker(disk, reader=READERS[content] if content else "", limits=limits)


class Worker:
    """One worker process. Every request raises `UnresolvedError` if the worker fails at it, in
    whatever way; what the disk raises that is not the disk's fault is raised as it is.
    """

    def __init__(self, disk: Disk | None, *, reader: str, limits: Limits | None = None) -> None:
        """Say what to read and how; `reader` is `module:function` of one that opens it.

        No disk and no reader for a worker that is only given a text.
        """
        self._disk = disk or _Nothing()
        self._reader = reader
        self._limits = limits or Limits()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._deadline = 0.0
        self._first = b""

    def __enter__(self) -> Self:
        """Start it."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise UnresolvedError(f"its reader could not be started: {error.strerror}") from error
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _program(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_environment(),
                cwd="/",
            )
        except OSError as error:
            ours.close()
            raise UnresolvedError(f"its reader could not be started: {error.strerror}") from error
        finally:
            theirs.close()
        self._socket = ours
        setup = {
            "reader": self._reader,
            "size": self._disk.size,
            "limits": codec.to_json(self._limits),
        }
        self._deadline = time.monotonic() + self._limits.wall_s
        self._first = frame(Kind.SETUP, json.dumps(setup).encode())
        return self

    def __exit__(self, *_: object) -> None:
        """End it at once; it holds nothing that could be lost."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def is_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process is None or self._process.returncode is not None

    def identify(self) -> Identity:
        """Return which filesystem it is."""
        document, _ = self._request(Kind.IDENTIFY, {})
        return self._checked(lambda: _identity(document, size=self._disk.size))

    def survey(self, request: SurveyRequest) -> Survey:
        """Return what the terms of a request mean."""
        document, numbers = self._request(Kind.SURVEY, codec.to_json(request))
        return self._checked(
            lambda: _survey(document, numbers, request=request, size=self._disk.size)
        )

    def census(self) -> Census:
        """Return which directories most of it belongs to."""
        document, numbers = self._request(Kind.CENSUS, {})
        return self._checked(lambda: _census(document, numbers, size=self._disk.size))

    def parse_lvm(self, text: str) -> Section:
        """Return the sections and values of the text that describes an LVM2 volume group."""
        document, _ = self._ask(Kind.LVM, text.encode("utf-8", "surrogateescape"), unpack_document)
        return self._checked(lambda: _section(document, depth=0))

    def _checked(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except (codec.CodecError, WireError) as error:
            raise UnresolvedError(f"its reader gave a malformed answer: {error.message}") from error

    def _request(self, kind: Kind, document: object) -> tuple[object, "array[int]"]:
        return self._ask(kind, json.dumps(document).encode("ascii"), unpack_document)

    def _ask(self, kind: Kind, asked: bytes, unpack: Callable[[bytes], T]) -> T:
        self._deadline = time.monotonic() + self._limits.wall_s
        try:
            self._send(self._first + frame(kind, asked))
            self._first = b""
            while True:
                answer, payload = receive(self._take)
                match answer:
                    case Kind.READ:
                        self._send(self._read(payload))
                    case Kind.ANSWER:
                        return unpack(payload)
                    case Kind.FAILED:
                        raise UnresolvedError(shown(payload.decode("utf-8", "replace")))
                    case _:
                        raise WireError(f"it sent {answer.name}")
        except TimeoutError as error:
            raise UnresolvedError(
                f"its reader did not end within {self._limits.wall_s:g} s"
            ) from error
        except WireError as error:
            raise UnresolvedError(f"its reader broke off: {error.message}") from error

    def _read(self, payload: bytes) -> bytes:
        """Return the frame that answers a read."""
        if len(payload) != READ.size:
            raise WireError("it sent a malformed read")
        offset, length = READ.unpack(payload)
        if not 0 < length <= READ_BYTES_MAX or offset + length > self._disk.size:
            raise WireError(f"it asked for {length} bytes at {offset}")
        try:
            return frame(Kind.DATA, read_exactly(self._disk, offset=offset, length=length))
        except StillblockError as error:
            if not is_of_disk(error):
                raise
            return frame(Kind.READ_FAILED, error.message.encode("utf-8", "replace"))

    def _send(self, data: bytes) -> None:
        assert self._socket is not None, "it was started"
        self._socket.settimeout(self._left_s())
        try:
            self._socket.sendall(data)
        except TimeoutError:
            raise
        except OSError as error:
            raise WireError(self._epitaph()) from error

    def _take(self, length: int) -> bytes:
        assert self._socket is not None, "it was started"
        parts: list[bytes] = []
        while length > 0:
            self._socket.settimeout(self._left_s())
            try:
                part = self._socket.recv(min(length, READ_BYTES_MAX))
            except TimeoutError:
                raise
            except OSError as error:
                raise WireError(self._epitaph()) from error
            if not part:
                raise WireError(self._epitaph())
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _left_s(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _epitaph(self) -> str:
        """Return what became of a worker that hung up."""
        assert self._process is not None, "it was started"
        try:
            code = self._process.wait(timeout=max(0.1, self._left_s()))
        except subprocess.TimeoutExpired as error:
            raise TimeoutError from error
        if code == -signal.SIGXCPU:
            return f"it used more than {self._limits.cpu_s} s of processor time"
        if code < 0:
            return f"it was ended by {signal.Signals(-code).name}"
        return f"it ended with code {code}"


class _Nothing:
    """What a worker reads that reads no disk."""

    size = 0

    def pread(self, *, offset: int, length: int) -> bytes:
        """Never called: no read lies inside."""
        raise WireError(f"it asked for {length} bytes at {offset}")


def is_of_disk(error: StillblockError) -> bool:
    """Whether bytes could not be had; anything else, such as a closed volume, ends the work."""
    return error.blame is Blame.DISK or isinstance(error, ExcludedError)


def _environment() -> dict[str, str]:
    """Return what an interpreter needs that was built to find its libraries so, and no more."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def _program(descriptor: int) -> str:
    """Return what the interpreter runs: this package, from where this process has it."""
    root = str(Path(stillblock.__file__).parent.parent)
    # Not the current directory, and nothing that is no path of modules.
    path = list(
        dict.fromkeys([root, *(str(Path(entry).absolute()) for entry in sys.path if entry)])
    )
    return (
        f"import sys; sys.path[:] = {path!r}; "
        f"from stillblock.selection.worker import main; main({descriptor})"
    )


# Answers --------------------------------------------------------------------------------------


def _identity(document: object, *, size: int) -> Identity:
    identity = codec.from_json(Identity, document)
    if not 0 < identity.size <= size or identity.block_size <= 0:
        raise WireError(f"a filesystem of {identity.size} bytes on {size}")
    return Identity(
        kind=shown(identity.kind),
        label=shown(identity.label),
        uuid=shown(identity.uuid),
        block_size=identity.block_size,
        size=identity.size,
        is_case_sensitive=identity.is_case_sensitive,
    )


def _section(document: object, *, depth: int) -> Section:
    if not isinstance(document, dict) or depth > LVM_DEPTH_MAX:
        raise WireError("a section that is none")
    section: Section = {}
    for name, value in document.items():
        if isinstance(value, dict):
            section[name] = _section(value, depth=depth + 1)
        elif isinstance(value, list):
            section[name] = [_scalar(item) for item in value]
        else:
            section[name] = _scalar(value)
    return section


def _scalar(value: object) -> int | str:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise WireError("a section with a value that is neither number nor text")


def _survey(
    document: object, numbers: "array[int]", *, request: SurveyRequest, size: int
) -> Survey:
    if not isinstance(document, dict):
        raise WireError("a survey that is no object")
    groups = codec.from_json(tuple[tuple[int, ...], ...], document.get("groups"))
    counts = codec.from_json(tuple[int, ...], document.get("counts"))
    tallies = codec.from_json(tuple[Tally, ...], document.get("tallies"))
    caveats = codec.from_json(tuple[str, ...], document.get("caveats"))
    reasons = codec.from_json(
        tuple[str, str], [document.get("files_reason"), document.get("free_reason")]
    )
    term_count = len(request.terms)
    if len(counts) != len(groups) + 3 or len(tallies) != term_count:
        raise WireError("a survey whose parts do not fit one another")
    if any(not 0 <= index < term_count for group in groups for index in group):
        raise WireError("a survey of terms that nobody asked for")
    identity = _identity(document.get("identity"), size=size)
    extents = _in_lists(numbers, counts, size=identity.size)
    return Survey(
        identity=identity,
        caveats=tuple(shown(caveat) for caveat in caveats[:_CAVEATS_MAX]),
        groups=tuple(
            Group(terms=terms, extents=found)
            for terms, found in zip(groups, extents[:-3], strict=True)
        ),
        contested=extents[-3],
        free=extents[-2],
        metadata=extents[-1],
        tallies=tuple(_tally(tally) for tally in tallies),
        files_reason=shown(reasons[0]),
        free_reason=shown(reasons[1]),
    )


def _census(document: object, numbers: "array[int]", *, size: int) -> Census:
    if not isinstance(document, dict):
        raise WireError("a census that is no object")
    paths = codec.from_json(tuple[str, ...], document.get("paths"))
    counts = codec.from_json(tuple[int, ...], document.get("counts"))
    if len(paths) > PARTS_MAX or len(counts) != len(paths) + 1:
        raise WireError("a census whose parts do not fit one another")
    extents = _in_lists(numbers, counts, size=size)
    return Census(
        parts=tuple(
            Part(path=path[:_PATH_LENGTH_MAX], extents=found)
            for path, found in zip(paths, extents[:-1], strict=True)
        ),
        free=extents[-1],
    )


def _tally(tally: Tally) -> Tally:
    counts = (tally.file_count, tally.file_bytes, tally.unmapped_count, tally.linked_count)
    if any(count < 0 for count in counts):
        raise WireError("a survey that counts less than nothing")
    return Tally(
        file_count=tally.file_count,
        file_bytes=tally.file_bytes,
        unmapped_count=tally.unmapped_count,
        unmapped_reason=shown(tally.unmapped_reason),
        linked_count=tally.linked_count,
    )


def _in_lists(numbers: "array[int]", counts: tuple[int, ...], *, size: int) -> list[Extents]:
    """Return the extents behind an answer, in lists of as many as it counts."""
    if any(count < 0 for count in counts) or sum(counts) * 2 != len(numbers):
        raise WireError("other extents than it counts")
    found: list[Extents] = []
    position = 0
    for count in counts:
        found.append(extents_of(numbers[position : position + 2 * count], size=size))
        position += 2 * count
    return found
