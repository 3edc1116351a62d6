"""Times as FAT and exFAT have them: local, in steps of two seconds since 1980."""

import datetime as dt


def seconds_of(stamp: int) -> int | None:
    """Return seconds since 1970, as if local time were UTC; None if there is no such time.

    `stamp` is the date in the upper half and the time in the lower one, 16 bits each.
    """
    try:
        moment = dt.datetime(
            1980 + (stamp >> 25),
            stamp >> 21 & 15,
            stamp >> 16 & 31,
            stamp >> 11 & 31,
            stamp >> 5 & 63,
            (stamp & 31) * 2,
            tzinfo=dt.UTC,
        )
    except ValueError:
        return None
    return int(moment.timestamp())
