"""Which kernel a command goes to: small strategies over what is known of each. Pure: no processes, the clock is injected."""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ("Ask", "Candidate", "Durations", "Fastest", "LeastLoaded", "Pinned", "Random", "Routing", "routing_named")

WEIGHT: Final = 0.2  # of the newest duration in a moving average
STALE_S: Final = 30.0
MAX_COMMANDS: Final = 4096
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


class Durations:
    """Moving averages of how long commands took on one kernel, in seconds. Bounded: the oldest command is forgotten."""

    __slots__ = ("_commands", "mean")

    def __init__(self, mean: float = 0.0) -> None:
        self.mean = mean
        """Of all commands; 0 if nothing is known."""
        self._commands: OrderedDict[str, tuple[float, float]] = OrderedDict()  # average, when it was renewed

    def record(self, command: str, seconds: float, now: float) -> None:
        commands = self._commands
        known = commands.get(command)
        if known is None:
            # The first run pays for imports and caches: to judge by it would shun a kernel for what it has behind it.
            commands[command] = (0.0, now)
            if len(commands) > MAX_COMMANDS:
                commands.popitem(last=False)
            return
        average = known[0]
        commands[command] = (average + WEIGHT * (seconds - average) if average else seconds, now)
        commands.move_to_end(command)
        self.mean = self.mean + WEIGHT * (seconds - self.mean) if self.mean else seconds

    def of(self, command: str, now: float) -> float:
        """How long it takes; 0 if that is not known, or has not been seen for so long that it is worth another try."""
        known = self._commands.get(command)
        return known[0] if known is not None and now - known[1] < STALE_S else 0.0

    def expected(self, command: str, in_flight: int, now: float) -> float:
        """How long the command would take here, behind `in_flight` others."""
        return in_flight * self.mean + self.of(command, now)

    def __len__(self) -> int:
        return len(self._commands)


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
    def durations(self) -> Durations: ...


Chosen = TypeVar("Chosen", bound=Candidate)


class Routing(Protocol):
    """A strategy. `candidates` are two or more kernels that could take the command now."""

    def choose(self, ask: Ask, candidates: Sequence[Chosen]) -> Chosen: ...


class Fastest:
    """Where the command is expected to be done first: what is in flight there, and how long it takes there."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def choose(self, ask: Ask, candidates: Sequence[Chosen]) -> Chosen:
        now, command = self._clock(), ask.command
        best = candidates[0]
        least = (best.durations.expected(command, best.in_flight, now), best.in_flight, best.last_used)
        for kernel in candidates[1:]:
            wait = (kernel.durations.expected(command, kernel.in_flight, now), kernel.in_flight, kernel.last_used)
            if wait < least:
                best, least = kernel, wait
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
