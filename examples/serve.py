"""Serve a disk and a snapshot of it over NBD from a process of your own, until a line is read.

    python examples/serve.py STORE SOCKET

This is the engine itself (`stillblock.native`), below names, rules and receipts; unlike docs/api.md
it may change in any version. `stillblock serve` is the same with all of that.
"""

import sys
from pathlib import Path

from stillblock import native


def main() -> None:
    """Serve `live` and `still`; the snapshot goes when this ends."""
    store, socket = Path(sys.argv[1]), Path(sys.argv[2])
    volume = native.Volume.open(store)
    instant = volume.snapshot(selection=((0, volume.size_bytes),), meta=b"", pause_limit_ms=2000)
    view = volume.view(epoch=instant.epoch)
    server = native.Server()
    changed = ("x-stillblock:changed:still", "changed", instant.epoch)
    server.add_volume("live", volume, description="the live disk", contexts=[changed])
    server.add_view("still", view, description="as it was", contexts=[])
    server.listen_unix(socket)
    print(f"nbd+unix:///live?socket={socket}", flush=True)
    print(f"nbd+unix:///still?socket={socket}", flush=True)
    sys.stdin.readline()
    server.stop()
    view.close()
    volume.delete_snapshot(epoch=instant.epoch)
    volume.close()


if __name__ == "__main__":
    main()
