"""What a command tells about itself: events, recorded here and published as display data that anyone can read."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .contract.errors import type_of
from .contract.line import Line, Summary
from .contract.secrets import captured_text, without_secrets
from .contract.telemetry import (
    TELEMETRY_MIME,
    Scalar,
    begins_with_any,
    display_id,
    new_span_id,
    traceparent_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from .contract.telemetry import Capture, TelemetryOptions, Trace

__all__ = ("Recorder", "Span", "together")

MAX_EVENTS: Final = 1000  # between two updates; what is beyond is counted, not kept
MAX_CHARACTERS: Final = 1_000_000  # of users' own events, likewise: a larger display would make the transport hang up
MAX_NAME: Final = 200  # characters of a name that is not ours
_encode = msgspec.json.Encoder().encode

EXECUTION: Final = ("bridge", "execution")
_EXECUTION_START: Final = (*EXECUTION, "start")
_EVERYTHING: Final = ("bridge",)
_NOTHING: Final[Mapping[str, Scalar]] = {}


class Recorder:
    """The telemetry of one command: one display, updated in place, settled when the command ends. Thread-safe."""

    def __init__(
        self,
        command: int | str,
        subject: str,
        metadata: dict[str, Scalar],
        trace: Trace,
        publish: Callable[[str, bytes], None],
        display_id: str,
        options: TelemetryOptions | None = None,
        secrets: tuple[str, ...] = (),
    ) -> None:
        """`subject` is what people call the command, e.g. `math.hypot`; `metadata` is what each of its events says.

        `publish(msg_type, content)` sends a `display_data` or an `update_display_data` message.
        """
        self.subject = subject
        self.callbacks = 0
        self.lm_calls = 0
        self.tokens = 0
        self.adrift: Callable[[], str | None] | None = None
        """Says in which span code is that has lost its context, as that of plain threads has."""
        self.capture: tuple[Capture, ...] = () if options is None else options.capture
        self.trace = trace
        self._off = () if options is None else options.off
        self._silent = not trace.sampled or begins_with_any(_EVERYTHING, self._off)
        self._command = command
        self._metadata = metadata
        self._publish = publish
        self._display_id = display_id
        self._secrets = secrets
        # Reentrant, both: a finalizer that runs while one is held may record something itself.
        self._sending = threading.RLock()  # what is taken first is sent first
        self._lock = threading.RLock()
        self._events: deque[tuple[tuple[str, ...], Mapping[str, int | float], Mapping[str, Scalar]]] = deque()
        self._characters = 0
        self._dropped = 0
        self._shown = False
        self._settled = False
        self._end: Line | None = None
        self._done: tuple[float | None, float | None, str] = (None, None, "")
        self._started = time.perf_counter_ns()

    # -- recording ---------------------------------------------------------------

    def record(
        self,
        name: tuple[str, ...],
        measurements: Mapping[str, int | float],
        metadata: Mapping[str, Scalar],
        characters: int = 0,
    ) -> None:
        """Record an event of the kernel's own: numbers and plain scalars, which nobody changes any more.

        `characters` is how many of the display's are taken up by texts that others have chosen.
        """
        if self._silent or (self._off and begins_with_any(name, self._off)):
            return
        with self._lock:
            if len(self._events) >= MAX_EVENTS or self._characters + characters > MAX_CHARACTERS:
                self._dropped += 1
            else:
                self._characters += characters
                self._events.append((name, measurements, metadata))

    def emit(
        self,
        name: tuple[str, ...],
        measurements: Mapping[str, Any],
        metadata: Mapping[str, Any],
        own: Mapping[str, Scalar] = _NOTHING,
    ) -> None:
        """Record an event of the user's own, of which nothing is known: what JSON cannot carry is said as text.

        What the command's events say of it, and `own`, cannot be said otherwise: a user's `kernel` becomes
        `user.kernel`.
        """
        # Here, in the thread of whoever emits: what is no number must not be found out by the lane.
        if self._silent:
            return
        said: dict[str, Scalar] = {}
        numbers: dict[str, int | float] = {}
        for key, value in metadata.items():
            said[self._key(key)] = self._scalar(value)
        for key, value in measurements.items():
            number = _number(value)
            if number is None:
                said[self._key(key)] = self._scalar(value)  # NaN, infinity, no number at all: said, not measured
            else:
                numbers[self.named(key)] = number
        said |= own
        words = tuple(map(self.named, name))
        texts = sum(len(value) for value in said.values() if isinstance(value, str))
        self.record(words, numbers, said, texts + sum(map(len, (*words, *said, *numbers))))

    def _key(self, key: object) -> str:
        name = self.named(key)
        return f"user.{name}" if name in self._metadata else name

    def _scalar(self, value: object) -> Scalar:
        plain = _scalar(value)
        return captured_text(plain, self._secrets) if isinstance(plain, str) else plain

    def named(self, name: object) -> str:
        """A name that somebody else has chosen, 200 characters at most, without secrets: no part of one is left at
        its end.
        """
        text = name if type(name) is str and name.isascii() else _text(name)
        return text if len(text) <= MAX_NAME else f"{self._said(text)[: MAX_NAME - 1]}…"

    def start(self, captured: Mapping[str, Scalar]) -> None:
        """Record the beginning."""
        self.record(_EXECUTION_START, {"system_time": time.time_ns()}, captured)

    def progress(self, done: float, total: float | None, message: str) -> tuple[float | None, float | None, str]:
        """Record how far it is; returns it as it may be told: None instead of what is no number."""
        given, message = {"done": done, "total": total}, captured_text(_text(message), self._secrets)
        measurements = {name: number for name, value in given.items() if (number := _number(value)) is not None}
        self._done = (measurements.get("done"), measurements.get("total"), message)
        self.record((*EXECUTION, "progress"), measurements, {"message": message}, len(message))
        return self._done

    def say(self, message: str) -> None:
        """Say in the live line what goes on, beside how far it is: no event, where one of its own says it already."""
        self._done = (*self._done[:2], message)

    def captured(self, what: Capture, name: str, value: Callable[[], Any]) -> dict[str, Scalar]:
        """`{name: value()}` as a text, if the session wants that captured; else nothing."""
        if self._silent or what not in self.capture:
            return {}
        return {name: captured_text(value(), self._secrets)}

    def span(self, name: tuple[str, ...], metadata: Mapping[str, Scalar], *, users: bool = False) -> Span:
        """A part of the command, to be entered; `users`: the metadata is the user's own."""
        return Span(self, name, metadata, users=users)

    def current_span(self) -> str:
        """The id of the innermost span here, the command's own if there is none."""
        current = _SPAN.get()
        if current is not None and current[0] is self:
            return current[1]
        return (self.adrift() if self.adrift is not None else None) or self.trace.span_id

    def traceparent(self, span_id: str) -> str:
        """The header that says: beneath this span of the command."""
        return traceparent_of(self.trace.trace_id, span_id, sampled=self.trace.sampled)

    def stop(
        self, *, error: str | None, queue: int, bytes_in: int, bytes_out: int, where: str, captured: dict[str, Scalar]
    ) -> int:
        """Record the end (`queue` in ns), which the next `publish` settles; returns the duration in ns.

        `where` is where it failed, as a traceback without the error's own words: those may hold values.
        """
        duration = time.perf_counter_ns() - self._started
        if self._silent:
            return duration
        measurements: dict[str, int | float] = {
            "duration": duration,
            "queue": queue,
            "callbacks": self.callbacks,
            "bytes_in": bytes_in,
            "bytes_out": bytes_out,
        }
        if self.lm_calls:
            measurements |= {"lm_calls": self.lm_calls, "tokens": self.tokens}
        last = "stop" if error is None else "exception"
        if not begins_with_any((*EXECUTION, last), self._off):
            with self._lock:  # whether there is room or not: it is what the others are part of
                said = {"success": error is None, "error": error, **captured}
                self._events.append(((*EXECUTION, last), measurements, said))
        self._end = self._line(duration, "ok" if error is None else "error")._replace(
            error=error or "", traceback=where
        )
        return duration

    # -- publishing --------------------------------------------------------------

    def publish(self) -> None:
        """Show what there is so far; nothing happens if there is nothing new, or once the end was shown."""
        if self._silent:
            return
        with self._sending:
            self._publish_batch()

    def _publish_batch(self) -> None:
        msg_type = "update_display_data" if self._shown else "display_data"
        if (taken := self._take()) is None:
            return
        line = self._end or self._line(time.perf_counter_ns() - self._started, "running")
        if self._secrets:
            line = line.redacted(self._said)
        self._publish(msg_type, _display([taken], line.text(), line.html(), self._display_id))

    @property
    def whole(self) -> bool:
        """Whether it has ended and nothing was shown of it yet: `take` gives all there is."""
        return self._end is not None and not self._shown

    @property
    def characters(self) -> int:
        """How much there is to be shown of what others have chosen."""
        return self._characters

    def take(self) -> dict[str, Any] | None:
        """The next batch, to be shown together with others'; None if there is nothing new."""
        with self._sending:
            return self._take()

    def _take(self) -> dict[str, Any] | None:
        """The next `EventBatch`; None if there is nothing new, or once the end was taken."""
        with self._lock:
            end = self._end
            if self._settled or not (self._events or self._dropped or end is not None):
                return None
            # Exchanged, not copied and cleared: what a finalizer records in between would be lost.
            recorded, self._events = self._events, deque()
            dropped, self._dropped, self._characters = self._dropped, 0, 0
            self._shown = True
            self._settled = end is not None
        metadata: Mapping[str, Scalar] = self._metadata
        taken = list(recorded)
        if self._secrets:
            taken = [(tuple(map(self._said, name)), self._all_said(n), self._all_said(m)) for name, n, m in taken]
            metadata = self._all_said(metadata)
        return {
            "command": self._command,
            "metadata": metadata,
            "events": [{"name": name, "measurements": numbers, "metadata": said} for name, numbers, said in taken],
            "dropped": dropped,
            "settled": end is not None,
        }

    def _line(self, elapsed: int, state: str) -> Line:
        done, total, message = self._done
        return Line(
            self.subject,
            elapsed,
            state,
            kernel=str(self._metadata["kernel"]),
            callbacks=self.callbacks,
            lm_calls=self.lm_calls,
            tokens=self.tokens,
            done=done,
            total=total,
            message=message,
        )

    @property
    def end(self) -> Line | None:
        """The settled line, once it has ended."""
        return self._end

    def _all_said(self, members: Mapping[str, Any]) -> dict[str, Any]:
        return {self._said(k): self._said(v) if isinstance(v, str) else v for k, v in members.items()}

    def _said(self, text: str) -> str:
        return without_secrets(_text(text), self._secrets)


