"""Tables that people look at: the same rows as text and as HTML."""

from __future__ import annotations

import html as html_library
import unicodedata
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("NOTHING", "Shown", "one_line", "table")

NOTHING: Final = "nothing yet"
MAX_CELL: Final = 80
"""Characters; of a longer one the beginning is shown."""
_UNSHOWN: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS: Final = "\u200c\u200d"  # of the same category, and part of how words and emoji are written


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, html: bool = False, title: str = "") -> str:
    """Rows of text under their columns. What would break them, newlines and control characters, is shown escaped."""
    title = one_line(title)
    columns = [_cell(column) for column in columns]
    rows = [[_cell(cell) for cell in row] for row in rows]
    if html:
        head = "".join(f"<th>{html_library.escape(column)}</th>" for column in columns)
        body = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{html_library.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        caption = f"<caption>{html_library.escape(title)}</caption>" if title else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    drawn = Table(
        *(Column(Text(column)) for column in columns), box=None, pad_edge=False
    )  # as Text, for in text rich looks for markup
    for row in rows:
        drawn.add_row(*map(Text, row))
    console = Console(width=120, color_system=None, highlight=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(drawn)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join([title, *lines] if title else lines)


def _cell(text: str) -> str:
    text = one_line(text[: MAX_CELL + 1])  # cut before it is gone through: it may be of any length
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 1]}…"


def one_line(text: str) -> str:
    """The same text, with what would break a line or steer a terminal shown escaped."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(char: str) -> str:
    if unicodedata.category(char) not in _UNSHOWN or char in _JOINERS:
        return char
    return char.encode("unicode_escape").decode()


class Shown:
    """Shows itself as a table, in a terminal and in a notebook: what it has is `_rows()`, columns and rows."""

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        raise NotImplementedError

    def __repr__(self) -> str:
        columns, rows = self._rows()
        return table(columns, rows) if rows else f"<{type(self).__name__}: {NOTHING}>"

    def _repr_html_(self) -> str:
        columns, rows = self._rows()
        return table(columns, rows, html=True) if rows else f"<i>{type(self).__name__}: {NOTHING}</i>"
