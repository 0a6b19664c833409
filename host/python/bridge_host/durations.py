"""Lengths of time as people write them: `90`, `"90s"`, `"10m"`, `"1h"`, `"7d"`."""

from __future__ import annotations

import math
import re
from typing import Final

__all__ = ("Duration", "seconds_of", "written")

Duration = float | str
"""Seconds, or a text: a number and one of s, m, h, d."""

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_TEXT: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)([smhd])")


def seconds_of(duration: object, what: str = "a duration") -> float:
    """A length of time in seconds, more than 0. `what` is what an error calls it.

    Raises:
        TypeError: it is neither a number nor a text.
        ValueError: it is a text of another form, or not more than 0, or endless.
    """
    how = f'{what} is given in seconds (90) or as "90s", "10m", "1h", "7d"'
    if isinstance(duration, str):
        found = _TEXT.fullmatch(duration)
        if found is None:
            raise ValueError(f"{how}, not as {duration[:60]!r}")
        duration = float(found[1]) * _UNITS[found[2]]
    elif isinstance(duration, bool) or not isinstance(duration, int | float):
        raise TypeError(f"{how}, not as {duration!r}")
    try:
        seconds = float(duration)
    except OverflowError:
        seconds = math.inf
    if not 0 < seconds < math.inf:
        raise ValueError(f"{how}, and is more than 0 and not endless: not {duration!r}")
    return seconds


def written(seconds: float) -> str:
    """As people write it, in the largest unit of which it is a whole number: `"1h"`."""
    for unit, size in reversed(_UNITS.items()):
        if seconds % size == 0:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:g}s"
