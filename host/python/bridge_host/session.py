"""`AsyncSession` and `AsyncInstance`: a session as asynchronous code of the host's uses it."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

import msgspec

from bridge_kernel.contract.errors import InternalError, NotFound
from bridge_kernel.contract.frames import UNDECODABLE
from bridge_kernel.contract.methods import (
    COMMANDS,
    LM,
    FunctionCall,
    FunctionStream,
    Inspected,
    InstanceCall,
    InstanceCreate,
    InstanceRecord,
    ObjectInspect,
    PathFunction,
)
from bridge_kernel.contract.values import Ref

from .engine import record_of
from .functions import FunctionSource, source_of
from .store import InstanceState, check_name
from .stream import WINDOW, AsyncStream
from .tools import Tool
from .values import ValueReader, ValueWriter, store, store_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bridge_kernel.contract.frames import Buffer
    from bridge_kernel.contract.methods import VariableInfo
    from bridge_kernel.contract.values import Tag

    from .client import Reply
    from .engine import Attempt, Engine, Running
    from .store import SessionState

__all__ = ("AsyncInstance", "AsyncSession")

F = TypeVar("F", bound="Callable[..., Any]")

_decoders: Final = {name: msgspec.json.Decoder(m.result) for name, m in COMMANDS.items()}


def _result(method: str, reply: Reply) -> Any:
    try:
        return _decoders[method].decode(reply.result)
    except UNDECODABLE as exc:
        raise InternalError(f"the kernel's answer to {method} does not fit the contract: {exc}") from exc


class SessionBase:
    """What sessions do without a kernel: all of it at once, so it is the same for both faces."""

    def __init__(self, state: SessionState, engine: Engine) -> None:
        self._state = state
        self._engine = engine

    @property
    def id(self) -> str:
        return self._state.id

    # -- variables ---------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        """The variable's value, made anew: to change the variable, assign to it. Raises `NotFound`, a KeyError."""
        return self._state.get(name).value.read(name, self._arrive)

    def __setitem__(self, name: str, value: Any) -> None:
        """Write a variable; raises `NotSerializable` if the value could not reach a kernel."""
        self._state.set(name, store(value, check_name("variable", name)))

    def __delitem__(self, name: str) -> None:
        self._state.delete(name)

    def __contains__(self, name: object) -> bool:
        return name in self._state.names()

    def __iter__(self) -> Any:
        return iter(self._state.names())

    def __len__(self) -> int:
        return len(self._state.names())

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except NotFound:
            return default

    def update(self, values: dict[str, Any]) -> None:
        """Write several variables; if one of them cannot be carried, none is written."""
        stored = {name: store(value, check_name("variable", name)) for name, value in values.items()}
        for name, value in stored.items():
            self._state.set(name, value)

    def variables(self) -> tuple[VariableInfo, ...]:
        """Name, version, type and size (bytes) of every variable, by name."""
        return self._state.describe()

    # -- tools and functions -----------------------------------------------------

    @property
    def tools(self) -> dict[str, Tool]:
        """The session's tools by name. Pass one as an argument, and it arrives as a Python function."""
        return dict(self._state.tools)

    @overload
    def tool(self, function: F, /, *, name: str = "", description: str = "") -> F: ...
    @overload
    def tool(self, function: None = None, /, *, name: str = "", description: str = "") -> Callable[[F], F]: ...
    def tool(self, function: Callable[..., Any] | None = None, /, *, name: str = "", description: str = "") -> Any:
        """Register a function of the host as a tool, as a decorator or by a call. The function itself stays as it was.

        Its schema comes from its type hints, what it says of itself from its docstring. Registering the
        name again replaces it. Raises TypeError if the function has parameters that go by position only.
        """
        if function is None:
            return lambda decorated: self._register(decorated, name, description)
        return self._register(function, name, description)

    def _register(self, function: Callable[..., Any], name: str, description: str) -> Callable[..., Any]:
        if not callable(function):
            raise TypeError(
                f"a tool is a function, not {function!r}: @session.tool, or @session.tool(name=…), above it"
            )
        tool = function if isinstance(function, Tool) else Tool(function, name=name, description=description)
        self._state.tools[tool.name] = tool
        return function

    def function(
        self,
        name: str | Callable[..., Any] | None = None,
        what: str | Callable[..., Any] | None = None,
        /,
        *,
        lm: bool = False,
    ) -> Any:
        """Give the session a Python function that kernels run: `session.call(name, …)`.

        `session.function("name", source_or_callable)`, or as a decorator: `@session.function`,
        `@session.function("name")`, `@session.function(lm=True)`. `lm` runs it with the session's language model.

        Raises:
            ValueError: the function uses what does not travel with it.
        """
        if callable(name):
            what, name = name, name.__name__
        if what is not None and name is not None:
            self._state.functions[name] = source_of(name, what, lm=lm)
            return what

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            called = name or function.__name__
            self._state.functions[called] = source_of(called, function, lm=lm)
            return function

        return register

    def lm(
        self,
        model: str,
        *,
        api_base: str | None = None,
        api_key: str | None = None,
        adapter: str | None = None,
        **options: Any,
    ) -> None:
        """The language model of the session's DSPy code: the arguments of `dspy.LM`, and DSPy's adapter by name.

        The key is sent with the commands that need it, and is in no repr, telemetry or error.
        """
        writer = ValueWriter()
        written = {name: writer.write(value, f"lm.{name}") for name, value in options.items()}
        if writer.buffers:
            raise TypeError("options of a language model are plain data: no arrays, tables or long bytes")
        self._state.lm = LM(model=model, api_base=api_base, api_key=api_key, adapter=adapter, options=written)

    def _arrive(self, tag: Tag) -> object:
        return self._engine.hook(self._state, tag)

    # -- building commands -------------------------------------------------------

    def _function_call(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], credit: int = 0
    ) -> tuple[Callable[[Attempt], tuple[msgspec.Struct, Sequence[Buffer]]], FunctionSource | None]:
        source = self._state.functions.get(check_name("function", name))
        writer = ValueWriter()
        written_args, written_kwargs = writer.write_all(args, kwargs)
        lm = self._state.lm if name.startswith("dspy.") or (source is not None and source.lm) else None

        def build(attempt: Attempt) -> tuple[msgspec.Struct, Sequence[Buffer]]:
            function = PathFunction(name) if source is None else source.ref(with_source=attempt.with_source)
            common: dict[str, Any] = {
                **attempt.common(self._state.id),
                "function": function,
                "args": written_args,
                "kwargs": written_kwargs,
                "lm": lm,
            }
            params = FunctionStream(**common, credit=credit) if credit else FunctionCall(**common)
            return params, writer.buffers

        return build, source

    def __repr__(self) -> str:
        state = self._state
        parts = {
            "variables": state.names(),
            "instances": [f"{i.cls} {i.ref[:8]}" for i in list(state.instances.values())],
            "tools": sorted(state.tools),
            "functions": sorted(state.functions),
        }
        shown = "; ".join(f"{what}: {', '.join(names[:12])}" for what, names in parts.items() if names)
        return f"<Session {state.id!r}{' ' + shown if shown else ' (empty)'}>"


