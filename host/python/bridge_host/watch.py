"""`Watchers`: who is told what was committed, in the order of the commits, once it is on disk."""

from __future__ import annotations

import asyncio
import inspect
import threading
import warnings
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Self

from bridge_kernel.contract.errors import BridgeError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from .store import Change, Store

__all__ = ("Changes", "Watch", "Watchers")

WAITING: Final = 10_000  # commits that watchers may be behind; of older ones they are told only how many they missed


class Watch:
    """One watcher. `close()` ends it; so does raising, with a warning."""

    def __init__(
        self, owner: Watchers, session: str, name: str | None, callback: Callable[[Change], object] | None
    ) -> None:
        self._owner = owner
        self.session = session
        self.name = name
        self.callback = callback
        self.asynchronous = inspect.iscoroutinefunction(callback)

    def close(self) -> None:
        """Tell it nothing more. Closing twice does nothing."""
        self._owner.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Watch {self.name or 'every variable'} of session {self.session!r}>"


class Changes(Watch):
    """Changes to iterate over, with `for` or with `async for`, as they are committed; it ends when it is closed."""

    def __init__(self, owner: Watchers, session: str, name: str | None) -> None:
        super().__init__(owner, session, name, self._take)
        self._changes: deque[Change] = deque()
        self._arrived = threading.Condition()
        self._awaited: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._closed = False

    def _take(self, change: Change) -> None:
        with self._arrived:
            # A reader that is this far behind makes the writers' side wait no more than the others': it misses some.
            if len(self._changes) < WAITING:
                self._changes.append(change)
            self._wake()

    def _wake(self) -> None:
        self._arrived.notify_all()
        if self._awaited is not None:
            loop, event = self._awaited
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    def close(self) -> None:
        super().close()
        with self._arrived:
            self._closed = True
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
        self._awaited = (asyncio.get_running_loop(), event)
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


class Watchers:
    """Belongs to one store. A thread of its own tells them, for what they do must hold up nobody who writes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watches: list[Watch] = []
        self._queue: deque[tuple[int, list[Change]]] = deque()
        self._missed = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run asynchronous watchers on that loop."""
        self._loop = loop

    def watch(self, session: str, name: str | None, callback: Callable[[Change], Any]) -> Watch:
        """Call `callback(change)` after each commit that changes the variable, or any variable without a name."""
        if not callable(callback):
            raise TypeError(f"a watcher is a function of one change, not {callback!r}")
        return self._add(Watch(self, session, name, callback))

    def changes(self, session: str, name: str | None) -> Changes:
        changes = Changes(self, session, name)
        self._add(changes)
        return changes

    def _add(self, watch: Watch) -> Watch:
        with self._changed:
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

    def _on_change(self, number: int, changes: list[Change]) -> None:
        # Called inside the commit, so the queue has the commits' order.
        with self._changed:
            if len(self._queue) >= WAITING:
                self._missed += len(self._queue.popleft()[1])
            self._queue.append((number, changes))
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    if self._closed:
                        return
                    self._changed.wait()
                number, changes = self._queue.popleft()
                missed, self._missed = self._missed, 0
                watches = list(self._watches)
            if missed:
                warnings.warn(f"watchers were too slow and missed {missed} changes", stacklevel=1)
            try:
                self._store.log.wait(number)
            except BridgeError:
                continue  # it never was committed: whoever wrote it was told
            for change in changes:
                for watch in watches:
                    if watch.session == change.session and watch.name in (None, change.name):
                        self._tell(watch, change)

    def _tell(self, watch: Watch, change: Change) -> None:
        assert watch.callback is not None
        try:
            if watch.asynchronous and self._loop is not None:
                asyncio.run_coroutine_threadsafe(watch.callback(change), self._loop).result()  # type: ignore[arg-type]
            else:
                watch.callback(change)
        except Exception as exc:  # noqa: BLE001 - somebody else's function: it is told nothing more, and that is said
            watch.close()
            warnings.warn(f"{watch!r} raised {exc!r} and was closed", stacklevel=1)

    def close(self) -> None:
        """Tell what is still to be told, then end. The loop of asynchronous watchers must be running still."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            watches = list(self._watches)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        for watch in watches:
            watch.close()
