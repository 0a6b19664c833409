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


_Calls = dict[str, "deque[_Call]"]  # by kernel, the last ones


class Comparison:
    """Finds the kernel whose error rate rises where that of its peers does not, for the same command and sessions.

    A command is watched from its first error on, until no kernel has any among its last calls. What fails everywhere
    (a bug, a service that is down) is no kernel's fault, and neither is one session's data on the kernel that it is
    pinned to: as long as there are no calls of those sessions elsewhere, begun since, that went well, nothing is judged.
    With one kernel nothing ever is: its past does not tell whether it or the world has changed.

    A command that had a kernel replaced has no other replaced for a minute, and each time that doubles, up to an hour.
    """

    def __init__(self) -> None:
        self._watched: OrderedDict[str, _Calls] = OrderedDict()
        self._pauses: OrderedDict[str, tuple[float, float]] = OrderedDict()  # by command: until when, how long

    def __len__(self) -> int:
        return len(self._watched)

    def add(
        self, kernel: str, command: str, session: str, outcome: Outcome, *, began: float, now: float
    ) -> Verdict | None:
        """A command has ended that began at `began`: the kernel that is to be replaced for it, if there is one."""
        if outcome != "ok" and outcome not in FAILED:
            return None
        failed = outcome != "ok"
        kernels = self._watched.get(command)
        if kernels is None:
            if not failed:
                return None
            kernels = self._watched[command] = {}
            if len(self._watched) > MAX_COMMANDS:
                self._watched.popitem(last=False)
        calls = kernels.get(kernel)
        if calls is None:
            calls = kernels[kernel] = deque(maxlen=LAST)
        calls.append(_Call(began, failed, session))
        verdict = self._judge(command, kernels, now)
        if verdict is not None:
            self._pause(command, now)
            del self._watched[command]
        elif not failed and not any(call.failed for calls in kernels.values() for call in calls):
            del self._watched[command]
        return verdict

    def forget(self, kernel: str) -> None:
        """That kernel has gone."""
        for command in [command for command, kernels in self._watched.items() if kernel in kernels]:
            kernels = self._watched[command]
            del kernels[kernel]
            if not kernels:
                del self._watched[command]

    def _judge(self, command: str, kernels: _Calls, now: float) -> Verdict | None:
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
            sessions = {call.session for call in calls if call.failed}
            peers = [
                call.failed
                for call in _elsewhere(kernels, kernel)
                if call.began >= since and (call.session in sessions or len(sessions) >= SEVERAL)
            ]
            if len(peers) < LEAST:
                continue
            here, there = failures / len(calls), sum(peers) / len(peers)
            if here >= there + MORE and _by_chance(failures, len(calls), sum(peers), len(peers)) <= CHANCE:
                return Verdict(
                    kernel,
                    f"errors: {here:.2f} of the last {len(calls)} calls of {command} failed here, {there:.2f} elsewhere",
                )
        return None

    def _pause(self, command: str, now: float) -> None:
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
