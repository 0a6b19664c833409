"""What kernels display, read when there is time or somebody looks: from bytes to events and lines."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bridge_kernel.contract.catalogue import from_kernel, problem
from bridge_kernel.contract.frames import UNDECODABLE
from bridge_kernel.contract.line import Line
from bridge_kernel.contract.secrets import without_secrets
from bridge_kernel.contract.telemetry import TELEMETRY_MIME, Event, EventBatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from bridge_kernel.contract.telemetry import Scalar

__all__ = ("Intake",)

REMEMBERED: Final = 10_000
MAX_UNREAD: Final = 256
MAX_WAITING: Final = 10_000  # displays that wait for a handler on another thread; the oldest make room
MAX_LINE: Final = 1000  # characters: a kernel's own line is shorter
SYNC_S: Final = 1.0
_LAST: Final = (("bridge", "execution", "stop"), ("bridge", "execution", "exception"))


class _Data(msgspec.Struct, rename={"batches": TELEMETRY_MIME, "text": "text/plain"}):
    batches: tuple[EventBatch, ...]
    text: str = ""


class _Transient(msgspec.Struct):
    display_id: str


class _Display(msgspec.Struct):
    data: _Data
    transient: _Transient


_decode_display: Final = msgspec.json.Decoder(_Display).decode
log: Final = logging.getLogger(__name__)


class Intake:
    """Thread-safe. Events go to `take`, on the thread that reads."""

    def __init__(self, take: Callable[[Event], None]) -> None:
        self._take = take
        self.secrets_of: Callable[[str], tuple[str, ...]] = lambda session: ()
        """What must not be shown of a session, however its commands came by it."""
        self.on_batch: Callable[[str, EventBatch], None] | None = None
        """Told of each display that is read: its id, and what is in it."""
        self._lock = threading.Lock()
        self._lines: OrderedDict[str, str | Event] = OrderedDict()
        """What is told of each command: a line, or the event from which it is made when somebody looks."""
        self._unread: deque[bytes] = deque()
        self._reading = threading.Lock()
        self._reader = 0
        """The thread that reads: what its handlers look at is what has been read so far."""
        self.dropped = 0
        """Displays that there was no room for, because a handler took too long."""
        self.refused = 0
        """Events that no kernel can have measured."""
        self._expected: OrderedDict[str, None] = OrderedDict()
        self._settled: OrderedDict[str, None] = OrderedDict()
        self._waiting = 0
        self._arrived = threading.Condition()
        self._pump: Callable[[], None] | None = None
        self._loop_thread = 0

    def pumped_by(self, pump: Callable[[], None]) -> None:
        """Say how the loop of this thread reads what has arrived, without returning to itself."""
        self._pump, self._loop_thread = pump, threading.get_ident()

    def take_display(self, content: bytes) -> None:
        """Take what a kernel displays for one command: the content of a display message, read later."""
        if len(self._unread) >= MAX_WAITING:
            self._unread.popleft()
            self.dropped += 1
            if self.dropped == 1:
                log.warning("a telemetry handler takes too long: what kernels tell is dropped")
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
                _bound(self._expected, MAX_UNREAD)

    def abandon(self, prefix: str) -> None:
        """Expect no displays any more whose ids begin so: their kernel is gone."""
        with self._lock:
            for display_id in [id for id in self._expected if id.startswith(prefix)]:
                del self._expected[display_id]
        with self._arrived:
            self._arrived.notify_all()

    def sync(self) -> None:
        """Wait until the telemetry of every command that has been answered is here: a millisecond, 1 s at most.

        What has not come by then is not waited for again.
        """
        with self._lock:
            wanted = list(self._expected)
        self.read()
        if not wanted or self._reader == threading.get_ident():
            return
        until = time.monotonic() + SYNC_S
        if self._pump is not None and threading.get_ident() == self._loop_thread:
            while self._missing(wanted) and time.monotonic() < until:
                self._pump()  # nobody else reads the sockets while the loop's own thread waits here
                self.read()
        else:
            self._wait(wanted, until)
        with self._lock:
            for display_id in wanted:
                self._expected.pop(display_id, None)

    def _wait(self, wanted: list[str], until: float) -> None:
        with self._arrived:
            self._waiting += 1
        try:
            while self._missing(wanted) and (left := until - time.monotonic()) > 0:
                with self._arrived:
                    # Told of what arrives, and when another thread has read.
                    if self._missing(wanted) and (not self._unread or self._reading.locked()):
                        self._arrived.wait(left)
                self.read()
        finally:
            with self._arrived:
                self._waiting -= 1

    def _missing(self, wanted: list[str]) -> bool:
        return any(display_id in self._expected for display_id in wanted)

    def read(self) -> None:
        """Read what was taken and not yet read. If another thread does, or a handler that it calls, that one goes on.

        It never waits for the one that reads: that may be in a handler, which may wait for who calls this.
        """
        while self._unread and self._reading.acquire(blocking=False):
            self._reader = threading.get_ident()
            try:
                self._read_all()
            finally:
                self._reader = 0
                self._reading.release()
                if self._waiting:
                    with self._arrived:
                        self._arrived.notify_all()

    def _read_all(self) -> None:
        while self._unread:
            try:
                display = _decode_display(self._unread.popleft())
            except UNDECODABLE:
                continue  # display data of some other kind
            self._take_batches(display)

    def _take_batches(self, display: _Display) -> None:
        id, batches = display.transient.display_id, display.data.batches
        if len(batches) == 1:
            self._take_batch(id, batches[0], display.data.text[:MAX_LINE])
            return
        prefix = id.rpartition("-")[0]
        for batch in batches:
            self._take_batch(f"{prefix}-{batch.command}", batch, None)

    def _take_batch(self, id: str, batch: EventBatch, told: str | Event | None) -> None:
        secrets = self.secrets_of(str(batch.metadata.get("session", "")))
        if secrets:
            batch = _redacted(batch, secrets)
            told = without_secrets(told, secrets) if isinstance(told, str) else told
        for event in batch.whole():
            if not from_kernel(event):
                self.refused += 1
                continue
            self._take(event)
            if told is None and event.name in _LAST:
                told = event
        if self.on_batch is not None:
            self.on_batch(id, batch)
        if batch.dropped:
            drop = Event(("bridge", "telemetry", "drop"), {"events": batch.dropped}, dict(batch.metadata))
            if problem(drop) is None:  # it is of a kernel, after all
                self._take(drop)
        with self._lock:
            if told is not None:
                self._lines[id] = told
                _bound(self._lines, REMEMBERED)
            if batch.settled and self._expected.pop(id, id) is not None:
                self._settled[id] = None  # it came before the answer was looked at
                _bound(self._settled, MAX_UNREAD)

    def settle(self, display_id: str, line: str) -> None:
        """Say of a command what its kernel can no longer say: its last line."""
        self.read()
        with self._lock:
            self._lines[display_id] = line

    @property
    def lines(self) -> list[str]:
        with self._lock:
            lines = list(self._lines.values())
        return [line if isinstance(line, str) else line_of(line).text() for line in lines]


def line_of(event: Event) -> Line:
    """The settled line of a command, from its last event: as much as its kernel has said of it."""
    measured, said = event.measurements, event.metadata
    return Line(
        str(said.get("subject") or ""),
        int(measured.get("duration", 0)),
        "ok" if event.name[-1] == "stop" else "error",
        kernel=str(said.get("kernel") or ""),
        callbacks=int(measured.get("callbacks", 0)),
        lm_calls=int(measured.get("lm_calls", 0)),
        tokens=int(measured.get("tokens", 0)),
        error=str(said.get("error") or ""),
    )


def _redacted(batch: EventBatch, secrets: tuple[str, ...]) -> EventBatch:
    """Once more, here: a kernel knows only the secrets that it was sent with the command."""

    def said(metadata: dict[str, Scalar]) -> dict[str, Scalar]:
        return {
            without_secrets(name, secrets): without_secrets(value, secrets) if isinstance(value, str) else value
            for name, value in metadata.items()
        }

    events = tuple(
        Event(
            tuple(without_secrets(word, secrets) for word in event.name),
            {without_secrets(name, secrets): number for name, number in event.measurements.items()},
            said(event.metadata),
        )
        for event in batch.events
    )
    return EventBatch(batch.command, said(batch.metadata), events, batch.dropped, batch.settled)


def _bound(table: OrderedDict[str, Any], most: int) -> None:
    while len(table) > most:
        table.popitem(last=False)
