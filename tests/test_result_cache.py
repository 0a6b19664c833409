"""Results given again without a kernel: when they are, when they are not, and what suggests it."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge_host import AsyncHost, DeadlineExceeded, Host, NotFound, RemoteError
from bridge_host.client import Reply
from bridge_host.durations import seconds_of, written
from bridge_host.engine.commands import Arguments, CallFunction, prepare
from bridge_host.engine.reads import Reads
from bridge_host.engine.results import OVERHEAD_BYTES, ResultCache
from bridge_host.telemetry.usage import MAX_CALLS, Usage
from bridge_kernel.contract.catalogue import problem
from conftest import KERNELSIDE
from scripted_lm import ScriptedLM, fields

if TYPE_CHECKING:
    from pathlib import Path

    from bridge_host import Session

COUNTED = """
def counted(path, x=0):
    with open(path, "a") as file:
        file.write(".")
    return [x, 1]
"""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Runs:
    """A file into which a function in a kernel writes a dot each time that it runs."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        path.touch()

    def __len__(self) -> int:
        with open(self.path) as file:
            return len(file.read())


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


@pytest.fixture
def clock(shared_host: Host, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(shared_host.results, "clock", clock)
    return clock


def tries(session: Session) -> list[int]:
    """How often each command of the session was tried that ended well: 0 if no kernel was asked."""
    return [int(e.measurements["attempts"]) for e in session.telemetry.events("bridge", "command", "stop")]


def cached(session: Session) -> list[str]:
    """What the cache said of the session's commands."""
    return [event.name[-1] for event in session.telemetry.events("bridge", "cache")]


def reasons(session: Session) -> list[Any]:
    return [event.metadata["reason"] for event in session.telemetry.events("bridge", "cache", "skip")]


# -- when it is given again ----------------------------------------------------------


def test_a_call_that_was_made_before_is_answered_without_a_kernel(session: Session, runs: Runs) -> None:
    session.function("counted", COUNTED, cache="1h")
    assert [session.call("counted", runs.path, 1) for _ in range(3)] == [[1, 1]] * 3
    assert len(runs) == 1
    assert session.call("counted", runs.path, 2) == [2, 1]
    assert session.call("counted", runs.path, x=1) == [1, 1], "written otherwise it is another request"
    assert len(runs) == 3
    assert tries(session) == [1, 0, 0, 1, 1]


def test_a_function_without_cache_runs_each_time(session: Session, runs: Runs) -> None:
    session.function("counted", COUNTED)
    session.call("counted", runs.path)
    session.call("counted", runs.path)
    assert (len(runs), cached(session)) == (2, [])


def test_the_decorator_takes_it_too(session: Session) -> None:
    @session.function(cache="10m")  # type: ignore[untyped-decorator]
    def double(x: int) -> int:
        return 2 * x

    assert session.caches == {"double": 600}
    assert (session.call("double", 2), session.call("double", 2)) == (4, 4)
    assert tries(session) == [1, 0]


@pytest.mark.parametrize(
    ("one", "other"), [({"a": 1, "b": 2}, {"b": 2, "a": 1}), (1, 1.0), (1, True), (b"1", "1"), ((1,), [1])], ids=repr
)
def test_what_code_can_tell_apart_is_asked_anew(session: Session, one: Any, other: Any) -> None:
    session.function("told", "def told(x): return repr(x)\n", cache="1h")
    assert [session.call("told", x) for x in (one, other, one, other)] == [repr(one), repr(other)] * 2
    assert tries(session) == [1, 1, 0, 0]


def test_large_arguments_are_told_apart_by_their_content(session: Session) -> None:
    session.function("total", "def total(array): return int(array.sum())\n", cache="1h")
    array = numpy.ones(100_000, "u1")
    other = array.copy()
    other[-1] = 2
    assert [session.call("total", a) for a in (array, array.copy(), other)] == [100_000, 100_000, 100_001]
    assert tries(session) == [1, 0, 1]


def test_whoever_changes_a_result_changes_only_his_own(session: Session) -> None:
    session.function("made", "def made():\n    import numpy\n    return [[1], numpy.arange(3)]\n", cache="1h")
    for _ in range(3):
        numbers, array = session.call("made")
        assert (numbers, array.tolist()) == ([1], [0, 1, 2])
        numbers.append(2)
        if array.flags.writeable:
            array[:] = 7
    assert tries(session) == [1, 0, 0]


def test_an_array_that_is_changed_while_its_call_waits_is_what_it_was_when_it_was_given() -> None:
    async def main() -> None:
        async with AsyncHost(kernels=1, concurrency=1) as host:
            session = host.session()
            held, go, missed = asyncio.Event(), asyncio.Event(), asyncio.Event()
            host.telemetry.attach("bridge.cache.miss", lambda event: missed.set())

            @session.tool
            async def wait() -> None:
                """Hold the only place."""
                held.set()
                await go.wait()

            session.function("holds", "def holds(ctx):\n    ctx.call_tool('wait')\n")
            session.function("total", "def total(x):\n    return float(x.sum())\n", cache="1h")
            array = numpy.ones(100_000)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(session.call("holds"))
                await held.wait()
                first = tasks.create_task(session.call("total", array))
                await missed.wait()
                array[:] = 7
                go.set()
            assert first.result() == 100_000
            assert await session.call("total", numpy.ones(100_000)) == 100_000

    asyncio.run(main())


def test_an_instances_methods_are_cached_by_recipe_and_state(session: Session) -> None:
    one, same = (session.create("accounts.Diary", cache="1h") for _ in range(2))
    assert (one.write("first"), same.call("bridge_state")) == (1, {"pages": []})
    assert one.bridge_state() == {"pages": ["first"]}
    assert reasons(session) == ["it changes its instance"]
    assert same.write("first") == 1, "what changes its instance runs each time"
    session.telemetry.events()
    hits = session._engine.results.hits
    assert same.bridge_state() == {"pages": ["first"]}, "and now the two are equal"
    assert session._engine.results.hits == hits + 1


def test_instances_of_other_arguments_do_not_share(session: Session) -> None:
    for owner in ("Ada", "Zoë"):
        account = session.create("accounts.Account", owner, cache="1h")
        assert [account.look() for _ in range(2)] == [(owner, 0)] * 2
    for start in (0, 5):  # kept as its recipe alone
        counter = session.create("accounts.Locked", start, cache="1h")
        assert [counter.more() for _ in range(2)] == [start + 1] * 2
    assert cached(session) == ["miss", "store", "hit"] * 4


def test_a_copy_of_an_instance_is_cached_as_long(session: Session) -> None:
    one = session.create("accounts.Diary", cache="2h")
    other = session.copy(one, name="copy")
    assert session.caches == {one.ref: 7200, "copy": 7200}
    session.release(other)
    assert session.caches == {one.ref: 7200}


def test_a_language_model_is_asked_once(lonely_host: Host) -> None:
    pytest.importorskip("dspy")
    session = lonely_host.session("s")
    with ScriptedLM([fields(answer="Paris"), fields(answer="Rome"), fields(answer="Lutetia")]) as lm:
        session.lm(lm.model, api_base=lm.api_base, api_key="sk-planted", num_retries=0, cache=False)
        predict = session.create("dspy.Predict", "question -> answer", cache="1h")
        asked = ["France?", "Italy?", "France?", "Italy?"]
        assert [predict(question=country).answer for country in asked] == ["Paris", "Rome"] * 2
        assert len(lm.requests) == 2
        session.lm(lm.model, api_base=lm.api_base, api_key="sk-planted", num_retries=0, cache=False, temperature=1.0)
        assert predict(question="France?").answer == "Lutetia"
    assert cached(session) == ["miss", "store", "miss", "store", "hit", "hit", "miss", "store"]


def test_of_callers_that_ask_the_same_at_once_one_runs(shared_host: Host, session: Session) -> None:
    asked, gate = [], threading.Event()

    @session.tool(idempotent=True)
    def wait() -> int:
        asked.append(1)
        return gate.wait(30) + len(asked)

    session.function("slow", "def slow(ctx): return ctx.call_tool('wait')\n", cache="1h")
    futures = [session.submit("slow") for _ in range(4)]
    shared_host._run(asyncio.sleep, 0)  # after this each of them has begun
    gate.set()
    assert {future.result(30) for future in futures} == {2}
    assert len(asked) == 1
    assert sorted(tries(session)) == [0, 0, 0, 1]


def test_a_tool_may_send_the_very_command_that_called_it(session: Session) -> None:
    depth = []

    @session.tool(idempotent=True)
    def deeper() -> int:
        depth.append(1)
        return 1 if len(depth) == 3 else 1 + int(session.call("dig", deadline=30))

    session.function("dig", "def dig(ctx): return ctx.call_tool('deeper')\n", cache="1h")
    assert session.call("dig", deadline=30) == 3


# -- for how long ----------------------------------------------------------------------


def test_a_result_is_given_until_it_is_as_old_as_was_said(session: Session, runs: Runs, clock: Clock) -> None:
    session.function("counted", COUNTED, cache="10m")
    session.call("counted", runs.path)
    clock.now += 599
    session.call("counted", runs.path)
    assert len(runs) == 1
    clock.now += 1
    session.call("counted", runs.path)
    assert len(runs) == 2
    clock.now += 599
    session.call("counted", runs.path)
    assert len(runs) == 2, "the new one has its own time"


def test_how_long_can_be_changed_and_ended(session: Session, runs: Runs, clock: Clock) -> None:
    session.function("counted", COUNTED, cache="10m")
    session.call("counted", runs.path)
    clock.now += 60
    session.cache("counted", 60)
    session.call("counted", runs.path)
    assert len(runs) == 2, "older than is wanted now"
    session.cache("counted", None)
    session.call("counted", runs.path)
    assert (len(runs), session.caches) == (3, {})
    session.cache("counted", "1h")
    session.call("counted", runs.path)
    assert (len(runs), session.caches) == (3, {"counted": 3600})
    session.function("counted", COUNTED)
    assert session.caches == {}, "given anew, it is what is said now"


def test_an_instance_is_named_in_each_way(session: Session) -> None:
    diary = session.create("accounts.Diary")
    session.rename(diary, "diary")
    for target in (diary, "diary", diary.ref):
        session.cache(target, "1m")
        assert session.caches == {"diary": 60}
        session.cache(target, None)
        assert session.caches == {}
    with pytest.raises(NotFound, match=r"no function and no instance 'math.hypot'[^$]*There is: diary\."):
        session.cache("math.hypot", "1h")


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [(90, 90), (0.5, 0.5), ("90s", 90), ("10m", 600), ("1h", 3600), ("1.5h", 5400), ("7d", 604800)],
)
def test_a_duration_is_a_number_or_a_text(duration: float | str, seconds: float) -> None:
    assert seconds_of(duration) == seconds
    assert seconds_of(written(seconds)) == seconds


