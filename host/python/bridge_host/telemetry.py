"""Telemetry in the host: events from kernels and of the host's own, to handlers and a bounded memory."""

from __future__ import annotations

import threading
import time
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
SYNC_S: Final = 1.0
_LAST: Final = (("bridge", "execution", "stop"), ("bridge", "execution", "exception"))


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
        self._depth = 0
        self._expected: dict[str, None] = {}
        self._settled: dict[str, None] = {}
        self._waiting = 0
        self._arrived = threading.Condition()
        self._pump: Callable[[], None] | None = None
        self._loop_thread = 0

    def pumped_by(self, pump: Callable[[], None]) -> None:
        """Say how the loop of this thread reads what has arrived, without returning to itself."""
        self._pump, self._loop_thread = pump, threading.get_ident()

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
        if self._waiting:
            with self._arrived:
                self._arrived.notify_all()
        elif len(self._unread) > MAX_UNREAD:
            self.read()

    def expect(self, display_id: str) -> None:
        """A command has been answered: its last display is on its way, and who looks should see it."""
        with self._lock:
            if display_id not in self._settled:
                self._expected[display_id] = None
                if len(self._expected) > MAX_UNREAD:
                    del self._expected[next(iter(self._expected))]

    def abandon(self, prefix: str) -> None:
        """Expect no displays any more whose ids begin so: their kernel is gone."""
        with self._lock:
            for display_id in [id for id in self._expected if id.startswith(prefix)]:
                del self._expected[display_id]

    def sync(self) -> None:
        """Wait until the telemetry of every command that has been answered is here: a millisecond, 1 s at most.

        `events` and `lines` do so by themselves.
        """
        self.read()
        if not self._expected or self._depth:
            return
        until = time.monotonic() + SYNC_S
        if self._pump is not None and threading.get_ident() == self._loop_thread:
            while self._expected and time.monotonic() < until:
                self._pump()  # nobody else reads the sockets while the loop's own thread waits here
                self.read()
            return
        self._waiting += 1
        try:
            while self._expected and (left := until - time.monotonic()) > 0:
                with self._arrived:
                    if not self._unread:
                        self._arrived.wait(left)
                self.read()
        finally:
            self._waiting -= 1

    def read(self) -> None:
        """Read what was taken and not yet read."""
        with self._reading:
            self._depth += 1
            try:
                while self._unread:
                    try:
                        display = _decode_display(self._unread.popleft())
                    except msgspec.MsgspecError:
                        continue  # display data of some other kind
                    self._take_batch(display)
            finally:
                self._depth -= 1

    def _take_batch(self, display: _Display) -> None:
        id, batch = display.transient.display_id, display.data.batch
        for event in batch.events:
            self.take(event)
        with self._lock:
            self._lines[id] = display.data.text
            if len(self._lines) > REMEMBERED:
                del self._lines[next(iter(self._lines))]
            if batch.events and batch.events[-1].name in _LAST and self._expected.pop(id, id) is not None:
                self._settled[id] = None  # it came before the answer was looked at
                if len(self._settled) > MAX_UNREAD:
                    del self._settled[next(iter(self._settled))]

    def settle(self, display_id: str, line: str, event: Event) -> None:
        """Say of a command what its kernel can no longer say: its last line and its last event."""
        self.read()
        self.take(event)
        with self._lock:
            self._lines[display_id] = line

    def events(self, *prefix: str) -> list[Event]:
        """The events remembered whose names begin with `prefix`, oldest first: `events("bridge", "execution")`."""
        self.sync()
        with self._lock:
            return [event for event in self._events if event.name[: len(prefix)] == prefix]

    def lines(self) -> list[str]:
        """One line a command, as a notebook shows it, oldest first."""
        self.sync()
        with self._lock:
            return list(self._lines.values())

    def __repr__(self) -> str:
        self.sync()
        with self._lock:
            return f"<Telemetry: {len(self._events)} events of {len(self._lines)} commands, {len(self._handlers)} handlers>"
