"""What the pool learns from how commands went: where they go next, which kernel is replaced, which command is held back."""

from __future__ import annotations

import heapq
import itertools
import math
import random
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from bridge_host import Breaker, Host, Recycle
from bridge_host.pool.breaker import Circuits
from bridge_host.pool.load import Job, Kinds, Load
from bridge_host.pool.outcomes import Comparison, Window, outcome_of
from bridge_host.pool.routing import Ask, Fastest, LeastLoaded, Random, Routing
from bridge_kernel.contract.catalogue import problem
from bridge_kernel.contract.errors import CircuitOpen, Conflict, InvalidParams, NotFound, PolicyDenied, RemoteError
from conftest import KERNELSIDE, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bridge_host import Session
    from bridge_host.pool.outcomes import Outcome

# -- kernels that share their time, simulated --------------------------------------------


class Kind(NamedTuple):
    """A kind of command: how often it comes, how long it waits, how long it computes after that."""

    often: float
    waits_s: float
    computes_s: float


class Simulated:
    """A kernel: those of its commands that compute get equal shares of its speed, those that wait cost nothing."""

    def __init__(self, id: str, kinds: Kinds) -> None:
        self.id = id
        self.speed = 1.0
        self.load = Load(kinds)
        self.in_flight = 0
        self.last_used = 0
        self.waiting: list[tuple[float, int, float, Sent]] = []  # until when, a number, what it then computes
        self.computing: list[tuple[float, Sent]] = []  # what is left


class Sent(NamedTuple):
    kind: str
    at: float
    alone_s: float
    job: Job


class Done(NamedTuple):
    kind: str
    kernel: str
    at: float  # when it was sent
    lost_s: float  # how much longer it took than alone on a kernel of speed 1


class Simulation:
    """Commands that arrive at random moments at kernels, of which `strategy` chooses."""

    def __init__(self, strategy: str, kernels: int = 3, seed: int = 1) -> None:
        self.now = 0.0
        self.chance = random.Random(seed)
        self.kernels = [Simulated(str(n), kinds) for kinds in [Kinds()] for n in range(kernels)]
        strategies: dict[str, Callable[[], Routing]] = {
            "fastest": lambda: Fastest(lambda: self.now),
            "least_loaded": LeastLoaded,
            "random": lambda: Random(random.Random(seed)),
        }
        self.routing = strategies[strategy]()
        self.numbers = itertools.count(1)

    def run(self, kinds: dict[str, Kind], rate: float, count: int) -> list[Done]:
        """`count` commands, `rate` a second; those that are in flight at the end are waited for."""
        done: list[Done] = []
        names, often = list(kinds), [kind.often for kind in kinds.values()]
        arrives = self.now
        while count or any(kernel.in_flight for kernel in self.kernels):
            if count and arrives <= self.now:
                arrives = self.now + self.chance.expovariate(rate)
            moment, kernel = min(
                ((self._next(kernel), kernel) for kernel in self.kernels), key=lambda pair: (pair[0], pair[1].id)
            )
            if count and arrives <= moment:
                self._pass(arrives)
                self._send(self.chance.choices(names, often)[0], kinds)
                count -= 1
            else:
                self._pass(moment)
                done += self._proceed(kernel)
        return done

    def _next(self, kernel: Simulated) -> float:
        """When something happens there."""
        moment = kernel.waiting[0][0] if kernel.waiting else math.inf
        if kernel.computing:
            least = min(left for left, _ in kernel.computing)
            moment = min(moment, self.now + least * len(kernel.computing) / kernel.speed)
        return moment

    def _pass(self, until: float) -> None:
        for kernel in self.kernels:
            if kernel.computing:
                had = (until - self.now) * kernel.speed / len(kernel.computing)
                kernel.computing = [(left - had, sent) for left, sent in kernel.computing]
        self.now = until

    def _send(self, name: str, kinds: dict[str, Kind]) -> None:
        kernel = self.routing.choose(Ask("s", name), self.kernels)
        scale = self.chance.uniform(0.8, 1.2)
        _, waits_s, computes_s = kinds[name]
        kernel.in_flight += 1
        kernel.last_used = next(self.numbers)
        sent = Sent(name, self.now, (waits_s + computes_s) * scale, kernel.load.begin(name, self.now))
        if waits_s:
            heapq.heappush(kernel.waiting, (self.now + waits_s * scale, kernel.last_used, computes_s * scale, sent))
        else:
            kernel.computing.append((computes_s * scale, sent))

    def _proceed(self, kernel: Simulated) -> Iterator[Done]:
        if kernel.waiting and kernel.waiting[0][0] <= self.now:
            _, _, computes_s, sent = heapq.heappop(kernel.waiting)
            kernel.computing.append((computes_s, sent))
            return
        first = min(kernel.computing, key=lambda one: one[0])
        kernel.computing.remove(first)
        sent = first[1]
        kernel.in_flight -= 1
        kernel.load.end(sent.job, self.now, typical=True)
        yield Done(sent.kind, kernel.id, sent.at, self.now - sent.at - sent.alone_s)