@pytest.mark.parametrize(
    "duration", [0, -1, float("nan"), float("inf"), 10**400, "", "10", "1 h", "1h30m", "-1h", "0s", "1w", "١h", "h"]
)
def test_a_duration_that_is_none_is_refused(session: Session, duration: Any) -> None:
    for use in (
        lambda: session.function("counted", COUNTED, cache=duration),
        lambda: session.create("accounts.Diary", cache=duration),
        lambda: session.cache("counted", duration),
    ):
        with pytest.raises(ValueError, match=r'in seconds .* or as "90s", "10m", "1h", "7d"'):
            use()


@pytest.mark.parametrize("duration", [True, False, b"1h", ["1h"]])
def test_a_duration_of_another_type_is_refused(session: Session, duration: Any) -> None:
    with pytest.raises(TypeError, match='"90s", "10m", "1h", "7d"'):
        session.function("counted", COUNTED, cache=duration)
    assert session.caches == {}


# -- when something has changed ----------------------------------------------------------


def test_a_changed_source_runs(session: Session) -> None:
    session.function("f", "def f(): return 1\n", cache="1h")
    assert session.call("f") == 1
    session.function("f", "def f(): return 2\n", cache="1h")
    assert session.call("f") == 2


READING: dict[str, str] = {
    "get_variable": "ctx.get_variable('x', None)",
    "get_variables": "ctx.get_variables('x', 'y')",
    "variables": "sorted(v.name for v in ctx.variables())",
}


