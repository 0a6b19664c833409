"""Answers what kernels call back: reads, staged writes, tools. All of it is journaled, so that it can be repeated."""

from __future__ import annotations

import asyncio
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.to_thread
import msgspec

from bridge_kernel.contract.errors import (
    BridgeError,
    Cancelled,
    ErrorObject,
    InternalError,
    InvalidParams,
    MethodNotFound,
    ReplayDiverged,
    ToolError,
    error_object,
    type_of,
)
from bridge_kernel.contract.frames import UNDECODABLE
from bridge_kernel.contract.methods import (
    CALLBACKS,
    Callback,
    Nothing,
    SessionDelete,
    SessionSet,
    ToolCall,
    Tools,
    ValueResult,
    Variables,
    VariableValue,
    VariableValues,
    Versioned,
)
from bridge_kernel.contract.secrets import captured_text
from bridge_kernel.contract.telemetry import Trace

from ..store.facts import CallbackAnswered, CallbackMade, CallbacksForgotten
from ..telemetry import spans
from ..values import ValueReader, ValueWriter, store_tree
from .commands import record_of
from .journal import Recorded
from .running import CURRENT, CURRENT_CALL, ToolCallInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bridge_kernel.contract.frames import Buffer
    from bridge_kernel.contract.messages import Request
    from bridge_kernel.contract.telemetry import Capture, Scalar
    from bridge_kernel.contract.values import Tag

    from ..client import KernelClient
    from ..store import SessionState, Staged, Store
    from ..tasks import Tasks
    from ..telemetry import Telemetry
    from ..tools import Tool
    from .journal import Entry
    from .running import Running

__all__ = ("Callbacks", "decode_asked", "decode_reply")

MAX_TOOL_THREADS: Final = 1000
OWN_FILES: Final = os.path.dirname(os.path.dirname(__file__)) + os.sep

_decoders: Final = {m.name: msgspec.json.Decoder(m.params) for m in CALLBACKS.values()}


class _Kept(msgspec.Struct, array_like=True):
    """A tool's reply, or the versions that a reading saw, as they are kept on disk."""

    result: bytes = b""
    buffers: tuple[bytes, ...] = ()
    error: bytes = b""
    versions: dict[str, int] | None = None


class _Asked(msgspec.Struct, array_like=True):
    params: bytes
    buffers: tuple[bytes, ...]
    effect: bool


def _encode_reply(reply: Recorded) -> bytes:
    """A tool's reply for the disk."""
    if reply.error is not None:
        return msgspec.msgpack.encode(_Kept(error=msgspec.json.encode(reply.error)))
    buffers = tuple(bytes(buffer) for buffer in reply.buffers)
    return msgspec.msgpack.encode(_Kept(msgspec.json.encode(reply.result), buffers))


def decode_reply(content: bytes) -> tuple[Recorded | None, dict[str, int] | None]:
    """What `_encode_reply` made; or the versions of the variables that were read."""
    kept = msgspec.msgpack.decode(content, type=_Kept)
    if kept.versions is not None:
        return None, kept.versions
    if kept.error:
        return Recorded(None, (), msgspec.json.decode(kept.error, type=ErrorObject)), None
    return Recorded(msgspec.Raw(kept.result), kept.buffers), None


def decode_asked(made: CallbackMade, request: bytes) -> tuple[Callback, tuple[bytes, ...], bool]:
    """The parameters, their buffers, and whether its effect must not happen twice."""
    asked = msgspec.msgpack.decode(request, type=_Asked)
    params: Any = _decoders[made.method].decode(asked.params)
    return params, asked.buffers, asked.effect


