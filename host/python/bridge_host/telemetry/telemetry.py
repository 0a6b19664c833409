"""`host.telemetry`: what happened, to handlers, to a bounded memory, to figures, and out to other systems."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final, TypeVar

from bridge_kernel.contract.telemetry import Event, TelemetryOptions, begins_with_any

from .figures.metrics import Metrics
from .handlers import Handlers, prefix_of
from .intake import Intake
from .page.snapshot import Snapshots
from .spans import Span, Tracer
from .usage import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from bridge_kernel.contract.telemetry import Capture, Scalar

    from .export.exporter import Exporter
    from .export.jsonl import JsonLines
    from .export.otel import OpenTelemetry
    from .figures.tables import Errors, Kernels, Latencies, Models
    from .page.dashboard import Dashboard
    from .traces.trace import Trace, Traces
    from .usage import Suggestions

    Handler = Callable[[Event], object]

__all__ = ("Telemetry",)

E = TypeVar("E", bound="Exporter")

REMEMBERED: Final = 10_000
_EVERYTHING: Final = ("bridge",)


class Telemetry:
    """`host.telemetry`: what happened, newest last. Thread-safe.

    Events have the shape of Elixir's `:telemetry`: a name, measurements, metadata; docs/telemetry.md lists them all.
    Secrets are never in them; arguments, results, prompts and completions only of sessions that ask for it.
    """

    def __init__(self) -> None:
        self.intake = Intake(self.take)
        self.tracer = Tracer()
        self.metrics = Metrics()
        self.usage = Usage()
        self.snapshots = Snapshots(self.metrics)
        """Where pages that show the host get what they show."""
        self.counting: list[Callable[[Event], None]] = []
        """Who else counts the events of traces that are not recorded."""
        self._events: deque[Event] = deque(maxlen=REMEMBERED)
        self._handlers = Handlers()
        self._switching = threading.Lock()
        self._off: tuple[tuple[str, ...], ...] = ()
        self._options: dict[frozenset[Capture], TelemetryOptions | None] = {}
        self._exporters: list[Exporter] = []

    # -- handlers ----------------------------------------------------------------

    def attach(self, prefix: str | Iterable[str], handler: Handler, *, id: str | None = None) -> str:
        """Call `handler(event)` for each event whose name begins with `prefix`: `"bridge.execution"`; its id.

        It is called on the thread that emits. A handler that raises is detached, with a warning and an event: it
        never breaks a command.

        Raises:
            ValueError: a handler of this id is attached already.
        """
        return self._handlers.attach(prefix, handler, id)

    def detach(self, id: str) -> None:
        """Stop calling the handler; does nothing if there is none of this id."""
        self._handlers.detach(id)

    def emit(self, name: str, measurements: Mapping[str, int | float] | None = None, **metadata: Scalar) -> None:
        """Emit an event of yours, `["bridge", "user", name]`, as `ctx.emit` does in a kernel."""
        if not isinstance(name, str):
            raise TypeError(f"the name of an event is a text, not {name!r}: it becomes ['bridge', 'user', name]")
        self.tell(("bridge", "user", name), measurements or {}, metadata)

    def tell(
        self, name: tuple[str, ...], measurements: Mapping[str, int | float], metadata: Mapping[str, Scalar]
    ) -> None:
        """Take an event of Bridge's own, unless it is switched off."""
        if not self._is_off(name):
            self.take(Event(name, dict(measurements), dict(metadata)))

    def span(self, name: str, *, traceparent: str | None = None, **metadata: Scalar) -> Span:
        """Measure what is done within, commands included: `with host.telemetry.span("import", rows=3) as span`.

        `traceparent` is the W3C header of whoever asked for it; `span.traceparent` is the one to hand on.

        Raises:
            ValueError: the header is none.
        """
        return Span(self.tracer, self._take_unless_off, name, metadata, traceparent)

    def traceparent(self) -> str | None:
        """The W3C header that says: beneath the span that is current here; None if there is none."""
        return self.tracer.traceparent()

    def take(self, event: Event) -> None:
        """Take an event as it is."""
        self._events.append(event)
        self._counted(event)
        if self._handlers:
            for id, error in self._handlers.call(event):
                self.take(Event(("bridge", "telemetry", "detach"), {}, {"handler": id, "error": error}))

    def count(self, event: Event) -> None:
        """Count an event of a trace that is not recorded: the figures are of all commands."""
        if not self._is_off(event.name):
            self._counted(event)
            for count in tuple(self.counting):
                count(event)

    def _take_unless_off(self, event: Event) -> None:
        if not self._is_off(event.name):
            self.take(event)

    def _counted(self, event: Event) -> None:
        self.metrics.take(event)
        self.snapshots.note(event)

    def _is_off(self, name: tuple[str, ...]) -> bool:
        return bool(self._off) and begins_with_any(name, self._off)

    # -- switches ----------------------------------------------------------------

    @property
    def sampling(self) -> float:
        """The share of traces that are recorded, 0 to 1; settable at any time. The figures count all commands."""
        return self.tracer.sampling

    @sampling.setter
    def sampling(self, share: float) -> None:
        self.tracer.sampling = share

    def disable(self, prefix: str | Iterable[str] = _EVERYTHING) -> None:
        """Record no events whose names begin so, here and in kernels, from the next command on."""
        with self._switching:
            self._switch({*self._off, prefix_of(prefix)})

    def enable(self, prefix: str | Iterable[str] = _EVERYTHING) -> None:
        """Record them again: all that `disable` was told whose names begin so."""
        wanted = prefix_of(prefix)
        with self._switching:
            self._switch({off for off in self._off if off[: len(wanted)] != wanted})

    def _switch(self, off: set[tuple[str, ...]]) -> None:
        self._off = tuple(sorted(off))
        self._options = {}

    @property
    def disabled(self) -> list[str]:
        """What `disable` was told."""
        return [".".join(prefix) for prefix in self._off]

    def options(self, capture: frozenset[Capture]) -> TelemetryOptions | None:
        """What a command tells its kernel; None if it is what a kernel does anyway."""
        known = self._options  # looked at before `_off`: what is made of an old one goes where nobody looks any more
        try:
            return known[capture]
        except KeyError:
            off = self._off
            made = known[capture] = TelemetryOptions(off, tuple(sorted(capture))) if off or capture else None
            return made

    @property
    def silent(self) -> bool:
        """Whether everything is switched off."""
        return begins_with_any(_EVERYTHING, self._off)

    # -- what happened -----------------------------------------------------------

    def sync(self) -> None:
        """Wait until the telemetry of every command that has been answered is here: a millisecond, 1 s at most.

        Whatever shows something does so by itself.
        """
        self.intake.sync()

    def events(self, *prefix: str) -> list[Event]:
        """The last 10,000 events whose names begin with `prefix`, oldest first: `events("bridge", "execution")`."""
        self.sync()
        wanted = prefix_of(prefix[0]) if len(prefix) == 1 else prefix
        return [event for event in self._remembered() if event.name[: len(wanted)] == wanted]

    def _remembered(self) -> list[Event]:
        while True:
            try:
                return list(self._events)
            except RuntimeError:  # another thread appended meanwhile
                continue

    def lines(self) -> list[str]:
        """One line a command, as a notebook shows it, oldest first."""
        self.sync()
        return self.intake.lines

    def trace(self, id: str | None = None) -> Trace:
        """What happened in one trace, of all it goes through: shows itself as a waterfall. Without an id the last one.

        Raises:
            NotFound: nothing is remembered of it.
        """
        return self.traces()[id]

    def traces(self) -> Traces:
        """The traces that are remembered, as a table to look at."""
        from .traces.trace import Traces

        return Traces(self.events())

    def latencies(self) -> Latencies:
        """How long commands take: count, errors, percentiles, as a table; `.plot()`, `.frame()`."""
        self.sync()
        return self.metrics.latencies()

    def errors(self) -> Errors:
        """Errors by type: how often, of which commands, when last; as a table; `.plot()`, `.frame()`."""
        self.sync()
        return self.metrics.errors()

    def kernels(self) -> Kernels:
        """Kernels over time: life, memory, commands; as a table; `.plot()`, `.frame()`."""
        self.sync()
        return self.metrics.kernels()

    def models(self) -> Models:
        """Language models: calls, tokens, cost, cache hits, latency; as a table; `.plot()`, `.frame()`."""
        self.sync()
        return self.metrics.models()

    def frame(self, *prefix: str, library: str = "pandas") -> Any:
        """The remembered events as a data frame of pandas or polars: a row each, a column for each member.

        Raises:
            ModuleNotFoundError: the library is not installed.
        """
        from .figures.frames import events_frame

        return events_frame(self.events(*prefix), library)

    def suggestions(self) -> Suggestions:
        """Calls that are repeated with the same arguments and would gain from a cache, as a table to look at."""
        return self.usage.suggestions()

    def dashboard(self) -> Dashboard:
        """A live page for a notebook: kernels, queue, rates, latencies, errors. Needs the extra `lab`.

        Raises:
            ModuleNotFoundError: anywidget is not installed.
        """
        from .page.dashboard import Dashboard

        return Dashboard(self)

    # -- export ------------------------------------------------------------------

    def to_file(
        self, path: str | os.PathLike[str], prefix: str | Iterable[str] = (), *, max_bytes: int = 64 << 20
    ) -> JsonLines:
        """Append every event to a file, as JSON lines, until the exporter or the host is closed.

        At `max_bytes` the file becomes `<path>.1`, of which one is kept.
        """
        from .export.jsonl import JsonLines

        return self._export(JsonLines(self, path, prefix, max_bytes=max_bytes))

    def otel(self, endpoint: str | None = None, **options: Any) -> OpenTelemetry:
        """Send traces, metrics and logs to an OpenTelemetry collector (OTLP over HTTP). Needs the extra `otel`.

        `endpoint` is its address, `http://127.0.0.1:4318`; without one OpenTelemetry's own environment variables
        say it. The other options are those of `OpenTelemetry`.

        Raises:
            ModuleNotFoundError: OpenTelemetry is not installed.
        """
        from .export.otel import OpenTelemetry

        named = endpoint is not None or any(name.startswith("OTEL_EXPORTER_OTLP") for name in os.environ)
        if options.get("prometheus") is not None and not named:
            options = {"traces": False, "metrics": False, "logs": False, **options}  # it asks, nothing is sent
        return self._export(OpenTelemetry(self, endpoint, **options))

    def _export(self, exporter: E) -> E:
        self._exporters = [*(other for other in self._exporters if not other.closed), exporter]
        return exporter

    def close(self) -> None:
        """End what exports: everything that has happened is sent first, for 5 s at most each."""
        self.sync()
        exporters, self._exporters = self._exporters, []
        for exporter in exporters:
            exporter.close()

    def __repr__(self) -> str:
        self.sync()
        return f"<Telemetry: {len(self._events)} events of {len(self.intake.lines)} commands, {len(self._handlers)} handlers>"
