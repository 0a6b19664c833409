"""A host at one moment, as the pages that are looked at show it: the dashboard, `jupyter bridge top`."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from ...display import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bridge_kernel.contract.telemetry import Event

    from ...pool.kernel import KernelStatus, PoolStatus
    from ..figures.metrics import Metrics

__all__ = (
    "CircuitView",
    "CommandView",
    "ErrorView",
    "Health",
    "KernelView",
    "Snapshot",
    "Snapshots",
)

MAX_KERNELS: Final = 200
MAX_COMMANDS: Final = 10
MANY_ERRORS: Final = 5
MANY_FAILING: Final = 0.1  # of the commands of the last minute
MAX_ERRORS: Final = 10
MAX_CIRCUITS: Final = 20
MAX_TEXT: Final = 160  # characters of a name: subjects and types of errors are the user's own

Health = Literal["ok", "busy", "degraded", "down", "closed"]


class KernelView(msgspec.Struct, frozen=True):
    """One kernel."""

    id: str
    """The first eight characters; "" while it starts."""
    pid: int
    state: str
    """As `KernelStatus` has it."""
    in_flight: int
    completed: int
    rss: int
    """Bytes; 0 if not known yet."""
    born: float
    """Seconds since the epoch."""
    error_rate: float | None
    """The share of its commands that failed, 0 to 1; None if it has run none."""


class CommandView(msgspec.Struct, frozen=True):
    """One command, over the whole life of the host. Durations in ns."""

    subject: str
    count: int
    errors: int
    p50: int
    p95: int
    p99: int


class ErrorView(msgspec.Struct, frozen=True):
    """A command that failed."""

    at: float
    """Seconds since the epoch."""
    subject: str
    type: str


class CircuitView(msgspec.Struct, frozen=True):
    """A command that is held back."""

    subject: str
    kernel: str
    """Off which kernel; "" off all."""
    failures: int
    until: float
    """Seconds since the epoch; after that one is let through, to see."""


class Snapshot(msgspec.Struct, frozen=True, tag="snapshot", tag_field="kind"):
    """A host at one moment. Texts are printable, 160 characters at most; nothing in it grows without bound."""

    at: float
    """Seconds since the epoch, by the host's clock, as all times here."""
    pid: int
    started: float
    """When the host was opened."""
    health: Health
    summary: str
    """The state in words. It changes when the state does, not with each number."""
    kernels: tuple[KernelView, ...]
    """The first 200."""
    kernels_in_all: int
    ready: int
    wanted: int
    in_flight: int
    """Commands that run now."""
    waiting: int
    rejected: int
    commands_per_s: float
    errors_per_s: float
    p50: int | None
    """Of the commands that ended in the last minute, in ns; None if there were none. `p95`, `p99` too."""
    p95: int | None
    p99: int | None
    command_series: tuple[int, ...]
    """Commands that ended in each of the last 60 s, oldest first."""
    error_series: tuple[int, ...]
    commands: tuple[CommandView, ...]
    """The ten that were called most, the most first."""
    tokens: int
    cost: float
    """USD, of all calls of language models."""
    cache_hits: int
    errors: tuple[ErrorView, ...]
    """The last ten, newest first."""
    circuits: tuple[CircuitView, ...]

    def same_as(self, other: Snapshot | None) -> bool:
        """Whether a page that shows `other` shows this already: all but the moment is the same."""
        return other is not None and msgspec.structs.replace(other, at=self.at) == self


