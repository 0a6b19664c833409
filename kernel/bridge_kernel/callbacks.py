"""How a command calls its host back: from threads and tasks, each call in its place, and until the command ends."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .contract.errors import Cancelled, InternalError, LimitExceeded, exception_from
from .contract.frames import HEADROOM, UNDECODABLE
from .contract.messages import Failure, Success
from .contract.methods import CALLBACKS, ToolCall
from .stops import CommandStopped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .connection import Connection
    from .contract.frames import Buffer
    from .contract.methods import Callback
    from .contract.telemetry import Scalar
    from .runtime import Runtime
    from .telemetry import Recorder

__all__ = ("Caller", "Reply")

_decoders: Final = {name: msgspec.json.Decoder(m.result) for name, m in CALLBACKS.items()}

CALLBACK: Final = ("bridge", "callback")

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


class Caller:
    """Who calls the host back. How it runs and ends is its subclass's, which sets `_thread`, `_task` and the flags."""

    def __init__(
        self, runtime: Runtime, connection: Connection, recorder: Recorder, *, parent: bytes, bytes_in: int
    ) -> None:
        self.runtime = runtime
        self.connection = connection
        self.recorder = recorder
        self.parent = parent
        self._bytes_in = bytes_in
        self._bytes_out = 0
        self._lock = threading.Lock()
        self._answered = False
        self._stopped = False
        self._thread: int | None = None
        """The worker that runs its code, as long as it can be stopped there."""
        self._task: asyncio.Task[None] | None = None
        """The task that runs its code, once it has turned out to be asynchronous."""
        self._waiting = False
        self._pending: dict[int, Callable[[Reply, Sequence[Buffer]], None]] = {}
        self._seq = 0

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

    def require_running(self) -> None:
        """Raise what every callback raises once there is nobody left to call back for.

        Raises:
            CommandStopped: it was cancelled or ran out of time.
            Cancelled: it has ended.
        """
        if self._stopped:
            raise CommandStopped
        if self._answered:
            raise Cancelled("this command has ended, and its SessionContext with it")

    # -- calling -----------------------------------------------------------------

    def call(self, method: str, params: Callback, buffers: Sequence[Buffer] = (), *, about: str = "") -> Any:
        """Call the host back from a thread and wait: the decoded result and its buffers.

        Raises:
            BridgeError: what the host answered, as its own type.
            CommandStopped: the command was cancelled or ran out of time meanwhile.
        """
        with self.recorder.span(CALLBACK, {"method": method, "about": self.recorder.named(about)}) as span:
            waiter = _Waiter()
            self._request(method, self._within(params, span), buffers, waiter.resolve)
            return self._result(method, *self._wait(waiter))

    async def acall(self, method: str, params: Callback, buffers: Sequence[Buffer] = (), *, about: str = "") -> Any:
        """As `call`, from the event loop. Cancelling it leaves the host to finish the callback, unheard."""
        with self.recorder.span(CALLBACK, {"method": method, "about": self.recorder.named(about)}) as span:
            loop = asyncio.get_running_loop()
            future: asyncio.Future[tuple[Reply, Sequence[Buffer]]] = loop.create_future()

            def settle(value: tuple[Reply, Sequence[Buffer]]) -> None:
                if not future.done():
                    future.set_result(value)

            def resolve(*reply: Any) -> None:
                loop.call_soon_threadsafe(settle, reply)

            self._request(method, self._within(params, span), buffers, resolve)
            return self._result(method, *await future)

    def _within(self, params: Callback, span: dict[str, Scalar]) -> Callback:
        """A tool's call says to which span it belongs, for the host goes on with the trace."""
        if not isinstance(params, ToolCall):
            return params
        return msgspec.structs.replace(params, traceparent=self.recorder.traceparent(str(span["span_id"])))

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
        params: Callback,
        buffers: Sequence[Buffer],
        resolve: Callable[[Reply, Sequence[Buffer]], None],
    ) -> None:
        id = self.runtime.next_id()
        seq = self._seq + 1 if self._in_own_flow() else None
        if seq is not None:
            params = msgspec.structs.replace(params, seq=seq)
        content = self.connection.request(id, method, params)
        self._check_size(method, content, buffers)
        with self._lock:
            self.require_running()
            self._pending[id] = resolve
        if seq is not None:
            self._seq = seq  # only now: what was refused here took no place
        self.connection.expect(id, self)
        self.recorder.callbacks += 1
        self._bytes_out += len(content)
        self.connection.publish(content, buffers, self.parent)

    def _in_own_flow(self) -> bool:
        """Whether this is the one flow of the command whose callbacks come in the order in which its code makes them.

        A task within the worker's thread is not: who of several tasks is first depends on what they wait for.
        """
        task = self._task
        if task is None:
            return threading.get_ident() == self._thread and asyncio._get_running_loop() is None
        return asyncio._get_running_loop() is not None and asyncio.current_task() is task

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
