"""Circuit breakers: a command that keeps failing its kernels is kept off them for a while. Pure: the clock is injected."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import msgspec

from bridge_kernel.contract.errors import CircuitOpen

from .option_checks import require_seconds, require_share, require_whole
from .outcomes import Window

if TYPE_CHECKING:
    from collections.abc import Callable

    from .outcomes import Outcome

__all__ = ("Breaker", "Change", "Circuits")

LAST_COOLDOWN_S: Final = 300.0
MAX_CIRCUITS: Final = 4096
LARGEST_WINDOW: Final = 1000

Key = TypeVar("Key")
Value = TypeVar("Value")


class Breaker(msgspec.Struct, frozen=True):
    """When circuits open: after how many failures in a row, and for how long (doubled each time, up to 5 minutes).

    A failure is one of the kernel's: it died, or let a deadline pass without a word. With `error_rate` the errors of a
    command's own code count too: it is held back as soon as at least that share of its last `error_window` calls
    failed, on whatever kernel. None: never, for who tries out a function in a notebook must not be locked out by it.

    Raises:
        TypeError: one is no number. `ValueError`: there is no such count, time or share.
    """

    kernel_failures: int = 3
    command_failures: int = 5
    cooldown_s: float = 10.0
    error_rate: float | None = None
    error_window: int = 20

    def __post_init__(self) -> None:
        require_whole("breaker: kernel_failures", self.kernel_failures, 1)
        require_whole("breaker: command_failures", self.command_failures, 1)
        require_seconds("breaker: cooldown_s", self.cooldown_s, most=LAST_COOLDOWN_S)
        require_whole("breaker: error_window", self.error_window, 1, most=LARGEST_WINDOW)
        if self.error_rate is not None:
            require_share("breaker: error_rate", self.error_rate, none="any rate")


class Change(NamedTuple):
    """A circuit opened or closed; `kernel` is "" for the command's circuit over all kernels."""

    opened: bool
    command: str
    kernel: str
    failures: int
    cooldown_s: float
    reason: str


class _Circuit:
    """Closed while `until` is None; open until then; half-open afterwards: one probe decides."""

    __slots__ = ("cooldown_s", "failures", "probing", "until", "why")

    def __init__(self, cooldown_s: float) -> None:
        self.failures = 0
        self.cooldown_s = cooldown_s
        self.until: float | None = None
        self.probing = False
        self.why = ""
        """By which error rate it opened; "": by failures of its kernels."""

    def fail(self, threshold: int, now: float, *, probe: bool) -> bool:
        """Count a failure; True if the circuit opens by it."""
        self.failures += 1
        if self.until is None:
            if self.failures < threshold:
                return False
        elif probe:
            self.cooldown_s = min(self.cooldown_s * 2, LAST_COOLDOWN_S)
            self.probing = False
        else:
            return False  # sent before it opened: that says nothing new
        self.until = now + self.cooldown_s
        return True


