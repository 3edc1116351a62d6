"""Mounts of what a server shows: what is written down, what the kernel says, how they end.

`records` is what is to be undone, `kernel` the kernel's tables and the system's commands, `options`
how each filesystem is mounted without changing it, `leftovers` which of all that is ours.
"""
