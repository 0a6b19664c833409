"""What runs on one kernel, and how long a command would take beside it. Pure: who calls says what time it is.

A kernel runs its commands at once, under one lock. Those that compute share it: beside one other, each takes twice as
long. Those that wait (for a model, a tool, a disk) slow nobody and are slowed by nobody. Which kind a command is of
shows in its durations: whether they stay the same however many others there are.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple

__all__ = ("Job", "Kinds", "Load")

WEIGHT: Final = 0.2  # of the newest duration in a moving average
STALE_S: Final = 30.0
MAX_COMMANDS: Final = 4096
SLICE_S: Final = 0.005
"""Python's switch interval: who is done sooner than that waits for it all the same where somebody computes."""
STEADY: Final = 0.05
"""Durations stay the same if they are that far from the usual, in the mean of squares."""
STEADY_WEIGHT: Final = 0.03
LEAST_RUNS: Final = 30


class Job(NamedTuple):
    """A command that runs on a kernel, as its `Load` counts it. It is given back once, to `Load.end`."""

    command: str
    began: float
    served: float  # of the kernel's time that each command had had by then
    crowd: float  # how many had been there by then, summed up over time
    work: float  # seconds that it was expected to take alone
    computes: bool
    trial: bool  # what was known of it was stale


class _Kind:
    """How far a command's durations, and how far the number of commands beside it, are from the usual: mean squares of
    both, as shares of the usual.
    """

    __slots__ = ("crowding", "runs", "spread", "waits")

    def __init__(self) -> None:
        self.runs = 0
        self.spread = self.crowding = 0.0
        self.waits = False

    def add(self, longer: float, fuller: float) -> None:
        """It took `longer` than usual beside `fuller` than usual, both as shares of the usual."""
        self.runs += 1
        weight = max(STEADY_WEIGHT, 1 / self.runs)
        self.spread += weight * (longer * longer - self.spread)
        self.crowding += weight * (fuller * fuller - self.crowding)
        if self.waits:
            self.waits = self.spread < 2 * STEADY and self.spread < 1.2 * self.crowding
        elif self.runs >= LEAST_RUNS:
            self.waits = self.spread < STEADY and self.spread < self.crowding / 1.5


class Kinds:
    """Which commands compute and which wait, wherever they run: one for all kernels of a pool. Bounded as `Load` is.

    One waits if its durations stay the same however many commands are beside it. That is judged by the number of
    these alone, whatever kind they are: who took the kinds for granted would never find out that they are wrong. So
    what waits for an uncertain time counts as computing, which is the safe side: then it is as if only the number
    counted.
    """

    __slots__ = ("_kinds",)

    def __init__(self) -> None:
        self._kinds: OrderedDict[str, _Kind] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kinds)

    def waits(self, command: str) -> bool:
        """Whether the command is known to wait rather than compute."""
        kind = self._kinds.get(command)
        return kind is not None and kind.waits

    def of(self, command: str) -> _Kind:
        kind = self._kinds.get(command)
        if kind is None:
            kind = self._kinds[command] = _Kind()
            if len(self._kinds) > MAX_COMMANDS:
                self._kinds.popitem(last=False)
        else:
            self._kinds.move_to_end(command)
        return kind


class _Known:
    """Moving averages of one command on one kernel."""

    __slots__ = ("alone", "crowd", "renewed", "runs", "seconds")

    def __init__(self, now: float) -> None:
        self.runs = 0
        self.seconds = 0.0
        self.crowd = 0.0
        """How many commands ran meanwhile, itself included."""
        self.alone = 0.0
        """How long it would take alone, in seconds; 0 if that is not known."""
        self.renewed = now