class _Notes:
    """What the pages show that no figure keeps: the last errors, what was refused, what is held back. Thread-safe."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._lock = threading.RLock()  # a finalizer that runs while it is held may emit something itself
        self._errors: deque[ErrorView] = deque(maxlen=MAX_ERRORS)
        self._circuits: OrderedDict[tuple[str, str], CircuitView] = OrderedDict()
        self.rejected = 0
        self._noting: Final[dict[tuple[str, ...], Callable[[Event], None]]] = {
            ("bridge", "command", "exception"): self._failed,
            ("bridge", "pool", "queue", "reject"): self._rejected,
            ("bridge", "pool", "breaker", "open"): self._opened,
            ("bridge", "pool", "breaker", "close"): self._closed,
            ("bridge", "kernel", "stop"): self._ended,
        }

    def take(self, event: Event) -> None:
        note = self._noting.get(event.name)
        if note is not None:
            with self._lock:
                note(event)

    def _failed(self, event: Event) -> None:
        said = event.metadata
        self._errors.appendleft(ErrorView(self._wall(), _text(said.get("subject")), _text(said.get("error"))))

    def _rejected(self, event: Event) -> None:
        self.rejected += 1

    def _opened(self, event: Event) -> None:
        subject, kernel = str(event.metadata.get("subject")), str(event.metadata.get("kernel", ""))
        until = self._wall() + event.measurements.get("cooldown", 0) / 1e9
        failures = int(event.measurements.get("failures", 0))
        self._circuits[subject, kernel] = CircuitView(_text(subject), kernel[:8], failures, until)
        if len(self._circuits) > MAX_CIRCUITS:
            self._circuits.popitem(last=False)

    def _closed(self, event: Event) -> None:
        self._circuits.pop((str(event.metadata.get("subject")), str(event.metadata.get("kernel", ""))), None)

    def _ended(self, event: Event) -> None:
        for key in [key for key in self._circuits if key[1] == event.metadata.get("kernel")]:
            del self._circuits[key]

    def now(self) -> tuple[tuple[ErrorView, ...], tuple[CircuitView, ...]]:
        with self._lock:
            return tuple(self._errors), tuple(self._circuits.values())


class Snapshots:
    """Where pages get what they show: `take()`. Thread-safe.

    A host says when it is opened and when it is closed; who shows a page hears of its end by `on_close`.
    """

    def __init__(self, metrics: Metrics, wall: Callable[[], float] = time.time) -> None:
        self._metrics = metrics
        self._wall = wall
        self._notes = _Notes(wall)
        self.note: Callable[[Event], None] = self._notes.take
        """Take what an event says that no figure keeps."""
        self._lock = threading.Lock()
        self._status: Callable[[], PoolStatus] | None = None
        self._started = wall()
        self._over = False
        self._on_close: dict[int, Callable[[], None]] = {}
        self._born: dict[int, float] = {}  # by pid

    def opened(self, status: Callable[[], PoolStatus]) -> None:
        """The host is open: this is how its kernels are looked at, from any thread."""
        with self._lock:
            self._status, self._started, self._over = status, self._wall(), False

    def closed(self) -> None:
        """The host is closed; who shows a page is told so. Closing twice does nothing."""
        with self._lock:
            self._status, self._over = None, True
            told, self._on_close = list(self._on_close.values()), {}
        for tell in told:
            tell()

    @property
    def open(self) -> bool:
        return self._status is not None

    def on_close(self, tell: Callable[[], None]) -> Callable[[], None]:
        """Call `tell()` when the host is closed, on the thread that closes it; what this gives takes that back.

        If it has been closed already `tell()` is called now.
        """
        with self._lock:
            over = self._over
            if not over:
                self._on_close[id(tell)] = tell
        if over:
            tell()

        def forget() -> None:
            with self._lock:
                self._on_close.pop(id(tell), None)

        return forget

    def take(self) -> Snapshot:
        """The host as it is now. A millisecond or so; nothing is waited for."""
        at, status = self._wall(), self._status
        pool = status() if status is not None else None
        kernels = pool.kernels if pool is not None else ()
        # Kept: an age and the time now are never read at the same moment, and what is shown should not tremble.
        self._born = {kernel.pid: self._born.get(kernel.pid, round(at - kernel.age_s, 1)) for kernel in kernels}
        recent, glance = self._metrics.recent(), self._metrics.glance(MAX_COMMANDS)
        errors, circuits = self._notes.now()
        ready = sum(kernel.state == "ready" for kernel in kernels)
        failed = sum(recent.errors)
        failing = failed >= MANY_ERRORS and failed >= MANY_FAILING * sum(recent.commands)
        health, summary = _judged(pool, ready, circuits, failing=failing)
        return Snapshot(
            at=at,
            pid=os.getpid(),
            started=self._started,
            health=health,
            summary=summary,
            kernels=tuple(_kernel(kernel, self._born[kernel.pid], glance.failing) for kernel in kernels[:MAX_KERNELS]),
            kernels_in_all=len(kernels),
            ready=ready,
            wanted=pool.wanted if pool is not None else 0,
            in_flight=sum(kernel.in_flight for kernel in kernels),
            waiting=pool.queue if pool is not None else 0,
            rejected=self._notes.rejected,
            commands_per_s=recent.commands_per_s,
            errors_per_s=recent.errors_per_s,
            p50=recent.p50,
            p95=recent.p95,
            p99=recent.p99,
            command_series=recent.commands,
            error_series=recent.errors,
            commands=tuple(_command(*command) for command in glance.commands),
            tokens=glance.tokens,
            cost=glance.cost,
            cache_hits=glance.cached,
            errors=errors,
            circuits=circuits,
        )


def _kernel(kernel: KernelStatus, born: float, rates: Mapping[str, float]) -> KernelView:
    return KernelView(
        one_line(kernel.id[:8]),
        kernel.pid,
        kernel.state,
        kernel.in_flight,
        kernel.completed,
        kernel.rss,
        born,
        rates.get(kernel.id),
    )


def _command(subject: str, *figures: int) -> CommandView:
    return CommandView(_text(subject), *figures)


def _judged(
    pool: PoolStatus | None, ready: int, circuits: tuple[CircuitView, ...], *, failing: bool
) -> tuple[Health, str]:
    """The state, and what to say of it: no numbers that change all the time, for it is read out when it changes."""
    if pool is None:
        return "closed", "The host is closed."
    states = Counter(kernel.state for kernel in pool.kernels)
    if not pool.wanted and not ready:
        return "ok", "No kernels: scale the pool, or attach one."
    troubles = [f"{states[state]} {state}" for state in ("starting", "unresponsive", "dead") if states[state]]
    if ready < pool.wanted:
        first = f"{ready} of {_plural(pool.wanted, 'kernel')} ready"
    else:
        first = f"{_plural(ready, 'kernel')} ready"
    said = ", ".join([first, *troubles])
    if circuits:
        said += f"; {_plural(len(circuits), 'command')} held back"
    if not ready:
        return "down", f"{said}."
    if failing:
        said += "; many commands fail"
    if circuits or failing or ready < pool.wanted or states["unresponsive"]:
        return "degraded", f"{said}."
    if pool.queue:
        return "busy", f"{said}; commands wait for one."
    return "ok", f"{said}."


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _text(value: object) -> str:
    text = one_line(str(value)[: MAX_TEXT + 1])
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
