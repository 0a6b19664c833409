"""The figures of `host.telemetry`: exact under threads, bounded, and shown as tables, frames and plots."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pandas
import polars
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len

from bridge_host import RemoteError, Telemetry
from bridge_host.telemetry.figures.counts import MAX_MEMORY
from bridge_host.telemetry.figures.frames import events_frame
from bridge_host.telemetry.figures.histogram import RELATIVE_ERROR, Histogram
from bridge_host.telemetry.figures.metrics import (
    MAX_ABOUT,
    MAX_COMMANDS,
    MAX_ERRORS,
    MAX_KERNELS,
    MAX_MODELS,
    Metrics,
)
from bridge_host.telemetry.figures.rows import OTHERS
from bridge_kernel.contract.telemetry import Event

if TYPE_CHECKING:
    from bridge_host import Host

MS = 1_000_000
S = 1_000_000_000
EPOCH = 1_790_000_000 * S

values = st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 100) | st.integers(MS, 2 * MS), min_size=1, max_size=200)


class Clock:
    """Seconds that never go back, and the time in ns, as a test says."""

    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now

    def wall(self) -> int:
        return EPOCH + round(self.now * S)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics(clock, clock.wall)


def event(name: str, measurements: dict[str, int | float], /, **metadata: Any) -> Event:
    return Event(tuple(name.split(".")), measurements, metadata)


def command(subject: str, duration: int = MS, error: str | None = None, attempts: int = 1) -> Event:
    last, said = ("stop", {}) if error is None else ("exception", {"error": error})
    return event(f"bridge.command.{last}", {"duration": duration, "attempts": attempts}, subject=subject, **said)


def execution(subject: str, kernel: str, duration: int, last: str = "stop") -> Event:
    return event(f"bridge.execution.{last}", {"duration": duration}, subject=subject, kernel=kernel)


def lm(model: str, duration: int = MS, last: str = "stop", hit: bool = False, **measured: float) -> Event:
    return event(f"bridge.dspy.lm.{last}", {"duration": duration, **measured}, model=model, cache_hit=hit)


def kernel_start(kernel: str, at: int) -> Event:
    numbers: dict[str, int | float] = {"duration": 600 * MS, "system_time": at}
    return event("bridge.kernel.start", numbers, kernel=kernel, pid=7, spare=False, deaths=1)


def kernel_stop(kernel: str, at: int, *, expected: bool, lost: int = 0) -> Event:
    numbers: dict[str, int | float] = {"duration": 60 * S, "system_time": at, "lost": lost}
    return event("bridge.kernel.stop", numbers, kernel=kernel, pid=7, exit_code=-9, expected=expected, reason="exit")


def some_of_all(metrics: Metrics, clock: Clock) -> None:
    for number in range(50):
        metrics.take(command("dspy.Predict.__call__", (300 + number) * MS))
        metrics.take(command("math.hypot", (200 + number) * 1000))
    metrics.take(command("clean $x^2\nrows$ \x1b[31m", 20 * MS, "ValueError"))
    metrics.take(event("bridge.tool.exception", {"duration": 1}, tool="search", error="ConnectionError"))
    for kernel in ("3f2a9c1d77", "b81e00aa11"):
        metrics.take(kernel_start(kernel, clock.wall()))
        clock.now += 30
        metrics.take(event("bridge.kernel.memory", {"rss": 120 * MS}, kernel=kernel, pid=7))
        clock.now += 30
    metrics.take(kernel_stop("b81e00aa11", clock.wall(), expected=False, lost=2))
    metrics.take(lm("openai/gpt-4.1", 400 * MS, input_tokens=500, output_tokens=50, cost=0.002))


# -- the histogram -------------------------------------------------------------------


@given(values, st.floats(0, 1) | st.sampled_from([0.5, 0.95, 0.99, 0.07]))
@example(list(range(1, 101)), 0.95)
@example([0], 0.5)
@example([2**63 - 1], 0.5)
def test_a_percentile_is_within_the_relative_error_of_the_exact_one(values: list[int], share: float) -> None:
    exact = sorted(values)[min(max(math.ceil(share * len(values) - 1e-9), 1), len(values)) - 1]
    found = Histogram(values).percentile(share)
    assert found is not None
    assert abs(found - exact) <= exact * RELATIVE_ERROR


@given(values, values)
def test_what_is_merged_is_as_if_counted_together(some: list[int], others: list[int]) -> None:
    merged, together = Histogram(some), Histogram(some + others)
    merged.merge(Histogram(others))
    assert list(merged.buckets()) == list(together.buckets())
    for name in ("count", "total", "low", "high"):
        assert getattr(merged, name) == getattr(together, name)
    assert together.total == sum(some + others)


@given(values)
def test_every_value_is_in_the_bucket_that_is_said_to_hold_it(values: list[int]) -> None:
    for value in values:
        ((low, beyond, count),) = Histogram([value]).buckets()
        assert low <= value < beyond
        assert count == 1


@given(values)
def test_a_histogram_made_of_buckets_has_the_same_percentiles_but_for_the_error(values: list[int]) -> None:
    counted = Histogram()
    made = Histogram.of_buckets([(counted.add(value), 1) for value in values])
    assert list(made.buckets()) == list(counted.buckets())
    for share in (0.0, 0.5, 0.95, 1.0):
        exact = sorted(values)[max(math.ceil(share * len(values) - 1e-9), 1) - 1]
        found = made.percentile(share)
        assert found is not None
        assert abs(found - exact) <= exact * RELATIVE_ERROR


def test_a_histogram_never_holds_more_than_its_960_buckets() -> None:
    histogram = Histogram(
        value for shift in range(64) for value in range((1 << shift) - 1, 2 << shift, (1 << shift) // 64 + 1)
    )
    assert 900 < len(list(histogram.buckets())) <= 960


def test_a_histogram_takes_what_is_too_small_or_too_large_at_its_ends() -> None:
    histogram = Histogram()
    for value in (-5, 2.9, 2**70):
        histogram.add(value)
    assert (histogram.low, histogram.high, histogram.count) == (0, 2**63 - 1, 3)
    assert histogram.percentile(0.5) == 2


def test_a_histogram_without_values_has_no_percentiles_and_says_what_a_share_is() -> None:
    assert Histogram().percentiles(0.5, 1) == [None, None]
    assert Histogram().mean is None
    with pytest.raises(ValueError, match="between 0 and 1"):
        Histogram([1]).percentile(95)


def test_a_copy_of_a_histogram_does_not_change_with_it() -> None:
    histogram = Histogram([5, 500])
    copy = histogram.copy()
    histogram.add(50_000)
    assert (copy.count, copy.high, list(copy.buckets())) == (2, 500, list(Histogram([5, 500]).buckets()))


# -- what is counted -----------------------------------------------------------------


def test_commands_are_counted_from_the_host_with_their_queue_and_their_time_in_kernels(metrics: Metrics) -> None:
    for number in range(1, 101):
        metrics.take(command("f", number * MS))
    metrics.take(command("f", 200 * MS, "ValueError", attempts=3))
    metrics.take(command("f", 1000, attempts=0))
    metrics.take(command("refused", 5, "bridge.QueueFull", attempts=0))
    metrics.take(event("bridge.pool.route", {"queue": 7 * MS}, subject="f 1a2b3c4d", kernel="k"))
    metrics.take(execution("f", "k", 3 * MS))
    row, refused = metrics.latencies()
    assert (row.command, row.count, row.errors, row.retries, row.cached) == ("f", 102, 1, 2, 1)
    assert (row.low, row.high, row.total) == (1000, 200 * MS, 5250 * MS + 1000)
    assert row.p50 == pytest.approx(50 * MS, rel=RELATIVE_ERROR)
    assert row.p95 == pytest.approx(96 * MS, rel=RELATIVE_ERROR)
    assert (row.queue_p95, row.kernel_p50) == (7 * MS, 3 * MS)
    assert (refused.command, refused.count, refused.errors, refused.cached) == ("refused", 1, 1, 0)


def test_errors_are_counted_by_type_with_whose_they_were_and_when_the_last_came(metrics: Metrics, clock: Clock) -> None:
    for subject in ("f", "g", "f"):
        metrics.take(command(subject, error="ValueError"))
    clock.now += 60
    metrics.take(command("f", error="ValueError"))
    metrics.take(event("bridge.tool.exception", {"duration": 1}, tool="search", error="ValueError"))
    of_commands, of_tools = metrics.errors()
    assert (of_commands.error, of_commands.of, of_commands.count) == ("ValueError", "command", 4)
    assert of_commands.about == (("f", 3), ("g", 1))
    assert of_commands.last == clock.wall()
    assert (of_tools.of, of_tools.count, of_tools.about) == ("tool", 1, (("search", 1),))


def test_kernels_are_told_with_their_life_their_memory_and_their_commands(metrics: Metrics, clock: Clock) -> None:
    metrics.take(kernel_start("k", clock.wall()))
    for rss in (100, 300, 200):
        clock.now += 1
        metrics.take(event("bridge.kernel.memory", {"rss": rss}, kernel="k", pid=7))
    metrics.take(execution("f", "k", MS))
    metrics.take(execution("f", "k", MS, "exception"))
    metrics.take(execution("f", "", MS, "exception"))  # it was lost before it was known where
    metrics.take(event("bridge.kernel.unresponsive", {"silence": S}, kernel="k"))
    metrics.take(event("bridge.pool.recycle", {}, kernel="k", reason="memory"))
    (row,) = metrics.kernels()
    assert (row.state, row.started, row.ready, row.deaths, row.pid) == ("alive", EPOCH + 5000 * S, 600 * MS, 1, 7)
    assert (row.commands, row.errors, row.unresponsive, row.recycled) == (2, 1, 1, "memory")
    assert (row.rss, row.peak, [rss for _, rss in row.memory]) == (200, 300, [100, 300, 200])
    metrics.take(kernel_stop("k", clock.wall(), expected=False, lost=2))
    (row,) = metrics.kernels()
    assert (row.state, row.ended, row.lost, row.exit_code, row.reason) == ("died", clock.wall(), 2, -9, "exit")


def test_the_memory_of_a_kernel_over_time_is_thinned_and_keeps_its_peaks(metrics: Metrics, clock: Clock) -> None:
    for number in range(10 * MAX_MEMORY):
        clock.now += 1
        metrics.take(event("bridge.kernel.memory", {"rss": 999 if number == 1001 else 100}, kernel="k", pid=7))
    (row,) = metrics.kernels()
    assert MAX_MEMORY / 2 < len(row.memory) <= MAX_MEMORY
    assert max(rss for _, rss in row.memory) == 999
    times = [at for at, _ in row.memory]
    assert times[0] == EPOCH + 5001 * S
    assert len({later - at for at, later in itertools.pairwise(times)}) == 1


def test_models_are_counted_with_tokens_cost_and_what_the_cache_had(metrics: Metrics) -> None:
    for _ in range(3):
        metrics.take(lm("gpt", 400 * MS, input_tokens=10, output_tokens=5, tokens=15, cost=0.25, first_token=90 * MS))
    metrics.take(lm("gpt", 1000, hit=True))
    metrics.take(lm("gpt", 400 * MS, "exception"))
    (row,) = metrics.models()
    assert (row.calls, row.errors, row.cache_hits) == (5, 1, 1)
    assert (row.input_tokens, row.output_tokens, row.tokens, row.cost) == (30, 15, 45, 0.75)
    assert (row.p50, row.first_token_p50) == (400 * MS, 90 * MS)


def test_an_event_that_lacks_what_it_should_have_is_not_counted(metrics: Metrics) -> None:
    metrics.take(event("bridge.command.stop", {}, subject="f"))
    metrics.take(event("bridge.command.stop", {"duration": 1, "attempts": 1}))
    metrics.take(event("bridge.command.exception", {"duration": 1, "attempts": 1}, subject="f"))
    metrics.take(event("bridge.kernel.memory", {}, kernel="k"))
    metrics.take(event("bridge.dspy.lm.stop", {"duration": math.nan}, model="m"))
    metrics.take(event("bridge.user.mine", {"duration": 1}, subject="f"))
    assert not [*metrics.latencies(), *metrics.errors(), *metrics.kernels(), *metrics.models()]
    assert metrics.recent().commands_per_s == 0


def test_what_is_beyond_the_bounds_is_counted_under_others(metrics: Metrics, clock: Clock) -> None:
    for number in range(2 * MAX_COMMANDS):
        metrics.take(command(f"f{number}", error=f"E{number}"))
        metrics.take(lm(f"m{number}", tokens=2))
        metrics.take(kernel_start(f"k{number}", clock.wall()))
        metrics.take(execution(f"f{number}", f"k{number}", 1))
        metrics.take(kernel_stop(f"k{number}", clock.wall(), expected=True, lost=1))
    latencies, errors, models, kernels = metrics.latencies(), metrics.errors(), metrics.models(), metrics.kernels()
    assert len(latencies) == MAX_COMMANDS + 1
    assert sum(row.count for row in latencies) == 2 * MAX_COMMANDS
    assert (latencies[-1].command, latencies[-1].count) == (OTHERS, MAX_COMMANDS)
    assert len(errors) == MAX_ERRORS + 1
    assert sum(row.count for row in errors) == 2 * MAX_COMMANDS
    assert (len(errors[-1].about), sum(count for _, count in errors[-1].about)) == (MAX_ABOUT + 1, errors[-1].count)
    assert len(models) == MAX_MODELS + 1
    assert sum(row.tokens for row in models) == 4 * MAX_COMMANDS
    assert len(kernels) == MAX_KERNELS + 1
    assert sum(row.commands for row in kernels) == sum(row.lost for row in kernels) == 2 * MAX_COMMANDS
    assert (kernels[-1].kernel, kernels[-1].count) == (OTHERS, 2 * MAX_COMMANDS - MAX_KERNELS)
    assert kernels[0].kernel == f"k{2 * MAX_COMMANDS - MAX_KERNELS}", "the latest are the ones that are told apart"
    assert (kernels[-1].state, {row.state for row in kernels[:-1]}) == ("", {"ended"})
    assert "alive" not in repr(kernels)


def test_a_kernel_that_lives_is_told_apart_however_many_come_and_go(metrics: Metrics, clock: Clock) -> None:
    metrics.take(kernel_start("long", clock.wall()))
    for number in range(2 * MAX_KERNELS):
        metrics.take(kernel_start(f"k{number}", clock.wall()))
        metrics.take(kernel_stop(f"k{number}", clock.wall(), expected=True))
    assert "long" in [row.kernel for row in metrics.kernels()]


def test_nothing_is_lost_or_counted_twice_when_threads_emit_at_once() -> None:
    metrics = Metrics()
    threads, each = 4, 2000
    together = threading.Barrier(threads + 1)

    def emit(thread: int) -> None:
        together.wait()
        for number in range(each):
            metrics.take(command(f"f{number % 7}", number, "E" if number % 2 == 0 else None))
            metrics.take(lm("m", number, tokens=3))

    workers = [threading.Thread(target=emit, args=(thread,)) for thread in range(threads)]
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for worker in workers:
            worker.start()
        together.wait()
        while any(worker.is_alive() for worker in workers):
            metrics.latencies()  # who looks on disturbs nothing
            metrics.recent()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(switching)
    latencies = metrics.latencies()
    assert sum(row.count for row in latencies) == threads * each
    assert sum(row.total for row in latencies) == threads * sum(range(each))
    assert sum(row.errors for row in latencies) == threads * each // 2 == metrics.errors()[0].count
    assert sum(count for _, count in metrics.errors()[0].about) == threads * each // 2
    assert all(sum(count for *_, count in row.durations.buckets()) == row.count for row in latencies)
    assert (metrics.models()[0].calls, metrics.models()[0].tokens) == (threads * each, 3 * threads * each)


# -- the last minute -------------------------------------------------------------------


def test_the_last_minute_has_rates_percentiles_and_a_series(metrics: Metrics, clock: Clock) -> None:
    for _ in range(120):
        clock.now += 1
        metrics.take(command("f", 10 * MS))
        metrics.take(command("f", 90 * MS, "E"))
    clock.now += 0.5
    recent = metrics.recent()
    assert recent.commands == (2,) * 60
    assert recent.errors == (1,) * 60
    assert recent.commands_per_s == pytest.approx(120 / 59.5)
    assert recent.errors_per_s == pytest.approx(60 / 59.5)
    assert recent.p50 == pytest.approx(10 * MS, rel=RELATIVE_ERROR)
    assert recent.p95 == pytest.approx(90 * MS, rel=RELATIVE_ERROR)


def test_what_is_older_than_a_minute_is_no_longer_in_the_last_one(metrics: Metrics, clock: Clock) -> None:
    metrics.take(command("f", 10 * MS, "E"))
    clock.now += 59
    assert metrics.recent().commands == (1, *(0,) * 59)
    clock.now += 1
    recent = metrics.recent()
    assert (recent.commands, recent.errors, recent.p50, recent.commands_per_s) == ((0,) * 60, (0,) * 60, None, 0)


def test_the_rates_of_a_young_host_are_over_the_time_that_it_has_lived(metrics: Metrics, clock: Clock) -> None:
    clock.now += 5
    for _ in range(50):
        metrics.take(command("f"))
    assert metrics.recent().commands_per_s == pytest.approx(10)


# -- as tables, text and pictures --------------------------------------------------------

ALL = ("latencies", "errors", "kernels", "models")


@pytest.mark.parametrize("which", ALL)
def test_each_is_a_sequence_of_rows_shown_as_text_html_plot_and_frame(
    which: str, metrics: Metrics, clock: Clock
) -> None:
    some_of_all(metrics, clock)
    shown = getattr(metrics, which)()
    first = shown[0]
    assert next(iter(shown)) is first
    assert shown[:1] == (first,)
    name = getattr(first, first.__struct_fields__[0])[:8]
    for text in (repr(shown), shown._repr_html_(), repr(shown.text_plot()), str(shown.plot())):
        assert name in text
        assert "\x1b" not in text
    assert shown._repr_html_().startswith("<table>")
    assert shown.text_plot()._repr_html_().startswith("<pre")
    png, size = shown.plot()._repr_png_()
    assert png.startswith(b"\x89PNG")
    assert size["width"] > 800
    with pytest.raises(AttributeError):
        setattr(first, first.__struct_fields__[0], "another")
    for library in ("pandas", "polars"):
        assert len(shown.frame(library)) == len(shown)


@pytest.mark.parametrize("which", ALL)
def test_where_there_is_nothing_yet_everything_says_so(which: str, metrics: Metrics) -> None:
    shown = getattr(metrics, which)()
    assert len(shown) == 0
    for text in (repr(shown), repr(shown.text_plot()), str(shown.plot())):
        assert "nothing yet" in text
    assert [text.get_text() for text in shown.plot().texts if text.get_text() == "nothing yet"]
    assert shown.plot()._repr_png_()[0].startswith(b"\x89PNG")
    assert len(shown.frame("pandas")) == len(shown.frame("polars")) == 0


def test_a_plot_draws_the_figures_and_names_what_it_leaves_out(metrics: Metrics, clock: Clock) -> None:
    for number in range(40):
        metrics.take(command(f"f{number:02}", MS + number))
    picture: Any = metrics.latencies().plot()
    (axes,) = picture.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"f{39 - number}" for number in range(16)]
    assert "16 of 40" in picture.get_suptitle()
    assert "and 10 more" in str(picture)
    some_of_all(metrics, clock)
    of_errors: Any = metrics.errors().plot()
    (errors,) = of_errors.axes
    assert sorted(bar.get_width() for bar in errors.patches) == [1, 1]
    assert {text.get_text() for text in picture.legends[0].get_texts()} == {"p50", "p95", "p99"}


@pytest.mark.parametrize("which", ["latencies", "errors", "kernels", "models"])
def test_a_name_in_any_script_is_drawn_without_a_warning_and_no_chart_of_text_is_broken(
    which: str, metrics: Metrics
) -> None:
    name = "日本語 🎉 " + "long_name" * 10
    metrics.take(command(name, MS, name))
    metrics.take(kernel_start(name, EPOCH))
    metrics.take(lm(name, input_tokens=5, cost=0.1))
    shown: Any = getattr(metrics, which)()
    assert shown.plot()._repr_png_()[0].startswith(b"\x89PNG")
    _, *lines = repr(shown.text_plot()).splitlines()
    assert len(lines) == 1 + (which in ("latencies", "kernels")), "the axis, if there is one, and the row"
    assert max(map(cell_len, lines)) <= 120


@pytest.mark.parametrize("missing", ["matplotlib", "numpy"])
def test_without_matplotlib_or_what_comes_with_it_a_plot_is_text(
    missing: str, metrics: Metrics, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_of_all(metrics, clock)
    monkeypatch.delitem(sys.modules, "bridge_host.telemetry.figures.plots", raising=False)
    monkeypatch.delattr("bridge_host.telemetry.figures.plots", raising=False)
    monkeypatch.delitem(sys.modules, "bridge_host.telemetry.figures.picture", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, missing, None)
    plot = metrics.errors().plot()
    assert repr(plot) == repr(metrics.errors().text_plot())
    assert "█" in repr(plot)


def test_a_plot_leaves_pyplot_alone_and_importing_the_figures_leaves_matplotlib_and_pandas_alone() -> None:
    code = """
