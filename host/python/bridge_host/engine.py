"""Runs commands on kernels, and answers what they call back while they run."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import anyio
import anyio.to_thread
import msgspec

from bridge_kernel.contract.errors import (
    BridgeError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidParams,
    KernelDied,
    LimitExceeded,
    MethodNotFound,
    SourceMissing,
    ToolError,
    error_object,
    type_of,
)
from bridge_kernel.contract.frames import UNDECODABLE
from bridge_kernel.contract.methods import (
    CALLBACKS,
    Cancel,
    Chunk,
    GiveCredit,
    InstanceRecord,
    Nothing,
    State,
    ToolCall,
    Tools,
    ValueResult,
    Variables,
    VariableValue,
    VariableValues,
    Versioned,
)
from bridge_kernel.contract.telemetry import Event, Trace

from .values import ValueReader, ValueWriter, store_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bridge_kernel.contract.frames import Buffer
    from bridge_kernel.contract.messages import Notification, Request
    from bridge_kernel.contract.values import Tag

    from .client import KernelClient, Reply, StreamText
    from .pool import Kernel, Pool
    from .store import InstanceState, MemoryStore, SessionState
    from .tasks import Tasks
    from .telemetry import Telemetry
    from .tools import Tool

__all__ = ("CURRENT", "Attempt", "Engine", "Output", "Running")

MAX_NESTING: Final = 64  # commands within tools within commands: more is a tool that calls itself
MAX_TOOL_THREADS: Final = 1000
TELEMETRY_S: Final = 0.02  # how long telemetry may wait to be read when nobody asks
LATE_S: Final = 0.5  # how long after its deadline a kernel may still say so itself
OWN_FILES: Final = os.path.dirname(__file__) + os.sep

_decoders: Final = {m.name: msgspec.json.Decoder(m.params) for m in CALLBACKS.values()}
_decode_chunk: Final = msgspec.json.Decoder(Chunk).decode


class Output(NamedTuple):
    """What a command printed, labelled."""

    name: str  # "stdout" or "stderr"
    text: str
    session: str
    command: str
    kernel: str


class Attempt(NamedTuple):
    """One try at a command: what its parameters say of the try, not of the command."""

    deadline: float | None  # ms left
    attempt: int
    traceparent: str
    with_source: bool

    def common(self, session: str) -> dict[str, Any]:
        """What every command's parameters begin with."""
        return {
            "session": session,
            "deadline": self.deadline,
            "attempt": self.attempt,
            "traceparent": self.traceparent,
        }


class Running:
    """A command that a kernel runs for us now."""

    def __init__(
        self,
        session: SessionState,
        method: str,
        subject: str,
        deadline: float | None,
        depth: int,
        trace: Trace,
        on_chunk: Callable[[Chunk, Sequence[Buffer]], None] | None,
    ) -> None:
        self.session = session
        self.method = method
        self.subject = subject
        self.began = time.perf_counter_ns()
        self.deadline = deadline  # time.monotonic
        self.depth = depth
        self.trace = trace
        self.on_chunk = on_chunk
        self.client: KernelClient | None = None
        self.id = 0
        self._tools: set[anyio.CancelScope] = set()
        self._ended = False

    def remaining_ms(self) -> float | None:
        return None if self.deadline is None else max(0.0, (self.deadline - time.monotonic()) * 1000)

    def add(self, scope: anyio.CancelScope) -> None:
        self._tools.add(scope)
        if self._ended:
            scope.cancel()

    def remove(self, scope: anyio.CancelScope) -> None:
        self._tools.discard(scope)

    def begin(self, client: KernelClient) -> None:
        """An attempt begins; what an earlier one left behind was ended with it."""
        self.client = client
        self._tools = set()
        self._ended = False

    def end(self) -> None:
        """Nobody waits for its tools any more: cancel them. A tool in a thread runs on, and its result is dropped."""
        self._ended = True
        for scope in self._tools:
            scope.cancel()

    def give_credit(self, credit: int) -> None:
        if self.client is not None and not self._ended:
            self.client.notify("command.credit", GiveCredit(self.id, credit))


CURRENT: ContextVar[Running | None] = ContextVar("bridge_running_command", default=None)
"""The command for which a tool runs here: what it sends itself is nested in that, and shares its budget."""


