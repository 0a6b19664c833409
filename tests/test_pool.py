"""The pool: who waits and in which order, which kernel a command goes to, and what becomes of kernels that fail it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import json
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge_host.display import table
from bridge_host.pool import orphans
from bridge_host.pool.admission import FairQueue
from bridge_host.pool.breaker import Breaker, Change, Circuits
from bridge_host.pool.heartbeat import Pulse
from bridge_host.pool.load import Kinds, Load
from bridge_host.pool.outcomes import outcome_of
from bridge_host.pool.pool import Pool, PoolOptions, Recycle
from bridge_host.pool.process import RuntimeDirectory
from bridge_host.pool.routing import Ask, Fastest, LeastLoaded, Pinned, Random, routing_named
from bridge_host.tasks import Tasks
from bridge_host.telemetry import Telemetry
from bridge_kernel.contract.catalogue import problem
from bridge_kernel.contract.errors import (
    BridgeError,
    CircuitOpen,
    HostClosed,
    KernelDied,
    KernelStartFailed,
    NotFound,
    Overloaded,
    QueueFull,
)
from bridge_kernel.contract.methods import FunctionCall, PathFunction
from conftest import KERNELSIDE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from bridge_host.pool.dispatch import Lease
    from bridge_host.pool.kernel import Kernel
    from bridge_host.pool.outcomes import Outcome


# -- the queue ---------------------------------------------------------------------


def drained(queue: FairQueue[Any]) -> list[Any]:
    return [queue.pop() for _ in range(len(queue))]


def test_sessions_take_turns_and_each_is_served_in_its_own_order() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.put(item[0], item, wait_s=0)
    assert drained(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    with pytest.raises(IndexError):
        queue.pop()


def test_a_session_that_floods_leaves_room_for_the_next() -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue(100)
    taken = dict.fromkeys("abc", 0)
    for session in taken:
        with contextlib.suppress(QueueFull):
            for number in range(1000):
                queue.put(session, (session, number), wait_s=0)
                taken[session] += 1
    assert taken == {"a": 50, "b": 25, "c": 13}
    assert [queue.pop()[0] for _ in range(6)] == list("abcabc")


def test_a_full_queue_says_how_many_wait_and_how_long_it_would_take() -> None:
    queue: FairQueue[int] = FairQueue(2)
    queue.put("a", 1, wait_s=0)
    with pytest.raises(QueueFull, match=r"1 commands wait for a kernel.*about 12\.5 s"):
        queue.put("a", 2, wait_s=12.5)
    queue.put("b", 3, wait_s=0)
    with pytest.raises(QueueFull, match="2 commands wait"):
        queue.put("c", 4, wait_s=0)
    with pytest.raises(QueueFull, match="how long the wait would be is not known yet"):
        queue.put("c", 4, wait_s=None)


def test_what_is_cancelled_leaves_from_the_middle_and_makes_room() -> None:
    queue: FairQueue[int] = FairQueue(6)
    for number in (1, 2, 3):
        queue.put("a", number, wait_s=0)
    queue.remove("a", 2)
    queue.remove("a", 2)
    queue.remove("nobody", 2)
    queue.put("a", 4, wait_s=0)
    assert (len(queue), queue.waiting("a"), queue.waiting("b")) == (3, 3, 0)
    assert drained(queue) == [1, 3, 4]
    assert queue.waiting("a") == 0


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["put", "pop", "remove"]))), st.integers(0, 20))
def test_the_queue_never_passes_its_bound_and_keeps_each_sessions_order(
    steps: list[tuple[str, str]], bound: int
) -> None:
    queue: FairQueue[int] = FairQueue(bound)
    model: dict[str, list[int]] = {name: [] for name in "abcd"}
    for number, (session, step) in enumerate(steps):
        if step == "put":
            free = bound - sum(map(len, model.values()))
            try:
                queue.put(session, number, wait_s=0)
            except QueueFull:
                assert len(model[session]) >= free
            else:
                assert len(model[session]) < free
                model[session].append(number)
        elif step == "remove" and model[session]:
            queue.remove(session, model[session].pop(len(model[session]) // 2))
        elif step == "pop" and len(queue):
            popped = queue.pop()
            assert popped in [items[0] for items in model.values() if items]
            for items in model.values():
                if popped in items:
                    items.remove(popped)
        assert len(queue) == sum(map(len, model.values())) <= bound


# -- routing -----------------------------------------------------------------------


class Place:
    """A kernel as a strategy sees it."""

    def __init__(self, id: str, in_flight: int = 0, last_used: int = 0) -> None:
        self.id = id
        self.in_flight = in_flight
        self.last_used = last_used
        self.load = Load(Kinds())


ASK = Ask("session", "f")


def test_the_fastest_is_where_the_command_took_least_and_the_unknown_is_tried() -> None:
    a, b = Place("a", last_used=2), Place("b", last_used=1)
    routing = Fastest(clock=lambda: 0.0)
    for seconds in (9.0, 1.0, 1.0):
        a.load.record("f", seconds, 0.0)
    assert routing.choose(ASK, [a, b]) is b, "unknown is worth a try"
    for seconds in (9.0, 2.0, 2.0):
        b.load.record("f", seconds, 0.0)
    assert routing.choose(ASK, [a, b]) is a
    for _ in range(3):
        a.load.begin("f", 0.0)
    assert routing.choose(ASK, [a, b]) is b, "three seconds of others' work are ahead there"


def test_a_first_run_that_paid_for_imports_does_not_count_and_what_is_stale_is_tried_again() -> None:
    slow, good = Place("slow", last_used=1), Place("good", last_used=2)
    now = [0.0]
    routing = Fastest(clock=lambda: now[0])
    slow.load.record("f", 30.0, 0.0)
    assert slow.load.of("f", 0.0) == 0
    for place, seconds in ((slow, 2.0), (good, 1.0), (good, 1.0)):
        place.load.record("f", seconds, 0.0)
    assert routing.choose(ASK, [slow, good]) is good
    now[0] = 3600.0
    good.load.record("f", 1.0, 3600.0)
    assert routing.choose(ASK, [slow, good]) is slow
    trial = slow.load.begin("f", now[0])
    assert routing.choose(ASK, [slow, good]) is good, "one tries, the others wait for what comes of it"
    now[0] += 0.5
    slow.load.end(trial, now[0], typical=True)
    assert slow.load.of("f", now[0]) == 0.5, "what was before it is forgotten"
    assert routing.choose(ASK, [slow, good]) is slow


def test_where_nothing_is_known_the_fastest_is_the_least_loaded() -> None:
    places = [Place("a", 2, 1), Place("b", 1, 3), Place("c", 1, 2)]
    assert Fastest(clock=lambda: 0.0).choose(ASK, places).id == "c"
    assert LeastLoaded().choose(ASK, places).id == "c"


def test_a_pinned_session_stays_until_its_kernel_is_gone_and_random_uses_them_all() -> None:
    a, b = Place("a", last_used=1), Place("b", last_used=2)
    pinned = Pinned()
    assert pinned.choose(Ask("s", "f"), [a, b]) is a
    a.in_flight = 50
    assert pinned.choose(Ask("s", "g"), [a, b]) is a
    assert pinned.choose(Ask("t", "g"), [a, b]) is b
    assert pinned.choose(Ask("s", "g"), [b]) is b
    assert pinned.choose(Ask("s", "g"), [a, b]) is b
    anywhere = Random(random.Random(1))
    assert {anywhere.choose(ASK, [a, b]).id for _ in range(50)} == {"a", "b"}


def test_an_unknown_routing_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"'fastest', 'least_loaded', 'random' or 'pinned'.*'quickest'"):
        routing_named("quickest")
    mine = Pinned()
    assert routing_named(mine) is mine


def test_what_is_known_of_commands_is_bounded() -> None:
    kinds = Kinds()
    load = Load(kinds)
    for number in range(5_000):
        for _ in range(3):
            load.record(f"f{number}", 1.0, 0.0)
    assert len(load) == len(kinds) == 4096


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"queue": -1}, "queue"),
        ({"spares": -1}, "spares"),
        ({"heartbeat": 0}, "heartbeat"),
        ({"routing": "nearest"}, "nearest"),
        ({"heartbeat": None, "recycle": Recycle(rss_bytes=1)}, "rss_bytes"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_at_once(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PoolOptions(**options)
    with pytest.raises(ValueError, match="age_s"):
        Recycle(age_s=-1)
    with pytest.raises(ValueError, match="failures"):
        Breaker(kernel_failures=0)
    with pytest.raises(ValueError, match="error_rate is a share, more than 0 and at most 1, or None for any rate"):
        Breaker(error_rate=1.5)
    with pytest.raises(ValueError, match="error_window is a whole number, 1 to 1000"):
        Breaker(error_window=1001)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: PoolOptions(recycle=3), r"recycle is a Recycle\(commands=…, .*\) or None, not 3"),  # type: ignore[arg-type]
        (lambda: PoolOptions(breaker=3), r"breaker is a Breaker\(kernel_failures=…, .*\), not 3"),  # type: ignore[arg-type]
        (lambda: PoolOptions(heartbeat="x"), "heartbeat is in seconds, more than 0, or None for no heartbeat, not 'x'"),  # type: ignore[arg-type]
        (lambda: PoolOptions(queue=True), "queue is a whole number, 0 or more, not True"),
        (lambda: PoolOptions(concurrency=2.0), "concurrency is a whole number, 1 or more, not 2.0"),  # type: ignore[arg-type]
        (lambda: PoolOptions(clock=5), "clock is a function that returns seconds, not 5"),  # type: ignore[arg-type]
        (lambda: Recycle(commands="9"), "recycle: commands is a whole number, 1 or more, not '9'"),  # type: ignore[arg-type]
        (lambda: Recycle(age_s=True), "recycle: age_s is in seconds"),
        (lambda: Recycle(errors=1), "recycle: errors is True or False, not 1"),  # type: ignore[arg-type]
        (lambda: Breaker(error_rate="0.5"), "breaker: error_rate is a share, .*, not '0.5'"),  # type: ignore[arg-type]
        (lambda: Breaker(kernel_failures=1.5), "breaker: kernel_failures is a whole number"),  # type: ignore[arg-type]
        (lambda: Breaker(cooldown_s="1"), "breaker: cooldown_s is in seconds, more than 0 and at most 300, not '1'"),  # type: ignore[arg-type]
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_of_another_type_is_refused_by_its_name_and_says_what_it_takes(
    make: Callable[[], object], complaint: str
) -> None:
    with pytest.raises(TypeError, match=complaint):
        make()


def test_a_number_that_is_none_or_has_no_end_is_refused() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="age_s"):
            Recycle(age_s=value)
        with pytest.raises(ValueError, match="heartbeat"):
            PoolOptions(heartbeat=value)
        with pytest.raises(ValueError, match="cooldown_s"):
            Breaker(cooldown_s=value)


# -- what people look at -----------------------------------------------------------


def test_a_cell_or_a_title_with_newlines_or_control_characters_stays_in_its_row() -> None:
    rows = [["a\nb", "\x1b[31mred\r\x00"], ["[bold]é\\[/bold] :smile:", "\u2028\u202e\ud800"]]
    title, head, *drawn = table(["na\nme", "value"], rows, title="one\ntwo").splitlines()
    assert title == r"one\ntwo"
    assert head.split() == [r"na\nme", "value"]
    assert [line.split("  ")[0] for line in drawn] == [r"a\nb", "[bold]é\\[/bold] :smile:"]
    assert drawn[0].endswith(r"\x1b[31mred\r\x00")
    assert drawn[1].endswith(r"\u2028\u202e\ud800")
    shown = table(["name", "value"], [["a\n<b>", "\x00"]], html=True, title="one\ntwo<")
    assert r">a\n&lt;b&gt;<" in shown
    assert r">\x00<" in shown
    assert r"<caption>one\ntwo&lt;</caption>" in shown


@pytest.mark.parametrize("html", [False, True])
def test_a_long_cell_is_shortened(html: bool) -> None:
    drawn = table(["value"], [["x" * 80], ["y" * 81], ["\n" * 100_000]], html=html)
    assert "x" * 80 in drawn
    assert "y" * 79 + "…" in drawn
    assert "y" * 80 not in drawn
    assert drawn.count(r"\n") == 39


# -- circuits ----------------------------------------------------------------------


class Circus:
    """Circuits and a clock that stands still."""

    def __init__(self) -> None:
        self.now = 0.0
        self.circuits = Circuits(Breaker(kernel_failures=3, command_failures=5, cooldown_s=10.0), lambda: self.now)

    def run(self, kernel: str, outcome: Outcome, command: str = "f") -> list[Change]:
        probe = self.circuits.begin(kernel, command)
        return self.circuits.end(kernel, command, outcome, probe=probe)


def test_three_failures_in_a_row_open_the_circuit_of_a_kernel_and_success_closes_it() -> None:
    circus = Circus()
    assert not circus.circuits.known
    for outcome in ("timeout", "timeout", "error", "timeout", "timeout"):
        assert not circus.run("k", outcome)
        assert circus.circuits.admits("k", "f"), "an error of the user's own is a sign of life"
    assert circus.run("k", "timeout") == [Change(True, "f", "k", 3, 10.0, "timeout")]
    assert not circus.circuits.admits("k", "f")
    assert circus.circuits.admits("other", "f")
    assert circus.circuits.admits("k", "g")
    circus.now = 10.0
    assert circus.circuits.admits("k", "f")
    assert circus.run("k", "ok") == [Change(False, "f", "k", 3, 0.0, "ok")]
    assert not circus.circuits.known


def test_five_failures_over_all_kernels_hold_the_command_back_and_one_probe_decides() -> None:
    circus = Circus()
    for number in range(4):
        assert not circus.run(f"k{number}", "died")
    circus.circuits.require("f")
    assert circus.run("k4", "died") == [Change(True, "f", "", 5, 10.0, "died")]
    circus.now = 4.0
    with pytest.raises(CircuitOpen, match="6 s more"):
        circus.circuits.require("f")
    circus.circuits.require("g")
    circus.now = 10.0
    circus.circuits.require("f")
    assert circus.circuits.begin("k5", "f")
    with pytest.raises(CircuitOpen, match="one is tried"):
        circus.circuits.require("f")
    assert circus.circuits.end("k5", "f", "cancelled", probe=True) == []
    circus.circuits.require("f")
    assert circus.run("k5", "died") == [Change(True, "f", "", 6, 20.0, "died")]
    for _ in range(20):
        circus.now += 1000.0
        (change,) = circus.run(f"at {circus.now}", "died")
    assert change.cooldown_s == 300.0, "doubled, up to five minutes"
    circus.now += 300.0
    assert circus.run("k9", "error") == [Change(False, "f", "", 26, 0.0, "error")]


def test_one_death_is_one_failure_however_many_calls_were_in_flight() -> None:
    circus = Circus()
    for _ in range(64):
        assert not circus.run("k", "died")
    circus.circuits.require("f")
    for _ in range(64):
        assert not circus.run("k", "cancelled")


def test_the_circuits_are_bounded_and_a_kernels_go_with_it() -> None:
    circus = Circus()
    for number in range(3000):
        circus.run("k", "timeout", f"f{number}")
    assert len(circus.circuits) == 4096
    circus.circuits.forget("k")
    assert len(circus.circuits) < 3000


# -- silence -----------------------------------------------------------------------


def test_a_kernel_is_asked_then_avoided_then_given_up_and_one_word_clears_it() -> None:
    pulse = Pulse(8.0)
    assert [pulse.tick(1.0, 0) for _ in range(8)] == [
        *("heard", "ask", "ask", "unresponsive", "unresponsive", "unresponsive", "unresponsive", "gone")
    ]
    assert pulse.tick(100.0, 1) == "heard"
    assert pulse.tick(1.0, 1) == "heard"


# -- real kernels --------------------------------------------------------------------


class Nobody:
    """A listener that has nothing to say."""

    def on_callback(self, *args: Any) -> None: ...
    def on_notification(self, *args: Any) -> None: ...
    def on_output(self, *args: Any) -> None: ...
    def on_display(self, *args: Any) -> None: ...


class Rig:
    """A pool, and commands through it."""

    def __init__(self, **options: Any) -> None:
        self.telemetry = Telemetry()
        self.tasks = Tasks()
        self.pool = Pool(
            self.tasks,
            self.telemetry,
            Nobody(),
            kernel_name=options.pop("kernel_name", "bridge"),
            arguments=options.pop("arguments", ()),
            env={"PYTHONPATH": KERNELSIDE},
            options=PoolOptions(**options),
        )

    async def place(self, session: str = "s", command: str = "f", **ask: Any) -> Lease:
        asked = Ask(session, command, **ask)
        return self.pool.take(asked) or await self.pool.acquire(asked)

    async def call(self, path: str, *args: Any, session: str = "s", **ask: Any) -> Any:
        return await self.run(await self.place(session, path, **ask), path, *args)

    async def run(self, lease: Lease, path: str, *args: Any) -> Any:
        """Run a command in that place, and give it back."""
        outcome: Outcome = "cancelled"
        try:
            _, future = lease.client.request("function.call", FunctionCall(function=PathFunction(path), args=args))
            reply = await future
            outcome = "ok"
            return json.loads(bytes(reply.result))["value"]
        except BridgeError as exc:
            outcome = "died" if exc is lease.client.closed else outcome_of(exc)
            raise
        finally:
            self.pool.release(lease, outcome)

    def events(self, *name: str) -> list[dict[str, Any]]:
        return [{**event.measurements, **event.metadata} for event in self.telemetry.events("bridge", *name)]

    @property
    def states(self) -> list[str]:
        return [kernel.state for kernel in self.pool.status().kernels]


@contextlib.asynccontextmanager
async def rig(kernels: int = 1, **options: Any) -> AsyncIterator[Rig]:
    made = Rig(**options)
    try:
        await made.pool.start(kernels)
        yield made
    finally:
        made.pool.refuse()
        await made.tasks.close()
        await made.pool.close()
    assert [wrong for event in made.telemetry.events("bridge") if (wrong := problem(event))] == []


def asynchronous(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    def run(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**fixtures), 60))

    run.__name__ = test.__name__
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


async def until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
    """Wait for what other processes do; the condition decides, not the clock."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def only(made: Rig) -> Kernel:
    (kernel,) = made.pool.kernels
    return kernel


