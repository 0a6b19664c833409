"""What happens gets out: to a file, to an OpenTelemetry collector (a real one, in this process), to Prometheus."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import trace as trace_api
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from bridge_host import Host
from bridge_host.telemetry import Telemetry
from bridge_host.telemetry.export.feed import Feed
from bridge_host.telemetry.export.jsonl import JsonLines
from bridge_kernel.contract.catalogue import problem
from bridge_kernel.contract.telemetry import Event
from conftest import eventually
from otlp_collector import Collector, said

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bridge_host import Session

TRACE, ROOT, CHILD = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "00f067aa0ba902b7"
USER = ("bridge", "user", "noted")
SECRET = "Bearer sk-very-secret-0123456789"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def execution(span: str = CHILD, parent: str | None = ROOT, **more: Any) -> dict[str, Any]:
    return {
        "command": "function.call",
        "subject": "answer",
        "session": "s",
        "kernel": "k1",
        "attempt": 1,
        "trace_id": TRACE,
        "span_id": span,
        "parent_span_id": parent,
        **more,
    }


def emit(telemetry: Telemetry, name: str, measurements: dict[str, int | float], metadata: dict[str, Any]) -> None:
    """An event as the catalogue has it."""
    event = Event(tuple(name.split(".")), measurements, metadata)
    assert problem(event) is None
    telemetry.take(event)


def command(telemetry: Telemetry, subject: str, duration: int, error: str | None = None, **ids: str) -> None:
    metadata: dict[str, Any] = {
        "command": "function.call",
        "subject": subject,
        "session": "s",
        "command_id": "c",
        "trace_id": TRACE,
    }
    metadata |= {"span_id": ROOT, "parent_span_id": None, **ids}
    emit(telemetry, "bridge.command.start", {"system_time": 1_000_000_000}, metadata)
    measurements: dict[str, int | float] = {"duration": duration, "attempts": 1}
    if error is None:
        emit(telemetry, "bridge.command.stop", measurements, metadata)
    else:
        emit(telemetry, "bridge.command.exception", measurements, {**metadata, "error": error})


# -- a file --------------------------------------------------------------------------


def test_each_event_of_a_command_is_a_line_of_the_file(session: Session, shared_host: Host, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with shared_host.telemetry.to_file(path) as lines:
        session.call("math.sqrt", 4)
        assert lines.flush()
        found = [line for line in read(path) if line["metadata"].get("session") == session.id]
        expected = session.telemetry.events()
        assert [(tuple(f["name"]), f["measurements"], f["metadata"]) for f in found] == [
            (e.name, e.measurements, e.metadata) for e in expected if e.name != ("bridge", "session", "start")
        ]
        assert {"bridge.command.start", "bridge.execution.stop"} <= {".".join(line["name"]) for line in found}
        started = next(line for line in found if line["name"] == ["bridge", "command", "start"])
        assert set(started) == {"name", "measurements", "metadata", "time"}
        assert started["time"] >= started["measurements"]["system_time"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    count = len(read(path))
    session.call("math.sqrt", 4)
    assert len(read(path)) == count, "it is closed"
    assert "closed" in repr(lines)
    lines.close()


def test_a_file_has_only_the_events_that_were_asked_for(telemetry: Telemetry, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with telemetry.to_file(path, "bridge.user"):
        telemetry.tell(USER, {}, {"n": 1})
        command(telemetry, "answer", 1)
    assert [line["metadata"] for line in read(path)] == [{"n": 1}]


def test_a_file_is_rotated_by_its_size_and_one_old_one_is_kept(telemetry: Telemetry, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with JsonLines(telemetry, path, max_bytes=1000) as lines:
        for n in range(100):
            telemetry.tell(USER, {}, {"n": n})
        lines.flush()
    both = read(tmp_path / "events.jsonl.1") + read(path)
    assert [line["metadata"]["n"] for line in both] == list(range(100 - len(both), 100))
    assert all(500 < (tmp_path / name).stat().st_size <= 1000 for name in ("events.jsonl.1",))
    assert path.stat().st_size <= 1000
    assert sorted(os.listdir(tmp_path)) == ["events.jsonl", "events.jsonl.1"]
    assert not lines.dropped


def test_what_is_in_a_file_already_stays_and_a_line_that_was_cut_off_spoils_no_other(
    telemetry: Telemetry, tmp_path: Path
) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"name": ["old"]}\n{"name": ["cut')
    with telemetry.to_file(path):
        telemetry.tell(USER, {}, {"n": 1})
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"name": ["old"]}', '{"name": ["cut']
    assert json.loads(lines[2])["metadata"] == {"n": 1}


def test_a_directory_that_is_removed_is_warned_of_once_and_what_is_lost_is_counted(
    telemetry: Telemetry, tmp_path: Path
) -> None:
    path = tmp_path / "logs" / "events.jsonl"
    path.parent.mkdir()
    lines = telemetry.to_file(path)
    lines._again_at = 0.0
    telemetry.tell(USER, {}, {"n": 1})
    assert lines.flush()
    shutil.rmtree(path.parent)
    with pytest.warns(UserWarning, match="cannot be written") as warned:
        for n in (2, 3):
            telemetry.tell(USER, {}, {"n": n})
            assert lines.flush()
    assert len(warned) == 1
    assert lines.dropped == 2
    path.parent.mkdir()
    lines._again_at = 0.0  # as if a second had passed
    telemetry.tell(USER, {}, {"n": 4})
    telemetry.close()
    (line,) = read(path)
    assert (line["metadata"], line["dropped"]) == ({"n": 4}, 2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_warned_of_and_breaks_no_command(shared_host: Host, session: Session, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with shared_host.telemetry.to_file(path) as lines:
        assert lines._file is not None
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, lines._file)
        os.close(full)
        lines._gone = lambda: False  # type: ignore[method-assign] # it is another file by now, and shall be
        with pytest.warns(UserWarning, match="No space left"):
            assert session.call("math.sqrt", 4) == 2
            lines.flush()
        assert lines.dropped > 0
        del lines._gone
        lines._again_at = 0.0
        dropped = lines.dropped
        assert session.call("math.sqrt", 9) == 3
        lines.flush()
        assert dropped == lines.dropped
        assert [line["dropped"] for line in read(path) if "dropped" in line] == [dropped]


def test_a_file_that_cannot_be_opened_is_said_at_once(telemetry: Telemetry, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        telemetry.to_file(tmp_path / "nowhere" / "events.jsonl")
    with pytest.raises(ValueError, match="max_bytes"):
        JsonLines(telemetry, tmp_path / "events.jsonl", max_bytes=0)


def test_an_event_that_json_cannot_carry_is_a_line_all_the_same(telemetry: Telemetry, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with telemetry.to_file(path):
        telemetry.tell(USER, {}, {"half": "\ud800", "odd": {1: 2}})  # type: ignore[dict-item]
        telemetry.tell(USER, {}, {"n": 1})
    assert [line["metadata"] for line in read(path)] == [{"half": "\ud800", "odd": "{1: 2}"}, {"n": 1}]


def test_a_number_that_json_has_no_word_for_spoils_no_other_line(telemetry: Telemetry, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with telemetry.to_file(path) as file:
        telemetry.tell(USER, {"n": math.nan, "m": 2**70}, {"half": "\ud800"})
        telemetry.tell(USER, {"n": 10**5000}, {})
        telemetry.tell(USER, {"n": 1}, {})
    assert file.dropped == 0
    odd, large, plain = [line["measurements"] for line in read(path)]
    assert odd == {"n": None, "m": "an integer of 71 bits"}
    assert (large, plain) == ({"n": "an integer of 16610 bits"}, {"n": 1})


def test_only_a_file_is_rotated_and_no_device(telemetry: Telemetry, tmp_path: Path) -> None:
    path = tmp_path / "pipe"  # as /dev/null, which must stay where it is, and which a test must not risk
    os.mkfifo(path)
    with telemetry.to_file(path, max_bytes=100) as file, open(path, "rb", buffering=0) as pipe:
        for number in range(10):
            telemetry.tell(USER, {"n": number}, {})
        assert file.flush()
        lines = pipe.read(65536).splitlines()
    assert [json.loads(line)["measurements"]["n"] for line in lines] == list(range(10))
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_feed_that_is_full_counts_what_it_drops_and_never_waits() -> None:
    go, got = threading.Event(), []

    def consume(taken: Any, dropped: int) -> None:
        go.wait(60)
        got.append(([event.metadata["n"] for _, event in taken], dropped))

    feed = Feed("test", consume, max_queued=3, delay_s=0)
    feed.put(Event(USER, {}, {"n": 0}))
    eventually(lambda: not feed._queue, "the first was taken")
    for n in range(1, 6):
        feed.put(Event(USER, {}, {"n": n}))
    assert feed.dropped == 2
    assert not feed.flush(0)
    go.set()
    assert feed.flush(10)
    assert got == [([0], 0), ([1, 2, 3], 2)]
    assert feed.close(10)
    feed.put(Event(USER, {}, {"n": 6}))
    assert len(got) == 2


def test_a_feed_goes_on_after_what_could_not_be_consumed() -> None:
    got = []

    def consume(taken: Any, dropped: int) -> None:
        if taken[0][1].metadata["n"] == 0:
            raise RuntimeError("no")
        got.extend(taken)

    feed = Feed("test", consume)
    feed.put(Event(USER, {}, {"n": 0}))
    with pytest.warns(UserWarning, match="1 events were not exported"):
        assert feed.flush(10)
    feed.put(Event(USER, {}, {"n": 1}))
    assert feed.close(10)
    assert len(got) == 1


# -- traces --------------------------------------------------------------------------


def test_the_collector_gets_each_span_with_the_ids_and_parents_of_bridge(
    collector: Collector, shared_host: Host, session: Session
) -> None:
    @session.tool
    def look_up(n: int) -> float:
        return float(session.call("math.sqrt", n))

    session.function("answer", "def answer(ctx, n):\n    return ctx.call_tool('look_up', n=n)\n")
    with shared_host.telemetry.otel(collector.endpoint, metrics=False, logs=False) as exporter:
        with shared_host.telemetry.span("question", weight=3) as around:
            assert session.call("answer", 16) == 4
        assert exporter.flush()
    spans = {span.span_id.hex(): span for span in collector.spans if span.trace_id.hex() == around.trace_id}
    ended = [e for e in shared_host.telemetry.events() if e.name[-1] == "stop"]
    ended = [e for e in ended if e.metadata.get("trace_id") == around.trace_id]
    assert {(s.span_id.hex(), s.parent_span_id.hex() or None) for s in spans.values()} == {
        (e.metadata["span_id"], e.metadata["parent_span_id"]) for e in ended
    }
    named = {span.name: span for span in spans.values()}
    assert set(named) == {
        "bridge.span question",
        "bridge.command answer",
        "bridge.execution answer",
        "bridge.callback tool.call",
        "execute_tool look_up",
        "bridge.command math.sqrt",
        "bridge.execution math.sqrt",
    }
    path, one = [], named["bridge.execution math.sqrt"]
    while one.parent_span_id:
        one = spans[one.parent_span_id.hex()]
        path.append(one.name)
    assert path == [
        "bridge.command math.sqrt",
        "execute_tool look_up",
        "bridge.callback tool.call",
        "bridge.execution answer",
        "bridge.command answer",
        "bridge.span question",
    ]
    kinds = {name: span.kind for name, span in named.items()}
    assert kinds["bridge.command answer"] == kinds["bridge.callback tool.call"] == 3  # client
    assert kinds["bridge.execution answer"] == 2  # server
    assert kinds["execute_tool look_up"] == kinds["bridge.span question"] == 1  # internal
    assert said(named["bridge.span question"].attributes)["bridge.weight"] == 3
    ran = said(named["bridge.execution answer"].attributes)
    assert (ran["bridge.session"], ran["bridge.callbacks"], ran["bridge.success"]) == (session.id, 1, True)
    assert ran["bridge.queue_ns"] >= 0
    tool = said(named["execute_tool look_up"].attributes)
    assert (tool["gen_ai.operation.name"], tool["gen_ai.tool.name"]) == ("execute_tool", "look_up")
    assert "gen_ai.tool.call.arguments" not in tool
    (route,) = named["bridge.command answer"].events
    assert route.name == "bridge.pool.route"
    assert said(route.attributes)["bridge.kernel"] == ran["bridge.kernel"]
    assert "bridge.session" not in said(route.attributes), "the span says it"
    assert collector.services == {"bridge"}


def test_a_span_has_the_times_of_its_events(collector: Collector, telemetry: Telemetry) -> None:
    with telemetry.otel(collector.endpoint, metrics=False, logs=False):
        command(telemetry, "answer", 250, "ValueError")
        emit(telemetry, "bridge.execution.stop", {"duration": 50}, execution(success=True, error=None))
    first, second = collector.spans
    assert (first.start_time_unix_nano, first.end_time_unix_nano) == (1_000_000_000, 1_000_000_250)
    assert (first.status.code, first.status.message) == (2, "ValueError")
    assert said(first.attributes)["error.type"] == "ValueError"
    assert second.end_time_unix_nano - second.start_time_unix_nano == 50, "its start was not told"
    assert second.status.code == 0


def test_a_run_that_its_kernel_could_not_end_is_ended_by_the_host(collector: Collector, telemetry: Telemetry) -> None:
    with telemetry.otel(collector.endpoint, metrics=False, logs=False):
        emit(telemetry, "bridge.execution.start", {"system_time": 1000}, execution())
        emit(telemetry, "bridge.execution.progress", {"done": 1}, execution(message="half"))
        lost = execution(span="1234567812345678", success=False, error="bridge.KernelDied")
        emit(telemetry, "bridge.execution.exception", {"duration": 50}, lost)
    (span,) = collector.spans
    assert span.span_id.hex() == CHILD, "what ran in it has that as its parent"
    assert said(span.attributes)["error.type"] == "bridge.KernelDied"
    assert [(event.name, said(event.attributes)["bridge.message"]) for event in span.events] == [
        ("bridge.execution.progress", "half")
    ]
    assert span.start_time_unix_nano <= span.events[0].time_unix_nano <= span.end_time_unix_nano


def test_what_opentelemetry_cannot_carry_spoils_no_batch(collector: Collector, telemetry: Telemetry) -> None:
    with telemetry.otel(collector.endpoint):
        with telemetry.span("half \ud800", large=2**70, odd=[1], half="\ud800", long="x" * 10_000):  # type: ignore[arg-type]
            pass
        command(telemetry, "\ud800", 1, "\udfff")
    span, asked = collector.spans
    assert span.name == "bridge.span half \\ud800"
    attributes = said(span.attributes)
    assert (attributes["bridge.large"], attributes["bridge.odd"]) == ("an integer of 71 bits", "[1]")
    assert attributes["bridge.half"] == "\\ud800"
    assert len(attributes["bridge.long"]) == 8192
    assert (asked.status.message, collector.logs[0].body.string_value) == ("\\udfff", "\\ud800 failed: \\udfff")
    assert collector.points("bridge.errors") == [({"bridge.subject": "\\ud800", "error.type": "\\udfff"}, 1)]


def test_an_event_of_the_users_own_ends_no_span_whatever_it_is_called(
    collector: Collector, telemetry: Telemetry
) -> None:
    with telemetry.otel(collector.endpoint):
        telemetry.tell(("bridge", "execution", "start"), {"system_time": 1_000_000}, execution())
        telemetry.tell(("bridge", "user", "start"), {}, execution())
        telemetry.tell(("bridge", "user", "stop"), {"duration": 5}, execution())
        telemetry.tell(
            ("bridge", "execution", "stop"), {"duration": 9}, {**execution(), "success": True, "error": None}
        )
    (span,) = collector.spans
    assert (span.name, span.start_time_unix_nano) == ("bridge.execution answer", 1_000_000)
    assert [event.name for event in span.events] == ["bridge.user.start", "bridge.user.stop"]


@pytest.mark.parametrize(("started", "duration"), [(-5, 5), (5, -50), (5, 2**70), (2**70, 5), (5, math.inf)], ids=str)
def test_a_time_that_cannot_be_spoils_no_batch(
    started: int, duration: float, collector: Collector, telemetry: Telemetry
) -> None:
    span = {**execution(span="1" * 16), "name": "odd"}
    with telemetry.otel(collector.endpoint) as exporter:
        telemetry.tell(("bridge", "span", "start"), {"system_time": started}, span)
        telemetry.tell(("bridge", "span", "stop"), {"duration": duration}, span)
        command(telemetry, "answer", 1)
    assert "bridge.command answer" in [one.name for one in collector.spans]
    assert len(collector.spans) + exporter.dropped == 2


def test_a_prompt_that_is_nested_too_deep_to_be_read_is_one_text(collector: Collector, telemetry: Telemetry) -> None:
    said_of_it = {**execution(span="1" * 16), "model": "m"}
    with telemetry.otel(collector.endpoint):
        telemetry.tell(("bridge", "dspy", "lm", "start"), {"system_time": 1}, {**said_of_it, "prompt": "[" * 4000})
        telemetry.tell(("bridge", "dspy", "lm", "stop"), {"duration": 1}, said_of_it)
    (message,) = json.loads(said(collector.spans[0].attributes)["gen_ai.input.messages"])
    assert message["parts"] == [{"type": "text", "content": "[" * 4000}]


def test_what_was_dropped_is_not_taken_to_run_or_to_live_for_ever(collector: Collector, telemetry: Telemetry) -> None:
    with telemetry.otel(collector.endpoint, interval_s=60) as exporter:
        begun = {**execution(), "command_id": "1"}
        kernel = Event(("bridge", "kernel", "start"), {"duration": 1, "system_time": 1}, {"kernel": "k", "pid": 1})
        exporter._take([(1, Event(("bridge", "command", "start"), {"system_time": 1}, begun)), (1, kernel)], 0)
        assert exporter.flush()
        assert [collector.points(f"bridge.{what}") for what in ("in_flight", "kernels")] == [[({}, 1)]] * 2
        exporter._take([], 3)
        assert exporter.flush()
        assert [collector.points(f"bridge.{what}") for what in ("in_flight", "kernels")] == [[({}, 0)]] * 2


def test_a_models_call_is_told_as_the_genai_conventions_want_it(collector: Collector, telemetry: Telemetry) -> None:
    model = {"model": "gemini/gemini-2.5-pro"}
    used: dict[str, int | float] = {
        "duration": 2_000_000_000,
        "input_tokens": 20,
        "output_tokens": 11,
        "tokens": 31,
        "cost": 0.25,
    }
    with telemetry.otel(collector.endpoint):
        prompt = json.dumps([{"role": "user", "content": "Why?"}])
        emit(telemetry, "bridge.dspy.lm.start", {"system_time": 1}, execution(**model, prompt=prompt))
        more: dict[str, Any] = {
            "response_model": "gemini-2.5-pro-002",
            "cache_hit": False,
            "completion": '["Because."]',
        }
        emit(telemetry, "bridge.dspy.lm.stop", {**used, "first_token": 300_000_000}, execution(**model, **more))
        emit(telemetry, "bridge.dspy.lm.start", {"system_time": 1}, execution(ROOT, None, **model))
        emit(
            telemetry, "bridge.dspy.lm.exception", {"duration": 1}, execution(ROOT, None, **model, error="RateLimited")
        )
        emit(telemetry, "bridge.dspy.tool.start", {"system_time": 1}, execution(tool="search"))
        emit(telemetry, "bridge.dspy.tool.stop", {"duration": 1}, execution(tool="search"))
    told, failed, tool = collector.spans
    assert (told.name, told.kind) == ("chat gemini-2.5-pro", 3)
    attributes = said(told.attributes)
    assert {name: value for name, value in attributes.items() if name.startswith("gen_ai.")} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "gcp.gemini",
        "gen_ai.request.model": "gemini-2.5-pro",
        "gen_ai.response.model": "gemini-2.5-pro-002",
        "gen_ai.response.time_to_first_chunk": 0.3,
        "gen_ai.usage.input_tokens": 20,
        "gen_ai.usage.output_tokens": 11,
        "gen_ai.input.messages": '[{"role":"user","parts":[{"type":"text","content":"Why?"}]}]',
        "gen_ai.output.messages": '[{"role":"assistant","parts":[{"type":"text","content":"Because."}]}]',
    }
    assert (attributes["bridge.cost"], attributes["bridge.cache_hit"]) == (0.25, False)
    assert "bridge.prompt" not in attributes
    assert said(failed.attributes)["error.type"] == "RateLimited"
    assert "gen_ai.input.messages" not in said(failed.attributes), "it was not captured"
    assert (tool.name, said(tool.attributes)["gen_ai.tool.name"]) == ("execute_tool search", "search")
    common = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "gcp.gemini"}
    common |= {"gen_ai.request.model": "gemini-2.5-pro"}
    assert collector.points("gen_ai.client.token.usage") == [
        ({**common, "gen_ai.token.type": "input"}, (1, 20)),
        ({**common, "gen_ai.token.type": "output"}, (1, 11)),
    ]
    assert collector.points("gen_ai.client.operation.duration") == [
        (common, (1, 2.0)),
        ({**common, "error.type": "RateLimited"}, (1, 1e-9)),
    ]
    assert collector.points("bridge.lm.cost") == [(common, 0.25)]


def test_a_prompt_that_was_clipped_is_one_text(collector: Collector, telemetry: Telemetry) -> None:
    with telemetry.otel(collector.endpoint, metrics=False, logs=False):
        clipped = execution(model="local", prompt='[{"role": "user", "content": "Wh…')
        emit(telemetry, "bridge.dspy.lm.start", {"system_time": 1}, clipped)
        emit(telemetry, "bridge.dspy.lm.stop", {"duration": 1}, execution(model="local"))
    attributes = said(collector.spans[0].attributes)
    (message,) = json.loads(attributes["gen_ai.input.messages"])
    assert message["parts"] == [{"type": "text", "content": '[{"role": "user", "content": "Wh…'}]
    assert (attributes["gen_ai.provider.name"], attributes["gen_ai.request.model"]) == ("unknown", "local")


def test_a_command_goes_on_with_the_trace_of_the_hosts_own_opentelemetry(
    collector: Collector, shared_host: Host, session: Session
) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("mine")
    with shared_host.telemetry.otel(collector.endpoint, metrics=False, logs=False):
        with tracer.start_as_current_span("mine") as mine:
            session.call("math.sqrt", 4)
        session.call("math.sqrt", 9)
    ids = mine.get_span_context()
    commands = [span for span in collector.spans if span.name == "bridge.command math.sqrt"]
    assert [span.trace_id == ids.trace_id.to_bytes(16) for span in commands] == [True, False]
    assert [span.parent_span_id for span in commands] == [ids.span_id.to_bytes(8), b""]
    (ran,) = [s for s in collector.spans if s.parent_span_id == commands[0].span_id]
    assert (ran.name, ran.trace_id) == ("bridge.execution math.sqrt", commands[0].trace_id)
    with tracer.start_as_current_span("later"):
        session.call("math.sqrt", 4)
    last = shared_host.telemetry.events("bridge", "command", "stop")[-1]
    assert last.metadata["parent_span_id"] is None, "it was closed"


def test_what_the_hosts_own_opentelemetry_does_not_record_bridge_does_not_record(
    collector: Collector, shared_host: Host, session: Session
) -> None:
    tracer = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False).get_tracer("mine")
    with (
        shared_host.telemetry.otel(collector.endpoint, metrics=False, logs=False),
        tracer.start_as_current_span("mine"),
    ):
        session.call("math.sqrt", 4)
    assert not collector.spans


def test_two_exporters_may_be_closed_in_any_order(telemetry: Telemetry, collector: Collector) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("mine")
    telemetry.tracer.outside = None
    for first in (0, 1):
        both = [telemetry.otel(collector.endpoint) for _ in range(2)]
        with tracer.start_as_current_span("mine") as mine:
            wanted = format(mine.get_span_context().trace_id, "032x")
            both.pop(first).close()
            assert wanted in str(telemetry.traceparent())
            both.pop().close()
            assert telemetry.traceparent() is None


# -- metrics -------------------------------------------------------------------------


def test_the_metrics_sum_what_happened(collector: Collector, telemetry: Telemetry) -> None:
    with telemetry.otel(collector.endpoint, traces=False, logs=False) as exporter:
        for _ in range(3):
            command(telemetry, "answer", 500_000_000)
        command(telemetry, "answer", 250_000_000, "ValueError")
        command(telemetry, "ask", 1_000_000_000, "bridge.Cancelled")
        measured: dict[str, int | float] = {"duration": 125_000_000, "queue": 62_500_000}
        emit(telemetry, "bridge.execution.stop", measured, execution(success=True, error=None))
        routed = {"kernel": "k1", "strategy": "fastest", "subject": "answer", "session": "s"}
        emit(telemetry, "bridge.pool.route", {"queue": 1_000_000_000, "candidates": 2, "expected": 5}, routed)
        emit(telemetry, "bridge.tool.stop", {"duration": 500_000_000}, {"tool": "look_up", "session": "s"})
        for kernel, rss in (("k1", 100), ("k2", 300), ("k3", 1000)):
            size: dict[str, int | float] = {"rss": rss, "in_flight": 0, "round_trip": 1}
            emit(telemetry, "bridge.kernel.memory", size, {"kernel": kernel, "pid": 1})
        gone = {"kernel": "k3", "pid": 1, "exit_code": -9, "expected": False, "reason": "killed"}
        emit(telemetry, "bridge.kernel.stop", {"duration": 1, "system_time": 1, "lost": 0}, gone)
        running = {"command": "function.call", "subject": "answer", "session": "s", "command_id": "d"}
        running |= {"trace_id": TRACE, "span_id": CHILD}
        emit(telemetry, "bridge.command.start", {"system_time": 1}, {**running, "parent_span_id": None})
        assert exporter.flush()
    answer, failed = {"bridge.subject": "answer"}, {"bridge.subject": "answer", "error.type": "ValueError"}
    cancelled = {"bridge.subject": "ask", "error.type": "bridge.Cancelled"}
    assert collector.points("bridge.command.duration") == [
        (answer, (3, 1.5)),
        (failed, (1, 0.25)),
        (cancelled, (1, 1.0)),
    ]
    assert collector.points("bridge.commands") == [
        ({**answer, "bridge.outcome": "ok"}, 3),
        ({**answer, "bridge.outcome": "error"}, 1),
        ({"bridge.subject": "ask", "bridge.outcome": "cancelled"}, 1),
    ]
    assert collector.points("bridge.errors") == [(failed, 1)]
    assert collector.points("bridge.execution.duration") == [(answer, (1, 0.125))]
    assert collector.points("bridge.queue.wait") == [
        ({"bridge.where": "kernel"}, (1, 0.0625)),
        ({"bridge.where": "host"}, (1, 1.0)),
    ]
    assert collector.points("bridge.tool.duration") == [({"gen_ai.tool.name": "look_up"}, (1, 0.5))]
    assert collector.points("bridge.kernels") == [({}, 2)]
    assert collector.points("bridge.kernels.memory") == [({"bridge.of": "all"}, 400), ({"bridge.of": "largest"}, 300)]
    assert collector.points("bridge.kernel.ends") == [({"bridge.expected": False}, 1)]
    assert collector.points("bridge.in_flight") == [({}, 1)]
    assert collector.metrics["bridge.command.duration"].unit == "s"
    assert not any(b"session" in body for body in collector.bodies)


def test_commands_that_are_not_sampled_are_counted_all_the_same(
    collector: Collector, shared_host: Host, session: Session
) -> None:
    with shared_host.telemetry.otel(collector.endpoint, interval_s=60) as exporter:
        shared_host.telemetry.sampling = 0
        try:
            session.call("math.hypot", 3, 4)
        finally:
            shared_host.telemetry.sampling = 1
        assert exporter.flush()
    assert ({"bridge.subject": "math.hypot", "bridge.outcome": "ok"}, 1) in collector.points("bridge.commands")
    assert not [span for span in collector.spans if "math.hypot" in span.name]
    assert not shared_host.telemetry.counting


def test_kernels_that_were_there_before_the_export_are_counted(shared_host: Host, collector: Collector) -> None:
    with shared_host.telemetry.otel(collector.endpoint, traces=False, logs=False):
        pass
    assert collector.points("bridge.kernels") == [({}, len(shared_host.kernels()))]


def test_the_metrics_stay_few_whatever_is_called(collector: Collector, telemetry: Telemetry) -> None:
    with telemetry.otel(collector.endpoint, traces=False, logs=False):
        for n in range(400):
            command(telemetry, f"f{n}", 1, span_id=f"{n + 1:016x}")
    points = {attributes["bridge.subject"]: n for attributes, n in collector.points("bridge.commands")}
    assert len(points) == 301
    assert points["(others)"] == 100


def test_prometheus_reads_the_metrics_on_loopback_until_it_is_closed(telemetry: Telemetry) -> None:
    exporter = telemetry.otel(traces=False, metrics=False, logs=False, prometheus=0)
    for _ in range(3):
        command(telemetry, "answer", 500_000_000)
    exporter.flush()
    url = exporter.prometheus_url
    assert url is not None
    with urllib.request.urlopen(url, timeout=60) as answer:
        page = answer.read().decode()
    assert 'bridge_commands_total{bridge_outcome="ok",bridge_subject="answer"} 3.0' in page
    assert 'bridge_command_duration_seconds_sum{bridge_subject="answer"} 1.5' in page
    assert 'service_name="bridge"' in page
    port = int(url.split(":")[2].split("/")[0])
    with pytest.raises(OSError, match="in use"):
        telemetry.otel(traces=False, metrics=False, logs=False, prometheus=port)
    assert url in repr(exporter)
    exporter.close()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=10):
        pass


# -- logs ----------------------------------------------------------------------------


def test_an_error_is_logged_within_its_trace(collector: Collector, shared_host: Host, session: Session) -> None:
    session.function("fail", "def fail(ctx):\n    raise ValueError('a value that nobody is told')\n")
    with shared_host.telemetry.otel(collector.endpoint, metrics=False):
        with pytest.raises(Exception, match="a value that"):
            session.call("fail")
        session.call("math.sqrt", 4)
    (record,) = collector.logs
    (span,) = [span for span in collector.spans if span.name == "bridge.command fail"]
    assert (record.trace_id, record.span_id) == (span.trace_id, span.span_id)
    assert (record.event_name, record.severity_text) == ("bridge.command.exception", "ERROR")
    assert record.body.string_value == f"fail failed: {said(record.attributes)['error.type']}"
    assert not any(b"nobody" in body for body in collector.bodies)


def test_what_goes_wrong_with_kernels_and_handlers_is_logged(collector: Collector, telemetry: Telemetry) -> None:
    with telemetry.otel(collector.endpoint, traces=False, metrics=False):
        for expected in (True, False):
            gone = {"kernel": "k3", "pid": 1, "exit_code": -9, "expected": expected, "reason": "signal 9"}
            emit(telemetry, "bridge.kernel.stop", {"duration": 1, "system_time": 77, "lost": 2}, gone)
        breaker = {"subject": "answer", "kernel": "", "reason": "5 failures"}
        emit(telemetry, "bridge.pool.breaker.open", {"failures": 5, "cooldown": 1000}, breaker)
        worn = {"kernel": "k1", "pid": 1, "reason": "memory"}
        emit(telemetry, "bridge.pool.recycle", {"completed": 1, "age": 1, "rss": 1}, worn)
        telemetry.attach("bridge.user", lambda event: 1 / 0, id="mine")
        with pytest.warns(UserWarning, match="was detached"):
            telemetry.tell(USER, {}, {})
    assert [(record.severity_text, record.body.string_value) for record in collector.logs] == [
        ("ERROR", "kernel k3 died: signal 9"),
        ("ERROR", "answer is held back: 5 failures"),
        ("WARN", "kernel k1 is going to be replaced: memory"),
        ("ERROR", "telemetry handler mine raised ZeroDivisionError and was detached"),
    ]
    assert collector.logs[0].time_unix_nano == 77
    assert said(collector.logs[1].attributes)["bridge.cooldown_ns"] == 1000


# -- a collector that is not there ---------------------------------------------------


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_a_collector_that_is_down_costs_one_warning(
    telemetry: Telemetry, caplog: pytest.LogCaptureFixture, shared_host: Host, session: Session
) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    with caplog.at_level(logging.WARNING), pytest.warns(UserWarning, match="does not get to") as warned:
        exporter = shared_host.telemetry.otel(endpoint, headers={"Authorization": SECRET}, timeout_s=0.5)
        for _ in range(2):
            assert session.call("math.sqrt", 4) == 2
            assert not exporter.flush()
        exporter.close()
    assert len(warned) == 1
    assert endpoint in str(warned[0].message)
    assert exporter.dropped >= 4
    assert "dropped" in repr(exporter)
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]
    assert SECRET not in repr(exporter) + str(warned[0].message)


def test_what_others_send_to_a_collector_is_logged_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    theirs = OTLPSpanExporter(f"http://127.0.0.1:{free_port()}/v1/traces", timeout=0.1)
    with caplog.at_level(logging.WARNING):
        theirs.export([])
    theirs.shutdown()  # type: ignore[no-untyped-call]
    assert [record for record in caplog.records if "Failed to export" in record.getMessage()]


def test_a_collector_that_hangs_does_not_hold_up_commands_nor_the_close(shared_host: Host, session: Session) -> None:
    hold = threading.Event()
    before = set(threading.enumerate())
    with Collector(hold=hold) as collector, pytest.warns(UserWarning, match="does not get to"):
        exporter = shared_host.telemetry.otel(collector.endpoint, timeout_s=0.3, interval_s=0.05)
        assert session.call("math.sqrt", 4) == 2
        assert collector.asked.wait(60)
        assert session.call("math.sqrt", 9) == 3
        exporter.close()
        ours = [t for t in set(threading.enumerate()) - before if t.name.startswith(("bridge-otel", "Otel"))]
        assert not [thread.name for thread in ours]
        hold.set()


def test_a_collector_that_refuses_is_warned_of_with_its_reason(telemetry: Telemetry) -> None:
    with Collector(status=401) as collector, pytest.warns(UserWarning, match="401"):
        exporter = telemetry.otel(collector.endpoint, metrics=False, logs=False)
        command(telemetry, "answer", 1)
        exporter.close()
    assert exporter.dropped == 1


def test_headers_go_to_the_collector_and_nowhere_else(telemetry: Telemetry, collector: Collector) -> None:
    endpoint = collector.endpoint.replace("//", "//somebody:very-secret-password@")
    exporter = telemetry.otel(endpoint, headers={"X-Api-Key": SECRET}, metrics=False, logs=False)
    command(telemetry, "answer", 1)
    assert exporter.flush()
    telemetry.close()
    assert {name.lower(): value for name, value in collector.headers[0].items()}["x-api-key"] == SECRET
    assert repr(exporter) == f"<OpenTelemetry {collector.endpoint}: 1 spans, closed>"
    assert not any(SECRET.encode() in body for body in collector.bodies)


def test_closing_sends_what_has_happened_and_the_host_closes_its_exporters(
    telemetry: Telemetry, collector: Collector, tmp_path: Path
) -> None:
    exporter = telemetry.otel(collector.endpoint, service_name="mine")
    lines = telemetry.to_file(tmp_path / "events.jsonl")
    command(telemetry, "answer", 1, "ValueError")
    telemetry.close()
    assert len(collector.spans) == len(collector.logs) == 1
    assert collector.services == {"mine"}
    assert len(read(tmp_path / "events.jsonl")) == 2
    command(telemetry, "answer", 1)
    exporter.close()
    lines.close()
    assert len(collector.spans) == 1


def test_an_event_that_is_not_as_the_catalogue_says_is_counted_and_spoils_no_other(
    telemetry: Telemetry, collector: Collector
) -> None:
    with telemetry.otel(collector.endpoint, logs=False) as exporter:
        exporter._feed.put(Event(("bridge", "command", "stop"), {"duration": 1}, {}))
        exporter._feed.put(Event(("bridge", "execution", "stop"), {"duration": 1}, execution(span="no hexadecimal")))
        command(telemetry, "answer", 1)
    assert exporter.dropped == 1
    assert [span.name for span in collector.spans] == ["bridge.command answer"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"endpoint": "127.0.0.1:4318"}, "an address like http"),
        ({"traces": False, "metrics": False, "logs": False}, "nothing is to be exported"),
        ({"interval_s": 0}, "more than 0"),
    ],
)
def test_what_cannot_be_exported_is_said_at_once(telemetry: Telemetry, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        telemetry.otel(**options)


def test_opentelemetry_is_imported_when_it_is_asked_for_and_without_it_is_said_what_to_install() -> None:
    code = """
import sys
from bridge_host.telemetry import Telemetry
telemetry = Telemetry()
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
sys.modules["opentelemetry.sdk._logs"] = None
try:
    telemetry.otel("http://127.0.0.1:4318")
except ModuleNotFoundError as exc:
    print(exc)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'bridge-kernel[otel]'" in told


def test_the_hosts_own_tracer_is_left_alone(telemetry: Telemetry, collector: Collector) -> None:
    before = trace_api.get_tracer_provider()
    with telemetry.otel(collector.endpoint):
        assert trace_api.get_tracer_provider() is before


def test_a_host_that_closes_sends_all_that_has_happened_first(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with Host(live=False) as host:
        for _ in range(20):
            with host.telemetry.to_file(tmp_path / "other.jsonl"):
                pass
        host.telemetry.to_file(path)
        assert len(host.telemetry._exporters) == 1, "what was closed is let go"
        session = host.session()
        for number in range(5):
            session.call("math.sqrt", number)
    names = [".".join(json.loads(line)["name"]) for line in path.read_text().splitlines()]
    assert names.count("bridge.execution.stop") == names.count("bridge.command.stop") == 5
