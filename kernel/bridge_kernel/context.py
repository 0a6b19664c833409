"""`SessionContext`: what a command's code sees of its session. It dies with its command."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from .contract.errors import NotFound
from .contract.methods import (
    Progress,
    SessionDelete,
    SessionGet,
    SessionGetMany,
    SessionList,
    SessionSet,
    ToolCall,
    ToolInfo,
    ToolList,
    VariableInfo,
)
from .values import ValueReader, ValueWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .command import RunningCommand
    from .contract.telemetry import Scalar

__all__ = ("CONTEXT_NAMES", "AsyncSessionContext", "SessionContext")

CONTEXT_NAMES: Final = ("session_context", "ctx")
"""A function whose first parameter has one of these names gets the context as its first argument."""

_MISSING: Final = object()


class _Context:
    """What both kinds of context share: everything that needs no answer from the host."""

    def __init__(self, command: RunningCommand) -> None:
        self._command = command

    @property
    def session_id(self) -> str:
        return self._command.session

    @property
    def deadline(self) -> float | None:
        """Seconds left of the command's budget, never below 0; None if it has none."""
        remaining = self._command.remaining_ms
        return None if remaining is None else remaining / 1000

    @property
    def cancelled(self) -> bool:
        """True once the command was cancelled or ran out of time: long loops in C code ask for it."""
        return self._command.stopped

    def secret(self, name: str) -> str:
        """A secret of the session that the command was sent with: `session.call(..., secrets=["NAME"])`.

        It came with the command, so there is nothing to wait for. Whatever the command prints, raises or tells
        of itself shows `***` in its place. Raises `NotFound` if the command was not given it.
        """
        return self._command.secret(name)

    def progress(self, done: float, total: float | None = None, message: str = "") -> None:
        """Tell the host how far the command is; seen in its live line of telemetry."""
        done_so_far, of, said = self._command.recorder.progress(done, total, message)
        if done_so_far is not None:  # without it, only the telemetry says so
            self._command.notify("command.progress", Progress(self._command.id, done_so_far, of, said))

    @contextmanager
    def span(self, name: str, **metadata: Scalar) -> Iterator[dict[str, Scalar]]:
        """Measure a part of the command: telemetry `["bridge", "span", "start"|"stop"|"exception"]`.

        The metadata is yours, as in `emit`.
        """
        with self._command.recorder.span(("bridge", "span"), {**metadata, "name": name}, users=True) as given:
            yield given

    def emit(self, name: str, measurements: Mapping[str, float] | None = None, **metadata: Scalar) -> None:
        """Emit one telemetry event, `["bridge", "user", name]`.

        What every event says of its command (`kernel`, `session`, `trace_id`, …) stays so: of that name, yours is told
        as `user.kernel`. A text is clipped at 4,096 characters.
        """
        self._command.recorder.emit(("bridge", "user", name), dict(measurements or {}), metadata)

    def _tool_call(
        self, name: str, arguments: Mapping[str, Any] | None, kwargs: dict[str, Any], args: tuple[Any, ...] = ()
    ) -> tuple[ToolCall, ValueWriter]:
        writer = ValueWriter()
        merged = {**(arguments or {}), **kwargs}
        return (
            ToolCall(
                command=self._command.id,
                name=name,
                args=tuple(writer.write(a, f"args[{i}]") for i, a in enumerate(args)),
                kwargs={str(k): writer.write(v, str(k)) for k, v in merged.items()},
            ),
            writer,
        )

    def __repr__(self) -> str:
        state = "ended" if self._command.stopped or self._command.answered else "running"
        return f"<{type(self).__name__} session={self.session_id!r} command={self._command.id} {state}>"