@pytest.mark.parametrize("read", READING.values(), ids=READING)
def test_a_changed_variable_that_was_read_runs(session: Session, read: str) -> None:
    session.function("f", f"def f(ctx): return {read}\n", cache="1h")
    session.function("plain", f"def plain(ctx): return {read}\n")
    for change in (
        lambda: None,
        lambda: session.__setitem__("x", 1),
        lambda: session.__setitem__("x", 2),
        lambda: session.__delitem__("x"),
        lambda: session.update({"x": 3, "y": 4}),
        lambda: session.variables["x"].undo(),
    ):
        change()
        assert session.call("f") == session.call("f") == session.call("plain")
    assert session._engine.results.hits >= 6


def test_a_changed_variable_that_was_not_read_is_nobodys_business(session: Session, runs: Runs) -> None:
    session.function("counted", COUNTED, cache="1h")
    for x in range(3):
        session["other"] = x
        session.call("counted", runs.path)
    assert len(runs) == 1


def test_a_variable_written_while_it_ran_is_not_taken_for_what_it_read(session: Session) -> None:
    @session.tool(idempotent=True)
    def write() -> None:
        session["x"] = session["x"] + 1

    session["x"] = 1
    source = (
        "def f(ctx):\n    a = ctx.get_variable('x')\n    ctx.call_tool('write')\n    return a, ctx.get_variable('x')\n"
    )
    session.function("f", source, cache="1h")
    assert session.call("f") == (1, 2)
    assert reasons(session) == ["the variable 'x' was written while it ran"]
    assert session.call("f") == (2, 3)


