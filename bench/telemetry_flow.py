"""What telemetry costs the host: events a second from a kernel's bytes to figures, and memory: `python -m bench.telemetry_flow`.

A kernel's own recorder makes the displays: of a command with two callbacks and a call of a model eight events, in one
display. They take the host's whole way: `Intake.take_display`, decoded, remembered, counted. Making them is not timed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
from bench.peers import machine
from bench.report import measured
from rich.table import Table

from bridge_host import Telemetry
from bridge_kernel.contract.telemetry import Trace
from bridge_kernel.telemetry import Recorder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from bridge_kernel.contract.telemetry import Scalar

__all__ = ("main", "measure")

EVENTS: Final = 8  # of one command
COMMANDS: Final = 1000  # made at a time, then timed
SUBJECTS: Final = 50
MARKS: Final = (100_000, 500_000, 1_000_000)


def _display(number: int) -> bytes:
    """What a kernel shows of one command, from its start to its end."""
    told: list[bytes] = []
    trace = Trace.child_of(None)
    metadata: dict[str, Scalar] = {
        "command": "instance.call",
        "subject": f"function_{number % SUBJECTS}",
        "session": f"session-{number % 20}",
        "kernel": f"{number % 4:032x}",
        "attempt": 1,
        "trace_id": trace.trace_id,
        "span_id": trace.span_id,
        "parent_span_id": trace.parent_span_id,
    }
    recorder = Recorder(
        number,
        str(metadata["subject"]),
        metadata,
        trace,
        lambda _, content: told.append(content),
        f"bridge-flow-{number}",
    )
    recorder.start({})
    for about in ("documents", "search"):
        with recorder.span(("bridge", "callback"), {"method": "session.get", "about": about}):
            recorder.callbacks += 1
    call = recorder.span(("bridge", "dspy", "lm"), {"model": "openai/gpt-4.1"})
    call.start()
    call.end(measurements={"input_tokens": 400, "output_tokens": 60, "tokens": 460, "cost": 0.001})
    recorder.stop(error=None, queue=20_000, bytes_in=900, bytes_out=700, where="", captured={})
    recorder.publish()
    (content,) = told
    return content


def measure(events: int) -> dict[str, Any]:
    """So many events through one telemetry: how long the way took, in rounds, and what it held on the way."""
    telemetry = Telemetry()
    intake = telemetry.intake
    process = psutil.Process()
    marks = [mark for mark in MARKS if mark <= events] or [events]
    memory: list[dict[str, int]] = []
    rounds: list[float] = []
    before = process.memory_info().rss
    number = 0
    while number * EVENTS < events:
        displays = [_display(one) for one in range(number, number + COMMANDS)]
        number += COMMANDS
        began = time.perf_counter_ns()
        for display in displays:
            intake.take_display(display)
        intake.read()
        rounds.append((time.perf_counter_ns() - began) / (COMMANDS * EVENTS))
        while len(memory) < len(marks) and number * EVENTS >= marks[len(memory)]:
            gc.collect()
            memory.append({"events": number * EVENTS, "rss": process.memory_info().rss})
    (row,) = telemetry.models()
    if row.calls != number:
        raise RuntimeError(f"{row.calls} calls of a model were counted, not {number}")
    ns = statistics.median(rounds)
    return {
        "events": number * EVENTS,
        "us_per_event": ns / 1e3,
        "best_round_us_per_event": min(rounds) / 1e3,
        "events_per_s": 1e9 / ns,
        "bytes_per_display": len(_display(0)),
        "rss_before": before,
        "memory": memory,
    }


def _show(report: Mapping[str, Any], console: Console) -> None:
    flow = report["flow"]
    table = Table(title=f"Telemetry through the host: {flow['events']:,} events, {EVENTS} a display")
    for column in ("events a second", "µs an event", "best round µs", "bytes a display"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{flow['events_per_s']:,.0f}",
        f"{flow['us_per_event']:.2f}",
        f"{flow['best_round_us_per_event']:.2f}",
        f"{flow['bytes_per_display']:,}",
    )
    console.print(table)
    memory = Table(title="Memory of the process")
    for column in ("events", "resident MB"):
        memory.add_column(column, justify="right")
    memory.add_row("0", f"{flow['rss_before'] / 1e6:.1f}")
    for mark in flow["memory"]:
        memory.add_row(f"{mark['events']:,}", f"{mark['rss'] / 1e6:.1f}")
    console.print(memory)
    console.print(", ".join(f"{name} {value}" for name, value in report["machine"].items()), highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.telemetry_flow", description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="a second: does it run, not how fast it is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    options = parser.parse_args(arguments)
    events = 20_000 if options.quick else options.events
    about = machine()
    return measured(lambda: {"machine": about, "flow": measure(events)}, _show, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
