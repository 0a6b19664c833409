"""How long a command takes, and a callback, beside what else one could use: `python -m bench.latency`.

Peers take turns, in another order each round, so that what else the machine does falls on all of them. Ratios are
to the raw pyzmq echo (JSON and HMAC, nothing else) of the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.peers import PAYLOAD, RAW, Place, launch, launch_host, machine, open_peers
from bench.report import measured
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.peers import Peer, Transport
    from rich.console import Console

__all__ = ("main", "measure", "measure_starts")

WARM_UP: Final = 5  # untimed round trips before each turn: the peer's pages and branches are somebody else's by then
TURN_S: Final = 120.0  # of one peer: far more than it needs, so that a hang is an error
SEED: Final = 20240229


async def measure(place: Place, rounds: int, calls: int) -> dict[str, list[list[int]]]:
    """Durations in ns, by peer and round."""
    order = random.Random(SEED)
    async with open_peers(place) as peers:
        measured: dict[str, list[list[int]]] = {peer.name: [] for peer in peers}
        for peer in peers:
            async with asyncio.timeout(TURN_S):
                await peer.run(_turn(peer, calls))
        for _ in range(rounds):
            for peer in order.sample(peers, len(peers)):
                async with asyncio.timeout(TURN_S):
                    await peer.run(WARM_UP)
                    measured[peer.name].append(await peer.run(_turn(peer, calls)))
                await asyncio.sleep(0)  # blocking peers never let the loop see Ctrl-C
    return measured


def _turn(peer: Peer, calls: int) -> int:
    return max(1, int(calls * peer.share))


def measure_starts(place: Place, repetitions: int) -> dict[str, list[float]]:
    """Seconds from the start of the process, by what was waited for."""
    names = (
        "ipykernel: process start to kernel_info",
        "ipykernel: process start to the first result",
        "Bridge: process start to kernel_info",
        "Bridge: Host() to the first result",
    )
    measured: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(SEED)

    def ipykernel() -> None:
        known, result = launch(place, "python3", execute=True)
        measured[names[0]].append(known)
        measured[names[1]].append(result)

    def bridge() -> None:
        measured[names[2]].append(launch(place, "bridge", execute=False).kernel_info_s)

    def host() -> None:
        measured[names[3]].append(launch_host())

    for _ in range(repetitions):
        for one in order.sample((ipykernel, bridge, host), 3):
            one()
    return measured


def summary(measured: Mapping[str, Sequence[Sequence[int]]]) -> list[dict[str, Any]]:
    """Per peer: microseconds, and ratios to raw, the better one being the median of the rounds' own."""
    p50 = {name: statistics.median(ns for turn in turns for ns in turn) for name, turns in measured.items()}
    by_round = {name: [statistics.median(turn) for turn in turns] for name, turns in measured.items()}
    rows = []
    for name, turns in measured.items():
        pooled = sorted(ns for turn in turns for ns in turn)
        ratios = [own / raw for own, raw in zip(by_round[name], by_round[RAW], strict=True)]
        rows.append(
            {
                "peer": name,
                "calls": len(pooled),
                "p50_us": p50[name] / 1e3,
                "p99_us": pooled[min(len(pooled) - 1, int(len(pooled) * 0.99))] / 1e3,
                "ratio": p50[name] / p50[RAW],
                "ratio_median_of_rounds": statistics.median(ratios),
                "best_round_us": min(by_round[name]) / 1e3,
            }
        )
    return rows


def _start_rows(measured: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    return [
        {"what": name, "median_s": statistics.median(times), "best_s": min(times), "repetitions": len(times)}
        for name, times in measured.items()
    ]


def _show(report: Mapping[str, Any], console: Console) -> None:
    rounds, transport = report["rounds"], report["transport"]
    table = Table(title=f"Round trips over {transport}, {rounds} interleaved rounds, payload {json.dumps(PAYLOAD)}")
    table.add_column("peer")
    for column in ("p50 µs", "p99 µs", "× raw", "× raw, by round", "best round µs", "calls"):
        table.add_column(column, justify="right")
    for row in report["latency"]:
        table.add_row(
            row["peer"],
            f"{row['p50_us']:,.0f}",
            f"{row['p99_us']:,.0f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_median_of_rounds']:.2f}",
            f"{row['best_round_us']:,.0f}",
            f"{row['calls']:,}",
            end_section=row["peer"] == RAW,
        )
    console.print(table)
    starts = Table(title="Start-up")
    starts.add_column("what")
    for column in ("median s", "best s", "n"):
        starts.add_column(column, justify="right")
    for row in report["start"]:
        starts.add_row(row["what"], f"{row['median_s']:.2f}", f"{row['best_s']:.2f}", str(row["repetitions"]))
    console.print(starts)
    console.print(", ".join(f"{name} {value}" for name, value in report["machine"].items()), highlight=False)


def _run(transport: Transport, rounds: int, calls: int, starts: int) -> dict[str, Any]:
    about = machine()
    with Place(transport) as place:
        # First, while this process is still small: gRPC has threads of its own.
        start = measure_starts(place, starts)
        latency = asyncio.run(measure(place, rounds, calls))
    return {
        "machine": about,
        "transport": transport,
        "rounds": rounds,
        "payload": PAYLOAD,
        "latency": summary(latency),
        "start": _start_rows(start),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__)
    parser.add_argument("--transport", choices=("ipc", "tcp"), default="ipc", help="the same for all (default: ipc)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=200, help="a round and peer; slow peers make fewer")
    parser.add_argument("--starts", type=int, default=7, help="how often each kernel is started")
    parser.add_argument("--quick", action="store_true", help="a few seconds: does it run, not how fast it is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.calls, options.starts = 2, 10, 1
    return measured(lambda: _run(options.transport, options.rounds, options.calls, options.starts), _show, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
