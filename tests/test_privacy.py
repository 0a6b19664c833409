"""What telemetry never tells: secrets, planted wherever they could be, and values that nobody asked for."""

from __future__ import annotations

import json
import logging
import textwrap
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from bridge_host import BridgeError, Host, Telemetry
from bridge_host.telemetry.intake import Intake
from bridge_kernel.contract.secrets import forms_of, without_secrets
from bridge_kernel.contract.telemetry import CAPTURES
from otlp_collector import Collector
from scripted_lm import Refused, ScriptedLM, fields

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOKEN = 'sk-planted/"1\n+end'
"""A secret with what JSON, HTML and a repr write otherwise."""
KEY = "sk-planted-key-of-the-model"
TRACES = ("sk-planted", KEY[8:])
"""Parts of them that no way of writing them hides."""

UNKNOWING = "displays of kernels to which it was a value like any other"
"""What the host hears, and redacts before anybody else does."""

GIVEN, RETURNED, ASKED, ANSWERED = "private argument", "private result", "private question", "private answer"
PRIVATE = (GIVEN, RETURNED, ASKED, ANSWERED)

LEAK = """
def leak(ctx, given, fail):
    import sys
    token = ctx.secret("TOKEN")
    print(token)
    print(token, file=sys.stderr)
    ctx.progress(1, 2, token)
    ctx.emit(token, {"n": 1}, key=token, **{token: 1})
    with ctx.span(token, key=token) as said:
        said["later"] = token
        ctx.set_variable("x", 1)
    try:
        ctx.get_variable(token)
    except Exception:
        pass
    try:
        ctx.call_tool("look", value=token)
    except Exception:
        pass
    if fail:
        raise ValueError(token)
    return "private result"
"""

ASK = """
def ask(question, token):
    import dspy
    return dspy.Predict("question, token -> answer")(question=question, token=token).answer
"""


class Channels:
    """Everything that telemetry says, wherever it says it, as texts by channel."""

    def __init__(self) -> None:
        self.said: dict[str, list[str]] = {}
        self.displays = "displays of kernels"

    def hear(self, channel: str, *texts: object) -> None:
        self.said.setdefault(channel, []).extend(map(str, texts))

    def find(self, *parts: str) -> dict[str, str]:
        """By channel the first text that has one of the parts."""
        return {
            channel: next(text for text in texts if any(part in text for part in parts))
            for channel, texts in self.said.items()
            if any(part in text for text in texts for part in parts)
        }


def look_at(channels: Channels, host: Host) -> None:
    """All that people, and other programs, can see of a host's telemetry."""
    telemetry = host.telemetry
    events = telemetry.events()
    assert len(events) > 50
    channels.hear("events", *(msgspec.json.encode(event).decode() for event in events), *events)
    channels.hear("lines", *telemetry.lines())
    for id in telemetry.traces():
        trace = telemetry.trace(id)
        channels.hear("traces", trace, trace.frame().to_csv(), json.dumps(trace._repr_mimebundle_(), default=str))
    for name in ("latencies", "errors", "kernels", "models", "suggestions", "traces"):
        table: Any = getattr(telemetry, name)()
        channels.hear(name, table, table._repr_html_(), list(table))
    channels.hear("frame", telemetry.frame().to_csv())
    channels.hear("snapshot", msgspec.json.encode(telemetry.snapshots.take()).decode())
    logs = host.pool._host._host.pool.directory.rglob("*.log")
    channels.hear("logs of kernels", "", *(log.read_text() for log in logs))
    channels.hear("reprs", telemetry, host, *(host.session(id).telemetry for id in host.sessions()))


@pytest.fixture(scope="module", params=[False, True], ids=["captured-nothing", "captured-all"])
def channels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Channels:
    directory: Path = tmp_path_factory.mktemp("privacy")
    channels = Channels()
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        take_display = Intake.take_display

        def heard(self: Intake, content: bytes) -> None:
            channels.hear(channels.displays, content.decode())
            take_display(self, content)

        patch.setattr(Intake, "take_display", heard)
        logs = stack.enter_context(_logs(channels))
        collector = stack.enter_context(Collector())
        with Host(live=False, on_output=lambda output: channels.hear("output", output.text)) as host:
            host.telemetry.to_file(directory / "events.jsonl")
            host.telemetry.otel(collector.endpoint)
            _plant(host, channels, captured=request.param)
            look_at(channels, host)
        channels.hear("JSON lines", (directory / "events.jsonl").read_text())
        channels.hear("OpenTelemetry", *(body.decode(errors="replace") for body in collector.bodies))
        assert logs
    return channels


def _logs(channels: Channels) -> Any:
    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            channels.hear("logs", record.getMessage(), record.exc_text)

    handler = Heard()
    logging.getLogger().addHandler(handler)
    stack = ExitStack()
    stack.callback(logging.getLogger().removeHandler, handler)
    return stack


def _plant(host: Host, channels: Channels, *, captured: bool) -> None:
    session = host.session("planted")
    if captured:
        session.telemetry.capture = set(CAPTURES)
    session.secrets["TOKEN"] = TOKEN

    @session.tool
    def look(value: str) -> str:
        assert value == TOKEN, "the tool itself gets what it was sent"
        raise ValueError(f"a tool's error that says {value}")

    session.function("leak", LEAK, secrets=["TOKEN"])
    session.function("ask", ASK, lm=True)
    assert session.call("leak", GIVEN, False) == RETURNED
    with pytest.raises(BridgeError) as error:
        session.call("leak", GIVEN, True)
    channels.hear("errors that are raised", error.value, *error.value.__notes__)
    host.telemetry.sync()  # what has been told so far is under its own name
    # The host knows that it is one, the kernel does not: it is sent as any other value, and told of as such.
    channels.displays = UNKNOWING
    assert session.call("builtins.str", TOKEN) == TOKEN
    session.create("collections.Counter", {TOKEN: 1})
    for replies in ([fields(answer=ANSWERED + TOKEN)], [Refused(401, f"the key {KEY} is wrong")] * 5):
        with ScriptedLM(replies) as lm:
            session.lm(lm.model, api_base=lm.api_base, api_key=KEY, engine="lm15", num_retries=0)
            with suppress(BridgeError):
                session.call("ask", ASKED, TOKEN)
            assert lm.requests


