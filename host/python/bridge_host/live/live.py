"""`Live`: from what the engine and the kernels tell of commands, to the place where somebody looks."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, Protocol

from .notebook import Notebook
from .terminal import Terminal
from .told import Told

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Collection, Iterator

    from bridge_kernel.contract.telemetry import EventBatch

    from ..engine.running import Running
    from ..telemetry import Telemetry

__all__ = ("Live", "Place", "live_for")

MAX_DISPLAYS: Final = 2000
"""Attempts whose kernels may still tell something; one that was killed never does."""


class Place(Protocol):
    """Where lines are shown. All is called with `lock` held, `waits_for` without."""

    lock: threading.RLock
    pause: float
    """Seconds until the first tick."""

    def begin(self, told: Told) -> bool:
        """Whether this one is shown here."""

    def waits_for(self, told: Told) -> bool:
        """Whether all that its kernel tells must be here before it ends."""

    def end(self, told: Told, error: BaseException | None, now: int) -> None: ...

    def counted(self, told: Told, lm_calls: int, tokens: int) -> None:
        """Language models were called."""

    def tick(self, now: int) -> float | None:
        """Show what has changed; seconds until the next time, None if there is nothing to come."""

    def close(self, now: int) -> None: ...

    def abandon(self) -> None:
        """It has raised: show nothing any more."""


class Live:
    """`begin`, `tried` and `end` are called in the host's event loop, `take` on any thread.

    Once its place has raised, nothing is shown any more: `begin` and `end` raise what it raised.
    """

    def __init__(
        self, place: Place, sync: Callable[[], None], *, clock: Callable[[], int] = time.perf_counter_ns
    ) -> None:
        """`sync` waits for the telemetry of commands that were answered; `clock` is the one of `Running.began`."""
        self._place = place
        self._lock = place.lock
        self._sync = sync
        self._clock = clock
        self._told: dict[str, Told] = {}
        self._displays: OrderedDict[str, tuple[Told, bool]] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        self._failure: Exception | None = None

    def begin(self, running: Running) -> None:
        """A command was taken. Those that a tool sends are part of the one that called it."""
        if running.parent is not None:
            return
        told = Told(running)
        with self._lock, self._looking():
            if self._place.begin(told):
                self._told[told.id] = told
                if self._timer is None:
                    self._timer = asyncio.get_running_loop().call_later(self._place.pause, self._tick)

    def tried(self, running: Running, display_id: str) -> None:
        """An attempt begins, of which its kernel tells under this id."""
        outer = running
        while outer.parent is not None:
            outer = outer.parent
        told = self._told.get(outer.id)
        if told is None:
            return
        if told.queue is None:
            told.queue = running.tried - running.began
        with self._lock:
            if len(self._displays) >= MAX_DISPLAYS:
                self._displays.popitem(last=False)
            self._displays[display_id] = (told, outer is not running)

    def end(self, running: Running, error: BaseException | None) -> None:
        """It was answered, or failed for good."""
        if self._failure is not None:
            raise self._failure
        told = self._told.pop(running.id, None)
        if told is None:
            return
        now = self._clock()
        if self._place.waits_for(told):
            self._sync()
        with self._lock, self._looking():
            self._place.end(told, error, now)

    def take(self, display_id: str, batch: EventBatch) -> None:
        """What a kernel tells."""
        found = self._displays.get(display_id)
        if found is None:
            return
        told, nested = found
        with self._lock:
            if batch.settled:
                self._displays.pop(display_id, None)
            lm_calls, tokens = told.take(batch, nested=nested)
            if lm_calls:
                self._place.counted(told, lm_calls, tokens)

    def _tick(self) -> None:
        self._timer = None
        try:
            with self._lock, self._looking():
                pause = self._place.tick(self._clock())
        except Exception:  # noqa: BLE001 - here nobody is told: the command that runs now is, by its end
            return
        if pause is not None:
            self._timer = asyncio.get_running_loop().call_later(pause, self._tick)

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        """The place is asked to do something."""
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except Exception as exc:
            self._failure = exc
            self._stop()
            self._told.clear()
            self._displays.clear()
            self._place.abandon()
            raise

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Show what there is to be shown still, and no more."""
        self._stop()
        if self._failure is None:
            with self._lock:
                self._place.close(self._clock())


def live_for(wanted: bool | None, telemetry: Telemetry, waiting: Collection[object]) -> Live | None:
    """Where somebody looks: the notebook whose kernel this process is, or the terminal. None if nobody does.

    `wanted`: False: nobody; True: even so, and a notebook's lines are updated in place whatever its front end says
    of itself. `waiting` is not empty while a plain call waits for its command.
    """
    if wanted is False:
        return None
    place: Place
    shell = _shell()
    if getattr(shell, "kernel", None) is not None:
        place = Notebook(shell, telemetry.sync, forced=wanted is True)
    elif wanted or (sys.stderr is not None and sys.stderr.isatty()):
        prompts = shell is not None or hasattr(sys, "ps1")
        place = Terminal(waiting if prompts else None)
    else:
        return None
    live = Live(place, telemetry.sync)
    telemetry.intake.on_batch = live.take
    return live


def _shell() -> Any:
    """IPython's shell, if this process is one."""
    module = sys.modules.get("IPython.core.interactiveshell")
    shell = None if module is None else module.InteractiveShell
    return shell.instance() if shell is not None and shell.initialized() else None