def lost(done: list[Done]) -> tuple[float, float]:
    """The mean and the 95th percentile of what the commands lost to each other."""
    ordered = sorted(one.lost_s for one in done)
    return statistics.mean(ordered), ordered[int(len(ordered) * 0.95)]


def compared(kinds: dict[str, Kind], rate: float, count: int) -> dict[str, tuple[float, float]]:
    return {
        strategy: lost([one for seed in (1, 2) for one in Simulation(strategy, seed=seed).run(kinds, rate, count)])
        for strategy in ("fastest", "least_loaded", "random")
    }


def test_fastest_loses_less_than_others_where_some_commands_wait_and_others_compute_for_long_or_short() -> None:
    mix = {"model": Kind(10, 1.0, 0.005), "long": Kind(1, 0, 0.5), "short": Kind(10, 0, 0.02)}
    losses = compared(mix, rate=50, count=4000)
    mean, p95 = losses["fastest"]
    for other, least in (("least_loaded", 0.85), ("random", 0.75)):
        assert mean < least * losses[other][0], losses
        assert p95 < least * losses[other][1], losses


def test_fastest_loses_no_more_than_others_where_all_compute() -> None:
    losses = compared({"long": Kind(1, 0, 1.0), "short": Kind(20, 0, 0.02)}, rate=29, count=2500)
    mean, p95 = losses["fastest"]
    assert mean < 1.05 * losses["least_loaded"][0], losses
    assert mean < 0.5 * losses["random"][0], losses
    assert p95 < 1.05 * losses["least_loaded"][1], losses


def test_commands_that_wait_are_told_from_those_that_compute() -> None:
    simulation = Simulation("least_loaded")
    mix = {"model": Kind(10, 1.0, 0.005), "long": Kind(1, 0, 0.5), "short": Kind(10, 0, 0.02)}
    simulation.run(mix, rate=50, count=5000)
    kinds = simulation.kernels[0].load._kinds
    assert [kinds.waits(name) for name in mix] == [True, False, False]
    assert not kinds.waits("never seen")


def test_what_computes_alone_is_known_although_it_never_ran_alone() -> None:
    load, now = Load(Kinds()), 0.0
    for _ in range(4):
        jobs = [load.begin("f", now) for _ in range(5)]
        now += 5.0
        for job in jobs:
            load.end(job, now, typical=True)
    assert load.of("f", now) == pytest.approx(1.0)


def test_the_longer_a_command_has_run_the_less_of_it_is_ahead_until_it_is_overdue() -> None:
    load = Load(Kinds())
    for _ in range(3):
        load.record("f", 1.0, 0.0)
    load.begin("f", 0.0)
    assert [load.ahead("f", 10.0, now) for now in (0.0, 0.75, 1.0, 3.0)] == pytest.approx([1.0, 0.25, 0.0, 2.0])
    assert load.ahead("f", 0.1, 0.0) == pytest.approx(0.1), "a short one is done before the other is"
    assert load.expected("f", 0.5) == pytest.approx(1.5)


