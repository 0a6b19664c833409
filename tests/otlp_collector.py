"""An OpenTelemetry collector in this process: takes OTLP over HTTP on loopback, and keeps what it got."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from opentelemetry.proto.common.v1.common_pb2 import KeyValue
    from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
    from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

__all__ = ("Collector", "said")


class Collector:
    """`with Collector() as collector`: spans and logs as they came, metrics as they were last."""

    def __init__(self, *, status: int = 200, hold: threading.Event | None = None) -> None:
        """Answers with `status`; with `hold` it answers nothing until that is set."""
        self.spans: list[Span] = []
        self.logs: list[LogRecord] = []
        self.metrics: dict[str, Metric] = {}
        self.services: set[str] = set()
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.asked = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.asked.set()
                if hold is not None:
                    hold.wait(30)
                if status == 200:
                    collector._take(self.path, body, dict(self.headers))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def _take(self, path: str, body: bytes, headers: dict[str, str]) -> None:
        self.headers.append(headers)
        self.bodies.append(body)
        match path:
            case "/v1/traces":
                for of in ExportTraceServiceRequest.FromString(body).resource_spans:
                    self.services.add(str(said(of.resource.attributes)["service.name"]))
                    self.spans += [span for scope in of.scope_spans for span in scope.spans]
            case "/v1/metrics":
                for measured in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                    self.services.add(str(said(measured.resource.attributes)["service.name"]))
                    self.metrics |= {m.name: m for scope in measured.scope_metrics for m in scope.metrics}
            case "/v1/logs":
                for logged in ExportLogsServiceRequest.FromString(body).resource_logs:
                    self.services.add(str(said(logged.resource.attributes)["service.name"]))
                    self.logs += [record for scope in logged.scope_logs for record in scope.log_records]
            case _:
                raise AssertionError(path)

    def points(self, name: str) -> list[tuple[dict[str, Any], Any]]:
        """The data points of a metric, each with its attributes: a number, or a histogram's (count, sum)."""
        metric = self.metrics[name]
        match metric.WhichOneof("data"):
            case "histogram":
                return [(said(point.attributes), (point.count, point.sum)) for point in metric.histogram.data_points]
            case "sum":
                return [(said(p.attributes), p.as_int or p.as_double) for p in metric.sum.data_points]
            case _:
                return [(said(p.attributes), p.as_int or p.as_double) for p in metric.gauge.data_points]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def said(attributes: Any) -> dict[str, Any]:
    """Attributes as a dict."""
    found: dict[str, Any] = {}
    pair: KeyValue
    for pair in attributes:
        kind = pair.value.WhichOneof("value")
        found[pair.key] = getattr(pair.value, kind) if kind is not None else None
    return found
