"""What can be set of a pool, with its defaults; checked when it is made."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from .breaker import Breaker
from .option_checks import require_flag, require_seconds, require_whole
from .routing import Routing, routing_named

__all__ = ("PoolOptions", "Recycle")


class Recycle(msgspec.Struct, frozen=True):
    """When a kernel has served long enough: a new one is started, then the old one finishes what it runs and ends.

    `age_s` is varied by a tenth, so that kernels that started together do not end together. `rss_bytes` is the
    kernel process's own resident memory, as it reports it with the heartbeat. With `errors`, which needs two kernels, one
    is replaced too that fails a command again and again while the others do not. Before that, the command is kept off it
    for a trial: what fails elsewhere as well never is a reason.

    Raises:
        TypeError: one is of another type. `ValueError`: it is not more than 0.
    """

    commands: int | None = None
    age_s: float | None = None
    rss_bytes: int | None = None
    errors: bool = True

    def __post_init__(self) -> None:
        for name in ("commands", "rss_bytes"):
            if (value := getattr(self, name)) is not None:
                require_whole(f"recycle: {name}", value, 1)
        if self.age_s is not None:
            require_seconds("recycle: age_s", self.age_s, none="any age")
        require_flag("recycle: errors", self.errors)


class PoolOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a pool works.

    `concurrency` is how many commands a kernel runs at once (never more than it takes), `queue` how many may wait
    over all sessions, `heartbeat` how many seconds a kernel may be silent (None: for ever), `spares` how many
    kernels are kept ready to replace one that dies. `recycle=None` is the same as `Recycle()`.

    Raises:
        TypeError: a value is of another type than its option takes.
        ValueError: a value makes no sense.
    """

    concurrency: int = 64
    queue: int = 10_000
    routing: str | Routing = "fastest"
    heartbeat: float | None = 30.0
    spares: int = 0
    recycle: Recycle | None = None
    breaker: Breaker = Breaker()
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("queue", 0), ("spares", 0)):
            require_whole(name, getattr(self, name), least)
        if self.heartbeat is not None:
            require_seconds("heartbeat", self.heartbeat, none="no heartbeat")
        # msgspec compares no types where Python makes a struct.
        if not isinstance(self.recycle, Recycle | None):
            raise TypeError(
                f"recycle is a Recycle(commands=…, age_s=…, rss_bytes=…, errors=…) or None, not {self.recycle!r:.100}"
            )
        if not isinstance(self.breaker, Breaker):
            raise TypeError(
                f"breaker is a Breaker(kernel_failures=…, command_failures=…, cooldown_s=…, error_rate=…, error_window=…), "
                f"not {self.breaker!r:.100}"
            )
        if not callable(self.clock):
            raise TypeError(f"clock is a function that returns seconds, not {self.clock!r:.100}")
        if self.heartbeat is None and self.recycle is not None and self.recycle.rss_bytes is not None:
            raise ValueError("recycle: rss_bytes is asked for with the heartbeat, which is off (heartbeat=None)")
        routing_named(self.routing)