def test_a_slower_kernel_gets_fewer_commands_and_all_lose_less() -> None:
    losses: dict[str, tuple[float, float]] = {}
    for strategy in ("fastest", "least_loaded"):
        simulation = Simulation(strategy)
        simulation.kernels[0].speed = 0.25
        done = simulation.run({"f": Kind(1, 0, 0.1)}, rate=12, count=4000)
        losses[strategy] = lost(done)
        if strategy == "fastest":
            slow, *others = (sum(one.kernel == kernel.id for one in done) for kernel in simulation.kernels)
            assert slow < min(others) / 2
    assert losses["fastest"][0] < 0.75 * losses["least_loaded"][0], losses


def test_a_kernel_that_becomes_slow_is_left_and_is_tried_again_later() -> None:
    simulation = Simulation("fastest")
    kinds = {"f": Kind(1, 0, 0.1)}

    def to_first(count: int) -> float:
        done = simulation.run(kinds, rate=8, count=count)
        return sum(one.kernel == "0" for one in done) / len(done)

    assert to_first(400) == pytest.approx(1 / 3, abs=0.1)
    simulation.kernels[0].speed = 0.1
    simulation.run(kinds, rate=8, count=100)
    assert 0 < to_first(800) < 0.05, "it is tried again, though not often"
    simulation.kernels[0].speed = 1.0
    simulation.run(kinds, rate=8, count=400)
    assert to_first(400) == pytest.approx(1 / 3, abs=0.1)


def test_a_kernel_on_which_a_command_fails_at_once_does_not_look_fast() -> None:
    load, now = Load(Kinds()), 0.0
    for seconds, typical in ((1.0, True), (1.0, True), (0.001, False), (0.001, False)):
        job = load.begin("f", now)
        now += seconds
        load.end(job, now, typical=typical)
    assert load.of("f", now) == pytest.approx(1.0)


# -- who fails where others do not ---------------------------------------------------------


class Compared:
    """Calls on kernels, one after the other."""

    def __init__(self) -> None:
        self.comparison = Comparison()
        self.now = 0.0
        self.verdicts: list[tuple[str, str]] = []

    def admits(self, kernel: str, command: str = "f") -> bool:
        return self.comparison.admits(kernel, command, self.now)

    def call(self, kernel: str, outcome: Outcome, command: str = "f", session: str = "s") -> None:
        """One call, a second later; where the kernel is under suspicion there is none."""
        self.now += 1.0
        if not self.admits(kernel, command):
            return
        verdict = self.comparison.add(kernel, command, session, outcome, began=self.now - 0.5, now=self.now)
        if verdict is not None:
            self.verdicts.append((verdict.kernel, verdict.reason))


def test_a_kernel_that_fails_a_command_which_the_others_do_not_fail_is_found_and_the_reason_has_the_rates() -> None:
    calls = Compared()
    for outcome in ("ok", "error", "timeout", "error", "error", "error", "ok", "error", "error", "error", "error"):
        calls.call("sick", outcome)
        calls.call("a", "ok")
        calls.call("b", "ok")
    assert calls.verdicts == [], "it may be what it was sent"
    assert [calls.admits(kernel) for kernel in ("sick", "a", "b")] == [False, True, True]
    assert calls.admits("sick", "another command")
    for _ in range(50):
        calls.call("a", "ok")
        calls.call("b", "ok")
    ((kernel, reason),) = calls.verdicts
    assert kernel == "sick"
    assert reason == "errors: 0.88 of the last 8 calls of f failed here, 0.00 elsewhere"


def test_what_fails_everywhere_is_no_kernels_fault() -> None:
    calls = Compared()
    for _ in range(200):
        for kernel in "abc":
            calls.call(kernel, "error")
    assert calls.verdicts == []


