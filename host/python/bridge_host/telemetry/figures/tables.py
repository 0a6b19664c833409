"""The figures as tables to look at: rows that nobody changes, as text, HTML, a data frame, a plot."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar, get_args, overload

import msgspec

from bridge_kernel.contract.line import duration, quantity

from ...display import NOTHING, Shown
from .bars import Lived, Ranged, bars, lives, ranges
from .rows import OTHERS, Failure, Latency, Life, ModelUse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .bars import TextPlot
    from .frames import Kind
    from .picture import Picture

__all__ = ("Errors", "Figures", "Kernels", "Latencies", "Models")

_Row = TypeVar("_Row", bound=msgspec.Struct)


_KINDS: Final[dict[type, Kind]] = {bool: "boolean", int: "integer", float: "number", str: "text"}


def _kinds_of(row: type[msgspec.Struct]) -> dict[str, Kind]:
    """What kind of column each member makes; of those that are no scalars, none."""
    found: dict[str, Kind] = {}
    for field in msgspec.structs.fields(row):
        kind = next((_KINDS[one] for one in get_args(field.type) or (field.type,) if one in _KINDS), None)
        if kind is not None:
            found[field.name] = kind
    return found


class Figures(Shown, Sequence[_Row], Generic[_Row]):
    """Rows: to look at, to go through, `.frame()`, `.plot()`, `.text_plot()`."""

    _kinds: ClassVar[dict[str, Kind]]

    def __init__(self, rows: Iterable[_Row]) -> None:
        self.rows: tuple[_Row, ...] = tuple(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[_Row]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> _Row: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[_Row, ...]: ...
    def __getitem__(self, index: int | slice) -> _Row | tuple[_Row, ...]:
        return self.rows[index]

    def frame(self, library: str = "pandas") -> Any:
        """A data frame of pandas or polars, a row each. Durations are ns, sizes bytes, times UTC.

        Raises:
            ModuleNotFoundError: the library is not installed.
            ValueError: it is another.
        """
        from .frames import frame_of

        columns, kinds = self._framed()
        return frame_of(columns, library, kinds)

    def plot(self) -> Picture | TextPlot:
        """A matplotlib `Figure`, which notebooks show, and which a terminal prints as `text_plot()`.

        Without matplotlib (`pip install 'bridge-kernel[plot]'`) it is the text plot.
        """
        try:
            return self._picture()
        except ModuleNotFoundError as exc:
            if exc.name is None or exc.name.partition(".")[0] not in ("matplotlib", "numpy"):  # that comes with it
                raise
            return self.text_plot()

    def text_plot(self) -> TextPlot:
        """The same as text: `print(it)`."""
        raise NotImplementedError

    def _picture(self) -> Picture:
        raise NotImplementedError

    def _framed(self) -> tuple[dict[str, list[Any]], dict[str, Kind]]:
        """The columns of its frame, and what they hold: known of none and of empty ones too."""
        columns = {name: [getattr(row, name) for row in self.rows] for name in self._kinds}
        return columns, self._kinds


class Latencies(Figures[Latency]):
    """How long commands take, those first on which most time was spent."""

    _kinds = _kinds_of(Latency)

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        columns = ["command", "count", "errors", "total", "p50", "p95", "p99", "max", "queued p95", "in kernel p50"]
        return [*columns, "retries", "cached"], [
            [
                row.command,
                f"{row.count:,}",
                f"{row.errors:,}",
                duration(row.total),
                duration(row.p50),
                duration(row.p95),
                duration(row.p99),
                duration(row.high),
                _maybe(row.queue_p95),
                _maybe(row.kernel_p50),
                f"{row.retries:,}",
                f"{row.cached:,}",
            ]
            for row in self.rows
        ]

    def text_plot(self) -> TextPlot:
        rows = [
            Ranged(row.command, row.low, row.p50, row.p95, row.p99, row.high, f"{duration(row.p50)} · {row.count:,}×")
            for row in self.rows
        ]
        return ranges("How long commands take", rows, NOTHING)

    def _picture(self) -> Picture:
        from . import plots

        return plots.latencies(self)


class Errors(Figures[Failure]):
    """Errors by type, the most frequent first."""

    _kinds: ClassVar[dict[str, Kind]] = {
        "error": "text",
        "of": "text",
        "about": "text",
        "count": "integer",
        "last": "time",
    }

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        return ["error", "of", "count", "last", "which"], [
            [row.error, row.of, f"{row.count:,}", clock_time(row.last), which(row)] for row in self.rows
        ]

    def _framed(self) -> tuple[dict[str, list[Any]], dict[str, Kind]]:
        """A row for each type and each command or tool: the counts are of these."""
        told = [(row.error, row.of, name, count, row.last) for row in self.rows for name, count in row.about]
        return {name: [row[i] for row in told] for i, name in enumerate(self._kinds)}, self._kinds

    def text_plot(self) -> TextPlot:
        rows = [(f"{row.error} ({row.of})", row.count, f"{row.count:,} · {which(row, 1)}") for row in self.rows]
        return bars("Errors by type", rows, NOTHING)

    def _picture(self) -> Picture:
        from . import plots

        return plots.errors(self)


class Kernels(Figures[Life]):
    """Kernels over time, the oldest first. `now` is when this was asked for, in ns since the epoch."""

    _kinds: ClassVar[dict[str, Kind]] = {**_kinds_of(Life), "started": "time", "ended": "time"}

    def __init__(self, rows: Iterable[Life], now: int) -> None:
        super().__init__(rows)
        self.now = now

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        columns = ["kernel", "pid", "state", "started", "lived", "memory", "peak", "commands", "errors", "lost"]
        return [*columns, "why it ended"], [
            [
                name_of(row),
                "" if row.pid is None else str(row.pid),
                row.state,
                "" if row.started is None else clock_time(row.started),
                "" if row.started is None else duration((row.ended or self.now) - row.started),
                _maybe_size(row.rss),
                _maybe_size(row.peak),
                f"{row.commands:,}",
                f"{row.errors:,}",
                f"{row.lost:,}",
                why(row),
            ]
            for row in self.rows
        ]

    def spans(self) -> list[tuple[Life, int, int]]:
        """Each kernel with when it began and when it ended, or `now`; those of which that is not known are left out."""
        found = []
        for row in self.rows:
            began = row.started if row.started is not None else row.memory[0][0] if row.memory else None
            if began is not None:
                found.append((row, began, max(row.ended or self.now, began)))
        return found

    def text_plot(self) -> TextPlot:
        ends = {"alive": "▶", "ended": "■", "died": "✗"}
        rows = []
        for row, began, ended in self.spans():
            said = (_maybe_size(row.peak), quantity(row.commands, "command"))
            rows.append(Lived(name_of(row), began, ended, ends[row.state], " · ".join(filter(None, said))))
        return lives("Kernels over time", rows, NOTHING)

    def _picture(self) -> Picture:
        from . import plots

        return plots.kernels(self)


class Models(Figures[ModelUse]):
    """Language models, those with most tokens first."""

    _kinds = _kinds_of(ModelUse)

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        columns = ["model", "calls", "errors", "cache hits", "tokens", "in", "out", "cost", "p50", "p95", "first token"]
        return columns, [
            [
                row.model,
                f"{row.calls:,}",
                f"{row.errors:,}",
                f"{row.cache_hits:,}",
                f"{row.tokens:,}",
                f"{row.input_tokens:,}",
                f"{row.output_tokens:,}",
                dollars(row.cost),
                _maybe(row.p50),
                _maybe(row.p95),
                _maybe(row.first_token_p50),
            ]
            for row in self.rows
        ]

    def text_plot(self) -> TextPlot:
        rows = []
        for row in self.rows:
            said = (quantity(row.tokens, "token"), dollars(row.cost), quantity(row.calls, "call"))
            rows.append((row.model, row.tokens, " · ".join(filter(None, said))))
        return bars("Tokens by model", rows, NOTHING)

    def _picture(self) -> Picture:
        from . import plots

        return plots.models(self)


def _maybe(ns: int | None) -> str:
    return "" if ns is None else duration(ns)


def _maybe_size(count: int | None) -> str:
    return "" if count is None else size(count)


def size(count: float) -> str:
    """Bytes as people read them: `312 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def dollars(cost: float) -> str:
    """`$0.0042`, `$12.30`; nothing if there is none."""
    return "" if not cost else f"${cost:,.2f}" if cost >= 0.1 else f"${cost:.2g}"


def clock_time(ns: int) -> str:
    """The local time of day; the date too if it is not today's."""
    at, today = time.localtime(ns / 1e9), time.localtime()
    return time.strftime("%H:%M:%S" if at[:3] == today[:3] else "%Y-%m-%d %H:%M", at)


def which(row: Failure, most: int = 3) -> str:
    """Which commands or tools failed so: `f (3), g`."""
    said = [f"{name} ({count:,})" if count > 1 else name for name, count in row.about[:most]]
    return ", ".join(said) + (f" and {len(row.about) - most} more" if len(row.about) > most else "")


def name_of(row: Life) -> str:
    """As the line of a command names a kernel; of several, how many there are."""
    return row.kernel[:8] if row.kernel != OTHERS else quantity(row.count, "earlier kernel")


def why(row: Life) -> str:
    """Why a kernel ended, or is going to."""
    code = f"exit code {row.exit_code}" if row.exit_code else ""
    return ", ".join(filter(None, (row.recycled and f"recycled: {row.recycled}", row.reason, code)))
