"""Kernels are stateless, as a property: which kernel runs a command, and what ran there before, never shows.

Random sequences of commands run on one kernel, on a random kernel of two for each command, and on a fresh process
for each command. Results, errors and the session's final state are the same. So they are whatever a kernel keeps
of instances that it has rebuilt: the one kernel keeps all that it can, the two keep nothing, the fresh ones what a
kernel keeps by default. Module globals of what is *imported* are the process's, and no part of the promise: no code
here changes one.
"""

from __future__ import annotations

import datetime
import decimal
import math
import os
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import conftest
from bridge_host import BridgeError, Host, Instance, Session, Tool
from bridge_host.pool.pool import Recycle
from conftest import KERNELSIDE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

    from bridge_host.pool.routing import Ask, Chosen

Step = tuple[Any, ...]


eventually = partial(conftest.eventually, seconds=15.0)


# -- the session's functions: each tries to leave something behind -----------------------------

FUNCTIONS = {
    "put": "def put(ctx, name, value):\n    return ctx.set_variable(name, value)\n",
    "fetch": "def fetch(ctx, name):\n    return ctx.get_variable(name)\n",
    "drop": "def drop(ctx, name):\n    ctx.delete_variable(name)\n",
    "names": "def names(ctx):\n    return [(v.name, v.version, v.type) for v in ctx.variables()]\n",
    "put_async": """
        async def put_async(ctx, name, value):
            import asyncio
            versions = await asyncio.gather(ctx.set_variable(name, value), ctx.set_variable(name + "_twin", value))
            return versions, await ctx.get_variable(name)
    """,
    "hoard": """
        CALLS = []
        class Kept:
            total = 0
            items = []
        def hoard(value, into=[], *, also={}):
            global LAST
            before = globals().get("LAST", "nothing")
            LAST = value
            CALLS.append(value)
            Kept.total += 1
            Kept.items.append(value)
            Kept.added = getattr(Kept, "added", 0) + 1
            into.append(value)
            also[len(also)] = value
            hoard.calls = getattr(hoard, "calls", 0) + 1
            return before, len(CALLS), Kept.total, len(Kept.items), Kept.added, into, also, hoard.calls
    """,
    "level": """
        def level():
            import decimal
            from ambient import LEVEL
            before = LEVEL.get(), decimal.getcontext().prec
            LEVEL.set(before[0] + 1)
            decimal.getcontext().prec = 7
            return before
    """,
    "level_async": """
        async def level_async():
            import decimal
            from ambient import LEVEL
            before = LEVEL.get(), decimal.getcontext().prec
            LEVEL.set(before[0] + 1)
            decimal.getcontext().prec = 9
            return before
    """,
    "fail": """
        class Own(Exception):
            pass
        FAILED = []
        def fail(ctx, how, message):
            FAILED.append(how)
            if how == "after a write":
                ctx.set_variable("a", message)
                raise Own(message, len(FAILED))
            if how == "base":
                raise KeyboardInterrupt(message)
            if how == "exit":
                raise SystemExit(message)
            if how == "group":
                raise ExceptionGroup(message, [ValueError(message), Own(message)])
            raise KeyError(message)
    """,
    "fail_async": "async def fail_async(message):\n    raise LookupError(message)\n",
    "stream": """
        SENT = []
        def stream(ctx, values, fail):
            for value in values:
                SENT.append(value)
                ctx.set_variable("sent", len(SENT))
                yield value, len(SENT)
            if fail:
                raise ValueError(f"after {len(SENT)}")
            return len(SENT)
    """,
    "stream_async": """
        async def stream_async(ctx, values, fail):
            for value in values:
                await ctx.set_variable("sent", value)
                yield value
            if fail:
                raise ValueError("at the end")
    """,
    "unsendable": "def unsendable():\n    return {'x': [object()]}\n",
    "use_tool": "def use_tool(tool, x):\n    return tool(x), tool.__name__\n",
    "use_tool_async": "async def use_tool_async(tool, x):\n    return await tool(x)\n",
    "call_tool": """
        def call_tool(ctx, name, x):
            from bridge_kernel import BridgeError
            try:
                return ctx.call_elixir_tool(name, {"x": x})
            except BridgeError as error:
                return type(error).__name__, str(error)
    """,
    "nested": "def nested(ctx, x):\n    return ctx.call_tool('again', x=x)\n",
    "use_instance": """
        def use_instance(thing):
            seen = dict(vars(thing)) if hasattr(thing, "__dict__") else {}
            seen.pop("lock", None)
            if hasattr(thing, "pages"):
                thing.pages.append("scribbled by a borrower")
            return type(thing).__name__, sorted(seen)
    """,
    "print": "def print_(word):\n    print(word)\n",
}
FUNCTIONS["print_"] = FUNCTIONS.pop("print")

