"""What a command tells about itself: events, recorded here and published as display data that anyone can read."""

from __future__ import annotations

import html
import math
import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import msgspec

from .contract.errors import type_of, without_secrets
from .contract.telemetry import TELEMETRY_MIME, Event, EventBatch, Scalar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ("Recorder",)

MAX_EVENTS: Final = 1000  # between two updates; what is beyond is counted, not kept
_encode = msgspec.json.Encoder().encode


class Recorder:
    """The telemetry of one command: one display, updated in place, settled when the command ends. Thread-safe."""

    def __init__(
        self,
        command: int | str,
        subject: str,
        metadata: dict[str, Scalar],
        publish: Callable[[str, bytes], None],
        display_id: str,
        secrets: tuple[str, ...] = (),
    ) -> None:
        """`subject` is what people call the command, e.g. `math.hypot`.

        `publish(msg_type, content)` sends a `display_data` or an `update_display_data` message.
        """
        self.subject = subject
        self._command = command
        self._metadata = metadata
        self._publish = publish
        self._display_id = display_id
        self._secrets = secrets
        self._sending = threading.Lock()  # what is taken first is sent first
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._dropped = 0
        self._shown = False
        self._settled = False
        self._end: tuple[str, int, str | None] = ("", 0, None)
        self._started = time.perf_counter_ns()
        self.callbacks = 0
        self._progress = ""

    def emit(self, name: tuple[str, ...], measurements: dict[str, int | float], metadata: dict[str, Scalar]) -> None:
        """Record one event; the command's own metadata is added to it."""
        # Here, in the thread of whoever emits: what JSON cannot carry must not be found out by the lane.
        said = {self._said(key): self._clean(_scalar(value)) for key, value in metadata.items()}
        numbers: dict[str, int | float] = {}
        for key, value in measurements.items():
            number = _number(value)
            if number is None:
                said[self._said(key)] = self._clean(
                    _scalar(value)
                )  # NaN, infinity, no number at all: said, not measured
            else:
                numbers[self._said(key)] = number
        with self._lock:
            if len(self._events) >= MAX_EVENTS:
                self._dropped += 1
            else:
                self._events.append(Event(tuple(map(self._said, name)), numbers, {**self._metadata, **said}))

    def _clean(self, value: Scalar) -> Scalar:
        return without_secrets(value, self._secrets) if isinstance(value, str) else value

    def _said(self, text: object) -> str:
        return without_secrets(_text(text), self._secrets)

    def start(self) -> None:
        self.emit(("bridge", "execution", "start"), {"system_time": time.time_ns()}, {})

    def progress(self, done: float, total: float | None, message: str) -> None:
        share = f"{done:g}/{total:g}" if total is not None else f"{done:g}"
        self._progress = self._said(f"{share} {message}".strip())
        measurements: dict[str, int | float] = {"done": done}
        if total is not None:
            measurements["total"] = total
        self.emit(("bridge", "execution", "progress"), measurements, {})

    @contextmanager
    def span(self, name: tuple[str, ...], metadata: dict[str, Scalar]) -> Iterator[dict[str, Scalar]]:
        """Record `start`, and `stop` or `exception` with the duration. What is put into the dict goes with the end."""
        span_id = os.urandom(8).hex()
        metadata = {**metadata, "span_id": span_id, "parent_span_id": self._metadata.get("span_id")}
        began = time.perf_counter_ns()
        self.emit((*name, "start"), {"system_time": time.time_ns()}, metadata)
        try:
            yield metadata
        except BaseException as exc:
            metadata["error"] = type_of(exc)
            self.emit((*name, "exception"), {"duration": time.perf_counter_ns() - began}, metadata)
            raise
        self.emit((*name, "stop"), {"duration": time.perf_counter_ns() - began}, metadata)

    def stop(self, *, error: str | None, queue: int, bytes_in: int, bytes_out: int) -> int:
        """Record the end (`queue` in ns), which the next `publish` settles; returns the duration in ns."""
        duration = time.perf_counter_ns() - self._started
        self.emit(
            ("bridge", "execution", "stop" if error is None else "exception"),
            {
                "duration": duration,
                "queue": queue,
                "callbacks": self.callbacks,
                "bytes_in": bytes_in,
                "bytes_out": bytes_out,
            },
            {"success": error is None, "error": error},
        )
        self._end = ("✓" if error is None else "✗", duration, error)
        return duration

    def publish(self) -> None:
        """Show what there is so far; nothing happens if there is nothing new, or once the end was shown."""
        with self._sending:
            self._publish_batch()

    def _publish_batch(self) -> None:
        with self._lock:
            if self._settled or not (self._events or self._dropped):
                return
            batch = EventBatch(self._command, tuple(self._events), self._dropped)
            self._events, self._dropped = [], 0
            msg_type = "update_display_data" if self._shown else "display_data"
            self._shown = True
            settled, duration, error = self._end
            self._settled = bool(settled)
        mark = settled or "…"
        elapsed = duration or time.perf_counter_ns() - self._started
        details = [_duration(elapsed), f"kernel {str(self._metadata['kernel'])[:4]}"]
        if self.callbacks:
            details.append(f"{self.callbacks} callback{'s' if self.callbacks > 1 else ''}")
        if self._progress and not settled:
            details.append(self._progress)
        if error:
            details.append(error)
        text = f"{mark} {self.subject}  {' · '.join(details)}"
        colour = "#b3261e" if error else "#1b7f4b" if settled else "#5b5bd6"
        content = _encode(
            {
                "data": {
                    TELEMETRY_MIME: batch,
                    "text/plain": text,
                    "text/html": (
                        f'<div style="font:12px ui-monospace,monospace"><span style="color:{colour}">{mark}</span> '
                        f"<b>{html.escape(self.subject)}</b> "
                        f'<span style="opacity:.7">{html.escape(" · ".join(details))}</span></div>'
                    ),
                },
                "metadata": {},
                "transient": {"display_id": self._display_id},
            }
        )
        self._publish(msg_type, content)


def _text(value: object) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()


def _number(value: object) -> int | float | None:
    """A number that JSON can carry, or None."""
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return int(value)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _scalar(value: object) -> Scalar:
    if value is None or isinstance(value, bool):
        return value
    number = _number(value) if isinstance(value, int | float) else None
    if number is not None:
        return number
    # The repr of an int beyond 4,300 digits raises; of so large a number its size says enough.
    return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else _text(value)


def _duration(ns: int) -> str:
    if ns < 1_000_000:
        return f"{ns / 1000:.0f} µs"
    return f"{ns / 1e6:.1f} ms" if ns < 1_000_000_000 else f"{ns / 1e9:.2f} s"
