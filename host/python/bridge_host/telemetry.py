"""Telemetry in the host: events from kernels and of the host's own, to handlers and a bounded memory."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from bridge_kernel.contract.telemetry import TELEMETRY_MIME, Event, EventBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bridge_kernel.contract.telemetry import Scalar

    Handler = Callable[[Event], object]

__all__ = ("Telemetry",)

REMEMBERED: Final = 10_000
MAX_UNREAD: Final = 256


class _Data(msgspec.Struct, rename={"batch": TELEMETRY_MIME, "text": "text/plain"}):
    batch: EventBatch
    text: str = ""


class _Transient(msgspec.Struct):
    display_id: str


class _Display(msgspec.Struct):
    data: _Data
    transient: _Transient


_decode_display: Final = msgspec.json.Decoder(_Display).decode


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
        self._unread: deque[bytes] = deque()
        self._reading = threading.RLock()  # a handler may look at the telemetry

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

    def take_display(self, content: bytes) -> None:
        """Take what a kernel displays for one command: the content of a display message, read later."""
        self._unread.append(content)
        if len(self._unread) > MAX_UNREAD:
            self.read()

    def settle(self, display_id: str, line: str, event: Event) -> None:
        """Say of a command what its kernel can no longer say: its last line and its last event."""
        self.read()
        self.take(event)
        with self._lock:
            self._lines[display_id] = line

    def read(self) -> None:
        """Read what was taken and not yet read: done before anybody looks."""
        with self._reading:
            while self._unread:
                try:
                    display = _decode_display(self._unread.popleft())
                except msgspec.MsgspecError:
                    continue  # display data of some other kind
                for event in display.data.batch.events:
                    self.take(event)
                with self._lock:
                    self._lines[display.transient.display_id] = display.data.text
                    if len(self._lines) > REMEMBERED:
                        del self._lines[next(iter(self._lines))]

    def events(self, *prefix: str) -> list[Event]:
        """The events remembered whose names begin with `prefix`, oldest first: `events("bridge", "execution")`."""
        self.read()
        with self._lock:
            return [event for event in self._events if event.name[: len(prefix)] == prefix]

    def lines(self) -> list[str]:
        """One line a command, as a notebook shows it, oldest first."""
        self.read()
        with self._lock:
            return list(self._lines.values())

    def __repr__(self) -> str:
        self.read()
        with self._lock:
            return f"<Telemetry: {len(self._events)} events of {len(self._lines)} commands, {len(self._handlers)} handlers>"