METHODS: dict[str, list[tuple[str, tuple[Any, ...]]]] = {
    "accounts.Account": [("deposit", (3,)), ("deposit_later", (4,)), ("look", ()), ("owner", ()), ("withdraw", ())],
    "accounts.Diary": [("write", ("a page",)), ("write", ("another",)), ("pages", ())],
    "accounts.Locked": [("more", ()), ("more", ()), ("count", ())],
    "programs.Program": [("teach", ("1+1", "2")), ("recall", ()), ("teach", (7, None))],
    "collections.Counter": [("update", ("ab",)), ("most_common", ()), ("total", ()), ("pop", ("a",))],
    "builtins.set": [("add", (1,)), ("add", (2,)), ("discard", (1,)), ("copy", ()), ("remove", ("x",))],
}
RECIPES: dict[str, tuple[Any, ...]] = {
    "accounts.Account": ("Ada",),
    "accounts.Diary": (),
    "accounts.Locked": (5,),
    "programs.Program": ("question -> answer",),
    "collections.Counter": ("abc",),
    "builtins.set": ([1, 2],),
}
CHEAP = [cls for cls in METHODS if cls != "programs.Program"]


# -- what is drawn -------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "c"])
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**90), 2**90),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.decimals(allow_nan=False, places=2, min_value=-1000, max_value=1000),
    st.dates(),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.integers(0, 9), st.text(max_size=3)), inner, max_size=3),
        st.sets(st.integers(0, 99), max_size=4),
        st.just({"$bridge": "a dict of the user's own"}),
    ),
    max_leaves=6,
)
messages = st.text("abc xyz é", max_size=8)
tools = st.sampled_from(["double", "double_async", "refuse", "missing"])


def steps(classes: list[str]) -> st.SearchStrategy[Step]:
    which = st.integers(0, 5)
    call = st.just("call")
    return st.one_of(
        st.tuples(st.just("set"), names, values),
        st.tuples(st.just("get"), names),
        st.tuples(st.just("delete"), names),
        st.tuples(call, st.sampled_from(["put", "put_async"]), names, values),
        st.tuples(call, st.sampled_from(["fetch", "drop"]), names),
        st.tuples(call, st.sampled_from(["names", "level", "level_async", "unsendable"])),
        st.tuples(call, st.just("hoard"), values),
        st.tuples(call, st.just("fail"), st.sampled_from(["after a write", "base", "exit", "group", "key"]), messages),
        st.tuples(call, st.just("fail_async"), messages),
        st.tuples(call, st.sampled_from(["call_tool"]), tools, st.one_of(st.integers(-9, 9), st.text(max_size=3))),
        st.tuples(call, st.just("nested"), st.integers(-9, 9)),
        st.tuples(call, st.just("print_"), messages),
        st.tuples(call, st.sampled_from(["math.sqrt", "nowhere.at_all", "math.nothing"]), st.integers(-4, 4)),
        st.tuples(
            st.just("stream"),
            st.sampled_from(["stream", "stream_async"]),
            st.lists(st.integers(0, 9), max_size=20),
            st.booleans(),
        ),
        st.tuples(st.just("use_tool"), st.sampled_from(["use_tool", "use_tool_async"]), tools, st.integers(-9, 9)),
        st.tuples(st.just("create"), st.sampled_from([*classes, "builtins.int", "nowhere.Class"])),
        st.tuples(st.just("method"), which, which),
        st.tuples(st.just("method"), which, which),
        st.tuples(st.just("lend"), which),
        st.tuples(st.just("keep"), names, which),
    )


