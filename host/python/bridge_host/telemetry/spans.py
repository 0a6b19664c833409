"""Where in a trace code of the host's is: W3C trace context, in and out."""

from __future__ import annotations

import random
import re
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, Self

from bridge_kernel.contract.errors import type_of
from bridge_kernel.contract.telemetry import Event, Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from bridge_kernel.contract.telemetry import Scalar

__all__ = ("Span", "Tracer")

_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_CURRENT: Final[ContextVar[Trace | None]] = ContextVar("bridge_trace", default=None)
"""The innermost span here. It goes with the context into tasks, and into the threads of synchronous tools."""


class Tracer:
    """Says where new spans belong, and which traces are recorded."""

    def __init__(self) -> None:
        self._sampling = 1.0
        self._chance = random.Random()
        self.outside: Callable[[], str | None] | None = None
        """The `traceparent` of a tracer outside of Bridge that is active here: OpenTelemetry's, if it is used."""

    @property
    def sampling(self) -> float:
        return self._sampling

    @sampling.setter
    def sampling(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"sampling is the share of traces that are recorded, 0 to 1, not {share!r}")
        self._sampling = share

    def traceparent(self) -> str | None:
        """The header that says: beneath the span that is current here. None if there is none."""
        current = _CURRENT.get()
        if current is not None:
            return current.traceparent
        return None if self.outside is None else self.outside()

    def child(self) -> Trace:
        """A new span, beneath the current one; or the root of a new trace, recorded if chance wants it."""
        sampled = self._sampling >= 1 or self._chance.random() < self._sampling
        return Trace.child_of(self.traceparent(), sampled=sampled)


def enter(trace: Trace) -> None:
    """Make a span the current one, in this task or thread until it ends."""
    _CURRENT.set(trace)


class Span:
    """`with host.telemetry.span("import", rows=3)`: measured, and the parent of what is done within.

    `traceparent` is its W3C header, to be handed on.
    """

    def __init__(
        self,
        tracer: Tracer,
        take: Callable[[Event], object],
        name: str,
        metadata: Mapping[str, Scalar],
        traceparent: str | None,
    ) -> None:
        if traceparent is not None and not _TRACEPARENT.fullmatch(traceparent):
            raise ValueError(f"a traceparent is 00-<32 hex digits>-<16 hex digits>-<2 hex digits>, not {traceparent!r}")
        self._take = take
        self._outer: Trace | None = None
        self._began = 0
        self._trace = tracer.child() if traceparent is None else Trace.child_of(traceparent)
        trace = self._trace
        self.metadata: dict[str, Scalar] = {
            **metadata,
            "name": name,
            "trace_id": trace.trace_id,
            "span_id": trace.span_id,
            "parent_span_id": trace.parent_span_id,
        }

    @property
    def trace_id(self) -> str:
        return self._trace.trace_id

    @property
    def traceparent(self) -> str:
        return self._trace.traceparent

    def __enter__(self) -> Self:
        self._outer = _CURRENT.get()
        _CURRENT.set(self._trace)
        self._emit("start", {"system_time": time.time_ns()}, dict(self.metadata))
        self._began = time.perf_counter_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        duration = time.perf_counter_ns() - self._began
        _CURRENT.set(self._outer)
        if error is not None:
            self.metadata["error"] = type_of(error)
        self._emit("stop" if error is None else "exception", {"duration": duration}, dict(self.metadata))

    def _emit(self, last: str, measurements: dict[str, int | float], metadata: dict[str, Scalar]) -> None:
        if self._trace.sampled:
            self._take(Event(("bridge", "span", last), measurements, metadata))
