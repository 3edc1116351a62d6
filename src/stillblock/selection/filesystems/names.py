"""Names that are UTF-16 on disk, and names that cannot be."""

from stillblock.selection.filesystems.filesystem import UnresolvedError


def text_of_utf16(name: bytes) -> str:
    """Return little-endian UTF-16 as text.

    Lone surrogates, which have no UTF-8, come as `os.fsdecode` shows what FUSE drivers make of
    them.
    """
    try:
        return name.decode("utf-16-le")
    except UnicodeDecodeError:
        text = name.decode("utf-16-le", "surrogatepass")
        return text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")


def checked_name(name: str) -> str:
    """Return a name; raise `UnresolvedError` for one that would make another path than its own."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise UnresolvedError(f"a directory has the impossible name {name!r}: it is damaged")
    return name