# -- running a sequence ------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A value that compares by type and content: 1 is not True, NaN is NaN, a set has no order."""
    kind = type(value).__name__
    if isinstance(value, dict):
        return kind, sorted(((plain(k), plain(v)) for k, v in value.items()), key=repr)
    if isinstance(value, set | frozenset):
        return kind, sorted(map(plain, value), key=repr)
    if isinstance(value, list | tuple):
        return kind, [plain(item) for item in value]
    return kind, repr(value)


class Run:
    """One sequence in one session of one host: what each command gave, and what is left in the end."""

    def __init__(self, host: Host, after: Callable[[], None] = lambda: None) -> None:
        self.host = host
        self.after = after
        self.session = host.session("a sequence")
        self.instances: list[Instance] = []
        session = self.session
        for name, source in FUNCTIONS.items():
            session.function(name, source)

        @session.tool
        def double(x: int) -> int:
            return 2 * x

        @session.tool
        async def double_async(x: int) -> int:
            return 2 * x

        @session.tool
        def refuse(x: Any) -> None:
            raise ValueError(f"refused {x}")

        @session.tool
        def again(x: int) -> Any:
            return session.call("hoard", x), session.call("level")

        @session.tool
        def meet() -> None:
            pass

    def all(self, sequence: list[Step]) -> tuple[list[Any], Any]:
        try:
            return [self.outcome(step) for step in sequence], self.final_state()
        finally:
            self.host.delete_session(self.session.id)

    def outcome(self, step: Step) -> Any:
        try:
            return "value", self.normal(self.run(step))
        except (BridgeError, ValueError) as error:
            kind = error.type if isinstance(error, BridgeError) else ""
            return "error", type(error).__name__, kind, self.without_refs(str(error))
        finally:
            self.after()

    def run(self, step: Step) -> Any:
        session = self.session
        match step:
            case ("set", name, value):
                session[name] = value
            case ("get", name):
                return session[name]
            case ("delete", name):
                del session[name]
            case ("call", name, *args):
                return session.call(name, *args)
            case ("stream", name, given, fail):
                got: list[Any] = []
                stream = session.stream(name, given, fail)
                try:
                    got.extend(stream)
                except BridgeError as error:
                    return got, type(error).__name__, str(error)
                return got, stream.result
            case ("use_tool", name, tool, x):
                return session.call(name, session.tools.get(tool, tool), x)
            case ("create", cls):
                self.instances.append(session.create(cls, *RECIPES.get(cls, ())))
                return self.instances[-1]
            case ("method", which, method) if self.instances:
                instance = self.instances[which % len(self.instances)]
                methods = METHODS.get(session._state.instance(instance.ref).cls, [("bit_length", ())])
                name, args = methods[method % len(methods)]
                return instance.call(name, *args)
            case ("lend", which) if self.instances:
                return session.call("use_instance", self.instances[which % len(self.instances)])
            case ("keep", name, which) if self.instances:
                session[name] = self.instances[which % len(self.instances)]
                return session.call("builtins.repr", "kept")
        return None

    def normal(self, value: Any) -> Any:
        if isinstance(value, Instance):
            return "instance", [i.ref for i in self.instances].index(value.ref)
        if isinstance(value, Tool):
            return "tool", value.name
        if isinstance(value, list | tuple):
            return type(value).__name__, [self.normal(item) for item in value]
        return plain(value)

    def without_refs(self, text: str) -> str:
        for number, instance in enumerate(self.instances):
            text = text.replace(instance.ref, f"instance {number}")
        return text

    def final_state(self) -> Any:
        session, state = self.session, self.session._state
        variables = {
            info.name: (info.version, info.type, self.normal(session[info.name])) for info in session.variables.values()
        }
        instances = []
        for instance in self.instances:
            kept = state.instance(instance.ref)
            readable = plain(kept.state.read("state")) if kept.adapter in ("bridge", "dspy", "recipe") else ""
            shown = [self.outcome(("method", self.instances.index(instance), i)) for i in reading(kept.cls)]
            instances.append((kept.cls, kept.adapter, kept.version, kept.methods, readable, shown))
        return variables, instances, sorted(session.tools), {n: f.hash for n, f in state.functions.items()}


