"""Traces: put together from any part of their events, drawn, and whole through hosts, kernels, tools and retries."""

from __future__ import annotations

import asyncio
import builtins
import itertools
import sys
from collections import Counter
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.cells import cell_len

from bridge_host import AsyncHost, Host
from bridge_host.telemetry.traces.trace import Trace, Traces
from bridge_host.telemetry.traces.waterfall import Waterfall
from bridge_kernel.contract.catalogue import problem
from bridge_kernel.contract.errors import NotFound
from bridge_kernel.contract.telemetry import Event
from conftest import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bridge_host import Session
    from bridge_host.telemetry import Telemetry
    from bridge_host.telemetry.traces.trace import Span

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
T0 = 1_790_000_000_000_000_000
MS = 1_000_000
HERE, THERE = "3f2a" * 8, "91bc" * 8  # two kernels


class Story:
    """Writes the events of a trace, in ms since its beginning."""

    def __init__(self, trace: str = TRACE) -> None:
        self.trace = trace
        self.events: list[Event] = []
        self._ids = itertools.count(1)

    def tell(self, name: tuple[str, ...], measurements: dict[str, Any], metadata: dict[str, Any]) -> None:
        self.events.append(Event(name, measurements, metadata))

    def span(
        self, kind: str, parent: str | None, start: float, took: float | None, error: str | None = None, **said: Any
    ) -> str:
        name, id = ("bridge", *kind.split(".")), f"{next(self._ids):016x}"
        said = {"session": "s", **said, "trace_id": self.trace, "span_id": id, "parent_span_id": parent}
        if kind in ("execution", "callback"):
            said = {"command": "function.call", "subject": "f", **said}
        self.tell((*name, "start"), {"system_time": T0 + round(start * MS)}, said)
        if took is not None:
            if kind == "execution":
                said = {**said, "success": error is None, "error": error}
            elif error is not None:
                said = {**said, "error": error}
            more = {"execution": {"queue": 5}, "command": {"attempts": 1}}.get(kind, {})
            measured = {"duration": round(took * MS), **more}
            self.tell((*name, "stop" if error is None else "exception"), measured, said)
        return id

    def command(self, parent: str | None, start: float, took: float | None, id: str = "c1", **said: Any) -> str:
        return self.span("command", parent, start, took, command="function.call", subject="f", command_id=id, **said)

    def route(self, command: str, waited: float, kernel: str) -> None:
        said = {"kernel": kernel, "strategy": "fastest", "subject": "f", "session": "s"}
        said |= {"trace_id": self.trace, "parent_span_id": command}
        numbers = {"queue": round(waited * MS), "candidates": 2, "expected": 0}
        self.tell(("bridge", "pool", "route"), numbers, said)

    def lost(self, command: str, took: float, kernel: str, attempt: int = 1) -> str:
        id = f"{next(self._ids):016x}"
        said: dict[str, Any] = {"kernel": kernel, "attempt": attempt}
        said |= {"command": "function.call", "subject": "f", "session": "s"}
        said |= {"trace_id": self.trace, "span_id": id, "parent_span_id": command}
        said |= {"success": False, "error": "bridge.KernelDied"}
        self.tell(("bridge", "execution", "exception"), {"duration": round(took * MS)}, said)
        return id

    def whole(self) -> Trace:
        return Trace(self.trace, self.events)


def retried() -> Story:
    """A span, in it a command whose first kernel dies in a tool, then a nested command; 500 readings at its end."""
    story = Story()
    root = story.span("span", None, 0, 300, name="import", rows=3)
    command = story.command(root, 1, 298)
    story.route(command, 4, HERE)
    first = story.span("execution", command, 6, None, kernel=HERE, attempt=1)
    asked = story.span("callback", first, 10, None, kernel=HERE, attempt=1, method="tool.call", about="ask")
    tool = story.span("tool", asked, 11, 80, tool="ask", command_id="c1")
    story.lost(command, 50, HERE)
    story.route(command, 2, THERE)
    second = story.span("execution", command, 60, 230, error="ValueError", kernel=THERE, attempt=2)
    story.span("callback", second, 70, 15, kernel=THERE, attempt=2, method="tool.call", about="ask")
    nested = story.command(tool, 15, 60, id="c2")
    story.route(nested, 1, THERE)
    inner = story.span("execution", nested, 17, 55, kernel=THERE, attempt=1)
    story.span("span", inner, 18, 2, name="part 答え $x$\n", kernel=THERE, attempt=1)
    for n in range(500):
        story.span("callback", second, 90 + n / 5, 0.1, method="session.get", about=f"v{n}", kernel=THERE, attempt=2)
    return story


