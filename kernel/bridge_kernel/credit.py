"""Flow control of a stream: a producer that outruns its host waits."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Credit",)


class Credit:
    """How many chunks the host will still take. A producer without credit waits: memory stays bounded."""

    def __init__(self, initial: int) -> None:
        self._left = initial
        self._lock = threading.Lock()
        self._wake: Callable[[], None] | None = None

    def give(self, more: int) -> None:
        with self._lock:
            self._left += more
            wake, self._wake = self._wake, None
        if wake is not None:
            wake()

    def take(self) -> bool:
        with self._lock:
            if self._left <= 0:
                return False
            self._left -= 1
            return True

    def when_given(self, wake: Callable[[], None]) -> bool:
        """Have `wake` called at the next gift; False if there is credit already, and it will not be."""
        with self._lock:
            if self._left > 0:
                return False
            self._wake = wake
            return True
