"""What it costs to keep a variable, a session, a command: `python -m bench.store`.

Readers and writers take turns, in another order each round. What a store takes in memory is told of processes that
do nothing else (`bench.store_scale`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.peers import PAYLOAD, machine
from bench.report import measured
from bench.store_peers import VALUES, open_async_writer, open_readers, open_writers
from bench.store_scale import TASKS, VARIABLES
from rich.markup import escape
from rich.table import Table

from bridge_host import AsyncHost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.store_peers import Writer
    from rich.console import Console

    from bridge_host import AsyncSession

__all__ = ("main", "measure_commands", "measure_reads", "measure_scale", "measure_writes")

ROOT: Final = Path(__file__).parent.parent
SEED: Final = 20240229
TARGET_US: Final = 2.0  # a read of a variable
TURN_S: Final = 600.0
WRITERS: Final = (1, 8, 64)
IN_FLIGHT: Final = 64  # commands, where many run at once

now = time.perf_counter


def measure_reads(directory: Path, rounds: int, reads: int) -> tuple[dict[tuple[str, str], list[float]], list[str]]:
    """ns a read, a round each, by peer and value; and what was left out."""
    order = random.Random(SEED)
    with open_readers(directory) as (readers, left_out):
        measured: dict[tuple[str, str], list[float]] = {(r.name, value): [] for r in readers for value in VALUES}
        for _ in range(rounds):
            for reader in order.sample(readers, len(readers)):
                n = max(1, int(reads * reader.share))
                for value in VALUES:
                    reader.run(value, max(1, n // 10))
                    measured[reader.name, value].append(reader.run(value, n) / n)
    return measured, left_out


def measure_writes(directory: Path, rounds: int, seconds: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Writes a second by peer and number of writers, and how many went with one sync."""
    order = random.Random(SEED)
    measured: dict[tuple[str, int], list[tuple[float, float | None]]] = {}
    with open_writers(directory, max(WRITERS)) as (writers, left_out):
        turns: list[Callable[[], None]] = []

        def turn(writer: Writer, threads: int) -> None:
            measured.setdefault((writer.name, threads), []).append(_writes(writer, threads, seconds))

        def turn_async(tasks: int) -> None:
            name = "Bridge await session.set(name, value)"
            measured.setdefault((name, tasks), []).append(asyncio.run(_writes_async(directory, tasks, seconds)))

        for writer in writers:
            turns += [lambda w=writer, n=n: turn(w, n) for n in (WRITERS[:1] if writer.alone else WRITERS)]  # type: ignore[misc]
        turns += [lambda n=n: turn_async(n) for n in WRITERS]  # type: ignore[misc]
        for _ in range(rounds):
            for one in order.sample(turns, len(turns)):
                one()
    rows = [
        {
            "peer": name,
            "writers": writers,
            "per_s": statistics.median(rate for rate, _ in rates),
            "writes_a_sync": statistics.median(shared) if (shared := [s for _, s in rates if s is not None]) else None,
        }
        for (name, writers), rates in measured.items()
    ]
    return sorted(rows, key=lambda row: (row["peer"], row["writers"])), left_out


def _writes(writer: Writer, threads: int, seconds: float) -> tuple[float, float | None]:
    """Writes a second, and writes a sync, of so many threads that each write as fast as they can."""

    def write(thread: int) -> int:
        i = 0
        while now() < until:
            writer.write(thread, i)
            i += 1
        return i

    writer.write(0, 0)
    before, began = writer.syncs(), now()
    until = began + seconds
    with ThreadPoolExecutor(threads) as pool:
        count = sum(pool.map(write, range(threads)))
    took, after = now() - began, writer.syncs()
    return count / took, None if after is None or before is None else count / max(1, after - before)


async def _writes_async(directory: Path, tasks: int, seconds: float) -> tuple[float, float]:
    async with open_async_writer(directory, tasks) as (write, commits):

        async def one(task: int) -> int:
            i = 0
            while now() < until:
                await write(task, i)
                i += 1
            return i

        before, began = commits(), now()
        until = began + seconds
        count = sum(await asyncio.gather(*(one(task) for task in range(tasks))))
        return count / (now() - began), count / max(1, commits() - before)


