"""From events to the spans of one trace: a tree that loses nothing, whatever part of the events there is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from bridge_kernel.contract.telemetry import Scalar

from ...display import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from bridge_kernel.contract.telemetry import Event

__all__ = ("Missing", "Span", "short_kernel", "spans_of")

MOST_NS: Final = 2**62  # no clock shows more before the year 2116

Missing = Literal["start", "parent"]

_LASTS: Final = ("start", "stop", "exception")
_ROUTE: Final = ("bridge", "pool", "route")
_IDS: Final = frozenset({"trace_id", "span_id", "parent_span_id"})
_TIMES: Final = frozenset({"system_time", "duration"})


class Span(msgspec.Struct, frozen=True, eq=False):
    """A part of a trace, with its parts. Times in ns; `start` since the epoch.

    `kind` is the event's: `command`, `queue`, `execution`, `callback`, `tool`, `instance`, `span`, `dspy.module`,
    `dspy.lm`, …; `name` is what people call it. `parent` is the span that it said to be part of. An open span, or
    one whose end was never told, has no `duration`. `missing` says what of it is not among the events: its
    "start", which is then estimated, or its "parent", in whose place another stands or none.
    """

    name: str
    kind: str
    span_id: str
    parent: str | None
    start: int
    duration: int | None
    error: str | None
    attributes: dict[str, Scalar]
    children: tuple[Span, ...] = ()
    missing: tuple[Missing, ...] = ()

    @property
    def end(self) -> int | None:
        return None if self.duration is None else self.start + self.duration

    def walk(self) -> Iterator[Span]:
        """This span and all beneath it, each before its parts."""
        waiting = [self]
        while waiting:  # not by recursion: spans may be nested deeper than Python's stack
            span = waiting.pop()
            yield span
            waiting.extend(reversed(span.children))

    def __repr__(self) -> str:
        state = "open" if self.duration is None else f"{self.duration / 1e6:.3f} ms"
        failed = f", {self.error}" if self.error else ""
        return f"<Span {self.name!r}: {state}{failed}, {len(self.children)} children>"


class _Draft:
    """A span whose events are still being put together."""

    __slots__ = (
        "above",
        "attempt",
        "children",
        "duration",
        "ended",
        "error",
        "kind",
        "missing",
        "numbers",
        "order",
        "parent",
        "said",
        "span_id",
        "start",
    )

    def __init__(self, kind: str, span_id: str, parent: str | None, order: int) -> None:
        self.kind = kind
        self.span_id = span_id
        self.parent = parent
        self.order = order
        self.start: int | None = None
        self.duration: int | None = None
        self.ended = False
        self.error: str | None = None
        self.said: dict[str, Scalar] = {}
        self.numbers: dict[str, int | float] = {}
        self.attempt: float = math.inf
        self.above: _Draft | None = None
        self.children: list[_Draft] = []
        self.missing: list[Missing] = []

    def take(self, event: Event) -> None:
        """Take its start or its end; of several the first counts."""
        metadata, measurements = event.metadata, event.measurements
        if event.name[-1] == "start":
            self.said = {**metadata, **self.said}
            if self.start is None:
                self.start = _nanoseconds(measurements.get("system_time"))
            return
        self.said = {**self.said, **metadata}
        self.numbers |= {name: number for name, number in measurements.items() if name not in _TIMES}
        if not self.ended:
            self.ended = True
            self.duration = max(_nanoseconds(measurements.get("duration")) or 0, 0)
            if event.name[-1] == "exception":
                self.error = str(metadata.get("error") or "error")

    @property
    def end(self) -> int | None:
        return None if self.start is None or self.duration is None else self.start + self.duration

    @property
    def lost(self) -> bool:
        """Whether it is the host's word on a run whose kernel died: kernels say how long it was queued, the host cannot."""
        return (
            self.kind == "execution" and self.start is None and self.error is not None and "queue" not in self.numbers
        )


def spans_of(events: Iterable[Event]) -> tuple[Span, ...]:
    """The spans that are part of no other, by their start, with all that is beneath them. All events of one trace."""
    drafts, queues = _collect(events)
    _end_lost(drafts)
    everything = [*drafts.values(), *(queue for of_one in queues.values() for queue in of_one)]
    _place_queues(drafts, queues)
    roots = _tree(everything, drafts)
    ordered = _from_roots(everything, roots)
    _estimate_starts(ordered, roots)
    return _build(ordered, roots)