import sys
from bridge_host import Telemetry
from bridge_kernel.contract.telemetry import Event
telemetry = Telemetry()
telemetry.take(Event(("bridge", "command", "stop"), {"duration": 5, "attempts": 1}, {"subject": "f"}))
print(repr(telemetry.latencies()).count("f"))
assert not {"matplotlib", "pandas", "polars"} & set(sys.modules)
telemetry.latencies().plot()._repr_png_()
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


# -- as frames ---------------------------------------------------------------------------


EVENTS = [
    event("bridge.command.start", {"system_time": EPOCH + 7}, subject="f", sampled=True),
    event("bridge.command.stop", {"duration": 2**62 + 1}, subject="f", error=None),
    event("bridge.user.mine", {"score": 1, "mixed": 1}, name="mine", system="x"),
    event("bridge.user.mine", {"score": 0.5}, name="mine", mixed="two", duration="long"),
]


def test_events_as_a_pandas_frame_are_typed_and_null_where_something_is_missing() -> None:
    frame = events_frame(EVENTS, "pandas")
    assert list(frame["name"]) == [
        "bridge.command.start",
        "bridge.command.stop",
        "bridge.user.mine",
        "bridge.user.mine",
    ]
    assert frame["system_time"][0] == pandas.Timestamp(EPOCH + 7, unit="ns", tz="UTC")
    assert str(frame["system_time"].dtype) == "datetime64[ns, UTC]"
    assert frame["system_time"][1:].isna().all()
    assert list(frame["metadata.name"].dropna()) == ["mine", "mine"]
    assert (str(frame["score"].dtype), str(frame["sampled"].dtype)) == ("Float64", "boolean")
    assert list(frame["mixed"].dropna()) == ["1", "two"]
    durations = events_frame(EVENTS[:2], "pandas")["duration"]
    assert str(durations.dtype) == "Int64"
    assert durations[1] == 2**62 + 1, "to the last nanosecond"