def tree(spans: tuple[Span, ...]) -> Any:
    return [(span.name, tree(span.children)) if span.children else span.name for span in spans]


def named(trace: Trace, name: str) -> Span:
    found = [span for span in trace.spans if span.name == name]
    assert len(found) == 1, f"{len(found)} spans are named {name!r} in\n{trace.text(120)}"
    return found[0]


# -- putting together ------------------------------------------------------------


def test_the_stories_told_here_are_as_the_catalogue_says() -> None:
    assert {problem(event) for event in retried().events} == {None}


def test_spans_are_a_tree_with_their_times_names_errors_and_what_was_said_of_them() -> None:
    trace = retried().whole()
    (root,) = trace.roots
    assert (root.name, root.kind, root.start, root.duration, root.end) == (
        "import",
        "span",
        T0,
        300 * MS,
        T0 + 300 * MS,
    )
    assert root.attributes["rows"] == 3
    (command,) = root.children
    assert [child.name for child in command.children] == [
        "queue",
        "kernel 3f2a: f",
        "queue",
        "kernel 91bc: f (attempt 2)",
    ]
    second = command.children[3]
    assert (second.error, second.attributes["queue"], len(second.children)) == ("ValueError", 5, 501)
    assert [child.start for child in second.children] == sorted(child.start for child in second.children)
    assert (trace.subject, trace.session, trace.complete, trace.duration) == ("import", "s", True, 300 * MS)


def test_a_run_whose_kernel_died_is_ended_by_the_host() -> None:
    command = retried().whole().roots[0].children[0]
    queue, died, again, _ = command.children
    assert (died.duration, died.error, died.attributes["success"]) == (50 * MS, "bridge.KernelDied", False)
    assert (queue.start, queue.duration) == (command.start, 4 * MS)
    assert (again.start, again.duration) == (died.end, 2 * MS)


def test_a_run_of_which_its_kernel_could_tell_nothing_stands_for_itself_after_its_wait() -> None:
    story = Story()
    command = story.command(None, 0, 100)
    story.route(command, 3, HERE)
    lost = story.lost(command, 40, HERE)
    trace = story.whole()
    queue, died = trace.roots[0].children
    assert (died.span_id, died.start, died.duration, died.missing) == (lost, queue.end, 40 * MS, ())


def test_another_attempts_run_is_not_ended_by_a_death() -> None:
    story = Story()
    command = story.command(None, 0, None)
    story.span("execution", command, 60, None, kernel=THERE, attempt=2)
    story.lost(command, 50, HERE, attempt=1)
    assert [(child.error, child.duration) for child in story.whole().roots[0].children] == [
        ("bridge.KernelDied", 50 * MS),
        (None, None),
    ]


def test_what_lost_its_parent_hangs_at_the_root_and_is_marked() -> None:
    story = Story()
    story.command(None, 0, 100)
    story.span("callback", "f" * 16, 10, 5, method="session.get", about="x")
    trace = story.whole()
    assert [(root.name, root.missing) for root in trace.roots] == [
        ("host: f", ()),
        ("callback session.get x", ("parent",)),
    ]
    assert trace.root is trace.roots[0]
    assert "⋯ callback session.get x" in trace.text()
    assert "not remembered here" in trace.text()


def test_a_tool_whose_callback_is_lost_hangs_beneath_the_run_that_called_it() -> None:
    story = Story()
    command = story.command(None, 0, 100)
    story.span("execution", command, 5, 20, error="bridge.KernelDied", kernel=HERE, attempt=1)
    story.span("execution", command, 40, 60, kernel=THERE, attempt=2)
    story.span("tool", "f" * 16, 10, 5, tool="ask", command_id="c1")
    first, second = story.whole().roots[0].children
    assert [child.name for child in first.children] == ["tool ask"]
    assert second.children == ()