class Engine:
    """Belongs to one event loop; `tasks` must outlive it."""

    def __init__(
        self,
        sessions: MemoryStore,
        telemetry: Telemetry,
        tasks: Tasks,
        on_output: Callable[[Output], object] | None,
    ) -> None:
        self.sessions = sessions
        self.telemetry = telemetry
        self.tasks = tasks
        self.pool: Pool  # set by the host: the pool needs the engine to listen to its kernels
        self.hook: Callable[[SessionState, Tag], object]  # set by the host: what a ref in a result becomes
        self._on_output = on_output
        self._running: dict[tuple[KernelClient, int], Running] = {}
        self._cells: dict[KernelClient, SessionState] = {}
        self._telemetry_due = False
        self._threads = anyio.CapacityLimiter(MAX_TOOL_THREADS)

    # -- commands ----------------------------------------------------------------

    async def run(
        self,
        session: SessionState,
        method: str,
        subject: str,
        build: Callable[[Attempt], tuple[msgspec.Struct, Sequence[Buffer]]],
        *,
        deadline: float | None = None,
        retries: int = 0,
        parent: Running | None = None,
        source_hash: str | None = None,
        on_chunk: Callable[[Chunk, Sequence[Buffer]], None] | None = None,
        started: Callable[[Running], None] | None = None,
    ) -> Reply:
        """Run one command: on another kernel if the first dies, at most `retries` times.

        `deadline` is in seconds; what is left of an enclosing command's bounds it. Cancelling it cancels the
        command in the kernel.

        Raises:
            BridgeError: what the kernel answered, or what became of the kernel.
        """
        session.require()
        if deadline is not None and not deadline > 0:
            raise ValueError(f"a deadline is how many seconds there are, more than 0, not {deadline!r}")
        parent = parent or CURRENT.get()
        depth = parent.depth + 1 if parent is not None else 0
        if depth > MAX_NESTING:
            raise LimitExceeded(
                f"commands are nested {depth} deep, at most {MAX_NESTING}",
                remedy="A tool seems to call, through commands, itself.",
            )
        until = None if deadline is None else time.monotonic() + deadline
        if parent is not None and parent.deadline is not None:
            until = parent.deadline if until is None else min(until, parent.deadline)
        trace = Trace.child_of(parent.trace.traceparent if parent is not None else None)
        running = Running(session, method, subject, until, depth, trace, on_chunk)
        if started is not None:
            started(running)
        attempt, resend = 1, False
        while True:
            kernel = await self._acquire(running)
            client = kernel.client
            assert client is not None
            with_source = source_hash is not None and (resend or source_hash not in client.sources)
            tried = Attempt(running.remaining_ms(), attempt, trace.traceparent, with_source)
            try:
                reply = await self._attempt(client, running, method, tried, build)
            except KernelDied as exc:
                # Only if it is this kernel that died: a tool may have met another's death and passed it on.
                if exc is not client.closed:
                    raise
                if running.client is client:
                    self._settle(client, running, attempt)
                if attempt > retries:
                    raise
                attempt += 1
                continue
            except SourceMissing:
                if resend:
                    raise
                resend = True
                continue
            finally:
                kernel.completed += 1
            if source_hash is not None:
                client.sources.add(source_hash)
            return reply

    def _settle(self, client: KernelClient, running: Running, attempt: int) -> None:
        """End the telemetry of a command whose kernel can no longer do so itself."""
        duration = time.perf_counter_ns() - running.began
        trace = running.trace
        self.telemetry.settle(
            client.display_id(running.id),
            f"✗ {running.subject}  {duration / 1e6:.1f} ms · bridge.KernelDied",
            Event(
                ("bridge", "execution", "exception"),
                {"duration": duration},
                {
                    "command": running.method,
                    "subject": running.subject,
                    "success": False,
                    "error": "bridge.KernelDied",
                    "session": running.session.id,
                    "kernel": client.attached.kernel.id if client.attached is not None else "",
                    "attempt": attempt,
                    "trace_id": trace.trace_id,
                    "span_id": trace.span_id,
                    "parent_span_id": trace.parent_span_id,
                },
            ),
        )

    async def _acquire(self, running: Running) -> Kernel:
        ready = self.pool.choose()
        if ready is not None:
            return ready
        remaining = running.remaining_ms()
        try:
            async with asyncio.timeout(None if remaining is None else remaining / 1000):
                return await self.pool.acquire()
        except TimeoutError:
            raise DeadlineExceeded(f"{running.subject} ran out of time before a kernel was ready") from None

    async def _attempt(
        self,
        client: KernelClient,
        running: Running,
        method: str,
        attempt: Attempt,
        build: Callable[[Attempt], tuple[msgspec.Struct, Sequence[Buffer]]],
    ) -> Reply:
        params, buffers = build(attempt)
        running.id, future = client.request(method, params, buffers)
        running.begin(client)
        key = (client, running.id)
        self._running[key] = running
        answered = False
        try:
            if attempt.deadline is None:
                reply = await future
            else:
                try:
                    async with asyncio.timeout(attempt.deadline / 1000 + LATE_S):
                        reply = await future
                except DeadlineExceeded:
                    raise  # a TimeoutError too, but the kernel's own word
                except TimeoutError:
                    raise DeadlineExceeded(
                        f"{running.subject} ran out of time, and its kernel did not say so itself",
                        remedy="It may hang in C code: kill the kernel if it does not come back.",
                    ) from None
            answered = True
            return reply
        except BridgeError as exc:
            # A deadline that the kernel noticed is an answer too; to cancel once more does no harm.
            answered = not isinstance(exc, DeadlineExceeded) and client.closed is None
            raise
        finally:
            del self._running[key]
            client.forget(running.id)
            running.end()
            if answered:
                self.telemetry.expect(client.display_id(running.id))
            else:
                client.notify("command.cancel", Cancel(running.id), control=True)

    # -- what kernels say (Listener) ---------------------------------------------

    def on_output(self, client: KernelClient, command: int | None, output: StreamText) -> None:
        running = self._running.get((client, command)) if command is not None else None
        kernel = client.attached.kernel.id if client.attached is not None else ""
        labelled = Output(
            output.name,
            output.text,
            running.session.id if running is not None else "",
            running.subject if running is not None else "",
            kernel,
        )
        if self._on_output is not None:
            self._on_output(labelled)
        else:
            (sys.stderr if output.name == "stderr" else sys.stdout).write(output.text)

    def on_display(self, client: KernelClient, content: bytes) -> None:
        self.telemetry.take_display(content)
        if not self._telemetry_due:
            self._telemetry_due = True
            asyncio.get_running_loop().call_later(TELEMETRY_S, self._read_telemetry)

    def _read_telemetry(self) -> None:
        self._telemetry_due = False
        self.telemetry.read()

    def on_notification(self, client: KernelClient, message: Notification, buffers: Sequence[Buffer]) -> None:
        if message.method == "command.chunk":
            chunk = _decode_chunk(message.params)
            running = self._running_of(client, chunk.command)
            if running is not None and running.on_chunk is not None:
                running.on_chunk(chunk, buffers)
        # command.progress is in the command's telemetry too, which is where the host shows it.

    def _running_of(self, client: KernelClient, command: int | str | None) -> Running | None:
        return self._running.get((client, command)) if isinstance(command, int) else None

    def cells_of(self, client: KernelClient, session: SessionState) -> None:
        """Cells of this kernel belong to `session`."""
        self._cells[client] = session

    def on_callback(self, client: KernelClient, request: Request, buffers: Sequence[Buffer]) -> None:
        try:
            decoder = _decoders.get(request.method)
            if decoder is None:
                raise MethodNotFound(f"a host has no {request.method!r}")
            try:
                params: Any = decoder.decode(request.params)
            except UNDECODABLE as exc:
                raise InvalidParams(f"{request.method}: {exc}") from exc
            running = self._running_of(client, params.command)
            if running is None and params.command is None and client in self._cells:
                running = Running(self._cells[client], "execute_request", "cell", None, 0, Trace.child_of(None), None)
            if running is None:
                raise Cancelled(f"command {params.command} is not running: nobody waits for what it calls back")
            if isinstance(params, ToolCall):
                tool = running.session.tool(params.name)
                self.tasks.start_soon(self._tool, client, request.id, running, tool, params, buffers)
                return
            result, out = self._answer(running.session, request.method, params, buffers)
            client.answer(request.id, result, out)
        except BridgeError as exc:
            client.refuse(request.id, error_object(exc))
        except Exception as exc:
            # A mistake of ours: whoever waits in the kernel must hear of it all the same.
            client.refuse(request.id, error_object(InternalError(f"{request.method}: {type(exc).__name__}: {exc}")))
            raise

    def _answer(
        self, session: SessionState, method: str, params: Any, buffers: Sequence[Buffer]
    ) -> tuple[msgspec.Struct, Sequence[Buffer]]:
        """Everything but tools: read and written at once, here on the loop."""
        match method:
            case "session.get":
                variable = session.get(params.name)
                return VariableValue(variable.value.json, variable.version), variable.value.buffers
            case "session.get_many":
                writer = ValueWriter()
                found = session.get_many(params.names)
                values = {name: writer.write(v.value.read(name), name) for name, v in found.items()}
                return VariableValues(values), writer.buffers
            case "session.set":
                return Versioned(session.set(params.name, store_tree(params.value, buffers, params.name))), ()
            case "session.delete":
                session.delete(params.name)
                return Nothing(), ()
            case "session.list":
                return Variables(session.describe()), ()
            case "instance.fetch":
                writer = ValueWriter()
                return record_of(session.instance(params.ref), writer), writer.buffers
            case "tool.list":
                return Tools(tuple(tool.info for _, tool in sorted(session.tools.items()))), ()
        raise MethodNotFound(method)

    async def _tool(
        self,
        client: KernelClient,
        id: int | str,
        running: Running,
        tool: Tool,
        params: ToolCall,
        buffers: Sequence[Buffer],
    ) -> None:
        """Run a tool for a command. What it raises is the answer; its end before the command's is not waited for."""
        metadata: dict[str, Any] = {
            "tool": tool.name,
            "session": running.session.id,
            "trace_id": running.trace.trace_id,
            "parent_span_id": running.trace.span_id,
        }
        began = time.perf_counter_ns()
        self.telemetry.emit(("bridge", "tool", "start"), {"system_time": time.time_ns()}, metadata)
        outcome = "exception"
        with anyio.CancelScope() as scope:
            running.add(scope)
            try:
                reader = ValueReader(buffers, lambda tag: self.hook(running.session, tag))
                args = tuple(reader.read(value, f"args[{i}]") for i, value in enumerate(params.args))
                kwargs = {name: reader.read(value, name) for name, value in params.kwargs.items()}
                arguments = tool.validate(args, kwargs)
                CURRENT.set(running)
                if tool.asynchronous:
                    result = await tool.function(**arguments)
                else:
                    result = await anyio.to_thread.run_sync(
                        lambda: tool.function(**arguments), abandon_on_cancel=True, limiter=self._threads
                    )
                writer = ValueWriter()
                answer = ValueResult(writer.write(result, f"{tool.name}()"))
                client.answer(id, answer, writer.buffers)
                outcome = "stop"
            except BaseException as exc:
                task = asyncio.current_task()
                if isinstance(exc, asyncio.CancelledError) and (scope.cancel_called or (task and task.cancelling())):
                    raise  # we cancelled it; one that the tool itself raised is its answer like any other
                metadata["error"] = type_of(exc)
                client.refuse(id, error_object(exc, wrap=ToolError, hidden=OWN_FILES))
            finally:
                running.remove(scope)
        if scope.cancelled_caught:
            metadata["error"] = "bridge.Cancelled"
        self.telemetry.emit(("bridge", "tool", outcome), {"duration": time.perf_counter_ns() - began}, metadata)


def record_of(instance: InstanceState, writer: ValueWriter) -> InstanceRecord:
    """An instance as a kernel is told of it; its values are written into `writer`'s message."""
    args = [writer.write(value, f"args[{i}]") for i, value in enumerate(instance.args.read("args"))]
    kwargs = {name: writer.write(value, name) for name, value in instance.kwargs.read("kwargs").items()}
    state = State(
        instance.adapter,  # type: ignore[arg-type]
        writer.write(instance.state.read("state"), "state"),
        instance.sha256,
    )
    return InstanceRecord(instance.ref, instance.cls, tuple(args), kwargs, state, instance.version)