def measure_scale(directory: Path, sessions: int, commands: int, *, fresh: bool = True) -> dict[str, Any]:
    """Many sessions, and a long journal, each in a fresh process; else only the first, and memory tells nothing."""

    def task(name: str, path: str, count: int) -> dict[str, Any]:
        if not fresh and name != "fill":
            return TASKS[name](str(directory / path), str(count))
        run = subprocess.run(
            [sys.executable, "-m", "bench.store_scale", name, str(directory / path), str(count)],
            cwd=ROOT,
            check=True,
            stdout=subprocess.PIPE,
            timeout=TURN_S,
        )
        found: dict[str, Any] = json.loads(run.stdout)
        return found

    return {
        "fill": task("fill", "many.db", sessions),
        "open_filled": task("open_filled", "many.db", sessions),
        "open_plain": task("open_plain", "many.db", sessions),
        "fill_memory": task("fill_memory", "none", sessions),
        "journal": task("journal", "journal.db", commands),
        "journal_plain": task("journal_plain", "journal-plain.db", commands),
    }


# -- commands, end to end ------------------------------------------------------------

_FUNCTIONS: Final = {
    "echo": "def echo(value):\n    return value\n",
    "writes": "def writes(ctx, value):\n    ctx.set_variable('x', value)\n",
    "calls": "def calls(ctx, value):\n    return ctx.call_tool('tool', value=value)\n",
}
_WORDS: Final = {"echo": "echo", "writes": "writes a variable", "calls": "calls a tool once"}


