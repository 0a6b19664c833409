"""Telemetry in the host: events from kernels and of the host's own, to handlers and a bounded memory."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from typing import TYPE_CHECKING, Final

from bridge_kernel.contract.telemetry import Event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bridge_kernel.contract.telemetry import Scalar

    from .client import Display

    Handler = Callable[[Event], object]

__all__ = ("Telemetry",)

REMEMBERED: Final = 10_000


class Telemetry:
    """`host.telemetry`: what happened, newest last. Thread-safe.

    Events have the shape of Elixir's `:telemetry`: a name, measurements, metadata. Arguments and values are
    never in them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=REMEMBERED)
        self._handlers: dict[str, tuple[tuple[str, ...], Handler]] = {}
        self._lines: dict[str, str] = {}

    def attach(self, id: str, prefix: Iterable[str], handler: Handler) -> None:
        """Call `handler(event)` for each event whose name begins with `prefix`, on the thread that emits it.

        A handler that raises is detached, with a warning: it never breaks a command.

        Raises:
            ValueError: a handler of this id is attached already.
        """
        with self._lock:
            if id in self._handlers:
                raise ValueError(f"a handler {id!r} is attached already: detach it first, or choose another id")
            self._handlers[id] = (tuple(prefix), handler)

    def detach(self, id: str) -> None:
        """Stop calling the handler; does nothing if there is none of this id."""
        with self._lock:
            self._handlers.pop(id, None)

    def emit(self, name: tuple[str, ...], measurements: dict[str, int | float], metadata: dict[str, Scalar]) -> None:
        """Emit an event of the host's own."""
        self.take(Event(name, measurements, metadata))

    def take(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)
            handlers = list(self._handlers.items()) if self._handlers else ()
        for id, (prefix, handler) in handlers:
            if event.name[: len(prefix)] == prefix:
                try:
                    handler(event)
                except Exception as exc:  # noqa: BLE001 - somebody else's handler: it is detached, and said to be
                    self.detach(id)
                    warnings.warn(f"telemetry handler {id!r} raised {exc!r} and was detached", stacklevel=2)

    def take_display(self, display: Display) -> None:
        """Take what a kernel displays for one command."""
        for event in display.batch.events:
            self.take(event)
        with self._lock:
            self._lines.pop(display.display_id, None)
            self._lines[display.display_id] = display.text
            if len(self._lines) > REMEMBERED:
                del self._lines[next(iter(self._lines))]

    def events(self, *prefix: str) -> list[Event]:
        """The events remembered whose names begin with `prefix`, oldest first: `events("bridge", "execution")`."""
        with self._lock:
            return [event for event in self._events if event.name[: len(prefix)] == prefix]

    def lines(self) -> list[str]:
        """One line a command, as a notebook shows it, oldest first."""
        with self._lock:
            return list(self._lines.values())

    def __repr__(self) -> str:
        with self._lock:
            return f"<Telemetry: {len(self._events)} events of {len(self._lines)} commands, {len(self._handlers)} handlers>"
