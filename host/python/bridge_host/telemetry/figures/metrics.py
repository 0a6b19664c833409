"""Figures of what happened: exact counts and sums in bounded memory, changed by each event as it comes."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from .counts import CommandCount, ErrorCount, KernelCount, ModelCount, Second
from .histogram import Histogram
from .rows import OTHERS, Failure, Latency, Life, ModelUse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bridge_kernel.contract.telemetry import Event, Scalar

    from .tables import Errors, Kernels, Latencies, Models

    Numbers = Mapping[str, int | float]
    Said = Mapping[str, Scalar]

__all__ = ("Glance", "Metrics", "Recent")

MAX_COMMANDS: Final = 1000
MAX_ERRORS: Final = 200
MAX_ABOUT: Final = 20  # commands or tools that are told apart for one type of error
MAX_KERNELS: Final = 500
MAX_MODELS: Final = 200
WINDOW_S: Final = 60

_Row = TypeVar("_Row")


class Recent(msgspec.Struct, frozen=True):
    """The last minute. The series have 60 numbers, oldest first, one a second; the last second is not over yet."""

    commands_per_s: float
    errors_per_s: float
    p50: int | None
    """Of the commands that ended in this minute, in ns; None if there were none."""
    p95: int | None
    p99: int | None
    commands: tuple[int, ...]
    errors: tuple[int, ...]


class Glance(msgspec.Struct, frozen=True):
    """What a page shows, beside `Recent`."""

    commands: tuple[tuple[str, int, int, int, int, int], ...]
    """Name, count, errors, p50, p95, p99 (ns) of those that were called most, the most first."""
    failing: dict[str, float]
    """By kernel the share of its commands that failed, 0 to 1; of those that ran any."""
    cached: int
    tokens: int
    cost: float


class Metrics:
    """Thread-safe. `clock` gives seconds that never go back, `wall` the time in ns since the epoch.

    Commands are all counted, also those of traces that are not recorded; what kernels say of them (time in the
    kernel, model calls) and what the queue says is known of recorded traces only.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._wall = wall
        self._lock = threading.RLock()  # a finalizer that runs while it is held may emit something itself
        self._commands: dict[str, CommandCount] = {}
        self._errors: dict[tuple[str, str], ErrorCount] = {}
        self._kernels: dict[str, KernelCount] = {}
        self._other_kernels = KernelCount(0)
        self._models: dict[str, ModelCount] = {}
        self._seconds = [Second(-1) for _ in range(WINDOW_S)]
        self._began = clock()
        self._counting: dict[tuple[str, ...], Callable[[Numbers, Said], None]] = {
            ("bridge", "command", "stop"): self._command_stopped,
            ("bridge", "command", "exception"): self._command_failed,
            ("bridge", "pool", "route"): self._routed,
            ("bridge", "execution", "stop"): self._executed,
            ("bridge", "execution", "exception"): self._execution_failed,
            ("bridge", "tool", "exception"): self._tool_failed,
            ("bridge", "kernel", "start"): self._kernel_started,
            ("bridge", "kernel", "stop"): self._kernel_stopped,
            ("bridge", "kernel", "memory"): self._kernel_measured,
            ("bridge", "kernel", "unresponsive"): self._kernel_silent,
            ("bridge", "pool", "recycle"): self._kernel_recycled,
            ("bridge", "dspy", "lm", "stop"): self._model_called,
            ("bridge", "dspy", "lm", "exception"): self._model_failed,
        }

    def take(self, event: Event) -> None:
        """Count one event. One that lacks what docs/telemetry.md says it has is not counted."""
        count = self._counting.get(event.name)
        if count is not None:
            with self._lock:
                try:
                    count(event.measurements, event.metadata)
                except (KeyError, TypeError, ValueError, OverflowError):  # each looks before it changes anything
                    return

    # -- counting, with the lock held ----------------------------------------------

    def _command_stopped(self, numbers: Numbers, said: Said) -> None:
        attempts = numbers["attempts"]
        row, _ = self._command_ended(numbers["duration"], said["subject"])
        if attempts == 0:
            row.cached += 1
        elif attempts > 1:
            row.retries += int(attempts) - 1

    def _command_failed(self, numbers: Numbers, said: Said) -> None:
        attempts, error, subject = numbers["attempts"], said["error"], said["subject"]
        row, second = self._command_ended(numbers["duration"], subject)
        row.errors += 1
        second.errors += 1
        if attempts > 1:
            row.retries += int(attempts) - 1
        self._failed("command", error, subject)

    def _command_ended(self, duration: float, subject: Scalar) -> tuple[CommandCount, Second]:
        row = self._commands.get(subject)  # type: ignore[arg-type]  # what is no text is not found
        if row is None:
            row = self._command(subject)
        bucket = row.duration.add(duration)
        at = int(self._clock())
        second = self._seconds[at % WINDOW_S]
        if second.at != at:
            second = self._seconds[at % WINDOW_S] = Second(at)
        second.commands += 1
        second.durations[bucket] = second.durations.get(bucket, 0) + 1
        return row, second

    def _command(self, subject: Scalar) -> CommandCount:
        return _row(self._commands, str(subject), CommandCount, MAX_COMMANDS)

    def _failed(self, of: str, error: Scalar, about: Scalar) -> None:
        key = (of, str(error))
        if key not in self._errors and len(self._errors) >= MAX_ERRORS:
            key = (of, OTHERS)
        row = self._errors.get(key)
        if row is None:
            row = self._errors[key] = ErrorCount()
        name = str(about)
        if name not in row.about and len(row.about) >= MAX_ABOUT:
            name = OTHERS
        row.about[name] = row.about.get(name, 0) + 1
        row.count += 1
        row.last = self._wall()

    def _tool_failed(self, numbers: Numbers, said: Said) -> None:
        self._failed("tool", said["error"], said["tool"])

    def _routed(self, numbers: Numbers, said: Said) -> None:
        queue, subject = numbers["queue"], said["subject"]
        row = self._commands.get(subject)  # type: ignore[arg-type]
        if row is None:
            # To the pool, sessions' functions of one name are different commands: "f 1a2b3c4d".
            text = str(subject)
            row = self._command(text[:-9] if text[-9:-8] == " " else text)
        row.queue.add(queue)

    def _executed(self, numbers: Numbers, said: Said) -> None:
        duration, kernel, subject = numbers["duration"], said["kernel"], said["subject"]
        row = self._commands.get(subject)  # type: ignore[arg-type]
        if row is None:
            row = self._command(subject)
        row.kernel.add(duration)
        if kernel:  # "" if it was lost before it was known which
            self._kernel(kernel).commands += 1

    def _execution_failed(self, numbers: Numbers, said: Said) -> None:
        self._executed(numbers, said)
        if said["kernel"]:
            self._kernel(said["kernel"]).errors += 1

    def _kernel(self, id: Scalar) -> KernelCount:
        row = self._kernels.get(id)  # type: ignore[arg-type]
        if row is None:
            if len(self._kernels) >= MAX_KERNELS:
                # Kernels come and go: the first of those that have ended makes room, else the first of all.
                gone = next((id for id, row in self._kernels.items() if row.ended is not None), None)
                self._other_kernels.fold(self._kernels.pop(next(iter(self._kernels)) if gone is None else gone))
            row = self._kernels[str(id)] = KernelCount()
        return row

    def _kernel_started(self, numbers: Numbers, said: Said) -> None:
        ready, started, deaths = int(numbers["duration"]), int(numbers["system_time"]), _int_or_none(said["deaths"])
        spare = bool(said["spare"])
        row = self._kernel(said["kernel"])
        row.pid = _int_or_none(said.get("pid"))
        row.ready, row.started, row.deaths, row.spare = ready, started, deaths or 0, spare

    def _kernel_stopped(self, numbers: Numbers, said: Said) -> None:
        lived, at, lost = int(numbers["duration"]), int(numbers["system_time"]), int(numbers["lost"])
        expected, reason = bool(said["expected"]), str(said["reason"])
        row = self._kernel(said["kernel"])
        row.ended = at
        if row.started is None:
            row.started = at - lived
        row.lost += lost
        row.pid = _int_or_none(said.get("pid"))
        row.exit_code = _int_or_none(said.get("exit_code"))
        row.expected, row.reason = expected, reason

    def _kernel_measured(self, numbers: Numbers, said: Said) -> None:
        rss = int(numbers["rss"])
        row = self._kernel(said["kernel"])
        row.pid = _int_or_none(said.get("pid"))
        row.remember(self._wall(), rss)

    def _kernel_silent(self, numbers: Numbers, said: Said) -> None:
        self._kernel(said["kernel"]).unresponsive += 1

    def _kernel_recycled(self, numbers: Numbers, said: Said) -> None:
        reason = str(said["reason"])
        self._kernel(said["kernel"]).recycled = reason

    def _model_called(self, numbers: Numbers, said: Said) -> None:
        duration, hit = int(numbers["duration"]), said.get("cache_hit") is True
        given, made = int(numbers.get("input_tokens", 0)), int(numbers.get("output_tokens", 0))
        both, cost, first = int(numbers.get("tokens", given + made)), numbers.get("cost", 0), numbers.get("first_token")
        row = _row(self._models, str(said["model"]), ModelCount, MAX_MODELS)
        if hit:
            row.cache_hits += 1
        else:
            row.duration.add(duration)
        if first is not None:
            row.first.add(first)
        row.calls += 1
        row.input += given
        row.output += made
        row.tokens += both
        row.cost += cost

    def _model_failed(self, numbers: Numbers, said: Said) -> None:
        self._model_called(numbers, said)
        _row(self._models, str(said["model"]), ModelCount, MAX_MODELS).errors += 1

    # -- what is known ---------------------------------------------------------------

    def recent(self) -> Recent:
        """The last minute: rates, percentiles, and a series of seconds."""
        with self._lock:
            now = self._clock()
            last = int(now)
            first = last - WINDOW_S + 1
            seconds = [self._seconds[at % WINDOW_S] for at in range(first, last + 1)]
            commands = tuple([second.commands if second.at >= first else 0 for second in seconds])
            errors = tuple([second.errors if second.at >= first else 0 for second in seconds])
            durations = [second.durations.copy() for second in seconds if second.at >= first]
        together = Histogram.of_buckets(itertools.chain.from_iterable(one.items() for one in durations))
        # The last second is not over, and a young host has not seen sixty of them.
        elapsed = max(min(now - first, now - self._began), 1.0)
        p50, p95, p99 = together.percentiles(0.5, 0.95, 0.99)
        return Recent(sum(commands) / elapsed, sum(errors) / elapsed, p50, p95, p99, commands, errors)

    def latencies(self) -> Latencies:
        """See `Telemetry.latencies`."""
        from .tables import Latencies

        with self._lock:
            copies = [
                (name, row.errors, row.retries, row.cached, row.duration.copy(), row.queue.copy(), row.kernel.copy())
                for name, row in self._commands.items()
                if row.duration.count
            ]
        rows = [Latency.of(*copy) for copy in copies]
        return Latencies(sorted(rows, key=lambda row: (row.command == OTHERS, -row.total)))

    def errors(self) -> Errors:
        """See `Telemetry.errors`."""
        from .tables import Errors

        with self._lock:
            rows = [
                Failure(error, of, row.count, row.last, tuple(sorted(row.about.items(), key=lambda one: -one[1])))
                for (of, error), row in self._errors.items()
            ]
        return Errors(sorted(rows, key=lambda row: (row.error == OTHERS, -row.count)))

    def kernels(self) -> Kernels:
        """See `Telemetry.kernels`."""
        from .tables import Kernels

        with self._lock:
            named = list(self._kernels.items())
            if self._other_kernels.kernels:
                named.append((OTHERS, self._other_kernels))
            rows = [
                Life(
                    kernel=name,
                    pid=row.pid,
                    started=row.started,
                    ended=row.ended,
                    ready=row.ready,
                    spare=row.spare,
                    deaths=row.deaths,
                    commands=row.commands,
                    errors=row.errors,
                    lost=row.lost,
                    unresponsive=row.unresponsive,
                    rss=row.rss,
                    peak=row.peak,
                    expected=row.expected,
                    exit_code=row.exit_code,
                    reason=row.reason,
                    recycled=row.recycled,
                    count=row.kernels,
                    memory=tuple(zip(row.times, row.sizes, strict=True)),
                )
                for name, row in named
            ]
            now = self._wall()
        return Kernels(sorted(rows, key=lambda row: (row.kernel == OTHERS, row.started or 0)), now)

    def models(self) -> Models:
        """See `Telemetry.models`."""
        from .tables import Models

        with self._lock:
            rows = [
                ModelUse(
                    model=name,
                    calls=row.calls,
                    errors=row.errors,
                    cache_hits=row.cache_hits,
                    input_tokens=row.input,
                    output_tokens=row.output,
                    tokens=row.tokens,
                    cost=row.cost,
                    p50=row.duration.percentile(0.5),
                    p95=row.duration.percentile(0.95),
                    first_token_p50=row.first.percentile(0.5),
                )
                for name, row in self._models.items()
            ]
        return Models(sorted(rows, key=lambda row: (row.model == OTHERS, -row.tokens)))

    def glance(self, commands: int) -> Glance:
        """What a page shows of it twice a second: cheap, however much there is. The most called `commands` first."""
        with self._lock:
            busiest = heapq.nlargest(commands, self._commands.items(), key=lambda item: item[1].duration.count)
            return Glance(
                tuple([_glanced(name, row) for name, row in busiest if row.duration.count]),
                {name: row.errors / row.commands for name, row in self._kernels.items() if row.commands},
                sum(row.cached for row in self._commands.values()),
                sum(row.tokens for row in self._models.values()),
                sum(row.cost for row in self._models.values()),
            )


def _glanced(name: str, row: CommandCount) -> tuple[str, int, int, int, int, int]:
    p50, p95, p99 = (value or 0 for value in row.duration.percentiles(0.5, 0.95, 0.99))
    return name, row.duration.count, row.errors, p50, p95, p99


def _row(rows: dict[str, _Row], name: str, make: Callable[[], _Row], most: int) -> _Row:
    """That of this name; beyond `most` names the others'."""
    row = rows.get(name)
    if row is None:
        if len(rows) >= most:
            name = OTHERS
        row = rows.get(name)
        if row is None:
            row = rows[name] = make()
    return row


def _int_or_none(value: Scalar) -> int | None:
    return None if value is None else int(value)
