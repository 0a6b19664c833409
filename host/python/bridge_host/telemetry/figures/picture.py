"""A matplotlib figure that shows itself: in a notebook as a picture, in a terminal as text."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Final, Literal

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

__all__ = ("PAPER", "Picture", "drawable")

PAPER: Final = "#ffffff"  # opaque: what is drawn on it is readable on a dark page too
DPI: Final = 96
SHARPNESS: Final = 2
"""Pixels of the PNG for each that it takes on a page."""


class Picture(Figure):
    """A figure of so many inches. A notebook shows a bare `Figure` only as `<Figure …>` unless somebody uses pyplot.

    `text` is what a terminal prints, and what is said to those who do not see the picture: its repr.
    """

    def __init__(self, width: float, height: float, text: object, layout: Literal["constrained"] | None = None) -> None:
        super().__init__(figsize=(width, height), dpi=DPI, facecolor=PAPER, edgecolor=PAPER, layout=layout)
        self.as_text = text

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI * SHARPNESS, facecolor=PAPER)
        width, height = self.get_size_inches() * DPI
        return buffer.getvalue(), {"width": round(width), "height": round(height)}

    def __repr__(self) -> str:
        return repr(self.as_text)

    __str__ = __repr__  # Figure has one of its own


@lru_cache(1)
def _glyphs() -> frozenset[int]:
    """The characters that the font has: of others matplotlib would draw a box and warn."""
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def drawable(text: str) -> str:
    """The same text, with a box for each character that the font does not have."""
    known = _glyphs()
    box = "□" if ord("□") in known else "?"
    return "".join(char if ord(char) in known or char == "\n" else box for char in text)
