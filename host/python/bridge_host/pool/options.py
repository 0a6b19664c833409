"""What can be set of a pool, with its defaults; checked when it is made."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from .breaker import Breaker
from .routing import Routing, routing_named

__all__ = ("PoolOptions", "Recycle")


class Recycle(msgspec.Struct, frozen=True):
    """When a kernel has served long enough: a new one is started, then the old one finishes what it runs and ends.

    `age_s` is varied by a tenth, so that kernels that started together do not end together. `rss_bytes` is the
    kernel process's own resident memory, as it reports it with the heartbeat.
    """

    commands: int | None = None
    age_s: float | None = None
    rss_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("commands", "age_s", "rss_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"recycle: {name} must be more than 0, not {value!r}")


class PoolOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a pool works.

    `concurrency` is how many commands a kernel runs at once (never more than it takes), `queue` how many may wait
    over all sessions, `heartbeat` how many seconds a kernel may be silent (None: for ever), `spares` how many
    kernels are kept ready to replace one that dies.

    Raises:
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
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is a whole number, {least} or more, not {value!r}")
        if self.heartbeat is not None and not 0 < self.heartbeat < float("inf"):
            raise ValueError(f"heartbeat is in seconds, more than 0, or None for none, not {self.heartbeat!r}")
        if self.heartbeat is None and self.recycle is not None and self.recycle.rss_bytes is not None:
            raise ValueError("recycle: rss_bytes is asked for with the heartbeat, which is off (heartbeat=None)")
        routing_named(self.routing)
