"""Tables that people look at: the same rows as text and as HTML."""

from __future__ import annotations

import html as html_library
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("Shown", "table")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, html: bool = False, title: str = "") -> str:
    """Rows of text under their columns."""
    if html:
        head = "".join(f"<th>{html_library.escape(column)}</th>" for column in columns)
        body = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{html_library.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        caption = f"<caption>{html_library.escape(title)}</caption>" if title else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    drawn = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        drawn.add_row(*[cell.replace("[", "\\[") for cell in row])
    console = Console(width=120, color_system=None, highlight=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(drawn)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join([title, *lines] if title else lines)


class Shown:
    """Shows itself as a table, in a terminal and in a notebook: what it has is `_rows()`, columns and rows."""

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        raise NotImplementedError

    def __repr__(self) -> str:
        return table(*self._rows())

    def _repr_html_(self) -> str:
        return table(*self._rows(), html=True)