def test_a_secret_is_in_no_channel(channels: Channels) -> None:
    assert len(channels.said) >= 14, "there is something to look through"
    assert channels.find(*TRACES).keys() <= {UNKNOWING}


def test_values_are_told_only_where_they_were_asked_for(channels: Channels, request: pytest.FixtureRequest) -> None:
    del channels.said["output"]
    found = channels.find(*PRIVATE)
    if request.node.callspec.params["channels"]:
        assert {"events", "displays of kernels", "JSON lines", "OpenTelemetry", "traces"} <= found.keys()
        assert all(any(value in text for text in channels.said["events"]) for value in PRIVATE)
        assert any("***" in text for text in channels.said["events"]), "secrets in them are starred out"
    else:
        assert found == {}


def test_what_is_captured_is_clipped_and_a_secret_at_the_cut_is_still_starred_out() -> None:
    with Host(live=False) as host:
        session = host.session()
        session.telemetry.capture = {"arguments", "results"}
        session.secrets["TOKEN"] = TOKEN
        given = "x" * 4080 + TOKEN + "y" * 10_000
        session.function("same", "def same(ctx, x):\n    return x\n", secrets=["TOKEN"])
        session.call("same", given)
        captured = [
            value
            for event in host.telemetry.events()
            for name, value in event.metadata.items()
            if name in ("arguments", "result")
        ]
        assert len(captured) == 2
        for text in map(str, captured):
            assert len(text) == 4096
            assert "sk-pl" not in text


def test_only_what_is_asked_for_is_captured_and_of_that_session_only() -> None:
    with Host(live=False) as host:
        asks, silent = host.session("asks"), host.session("silent")
        asks.telemetry.capture = {"results"}
        assert asks.telemetry.capture == {"results"}
        assert silent.telemetry.capture == set()
        for session in (asks, silent):
            session.call("math.sqrt", 1764.0)
        told = "".join(str(event) for event in asks.telemetry.events())
        assert "42.0" in told
        assert "1764" not in told
        assert "42.0" not in "".join(str(event) for event in silent.telemetry.events())
        with pytest.raises(ValueError, match="'everything'"):
            asks.telemetry.capture = {"everything"}  # type: ignore[arg-type]


def test_a_session_that_is_opened_again_captures_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bridge.db"
    with Host(live=False, store=path) as host:
        host.session("a").telemetry.capture = {"arguments"}
    with Host(live=False, store=path) as host:
        assert host.session("a").telemetry.capture == set()


def test_telemetry_of_no_host_redacts_nothing_and_breaks_nothing() -> None:
    assert Telemetry().intake.secrets_of("a session") == ()


def test_no_part_of_a_secret_is_left_where_a_name_or_a_text_is_cut() -> None:
    cut = """
        def cut(ctx):
            import dspy
            token = ctx.secret("TOKEN")
            for length in (198, 4094):
                ctx.emit("n" * length + token, {}, **{"k" * length + token: "v" * length + token})
                ctx.progress(1, 2, "m" * length + token)
                with ctx.span("s" * length + token):
                    pass
                try:
                    ctx.get_variable("x" * length + token)
                except Exception:
                    pass
            named = dspy.Tool(lambda x: x, name="t" * 198 + token, args={"x": {"type": "integer"}})
            return named(x=1)
    """
    with Host(live=False) as host:
        session = host.session()
        session.secrets["TOKEN"] = "sk-planted-at-the-cut"
        session.function("cut", textwrap.dedent(cut), secrets=["TOKEN"], lm=True)
        session.lm("openai/nobody", api_key=KEY)
        session.call("cut")
        told = "".join(map(str, host.telemetry.events()))
    assert told.count("dspy") >= 2
    assert "sk" not in told.replace("task", "")


def test_a_secret_that_its_kernel_did_not_know_is_starred_out_of_all_that_the_host_hears() -> None:
    said = """
        def said(ctx, given):
            ctx.emit(given, {given: 1}, **{given: given})
            ctx.progress(1, 2, given)
            with ctx.span(given):
                import time; time.sleep(0.3)  # until the line has been shown
    """
    batches: list[Any] = []
    with Host(live=False) as host:
        session = host.session()
        session.secrets["TOKEN"] = TOKEN
        session.function("said", textwrap.dedent(said))
        host.telemetry.intake.on_batch = lambda id, batch: batches.append(batch)
        session.call("said", TOKEN)
        told = [*map(str, host.telemetry.events()), *host.telemetry.lines(), *map(str, batches)]
    assert any("***" in text for text in told)
    assert not [text for text in told if "sk-planted" in text]


@pytest.mark.parametrize("write", [json.dumps, repr, lambda text: json.dumps(text, ensure_ascii=False)])
def test_a_secret_is_found_in_a_text_within_a_text(write: Callable[[Any], str]) -> None:
    secret = 'ein "Schlüssel"\nmit\\allem'
    assert without_secrets(write({"a": write({"b": secret})}), forms_of([secret])).count("***") == 1