def _collect(events: Iterable[Event]) -> tuple[dict[str, _Draft], dict[str, list[_Draft]]]:
    """Spans by id, and the waits for a kernel by the command that waited."""
    drafts: dict[str, _Draft] = {}
    queues: dict[str, list[_Draft]] = {}
    for order, event in enumerate(events):
        name, metadata = event.name, event.metadata
        parent = metadata.get("parent_span_id")
        above = parent if isinstance(parent, str) else None
        if name == _ROUTE:
            queue = _Draft("queue", "", above, order)
            queue.ended = True
            queue.duration = max(_nanoseconds(event.measurements.get("queue")) or 0, 0)
            given = _nanoseconds(event.measurements.get("system_time"))
            queue.start = None if given is None else given - queue.duration
            queue.said = dict(metadata)
            queues.setdefault(above or "", []).append(queue)
            continue
        span_id = metadata.get("span_id")
        # An event of the user's own may be called anything, and says in which span it was emitted.
        if len(name) < 2 or name[-1] not in _LASTS or name[:2] == ("bridge", "user") or not isinstance(span_id, str):
            continue
        draft = drafts.get(span_id)
        if draft is None:
            middle = name[1:-1] if name[0] == "bridge" else name[:-1]
            draft = drafts[span_id] = _Draft(".".join(middle) or name[0], span_id, above, order)
        draft.take(event)
    return drafts, queues


def _end_lost(drafts: dict[str, _Draft]) -> None:
    """A run whose kernel died is ended by the host, under another id: put the two together."""
    running: dict[tuple[object, ...], list[_Draft]] = {}
    for draft in drafts.values():
        if draft.kind == "execution":
            attempt = draft.said.get("attempt")
            draft.attempt = attempt if isinstance(attempt, int | float) else math.inf
            if not draft.ended and draft.start is not None:
                running.setdefault(_run(draft), []).append(draft)
    for lost in [draft for draft in drafts.values() if draft.lost]:
        if begun := running.get(_run(lost)):
            draft = begun.pop()
            draft.ended, draft.duration, draft.error = True, lost.duration, lost.error
            draft.said = {
                **lost.said,
                **draft.said,
                **{name: lost.said[name] for name in ("success", "error") if name in lost.said},
            }
            del drafts[lost.span_id]


def _run(draft: _Draft) -> tuple[object, ...]:
    return draft.parent, draft.said.get("kernel"), draft.said.get("attempt")


def _place_queues(drafts: dict[str, _Draft], queues: dict[str, list[_Draft]]) -> None:
    """When each wait for a kernel was: it ended when its run was sent there."""
    runs: dict[str | None, list[_Draft]] = {}
    for draft in drafts.values():
        if draft.kind == "execution":
            runs.setdefault(draft.parent, []).append(draft)
    for command, waits in queues.items():
        above = drafts.get(command)
        now = above.start if above is not None else None
        left = sorted(
            runs.get(command, ()),
            key=lambda run: (run.attempt, math.inf if run.start is None else run.start, run.order),
        )
        for number, queue in enumerate(waits, start=1):
            assert queue.duration is not None
            run = next((run for run in left if run.said.get("kernel") == queue.said.get("kernel")), None)
            if queue.start is None and now is not None:
                queue.start = now
            elif queue.start is None and run is not None and run.start is not None:
                queue.start = run.start - queue.duration
            queue.attempt = number
            now = queue.end
            if run is not None:
                left.remove(run)
                queue.attempt = run.attempt
                if run.start is None:
                    run.start = queue.end
                now = run.end


def _tree(everything: Sequence[_Draft], drafts: dict[str, _Draft]) -> list[_Draft]:
    """Hang each beneath its parent; those without one are returned."""
    commands = {
        draft.said["command_id"]: draft
        for draft in drafts.values()
        if draft.kind == "command" and "command_id" in draft.said
    }
    runs: dict[str | None, list[_Draft]] = {}
    for draft in drafts.values():
        if draft.kind == "execution":
            runs.setdefault(draft.parent, []).append(draft)
    roots: list[_Draft] = []
    for draft in everything:
        above = None if draft.parent is None else drafts.get(draft.parent)
        if draft.parent is not None and above is None:
            draft.missing.append("parent")
            # A tool knows for which command it runs, even if the callback is lost that called it.
            command = None if draft.kind == "command" else commands.get(draft.said.get("command_id"))
            if command is not None:
                above = _run_at(draft.start, runs.get(command.span_id, ())) or command
        draft.above = above
        (roots if above is None else above.children).append(draft)
    return roots


