"""Load for the benchmarks of the pool: what clients ask for, how long it took, and the tables that say so."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from bridge_host import AsyncHost, AsyncSession

__all__ = ("Load", "burn", "figures", "furnished", "load", "loops_of", "nap", "share_of", "table_of")

TURN_S: Final = 120.0

now = time.perf_counter


def burn(count: int) -> int:
    total = 0
    for i in range(count):
        total += i * i
    return total


def nap(seconds: float) -> float:
    import time

    time.sleep(seconds)
    return seconds


class Load(NamedTuple):
    """Of one turn: commands a second, and how many seconds each took from being sent to being answered."""

    per_s: float
    seconds: list[float]


async def load(clients: Sequence[Callable[[], Awaitable[object]]], seconds: float) -> Load:
    """Clients that each send a command when their last one is answered, for so many seconds."""
    durations: list[float] = []

    async def client(send: Callable[[], Awaitable[object]]) -> None:
        while (began := now()) < until:
            await send()
            durations.append(now() - began)

    began = now()
    until = began + seconds
    async with asyncio.timeout(TURN_S):
        await asyncio.gather(*map(client, clients))
    return Load(len(durations) / (now() - began), durations)


def loops_of(seconds: float) -> int:
    """How many of `burn`'s loops take so long here, alone."""
    count = 100_000
    best = float("inf")
    for _ in range(7):
        began = now()
        burn(count)
        best = min(best, now() - began)
    return int(count * seconds / best)


def share_of(durations: Sequence[float], share: float) -> float:
    """That share of the durations is shorter, in ms."""
    ordered = sorted(durations)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1e3


def furnished(host: AsyncHost, sessions: int) -> list[AsyncSession]:
    made = [host.session() for _ in range(sessions)]
    for session in made:
        session.function("burn", burn)
        session.function("nap", nap)
    return made


def figures(loads: Sequence[Load]) -> dict[str, float]:
    durations = [duration for load in loads for duration in load.seconds]
    return {
        "per_s": statistics.median(load.per_s for load in loads),
        "p50_ms": share_of(durations, 0.5),
        "p95_ms": share_of(durations, 0.95),
        "p99_ms": share_of(durations, 0.99),
    }


def table_of(title: str, *columns: str) -> Table:
    table = Table(title=title)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table