def reading(cls: str) -> list[int]:
    """Which of a class's methods only read."""
    only_read = {"look", "owner", "pages", "recall", "most_common", "total", "copy", "count"}
    return [i for i, (name, _) in enumerate(METHODS.get(cls, [])) if name in only_read]


@pytest.fixture(scope="module")
def quiet() -> dict[str, Any]:
    return {"env": {"PYTHONPATH": KERNELSIDE}, "on_output": lambda output: None}


@pytest.fixture(scope="module")
def one(quiet: dict[str, Any]) -> Iterator[Host]:
    with Host(kernels=1, arguments=["""--Policy.cache_names=["*"]"""], **quiet) as host:
        yield host
        (stats,) = host.stats().values()
        assert stats.cache["hits"] > 0, "it kept something, or nothing here was shown of what is kept"


class Drawn:
    """Routes each command by chance, the same way for the same seed."""

    def __init__(self) -> None:
        self.chance = random.Random()

    def choose(self, ask: Ask, candidates: Sequence[Chosen]) -> Chosen:
        return self.chance.choice(candidates)


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return Drawn()


@pytest.fixture(scope="module")
def two(quiet: dict[str, Any], drawn: Drawn) -> Iterator[Host]:
    with Host(kernels=2, arguments=["--Policy.max_cache_bytes=0"], routing=drawn, **quiet) as host:
        yield host


bounded = settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@bounded
@given(sequence=st.lists(steps(list(METHODS)), min_size=1, max_size=14), seed=st.integers(0, 2**16))
def test_a_random_kernel_for_each_command_gives_what_one_kernel_gives(
    one: Host, two: Host, drawn: Drawn, sequence: list[Step], seed: int
) -> None:
    drawn.chance.seed(seed)
    assert Run(two).all(sequence) == Run(one).all(sequence)


@bounded
@given(sequence=st.lists(steps(CHEAP), min_size=1, max_size=10))
def test_a_kernel_with_a_past_gives_what_it_gave_without_one(one: Host, sequence: list[Step]) -> None:
    first = Run(one).all(sequence)
    assert Run(one).all(sequence) == first


class Fresh:
    """A host whose every command runs in a process that has run nothing before."""

    KERNELS = 4  # no step sends more commands at once

    def __init__(self) -> None:
        self.host: Host
        self.used: set[str] = set()

    def choose(self, ask: Ask, candidates: Sequence[Chosen]) -> Chosen:
        kernel = next(kernel for kernel in candidates if kernel.id not in self.used)
        self.used.add(kernel.id)
        return kernel

    def renew(self) -> None:
        """Wait until the used ones have gone and as many fresh ones are there."""

        def renewed() -> bool:
            kernels = self.host._host.engine.pool.kernels
            return len(kernels) == self.KERNELS and all(k.routable and k.id not in self.used for k in kernels)

        eventually(renewed, "fresh kernels", seconds=60)


@pytest.fixture(scope="module")
def fresh(quiet: dict[str, Any]) -> Iterator[Fresh]:
    fresh = Fresh()
    with Host(kernels=fresh.KERNELS, routing=fresh, recycle=Recycle(commands=1), **quiet) as host:
        fresh.host = host
        yield fresh


@settings(bounded, max_examples=6)
@given(sequence=st.lists(steps(CHEAP), min_size=3, max_size=6))
def test_a_fresh_process_for_each_command_gives_what_one_kernel_gives(
    one: Host, fresh: Fresh, sequence: list[Step]
) -> None:
    assert Run(fresh.host, fresh.renew).all(sequence) == Run(one).all(sequence)


