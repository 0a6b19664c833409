"""Ctrl-C in cells: when SIGINT may raise KeyboardInterrupt, and where. Knows nothing of IPython or Jupyter."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

__all__ = ("Interrupts",)

INSIST_S: Final = 0.02


class Interrupts:
    """SIGINT: KeyboardInterrupt in a running cell, nothing at any other time. For the main thread, as handlers are."""

    def __init__(self) -> None:
        self._namespace: dict[str, Any] | None = None
        self._task: asyncio.Future[Any] | None = None
        self._held = 0
        self._pending = False
        self._wanted = False

    def install(self) -> None:
        # Not SIG_IGN, which child processes would inherit and could then not be interrupted either.
        signal.signal(signal.SIGINT, self._handle)

    def deliver(self) -> None:
        """Interrupt the cell that runs, if one does. Any thread."""
        if self._namespace is not None and not self._wanted:
            self._wanted = True
            threading.Thread(target=self._insist, name="bridge-interrupt", daemon=True).start()

    def _insist(self) -> None:
        # Again and again: a signal that comes between Python's last look and a blocking call wakes nobody, and one
        # that comes while IPython's own code runs, before the cell's next line, would break that instead.
        main = threading.main_thread().ident
        assert main is not None
        while self._wanted and self._namespace is not None:
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(INSIST_S)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._namespace is None:
            return
        if self._held:
            self._pending = True
            return
        in_cell = self._in_cell(frame)
        if self._task is not None and not (in_cell and self._task is asyncio.current_task()):
            # Raised in another task, or in the loop itself, it would end the kernel.
            self._wanted = False
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)
        elif in_cell:
            self._wanted = False
            raise KeyboardInterrupt
        else:
            self.deliver()

    def _in_cell(self, frame: FrameType | None) -> bool:
        while frame is not None and frame.f_globals is not self._namespace:
            frame = frame.f_back
        return frame is not None

    @contextmanager
    def allowed(self, namespace: dict[str, Any]) -> Iterator[None]:
        """While the cell with this namespace runs."""
        self._pending = self._wanted = False
        self._namespace = namespace
        try:
            yield
        finally:
            self._namespace = None

    @contextmanager
    def of_task(self, task: asyncio.Future[Any]) -> Iterator[None]:
        """While this task is the cell."""
        self._task = task
        try:
            yield
        finally:
            self._task = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait with KeyboardInterrupt: half a message sent would spoil the socket for all."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if self._pending and not self._held:
                self._pending = False
                self._handle(signal.SIGINT, sys._getframe())