def test_a_service_that_goes_down_is_no_fault_of_the_kernel_that_asked_it_first() -> None:
    calls = Compared()
    for number in range(100):
        calls.call("ab"[number % 2], "ok")
    for _ in range(50):
        calls.call("a", "error")
    assert calls.verdicts == [], "elsewhere nobody has tried since"
    for _ in range(50):
        calls.call("b", "error")
    assert calls.verdicts == []


def test_a_command_that_fails_at_random_has_no_kernel_replaced() -> None:
    chance = random.Random(5)
    calls = Compared()
    for _ in range(3000):
        calls.call(chance.choice("abc"), chance.choice(["ok", "error"]))
    assert calls.verdicts == []


def test_one_sessions_bad_data_on_the_kernel_it_is_pinned_to_has_it_not_replaced_but_several_sessions_have() -> None:
    calls = Compared()
    for _ in range(30):
        calls.call("a", "error", session="bad")
        calls.call("b", "ok", session="good")
    assert calls.verdicts == []
    for number in range(200):
        calls.call("a", "error", session=f"one {number}")
        calls.call("b", "ok", session=f"another {number}")
    assert [kernel for kernel, _ in calls.verdicts] == ["a"]


def suspected() -> Compared:
    """Calls that have raised a suspicion against kernel "sick"; "well" is the other one."""
    calls = Compared()
    while calls.admits("sick"):
        calls.call("sick", "error")
        calls.call("well", "ok")
        assert calls.now < 100
    return calls


def test_a_suspicion_is_dropped_where_the_errors_go_elsewhere_with_the_calls_and_commands_go_there_again() -> None:
    calls = suspected()
    trial = calls.now
    while not calls.admits("sick"):
        calls.call("well", "error" if calls.now % 2 else "ok")
        assert calls.now < trial + 60
    assert calls.verdicts == []
    dropped = calls.now
    while calls.admits("sick"):
        calls.call("sick", "error")
        calls.call("well", "ok")
        assert calls.now < dropped + 100
    assert calls.now >= dropped + 60, "the pause"


def test_a_suspicion_is_dropped_where_the_errors_are_fewer_since_but_perhaps_by_chance() -> None:
    calls = suspected()
    while not calls.admits("sick"):
        calls.call("well", "error" if calls.now % 4 == 0 else "ok")
    assert calls.verdicts == []


def test_a_suspicion_is_dropped_where_few_calls_are_bad_and_all_of_them_were_sent_to_one_kernel() -> None:
    calls = Compared()
    suspicions = 0
    for _ in range(500):
        for number in range(8):
            calls.call("busy", "ok", session=f"s{number % 4}")
        before = calls.comparison.suspecting
        calls.call("idle" if calls.admits("idle") else "busy", "error", session=f"s{calls.now % 4}")
        suspicions += calls.comparison.suspecting and not before
    assert suspicions > 1
    assert calls.verdicts == []


def test_calls_that_began_before_the_suspicion_do_not_count_in_its_trial() -> None:
    calls = suspected()
    comparison, now = calls.comparison, calls.now
    for _ in range(300):
        assert comparison.add("well", "f", "s", "ok", began=now - 0.1, now=now + 30) is None
    assert not comparison.admits("sick", "f", now + 31)


def test_errors_that_the_suspected_kernel_still_meets_for_want_of_another_speak_for_it() -> None:
    calls = suspected()
    comparison = calls.comparison
    while comparison.suspecting:
        calls.call("well", "ok")
        comparison.add("sick", "f", "s", "error", began=calls.now - 0.5, now=calls.now)
    assert calls.verdicts == []


def test_a_suspicion_that_gets_too_few_calls_is_dropped_after_a_while() -> None:
    calls = suspected()
    calls.call("well", "ok")
    calls.now += 59.0
    assert not calls.admits("sick")
    calls.now += 100.0
    assert calls.admits("sick")
    assert not calls.comparison.suspecting
    assert calls.verdicts == []


def test_a_suspicion_ends_when_its_kernel_or_all_others_are_gone() -> None:
    for gone in ("sick", "well"):
        calls = suspected()
        calls.comparison.forget("a third")
        assert not calls.admits("sick")
        calls.comparison.forget(gone)
        assert calls.admits("sick")
        assert len(calls.comparison) == 0