def test_a_chosen_sequence_with_every_kind_of_command_is_the_same_on_fresh_processes(one: Host, fresh: Fresh) -> None:
    sequence: list[Step] = [
        ("set", "a", {1: (2, {3})}),
        ("call", "put_async", "b", 2**80),
        ("call", "hoard", math.inf),
        ("create", "accounts.Account"),
        ("create", "programs.Program"),
        ("method", 0, 0),
        ("method", 1, 0),
        ("method", 0, 1),
        ("method", 0, 4),
        ("call", "fail", "after a write", "oh"),
        ("stream", "stream", [1, 2, 3], True),
        ("call", "nested", 4),
        ("keep", "c", 0),
        ("lend", 1),
        ("use_tool", "use_tool_async", "double_async", 3),
    ]
    results, state = Run(fresh.host, fresh.renew).all(sequence)
    assert (results, state) == Run(one).all(sequence)
    assert [kind for kind, *_ in results].count("error") == 2
    assert len(fresh.used) > len(sequence)


# -- what one command cannot leave for the next ----------------------------------------------------


@pytest.fixture
def alone(one: Host) -> Iterator[Session]:
    session = one.session()
    yield session
    one.delete_session(session.id)


def test_a_functions_globals_class_attributes_and_defaults_are_new_at_each_call(alone: Session) -> None:
    alone.function("hoard", FUNCTIONS["hoard"])
    fresh = ("nothing", 1, 1, 1, 1, ["x"], {0: "x"}, 1)
    assert [alone.call("hoard", "x") for _ in range(3)] == [fresh] * 3


def test_code_that_runs_when_a_function_is_defined_runs_at_each_call(alone: Session) -> None:
    alone.function("f", "import uuid\nMADE = uuid.uuid4().hex\ndef f():\n    return MADE\n")
    assert len({alone.call("f") for _ in range(3)}) == 3


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_context_variables_that_a_command_sets_are_not_seen_by_the_next(alone: Session, kind: str) -> None:
    alone.function(
        "level",
        f"""
        {kind} level():
            import decimal, threading
            from ambient import LEVEL
            before = LEVEL.get(), decimal.getcontext().prec, threading.get_ident()
            LEVEL.set(before[0] + 1)
            decimal.getcontext().prec = 7
            return before
        """,
    )
    levels, precisions, threads = zip(*(alone.call("level") for _ in range(4)), strict=True)
    assert len(set(threads)) < 4, "some thread ran two of them, or this proves nothing"
    assert set(levels) == {0}
    assert set(precisions) == {28}


def test_context_variables_set_where_a_stream_begins_or_an_error_ends_it_are_not_seen_either(alone: Session) -> None:
    alone.function(
        "chunks",
        """
        def chunks(fail):
            from ambient import LEVEL
            yield LEVEL.get()
            LEVEL.set(LEVEL.get() + 1)
            if fail:
                raise ValueError("no")
        """,
    )
    seen = []
    for fail in (False, True, False):
        try:
            for level in alone.stream("chunks", fail):
                seen.append(level)  # noqa: PERF402 - what came before the error counts
        except BridgeError:
            pass
    assert seen == [0, 0, 0]


def test_an_object_lent_to_a_function_is_not_changed_by_it(alone: Session) -> None:
    alone.function("use_instance", FUNCTIONS["use_instance"])
    diary = alone.create("accounts.Diary")
    assert [alone.call("use_instance", diary) for _ in range(2)] == [("Diary", ["pages"])] * 2
    assert diary.pages() == []


# -- a context kept after its command ---------------------------------------------------------------

TRY_ALL = """
    def try_all(ctx):
        outcomes = {}
        for name, use in {
            "get": lambda: ctx.get_variable("a"),
            "get_default": lambda: ctx.get_variable("a", None),
            "set": lambda: ctx.set_variable("a", "written by a ghost"),
            "delete": lambda: ctx.delete_variable("a"),
            "list": lambda: ctx.variables(),
            "tool": lambda: ctx.call_tool("note", what="a ghost"),
            "tools": lambda: ctx.tools(),
        }.items():
            try:
                outcomes[name] = repr(use())
            except BaseException as error:
                outcomes[name] = type(error).__name__
        return outcomes
"""
REFUSED = dict.fromkeys(["get", "get_default", "set", "delete", "list", "tool", "tools"], "Cancelled")


