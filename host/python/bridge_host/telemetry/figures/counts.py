"""What is counted of one command, error, kernel, model or second: plain, changed in place by `Metrics`."""

from __future__ import annotations

from array import array
from typing import Final

from .histogram import Histogram

__all__ = ("CommandCount", "ErrorCount", "KernelCount", "ModelCount", "Second")

MAX_MEMORY: Final = 240  # points of a kernel's memory over time


class CommandCount:
    __slots__ = ("cached", "duration", "errors", "kernel", "queue", "retries")

    def __init__(self) -> None:
        self.errors = 0
        self.retries = 0
        self.cached = 0
        self.duration = Histogram()
        self.queue = Histogram()
        self.kernel = Histogram()


class ErrorCount:
    __slots__ = ("about", "count", "last")

    def __init__(self) -> None:
        self.count = 0
        self.about: dict[str, int] = {}
        self.last = 0


class KernelCount:
    __slots__ = (
        *("commands", "deaths", "ended", "errors", "exit_code", "expected", "kernels", "lost", "peak", "pid"),
        *(
            "ready",
            "reason",
            "recycled",
            "rss",
            "sizes",
            "spare",
            "started",
            "stride",
            "times",
            "unresponsive",
            "window",
        ),
    )

    def __init__(self, kernels: int = 1) -> None:
        self.kernels = kernels
        self.pid: int | None = None
        self.started: int | None = None
        self.ended: int | None = None
        self.ready: int | None = None
        self.spare = False
        self.deaths = 0
        self.commands = 0
        self.errors = 0
        self.lost = 0
        self.unresponsive = 0
        self.rss: int | None = None
        self.peak: int | None = None
        self.exit_code: int | None = None
        self.expected: bool | None = None
        self.reason = ""
        self.recycled = ""
        # Memory over time: each point is the most of a window of `stride` measurements.
        self.times = array("q")
        self.sizes = array("q")
        self.stride = 1
        self.window = 0

    def remember(self, at: int, rss: int) -> None:
        self.rss = rss
        if self.peak is None or rss > self.peak:
            self.peak = rss
        if self.window:
            self.sizes[-1] = max(self.sizes[-1], rss)
        else:
            if len(self.times) == MAX_MEMORY:
                halves = zip(self.sizes[::2], self.sizes[1::2], strict=True)
                self.times, self.sizes = self.times[::2], array("q", map(max, halves))
                self.stride *= 2
            self.times.append(at)
            self.sizes.append(rss)
        self.window = (self.window + 1) % self.stride

    def fold(self, other: KernelCount) -> None:
        """Stand for `other` too."""
        self.kernels += other.kernels
        self.commands += other.commands
        self.errors += other.errors
        self.lost += other.lost
        self.unresponsive += other.unresponsive
        self.peak = max((peak for peak in (self.peak, other.peak) if peak is not None), default=None)


class ModelCount:
    __slots__ = ("cache_hits", "calls", "cost", "duration", "errors", "first", "input", "output", "tokens")

    def __init__(self) -> None:
        self.calls = 0
        self.errors = 0
        self.cache_hits = 0
        self.input = 0
        self.output = 0
        self.tokens = 0
        self.cost = 0.0
        self.duration = Histogram()
        self.first = Histogram()


class Second:
    __slots__ = ("at", "commands", "durations", "errors")

    def __init__(self, at: int) -> None:
        self.at = at
        self.commands = 0
        self.errors = 0
        self.durations: dict[int, int] = {}  # by the buckets of a histogram: they need not be found twice
