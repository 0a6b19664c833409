"""A waterfall as a matplotlib figure."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from .waterfall import COLOURS, ERROR_COLOUR, Waterfall, colour_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    from ..figures.picture import Picture
    from .trace import Trace
    from .waterfall import Row

__all__ = ("as_figure",)

WIDTH: Final = 10.5  # inches
ROW: Final = 0.23
HEAD: Final = 0.78  # title, key and time axis
NOTE: Final = 0.18
EDGE: Final = 0.12
INDENT: Final = 0.14
MAX_DEPTH: Final = 14
MAX_LABEL: Final = 4.0
MAX_TOLD: Final = 3.2
SIZE: Final = 8.5  # points
_INK: Final = "#222222"
_FAINT: Final = "#666666"  # 5:1 on the ground
_GROUNDS: Final = ("#FFFFFF", "#F5F6F7")


def as_figure(trace: Trace, rows: int) -> Picture:
    """See `Trace.plot`."""
    try:
        from ..figures.picture import Picture
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError(
            "a plot needs matplotlib: pip install 'bridge-kernel[plot]', or look at trace.text()", name=exc.name
        ) from exc

    shown = Waterfall(trace, rows)
    # Not pyplot: that would keep every figure, and choose a backend for the whole process.
    height = HEAD + ROW * max(len(shown.rows), 1) + NOTE * len(shown.notes) + EDGE
    figure = Picture(WIDTH, height, trace)
    canvas = _Canvas(figure, shown, height)
    canvas.draw_head()
    for number, row in enumerate(shown.rows):
        canvas.draw_row(number, row)
    canvas.draw_notes()
    return figure


class _Canvas:
    """Draws in inches from the upper left corner; only the bars are in ms, along one axis."""

    def __init__(self, figure: Figure, shown: Waterfall, height: float) -> None:
        from matplotlib.font_manager import FontProperties

        self.shown = shown
        self.height = height
        self.font = FontProperties(size=SIZE)
        # What lies behind the bars, and what stands on them.
        self.ground = figure.add_axes((0, 0, 1, 1), frameon=False, zorder=0)
        self.page = figure.add_axes((0, 0, 1, 1), frameon=False, zorder=2)
        for axes in (self.ground, self.page):
            axes.set(xlim=(0, WIDTH), ylim=(height, 0), xticks=[], yticks=[])
        labels = [_indent(row) + _width(row.label, self.font) for row in shown.rows]
        told = [_width(row.told, self.font) for row in shown.rows]
        self.left = EDGE + min(max(labels, default=0), MAX_LABEL) + 0.12
        # Room at the right for what stands beside a bar that ends there.
        self.beside = min(max(told, default=0), MAX_TOLD) + 0.1
        self.right = WIDTH - EDGE - self.beside
        self.ms = shown.length / 1e6
        count = max(len(shown.rows), 1)
        self.axes: Axes = figure.add_axes(
            (
                self.left / WIDTH,
                1 - (HEAD + ROW * count) / height,
                (self.right - self.left) / WIDTH,
                ROW * count / height,
            ),
            zorder=1,
        )
        self._dress(self.axes, count)

    def _dress(self, axes: Axes, count: int) -> None:
        axes.set(xlim=(0, self.ms), ylim=(count, 0), yticks=[])
        axes.patch.set_visible(False)
        axes.xaxis.tick_top()
        axes.tick_params(axis="x", labelsize=SIZE - 1, colors=_FAINT, length=3)
        axes.grid(axis="x", color="#E2E2E2", linewidth=0.6)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "top")
            spine.set_color("#B0B0B0")

    def _x(self, ms: float) -> float:
        return self.left + (self.right - self.left) * ms / self.ms

    def _text(self, x: float, y: float, text: str, size: float = SIZE, **how: Any) -> None:
        from ..figures.picture import drawable

        # A dollar sign is one: what users call something is no formula.
        self.page.text(x, y, drawable(text), fontsize=size, va="center", parse_math=False, **how)

    # -- parts -------------------------------------------------------------------

    def draw_head(self) -> None:
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=11, weight="bold")
        title = _clip(self.shown.title, WIDTH - 2 * EDGE, font)
        self._text(EDGE, 0.2, title, size=11, weight="bold", color=_INK)
        x = EDGE
        for kind in self.shown.kinds:
            self._box(x, 0.39, 0.1, 0.1, COLOURS[kind])
            self._text(x + 0.15, 0.445, kind, size=SIZE - 1, color=_FAINT)
            x += 0.32 + _width(kind, self.font)
        trace = self.shown.trace
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(trace.start // 1_000_000_000))
        about = f"trace {trace.short_id} · ms from {began}.{trace.start // 1_000_000 % 1000:03d} UTC"
        self._text(WIDTH - EDGE, 0.445, about, size=SIZE - 1, ha="right", color=_FAINT)

    def draw_row(self, number: int, row: Row) -> None:
        top = HEAD + ROW * number
        middle = top + ROW / 2
        if number % 2:
            self._box(0, top, WIDTH, ROW, _GROUNDS[1])
        x = EDGE + _indent(row)
        if row.depth:  # a hook to what it is part of
            line: dict[str, Any] = {"color": "#B8B8B8", "linewidth": 0.7, "solid_capstyle": "butt"}
            self.page.plot([x - 0.09, x - 0.09, x - 0.025], [top - 0.02, middle, middle], **line)
        label = _clip(row.label, self.left - 0.08 - x, self.font)
        self._text(x, middle, label, color=_FAINT if row.summed else _INK, style="italic" if row.summed else "normal")
        self._draw_bars(number, row)
        self._draw_told(middle, row, _GROUNDS[number % 2])

    def _draw_bars(self, number: int, row: Row) -> None:
        colour = COLOURS[colour_of(row.kind)]
        least = self.ms * 0.015 / max(self.right - self.left, 0.1)  # one pixel at least, whatever the scale
        bars = [(begin / 1e6, max((end - begin) / 1e6, least)) for begin, end in row.bars]
        bars = [(min(begin, self.ms - length), length) for begin, length in bars]
        how: dict[str, Any] = {"facecolor": colour, "edgecolor": "none", "zorder": 3}
        if row.error and not row.summed:
            how |= {"facecolor": _paler(colour), "hatch": "////", "edgecolor": ERROR_COLOUR, "linewidth": 1.0}
        elif row.open:
            how |= {"alpha": 0.45, "edgecolor": colour, "linewidth": 0.8, "linestyle": "--"}
        at = (number + 0.34, 0.32) if row.summed else (number + 0.18, 0.64)
        self.axes.broken_barh(bars, at, **how)

    def _draw_told(self, middle: float, row: Row, ground: str) -> None:
        """Beside the bar: to its right, or where that would leave the page to its left."""
        from matplotlib.patheffects import withStroke

        clear = [withStroke(linewidth=2.5, foreground=ground)]  # the grid is not to run through it
        begin, end = self._x(row.bars[0][0] / 1e6), self._x(row.bars[-1][1] / 1e6)
        took = _width(row.took, self.font)
        error = _clip(f"✗ {row.error}", max(MAX_TOLD - took, 1.0), self.font) if row.error else ""
        wanted = took + (0.1 + _width(error, self.font) if error else 0)
        x = max(end, begin + 0.02) + 0.06
        if x + wanted > WIDTH - EDGE / 2 and begin - wanted - 0.06 > self.left:
            x = begin - wanted - 0.06
        self._text(x, middle, row.took, color=_FAINT, path_effects=clear)
        if error:
            self._text(x + took + 0.1, middle, error, color="#B34700", weight="bold", path_effects=clear)

    def draw_notes(self) -> None:
        y = HEAD + ROW * max(len(self.shown.rows), 1) + NOTE / 2 + 0.02
        for note in self.shown.notes:
            self._text(EDGE, y, _clip(note, WIDTH - 2 * EDGE, self.font), size=SIZE - 0.5, color=_FAINT)
            y += NOTE

    def _box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        from matplotlib.patches import Rectangle

        self.ground.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="none"))


def _paler(colour: str) -> tuple[float, float, float]:
    """Half way to white, so that hatching is seen on it."""
    from matplotlib.colors import to_rgb

    red, green, blue = (0.5 + part / 2 for part in to_rgb(colour))
    return red, green, blue


def _indent(row: Row) -> float:
    return INDENT * min(row.depth, MAX_DEPTH)


# -- text --------------------------------------------------------------------------


def _width(text: str, font: FontProperties) -> float:
    """How wide a text is, in inches."""
    from matplotlib.textpath import text_to_path

    from ..figures.picture import drawable

    drawn = drawable(text)
    if not drawn:
        return 0.0
    width, _, _ = text_to_path.get_text_width_height_descent(drawn, font, ismath=False)
    return float(width) / 72


def _clip(text: str, inches: float, font: FontProperties) -> str:
    if _width(text, font) <= inches:
        return text
    fits, over = 0, len(text)
    while over - fits > 1:
        half = (fits + over) // 2
        fits, over = (half, over) if _width(f"{text[:half]}…", font) <= inches else (fits, half)
    return f"{text[:fits].rstrip()}…"
