"""Charts made of characters, for a terminal: bars, ranges on a logarithmic scale, lives over time. Pure."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Final, NamedTuple

from rich.cells import cell_len

from bridge_kernel.contract.line import duration

from ...display import table

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("Lived", "Ranged", "TextPlot", "bars", "clipped", "lives", "ranges")

WIDTH: Final = 44
MAX_ROWS: Final = 30
MAX_LABEL: Final = 40
MAX_SAID: Final = 32  # cells; with more the table would be too wide, and break the bars
_EIGHTHS: Final = "▏▎▍▌▋▊▉█"


class TextPlot:
    """A chart as text; a notebook shows it in letters of one width."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f'<pre style="line-height:1.3;font-family:ui-monospace,monospace">{html.escape(self.text)}</pre>'


class Ranged(NamedTuple):
    """A row of `ranges`; durations in ns."""

    label: str
    low: int
    p50: int
    p95: int
    p99: int
    high: int
    said: str


class Lived(NamedTuple):
    """A row of `lives`; times in ns."""

    label: str
    began: int
    ended: int
    end: str
    """The character that says how it ended."""
    said: str


def clipped(text: str, most: int = MAX_LABEL) -> str:
    """A name that fits into so many cells of a terminal: of a longer one the beginning and the end, for both tell it apart from others."""
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[:1000])
    if cell_len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{_beginning(text, head)}…{_beginning(text[::-1], most - 1 - head)[::-1]}"


def _beginning(text: str, cells: int) -> str:
    for at, char in enumerate(text):
        cells -= cell_len(char)
        if cells < 0:
            return text[:at]
    return text


def bars(title: str, rows: Sequence[tuple[str, float, str]], nothing: str) -> TextPlot:
    """A bar for each label and value, with what is said of it."""
    if not rows:
        return TextPlot(f"{title}: {nothing}")
    most = max((value for _, value, _ in rows), default=0) or 1
    drawn = [[clipped(label), _bar(value / most), said] for label, value, said in rows[:MAX_ROWS]]
    return TextPlot(_chart(title, "", drawn, len(rows)))


def _bar(share: float) -> str:
    whole, eighths = divmod(round(max(share, 0) * WIDTH * 8), 8)
    return "█" * whole + (_EIGHTHS[eighths - 1] if eighths else "") or ("▏" if share > 0 else "")


def ranges(title: str, rows: Sequence[Ranged], nothing: str) -> TextPlot:
    """A line for each row, on one logarithmic scale: ─ all values, ━ from p50 ● to p95 ◆, ▶ p99."""
    if not rows:
        return TextPlot(f"{title}: {nothing}")
    shown = rows[:MAX_ROWS]
    first = math.log(max(min(row.low for row in shown), 1))
    span = math.log(max(max(row.high for row in shown), 2)) - first or 1.0

    def place(value: int) -> int:
        return min(max(round((math.log(max(value, 1)) - first) / span * (WIDTH - 1)), 0), WIDTH - 1)

    drawn = []
    for row in shown:
        cells = [" "] * WIDTH
        for begin, end, char in ((row.low, row.high, "─"), (row.p50, row.p95, "━")):
            for at in range(place(begin), place(end) + 1):
                cells[at] = char
        for value, char in ((row.p99, "▶"), (row.p95, "◆"), (row.p50, "●")):
            cells[place(value)] = char
        drawn.append([clipped(row.label), "".join(cells), row.said])
    left, right = duration(math.exp(first)), duration(math.exp(first + span))
    axis = f"{left} {'·' * (WIDTH - len(left) - len(right) - 2)} {right}"
    return TextPlot(_chart(f"{title} (log scale; ● p50  ◆ p95  ▶ p99)", axis, drawn, len(rows)))


def lives(title: str, rows: Sequence[Lived], nothing: str) -> TextPlot:
    """A line for each row from its beginning to its end, on one scale of time."""
    if not rows:
        return TextPlot(f"{title}: {nothing}")
    shown = rows[-MAX_ROWS:]
    first = min(row.began for row in shown)
    span = max(max(row.ended for row in shown) - first, 1)
    drawn = []
    for row in shown:
        begin, end = (round((at - first) / span * (WIDTH - 1)) for at in (row.began, row.ended))
        drawn.append([clipped(row.label), " " * begin + "━" * (end - begin) + row.end, row.said])
    axis = f"0 {'·' * (WIDTH - 3 - len(duration(span)))} {duration(span)}"
    return TextPlot(_chart(f"{title} (▶ alive  ■ ended  ✗ died)", axis, drawn, len(rows)))


def _chart(title: str, axis: str, drawn: Sequence[Sequence[str]], count: int) -> str:
    drawn = [[label, bar, clipped(said, MAX_SAID)] for label, bar, said in drawn]
    text = table(["", axis, ""], drawn).removeprefix("\n")  # without an axis there is no head
    more = f"\n… and {count - len(drawn)} more" if count > len(drawn) else ""
    return f"{title}\n{text}{more}"
