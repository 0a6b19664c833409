"""One command from its arrival to its answer: its budget, its callbacks, its end. Nothing of it outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import threading
import time
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from .contract.errors import (
    BridgeError,
    Cancelled,
    DeadlineExceeded,
    ErrorObject,
    InternalError,
    LimitExceeded,
    error_object,
    exception_from,
    redacted,
    without_secrets,
)
from .contract.frames import HEADROOM, UNDECODABLE
from .contract.messages import Failure, Success
from .contract.methods import CALLBACKS, FunctionStream
from .contract.telemetry import Trace, display_id
from .credit import Credit
from .output import CURRENT, Output
from .stops import CommandStopped, calm, stop_thread
from .telemetry import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from .connection import Connection
    from .contract.frames import Buffer
    from .contract.methods import Command
    from .contract.telemetry import Scalar
    from .runtime import Runtime

__all__ = ("Answer", "RunningCommand")

OWN_FILES: Final = os.path.dirname(__file__) + os.sep
"""Frames of the kernel's own files are left out at the head of a traceback: people want to see theirs."""

SHORT_NS: Final = 20_000_000
"""Below this, publishing a command's telemetry at once would be a good part of what the next one takes."""
SHORTEST_SECRET: Final = 8  # a shorter one would be found in innocent words

_decoders: Final = {name: msgspec.json.Decoder(m.result) for name, m in CALLBACKS.items()}


class Answer(NamedTuple):
    """A command's result, ready for the wire."""

    result: msgspec.Struct
    buffers: Sequence[Buffer] = ()


Reply = Success | Failure | CommandStopped


