"""What full telemetry costs a command and a callback: `python -m bench.telemetry`.

The same host and kernel with telemetry on and switched off (`host.telemetry.disable()`), in pairs of short turns one
after the other, so that what else the machine does falls on both. A turn's mean has everything in it, what is
deferred until after an answer too; its median is what a caller usually waits for.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psutil
from bench.peers import PAYLOAD, machine
from bench.report import measured
from rich.table import Table

from bridge_host import AsyncHost

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from rich.console import Console

    from bridge_host import AsyncSession

__all__ = ("main",)

CALLBACKS: Final = """
def {name}(ctx, payload, n):
    import time
    durations = []
    for _ in range(n):
        began = time.perf_counter_ns()
        {call}
        durations.append(time.perf_counter_ns() - began)
    return durations
"""


class Turn(NamedTuple):
    """One turn: ns a call."""

    mean: float
    median: float
    cpu: float = 0.0
    """Of host and kernel together: what other processes do is not in it."""


def _cpu_s(kernel: psutil.Process) -> float:
    used = kernel.cpu_times()
    return time.process_time() + used.user + used.system


async def _commands(session: AsyncSession, calls: int) -> Turn:
    durations = []
    began = time.perf_counter_ns()
    for _ in range(calls):
        started = time.perf_counter_ns()
        await session.call("echo", PAYLOAD)
        durations.append(time.perf_counter_ns() - started)
    return Turn((time.perf_counter_ns() - began) / calls, statistics.median(durations))


def _callbacks(name: str) -> Callable[[AsyncSession, int], Awaitable[Turn]]:
    async def run(session: AsyncSession, calls: int) -> Turn:
        began = time.perf_counter_ns()
        durations = await session.call(name, PAYLOAD, calls)
        return Turn((time.perf_counter_ns() - began) / calls, statistics.median(durations))

    return run


KINDS: Final[dict[str, Callable[[AsyncSession, int], Awaitable[Turn]]]] = {
    "Bridge command echo": _commands,
    "Bridge callback get_variable": _callbacks("get"),
    "Bridge callback call_tool, async tool": _callbacks("tool"),
}


async def _measure(pairs: int, calls: int) -> dict[str, Any]:
    turns: dict[str, dict[bool, list[Turn]]] = {kind: {True: [], False: []} for kind in KINDS}
    async with AsyncHost() as host:
        kernel = psutil.Process(host.kernels()[0].pid)
        session = host.session()
        session["x"] = PAYLOAD
        session.function("echo", "def echo(value):\n    return value\n")
        session.function("get", CALLBACKS.format(name="get", call='ctx.get_variable("x")'))
        session.function("tool", CALLBACKS.format(name="tool", call='ctx.call_tool("same", value=payload)'))

        async def same(value: dict[str, Any]) -> dict[str, Any]:
            return value

        session.tool(same)
        for run in KINDS.values():
            await run(session, calls)  # warm
        for pair in range(pairs):
            for kind, run in KINDS.items():
                for on in (True, False) if pair % 2 else (False, True):
                    (host.telemetry.enable if on else host.telemetry.disable)()
                    await run(session, 3)
                    before = _cpu_s(kernel)
                    turn = await run(session, calls)
                    host.telemetry.sync()  # what was put off belongs to the turn
                    turns[kind][on].append(turn._replace(cpu=(_cpu_s(kernel) - before) * 1e9 / calls))
        host.telemetry.enable()
        await session.call("echo", PAYLOAD)
        events = len(host.telemetry.events())
    rows = []
    for kind, both in turns.items():
        ratios = {
            name: statistics.median(
                getattr(on, name) / getattr(off, name) for on, off in zip(both[True], both[False], strict=True)
            )
            for name in Turn._fields
        }
        medians = {on: statistics.median(turn.median for turn in both[on]) / 1e3 for on in both}
        rows.append({"what": kind, "on_us": medians[True], "off_us": medians[False], **ratios})
    return {"machine": machine(), "pairs": pairs, "calls": calls, "events": events, "overhead": rows}


def _show(report: dict[str, Any], console: Console) -> None:
    table = Table(title=f"Telemetry on / off, {report['pairs']} pairs of turns of {report['calls']} calls")
    table.add_column("what")
    for column in ("off p50 µs", "on p50 µs", "on / off, medians", "means", "CPU"):
        table.add_column(column, justify="right")
    for row in report["overhead"]:
        figures = (row["off_us"], row["on_us"])
        table.add_row(
            row["what"],
            *(f"{f:,.0f}" for f in figures),
            f"{row['median']:.3f}",
            f"{row['mean']:.3f}",
            f"{row['cpu']:.3f}",
        )
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in report["machine"].items()), highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.telemetry", description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--calls", type=int, default=200, help="a turn")
    parser.add_argument("--quick", action="store_true", help="a few seconds: does it run, not how much it costs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs, options.calls = 2, 10
    return measured(lambda: asyncio.run(_measure(options.pairs, options.calls)), _show, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
