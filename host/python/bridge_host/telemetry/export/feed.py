"""How events get from where they happen to a thread of an exporter's own: through a bounded queue, never waiting."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from bridge_kernel.contract.telemetry import Event

    Taken = list[tuple[int, Event]]

__all__ = ("Feed", "warn")

MAX_QUEUED: Final = 10_000
ENOUGH: Final = 1_000  # for the thread to begin before its delay is over


class Feed:
    """Belongs to an exporter, whose thread it owns. Thread-safe; `put` is the handler to attach."""

    def __init__(
        self,
        name: str,
        consume: Callable[[Taken, int], None],
        *,
        max_queued: int = MAX_QUEUED,
        delay_s: float = 0.1,
    ) -> None:
        """`consume(taken, dropped)` is called on the thread with events and when each was put (ns since the epoch).

        `dropped` counts those for which there was no room: they came after the last of `taken`. An event waits for
        `delay_s`, so that a busy host does not wake the thread for each.
        """
        self._consume = consume
        self._max = max_queued
        self._delay_s = delay_s
        # Its lock is reentrant: a finalizer that runs while it is held may emit something itself.
        self._changed = threading.Condition()
        self._queue: deque[tuple[int, Event]] = deque()
        self._dropped = 0
        self._lost = 0
        self._accepted = 0
        self._consumed = 0
        self._hurry = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """How many events there was no room for."""
        return self._dropped

    def put(self, event: Event) -> None:
        """Take an event, or count it if there is no room."""
        with self._changed:
            if self._closed:
                return
            if len(self._queue) >= self._max:
                self._dropped += 1
                self._lost += 1
                return
            self._queue.append((time.time_ns(), event))
            self._accepted += 1
            if len(self._queue) in (1, ENOUGH):
                self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was put has been consumed; whether that was so in time."""
        with self._changed:
            wanted = self._accepted
            self._hurry = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._consumed >= wanted, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Take nothing more, and wait until all has been consumed; whether the thread has ended in time."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                self._changed.wait_for(
                    lambda: self._hurry or self._closed or len(self._queue) >= ENOUGH, timeout=self._delay_s
                )
                self._hurry = False
                taken = list(self._queue)
                self._queue.clear()
                dropped, self._lost = self._lost, 0
                if not taken and self._closed:
                    return
            try:
                self._consume(taken, dropped)
            except Exception as exc:  # noqa: BLE001 - whatever an exporter's library raises: what comes next may be well
                warn(f"telemetry: {len(taken)} events were not exported: {exc!r}")
            with self._changed:
                self._consumed += len(taken)
                self._changed.notify_all()


def warn(text: str) -> None:
    """Warn on a thread of our own; where warnings are errors nobody could catch it there, and it is left at that."""
    with contextlib.suppress(UserWarning):
        warnings.warn(text, UserWarning, stacklevel=2)
