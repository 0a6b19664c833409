"""One command from its arrival to its answer: its budget, its code, its end. Nothing of it outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import threading
import time
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from .callbacks import Caller
from .contract.errors import (
    BridgeError,
    Cancelled,
    DeadlineExceeded,
    ErrorObject,
    InternalError,
    LimitExceeded,
    NotFound,
    error_object,
)
from .contract.methods import FunctionStream
from .contract.telemetry import Trace, display_id
from .credit import Credit
from .output import CURRENT, Output
from .redaction import secrets_of
from .stops import CommandStopped, calm, stop_thread
from .telemetry import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from .connection import Connection
    from .contract.errors import ErrorData
    from .contract.frames import Buffer
    from .contract.methods import Command
    from .contract.telemetry import Scalar
    from .runtime import Runtime

__all__ = ("Answer", "RunningCommand")

OWN_FILES: Final = os.path.dirname(__file__) + os.sep
"""Frames of the kernel's own files are left out at the head of a traceback: people want to see theirs."""

SHORT_NS: Final = 20_000_000
"""Below this, publishing a command's telemetry at once would be a good part of what the next one takes."""


class Answer(NamedTuple):
    """A command's result, ready for the wire."""

    result: msgspec.Struct
    buffers: Sequence[Buffer] = ()


