"""The Elixir host beside the Python host, and beside an Erlang port to a Python that only echoes: `python -m bench.elixir`.

Peers take turns, as in `bench.latency`: ratios are to the raw pyzmq echo of the same round. Needs Elixir.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

from bench.latency import summary
from bench.peers import PAYLOAD, RAW, TIMED, Peer, Place, machine, open_peers
from bench.report import measured
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from rich.console import Console

__all__ = ("main", "measure")

PROJECT: Final = Path(__file__).parent.parent / "host" / "elixir"
SEED: Final = 20240229
TURN_S: Final = 120.0
WARM_UP: Final = 5
READERS: Final = (1, 8)
IN_FLIGHT: Final = (1, 16, 64)
ROUND_TRIPS: Final = {
    "Elixir command operator.index(1)": "command-index",
    "Elixir command echo": "command-echo",
    "Elixir callback get_variable": "callback-get",
    "Elixir callback await get_variable": "callback-get_async",
    "Elixir callback call_tool": "callback-call_tool",
    "Erlang port, Python echoes a line of JSON": "port-echo",
}
CALLBACKS: Final = {
    "get": TIMED.format("", "get", 'ctx.get_variable("x")'),
    "get_async": TIMED.format("async ", "get_async", 'await ctx.get_variable("x")'),
    "call_tool": TIMED.format("", "call_tool", 'ctx.call_tool("tool", value=payload)'),
}
BESIDE: Final = (
    RAW,
    "Bridge command operator.index(1)",
    "Bridge command echo",
    "Bridge callback get_variable",
    "Bridge callback await get_variable",
    "Bridge callback call_tool, sync tool",
)


class Elixir(NamedTuple):
    """An Elixir host in a process of its own, which does what it is told, a line at a time."""

    pid: int
    asked: IO[str]
    answers: IO[str]

    def ask(self, line: str) -> list[int]:
        print(line, file=self.asked, flush=True)
        if not (answer := self.answers.readline()):
            raise RuntimeError(f"the Elixir host has ended, asked for {line}")
        durations: list[int] = json.loads(answer)
        return durations

    def peers(self) -> list[Peer]:
        return [Peer(name, self.pid, self._run(line)) for name, line in ROUND_TRIPS.items()]

    def _run(self, line: str) -> Callable[[int], Awaitable[list[int]]]:
        async def run(n: int) -> list[int]:
            return self.ask(f"{line} {n}")

        return run


@contextlib.contextmanager
def open_elixir(place: Place) -> Iterator[Elixir]:
    if (elixir := shutil.which("elixir")) is None:
        raise RuntimeError("elixir is not installed")
    build = place.path / "build"
    env = {**place.env, "MIX_ENV": "prod", "MIX_BUILD_PATH": str(build)}
    subprocess.run(["mix", "compile"], cwd=PROJECT, env=env, check=True, stdout=subprocess.DEVNULL)
    ebin = build / "lib" / "bridge_host" / "ebin"
    command = [elixir, "-pa", str(ebin), str(PROJECT / "bench" / "round_trips.exs")]
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            setting = {"python": sys.executable, "payload": PAYLOAD, "functions": CALLBACKS}
            print(json.dumps(setting), file=process.stdin, flush=True)
            up, _, pid = process.stdout.readline().partition(" ")
            if up != "up":
                raise RuntimeError("host/elixir/bench/round_trips.exs did not start")
            yield Elixir(int(pid), process.stdin, process.stdout)
        finally:
            process.kill()


async def measure(place: Place, elixir: Elixir, rounds: int, calls: int) -> dict[str, list[list[int]]]:
    """Durations in ns, by peer and round."""
    order = random.Random(SEED)
    async with open_peers(place) as all_peers:
        peers = [peer for peer in all_peers if peer.name in BESIDE] + elixir.peers()
        durations: dict[str, list[list[int]]] = {peer.name: [] for peer in peers}
        for peer in peers:
            async with asyncio.timeout(TURN_S):
                await peer.run(calls)
        for _ in range(rounds):
            for peer in order.sample(peers, len(peers)):
                async with asyncio.timeout(TURN_S):
                    await peer.run(WARM_UP)
                    durations[peer.name].append(await peer.run(calls))
    return durations


def measure_rates(elixir: Elixir, rounds: int, reads: int, commands: int) -> dict[str, list[float]]:
    """How many a second, by what, a round each."""
    order = random.Random(SEED)
    turns: dict[str, tuple[str, int]] = {}
    for readers in READERS:
        turns[f"get_variable, {readers} processes"] = (f"read {readers} {reads}", readers * reads)
        turns[f":ets.lookup, {readers} processes"] = (f"ets {readers} {reads}", readers * reads)
    for at_once in IN_FLIGHT:
        commands = max(commands, at_once)
        turns[f"command echo, {at_once} in flight"] = (
            f"throughput {at_once} {commands}",
            commands // at_once * at_once,
        )
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name in order.sample(list(turns), len(turns)):
            line, count = turns[name]
            rates[name].append(count / (elixir.ask(line)[0] / 1e9))
    return rates


def _show(report: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"Round trips over IPC, {report['rounds']} interleaved rounds, payload {json.dumps(PAYLOAD)}")
    table.add_column("peer")
    for column in ("p50 µs", "p99 µs", "× raw, by round", "best round µs", "calls"):
        table.add_column(column, justify="right")
    for row in report["latency"]:
        table.add_row(
            row["peer"],
            f"{row['p50_us']:,.0f}",
            f"{row['p99_us']:,.0f}",
            f"{row['ratio_median_of_rounds']:.2f}",
            f"{row['best_round_us']:,.0f}",
            f"{row['calls']:,}",
        )
    console.print(table)
    rates = Table(title="A second")
    rates.add_column("what")
    for column in ("median", "best"):
        rates.add_column(column, justify="right")
    for row in report["rates"]:
        rates.add_row(row["what"], f"{row['median']:,.0f}", f"{row['best']:,.0f}")
    console.print(rates)
    console.print(", ".join(f"{name} {value}" for name, value in report["machine"].items()), highlight=False)


def _run(rounds: int, calls: int, reads: int) -> dict[str, Any]:
    about = machine()
    with Place("ipc") as place, open_elixir(place) as elixir:
        latency = asyncio.run(measure(place, elixir, rounds, calls))
        rates = measure_rates(elixir, max(2, rounds // 2), reads, calls * 5)
    return {
        "machine": about,
        "rounds": rounds,
        "payload": PAYLOAD,
        "latency": summary(latency),
        "rates": [
            {"what": what, "median": statistics.median(found), "best": max(found)} for what, found in rates.items()
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.elixir", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=200, help="a round and peer")
    parser.add_argument("--reads", type=int, default=20_000, help="of a variable, a round and process")
    parser.add_argument("--quick", action="store_true", help="a few seconds: does it run, not how fast it is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.calls, options.reads = 2, 10, 1_000
    return measured(lambda: _run(options.rounds, options.calls, options.reads), _show, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