def test_events_of_the_users_own_are_no_spans_whatever_they_are_called() -> None:
    story = Story()
    command = story.command(None, 0, 100)
    run = story.span("execution", command, 5, 20, kernel=HERE, attempt=1)
    said = {"trace_id": TRACE, "span_id": run, "parent_span_id": command, "kernel": HERE}
    for last in ("start", "stop", "exception"):
        story.tell(("bridge", "user", last), {"duration": 1, "system_time": 1}, said)
    story.events.reverse()
    (found,) = story.whole().roots[0].children
    assert (found.kind, found.start, found.duration, found.error) == ("execution", T0 + 5 * MS, 20 * MS, None)


def test_a_span_whose_beginning_was_forgotten_begins_with_what_is_in_it() -> None:
    story = Story()
    command = story.command(None, 0, 100)
    run = story.span("execution", command, 5, 20, kernel=HERE, attempt=1)
    story.span("callback", run, 8, 1, method="session.get", about="x")
    trace = Trace(TRACE, [event for event in story.events if event.name != ("bridge", "execution", "start")])
    found = named(trace, "kernel 3f2a: f")
    assert (found.start, found.missing, found.error) == (T0 + 8 * MS, ("start",), None)
    assert "begun unseen" in trace.text(120)


def test_a_kernel_with_another_clock_is_clipped_into_view_and_keeps_its_place() -> None:
    story = Story()
    command = story.command(None, 0, 100)
    story.route(command, 1, HERE)
    story.span("execution", command, -3_600_000, 50, error="bridge.KernelDied", kernel=HERE, attempt=1)
    story.route(command, 1, THERE)
    story.span("execution", command, 30, 50, kernel=THERE, attempt=2)
    trace = story.whole()
    assert [child.attributes.get("attempt", "-") for child in trace.roots[0].children] == ["-", 1, "-", 2]
    assert (trace.start, trace.duration) == (T0, 100 * MS)
    assert "100 ms" in trace.text().splitlines()[1]


def test_spans_nested_deeper_than_pythons_stack_are_put_together_drawn_and_dropped() -> None:
    story, parent = Story(), None
    for depth in range(1500):
        parent = story.span("span", parent, depth / 100, 50, name=f"level {depth}")
    trace = story.whole()
    assert len(trace.spans) == 1500
    assert "level 0" in trace.text()
    assert len(trace.frame()) == 1500
    assert "1 children" in repr(trace.roots[0])


STORY = retried()
FEW = [event for event in STORY.events if not str(event.metadata.get("about", "")).startswith("v")]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(range(len(FEW))), unique=True), st.integers(-5, 200), st.integers(-1, 40))
def test_no_part_and_no_order_of_the_events_loses_a_span_or_stops_the_drawing(
    which: list[int], width: int, rows: int
) -> None:
    events = [FEW[i] for i in which]
    trace = Trace(TRACE, events)
    told = {event.metadata["span_id"] for event in events if event.name[-1] in ("start", "stop", "exception")}
    found = Counter(span.span_id for span in trace.spans)
    waits = found.pop("", 0)
    assert waits == sum(event.name == ("bridge", "pool", "route") for event in events)
    assert all(count == 1 for count in found.values())
    deaths = {
        event.metadata["span_id"]
        for event in events
        if event.name[1:] == ("execution", "exception") and "queue" not in event.measurements
    }
    assert set(found) <= told
    assert told - set(found) <= deaths  # the host's word on a death is part of the run that it ended
    assert all(cell_len(line) <= max(width, 40) for line in trace.text(width, rows).splitlines())
    trace.html(rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.none() | st.integers(0, 9)), max_size=16))
def test_spans_that_say_to_be_part_of_each_other_are_all_there(links: list[tuple[int, int | None]]) -> None:
    events = [
        Event(
            ("bridge", "span", "start"),
            {"system_time": T0},
            {
                "trace_id": TRACE,
                "span_id": f"{id}",
                "parent_span_id": None if above is None else f"{above}",
                "name": "x",
            },
        )
        for id, above in links
    ]
    trace = Trace(TRACE, events)
    assert sorted(span.span_id for span in trace.spans) == sorted({f"{id}" for id, _ in links})
    trace.text()