def test_a_changed_instance_that_was_an_argument_runs(session: Session) -> None:
    session.function("pages", "def pages(diary): return len(diary.pages)\n", cache="1h")
    diary = session.create("accounts.Diary")
    assert [session.call("pages", diary) for _ in range(2)] == [0, 0]
    diary.write("one")
    assert [session.call("pages", diary) for _ in range(2)] == [1, 1]
    assert tries(session) == [1, 1, 0, 1, 1, 0]


def test_a_tool_that_was_replaced_is_called(session: Session) -> None:
    session.function("f", "def f(ctx): return ctx.call_tool('answer')\n", cache="1h")
    session.tool(lambda: 1, name="answer", idempotent=True)
    assert [session.call("f") for _ in range(2)] == [1, 1]
    session.tool(lambda: 2, name="answer", idempotent=True)
    assert [session.call("f") for _ in range(2)] == [2, 2]
    assert tries(session) == [1, 0, 1, 0]


def test_other_tools_than_it_was_told_of_run_it(session: Session) -> None:
    session.function("f", "def f(ctx): return [tool.name for tool in ctx.tools()]\n", cache="1h")
    assert [session.call("f") for _ in range(2)] == [[], []]
    session.tool(lambda: 1, name="answer")
    assert session.call("f") == ["answer"]


def test_a_changed_secret_runs(session: Session) -> None:
    session.function("f", "def f(ctx): return len(ctx.secret('KEY'))\n", secrets=["KEY"], cache="1h")
    for secret in ("one", "three", "one"):
        session.secrets["KEY"] = secret
        assert [session.call("f") for _ in range(2)] == [len(secret)] * 2
    assert tries(session) == [1, 0, 1, 0, 0, 0]


def test_a_changed_language_model_runs_and_another_key_for_it_does_not(session: Session) -> None:
    session.function("f", "def f(): return 1\n", lm=True, cache="1h")
    session.function("g", "def g(): return 1\n", cache="1h")

    def key(name: str) -> bytes:
        vault = session._engine.store.vault
        return prepare(CallFunction(name, Arguments()), session._state, vault).result_key(vault)

    keys, without = [], []
    asked: list[tuple[str, dict[str, Any]]] = [("openai/a", {}), ("openai/b", {}), ("openai/b", {"temperature": 0.5})]
    for model, options in asked:
        for api_key in ("secret-1", "secret-2"):
            session.lm(model, api_key=api_key, **options)
            keys.append(key("f"))
            without.append(key("g"))
    assert keys[::2] == keys[1::2]
    assert len(set(keys)) == 3
    assert len(set(without)) == 1, "without lm= it does not get one"


