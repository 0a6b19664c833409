"""What the host tells of a command: that it began, ended, lost a kernel. To telemetry, and to who looks on."""

from __future__ import annotations

import asyncio
import contextlib
import time
import warnings
from typing import TYPE_CHECKING, Final, Literal

from bridge_kernel.contract.errors import type_of
from bridge_kernel.contract.line import Line
from bridge_kernel.contract.telemetry import Event, new_span_id

if TYPE_CHECKING:
    from bridge_kernel.contract.telemetry import Scalar

    from ..client import KernelClient
    from ..live import Live
    from ..telemetry import Telemetry
    from .running import Running

__all__ = ("Teller",)

_COMMAND: Final = ("bridge", "command")
_STARTED: Final = (*_COMMAND, "start")


class Teller:
    """Belongs to one event loop."""

    def __init__(self, telemetry: Telemetry, live: Live | None = None) -> None:
        """`live` is where somebody looks."""
        self._telemetry = telemetry
        self._live = live

    def begun(self, running: Running) -> None:
        """A command was taken."""
        if self._live is not None:
            try:
                self._live.begin(running)
            except Exception as exc:  # noqa: BLE001 - who looks on must not break a command
                self._look_away(exc)
        if running.trace.sampled:
            said = said_of(running) | {"command_id": running.id}
            self._telemetry.tell(_STARTED, {"system_time": time.time_ns()}, said)

    def tried(self, client: KernelClient, running: Running) -> None:
        """An attempt at it begins, on this kernel."""
        if self._live is not None:
            self._live.tried(running, client.display_id(running.request_id))

    def ended(self, running: Running, error: BaseException | None) -> None:
        """It was answered, or failed for good."""
        if self._live is not None:
            try:
                self._live.end(running, error)
            except Exception as exc:  # noqa: BLE001 - as above
                self._look_away(exc)
        measurements: dict[str, int | float] = {
            "duration": time.perf_counter_ns() - running.began,
            "attempts": running.attempt,
        }
        said = said_of(running) | {"command_id": running.id}
        if error is not None:
            said["error"] = "bridge.Cancelled" if isinstance(error, asyncio.CancelledError) else type_of(error)
        self._tell(running, (*_COMMAND, "stop" if error is None else "exception"), measurements, said)

    def _look_away(self, error: Exception) -> None:
        self._live = None
        with contextlib.suppress(Warning):  # where warnings are errors, it would break the command after all
            warnings.warn(f"commands are not shown live any more, for that raised {error!r}", stacklevel=3)

    def cached(
        self,
        what: Literal["hit", "miss", "store", "skip"],
        running: Running,
        measurements: dict[str, int | float] | None = None,
        **said: Scalar,
    ) -> None:
        """What the cache of results had or did for it."""
        self._tell(running, ("bridge", "cache", what), measurements or {}, {**said_of(running), **said})

    def _tell(
        self,
        running: Running,
        name: tuple[str, ...],
        measurements: dict[str, int | float],
        said: dict[str, Scalar],
    ) -> None:
        """Of what is counted although its trace may not be recorded."""
        if running.trace.sampled:
            self._telemetry.tell(name, measurements, said)
        else:
            self._telemetry.count(Event(name, measurements, said))

    def again(self, running: Running) -> None:
        """Its kernel died, and it is going to be run again."""
        if running.trace.sampled:
            measurements = {"attempt": running.attempt + 1, "recorded": len(running.journal)}
            self._telemetry.tell(("bridge", "execution", "retry"), measurements, said_of(running))

    def lost(self, client: KernelClient, running: Running) -> None:
        """End an attempt whose kernel can no longer do so itself."""
        if not running.trace.sampled or self._telemetry.silent:
            return
        kernel = client.attached.kernel.id if client.attached is not None else ""
        duration = time.perf_counter_ns() - running.tried
        line = Line(running.subject, duration, "error", kernel, attempt=running.attempt, error="bridge.KernelDied")
        said = said_of(running) | {
            "kernel": kernel,
            "attempt": running.attempt,
            "span_id": new_span_id(),
            "parent_span_id": running.trace.span_id,
            "success": False,
            "error": "bridge.KernelDied",
        }
        self._telemetry.intake.settle(client.display_id(running.request_id), line.text())
        self._telemetry.tell(("bridge", "execution", "exception"), {"duration": duration}, said)


def said_of(running: Running) -> dict[str, Scalar]:
    """What each of the host's events of a command says of it."""
    trace = running.trace
    return {
        "command": running.prepared.method,
        "subject": running.subject,
        "session": running.session.id,
        "trace_id": trace.trace_id,
        "span_id": trace.span_id,
        "parent_span_id": trace.parent_span_id,
    }
