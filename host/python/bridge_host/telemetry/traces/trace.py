"""`host.telemetry.traces()` and `host.telemetry.trace()`: what happened in each trace, to look at and to go through."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bridge_kernel.contract.errors import NotFound
from bridge_kernel.contract.line import duration

from ...display import Shown, one_line
from ..figures.frames import frame_of
from .assembly import Span, spans_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bridge_kernel.contract.telemetry import Event

    from ..figures.picture import Picture

__all__ = ("Span", "Trace", "Traces")

SHOWN: Final = 30
"""How many traces a table shows."""
ROWS: Final = 80
"""How many rows a waterfall has at most."""
_DROP: Final = ("bridge", "telemetry", "drop")


class Trace:
    """What happened in one trace: its spans, as a tree. Shows itself as a waterfall: a plot in a notebook, else text."""

    def __init__(self, id: str, events: Iterable[Event]) -> None:
        self.id = id
        events = tuple(events)
        self.roots: tuple[Span, ...] = spans_of(events)
        """The spans that are part of no other, or of one that is not remembered."""
        self.dropped = sum(int(event.measurements.get("events", 0)) for event in events if event.name == _DROP)
        """Events that a kernel had no room for."""

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """All spans, each before its parts."""
        return tuple(span for root in self.roots for span in root.walk())

    @property
    def root(self) -> Span | None:
        """What it all belongs to; None if nothing of it is remembered."""
        return next((root for root in self.roots if "parent" not in root.missing), next(iter(self.roots), None))

    @property
    def short_id(self) -> str:
        """As much of its id as people need to find it."""
        return one_line(self.id[:16])

    @property
    def subject(self) -> str:
        """What people call it."""
        root = self.root
        return "" if root is None else one_line(str(root.attributes.get("subject") or root.name))

    @cached_property
    def session(self) -> str:
        """The session of its first command; "" if there is none."""
        return next((str(session) for span in self.spans if (session := span.attributes.get("session"))), "")

    @property
    def complete(self) -> bool:
        """Whether it has ended: of a command that lost its kernel, parts may stay open for good."""
        return bool(self.roots) and all(root.duration is not None for root in self.roots)

    @property
    def error(self) -> str | None:
        """The type of the error that it ended with."""
        return next((root.error for root in self.roots if root.error is not None), None)

    @cached_property
    def start(self) -> int:
        """When its first span began, in ns since the epoch. Times of kernels count only where there are no others:
        a kernel on another machine has another clock.
        """
        return min((span.start for span in self._timed), default=0)

    @cached_property
    def end(self) -> int:
        """When the last that is known of it happened, in ns since the epoch."""
        timed = self._timed if self.complete else self.spans
        return max((span.start if span.end is None else span.end for span in timed), default=self.start)

    @cached_property
    def _timed(self) -> tuple[Span, ...]:
        here = tuple(span for span in self.spans if "kernel" not in span.attributes)
        return here or self.spans

    @property
    def duration(self) -> int | None:
        """How long it took, in ns; None if it has not ended."""
        return self.end - self.start if self.complete else None

    # -- looking -----------------------------------------------------------------

    def text(self, width: int = 100, rows: int = ROWS) -> str:
        """The waterfall as text, `width` columns wide (40 or more); what does not fit into `rows` is summed up."""
        from .waterfall_text import as_text

        return as_text(self, width, rows)

    def plot(self, rows: int = ROWS) -> Picture:
        """The waterfall as a matplotlib `Figure` that notebooks show; what does not fit into `rows` is summed up.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from .waterfall_plot import as_figure

        return as_figure(self, rows)

    def html(self, rows: int = ROWS) -> str:
        """The waterfall as HTML, which needs no library."""
        from .waterfall_text import as_html

        return as_html(self, rows)

    def frame(self, library: str = "pandas") -> Any:
        """A data frame of pandas or polars, a row for each span, each before its parts.

        `start` is a time in UTC, `offset` (since the trace's start) and `duration` are in ns, `attributes` is JSON.

        Raises:
            ModuleNotFoundError: the library is not installed.
            ValueError: it is neither pandas nor polars.
        """
        said = msgspec.json.Encoder(enc_hook=str)
        rows: list[dict[str, Any]] = [
            {
                "trace_id": self.id,
                "span_id": span.span_id or None,
                "parent_span_id": span.parent,
                "depth": depth,
                "kind": span.kind,
                "name": span.name,
                "start": span.start,
                "offset": span.start - self.start,
                "duration": span.duration,
                "error": span.error,
                "missing": " ".join(span.missing) or None,
                "attributes": said.encode({str(key): value for key, value in span.attributes.items()}).decode(),
            }
            for span, depth in self._with_depth()
        ]
        return _frame(rows, library)

    def _with_depth(self) -> Iterator[tuple[Span, int]]:
        waiting = [(root, 0) for root in reversed(self.roots)]
        while waiting:
            span, depth = waiting.pop()
            yield span, depth
            waiting.extend((child, depth + 1) for child in reversed(span.children))

    def __repr__(self) -> str:
        return self.text(shutil.get_terminal_size((100, 24)).columns)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Any:
        """The plot if there is something to plot with, else HTML; and text."""
        text = self.text()
        try:
            plot = self.plot()
        except ModuleNotFoundError:
            return {"text/plain": text, "text/html": self.html()}
        picture, size = plot._repr_png_()
        return {"text/plain": text, "image/png": base64.b64encode(picture).decode("ascii")}, {"image/png": size}


