"""What a waterfall shows of a trace: its rows, with what is too much for one summed up."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

from bridge_kernel.contract.line import duration, quantity

from ...display import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .assembly import Span
    from .trace import Trace

__all__ = ("COLOURS", "ERROR_COLOUR", "Row", "Waterfall", "colour_of")

FOLD_FROM: Final = 9
"""So many of one name beneath one span, or more, are summed up but for `FOLD_TO` of them."""
FOLD_TO: Final = 4
SHORTEST_QUEUE: Final = 100_000  # ns: a command that did not wait needs no row to say so
MAX_ERROR: Final = 60
ELSEWHERE: Final = "⋯"
MAX_BARS: Final = 500
"""In one row: what is closer together than this share of the trace nobody could tell apart."""

# Okabe and Ito's, which colour-blind people can tell apart: https://jfly.uni-koeln.de/color/. Vermillion is for errors.
COLOURS: Final[dict[str, str]] = {
    "command": "#0072B2",
    "queue": "#999999",
    "execution": "#56B4E9",
    "callback": "#F0E442",
    "tool": "#009E73",
    "dspy": "#CC79A7",
    "LM": "#E69F00",
    "span": "#666666",
    "instance": "#BFBFBF",
    "other": "#BFBFBF",
}
ERROR_COLOUR: Final = "#D55E00"


def colour_of(kind: str) -> str:
    """Which of `COLOURS` a span of this kind has."""
    if kind == "dspy.lm":
        return "LM"
    if kind == "dspy.tool":
        return "tool"
    if kind.startswith("dspy."):
        return "dspy"
    return kind if kind in COLOURS else "other"


class Row(NamedTuple):
    """One row. `bars` are (begin, end) in ns since the trace's start, within its duration."""

    label: str
    depth: int
    kind: str
    bars: tuple[tuple[int, int], ...]
    took: str
    """Its duration as people read it, and what else there is to say of it."""
    error: str = ""
    open: bool = False
    summed: bool = False

    @property
    def told(self) -> str:
        """What stands beside the bar."""
        return f"{self.took}  ✗ {self.error}" if self.error else self.took


class _Sum(NamedTuple):
    """Spans of one name beneath one span, in one row."""

    spans: tuple[Span, ...]


