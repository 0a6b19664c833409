"""What OpenTelemetry can carry: one value that it cannot would cost the whole batch."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    Value = str | int | float | bool

__all__ = ("MAX_TEXT", "carried", "carried_text")

MAX_ATTRIBUTES: Final = 128
MAX_TEXT: Final = 8192


def carried(said: Mapping[str, object]) -> dict[str, Value]:
    """The first 128 of these attributes."""
    # Not OpenTelemetry's BoundedAttributes: it lets integers of more than 64 bits and half surrogate pairs through,
    # and is half of what a span costs.
    return {carried_text(name): _value(value) for name, value in islice(said.items(), MAX_ATTRIBUTES)}


def _value(value: object) -> Value:
    kind = type(value)
    if kind is str:
        return carried_text(value)  # type: ignore[arg-type]
    if kind is bool or kind is float:
        return value  # type: ignore[return-value]
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else f"an integer of {value.bit_length()} bits"
    return carried_text(str(value))


def carried_text(text: str, most: int = MAX_TEXT) -> str:
    text = text[:most]
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
