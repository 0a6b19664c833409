"""Which kernel a command goes to: small strategies over what is known of each. Pure: no processes, the clock is injected."""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bridge_kernel.contract.telemetry import Trace

    from .load import Load

__all__ = ("Ask", "Candidate", "Fastest", "LeastLoaded", "Pinned", "Random", "Routing", "routing_named")

ABOUT: Final = 1.2
"""Expectations that differ by less than that factor are the same: what is measured is no more exact."""
MAX_SESSIONS: Final = 4096


class Ask(NamedTuple):
    """What a command asks of the pool."""

    session: str
    command: str
    """Its subject: `math.hypot`, `dspy.ChainOfThought.__call__`."""
    nested: bool = False
    """Sent by a tool of a running command: it neither waits in the queue nor counts against the concurrency,
    for its outer command holds a place already, and would never give it back."""
    alone: bool = False
    """No other command runs on that kernel while this one does."""
    avoid: frozenset[str] = frozenset()
    """Ids of kernels that it should not go to if there is another."""
    trace: Trace | None = None
    """Its span, beneath which its time in the queue belongs."""


class Candidate(Protocol):
    """What a strategy knows of a kernel."""

    @property
    def id(self) -> str: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def last_used(self) -> int:
        """The larger, the later a command was sent there."""
        ...

    @property
    def load(self) -> Load: ...


Chosen = TypeVar("Chosen", bound=Candidate)


class Routing(Protocol):
    """A strategy. `candidates` are two or more kernels that could take the command now."""

    def choose(self, ask: Ask, candidates: Sequence[Chosen]) -> Chosen: ...


class Fastest:
    """Where the command is expected to be done first: how long it takes there, beside what is in flight there.

    Of a kernel of which nothing is known, or nothing new for long, it expects as much as of the best. Among kernels
    that are about as good, the one with the fewest commands in flight, and of these the longest unused: so those are
    tried.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def choose(self, ask: Ask, candidates: Sequence[Chosen]) -> Chosen:
        now, command = self._clock(), ask.command
        known: list[float] = []
        usual = mean = 0.0
        for kernel in candidates:
            load = kernel.load
            alone = load.of(command, now)
            known.append(alone)
            if alone and (alone < usual or not usual):
                usual = alone
            mean = max(mean, load.mean)
        usual = usual or mean
        waits: list[float] = []
        for kernel, alone in zip(candidates, known, strict=True):
            alone = alone or usual
            waits.append(alone + kernel.load.ahead(command, alone, now))
        enough = min(waits) * ABOUT
        best: Chosen | None = None
        least = (0, 0)
        for kernel, wait in zip(candidates, waits, strict=True):
            if wait <= enough:
                rank = (kernel.in_flight, kernel.last_used)
                if best is None or rank < least:
                    best, least = kernel, rank
        assert best is not None
        return best


class LeastLoaded:
    """The one with the fewest commands in flight; among equals the longest unused."""

    def choose(self, ask: Ask, candidates: Sequence[Chosen]) -> Chosen:
        return min(candidates, key=lambda kernel: (kernel.in_flight, kernel.last_used))


class Random:
    """Any of them."""

    def __init__(self, chance: random.Random | None = None) -> None:
        self._chance = chance or random.Random()

    def choose(self, ask: Ask, candidates: Sequence[Chosen]) -> Chosen:
        return self._chance.choice(candidates)


class Pinned:
    """A session stays with one kernel as long as that takes commands: for debugging, not for speed."""

    def __init__(self) -> None:
        self._kernels: OrderedDict[str, str] = OrderedDict()
        self._fallback = LeastLoaded()

    def choose(self, ask: Ask, candidates: Sequence[Chosen]) -> Chosen:
        pinned = self._kernels.get(ask.session)
        for kernel in candidates:
            if kernel.id == pinned:
                return kernel
        chosen = self._fallback.choose(ask, candidates)
        self._kernels[ask.session] = chosen.id
        if len(self._kernels) > MAX_SESSIONS:
            self._kernels.popitem(last=False)
        return chosen


def routing_named(routing: str | Routing, clock: Callable[[], float] = time.monotonic) -> Routing:
    """The strategy of that name, or the one given.

    Raises:
        ValueError: there is none of this name, or it has no method `choose`.
    """
    if isinstance(routing, str):
        match routing:
            case "fastest":
                return Fastest(clock)
            case "least_loaded":
                return LeastLoaded()
            case "random":
                return Random()
            case "pinned":
                return Pinned()
    elif callable(getattr(routing, "choose", None)):
        return routing
    raise ValueError(
        f"routing is 'fastest', 'least_loaded', 'random' or 'pinned', or an object with a method "
        f"choose(ask, candidates), not {routing!r}"
    )