def test_another_session_does_not_see_it(shared_host: Host, session: Session, runs: Runs) -> None:
    other = shared_host.session(f"{session.id}-other")
    for each in (session, other):
        each.function("counted", COUNTED, cache="1h")
        each.call("counted", runs.path)
    assert len(runs) == 2


def test_a_session_of_the_same_name_does_not_see_what_was_before_it(shared_host: Host, session: Session) -> None:
    for x in (1, 2):
        new = shared_host.session(session.id)
        new.function("f", "def f(ctx): return ctx.get_variable('x')\n", cache="1h")
        new["x"] = x  # at version 1 both times
        assert [new.call("f") for _ in range(2)] == [x, x]
        before = len(shared_host.results)
        shared_host.delete_session(session.id)
        assert len(shared_host.results) == before - 1


# -- what is not kept ----------------------------------------------------------------------

EFFECTS: dict[str, tuple[str, str]] = {
    "writes": ("ctx.set_variable('x', 1)", "it writes variables"),
    "deletes": ("ctx.delete_variable('there')", "it writes variables"),
    "tries to write": ("refused(ctx)", "it writes variables"),
    "calls a tool": ("ctx.call_tool('pay')", "it calls the tool 'pay', which is not idempotent"),
    "lives with a tool's failure": ("failing(ctx)", "the tool 'fails' failed"),
    "returns an instance": ("referred(ref)", "its result refers to what the host holds"),
    "returns a tool": ("[{'deep': pay}]", "its result refers to what the host holds"),
}
SOURCE = """
def f(ctx, ref, pay):
    return {}

def referred(ref):
    from bridge_kernel.contract.values import Ref
    return Ref(ref)

def refused(ctx):
    try:
        ctx.set_variable("there", 1, if_version=99)
    except Exception as exc:
        return type(exc).__name__

def failing(ctx):
    try:
        ctx.call_tool("fails")
    except Exception as exc:
        return type(exc).__name__
"""


@pytest.mark.parametrize(("does", "reason"), EFFECTS.values(), ids=EFFECTS)
def test_what_did_more_than_to_compute_runs_each_time(session: Session, does: str, reason: str) -> None:
    session.tool(lambda: 1, name="pay")

    @session.tool(idempotent=True)
    def fails() -> None:
        raise ValueError

    session.function("f", SOURCE.replace("{}", does), cache="1h")
    diary = session.create("accounts.Diary")
    for _ in range(2):
        session["there"] = 0
        session.call("f", diary.ref, session.tools["pay"])
    assert reasons(session) == [reason] * 2
    assert tries(session) == [1, 1, 1]


def test_a_failure_is_not_kept(session: Session) -> None:
    session.function("f", "def f(ctx): return 1 / ctx.get_variable('x')\n", cache="1h")
    session["x"] = 0
    for _ in range(2):
        with pytest.raises(RemoteError, match="division by zero"):
            session.call("f")
    assert (cached(session), reasons(session)) == (["miss", "skip"] * 2, ["it failed"] * 2)


def test_a_stream_is_not_kept(session: Session) -> None:
    session.function("f", "def f():\n    yield 1\n    yield 2\n", cache="1h")
    for _ in range(2):
        assert list(session.stream("f")) == [1, 2]
    assert reasons(session) == ["it is a stream"] * 2


def test_an_idempotency_key_wins(session: Session, runs: Runs) -> None:
    session.function("counted", COUNTED, cache="1h")
    for key in ("a", "b", "a", None, None):
        session.call("counted", runs.path, idempotency_key=key)
    assert len(runs) == 3
    assert cached(session) == ["miss", "store", "hit"]


def test_a_follower_runs_it_when_the_first_caller_gives_up(shared_host: Host, session: Session) -> None:
    asked, called, gate = [], threading.Event(), threading.Event()

    @session.tool(idempotent=True)
    def wait() -> int:
        asked.append(1)
        called.set()
        gate.wait(30)
        return len(asked)

    session.function("slow", "def slow(ctx): return ctx.call_tool('wait')\n", cache="1h")
    first = session.submit("slow")
    assert called.wait(30)
    second = session.submit("slow")
    shared_host._run(asyncio.sleep, 0)
    first.cancel()
    gate.set()
    assert second.result(30) == 2


