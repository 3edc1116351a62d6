"""The writer of `stall`: random 4 KiB writes, some deep, noting when completions arrive.

A process of its own (`python -m bench.writer URI REGION_BYTES DEPTH SECONDS OUT`), so that taking
snapshots does not disturb it.
"""

import array
import gc
import random
import sys
import time
from pathlib import Path

from bench.errors import PeerError
from bench.nbd import SIMPLE_REPLY, WRITE, NbdClient, request
from bench.units import BLOCK_BYTES

RECEIVE_BYTES = 65536
DATA_SEED, PLACE_SEED = 2, 3


def write_and_note(
    uri: str, *, region_bytes: int, depth: int, seconds: float
) -> "array.array[float]":
    """Write for that long; return the monotonic time of each receipt of completions."""
    connection = NbdClient(uri).socket
    data = random.Random(DATA_SEED).randbytes(BLOCK_BYTES)
    choose = random.Random(PLACE_SEED).randrange
    block_count = region_bytes // BLOCK_BYTES
    stamps = array.array("d")
    rest = b""
    cookie = 0
    to_send = depth
    # A collection would show as a gap that no server caused.
    gc.disable()
    end = time.monotonic() + seconds
    while True:
        parts = []
        for _ in range(to_send):
            cookie += 1
            offset = choose(block_count) * BLOCK_BYTES
            parts += [request(WRITE, cookie=cookie, offset=offset, length=BLOCK_BYTES), data]
        connection.sendall(b"".join(parts))
        received = connection.recv(RECEIVE_BYTES)
        now = time.monotonic()
        stamps.append(now)
        if not received:
            raise PeerError("the server hung up")
        replies = rest + received
        to_send = len(replies) // SIMPLE_REPLY.size
        whole = to_send * SIMPLE_REPLY.size
        rest = replies[whole:]
        if any(error for _, error, _ in SIMPLE_REPLY.iter_unpack(replies[:whole])):
            raise PeerError("a write failed")
        if now > end:
            return stamps


def main(arguments: list[str]) -> None:
    """Write as told and leave the times in the last argument's file."""
    uri, region, depth, seconds, out = arguments
    stamps = write_and_note(uri, region_bytes=int(region), depth=int(depth), seconds=float(seconds))
    with Path(out).open("wb") as file:
        stamps.tofile(file)


if __name__ == "__main__":
    main(sys.argv[1:])