class Load:
    """One kernel's. Bounded: of the commands, the one that was longest unused is forgotten. All in constant time."""

    __slots__ = ("_at", "_computing", "_crowd", "_jobs", "_kinds", "_known", "_served", "_since", "_work", "mean")

    def __init__(self, kinds: Kinds, mean: float = 0.0) -> None:
        self._kinds = kinds
        self.mean = mean
        """How long a command takes of which nothing is known, in seconds; 0 if that is not known either."""
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._at = 0.0
        self._served = 0.0  # the seconds of computing that a command had which was there all the time
        self._crowd = 0.0  # how many commands were there, summed up over time
        # Sums over what is in flight:
        self._jobs = 0
        self._computing = 0  # how many of them compute
        self._work = 0.0  # of those, `work`
        self._since = 0.0  # of those, `served`

    def __len__(self) -> int:
        return len(self._known)

    # -- what runs -------------------------------------------------------------------

    def begin(self, command: str, now: float) -> Job:
        """The command is sent there."""
        self._advance(now)
        known, computes, trial = self._known.get(command), not self._kinds.waits(command), False
        work = self.mean
        if known is not None and known.runs:
            trial = now - known.renewed >= STALE_S
            known.renewed = now  # others wait for what comes of a trial
            work = known.alone
        self._jobs += 1
        if computes:
            self._computing += 1
            self._work += work
            self._since += self._served
        return Job(command, now, self._served, self._crowd, work, computes, trial)

    def end(self, job: Job, now: float, *, typical: bool) -> None:
        """The command has ended; `typical` unless it says nothing of how long the command takes."""
        self._advance(now)
        self._jobs -= 1
        if job.computes:
            self._computing -= 1
            self._work -= job.work
            self._since -= job.served
            if not self._computing:
                self._work = self._since = 0.0  # so that no rounding adds up
        if typical and (seconds := now - job.began) > 0:
            alone = self._served - job.served if job.computes else seconds
            self.record(job.command, alone, now, seconds, (self._crowd - job.crowd) / seconds, trial=job.trial)
        if not self._jobs:
            self._served = self._crowd = 0.0

    def _advance(self, now: float) -> None:
        past = now - self._at
        self._served += past / (self._computing or 1)
        self._crowd += past * self._jobs
        self._at = now

    # -- what is known -----------------------------------------------------------------

    def record(
        self,
        command: str,
        alone: float,
        now: float,
        seconds: float | None = None,
        crowd: float = 1.0,
        *,
        trial: bool = False,
    ) -> None:
        """The command took `seconds`, beside so many commands that it would have taken `alone` without those that
        compute; `crowd` is how many there were, itself included. After a trial what was before is forgotten.
        """
        known = self._known.get(command)
        if known is None:
            # The first run pays for imports and caches: to judge by it would shun a kernel for what it has behind it.
            self._known[command] = _Known(now)
            if len(self._known) > MAX_COMMANDS:
                self._known.popitem(last=False)
            return
        if trial:
            known = self._known[command] = _Known(now)
        seconds = alone if seconds is None else seconds
        longer, fuller = seconds - known.seconds, crowd - known.crowd
        if known.runs:
            self._kinds.of(command).add(longer / known.seconds, fuller / known.crowd)
        known.runs += 1
        weight = max(STEADY_WEIGHT, 1 / known.runs)
        known.seconds += weight * longer
        known.crowd += weight * fuller
        known.alone += max(WEIGHT, 1 / known.runs) * (alone - known.alone)
        known.renewed = now
        self.mean += WEIGHT * (alone - self.mean) if self.mean else alone
        self._known.move_to_end(command)

    def of(self, command: str, now: float) -> float:
        """How long it takes alone; 0 if that is not known, or has not been seen for so long that it is worth another
        try.
        """
        known = self._known.get(command)
        return known.alone if known is not None and now - known.renewed < STALE_S else 0.0

    def ahead(self, command: str, seconds: float, now: float) -> float:
        """How much longer than `seconds`, which it takes alone, it would take because of what runs there."""
        computing = self._computing
        if not computing or self._kinds.waits(command):
            return 0.0
        served = self._served + (now - self._at) / computing
        # What was expected, less what they have had. Who is overdue is expected to need as much again as it is overdue.
        left = abs(self._work - (computing * served - self._since))
        # Where all get the same, each of the others gets no more meanwhile than the command itself does.
        return min(computing * max(seconds, SLICE_S), left)

    def expected(self, command: str, now: float) -> float:
        """How long the command would take here, in seconds; 0 if nothing is known."""
        alone = self.of(command, now) or self.mean
        return alone + self.ahead(command, alone, now)