class RunningCommand(Caller):
    """A command that this kernel has taken and not yet forgotten."""

    def __init__(
        self,
        runtime: Runtime,
        connection: Connection,
        id: int | str,
        method: str,
        params: Command,
        *,
        subject: str,
        parent: bytes,
        buffers: Sequence[Buffer],
        bytes_in: int,
    ) -> None:
        self.secrets = secrets_of(params)
        """What of it must not be shown, in every form that it could be shown in."""
        self.counted = False  # set when it is taken to be run: a drain is no work
        self.credit = Credit(params.credit if isinstance(params, FunctionStream) else 0)
        self.id = id
        self.method = method
        self.params = params
        self.buffers = buffers
        self.session = params.session
        self.deadline = None if params.deadline is None else time.monotonic() + params.deadline / 1000
        self.output = Output(self._publish_output, runtime.policy.max_output_bytes, self.secrets)
        self.trace = Trace.child_of(params.traceparent)
        metadata: dict[str, Scalar] = {
            "command": method,
            "subject": subject,
            "session": params.session,
            "kernel": runtime.identity.id,
            "attempt": params.attempt,
            "trace_id": self.trace.trace_id,
            "span_id": self.trace.span_id,
            "parent_span_id": self.trace.parent_span_id,
        }
        recorder = Recorder(
            id,
            subject,
            metadata,
            self.trace,
            self._publish_display,
            display_id(connection.comm_id, id),
            params.telemetry,
            self.secrets,
        )
        super().__init__(runtime, connection, recorder, parent=parent, bytes_in=bytes_in)
        recorder.start(recorder.captured("arguments", "arguments", partial(_arguments, params)))
        self._received = time.perf_counter_ns()
        self._queue = 0

    # -- running -----------------------------------------------------------------

    def run(self, handler: Callable[[RunningCommand, Any], Answer | Coroutine[Any, Any, Answer]]) -> None:
        """Run on this worker thread, answer, and end; asynchronous code goes on in the event loop."""
        token = CURRENT.set(self)
        self._queue = time.perf_counter_ns() - self._received
        handed_over = False
        try:
            try:
                with self._lock:
                    if self._stopped:
                        return
                    self._thread = threading.get_ident()
                outcome = handler(self, self.params)
                if inspect.iscoroutine(outcome):
                    handed_over = True
                    self.runtime.executor.spawn(self._finish(outcome), copy_context(), self._started)
                    return
                assert isinstance(outcome, Answer)
                self._not_interruptible()
                self.succeed(outcome)
            finally:
                self._not_interruptible()
        except CommandStopped:
            # Stopped from here: answered already. Raised by its own hand: it must be answered.
            self.fail(Cancelled("the command's own code cancelled it"))
        except BaseException as exc:  # noqa: BLE001 - the boundary: whatever the command's code raises is its answer
            self.fail(exc)
        finally:
            CURRENT.reset(token)
            if not handed_over:
                self._end()

    async def _finish(self, outcome: Coroutine[Any, Any, Answer]) -> None:
        try:
            self.succeed(await outcome)
        except (CommandStopped, asyncio.CancelledError):
            # Cancelled from here: answered already. By its own hand: it must be answered.
            self.fail(Cancelled("the command's own code cancelled it"))
        except BaseException as exc:  # noqa: BLE001 - the boundary, as in `run`
            self.fail(exc)

    def _started(self, task: asyncio.Task[None]) -> None:
        with self._lock:
            self._task = task
            stopped = self._stopped
        # Not in `_finish`: a task cancelled before its first step never runs a line of it.
        task.add_done_callback(lambda _: self._end())
        if stopped:
            task.cancel()

    def _not_interruptible(self) -> None:
        """From here on `stop` cannot raise in this thread, and what it raised that is still on its way is taken back."""
        while True:
            try:
                with self._lock:
                    self._thread = None
                calm()
                return
            except CommandStopped:
                continue

    def _end(self) -> None:
        self.buffers = ()
        self.output.flush(final=True)
        self.runtime.ended(self)

    # -- ending ------------------------------------------------------------------

    def stop(self, error: BridgeError) -> None:
        """Answer with `error` now, and stop the code: a task at once, a thread at its next line of Python."""
        with self._lock:
            if self._stopped or self._answered:
                return
            self._stopped = True
            pending = list(self._pending.values())
            task = self._task
            if self._thread is not None and not self._waiting:
                stop_thread(self._thread)
        for resolve in pending:
            resolve(CommandStopped(), ())
        if task is not None:
            self.runtime.executor.cancel(task)
        self.fail(error, stopping=True)

    def expire(self) -> None:
        """Stop it because its deadline passed."""
        self.stop(
            DeadlineExceeded(
                f"{self.recorder.subject} ran out of time: it had {(self.params.deadline or 0) / 1000:.3g} s"
            )
        )

    @property
    def remaining_ms(self) -> float | None:
        """What is left of the budget, never below 0; None if there is none."""
        return None if self.deadline is None else max(0.0, (self.deadline - time.monotonic()) * 1000)

    def secret(self, name: str) -> str:
        """One of the secrets that the command was given. Raises `NotFound`, and what `require_running` does."""
        self.require_running()
        try:
            return self.params.secrets[name]
        except KeyError:
            remedy = f"Name it where the command is sent: session.call(..., secrets=[{name!r}])."
            raise NotFound(f"this command was given no secret {name!r}", remedy=remedy) from None

    def succeed(self, answer: Answer) -> None:
        try:
            content = self.connection.success(self.id, answer.result)
        except (msgspec.MsgspecError, TypeError, UnicodeError) as exc:
            self.fail(InternalError(f"the result could not be written: {exc}"))
            return
        try:
            self._check_size("the result", content, answer.buffers)
        except LimitExceeded as exc:
            self.fail(exc)
            return
        self._answer(content, answer.buffers, None, captured=self._captured(answer.result))

    def fail(self, exc: BaseException, *, stopping: bool = False) -> None:
        error = error_object(exc, hidden=OWN_FILES, secrets=self.secrets)
        self._answer(self.connection.failure(self.id, error), (), error, stopping=stopping)

    def _answer(
        self,
        content: bytes,
        buffers: Sequence[Buffer],
        error: ErrorObject | None,
        *,
        stopping: bool = False,
        captured: dict[str, Scalar] | None = None,
    ) -> None:
        with self._lock:
            if self._answered or (self._stopped and not stopping):
                return  # it was stopped meanwhile: a late result goes nowhere
            self._answered = True
        if self.counted:
            self.runtime.count("cancelled" if self._stopped else "succeeded" if error is None else "failed")
        self._bytes_out += len(content) + sum(map(len, buffers))
        self.output.flush(final=not stopping)  # code that is being stopped may be in the middle of a word
        self.connection.publish(content, buffers, self.parent)
        self.connection.forget(self)
        with self._lock:
            left, self._pending = list(self._pending.values()), {}
        for resolve in left:  # threads that it left behind: nobody will answer them any more
            resolve(CommandStopped(), ())
        # After the answer: who waits for that should not wait for this too, which is half as much again.
        data = None if error is None else error.data
        duration = self.recorder.stop(
            error=None if data is None else data.type,
            queue=self._queue,
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
            where="" if data is None else _where(data),
            captured=captured or {},
        )
        if duration < SHORT_NS:
            self.runtime.unpublished.append(self)  # the lane shows it as soon as it has nothing to do
        else:
            self.recorder.publish()

    def _captured(self, result: msgspec.Struct) -> dict[str, Scalar]:
        return self.recorder.captured("results", "result", lambda: getattr(result, "value", None))

    # -- publishing --------------------------------------------------------------

    def _publish_output(self, name: str, text: str) -> None:
        content = msgspec.json.encode({"name": name, "text": text.encode("utf-8", "replace").decode()})
        self._bytes_out += len(content)
        self.connection.publish_as("stream", content, self.parent)

    def _publish_display(self, msg_type: str, content: bytes) -> None:
        self.connection.publish_as(msg_type, content, self.parent)

    def refresh(self) -> None:
        """Show what was printed and recorded since the last time: the lane's tick."""
        with contextlib.suppress(BridgeError):
            self.output.flush()
            self.recorder.publish()


def _arguments(params: Command) -> Any:
    """What a command was given, as it came: a method's or a constructor's arguments."""
    source = params if hasattr(params, "args") else getattr(params, "record", None)
    return {"args": getattr(source, "args", ()), "kwargs": getattr(source, "kwargs", {})}


def _where(data: ErrorData) -> str:
    """Where it failed, without the error's message and without code: both may hold values."""
    frames = [f'  File "{f.file}", line {f.line}, in {f.function}' for f in data.traceback]
    return "\n".join(["Traceback (most recent call last):", *frames, data.type]) if frames else ""
