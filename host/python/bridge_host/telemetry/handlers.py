"""Who wants to hear of events: handlers by the beginning of a name, as Elixir's `:telemetry` has them."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import threading
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

from bridge_kernel.contract.errors import type_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bridge_kernel.contract.telemetry import Event

    Handler = Callable[[Event], object]

__all__ = ("Handlers", "prefix_of")


def prefix_of(prefix: str | Iterable[str]) -> tuple[str, ...]:
    """`"bridge.execution"` and `("bridge", "execution")` are the same; an empty one is the beginning of every name."""
    if isinstance(prefix, str):
        return tuple(filter(None, prefix.split(".")))
    return tuple(prefix)


class Handlers:
    """Thread-safe. What handles events may attach and detach handlers itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._attached: dict[str, tuple[tuple[str, ...], Handler]] = {}
        self._ids = itertools.count(1)
        # Replaced, never changed: it is gone through without a lock.
        self._all: tuple[tuple[str, tuple[str, ...], Handler], ...] = ()

    def attach(self, prefix: str | Iterable[str], handler: Handler, id: str | None) -> str:
        """See `Telemetry.attach`."""
        if not callable(handler):
            raise TypeError(f"a handler is a function that takes an event, not {handler!r}")
        if inspect.iscoroutinefunction(handler):
            raise TypeError(f"a handler is called, not awaited: {handler!r} is asynchronous; put events in a queue")
        with self._lock:
            if id is None:
                id = f"handler-{next(self._ids)}"
            if id in self._attached:
                raise ValueError(f"a handler {id!r} is attached already: detach it first, or choose another id")
            self._attached[id] = (prefix_of(prefix), handler)
            self._changed()
        return id

    def detach(self, id: str) -> bool:
        """Whether there was one of this id."""
        with self._lock:
            found = self._attached.pop(id, None) is not None
            self._changed()
        return found

    def _changed(self) -> None:
        self._all = tuple((id, prefix, handler) for id, (prefix, handler) in self._attached.items())

    def call(self, event: Event) -> list[tuple[str, str]]:
        """Call those that want the event; of those that raised, and are detached now, the id and the error's type."""
        failed = []
        for id, prefix, handler in self._all:
            if event.name[: len(prefix)] == prefix:
                try:
                    handler(event)
                # A CancelledError is its own too: nothing is awaited here. It is detached, and said to be.
                except (Exception, asyncio.CancelledError) as exc:  # noqa: BLE001 - somebody else's handler
                    if self.detach(id):
                        failed.append((id, type_of(exc)))
                        with suppress(Warning):  # where warnings are errors, it would break the command after all
                            warnings.warn(f"telemetry handler {id!r} raised {exc!r} and was detached", stacklevel=4)
        return failed

    def __len__(self) -> int:
        return len(self._all)
