"""What numbers an option of a pool takes: an error names the option, what it takes and what it was given."""

from __future__ import annotations

import math

__all__ = ("require_seconds", "require_whole")


def require_whole(name: str, value: object, least: int) -> None:
    """Raises `TypeError`: not a whole number. `ValueError`: less than `least`."""
    complaint = f"{name} is a whole number, {least} or more, not {value!r:.100}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(complaint)
    if value < least:
        raise ValueError(complaint)


def require_seconds(name: str, value: object, *, most: float | None = None, none: str = "") -> None:
    """Raises `TypeError`: not a number. `ValueError`: not more than 0, not finite, or more than `most`.

    `none` says what None means, where the caller takes it.
    """
    bound = "" if most is None else f" and at most {most:g}"
    complaint = f"{name} is in seconds, more than 0{bound}{f', or None for {none}' if none else ''}, not {value!r:.100}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(complaint)
    if not 0 < value < math.inf or (most is not None and value > most):
        raise ValueError(complaint)
