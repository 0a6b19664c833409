"""The tasks that a host starts from its loop's callbacks, where no task group can: owned here, ended with the host."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ("Tasks",)


class Tasks:
    """Owns tasks of one event loop. A message arrives in a callback of the loop, which anyio's groups do not serve."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def start_soon(self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> bool:
        """Run `function(*args)` as a task; what it raises is reported by the loop's exception handler.

        False if the host is closed, and nothing was started.
        """
        if self._closed:
            return False
        task = self._loop.create_task(function(*args))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return True

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler(
                {"message": "a task of a Bridge host failed", "exception": error, "task": task}
            )

    async def close(self) -> None:
        """Cancel them all and wait until they have ended; none is started from now on."""
        self._closed = True
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