# -- places


@asynchronous
async def test_commands_beyond_the_concurrency_wait_their_turn_and_sessions_alternate() -> None:
    async with rig(concurrency=2, queue=20) as made:
        holders = [await made.place(), await made.place()]
        assert made.pool.take(Ask("a", "f")) is None
        got: list[str] = []

        async def wait(session: str) -> None:
            lease = await made.place(session)
            got.append(session)
            made.pool.release(lease, "ok")

        waiting = [asyncio.ensure_future(wait(session)) for session in "aaabbc"]
        await until(lambda: made.pool.status().queue == 6, "all wait")
        nested = made.pool.take(Ask("a", "g", nested=True))
        assert nested is not None, "a tool's command never waits: its outer command holds a place"
        made.pool.release(nested, "ok")
        made.pool.release(holders[0], "ok")
        await asyncio.gather(*waiting)
        assert got == list("abcaba")
        assert made.events("pool", "route")[-1]["queue"] > 0
        made.pool.release(holders[1], "ok")
        assert only(made).in_flight == only(made).running == 0


@asynchronous
async def test_a_full_queue_refuses_at_once_and_a_cancelled_command_makes_room() -> None:
    async with rig(concurrency=1, queue=2) as made:
        holder = await made.place()
        waiting = asyncio.ensure_future(made.place("a"))
        await until(lambda: made.pool.status().queue == 1, "it waits")
        with pytest.raises(QueueFull, match=r"1 commands wait.* not known yet"):  # no command has ended
            await made.place("a")
        (event,) = made.events("pool", "queue", "reject")
        assert (event["session"], event["waiting"]) == ("a", 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert made.pool.status().queue == 0
        late = asyncio.ensure_future(made.place("a"))
        await until(lambda: made.pool.status().queue == 1, "there is room again")
        made.pool.release(holder, "ok")  # the place is given and its owner cancelled in the same breath
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        assert only(made).in_flight == 0
        made.pool.release(await made.place(), "ok")


@asynchronous
async def test_a_command_that_is_to_be_alone_waits_for_an_idle_kernel_and_keeps_others_off() -> None:
    async with rig() as made:
        first, second = await made.place(), await made.place()
        alone = asyncio.ensure_future(made.place(command="poison", alone=True))
        await until(lambda: made.pool.status().queue == 1, "it waits")
        assert made.pool.take(Ask("s", "f")) is None, "nothing more is sent there"
        other = asyncio.ensure_future(made.place("other"))
        nested = made.pool.take(Ask("s", "g", nested=True))
        assert nested is not None, "the outer command would wait for ever"
        for lease in (first, second):
            made.pool.release(lease, "ok")
        assert not alone.done()
        made.pool.release(nested, "ok")
        lease = await alone
        await asyncio.sleep(0)
        assert not other.done()
        assert (lease.kernel.in_flight, lease.alone) == (1, True)
        made.pool.release(lease, "ok")
        made.pool.release(await other, "ok")
        await made.place()
        gone_soon = asyncio.ensure_future(made.place(alone=True))
        await until(lambda: made.pool.status().queue == 1, "it waits")
        gone_soon.cancel()
        await asyncio.wait([gone_soon])
        plain = made.pool.take(Ask("s", "f"))
        assert plain is not None, "the kernel is not kept for one that has gone"


@asynchronous
async def test_a_command_keeps_off_the_kernels_it_should_avoid_if_there_is_another() -> None:
    async with rig(2) as made:
        a, b = (kernel.id for kernel in made.pool.kernels)
        for _ in range(4):
            lease = await made.place(avoid=frozenset({a}))
            assert lease.kernel.id == b
            made.pool.release(lease, "ok")
        made.pool.release(await made.place(avoid=frozenset({a, b})), "ok")
        lonely = await made.place(avoid=frozenset({b}), alone=True)
        assert lonely.kernel.id == a
        others = [await made.place() for _ in range(3)]
        assert {lease.kernel.id for lease in others} == {b}


@asynchronous
async def test_a_command_that_keeps_timing_out_is_held_back_and_says_for_how_long() -> None:
    async with rig(2, breaker=Breaker(kernel_failures=2, command_failures=3)) as made:
        for _ in range(2):
            lease = await made.place(avoid=frozenset({made.pool.kernels[1].id}))
            made.pool.release(lease, "timeout")
        for _ in range(3):
            lease = await made.place()
            assert lease.kernel is made.pool.kernels[1], "it is sent elsewhere"
            made.pool.release(lease, "cancelled")
        made.pool.release(await made.place(), "timeout")
        with pytest.raises(CircuitOpen, match=r"held back for \d"):
            await made.place()
        made.pool.release(await made.place(command="another"), "ok")
        opened = made.events("pool", "breaker", "open")
        assert [(event["kernel"] != "", event["reason"]) for event in opened] == [(True, "timeout"), (False, "timeout")]


@asynchronous
async def test_a_pool_without_kernels_says_so_and_one_that_closes_tells_those_that_wait() -> None:
    async with rig(0) as made:
        with pytest.raises(Overloaded, match="no kernels"):
            await made.place()
    async with rig(1, concurrency=1) as made:
        await made.place()
        waiting = [asyncio.ensure_future(made.place(alone=alone)) for alone in (False, True)]
        await until(lambda: made.pool.status().queue == 2, "they wait")
        made.pool.refuse()
        for one in waiting:
            with pytest.raises(HostClosed):
                await one
        with pytest.raises(HostClosed):
            made.pool.take(Ask("s", "f"))


# -- kernels that fail


@asynchronous
async def test_a_kernel_that_is_killed_fails_its_commands_and_is_replaced() -> None:
    async with rig() as made:
        before = only(made)
        with pytest.raises(KernelDied, match=rf"\(pid {before.pid}\) ended with exit code -9, 1 in flight") as caught:
            await made.call("sabotage.die")
        assert before.client is not None
        assert caught.value is before.client.closed
        assert before.in_flight == 0
        assert await made.call("math.sqrt", 4) == 2
        after = only(made)
        assert (after.pid != before.pid, after.deaths) == (True, 1)
        assert made.pool.status().restarts == 1
        (stop,) = made.events("kernel", "stop")
        assert (stop["reason"], stop["exit_code"], stop["lost"], stop["expected"]) == ("exit", -9, 1, False)


@asynchronous
async def test_a_kernel_that_ends_by_itself_is_reported_with_its_exit_code_not_as_a_cut_connection() -> None:
    async with rig() as made:
        with pytest.raises(KernelDied, match="ended with exit code 7"):
            await made.call("sabotage.leave", 7)


@asynchronous
async def test_a_kernel_whose_connections_were_cut_is_given_up_and_replaced() -> None:
    async with rig() as made:
        before = only(made)
        with pytest.raises(KernelDied, match=rf"the connection to kernel .{{4}} \(pid {before.pid}\) was cut"):
            await made.call("sabotage.cut")
        assert await made.call("math.sqrt", 4) == 2
        await until(lambda: gone(before.pid), "the cut kernel was killed")
        await until(lambda: made.events("kernel", "stop"), "its end is told")
        assert made.events("kernel", "stop")[0]["reason"] == "cut"


@asynchronous
async def test_a_stopped_kernel_is_not_chosen_then_killed_and_its_commands_fail() -> None:
    async with rig(2, heartbeat=4.0, routing="least_loaded") as made:
        stopped, other = made.pool.kernels
        lost = asyncio.ensure_future(made.run(await made.place(avoid=frozenset({other.id})), "time.sleep", 600))
        os.kill(stopped.pid, signal.SIGSTOP)
        await until(lambda: stopped.state == "unresponsive", "its silence is noticed")
        for _ in range(3):
            assert (await made.place()).kernel is other
        with pytest.raises(KernelDied, match=r"did not answer for \d.* s: it hangs or is stopped"):
            await lost
        await until(lambda: gone(stopped.pid), "it was killed")
        await until(lambda: made.states == ["ready", "ready"], "it was replaced")
        assert made.events("kernel", "unresponsive")[0]["kernel"] == stopped.id
        assert made.events("kernel", "stop")[0]["reason"] == "silent"


@asynchronous
async def test_a_kernel_that_is_continued_in_time_works_on() -> None:
    async with rig(heartbeat=8.0) as made:
        kernel = only(made)
        os.kill(kernel.pid, signal.SIGSTOP)
        await until(lambda: kernel.state == "unresponsive", "its silence is noticed")
        waiting = asyncio.ensure_future(made.call("os.getpid"))
        os.kill(kernel.pid, signal.SIGCONT)
        assert await waiting == kernel.pid
        assert kernel.rss > 1 << 20, "a heartbeat's answer says how much memory it uses"
        said = made.events("kernel", "memory")[-1]
        assert (said["kernel"], said["pid"], said["rss"]) == (kernel.id, kernel.pid, kernel.rss)
        assert said["round_trip"] > 0


@asynchronous
async def test_a_busy_kernel_says_how_much_memory_it_uses_too() -> None:
    async with rig(heartbeat=4.0) as made:
        until_known = len(made.events("kernel", "memory")) + 2
        while len(made.events("kernel", "memory")) < until_known:
            await made.call("math.sqrt", 4)
        assert all(event["rss"] > 1 << 20 for event in made.events("kernel", "memory"))


@asynchronous
async def test_a_host_whose_own_loop_stood_still_does_not_take_it_for_its_kernels_silence() -> None:
    async with rig(heartbeat=2.0) as made:
        kernel = only(made)
        running = asyncio.ensure_future(made.call("time.sleep", 5))
        await until(lambda: kernel.rss, "a heartbeat was answered")
        time.sleep(4)  # noqa: ASYNC251 - what a notebook's user does
        await running
        assert only(made) is kernel
        assert not made.events("kernel", "stop")


@asynchronous
async def test_an_attached_kernel_of_others_is_only_let_go_when_it_hangs_or_dies() -> None:
    async with rig() as theirs, rig(0, heartbeat=4.0) as made:
        owned = only(theirs)
        kernel = await made.pool.attach(owned.connection_file, "")
        assert await made.call("os.getpid") == owned.pid
        os.kill(owned.pid, signal.SIGSTOP)
        with pytest.raises(KernelDied, match="did not answer"):
            await made.call("math.sqrt", 4)
        assert not made.pool.kernels
        assert not gone(owned.pid), "it is not ours to kill"
        os.kill(owned.pid, signal.SIGCONT)
        await made.pool.attach(owned.connection_file, "")
        waiting = asyncio.ensure_future(made.call("time.sleep", 600))
        await until(lambda: theirs.pool.kernels[0].pid == owned.pid, "it lives")
        await asyncio.sleep(0)
        os.kill(owned.pid, signal.SIGKILL)
        with pytest.raises(KernelDied, match=r"the connection to kernel .* was cut"):
            await waiting
        assert kernel.id == owned.id
        with pytest.raises(Overloaded, match="no kernels"):
            await made.place()


@asynchronous
async def test_kernels_that_cannot_start_are_reported_to_those_that_wait() -> None:
    async with rig() as made:
        made.pool._roster._launcher._options["kernel_name"] = "there-is-no-such-kernel"
        os.kill(only(made).pid, signal.SIGKILL)
        await until(lambda: not made.pool.kernels, "its end is seen")
        with pytest.raises(KernelStartFailed, match="there-is-no-such-kernel"):
            await made.place()


# -- as many as are wanted


@asynchronous
async def test_a_spare_takes_the_place_of_a_dead_kernel_at_once_and_another_spare_is_started() -> None:
    async with rig(spares=1) as made:
        await until(lambda: sorted(made.states) == ["ready", "spare"], "the spare is there")
        ready, spare = sorted(made.pool.kernels, key=lambda kernel: kernel.spare)
        assert {(await made.place()).kernel for _ in range(5)} == {ready}, "spares do no work"
        os.kill(ready.pid, signal.SIGKILL)
        await until(lambda: ready not in made.pool.kernels, "its end is seen")
        lease = made.pool.take(Ask("s", "f"))
        assert lease is not None
        assert lease.kernel is spare
        assert (spare.deaths, made.pool.status().restarts) == (1, 1)
        await until(lambda: sorted(made.states) == ["ready", "spare"], "there is another spare")
        assert made.pool.status().spares == 1


@asynchronous
async def test_scaling_up_starts_kernels_and_scaling_down_lets_them_finish() -> None:
    async with rig() as made:
        first = only(made)
        await made.pool.scale(3)
        assert made.states == ["ready"] * 3
        commands = [
            asyncio.ensure_future(made.run(await made.place(command=f"f{number}"), "time.sleep", 0.5))
            for number in range(3)
        ]
        await made.pool.scale(1)
        await asyncio.gather(*commands)
        await until(lambda: len(made.pool.kernels) == 1, "two have ended")
        assert made.states == ["ready"]
        assert made.pool.status().wanted == 1
        assert first in made.pool.kernels, "the newest goes first where all run as much"
        await made.pool.scale(0)
        await until(lambda: not made.pool.kernels, "all have ended")
        with pytest.raises(Overloaded):
            await made.place()
        assert [(e["before"], e["wanted"]) for e in made.events("pool", "scale")] == [(1, 3), (3, 1), (1, 0)]
        stops = made.events("kernel", "stop")
        assert [(stop["reason"], stop["expected"], stop["lost"]) for stop in stops] == [("scale", True, 0)] * 3
        with pytest.raises(ValueError, match="-1"):
            await made.pool.scale(-1)
        await made.pool.scale(1)
        assert await made.call("math.sqrt", 4) == 2


@asynchronous
async def test_a_drained_kernel_finishes_what_it_runs_gets_nothing_more_and_is_replaced() -> None:
    async with rig() as made:
        kernel = only(made)
        running = asyncio.ensure_future(made.run(await made.place(), "time.sleep", 1))
        draining = asyncio.ensure_future(made.pool.drain(kernel.id))
        await until(lambda: kernel.state == "draining", "it drains")
        assert await made.call("os.getpid") != kernel.pid
        await running
        await draining
        await until(lambda: gone(kernel.pid), "it has ended")
        assert made.states == ["ready"]
        with pytest.raises(NotFound, match="there is no kernel 'nobody'"):
            await made.pool.drain("nobody")


@asynchronous
async def test_a_restart_has_the_new_kernel_ready_before_the_old_one_drains() -> None:
    async with rig(2) as made:
        before = {kernel.pid for kernel in made.pool.kernels}
        running = [asyncio.ensure_future(made.call("time.sleep", 0.3, session=str(n))) for n in range(4)]
        restarting = asyncio.ensure_future(made.pool.restart())
        while not restarting.done():
            assert made.pool._roster._serving() + sum(k.leaving and k.ready for k in made.pool.kernels) >= 2
            await asyncio.sleep(0.005)
        await asyncio.gather(*running)
        await restarting
        await until(lambda: made.states == ["ready", "ready"], "both are new")
        assert before.isdisjoint(kernel.pid for kernel in made.pool.kernels)
        assert made.pool.status().restarts == 0, "nobody died"


@asynchronous
async def test_a_kernel_is_replaced_after_so_many_commands_and_none_is_lost() -> None:
    async with rig(recycle=Recycle(commands=5)) as made:
        pids = [await made.call("os.getpid") for _ in range(5)]
        assert len(set(pids)) == 1
        calls = [asyncio.ensure_future(made.call("time.sleep", 0.01)) for _ in range(5)]
        await asyncio.gather(*calls)
        await until(lambda: gone(pids[0]), "the old one has ended")
        assert await made.call("os.getpid") != pids[0]
        (event,) = made.events("pool", "recycle")
        assert (event["reason"], event["pid"]) == ("commands", pids[0])


@asynchronous
async def test_a_kernel_is_replaced_when_it_is_old() -> None:
    async with rig(recycle=Recycle(age_s=2.0)) as made:
        first = only(made).pid
        await until(lambda: gone(first), "it is replaced")
        assert made.events("pool", "recycle")[0]["reason"] == "age"
        assert await made.call("os.getpid") != first


@asynchronous
async def test_a_kernel_is_replaced_when_it_has_grown_too_large_by_its_own_account() -> None:
    async with rig(heartbeat=4.0, recycle=Recycle(rss_bytes=200 << 20)) as made:
        kernel = only(made)
        await until(lambda: kernel.rss, "it has said how large it is")
        assert kernel.rss < 200 << 20
        await made.call("sabotage.keep", 200 << 20)
        await until(lambda: gone(kernel.pid), "it is replaced")
        (event,) = made.events("pool", "recycle")
        assert event["reason"] == "rss"
        assert event["rss"] > 200 << 20


@asynchronous
async def test_the_status_is_a_table_that_people_can_read() -> None:
    async with rig(heartbeat=4.0) as made:
        await until(lambda: only(made).rss, "a heartbeat was answered")
        status = made.pool.status()
        title, head, row = repr(status).splitlines()
        assert "1 kernels wanted" in title
        assert "routing fastest" in title
        assert head.split()[:3] == ["kernel", "pid", "state"]
        assert f"{only(made).pid}" in row
        assert "ready" in row
        assert "MiB" in row
        assert "errors" in head.split()


@asynchronous
async def test_a_pool_leaves_no_descriptor_and_no_file_behind() -> None:
    for round in range(2):
        async with rig(2, spares=1) as made:
            os.kill(made.pool.kernels[0].pid, signal.SIGKILL)
            await until(lambda: sorted(made.states) == ["ready", "ready", "spare"], "all are there")
            directory = Path(made.pool.kernels[0].connection_file).parent.parent
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        gc.collect()
        assert not directory.exists()
        if round == 0:
            before = psutil.Process().num_fds()
    assert psutil.Process().num_fds() <= before


# -- orphans -------------------------------------------------------------------------

DEAD_HOST = """
    import json, os, sys
    sys.path[:0] = {path!r}
    from bridge_host import Host

    host = Host(kernels=2)
    print(json.dumps([[k.pid for k in host.kernels()], os.path.dirname(os.path.dirname(host.kernels()[0].connection_file))]), flush=True)
    sys.stdin.read()
"""


def test_a_stopped_kernel_that_outlived_its_host_is_killed_by_the_next_host_that_starts() -> None:
    source = inspect.cleandoc(DEAD_HOST).format(path=sys.path)
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as host:
        assert host.stdout is not None
        (stopped, other), directory = json.loads(host.stdout.readline())
        os.kill(stopped, signal.SIGSTOP)
        host.kill()
    try:
        asyncio.run(until(lambda: gone(other), "a kernel that runs notices by itself"))
        assert not gone(stopped)
        assert {swept.killed for swept in orphans.sweep() if swept.directory == directory} == {(stopped,)}
        asyncio.run(until(lambda: gone(stopped), "it is killed, though it is stopped"))
        assert not os.path.exists(directory)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)


