"""What the host takes from kernels, and hands to handlers: it waits for nobody, believes little, and breaks nothing."""

from __future__ import annotations

import asyncio
import threading
import warnings
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from bridge_host import Host, Telemetry
from bridge_host.telemetry import intake as intake_module
from bridge_kernel.contract.catalogue import EVENTS, from_kernel
from bridge_kernel.contract.telemetry import TELEMETRY_MIME, Event
from conftest import eventually

if TYPE_CHECKING:
    from bridge_host import Session

SEEN = {"name": ["bridge", "user", "seen"], "measurements": {}, "metadata": {}}


def display(*events: dict[str, Any], id: str = "bridge-x-1", batches: int = 1, **more: Any) -> bytes:
    batch = {"command": 1, "metadata": {}, "events": events, "settled": True, **more}
    data = {TELEMETRY_MIME: [batch] * batches, "text/plain": "a line"}
    return msgspec.json.encode({"data": data, "transient": {"display_id": id}})


# -- waiting -----------------------------------------------------------------


def test_what_never_comes_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "SYNC_S", 0.01)
    telemetry = Telemetry()
    telemetry.intake.expect("bridge-x-1")
    telemetry.sync()
    assert not telemetry.intake._expected


def test_what_is_answered_meanwhile_is_not_waited_for() -> None:
    telemetry = Telemetry()
    telemetry.intake.expect("bridge-x-1")
    telemetry.attach("bridge.user", lambda event: telemetry.intake.expect("bridge-x-2"))
    telemetry.intake.take_display(display(SEEN))
    telemetry.sync()
    assert list(telemetry.intake._expected) == ["bridge-x-2"]


def test_who_looks_waits_for_a_thread_that_is_in_the_middle_of_reading() -> None:
    telemetry = Telemetry()
    reading, go_on = threading.Event(), threading.Event()

    def slow(event: Event) -> None:
        reading.set()
        assert go_on.wait(60)

    handler = telemetry.attach("bridge.user", slow)
    telemetry.intake.expect("bridge-x-1")
    telemetry.intake.take_display(display(SEEN, SEEN))
    reader = threading.Thread(target=telemetry.intake.read)
    reader.start()
    assert reading.wait(60)
    telemetry.detach(handler)
    threading.Timer(0.02, go_on.set).start()
    assert len(telemetry.events("bridge", "user")) == 2
    reader.join()


def test_a_handler_that_runs_a_command_on_another_thread_does_not_stop_the_host() -> None:
    def slow(ctx: Any) -> int:
        import time

        for n in range(3):
            ctx.progress(n)
            time.sleep(0.11)  # until the kernel has told of it
        return 1

    told: list[Any] = []
    with Host(kernels=1, live=False) as host:
        session = host.session()
        session.function("slow", slow)

        def handler(event: Event) -> None:
            if not told:
                told.append(None)
                told.append(session.call("slow", deadline=5))

        host.telemetry.attach("bridge.user", handler)
        reading = threading.Thread(target=host.telemetry.intake.read)
        host.telemetry.intake._unread.append(display(SEEN))
        reading.start()
        reading.join()
    assert told == [None, 1]


def test_a_handler_may_look_at_the_telemetry_however_much_there_is_to_read() -> None:
    telemetry = Telemetry()
    seen: list[int] = []
    telemetry.attach("bridge.user", lambda event: seen.append(len(telemetry.events("bridge", "user"))))
    for n in range(200):
        telemetry.intake.take_display(display(SEEN, id=f"bridge-x-{n}"))
    telemetry.sync()
    assert seen == list(range(1, 201)), "in order, each once, and none within another"


def test_telemetry_that_is_switched_on_while_a_command_runs_is_not_waited_for(
    session: Session, shared_host: Host
) -> None:
    telemetry = shared_host.telemetry
    session.tool(lambda: telemetry.enable(), name="switch")
    telemetry.disable()
    try:
        session.function("switch_on", "def switch_on(ctx):\n    ctx.call_tool('switch')\n")
        session.call("switch_on")
        assert not telemetry.intake._expected
    finally:
        telemetry.enable()


def test_a_burst_of_commands_of_which_some_are_not_recorded_leaves_nothing_to_wait_for() -> None:
    with Host(kernels=1, live=False) as host:
        session = host.session()
        for sampled in (True, False) * 5:
            with host.telemetry.span("part", traceparent=f"00-{'a' * 32}-{'b' * 16}-0{sampled:d}"):
                session.call("math.sqrt", 4.0)
        eventually(lambda: not host.telemetry.intake._expected, "all has come")


# -- distrust ----------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [display().replace(b"a line", b"\xff"), b'{"x":' + b"[" * 100_000, b"", b'{"data":1}', display()[:-3]],
    ids=["no UTF-8", "deep", "nothing", "another shape", "cut"],
)
def test_a_display_that_cannot_be_read_costs_nothing_but_itself(content: bytes) -> None:
    telemetry = Telemetry()
    telemetry.intake.take_display(content)
    telemetry.intake.take_display(display(SEEN))
    assert len(telemetry.events("bridge", "user")) == 1


