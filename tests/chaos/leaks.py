"""What a host that goes on may not gather while its kernels die: file descriptors, threads, tasks."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bridge_host import AsyncHost, AsyncSession

__all__ = ("look_for_leaks", "more_of", "what_is_held")

ROUNDS: Final = 2  # after the first, which makes what is made once
SETTLE_S: Final = 20.0
STEADY: Final = 20  # looks, one each 50 ms: longer than the longest pause between two tries to connect


def what_is_held() -> dict[str, Counter[str]]:
    """Open files and threads by what they are, tasks by what they run; nothing where the system does not say."""
    if sys.platform != "linux":
        return {}
    files: list[str] = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            files.append(os.readlink(f"/proc/self/fd/{fd}").partition(":")[0])
        except FileNotFoundError:
            continue  # that of the listing itself
    # Not those that tools run in: there are as many as there were tools at work at once, and they end when idle.
    python = [thread.name for thread in threading.enumerate()]
    threads = [name for name in python if name != "AnyIO worker thread"]
    threads += ["native"] * (len(os.listdir("/proc/self/task")) - len(python))
    tasks = [getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks()]
    return {"files": Counter(files), "threads": Counter(threads), "tasks": Counter(tasks)}


def more_of(before: dict[str, Counter[str]], after: dict[str, Counter[str]]) -> dict[str, Counter[str]]:
    """What there is more of now."""
    return {what: more for what, there in after.items() if (more := there - before[what]) and more.total() > 0}


async def _until(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + SETTLE_S
    while not condition():
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.05)
    return True


async def _steady() -> dict[str, Counter[str]]:
    """What is held when it has not changed for a while: ZMQ connects, and lets go, in its own time."""
    last, same = what_is_held(), 0

    def settled() -> bool:
        nonlocal last, same
        now = what_is_held()
        last, same = now, same + 1 if now == last else 0
        return same >= STEADY

    await _until(settled)
    return last


async def _round(host: AsyncHost, sessions: Sequence[AsyncSession]) -> None:
    """One kernel dies and one loses its sockets; work goes on, and both are replaced."""
    async with asyncio.TaskGroup() as group:
        ready = [kernel for kernel in host.kernels() if kernel.state == "ready"]
        for kernel, sign in zip(ready, (signal.SIGKILL, signal.SIGUSR2), strict=False):
            os.kill(kernel.pid, sign)
        for session in sessions:
            group.create_task(session.call("workload.look"))
    await _rest(host)


async def _rest(host: AsyncHost) -> bool:
    def ready() -> bool:
        kernels = host.kernels()
        return len(kernels) == host.pool.status().wanted and all(k.state == "ready" for k in kernels)

    return await _until(ready)


async def look_for_leaks(host: AsyncHost, sessions: Sequence[AsyncSession]) -> list[str]:
    """What it holds more of after kernels have died than before; empty if nothing."""
    if not await _rest(host):
        return [f"the pool does not come to rest: {host.pool.status()!r}"]
    await _round(host, sessions)
    before = await _steady()
    for _ in range(ROUNDS):
        await _round(host, sessions)
    leaks = more_of(before, await _steady())
    return [f"leaked, while kernels died: {leaks}"] if leaks else []