class SessionContext(_Context):
    """The session, as synchronous code of a command sees it. Every call is a callback to the host.

    All methods raise the host's own errors (`NotFound`, `ToolError`, `InvalidArguments`, …), and
    `CommandStopped` once the command was cancelled or ran out of time.
    """

    def get_variable(self, name: str, default: Any = _MISSING) -> Any:
        """A variable's value; `default` if there is none and one is given, else `NotFound`."""
        try:
            got, buffers = self._command.call(
                "session.get", SessionGet(command=self._command.id, name=name), about=name
            )
        except NotFound:
            if default is _MISSING:
                raise
            return default
        return ValueReader(self._command, buffers).read(got.value, name)

    def get_variables(self, *names: str) -> dict[str, Any]:
        """Several variables in one callback; those that do not exist are left out."""
        got, buffers = self._command.call("session.get_many", SessionGetMany(command=self._command.id, names=names))
        reader = ValueReader(self._command, buffers)
        return {name: reader.read(value, name) for name, value in got.values.items()}

    def set_variable(self, name: str, value: Any, *, if_version: int | None = None) -> int:
        """Write a variable: seen by this command at once, by others only when the command has succeeded.

        `if_version`: only if the variable is still at that version; 0 if there must be none. Returns the
        version that it becomes if nobody else writes it first.

        Raises:
            NotSerializable: the value cannot cross.
            InvalidValue: it does not fit the type that the variable was defined with.
            QuotaExceeded: the session has no room for it.
            Conflict: the variable is not at `if_version`.
        """
        writer = ValueWriter()
        params = SessionSet(command=self._command.id, name=name, value=writer.write(value, name), if_version=if_version)
        got, _ = self._command.call("session.set", params, writer.buffers, about=name)
        return int(got.version)

    def delete_variable(self, name: str, *, if_version: int | None = None) -> None:
        """Delete a variable: gone for this command at once, for others only when the command has succeeded.

        Raises:
            NotFound: there is no such variable.
            Conflict: it is not at `if_version`.
        """
        params = SessionDelete(command=self._command.id, name=name, if_version=if_version)
        self._command.call("session.delete", params, about=name)

    def variables(self) -> list[VariableInfo]:
        """Name, version, type and size (bytes) of every variable, by name."""
        got, _ = self._command.call("session.list", SessionList(command=self._command.id))
        return list(got.variables)

    def call_tool(self, name: str, arguments: Mapping[str, Any] | None = None, /, **kwargs: Any) -> Any:
        """Run a tool in the host; arguments go by name, in a mapping or as keywords."""
        params, writer = self._tool_call(name, arguments, kwargs)
        return self._call_tool(params, writer)

    def call_elixir_tool(self, name: str, arguments: Mapping[str, Any] | None = None, /, **kwargs: Any) -> Any:
        """As `call_tool`: the host is an Elixir one as soon as it is Elixir that drives the kernel."""
        return self.call_tool(name, arguments, **kwargs)

    def tools(self) -> list[ToolInfo]:
        """Name, description and JSON Schema of every tool."""
        got, _ = self._command.call("tool.list", ToolList(command=self._command.id))
        return list(got.tools)

    def _call_tool(self, params: ToolCall, writer: ValueWriter) -> Any:
        got, buffers = self._command.call("tool.call", params, writer.buffers, about=params.name)
        return ValueReader(self._command, buffers).read(got.value, params.name)

    def __getitem__(self, name: str) -> Any:
        return self.get_variable(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.set_variable(name, value)

    def __delitem__(self, name: str) -> None:
        self.delete_variable(name)

    def __contains__(self, name: object) -> bool:
        return any(info.name == name for info in self.variables())


class AsyncSessionContext(_Context):
    """The session, as asynchronous code of a command sees it: the names of `SessionContext`, awaited."""

    async def get_variable(self, name: str, default: Any = _MISSING) -> Any:
        try:
            got, buffers = await self._command.acall(
                "session.get", SessionGet(command=self._command.id, name=name), about=name
            )
        except NotFound:
            if default is _MISSING:
                raise
            return default
        return ValueReader(self._command, buffers, asynchronous=True, may_wait=False).read(got.value, name)

    async def get_variables(self, *names: str) -> dict[str, Any]:
        params = SessionGetMany(command=self._command.id, names=names)
        got, buffers = await self._command.acall("session.get_many", params)
        reader = ValueReader(self._command, buffers, asynchronous=True, may_wait=False)
        return {name: reader.read(value, name) for name, value in got.values.items()}

    async def set_variable(self, name: str, value: Any, *, if_version: int | None = None) -> int:
        writer = ValueWriter()
        params = SessionSet(command=self._command.id, name=name, value=writer.write(value, name), if_version=if_version)
        got, _ = await self._command.acall("session.set", params, writer.buffers, about=name)
        return int(got.version)

    async def delete_variable(self, name: str, *, if_version: int | None = None) -> None:
        params = SessionDelete(command=self._command.id, name=name, if_version=if_version)
        await self._command.acall("session.delete", params, about=name)

    async def variables(self) -> list[VariableInfo]:
        got, _ = await self._command.acall("session.list", SessionList(command=self._command.id))
        return list(got.variables)

    async def call_tool(self, name: str, arguments: Mapping[str, Any] | None = None, /, **kwargs: Any) -> Any:
        params, writer = self._tool_call(name, arguments, kwargs)
        return await self._call_tool(params, writer)

    async def call_elixir_tool(self, name: str, arguments: Mapping[str, Any] | None = None, /, **kwargs: Any) -> Any:
        return await self.call_tool(name, arguments, **kwargs)

    async def tools(self) -> list[ToolInfo]:
        got, _ = await self._command.acall("tool.list", ToolList(command=self._command.id))
        return list(got.tools)

    async def _call_tool(self, params: ToolCall, writer: ValueWriter) -> Any:
        got, buffers = await self._command.acall("tool.call", params, writer.buffers, about=params.name)
        return ValueReader(self._command, buffers, asynchronous=True, may_wait=False).read(got.value, params.name)