def test_events_as_a_polars_frame_are_the_same() -> None:
    frame = events_frame(EVENTS[:3], "polars")
    assert frame.schema["system_time"] == polars.Datetime("ns", "UTC")
    assert frame["system_time"].to_physical().to_list() == [EPOCH + 7, None, None]
    assert frame["duration"].to_list() == [None, 2**62 + 1, None]
    assert frame.schema["duration"] == polars.Int64
    assert frame.schema["sampled"] == polars.Boolean
    assert frame["metadata.name"].to_list() == [None, None, "mine"]
    assert frame["error"].to_list() == [None, None, None]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_frame_holds_what_no_library_has_a_type_for_as_text(library: str) -> None:
    values = [10**400, 1.5, 10**5000, "half \ud800", True]
    frame = events_frame([event("bridge.user.x", {}, n=value) for value in values], library)
    assert list(frame["n"]) == [str(10**400), "1.5", "an integer of 16610 bits", "half \\ud800", "True"]
    frame = events_frame([event("bridge.user.x", {}, n=value) for value in (10**400, 1.5)], library)
    assert list(frame["n"]) == [str(10**400), "1.5"]


def test_frames_of_figures_have_the_same_types_with_rows_and_without(metrics: Metrics, clock: Clock) -> None:
    empty = {which: getattr(metrics, which)().frame("polars").schema for which in ALL}
    some_of_all(metrics, clock)
    assert {which: getattr(metrics, which)().frame("polars").schema for which in ALL} == empty
    assert empty["kernels"]["started"] == empty["errors"]["last"] == polars.Datetime("ns", "UTC")
    assert empty["latencies"]["p50"] == polars.Int64
    assert empty["models"]["cost"] == polars.Float64
    assert list(metrics.errors().frame()["about"]) == ["clean $x^2\nrows$ \x1b[31m", "search"]