def _run_at(moment: int | None, runs: Iterable[_Draft]) -> _Draft | None:
    """The last of the runs that had begun then."""
    begun = [run for run in runs if moment is not None and run.start is not None and run.start <= moment]
    return max(begun, key=lambda run: (run.start or 0, run.order), default=None)


def _from_roots(everything: Sequence[_Draft], roots: list[_Draft]) -> list[_Draft]:
    """All of them, each after its parent. What is part of itself by some detour becomes a root, marked."""
    ordered: list[_Draft] = []
    seen: set[int] = set()

    def descend(root: _Draft) -> None:
        waiting = [root]
        while waiting:
            draft = waiting.pop()
            if id(draft) in seen:
                continue
            seen.add(id(draft))
            ordered.append(draft)
            waiting.extend(draft.children)

    for root in roots:
        descend(root)
    for draft in everything:
        if id(draft) not in seen:
            assert draft.above is not None
            draft.above.children.remove(draft)
            draft.missing.append("parent")
            roots.append(draft)
            descend(draft)
    return ordered


def _estimate_starts(ordered: list[_Draft], roots: list[_Draft]) -> None:
    """Give those a start whose beginning was not told: that of what is first beneath them, else of what is above."""
    known = [draft.start for draft in ordered if draft.start is not None]
    first = min(known, default=0)
    for draft in reversed(ordered):
        if draft.start is None:
            draft.missing.append("start")
            draft.start = min((child.start for child in draft.children if child.start is not None), default=None)
    for root in roots:
        if root.start is None:
            root.start = first
    for draft in ordered:
        for child in draft.children:
            if child.start is None:
                child.start = draft.start


def _build(ordered: list[_Draft], roots: list[_Draft]) -> tuple[Span, ...]:
    built: dict[int, Span] = {}
    for draft in reversed(ordered):
        by_attempt = draft.kind == "command"  # not by start: clocks of several kernels may differ
        draft.children.sort(key=lambda child: _rank(child, by_attempt=by_attempt))
        children = tuple(built[id(child)] for child in draft.children)
        said: dict[str, Scalar] = {name: value for name, value in draft.said.items() if name not in _IDS}
        assert draft.start is not None
        built[id(draft)] = Span(
            _name(draft.kind, draft.said),
            draft.kind,
            draft.span_id,
            draft.parent,
            draft.start,
            draft.duration,
            draft.error,
            {**draft.numbers, **said},
            children,
            tuple(draft.missing),
        )
    roots.sort(key=lambda root: _rank(root, by_attempt=False))
    return tuple(built[id(root)] for root in roots)


def _rank(draft: _Draft, *, by_attempt: bool) -> tuple[float, bool, int, int]:
    start = draft.start or 0
    if by_attempt:
        return draft.attempt, draft.kind != "queue", start, draft.order
    return 0, False, start, draft.order


def _nanoseconds(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -MOST_NS < value < MOST_NS:
        return None
    return int(value)


# -- names -------------------------------------------------------------------------


def short_kernel(kernel: object) -> str:
    """A kernel's id as people read it."""
    return str(kernel)[:4]


def _name(kind: str, said: dict[str, Scalar]) -> str:
    """What people call it."""

    def word(name: str, otherwise: str = "") -> str:
        value = said.get(name)
        return otherwise if value is None or value == "" else str(value)

    subject = word("subject", word("command", "command"))
    match kind:
        case "command":
            name = f"host: {subject}"
        case "execution":
            attempt = said.get("attempt")
            again = f" (attempt {attempt})" if isinstance(attempt, int) and attempt > 1 else ""
            name = f"kernel {short_kernel(word('kernel', '?'))}: {subject}{again}"
        case "callback":
            name = f"callback {word('method')} {word('about')}"
        case "tool":
            name = f"tool {word('tool')}"
        case "dspy.tool":
            name = f"dspy.Tool {word('tool')}"
        case "instance":
            name = f"{word('action')} {word('class')}"
        case "span":
            name = word("name", "span")
        case "dspy.module":
            name = _of_dspy(word("module", "module"))
        case "dspy.lm":
            name = f"LM {word('model')}"
        case "dspy.adapter":
            name = f"{word('adapter')} {word('action')}"
        case "dspy.evaluate":
            name = f"evaluate {word('metric')}"
        case "dspy.optimizer":
            name = f"{_of_dspy(word('optimizer', 'optimizer'))} compile"
        case _:
            name = kind
    return one_line(name.strip()) or kind


def _of_dspy(cls: str) -> str:
    return cls if "." in cls else f"dspy.{cls}"
