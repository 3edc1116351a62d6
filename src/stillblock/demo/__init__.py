"""`stillblock demo`: the whole idea on a real disk, proved byte for byte, without root.

A stranger to the rest of the package on purpose: it types the commands a user types and talks to
the disk as a client does, so that what it shows is what there is.
"""

from stillblock.demo.story import main

__all__ = ["main"]
