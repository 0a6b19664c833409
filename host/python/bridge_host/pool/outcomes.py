"""How commands end, and which kernel fails where the others do not. Pure: no clock but the times that it is told."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from bridge_kernel.contract.errors import (
    BridgeError,
    Cancelled,
    CircuitOpen,
    Conflict,
    Draining,
    HostClosed,
    InvalidArguments,
    InvalidParams,
    InvalidRequest,
    InvalidValue,
    KernelDied,
    MethodNotFound,
    NotFound,
    Overloaded,
    PolicyDenied,
    QueueFull,
    QuotaExceeded,
    SourceMissing,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("FAILED", "Comparison", "Outcome", "Verdict", "Window", "outcome_of")

Outcome = Literal["ok", "error", "refused", "died", "timeout", "cancelled"]
"""How a command ended. "error" is an error of its own code, "refused" one of whoever asked for it, "died" and
"timeout" are failures of its kernel's."""

FAILED: Final = frozenset({"error", "timeout"})
"""What counts against a kernel that lives."""

_OF_THE_CALLER: Final = (
    Cancelled,
    CircuitOpen,
    Conflict,
    Draining,
    HostClosed,
    InvalidArguments,
    InvalidParams,
    InvalidRequest,
    InvalidValue,
    KernelDied,
    MethodNotFound,
    NotFound,
    Overloaded,
    PolicyDenied,
    QueueFull,
    QuotaExceeded,
    SourceMissing,
)

LAST: Final = 20
"""How many calls of each kernel are compared."""
LEAST: Final = 5
"""Errors that a kernel must have, and calls that its peers must have, before it is judged."""
SEVERAL: Final = 3
"""Sessions that failed there: as many hardly all have bad data, and then any session's calls elsewhere count."""
RATE: Final = 0.5
MORE: Final = 0.4
CHANCE: Final = 1e-4
"""A difference that would come about more often than that where all kernels fail alike is no reason: judged after
each call, a command that fails half of the time would soon have a kernel replaced for nothing."""
TRIED: Final = (10, 300)
"""How many calls elsewhere a trial takes, at least and at most."""
LONGER: Final = 3
"""So many times as many calls as raised the suspicion: that even LEAST errors cannot well be missing by chance."""
GONE: Final = 1e-3
"""How likely it may be, at most, that the errors are fewer since the trial began by chance alone."""
PATIENCE_S: Final = 60.0
"""A trial that has not had its calls after that time, or after ten times as long as the suspicion took, is given up."""
MAX_COMMANDS: Final = 1024
FIRST_PAUSE_S: Final = 60.0
LAST_PAUSE_S: Final = 3600.0


def outcome_of(error: BridgeError) -> Outcome:
    """Whose error it is: the caller's own ("refused") or the command's ("error")."""
    return "refused" if isinstance(error, _OF_THE_CALLER) else "error"


