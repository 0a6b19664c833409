"""What happens, to OpenTelemetry: traces, metrics and logs to a collector, and metrics on a page for Prometheus."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from bridge_kernel._version import __version__
from bridge_kernel.contract.secrets import forms_of
from bridge_kernel.contract.telemetry import Event

from .exporter import Exporter
from .feed import Feed, warn

try:
    from opentelemetry import trace as trace_api
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
    from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
    from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    from .otel_delivery import Delivery, LogExporter, MetricExporter, SpanExporter
    from .otel_logs import log
    from .otel_metrics import Figures
    from .otel_spans import Spans
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        f"OpenTelemetry needs {exc.name}, which is not installed: pip install 'bridge-kernel[otel]'", name=exc.name
    ) from exc

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from opentelemetry._logs import Logger
    from opentelemetry.sdk.trace import ReadableSpan

    from ..telemetry import Telemetry
    from .feed import Taken

__all__ = ("OpenTelemetry",)

SCOPE: Final = "bridge"
_UNRECORDED: Final = "(unrecorded)"
CLOSE_S: Final = 5.0
MAX_WAITING: Final = 8192
BATCH: Final = 512


class OpenTelemetry(Exporter):
    """Sends what happens to a collector, by threads of its own: a command never waits for it.

    Spans have Bridge's own ids and times; those of models and tools follow the GenAI conventions. While a span of
    the host's own OpenTelemetry is current, what Bridge does becomes a part of it.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        endpoint: str | None = None,
        *,
        service_name: str | None = None,
        headers: Mapping[str, str] | None = None,
        traces: bool = True,
        metrics: bool = True,
        logs: bool = True,
        prometheus: int | None = None,
        interval_s: float = 5.0,
        timeout_s: float = 3.0,
    ) -> None:
        """Attach; nothing is connected to yet.

        `endpoint` is where the collector takes OTLP over HTTP, `http://127.0.0.1:4318`; without one
        `OTEL_EXPORTER_OTLP_ENDPOINT` and its like are heeded. `service_name` is `OTEL_SERVICE_NAME`, or `bridge`.
        `headers` go with each request and are shown nowhere. `traces`, `metrics`, `logs`: what is sent, every
        `interval_s`, each request for `timeout_s` at most.

        `prometheus` is a port of 127.0.0.1 at which the metrics are served too, `http://127.0.0.1:9464/metrics`,
        also if they are not sent; 0 takes a free one, see `prometheus_url`.

        Raises:
            ValueError: the endpoint is no address, a duration is not positive, or nothing is to be exported.
            ModuleNotFoundError: what serves Prometheus is not installed.
            OSError: the port is taken.
        """
        if not (traces or metrics or logs or prometheus is not None):
            raise ValueError("nothing is to be exported: leave one of traces, metrics and logs on, or set prometheus")
        if interval_s <= 0 or timeout_s <= 0:
            raise ValueError(f"interval_s and timeout_s are seconds, more than 0, not {interval_s!r} and {timeout_s!r}")
        self._telemetry = telemetry
        self._sends = traces or metrics or logs
        self._where, secrets = _shown(endpoint, headers or {})
        self._delivery = Delivery(self._where, secrets)
        self._closing = threading.Lock()
        self._malformed = 0
        self.prometheus_url: str | None = None
        """Where the metrics are served, if they are."""
        self._flushes: list[Callable[[], object]] = []
        self._shutdowns: list[Callable[[], object]] = []
        self._stop_serving: Callable[[], None] = _nothing
        self._spans: Spans | None = None
        self._logger: Logger | None = None
        self._figures: Figures | None = None
        resource = Resource.create(
            {
                SERVICE_NAME: service_name or os.environ.get("OTEL_SERVICE_NAME") or SCOPE,
                SERVICE_VERSION: __version__,
            }
        )
        base = None if endpoint is None else endpoint.rstrip("/")
        common = (base, headers or {}, timeout_s)
        try:
            readers: list[MetricReader] = [] if prometheus is None else [self._serve(prometheus)]
            if traces:
                self._trace(resource, SpanExporter(self._delivery, *common), interval_s)
            if logs:
                self._log(resource, LogExporter(self._delivery, *common), interval_s)
            if metrics:
                exporter = MetricExporter(self._delivery, *common)
                readers.append(PeriodicExportingMetricReader(exporter, interval_s * 1e3, timeout_s * 1e3))
            if readers:
                self._measure(resource, readers)
        except BaseException:
            _all(self._shutdowns, CLOSE_S)
            self._stop_serving()
            raise
        self._feed = Feed("bridge-otel", self._take)
        self._id = telemetry.attach((), self._feed.put)
        if self._figures is not None:
            telemetry.counting.append(self._count)
            for event in telemetry.events("bridge", "kernel"):  # kernels that were there before
                self._figures.place(event)
        self._outside_before = telemetry.tracer.outside
        self._outside_now = self._outside
        telemetry.tracer.outside = self._outside_now

    def _trace(self, resource: Resource, exporter: SpanExporter, interval_s: float) -> None:
        self._span_processor = BatchSpanProcessor(exporter, MAX_WAITING, interval_s * 1e3, BATCH)
        self._spans = Spans(resource, InstrumentationScope(SCOPE), self._hand)
        self._flushes.append(self._span_processor.force_flush)
        self._shutdowns.append(self._span_processor.shutdown)

    def _log(self, resource: Resource, exporter: LogExporter, interval_s: float) -> None:
        loggers = LoggerProvider(resource, shutdown_on_exit=False)
        loggers.add_log_record_processor(
            BatchLogRecordProcessor(exporter, interval_s * 1e3, BATCH, max_queue_size=MAX_WAITING)
        )
        self._logger = loggers.get_logger(SCOPE)
        self._flushes.append(loggers.force_flush)
        self._shutdowns.append(loggers.shutdown)

    def _measure(self, resource: Resource, readers: list[MetricReader]) -> None:
        meters = MeterProvider(readers, resource, AlwaysOffExemplarFilter(), shutdown_on_exit=False)
        self._figures = Figures(meters.get_meter(SCOPE))
        self._flushes.append(meters.force_flush)
        self._shutdowns.append(lambda: meters.shutdown(CLOSE_S * 1e3))

    # -- in ----------------------------------------------------------------------

    def _count(self, event: Event) -> None:
        """Take an event of a trace that is not recorded: the metrics are of all commands, as the figures are."""
        self._feed.put(Event((_UNRECORDED, *event.name), event.measurements, event.metadata))

    def _outside(self) -> str | None:
        """The W3C header of the span that is current in the host's own OpenTelemetry."""
        if self._closed:
            return None if self._outside_before is None else self._outside_before()
        if not trace_api.get_current_span().get_span_context().is_valid:
            return None
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        return carrier["traceparent"]

    # -- out, on the feed's thread -----------------------------------------------

    def _take(self, taken: Taken, dropped: int) -> None:
        if dropped and self._figures is not None:
            self._figures.forget()
        for at, event in taken:
            try:
                self._take_one(at, event)
            except (KeyError, TypeError, ValueError, OverflowError):  # not as the catalogue says: a kernel's, a user's
                self._malformed += 1

    def _take_one(self, at: int, event: Event) -> None:
        if event.name[:1] == (_UNRECORDED,):
            if self._figures is not None:
                self._figures.take(Event(event.name[1:], event.measurements, event.metadata))
            return
        if self._spans is not None:
            self._spans.take(at, event)
        if self._figures is not None:
            self._figures.take(event)
        if self._logger is not None:
            log(self._logger, at, event, lambda: self._delivery.admit("logs", MAX_WAITING))

    def _hand(self, span: ReadableSpan) -> None:
        if self._delivery.admit("spans", MAX_WAITING):
            self._span_processor.on_end(span)

    def _serve(self, port: int) -> MetricReader:
        try:
            from opentelemetry.exporter.prometheus import PrometheusMetricReader
            from prometheus_client import CollectorRegistry, start_http_server
        except ModuleNotFoundError as exc:
            raise ModuleNotFoundError(
                f"Prometheus needs {exc.name}, which is not installed: pip install 'bridge-kernel[otel]'", name=exc.name
            ) from exc
        registry = CollectorRegistry()  # of its own: not what else is measured in this process
        reader = PrometheusMetricReader(registry=registry, scope_info_enabled=False)
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
        self.prometheus_url = f"http://127.0.0.1:{server.server_port}/metrics"

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._stop_serving = stop
        return reader

    # -- for people --------------------------------------------------------------

    @property
    def dropped(self) -> int:
        """How many events, spans and log records were not exported: no room in a queue, no collector, malformed."""
        return self._feed.dropped + self._malformed + sum(self._delivery.lost.values())

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Send everything that has happened so far; whether that was done in time, and taken."""
        until, lost = time.monotonic() + timeout_s, self._delivery.failures
        self._telemetry.sync()
        done = self._feed.flush(timeout_s)
        return _all(self._flushes, until - time.monotonic()) and done and self._delivery.failures == lost

    def close(self) -> None:
        """Send what has happened, for 5 s at most, and end the threads. Closing twice does nothing."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        until = time.monotonic() + CLOSE_S
        tracer = self._telemetry.tracer
        if tracer.outside is self._outside_now:
            tracer.outside = self._outside_before
        self._telemetry.sync()
        self._telemetry.detach(self._id)
        if self._count in self._telemetry.counting:
            self._telemetry.counting.remove(self._count)
        self._feed.close(until - time.monotonic())
        self._delivery.hurry(until - time.monotonic())
        _all(self._shutdowns, until - time.monotonic())
        self._stop_serving()

    def __repr__(self) -> str:
        said = [f"{count} {what}" for what, count in sorted(self._delivery.delivered.items()) if count]
        said += [f"{self.dropped} dropped"] * bool(self.dropped) + ["closed"] * self._closed
        where = [self._where] * self._sends + [self.prometheus_url] * (self.prometheus_url is not None)
        return f"<OpenTelemetry {', '.join(map(str, where))}: {', '.join(said) or 'nothing sent yet'}>"


_PROPAGATOR: Final = TraceContextTextMapPropagator()


def _nothing() -> None:
    pass


def _shown(endpoint: str | None, headers: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """What a collector's address is called, without what is secret in it; and what must not be shown."""
    address = endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or "http://localhost:4318"
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"an endpoint is an address like http://127.0.0.1:4318, not {endpoint!r}")
    secrets = [*headers.values(), parts.query, parts.password or "", parts.username or ""]
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", forms_of(secrets)


def _all(calls: Sequence[Callable[[], object]], timeout_s: float) -> bool:
    """Call them all at once, each on a thread; whether all were done in time. OpenTelemetry's own waits have no bound.

    What takes longer ends by itself: each request has its timeout.
    """

    def guarded(call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as exc:  # noqa: BLE001 - whatever the SDK raises as it ends: the others are to end as well
            warn(f"telemetry: OpenTelemetry did not end well: {exc!r}")

    until = time.monotonic() + timeout_s
    threads = [threading.Thread(target=guarded, args=(call,), name="bridge-otel-flush", daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)
