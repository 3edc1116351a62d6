"""List what changed from one snapshot to another, or to now.

    python examples/what_changed.py VOLUME OLDER [NEWER]

One line an extent: start, length, and whether it is all zeros now.
"""

import sys

import stillblock


def main() -> None:
    """Print the changed extents and their sum."""
    name, older, *newer = sys.argv[1:]
    with stillblock.open(name) as volume:
        since = volume.find(older)
        until = volume.find(newer[0]) if newer else None
        changed = until.changed_since(since) if until else volume.changed_since(since)
        view = until.view() if until else None
        for start, end in changed:
            length = end - start
            now = (view or volume).pread(offset=start, length=length)
            print(f"{start:>14} {length:>10} {'' if any(now) else 'zeros'}".rstrip())
        if view:
            view.close()
    print(f"{sum(end - start for start, end in changed)} bytes in {len(changed)} extents")


if __name__ == "__main__":
    main()