def together(recorders: Sequence[Recorder], comm_id: str) -> bytes | None:
    """One display of several commands that have ended, so that a burst of short ones costs a message, not hundreds.

    None if there are no two of which nothing was shown yet. What is too large to go together is left out.
    """
    whole = [recorder for recorder in recorders if recorder.whole]
    sizes = itertools.accumulate(recorder.characters for recorder in whole)
    fitting = [recorder for recorder, size in zip(whole, sizes, strict=True) if size <= MAX_CHARACTERS]
    if len(fitting) < 2:  # one is shown in its own display: its host waits for that
        return None
    taken = [batch for recorder in fitting if (batch := recorder.take()) is not None]
    ended = [recorder.end for recorder in fitting if recorder.end is not None]
    failed = sum(line.state == "error" for line in ended)
    durations = sorted(line.elapsed for line in ended)
    summary = Summary(
        len(ended) - failed,
        failed,
        p50=durations[len(durations) // 2],
        p95=durations[len(durations) * 19 // 20],
        lm_calls=sum(line.lm_calls for line in ended),
        tokens=sum(line.tokens for line in ended),
    )
    id = display_id(comm_id, f"{taken[0]['command']}..{taken[-1]['command']}")
    return _display(taken, summary.text(), summary.html(), id)


def _display(batches: list[dict[str, Any]], text: str, markup: str, id: str) -> bytes:
    content = {
        "data": {TELEMETRY_MIME: batches, "text/plain": text, "text/html": markup},
        "metadata": {},
        "transient": {"display_id": id},
    }
    try:
        return _encode(content)
    except UnicodeEncodeError:  # a name of the user's with half a surrogate pair
        return _encode(_whole(content))


def _whole(value: Any) -> Any:
    """The same, with all of its texts such as can be encoded."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        return {_text(key): _whole(item) for key, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list | tuple) else value


_SPAN: Final[ContextVar[tuple[Recorder, str] | None]] = ContextVar("bridge_span", default=None)


class Span:
    """A part of a command: `start`, then `stop` or `exception` with its duration. What is put into `metadata` before
    its end goes with that.
    """

    __slots__ = ("_began", "_name", "_outer", "_own", "_recorder", "id", "metadata")

    def __init__(
        self, recorder: Recorder, name: tuple[str, ...], metadata: Mapping[str, Scalar], *, users: bool
    ) -> None:
        self._recorder = recorder
        self._name = name
        self._outer: tuple[Recorder, str] | None = None
        self._began = 0
        self.id = new_span_id()
        self.metadata: dict[str, Scalar] = {
            **metadata,
            "span_id": self.id,
            "parent_span_id": recorder.current_span(),
        }
        self._own: dict[str, Scalar] | None = None
        """Of a user's span, what the user cannot change."""
        if users:
            self._own = {name: self.metadata[name] for name in ("span_id", "parent_span_id")}
            self._own["name"] = recorder.named(metadata["name"])

    def start(self, **captured: Scalar) -> None:
        """Begin it: spans that begin here until it ends are parts of it."""
        self._outer = _SPAN.get()
        _SPAN.set((self._recorder, self.id))
        self._record("start", {"system_time": time.time_ns()}, {**self.metadata, **captured})
        self._began = time.perf_counter_ns()

    def end(self, error: BaseException | None = None, measurements: Mapping[str, int | float] | None = None) -> None:
        """End it, as `stop` or, with an error, as `exception`."""
        measured: dict[str, int | float] = {"duration": time.perf_counter_ns() - self._began}
        if measurements:
            measured.update(measurements)
        # Set, not reset by its token: a span of asynchronous code may end in another context than it began in.
        _SPAN.set(self._outer)
        if error is not None:
            (self.metadata if self._own is None else self._own)["error"] = type_of(error)
        self._record("stop" if error is None else "exception", measured, self.metadata)

    def _record(self, last: str, measurements: dict[str, int | float], metadata: dict[str, Scalar]) -> None:
        name, own = (*self._name, last), self._own
        if own is None:
            self._recorder.record(name, measurements, metadata)
        else:
            said = {key: value for key, value in metadata.items() if key not in own}
            self._recorder.emit(name, measurements, said, own)

    def __enter__(self) -> dict[str, Scalar]:
        self.start()
        return self.metadata

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(error)


def _text(value: object) -> str:
    try:
        text = str(value)
    except Exception as exc:  # noqa: BLE001 - somebody else's `__str__`: telling of a value must not break a command
        text = f"<{type(value).__name__}: {type_of(exc)}>"
    return text.encode("utf-8", "backslashreplace").decode()


def _number(value: object) -> int | float | None:
    """A number that JSON can carry, or None."""
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return int(value)
    try:
        number = float(value)  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 - somebody else's `__float__`: whatever it raises, it is no number
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