def test_a_command_that_had_a_kernel_replaced_has_none_suspected_for_a_while_and_then_for_twice_as_long() -> None:
    calls, replaced, suspicions = Compared(), [0.0], []
    while len(replaced) < 4:
        before, suspecting = len(calls.verdicts), calls.comparison.suspecting
        calls.call("sick", "error")
        calls.call("well", "ok")
        if len(calls.verdicts) > before:
            replaced.append(calls.now)
        if calls.comparison.suspecting and not suspecting:
            suspicions.append(calls.now - replaced[-1])
        assert calls.now < 2000
    first, second, third = suspicions
    assert first < 60 <= second < 120 <= third < 240


class Mixed:
    """Callers of one command, each one call after the other, at kernels with `capacity` places: good calls take a
    second, bad ones fail at once. On a kernel that is sick all of them fail."""

    def __init__(self, kernels: int, good: int, pause_s: float, capacity: int, sick: str = "") -> None:
        self.now = 0.0
        self.comparison = Comparison()
        self.verdicts: list[tuple[str, str]] = []
        self.suspicions = 0
        self.sick = sick
        self.capacity = capacity
        self.kernels = [Simulated(str(n), kinds) for kinds in [Kinds()] for n in range(kernels)]
        self.routing = Fastest(lambda: self.now)
        self.numbers = itertools.count(1)
        chance = random.Random(3)
        # When, a number, whether it is a good one, the kernel it is on (none: it is to be sent).
        self.events: list[tuple[float, int, bool, Simulated | None, Job | None]] = []
        self.pause_s = pause_s
        for _ in range(good):
            self._at(chance.random(), True)
        self._at(1.0, False)

    def _at(self, moment: float, good: bool, kernel: Simulated | None = None, job: Job | None = None) -> None:
        heapq.heappush(self.events, (moment, next(self.numbers), good, kernel, job))

    def run(self, until: float) -> None:
        while self.events[0][0] < until:
            self.now, _, good, kernel, job = heapq.heappop(self.events)
            if kernel is None or job is None:
                self._send(good)
                continue
            failed = not good or kernel.id == self.sick
            kernel.in_flight -= 1
            kernel.load.end(job, self.now, typical=not failed)
            suspecting = self.comparison.suspecting
            verdict = self.comparison.add(
                kernel.id, "f", "s", "error" if failed else "ok", began=job.began, now=self.now
            )
            self.suspicions += self.comparison.suspecting and not suspecting
            if verdict is not None:
                self.verdicts.append((verdict.kernel, verdict.reason))
            self._at(self.now + (self.pause_s if failed else 0.001), good)

    def _send(self, good: bool) -> None:
        free = [kernel for kernel in self.kernels if kernel.in_flight < self.capacity]
        if not free:
            self._at(self.now + 0.01, good)
            return
        free = [kernel for kernel in free if self.comparison.admits(kernel.id, "f", self.now)] or free
        kernel = self.routing.choose(Ask("s", "f"), free)
        kernel.in_flight += 1
        kernel.last_used = next(self.numbers)
        job = kernel.load.begin("f", self.now)
        self._at(self.now + (0.01 if not good or kernel.id == self.sick else 1.0), good, kernel, job)


@pytest.mark.parametrize("capacity", [1, 8])
@pytest.mark.parametrize(("kernels", "good", "pause_s"), [(2, 1, 0.5), (5, 4, 0.5), (5, 4, 0.1)])
def test_a_healthy_kernel_that_is_idle_and_meets_all_bad_calls_is_not_replaced(
    kernels: int, good: int, pause_s: float, capacity: int
) -> None:
    mixed = Mixed(kernels, good, pause_s, capacity)
    mixed.run(until=1200.0)
    assert mixed.suspicions, "errors alone look as if it were sick"
    assert mixed.verdicts == []