def test_a_time_that_no_clock_shows_is_none() -> None:
    for time in (6.8e25, 2**80, -(2**80), float("inf")):
        traces = Traces(
            [Event(("bridge", "command", "start"), {"system_time": time}, {"trace_id": "a", "span_id": "b"})]
        )
        assert "a" in repr(traces)
        assert traces["a"].spans[0].duration is None


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.builds(
            Event,
            st.lists(st.sampled_from(["bridge", "span", "start", "stop", "x"]), max_size=4).map(tuple),
            st.dictionaries(st.sampled_from(["system_time", "duration"]), st.integers() | st.floats()),
            st.dictionaries(
                st.sampled_from(["trace_id", "span_id", "parent_span_id", "name", "kernel"]),
                st.none() | st.integers() | st.sampled_from(["a", "b", "\ud800\x1b[31m\u202e"]),
            ),
        ),
        max_size=6,
    )
)
def test_events_of_any_shape_are_drawn_or_left_out(events: list[Event]) -> None:
    traces = Traces(events)
    for trace in traces.values():
        assert "\x1b" not in trace.text()
        trace.html()
    repr(traces)


# -- drawing ---------------------------------------------------------------------


def test_hundreds_of_callbacks_are_summed_up_in_the_drawing_and_kept_in_the_data() -> None:
    trace = retried().whole()
    assert sum(span.attributes.get("method") == "session.get" for span in trace.spans) == 500
    drawn = trace.text(120)
    assert "… 496 more session.get" in drawn
    assert "49.6 ms in all" in drawn
    assert len(drawn.splitlines()) < 30


def test_what_is_summed_up_has_no_more_bars_than_can_be_told_apart() -> None:
    story = Story()
    root = story.span("span", None, 0, 3000, name="all")
    for number in range(3000):
        story.span("span", root, number, number + 0.5, name="one")
    trace = story.whole()
    (summed,) = [row for row in Waterfall(trace, 80).rows if row.summed]
    assert len(summed.bars) == 1
    assert len(trace.html()) < 10_000


def test_of_many_the_failed_and_the_longest_are_drawn() -> None:
    story = Story()
    root = story.span("span", None, 0, 1000, name="all")
    for n in range(100):
        story.span("span", root, n, 2, error="ValueError" if n == 40 else None, name="step", n=n)
    story.span("span", root, 500, 77, name="step")
    lines = story.whole().text(120).splitlines()
    assert sum("✗ ValueError" in line for line in lines) == 1
    assert any("77.0 ms" in line for line in lines)
    assert any("… 97 more step" in line and "194 ms in all" in line for line in lines)


def test_what_does_not_fit_is_left_out_by_depth_and_said() -> None:
    story = Story()
    root = story.span("span", None, 0, 1000, name="all")
    for n in range(20):
        middle = story.span("span", root, n, 10, name=f"middle {n}")
        story.span("span", middle, n, 5, name=f"inner {n}")
    drawn = story.whole().text(120, rows=30)
    assert len(drawn.splitlines()) == 2 + 30
    assert "middle 19 (+1 span)" in drawn
    assert "inner 8 " in drawn
    assert "inner 9 " not in drawn
    assert "… 22 spans more" in Trace(TRACE, [e for e in story.events if e.metadata["parent_span_id"]]).text(
        120, rows=9
    )


def test_an_open_span_is_said_to_be_open_and_one_whose_kernel_died_never_to_have_ended() -> None:
    story = Story()
    command = story.command(None, 0, None)
    story.span("execution", command, 5, None, kernel=HERE, attempt=1)
    assert not story.whole().complete
    assert story.whole().text().count("still open") == 3  # title, command, run
    assert "never ended" in retried().whole().text()