class Traces(Shown, Mapping[str, Trace]):
    """The traces that are remembered, newest first, by their ids. Shows itself as a table."""

    def __init__(self, events: Iterable[Event]) -> None:
        of: dict[str, list[Event]] = {}
        for event in events:
            id = event.metadata.get("trace_id")
            if isinstance(id, str):
                of.setdefault(id, []).append(event)
        self._events = {id: of[id] for id in reversed(of)}
        self._made: dict[str, Trace] = {}

    def __getitem__(self, id: str | None) -> Trace:
        """The trace of this id, of the only id that begins so, or of the command that the journal knows by this id;
        of None the last that is complete, or the last.

        Raises:
            NotFound: there is none.
        """
        if id is None:
            return self._last()
        if not isinstance(id, str):
            raise TypeError(f"a trace is known by its id, or by its command's: a text, not {id!r}")
        found = [id] if id in self._events else [known for known in self._events if known.startswith(id)]
        if not found:
            said = ((known, event.metadata.get("command_id")) for known, es in self._events.items() for event in es)
            found = list(dict.fromkeys(known for known, command in said if command == id))
        if len(found) == 1:
            return self._trace(found[0])
        if found and id:
            raise NotFound(
                f"{len(found)} traces have an id that begins with {id!r}", remedy=f"Say more of it: {found[0]!r}."
            )
        raise NotFound(
            f"no trace {id!r} is remembered",
            remedy="host.telemetry.traces() lists those that are: of the last 10,000 events, and only what is sampled.",
        )

    def _last(self) -> Trace:
        traces = map(self._trace, self._events)
        first = next(traces, None)
        if first is None:
            raise NotFound(
                "no trace is remembered",
                remedy="Run a command first; host.telemetry.sampling and .disabled say what is not recorded.",
            )
        if first.complete:
            return first
        return next((trace for trace in traces if trace.complete), first)

    def _trace(self, id: str) -> Trace:
        made = self._made.get(id)
        if made is None:
            made = self._made[id] = Trace(id, self._events[id])
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._events)

    def __len__(self) -> int:
        return len(self._events)

    def __contains__(self, id: object) -> bool:
        return id in self._events

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        rows = [_row(trace) for trace in map(self._trace, list(self._events)[:SHOWN])]
        if len(self) > SHOWN:
            rows.append([f"… {len(self) - SHOWN:,} more", "", "", "", "", "", ""])
        return ["trace", "what", "session", "began", "spans", "duration", "error"], rows

    def frame(self, library: str = "pandas") -> Any:
        """A data frame of pandas or polars, a row for each trace, newest first; `start` in UTC, `duration` in ns.

        Raises:
            ModuleNotFoundError: the library is not installed.
            ValueError: it is neither pandas nor polars.
        """
        rows: list[dict[str, Any]] = [
            {
                "trace_id": trace.id,
                "subject": trace.subject,
                "session": trace.session or None,
                "start": trace.start,
                "duration": trace.duration,
                "spans": len(trace.spans),
                "error": trace.error,
            }
            for trace in self.values()
        ]
        return _frame(rows, library)


def _row(trace: Trace) -> list[str]:
    took = "open" if trace.duration is None else duration(trace.duration)
    began = time.strftime("%H:%M:%S", time.localtime(trace.start // 1_000_000_000))
    return [trace.short_id, trace.subject, trace.session, began, f"{len(trace.spans):,}", took, trace.error or ""]


def _frame(rows: list[dict[str, Any]], library: str) -> Any:
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    return frame_of(columns, library, {"start": "time", "duration": "integer"})
