"""What a round trip costs, whoever else uses the machine: `python -m bench.profile_command`.

CPU time and context switches, of this process and of the one that answers: unlike a latency they hardly depend on
what else runs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import psutil
from bench.peers import Place, machine, open_peers
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.peers import Peer

__all__ = ("Cost", "main", "measure")

SEED: Final = 20240229
TURN_S: Final = 300.0


class Cost(NamedTuple):
    """Of one round trip: CPU in µs and context switches, here and where the answer comes from."""

    host_us: float
    peer_us: float
    host_switches: float
    peer_switches: float


def _cpu_us(process: psutil.Process) -> float:
    """To the system's clock tick, mostly 10 ms: measure a second's worth."""
    times = process.cpu_times()
    return (times.user + times.system) * 1e6


def _switches(process: psutil.Process) -> int:
    """Of all threads. On Linux `num_ctx_switches` tells the main thread's only, so the threads are asked there."""
    threads = Path(f"/proc/{process.pid}/task")
    if not threads.is_dir():
        counted = process.num_ctx_switches()
        return counted.voluntary + counted.involuntary
    total = 0
    for status in threads.glob("*/status"):
        for line in status.read_text().splitlines():
            if "ctxt_switches" in line:
                total += int(line.rpartition(":")[2])
    return total


async def _cost(peer: Peer, calls: int) -> Cost:
    here, there = psutil.Process(os.getpid()), psutil.Process(peer.pid)
    n = max(1, int(calls * peer.share))
    await peer.run(max(1, n // 20))
    switches, cpu = (_switches(here), _switches(there)), (_cpu_us(here), _cpu_us(there))
    await peer.run(n)
    return Cost(
        host_us=(_cpu_us(here) - cpu[0]) / n,
        peer_us=(_cpu_us(there) - cpu[1]) / n,
        host_switches=(_switches(here) - switches[0]) / n,
        peer_switches=(_switches(there) - switches[1]) / n,
    )


async def measure(place: Place, rounds: int, calls: int) -> dict[str, list[Cost]]:
    """Each peer's costs, a round each."""
    order = random.Random(SEED)
    async with open_peers(place) as peers:
        measured: dict[str, list[Cost]] = {peer.name: [] for peer in peers}
        for _ in range(rounds):
            for peer in order.sample(peers, len(peers)):
                async with asyncio.timeout(TURN_S):
                    measured[peer.name].append(await _cost(peer, calls))
                await asyncio.sleep(0)
    return measured


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_command", description=__doc__)
    parser.add_argument("--transport", choices=("ipc", "tcp"), default="ipc", help="the same for all (default: ipc)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=2000, help="a round and peer; slow peers make fewer")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.raise_signal(signal.SIGINT))
    about = machine()
    try:
        with Place(options.transport) as place:
            measured = asyncio.run(measure(place, options.rounds, options.calls))
    except KeyboardInterrupt:
        return 130
    table = Table(title=f"Cost of one round trip over {options.transport}, median of {options.rounds} rounds")
    table.add_column("peer")
    for column in ("host CPU µs", "peer CPU µs", "together µs", "host switches", "peer switches"):
        table.add_column(column, justify="right")
    for name, costs in measured.items():
        host_us, peer_us, host_switches, peer_switches = (
            statistics.median(values) for values in zip(*costs, strict=True)
        )
        together = statistics.median(cost.host_us + cost.peer_us for cost in costs)
        figures = (
            f"{host_us:,.0f}",
            f"{peer_us:,.0f}",
            f"{together:,.0f}",
            f"{host_switches:.1f}",
            f"{peer_switches:.1f}",
        )
        table.add_row(name, *figures)
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
