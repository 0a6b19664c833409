"""Effects happen once: commands that run again, kernels and hosts that die in the middle, idempotency keys."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import numpy
import psutil
import pytest

from bridge_host import (
    AsyncHost,
    Breaker,
    BridgeError,
    CircuitOpen,
    Conflict,
    DeadlineExceeded,
    EffectInDoubt,
    Host,
    InvalidValue,
    KernelDied,
    NotFound,
    Overloaded,
    Quarantined,
    QueueFull,
    RemoteError,
    ReplayDiverged,
    current_call,
)
from conftest import KERNELSIDE, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bridge_host import Session


@pytest.fixture
def session(shared_host: Host, tmp_path: Path) -> Iterator[Session]:
    """With `die(n)`, which kills the kernel on each of the first n attempts that come to it."""
    session = shared_host.session(f"once-{tmp_path.name}")
    session["deaths"] = str(tmp_path / "deaths")
    yield session
    shared_host.delete_session(session.id)


DIE = """
def die(ctx, times=1):
    import os, signal
    with open(ctx["deaths"], "a+") as file:
        file.seek(0)
        if len(file.read()) < times:
            file.write("x")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def with_die(session: Session, name: str, source: str) -> None:
    session.function(name, DIE + textwrap.dedent(source))


# -- a kernel dies ---------------------------------------------------------------------


def test_a_tool_is_not_run_again_when_the_command_is(session: Session) -> None:
    paid: list[int] = []

    @session.tool
    def pay(amount: int) -> dict[str, Any]:
        paid.append(amount)
        return {"receipt": len(paid), "rows": numpy.arange(amount)}

    with_die(
        session,
        "order",
        """
        def order(ctx, amount):
            first = ctx.call_tool("pay", amount=amount)
            die(ctx, 2)
            return first["receipt"], first["rows"].sum(), ctx.call_tool("pay", amount=7)["receipt"]
        """,
    )
    assert session.call("order", 3) == (1, 3, 2)
    assert paid == [3, 7]


def test_a_tool_that_runs_while_its_kernel_dies_runs_on_and_answers_the_next_attempt(shared_host: Host) -> None:
    session = shared_host.session("runs-on")
    entered, leave = threading.Event(), threading.Event()
    runs: list[int] = []

    @session.tool
    def slow() -> int:
        runs.append(1)
        entered.set()
        assert leave.wait(30)
        return len(runs)

    session.function("f", "def f(ctx):\n    import os\n    return ctx.call_tool('slow'), os.getpid()\n")
    future = session.submit("f")
    assert entered.wait(30)
    (busy,) = [k for k in shared_host.kernels() if k.in_flight]
    os.kill(busy.pid, signal.SIGKILL)
    eventually(lambda: any(k.in_flight and k.pid != busy.pid for k in shared_host.kernels()), "it runs elsewhere")
    leave.set()
    count, pid = future.result(30)
    assert count == 1
    assert pid != busy.pid


def test_what_a_tool_raised_is_raised_again_without_running_it(session: Session) -> None:
    runs: list[int] = []

    @session.tool
    def fail() -> None:
        runs.append(1)
        raise LookupError("no such order")

    with_die(
        session,
        "f",
        """
        def f(ctx):
            try:
                ctx.call_tool("fail")
            except Exception as exc:
                die(ctx)
                return str(exc)
        """,
    )
    assert "no such order" in session.call("f")
    assert runs == [1]


def test_a_command_that_runs_again_reads_what_it_read_the_first_time(session: Session) -> None:
    session["rate"] = 1.5

    @session.tool
    def change() -> None:
        session["rate"] = 99.0

    with_die(
        session,
        "f",
        """
        def f(ctx):
            before = ctx["rate"], ctx.get_variables("rate", "absent")
            ctx.call_tool("change")
            die(ctx)
            return before, ctx["rate"]
        """,
    )
    assert session.call("f") == ((1.5, {"rate": 1.5}), 99.0)


def test_a_command_that_runs_again_misses_what_it_missed_the_first_time(session: Session) -> None:
    with_die(
        session,
        "f",
        """
        def f(ctx):
            before = ctx.get_variable("missing", 42)
            die(ctx)
            return before
        """,
    )
    assert session.call("f", deadline=60) == 42