def test_a_frame_wants_a_library_that_is_known_and_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='"pandas" or "polars", not \'numpy\''):
        Telemetry().frame(library="numpy")
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'bridge-kernel\[arrow\]'"):
        Telemetry().frame(library="polars")


# -- in a host ---------------------------------------------------------------------------


def test_a_host_has_figures_of_what_it_ran(lonely_host: Host) -> None:
    session = lonely_host.session()
    for _ in range(5):
        session.call("math.hypot", 3, 4)
    with pytest.raises(RemoteError):
        session.call("math.sqrt", -1)
    telemetry = lonely_host.telemetry
    by_name = {row.command: row for row in telemetry.latencies()}
    assert (by_name["math.hypot"].count, by_name["math.sqrt"].errors) == (5, 1)
    assert 0 < (by_name["math.hypot"].kernel_p50 or 0) < by_name["math.hypot"].high
    (failure,) = telemetry.errors()
    assert (failure.error, failure.about) == ("ValueError", (("math.sqrt", 1),))
    (kernel,) = [row for row in telemetry.kernels() if row.commands]
    assert (kernel.commands, kernel.errors, kernel.state) == (6, 1, "alive")
    assert kernel.started is not None
    assert set(telemetry.frame("bridge.command")["name"]) == {
        "bridge.command.start",
        "bridge.command.stop",
        "bridge.command.exception",
    }