class _Waiter:
    """One thread's wait for one reply: a lock, the cheapest thing that a thread can sleep on."""

    __slots__ = ("_lock", "_value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._value: tuple[Reply, Sequence[Buffer]] | None = None

    def resolve(self, reply: Reply, buffers: Sequence[Buffer]) -> None:
        if self._value is None:
            self._value = (reply, buffers)
            self._lock.release()

    def wait(self) -> tuple[Reply, Sequence[Buffer]]:
        self._lock.acquire()
        assert self._value is not None
        return self._value


class RunningCommand:
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
        self.runtime = runtime
        self.connection = connection
        lm = getattr(params, "lm", None)
        self.secrets = (lm.api_key,) if lm is not None and lm.api_key and len(lm.api_key) >= SHORTEST_SECRET else ()
        self.counted = False  # set when it is taken to be run: a ping is no work
        self.credit = Credit(params.credit if isinstance(params, FunctionStream) else 0)
        self.id = id
        self.method = method
        self.params = params
        self.parent = parent
        self.buffers = buffers
        self.session = params.session
        self.deadline = None if params.deadline is None else time.monotonic() + params.deadline / 1000
        self.output = Output(self._publish_output, runtime.policy.max_output_bytes)
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
        self.recorder = Recorder(
            id, subject, metadata, self._publish_display, display_id(connection.comm_id, id), self.secrets
        )
        self.recorder.start()
        self._received = time.perf_counter_ns()
        self._queue = 0
        self._bytes_in = bytes_in
        self._bytes_out = 0
        self._lock = threading.Lock()
        self._answered = False
        self._stopped = False
        self._thread: int | None = None
        self._waiting = False
        self._task: asyncio.Task[None] | None = None
        self._pending: dict[int, Callable[[Reply, Sequence[Buffer]], None]] = {}

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
        self.output.flush()
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
    def stopped(self) -> bool:
        return self._stopped

    @property
    def answered(self) -> bool:
        return self._answered

    @property
    def unanswered(self) -> list[int]:
        """The callbacks that no reply has come to."""
        with self._lock:
            return list(self._pending)

    @property
    def remaining_ms(self) -> float | None:
        """What is left of the budget, never below 0; None if there is none."""
        return None if self.deadline is None else max(0.0, (self.deadline - time.monotonic()) * 1000)

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
        self._answer(content, answer.buffers, None)

    def fail(self, exc: BaseException, *, stopping: bool = False) -> None:
        error = redacted(error_object(exc, hidden=OWN_FILES), self.secrets)
        self._answer(self.connection.failure(self.id, error), (), error, stopping=stopping)

    def _answer(
        self, content: bytes, buffers: Sequence[Buffer], error: ErrorObject | None, *, stopping: bool = False
    ) -> None:
        with self._lock:
            if self._answered or (self._stopped and not stopping):
                return  # it was stopped meanwhile: a late result goes nowhere
            self._answered = True
        if self.counted:
            self.runtime.count("cancelled" if self._stopped else "succeeded" if error is None else "failed")
        self._bytes_out += len(content) + sum(map(len, buffers))
        self.output.flush()
        self.connection.publish(content, buffers, self.parent)
        self.connection.forget(self)
        with self._lock:
            left, self._pending = list(self._pending.values()), {}
        for resolve in left:  # threads that it left behind: nobody will answer them any more
            resolve(CommandStopped(), ())
        # After the answer: who waits for that should not wait for this too, which is half as much again.
        name = None if error is None or error.data is None else error.data.type
        duration = self.recorder.stop(error=name, queue=self._queue, bytes_in=self._bytes_in, bytes_out=self._bytes_out)
        if duration < SHORT_NS:
            self.runtime.unpublished.append(self.recorder)  # the lane shows it as soon as it has nothing to do
        else:
            self.recorder.publish()

    # -- calling back ------------------------------------------------------------

    def call(self, method: str, params: msgspec.Struct, buffers: Sequence[Buffer] = (), *, about: str = "") -> Any:
        """Call the host back from a thread and wait: the decoded result and its buffers.

        Raises:
            BridgeError: what the host answered, as its own type.
            CommandStopped: the command was cancelled or ran out of time meanwhile.
        """
        with self.recorder.span(("bridge", "callback"), {"method": method, "about": about}):
            waiter = _Waiter()
            self._request(method, params, buffers, waiter.resolve)
            return self._result(method, *self._wait(waiter))

    async def acall(
        self, method: str, params: msgspec.Struct, buffers: Sequence[Buffer] = (), *, about: str = ""
    ) -> Any:
        """As `call`, from the event loop. Cancelling it leaves the host to finish the callback, unheard."""
        with self.recorder.span(("bridge", "callback"), {"method": method, "about": about}):
            loop = asyncio.get_running_loop()
            future: asyncio.Future[tuple[Reply, Sequence[Buffer]]] = loop.create_future()

            def settle(value: tuple[Reply, Sequence[Buffer]]) -> None:
                if not future.done():
                    future.set_result(value)

            def resolve(*reply: Any) -> None:
                loop.call_soon_threadsafe(settle, reply)

            self._request(method, params, buffers, resolve)
            return self._result(method, *await future)

    def notify(self, method: str, params: msgspec.Struct, buffers: Sequence[Buffer] = ()) -> None:
        """Tell the host something that it does not answer."""
        content = self.connection.notification(method, params)
        self._check_size(method, content, buffers)
        self._bytes_out += len(content)
        self.connection.publish(content, buffers, self.parent)

    def _check_size(self, what: str, content: bytes, buffers: Sequence[Buffer]) -> None:
        """A larger message would make the transport hang up: refuse it where somebody can do something about it."""
        limit = self.runtime.policy.max_message_bytes
        if (size := len(content) + sum(map(len, buffers))) > limit - HEADROOM:
            raise LimitExceeded(f"{what} takes {size} bytes, and a message at most {limit}")

    def _request(
        self,
        method: str,
        params: msgspec.Struct,
        buffers: Sequence[Buffer],
        resolve: Callable[[Reply, Sequence[Buffer]], None],
    ) -> None:
        id = self.runtime.next_id()
        content = self.connection.request(id, method, params)
        self._check_size(method, content, buffers)
        with self._lock:
            if self._stopped:
                raise CommandStopped
            if self._answered:
                raise Cancelled("this command has ended, and its SessionContext with it")
            self._pending[id] = resolve
        self.connection.expect(id, self)
        self.recorder.callbacks += 1
        self._bytes_out += len(content)
        self.connection.publish(content, buffers, self.parent)

    def reply(self, id: int, reply: Success | Failure, buffers: Sequence[Buffer], size: int) -> None:
        """The host's reply to callback `id`: called by the lane, resolves whoever waits, never blocks."""
        with self._lock:
            resolve = self._pending.pop(id, None)
        self._bytes_in += size
        if resolve is not None:
            resolve(reply, buffers)

    def _wait(self, waiter: _Waiter) -> tuple[Reply, Sequence[Buffer]]:
        own = threading.get_ident() == self._thread
        self._waiting = own or self._waiting
        try:
            return waiter.wait()
        finally:
            if own:
                # `stop` leaves a thread that waits alone: one whose reply had come already must see it here.
                with self._lock:
                    self._waiting = False
                    stopped = self._stopped
                if stopped:
                    raise CommandStopped

    def _result(self, method: str, reply: Reply, buffers: Sequence[Buffer]) -> tuple[Any, Sequence[Buffer]]:
        if isinstance(reply, CommandStopped):
            raise reply
        if isinstance(reply, Failure):
            raise exception_from(reply.error)
        try:
            return _decoders[method].decode(reply.result), buffers
        except UNDECODABLE as exc:
            raise InternalError(f"the host's reply to {method} does not fit the contract: {exc}") from exc

    # -- waiting for credit ------------------------------------------------------

    def wait_for(self, register: Callable[[Callable[[], None]], bool]) -> None:
        """Sleep until `register`'s callback is called; return at once if `register` returns False.

        Raises:
            CommandStopped: the command was stopped meanwhile.
        """
        waiter = _Waiter()
        id = self._park(waiter.resolve)
        try:
            if register(lambda: waiter.resolve(CommandStopped(), ())):
                self._wait(waiter)
        finally:
            self._pending.pop(id, None)
        if self._stopped:
            raise CommandStopped

    async def await_for(self, register: Callable[[Callable[[], None]], bool]) -> None:
        """As `wait_for`, from the event loop."""
        loop = asyncio.get_running_loop()
        given = asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(given.set)

        if register(wake):
            await given.wait()

    def _park(self, resolve: Callable[[Reply, Sequence[Buffer]], None]) -> int:
        id = self.runtime.next_id()
        with self._lock:
            if self._stopped:
                raise CommandStopped
            self._pending[id] = resolve
        return id

    # -- publishing --------------------------------------------------------------

    def _publish_output(self, name: str, text: str) -> None:
        text = without_secrets(text, self.secrets)
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