def test_a_command_with_more_callbacks_than_the_journal_holds_is_not_run_again_if_it_has_paid(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge_host.engine.journal.MAX_CALLBACKS", 3)
    paid: list[int] = []

    @session.tool
    def pay() -> None:
        paid.append(1)

    with_die(
        session,
        "f",
        """
        def f(ctx):
            for _ in range(5):
                ctx.variables()
            ctx.call_tool("pay")
            die(ctx)
        """,
    )
    with pytest.raises(KernelDied, match="called back too often to be repeated"):
        session.call("f")
    assert paid == [1]


def test_tools_called_from_threads_and_tasks_are_found_again_in_any_order(session: Session) -> None:
    calls: list[int] = []

    @session.tool
    def square(x: int) -> int:
        calls.append(x)
        return x * x

    with_die(
        session,
        "threads",
        """
        def threads(ctx):
            from concurrent.futures import ThreadPoolExecutor
            import random
            xs = list(range(8))
            random.shuffle(xs)
            with ThreadPoolExecutor(4) as pool:
                total = sum(pool.map(lambda x: ctx.call_tool("square", x=x), xs))
            die(ctx)
            return total
        """,
    )
    assert session.call("threads") == sum(x * x for x in range(8))
    assert sorted(calls) == list(range(8))

    with_die(
        session,
        "tasks",
        """
        async def tasks(ctx):
            import asyncio, random
            xs = list(range(8))
            random.shuffle(xs)
            return sum(await asyncio.gather(*[ctx.call_tool("square", x=x) for x in xs]))
        """,
    )
    calls.clear()
    assert session.call("tasks") == sum(x * x for x in range(8))
    assert sorted(calls) == list(range(8))


def test_a_command_that_takes_another_way_after_an_effect_fails_and_both_requests_are_named(session: Session) -> None:
    paid: list[int] = []

    @session.tool
    def pay(amount: int) -> None:
        paid.append(amount)

    source = """
        def f(ctx):
            import os
            ctx["who"] = os.getpid()
            try:
                ctx.call_tool("pay", amount=os.getpid())
            except Exception:
                pass  # it cannot be swallowed
            die(ctx)
        """
    with_die(session, "f", source)
    with pytest.raises(ReplayDiverged, match=rf"was tool pay\(amount={paid[0] if paid else ''}.*was tool pay\(amount="):
        session.call("f")
    assert len(paid) == 1
    assert "who" not in session, "nothing of it is committed"
    Path(session["deaths"]).unlink()

    session.tool(pay, idempotent=True)  # it takes the other's place

    session.call("f")
    assert len(paid) == 3


def test_a_command_that_ends_without_a_call_it_made_before_commits_nothing(session: Session) -> None:
    session.tool(lambda: 1, name="effect")
    with_die(
        session,
        "f",
        """
        def f(ctx):
            import os
            ctx["x"] = 1
            if not os.path.exists(ctx["deaths"]):
                ctx.call_tool("effect")
                die(ctx)
        """,
    )
    with pytest.raises(ReplayDiverged, match="ended without calling that"):
        session.call("f")
    assert "x" not in session


def test_a_stream_that_runs_again_gives_nothing_twice(session: Session) -> None:
    with_die(
        session,
        "count",
        """
        def count(ctx, n):
            for i in range(n):
                yield i
                if i == 25:
                    die(ctx)
            return "end"
        """,
    )
    stream = session.stream("count", 60)
    assert list(stream) == list(range(60))
    assert stream.result == "end"


def test_a_stream_that_yields_something_else_when_it_runs_again_says_so(session: Session) -> None:
    with_die(
        session,
        "pids",
        """
        def pids(ctx):
            import os
            yield os.getpid()
            die(ctx)
            yield 2
        """,
    )
    got = []
    with pytest.raises(ReplayDiverged, match="other values"):
        for value in session.stream("pids"):
            got.append(value)  # noqa: PERF402
    assert len(got) == 1


def test_a_command_that_kills_every_kernel_is_named_and_kept_away_and_the_pool_goes_on(shared_host: Host) -> None:
    session = shared_host.session("poison")
    with pytest.raises(Quarantined, match=r"os\._exit ended 3 kernels"):
        session.call("os._exit", 3)
    (poison,) = shared_host.quarantine
    assert (poison.name, poison.kernels, poison.session) == ("os._exit", 3, "poison")
    pids = {kernel.pid for kernel in shared_host.kernels()}
    with pytest.raises(Quarantined, match="is in quarantine"):
        shared_host.session("another").call("os._exit", 3)
    assert {kernel.pid for kernel in shared_host.kernels() if kernel.pid in pids} == pids, "it touched no kernel again"
    assert session.call("math.sqrt", 4) == 2
    shared_host.quarantine.release("os._exit")
    with pytest.raises(KernelDied, match="exit code 4"):
        session.call("os._exit", 4, retries=0)
    with pytest.raises(NotFound):
        shared_host.quarantine.release("os._exit")


def test_the_neighbours_of_a_poisonous_command_come_through(lonely_host: Host) -> None:
    session = lonely_host.session()
    inside = threading.Barrier(6)

    @session.tool
    def meet() -> None:
        if not inside.broken and inside.n_waiting < 6:
            inside.wait(30)

    session.function("work", "def work(ctx, x):\n    ctx.call_tool('meet')\n    return x\n")
    session.function("poison", "def poison(ctx):\n    import os\n    ctx.call_tool('meet')\n    os._exit(9)\n")
    futures = [session.submit("work", i) for i in range(5)]
    with pytest.raises(Quarantined):
        session.call("poison")
    assert [future.result(60) for future in futures] == list(range(5))


# -- writes are staged -----------------------------------------------------------------


def test_a_command_sees_what_it_wrote_at_once_and_others_when_it_has_succeeded(session: Session) -> None:
    session["x"] = 1
    seen: list[Any] = []

    @session.tool
    def look() -> None:
        seen.append(({name: session[name] for name in session if name != "deaths"}, session.version))

    @session.function
    def f(ctx):  # type: ignore[no-untyped-def]
        version = ctx.set_variable("x", ctx["x"] + 1)
        ctx["y"] = "new"
        ctx.delete_variable("y")
        ctx["z"] = [1]
        ctx.call_tool("look")
        return version, ctx["x"], "y" in ctx, sorted(v.name for v in ctx.variables())

    before = session.version
    assert session.call("f") == (2, 2, False, ["deaths", "x", "z"])
    assert seen == [({"x": 1}, before)]
    assert (session["x"], session["z"], "y" in session) == (2, [1], False)
    assert session.version == before + 1, "one commit"


def test_nothing_of_a_command_that_fails_or_is_cancelled_is_kept(session: Session) -> None:
    session.function("f", "def f(ctx):\n    ctx['x'] = 1\n    raise LookupError\n")
    with pytest.raises(RemoteError):
        session.call("f")
    entered = threading.Event()
    session.tool(entered.set, name="entered")
    session.function(
        "g", "def g(ctx):\n    ctx['x'] = 1\n    ctx.call_tool('entered')\n    import time\n    time.sleep(600)\n"
    )
    future = session.submit("g")
    assert entered.wait(30)
    future.cancel()
    assert session.call("math.sqrt", 4) == 2
    assert "x" not in session


def test_a_command_that_counts_on_a_version_conflicts_instead_of_losing_an_update(session: Session) -> None:
    session["n"] = 0

    @session.tool
    def meddle() -> None:
        session["n"] = 10

    @session.function
    def add(ctx, meddled):  # type: ignore[no-untyped-def]
        (info,) = [v for v in ctx.variables() if v.name == "n"]
        if meddled:
            ctx.call_tool("meddle")
        ctx.set_variable("n", ctx["n"] + 1, if_version=info.version)

    session.call("add", False)
    with pytest.raises(Conflict, match="'n' is at version 3, not 2"):
        session.call("add", True)
    assert session["n"] == 10


def test_a_value_that_does_not_fit_is_refused_where_it_is_written(session: Session) -> None:
    session.define("temperature", float, ge=0, le=2)

    @session.function
    def f(ctx, value):  # type: ignore[no-untyped-def]
        try:
            ctx["temperature"] = value
        except ValueError as exc:
            return type(exc).__name__, "temperature" in str(exc)

    assert session.call("f", 3.5) == ("InvalidValue", True)
    with pytest.raises(InvalidValue):
        session["temperature"] = -1
    session.call("f", 1.5)
    assert session["temperature"] == 1.5


# -- idempotency keys ------------------------------------------------------------------


def test_the_same_key_gives_the_first_result_without_running_again(session: Session) -> None:
    runs: list[int] = []

    @session.tool
    def run() -> int:
        runs.append(1)
        return len(runs)

    session.function("f", "def f(ctx, x):\n    return ctx.call_tool('run'), x\n")
    first = session.call("f", numpy.arange(3), idempotency_key="order-17")
    again = session.call("f", numpy.arange(3), idempotency_key="order-17")
    assert first[0] == again[0] == 1
    assert (again[1] == numpy.arange(3)).all()
    assert session.call("f", numpy.arange(3), idempotency_key="order-18")[0] == 2
    with pytest.raises(Conflict, match="'order-17' was used for another command"):
        session.call("f", numpy.arange(4), idempotency_key="order-17")
    with pytest.raises(ValueError, match="1 to 255"):
        session.call("f", 1, idempotency_key="")


def test_two_callers_with_one_key_run_one_command(session: Session) -> None:
    entered, leave = threading.Event(), threading.Event()
    runs: list[int] = []

    @session.tool
    def run() -> int:
        runs.append(1)
        entered.set()
        assert leave.wait(30)
        return len(runs)

    session.function("f", "def f(ctx):\n    return ctx.call_tool('run')\n")
    futures = [session.submit("f", idempotency_key="k") for _ in range(3)]
    assert entered.wait(30)
    leave.set()
    assert [future.result(30) for future in futures] == [1, 1, 1]


def test_whoever_gives_up_leaves_the_others_with_the_same_key_waiting(session: Session) -> None:
    entered, leave = threading.Event(), threading.Event()

    @session.tool
    def run() -> int:
        entered.set()
        assert leave.wait(30)
        return 1

    session.function("f", "def f(ctx):\n    return ctx.call_tool('run')\n")
    first = session.submit("f", idempotency_key="k")
    assert entered.wait(30)
    second = session.submit("f", idempotency_key="k")
    with pytest.raises(DeadlineExceeded):
        session.call("f", idempotency_key="k", deadline=0.2)
    first.cancel()
    leave.set()
    assert second.result(30) == 1


def test_a_command_with_a_key_that_ran_out_of_time_goes_on_where_it_was(session: Session) -> None:
    paid: list[int] = []

    @session.tool
    def pay() -> int:
        paid.append(1)
        return len(paid)

    session["slow"] = True
    session.function(
        "f",
        "def f(ctx):\n    number = ctx.call_tool('pay')\n    import time\n    time.sleep(600 if ctx['slow'] else 0)\n"
        "    return number\n",
    )
    with pytest.raises(DeadlineExceeded):
        session.call("f", idempotency_key="k", deadline=0.5)
    (interrupted,) = [c for c in session._engine.recovery.interrupted() if c.session == session.id]
    assert interrupted.in_doubt == ()
    # What it read then it reads again: so it is made to read on.
    session.function("f", "def f(ctx):\n    return ctx.call_tool('pay')\n")
    with pytest.raises(Conflict):
        session.call("f", idempotency_key="k")  # another source is another command
    session._engine.recovery.drop(interrupted.id)
    assert session.call("f", idempotency_key="k") == 2


def test_a_command_with_a_key_ends_with_the_last_who_waits_for_it(session: Session) -> None:
    entered = threading.Event()
    session.tool(entered.set, name="entered")
    session.function(
        "f", "def f(ctx):\n    ctx['x'] = 1\n    ctx.call_tool('entered')\n    import time\n    time.sleep(600)\n"
    )
    futures = [session.submit("f", idempotency_key="k") for _ in range(2)]
    assert entered.wait(30)
    for future in futures:
        future.cancel()
    eventually(lambda: session._state.busy == 0, "it was cancelled")
    assert "x" not in session


def test_a_tool_may_wait_for_a_command_that_waits_for_the_place_of_the_tools_own_command() -> None:
    """It has a key, and somebody else sent it."""
    with Host(kernels=1, concurrency=1) as host:
        session = host.session()
        entered, queued = threading.Event(), threading.Event()
        session.function("f", "def f(ctx):\n    return 7\n")
        session.function("outer", "def outer(ctx):\n    return ctx.call_tool('waits')\n")

        @session.tool
        def waits() -> Any:
            entered.set()
            assert queued.wait(30)
            return session.call("f", idempotency_key="k")

        outer = session.submit("outer")
        assert entered.wait(30)
        other = session.submit("f", idempotency_key="k")
        eventually(lambda: host.pool.status().queue == 1, "it waits")
        queued.set()
        assert outer.result(30) == 7
        assert other.result(30) == 7


def test_a_tool_that_sends_its_own_command_again_is_told_so(session: Session) -> None:
    session.tool(lambda: session.call("f", idempotency_key="k"), name="again")
    session.function("f", "def f(ctx):\n    return ctx.call_tool('again')\n")
    with pytest.raises(BridgeError, match="would wait for itself"):
        session.call("f", idempotency_key="k", deadline=30)


def test_the_order_of_named_arguments_does_not_make_another_command(session: Session) -> None:
    session.function("f", "def f(a, b):\n    return a, b\n")
    assert session.call("f", a=1, b=2, idempotency_key="k") == (1, 2)
    assert session.call("f", b=2, a=1, idempotency_key="k") == (1, 2)


def test_a_type_that_was_defined_while_a_command_ran_holds_for_what_it_commits(session: Session) -> None:
    session.tool(lambda: session.define("t", float), name="define")
    session.function("f", "def f(ctx):\n    ctx['t'] = 'text'\n    ctx.call_tool('define')\n")
    with pytest.raises(InvalidValue):
        session.call("f")
    assert "t" not in session


def test_a_command_that_failed_with_a_key_runs_anew(session: Session) -> None:
    session["ok"] = False
    session.function("f", "def f(ctx):\n    if not ctx['ok']:\n        raise LookupError\n    return 'done'\n")
    with pytest.raises(RemoteError):
        session.call("f", idempotency_key="k")
    session["ok"] = True
    assert session.call("f", idempotency_key="k") == "done"


def test_a_command_with_a_key_that_lost_its_kernels_goes_on_where_it_was(session: Session) -> None:
    paid: list[int] = []

    @session.tool
    def pay() -> int:
        paid.append(1)
        return len(paid)

    with_die(session, "f", "def f(ctx):\n    number = ctx.call_tool('pay')\n    die(ctx, 2)\n    return number\n")
    for _ in range(2):
        with pytest.raises(KernelDied):
            session.call("f", idempotency_key="k", retries=0)
    assert [c.subject for c in session._engine.recovery.interrupted() if c.session == session.id] == ["f"]
    assert session.call("f", idempotency_key="k", retries=0) == 1
    assert paid == [1]
    assert not [c for c in session._engine.recovery.interrupted() if c.session == session.id]


def test_a_tool_knows_the_call_it_runs_for(session: Session) -> None:
    calls: list[Any] = []

    @session.tool
    async def awaited() -> None:
        calls.append(current_call())

    @session.tool
    def plain() -> None:
        calls.append(current_call())

    session.function("f", "def f(ctx):\n    ctx.call_tool('plain')\n    ctx.call_tool('awaited')\n")
    session.call("f")
    (one, two) = calls
    assert (one.tool, two.tool, one.session) == ("plain", "awaited", session.id)
    assert one.id != two.id
    assert one.command == two.command


# -- the host dies ---------------------------------------------------------------------

HOST = """
import os, sys, json
from bridge_host import Host, current_call
directory = sys.argv[1]
host = Host(store=directory + "/bridge.db")
session = host.session("shop")

@session.tool
def pay(amount: int) -> int:
    with open(directory + "/effects", "a") as file:
        file.write(json.dumps([current_call().id, amount]) + "\\n")
    return amount * 2

@session.tool
def stuck() -> None:
    print("stuck", flush=True)
    import time
    time.sleep(600)

session["price"] = 21
session.function("order", '''
def order(ctx, last):
    SOURCE
    total = ctx.call_tool("pay", amount=ctx["price"])
    ctx["total"] = total
    return total + ctx.call_tool(last)
''')
session.call("order", sys.argv[2], idempotency_key=sys.argv[3] or None)
"""


def killed_in(directory: Path, tool: str, key: str = "", *, source: str = "pass") -> None:
    """A host that is SIGKILLed while that tool runs; the command begins with `source`."""
    script = directory / "host.py"
    script.write_text(HOST.replace("SOURCE", source))
    host = subprocess.Popen([sys.executable, str(script), str(directory), tool, key], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    with host.stdout:
        assert host.stdout.readline() == "stuck\n"
        host.kill()
    host.wait()


def effects(directory: Path) -> list[Any]:
    return [json.loads(line) for line in (directory / "effects").read_text().splitlines()]


@pytest.fixture
def after_death(tmp_path: Path) -> Iterator[Host]:
    killed_in(tmp_path, "stuck")
    with Host(store=tmp_path / "bridge.db", env={"PYTHONPATH": KERNELSIDE}) as host:
        yield host


def register(session: Session, directory: Path, stuck: Any) -> None:
    @session.tool
    def pay(amount: int) -> int:
        with open(directory / "effects", "a") as file:
            file.write(json.dumps(["again", amount]) + "\n")
        return amount * 2

    session.tool(stuck, name="stuck")


def test_a_command_cut_short_by_its_hosts_death_is_listed_and_goes_on_where_it_was(
    after_death: Host, tmp_path: Path
) -> None:
    host = after_death
    (interrupted,) = host.interrupted()
    assert (interrupted.session, interrupted.subject, interrupted.method) == ("shop", "order", "function.call")
    session = host.session("shop")
    assert session["price"] == 21
    assert "total" not in session, "what it had staged is not there"
    (doubt,) = interrupted.in_doubt
    assert (doubt.tool, doubt.call) == ("stuck", "tool stuck()")
    register(session, tmp_path, lambda: 5)
    with pytest.raises(EffectInDoubt, match=r"while tool stuck\(\) ran"):
        host.resume(interrupted.id)
    with pytest.raises(NotFound, match="no call in doubt"):
        host.resume(interrupted.id, rerun=["nothing"], replies={doubt.id: 8})
    session["price"] = 1000  # what it read then, it reads again
    assert host.resume(interrupted.id, rerun=[doubt.id]) == 47
    assert session["total"] == 42
    assert [amount for _, amount in effects(tmp_path)] == [21], "paid once"
    assert host.interrupted() == []


def test_whoever_looked_may_say_what_a_call_in_doubt_returned(after_death: Host, tmp_path: Path) -> None:
    (interrupted,) = after_death.interrupted()
    session = after_death.session("shop")
    register(session, tmp_path, lambda: pytest.fail("it must not run"))
    assert after_death.resume(interrupted.id, replies={interrupted.in_doubt[0].id: 100}) == 142


def test_a_call_in_doubt_of_a_tool_that_is_idempotent_is_simply_made_again(after_death: Host, tmp_path: Path) -> None:
    (interrupted,) = after_death.interrupted()
    session = after_death.session("shop")
    register(session, tmp_path, lambda: None)
    ids: list[str] = []

    @session.tool(idempotent=True)
    def stuck() -> int:
        call = current_call()
        assert call is not None
        ids.append(call.id)
        return 1

    assert after_death.resume(interrupted.id) == 43
    assert ids == [f"{interrupted.id}:{3}"], "the same call has the same id"


def test_a_command_that_listed_variables_before_it_paid_goes_on_too(tmp_path: Path) -> None:
    killed_in(tmp_path, "stuck", source="ctx.variables(); ctx.tools()")
    with Host(store=tmp_path / "bridge.db") as host:
        session = host.session("shop")
        register(session, tmp_path, lambda: 5)
        (interrupted,) = host.interrupted()
        assert host.resume(interrupted.id, rerun=[interrupted.in_doubt[0].id]) == 47


def test_an_interrupted_command_may_be_dropped(after_death: Host, tmp_path: Path) -> None:
    (interrupted,) = after_death.interrupted()
    after_death.drop(interrupted.id)
    assert after_death.interrupted() == []
    with pytest.raises(NotFound):
        after_death.resume(interrupted.id)
    assert "total" not in after_death.session("shop")


def test_an_interrupted_command_that_is_to_go_on_and_gets_no_kernel_is_still_there(
    after_death: Host, tmp_path: Path
) -> None:
    (interrupted,) = after_death.interrupted()
    register(after_death.session("shop"), tmp_path, lambda: 5)
    (doubt,) = interrupted.in_doubt
    after_death.pool.scale(0)
    with pytest.raises(Overloaded):
        after_death.resume(interrupted.id, rerun=[doubt.id])
    assert after_death.interrupted() == [interrupted]
    after_death.pool.scale(1)
    assert after_death.resume(interrupted.id, rerun=[doubt.id]) == 47
    assert after_death.interrupted() == []
    assert [amount for _, amount in effects(tmp_path)] == [21], "paid once"


def test_to_call_again_with_the_key_of_an_interrupted_command_goes_on_with_it(tmp_path: Path) -> None:
    killed_in(tmp_path, "stuck", "order-1")
    with Host(store=tmp_path / "bridge.db") as host:
        session = host.session("shop")
        register(session, tmp_path, lambda: 5)
        with pytest.raises(EffectInDoubt):
            session.call("order", "stuck", idempotency_key="order-1")
        assert len(host.interrupted()) == 1
        session.tool(lambda: 5, name="stuck", idempotent=True)
        assert session.call("order", "stuck", idempotency_key="order-1") == 47
        assert host.interrupted() == []
    assert [amount for _, amount in effects(tmp_path)] == [21]
    with Host(store=tmp_path / "bridge.db") as host:
        assert host.session("shop").call("order", "stuck", idempotency_key="order-1") == 47, "with no tool at all"


def test_a_host_that_is_closed_while_a_command_runs_lists_it_when_it_is_opened_again(tmp_path: Path) -> None:
    entered = threading.Event()
    host = Host(store=tmp_path / "bridge.db")
    session = host.session("s")
    session.tool(entered.set, name="entered")
    session.function("f", "def f(ctx):\n    ctx.call_tool('entered')\n    import time\n    time.sleep(600)\n")
    session.submit("f")
    assert entered.wait(30)
    host.close()
    with Host(kernels=0, store=tmp_path / "bridge.db") as host:
        assert [command.subject for command in host.interrupted()] == ["f"]


def test_of_a_command_that_has_secrets_no_argument_of_a_call_in_doubt_is_shown(tmp_path: Path) -> None:
    entered = threading.Event()
    host = Host(store=tmp_path / "bridge.db")
    session = host.session("s")
    session.secrets["TOKEN"] = "sk-planted"

    @session.tool
    async def pay(token: str) -> None:
        entered.set()
        await anyio.sleep_forever()

    session.function("f", "def f(ctx):\n    ctx.call_tool('pay', token=ctx.secret('TOKEN'))\n", secrets=["TOKEN"])
    session.submit("f")
    assert entered.wait(30)
    host.close()
    with Host(kernels=0, store=tmp_path / "bridge.db") as host:
        (interrupted,) = host.interrupted()
        assert [doubt.call for doubt in interrupted.in_doubt] == ["tool pay(…)"]
        with pytest.raises(EffectInDoubt) as caught:
            host.resume(interrupted.id)
        assert "tool pay(…)" in str(caught.value)
        assert "planted" not in str(caught.value)


async def _nested(directory: Path) -> Any:
    async with AsyncHost(store=directory / "bridge.db") as host:
        session = host.session("s")
        session.function("inner", "def inner(ctx, x):\n    ctx['inner'] = x\n    return x + 1\n")

        @session.tool
        async def nested(x: int) -> Any:
            return await session.call("inner", x)

        session.function(
            "outer", "def outer(ctx):\n    ctx['outer'] = ctx.call_tool('nested', x=1)\n    return ctx['outer']\n"
        )
        result = await session.call("outer")
        return result, session["inner"], session["outer"], [c.begun.subject for c in host.journal("s")]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_commands_within_tools_within_commands_are_journaled_each(tmp_path: Path) -> None:
    assert await _nested(tmp_path) == (2, 1, 2, ["outer", "inner"])


# -- whatever ends a kernel ------------------------------------------------------------


@pytest.fixture
def watched() -> Iterator[Host]:
    """Two kernels that may be silent for 4 s."""
    with Host(kernels=2, heartbeat=4.0, env={"PYTHONPATH": KERNELSIDE}) as host:
        yield host


def paying(session: Session) -> list[int]:
    paid: list[int] = []

    @session.tool
    def pay() -> int:
        paid.append(1)
        return len(paid)

    return paid


ENDS = {
    "a kernel that is stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "a kernel whose sockets are cut": "__import__('sabotage').cut()",
    "a segmentation fault": "__import__('ctypes').string_at(0)",
    "a kernel that ends itself": "os._exit(0)",
    "a kernel that is out of memory, as the system sees it": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_whatever_ends_a_kernel_the_command_goes_on_elsewhere_and_pays_once(
    watched: Host, end: str, tmp_path: Path
) -> None:
    session = watched.session("s")
    session["flag"] = str(tmp_path / "flag")
    paid = paying(session)
    session.function(
        "f",
        "def f(ctx):\n    import os, signal, time\n    number = ctx.call_tool('pay')\n    ctx['number'] = number\n"
        f"    if not os.path.exists(ctx['flag']):\n        open(ctx['flag'], 'w').close()\n        {end}\n"
        "        time.sleep(600)\n"
        "    return number, os.getpid()\n",
    )
    before = {kernel.pid for kernel in watched.kernels()}
    number, pid = session.call("f")
    assert (number, paid, session["number"]) == (1, [1], 1)
    eventually(lambda: watched.telemetry.events("bridge", "kernel", "stop"), "its end is told")
    (stop,) = watched.telemetry.events("bridge", "kernel", "stop")
    assert stop.metadata["pid"] in before - {pid}, "the one that was lost is not the one that answered"
    eventually(lambda: len([k for k in watched.kernels() if k.state == "ready"]) == 2, "another took its place")
    lost = stop.metadata["pid"]
    assert isinstance(lost, int)
    eventually(lambda: not psutil.pid_exists(lost), "nothing is left of the lost one")


def test_late_words_of_a_kernel_that_was_given_up_change_nothing(watched: Host, tmp_path: Path) -> None:
    session = watched.session("s")
    session["flag"] = str(tmp_path / "flag")
    told: list[str] = []

    @session.tool
    def tell(what: str) -> None:
        told.append(what)

    # The first attempt goes on after its connection was cut: what it says then is nobody's.
    session.function(
        "f",
        """
        def f(ctx):
            import os
            first = not os.path.exists(ctx["flag"])
            if first:
                open(ctx["flag"], "w").close()
                __import__("sabotage").cut()
                ctx["x"] = "late"
                ctx.call_tool("tell", what="late")
                return "late"
            ctx["x"] = "in time"
            ctx.call_tool("tell", what="in time")
            return "in time"
        """,
    )
    assert session.call("f") == "in time"
    assert told == ["in time"]
    assert session["x"] == "in time"


def test_a_pool_is_looked_at_and_steered_from_the_host(lonely_host: Host) -> None:
    host = lonely_host
    session = host.session()
    host.pool.scale(3)
    status = host.pool.status()
    assert [kernel.state for kernel in status.kernels] == ["ready"] * 3
    assert "3 kernels wanted" in repr(host.pool)
    assert "<table" in host.pool._repr_html_()
    old = {kernel.id for kernel in host.kernels()}
    entered, leave = threading.Event(), threading.Event()

    @session.tool
    def wait() -> str:
        entered.set()
        assert leave.wait(30)
        return "finished"

    session.function("f", "def f(ctx):\n    return ctx.call_tool('wait')\n")
    future = session.submit("f", retries=0)
    assert entered.wait(30)
    (busy,) = [kernel.id for kernel in host.kernels() if kernel.in_flight]
    draining = threading.Thread(target=host.pool.drain, args=(busy,))
    draining.start()
    eventually(lambda: [k.state for k in host.kernels() if k.id == busy] == ["draining"], "it takes no more")
    leave.set()
    assert future.result(30) == "finished", "what ran there was not cut short"
    draining.join(30)
    assert busy not in {kernel.id for kernel in host.kernels()}
    host.pool.restart()
    eventually(lambda: len([k for k in host.kernels() if k.state == "ready"]) == 3, "all are new")
    assert not old & {kernel.id for kernel in host.kernels()}
    host.pool.scale(1)
    eventually(lambda: len(host.kernels()) == 1, "the others are gone")
    assert session.call("math.sqrt", 4) == 2
    with pytest.raises(NotFound):
        host.pool.drain("nothing like it")


def test_a_flood_of_one_session_is_refused_in_time_and_holds_up_no_other() -> None:
    with Host(kernels=1, concurrency=2, queue=20) as host:
        flood, other = host.session("flood"), host.session("other")
        leave = threading.Event()
        flood.tool(lambda: leave.wait(60), name="wait")
        flood.function("f", "def f(ctx):\n    return ctx.call_tool('wait')\n")
        futures = [flood.submit("f") for _ in range(40)]
        # Two run, and one session may wait with as many as there are places left.
        eventually(lambda: sum(future.done() for future in futures) == 40 - 2 - 10, "the rest is refused at once")
        refused = [future for future in futures if future.done()]
        for future in refused:
            with pytest.raises(QueueFull, match=r"10 commands wait .* not known yet"):
                future.result()
        waiting = other.submit("math.sqrt", 4)
        futures[5].cancel()
        leave.set()
        assert waiting.result(30) == 2
        done = [future for future in futures if future not in refused and future is not futures[5]]
        assert all(future.result(30) is True for future in done)


def test_a_command_that_hangs_its_kernels_again_and_again_is_held_back_for_a_while() -> None:
    with Host(kernels=1, breaker=Breaker(kernel_failures=2, command_failures=2, cooldown_s=60.0)) as host:
        session = host.session()
        for _ in range(2):
            with pytest.raises(KernelDied):
                session.call("os._exit", 1, retries=0)
        with pytest.raises(CircuitOpen, match=r"\d s"):
            session.call("os._exit", 1, retries=0)
        assert session.call("math.sqrt", 4) == 2, "the others run"
        assert host.telemetry.events("bridge", "pool", "breaker")


def test_a_command_with_a_key_that_is_held_back_when_its_kernel_has_died_goes_on_later_where_it_was(
    tmp_path: Path,
) -> None:
    """Nor does it end when it is held back once more: only its code's own answer ends it."""
    with Host(kernels=1, breaker=Breaker(kernel_failures=1, command_failures=1, cooldown_s=0.5)) as host:
        session = host.session()
        session["deaths"] = str(tmp_path / "deaths")
        paid: list[int] = []

        @session.tool
        def pay() -> int:
            paid.append(1)
            return len(paid)

        with_die(session, "order", "def order(ctx):\n    paid = ctx.call_tool('pay')\n    die(ctx)\n    return paid\n")
        for _ in range(2):
            with pytest.raises(CircuitOpen):
                session.call("order", idempotency_key="once")
        assert [command.attempts for command in host.interrupted()] == [1]

        def let_through() -> bool:
            try:
                return bool(session.call("order", idempotency_key="once") == 1)
            except CircuitOpen:
                return False

        eventually(let_through, "it goes on")
        assert paid == [1]
        assert host.interrupted() == []