class Callbacks:
    """Belongs to one event loop; `tasks` must outlive it. `hook` says what a ref in a tool's argument becomes."""

    def __init__(
        self, store: Store, telemetry: Telemetry, tasks: Tasks, hook: Callable[[SessionState, Tag], object]
    ) -> None:
        self._store = store
        self._telemetry = telemetry
        self._tasks = tasks
        self._hook = hook
        self._threads = anyio.CapacityLimiter(MAX_TOOL_THREADS)

    def serve(
        self,
        client: KernelClient,
        request: Request,
        buffers: Sequence[Buffer],
        running_of: Callable[[int | str | None], Running | None],
        cells_of: SessionState | None,
    ) -> None:
        """Answer a callback: at once, or by a task of its own if a tool is to run."""
        try:
            decoder = _decoders.get(request.method)
            if decoder is None:
                raise MethodNotFound(f"a host has no {request.method!r}")
            try:
                params: Any = decoder.decode(request.params)
            except UNDECODABLE as exc:
                raise InvalidParams(f"{request.method}: {exc}") from exc
            running = running_of(params.command)
            if running is None and params.command is None and cells_of is not None:
                self._serve_cell(client, request, params, buffers, cells_of)
                return
            if running is None:
                raise Cancelled(f"command {params.command} is not running: nobody waits for what it calls back")
            try:
                self._serve(client, request.id, request.method, params, buffers, running)
            except ReplayDiverged as exc:
                self._give_up(running, exc)
                raise
        except Exception as exc:  # noqa: BLE001 - the boundary: the kernel waits for an answer, whatever happened
            client.refuse(request.id, error_object(exc, wrap=InternalError, hidden=OWN_FILES))

    def _give_up(self, running: Running, error: BridgeError) -> None:
        """The command cannot go on, whatever its code makes of the error: its caller is told now."""
        if running.answer is not None and not running.answer.done():
            running.answer.set_exception(error)

    # -- commands ----------------------------------------------------------------

    def _serve(
        self,
        client: KernelClient,
        id: int | str,
        method: str,
        params: Any,
        buffers: Sequence[Buffer],
        running: Running,
    ) -> None:
        if isinstance(params, SessionSet):
            value = store_tree(params.value, buffers, params.name)
            client.answer(id, Versioned(running.staged.set(params.name, value, params.if_version)))
            return
        if isinstance(params, SessionDelete):
            running.staged.delete(params.name, params.if_version)
            client.answer(id, Nothing())
            return
        journal = running.journal
        if journal.replaying:
            entry, forgotten = journal.match(params.seq, method, params, buffers)
            if forgotten and self._store.log.on_disk:
                self._store.log.append([CallbacksForgotten(running.id, forgotten)])
            if entry is not None:
                self._repeat(client, id, entry, params, running)
                return
        if isinstance(params, ToolCall):
            tool = running.session.tool(params.name)
            effect = not tool.idempotent
            entry = journal.record(params.seq, method, params, buffers, effect=effect)
            entry.waiting.append((client, id))
            try:
                number = self._note(running, entry)
            except BridgeError as exc:
                _answer_all(entry, Recorded(None, (), error_object(exc)))
                return
            self._tasks.start_soon(self._run_tool, running, tool, entry, number if effect else 0)
            return
        versions: dict[str, int] | None = None
        try:
            reply, versions = self._read(running.session, running.staged, method, params)
        except BridgeError as exc:
            reply = Recorded(None, (), error_object(exc))  # what is not there is not there the second time either
        entry = journal.record(params.seq, method, params, buffers)
        entry.reply, entry.versions = reply, versions
        _send(client, id, reply)
        if versions is not None and self._store.log.on_disk:
            self._note(running, entry, msgspec.msgpack.encode(_Kept(versions=versions)))

    def _repeat(self, client: KernelClient, id: int | str, entry: Entry, params: Callback, running: Running) -> None:
        """Answer as the first time; a tool that still runs answers both."""
        name = entry.params.name if isinstance(entry.params, ToolCall) else entry.method
        if running.trace.sampled:
            self._telemetry.tell(
                ("bridge", "journal", "replay"),
                {"n": entry.n},
                {"method": entry.method, "about": name, "session": running.session.id, "command_id": running.id},
            )
        if entry.reply is None and entry.versions is not None:
            entry.reply = self._read_again(running, entry)
        if entry.reply is not None:
            _send(client, id, entry.reply)
            return
        if not entry.lost:
            entry.waiting.append((client, id))
        else:
            assert isinstance(entry.params, ToolCall)
            tool = running.session.tool(entry.params.name)
            entry.lost, entry.params = False, params  # the same, but for the span that it belongs to now
            entry.waiting.append((client, id))
            self._tasks.start_soon(self._run_tool, running, tool, entry, 0)

    def _note(self, running: Running, entry: Entry, reply: bytes | None = None) -> int:
        """Put a callback into the journal on disk; the number to wait for."""
        log = self._store.log
        if not log.on_disk:
            return 0
        made = self.made(running, entry)
        if reply is None:
            return log.append([made])
        return log.append([made, CallbackAnswered(running.id, entry.n, self._sealed(running, reply))])

    def _sealed(self, running: Running, content: bytes) -> bytes:
        return self._store.vault.seal_if(running.prepared.secret, content)

    def made(self, running: Running, entry: Entry) -> CallbackMade:
        """A callback as it is journaled: sealed if the command carries secrets."""
        params = msgspec.json.encode(entry.params)
        asked = msgspec.msgpack.encode(_Asked(params, tuple(map(bytes, entry.buffers)), entry.effect))
        about = entry.params.name if isinstance(entry.params, ToolCall) else ""
        digest = b"" if running.prepared.secret else entry.digest  # what it asked could be guessed from it
        return CallbackMade(running.id, entry.n, entry.seq, entry.method, about, digest, self._sealed(running, asked))

    def answered(self, running: Running, entry: Entry) -> bytes | None:
        """Its reply as it is journaled; None if there is none yet."""
        return None if entry.reply is None else self._sealed(running, _encode_reply(entry.reply))

    def _read(
        self, session: SessionState, view: SessionState | Staged, method: str, params: Any
    ) -> tuple[Recorded, dict[str, int] | None]:
        """What needs no tool: answered at once, here on the loop. The second member: the versions it saw.

        `view` is what a command sees of its session's variables; a cell sees the session itself.
        """
        match method:
            case "session.get":
                variable = view.get(params.name)
                reply = VariableValue(variable.value.json, variable.version)
                return Recorded(reply, variable.value.buffers), {params.name: variable.version}
            case "session.get_many":
                writer = ValueWriter()
                found = view.get_many(params.names)
                values = {name: writer.write(v.value.read(name), name) for name, v in found.items()}
                return Recorded(VariableValues(values), writer.buffers), {n: v.version for n, v in found.items()}
            case "session.list":
                return Recorded(Variables(view.variables())), None
            case "instance.fetch":
                writer = ValueWriter()
                return Recorded(record_of(session.instance(params.ref), writer), writer.buffers), None
            case "tool.list":
                return Recorded(Tools(tuple(tool.info for _, tool in sorted(session.tools.items())))), None
        raise MethodNotFound(method)

    def _read_again(self, running: Running, entry: Entry) -> Recorded:
        """A reading that another life of this host answered: the same versions, as far as they are kept."""
        assert entry.versions is not None
        writer = ValueWriter()
        values: dict[str, Any] = {}
        for name, version in entry.versions.items():
            if name in running.staged.writes:
                value = running.staged.get(name).value
            else:
                kept = [
                    put for put in running.session.history(name) if put.version == version and put.value is not None
                ]
                found = kept[0].value if kept else running.session.get(name).value
                assert found is not None
                value = found
            if entry.method == "session.get":
                return Recorded(VariableValue(value.json, version), value.buffers)
            values[name] = writer.write(value.read(name), name)
        return Recorded(VariableValues(values), writer.buffers)

    # -- cells -------------------------------------------------------------------

    def _serve_cell(
        self, client: KernelClient, request: Request, params: Any, buffers: Sequence[Buffer], session: SessionState
    ) -> None:
        """A cell is no command: nothing of it is staged or journaled, and it is not run again."""
        if isinstance(params, ToolCall):
            tool = session.tool(params.name)
            self._tasks.start_soon(self._run_cell_tool, client, request.id, session, tool, params, buffers)
            return
        if isinstance(params, SessionSet):
            commit = session.set(params.name, store_tree(params.value, buffers, params.name), params.if_version)
            written = Versioned(commit.versions[params.name])
            self._tasks.start_soon(self._answer_when_durable, client, request.id, written, commit.number)
            return
        if isinstance(params, SessionDelete):
            commit = session.delete(params.name, params.if_version)
            self._tasks.start_soon(self._answer_when_durable, client, request.id, Nothing(), commit.number)
            return
        reply, _ = self._read(session, session, request.method, params)
        _send(client, request.id, reply)

    async def _answer_when_durable(
        self, client: KernelClient, id: int | str, result: msgspec.Struct, number: int
    ) -> None:
        try:
            await self._store.log.durable(number)
        except BridgeError as exc:
            client.refuse(id, error_object(exc))
            return
        client.answer(id, result)

    async def _run_cell_tool(
        self,
        client: KernelClient,
        id: int | str,
        session: SessionState,
        tool: Tool,
        params: ToolCall,
        buffers: Sequence[Buffer],
    ) -> None:
        trace = self._telemetry.tracer.child()  # of a cell nothing is recorded that it could be part of
        spans.enter(trace)
        reply = await self._call(session, tool, params, buffers, trace, None)
        _send(client, id, reply)

    # -- tools -------------------------------------------------------------------

    async def _run_tool(self, running: Running, tool: Tool, entry: Entry, number: int) -> None:
        """Run a tool for a command. What it raises is the answer; its end before the command's is not waited for."""
        params = entry.params
        assert isinstance(params, ToolCall)
        CURRENT.set(running)
        CURRENT_CALL.set(ToolCallInfo(f"{running.id}:{entry.n}", tool.name, running.id, running.session.id))
        trace = Trace.child_of(params.traceparent or running.trace.traceparent)
        spans.enter(trace)
        with anyio.CancelScope() as scope:
            running.add(scope)
            try:
                if number:
                    # On disk before it happens: a host that dies now must know that it may have happened.
                    try:
                        await self._store.log.durable(number)
                    except BridgeError as exc:
                        _answer_all(entry, Recorded(None, (), error_object(exc)))
                        return
                reply = await self._call(running.session, tool, params, entry.buffers, trace, running.id)
            finally:
                running.remove(scope)
            entry.reply = reply
            try:
                if self._store.log.on_disk and (content := self.answered(running, entry)) is not None:
                    self._store.log.append([CallbackAnswered(running.id, entry.n, content)])
            except BridgeError as exc:
                reply = Recorded(None, (), error_object(exc))  # the command ends with that: it cannot commit either
            _answer_all(entry, reply)

    async def _call(
        self,
        session: SessionState,
        tool: Tool,
        params: ToolCall,
        buffers: Sequence[Buffer],
        trace: Trace,
        command: str | None,
    ) -> Recorded:
        """The tool's result, or what it raised. Raises only if it is cancelled by us."""
        tell = partial(self._tell, session, trace)
        said: dict[str, Scalar] = {"tool": tool.name, "session": session.id}
        if command is not None:
            said["command_id"] = command
        said |= {"trace_id": trace.trace_id, "span_id": trace.span_id, "parent_span_id": trace.parent_span_id}
        began = time.perf_counter_ns()
        given = {"args": params.args, "kwargs": params.kwargs}
        tell("start", {"system_time": time.time_ns()}, said, "arguments", "arguments", given)
        result_tree: Any = None
        outcome = "exception"
        try:
            reader = ValueReader(buffers, lambda tag: self._hook(session, tag))
            args = tuple(reader.read(value, f"args[{i}]") for i, value in enumerate(params.args))
            kwargs = {name: reader.read(value, name) for name, value in params.kwargs.items()}
            arguments = tool.validate(args, kwargs)
            if tool.asynchronous:
                result = await tool.function(**arguments)
            else:
                raised, result = await anyio.to_thread.run_sync(
                    partial(_in_thread, tool, arguments), abandon_on_cancel=True, limiter=self._threads
                )
                if raised is not None:
                    raise raised
            writer = ValueWriter()
            tree = result_tree = writer.write(result, f"{tool.name}()")
            # Copied: the journal's reply must not change when the tool's own array does.
            reply = Recorded(ValueResult(tree), tuple(bytes(buffer) for buffer in writer.buffers))
            outcome = "stop"
        except BaseException as exc:
            said["error"] = type_of(exc)
            task = asyncio.current_task()
            if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
                said["error"] = "bridge.Cancelled"
                raise  # we cancelled it; one that the tool itself raised is its answer like any other
            reply = Recorded(None, (), error_object(exc, wrap=ToolError, hidden=OWN_FILES))
        finally:
            tell(outcome, {"duration": time.perf_counter_ns() - began}, said, "results", "result", result_tree)
        return reply

    def _tell(
        self,
        session: SessionState,
        trace: Trace,
        last: str,
        measurements: dict[str, int | float],
        said: dict[str, Scalar],
        what: Capture,
        name: str,
        value: Any,
    ) -> None:
        """Emit an event of a tool, with what it was given or returned if the session wants that captured."""
        if not trace.sampled:
            return
        if what in session.capture and (last != "exception"):
            said = {**said, name: captured_text(value, self._telemetry.intake.secrets_of(session.id))}
        self._telemetry.tell(("bridge", "tool", last), measurements, said)


def _in_thread(tool: Tool, arguments: dict[str, Any]) -> tuple[BaseException | None, Any]:
    """The tool's exception or its result. An exception is handed over as a value: a GeneratorExit that goes through
    an `await` would close the coroutine there, and never be caught.
    """
    try:
        return None, tool.function(**arguments)
    except BaseException as exc:  # noqa: BLE001 - whatever it raises is its answer
        return exc, None


def _send(client: KernelClient, id: int | str, reply: Recorded) -> None:
    if reply.error is not None:
        client.refuse(id, reply.error)
        return
    assert reply.result is not None
    try:
        client.answer(id, reply.result, reply.buffers)
    except BridgeError as exc:  # larger than the kernel takes
        client.refuse(id, error_object(exc))


def _answer_all(entry: Entry, reply: Recorded) -> None:
    entry.reply = reply
    waiting, entry.waiting = entry.waiting, []
    for client, id in waiting:
        _send(client, id, reply)