class Circuits:
    """The circuits of one pool: for each command over all kernels, and for each kernel and command."""

    def __init__(self, breaker: Breaker, clock: Callable[[], float] = time.monotonic) -> None:
        self._breaker = breaker
        self._clock = clock
        self._circuits: OrderedDict[tuple[str, str], _Circuit] = OrderedDict()  # by kernel ("": all), command
        self.known = self._circuits.keys()
        """Empty as long as nothing has failed: then there is nothing to look up."""
        self.counting = breaker.error_rate is not None
        """Whether `end` is to hear of every command, not only of failures and while there are circuits."""
        self._deaths: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._windows: OrderedDict[str, Window] = OrderedDict()  # by command

    def require(self, command: str) -> None:
        """Raise `CircuitOpen` unless the command may run on some kernel."""
        circuit = self._circuits.get(("", command))
        if circuit is None or circuit.until is None:
            return
        left = circuit.until - self._clock()
        if left <= 0 and not circuit.probing:
            return
        failed = f"failed its kernels {circuit.failures} times in a row"
        if circuit.why:
            failed = f"fails too often ({circuit.why} calls)"
        then = f"it is held back for {left:.3g} s more" if left > 0 else "one is tried now, the others wait"
        raise CircuitOpen(f"{command} {failed}: {then}")

    def admits(self, kernel: str, command: str) -> bool:
        """Whether the command may go to that kernel."""
        circuit = self._circuits.get((kernel, command))
        return circuit is None or circuit.until is None or (circuit.until <= self._clock() and not circuit.probing)

    def begin(self, kernel: str, command: str) -> bool:
        """The command is sent there. True if that is the probe of a half-open circuit: say so to `end`."""
        probe = False
        for key in (("", command), (kernel, command)):
            circuit = self._circuits.get(key)
            if circuit is not None and circuit.until is not None and not circuit.probing:
                # Before its time, too: where no other kernel is left, the command went to one that is open.
                circuit.probing = probe = True
        return probe

    def end(self, kernel: str, command: str, outcome: Outcome, *, probe: bool) -> list[Change]:
        """The command has ended: which circuits that opened or closed."""
        if outcome == "cancelled":
            if probe:
                for key in (("", command), (kernel, command)):
                    if (circuit := self._circuits.get(key)) is not None:
                        circuit.probing = False
            return []
        changes = self._count(command, outcome, probe=probe) if self.counting else []
        if outcome in ("ok", "error", "refused"):
            # Whatever it says, it is a sign of life.
            closed = (self._close(name, command, outcome, probe=probe) for name in ("", kernel))
            return changes + [change for change in closed if change is not None]
        if outcome == "died":
            # One death is one failure of a command, however many calls of it were in flight there.
            if (kernel, command) in self._deaths and not probe:
                return changes
            _remember(self._deaths, (kernel, command), None)
            self._circuits.pop((kernel, command), None)  # that kernel never comes back
            return changes or self._fail("", command, self._breaker.command_failures, outcome, probe=probe)
        return [
            *(changes or self._fail("", command, self._breaker.command_failures, outcome, probe=probe)),
            *self._fail(kernel, command, self._breaker.kernel_failures, outcome, probe=probe),
        ]

    def _count(self, command: str, outcome: Outcome, *, probe: bool) -> list[Change]:
        """Open the command's circuit if too many of its last calls have failed, or the probe of one that did so."""
        rate = self._breaker.error_rate
        if rate is None or outcome == "refused" or (outcome == "died" and not probe):
            return []
        circuit = self._circuits.get(("", command))
        if circuit is not None and circuit.until is not None:
            if not (probe and circuit.why and outcome != "ok"):
                return []  # sent before it opened, or it closes
        else:
            window = self._windows.get(command)
            if window is None:
                if outcome == "ok":
                    return []
                window = Window(self._breaker.error_window)
                _remember(self._windows, command, window)
            window.add(outcome != "ok")
            if not window.failures:
                del self._windows[command]
            if window.length < window.size or window.rate < rate:
                return []
            if circuit is None:
                circuit = _Circuit(self._breaker.cooldown_s)
                _remember(self._circuits, ("", command), circuit)
            circuit.why = f"error rate {window.rate:.2f} of the last {window.size}"
            circuit.failures = window.failures - 1  # `fail` counts this one
            del self._windows[command]
        circuit.fail(1, self._clock(), probe=probe)
        return [Change(True, command, "", circuit.failures, circuit.cooldown_s, circuit.why)]

    def _fail(self, kernel: str, command: str, threshold: int, outcome: Outcome, *, probe: bool) -> list[Change]:
        circuit = self._circuits.get((kernel, command))
        if circuit is None:
            circuit = _Circuit(self._breaker.cooldown_s)
            _remember(self._circuits, (kernel, command), circuit)
        if circuit.fail(threshold, self._clock(), probe=probe):
            return [Change(True, command, kernel, circuit.failures, circuit.cooldown_s, outcome)]
        return []

    def _close(self, kernel: str, command: str, outcome: Outcome, *, probe: bool) -> Change | None:
        circuit = self._circuits.get((kernel, command))
        if circuit is None:
            return None
        if circuit.why and not (probe and outcome == "ok"):
            if probe and outcome == "refused":
                circuit.probing = False  # that says nothing about its code: the next one decides
            return None
        del self._circuits[kernel, command]
        if circuit.until is None:
            return None
        return Change(False, command, kernel, circuit.failures, 0.0, outcome)

    def forget(self, kernel: str) -> None:
        """That kernel has gone: its circuits go with it."""
        for key in [key for key in self._circuits if key[0] == kernel]:
            del self._circuits[key]

    def __len__(self) -> int:
        return len(self._circuits)


def _remember(table: OrderedDict[Key, Value], key: Key, value: Value) -> None:
    table[key] = value
    if len(table) > MAX_CIRCUITS:
        table.popitem(last=False)