def test_a_sick_kernel_is_found_where_another_caller_sends_bad_calls_too() -> None:
    mixed = Mixed(kernels=3, good=6, pause_s=3.0, capacity=8, sick="1")
    mixed.run(until=300.0)
    assert mixed.verdicts[0][0] == "1"


def test_errors_of_the_caller_and_a_kernel_alone_are_not_judged() -> None:
    calls = Compared()
    outcomes: tuple[Outcome, ...] = ("refused", "cancelled", "died")
    for outcome in outcomes:
        for _ in range(50):
            calls.call("a", outcome)
            calls.call("b", "ok")
    for _ in range(50):
        calls.call("alone", "error", "g")
    assert calls.verdicts == []
    for error in (InvalidParams("x"), NotFound("x"), PolicyDenied("x"), Conflict("x")):
        assert outcome_of(error) == "refused"
    assert outcome_of(RemoteError("x")) == "error"


def test_what_is_watched_is_bounded_and_ends_when_nothing_fails_any_more() -> None:
    calls = Compared()
    for number in range(3000):
        calls.call("a", "error", f"f{number}")
    assert len(calls.comparison) == 1024
    calls.comparison.forget("a")
    assert len(calls.comparison) == 0
    calls.call("a", "error")
    for _ in range(20):
        assert len(calls.comparison) == 1
        calls.call("a", "ok")
    assert len(calls.comparison) == 0


def test_a_window_counts_the_last_ones_only() -> None:
    window = Window(4)
    assert window.rate == 0
    for failed in (True, True, False):
        window.add(failed)
    assert (window.length, window.failures) == (3, 2)
    for failed in (False, False, True):
        window.add(failed)
    assert (window.length, window.failures, window.rate) == (4, 1, 0.25)


# -- a command that fails too often ----------------------------------------------------------


class Rated:
    """Circuits that count errors, and a clock that stands still."""

    def __init__(self, **options: Any) -> None:
        self.now = 0.0
        self.circuits = Circuits(Breaker(**{"error_rate": 0.8, "error_window": 5, **options}), lambda: self.now)

    def run(self, *outcomes: Outcome, kernel: str = "k") -> list[tuple[bool, str, str]]:
        changes = []
        for outcome in outcomes:
            probe = self.circuits.begin(kernel, "f")
            changes += self.circuits.end(kernel, "f", outcome, probe=probe)
        return [(change.opened, change.kernel, change.reason) for change in changes]


def test_a_command_with_too_high_an_error_rate_is_held_back_says_so_and_comes_back_after_a_good_probe() -> None:
    rated = Rated()
    assert not rated.run("ok", "error", "ok", "ok", "error", "error", "refused", "cancelled", "error")
    rated.circuits.require("f")
    assert rated.run("error") == [(True, "", "error rate 0.80 of the last 5")]
    with pytest.raises(CircuitOpen, match=r"f fails too often \(error rate 0\.80 of the last 5 calls\).* 10 s more"):
        rated.circuits.require("f")
    rated.circuits.require("g")
    assert not rated.circuits.end("k", "f", "ok", probe=False), "sent before it opened"
    rated.now = 10.0
    assert rated.run("refused") == []
    assert rated.run("error") == [(True, "", "error rate 0.80 of the last 5")]
    rated.now = 29.0
    with pytest.raises(CircuitOpen, match="1 s more"):
        rated.circuits.require("f")
    rated.now = 30.0
    rated.circuits.require("f")
    probe = rated.circuits.begin("k", "f")
    with pytest.raises(CircuitOpen, match=r"fails too often .* one is tried now"):
        rated.circuits.require("f")
    assert [change.opened for change in rated.circuits.end("k", "f", "ok", probe=probe)] == [False]
    rated.circuits.require("f")
    assert not rated.run("error", "error", "error", "error"), "it starts anew"


def test_without_an_error_rate_a_buggy_function_is_never_locked_out() -> None:
    rated = Rated(error_rate=None)
    assert not rated.circuits.counting
    assert not [change for _ in range(100) for change in rated.run("error")]
    rated.circuits.require("f")


