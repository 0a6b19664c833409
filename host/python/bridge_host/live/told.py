"""`Told`: one command that somebody sent, with all that is said of it while it runs and after."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from bridge_kernel.contract.errors import BridgeError, type_of
from bridge_kernel.contract.line import Line

if TYPE_CHECKING:
    from bridge_kernel.contract.telemetry import EventBatch

    from ..engine.running import Running

__all__ = ("Told",)

_PROGRESS: Final = ("bridge", "execution", "progress")
_LM: Final = frozenset({("bridge", "dspy", "lm", "stop"), ("bridge", "dspy", "lm", "exception")})


class Told:
    """What its kernels tell is counted as it comes; what the host knows itself is looked at when a line is made."""

    __slots__ = (
        "_done",
        "_line",
        "_message",
        "_running",
        "_total",
        "began",
        "id",
        "lm_calls",
        "queue",
        "tokens",
        "where",
    )

    def __init__(self, running: Running) -> None:
        self.id = running.id
        self.began = running.began
        self.queue: int | None = None
        self.lm_calls = 0
        self.tokens = 0
        self.where: Any = None
        """In which cell, if it is in one."""
        self._running: Running | None = running
        self._line: Line | None = None  # once it has ended
        self._done: float | None = None
        self._total: float | None = None
        self._message = ""

    def take(self, batch: EventBatch, *, nested: bool) -> tuple[int, int]:
        """Take what a kernel tells; the LM calls and the tokens in it. `nested`: of a command of one of its tools."""
        calls = tokens = 0
        for event in batch.events:
            if event.name in _LM:
                calls += 1
                tokens += int(event.measurements.get("tokens", 0))
            elif event.name == _PROGRESS and not nested:
                self._done, self._total = event.measurements.get("done"), event.measurements.get("total")
                self._message = _in_one_line(str(event.metadata.get("message") or ""))
        self.lm_calls += calls
        self.tokens += tokens
        return calls, tokens

    def end(self, error: BaseException | None, now: int) -> None:
        """It has ended: of the command nothing is kept but its line."""
        running = self._running
        assert running is not None
        line = self.line(now)
        if error is None:
            self._line = line._replace(state="ok", cached=running.attempt == 0)
        else:
            self._line = line._replace(state="error", error=_name_of(error), traceback=_where(error))
        self._running = None

    def line(self, now: int) -> Line:
        """How it is at `now`, in ns of `time.perf_counter_ns`; once it has ended, how it ended."""
        running = self._running
        if running is None:
            assert self._line is not None
            return self._line._replace(lm_calls=self.lm_calls, tokens=self.tokens)
        client = running.client
        waits = client is None or client.closed is not None
        attached = None if client is None else client.attached
        return Line(
            _in_one_line(running.subject),
            now - self.began,
            "queued" if waits else "running",
            kernel="" if attached is None else attached.kernel.id,
            queue=self.queue or 0,
            callbacks=len(running.journal),
            lm_calls=self.lm_calls,
            tokens=self.tokens,
            attempt=running.attempt,
            done=self._done,
            total=self._total,
            message=self._message,
        )


def _name_of(error: BaseException) -> str:
    return "bridge.Cancelled" if isinstance(error, asyncio.CancelledError) else type_of(error)


def _in_one_line(text: str) -> str:
    """A newline would move a terminal's line, and an escape sequence do whatever it likes there."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def _where(error: BaseException) -> str:
    """Where it failed, without the error's message and without code: both may hold values."""
    frames = error.frames if isinstance(error, BridgeError) else ()
    if not frames:
        return ""
    said = [f'  File "{frame.file}", line {frame.line}, in {frame.function}' for frame in frames]
    return "\n".join(["Traceback (most recent call last):", *said, _name_of(error)])