class Waterfall:
    """At most `most` rows (1 or more) of a trace, each before its parts."""

    def __init__(self, trace: Trace, most: int) -> None:
        self.trace = trace
        self.length = max(trace.end - trace.start, 1)
        self.orphans = False
        self.lost = False
        laid_out = list(self._laid_out())
        hidden = _hidden(laid_out, _chosen([depth for _, depth, _ in laid_out], max(most, 1)))
        self.rows = [self._row(*one, hidden[i]) for i, one in enumerate(laid_out) if i in hidden]
        self.left_out = hidden[None]

    # -- what is shown -----------------------------------------------------------

    def _laid_out(self) -> Iterator[tuple[Span | _Sum, int, int | None]]:
        """Spans and sums with their depths, each before its parts; the last is when what it is part of ended."""
        waiting: list[tuple[Span | _Sum, int, int | None]] = [
            (one, 0, None) for one in reversed(_folded(self.trace.roots))
        ]
        while waiting:
            one, depth, until = waiting.pop()
            yield one, depth, until
            if not isinstance(one, _Sum):
                inner = until if one.end is None else one.end
                waiting.extend((child, depth + 1, inner) for child in reversed(_folded(one.children)))

    # -- rows --------------------------------------------------------------------

    def _row(self, one: Span | _Sum, depth: int, until: int | None, hidden: int) -> Row:
        if isinstance(one, _Sum):
            return self._sum_row(one.spans, depth)
        label = one.name
        if "parent" in one.missing:
            self.orphans = True
            label = f"{ELSEWHERE} {label}"
        if hidden:
            label = f"{label} (+{quantity(hidden, 'span')})"
        start, end = one.start, one.end
        if end is None:
            end = self.trace.end if until is None else until
            ended = until is not None or self.trace.complete
            self.lost = self.lost or ended
            took = "never ended" if ended else "still open"
        else:
            took = duration(end - start)
            if "start" in one.missing:
                took = f"{took}, begun unseen"
        error = one_line(one.error or "")
        error = error if len(error) <= MAX_ERROR else f"{error[: MAX_ERROR - 1]}…"
        return Row(label, depth, one.kind, (self._within(start, end),), took, error, open=one.end is None)

    def _sum_row(self, spans: Sequence[Span], depth: int) -> Row:
        total = sum(span.duration or 0 for span in spans)
        failed = sum(1 for span in spans if span.error is not None)
        beneath = sum(1 for span in spans for _ in span.walk()) - len(spans)
        took = f"{duration(total)} in all"
        if beneath:
            took = f"{took}, {quantity(beneath, 'span')} beneath"
        bars = tuple(self._within(span.start, span.start if span.end is None else span.end) for span in spans)
        label = f"… {len(spans):,} more {_group(spans[0])[1]}"
        return Row(
            label,
            depth,
            spans[0].kind,
            _joined(bars, self.length // MAX_BARS),
            took,
            f"{failed:,} failed" if failed else "",
            summed=True,
        )

    def _within(self, start: int, end: int) -> tuple[int, int]:
        """Clipped: another machine's clock may say that a part was before or after the whole."""
        begin = min(max(start - self.trace.start, 0), self.length)
        return begin, min(max(end - self.trace.start, begin), self.length)

    # -- words -------------------------------------------------------------------

    @property
    def title(self) -> str:
        trace = self.trace
        said = [trace.subject, "still open" if trace.duration is None else duration(trace.duration)]
        said.append(quantity(len(trace.spans), "span"))
        if trace.session:
            said.append(f"session {trace.session}")
        if trace.error:
            said.append(f"✗ {trace.error}")
        return one_line(" · ".join(said))

    @property
    def notes(self) -> list[str]:
        """What else there is to know."""
        notes = []
        if self.left_out > 0:
            notes.append(f"… {quantity(self.left_out, 'span')} more")
        if self.orphans:
            notes.append(f"{ELSEWHERE} part of a span that is not remembered here")
        if self.lost:
            notes.append("never ended: its kernel died, or the event was dropped")
        if self.trace.dropped:
            notes.append(
                f"{quantity(self.trace.dropped, 'event')} dropped: a command emitted more at once than are kept"
            )
        return notes

    @property
    def kinds(self) -> list[str]:
        """The colours' names that are used, in their order."""
        used = {colour_of(row.kind) for row in self.rows}
        return [name for name in COLOURS if name in used]


def _chosen(depths: Sequence[int], most: int) -> set[int]:
    """Which rows are shown: all down to the depth to which all fit, and the first ones beneath."""
    at = Counter(depths)
    depth, shown = 0, 0
    while at[depth] and shown + at[depth] <= most:
        shown += at[depth]
        depth += 1
    deepest = [i for i, one in enumerate(depths) if one == depth]
    return {*(i for i, one in enumerate(depths) if one < depth), *deepest[: most - shown]}


def _hidden(laid_out: Sequence[tuple[Span | _Sum, int, int | None]], chosen: set[int]) -> dict[int | None, int]:
    """How many spans are not shown, by the row beneath which they would be; None: beneath none."""
    hidden: dict[int | None, int] = {None: 0}
    above: list[tuple[int, int]] = []  # rows that are shown, with their depths
    for i, (one, depth, _) in enumerate(laid_out):
        while above and above[-1][1] >= depth:
            above.pop()
        if i in chosen:
            hidden[i] = 0
            above.append((i, depth))
        else:
            spans = sum(1 for span in one.spans for _ in span.walk()) if isinstance(one, _Sum) else 1
            hidden[above[-1][0] if above else None] += spans
    return hidden


def _group(span: Span) -> tuple[str, str]:
    """What is summed up with what: callbacks by their method, whatever it is about."""
    if span.kind == "callback":
        return span.kind, one_line(str(span.attributes.get("method") or span.name))
    return span.kind, span.name


def _folded(spans: Sequence[Span]) -> list[Span | _Sum]:
    """Of many of one name the failed and the longest are shown, the others in one row after them."""
    spans = [span for span in spans if span.kind != "queue" or (span.duration or 0) >= SHORTEST_QUEUE]
    if len(spans) < FOLD_FROM:
        return list(spans)
    groups: dict[tuple[str, str], list[Span]] = {}
    for span in spans:
        groups.setdefault(_group(span), []).append(span)
    hidden: dict[int, None] = {}
    after: dict[int, _Sum] = {}
    for group in groups.values():
        if len(group) < FOLD_FROM:
            continue
        worst = sorted(range(len(group)), key=lambda i: (group[i].error is None, -(group[i].duration or 0), i))
        kept = sorted(worst[:FOLD_TO])
        others = tuple(group[i] for i in sorted(worst[FOLD_TO:]))
        hidden.update((id(span), None) for span in others)
        after[id(group[kept[-1]])] = _Sum(others)
    shown: list[Span | _Sum] = []
    for span in spans:
        if id(span) not in hidden:
            shown.append(span)
            if id(span) in after:
                shown.append(after[id(span)])
    return shown


def _joined(bars: Iterable[tuple[int, int]], gap: int) -> tuple[tuple[int, int], ...]:
    """The same without overlaps, and without gaps of `gap` or less."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(bars):
        if joined and begin <= joined[-1][1] + gap:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return tuple(joined)