def test_the_text_has_a_bar_where_the_span_was() -> None:
    story = Story()
    root = story.span("span", None, 0, 100, name="all")
    story.span("span", root, 50, 50, name="late", error="ValueError")
    title, axis, whole, late = story.whole().text(80).splitlines()
    assert title == "trace 4bf92f3577b34da6 · all · 100 ms · 2 spans · session s"
    assert axis.split() == ["0", "100", "ms"]
    full = whole.count("█")
    assert "▒" * (full // 2) in late
    assert late.index("▒") - whole.index("█") == pytest.approx(full / 2, abs=1)
    assert late.endswith("✗ ValueError")


def test_the_plot_has_a_bar_for_each_row_on_an_axis_in_ms_and_names_as_they_are() -> None:
    figure = retried().whole().plot()
    assert isinstance(figure, Figure)
    assert repr(figure) == repr(retried().whole())
    _, page, bars = figure.axes
    texts = [text.get_text() for text in page.texts]
    assert any("part" in text and "$x$" in text for text in texts)
    assert "✗ bridge.KernelDied" in texts
    rows = len(retried().whole().text(120).splitlines()) - 3  # title, axis, a note
    assert len(bars.collections) == rows
    assert bars.get_xlim() == (0, 300)
    assert any(bar.get_hatch() for bar in bars.collections)


def test_any_trace_can_be_plotted(tmp_path: Any) -> None:
    for number, events in enumerate(([], FEW[::3], list(reversed(FEW)))):
        Trace(TRACE, events).plot().savefig(tmp_path / f"{number}.png", dpi=20)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_notebook_gets_the_plot_or_html_if_there_is_nothing_to_plot_with(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story()
    story.span("span", None, 0, 1, name="<script>alert(1)</script>")
    trace = story.whole()
    data, about = trace._repr_mimebundle_()
    assert sorted(data) == ["image/png", "text/plain"]
    assert about["image/png"]["width"] > about["image/png"]["height"] > 0
    monkeypatch.delitem(sys.modules, "bridge_host.telemetry.figures.picture")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    data = trace._repr_mimebundle_()
    assert sorted(data) == ["text/html", "text/plain"]
    read = _Tags()
    read.feed(data["text/html"])
    assert "<script>alert(1)</script>" in read.text
    assert read.tags["script"] == 0


def test_without_matplotlib_a_plot_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bridge_host.telemetry.figures.picture", raising=False)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"bridge-kernel\[plot\]"):
        retried().whole().plot()


# -- the table -------------------------------------------------------------------


def test_traces_are_a_mapping_newest_first_found_by_the_beginning_of_their_ids() -> None:
    stories = [Story(f"{n:x}" * 32) for n in (1, 2, 3)]
    stories[0].command(None, 0, 5)
    stories[1].command(None, 10, 5)
    stories[2].command(None, 20, None)
    traces = Traces(event for story in stories for event in story.events)
    assert [id[0] for id in traces] == ["3", "2", "1"]
    assert len(traces) == 3
    assert traces["1"] is traces["1" * 32]
    assert traces[None].id == "2" * 32  # the last that is complete
    assert Traces(stories[2].events)[None].id == "3" * 32
    for wrong in ("4", "", "1" * 33):
        with pytest.raises(NotFound, match="no trace"):
            traces[wrong]
    assert "4" not in traces
    assert traces.get("4") is None
    assert "3333333333333333" in repr(traces).splitlines()[1]
    assert "open" in repr(traces)


def test_the_beginning_of_several_ids_is_ambiguous() -> None:
    stories = [Story("ab" * 16), Story("ab" * 15 + "cd")]
    for story in stories:
        story.command(None, 0, 5)
    with pytest.raises(NotFound, match="2 traces have an id that begins with 'ab'"):
        Traces(event for story in stories for event in story.events)["ab"]


def test_a_trace_is_found_by_its_command_as_the_journal_has_it() -> None:
    with Host(live=False) as host:
        session = host.session()
        for number in (1, 4):
            session.call("math.sqrt", number)
        for journaled in host.journal():
            command = journaled.begun.id
            (said,) = {
                e.metadata["trace_id"] for e in host.telemetry.events() if e.metadata.get("command_id") == command
            }
            assert host.telemetry.trace(command).id == said
        with pytest.raises(TypeError, match="not 5"):
            host.telemetry.trace(5)  # type: ignore[arg-type]


def test_without_any_trace_the_remedy_says_why() -> None:
    with pytest.raises(NotFound, match="no trace is remembered") as caught:
        Traces([])[None]
    assert "sampling" in caught.value.remedy


def test_a_long_table_is_cut_and_says_so() -> None:
    events = []
    for n in range(100):
        story = Story(f"{n:032x}")
        story.command(None, n, 1)
        events += story.events
    lines = repr(Traces(events)).splitlines()
    assert len(lines) == 32
    assert lines[-1] == "… 70 more"


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_frame_has_a_row_for_each_span_in_utc_and_ns(library: str) -> None:
    trace = retried().whole()
    frame = trace.frame(library)
    assert len(frame) == len(trace.spans)
    assert list(frame["depth"])[:3] == [0, 1, 2]
    assert list(frame["offset"])[:2] == [0, MS]
    assert frame["start"][0].timestamp() == T0 / 1e9
    assert int(frame["duration"][0]) == 300 * MS
    table = Traces(retried().events).frame(library)
    assert list(table["spans"]) == [len(trace.spans)]
    assert isinstance(frame, pl.DataFrame) == (library == "polars")


def test_a_frame_of_another_library_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pandas.* or .*polars"):
        retried().whole().frame("excel")


# -- through hosts, kernels and tools --------------------------------------------


def shape(span: Span) -> Any:
    """Names beneath names, without the kernels' ids."""
    name = f"kernel: {span.name.split(': ', 1)[1]}" if span.kind == "execution" else span.name
    return {name: [shape(child) for child in span.children]} if span.children else name


def run_of(subject: str, *parts: Any) -> Any:
    """How a command looks: its wait, and its run with these parts."""
    run = f"kernel: {subject}"
    return {f"host: {subject}": ["queue", {run: list(parts)} if parts else run]}


GET = "callback session.get x"


def define(session: Any) -> None:
    """Functions of one session that call back in every way; `triple` is a tool that sends a command itself."""

    @session.function
    def inner(ctx, n):  # type: ignore[no-untyped-def]
        return n * ctx["x"]

    @session.function
    def outer(ctx, n):  # type: ignore[no-untyped-def]
        with ctx.span("part", n=n):
            return ctx.call_tool("triple", n=n)

    @session.function
    async def gathered(ctx):  # type: ignore[no-untyped-def]
        import asyncio

        async def one(i):  # type: ignore[no-untyped-def]
            with ctx.span(f"one {i}"):
                await asyncio.sleep(0)
                return await ctx.get_variable("x")

        with ctx.span("all"):
            return await asyncio.gather(*(one(i) for i in range(3)))  # type: ignore[no-untyped-call]

    @session.function
    def threaded(ctx):  # type: ignore[no-untyped-def]
        import contextvars
        import threading

        with ctx.span("around"):
            bare = threading.Thread(target=lambda: ctx["x"])
            within = threading.Thread(target=contextvars.copy_context().run, args=(lambda: ctx["x"],))
            for thread in (bare, within):
                thread.start()
                thread.join()

    @session.function
    def stream(ctx):  # type: ignore[no-untyped-def]
        for i in range(2):
            with ctx.span(f"item {i}"):
                yield ctx["x"]

    @session.function
    async def astream(ctx):  # type: ignore[no-untyped-def]
        for i in range(2):
            with ctx.span(f"item {i}"):
                yield await ctx.get_variable("x")


THROUGH_A_TOOL = run_of("outer", {"part": [{"callback tool.call triple": [{"tool triple": [run_of("inner", GET)]}]}]})


def test_a_trace_goes_from_host_to_kernel_to_tool_to_another_kernel_and_back(
    session: Session, shared_host: Host
) -> None:
    session["x"] = 3
    define(session)

    @session.tool
    def triple(n: int) -> int:
        return int(session.call("inner", n))

    with shared_host.telemetry.span("whole", rows=3) as span:
        assert session.call("outer", 5) == 15
    trace = shared_host.telemetry.trace(span.trace_id)
    assert [shape(root) for root in trace.roots] == [{"whole": [THROUGH_A_TOOL]}]
    assert trace.complete
    assert not any(span.missing or span.error for span in trace.spans)
    assert all(child.start >= one.start for one in trace.spans for child in one.children if child.kind != "queue")
    assert shared_host.telemetry.trace().id == trace.id
    assert trace.session == session.id


def test_a_trace_goes_through_an_asynchronous_host_and_its_tools_too() -> None:
    async def main() -> None:
        async with AsyncHost(kernels=2) as host:
            session = host.session("s")
            await session.set("x", 3)
            define(session)

            @session.tool
            async def triple(n: int) -> int:
                return int(await session.call("inner", n))

            with host.telemetry.span("whole") as span:
                await asyncio.gather(session.call("outer", 1), session.call("outer", 2))
            (root,) = host.telemetry.trace(span.trace_id).roots
            assert shape(root) == {"whole": [THROUGH_A_TOOL, THROUGH_A_TOOL]}
            await session.call("inner", 1)
            assert host.telemetry.trace().id != span.trace_id

    asyncio.run(main())


def test_tasks_and_threads_within_a_command_keep_their_place(session: Session, shared_host: Host) -> None:
    session["x"] = 3
    define(session)
    with shared_host.telemetry.span("whole") as span:
        session.call("gathered")
        session.call("threaded")
    (root,) = shared_host.telemetry.trace(span.trace_id).roots
    gathered, threaded = root.children
    assert shape(gathered) == run_of("gathered", {"all": [{f"one {i}": [GET]} for i in range(3)]})
    # A thread that was given no context belongs to the command, not to the span in which it was started.
    assert shape(threaded) == run_of("threaded", {"around": [GET]}, GET)


def test_streams_instances_and_what_is_submitted_belong_to_the_span_around_them(
    session: Session, shared_host: Host
) -> None:
    session["x"] = 3
    define(session)
    with shared_host.telemetry.span("whole") as span:
        assert list(session.stream("stream")) == [3, 3]
        assert list(session.stream("astream")) == [3, 3]
        counter = session.create("collections.Counter", "abca")
        assert counter.most_common(1) == [("a", 2)]
        later = session.submit("inner", 4)
    assert later.result() == 12
    (root,) = shared_host.telemetry.trace(span.trace_id).roots
    streamed, astreamed, created, called, submitted = root.children
    items = [{f"item {i}": [GET]} for i in range(2)]
    assert shape(streamed) == run_of("stream", *items)
    assert shape(astreamed) == run_of("astream", *items)
    assert [span.kind for span in created.walk()] == ["command", "queue", "execution", "instance"]
    assert [span.kind for span in called.walk()][:3] == ["command", "queue", "execution"]
    assert shape(submitted) == run_of("inner", GET)


@pytest.mark.parametrize("told", [True, False], ids=["after it told of itself", "at once"])
def test_a_command_whose_kernel_was_killed_shows_both_runs_and_its_tool_once(
    session: Session, shared_host: Host, tmp_path: Path, told: bool
) -> None:
    calls: list[int] = []

    @session.tool
    def count() -> int:
        calls.append(1)
        if told:  # the kernel shows what it does while it waits
            eventually(lambda: session.telemetry.events("bridge", "callback", "start"), "the kernel's first events")
        return len(calls)

    @session.function
    def doomed(ctx, path):  # type: ignore[no-untyped-def]
        import os
        import signal

        count = ctx.call_tool("count")
        if not os.path.exists(path):
            open(path, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return count

    with shared_host.telemetry.span("whole") as span:
        assert session.call("doomed", str(tmp_path / "killed")) == 1
    trace = shared_host.telemetry.trace(span.trace_id)
    (root,) = trace.roots
    (command,) = root.children
    assert [child.kind for child in command.children] == ["queue", "execution", "queue", "execution"]
    _, died, waited, again = command.children
    assert (died.error, died.attributes["attempt"]) == ("bridge.KernelDied", 1)
    assert (again.error, again.attributes["attempt"]) == (None, 2)
    assert died.start <= waited.start <= again.start
    # The tool ran once, for the first run; the second had its answer from the journal.
    assert sum(span.kind == "tool" for span in trace.spans) == 1
    assert sum(span.kind == "tool" for span in died.walk()) == 1
    assert [span.name for span in again.walk()][1:] == ["callback tool.call count"]
    if told:
        assert "never ended" in trace.text(200) or died.children[0].duration is not None
    assert trace.complete


# -- in and out ------------------------------------------------------------------

FOREIGN = "00-" + "ab" * 16 + "-" + "cd" * 8


def test_a_foreign_trace_goes_on_and_is_handed_on(session: Session, shared_host: Host) -> None:
    with shared_host.telemetry.span("served", traceparent=f"{FOREIGN}-01") as span:
        assert span.traceparent.startswith("00-" + "ab" * 16)
        assert shared_host.telemetry.traceparent() == span.traceparent
        session.call("math.hypot", 3, 4)
    (root,) = shared_host.telemetry.trace("ab" * 16).roots
    assert (root.parent, root.missing) == ("cd" * 8, ("parent",))
    assert shape(root) == {"served": [run_of("math.hypot")]}
    assert span.traceparent.split("-")[2] == root.span_id


@pytest.mark.parametrize(
    "wrong",
    ["", "00-abc-def-01", f"ff{FOREIGN[2:]}-01", f"00-{'0' * 32}-{'cd' * 8}-01", f"00-{'ab' * 16}-{'0' * 16}-01"],
)
def test_what_is_no_traceparent_is_refused(shared_host: Host, wrong: str) -> None:
    with pytest.raises(ValueError, match="a traceparent is"):
        shared_host.telemetry.span("x", traceparent=wrong)


@pytest.fixture
def telemetry(shared_host: Host) -> Iterator[Telemetry]:
    """The shared host's, everything recorded again afterwards."""
    yield shared_host.telemetry
    shared_host.telemetry.sampling = 1
    shared_host.telemetry.enable()


@pytest.mark.parametrize("how", ["an unsampled traceparent", "sampling = 0"])
def test_of_what_is_not_sampled_nothing_is_recorded_and_all_of_it_is_counted(
    session: Session, telemetry: Telemetry, how: str
) -> None:
    session["x"] = 3
    define(session)

    @session.tool
    def triple(n: int) -> int:
        with telemetry.span("in the tool"):
            return int(session.call("inner", n))

    name = f"unseen_{session.id.replace('-', '_')}"  # what no other test has counted
    session.function(name, f"def {name}(ctx, n):\n    return ctx.call_tool('triple', n=n)\n")
    session.call("inner", 1)
    before = [event for event in telemetry.events() if "trace_id" in event.metadata]
    lines = telemetry.lines()
    if how == "sampling = 0":
        telemetry.sampling = 0
        with telemetry.span("x") as span:
            assert session.call(name, 2) == 6
    else:
        with telemetry.span("x", traceparent=f"00-{'ef' * 16}-{'cd' * 8}-00") as span:
            assert session.call(name, 2) == 6
    assert span.traceparent.endswith("-00")
    assert [event for event in telemetry.events() if "trace_id" in event.metadata] == before
    assert telemetry.lines() == lines
    assert name in repr(telemetry.latencies())
    with pytest.raises(NotFound):
        telemetry.trace(span.trace_id)


def test_a_retry_that_is_not_sampled_leaves_no_trace_either(
    session: Session, telemetry: Telemetry, tmp_path: Path
) -> None:
    session["x"] = 3

    @session.function
    def doomed(ctx, path):  # type: ignore[no-untyped-def]
        import os
        import signal

        found = ctx["x"]
        if not os.path.exists(path):
            open(path, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    telemetry.sampling = 0
    assert session.call("doomed", str(tmp_path / "killed")) == 3
    assert {event.name[1] for event in session.telemetry.events()} <= {"session"}


def test_what_is_switched_off_loses_nothing_beneath_it(session: Session, telemetry: Telemetry) -> None:
    session["x"] = 3
    define(session)

    @session.tool
    def triple(n: int) -> int:
        return int(session.call("inner", n))

    telemetry.disable("bridge.callback")
    with telemetry.span("whole") as span:
        session.call("outer", 2)
    (root,) = telemetry.trace(span.trace_id).roots
    run = root.children[0].children[1]
    assert [child.name for child in run.children] == ["part", "tool triple"]
    assert run.children[1].missing == ("parent",)
    assert shape(run.children[1]) == {"tool triple": [run_of("inner")]}