class AsyncSession(SessionBase):
    """A session: variables, tools, functions and instances that the host owns; kernels borrow them for a command."""

    async def call(
        self,
        name: str,
        /,
        *args: Any,
        deadline: float | None = None,
        retries: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Call one of the session's functions, or one importable in the kernel: `call("math.hypot", 3, 4)`.

        `deadline` in seconds, callbacks included; `retries`: how often it may run again if its kernel dies.
        A function of yours with parameters of these two names takes them by position.

        Raises:
            RemoteError: what the function raised, with the kernel's traceback.
            DeadlineExceeded, KernelDied, NotSerializable, NotFound, PolicyDenied: as they say.
        """
        return await self._call(name, args, kwargs, deadline, retries, None)

    async def _call(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deadline: float | None,
        retries: int,
        parent: Running | None,
    ) -> Any:
        build, source = self._function_call(name, args, kwargs)
        reply = await self._engine.run(
            self._state,
            "function.call",
            name,
            build,
            deadline=deadline,
            retries=retries,
            parent=parent,
            source_hash=source.hash if source is not None else None,
        )
        return self._value("function.call", reply)

    def _value(self, method: str, reply: Reply) -> Any:
        return ValueReader(reply.buffers, self._arrive).read(_result(method, reply).value, "result")

    def stream(self, name: str, /, *args: Any, deadline: float | None = None, **kwargs: Any) -> AsyncStream[Any]:
        """Run a generator and iterate over what it yields: `async for chunk in session.stream(…)`.

        A producer is at most 16 values ahead. Leaving the loop early, or `aclose()`, stops it.
        """
        return self._stream(name, args, kwargs, deadline, None)

    def _stream(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deadline: float | None,
        parent: Running | None,
    ) -> AsyncStream[Any]:
        build, source = self._function_call(name, args, kwargs, credit=WINDOW)
        stream: AsyncStream[Any] = AsyncStream(self._engine, self._arrive)

        async def run() -> Any:
            reply = await self._engine.run(
                self._state,
                "function.stream",
                name,
                build,
                deadline=deadline,
                parent=parent,
                source_hash=source.hash if source is not None else None,
                on_chunk=stream._on_chunk,
                started=stream._on_started,
            )
            return self._value("function.stream", reply)

        stream._start(run)
        return stream

    async def create(self, cls: str, /, *args: Any, deadline: float | None = None, **kwargs: Any) -> AsyncInstance:
        """Make an object in a kernel and keep it here: as its recipe, and the state it has.

        Raises as `call` does; nothing is kept then.
        """
        return AsyncInstance(self, await self._create(cls, args, kwargs, deadline, None))

    async def _create(
        self,
        cls: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deadline: float | None,
        parent: Running | None,
    ) -> str:
        ref = uuid.uuid4().hex
        stored_args, stored_kwargs = store(list(args), "args"), store(kwargs, "kwargs")

        def build(attempt: Attempt) -> tuple[msgspec.Struct, Sequence[Buffer]]:
            writer = ValueWriter()
            written = writer.write_all(stored_args.read("args"), stored_kwargs.read("kwargs"))
            params = InstanceCreate(
                **attempt.common(self._state.id),
                record=InstanceRecord(ref, cls, *written),
            )
            return params, writer.buffers

        reply = await self._engine.run(
            self._state, "instance.create", f"{cls}()", build, deadline=deadline, parent=parent, retries=1
        )
        created = _result("instance.create", reply)
        self._state.instances[ref] = InstanceState(
            ref=ref,
            cls=cls,
            args=stored_args,
            kwargs=stored_kwargs,
            adapter=created.state.adapter,
            state=store_tree(created.state.value, reply.buffers, "state"),
            sha256=created.state.sha256,
            methods=created.methods,
        )
        return ref

    async def _call_method(
        self,
        ref: str,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deadline: float | None = None,
        retries: int = 0,
        parent: Running | None = None,
    ) -> Any:
        read = 0  # the version that the attempt which succeeds was built from

        def build(attempt: Attempt) -> tuple[msgspec.Struct, Sequence[Buffer]]:
            nonlocal read
            instance = self._state.instance(ref)
            read = instance.version
            writer = ValueWriter()
            record = record_of(instance, writer)
            written_args, written_kwargs = writer.write_all(args, kwargs)
            params = InstanceCall(
                **attempt.common(self._state.id),
                record=record,
                method=method,
                args=written_args,
                kwargs=written_kwargs,
                lm=self._state.lm if instance.adapter == "dspy" else None,
            )
            return params, writer.buffers

        subject = f"{self._state.instance(ref).cls}.{method}"
        reply = await self._engine.run(
            self._state, "instance.call", subject, build, deadline=deadline, retries=retries, parent=parent
        )
        called = _result("instance.call", reply)
        value = ValueReader(reply.buffers, self._arrive).read(called.value, "result")
        if called.state is not None:
            state = store_tree(called.state.value, reply.buffers, "state")
            self._state.change_instance(ref, read, called.state.adapter, state, called.state.sha256)
        return value

    async def inspect(self, target: Any, /, *, deadline: float | None = None) -> Inspected:
        """Describe a dotted name, a function of the session's, or an instance: signature, documentation, members."""
        return await self._inspect(target, deadline, None)

    async def _inspect(self, target: Any, deadline: float | None, parent: Running | None) -> Inspected:
        tag = getattr(type(target), "__bridge_tag__", None)
        ref = target.__bridge_tag__.id if tag is not None and isinstance(target.__bridge_tag__, Ref) else None
        source = self._state.functions.get(target) if isinstance(target, str) else None

        def build(attempt: Attempt) -> tuple[msgspec.Struct, Sequence[Buffer]]:
            writer = ValueWriter()
            params = ObjectInspect(
                **attempt.common(self._state.id),
                path=target if ref is None and source is None else None,
                function=source.ref(with_source=True) if source is not None else None,
                record=record_of(self._state.instance(ref), writer) if ref is not None else None,
            )
            return params, writer.buffers

        if ref is None and not isinstance(target, str):
            raise TypeError(f"inspect takes a dotted name, a function's name or an instance, not {target!r}")
        reply = await self._engine.run(
            self._state, "object.inspect", "object.inspect", build, deadline=deadline, parent=parent
        )
        inspected: Inspected = _result("object.inspect", reply)
        return inspected

    def instance(self, ref: str) -> AsyncInstance:
        """The instance of that ref. Raises `NotFound`."""
        self._state.instance(ref)
        return AsyncInstance(self, ref)

    @property
    def instances(self) -> dict[str, AsyncInstance]:
        """The session's instances by ref."""
        return {ref: AsyncInstance(self, ref) for ref in list(self._state.instances)}


class InstanceBase:
    """An object that the host owns; what it can do is asked of a kernel."""

    def __init__(self, session: Any, ref: str) -> None:
        self._session = session
        self._ref = ref

    @property
    def ref(self) -> str:
        return self._ref

    @property
    def state(self) -> Any:
        """Its state, as the host keeps it: data for DSPy's modules and for classes that say their state themselves.

        A pickle is returned as its bytes, which the host never loads. Read without a kernel.
        """
        known: InstanceState = self._session._state.instance(self._ref)
        return known.state.read("state")

    @property
    def version(self) -> int:
        """1 for a new instance, one more for each call that changed it."""
        known: InstanceState = self._session._state.instance(self._ref)
        return known.version

    @property
    def __bridge_tag__(self) -> Tag:
        known: InstanceState = self._session._state.instance(self._ref)
        return Ref(self._ref, known.cls)

    def __dir__(self) -> list[str]:
        known: InstanceState = self._session._state.instance(self._ref)
        return sorted({*super().__dir__(), *known.methods})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InstanceBase) and other._ref == self._ref

    def __hash__(self) -> int:
        return hash(self._ref)

    def __repr__(self) -> str:
        known = self._session._state.instances.get(self._ref)
        if known is None:
            return f"<Instance {self._ref[:8]} (released)>"
        recipe = [repr(value) for value in known.args.read("args")]
        recipe += [f"{name}={value!r}" for name, value in known.kwargs.read("kwargs").items()]
        kept = "recipe only" if known.adapter == "recipe" else f"{known.adapter} state"
        return f"<Instance {known.cls}({', '.join(recipe)}) ref={self._ref[:8]} version={known.version} {kept}>"


class AsyncInstance(InstanceBase):
    """`await instance(…)` and `await instance.method(…)` run in a kernel, on the state that the host holds."""

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return await self._session._call_method(self._ref, "__call__", args, kwargs)

    async def call(
        self, method: str, /, *args: Any, deadline: float | None = None, retries: int = 0, **kwargs: Any
    ) -> Any:
        """Call a method, with a deadline (seconds) and retries. Raises `Conflict` if it changed meanwhile."""
        return await self._session._call_method(self._ref, method, args, kwargs, deadline, retries)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        async def method(*args: Any, **kwargs: Any) -> Any:
            return await self._session._call_method(self._ref, name, args, kwargs)

        method.__name__ = name
        return method
