"""The Python host with real kernels: sessions, tools, functions, instances, and what happens when things go wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
import pytest

from bridge_host import (
    AsyncHost,
    Bridge,
    BridgeError,
    Conflict,
    DeadlineExceeded,
    Host,
    HostClosed,
    KernelDied,
    NotFound,
    NotSerializable,
    Output,
    RemoteError,
    Session,
    SessionStore,
    Tool,
)
from bridge_host.values import store
from conftest import KERNELSIDE, eventually

if TYPE_CHECKING:
    from pathlib import Path


# -- the principles, word for word ---------------------------------------------


def test_the_principles_code_samples_work_word_for_word(shared_host: Host) -> None:
    session_id = "principles"
    session = shared_host.session(session_id)
    SessionStore.set_variable(session_id, "temperature", 0.7)
    seen: list[tuple[dict[str, Any], dict[str, Any]]] = []

    @session.tool
    def validate_prediction(prediction: dict[str, Any], context: dict[str, Any]) -> bool:
        seen.append((prediction, context))
        return bool(prediction["answer"] == context["question"].upper())

    @session.function
    def predict(session_context, inputs):  # type: ignore[no-untyped-def]
        temperature = session_context.get_variable("temperature")
        prediction = {"answer": inputs["question"].upper(), "temperature": temperature}
        valid = session_context.call_elixir_tool("validate_prediction", {"prediction": prediction, "context": inputs})
        return {"prediction": prediction, "valid": valid}

    assert session.call("predict", {"question": "why?"}) == {
        "prediction": {"answer": "WHY?", "temperature": 0.7},
        "valid": True,
    }
    assert seen == [({"answer": "WHY?", "temperature": 0.7}, {"question": "why?"})]

    ref = Bridge.create_instance("dspy.Predict", "question -> answer")
    state = Bridge.call_method(ref, "dump_state")
    assert state["demos"] == []
    assert Bridge.call_method(ref.ref, "dump_state") == state
    assert SessionStore.get_variable(session_id, "temperature") == 0.7


def test_the_issues_example_runs(shared_host: Host) -> None:
    session = shared_host.session("example")
    session["temperature"] = 0.7
    assert session["temperature"] == 0.7
    assert session.call("math.hypot", 3, 4) == 5.0


# -- variables -------------------------------------------------------------------


def test_what_is_read_from_a_session_is_a_copy(session: Session) -> None:
    rows = [1, 2]
    session["rows"] = rows
    rows.append(3)
    session["rows"].append(4)
    assert session["rows"] == [1, 2]


def test_a_missing_variable_is_a_key_error_that_names_what_there_is(session: Session) -> None:
    session["there"] = 1
    with pytest.raises(KeyError, match="has no variable 'absent'") as caught:
        session["absent"]
    assert isinstance(caught.value, NotFound)
    assert "there" in caught.value.remedy
    assert session.get("absent", 5) == 5


def test_a_variable_that_cannot_reach_a_kernel_is_refused_when_it_is_written(session: Session) -> None:
    with pytest.raises(NotSerializable, match=r'x\["handle"\]'):
        session["x"] = {"handle": threading.Lock()}
    assert "x" not in session


def test_versions_count_writes_and_a_batch_is_written_whole_or_not_at_all(session: Session) -> None:
    session["a"] = 1
    session["a"] = 2
    with pytest.raises(NotSerializable):
        session.update({"a": 3, "b": object()})
    assert session["a"] == 2
    (variable,) = session.variables.values()
    assert (variable.name, variable.version, variable.type) == ("a", 2, "int")


def test_sync_code_in_the_kernel_reads_writes_lists_and_deletes_variables(session: Session) -> None:
    session.update({"a": 1, "b": [2.5, None], "gone": True})

    @session.function
    def use(ctx):  # type: ignore[no-untyped-def]
        version = ctx.set_variable("c", {"big": 2**80, "tuple": (1, 2)})
        ctx.delete_variable("gone")
        return (
            ctx.get_variable("a"),
            ctx.get_variables("a", "b", "nowhere"),
            ctx.get_variable("nowhere", "default"),
            [v.name for v in ctx.variables()],
            version,
            ctx["c"],
            "a" in ctx,
            ctx.session_id,
        )

    assert session.call("use") == (
        1,
        {"a": 1, "b": [2.5, None]},
        "default",
        ["a", "b", "c"],
        1,
        {"big": 2**80, "tuple": (1, 2)},
        True,
        session.id,
    )
    assert session["c"] == {"big": 2**80, "tuple": (1, 2)}
    assert "gone" not in session


def test_async_code_in_the_kernel_has_the_same_names_awaited(session: Session) -> None:
    session["a"] = 20

    @session.tool
    async def double(x: int) -> int:
        await asyncio.sleep(0)
        return 2 * x

    @session.function
    async def use(ctx):  # type: ignore[no-untyped-def]
        import asyncio

        a, b = await asyncio.gather(ctx.get_variable("a"), ctx.call_tool("double", {"x": 4}))
        await ctx.set_variable("c", a + b)
        return [v.name for v in await ctx.variables()], [t.name for t in await ctx.tools()]

    assert session.call("use") == (["a", "c"], ["double"])
    assert session["c"] == 28


def test_a_missing_variable_raises_not_found_inside_the_kernel(session: Session) -> None:
    session.function(
        "f",
        """
        def f(ctx):
            from bridge_kernel import NotFound
            try:
                ctx.get_variable("absent")
            except NotFound as error:
                return str(error)
        """,
    )
    assert "has no variable 'absent'" in session.call("f")


# -- tools -----------------------------------------------------------------------


def test_a_tools_schema_comes_from_hints_and_docstring(session: Session) -> None:
    @session.tool
    def search(query: str, limit: int = 5) -> list[str]:
        """Find documents.

        Args:
            query: What to look for.
            limit: How many at most.
        """
        return [query] * limit

    tool = session.tools["search"]
    assert tool.description == "Find documents."
    assert tool.schema["required"] == ["query"]
    assert tool.schema["properties"]["limit"] == {
        "default": 5,
        "description": "How many at most.",
        "title": "Limit",
        "type": "integer",
    }
    assert search("x", 1) == ["x"], "the function itself stays what it was"


def test_a_tools_arguments_are_checked_before_it_runs(session: Session) -> None:
    runs = []

    @session.tool
    def add(a: int, b: int = 0) -> int:
        runs.append((a, b))
        return a + b

    session.function(
        "f",
        """
        def f(ctx, arguments):
            from bridge_kernel import BridgeError
            try:
                return ctx.call_tool("add", arguments)
            except BridgeError as error:
                return type(error).__name__, str(error)
        """,
    )
    assert session.call("f", {"a": 1, "b": 2}) == 3
    assert session.call("f", {"a": "4"}) == 4, "what fits the declared type is converted to it"
    name, message = session.call("f", {"b": "many"})
    assert name == "InvalidArguments"
    assert "a: Field required" in message
    assert "b: Input should be a valid integer" in message
    assert session.call("f", {"a": 1, "c": 2})[0] == "InvalidArguments"
    assert runs == [(1, 2), (4, 0)]


def test_an_error_of_a_tool_arrives_as_an_exception_that_the_code_can_catch(session: Session) -> None:
    @session.tool
    def fail(reason: str) -> None:
        raise ValueError(reason)

    session.function(
        "catching",
        """
        def catching(ctx):
            from bridge_kernel import ToolError
            try:
                ctx.call_tool("fail", reason="no")
            except ToolError as error:
                return error.type, error.message, "raise ValueError(reason)" in error.remote_traceback
        """,
    )
    assert session.call("catching") == ("ValueError", "no", True)

    session.function("passing", "def passing(ctx):\n    ctx.call_tool('fail', reason='no')\n")
    with pytest.raises(BridgeError, match="ValueError: no") as caught:
        session.call("passing")
    assert "raise ValueError(reason)" in caught.value.remote_traceback
    assert "in passing" in caught.value.remote_traceback


def test_a_tool_given_as_an_argument_arrives_as_a_python_function(session: Session) -> None:
    @session.tool
    def shout(text: str, times: int = 1) -> str:
        """Say it loudly."""
        return text.upper() * times

    @session.function
    def use(say):  # type: ignore[no-untyped-def]
        import inspect

        return say("a"), say(text="b", times=2), say.__name__, say.__doc__, list(inspect.signature(say).parameters)

    @session.function
    async def use_async(say):  # type: ignore[no-untyped-def]
        return await say("c")

    tool = session.tools["shout"]
    assert session.call("use", tool) == ("A", "BB", "shout", "Say it loudly.", ["text", "times"])
    assert session.call("use_async", tool) == "C"
    assert session.call("builtins.list", [tool]) == [tool], "and comes back as the tool"


def test_tools_and_commands_nest_twenty_deep_in_one_kernel(lonely_host: Host) -> None:
    session = lonely_host.session("deep")

    @session.tool
    def descend(depth: int) -> int:
        return int(session.call("down", depth - 1)) + 1 if depth else 0

    session.function("down", "def down(ctx, depth):\n    return ctx.call_tool('descend', depth=depth) + 1\n")
    assert session.call("down", 20) == 41


def test_a_tool_that_calls_itself_for_ever_is_stopped_with_a_reason(lonely_host: Host) -> None:
    session = lonely_host.session("endless")

    @session.tool
    def again() -> None:
        session.call("again_and_again")

    session.function("again_and_again", "def again_and_again(ctx):\n    ctx.call_tool('again')\n")
    with pytest.raises(BridgeError, match="nested"):
        session.call("again_and_again")
    assert session.call("math.sqrt", 4) == 2


def test_a_nested_command_inherits_what_is_left_of_the_deadline(session: Session) -> None:
    @session.tool
    def nested() -> float:
        return float(session.call("left", deadline=1000))

    session.function("left", "def left(ctx):\n    return ctx.deadline\n")
    session.function("outer", "def outer(ctx):\n    return ctx.deadline, ctx.call_tool('nested')\n")
    outer, inner = session.call("outer", deadline=30)
    assert inner <= outer <= 30


def test_functions_and_async_functions_can_be_tools_of_an_async_host() -> None:
    async def main() -> None:
        async with AsyncHost() as host:
            session = host.session("async")

            @session.tool
            async def add(a: int, b: int) -> int:
                return a + b + int(await session.call("operator.index", 100))

            session.function("f", "def f(ctx):\n    return ctx.call_tool('add', a=1, b=2)\n")
            results = await asyncio.gather(*(session.call("f") for _ in range(20)))
            assert results == [103] * 20
            instance = await session.create("collections.Counter", "aab")
            await instance.update("b")
            assert await instance.most_common() == [("a", 2), ("b", 2)]
            inspected = await session.inspect(instance)
            assert "most_common" in {member.name for member in inspected.members}

    asyncio.run(main())


# -- functions -------------------------------------------------------------------


def test_a_function_that_uses_what_does_not_travel_is_refused_at_once(session: Session) -> None:
    factor = 3

    def closure(x: int) -> int:
        return x * factor

    def uses_module() -> str:
        return os.getcwd()

    with pytest.raises(ValueError, match="uses factor from outside"):
        session.function("closure", closure)
    with pytest.raises(ValueError, match="uses os from outside itself"):
        session.function("uses_module", uses_module)
    with pytest.raises(ValueError, match="does not compile"):
        session.function("broken", "def broken(:")
    with pytest.raises(ValueError, match="defines other, not 'named'"):
        session.function("named", "def other(): pass")
    with pytest.raises(ValueError, match="made with def"):
        session.function("anonymous", lambda: 1)


def test_a_functions_source_is_sent_once_to_each_kernel(lonely_host: Host) -> None:
    session = lonely_host.session()
    session.function("f", "def f(x):\n    return x + 1\n# " + "long " * 2000)
    assert [session.call("f", i) for i in range(3)] == [1, 2, 3]
    sizes = [e.measurements["bytes_in"] for e in lonely_host.telemetry.events("bridge", "execution", "stop")]
    assert sizes[0] > 10_000 > 2_000 > max(sizes[1:])


def test_a_function_replaced_is_the_new_one_at_the_next_call(session: Session) -> None:
    session.function("f", "def f():\n    return 1\n")
    assert session.call("f") == 1
    session.function("f", "def f():\n    return 2\n")
    assert session.call("f") == 2


def test_a_source_that_the_kernel_let_go_is_sent_again() -> None:
    with Host(arguments=["--Policy.max_sources=1"]) as host:
        session = host.session()
        session.function("f", "def f():\n    return 'f'\n")
        session.function("g", "def g():\n    return 'g'\n")
        assert [session.call(name) for name in "fgfgf"] == list("fgfgf")


def test_an_error_in_the_kernel_prints_the_kernels_traceback(session: Session) -> None:
    session.function("boom", "def boom(x):\n    return helper(x)\n\ndef helper(x):\n    return 1 / x\n")
    with pytest.raises(RemoteError, match="ZeroDivisionError: division by zero") as caught:
        session.call("boom", 0)
    error = caught.value
    assert error.type == "ZeroDivisionError"
    assert [frame.function for frame in error.frames] == ["boom", "helper"]
    assert "    return 1 / x" in error.remote_traceback
    assert error.remote_traceback in error.__notes__
    with pytest.raises(NotFound, match="no module named 'nowhere'"):
        session.call("nowhere.at_all")
    with pytest.raises(RemoteError, match="SystemExit"):
        session.call("sys.exit", 3)
    with pytest.raises(NotSerializable, match="result"):
        session.call("threading.Lock")


def test_generators_stream_with_flow_control(session: Session) -> None:
    @session.function
    def count(ctx, n):  # type: ignore[no-untyped-def]
        for i in range(n):
            ctx.set_variable("produced", i + 1)
            yield i
        return "end"

    @session.function
    async def count_async(n):  # type: ignore[no-untyped-def]
        import asyncio

        for i in range(n):
            await asyncio.sleep(0)
            yield i

    stream = session.stream("count", 100)
    assert list(stream) == list(range(100))
    assert stream.result == "end"
    assert list(session.stream("count_async", 50)) == list(range(50))
    assert list(session.stream("builtins.range", 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(BridgeError, match="nothing to stream"):
        list(session.stream("math.sqrt", 4))


def test_a_producer_is_bounded_and_stops_when_its_reader_leaves(session: Session) -> None:
    produced: list[int] = []

    @session.tool
    def producing(i: int) -> None:
        produced.append(i)

    @session.function
    def endless(ctx):  # type: ignore[no-untyped-def]
        i = 0
        while True:
            ctx.call_tool("producing", i=i)
            ctx.set_variable("produced", i)
            yield i
            i += 1

    for value in session.stream("endless"):
        if value == 3:
            break
    assert session.call("math.sqrt", 9) == 3
    assert produced[-1] <= 3 + 17
    assert "produced" not in session, "nothing is kept of a command that did not succeed"


def test_an_error_in_the_middle_of_a_stream_comes_after_what_was_before_it(session: Session) -> None:
    session.function("f", "def f():\n    yield 1\n    yield 2\n    raise LookupError('gone')\n")
    got = []
    with pytest.raises(RemoteError, match="LookupError: gone"):
        for value in session.stream("f"):
            got.append(value)  # noqa: PERF402
    assert got == [1, 2]


# -- instances -------------------------------------------------------------------


def test_an_instance_lives_in_the_host_and_each_change_is_a_new_version(session: Session) -> None:
    counter = session.create("collections.Counter", "abracadabra")
    assert counter.most_common(1) == [("a", 5)]
    assert "version=1" in repr(counter), "a call that changes nothing makes no version"
    counter.update("bbbbb")
    assert counter.most_common(1) == [("b", 7)]
    assert "version=2" in repr(counter)
    assert session.instances[counter.ref] == counter
    assert "most_common" in dir(counter)


def test_two_instances_of_equal_recipes_never_alias(session: Session) -> None:
    first, second = (session.create("collections.Counter", "a") for _ in range(2))
    assert first.ref != second.ref
    first.update("a")
    assert (first.total(), second.total()) == (2, 1)


def test_the_arguments_of_a_recipe_are_copied_when_it_is_made(session: Session) -> None:
    letters = ["a"]
    counter = session.create("collections.Counter", letters)
    letters.append("b")
    assert counter.total() == 1


def test_a_concurrent_change_is_a_conflict_and_not_a_lost_update(session: Session) -> None:
    account = session.create("accounts.Account", "Ada")
    both = threading.Barrier(2)

    @session.tool
    def meet() -> None:
        both.wait(60)  # by now both calls have read the same state

    results: list[Any] = []

    def deposit() -> None:
        try:
            results.append(account.deposit(5))
        except Conflict as error:
            results.append(error)

    threads = [threading.Thread(target=deposit) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(type(result).__name__ for result in results) == ["Conflict", "int"]
    assert account.look() == ("Ada", 5)
    conflict = next(result for result in results if isinstance(result, Conflict))
    assert conflict.retryable
    assert "was changed by another call" in str(conflict)


@pytest.mark.parametrize(
    ("cls", "adapter"), [("accounts.Account", "pickle"), ("accounts.Diary", "bridge"), ("accounts.Locked", "recipe")]
)
def test_each_kind_of_state_is_kept_by_its_adapter(session: Session, cls: str, adapter: str) -> None:
    arguments = {"accounts.Account": ["Ada"]}.get(cls, [])
    assert adapter in repr(session.create(cls, *arguments))


def test_an_object_that_says_its_state_keeps_it_and_the_host_can_read_it(session: Session) -> None:
    diary = session.create("accounts.Diary")
    assert [diary.write("a"), diary.write("b")] == [1, 2]
    assert diary.state == {"pages": ["a", "b"]}
    assert diary.version == 3


def test_an_object_without_keepable_state_starts_afresh_at_each_call_and_its_repr_says_so(session: Session) -> None:
    locked = session.create("accounts.Locked", start=5)
    assert [locked.more(), locked.more()] == [6, 6]
    assert "recipe only" in repr(locked)


def test_an_async_method_changes_its_instance_too(session: Session) -> None:
    account = session.create("accounts.Account", "Ada")
    assert account.deposit_later(3) == 3
    assert account.look() == ("Ada", 3)
    assert session["deposited"] == 3


def test_a_pickle_altered_on_its_way_is_refused(session: Session) -> None:
    account = session.create("accounts.Account", "Ada")
    state = session._state
    known = state.instance(account.ref)
    altered = msgspec.structs.replace(known, state=store(b"altered", "state"), version=2)
    state.commit({}, instances=[(altered, 1)])
    with pytest.raises(BridgeError, match="not what its digest says"):
        account.look()


def test_a_kernel_that_allows_no_pickle_keeps_the_recipe_alone() -> None:
    with Host(arguments=["--Policy.allow_pickle=False"], env={"PYTHONPATH": KERNELSIDE}) as host:
        account = host.session().create("accounts.Account", "Ada")
        assert "recipe only" in repr(account)
        assert account.look() == ("Ada", 0)


def test_an_instance_given_as_an_argument_arrives_rebuilt(session: Session) -> None:
    counter = session.create("collections.Counter", "aab")
    counter.update("a")
    assert session.call("builtins.dict", counter) == {"a": 3, "b": 1}
    session["c"] = counter
    assert session["c"] == counter
    session.function("f", "def f(ctx):\n    return ctx.get_variable('c').total()\n")
    assert session.call("f") == 4


def test_an_instance_outlives_the_kernel_that_made_it(lonely_host: Host) -> None:
    session = lonely_host.session()
    counter = session.create("collections.Counter", "ab")
    counter.update("b")
    (before,) = lonely_host.kernels()
    os.kill(before.pid, signal.SIGKILL)
    assert counter.call("most_common", 1, retries=1) == [("b", 2)]
    (after,) = lonely_host.kernels()
    assert after.pid != before.pid


def test_private_methods_and_missing_ones_are_refused_clearly(session: Session) -> None:
    counter = session.create("collections.Counter", "ab")
    with pytest.raises(BridgeError, match="private"):
        counter.call("__reduce__")
    with pytest.raises(NotFound, match="no method 'nothing_like_it'"):
        counter.nothing_like_it()


# -- kernels that die, hang or must stop ---------------------------------------------


@pytest.fixture
def dying(lonely_host: Host, tmp_path: Path) -> Session:
    session = lonely_host.session("dying")
    session["file"] = str(tmp_path / "deaths")

    @session.function
    def die(ctx, times):  # type: ignore[no-untyped-def]
        import os
        import signal

        with open(ctx.get_variable("file"), "a+") as file:  # outside of Bridge: a command repeats what it saw inside
            file.seek(0)
            deaths = len(file.read())
            if deaths < times:
                file.write("x")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        return deaths

    return session


def test_a_call_whose_kernel_dies_runs_again_on_another(dying: Session) -> None:
    assert dying.call("die", 2) == 2
    (command,) = dying._engine.store.log.commands("dying")
    assert command.ended is not None
    assert (command.attempts, command.ended.attempts) == (3, 3)


def test_a_call_that_may_not_run_again_fails_at_once_and_the_kernel_is_replaced(dying: Session) -> None:
    with pytest.raises(KernelDied, match="exit code -9"):
        dying.call("die", 1, retries=0)
    assert dying.call("die", 1) == 1


def test_every_call_in_flight_fails_when_its_kernel_dies(lonely_host: Host) -> None:
    session = lonely_host.session()
    started = threading.Barrier(6)

    @session.tool
    def ready() -> None:
        started.wait(60)

    session.function("hang", "def hang(ctx):\n    import time\n    ctx.call_tool('ready')\n    time.sleep(600)\n")
    futures = [session.submit("hang", retries=0) for _ in range(5)]
    started.wait(60)
    os.kill(lonely_host.kernels()[0].pid, signal.SIGKILL)
    for future in futures:
        with pytest.raises(KernelDied):
            future.result(timeout=60)


def test_a_deadline_ends_a_call_that_sleeps_and_the_kernel_goes_on(session: Session) -> None:
    with pytest.raises(DeadlineExceeded, match="ran out of time"):
        session.call("time.sleep", 600, deadline=0.2)
    with pytest.raises(TimeoutError):
        session.call("asyncio.sleep", 600, deadline=0.2)
    assert session.call("math.sqrt", 4) == 2


def test_cancelling_stops_pure_python_code_in_the_kernel(lonely_host: Host) -> None:
    session = lonely_host.session()
    running = threading.Event()

    @session.tool
    def started() -> None:
        running.set()

    session.function("spin", "def spin(ctx):\n    ctx.call_tool('started')\n    while True:\n        pass\n")
    future = session.submit("spin")
    assert running.wait(60)
    future.cancel()
    with pytest.raises(CancelledError):
        future.result(60)
    (kernel,) = lonely_host.kernels()
    eventually(lambda: lonely_host.stats()[kernel.id].commands["running"] == 1, "only kernel.stats itself runs")


def test_cancelling_a_command_cancels_the_tool_that_it_waits_for() -> None:
    async def main() -> None:
        async with AsyncHost() as host:
            session = host.session()
            entered, ended = asyncio.Event(), asyncio.Event()

            @session.tool
            async def wait_for_ever() -> None:
                entered.set()
                try:
                    await asyncio.sleep(600)
                finally:
                    ended.set()

            session.function("f", "def f(ctx):\n    ctx.call_tool('wait_for_ever')\n")
            task = asyncio.create_task(session.call("f"))
            await asyncio.wait_for(entered.wait(), 60)
            task.cancel()
            await asyncio.wait_for(ended.wait(), 60)

    asyncio.run(main())


def test_two_kernels_share_the_work_and_one_that_is_busy_is_passed_by(shared_host: Host, session: Session) -> None:
    held, release = threading.Barrier(2), threading.Event()

    @session.tool
    def hold() -> None:
        held.wait(60)
        release.wait(60)

    session.function("busy", "def busy(ctx):\n    import os\n    ctx.call_tool('hold')\n    return os.getpid()\n")
    future = session.submit("busy")
    held.wait(60)
    pids = {session.call("os.getpid") for _ in range(6)}
    release.set()
    assert future.result(60) not in pids
    assert len(pids) == 1


# -- hosts -----------------------------------------------------------------------


def test_a_closed_host_says_so_and_closing_twice_does_nothing() -> None:
    host = Host(kernels=0)
    session = host.session("s")
    host.close()
    host.close()
    with pytest.raises(HostClosed):
        session.call("math.sqrt", 4)
    with pytest.raises(HostClosed):
        host.session("s")


def test_a_host_leaves_no_process_no_file_and_no_thread_behind() -> None:
    threads = set(threading.enumerate())
    with Host(kernels=2) as host:
        pids = [kernel.pid for kernel in host.kernels()]
        directory = os.path.dirname(host.kernels()[0].connection_file)
        session = host.session()
        child = session.call("os.spawnlp", os.P_NOWAIT, "sleep", "sleep", "600")
        assert psutil.pid_exists(child)
    for pid in (*pids, child):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    assert not os.path.exists(directory)
    left = {t for t in threading.enumerate() if t.name.startswith("bridge-host")} - threads
    assert not left


def test_the_synchronous_host_works_inside_a_running_event_loop(session: Session) -> None:
    async def cell() -> float:
        return session.call("math.sqrt", 16)  # type: ignore[no-any-return]

    assert asyncio.run(cell()) == 4


def test_a_kernel_that_cannot_start_says_why() -> None:
    with pytest.raises(BridgeError, match=r"no-such-kernel|No such kernel"):
        Host(kernel_name="no-such-kernel")
    with pytest.raises(BridgeError, match="exit code") as caught:
        Host(arguments=["--Policy.max_commands=not-a-number"])
    assert "max_commands" in caught.value.remedy


def test_what_a_command_prints_reaches_the_host_labelled() -> None:
    outputs: list[Output] = []
    with Host(on_output=outputs.append) as host:
        session = host.session("printing")
        session.function(
            "say",
            """
            def say(word):
                import sys, threading
                print(word)
                print(word, "!", file=sys.stderr)
                thread = threading.Thread(target=lambda: print(word, "from a thread"))
                thread.start()
                thread.join()
            """,
        )
        for future in [session.submit("say", str(i)) for i in range(10)]:
            future.result(60)
    assert {output.session for output in outputs} == {"printing"}
    assert {output.command for output in outputs} == {"say"}
    text = "".join(o.text for o in outputs if o.name == "stdout")
    assert sorted(text.split("\n")) == sorted(["", *(f"{i}{end}" for i in range(10) for end in ("", " from a thread"))])
    assert "".join(sorted(o.text for o in outputs if o.name == "stderr")) == "".join(f"{i} !\n" for i in range(10))


def test_telemetry_tells_of_every_command_and_never_of_arguments(lonely_host: Host) -> None:
    session = lonely_host.session("told")
    events: list[Any] = []
    lonely_host.telemetry.attach("bridge.execution", events.append)
    session["x"] = "SECRET-1"
    session.function("f", "def f(ctx, given):\n    return ctx.get_variable('x') + given\n")
    session.call("f", "SECRET-2")
    with pytest.raises(RemoteError):
        session.call("math.sqrt", "SECRET-3")
    names = [event.name[-1] for event in lonely_host.telemetry.events("bridge", "execution")]
    assert names == ["start", "stop", "start", "exception"]
    stop = lonely_host.telemetry.events("bridge", "execution", "stop")[0]
    assert stop.measurements["callbacks"] == 1
    assert {"duration", "queue", "bytes_in", "bytes_out"} <= stop.measurements.keys()
    assert stop.metadata["success"] is True
    assert stop.metadata["session"] == "told"
    assert "SECRET" not in repr(lonely_host.telemetry.events()) + repr(lonely_host.telemetry.lines())
    assert [event.name for event in events] == [e.name for e in lonely_host.telemetry.events("bridge", "execution")]
    lines = lonely_host.telemetry.lines()
    assert lines[0].startswith("✓ f  ")
    assert "1 callback" in lines[0]
    assert lines[1].startswith("✗ math.sqrt")


def test_a_telemetry_handler_that_raises_is_detached_and_breaks_nothing(lonely_host: Host) -> None:
    def broken(event: object) -> None:
        raise RuntimeError("mine")

    lonely_host.telemetry.attach((), broken, id="broken")
    with pytest.warns(UserWarning, match="'broken' raised"):
        lonely_host.session("s").call("math.sqrt", 4)
        lonely_host.telemetry.events()
    lonely_host.telemetry.attach((), broken, id="broken")
    lonely_host.telemetry.detach("broken")


def test_a_session_shows_what_it_holds(session: Session) -> None:
    session["x"] = 1
    session.tool(Tool(lambda text: len(text), name="size"))
    session.function("f", "def f(): pass")
    shown = repr(session)
    assert "variables: x" in shown
    assert "tools: size" in shown
    assert "functions: f" in shown


def test_an_object_is_inspected_as_data(session: Session) -> None:
    hypot = session.inspect("math.sqrt")
    assert (hypot.kind, hypot.module) == ("function", "math")
    counter = session.inspect("collections.Counter")
    assert counter.kind == "class"
    most_common = next(member for member in counter.members if member.name == "most_common")
    assert most_common.signature == "(self, n=None)"
    assert [p.default for p in most_common.parameters] == [None, "None"]
    session.function("f", "def f(a: int, *, b: str = 'x') -> bool:\n    'Doc.'\n")
    f = session.inspect("f")
    assert (f.signature, f.doc) == ("(a: 'int', *, b: 'str' = 'x') -> 'bool'", "Doc.")
    assert session.inspect(session.create("collections.Counter")).name == "collections.Counter"


# -- what a second look found -------------------------------------------------------


def test_an_asynchronous_tool_that_calls_the_plain_host_is_told_so_and_nothing_hangs(lonely_host: Host) -> None:
    session = lonely_host.session()

    @session.tool
    async def wrong() -> float:
        return float(session.call("math.sqrt", 4))

    session.function("f", "def f(ctx):\n    return ctx.call_tool('wrong')\n")
    with pytest.raises(BridgeError, match="cannot wait for itself"):
        session.call("f")
    assert session.call("math.sqrt", 4) == 2


def test_a_tool_that_raises_anything_at_all_answers(session: Session) -> None:
    class Odd(BaseException):
        pass

    @session.tool
    def odd() -> None:
        raise Odd("very")

    session.function("f", "def f(ctx):\n    ctx.call_tool('odd')\n")
    with pytest.raises(BridgeError, match="very"):
        session.call("f")


def test_what_is_too_large_for_a_message_is_refused_by_whoever_would_send_it() -> None:
    with Host(arguments=["--Policy.max_message_bytes=100000"]) as host:
        session = host.session()
        session["big"] = "x" * 200_000
        session.function("read", "def read(ctx):\n    return len(ctx.get_variable('big'))\n")
        session.function("write", "def write(ctx):\n    ctx.set_variable('y', 'x' * 200_000)\n")
        session.function("give", "def give():\n    return 'x' * 200_000\n")
        for call in (("read",), ("write",), ("give",), ("builtins.len", "x" * 200_000)):
            with pytest.raises(BridgeError, match=r"and (a message at most|its kernel takes) 100000"):
                session.call(*call, deadline=20)
        assert session.call("math.sqrt", 4) == 2


def test_telemetry_of_any_number_reaches_the_host_and_harms_nobody(lonely_host: Host) -> None:
    session = lonely_host.session()
    session.function(
        "f",
        """
        def f(ctx):
            ctx.emit("loss", {"loss": float("nan"), "huge": 10**5000, "fine": 1.5}, also=float("inf"))
            ctx.progress(float("inf"), 3)
        """,
    )
    session.call("f")
    (event,) = lonely_host.telemetry.events("bridge", "user", "loss")
    assert event.measurements == {"fine": 1.5}
    assert event.metadata["loss"] == "nan"
    assert event.metadata["huge"] == "an integer of 16610 bits"
    assert session.call("math.sqrt", 4) == 2


def test_an_exit_that_a_task_left_behind_asks_for_does_not_end_the_event_loop(session: Session) -> None:
    session.function(
        "f",
        """
        async def f():
            import asyncio

            async def leave():
                raise SystemExit

            asyncio.create_task(leave())
            await asyncio.sleep(0)
        """,
    )
    with pytest.raises(BridgeError):
        session.call("f", deadline=2)
        raise BridgeError  # either end is fine: what counts is that the loop lives
    assert session.call("asyncio.sleep", 0, "alive", deadline=10) == "alive"


def test_a_kernel_that_closed_its_connection_is_not_chosen_any_more() -> None:
    with Host() as other:
        file = other.kernels()[0].connection_file
        with Host() as host:
            host.attach(file)
            assert {kernel.state for kernel in host.kernels()} == {"ready"}
            other.close()
            eventually(lambda: [k.state for k in host.kernels()].count("ready") == 1, "the other kernel's end is seen")
            assert [host.session().call("math.sqrt", 4) for _ in range(4)] == [2, 2, 2, 2]


@pytest.mark.parametrize("name", ["", "\udc80", 5])
def test_a_name_that_cannot_be_written_is_refused_at_once(session: Session, name: Any) -> None:
    for use in (lambda: session.update({name: 1}), lambda: session.__setitem__(name, 1), lambda: session.call(name)):
        with pytest.raises((TypeError, ValueError), match="the name of a"):
            use()
    assert not session.variables


@pytest.mark.parametrize("deadline", [0, -1, float("nan")])
def test_a_deadline_that_is_no_time_is_refused(session: Session, deadline: float) -> None:
    with pytest.raises(ValueError, match="more than 0"):
        session.call("math.sqrt", 4, deadline=deadline)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
def test_whatever_a_tool_raises_is_its_answer_and_the_host_goes_on(session: Session, raised: Any) -> None:
    @session.tool
    def plain() -> None:
        raise raised("mine")

    @session.tool
    async def awaited() -> None:
        raise raised("mine")

    session.function("f", "def f(ctx, tool):\n    ctx.call_tool(tool)\n")
    for tool in ("plain", "awaited"):
        with pytest.raises(BridgeError, match=raised.__name__):
            session.call("f", tool, deadline=10)
    assert session.call("math.sqrt", 4) == 2


def test_a_stream_that_nobody_reads_is_stopped_when_it_is_dropped(lonely_host: Host) -> None:
    session = lonely_host.session()
    session.function("endless", "def endless():\n    while True:\n        yield 1\n")
    for _ in range(3):
        session.stream("endless")
    (kernel,) = lonely_host.kernels()
    eventually(lambda: lonely_host.stats()[kernel.id].commands["running"] == 1, "only kernel.stats runs")


def test_a_fork_of_a_host_is_told_so_and_ends(lonely_host: Host) -> None:
    session = lonely_host.session()
    child = os.fork()
    if child == 0:  # nothing of pytest's may run here
        try:
            session.call("math.sqrt", 4)
        except HostClosed:
            lonely_host.close()
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert session.call("math.sqrt", 4) == 2
