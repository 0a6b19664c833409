"""OpenTelemetry's OTLP exporters, which say once if nobody takes what they send, and count what is lost."""

from __future__ import annotations

import logging
import threading
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs.export import LogRecordExportResult
from opentelemetry.sdk.metrics.export import MetricExportResult
from opentelemetry.sdk.trace.export import SpanExportResult

from bridge_kernel.contract.secrets import without_secrets

from .feed import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ("Delivery", "LogExporter", "MetricExporter", "SpanExporter")

_reasons: Final[ContextVar[list[str] | None]] = ContextVar("bridge_otlp_reasons", default=None)


class _Ours(logging.Filter):
    """Keeps what OpenTelemetry logs of our own deliveries, for our one warning; anybody else's it lets through.

    Else it would write a line to a notebook with every batch, for as long as no collector is there.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        reasons = _reasons.get()
        if reasons is not None:
            reasons.append(record.getMessage())
        return reasons is None


_ours: Final = _Ours()
for _exporter in (OTLPSpanExporter, OTLPMetricExporter, OTLPLogExporter):
    logging.getLogger(_exporter.__module__).addFilter(_ours)


class Delivery:
    """What becomes of what is sent to one collector. Thread-safe."""

    def __init__(self, where: str, secrets: tuple[str, ...]) -> None:
        """`where` is what the warning calls the collector; `secrets` are not said in it."""
        self._where = where
        self._secrets = secrets
        self._lock = threading.Lock()
        self._warned = False
        self._failing: set[str] = set()
        self._waiting: dict[str, int] = {}
        self.delivered: dict[str, int] = {}
        self.lost: dict[str, int] = {}
        self.failures = 0
        self._until: float | None = None

    def hurry(self, seconds: float) -> None:
        """Whoever closes waits for so long: after that, or once it has failed, what is sent fails at once."""
        self._until = time.monotonic() + seconds

    def admit(self, what: str, most: int) -> bool:
        """Whether one more of these may wait to be sent; it is lost otherwise."""
        with self._lock:
            waiting = self._waiting.get(what, 0)
            if waiting >= most:
                self.lost[what] = self.lost.get(what, 0) + 1
                return False
            self._waiting[what] = waiting + 1
            return True

    def send(self, what: str, count: int, export: Callable[[], Any], failed: Any) -> Any:
        """Send so many of these by `export()`; its result, or `failed`."""
        reasons: list[str] = []
        if self._until is not None and (what in self._failing or time.monotonic() > self._until):
            result = failed
            reasons.append("not everything could be sent before it was closed.")
        else:
            token = _reasons.set(reasons)
            try:
                result = export()
            finally:
                _reasons.reset(token)
        if result == failed:
            self._warn(reasons)
        with self._lock:
            self.failures += result == failed
            ended = self.lost if result == failed else self.delivered
            ended[what] = ended.get(what, 0) + count
            self._waiting[what] = max(0, self._waiting.get(what, 0) - count)
            (self._failing.add if result == failed else self._failing.discard)(what)
        return result

    def _warn(self, reasons: list[str]) -> None:
        with self._lock:
            if self._warned:
                return
            self._warned = True
        said = without_secrets("; ".join(dict.fromkeys(reasons)), self._secrets)[:500]
        warn(
            f"telemetry does not get to the OpenTelemetry collector at {self._where}: {said or 'no answer'} "
            "Is it running, and is that its port for OTLP over HTTP (4318)? It is tried again with what comes next."
        )


class _Watched:
    """What the three have in common. `base` is the collector's address; None: OpenTelemetry's environment says it."""

    _path: str

    def __init__(self, delivery: Delivery, base: str | None, headers: Mapping[str, str], timeout_s: float) -> None:
        self._delivery = delivery
        endpoint = None if base is None else f"{base}{self._path}"
        super().__init__(endpoint=endpoint, headers=dict(headers), timeout=timeout_s)  # type: ignore[call-arg]


class SpanExporter(_Watched, OTLPSpanExporter):
    """Of traces."""

    _path = "/v1/traces"

    def export(self, spans: Any) -> Any:
        return self._delivery.send("spans", len(spans), lambda: OTLPSpanExporter.export(self, spans), _NO_SPANS)


class LogExporter(_Watched, OTLPLogExporter):
    """Of log records."""

    _path = "/v1/logs"

    def export(self, batch: Any) -> Any:
        return self._delivery.send("logs", len(batch), lambda: OTLPLogExporter.export(self, batch), _NO_LOGS)


class MetricExporter(_Watched, OTLPMetricExporter):
    """Of metrics, of which nothing is lost: the next ones include them."""

    _path = "/v1/metrics"

    def export(self, metrics_data: Any, timeout_millis: float | None = 10_000, **kwargs: Any) -> Any:
        def export() -> MetricExportResult:
            return OTLPMetricExporter.export(self, metrics_data, timeout_millis, **kwargs)

        return self._delivery.send("metrics", 0, export, _NO_METRICS)


_NO_SPANS: Final = SpanExportResult.FAILURE
_NO_LOGS: Final = LogRecordExportResult.FAILURE
_NO_METRICS: Final = MetricExportResult.FAILURE
