"""What can go wrong in a benchmark, by whose fault."""


class BenchError(Exception):
    """The benchmark cannot go on with this session or run; the message says why."""


class UsageError(BenchError):
    """The caller asked for something that makes no sense or cannot be measured here."""


class PeerError(BenchError):
    """A server, fio or another tool failed or answered what it must not."""


class MissingToolError(BenchError):
    """A program that this target needs is not installed."""
