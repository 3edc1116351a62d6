"""Bring the users of a disk to a consistent point, take the instant, let them go on.

Of the volume it knows only what `mounts.WatchedReads` and `quiesce.WatchedVolume` say.
"""
