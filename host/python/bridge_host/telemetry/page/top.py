"""`jupyter bridge top`: the live page of a host that runs in another process, in a terminal."""

from __future__ import annotations

import contextlib
import datetime
import os
import select
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Final

import msgspec
from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bridge_kernel.contract.line import duration

from ...display import one_line, table
from .broadcast import Ended, FoundHost, Watching, find_hosts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from .snapshot import Snapshot

__all__ = ("page", "run")

BARS: Final = "▁▂▃▄▅▆▇█"
GAP: Final = 2
NARROW: Final = 76  # columns: below this the tables show less
ENDS: Final = {
    "closed": "The host was closed.",
    "gone": "The host's process has ended.",
    "full": "Eight others look at this host already: close one of them.",
}
SILENT: Final = "its process is stopped, or its event loop is blocked."
SILENT_S: Final = 3.0
LOOK_S: Final = 1.0
_HEALTH: Final = {
    "ok": ("✓ All well", "bold green"),
    "busy": ("◔ Busy", "bold yellow"),
    "degraded": ("▲ Degraded", "bold yellow"),
    "down": ("✗ Down", "bold red"),
    "closed": ("■ Closed", "bold"),
}
_STATES: Final = {
    "ready": ("●", "green"),
    "starting": ("◌", "dim"),
    "spare": ("○", "dim"),
    "draining": ("◐", "yellow"),
    "unresponsive": ("▲", "yellow"),
    "dead": ("✗", "red"),
}


def run(pid: int | None, *, once: bool, as_json: bool, only_list: bool) -> int:
    """Show the host of process `pid`, or the only one there is; the exit code."""
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False, soft_wrap=True)
    if not hasattr(socket, "AF_UNIX"):
        errors.print("`jupyter bridge top` needs Unix sockets, which Python does not have on this system: look at the")
        errors.print("host from where it runs, with host.telemetry.dashboard() or host.pool.status().")
        return 1
    hosts = find_hosts()
    if only_list and hosts:
        console.print(_listed(hosts), markup=False, soft_wrap=True)
        return 0
    found = [host for host in hosts if pid is None or host.pid == pid]
    if not found:
        errors.print(_nothing(pid, hosts), markup=False)
        return 1
    if len({host.pid for host in found}) > 1:
        errors.print(f"There are several hosts. Choose one with --pid:\n\n{_listed(found)}", markup=False)
        return 1
    with Watching(found[0].path) as watching:  # of several in one process the newest
        if (ended := watching.connect()) is not None:
            errors.print(ENDS[ended.reason])
            return 1
        try:
            if as_json or once or not console.is_terminal:
                return _once(watching, console, errors, as_json=as_json)
            return _live(watching, console)
        except TimeoutError:
            errors.print(f"The host does not answer: {SILENT}")
            return 1


def _nothing(pid: int | None, hosts: list[FoundHost]) -> str:
    if hosts:
        return f"Process {pid} has no open host of yours. These are open:\n\n{_listed(hosts)}"
    return (
        "No host of yours is open on this machine. Open one, in a notebook or a script:\n\n"
        "    from bridge_host import Host\n    host = Host(kernels=2)\n\n"
        "It is looked for in $TMPDIR, else in /tmp: a host that was started with another TMPDIR is not seen."
    )


def _listed(hosts: list[FoundHost]) -> str:
    now = time.time()
    rows = [[str(host.pid), _age(now - host.opened), str(host.kernels), host.command] for host in hosts]
    return table(["pid", "open for", "kernels", "command"], rows)


def _once(watching: Watching, console: Console, errors: Console, *, as_json: bool) -> int:
    heard: list[Snapshot | Ended] = []
    while not heard:  # a long line comes in pieces
        heard = watching.read()
    said = heard[0]
    if isinstance(said, Ended):
        errors.print(ENDS[said.reason])
        return 1
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(said), indent=2).decode() + "\n")
    else:
        console.print(page(said, console.width))
    return 0


def _live(watching: Watching, console: Console) -> int:
    """Draw the page anew with each snapshot, and when the window changes, until `q`, Ctrl-C or the host's end."""
    keys = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
    last: Snapshot | None = None
    heard = time.monotonic()
    ended = ""
    screen = Live(Text("Waiting for the host …"), console=console, screen=True, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), _ending_in_order(), _keys_at_once(keys), screen as live:
        while not ended:
            if last is not None:
                width, height = console.size
                live.update(page(last, width, height - 1, footer=_footer(heard)), refresh=True)
            ready, _, _ = select.select([watching] if keys is None else [watching, keys], [], [], LOOK_S)
            if keys in ready and b"q" in os.read(keys, 64).lower():
                return 0
            if watching in ready:
                heard = time.monotonic()
                for said in watching.read():
                    if isinstance(said, Ended):
                        ended = ENDS[said.reason]
                    else:
                        last = said
    if ended:
        if last is not None:
            console.print(page(last, console.width))  # as it last was, to be read in peace
        console.print(ended, style="bold")
    return 0