def test_a_follower_whose_time_is_up_does_not_wait_any_longer(session: Session) -> None:
    called, gate = threading.Event(), threading.Event()

    @session.tool(idempotent=True)
    def wait() -> None:
        called.set()
        gate.wait(30)

    session.function("slow", "def slow(ctx): return ctx.call_tool('wait')\n", cache="1h")
    first = session.submit("slow")
    assert called.wait(30)
    with pytest.raises(DeadlineExceeded, match="still runs for another caller"):
        session.call("slow", deadline=0.01)
    gate.set()
    assert first.result(30) is None


# -- how much is kept --------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(
    shared_host: Host, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_host.results.clear()
    monkeypatch.setattr(shared_host.results, "max_bytes", 8 * OVERHEAD_BYTES)
    session.function("text", "def text(x): return x * 400\n", cache="1h")
    for x in "abca":
        session.call("text", x)
    assert len(shared_host.results) == 3
    session.call("text", "d")
    session.call("text", "e")
    assert shared_host.results.size <= 8 * OVERHEAD_BYTES
    before = tries(session)
    assert [len(session.call("text", x)) for x in "ab"] == [400, 400]
    assert tries(session)[len(before) :] == [0, 1], "b was used longer ago than a"


def test_many_small_results_take_no_more_memory_than_is_counted(shared_host: Host, session: Session) -> None:
    results = ResultCache()
    running: Any = SimpleNamespace(session=session._state, subject="f")
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(10_000):
            key = number.to_bytes(32, "big")
            results.keep(running, key, Reply(msgspec.Raw(b'{"value":1}'), ()), Reads({}, {}, {}), 1)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 1.1 * results.size


def test_a_result_that_takes_a_large_part_is_not_kept(
    shared_host: Host, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_host.results, "max_bytes", 8 * OVERHEAD_BYTES)
    session.function("text", "def text(): return 'x' * 2000\n", cache="1h")
    assert [len(session.call("text")) for _ in range(2)] == [2000, 2000]
    assert reasons(session) == ["its result is too large"] * 2


def test_nothing_is_kept_in_no_bytes(session: Session, shared_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_host.results, "max_bytes", 0)
    session.function("f", "def f(): return 1\n", cache="1h")
    assert [session.call("f") for _ in range(2)] == [1, 1]
    assert tries(session) == [1, 1]


@pytest.mark.parametrize("size", [-1, 1.5, True, "1"])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="cache_bytes is how many bytes"):
        AsyncHost(0, cache_bytes=size)


# -- what can be seen ------------------------------------------------------------------------------


def test_hits_are_counted_and_shown(shared_host: Host, session: Session) -> None:
    results = shared_host.results
    before = results.hits, results.misses, results.skips, results.saved
    session.function("f", "def f(): return 1\n", cache="1h")
    for _ in range(3):
        session.call("f")
    assert (results.hits - before[0], results.misses - before[1], results.skips - before[2]) == (2, 1, 0)
    assert results.saved > before[3]
    line = next(line.split() for line in repr(results).splitlines() if line.startswith(f"{session.id} "))
    assert line[:5] == [session.id, "f", "2", "1", "0"]
    assert line[-2] == "1"
    assert f"<td style='text-align:left'>{session.id}</td>" in results._repr_html_()
    results.clear()
    assert (len(results), results.size) == (0, 0)
    session.call("f")
    assert tries(session) == [1, 0, 0, 1]


