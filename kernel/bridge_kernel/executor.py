"""Where commands' code runs: worker threads for synchronous code, one event loop for asynchronous code."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from contextvars import Context
from typing import TYPE_CHECKING, Any

from .stops import CommandStopped, stop_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ("Executor",)

STUCK_S = 0.1
IDLE_S = 30.0  # an idle worker thread ends after this long


class Executor:
    """Threads made when there is work and none is idle; how many there may be is the lane's limit on commands.

    A command that waits for a callback keeps its thread. A fixed pool would deadlock as soon as as many
    commands wait for tools that themselves send commands here.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._loop_thread: int | None = None
        self._cancelled: list[tuple[float, asyncio.Task[None]]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` on a worker thread; it must not raise."""
        with self._lock:
            if self._idle > 0:
                self._idle -= 1  # this job takes it
                spawn = False
            else:
                spawn = True
        if spawn:
            # In a list, which `_work` empties: a Thread keeps its arguments for as long as it lives.
            threading.Thread(target=self._work, args=([job],), name="bridge-worker", daemon=True).start()
        else:
            self._jobs.put(job)

    def _work(self, first: list[Callable[[], None]]) -> None:
        job = first.pop()
        while True:
            Context().run(job)  # one's context variables (a decimal precision, a library's settings) end with it
            del job  # or its command would live on until the next one comes
            with self._lock:
                self._idle += 1
            try:
                job = self._jobs.get(timeout=IDLE_S)
            except queue.Empty:
                with self._lock:
                    if self._idle > 0:
                        self._idle -= 1
                        return
                job = self._jobs.get()  # one was promised to this thread meanwhile

    def spawn(self, coroutine: Coroutine[Any, Any, None], context: Context, started: Callable[[Any], None]) -> None:
        """Run `coroutine`, which must not raise, as a task of the loop; `started(task)` is called there first."""
        loop = self._event_loop()

        def start() -> None:
            # The command holds its task, and the lane holds the command: the task has an owner.
            started(loop.create_task(coroutine, context=context))

        loop.call_soon_threadsafe(start)

    def cancel(self, task: asyncio.Task[None]) -> None:
        """Cancel `task` where it awaits; one that never does is stopped by `stop_stuck`."""
        self._event_loop().call_soon_threadsafe(task.cancel)
        with self._lock:
            self._cancelled.append((time.monotonic(), task))

    def stop_stuck(self) -> None:
        """Stop a cancelled task that holds the loop without awaiting: it would hold up every other command.

        Only once it has had its chance: an exception from outside may land a line late, in somebody else's.
        """
        if not self._cancelled:
            return
        with self._lock:
            now = time.monotonic()
            stuck = [task for since, task in self._cancelled if now - since >= STUCK_S and not task.done()]
            self._cancelled = [(s, task) for s, task in self._cancelled if now - s < STUCK_S and not task.done()]
        loop = self._event_loop()
        for task in stuck:
            if self._loop_thread is not None and asyncio.current_task(loop) is task:
                stop_thread(self._loop_thread)

    def _run_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop_thread = threading.get_ident()
        while True:
            # A stop that came too late for its task, or an exit that a task left behind asked for: of neither may the
            # loop die, on which every other asynchronous command runs.
            with contextlib.suppress(CommandStopped, SystemExit, KeyboardInterrupt):
                loop.run_forever()

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                # The loop's own reader, made here, must not keep the context of the command that comes first.
                self._loop = Context().run(asyncio.new_event_loop)
                thread = threading.Thread(target=self._run_loop, args=(self._loop,), name="bridge-loop", daemon=True)
                Context().run(thread.start)  # it must not take after the command that happens to come first
            return self._loop
