"""What numbers an option of a pool takes: an error names the option, what it takes and what it was given."""

from __future__ import annotations

import math

__all__ = ("require_flag", "require_seconds", "require_share", "require_whole")


def require_flag(name: str, value: object) -> None:
    """Raises `TypeError`: neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {value!r:.100}")


def require_whole(name: str, value: object, least: int, *, most: int | None = None) -> None:
    """Raises `TypeError`: not a whole number. `ValueError`: less than `least`, or more than `most`."""
    bound = "or more" if most is None else f"to {most}"
    complaint = f"{name} is a whole number, {least} {bound}, not {value!r:.100}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(complaint)
    if value < least or (most is not None and value > most):
        raise ValueError(complaint)


def require_share(name: str, value: object, *, none: str) -> None:
    """Raises `TypeError`: not a number. `ValueError`: not more than 0, or more than 1. `none` says what None means."""
    complaint = f"{name} is a share, more than 0 and at most 1, or None for {none}, not {value!r:.100}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(complaint)
    if not 0 < value <= 1:
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