def test_what_is_told_is_what_the_catalogue_says(shared_host: Host, session: Session) -> None:
    session.function("f", "def f(x): return 1 / x\n", cache="1h")
    with shared_host.telemetry.span("outer") as span:
        session.call("f", 1)
        session.call("f", 1)
    with pytest.raises(RemoteError):
        session.call("f", 0)
    events = session.telemetry.events()
    assert [problem(event) for event in events] == [None] * len(events)
    assert cached(session) == ["miss", "store", "hit", "miss", "skip"]
    within = [e for e in events if e.metadata.get("trace_id") == span.trace_id and e.name[1] in ("command", "cache")]
    assert [".".join(e.name[1:]) for e in within] == [
        *("command.start", "cache.miss", "cache.store", "command.stop"),
        *("command.start", "cache.hit", "command.stop"),
    ]
    hit, stored = within[5].measurements, within[2].measurements
    assert hit["saved"] == stored["saved"] > 0
    assert hit["age"] >= 0
    assert len({e.metadata["span_id"] for e in within[4:]}) == 1
    assert within[6].metadata["parent_span_id"] == within[0].metadata["parent_span_id"]


def test_a_hit_is_not_journaled_for_nothing_ran(shared_host: Host, session: Session) -> None:
    session.function("f", "def f(): return 1\n", cache="1h")
    for _ in range(3):
        session.call("f")
    assert len(shared_host.journal(session.id)) == 1


# -- where else --------------------------------------------------------------------------------------


def test_it_is_the_same_for_asynchronous_code(runs: Runs) -> None:
    async def main() -> None:
        async with AsyncHost(kernels=1, cache_bytes=1 << 20, env={"PYTHONPATH": KERNELSIDE}) as host:
            session = host.session("s")
            session.function("counted", COUNTED, cache="1h")
            assert await asyncio.gather(*(session.call("counted", runs.path) for _ in range(5))) == [[0, 1]] * 5
            assert len(runs) == 1
            diary = await session.create("accounts.Diary", cache="1h")
            assert [await diary.bridge_state() for _ in range(2)] == [{"pages": []}] * 2
            session.cache(diary, None)
            assert session.caches == {"counted": 3600}
            assert (host.results.hits, len(host.results), host.results.max_bytes) == (5, 2, 1 << 20)
        assert len(host.results) == 0, "they end with the host"

    asyncio.run(main())


def test_that_it_is_wanted_survives_and_the_results_do_not(tmp_path: Path, runs: Runs) -> None:
    path, exported = tmp_path / "bridge.db", tmp_path / "export.json"
    with Host(kernels=1, store=path, env={"PYTHONPATH": KERNELSIDE}) as host:
        session = host.session("s")
        session.function("counted", COUNTED, cache="90s")
        diary = session.create("accounts.Diary", cache="7d")
        session.rename(diary, "diary")
        diary.write("one")  # a new state, which has it too
        assert [session.call("counted", runs.path) for _ in range(2)] == [[0, 1]] * 2
        host.export(exported)
    wanted = {"counted": 90, "diary": 604800}
    with Host(kernels=1, store=path, env={"PYTHONPATH": KERNELSIDE}) as host:
        session = host.session("s")
        assert session.caches == wanted
        assert [session.call("counted", runs.path) for _ in range(2)] == [[0, 1]] * 2
        assert len(runs) == 2
        host.delete_session("s")
        assert host.import_(exported) == ["s"]
        assert host.session("s").caches == wanted


# -- suggestions ---------------------------------------------------------------------------------------


@pytest.fixture
def usage(shared_host: Host, monkeypatch: pytest.MonkeyPatch) -> Usage:
    """Every call is long enough to be worth a cache."""
    usage = shared_host.telemetry.usage
    monkeypatch.setattr(usage, "worthwhile", 0)
    return usage


def suggested(session: Session) -> dict[str, tuple[int, int, str]]:
    found = session._engine.telemetry.suggestions()
    return {s.subject: (s.calls, s.repeats, s.write) for s in found if s.session == session.id}


@pytest.mark.usefixtures("usage")
def test_repeated_calls_are_suggested_until_they_are_cached(shared_host: Host, session: Session) -> None:
    session.function("f", "def f(x): return x\n")
    for x in (1, 2, 1, 1):
        session.call("f", x)
    diary = session.create("accounts.Diary")
    session.rename(diary, "diary")
    for _ in range(2):
        diary.bridge_state()
        session.call("math.hypot", 3, 4)
        session.call("math.hypot", 3, diary.version + _)
    assert suggested(session) == {
        "f": (4, 2, 'session.cache("f", "1h")'),
        "accounts.Diary.bridge_state": (2, 1, 'session.cache("diary", "1h")'),
        "math.hypot": (4, 1, '@session.function(cache="1h") that calls math.hypot'),
    }
    shown = shared_host.telemetry.suggestions()
    assert 'session.cache("f", "1h")' in repr(shown)
    assert "session.cache(&quot;f&quot;, &quot;1h&quot;)" in shown._repr_html_()
    session.cache("f", "1h")
    session.cache(diary, "1h")
    assert list(suggested(session)) == ["math.hypot"]
    session.call("f", 1)
    assert list(suggested(session)) == ["math.hypot"]
    shared_host.delete_session(session.id)
    assert suggested(session) == {}


