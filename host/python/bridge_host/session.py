"""`AsyncSession`: a session as asynchronous code of the host's uses it; `SessionBase`: what needs no kernel."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

import msgspec

from bridge_kernel.contract.errors import NotFound
from bridge_kernel.contract.methods import LM
from bridge_kernel.contract.values import Ref

from .durations import seconds_of
from .engine import RETRIES, Terms
from .engine.commands import CallFunction, CallMethod, Create, Inspect, StreamFunction, arguments, result_of
from .functions import source_of
from .instance import AsyncInstance, Instances
from .secret import Secrets
from .store import Write, check_name
from .store.types import VariableType
from .stream import WINDOW, AsyncStream
from .telemetry import SessionTelemetry
from .tools import Tool
from .values import ValueReader, ValueWriter, store
from .variables import Access, Snapshot, Variables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from bridge_kernel.contract.methods import Inspected
    from bridge_kernel.contract.values import Tag

    from .client import Reply
    from .durations import Duration
    from .engine.engine import Engine
    from .store import Change, SessionInfo, SessionState
    from .watch import Changes, Watch

__all__ = ("AsyncSession", "SessionBase", "ttl_of")

_USUAL: Final = Terms()
F = TypeVar("F", bound="Callable[..., Any]")


class SessionBase:
    """What sessions do without a kernel: all of it at once, so it is the same for both faces.

    With a durable store, whatever changes the session returns when the change is on disk.
    """

    def __init__(self, state: SessionState, engine: Engine) -> None:
        self._state = state
        self._engine = engine
        self._access = Access(state, self._arrive, self._wait)

    @property
    def id(self) -> str:
        return self._state.id

    def _wait(self, number: int) -> None:
        if number:
            self._engine.store.log.wait(number)

    def _arrive(self, tag: Tag) -> object:
        return self._engine.hook(self._state, tag)

    # -- variables ---------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        """The variable's value, made anew: to change the variable, assign to it. Raises `NotFound`, a KeyError."""
        return self._state.get(name).value.read(name, self._arrive)

    def __setitem__(self, name: str, value: Any) -> None:
        """Write a variable.

        Raises:
            NotSerializable: the value could not reach a kernel.
            InvalidValue: it does not fit the type that the variable was defined with.
            QuotaExceeded, StoreFailed: as they say.
        """
        self._wait(self._state.set(name, store(value, check_name("variable", name))).number)

    def __delitem__(self, name: str) -> None:
        self._wait(self._state.delete(name).number)

    def __contains__(self, name: object) -> bool:
        return name in self._state.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._state.names())

    def __len__(self) -> int:
        return len(self._state.names())

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except NotFound:
            return default

    def update(self, values: Mapping[str, Any]) -> None:
        """Write several variables in one commit: all of them or, if one cannot be written, none."""
        writes = {name: Write(store(value, check_name("variable", name))) for name, value in values.items()}
        self._wait(self._state.commit(writes).number)

    @property
    def variables(self) -> Variables:
        """The variables by name, with their versions and history: `session.variables["x"].undo()`."""
        return Variables(self._access)

    def define(self, name: str, kind: Any, /, **constraints: Any) -> None:
        """Give a variable a type, which every value written from now on must fit, wherever it is written.

        `kind` is a Python type or annotation (`float`, `list[int]`, a pydantic model), a JSON Schema, "tensor"
        (dtype=, shape=), "embedding" (dimensions=) or "module" (choices=); None takes the type away. Constraints
        are JSON Schema's in Python's words: ge, gt, le, lt, multiple_of, min_length, max_length, pattern, enum,
        default, description.

        Raises:
            InvalidValue: the value that is there does not fit.
            TypeError, ValueError: the type makes no schema, or a constraint is none of its.
        """
        made = None if kind is None else VariableType.make(kind, **constraints)
        self._wait(self._state.define(name, made))

    @property
    def version(self) -> int:
        """How many commits there were."""
        return self._state.version

    def at(self, version: int) -> Snapshot:
        """The variables as they were after that commit, read only. Raises `NotFound` if they are not kept."""
        return Snapshot(version, self._state.at(version), self._arrive)

    def restore(self, version: int) -> None:
        """Bring all variables back to what they were after that commit, in one commit. Instances stay as they are."""
        then = self._state.at(version)
        writes = {name: Write(None) for name in self._state.names() if name not in then}
        for name, put in then.items():
            if self._state.version_of(name) != put.version:
                writes[name] = Write(put.value, None, put.restores or put.version)
        self._wait(self._state.commit(writes).number)

    def watch(self, callback: Callable[[Change], object], name: str | None = None) -> Watch:
        """Call `callback(change)`, a function or a coroutine function, after each commit that changes the variable.

        Without a name: any variable. In the order of the commits, on a thread of its own (asynchronous ones: on the
        host's loop). A slow one holds up the other watchers, never who writes; one that raises is closed, with a warning,
        and so are all with the end of the session. `Watch.missed` counts what it was too slow for.
        """
        return self._engine.watchers.watch(self.id, name, callback)

    def changes(self, name: str | None = None) -> Changes:
        """Changes from now on, to iterate over with `for` or `async for`; `close()` ends it."""
        return self._engine.watchers.changes(self.id, name)

    # -- its life ----------------------------------------------------------------

    @property
    def ttl(self) -> float | None:
        """Seconds that it may be unused before it expires, with all it owns; None: for ever. Settable.

        Whatever is done with the session by the host or by a command counts as use; kernels' heartbeats do not.
        """
        return self._state.ttl

    @ttl.setter
    def ttl(self, seconds: float | None) -> None:
        self._wait(self._state.set_ttl(seconds))

    def describe(self) -> SessionInfo:
        """Its age, use, version, and how much of what it holds."""
        return self._state.describe()

    @property
    def telemetry(self) -> SessionTelemetry:
        """What is told of this session, and what may be told: `session.telemetry.capture = {"prompts"}`."""
        return SessionTelemetry(self._engine.telemetry, self._state)

    @property
    def secrets(self) -> Secrets:
        """API keys and the like: `session.secrets["OPENAI_API_KEY"] = "…"`, sent with commands that name them."""
        return Secrets(self._access, self._engine.store.vault)

    # -- tools and functions -----------------------------------------------------

    @property
    def tools(self) -> dict[str, Tool]:
        """The session's tools by name. Pass one as an argument, and it arrives as a Python function."""
        return dict(self._state.tools)

    @overload
    def tool(self, function: F, /, *, name: str = "", description: str = "", idempotent: bool = False) -> F: ...
    @overload
    def tool(
        self, function: None = None, /, *, name: str = "", description: str = "", idempotent: bool = False
    ) -> Callable[[F], F]: ...
    def tool(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str = "",
        description: str = "",
        idempotent: bool = False,
    ) -> Any:
        """Register a function of the host as a tool, as a decorator or by a call. The function itself stays as it was.

        Its schema comes from its type hints, what it says of itself from its docstring. Registering the name again
        replaces it. `idempotent` says that to run it twice does no harm: then a command may take another way when
        it is run again, and a call that was cut short by the host's end is simply made again.

        Raises TypeError if the function has parameters that go by position only.
        """
        if function is None:
            return lambda decorated: self._register(decorated, name, description, idempotent)
        return self._register(function, name, description, idempotent)

    def _register(
        self, function: Callable[..., Any], name: str, description: str, idempotent: bool
    ) -> Callable[..., Any]:
        if not callable(function):
            raise TypeError(
                f"a tool is a function, not {function!r}: @session.tool, or @session.tool(name=…), above it"
            )
        if isinstance(function, Tool):
            tool = function
        else:
            tool = Tool(function, name=name, description=description, idempotent=idempotent)
        self._state.touch()
        self._state.tools[tool.name] = tool
        return function

    def function(
        self,
        name: str | Callable[..., Any] | None = None,
        what: str | Callable[..., Any] | None = None,
        /,
        *,
        lm: bool = False,
        secrets: Sequence[str] = (),
        cache: Duration | None = None,
    ) -> Any:
        """Give the session a Python function that kernels run: `session.call(name, …)`.

        `session.function("name", source_or_callable)`, or as a decorator: `@session.function`,
        `@session.function("name")`, `@session.function(lm=True)`. `lm` runs it with the session's language model,
        `secrets` with those of its secrets: `ctx.secret(name)`. `cache="1h"`: its results may be given again for so
        long; see `cache()`.

        Raises:
            ValueError: the function uses what does not travel with it.
        """
        if callable(name):
            what, name = name, name.__name__
        named, ttl = _names(secrets), ttl_of(cache)

        def register(called: str, function: str | Callable[..., Any]) -> Any:
            self._wait(self._state.put_function(source_of(called, function, lm=lm, secrets=named, cache=ttl)))
            if ttl is not None:
                self._engine.telemetry.usage.forget(self.id, called)
            return function

        if what is not None and name is not None:
            return register(name, what)
        return lambda function: register(name or function.__name__, function)

    def cache(self, target: Any, duration: Duration | None, /) -> None:
        """For how long results of a function, or of an instance's methods, may be given again: `cache("f", "1h")`.

        `target` is a function's name, or an instance: itself, its name or its ref. `duration` is in seconds or "90s",
        "10m", "1h", "7d"; None: every call runs, as without a cache.

        A result is given again, without a kernel, to who asks the same in this session: the same function or an equal
        instance, arguments, secrets and language model; as long as the variables, instances and tools that the
        command used are what they were. An idempotent tool is not called then, and nothing is printed; whatever else the
        code depends on, a clock, a file, the network, the packages that are installed, does not count: that is what
        asking for a cache says. `host.results.clear()` forgets all of them. Not kept are results of commands that wrote variables, changed
        their instance or called a tool that is not idempotent, of streams, of failures, those that refer to instances
        or tools, and those larger than a quarter of `cache_bytes`. A command with an idempotency key is not cached:
        the key says it all. Results are in the host's memory; that they are to be kept is in the session's record.

        Raises:
            NotFound: there is no such function or instance.
            TypeError, ValueError: the duration is none.
        """
        ttl = ttl_of(duration)
        state = self._state
        if isinstance(target, str) and target in state.functions:
            name, number = target, state.cache_function(target, ttl)
        else:
            try:
                name = self._ref(target)
            except NotFound as exc:
                there = ", ".join(
                    [*sorted(state.functions), *(i.name or i.ref for i in list(state.instances.values()))]
                )
                raise NotFound(
                    f"session {self.id!r} has no function and no instance {target!r}",
                    remedy=f"There is: {there[:500] or 'none'}. A function of a package gets a cache as one of the "
                    "session's that calls it: @session.function(cache=…).",
                ) from exc
            number = state.cache_instance(name, ttl)
        self._wait(number)
        if ttl is not None:
            self._engine.telemetry.usage.forget(self.id, name)

    @property
    def caches(self) -> dict[str, float]:
        """The functions, by name, and instances, by name or ref, whose results are kept, and for how many seconds."""
        state = self._state
        functions = {f.name: f.cache for f in list(state.functions.values()) if f.cache is not None}
        return functions | {i.name or i.ref: i.cache for i in list(state.instances.values()) if i.cache is not None}

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

        The key is kept as a secret: sent with the commands that need it, and in no repr, telemetry or error.
        """
        given: dict[str, object] = {"model": model, "api_base": api_base, "adapter": adapter, "api_key": api_key}
        for what, text in given.items():
            if not isinstance(text, str) and (text is not None or what == "model"):
                raise TypeError(f"{what} is a text, not a {type(text).__name__}")
        writer = ValueWriter()
        written = {name: writer.write(value, f"lm.{name}") for name, value in options.items()}
        if writer.buffers:
            raise TypeError("options of a language model are plain data: no arrays, tables or long bytes")
        sealed = self._engine.store.vault.seal(api_key.encode()) if api_key else None
        self._wait(self._state.put_lm(LM(model=model, api_base=api_base, adapter=adapter, options=written), sealed))

    # -- instances ---------------------------------------------------------------

    def _ref(self, instance: Any) -> str:
        if isinstance(instance, str):
            return self._state.find_instance(instance).ref
        tag = getattr(type(instance), "__bridge_tag__", None)
        if tag is None or not isinstance(instance.__bridge_tag__, Ref):
            raise TypeError(f"an instance is given as itself, or by its name or ref, not as {instance!r}")
        return self._state.instance(instance.__bridge_tag__.id).ref

    def release(self, instance: Any) -> None:
        """Let go of an instance, given as itself, by its name or by its ref. Raises `NotFound`."""
        self._wait(self._state.forget_instance(self._ref(instance)))

    def rename(self, instance: Any, name: str) -> None:
        """Give an instance a name, to find it by: `session.instances[name]`; an empty one takes it away.

        Raises:
            Conflict: another has that name.
        """
        self._wait(self._state.name_instance(self._ref(instance), name))

    def _copy(self, instance: Any, name: str) -> str:
        known = self._state.instance(self._ref(instance))
        made = msgspec.structs.replace(known, ref=uuid.uuid4().hex, version=1, name=name)
        self._wait(self._state.put_instance(made).number)
        return made.ref

    def __repr__(self) -> str:
        state = self._state
        parts = {
            "variables": state.names() if not state.deleted else [],
            "instances": [f"{i.cls} {i.name or i.ref[:8]}" for i in list(state.instances.values())],
            "tools": sorted(state.tools),
            "functions": sorted(state.functions),
            "secrets": list(self.secrets),
        }
        shown = "; ".join(f"{what}: {', '.join(names[:12])}" for what, names in parts.items() if names)
        return f"<Session {state.id!r}{' ' + shown if shown else ' (empty)'}>"


class AsyncSession(SessionBase):
    """A session: variables, tools, functions and instances that the host owns; kernels borrow them for a command."""

    async def set(self, name: str, value: Any, *, if_version: int | None = None) -> None:
        """As `session[name] = value`, without holding up the event loop while the disk writes.

        Raises:
            Conflict: the variable is not at `if_version`; 0 asks that there is none.
        """
        commit = self._state.set(name, store(value, check_name("variable", name)), if_version)
        await self._engine.store.log.durable(commit.number)

    async def call(
        self,
        name: str,
        /,
        *args: Any,
        deadline: float | None = None,
        retries: int = RETRIES,
        idempotency_key: str | None = None,
        secrets: Sequence[str] = (),
        **kwargs: Any,
    ) -> Any:
        """Call one of the session's functions, or one importable in the kernel: `call("math.hypot", 3, 4)`.

        `deadline` in seconds, callbacks included; `retries`: how often it runs again if its kernel dies, its tools
        not called a second time; `idempotency_key`: however often it is called with the same key, it runs once and
        the first result is given; `secrets` are the names of those that it gets. A function of yours with
        parameters of these names takes them by position.

        Raises:
            RemoteError: what the function raised, with the kernel's traceback.
            DeadlineExceeded, KernelDied, NotSerializable, NotFound, PolicyDenied, Quarantined, QueueFull,
            ReplayDiverged, Conflict: as they say. Nothing that the command wrote is kept then.
        """
        return await self._call(name, args, kwargs, Terms(deadline, retries, idempotency_key, secrets))

    async def _call(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        terms: Terms,
    ) -> Any:
        request = CallFunction(check_name("function", name), arguments(args, kwargs), _names(terms.secrets))
        outcome = await self._engine.run(self._state, request, terms)
        return self._value("function.call", outcome.reply)

    def _value(self, method: str, reply: Reply) -> Any:
        return ValueReader(reply.buffers, self._arrive).read(result_of(method, reply).value, "result")

    def stream(
        self,
        name: str,
        /,
        *args: Any,
        deadline: float | None = None,
        retries: int = RETRIES,
        secrets: Sequence[str] = (),
        **kwargs: Any,
    ) -> AsyncStream[Any]:
        """Run a generator and iterate over what it yields: `async for chunk in session.stream(…)`.

        A producer is at most 16 values ahead. Leaving the loop early, or `aclose()`, stops it, and nothing that it
        wrote is kept. If its kernel dies it runs again, and what had arrived is not given twice.
        """
        return self._stream(name, args, kwargs, Terms(deadline, retries, None, secrets))

    def _stream(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        terms: Terms,
    ) -> AsyncStream[Any]:
        given = arguments(args, kwargs)
        request = StreamFunction(check_name("function", name), given, _names(terms.secrets), WINDOW)
        stream: AsyncStream[Any] = AsyncStream(self._engine, self._arrive)

        async def run() -> Any:
            outcome = await self._engine.run(
                self._state,
                request,
                terms,
                on_chunk=stream._on_chunk,
                started=stream._on_started,
            )
            return self._value("function.stream", outcome.reply)

        stream._start(run)
        return stream

    async def create(
        self,
        cls: str,
        /,
        *args: Any,
        deadline: float | None = None,
        secrets: Sequence[str] = (),
        cache: Duration | None = None,
        **kwargs: Any,
    ) -> AsyncInstance:
        """Make an object in a kernel and keep it here: as its recipe, and the state it has.

        `cache="1h"`: results of its methods may be given again for so long; see `cache()`.
        Raises as `call` does; nothing is kept then.
        """
        terms = Terms(deadline, secrets=secrets)
        return AsyncInstance(self, await self._create(cls, args, kwargs, terms, ttl_of(cache)))

    async def _create(
        self,
        cls: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        terms: Terms,
        cache: float | None = None,
    ) -> str:
        ref = uuid.uuid4().hex
        request = Create(ref, cls, store(list(args), "args"), store(kwargs, "kwargs"), _names(terms.secrets), cache)
        await self._engine.run(self._state, request, terms)
        return ref

    async def _call_method(
        self,
        ref: str,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        terms: Terms = _USUAL,
    ) -> Any:
        request = CallMethod(ref, method, arguments(args, kwargs), _names(terms.secrets))
        outcome = await self._engine.run(self._state, request, terms)
        return self._value("instance.call", outcome.reply)

    async def inspect(self, target: Any, /, *, deadline: float | None = None) -> Inspected:
        """Describe a dotted name, a function of the session's, or an instance: signature, documentation, members."""
        return await self._inspect(target, Terms(deadline))

    async def _inspect(self, target: Any, terms: Terms) -> Inspected:
        if isinstance(target, str):
            request = Inspect(name=target)
        else:
            tag = getattr(type(target), "__bridge_tag__", None)
            if tag is None or not isinstance(target.__bridge_tag__, Ref):
                raise TypeError(f"inspect takes a dotted name, a function's name or an instance, not {target!r}")
            request = Inspect(ref=target.__bridge_tag__.id)
        outcome = await self._engine.run(self._state, request, terms)
        inspected: Inspected = result_of("object.inspect", outcome.reply)
        return inspected

    def instance(self, ref: str) -> AsyncInstance:
        """The instance of that ref or name. Raises `NotFound`."""
        return AsyncInstance(self, self._state.find_instance(ref).ref)

    @property
    def instances(self) -> Instances[AsyncInstance]:
        """The session's instances by name or ref, as a table to look at."""
        return Instances(self._state, self.instance)

    def copy(self, instance: Any, *, name: str = "") -> AsyncInstance:
        """A new instance with the same recipe and state, from now on its own."""
        return AsyncInstance(self, self._copy(instance, name))


def ttl_of(cache: Duration | None) -> float | None:
    """Seconds. Raises as `seconds_of` does."""
    return None if cache is None else seconds_of(cache, "cache=, how long a result may be given again,")


def _names(secrets: Sequence[str]) -> tuple[str, ...]:
    if isinstance(secrets, str):
        raise TypeError(f"secrets is a list of names: secrets=[{secrets!r}]")
    return tuple(secrets)