class Ghost:
    """What a command leaves running says what it found by writing a file: its session does not hear it any more."""

    def __init__(self, session: Session, path: str) -> None:
        self.path = path
        self.notes: list[str] = []
        session["a"] = "as it was"
        session.tool(lambda what: self.notes.append(what), name="note")

    def outcomes(self) -> Any:
        import json

        eventually(lambda: os.path.exists(self.path), "the ghost has said what it found")
        with open(self.path) as file:
            return json.load(file)


WRITE = """
    def write(path, outcomes):
        import json, os
        with open(path + ".part", "w") as file:
            json.dump(outcomes, file)
        os.rename(path + ".part", path)
"""


def test_a_context_kept_by_a_thread_refuses_once_its_command_has_ended(alone: Session, tmp_path: Any) -> None:
    ghost = Ghost(alone, str(tmp_path / "found"))
    alone.function(
        "leave",
        """
        def leave(ctx, path, gate):
            import os, threading, time
            def haunt():
                while not os.path.exists(gate):
                    time.sleep(0.005)
                write(path, try_all(ctx))
            threading.Thread(target=haunt, daemon=True).start()
            return "left"
        """
        + TRY_ALL.replace("\n    ", "\n        ")
        + WRITE.replace("\n    ", "\n        "),
    )
    gate = tmp_path / "ended"
    assert alone.call("leave", ghost.path, str(gate)) == "left"
    gate.touch()
    assert ghost.outcomes() == REFUSED
    assert alone["a"] == "as it was"
    assert not ghost.notes


def test_a_context_kept_by_a_task_refuses_once_its_command_has_ended(alone: Session, tmp_path: Any) -> None:
    ghost = Ghost(alone, str(tmp_path / "found"))
    alone.function(
        "leave",
        """
        async def leave(ctx, path, gate):
            import asyncio, os
            async def haunt():
                while not os.path.exists(gate):
                    await asyncio.sleep(0.005)
                outcomes = {}
                for name, use in {
                    "get": lambda: ctx.get_variable("a"),
                    "get_default": lambda: ctx.get_variable("a", None),
                    "set": lambda: ctx.set_variable("a", "written by a ghost"),
                    "delete": lambda: ctx.delete_variable("a"),
                    "list": lambda: ctx.variables(),
                    "tool": lambda: ctx.call_tool("note", what="a ghost"),
                    "tools": lambda: ctx.tools(),
                }.items():
                    try:
                        outcomes[name] = repr(await use())
                    except BaseException as error:
                        outcomes[name] = type(error).__name__
                write(path, outcomes)
            leave.task = asyncio.create_task(haunt())
            return "left"
        """
        + WRITE.replace("\n    ", "\n        "),
    )
    gate = tmp_path / "ended"
    assert alone.call("leave", ghost.path, str(gate)) == "left"
    gate.touch()
    assert ghost.outcomes() == REFUSED
    assert alone["a"] == "as it was"
    assert not ghost.notes


def test_a_context_says_that_its_command_has_ended(alone: Session, tmp_path: Any) -> None:
    alone.function(
        "leave",
        """
        def leave(ctx, path, gate):
            import os, threading, time
            def haunt():
                while not os.path.exists(gate):
                    time.sleep(0.005)
                outcomes = {"repr": repr(ctx)}
                try:
                    ctx.progress(1)
                    outcomes["progress"] = "said to nobody"
                except BaseException as error:
                    outcomes["progress"] = type(error).__name__
                write(path, outcomes)
            threading.Thread(target=haunt, daemon=True).start()
        """
        + WRITE.replace("\n    ", "\n        "),
    )
    ghost = Ghost(alone, str(tmp_path / "found"))
    gate = tmp_path / "ended"
    alone.call("leave", ghost.path, str(gate))
    gate.touch()
    found = ghost.outcomes()
    assert "ended" in found["repr"]
    assert found["progress"] in ("Cancelled", "said to nobody")


# -- the kernel's own bookkeeping ---------------------------------------------------------------------


