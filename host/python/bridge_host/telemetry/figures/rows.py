"""The rows of the figures: what is known of one command, error, kernel, model. Nobody changes them."""

from __future__ import annotations

from typing import Final

import msgspec

from .histogram import Histogram

__all__ = ("OTHERS", "Failure", "Latency", "Life", "ModelUse")

OTHERS: Final = "(others)"
"""What is beyond the bounds is counted under this name, so that the sums stay exact."""


class Latency(msgspec.Struct, frozen=True):
    """How long one command takes. Durations in ns, from when the host was asked until it had the result."""

    command: str
    count: int
    errors: int
    total: int
    p50: int
    p95: int
    p99: int
    low: int
    high: int
    queue_p50: int | None
    """Until it had a place in a kernel; None if no trace of it was recorded, as are the next."""
    queue_p95: int | None
    kernel_p50: int | None
    """In the kernel."""
    kernel_p95: int | None
    retries: int
    """How often it was run again because its kernel had died."""
    cached: int
    """How often the host's cache had the result."""
    durations: Histogram

    @classmethod
    def of(
        cls,
        command: str,
        errors: int,
        retries: int,
        cached: int,
        durations: Histogram,
        queue: Histogram,
        kernel: Histogram,
    ) -> Latency:
        p50, p95, p99 = (value or 0 for value in durations.percentiles(0.5, 0.95, 0.99))
        queue_p50, queue_p95 = queue.percentiles(0.5, 0.95)
        kernel_p50, kernel_p95 = kernel.percentiles(0.5, 0.95)
        return cls(
            command=command,
            count=durations.count,
            errors=errors,
            total=durations.total,
            p50=p50,
            p95=p95,
            p99=p99,
            low=durations.low,
            high=durations.high,
            queue_p50=queue_p50,
            queue_p95=queue_p95,
            kernel_p50=kernel_p50,
            kernel_p95=kernel_p95,
            retries=retries,
            cached=cached,
            durations=durations,
        )


class Failure(msgspec.Struct, frozen=True):
    """One type of error. `about` says which commands or tools, the most frequent first."""

    error: str
    of: str
    """"command" or "tool": a tool's error fails its command only if nobody there catches it."""
    count: int
    last: int
    """ns since the epoch."""
    about: tuple[tuple[str, int], ...]


class Life(msgspec.Struct, frozen=True):
    """One kernel. Times in ns since the epoch; `memory` holds pairs of such a time and bytes.

    `commands` and `errors` are those of recorded traces.
    """

    kernel: str
    pid: int | None
    started: int | None
    """None of a kernel that somebody else started."""
    ended: int | None
    """None of one that lives."""
    ready: int | None
    """How long its start took, in ns."""
    spare: bool
    deaths: int
    """How many died in its place before."""
    commands: int
    errors: int
    lost: int
    """Commands that it took with it."""
    unresponsive: int
    """How often it did not answer."""
    rss: int | None
    """Its memory when last asked, in bytes."""
    peak: int | None
    expected: bool | None
    """Whether the host ended it; None of one that lives."""
    exit_code: int | None
    reason: str
    """Why it ended."""
    recycled: str
    """Why it was replaced although it lived."""
    count: int
    """How many kernels this row stands for: more than one of those that are no longer told apart."""
    memory: tuple[tuple[int, int], ...]

    @property
    def state(self) -> str:
        """Whether it is "alive", or has "ended" as the host wanted, or "died"; "" of those that are not told apart."""
        if self.kernel == OTHERS:
            return ""
        return "alive" if self.ended is None else "ended" if self.expected else "died"


class ModelUse(msgspec.Struct, frozen=True):
    """One language model. Durations in ns, of calls that no cache of DSPy's answered; cost in USD, as DSPy says it.

    What is not known of a call (tokens, cost) is not in the sums.
    """

    model: str
    calls: int
    errors: int
    cache_hits: int
    input_tokens: int
    output_tokens: int
    tokens: int
    cost: float
    p50: int | None
    p95: int | None
    first_token_p50: int | None
