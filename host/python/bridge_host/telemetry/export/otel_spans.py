"""Bridge's events as OpenTelemetry's spans: a start and its end become one, with Bridge's own ids and times."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.trace import Event as SpanEvent
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from bridge_kernel.contract.catalogue import type_of_event

from .genai import is_tool, model_attributes, model_of, tool_attributes
from .otel_values import carried, carried_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    from bridge_kernel.contract.telemetry import Event, Scalar

__all__ = ("Spans", "attributes_of", "span_context")

MAX_OPEN: Final = 10_000
MAX_EVENTS: Final = 128  # of one span, as OpenTelemetry's own default
MAX_TIME: Final = 2**63 - 1
"""ns since the epoch. OTLP has 64 bits without a sign, and one span that does not fit costs its whole batch."""

_LM: Final = ("bridge", "dspy", "lm")
_EXECUTION: Final = ("bridge", "execution")
_USER: Final = ("bridge", "user")

# Who asks another process is its client; what a tool does is internal, so say the GenAI conventions.
_KINDS: Final = {
    ("bridge", "command"): SpanKind.CLIENT,
    _EXECUTION: SpanKind.SERVER,
    ("bridge", "callback"): SpanKind.CLIENT,
    _LM: SpanKind.CLIENT,
}

# What of the metadata tells one span of a kind from others, in the span's name.
_ABOUT: Final = {
    ("bridge", "command"): "subject",
    _EXECUTION: "subject",
    ("bridge", "callback"): "method",
    ("bridge", "instance"): "class",
    ("bridge", "span"): "name",
    ("bridge", "dspy", "module"): "module",
    ("bridge", "dspy", "adapter"): "adapter",
    ("bridge", "dspy", "evaluate"): "metric",
    ("bridge", "dspy", "optimizer"): "optimizer",
}

_ELSEWHERE: Final = frozenset({"trace_id", "span_id", "parent_span_id", "error", "prompt", "completion"})
"""What a span says in its own place, not as an attribute `bridge.…`."""
_TIMES: Final = frozenset({"duration", "system_time"})


class _Open:
    __slots__ = ("events", "metadata", "name", "started")

    def __init__(self, name: tuple[str, ...], started: int, metadata: dict[str, Scalar]) -> None:
        self.name = name
        self.started = started
        self.metadata = metadata
        self.events: list[tuple[int, Event]] = []


class Spans:
    """Belongs to one thread. Spans that have begun are kept until they end, 10,000 at most."""

    def __init__(self, resource: Resource, scope: InstrumentationScope, hand: Callable[[ReadableSpan], None]) -> None:
        """`hand` gets each span that has ended."""
        self._resource = resource
        self._scope = scope
        self._hand = hand
        self._open: OrderedDict[tuple[str, str], _Open] = OrderedDict()

    def take(self, at: int, event: Event) -> None:
        """Take an event that was taken `at` that time, in ns since the epoch."""
        trace_id = event.metadata.get("trace_id")
        span_id = event.metadata.get("span_id", event.metadata.get("parent_span_id"))  # it may be no span of its own
        if not isinstance(trace_id, str) or not isinstance(span_id, str):
            return
        key, name, last = (trace_id, span_id), event.name[:-1], event.name[-1]
        if event.name[:2] == _USER:
            last = ""  # it may be called "stop", but says of the span in which it was emitted, and ends none
        if last == "start":
            started = _time(event.measurements.get("system_time", at))
            self._open[key] = _Open(name, started, event.metadata)
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        elif last in ("stop", "exception") and "duration" in event.measurements:
            self._end(key, at, event)
        elif (around := self._open.get(key)) is not None and len(around.events) < MAX_EVENTS:
            around.events.append((at, event))

    def _end(self, key: tuple[str, str], at: int, event: Event) -> None:
        name, duration = event.name[:-1], _time(event.measurements["duration"])
        begun = self._open.pop(key, None)
        if begun is None and name == _EXECUTION:
            key, begun = self._abandoned(key, event)
        if begun is None:  # its start was switched off, or dropped
            begun = _Open(name, _time(at - duration), {})
        metadata = {**begun.metadata, **event.metadata}
        parent = metadata.get("parent_span_id")
        context = span_context(*key)
        if context is None:
            return
        ended = _time(begun.started + duration)
        error = metadata.get("error") if event.name[-1] == "exception" else None
        said = attributes_of(event, metadata)
        if error is not None:
            said["error.type"] = str(error)
        self._hand(
            ReadableSpan(
                name=carried_text(_title(name, metadata)),
                context=context,
                parent=span_context(key[0], parent) if isinstance(parent, str) else None,
                resource=self._resource,
                attributes=carried(said),
                events=[_span_event(min(max(when, begun.started), ended), one, metadata) for when, one in begun.events],
                kind=_KINDS.get(name, SpanKind.INTERNAL),
                status=Status(StatusCode.UNSET)
                if error is None
                else Status(StatusCode.ERROR, carried_text(str(error))),
                start_time=begun.started,
                end_time=ended,
                instrumentation_scope=self._scope,
            )
        )

    def _abandoned(self, key: tuple[str, str], event: Event) -> tuple[tuple[str, str], _Open | None]:
        """The run that this end is of: a host that ends it for a kernel that died does not know the span's id."""
        same = ("parent_span_id", "attempt")
        for other, begun in self._open.items():
            if (
                other[0] == key[0]
                and begun.name == _EXECUTION
                and all(begun.metadata.get(one) == event.metadata.get(one) for one in same)
            ):
                del self._open[other]
                return other, begun
        return key, None


def attributes_of(event: Event, metadata: Mapping[str, Scalar]) -> dict[str, Any]:
    """What an event says, as attributes: `bridge.…`, and what the GenAI conventions want beside that.

    Measurements in ns are named so: `bridge.queue_ns`.
    """
    said: dict[str, Any] = {
        f"bridge.{name}": value for name, value in metadata.items() if value is not None and name not in _ELSEWHERE
    }
    known = type_of_event(event.name)
    for name, number in event.measurements.items():
        if name not in _TIMES:
            measured = known.measurements.get(name) if known is not None else None
            said[f"bridge.{name}_ns" if measured is not None and measured.unit == "ns" else f"bridge.{name}"] = number
    kind = event.name[:-1]
    if kind == _LM:
        said |= model_attributes(metadata, event.measurements)
    elif is_tool(kind):
        said = {k: v for k, v in said.items() if k not in ("bridge.arguments", "bridge.result")}
        said |= tool_attributes(metadata)
    return said


def span_context(trace_id: str, span_id: str) -> SpanContext | None:
    """None if these are no ids."""
    try:
        context = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=TraceFlags(1))
    except ValueError:
        return None
    return context if context.is_valid else None


def _time(ns: float) -> int:
    return min(max(int(ns), 0), MAX_TIME)


def _title(name: tuple[str, ...], metadata: Mapping[str, Scalar]) -> str:
    if name == _LM:
        return f"chat {model_of(str(metadata['model']))}"
    if is_tool(name):
        return f"execute_tool {metadata['tool']}"
    about = metadata.get(_ABOUT.get(name, ""))
    return ".".join(name) if about is None else f"{'.'.join(name)} {about}"


def _span_event(at: int, event: Event, around: Mapping[str, Scalar]) -> SpanEvent:
    """`around` is what the span says itself."""
    metadata = {name: value for name, value in event.metadata.items() if name not in around or around[name] != value}
    return SpanEvent(".".join(event.name), carried(attributes_of(event, metadata)), at)