HELD = """
    def held():
        import gc
        import bridge_kernel.executor
        from bridge_kernel.command import RunningCommand
        from bridge_kernel.connection import Connection
        bridge_kernel.executor.IDLE_S = 0.05  # so that idle workers end while a test looks
        gc.collect()
        objects = gc.get_objects()
        connections = [o for o in objects if type(o) is Connection]
        return sum(type(o) is RunningCommand for o in objects), sum(len(c.commands) for c in connections)
"""
LOOSE_ENDS = 2
"""Commands that the kernel's own frames may still name: the one that looks, and the last one the lane refreshed."""


def test_after_500_varied_commands_the_kernel_holds_what_it_held_before(quiet: dict[str, Any]) -> None:
    with Host(kernels=1, **quiet) as host:
        run = Run(host)
        session = run.session
        session.function("held", HELD)
        session.call("held")
        for step in EVERY_KIND:  # the modules, the loop's thread and every source, once
            run.outcome(step)
        (kernel,) = host.kernels()
        eventually(lambda: session.call("held")[0] <= LOOSE_ENDS, "no command outlives its end")
        eventually(lambda: threads_of(host) <= 7, "the warm-up's workers have ended")
        threads, sources = threads_of(host), host.stats()[kernel.id].sources

        done = 0
        while done < 500:
            futures: list[Future[Any]] = [session.submit("hoard", i) for i in range(25)]
            futures += [session.submit("level_async") for _ in range(5)]
            for future in futures[:25:5]:
                future.cancel()
            for step in EVERY_KIND:
                run.outcome(step)
            for future in futures:
                if not future.cancelled():
                    future.exception(timeout=30)
            done += len(futures) + len(EVERY_KIND)

        eventually(lambda: host.stats()[kernel.id].commands["running"] == 1, "only kernel.stats runs")
        eventually(lambda: session.call("held") <= (LOOSE_ENDS, 1), "no command outlives its end")
        eventually(lambda: threads_of(host) <= threads, "as many threads as before")
        # A command is answered a moment before it has ended.
        eventually(lambda: host.stats()[kernel.id].commands["running"] == 1, "only kernel.stats runs")
        stats = host.stats()[kernel.id]
        assert (stats.sources, stats.connections) == (sources, 1)
        counts = stats.commands
        assert counts["received"] >= 500
        assert counts["received"] - counts["running"] == counts["succeeded"] + counts["failed"] + counts["cancelled"]
        assert set(stats.dropped) <= {"late"}, "a cancel may come after its command's end, and nothing else is dropped"


def test_commands_whose_deadline_is_far_off_are_not_kept_until_then(quiet: dict[str, Any]) -> None:
    with Host(kernels=1, **quiet) as host:
        session = host.session()
        session.function("held", HELD)
        for _ in range(300):
            session.call("math.sqrt", 4, deadline=3600)
        # The lane looks its deadlines through when there are more than 64.
        assert session.call("held")[0] <= 64 + 8


def threads_of(host: Host) -> int:
    """Of its only kernel; asking for it takes a worker too."""
    (stats,) = host.stats().values()
    return stats.threads


EVERY_KIND: list[Step] = [
    ("set", "a", [1]),
    ("call", "put", "b", b"x" * 5000),
    ("call", "put_async", "c", datetime.date(2025, 1, 1)),
    ("call", "fetch", "missing"),
    ("call", "names"),
    ("call", "hoard", decimal.Decimal("1.5")),
    ("call", "level"),
    ("call", "level_async"),
    ("call", "unsendable"),
    ("call", "fail", "group", "x"),
    ("call", "fail_async", "x"),
    ("call", "call_tool", "refuse", 1),
    ("call", "call_tool", "missing", 1),
    ("call", "nested", 2),
    ("call", "print_", "x"),
    ("call", "math.sqrt", -1),
    ("stream", "stream", list(range(40)), True),
    ("stream", "stream_async", [1, 2], False),
    ("use_tool", "use_tool", "double", 1),
    ("use_tool", "use_tool_async", "double_async", 1),
    ("create", "accounts.Account"),
    ("method", 0, 0),
    ("lend", 0),
    ("create", "nowhere.Class"),
]