def _footer(heard: float) -> str:
    silent = time.monotonic() - heard
    if silent < SILENT_S:
        return "q quits"
    return f"q quits   The host has said nothing for {silent:.0f} s: {SILENT}"


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """Whoever ends the process (`timeout`, `kill`) is to leave a terminal that works."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _keys_at_once(keys: int | None) -> Iterator[None]:
    """Have each key as it is pressed, and none of them shown, until the end."""
    if keys is None:
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(keys)
    tty.setcbreak(keys)
    try:
        yield
    finally:
        termios.tcsetattr(keys, termios.TCSADRAIN, before)


# -- the page ----------------------------------------------------------------------


def page(snapshot: Snapshot, width: int, height: int | None = None, *, footer: str = "") -> RenderableType:
    """The page, `width` columns wide. With a `height` in lines the tables show no more rows than fit in."""
    head = _head(snapshot)
    parts: list[RenderableType] = [head, Text(), _tiles(snapshot, width), Text()]
    kernels, commands, errors, circuits = (
        len(rows) for rows in (snapshot.kernels, snapshot.commands, snapshot.errors, snapshot.circuits)
    )
    if height is not None:
        above = (
            sum(1 + cell_len(line) // width for line in head.plain.splitlines()) + len(_figures(snapshot, width)) + 4
        )
        titled = 2 + bool(errors) + bool(circuits)  # each with its title, its columns' names and a blank line
        free = max(height - above - 3 * titled + 1 - (2 if footer else 0), titled)
        # What is given to none of them goes to the next; the kernels are last, for they are most.
        circuits, free = _share(circuits, free, 4)
        errors, free = _share(errors, free, 3)
        commands, free = _share(commands, free, 2)
        kernels, free = _share(kernels, free, 1)
    parts += [_kernels(snapshot, kernels, width), Text(), _commands(snapshot, commands, width)]
    if snapshot.circuits:
        parts += [Text(), _circuits(snapshot, circuits, width)]
    if snapshot.errors:
        parts += [Text(), _errors(snapshot, errors, width)]
    if footer:
        parts += [Text(), Text(footer, style="dim", no_wrap=True, overflow="ellipsis")]
    return Group(*parts)


def _share(wanted: int, free: int, among: int) -> tuple[int, int]:
    """How many rows a table gets, of those that are free for so many tables; and what is left for the others."""
    given = min(wanted, max(free // among, 1))
    return given, max(free - given, 1)


def _head(s: Snapshot) -> Text:
    words, style = _HEALTH[s.health]
    return Text.assemble(
        ("Bridge host", "bold"),
        f"  process {s.pid}, open for {_age(s.at - s.started)}\n",
        (words, style),
        f"  {one_line(s.summary)}",
    )


def _figures(s: Snapshot, width: int) -> list[list[tuple[str, str, str]]]:
    """Name, figure and note of each, in rows of as many as there is room for."""
    error_style = "red" if s.errors_per_s else ""
    figures = [
        ("Kernels", f"{s.ready} of {max(s.wanted, s.ready)} ready", ""),
        ("Running", f"{s.in_flight:,}", ""),
        ("Waiting", f"{s.waiting:,}" + (f", {s.rejected:,} refused" if s.rejected else ""), ""),
        ("p50", _duration(s.p50), ""),
        ("p95", _duration(s.p95), ""),
        ("p99", _duration(s.p99), ""),
        ("Commands", f"{s.commands_per_s:,.1f} /s", ""),
        ("Errors", f"{s.errors_per_s:,.1f} /s", error_style),
    ]
    if s.tokens:
        figures.append(("Tokens", f"{s.tokens:,}" + (f", ${s.cost:,.4f}" if s.cost else ""), ""))
    if s.cache_hits:
        figures.append(("From the cache", f"{s.cache_hits:,}", ""))
    each = max(1, min(width // 24, 6))
    return [figures[at : at + each] for at in range(0, len(figures), each)]


def _tiles(s: Snapshot, width: int) -> RenderableType:
    rows = _figures(s, width)
    grid = Table.grid(padding=(0, 3, 0, 0))
    for row in rows:
        grid.add_row(
            *(Text.assemble((f"{name} ", "dim"), (figure, f"bold {style}".strip())) for name, figure, style in row)
        )
    columns = max(10, min(60, width - 28))
    lines = Table.grid(padding=(0, 2, 0, 0))
    for name, series, style in (("commands", s.command_series, "cyan"), ("errors", s.error_series, "red")):
        most = max(series[-columns:], default=0)
        lines.add_row(
            Text(name, style="dim"),
            Text(_sparkline(series, columns), style=style),
            Text(f"{most:,} /s at most" if most else "none", style="dim", no_wrap=True),
        )
    return Group(grid, lines)


def _sparkline(series: tuple[int, ...], columns: int) -> str:
    """The last seconds, one column each; a second in which nothing happened is a blank."""
    last = series[-columns:]
    most = max(last, default=0)
    return "".join(" " if not value else BARS[min(value * len(BARS) // (most + 1), 7)] for value in last)


def _kernels(s: Snapshot, most: int, width: int) -> RenderableType:
    narrow = width < NARROW
    columns = ["kernel", "state", "running", "done", "failed"] + ([] if narrow else ["memory", "age", "process"])
    rows = []
    for kernel in s.kernels[:most]:
        symbol, style = _STATES.get(kernel.state, ("?", ""))
        row = [
            Text(one_line(kernel.id) or "-"),
            Text(f"{symbol} {one_line(kernel.state)}", style=style),
            Text(f"{kernel.in_flight:,}"),
            Text(f"{kernel.completed:,}"),
            Text(_percent(kernel.error_rate), style="red" if kernel.error_rate else ""),
        ]
        if not narrow:
            memory = f"{kernel.rss / 2**20:,.0f} MiB" if kernel.rss else "-"
            row += [Text(memory), Text(_age(s.at - kernel.born)), Text(str(kernel.pid or "-"))]
        rows.append(row)
    drawn = _table(columns, rows, width, names=("kernel", "state"), numbers=columns[2:])
    return _titled("Kernels", drawn, s.kernels_in_all, "none")


def _commands(s: Snapshot, most: int, width: int) -> RenderableType:
    columns = ["command", "calls", "errors", "p50", "p95"] + ([] if width < NARROW else ["p99"])
    rows = []
    for command in s.commands[:most]:
        times = [command.p50, command.p95, command.p99][: len(columns) - 3]
        rows.append(
            [
                Text(one_line(command.subject)),
                Text(f"{command.count:,}"),
                Text(f"{command.errors:,}", style="red" if command.errors else ""),
                *(Text(_duration(each)) for each in times),
            ]
        )
    drawn = _table(columns, rows, width, names=("command",), numbers=columns[1:])
    return _titled("Most called commands", drawn, len(s.commands), "none has ended yet")


def _errors(s: Snapshot, most: int, width: int) -> RenderableType:
    rows = [
        [Text(_clock(error.at)), Text(one_line(error.subject)), Text(one_line(error.type), style="red")]
        for error in s.errors[:most]
    ]
    drawn = _table(["time", "command", "error"], rows, width, names=("command", "error"), numbers=[])
    return _titled("Last errors", drawn, len(s.errors), "none")


def _circuits(s: Snapshot, most: int, width: int) -> RenderableType:
    rows = [
        [
            Text(one_line(circuit.subject)),
            Text(one_line(circuit.kernel) or "all"),
            Text(f"{circuit.failures:,}"),
            Text(_clock(circuit.until)),
        ]
        for circuit in s.circuits[:most]
    ]
    columns = ["command", "kernel", "failures", "until"]
    drawn = _table(columns, rows, width, names=("command", "kernel"), numbers=["failures"])
    return _titled("Held back", drawn, len(s.circuits), "none")


def _table(
    columns: list[str], rows: list[list[Text]], width: int, *, names: tuple[str, ...], numbers: list[str]
) -> Table:
    """Columns of `names`, which may be long, give way where there is little room; the others keep their width."""
    # By hand: rich would take from every column its part, and cut numbers and times.
    widths = {name: max([cell_len(name), *(row[index].cell_len for row in rows)]) for index, name in enumerate(columns)}
    free = width - GAP * (len(columns) - 1) - sum(size for name, size in widths.items() if name not in names)
    for left, name in zip(range(len(names), 0, -1), sorted(names, key=widths.__getitem__), strict=True):
        widths[name] = max(min(widths[name], free // left), 1)
        free -= widths[name]
    drawn = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="")
    for name in columns:
        drawn.add_column(
            Text(name, style="dim"),
            justify="right" if name in numbers else "left",
            no_wrap=True,
            overflow="ellipsis",
            width=widths[name],
        )
    for row in rows:
        drawn.add_row(*row)
    return drawn


def _titled(title: str, drawn: Table, there_are: int, nothing: str) -> RenderableType:
    if not there_are:
        return Text.assemble((title, "bold"), f"  {nothing}")
    more = there_are - drawn.row_count
    return Group(Text.assemble((title, "bold"), (f"  {more:,} more" if more > 0 else "", "dim")), drawn)


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{share:.1%}" if 0 < share < 0.1 else f"{share:.0%}"


def _clock(at: float) -> str:
    return datetime.datetime.fromtimestamp(at).strftime("%H:%M:%S")


def _duration(ns: int | None) -> str:
    return "-" if ns is None else duration(ns)


def _age(seconds: float) -> str:
    for most, per, unit in ((120, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < most:
            return f"{max(seconds, 0) / per:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"