def test_a_kernel_is_not_believed_what_it_cannot_have_measured() -> None:
    execution = {"name": ["bridge", "execution", "stop"], "measurements": {"duration": 1}, "metadata": {}}
    rubbish: list[dict[str, Any]] = [
        execution,
        {"name": [], "measurements": {}, "metadata": {}},
        {"name": ["somebody", "else"], "measurements": {}, "metadata": {}},
        {"name": ["bridge", "kernel", "memory"], "measurements": {"rss": 2**70}, "metadata": {"kernel": "k"}},
        {"name": ["bridge", "command", "stop"], "measurements": {"duration": 1}, "metadata": {"subject": "forged"}},
    ]
    telemetry = Telemetry()
    telemetry.intake.take_display(display(*rubbish, SEEN, batches=3, dropped=5))
    assert [event.name for event in telemetry.events()] == [("bridge", "user", "seen")] * 3
    assert telemetry.intake.refused == 3 * len(rubbish)
    assert telemetry.lines() == []
    assert list(telemetry.latencies()) == []


def test_what_a_kernel_may_say_is_what_the_catalogue_has_of_it_and_what_later_ones_add() -> None:
    later = Event(("bridge", "execution", "paused"), {"duration": -5}, {})
    assert from_kernel(later)
    for known in EVENTS.values():
        said: dict[str, Any] = {
            name: {"string": "x", "integer": 1, "boolean": True}[one.kind] for name, one in known.metadata.items()
        }
        event = Event(known.name, dict.fromkeys(known.measurements, 1), {**said, "more": "of a later kernel"})
        assert from_kernel(event) == (known.side != "host")
        for name, one in known.metadata.items():
            assert not from_kernel(Event(known.name, event.measurements, {**said, name: 1.5}))
            lacking = {key: value for key, value in said.items() if key != name}
            assert from_kernel(Event(known.name, event.measurements, lacking)) == (
                known.side != "host" and one.optional
            )
        for name, measured in known.measurements.items():
            assert not from_kernel(Event(known.name, {**event.measurements, name: 2**63}, said))
            if measured.unit != "1":
                assert not from_kernel(Event(known.name, {**event.measurements, name: -1}, said))


def test_a_line_is_one_line_and_no_longer_than_lines_are() -> None:
    telemetry = Telemetry()
    content = display(SEEN).replace(b"a line", b"a line" * 10_000)
    telemetry.intake.take_display(content)
    (line,) = telemetry.lines()
    assert len(line) == intake_module.MAX_LINE


def test_displays_that_wait_for_a_slow_handler_are_bounded_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "MAX_WAITING", 300)
    telemetry = Telemetry()
    with telemetry.intake._reading:  # as by a thread whose handler does not come back
        for _ in range(500):
            telemetry.intake.take_display(display(SEEN))
    assert telemetry.intake.dropped == 200
    assert len(telemetry.events("bridge", "user")) == 300


# -- handlers ----------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError])
def test_a_handler_that_raises_breaks_nothing_even_where_warnings_are_errors(error: type[BaseException]) -> None:
    telemetry = Telemetry()

    def handler(event: Event) -> None:
        raise error

    telemetry.attach("bridge.user", handler, id="mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        telemetry.tell(("bridge", "user", "seen"), {}, {})
    (event,) = telemetry.events("bridge", "telemetry", "detach")
    assert event.metadata["handler"] == "mine"


def test_a_handler_that_would_have_to_be_awaited_is_refused() -> None:
    async def handler(event: Event) -> None:
        """Never awaited."""

    with pytest.raises(TypeError, match="not awaited"):
        Telemetry().attach("bridge", handler)


def test_a_death_is_not_told_where_it_is_switched_off(lonely_host: Host) -> None:
    telemetry = lonely_host.telemetry
    session = lonely_host.session()
    session.function("die", "def die(ctx):\n    import os\n    os.kill(os.getpid(), 9)\n")
    telemetry.disable("bridge.execution")
    with pytest.raises(Exception, match="kernel"):
        session.call("die", retries=0)
    assert telemetry.events("bridge", "execution") == []


def test_an_event_of_the_users_own_is_named_by_a_text_as_in_a_kernel() -> None:
    telemetry = Telemetry()
    telemetry.emit("seen", {"n": 1}, where="here")
    (event,) = telemetry.events("bridge.user")
    assert (event.name, event.measurements, event.metadata) == (("bridge", "user", "seen"), {"n": 1}, {"where": "here"})
    with pytest.raises(TypeError, match="the name of an event is a text"):
        telemetry.emit(("bridge", "command", "stop"))  # type: ignore[arg-type]
