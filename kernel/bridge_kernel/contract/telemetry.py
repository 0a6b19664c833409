"""A telemetry event, in the shape of Elixir's `:telemetry`, where it belongs in a trace, and its MIME type."""

from __future__ import annotations

import os
from typing import Annotated, Final

import msgspec

__all__ = ("TELEMETRY_MIME", "Event", "EventBatch", "Scalar", "Trace", "display_id")

TELEMETRY_MIME: Final = "application/vnd.bridge.telemetry.v1+json"

Scalar = str | int | float | bool | None


def display_id(comm_id: str, command: int | str) -> str:
    """The id of the display in which a command's telemetry is shown."""
    return f"bridge-{comm_id}-{command}"


class Event(msgspec.Struct, frozen=True):
    """One event.

    `name` ends in `start`, `stop` or `exception` for what has a duration. Durations are native
    nanoseconds, sizes bytes; `system_time` (ns since the epoch) is in every `start`. Metadata never
    holds arguments, values or secrets.
    """

    name: tuple[str, ...]
    measurements: dict[str, int | float]
    metadata: dict[str, Scalar]


class EventBatch(msgspec.Struct, frozen=True):
    """What `TELEMETRY_MIME` carries: the events of one command since its last update, oldest first.

    `dropped` counts events that the command's buffer had no room for; never silently.
    """

    command: Annotated[int | str, msgspec.Meta(description="The id of the command's JSON-RPC request.")]
    events: tuple[Event, ...]
    dropped: int = 0


class Trace(msgspec.Struct, frozen=True):
    """Where an event belongs: W3C trace context, https://www.w3.org/TR/trace-context/."""

    trace_id: str
    span_id: str
    parent_span_id: str | None = None

    @classmethod
    def child_of(cls, traceparent: str | None) -> Trace:
        """A new span beneath `traceparent`, or the root of a new trace."""
        span_id = os.urandom(8).hex()
        if traceparent is None:
            return cls(os.urandom(16).hex(), span_id)
        _, trace_id, parent, _ = traceparent.split("-")
        return cls(trace_id, span_id, parent)

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-01"
