"""What it brings to choose among kernels, and by what: each strategy on the same kernels, in turns, on several mixes.

`python -m bench.routing`, and part of `bench.pool`. Strategies are compared with `least_loaded` round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from bench.load import Load, burn, figures, furnished, load, loops_of, table_of
from bench.peers import machine
from bench.report import measured

from bridge_host import AsyncHost
from bridge_host.pool.routing import Ask, routing_named

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from rich.console import Console

    from bridge_host import AsyncSession
    from bridge_host.pool.routing import Chosen

__all__ = ("STRATEGIES", "main", "measure_routing", "show_routing")

SEED: Final = 20240229
STRATEGIES: Final = ("fastest", "least_loaded", "random", "pinned")
BASE: Final = "least_loaded"
KERNELS: Final = 2


class Part(NamedTuple):
    """Clients of one kind; each sends its next command when the last is answered."""

    name: str
    clients: int
    does: str  # "burn" or "nap"
    seconds: float  # alone


MIXES: Final = {
    "long and short": (Part("long", 1, "burn", 0.1), Part("short", 6, "burn", 0.001)),
    "waiting, long and short": (
        Part("waiting", 12, "nap", 0.2),
        Part("long", 1, "burn", 0.1),
        Part("short", 2, "burn", 0.001),
    ),
    "one kernel is slowed": (Part("short", 4, "burn", 0.005),),
}
SLOWED: Final = "one kernel is slowed"


def haunt() -> None:
    """Leave a thread behind that computes until the kernel ends: whatever runs there shares its time with that."""
    import threading

    def compute() -> None:
        total = 0
        while True:
            total = (total + 1) % 1000

    threading.Thread(target=compute, daemon=True).start()


class _Switch:
    """A strategy that can be changed while the pool runs: the strategies are compared on the same kernels."""

    def __init__(self) -> None:
        self.strategies = {name: routing_named(name) for name in STRATEGIES}
        self.name = STRATEGIES[0]

    def choose(self, ask: Ask, candidates: Sequence[Chosen]) -> Chosen:
        return self.strategies[self.name].choose(ask, candidates)


async def measure_routing(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """For each mix, strategy and kind of client: how many a second, how long each took, how that compares."""
    return [row for mix, parts in MIXES.items() for row in await _measure_mix(mix, parts, rounds, seconds)]


async def _measure_mix(mix: str, parts: Sequence[Part], rounds: int, seconds: float) -> list[dict[str, Any]]:
    order, switch = random.Random(SEED), _Switch()
    measured: dict[str, list[list[Load]]] = {strategy: [] for strategy in STRATEGIES}
    async with AsyncHost(kernels=KERNELS, routing=switch) as host:
        sessions = furnished(host, sum(part.clients for part in parts))
        clients: list[list[Callable[[], Awaitable[object]]]] = []
        for part in parts:
            mine, sessions = sessions[: part.clients], sessions[part.clients :]
            clients.append([_sender(session, part) for session in mine])

        if mix == SLOWED:
            haunted = host.session()
            haunted.function("haunt", haunt)
            await haunted.call("haunt")

        async def turn(strategy: str, seconds: float) -> list[Load]:
            switch.name = strategy
            return list(await asyncio.gather(*(load(senders, seconds) for senders in clients)))

        for _ in range(rounds):
            for strategy in order.sample(STRATEGIES, len(STRATEGIES)):
                await turn(strategy, seconds / 4)
                measured[strategy].append(await turn(strategy, seconds))
    return [
        {
            "mix": mix,
            "strategy": strategy,
            "part": part.name,
            **figures([turn[n] for turn in turns]),
            "ratios": [_mean(turn[n]) / _mean(base[n]) for turn, base in zip(turns, measured[BASE], strict=True)],
        }
        for strategy, turns in measured.items()
        for n, part in enumerate(parts)
    ]


def _mean(load: Load) -> float:
    return statistics.mean(load.seconds)


def _sender(session: AsyncSession, part: Part) -> Callable[[], Awaitable[object]]:
    if part.does == "nap":
        return lambda: session.call("nap", part.seconds)
    session.function(part.name, burn)  # under a name of its own: it is another command
    loops = loops_of(part.seconds)
    return lambda: session.call(part.name, loops)


def show_routing(rows: Sequence[dict[str, Any]], console: Console) -> None:
    for mix, parts in MIXES.items():
        what = ", ".join(f"{part.clients} {part.name} ({part.does} {part.seconds * 1e3:g} ms)" for part in parts)
        table = table_of(
            f"On {KERNELS} kernels, clients: {what}",
            *("routing", "kind", "a second", "p50 ms", "p95 ms", "p99 ms", f"mean / {BASE}: median (least, most)"),
        )
        for row in rows:
            if row["mix"] == mix:
                ratios = row["ratios"]
                ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
                moments = (f"{row[name]:.1f}" for name in ("p50_ms", "p95_ms", "p99_ms"))
                table.add_row(row["strategy"], row["part"], f"{row['per_s']:,.1f}", *moments, ratio)
        console.print(table)
    console.print(f"{SLOWED!r}: by a thread that a command left behind there and that computes all the time")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.routing", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds: does it run, not how fast it is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    options = parser.parse_args(arguments)
    rounds, seconds = (1, 0.1) if options.quick else (7, 2.0)
    about = machine()

    def show(report: dict[str, Any], console: Console) -> None:
        show_routing(report["routing"], console)
        console.print(", ".join(f"{name} {value}" for name, value in report["machine"].items()), highlight=False)

    return measured(
        lambda: {"machine": about, "routing": asyncio.run(measure_routing(rounds, seconds))}, show, options.json
    )


if __name__ == "__main__":
    raise SystemExit(main())
