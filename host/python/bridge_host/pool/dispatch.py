"""Which command gets which kernel, and when: places in kernels, the queue before them, circuits, what is measured."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from bridge_kernel.contract.errors import BridgeError, HostClosed, QueueFull

from .admission import FairQueue
from .breaker import Circuits
from .load import Kinds
from .outcomes import FAILED, Comparison
from .routing import routing_named

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from bridge_kernel.contract.telemetry import Scalar

    from ..client import KernelClient
    from ..telemetry import Telemetry
    from .kernel import Kernel
    from .load import Job
    from .options import PoolOptions
    from .outcomes import Outcome
    from .routing import Ask

__all__ = ("Dispatcher", "Lease")

ROUTE: Final = ("bridge", "pool", "route")
MEAN_WEIGHT: Final = 0.1


class Lease(NamedTuple):
    """A command's place in a kernel. It is given back exactly once, by `release`."""

    kernel: Kernel
    client: KernelClient
    ask: Ask
    job: Job
    probe: bool  # it decides about a half-open circuit
    alone: bool


class _Waiter:
    """A command that waits for a place."""

    __slots__ = ("ask", "future", "reserved", "since")

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self.since = time.perf_counter_ns()
        self.reserved: Kernel | None = None


class Dispatcher:
    """Belongs to one event loop. It is told of kernels by `update`, and starts none."""

    def __init__(
        self,
        telemetry: Telemetry,
        options: PoolOptions,
        *,
        hopeless: Callable[[], BridgeError | None],
        on_worn: Callable[[Kernel, str], None],
    ) -> None:
        """`hopeless` says why no kernel will ever be ready, if that is so; `on_worn` hears of kernels to replace."""
        self._telemetry = telemetry
        self._concurrency = options.concurrency
        self._clock = options.clock
        self._routing = routing_named(options.routing, options.clock)
        self.strategy = options.routing if isinstance(options.routing, str) else type(options.routing).__name__
        self.circuits = Circuits(options.breaker, options.clock)
        self._comparison = Comparison() if options.recycle is None or options.recycle.errors else None
        self._hopeless = hopeless
        self._on_worn = on_worn
        self._kernels: Sequence[Kernel] = ()
        self._open: list[Kernel] = []  # those that take any command, if they have room
        self._queue: FairQueue[_Waiter] = FairQueue(options.queue)
        self._alone: OrderedDict[_Waiter, None] = OrderedDict()
        self._nested: OrderedDict[_Waiter, None] = OrderedDict()
        self._uses = itertools.count(1)
        self._closed = False
        self.kinds = Kinds()
        self.mean_s = 0.0
        """A moving average of how long commands take, nested ones not counted."""

    @property
    def waiting(self) -> int:
        return len(self._queue) + len(self._alone) + len(self._nested)

    def update(self, kernels: Iterable[Kernel]) -> None:
        """Something about the kernels has changed: give what waits to those that are ready now."""
        self._kernels = tuple(kernels)
        self._reopen()
        self._dispatch()
        if self.waiting and (error := self._hopeless()) is not None:
            self._fail_waiting(error)

    def _reopen(self) -> None:
        self._open = [k for k in self._kernels if k.routable and not k.reserved and not k.alone]

    # -- a place at once -----------------------------------------------------------

    def take(self, ask: Ask) -> Lease | None:
        """See `Pool.take`."""
        if self._closed:
            raise HostClosed
        if self.circuits.known:
            self.circuits.require(ask.command)
        if ask.nested:
            return self._take_nested(ask, 0)
        if ask.alone:
            return None if self._alone else self._take_alone(ask, 0)
        if self._queue.length:
            return None
        candidates = [kernel for kernel in self._open if kernel.running < kernel.capacity]
        return self._lend(candidates, ask, 0) if candidates else None

    def _take_nested(self, ask: Ask, queued: int) -> Lease | None:
        if ask.alone and (lease := self._take_alone(ask, queued)) is not None:
            return lease
        # Kernels that others should be kept off are better than none: its outer command waits for it there.
        candidates = self._open or [k for k in self._kernels if k.ready and not k.spare]
        return self._lend(candidates, ask, queued) if candidates else None

    def _take_alone(self, ask: Ask, queued: int) -> Lease | None:
        idle = [kernel for kernel in self._open if not kernel.in_flight]
        return self._lend(idle, ask, queued, alone=True) if idle else None

    def _lend(self, candidates: list[Kernel], ask: Ask, queued: int, *, alone: bool = False) -> Lease:
        """Choose one of the candidates: that to avoid, circuits and suspicions are respected where there is another."""
        command, circuits, comparison = ask.command, self.circuits, self._comparison
        if len(candidates) > 1:
            if ask.avoid:
                candidates = [kernel for kernel in candidates if kernel.id not in ask.avoid] or candidates
            if circuits.known:
                candidates = [k for k in candidates if circuits.admits(k.id, command)] or candidates
            if comparison is not None and comparison.suspecting:
                at = self._clock()
                candidates = [k for k in candidates if comparison.admits(k.id, command, at)] or candidates
        kernel = self._routing.choose(ask, candidates) if len(candidates) > 1 else candidates[0]
        client = kernel.client
        assert client is not None
        now = self._clock()
        expected = kernel.load.expected(command, now)
        job = kernel.load.begin(command, now)
        kernel.last_used = next(self._uses)
        kernel.in_flight += 1
        if not ask.nested:
            kernel.running += 1
        if alone:
            kernel.alone = True
            self._reopen()
        probe = circuits.begin(kernel.id, command) if circuits.known else False
        trace = ask.trace
        if trace is None or trace.sampled:
            said: dict[str, Scalar] = {
                "kernel": kernel.id,
                "strategy": self.strategy,
                "subject": command,
                "session": ask.session,
            }
            if trace is not None:
                said |= {"trace_id": trace.trace_id, "parent_span_id": trace.span_id}
            numbers = {
                "system_time": time.time_ns(),
                "queue": queued,
                "candidates": len(candidates),
                "expected": round(expected * 1e9),
            }
            self._telemetry.tell(ROUTE, numbers, said)
        return Lease(kernel, client, ask, job, probe, alone)

    def release(self, lease: Lease, outcome: Outcome) -> None:
        """See `Pool.release`."""
        kernel, client, ask, job, probe, alone = lease
        now = self._clock()
        kernel.in_flight -= 1
        kernel.completed += 1
        if not ask.nested:
            kernel.running -= 1
        if alone:
            kernel.alone = False
            self._reopen()
        # What fails at once must not look fast.
        kernel.load.end(job, now, typical=outcome in ("ok", "timeout"))
        if outcome not in ("died", "cancelled"):
            seconds = now - job.began
            if not ask.nested:
                self.mean_s = self.mean_s + MEAN_WEIGHT * (seconds - self.mean_s) if self.mean_s else seconds
            if outcome != "timeout":
                kernel.served = True
            if outcome != "refused":
                kernel.recent.add(outcome in FAILED)
        circuits = self.circuits
        if outcome in ("died", "timeout") or circuits.known or circuits.counting:
            self._judge(kernel, ask.command, outcome, probe=probe)
        comparison = self._comparison
        if comparison is not None and (outcome in FAILED or len(comparison)):
            self._compare(comparison, kernel, ask, outcome, job.began, now)
        if kernel.draining and not kernel.in_flight:
            kernel.idle.set()
        if kernel.completed >= kernel.worn_at and client.closed is None:
            self._on_worn(kernel, "commands")
        if self._queue.length or self._alone or self._nested:
            self._dispatch()

    def _judge(self, kernel: Kernel, command: str, outcome: Outcome, *, probe: bool) -> None:
        for change in self.circuits.end(kernel.id, command, outcome, probe=probe):
            self._telemetry.tell(
                ("bridge", "pool", "breaker", "open" if change.opened else "close"),
                {"failures": change.failures, "cooldown": round(change.cooldown_s * 1e9)},
                {"subject": change.command, "kernel": change.kernel, "reason": change.reason},
            )

    def _compare(
        self, comparison: Comparison, kernel: Kernel, ask: Ask, outcome: Outcome, began: float, now: float
    ) -> None:
        """Have a kernel replaced that fails a command which the others do not fail."""
        if not kernel.routable or kernel.worn:
            return  # it is on its way out: whatever it still says, another is taking its place
        verdict = comparison.add(kernel.id, ask.command, ask.session, outcome, began=began, now=now)
        if verdict is not None:
            for sick in self._kernels:
                if sick.id == verdict.kernel:
                    self._on_worn(sick, verdict.reason)

    def forget(self, kernel: str) -> None:
        """That kernel has gone: what is known of its failures goes with it."""
        self.circuits.forget(kernel)
        if self._comparison is not None:
            self._comparison.forget(kernel)

    # -- a place in time -------------------------------------------------------------

    async def acquire(self, ask: Ask) -> Lease:
        """See `Pool.acquire`."""
        if (lease := self.take(ask)) is not None:
            return lease
        if (error := self._hopeless()) is not None:
            raise error
        waiter = _Waiter(ask)
        self._join(waiter)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            self._withdraw(waiter)
            raise

    def _join(self, waiter: _Waiter) -> None:
        ask = waiter.ask
        if ask.nested:
            self._nested[waiter] = None
        elif ask.alone:
            self._alone[waiter] = None
            self._dispatch()  # reserve a kernel, so that it becomes idle
        else:
            try:
                self._queue.put(ask.session, waiter, wait_s=self.expected_wait_s())
            except QueueFull:
                self._telemetry.tell(
                    ("bridge", "pool", "queue", "reject"),
                    {"waiting": len(self._queue), "session_waiting": self._queue.waiting(ask.session)},
                    {"session": ask.session, "subject": ask.command},
                )
                raise

    def hurry(self, ask: Ask) -> None:
        """See `Pool.hurry`."""
        waiter = next((waiter for waiter in (*self._alone, *self._queue) if waiter.ask is ask), None)
        if waiter is None:
            return
        self._alone.pop(waiter, None)
        self._queue.remove(ask.session, waiter)
        waiter.ask = ask._replace(nested=True)
        self._nested[waiter] = None
        self._unreserve(waiter)
        self._dispatch()

    def expected_wait_s(self) -> float | None:
        """How long a command that joined the queue now would wait; None as long as no command has ended."""
        if not self.mean_s:
            return None
        places = sum(kernel.capacity for kernel in self._kernels if kernel.routable) or self._concurrency
        return self.mean_s * (len(self._queue) + 1) / places

    def _withdraw(self, waiter: _Waiter) -> None:
        future, ask = waiter.future, waiter.ask
        if future.done() and not future.cancelled() and future.exception() is None:
            self.release(future.result(), "cancelled")  # it came at the very moment
            return
        self._nested.pop(waiter, None)
        self._alone.pop(waiter, None)
        self._queue.remove(ask.session, waiter)
        self._unreserve(waiter)

    def _unreserve(self, waiter: _Waiter) -> None:
        kernel, waiter.reserved = waiter.reserved, None
        if kernel is not None:
            kernel.reserved = False
            self._reopen()
            self._dispatch()

    def _dispatch(self) -> None:
        while self._nested:
            waiter = next(iter(self._nested))
            if not waiter.future.done() and not self._grant(waiter, self._take_nested):
                break
            self._nested.pop(waiter, None)
        self._dispatch_alone()
        while len(self._queue):
            candidates = [kernel for kernel in self._open if kernel.running < kernel.capacity]
            if not candidates:
                return
            waiter = self._queue.pop()
            if not waiter.future.done():
                self._grant(waiter, partial(self._lend, candidates))

    def _dispatch_alone(self) -> None:
        """Give the first of those that want a kernel to themselves one that is idle; else keep others off one."""
        while self._alone:
            waiter = next(iter(self._alone))
            if waiter.future.done():
                self._alone.pop(waiter)
                continue
            kernel = waiter.reserved
            if kernel is None or not kernel.routable:
                if kernel is not None:
                    kernel.reserved = False
                    waiter.reserved = None
                    self._reopen()
                others = [k for k in self._open if k.id not in waiter.ask.avoid] or self._open
                if not others:
                    return
                kernel = waiter.reserved = min(others, key=lambda k: (k.in_flight, k.last_used))
                kernel.reserved = True
                self._reopen()
            if kernel.in_flight:
                return
            kernel.reserved, waiter.reserved = False, None
            self._alone.pop(waiter)
            self._grant(waiter, partial(self._lend, [kernel], alone=True))
            self._reopen()

    def _grant(self, waiter: _Waiter, lend: Callable[[Ask, int], Lease | None]) -> bool:
        """Give the waiter its place, or the error that meets it now; False if there is none for it yet."""
        try:
            if self.circuits.known:
                self.circuits.require(waiter.ask.command)
            lease = lend(waiter.ask, time.perf_counter_ns() - waiter.since)
        except BridgeError as exc:
            waiter.future.set_exception(exc)
            return True
        if lease is not None:
            waiter.future.set_result(lease)
        return lease is not None

    # -- the end -----------------------------------------------------------------------

    def _fail_waiting(self, error: BridgeError) -> None:
        waiters = [*self._nested, *self._alone]
        while len(self._queue):
            waiters.append(self._queue.pop())
        self._nested.clear()
        self._alone.clear()
        for waiter in waiters:
            if waiter.reserved is not None:
                waiter.reserved.reserved = False
            if not waiter.future.done():
                waiter.future.set_exception(error)
        self._reopen()

    def close(self) -> None:
        """No command gets a kernel any more; those that wait are told so."""
        self._closed = True
        self._fail_waiting(HostClosed())
