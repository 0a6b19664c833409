"""What several kernels bring, and what it costs to choose among them: `python -m bench.pool`.

Commands that compute (pure Python, some 20 ms) and commands that wait (50 ms), beside a `ProcessPoolExecutor` of as
many processes; routing strategies on a mix of slow and fast commands; the pool's own part of a command; what happens
when a kernel is killed. Whoever is compared takes turns, in another order each round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import signal
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.load import Load, burn, figures, furnished, load, loops_of, nap, table_of
from bench.peers import machine
from bench.report import measured
from bench.routing import STRATEGIES, measure_routing, show_routing

from bridge_host import AsyncHost
from bridge_host.pool.dispatch import Dispatcher
from bridge_host.pool.options import PoolOptions
from bridge_host.pool.routing import Ask

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from rich.console import Console

    from bridge_host import AsyncSession, Event

__all__ = ("main", "measure_places", "measure_recovery", "measure_scaling")

SEED: Final = 20240229
TURN_S: Final = 120.0
KERNELS: Final = (1, 2, 4)
BURN_S: Final = 0.02
NAP_S: Final = 0.05
BURNING: Final = 8  # commands in flight that compute
NAPPING: Final = 64  # that wait

now = time.perf_counter


# -- as many kernels -----------------------------------------------------------------


async def measure_scaling(counts: Sequence[int], naps: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Throughput and latency by kind of command, peer and number of processes."""
    order, loop = random.Random(SEED), asyncio.get_running_loop()
    loops = loops_of(BURN_S)
    senders: dict[tuple[str, str, int], list[Callable[[], Awaitable[object]]]] = {}
    with contextlib.ExitStack() as stack:
        # Started before there are kernels and their connections, of which a fork would inherit the sockets.
        for kernels in counts:
            executor = stack.enter_context(ProcessPoolExecutor(kernels))
            await asyncio.gather(*(loop.run_in_executor(executor, nap, 0.1) for _ in range(kernels)))

            def burns(executor: ProcessPoolExecutor = executor) -> Awaitable[int]:
                return loop.run_in_executor(executor, burn, loops)

            def sleeps(executor: ProcessPoolExecutor = executor) -> Awaitable[float]:
                return loop.run_in_executor(executor, nap, NAP_S)

            senders["computes", "ProcessPoolExecutor", kernels] = [burns] * BURNING
            senders["waits", "ProcessPoolExecutor", kernels] = [sleeps] * naps
        async with contextlib.AsyncExitStack() as hosts:
            for kernels in counts:
                sessions = furnished(await hosts.enter_async_context(AsyncHost(kernels=kernels)), naps)
                senders["computes", "Bridge", kernels] = [
                    lambda s=session: s.call("burn", loops)  # type: ignore[misc]
                    for session in sessions[:BURNING]
                ]
                senders["waits", "Bridge", kernels] = [
                    lambda s=session: s.call("nap", NAP_S)  # type: ignore[misc]
                    for session in sessions
                ]
            measured: dict[tuple[str, str, int], list[Load]] = {key: [] for key in senders}
            for clients in senders.values():
                await load(clients, seconds / 4)
            for _ in range(rounds):
                for key in order.sample(sorted(senders), len(senders)):
                    measured[key].append(await load(senders[key], seconds))
    rows = [
        {"kind": kind, "peer": peer, "kernels": kernels, **figures(loads)}
        for (kind, peer, kernels), loads in measured.items()
    ]
    return sorted(rows, key=lambda row: (row["kind"], row["peer"], row["kernels"]))


# -- a place in a kernel --------------------------------------------------------------


async def measure_places(counts: Sequence[int], rounds: int, count: int) -> list[dict[str, Any]]:
    """µs for a place in a kernel to be given and given back, by strategy and number of kernels."""
    order = random.Random(SEED)
    measured: dict[tuple[str, int], list[float]] = {}
    async with AsyncHost(kernels=max(counts)) as host:
        kernels, ask = host.pool.kernels, Ask("session", "bench.burn")
        desks = {}
        for strategy in STRATEGIES:
            for among in counts:
                desk = desks[strategy, among] = Dispatcher(
                    host.telemetry, PoolOptions(routing=strategy), hopeless=lambda: None, on_worn=lambda *worn: None
                )
                desk.update(kernels[:among])
        for _ in range(rounds):
            for key in order.sample(sorted(desks), len(desks)):
                desk, began = desks[key], now()
                for _ in range(count):
                    lease = desk.take(ask)
                    assert lease is not None
                    desk.release(lease, "ok")
                measured.setdefault(key, []).append((now() - began) / count * 1e6)
    return [
        {"strategy": strategy, "kernels": among, "us": statistics.median(us), "best_us": min(us)}
        for (strategy, among), us in sorted(measured.items())
    ]


