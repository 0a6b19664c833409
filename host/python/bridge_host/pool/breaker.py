"""Circuit breakers: a command that keeps failing its kernels is kept off them for a while. Pure: the clock is injected."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeVar

import msgspec

from bridge_kernel.contract.errors import CircuitOpen

from .option_checks import require_seconds, require_whole

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Breaker", "Change", "Circuits", "Outcome")

LAST_COOLDOWN_S: Final = 300.0
MAX_CIRCUITS: Final = 4096

Value = TypeVar("Value")
Outcome = Literal["ok", "error", "died", "timeout", "cancelled"]
"""How a command ended. "error" is an error of its own code, "died" and "timeout" are failures of its kernel's."""


class Breaker(msgspec.Struct, frozen=True):
    """When circuits open: after how many failures in a row, and for how long (doubled each time, up to 5 minutes).

    Raises:
        TypeError: one is no number. `ValueError`: there is no such count or time.
    """

    kernel_failures: int = 3
    command_failures: int = 5
    cooldown_s: float = 10.0

    def __post_init__(self) -> None:
        require_whole("breaker: kernel_failures", self.kernel_failures, 1)
        require_whole("breaker: command_failures", self.command_failures, 1)
        require_seconds("breaker: cooldown_s", self.cooldown_s, most=LAST_COOLDOWN_S)


class Change(NamedTuple):
    """A circuit opened or closed; `kernel` is "" for the command's circuit over all kernels."""

    opened: bool
    command: str
    kernel: str
    failures: int
    cooldown_s: float


class _Circuit:
    """Closed while `until` is None; open until then; half-open afterwards: one probe decides."""

    __slots__ = ("cooldown_s", "failures", "probing", "until")

    def __init__(self, cooldown_s: float) -> None:
        self.failures = 0
        self.cooldown_s = cooldown_s
        self.until: float | None = None
        self.probing = False

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
        self._deaths: OrderedDict[tuple[str, str], None] = OrderedDict()

    def require(self, command: str) -> None:
        """Raise `CircuitOpen` unless the command may run on some kernel."""
        circuit = self._circuits.get(("", command))
        if circuit is None or circuit.until is None:
            return
        left = circuit.until - self._clock()
        if left > 0:
            raise CircuitOpen(
                f"{command} failed its kernels {circuit.failures} times in a row: it is held back for {left:.3g} s more"
            )
        if circuit.probing:
            raise CircuitOpen(
                f"{command} failed its kernels {circuit.failures} times in a row: one is tried now, the others wait"
            )

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
        if outcome in ("ok", "error"):
            return [change for name in ("", kernel) if (change := self._close(name, command)) is not None]
        if outcome == "died":
            # One death is one failure of a command, however many calls of it were in flight there.
            if (kernel, command) in self._deaths and not probe:
                return []
            _remember(self._deaths, (kernel, command), None)
            self._circuits.pop((kernel, command), None)  # that kernel never comes back
            return self._fail("", command, self._breaker.command_failures, probe=probe)
        return [
            *self._fail("", command, self._breaker.command_failures, probe=probe),
            *self._fail(kernel, command, self._breaker.kernel_failures, probe=probe),
        ]

    def _fail(self, kernel: str, command: str, threshold: int, *, probe: bool) -> list[Change]:
        circuit = self._circuits.get((kernel, command))
        if circuit is None:
            circuit = _Circuit(self._breaker.cooldown_s)
            _remember(self._circuits, (kernel, command), circuit)
        if circuit.fail(threshold, self._clock(), probe=probe):
            return [Change(True, command, kernel, circuit.failures, circuit.cooldown_s)]
        return []

    def _close(self, kernel: str, command: str) -> Change | None:
        circuit = self._circuits.pop((kernel, command), None)
        if circuit is None or circuit.until is None:
            return None
        return Change(False, command, kernel, circuit.failures, 0.0)

    def forget(self, kernel: str) -> None:
        """That kernel has gone: its circuits go with it."""
        for key in [key for key in self._circuits if key[0] == kernel]:
            del self._circuits[key]

    def __len__(self) -> int:
        return len(self._circuits)


def _remember(table: OrderedDict[tuple[str, str], Value], key: tuple[str, str], value: Value) -> None:
    table[key] = value
    if len(table) > MAX_CIRCUITS:
        table.popitem(last=False)
