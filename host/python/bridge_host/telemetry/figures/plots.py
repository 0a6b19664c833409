"""The figures as pictures, with matplotlib: nothing of pyplot's, no backend is chosen, nobody's settings change."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bridge_kernel.contract.line import duration, quantity

from ...display import NOTHING
from .bars import clipped
from .picture import PAPER, Picture, drawable
from .tables import clock_time, dollars, name_of, size, which

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from matplotlib.axes import Axes

    from .rows import Latency, Life
    from .tables import Errors, Figures, Kernels, Latencies, Models

    Floats = npt.NDArray[np.float64]

__all__ = ("errors", "kernels", "latencies", "models")

# Okabe and Ito's palette, which people with any colour vision tell apart; besides, everything has a shape or a label.
BLUE: Final = "#0072B2"
SKY: Final = "#56B4E9"
ORANGE: Final = "#E69F00"
VERMILLION: Final = "#D55E00"
GREEN: Final = "#009E73"
INK: Final = "#1a1a1a"
FAINT: Final = "#5f6368"
GRID: Final = "#e3e5e8"

MAX_ROWS: Final = 16
WIDTH: Final = 9.5


def _picture(
    shown: Figures[Any], title: str, rows: int, columns: int = 1, *, row: float = 0.42
) -> tuple[Picture, list[Axes]]:
    """A picture of as many rows, of `row` inches each, and its axes side by side."""
    picture = Picture(WIDTH, 1.35 + row * max(rows, 1), shown.text_plot(), layout="constrained")
    picture.suptitle(title, x=0.008, ha="left", fontsize=13, fontweight="bold", color=INK, parse_math=False)
    axes = [picture.add_subplot(1, columns, i + 1) for i in range(columns)]
    for one in axes:
        one.set_facecolor(PAPER)
        one.tick_params(colors=FAINT, labelcolor=INK, labelsize=9, length=0)
        one.spines[:].set_visible(False)
        one.set_axisbelow(True)
        one.grid(axis="x", color=GRID, linewidth=0.8)
        one.xaxis.label.set_color(FAINT)
        one.xaxis.label.set_fontsize(9)
    if not rows:
        for one in axes:
            one.set_axis_off()
        picture.text(0.5, 0.42, NOTHING, ha="center", va="center", fontsize=14, color=FAINT)
    return picture, axes


def _lanes(axes: Axes, labels: Sequence[str]) -> None:
    """A lane for each label, the first above."""
    axes.set_yticks(range(len(labels)), [drawable(clipped(label, 36)) for label in labels], parse_math=False)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def _title(what: str, shown: int, of: int) -> str:
    return f"{what}, {shown} of {of}" if shown < of else what


def _note(axes: Axes, row: float, text: str, **options: Any) -> None:
    """What is said of a lane, to the right of it."""
    axes.annotate(
        drawable(text),
        (1, row),
        xycoords=("axes fraction", "data"),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=INK,
        parse_math=False,
        annotation_clip=False,
        **options,
    )


def latencies(shown: Latencies) -> Picture:
    """How each command's durations are distributed, on a logarithmic scale, with its percentiles."""
    rows = shown.rows[:MAX_ROWS]
    title = _title("How long commands take", len(rows), len(shown))
    picture, (axes,) = _picture(shown, title, len(rows), row=0.52)
    if not rows:
        return picture
    low = math.log(max(min(row.low for row in rows), 1))
    high = math.log(max(max(row.high for row in rows), 1))
    margin = max((high - low) * 0.03, 0.1)
    grid = np.linspace(low - margin, high + margin, 400)
    for lane, row in enumerate(rows):
        base = lane + 0.3
        axes.fill_between(np.exp(grid), base, base - 0.62 * _density(row, grid), color=SKY, alpha=0.75, linewidth=0)
        axes.plot([max(row.low, 1), max(row.high, 1)], [base, base], color=FAINT, linewidth=1, zorder=3)
        for value, marker, colour, say in (
            (row.p50, "o", BLUE, "p50"),
            (row.p95, "D", ORANGE, "p95"),
            (row.p99, ">", VERMILLION, "p99"),
        ):
            axes.plot(
                max(value, 1),
                base,
                marker,
                color=colour,
                markersize=7,
                markeredgecolor=PAPER,
                zorder=4,
                label=say if lane == 0 else None,
            )
        failed = f" · {row.errors:,} failed" if row.errors else ""
        _note(axes, lane, f"p50 {duration(row.p50)} · p95 {duration(row.p95)}\n{row.count:,}×{failed}")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if high - low > math.log(50) else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _round_duration(value / 1e9)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(math.exp(grid[0]), math.exp(grid[-1]))
    axes.set_xlabel("from asking the host until the result was there, log scale; each hill has a height of its own")
    _lanes(axes, [row.command for row in rows])
    _legend(picture, axes)
    return picture


def _density(row: Latency, grid: Floats) -> Floats:
    """How dense the durations are along a grid of logarithms, as a share of the densest; smoothed a little."""
    width = max(float(grid[-1] - grid[0]) / 90, 0.04)
    dense = np.zeros_like(grid)
    for low, high, count in row.durations.buckets():
        dense += count * np.exp(-0.5 * ((grid - math.log(max((low + high) / 2, 1))) / width) ** 2)
    dense /= dense.max()
    return dense


def _legend(picture: Picture, axes: Axes) -> None:
    picture.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper right",
        ncols=6,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handletextpad=0.4,
        columnspacing=1.4,
    )