async def measure_commands(directory: Path, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Commands a second on one kernel, with a store and without, one at a time and many at once."""
    order = random.Random(SEED)
    measured: dict[tuple[str, int, str], list[float]] = {}
    async with AsyncHost() as memory, AsyncHost(store=directory / "commands.db") as durable:
        sessions = {"memory": _furnished(memory), "store": _furnished(durable)}
        turns = [(name, width, kind) for name in _FUNCTIONS for width in (1, IN_FLIGHT) for kind in sessions]
        for _ in range(rounds):
            for name, width, kind in order.sample(turns, len(turns)):
                async with asyncio.timeout(TURN_S):
                    rate = await _commands(sessions[kind], name, width, seconds)
                measured.setdefault((name, width, kind), []).append(rate)
    return [
        {
            "command": _WORDS[name],
            "in_flight": width,
            "memory_per_s": statistics.median(measured[name, width, "memory"]),
            "store_per_s": statistics.median(measured[name, width, "store"]),
            "ratio": statistics.median(
                s / m for s, m in zip(measured[name, width, "store"], measured[name, width, "memory"], strict=True)
            ),
        }
        for name in _FUNCTIONS
        for width in (1, IN_FLIGHT)
    ]


def _furnished(host: AsyncHost) -> list[AsyncSession]:
    """A session for each command in flight: in one, they would change the same variable."""
    sessions = [host.session() for _ in range(IN_FLIGHT)]

    async def tool(value: dict[str, Any]) -> dict[str, Any]:
        return value

    for session in sessions:
        session.tool(tool)
        for name, source in _FUNCTIONS.items():
            session.function(name, source)
    return sessions


async def _commands(sessions: Sequence[AsyncSession], name: str, width: int, seconds: float) -> float:
    async def one(session: AsyncSession) -> int:
        count = 0
        while now() < until:
            await session.call(name, PAYLOAD)
            count += 1
        return count

    await asyncio.gather(*(session.call(name, PAYLOAD) for session in sessions[:width]))
    began = now()
    until = began + seconds
    count = sum(await asyncio.gather(*(one(session) for session in sessions[:width])))
    return count / (now() - began)


# -- the report ----------------------------------------------------------------------


def _read_rows(measured: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for name, _ in measured)
    return [
        {
            "peer": name,
            **{f"{value}_us": statistics.median(measured[name, value]) / 1e3 for value in VALUES},
            **{f"{value}_best_us": min(measured[name, value]) / 1e3 for value in VALUES},
        }
        for name in names
    ]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _show(report: dict[str, Any], console: Console) -> None:
    table = _table("A read of a variable", "peer", "float µs", "best µs", "dict µs", "best µs", "dicts a second")
    for row in report["reads"]:
        figures = [f"{row[key]:.2f}" for key in ("float_us", "float_best_us", "dict_us", "dict_best_us")]
        table.add_row(escape(row["peer"]), *figures, f"{1e6 / row['dict_us']:,.0f}")
    console.print(table)
    table = _table("Writes a second, each on disk before it is acknowledged", "peer", *map(str, WRITERS), "a sync")
    for name in dict.fromkeys(row["peer"] for row in report["writes"]):
        rows = {row["writers"]: row for row in report["writes"] if row["peer"] == name}
        rates = [f"{rows[n]['per_s']:,.0f}" if n in rows else "" for n in WRITERS]
        shared = [f"{row['writes_a_sync']:.0f}" for row in rows.values() if row["writes_a_sync"] is not None]
        table.add_row(escape(name), *rates, ", ".join(shared))
    console.print(table)
    _show_scale(report["scale"], report["sessions"], console)
    table = _table("Commands a second, one kernel", "command", "in flight", "in memory", "store", "store / memory")
    for row in report["commands"]:
        rates = [f"{row['memory_per_s']:,.0f}", f"{row['store_per_s']:,.0f}", f"{row['ratio']:.2f}"]
        table.add_row(row["command"], str(row["in_flight"]), *rates)
    console.print(table)
    if report["left_out"]:
        console.print("left out: " + "; ".join(report["left_out"]), highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in report["machine"].items()), highlight=False)


def _show_scale(scale: dict[str, Any], sessions: int, console: Console) -> None:
    table = _table(f"{sessions:,} sessions of {VARIABLES} variables", "what", "seconds", "KiB a session")
    for name, what in (
        ("fill", "written to a new store, the file"),
        ("open_filled", "opened, the memory"),
        ("open_plain", "the same rows by sqlite3 into dicts of bytes"),
        ("fill_memory", "written to a store in memory, with its history"),
    ):
        size = scale[name].get("rss", scale[name].get("file_bytes"))
        table.add_row(what, f"{scale[name]['seconds']:.2f}", f"{size / 1024 / sessions:.1f}")
    console.print(table)
    ours, plain = scale["journal"], scale["journal_plain"]
    table = _table(f"{ours['commands']:,} commands journaled, four batches each", "what", "a second", "MiB at the end")
    for name, row in (("Bridge", ours), ("sqlite3, 100 commands a transaction, all kept", plain)):
        rate, size = row["commands"] / row["seconds"], row["bytes_closed"]
        table.add_row(name, f"{rate:,.0f}", f"{size / 2**20:.1f}")
    console.print(table)
    growth = ", ".join(f"{size / 2**20:.1f}" for size in ours["bytes_by_fifth"])
    console.print(f"MiB after each fifth of them: {growth}; opened again in {ours['reopen_s']:.2f} s", highlight=False)


def _run(directory: Path, *, quick: bool) -> dict[str, Any]:
    about = {**machine(), "sqlite": sqlite3.sqlite_version}
    rounds, seconds = (1, 0.05) if quick else (5, 0.5)
    sessions, commands = (100, 500) if quick else (10_000, 100_000)
    scale = measure_scale(directory, sessions, commands, fresh=not quick)
    reads, reads_left_out = measure_reads(directory, 2 if quick else 10, 500 if quick else 20_000)
    writes, writes_left_out = measure_writes(directory, rounds, seconds)
    return {
        "machine": about,
        "target_us": TARGET_US,
        "sessions": sessions,
        "reads": _read_rows(reads),
        "writes": writes,
        "scale": scale,
        "commands": asyncio.run(measure_commands(directory, rounds, seconds)),
        "left_out": sorted({*reads_left_out, *writes_left_out}),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.store", description=__doc__)
    parser.add_argument("--directory", type=Path, help="on the disk that is to be measured (default: the system's own)")
    parser.add_argument("--quick", action="store_true", help="a few seconds: does it run, not how fast it is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    options = parser.parse_args(arguments)

    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=options.directory) as directory:
            return _run(Path(directory), quick=options.quick)

    return measured(measure, _show, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