def record(parent: Path, name: str = "bridge-left", **owner: Any) -> Path:
    """A runtime directory as a dead host leaves it behind."""
    directory = parent / name
    directory.mkdir(mode=0o700)
    known = {"where": orphans.here(), "pid": 2**22 + 1, "started": 1.0}
    orphans.write_owner(directory, orphans.Owner(**{**known, **owner}))
    return directory


@pytest.fixture
def sleeper() -> Any:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield process
        process.kill()


def test_a_process_that_has_the_pid_of_a_dead_kernel_is_not_touched(tmp_path: Path, sleeper: Any) -> None:
    began = orphans.started(sleeper.pid)
    assert began is not None
    left = record(tmp_path, kernels={sleeper.pid: began + 1})
    (swept,) = orphans.sweep(str(tmp_path))
    assert swept.killed == ()
    assert not left.exists()
    assert sleeper.poll() is None
    record(tmp_path, kernels={sleeper.pid: began})
    assert [swept.killed for swept in orphans.sweep(str(tmp_path))] == [(sleeper.pid,)]
    assert sleeper.wait(60) == -signal.SIGKILL


def test_a_process_that_has_the_pid_of_a_dead_host_does_not_protect_its_kernels(tmp_path: Path, sleeper: Any) -> None:
    began = orphans.started(os.getpid())
    assert began is not None
    record(tmp_path, "bridge-reused", pid=os.getpid(), started=began - 1)
    living = record(tmp_path, "bridge-living", pid=os.getpid(), started=began)
    assert [Path(swept.directory).name for swept in orphans.sweep(str(tmp_path))] == ["bridge-reused"]
    assert living.exists()


