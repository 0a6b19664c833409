"""What went wrong, as OpenTelemetry's log records: with the trace that it is part of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

# The signal's packages have an underscore, in the API and in the SDK: their names may still change. The tests of
# the export say so if they do.
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, set_span_in_context

from .otel_spans import MAX_TIME, attributes_of, span_context
from .otel_values import carried, carried_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry._logs import Logger

    from bridge_kernel.contract.telemetry import Event

__all__ = ("log", "record_of")

_ERROR: Final = (SeverityNumber.ERROR, "ERROR")
_WARN: Final = (SeverityNumber.WARN, "WARN")
_INFO: Final = (SeverityNumber.INFO, "INFO")

_LOGGED: Final = {
    ("bridge", "command", "exception"): (_ERROR, "{subject} failed: {error}"),
    ("bridge", "execution", "retry"): (_WARN, "{subject} is run again: its kernel died"),
    ("bridge", "kernel", "stop"): (_ERROR, "kernel {kernel} died: {reason}"),
    ("bridge", "kernel", "unresponsive"): (_WARN, "kernel {kernel} does not answer: {reason}"),
    ("bridge", "pool", "breaker", "open"): (_ERROR, "{subject} is held back: {reason}"),
    ("bridge", "pool", "breaker", "close"): (_INFO, "{subject} may run again: {reason}"),
    ("bridge", "pool", "recycle"): (_WARN, "kernel {kernel} is going to be replaced: {reason}"),
    ("bridge", "pool", "queue", "reject"): (_WARN, "{subject} was refused: the queue is full"),
    ("bridge", "pool", "sweep"): (_WARN, "kernels of a dead host were killed: {reason}"),
    ("bridge", "telemetry", "detach"): (_ERROR, "telemetry handler {handler} raised {error} and was detached"),
    ("bridge", "telemetry", "drop"): (_WARN, "{subject}: telemetry events were dropped"),
}


def record_of(at: int, event: Event) -> LogRecord | None:
    """The log record of an event that was taken `at` that time, in ns since the epoch; None if it is nothing to log."""
    found = _LOGGED.get(event.name)
    if found is None:
        return None
    (severity, text), body = found
    metadata = event.metadata
    if event.name == ("bridge", "kernel", "stop") and metadata["expected"]:
        return None
    if event.name == ("bridge", "command", "exception") and metadata["error"] == "bridge.Cancelled":
        (severity, text), body = _INFO, "{subject} was cancelled"
    said = attributes_of(event, metadata)
    if (error := metadata.get("error")) is not None:
        said["error.type"] = error
    where = Context()
    around = span_context(str(metadata.get("trace_id", "")), str(metadata.get("span_id", "")))
    if around is not None:
        where = set_span_in_context(NonRecordingSpan(around), where)
    return LogRecord(
        timestamp=min(max(int(event.measurements.get("system_time", at)), 0), MAX_TIME),
        context=where,
        severity_number=severity,
        severity_text=text,
        body=carried_text(body.format_map(metadata)),
        attributes=carried(said),
        event_name=".".join(event.name),
    )


def log(logger: Logger, at: int, event: Event, admit: Callable[[], bool]) -> None:
    """Log the event if it is one to log, and `admit()` says that there is room."""
    record = record_of(at, event)
    if record is not None and admit():
        logger.emit(record)
