"""`Watchers`: who is told what was committed, in the order of the commits, once it is on disk."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import sys
import threading
import warnings
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Self

from bridge_kernel.contract.errors import BridgeError, HostClosed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from .store import Change, Store

__all__ = ("Changes", "Watch", "Watchers")

WAITING: Final = 10_000
"""How many commits watchers may be behind, and how many changes a reader of `Changes`. Whoever is further behind misses
the oldest: `Watch.missed` counts them, and the first is warned of. Writers wait for neither."""
CLOSE_S: Final = 2.0
"""How long watchers may go on, in seconds, when the host closes."""


def _warn(message: str) -> None:
    # Where warnings are errors, one must end neither the thread that tells all the others nor the closing of a host.
    try:
        warnings.warn(message, stacklevel=2)
    except Warning:
        threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


class Watch:
    """One watcher. `close()` ends it; so do raising, with a warning, and the end of its session or of the host."""

    def __init__(
        self, owner: Watchers, session: str, name: str | None, callback: Callable[[Change], object] | None
    ) -> None:
        self._owner = owner
        self._since = 0  # the commit after which it was made
        self._closed = False
        self.session = session
        self.name = name
        self.callback = callback
        self.asynchronous = inspect.iscoroutinefunction(callback)
        self.missed = 0
        """How many changes it was not told, the oldest each time, for it or another watcher was too slow."""

    def close(self) -> None:
        """Tell it nothing more. Closing twice does nothing."""
        self._closed = True
        self._owner.remove(self)

    def _hears(self, commit: int, change: Change) -> bool:
        return (
            not self._closed
            and commit > self._since
            and self.session == change.session
            and self.name in (None, change.name)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Watch {self.name or 'every variable'} of session {self.session!r}>"


class Changes(Watch):
    """Changes to iterate over, with `for` or with `async for`, as they are committed.

    Once it is closed, or its session or the host ends, iterating ends after what had arrived by then.
    """

    def __init__(self, owner: Watchers, session: str, name: str | None) -> None:
        super().__init__(owner, session, name, self._take)
        self._changes: deque[Change] = deque()
        self._arrived = threading.Condition()
        self._awaited: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def _take(self, change: Change) -> None:
        with self._arrived:
            late = len(self._changes) >= WAITING
            if late:
                self._changes.popleft()
            self._changes.append(change)
            self._wake()
        if late:
            self._owner.miss(self)

    def _wake(self) -> None:
        self._arrived.notify_all()
        for loop, event in self._awaited:
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits on it any more
                loop.call_soon_threadsafe(event.set)

    def close(self) -> None:
        super().close()
        with self._arrived:
            self._wake()

    def __iter__(self) -> Iterator[Change]:
        while True:
            with self._arrived:
                while not self._changes:
                    if self._closed:
                        return
                    self._arrived.wait()
                change = self._changes.popleft()
            yield change

    async def __aiter__(self) -> AsyncIterator[Change]:
        event = asyncio.Event()
        awaited = (asyncio.get_running_loop(), event)
        with self._arrived:
            self._awaited.add(awaited)
        try:
            while True:
                with self._arrived:
                    change = self._changes.popleft() if self._changes else None
                    if change is None and self._closed:
                        return
                    event.clear()
                if change is not None:
                    yield change
                else:
                    await event.wait()
        finally:
            with self._arrived:
                self._awaited.discard(awaited)


class Watchers:
    """Belongs to one store. A thread of its own tells them, for what they do must hold up nobody who writes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watches: list[Watch] = []
        self._queue: deque[tuple[int, int, list[Change]]] = deque()
        self._commits = 0  # those heard of; the log's numbers are not used, for in memory there are none
        self._late: list[Watch] = []  # who missed a change, and has not been warned of yet
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._telling: Watch | None = None
        self._running: concurrent.futures.Future[Any] | None = None
        self._closed = False  # nothing more is heard
        self._stopped = False  # nothing more is told

    def serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run asynchronous watchers on that loop."""
        self._loop = loop

    def watch(self, session: str, name: str | None, callback: Callable[[Change], Any]) -> Watch:
        """Call `callback(change)` after each commit that changes the variable, or any variable without a name.

        Raises:
            HostClosed: nothing is told any more.
        """
        if not callable(callback):
            raise TypeError(f"a watcher is a function of one change, not {callback!r}")
        return self._add(Watch(self, session, name, callback))

    def changes(self, session: str, name: str | None) -> Changes:
        """Changes to iterate over. Raises `HostClosed`."""
        changes = Changes(self, session, name)
        self._add(changes)
        return changes

    def _add(self, watch: Watch) -> Watch:
        with self._changed:
            if self._closed:
                raise HostClosed("the host is closed: nothing is told to watchers any more")
            watch._since = self._commits
            self._watches.append(watch)
            self._store.on_change = self._on_change
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="bridge-watchers", daemon=True)
                self._thread.start()
        return watch

    def remove(self, watch: Watch) -> None:
        with self._changed:
            if watch in self._watches:
                self._watches.remove(watch)
            if not self._watches:
                self._store.on_change = None

    def forget(self, session: str) -> None:
        """Close what watches that session, for it is gone: another of the same id has watchers of its own."""
        with self._changed:
            watches = [watch for watch in self._watches if watch.session == session]
        for watch in watches:
            watch.close()

    def miss(self, watch: Watch) -> None:
        """Count a change that the watcher is not told."""
        with self._changed:
            self._miss(watch)

    def _miss(self, watch: Watch) -> None:
        watch.missed += 1
        if watch.missed == 1:
            self._late.append(watch)

    def _on_change(self, number: int, changes: list[Change]) -> None:
        # Called inside the commit, so the queue has the commits' order.
        with self._changed:
            if self._closed:
                return
            if len(self._queue) >= WAITING:
                commit, _, missed = self._queue.popleft()
                for change in missed:
                    for watch in self._watches:
                        if watch._hears(commit, change):
                            self._miss(watch)
            self._commits += 1
            self._queue.append((self._commits, number, changes))
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    if self._closed:
                        return
                    self._changed.wait()
                commit, number, changes = self._queue.popleft()
                watches = list(self._watches)
            try:
                self._store.log.wait(number)
            except BridgeError:
                continue  # it never was committed: whoever wrote it was told
            for change in changes:
                for watch in watches:
                    if watch._hears(commit, change) and not self._stopped:
                        self._tell(watch, change)
            with self._changed:
                late, self._late = self._late, []
            for watch in late:
                _warn(
                    f"{watch!r} is more than {WAITING} changes behind and misses the oldest: its `missed` counts them"
                )

    def _tell(self, watch: Watch, change: Change) -> None:
        assert watch.callback is not None
        self._telling = watch
        try:
            if watch.asynchronous and self._loop is not None:
                told: Any = watch.callback(change)
                running = asyncio.run_coroutine_threadsafe(told, self._loop)
                with self._changed:
                    self._running = running
                    if self._stopped:
                        running.cancel()
                running.result()
            else:
                watch.callback(change)
        except Exception as exc:  # noqa: BLE001 - somebody else's function: it is told nothing more, and that is said
            watch.close()
            if not (self._stopped and isinstance(exc, concurrent.futures.CancelledError)):  # `close` speaks of that
                _warn(f"{watch!r} raised {exc!r} and was closed")
        finally:
            self._telling = None

    def close(self, within_s: float = CLOSE_S) -> None:
        """Tell what was committed until now, not what watchers write from now on, and end.

        What that takes is bounded: after `within_s` seconds an asynchronous watcher that is running is cancelled and
        nothing more is told; a function that does not return within as long again is left to itself, on its daemon
        thread. A warning names either.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        thread = self._thread
        warning = None
        if thread is not None and thread is not threading.current_thread():
            thread.join(within_s)
            if thread.is_alive():
                warning = self._stop(thread, within_s)
        self._end()
        if warning is not None:
            _warn(warning)

    def _stop(self, thread: threading.Thread, within_s: float) -> str:
        """End the telling; what to say of it."""
        with self._changed:
            self._stopped = True
            telling = self._telling
            untold = len(self._queue)
            self._queue.clear()
            if self._running is not None:
                self._running.cancel()
        self._end()  # a watcher that iterates over changes waits for no more
        thread.join(within_s)
        if telling is None:
            what = "the disk was not"
        elif telling.asynchronous:
            what = f"{telling!r} was cancelled, which was not"
        elif thread.is_alive():
            what = f"{telling!r} does not return and is left to itself: it was not"
        else:
            what = f"{telling!r} was not"
        return f"{what} done {within_s:g} s after the host began to close; {untold} commits more were not told"

    def _end(self) -> None:
        with self._changed:
            watches = list(self._watches)
        for watch in watches:
            watch.close()
