"""A telemetry event, in the shape of Elixir's `:telemetry`, where it belongs in a trace, and its MIME type."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = (
    "CAPTURES",
    "TELEMETRY_MIME",
    "Capture",
    "Event",
    "EventBatch",
    "Scalar",
    "TelemetryOptions",
    "Trace",
    "begins_with_any",
    "display_id",
    "new_span_id",
    "traceparent_of",
)

TELEMETRY_MIME: Final = "application/vnd.bridge.telemetry.v1+json"

Scalar = str | int | float | bool | None

Capture = Literal["arguments", "results", "prompts", "completions"]
CAPTURES: Final[tuple[Capture, ...]] = ("arguments", "results", "prompts", "completions")
"""What telemetry may hold of the values themselves, each only if the session asks for it."""


def display_id(comm_id: str, command: int | str) -> str:
    """The id of the display in which a command's telemetry is shown."""
    return f"bridge-{comm_id}-{command}"


def begins_with_any(name: tuple[str, ...], prefixes: Iterable[tuple[str, ...]]) -> bool:
    """Whether an event's name begins with one of these: `("bridge", "callback")`."""
    return any(name[: len(prefix)] == prefix for prefix in prefixes)


class Event(msgspec.Struct, frozen=True):
    """One event.

    `name` ends in `start`, `stop` or `exception` for what has a duration. Durations are native
    nanoseconds, sizes bytes; `system_time` (ns since the epoch) is in every `start`. Metadata never
    holds secrets, and arguments, results, prompts and completions only where a session asks for it.
    """

    name: tuple[str, ...]
    measurements: dict[str, int | float]
    metadata: dict[str, Scalar]


class EventBatch(msgspec.Struct, frozen=True):
    """The events of one command since its last update, oldest first. `TELEMETRY_MIME` carries a list of these: of one
    command while it runs and when it ends, of several short ones that have ended, where they come in quick succession.

    `metadata` is what all of them share, beside their own. `dropped` counts events that the command's buffer had
    no room for; never silently. `settled`: the command has ended, and this is its last update.
    """

    command: Annotated[int | str, msgspec.Meta(description="The id of the command's JSON-RPC request.")]
    metadata: dict[str, Scalar]
    events: tuple[Event, ...]
    dropped: int = 0
    settled: bool = False

    def whole(self) -> Iterator[Event]:
        """The events, each with all its metadata."""
        shared = self.metadata
        return (Event(event.name, event.measurements, {**shared, **event.metadata}) for event in self.events)


class TelemetryOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a command's telemetry is to be: sent with the command, for a kernel remembers nothing."""

    off: Annotated[
        tuple[tuple[str, ...], ...],
        msgspec.Meta(
            description='Events whose names begin with one of these are not recorded: ["bridge", "callback"].'
        ),
    ] = ()
    capture: tuple[Capture, ...] = ()


class Trace(msgspec.Struct, frozen=True):
    """Where an event belongs: W3C trace context, https://www.w3.org/TR/trace-context/.

    Of what is not `sampled` nothing is recorded.
    """

    trace_id: str
    span_id: str
    parent_span_id: str | None = None
    sampled: bool = True

    @classmethod
    def child_of(cls, traceparent: str | None, *, sampled: bool = True) -> Trace:
        """A new span beneath `traceparent`, or the root of a new trace, of which `sampled` says whether it is recorded."""
        span_id = new_span_id()
        if traceparent is None:
            return cls(os.urandom(16).hex(), span_id, None, sampled)
        _, trace_id, parent, flags = traceparent.split("-")
        return cls(trace_id, span_id, parent, bool(int(flags, 16) & 1))

    @property
    def traceparent(self) -> str:
        return traceparent_of(self.trace_id, self.span_id, sampled=self.sampled)


def new_span_id() -> str:
    return os.urandom(8).hex()


def traceparent_of(trace_id: str, span_id: str, *, sampled: bool = True) -> str:
    """The header that says: beneath this span."""
    return f"00-{trace_id}-{span_id}-{'01' if sampled else '00'}"