def test_the_sweep_touches_nothing_but_private_directories_of_this_machines_dead_hosts(tmp_path: Path) -> None:
    kept = [
        record(tmp_path, "bridge-elsewhere", where="another machine"),
        record(tmp_path, "other-name"),
        record(tmp_path, "bridge-open-to-all"),
    ]
    kept[-1].chmod(0o755)
    for name, content in (("bridge-nothing", None), ("bridge-damaged", b"{"), ("bridge-mine", b'{"pid": 1}')):
        kept.append(tmp_path / name)
        kept[-1].mkdir(mode=0o700)
        if content is not None:
            (kept[-1] / "owner.json").write_bytes(content)
    linked = tmp_path / "bridge-linked"
    linked.mkdir(mode=0o700)
    (linked / "owner.json").symlink_to(record(tmp_path, "elsewhere") / "owner.json")
    (tmp_path / "bridge-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "bridge-file").write_text("a user's own")
    assert orphans.sweep(str(tmp_path)) == []
    assert all(path.exists() for path in (*kept, linked, tmp_path / "bridge-file", tmp_path / "elsewhere"))


def test_a_host_writes_down_its_processes_for_nobody_else_to_read() -> None:
    directory = RuntimeDirectory()
    try:
        assert directory.path.parent == Path(tempfile.gettempdir())
        directory.add(os.getpid())
        file = directory.path / "owner.json"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        owner = json.loads(file.read_bytes())
        assert owner["pid"] == os.getpid()
        assert owner["kernels"] == {str(os.getpid()): owner["started"]}
        directory.discard(os.getpid())
        assert json.loads(file.read_bytes())["kernels"] == {}
    finally:
        directory.close()
    assert not directory.path.exists()