# -- a kernel is killed --------------------------------------------------------------


async def measure_recovery(repetitions: int) -> list[dict[str, Any]]:
    """ms from SIGKILL of the only kernel: death seen, a command answered that was sent at once, a new one ready."""
    rows = []
    for spares in (0, 1):
        host, starts, complete = AsyncHost(kernels=1, spares=spares), itertools.count(), asyncio.Event()

        def on_start(event: Event) -> None:
            if next(starts) == spares:  # noqa: B023 - the host is closed before the next one is made
                complete.set()  # noqa: B023

        host.telemetry.attach("bridge.kernel.start", on_start, id="bench-complete")
        async with host:
            await complete.wait()
            session = host.session()
            times: dict[str, list[float]] = {"seen": [], "answered": [], "started": []}
            for _ in range(repetitions):
                async with asyncio.timeout(TURN_S):
                    await session.call("operator.index", 1)  # a kernel that has served is replaced without delay
                    for name, ms in (await _kill(host, session)).items():
                        times[name].append(ms)
            rows.append(
                {
                    "spares": spares,
                    **{name: {"median_ms": statistics.median(ms), "worst_ms": max(ms)} for name, ms in times.items()},
                }
            )
    return rows


async def _kill(host: AsyncHost, session: AsyncSession) -> dict[str, float]:
    started, seen = asyncio.Event(), asyncio.Event()
    at: dict[str, float] = {}

    def on_stop(event: Event) -> None:
        at["seen"] = now()
        seen.set()

    def on_start(event: Event) -> None:
        at["started"] = now()
        started.set()

    host.telemetry.attach("bridge.kernel.stop", on_stop, id="bench-stop")
    host.telemetry.attach("bridge.kernel.start", on_start, id="bench-start")
    try:
        pid = next(kernel.pid for kernel in host.kernels() if kernel.state == "ready")
        began = now()
        os.kill(pid, signal.SIGKILL)
        await session.call("operator.index", 1)
        at["answered"] = now()
        await seen.wait()
        await started.wait()
    finally:
        host.telemetry.detach("bench-stop")
        host.telemetry.detach("bench-start")
    return {name: (moment - began) * 1e3 for name, moment in at.items()}


# -- the report ----------------------------------------------------------------------


def _show(report: dict[str, Any], console: Console) -> None:
    for kind, what in (
        ("computes", f"Commands that compute for {BURN_S * 1e3:.0f} ms, {BURNING} in flight"),
        ("waits", f"Commands that wait for {NAP_S * 1e3:.0f} ms, {NAPPING} in flight"),
    ):
        table = table_of(what, "peer", "processes", "a second", "p50 ms", "p99 ms")
        for row in report["scaling"]:
            if row["kind"] == kind:
                figures = (f"{row['per_s']:,.0f}", f"{row['p50_ms']:,.0f}", f"{row['p99_ms']:,.0f}")
                table.add_row(row["peer"], str(row["kernels"]), *figures)
        console.print(table)
    show_routing(report["routing"], console)
    table = table_of("A place in a kernel, taken and given back", "routing", "kernels", "µs", "best µs")
    for row in report["places"]:
        table.add_row(row["strategy"], str(row["kernels"]), f"{row['us']:.1f}", f"{row['best_us']:.1f}")
    console.print(table)
    table = table_of(
        "The only kernel is killed: ms until (worst)", "spares", "death seen", "next command answered", "new one ready"
    )
    for row in report["recovery"]:
        moments = [row[name] for name in ("seen", "answered", "started")]
        table.add_row(str(row["spares"]), *(f"{ms['median_ms']:,.0f} ({ms['worst_ms']:,.0f})" for ms in moments))
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in report["machine"].items()), highlight=False)


async def _measure(*, quick: bool) -> dict[str, Any]:
    rounds, seconds = (1, 0.1) if quick else (5, 2.0)
    counts = (1, 2) if quick else KERNELS
    return {
        "scaling": await measure_scaling(counts, BURNING if quick else NAPPING, rounds, seconds),
        "routing": await measure_routing(rounds, seconds),
        "places": await measure_places(counts, 2 if quick else 30, 100 if quick else 2000),
        "recovery": await measure_recovery(1 if quick else 15),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pool", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds: does it run, not how fast it is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    options = parser.parse_args(arguments)
    about = machine()
    return measured(lambda: {"machine": about, **asyncio.run(_measure(quick=options.quick))}, _show, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