# -- real kernels ------------------------------------------------------------------------------


def sick_if_marked(directory: str) -> int:
    """Fails in the process whose number is the name of a file in that directory, or in all if there is a file "all"."""
    import os
    from pathlib import Path

    marks = {path.name for path in Path(directory).iterdir()}
    if str(os.getpid()) in marks or "all" in marks:
        raise RuntimeError("sick")
    return os.getpid()


def told(host: Host, *name: str) -> list[dict[str, Any]]:
    events = host.telemetry.events("bridge", *name)
    assert [wrong for event in events if (wrong := problem(event))] == []
    return [{**event.measurements, **event.metadata} for event in events]


def tried(session: Session, directory: Path) -> int | None:
    """The process that answered; None if it failed."""
    try:
        answer = session.call("sick_if_marked", str(directory))
    except RemoteError:
        return None
    assert isinstance(answer, int)
    return answer


def test_a_kernel_that_fails_where_the_other_does_not_is_replaced_with_the_reason_in_the_event(tmp_path: Path) -> None:
    with Host(kernels=2, env={"PYTHONPATH": KERNELSIDE}) as host:
        session = host.session()
        session.function("sick_if_marked", sick_if_marked)
        sick, well = (kernel.pid for kernel in host.kernels())
        (tmp_path / str(sick)).touch()
        answers = []
        while not told(host, "pool", "recycle"):
            answers.append(tried(session, tmp_path))
            assert len(answers) < 20_000
        assert None not in answers[-30:], "it was kept off that kernel before it was replaced"
        (recycled,) = told(host, "pool", "recycle")
        assert recycled["pid"] == sick
        assert recycled["reason"].startswith("errors: 1.00 of the last ")
        assert recycled["reason"].endswith(" failed here, 0.00 elsewhere")
        eventually(
            lambda: sick not in {kernel.pid for kernel in host.kernels()} and len(host.kernels()) == 2,
            "another has taken its place",
        )
        assert None not in {tried(session, tmp_path) for _ in range(10)}
        assert well in {kernel.pid for kernel in host.kernels()}


def test_a_function_that_fails_everywhere_has_no_kernel_replaced(tmp_path: Path) -> None:
    (tmp_path / "all").touch()
    with Host(kernels=2, recycle=Recycle(errors=True)) as host:
        session = host.session()
        session.function("sick_if_marked", sick_if_marked)
        before = {kernel.pid for kernel in host.kernels()}
        assert {tried(session, tmp_path) for _ in range(60)} == {None}
        assert told(host, "pool", "recycle") == []
        assert {kernel.pid for kernel in host.kernels()} == before
        assert [kernel.error_rate for kernel in host.kernels()] == [1.0, 1.0]
        assert "100%" in repr(host.pool.status())


def test_a_command_is_held_back_by_its_error_rate_and_comes_back_after_a_good_probe(tmp_path: Path) -> None:
    (tmp_path / "all").touch()
    breaker = Breaker(error_rate=0.5, error_window=6, cooldown_s=0.2)
    with Host(kernels=1, breaker=breaker) as host:
        session = host.session()
        session.function("sick_if_marked", sick_if_marked)
        assert {tried(session, tmp_path) for _ in range(6)} == {None}
        with pytest.raises(CircuitOpen, match=r"error rate 1\.00 of the last 6 calls"):
            session.call("sick_if_marked", str(tmp_path))
        (opened,) = told(host, "pool", "breaker", "open")
        assert (opened["reason"], opened["failures"], opened["kernel"]) == ("error rate 1.00 of the last 6", 6, "")
        assert opened["subject"].startswith("sick_if_marked")
        (tmp_path / "all").unlink()

        def answers() -> bool:
            try:
                return tried(session, tmp_path) is not None
            except CircuitOpen:
                return False

        eventually(answers, "it is tried again")
        (closed,) = told(host, "pool", "breaker", "close")
        assert closed["reason"] == "ok"
        assert answers()
