"""A waterfall as text for terminals, and as HTML where there is nothing to plot with."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Final

from rich.cells import cell_len, set_cell_size

from bridge_kernel.contract.line import duration

from .waterfall import COLOURS, ERROR_COLOUR, Waterfall, colour_of

if TYPE_CHECKING:
    from .trace import Trace
    from .waterfall import Row

__all__ = ("as_html", "as_text")

MIN_WIDTH: Final = 40
MIN_BAR: Final = 8
MAX_DEPTH: Final = 12
"""From here on what is deeper is not indented any more."""
_SOLID: Final = (" ", "▌", "▐", "█")  # by which halves of the cell are filled: none, left, right, both
_SUMMED: Final = (" ", "▖", "▗", "▄")


def as_text(trace: Trace, width: int, rows: int) -> str:
    """See `Trace.text`."""
    width = max(width, MIN_WIDTH)
    shown = Waterfall(trace, rows)
    labels = [_indented(row) for row in shown.rows]
    told = [row.told for row in shown.rows]
    wanted_label = max(map(cell_len, labels), default=0)
    wanted_told = max([*map(cell_len, told), 0])
    for_told = min(wanted_told, max(width * 3 // 10, 10))
    for_label = min(wanted_label, max(width * 4 // 10, width - for_told - 4 - width * 3 // 10))
    for_bar = max(width - for_label - for_told - 4, MIN_BAR)
    for_label = min(for_label, width - for_bar - for_told - 4)
    lines = [_clip(f"trace {trace.short_id} · {shown.title}", width)]
    if shown.rows:
        lines.append(f"{' ' * for_label}  {_axis(shown.length, for_bar)}".rstrip())
    for row, label, said in zip(shown.rows, labels, told, strict=True):
        bar = _bar(row, shown.length, for_bar)
        lines.append(f"{set_cell_size(_clip(label, for_label), for_label)}  {bar}  {_clip(said, for_told)}".rstrip())
    return "\n".join([*lines, *(_clip(note, width) for note in shown.notes)])


def _indented(row: Row) -> str:
    return "  " * min(row.depth, MAX_DEPTH) + row.label


def _clip(text: str, most: int) -> str:
    return text if cell_len(text) <= most else f"{set_cell_size(text, most - 1).rstrip()}…"


def _axis(length: int, cells: int) -> str:
    end = duration(length)
    return f"0{' ' * (cells - 1 - len(end))}{end}" if cells > len(end) + 1 else set_cell_size(end, cells)


def _bar(row: Row, length: int, cells: int) -> str:
    """Its bar: full blocks, `▒` if it failed, `░` if it never ended."""
    halves = bytearray(2 * cells)
    for begin, end in row.bars:
        first = min(begin * 2 * cells // length, 2 * cells - 1)
        last = max(-(-end * 2 * cells // length), first + 1)
        halves[first:last] = b"\1" * (min(last, 2 * cells) - first)
    filled = [halves[2 * i] + 2 * halves[2 * i + 1] for i in range(cells)]
    if row.summed:
        return "".join(_SUMMED[which] for which in filled)
    if row.open or row.error:
        return "".join(("░" if row.open else "▒") if which else " " for which in filled)
    return "".join(_SOLID[which] for which in filled)


def as_html(trace: Trace, rows: int) -> str:
    """See `Trace.html`."""
    shown = Waterfall(trace, rows)
    body = "".join(_html_row(row, shown.length) for row in shown.rows)
    notes = "".join(f"<div style='opacity:.75'>{html.escape(note)}</div>" for note in shown.notes)
    key = "".join(
        f"<span style='margin-right:1em'><span style='display:inline-block;width:.8em;height:.8em;"
        f"background:{COLOURS[name]}'></span> {name}</span>"
        for name in shown.kinds
    )
    axis = (
        "<tr style='background:none'><td></td><td style='padding:0;opacity:.75'><div style='display:flex;"
        f"justify-content:space-between'><span>0</span><span>{duration(shown.length)}</span></div></td><td></td></tr>"
    )
    return (
        f"<div class='bridge-trace' style='font:12px/1.5 system-ui,sans-serif'>"
        f"<div><b>{html.escape(shown.title)}</b> <span style='opacity:.75'>trace {html.escape(trace.short_id)}</span></div>"
        f"<div style='opacity:.75'>{key}</div>"
        f"<table style='width:100%;table-layout:fixed;border-collapse:collapse;margin:0;font:inherit'>"
        f"<colgroup><col style='width:34%'><col style='width:44%'><col style='width:22%'></colgroup>"
        f"<tbody>{axis}{body}</tbody></table>{notes}</div>"
    )


def _html_row(row: Row, length: int) -> str:
    bars = "".join(_html_bar(row, begin / length, (end - begin) / length) for begin, end in row.bars)
    label, took = html.escape(row.label), html.escape(row.took)
    error = f" <b style='color:{ERROR_COLOUR}'>✗ {html.escape(row.error)}</b>" if row.error else ""
    cut = "overflow:hidden;text-overflow:ellipsis;white-space:nowrap;text-align:left"
    indent = min(row.depth, MAX_DEPTH)
    return (
        f"<tr style='background:none'><td style='{cut};padding:0 .5em 0 {indent * 1.1:.1f}em' title='{label}'>{label}</td>"
        f"<td style='padding:0'><div style='position:relative;height:1.1em'>{bars}</div></td>"
        f"<td style='{cut};padding:0 0 0 .5em' title='{html.escape(row.told)}'>{took}{error}</td></tr>"
    )


def _html_bar(row: Row, begin: float, share: float) -> str:
    colour = COLOURS[colour_of(row.kind)]
    fill = f"background:{colour}"
    if row.error and not row.summed:
        fill = f"background:repeating-linear-gradient(135deg,{colour} 0 4px,transparent 4px 6px);outline:1px solid {ERROR_COLOUR}"
    elif row.open:
        fill = f"background:{colour};opacity:.4"
    top = "35%" if row.summed else "10%"
    return f"<div style='position:absolute;left:{begin:.3%};width:{max(share, 0.002):.3%};top:{top};bottom:10%;{fill}'></div>"