MILLION = """
import gc
import json
import psutil
from bridge_host import Telemetry
from bridge_kernel.contract.telemetry import Event

telemetry = Telemetry()
used = []
for number in range(1_000_000):
    said = {"subject": "f", "session": f"s{number}", "trace_id": f"{number:032x}", "parent_span_id": None}
    numbers = {"duration": 1_000_000 + number % 4096 * 4096, "attempts": 1}
    of = number % 5
    if of == 0:
        name, said["subject"] = ("bridge", "command", "stop"), f"f{number % 3001}"
    elif of == 1:
        name, said["error"] = ("bridge", "command", "exception"), f"E{number % 1009}"
    elif of == 2:
        name, said["kernel"] = ("bridge", "execution", "stop"), f"k{number // 500}"
    elif of == 3:
        name, said["model"] = ("bridge", "dspy", "lm", "stop"), f"m{number % 701}"
    else:
        name = ("bridge", "callback", "stop")
    telemetry.take(Event(name, numbers, said))
    if number in (199_999, 999_999):
        gc.collect()
        used.append(psutil.Process().memory_info().rss)
print(json.dumps({
    "grown": used[1] - used[0],
    "commands": sum(row.count for row in telemetry.latencies()),
    "executions": sum(row.commands for row in telemetry.kernels()),
    "calls": sum(row.calls for row in telemetry.models()),
    "errors": sum(row.count for row in telemetry.errors()),
    "remembered": len(telemetry.events()),
}))
"""


def test_a_million_events_leave_the_memory_flat_and_are_all_counted() -> None:
    # In a process of its own: what other tests leave behind is not measured with it.
    done = subprocess.run([sys.executable, "-c", MILLION], check=True, timeout=120, capture_output=True)
    found = json.loads(done.stdout)
    assert found.pop("grown") < 8_000_000
    assert found == {
        "commands": 400_000,
        "executions": 200_000,
        "calls": 200_000,
        "errors": 200_000,
        "remembered": 10_000,
    }
