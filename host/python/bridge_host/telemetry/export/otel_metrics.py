"""Bridge's events as OpenTelemetry's metrics. How many series there are is bounded, whatever is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from opentelemetry.metrics import Observation

from .genai import model_of, provider_of
from .otel_values import carried_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opentelemetry.metrics import CallbackOptions, Histogram, Meter

    from bridge_kernel.contract.telemetry import Event

__all__ = ("Figures",)

MAX_NAMES: Final = 300
MAX_NAME: Final = 200
OTHERS: Final = "(others)"
MAX_RUNNING: Final = 100_000
MAX_KERNELS: Final = 1_000

# Seconds: what Bridge's own commands take begins at a millisecond.
_SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
# These two are the GenAI conventions' own.
_LM_SECONDS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_TOKENS: Final = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)


_T = TypeVar("_T")


class _Names:
    """The first 300 of them; all that come later are `(others)`."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self, name: object) -> str:
        text = carried_text(str(name), MAX_NAME)
        if text not in self._known:
            if len(self._known) >= MAX_NAMES:
                return OTHERS
            self._known.add(text)
        return text


class Figures:
    """Belongs to one thread; what is observed is read by others. Sessions are never among the attributes."""

    def __init__(self, meter: Meter) -> None:
        self._subjects, self._errors, self._models, self._tools = _Names(), _Names(), _Names(), _Names()
        # Plain dictionaries: their length and a list of their values are read by other threads without a lock.
        self._running: dict[str, None] = {}
        self._kernels: dict[str, int] = {}  # each with its resident memory, 0 until it is known

        def seconds(name: str, says: str) -> Histogram:
            return meter.create_histogram(name, "s", says, explicit_bucket_boundaries_advisory=_SECONDS)

        self._command = seconds("bridge.command.duration", "Commands as the host sees them: queue and retries included")
        self._execution = seconds("bridge.execution.duration", "Runs of commands in kernels")
        self._queue = seconds("bridge.queue.wait", "How long commands wait, in the host and in the kernel")
        self._tool = seconds("bridge.tool.duration", "Runs of tools in the host")
        self._commands = meter.create_counter("bridge.commands", "{command}", "Commands by outcome")
        self._failures = meter.create_counter("bridge.errors", "{error}", "Commands that failed, by the error's type")
        self._ended = meter.create_counter("bridge.kernel.ends", "{kernel}", "Kernels that ended, expected or not")
        self._cost = meter.create_counter("bridge.lm.cost", "USD", "What language models cost, as DSPy says")
        self._usage = meter.create_histogram(
            "gen_ai.client.token.usage", "{token}", "Tokens used", explicit_bucket_boundaries_advisory=_TOKENS
        )
        self._lm = meter.create_histogram(
            "gen_ai.client.operation.duration",
            "s",
            "Calls of language models",
            explicit_bucket_boundaries_advisory=_LM_SECONDS,
        )
        meter.create_observable_gauge("bridge.kernels", [self._observe_kernels], "{kernel}", "Kernels that live")
        meter.create_observable_gauge(
            "bridge.kernels.memory",
            [self._observe_memory],
            "By",
            "Resident memory of the kernels: all, and the largest",
        )
        meter.create_observable_gauge("bridge.in_flight", [self._observe_running], "{command}", "Commands not answered")

    # -- what has happened -------------------------------------------------------

    def take(self, event: Event) -> None:
        """Count one event."""
        match event.name:
            case ("bridge", "command", "start"):
                _put(self._running, str(event.metadata["command_id"]), None, MAX_RUNNING)
            case ("bridge", "command", "stop" | "exception"):
                self._take_command(event)
            case ("bridge", "execution", "stop" | "exception"):
                self._execution.record(_seconds(event), self._of(event))
                if "queue" in event.measurements:
                    self._queue.record(event.measurements["queue"] / 1e9, {"bridge.where": "kernel"})
            case ("bridge", "pool", "route"):
                self._queue.record(event.measurements["queue"] / 1e9, {"bridge.where": "host"})
            case ("bridge", "tool", "stop" | "exception"):
                said = {"gen_ai.tool.name": self._tools(event.metadata["tool"])}
                self._tool.record(_seconds(event), said | self._error(event))
            case ("bridge", "dspy", "lm", "stop" | "exception"):
                self._take_lm(event)
            case ("bridge", "kernel", "stop"):
                self._ended.add(1, {"bridge.expected": bool(event.metadata["expected"])})
                self.place(event)
            case ("bridge", "kernel", _):
                self.place(event)
            case _:
                pass

    def place(self, event: Event) -> None:
        """Take from a kernel's event whether it lives, and how large it is; nothing is counted."""
        kernel, last = str(event.metadata["kernel"]), event.name[-1]
        if last == "stop":
            self._kernels.pop(kernel, None)
        elif last == "start":
            _put(self._kernels, kernel, 0, MAX_KERNELS)
        elif last == "memory":
            _put(self._kernels, kernel, int(event.measurements["rss"]), MAX_KERNELS)

    def forget(self) -> None:
        """Take nothing for running or living: ends were dropped, and what they were of would be counted for ever.

        Kernels that live say so with their next heartbeat.
        """
        self._running.clear()
        self._kernels.clear()

    def _take_command(self, event: Event) -> None:
        self._running.pop(str(event.metadata["command_id"]), None)
        said = self._of(event)
        self._command.record(_seconds(event), said)
        error = event.metadata.get("error")
        outcome = "ok" if error is None else "cancelled" if error == "bridge.Cancelled" else "error"
        self._commands.add(1, {"bridge.subject": said["bridge.subject"], "bridge.outcome": outcome})
        if outcome == "error":
            self._failures.add(1, said)

    def _take_lm(self, event: Event) -> None:
        model = str(event.metadata["model"])
        said = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": provider_of(self._models(model)),
            "gen_ai.request.model": model_of(self._models(model)),
        }
        self._lm.record(_seconds(event), said | self._error(event))
        for kind in ("input", "output"):
            if (tokens := event.measurements.get(f"{kind}_tokens")) is not None:
                self._usage.record(int(tokens), {**said, "gen_ai.token.type": kind})
        if cost := event.measurements.get("cost"):
            self._cost.add(cost, said)

    def _of(self, event: Event) -> dict[str, str]:
        return {"bridge.subject": self._subjects(event.metadata["subject"]), **self._error(event)}

    def _error(self, event: Event) -> dict[str, str]:
        error = event.metadata.get("error")
        return {} if error is None else {"error.type": self._errors(error)}

    # -- what is, read by whoever collects ---------------------------------------

    def _observe_kernels(self, options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(len(self._kernels))]

    def _observe_memory(self, options: CallbackOptions) -> Iterable[Observation]:
        # Not each kernel's: their ids are new ones with every restart, and each would remain a series for ever.
        sizes = list(self._kernels.values())
        largest = max(sizes, default=0)
        return [Observation(sum(sizes), {"bridge.of": "all"}), Observation(largest, {"bridge.of": "largest"})]

    def _observe_running(self, options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(len(self._running))]


def _seconds(event: Event) -> float:
    return event.measurements["duration"] / 1e9


def _put(table: dict[str, _T], key: str, value: _T, most: int) -> None:
    table[key] = value
    if len(table) > most:
        del table[next(iter(table))]  # the oldest