def errors(shown: Errors) -> Picture:
    """How often each type of error came, of commands and of tools."""
    rows = shown.rows[:MAX_ROWS]
    picture, (axes,) = _picture(shown, _title("Errors by type", len(rows), len(shown)), len(rows))
    if not rows:
        return picture
    for of, colour, hatch in (("command", VERMILLION, ""), ("tool", ORANGE, "///")):
        lanes = [lane for lane, row in enumerate(rows) if row.of == of]
        if lanes:
            counts = [rows[lane].count for lane in lanes]
            axes.barh(
                lanes, counts, height=0.56, color=colour, hatch=hatch, edgecolor=PAPER, linewidth=0, label=f"of a {of}"
            )
    for lane, row in enumerate(rows):
        _note(axes, lane, f"{row.count:,} · last {clock_time(row.last)}\n{clipped(which(row, 1), 34)}")
    _counts(axes, "errors")
    _lanes(axes, [row.error for row in rows])
    _legend(picture, axes)
    return picture


def _counts(axes: Axes, unit: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _round_count(value)))
    axes.set_xlim(left=0)
    axes.set_xlabel(unit)


def _round_duration(seconds: float) -> str:
    """As `duration`, of a tick: without decimals that are none."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.3g} µs" if seconds else "0"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.4g} h"


def _round_count(count: float) -> str:
    if count < 10_000:
        return f"{count:,.0f}"
    return f"{count / 1e3:.4g}k" if count < 1e6 else f"{count / 1e6:.4g}M"


def kernels(shown: Kernels) -> Picture:
    """When each kernel lived, how it ended, and its memory meanwhile."""
    spans = shown.spans()
    title = _title("Kernels over time", min(len(spans), MAX_ROWS), len(spans))
    spans = spans[-MAX_ROWS:]
    picture, (axes,) = _picture(shown, title, len(spans), row=0.5)
    if not spans:
        return picture
    most = max((row.peak or 0 for row, *_ in spans), default=0)
    first = min(began for _, began, _ in spans)
    drawn = False
    for lane, (row, began, ended) in enumerate(spans):
        left, right = (began - first) / 1e9, (ended - first) / 1e9
        base = lane + 0.36
        axes.plot([left, right], [base, base], color=BLUE, linewidth=2, solid_capstyle="butt", zorder=3)
        if row.memory and most:
            times = [(at - first) / 1e9 for at, _ in row.memory]
            tops = [base - 0.68 * rss / most for _, rss in row.memory]
            times, tops = [*times, max(right, times[-1])], [*tops, tops[-1]]
            axes.fill_between(
                times, base, tops, step="post", color=SKY, alpha=0.7, linewidth=0, label=None if drawn else "memory"
            )
            drawn = True
        memory = f"{size(row.rss)} · peak {size(row.peak or row.rss)}" if row.rss is not None else "memory not known"
        _note(axes, lane, f"{memory}\n{quantity(row.commands, 'command')}{_end(row)}")
    for state, marker, colour in (("alive", ">", GREEN), ("ended", "s", FAINT), ("died", "X", VERMILLION)):
        ends = [((end - first) / 1e9, lane + 0.36) for lane, (row, _, end) in enumerate(spans) if row.state == state]
        if ends:
            axes.plot(
                *zip(*ends, strict=True),
                marker,
                color=colour,
                markersize=8,
                markeredgecolor=PAPER,
                zorder=4,
                label=state,
            )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _round_duration(value)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 1.2, 1.5, 2, 3, 6, 10]))
    height = f"; a lane's height: {size(most)}" if most else ""
    axes.set_xlabel(f"since {clock_time(first)}{height}")
    _lanes(axes, [name_of(row) for row, *_ in spans])
    _legend(picture, axes)
    return picture


def _end(row: Life) -> str:
    if row.state == "died":
        return f" · {clipped(row.reason, 12)}, {row.lost:,} lost"
    return f" · recycled: {clipped(row.recycled, 12)}" if row.recycled else ""


def models(shown: Models) -> Picture:
    """Tokens and cost of each model, side by side."""
    rows = shown.rows[:MAX_ROWS]
    costly = any(row.cost for row in rows)
    title = _title("Tokens and cost by model" if costly else "Tokens by model", len(rows), len(shown))
    picture, (tokens, *others) = _picture(shown, title, len(rows), 2 if costly else 1)
    if not rows:
        return picture
    lanes = range(len(rows))
    given = [row.input_tokens for row in rows]
    made = [row.output_tokens for row in rows]
    tokens.barh(lanes, given, height=0.56, color=BLUE, edgecolor=PAPER, linewidth=0, label="prompt")
    tokens.barh(
        lanes, made, left=given, height=0.56, color=SKY, edgecolor=PAPER, linewidth=0, hatch="///", label="completion"
    )
    for lane, row in enumerate(rows):
        hits = f" · {row.cache_hits:,} cached" if row.cache_hits else ""
        took = "" if row.p50 is None else f"\np50 {duration(row.p50)}"
        _note(tokens, lane, f"{quantity(row.calls, 'call')}{hits}{took}")
        for costs in others:
            _note(costs, lane, f"{row.tokens:,} tokens\n{dollars(row.cost) or 'no cost known'}")
    _counts(tokens, "tokens")
    _lanes(tokens, [row.model for row in rows])
    for costs in others:
        costs.barh(lanes, [row.cost for row in rows], height=0.56, color=GREEN, linewidth=0)
        costs.xaxis.set_major_locator(MaxNLocator(nbins=4))
        costs.xaxis.set_major_formatter(FuncFormatter(lambda value, _: dollars(value) or "0"))
        costs.set_xlim(left=0)
        costs.set_xlabel("USD, as DSPy says it")
        _lanes(costs, [""] * len(rows))
    _legend(picture, tokens)
    return picture