class Window:
    """How many of the last `size` commands failed."""

    __slots__ = ("_bits", "length", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.length = 0
        self._bits = 0

    def add(self, failed: bool) -> None:
        self._bits = (self._bits << 1 | failed) & ((1 << self.size) - 1)
        if self.length < self.size:
            self.length += 1

    @property
    def failures(self) -> int:
        return self._bits.bit_count()

    @property
    def rate(self) -> float:
        """0 to 1; 0 if there was none."""
        return self.failures / self.length if self.length else 0.0


class Verdict(NamedTuple):
    """That kernel fails a command that the others do not fail."""

    kernel: str
    reason: str


class _Call(NamedTuple):
    began: float
    failed: bool
    session: str
    number: int  # of all calls of that command, as they ended


_Calls = dict[str, "deque[_Call]"]  # by kernel, the last ones


class _Watch:
    """The last calls of a command."""

    __slots__ = ("ended", "kernels")

    def __init__(self) -> None:
        self.kernels: _Calls = {}
        self.ended = 0


class _Tally:
    """How many calls there were, and how many of them failed."""

    __slots__ = ("calls", "failures")

    def __init__(self, calls: int = 0, failures: int = 0) -> None:
        self.calls = calls
        self.failures = failures

    def add(self, failed: bool) -> None:
        self.calls += 1
        self.failures += failed

    @property
    def rate(self) -> float:
        return self.failures / self.calls if self.calls else 0.0


class _Trial:
    """A command is kept off a kernel, to see whether its errors stay away too."""

    __slots__ = (
        "before",
        "began",
        "elsewhere",
        "enough",
        "everywhere",
        "here",
        "kernel",
        "least",
        "most",
        "peers",
        "who",
    )

    def __init__(
        self,
        kernel: str,
        here: _Tally,
        before: _Tally,
        who: frozenset[str] | None,
        peers: set[str],
        since: float,
        now: float,
    ) -> None:
        self.kernel = kernel
        self.here = here  # on the suspected kernel, before
        self.before = before  # on all kernels, before
        self.who = who  # the sessions whose calls count; None: any
        self.peers = peers
        self.began = now
        took = min(now - since, LAST_PAUSE_S / 10)
        self.least, self.most = now + took, now + max(PATIENCE_S, 10 * took)
        self.enough = min(max(LONGER * before.calls, TRIED[0]), TRIED[1])
        self.elsewhere = _Tally()
        self.everywhere = _Tally()

    def add(self, kernel: str, failed: bool, session: str, began: float) -> None:
        if kernel != self.kernel:
            self.peers.add(kernel)
        if began < self.began or (self.who is not None and session not in self.who):
            return
        self.everywhere.add(failed)
        if kernel != self.kernel:
            self.elsewhere.add(failed)

    def decided(self, now: float) -> bool:
        return self.elsewhere.calls >= self.enough and now >= self.least

    @property
    def guilty(self) -> bool:
        """Whether the errors went away with the kernel, and did not merely go elsewhere with the calls."""
        before, since = self.before, self.everywhere
        return (
            self.here.rate >= self.elsewhere.rate + MORE
            and _by_chance(before.failures, before.calls, since.failures, since.calls) <= GONE
        )


class Comparison:
    """Finds the kernel whose error rate rises where that of its peers does not, for the same command and sessions.

    A command is watched from its first error on, until no kernel has any among its last calls. What fails everywhere
    (a bug, a service that is down) is no kernel's fault, and neither is one session's data on the kernel that it is
    pinned to: as long as there are no calls of those sessions elsewhere, begun since, that went well, nothing is judged.
    With one kernel nothing ever is: its past does not tell whether it or the world has changed.

    More errors here than elsewhere only raise a suspicion, since calls do not reach kernels independently of their
    input: where the good ones take long and the bad ones fail at once, all of the bad ones meet the idle kernel. So a
    trial follows. The command is kept off the kernel (see `admits`), and what begins from then on is counted: three
    times as many calls, over at least as long, as raised the suspicion, for at most a minute or ten times as long. If
    the errors stay away, it was the kernel. If they turn up elsewhere, or too few calls come, the suspicion is dropped.

    A command that had a kernel tried has no other tried for a minute after that, and each time that doubles, up to an
    hour.
    """

    def __init__(self) -> None:
        self._watched: OrderedDict[str, _Watch] = OrderedDict()
        self._trials: OrderedDict[str, _Trial] = OrderedDict()  # by command, which is not watched meanwhile
        self._pauses: OrderedDict[str, tuple[float, float]] = OrderedDict()  # by command: until when, how long

    def __len__(self) -> int:
        return len(self._watched) + len(self._trials)

    @property
    def suspecting(self) -> bool:
        """Whether `admits` could say no."""
        return bool(self._trials)

    def admits(self, kernel: str, command: str, now: float) -> bool:
        """Whether the command may go to that kernel; not if there is a trial, unless it has taken too long."""
        trial = self._trials.get(command)
        if trial is None:
            return True
        if now >= trial.most:
            self._end(command, now)
            return True
        return kernel != trial.kernel

    def add(
        self, kernel: str, command: str, session: str, outcome: Outcome, *, began: float, now: float
    ) -> Verdict | None:
        """A command has ended that began at `began`: the kernel that is to be replaced for it, if there is one."""
        if outcome != "ok" and outcome not in FAILED:
            return None
        failed = outcome != "ok"
        if (trial := self._trials.get(command)) is not None:
            trial.add(kernel, failed, session, began)
            return self._decide(command, trial, now)
        watch = self._watched.get(command)
        if watch is None:
            if not failed:
                return None
            watch = self._watched[command] = _Watch()
            if len(self._watched) > MAX_COMMANDS:
                self._watched.popitem(last=False)
        calls = watch.kernels.get(kernel)
        if calls is None:
            calls = watch.kernels[kernel] = deque(maxlen=LAST)
        watch.ended += 1
        calls.append(_Call(began, failed, session, watch.ended))
        if (trial := self._suspect(command, watch, now)) is not None:
            self._trials[command] = trial
            if len(self._trials) > MAX_COMMANDS:
                self._trials.popitem(last=False)
            del self._watched[command]
        elif not failed and not any(call.failed for calls in watch.kernels.values() for call in calls):
            del self._watched[command]
        return None

    def forget(self, kernel: str) -> None:
        """That kernel has gone."""
        for command in [command for command, watch in self._watched.items() if kernel in watch.kernels]:
            kernels = self._watched[command].kernels
            del kernels[kernel]
            if not kernels:
                del self._watched[command]
        for command, trial in list(self._trials.items()):
            trial.peers.discard(kernel)
            if trial.kernel == kernel or not trial.peers:
                del self._trials[command]

    def _suspect(self, command: str, watch: _Watch, now: float) -> _Trial | None:
        kernels = watch.kernels
        if len(kernels) < 2:
            return None
        pause = self._pauses.get(command)
        if pause is not None and now < pause[0]:
            return None
        for kernel, calls in kernels.items():
            failures = sum(call.failed for call in calls)
            if failures < LEAST or failures < RATE * len(calls):
                continue
            since = min(call.began for call in calls if call.failed)
            sessions = frozenset(call.session for call in calls if call.failed)
            several = len(sessions) >= SEVERAL
            others = [call for call in _elsewhere(kernels, kernel) if call.began >= since]
            peers = [call.failed for call in others if several or call.session in sessions]
            if len(peers) < LEAST:
                continue
            here, there = _Tally(len(calls), failures), _Tally(len(peers), sum(peers))
            if (
                here.rate < there.rate + MORE
                or _by_chance(here.failures, here.calls, there.failures, there.calls) > CHANCE
            ):
                continue
            # Busy peers had more calls meanwhile than are kept: as many more count as went well or failed.
            first = min(call.number for call in calls if call.failed)
            met = sum(call.number >= first for call in calls)
            more = max(1.0, (watch.ended - first + 1 - met) / len(others))
            before = _Tally(met + round(more * there.calls), failures + round(more * there.failures))
            return _Trial(kernel, here, before, None if several else sessions, set(kernels) - {kernel}, since, now)
        return None

    def _decide(self, command: str, trial: _Trial, now: float) -> Verdict | None:
        decided = trial.decided(now)
        if not decided and now < trial.most:
            return None
        self._end(command, now)
        if not decided or not trial.guilty:
            return None
        here, there = trial.here, trial.elsewhere
        return Verdict(
            trial.kernel,
            f"errors: {here.rate:.2f} of the last {here.calls} calls of {command} failed here, "
            f"{there.rate:.2f} elsewhere",
        )

    def _end(self, command: str, now: float) -> None:
        del self._trials[command]
        _, last = self._pauses.get(command, (0.0, 0.0))
        pause = min(last * 2, LAST_PAUSE_S) if last else FIRST_PAUSE_S
        self._pauses[command] = (now + pause, pause)
        self._pauses.move_to_end(command)
        if len(self._pauses) > MAX_COMMANDS:
            self._pauses.popitem(last=False)


def _elsewhere(kernels: _Calls, kernel: str) -> Iterator[_Call]:
    for other, calls in kernels.items():
        if other != kernel:
            yield from calls


def _by_chance(here: int, calls: int, there: int, others: int) -> float:
    """How likely it is that at least `here` of all the failures are among these `calls` where none is worse than the
    other: Fisher's exact test, one-sided.
    """
    failures, total = here + there, calls + others
    ways = sum(
        math.comb(calls, n) * math.comb(others, failures - n)
        for n in range(here, min(calls, failures) + 1)
        if failures - n <= others
    )
    return ways / math.comb(total, failures)