@pytest.mark.usefixtures("usage")
def test_calls_that_could_not_be_cached_are_not_suggested(session: Session) -> None:
    session.tool(lambda: 1, name="pay")
    session["x"] = 0
    session.function("pays", "def pays(ctx): return ctx.call_tool('pay')\n")
    session.function("writes", "def writes(ctx): ctx.set_variable('x', 1)\n")
    session.function("reads", "def reads(ctx): return ctx.get_variable('x')\n")
    session.function("large", "def large(array): return array.size\n")
    session.function("keyed", "def keyed(): return 1\n")
    diary = session.create("accounts.Diary")
    for number in range(2):
        for name in ("pays", "writes", "reads"):
            session.call(name)
        session.call("large", numpy.zeros((1 << 20) + 1, "u1"))
        session.call("keyed", idempotency_key=str(number))
        diary.write("again")
    assert suggested(session) == {}, "what reads x had another one each time"


def test_short_calls_are_not_looked_at(shared_host: Host, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_host.telemetry.usage, "worthwhile", 1 << 62)
    session.function("f", "def f(): return 1\n")
    for _ in range(3):
        session.call("f")
    assert suggested(session) == {}


def test_what_is_remembered_of_calls_is_bounded() -> None:
    usage = Usage()
    for number in range(MAX_CALLS + 1):
        usage.record("s", f"f{number}", f"f{number}", "", (b"",), 1)
    usage.record("s", "f0", "f0", "", (b"",), 1)
    assert usage.suggestions() == (), "the oldest is forgotten"
    usage.record("s", "f0", "f0", "", (b"",), 7)
    (one,) = usage.suggestions()
    assert (one.subject, one.repeats, one.seconds) == ("f0", 1, 7e-9)


def test_what_is_counted_of_functions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge_host.engine.results.MAX_COUNTED", 2)
    results = ResultCache()
    for name in ("f", "g", "h"):
        results.skipped("s", name)
    assert [line.split()[1] for line in repr(results).splitlines()[1:3]] == ["g", "h"]
    assert results.skips == 3


# -- the property -----------------------------------------------------------------------------------------

PURE: tuple[str, ...] = (
    "def f0(ctx, a): return a, ctx.get_variable('x', None)\n",
    "def f1(ctx, a): return ctx.get_variables(*a)\n",
    "def f2(ctx, a): return [(v.name, v.version) for v in ctx.variables()], list(a)\n",
    "def f3(ctx, a):\n    x = ctx.get_variable('x', 0)\n    return ctx.get_variable('y', -1) if x else a\n",
)
NAMES = st.sampled_from(["x", "y"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("call"), st.integers(0, 3), st.sampled_from([("x",), ("y",), ("x", "y"), ("y", "x")])),
        st.tuples(st.just("set"), NAMES, st.integers(0, 2)),
        st.tuples(st.just("delete"), NAMES, st.none()),
    ),
    max_size=25,
)


@given(steps=STEPS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_with_a_cache_everything_answers_as_without(shared_host: Host, steps: list[tuple[str, Any, Any]]) -> None:
    answers: list[list[Any]] = []
    for cache in (None, "1h"):
        session = shared_host.session()
        for number, source in enumerate(PURE):
            session.function(f"f{number}", source, cache=cache)
        answers.append([])
        for what, one, other in steps:
            if what == "call":
                answers[-1].append(session.call(f"f{one}", other))
            elif what == "set":
                session[one] = other
            elif one in session:
                del session[one]
        shared_host.delete_session(session.id)
    assert answers[0] == answers[1]
