"""The lane of a real kernel, over real sockets: what it serves, what it refuses, and that nothing stops it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import zmq

from bridge_kernel.contract import openrpc
from bridge_kernel.contract.errors import Conflict, NotFound
from bridge_kernel.contract.frames import DELIMITER, comm_message
from bridge_kernel.contract.line import Line
from bridge_kernel.contract.messages import Failure, Request, Success, encode_request
from bridge_kernel.contract.methods import COMMANDS
from bridge_kernel.contract.telemetry import TELEMETRY_MIME, Trace, display_id
from bridge_kernel.output import Output
from bridge_kernel.sockets import Iopub
from bridge_kernel.telemetry import Recorder, together
from wire import Kernel, Wire, kernel_command, source, write_connection_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from wire import Received

PARSE, REQUEST, METHOD, PARAMS = -32700, -32600, -32601, -32602
REMOTE, CANCELLED, DEADLINE, NOT_FOUND, POLICY = -32000, -32002, -32003, -32005, -32007
OVERLOADED, DRAINING, MISMATCH, SOURCE_MISSING = -32009, -32010, -32011, -32012

GATED = "def gated(ctx, name='gate'): return ctx.call_tool(name)"
SPIN = """
    def spin(ctx):
        ctx.progress(1)
        while True:
            pass
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with Kernel(tmp_path_factory.mktemp("shared")) as kernel:
        yield kernel


@pytest.fixture
def host(kernel: Kernel) -> Iterator[Wire]:
    """A client of the shared kernel; whatever a test does, the kernel ends it idle and serving."""
    host = kernel.connect()
    yield host
    host.close()
    with_new_host = kernel.connect()
    with_new_host.until_idle()
    with_new_host.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Wire]]:
    """Start a kernel of the test's own, with the arguments given; its first client."""
    kernels: list[Kernel] = []

    def start(*arguments: str, attach: bool = True, transport: str = "ipc") -> Wire:
        directory = tmp_path / str(len(kernels))
        directory.mkdir()
        kernels.append(Kernel(directory, *arguments, transport=transport))
        return kernels[-1].connect(attach=attach)

    yield start
    for kernel in kernels:
        kernel.close()


@pytest.fixture(scope="module")
def fragile_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Kernel]]:
    kernels: list[Kernel] = []

    def alive() -> Kernel:
        if not kernels or not kernels[-1].connect(attach=False, welcome=False).heard_of():
            kernels.append(Kernel(tmp_path_factory.mktemp("fragile")))
        return kernels[-1]

    yield alive
    for kernel in kernels:
        kernel.close()


@pytest.fixture
def fragile(fragile_kernels: Callable[[], Kernel]) -> Iterator[Wire]:
    """A client of a kernel that the test may break without breaking others: a broken one is replaced."""
    wire = fragile_kernels().connect()
    yield wire
    wire.close()


@pytest.fixture
def fifo(tmp_path: Path) -> str:
    """Reading it blocks in the operating system, where no exception reaches, until the test writes to it."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return str(path)


def release(fifo: str) -> None:
    """Let a command that reads `fifo` go on."""
    # For reading too: so that opening it never blocks and writing never fails, whoever reads or has given up.
    fd = os.open(fifo, os.O_RDWR)
    os.write(fd, b"x")
    os.close(fd)


def progressed(host: Wire, command: int | str) -> None:
    """Wait until `command` says that it is at work."""
    host.expect(lambda m: m.method == "command.progress" and m.params["command"] == command, "progress")


def replies(host: Wire, id: int | str) -> list[Received]:
    return [m for m in host.received if isinstance(m.message, Success | Failure) and m.message.id == id]


# -- the handshake -----------------------------------------------------------


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_the_handshake_says_who_the_kernel_is_and_what_it_takes(
    start: Callable[..., Wire], transport: str, tmp_path: Path
) -> None:
    attached = start(attach=False, transport=transport).attach().result
    assert attached["protocol"] == [1, 0]
    assert attached["kernel"]["pid"] != os.getpid()
    assert set(attached["commands"]) == set(COMMANDS) - {"bridge.attach"}
    assert attached["limits"]["max_commands"] == 256
    assert attached["policy"]["allow_names"] == ["*"]
    assert attached["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_host_of_protocol_2_is_refused_with_both_versions_named(kernel: Kernel) -> None:
    for protocol, target in (([2, 0], "bridge.v1"), ([2, 0], "bridge.v2")):
        wire = kernel.connect(attach=False)
        refused = wire.attach(protocol=protocol, target=target)
        assert refused.code == MISMATCH
        assert "2.0" in refused.text
        assert "1.0" in refused.text
        wire.expect(lambda m: m.kind == "comm_close", "the comm's close")


def test_a_newer_minor_version_is_taken(kernel: Kernel) -> None:
    assert kernel.connect(attach=False).attach(protocol=[1, 7]).error is None


def test_a_first_message_other_than_attach_is_refused(kernel: Kernel) -> None:
    wire = kernel.connect(attach=False)
    wire.open(encode_request(7, "kernel.ping", {}))
    assert wire.reply(None).code == REQUEST
    wire = kernel.connect(attach=False)
    wire.open(encode_request(8, "bridge.attach", {"protocol": "one"}))
    assert wire.reply(8).code == PARAMS


def test_a_message_of_a_comm_that_was_never_opened_is_dropped(kernel: Kernel, host: Wire) -> None:
    before = host.dropped("unknown")
    stranger = kernel.connect(attach=False)
    stranger.start("kernel.ping")
    host.until(lambda: host.dropped("unknown") == before + 1, "the drop")
    assert not [m for m in stranger.received if m.kind == "comm_msg"]


def test_a_second_open_of_the_same_comm_is_ignored_and_the_first_lives_on(host: Wire) -> None:
    before = host.dropped("unknown")
    host.open(encode_request("again", "bridge.attach", {"protocol": [1, 0], "host": {"name": "x", "version": "0"}}))
    host.until(lambda: host.dropped("unknown") == before + 1, "the drop")
    assert not replies(host, "again")


def test_attach_as_a_command_is_no_command(host: Wire) -> None:
    assert host.request("bridge.attach", {}).code == METHOD


def test_two_hosts_of_one_kernel_do_not_see_one_anothers_messages(kernel: Kernel, host: Wire) -> None:
    other = kernel.connect()
    ids = {}
    for wire, name in ((host, "mine"), (other, "yours")):
        ids[name] = wire.call(
            "def talk(ctx, name): print(name); ctx.progress(1); ctx.call_tool(name); return name", name
        )
    for wire, name in ((host, "mine"), (other, "yours")):
        wire.answer(wire.callback(name), {"value": None})
        assert wire.reply(ids[name]).value == name
    assert not [m for m in host.received if b"yours" in m.raw]
    assert not [m for m in other.received if b"mine" in m.raw]
    assert {m.topic.split(".")[0] for m in host.received} == {f"comm-{host.comm_id}"}


def test_one_hosts_reply_does_not_answer_anothers_callback(kernel: Kernel, host: Wire) -> None:
    intruder = kernel.connect()
    running = host.call(GATED)
    asked = host.callback("gate")
    before = host.dropped("late")
    intruder.answer(asked, {"value": "forged"})
    host.until(lambda: host.dropped("late") == before + 1, "the drop")
    host.answer(asked, {"value": "true"})
    assert host.reply(running).value == "true"


def test_one_host_cannot_cancel_anothers_command(kernel: Kernel, host: Wire) -> None:
    intruder = kernel.connect()
    running = host.call(GATED)
    asked = host.callback("gate")
    intruder.cancel(running)
    sent = intruder.send("kernel_info_request", b"{}", channel="control")
    intruder.expect(lambda m: m.kind == "kernel_info_reply" and m.parent == sent, "so the cancel has been read")
    host.answer(asked, {"value": 1})
    assert host.reply(running).value == 1


def test_a_second_subscriber_to_the_same_topic_is_welcomed_too(kernel: Kernel) -> None:
    """Two ordinary Jupyter clients both subscribe to everything: each must learn that it misses nothing (JEP 65)."""
    kernel.connect(attach=False, topic="")
    kernel.connect(attach=False, topic="")


# -- what is not to be trusted -----------------------------------------------


def _altered(frames: list[Any], index: int, frame: bytes) -> list[Any]:
    return [*frames[:index], frame, *frames[index + 1 :]]


@pytest.mark.parametrize(
    "breakage",
    [
        pytest.param(lambda f: _altered(f, 1, b""), id="unsigned"),
        pytest.param(lambda f: _altered(f, 1, b"0" * 64), id="wrongly signed"),
        pytest.param(lambda f: _altered(f, 5, bytes(f[5]).replace(b"ping", b"pong")), id="altered"),
        pytest.param(lambda f: f[:5], id="without content"),
        pytest.param(lambda f: f[:2], id="signature only"),
        pytest.param(lambda f: f[1:], id="without delimiter"),
        pytest.param(lambda f: [b"router"] * 9 + f, id="too many identities"),
        pytest.param(lambda f: f + [b""] * 5000, id="too many frames"),
        pytest.param(lambda f: [b"\x00\xff garbage"], id="garbage"),
        pytest.param(lambda f: [b""], id="empty"),
    ],
)
@pytest.mark.parametrize("channel", ["shell", "control"])
def test_a_broken_message_is_dropped_and_counted_and_the_kernel_still_answers(
    host: Wire, breakage: Callable[[list[Any]], list[bytes]], channel: str
) -> None:
    before = host.dropped("malformed")
    content = comm_message(host.comm_id, encode_request("broken", "kernel.ping", {}))
    host.send_frames(breakage(host.pack("comm_msg", content)), channel=channel)
    host.until(lambda: host.dropped("malformed") == before + 1, "the drop")
    assert not replies(host, "broken")


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("comm_msg", b"not json"),
        ("comm_msg", b"[]"),
        ("comm_msg", b'{"comm_id": 5}'),
        ("comm_msg", b'{"comm_id": "\xff"}'),
        ("comm_msg", b"[" * 100_000),
        ("comm_open", b'{"comm_id": "", "target_name": "bridge.v1", "data": {}}'),
        ("comm_open", b'{"comm_id": "' + b"x" * 129 + b'", "target_name": "bridge.v1", "data": {}}'),
        ("comm_open", b'{"comm_id": "\\u0000", "target_name": "bridge.v1", "data": {}}'),
        ("shutdown_request", b'{"restart": "maybe"}'),
        ("shutdown_request", b'{"restart": "\xff"}'),
    ],
)
def test_a_signed_message_with_broken_content_is_dropped_and_counted(fragile: Wire, kind: str, content: bytes) -> None:
    host = fragile
    before = host.dropped("malformed")
    host.send(kind, content)
    host.until(lambda: host.dropped("malformed") == before + 1, "the drop")


@pytest.mark.parametrize("header", [b"", b"{}", b"[]", b'{"msg_id": "\xff", "msg_type": "comm_msg"}', b"{" * 100_000])
def test_a_signed_message_with_a_broken_header_is_dropped_and_counted(fragile: Wire, header: bytes) -> None:
    host = fragile
    before = host.dropped("malformed")
    # A signature of its own, whatever the kernel has seen: the same bytes again would be a replay.
    host.send_frames(host.codec.pack((), header, b"{}", metadata=json.dumps(host.comm_id).encode()))
    host.until(lambda: host.dropped("malformed") == before + 1, "the drop")


def test_a_replayed_message_is_dropped_and_counted(host: Wire) -> None:
    before = host.dropped("malformed")
    frames = host.pack("comm_msg", comm_message(host.comm_id, encode_request("once", "kernel.ping", {})))
    for channel in ("shell", "shell", "control"):
        host.send_frames(frames, channel=channel)
    host.until(lambda: host.dropped("malformed") == before + 2, "the drops")
    assert len(replies(host, "once")) == 1


def test_a_message_signed_with_another_key_is_dropped(host: Wire, tmp_path: Path) -> None:
    from bridge_kernel.contract.frames import FrameCodec

    before = host.dropped("malformed")
    other = FrameCodec(b"another key", session="x")
    content = comm_message(host.comm_id, encode_request("forged", "kernel.ping", {}))
    host.send_frames(other.pack((), other.header("comm_msg", "1", "now"), content))
    host.until(lambda: host.dropped("malformed") == before + 1, "the drop")
    assert not replies(host, "forged")


def test_ten_thousand_garbage_messages_are_dropped_and_counted_while_the_kernel_answers(host: Wire) -> None:
    before = host.dropped("malformed")
    flood = host.socket(zmq.DEALER, "shell_port")
    for number in range(10_000):
        flood.send_multipart([DELIMITER, b"garbage", b"%d" % number])
    assert host.request("kernel.ping").error is None
    host.until(lambda: host.dropped("malformed") == before + 10_000, "the drops")


def test_a_message_larger_than_the_limit_never_arrives_and_the_kernel_still_answers(
    start: Callable[..., Wire],
) -> None:
    host = start("--Policy.max_message_bytes=65536")
    in_parts = host.pack("comm_msg", comm_message(host.comm_id, encode_request("parts", "kernel.ping", {})))
    host.send_frames([*in_parts, *[b"x" * 30_000] * 3])
    host.until(lambda: host.dropped("malformed") == 1, "the drop")
    in_one = host.pack(
        "comm_msg", comm_message(host.comm_id, encode_request("one", "kernel.ping", {"x": "y" * 70_000}))
    )
    host.socket(zmq.DEALER, "shell_port").send_multipart(in_one)  # libzmq hangs up on whoever sends this
    assert host.run("abs", -1).code == NOT_FOUND
    assert host.run("math.fabs", -1).value == 1
    assert not replies(host, "parts")
    assert not replies(host, "one")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"1", REQUEST),
        (b"null", REQUEST),
        (b"{}", REQUEST),
        (b'{"jsonrpc": "1.0", "id": 1, "method": "kernel.ping"}', REQUEST),
        (b'{"jsonrpc": "2.0", "id": null, "method": "kernel.ping"}', REQUEST),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "kernel.ping", "result": 1}', REQUEST),
        (b'{"jsonrpc": "2.0", "id": 1, "method": 5}', REQUEST),
        (b'[{"jsonrpc": "2.0", "id": 1, "method": "kernel.ping"}]', REQUEST),
    ],
)
def test_what_is_no_json_rpc_message_is_answered_with_an_error_without_an_id(
    host: Wire, data: bytes, code: int
) -> None:
    host.send("comm_msg", b'{"comm_id": "%b", "data": %b}' % (host.comm_id.encode(), data))
    assert host.reply(None).code == code


def test_text_that_is_not_utf_8_is_answered_or_dropped_and_the_kernel_still_answers(fragile: Wire) -> None:
    host = fragile
    for data in (
        b'{"jsonrpc": "2.0", "id": 1, "method": "\xff"}',
        b'{"jsonrpc": "2.0", "id": 1, "method": "function.call", "params": {"session": "\xff"}}',
        b'{"jsonrpc": "2.0", "id": 1, "error": {"code": 1, "message": "\xff"}}',
    ):
        host.send("comm_msg", b'{"comm_id": "%b", "data": %b}' % (host.comm_id.encode(), data))
        assert host.request("kernel.ping", timeout_s=30).error is None


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("no.such", {}, METHOD),
        ("session.get", {"name": "x", "command": 1}, METHOD),  # the kernel's to send, not the host's
        ("command.cancel", {"command": 1}, METHOD),  # a notification
        ("function.call", {}, PARAMS),
        ("function.call", {"function": {"kind": "other"}}, PARAMS),
        ("function.call", {"function": {"kind": "path", "path": 5}}, PARAMS),
        ("function.call", {"function": {"kind": "path", "path": "math.fabs"}, "args": {}}, PARAMS),
        ("function.call", {"function": {"kind": "path", "path": "math.fabs"}, "deadline": -1}, PARAMS),
        ("function.call", {"function": {"kind": "path", "path": "math.fabs"}, "deadline": "1"}, PARAMS),
        ("function.call", {"function": {"kind": "path", "path": "math.fabs"}, "traceparent": "00"}, PARAMS),
        ("function.call", {"function": {"kind": "source", "name": "f", "hash": "00"}}, PARAMS),
        ("function.stream", {"function": {"kind": "path", "path": "math.fabs"}, "credit": 0}, PARAMS),
        ("function.call", {"function": {"kind": "path", "path": "math.pi"}}, PARAMS),
        ("function.stream", {"function": {"kind": "path", "path": "math.fabs"}, "args": [1]}, PARAMS),
        ("object.inspect", {}, PARAMS),
        ("instance.call", {"record": {"ref": "r"}}, PARAMS),
        ("function.call", {"function": {"kind": "path", "path": "math.no_such"}}, NOT_FOUND),
        ("function.call", {"function": {"kind": "path", "path": "no_such_module.f"}}, NOT_FOUND),
        ("function.call", {"function": {"kind": "path", "path": "math..fabs"}}, NOT_FOUND),
    ],
)
def test_unknown_methods_and_params_that_do_not_fit_have_their_codes(
    host: Wire, method: str, params: dict[str, Any], code: int
) -> None:
    assert host.request(method, params).code == code


def test_params_that_are_an_array_do_not_fit(host: Wire) -> None:
    host.send_data(encode_request("list", "function.call", [1, 2]))
    assert host.reply("list").code == PARAMS


def test_unknown_notifications_are_dropped_and_counted(host: Wire) -> None:
    before = host.dropped("unknown")
    host.notify("no.such", {})
    host.notify("command.progress", {"command": 1, "done": 1})  # the kernel's to send
    host.until(lambda: host.dropped("unknown") == before + 2, "the drops")


def test_the_id_of_a_running_command_is_refused_and_the_command_runs_on(host: Wire) -> None:
    host.start("function.call", {"function": source(GATED)}, id="twice")
    asked = host.callback("gate")
    assert host.request("kernel.ping", id="twice").code == REQUEST
    host.answer(asked, {"value": "done"})
    assert host.reply("twice").value == "done"
    assert host.request("kernel.ping", id="twice").error is None  # free again


def test_ids_may_be_strings_and_numbers_of_any_size(host: Wire) -> None:
    for id in ("", "a b", "ü", 0, -1, 2**63, 2**64, 2**70):
        assert host.request("kernel.ping", id=id).error is None
        assert host.reply(host.start("function.call", {"function": source("def f(): return 1")}, id=id)).value == 1


# -- busy, and still there ---------------------------------------------------


def test_ping_is_answered_while_ten_commands_block_and_a_thread_burns_cpu(host: Wire) -> None:
    blocked = [host.call(GATED) for _ in range(10)]
    asked = [host.callback("gate") for _ in range(10)]
    spinning = host.call(SPIN)
    progressed(host, spinning)
    assert host.busy() == 11
    for callback in asked:
        host.answer(callback, {"value": None})
    for command in blocked:
        assert host.reply(command).error is None
    host.until(lambda: host.busy() == 1, "the end of the ten")
    host.cancel(spinning)
    assert host.reply(spinning).code == CANCELLED


def test_the_heartbeat_echoes_while_a_command_holds_the_cpu(host: Wire) -> None:
    spinning = host.call(SPIN)
    progressed(host, spinning)
    assert all(host.heartbeat() for _ in range(20))
    host.cancel(spinning)
    assert host.reply(spinning).code == CANCELLED


def test_a_command_that_calls_a_tool_that_calls_the_kernel_does_not_deadlock(host: Wire) -> None:
    """Each waits for the next, forty deep: no pool of threads may run out."""
    outer = [host.call(GATED)]
    for _ in range(40):
        host.callback("gate", outer[-1])
        outer.append(host.call(GATED))
    asked = {m.params["command"]: m for m in host.received if m.method == "tool.call"}
    asked[outer[-1]] = host.callback("gate", outer[-1])
    for command in reversed(outer):
        host.answer(asked[command], {"value": command})
        assert host.reply(command).value == command


def test_more_commands_than_the_kernel_takes_are_refused_as_overloaded(start: Callable[..., Wire]) -> None:
    host = start("--Policy.max_commands=2")
    running = [host.call(GATED) for _ in range(2)]
    asked = [host.callback("gate") for _ in range(2)]
    refused = host.run("math.fabs", 1)
    assert refused.code == OVERLOADED
    assert refused.error is not None
    assert refused.error.data is not None
    assert refused.error.data.retryable
    assert host.busy() == 2
    for callback in asked:
        host.answer(callback, {"value": 1})
    assert [host.reply(command).value for command in running] == [1, 1]
    host.until_idle()
    assert host.run("math.fabs", 1).value == 1


# -- cancel ------------------------------------------------------------------

CANCELLABLE = {
    "asynchronous code": """
        import asyncio
        async def f(ctx):
            ctx.progress(1)
            await asyncio.Event().wait()
    """,
    "asynchronous code that waits for a callback": """
        async def f(ctx):
            ctx.progress(1)
            await ctx.call_tool("never")
    """,
    "synchronous code that waits for a callback": """
        def f(ctx):
            ctx.progress(1)
            ctx.call_tool("never")
    """,
    "a thread of its own that waits for a callback": """
        import threading
        def f(ctx):
            def ask():
                ctx.progress(1)
                ctx.call_tool("never")
            thread = threading.Thread(target=ask)
            threading.excepthook = lambda args: None
            thread.start()
            while thread.is_alive():
                thread.join(0.01)
    """,
    "a loop in pure Python": SPIN,
    "a loop that catches Exception": """
        def f(ctx):
            ctx.progress(1)
            while True:
                try:
                    while True:
                        pass
                except Exception:
                    pass
    """,
    "a callback that catches Exception": """
        def f(ctx):
            ctx.progress(1)
            while True:
                try:
                    ctx.call_tool("never")
                except Exception:
                    pass
    """,
    "asynchronous code that catches Exception": """
        async def f(ctx):
            ctx.progress(1)
            while True:
                try:
                    await ctx.call_tool("never")
                except Exception:
                    pass
    """,
}


@pytest.mark.parametrize("text", CANCELLABLE.values(), ids=CANCELLABLE.keys())
def test_cancel_over_control_answers_at_once_and_ends(host: Wire, text: str) -> None:
    spinning = host.call(SPIN)
    progressed(host, spinning)
    command = host.call(text)
    progressed(host, command)
    host.cancel(command)
    assert host.reply(command).code == CANCELLED
    host.until(lambda: host.busy() == 1, "its end")
    assert host.run("math.fabs", -1).value == 1
    host.cancel(spinning)
    assert host.reply(spinning).code == CANCELLED
    host.until_idle()
    assert len(replies(host, command)) == 1


def test_cancel_that_comes_right_behind_the_reply_to_a_callback_is_not_lost(fragile: Wire) -> None:
    """Both are there before the command's thread has woken: it must end all the same."""
    host = fragile
    for _ in range(20):
        command = host.call("def f(ctx):\n ctx.call_tool('gate')\n while True: pass")
        host.answer(host.callback("gate"), {"value": None})
        host.notify("command.cancel", {"command": command}, channel="shell")
        assert host.reply(command).code == CANCELLED
        host.until_idle(timeout_s=30)


def test_commands_cancelled_before_the_event_loop_came_to_them_end(fragile: Wire, fifo: str) -> None:
    """The loop is held up, coroutines queue behind it and are cancelled there: none may be left over."""
    host = fragile
    holding = host.call("async def hold(ctx, path):\n ctx.progress(1)\n open(path).read()", fifo)
    progressed(host, holding)
    queued = [host.call("async def f(): return 1") for _ in range(20)]
    assert host.run("def f(): return 1").value == 1  # so the threads before it have done their part
    for command in queued:
        host.cancel(command)
    assert [host.reply(command).code for command in queued] == [CANCELLED] * 20
    release(fifo)
    assert host.reply(holding).error is None
    host.until_idle(timeout_s=30)


def test_asynchronous_code_that_never_awaits_does_not_hold_up_others_once_it_is_cancelled(
    start: Callable[..., Wire],
) -> None:
    host = start()
    command = host.call("async def f(ctx):\n ctx.progress(1)\n while True: pass")
    progressed(host, command)
    host.cancel(command)
    assert host.reply(command).code == CANCELLED
    assert host.run("async def g(): return 1", timeout_s=30).value == 1


def test_cancel_of_a_command_that_has_ended_is_dropped_and_counted(host: Wire) -> None:
    command = host.call("math.fabs", 1)
    assert host.reply(command).value == 1
    before = host.dropped("late")
    host.cancel(command)
    host.until(lambda: host.dropped("late") == before + 1, "the drop")


def test_a_cancel_that_overtakes_its_command_is_not_lost(host: Wire) -> None:
    """Control is read before shell: a cancel sent right after its command may well arrive first."""
    id = 10**9
    host.cancel(id)
    asked = host.send("kernel_info_request", b"{}", channel="control")
    host.expect(lambda m: m.kind == "kernel_info_reply" and m.parent == asked, "so the cancel has been read")
    host.start("function.call", {"function": {"kind": "path", "path": "math.fabs"}, "args": [1]}, id=id)
    assert host.reply(id).code == CANCELLED


def test_cancel_with_params_that_do_not_fit_does_no_harm(host: Wire) -> None:
    host.notify("command.cancel", {"command": [1]})
    host.notify("command.cancel", {})
    assert host.request("kernel.ping").error is None


def test_callbacks_of_a_cancelled_command_are_refused(host: Wire, tmp_path: Path) -> None:
    mark = tmp_path / "refused"
    command = host.call(
        """
        def f(ctx, mark):
            try:
                ctx.call_tool("gate")
            finally:
                try:
                    ctx.call_tool("after")
                except BaseException as exc:
                    open(mark, "w").write(type(exc).__name__)
                    raise
        """,
        str(mark),
    )
    host.callback("gate")
    host.cancel(command)
    assert host.reply(command).code == CANCELLED
    host.until_idle()
    assert mark.read_text() == "CommandStopped"
    assert not [m for m in host.received if m.method == "tool.call" and m.params["name"] == "after"]


def test_code_that_ends_itself_as_cancelled_is_answered(host: Wire) -> None:
    assert host.run("import asyncio\nasync def f(): raise asyncio.CancelledError").code == CANCELLED


def test_a_late_reply_to_a_callback_is_dropped_and_counted(host: Wire) -> None:
    command = host.call(GATED)
    asked = host.callback("gate")
    host.cancel(command)
    assert host.reply(command).code == CANCELLED
    before = host.dropped("late")
    host.answer(asked, {"value": 1})
    host.answer(asked, NotFound("no"))
    host.until(lambda: host.dropped("late") == before + 2, "the drops")
    assert len(replies(host, command)) == 1


def test_a_thread_left_behind_by_its_command_does_not_wait_for_ever(host: Wire, tmp_path: Path) -> None:
    mark = tmp_path / "ended"
    text = """
        import threading
        def f(ctx, mark):
            def ask():
                try:
                    ctx.call_tool("gate")
                finally:
                    open(mark, "w").close()
            threading.excepthook = lambda args: None
            threading.Thread(target=ask, daemon=True).start()
            ctx.call_tool("end")
    """
    command = host.call(text, str(mark))
    host.callback("gate")
    host.answer(host.callback("end"), {"value": None})
    assert host.reply(command).error is None
    host.until(mark.exists, "the thread's end", timeout_s=30)


def test_interrupt_cancels_all_running_commands(host: Wire) -> None:
    commands = [host.call(text) for text in CANCELLABLE.values()]
    for command in commands:
        progressed(host, command)
    host.send("interrupt_request", b"{}", channel="control")
    assert [host.reply(command).code for command in commands] == [CANCELLED] * len(commands)
    answer = host.expect(lambda m: m.kind == "interrupt_reply", "the reply")
    assert answer.content == {"status": "ok"}
    host.until_idle()
    assert host.run("math.fabs", -1).value == 1


def run_cell(host: Wire, code: str) -> str:
    """Send a cell to the kernel; the msg_id to which it replies."""
    content = {"code": code, "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}
    return host.send("execute_request", json.dumps(content).encode())


@pytest.mark.parametrize("caught", [True, False])
def test_stopping_a_command_leaves_the_interpreter_as_it_was(start: Callable[..., Wire], caught: bool) -> None:
    host = start()
    stopped = host.call(
        """
        def f(ctx, caught):
            ctx.progress(1)
            try:
                while True:
                    pass
            except BaseException:
                if not caught:
                    raise
        """,
        caught,
    )
    progressed(host, stopped)
    host.cancel(stopped)
    assert host.reply(stopped).code == CANCELLED
    host.until_idle()
    # CPython 3.11 hangs here while it believes that an exception is yet to be raised in some thread.
    traced = """
        def f():
            import sys
            def line():
                return 1
            sys.settrace(lambda *_: None)
            try:
                return line()
            finally:
                sys.settrace(None)
    """
    assert host.run(traced).value == 1
    asked = run_cell(host, "1")
    assert host.expect(lambda m: m.kind == "execute_reply" and m.parent == asked).content["status"] == "ok"


def test_sigint_to_the_process_leaves_commands_and_kernel_alone(kernel: Kernel, host: Wire) -> None:
    command = host.call(GATED)
    asked = host.callback("gate")
    os.kill(kernel.process.pid, signal.SIGINT)
    assert host.request("kernel.ping").error is None
    host.answer(asked, {"value": 1})
    assert host.reply(command).value == 1


# -- deadlines ---------------------------------------------------------------


@pytest.mark.parametrize("text", CANCELLABLE.values(), ids=CANCELLABLE.keys())
def test_the_kernel_itself_ends_a_command_at_its_deadline(host: Wire, text: str) -> None:
    command = host.call(text, deadline=50)
    reply = host.reply(command)
    assert reply.code == DEADLINE
    assert "it had 0.05 s" in reply.text
    host.until_idle()
    assert len(replies(host, command)) == 1


def test_the_deadline_of_code_that_cannot_be_stopped_is_kept_and_its_late_result_dropped(host: Wire, fifo: str) -> None:
    command = host.call("def f(path): return open(path).read()", fifo, deadline=200)
    assert host.reply(command).code == DEADLINE
    assert host.busy() == 1  # it runs on
    release(fifo)
    host.until_idle()
    assert len(replies(host, command)) == 1


def test_the_deadline_of_a_sleeping_command_is_kept_while_it_sleeps(host: Wire) -> None:
    command = host.call("time.sleep", 0.8, deadline=30)
    assert host.reply(command).code == DEADLINE
    assert host.busy() == 1
    host.until_idle()
    assert len(replies(host, command)) == 1


def test_a_deadline_of_nothing_has_passed(host: Wire) -> None:
    assert host.run(GATED, deadline=0).code == DEADLINE


def test_a_command_that_ends_in_time_does_not_hear_of_its_deadline(host: Wire) -> None:
    command = host.call("math.fabs", -1, deadline=20)
    assert host.reply(command).value == 1
    assert host.run(GATED, deadline=60).code == DEADLINE  # so the first one's has passed too
    assert len(replies(host, command)) == 1


def test_a_command_sees_what_is_left_of_its_budget(host: Wire) -> None:
    left = host.run("def f(ctx): return ctx.deadline", deadline=60_000).value
    assert 50 < left <= 60
    assert host.run("def f(ctx): return ctx.deadline").value is None


# -- the place of a callback ---------------------------------------------------


def places(host: Wire, command: int | str | None) -> list[tuple[str, int | None]]:
    """The callbacks of a command in the order in which they came: method and `seq`."""
    requests = [m for m in host.received if isinstance(m.message, Request) and m.params["command"] == command]
    return [(m.method, m.params["seq"]) for m in requests]


@pytest.fixture
def answering(host: Wire) -> Wire:
    """A host that answers whatever it is asked, but for a tool named `no`."""

    def tool(params: dict[str, Any]) -> dict[str, Any]:
        if params["name"] == "no":
            raise NotFound("no such tool")
        return {"value": params["name"]}

    host.answers |= {
        "session.get": lambda params: {"value": params["name"], "version": 1},
        "session.get_many": lambda params: {"values": {}},
        "session.set": lambda params: {"version": 1},
        "session.delete": lambda params: {},
        "session.list": lambda params: {"variables": []},
        "tool.list": lambda params: {"tools": []},
        "tool.call": tool,
    }
    return host


EVERY_CALLBACK = """
    def f(ctx, given):
        ctx.get_variable("a")
        ctx.get_variables("a", "b")
        ctx.set_variable("a", 1)
        ctx.delete_variable("a")
        ctx.variables()
        ctx.progress(1)
        try:
            ctx.call_tool("no")
        except KeyError:
            pass
        ctx.tools()
        return given
"""
IN_ORDER = [
    "session.get",  # of the argument
    "session.get",
    "session.get_many",
    "session.set",
    "session.delete",
    "session.list",
    "tool.call",
    "tool.list",
]


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_the_callbacks_of_a_commands_own_flow_are_numbered_in_order_and_a_second_attempt_numbers_them_so_again(
    answering: Wire, kind: str
) -> None:
    host = answering
    text = textwrap.dedent(EVERY_CALLBACK).replace("def f", f"{kind} f")
    if kind == "async def":
        for name in ("get_variable", "set_variable", "delete_variable", "variables", "call_tool", "tools"):
            text = text.replace(f"    ctx.{name}", f"    await ctx.{name}")
    for attempt in (1, 2):
        command = host.call(text, {"$bridge": "variable", "name": "given"}, attempt=attempt)
        assert host.reply(command).value == "given"
        assert places(host, command) == [(method, i) for i, method in enumerate(IN_ORDER, 1)]


@pytest.mark.parametrize(
    ("text", "seqs"),
    [
        (
            """
            def f(ctx):
                import threading
                ctx.call_tool("a")
                for _ in range(2):
                    thread = threading.Thread(target=ctx.call_tool, args=("b",))
                    thread.start()
                    thread.join()
                ctx.call_tool("c")
            """,
            [("a", 1), ("b", None), ("b", None), ("c", 2)],
        ),
        (
            """
            def f(ctx):
                import asyncio
                async def within():
                    ctx.call_tool("b")
                ctx.call_tool("a")
                asyncio.run(within())
                ctx.call_tool("c")
            """,
            [("a", 1), ("b", None), ("c", 2)],
        ),
        (
            """
            async def f(ctx):
                import asyncio
                await ctx.call_tool("a")
                await asyncio.gather(ctx.call_tool("b"), ctx.call_tool("b"))
                await asyncio.create_task(ctx.call_tool("b"))
                await ctx.call_tool("c")
            """,
            [("a", 1), ("b", None), ("b", None), ("b", None), ("c", 2)],
        ),
    ],
    ids=["threads", "a loop of its own", "tasks"],
)
def test_the_callbacks_of_other_threads_and_tasks_have_no_place_and_take_none(
    answering: Wire, text: str, seqs: list[tuple[str, int | None]]
) -> None:
    host = answering
    command = host.call(text)
    assert host.reply(command).error is None
    calls = [m.params for m in host.received if m.method == "tool.call" and m.params["command"] == command]
    assert [(params["name"], params["seq"]) for params in calls] == seqs


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_the_callbacks_of_a_generator_are_numbered_across_its_chunks(answering: Wire, kind: str) -> None:
    host = answering
    wait = "await " if kind == "async def" else ""
    command = host.stream(
        f"""
        {kind} f(ctx):
            for i in range(3):
                {wait}ctx.call_tool("a")
                yield i
                {wait}ctx.get_variable("b")
        """,
        credit=1,
    )
    for i in range(3):
        assert host.chunk(command) == i
        host.notify("command.credit", {"command": command, "credit": 1}, channel="shell")
    assert host.reply(command).error is None
    assert places(host, command) == list(zip(["tool.call", "session.get"] * 3, range(1, 7), strict=True))


def test_a_callback_that_was_never_sent_takes_no_place(start: Callable[..., Wire]) -> None:
    host = start("--Policy.max_message_bytes=70000")
    host.answers["session.set"] = lambda params: {"version": 1}
    command = host.call(
        """
        def f(ctx):
            from bridge_kernel import BridgeError
            refused = []
            for value in (1, object(), "x" * 70_000, 2):
                try:
                    ctx["a"] = value
                except BridgeError as error:
                    refused.append(type(error).__name__)
            return refused
        """
    )
    assert host.reply(command).value == ["NotSerializable", "LimitExceeded"]
    assert places(host, command) == [("session.set", 1), ("session.set", 2)]


def test_commands_that_run_at_once_each_number_their_own(answering: Wire) -> None:
    commands = [answering.call("def f(ctx):\n for _ in range(20): ctx.call_tool('a')") for _ in range(4)]
    for command in commands:
        assert answering.reply(command).error is None
        assert [seq for _, seq in places(answering, command)] == list(range(1, 21))


def test_the_callbacks_of_a_cell_have_no_place(answering: Wire) -> None:
    asked = run_cell(answering, "session['a'] = 1; session['a']")
    assert answering.expect(lambda m: m.kind == "execute_reply" and m.parent == asked).content["status"] == "ok"
    assert places(answering, None) == [("session.set", None), ("session.get", None)]


# -- versions of variables -----------------------------------------------------


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_write_may_ask_for_the_version_that_it_replaces(answering: Wire, kind: str) -> None:
    host = answering

    def write(params: dict[str, Any]) -> dict[str, Any]:
        if params["if_version"] not in (None, 3):
            raise Conflict("a is at version 3")
        return {"version": 4}

    host.answers["session.set"] = host.answers["session.delete"] = write
    wait = "await " if kind == "async def" else ""
    command = host.call(
        f"""
        {kind} f(ctx):
            from bridge_kernel import Conflict
            versions = [{wait}ctx.set_variable("a", 1), {wait}ctx.set_variable("a", 1, if_version=3)]
            for write in (lambda: ctx.set_variable("a", 1, if_version=0), lambda: ctx.delete_variable("a", if_version=2)):
                try:
                    {wait}write()
                except Conflict as conflict:
                    versions.append(str(conflict))
            {wait}ctx.delete_variable("a", if_version=3)
            {wait}ctx.delete_variable("a")
            return versions
        """
    )
    assert host.reply(command).value == [4, 4, "a is at version 3", "a is at version 3"]
    sent = [(m.method, m.params["if_version"]) for m in host.received if m.method.startswith("session.")]
    assert sent == [
        ("session.set", None),
        ("session.set", 3),
        ("session.set", 0),
        ("session.delete", 2),
        ("session.delete", 3),
        ("session.delete", None),
    ]


# -- the heartbeat ---------------------------------------------------------------


def test_a_ping_is_no_command(start: Callable[..., Wire]) -> None:
    host = start("--Policy.max_commands=1")
    pid = host.run("os.getpid").value
    host.until_idle()
    running = host.call(GATED)
    gate = host.callback("gate")
    ping = host.start("kernel.ping")
    pong = host.reply(ping).result
    assert pong["busy"] == 1
    assert pong["rss"] == pytest.approx(psutil.Process(pid).memory_info().rss, rel=0.2)
    host.answer(gate, {"value": None})
    assert host.reply(running).error is None
    host.events(running)
    assert not [m for m in host.received if m.kind.endswith("display_data") and m.parent == host.msg_ids[ping]]
    assert host.request("kernel.stats").result["commands"]["received"] == 3


def test_a_ping_is_answered_by_a_kernel_that_drains_and_on_control(start: Callable[..., Wire]) -> None:
    host = start()
    assert host.request("kernel.drain").error is None
    assert host.request("kernel.ping").error is None
    assert host.request("kernel.ping", channel="control").error is None


def test_a_ping_does_not_import_psutil(start: Callable[..., Wire]) -> None:
    host = start()
    assert host.request("kernel.ping").error is None
    assert host.run("def f():\n import sys\n return 'psutil' in sys.modules").value is False


# -- drain and shutdown ------------------------------------------------------


def test_drain_waits_for_the_cell_that_runs_and_takes_no_other(start: Callable[..., Wire]) -> None:
    host = start()
    first = run_cell(host, "session.call_tool('gate')")
    gate = host.callback("gate")
    draining = host.start("kernel.drain")
    second = run_cell(host, "1")
    assert host.request("kernel.ping").error is None
    assert not replies(host, draining)
    host.answer(gate, {"value": None})
    assert host.expect(lambda m: m.kind == "execute_reply" and m.parent == first).content["status"] == "ok"
    assert host.expect(lambda m: m.kind == "execute_reply" and m.parent == second).content["ename"] == "Draining"
    assert host.reply(draining).result == {"finished": 1}


def test_drain_refuses_new_commands_finishes_the_running_ones_and_then_answers(start: Callable[..., Wire]) -> None:
    host = start()
    running = [host.call(GATED) for _ in range(3)]
    asked = [host.callback("gate") for _ in running]
    draining = host.start("kernel.drain")
    host.until(lambda: host.run("math.fabs", 1).code == DRAINING, "the refusal")
    assert host.request("kernel.ping").result["busy"] == 3
    assert not replies(host, draining)
    for callback in asked:
        host.answer(callback, {"value": 1})
    assert [host.reply(command).value for command in running] == [1, 1, 1]
    assert host.reply(draining).result == {"finished": 3}
    assert host.request("kernel.drain").result == {"finished": 0}


@pytest.mark.parametrize("channel", ["shell", "control"])
def test_shutdown_is_answered_and_the_process_ends_whatever_runs(start: Callable[..., Wire], channel: str) -> None:
    host = start()
    pid = host.run("os.getpid").value
    spinning = host.call(SPIN)
    progressed(host, spinning)
    process = psutil.Process(pid)
    host.send("shutdown_request", b'{"restart":false}', channel=channel)
    assert host.reply(spinning).code == CANCELLED
    assert host.expect(lambda m: m.kind == "shutdown_reply").content == {"status": "ok", "restart": False}
    host.until(lambda: _gone(process), "its end", timeout_s=30)


# -- streams -----------------------------------------------------------------

STREAMS = {
    "a generator": """
        def stream(ctx, count):
            for number in range(count):
                ctx.call_tool("made", number=number)
                yield number
            return "all"
    """,
    "an asynchronous generator": """
        async def stream(ctx, count):
            for number in range(count):
                await ctx.call_tool("made", number=number)
                yield number
    """,
}


@pytest.mark.parametrize("text", STREAMS.values(), ids=STREAMS.keys())
def test_a_producer_is_never_ahead_of_its_credit(host: Wire, text: str) -> None:
    made: list[int] = []

    def record(params: dict[str, Any]) -> dict[str, Any]:
        made.append(params["kwargs"]["number"])
        return {"value": None}

    host.answers["tool.call/made"] = record
    command = host.stream(text, 6, credit=2)
    assert [host.chunk(command), host.chunk(command)] == [0, 1]
    assert host.run("math.fabs", 1).value == 1  # the kernel's other business goes on meanwhile
    assert made == [0, 1]
    host.notify("command.credit", {"command": command, "credit": 1})
    assert host.chunk(command) == 2
    assert host.busy() == 1
    assert made == [0, 1, 2]
    host.notify("command.credit", {"command": command, "credit": 100})
    assert [host.chunk(command) for _ in range(3)] == [3, 4, 5]
    assert host.reply(command).result["chunks"] == 6


def test_what_a_generator_returns_arrives_with_the_end_of_its_stream(host: Wire) -> None:
    host.answers["tool.call/made"] = lambda params: {"value": None}
    reply = host.reply(host.stream(STREAMS["a generator"], 3, credit=10))
    assert reply.result == {"chunks": 3, "value": "all"}
    assert host.reply(host.stream("def empty():\n return 5\n yield", credit=1)).result == {"chunks": 0, "value": 5}


def test_chunks_are_numbered_and_come_before_the_end(host: Wire) -> None:
    command = host.stream("def many():\n yield from range(100)", credit=1000)
    assert host.reply(command).result["chunks"] == 100
    about = [m for m in host.received if m.parent == host.msg_ids[command]]
    assert [m.params["seq"] for m in about if m.method == "command.chunk"] == list(range(100))
    assert isinstance(next(m for m in reversed(about) if m.kind == "comm_msg").message, Success)


CLOSING = {
    "a generator that waits for credit": """
        def stream(ctx, mark):
            try:
                yield 0
                yield 1
            finally:
                open(mark, "w").write("closed")
    """,
    "a generator in a loop of its own": """
        def stream(ctx, mark):
            try:
                yield 0
                while True:
                    pass
            finally:
                open(mark, "w").write("closed")
    """,
    "a generator that waits for a callback": """
        def stream(ctx, mark):
            try:
                yield 0
                ctx.call_tool("never")
            finally:
                open(mark, "w").write("closed")
    """,
    "an asynchronous generator that waits for credit": """
        async def stream(ctx, mark):
            try:
                yield 0
                yield 1
            finally:
                open(mark, "w").write("closed")
    """,
    "an asynchronous generator that waits": """
        import asyncio
        async def stream(ctx, mark):
            try:
                yield 0
                await asyncio.Event().wait()
            finally:
                open(mark, "w").write("closed")
    """,
}


@pytest.mark.parametrize("text", CLOSING.values(), ids=CLOSING.keys())
def test_cancel_of_a_stream_closes_its_generator(host: Wire, tmp_path: Path, text: str) -> None:
    mark = tmp_path / "mark"
    command = host.stream(text, str(mark), credit=1 if "waits for credit" in text else 2)
    assert host.chunk(command) == 0
    host.cancel(command)
    assert host.reply(command).code == CANCELLED
    host.until_idle()
    assert mark.read_text() == "closed"


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_generator_that_raises_midway_fails_after_its_chunks(host: Wire, kind: str) -> None:
    command = host.stream(f"{kind} stream():\n yield 1\n yield 2\n raise ValueError('broken')", credit=10)
    reply = host.reply(command)
    assert reply.code == REMOTE
    assert "ValueError: broken" in reply.text
    assert [host.chunk(command), host.chunk(command)] == [1, 2]


def test_what_a_stopped_command_prints_as_it_ends_is_shown(host: Wire) -> None:
    command = host.call(
        "def f(ctx):\n try:\n  ctx.call_tool('gate')\n finally:\n  print('cleaned up')",
    )
    host.callback("gate")
    host.cancel(command)
    assert host.reply(command).code == CANCELLED
    host.until_idle()
    assert host.run("math.fabs", 1).value == 1
    assert host.printed(command) == "cleaned up\n"


# -- output ------------------------------------------------------------------

PRINTING = {
    "its own thread": """
        import sys
        def f(ctx, name):
            ctx.call_tool("start")
            for number in range(50):
                print(name, number)
                print(name, number, file=sys.stderr)
    """,
    "a task": """
        import asyncio, sys
        async def f(ctx, name):
            await ctx.call_tool("start")
            async def talk(number):
                await asyncio.sleep(0)
                print(name, number)
                print(name, number, file=sys.stderr)
            await asyncio.gather(*(talk(number) for number in range(50)))
    """,
    "asyncio.to_thread": """
        import asyncio, sys
        async def f(ctx, name):
            await ctx.call_tool("start")
            def talk(number):
                print(name, number)
                print(name, number, file=sys.stderr)
            for number in range(50):
                await asyncio.to_thread(talk, number)
    """,
    "raw threads": """
        import sys, threading
        def f(ctx, name):
            ctx.call_tool("start")
            def talk(number):
                print(name, number)
                print(name, number, file=sys.stderr)
            for number in range(50):
                thread = threading.Thread(target=talk, args=(number,))
                thread.start()
                thread.join()
    """,
    "an executor": """
        import sys
        from concurrent.futures import ThreadPoolExecutor
        def f(ctx, name):
            ctx.call_tool("start")
            def talk(number):
                print(name, number)
                print(name, number, file=sys.stderr)
            with ThreadPoolExecutor(1) as executor:
                list(executor.map(talk, range(50)))
    """,
}


def test_what_ten_commands_print_at_once_is_labelled_with_the_command_that_printed_it(host: Wire) -> None:
    names = [f"{how}, {which}" for how in PRINTING for which in ("first", "second")]
    commands = {name: host.call(PRINTING[name.split(", ")[0]], name) for name in names}
    for asked in [host.callback("start") for _ in names]:
        host.answer(asked, {"value": None})
    for name, command in commands.items():
        assert host.reply(command).error is None
        lines = [f"{name} {number}" for number in range(50)]
        assert sorted(host.printed(command).splitlines()) == sorted(lines)
        assert sorted(host.printed(command, "stderr").splitlines()) == sorted(lines)
    parents = {m.parent for m in host.received if m.kind == "stream"}
    assert parents == {host.msg_ids[command] for command in commands.values()}


def test_output_comes_before_the_answer_and_in_order(host: Wire) -> None:
    command = host.call("import sys\ndef f():\n print(1)\n print(2, file=sys.stderr)\n print(3)")
    assert host.reply(command).error is None
    about = [m for m in host.received if m.parent == host.msg_ids[command]]
    assert [(m.content["name"], m.content["text"]) for m in about if m.kind == "stream"] == [
        ("stdout", "1\n"),
        ("stderr", "2\n"),
        ("stdout", "3\n"),
    ]
    kinds = [m.kind for m in about if m.kind != "display_data"]
    assert kinds == ["stream", "stream", "stream", "comm_msg"]


def test_output_is_seen_while_the_command_still_runs(host: Wire) -> None:
    command = host.call("def f(ctx): print('now'); ctx.call_tool('gate')")
    host.expect(lambda m: m.kind == "stream" and m.content["text"] == "now\n", "the output")
    host.answer(host.callback("gate"), {"value": None})
    assert host.reply(command).error is None


def test_finalizers_that_print_while_the_kernel_publishes_hold_nothing_up(start: Callable[..., Wire]) -> None:
    host = start()
    littered = source(
        """
        def litter(ctx, number):
            import gc
            gc.set_threshold(50)
            class Bye:
                def __del__(self):
                    print("bye", flush=True)
            for step in range(30 + number % 7):  # collected at each step of a send in its turn
                bye = Bye()
                bye.itself = bye
                ctx.progress(step)
            return number
        """
    )
    commands = [host.call(littered, number) for number in range(200)]
    assert [host.reply(command).value for command in commands] == list(range(200))
    host.until_idle()
    assert {line for command in commands for line in host.printed(command).splitlines()} == {"bye"}


class Reentering:
    """An XPUB socket within whose calls something is sent, as a finalizer does: once for each of `inner`."""

    def __init__(self, *inner: list[bytes]) -> None:
        self.frames: list[tuple[bytes, bool]] = []
        self.inner = list(inner)
        self.iopub = Iopub(self, None)  # type: ignore[arg-type]  # it has what is called here

    def send(self, frame: bytes, flags: int = 0, copy: bool = True) -> None:
        self._reenter()
        self.frames.append((frame, bool(flags & zmq.SNDMORE)))
        self._reenter()

    def getsockopt(self, option: int) -> int:
        self._reenter()
        return 0

    def _reenter(self) -> None:
        if self.inner:
            self.iopub.send(self.inner.pop(0))
            self.iopub.subscriptions()


@pytest.mark.parametrize("count", range(1, 8))
def test_what_is_sent_within_a_send_follows_it_whole_and_in_order(count: int) -> None:
    inner = [[b"%d" % number, b"x", b"y"] for number in range(count)]
    socket = Reentering(*inner)
    socket.iopub.send([b"outer", b"frames"])
    sent = [(b"outer", True), (b"frames", False)]
    for message in inner:
        sent += [(message[0], True), (b"x", True), (b"y", False)]
    assert socket.frames == sent


def test_what_is_sent_within_a_look_at_the_subscriptions_is_sent_too() -> None:
    socket = Reentering([b"one"], [b"two"])
    assert socket.iopub.subscriptions() == []
    assert socket.frames == [(b"one", False), (b"two", False)]


def test_a_message_left_to_another_thread_is_what_it_was_when_it_was_given() -> None:
    socket = Reentering()
    data = bytearray(b"before")
    socket.iopub._lock.acquire()
    socket.iopub.send([b"topic", memoryview(data)])
    data[:] = b"after!"
    socket.iopub._lock.release()
    socket.iopub.subscriptions()
    assert socket.frames == [(b"topic", True), (b"before", False)]


def test_what_is_printed_while_the_same_output_is_shown_comes_after_it_and_is_not_lost() -> None:
    shown: list[tuple[str, str]] = []
    late = ["second", "third"]

    def publish(name: str, text: str) -> None:
        shown.append((name, text))
        if late:
            output.write("stdout", late.pop(0))
            output.flush()

    output = Output(publish, 1000)
    output.write("stdout", "first")
    output.write("stderr", "beside")
    output.flush()
    assert shown == [("stdout", "first"), ("stderr", "beside"), ("stdout", "secondthird")]


def test_output_beyond_the_limit_is_dropped_and_said_to_be(start: Callable[..., Wire]) -> None:
    host = start("--Policy.max_output_bytes=2000")
    command = host.call("def f():\n for _ in range(10_000): print('x' * 99)")
    assert host.reply(command).error is None
    assert host.printed(command).count("x") in range(1000, 2001)
    assert "output limit reached" in host.printed(command, "stderr")
    again = host.call("def f(): print('fresh')")
    assert host.reply(again).error is None
    assert host.printed(again) == "fresh\n"


# -- telemetry ---------------------------------------------------------------


def test_every_command_is_shown_as_display_data_from_its_start_to_its_stop(host: Wire) -> None:
    command = host.call(GATED, traceparent=f"00-{'a' * 32}-{'b' * 16}-01", attempt=3, session="demo")
    host.answer(host.callback("gate"), {"value": 1})
    assert host.reply(command).value == 1
    events = host.events(command)
    about = [m for m in host.received if m.parent == host.msg_ids[command]]
    shown = [m for m in about if m.kind in ("display_data", "update_display_data")]
    assert shown[0].kind == "display_data"
    assert {m.kind for m in shown[1:]} <= {"update_display_data"}
    assert len({m.content["transient"]["display_id"] for m in shown}) == 1
    for message in shown:
        assert set(message.content["data"]) == {TELEMETRY_MIME, "text/html", "text/plain"}
        assert "gated" in message.content["data"]["text/html"]
        (batch,) = message.content["data"][TELEMETRY_MIME]
        assert batch["command"] == command
        assert batch["dropped"] == 0
    assert shown[-1].content["data"]["text/plain"].startswith("✓ gated")
    assert events[0]["name"] == ["bridge", "execution", "start"]
    assert [e["name"][1:] for e in events[1:-1]] == [["callback", "start"], ["callback", "stop"]]
    assert events[-1]["name"] == ["bridge", "execution", "stop"]
    assert set(events[-1]["measurements"]) == {"duration", "queue", "callbacks", "bytes_in", "bytes_out"}
    assert events[-1]["measurements"]["callbacks"] == 1
    metadata = events[-1]["metadata"]
    assert metadata["command"] == "function.call"
    assert metadata["success"] is True
    assert metadata["error"] is None
    assert metadata["session"] == "demo"
    assert metadata["attempt"] == 3
    assert metadata["trace_id"] == "a" * 32
    assert metadata["parent_span_id"] == "b" * 16
    assert any(isinstance(m.message, Success) for m in about[:-1]), "the last of it follows the answer"
    assert about[-1] is shown[-1]
    assert events[1]["metadata"]["parent_span_id"] == metadata["span_id"]


@pytest.mark.parametrize("method", sorted(set(COMMANDS) - {"bridge.attach", "kernel.ping", "kernel.drain"}))
def test_each_kind_of_command_has_its_telemetry(host: Wire, method: str) -> None:
    function = {"kind": "path", "path": "itertools.chain"}
    record = {"ref": "r", "class": "collections.Counter", "args": [[1, 1]]}
    params: dict[str, Any] = {"object.inspect": {"path": "collections.Counter"}, "instance.create": {"record": record}}
    params |= {"function.call": {"function": {"kind": "path", "path": "math.fabs"}, "args": [1]}}
    params |= {"function.stream": {"function": function, "args": [[1], [2]]}}
    params |= {"instance.call": {"record": record, "method": "total"}}
    command = host.start(method, params.get(method, {}))
    assert host.reply(command).error is None
    names = [e["name"] for e in host.events(command)]
    assert names[0] == ["bridge", "execution", "start"]
    assert names[-1] == ["bridge", "execution", "stop"]
    assert {e["metadata"]["command"] for e in host.events(command)} == {method}


def test_an_error_ends_the_telemetry_with_an_exception_that_names_its_type_only(host: Wire) -> None:
    command = host.call("def f(): raise ValueError('do not show this')")
    assert host.reply(command).code == REMOTE
    last = host.events(command)[-1]
    assert last["name"] == ["bridge", "execution", "exception"]
    assert last["metadata"]["success"] is False
    assert last["metadata"]["error"] == "ValueError"
    shown = [m for m in host.received if m.kind.endswith("display_data")]
    assert not [m for m in shown if b"do not show this" in m.raw]


def test_arguments_and_values_are_in_no_message_but_the_one_that_is_to_carry_them(host: Wire) -> None:
    marker = "swordfish"
    host.answers["tool.call"] = lambda params: {"value": marker}
    host.answers["session.get"] = lambda params: {"value": marker, "version": 1}
    echo = """
        class Kept:
            pass
        def echo(ctx, value, *, key):
            ctx.call_tool("tool", value=value)
            ctx["variable"]
            with ctx.span("part"):
                ctx.progress(1, 2)
            return value
    """
    lm = {"model": "m", "api_key": marker}
    commands = [
        host.call(echo, marker, kwargs={"key": marker}),
        host.call("int", marker),
        host.call("builtins.int", marker),
        host.call("def fail(value): raise ValueError(value)", marker),
        host.stream("def echo(value):\n yield value", marker, credit=2),
        host.call("math.fabs", marker),
        host.call("def f(value): return value", marker, deadline="wrong " + marker),
        host.start("instance.create", {"record": {"ref": "r", "class": "collections.Counter", "args": [marker]}}),
    ]
    for command in commands:
        host.reply(command)
    carries = ("tool.call", "command.chunk")
    leaks = [
        m
        for m in host.received
        if marker.encode() in m.raw and not isinstance(m.message, Success | Failure) and m.method not in carries
    ]
    assert not leaks
    assert lm["api_key"] == marker


@pytest.mark.parametrize(
    "said",
    [
        "ctx.emit('event', {}, what=object())",
        "ctx.emit('event', {'number': object()})",
        "ctx.emit('event', {'number': 2**70, 'other': float('nan')})",
        "ctx.emit('\\udc80')",
        "ctx.span('\\udc80').__enter__()",
        "ctx.span('part', what=object()).__enter__()",
        "ctx.progress(1, 2, '\\udc80')",
    ],
)
def test_telemetry_that_json_cannot_carry_harms_neither_its_command_nor_the_kernel(fragile: Wire, said: str) -> None:
    host = fragile
    waits = f"""
        def f(ctx):
            try:
                {said}
            except Exception:
                pass
            ctx.call_tool("gate")
            return 1
    """
    command = host.call(waits)
    asked = host.callback("gate")
    host.expect(lambda m: m.kind == "display_data" and m.parent == host.msg_ids[command], "its line", timeout_s=30)
    host.answer(asked, {"value": None})
    assert host.reply(command, timeout_s=30).value == 1
    quick = host.call(f"def f(ctx):\n try: {said}\n except Exception: pass\n return 1")
    assert host.reply(quick, timeout_s=30).value == 1
    host.until_idle(timeout_s=30)


def test_what_events_say_of_their_command_no_code_of_it_can_change(host: Wire) -> None:
    code = """
        def f(ctx):
            forged = {"session": "other", "trace_id": "0", "span_id": "0", "kernel": "rbf"}
            ctx.emit("seen", {"session": "no number"}, **forged)
            with ctx.span("part", **forged) as said:
                said.update(forged, name=5, parent_span_id=None)
    """
    command = host.call(code, session="own")
    assert host.reply(command).error is None
    first, *events, _ = host.events(command)
    seen, started, stopped = [event["metadata"] for event in events]
    for metadata in (seen, started, stopped):
        for name in ("session", "kernel", "trace_id", "subject"):
            assert metadata[name] == first["metadata"][name]
        assert metadata["user.kernel"] == "rbf"
    assert seen["span_id"] == first["metadata"]["span_id"]
    assert started["span_id"] == stopped["span_id"] not in ("0", first["metadata"]["span_id"])
    assert stopped["parent_span_id"] == first["metadata"]["span_id"]
    assert stopped["name"] == "part"


def test_large_texts_in_events_are_clipped_and_a_display_of_them_stays_small(host: Wire) -> None:
    code = """
        def f(ctx):
            for n in range(900):
                ctx.emit("n" * 10_000, {"m" * 10_000: 1}, **{"k" * 10_000: "v" * 1_000_000})
            ctx.progress(1, 2, "p" * 1_000_000)
            with ctx.span("s" * 1_000_000):
                pass
            try:
                ctx.get_variable("x" * 1_000_000)
            except Exception:
                pass
    """
    host.answers["session.get"] = lambda params: {"value": 1, "version": 1}
    command = host.call(code)
    assert host.reply(command).error is None
    events = host.events(command)
    assert events[-1]["name"] == ["bridge", "execution", "stop"]
    texts = [text for event in events for text in (*event["name"], *event["metadata"], *event["metadata"].values())]
    assert max(len(text) for text in texts if isinstance(text, str)) == 4096
    shown = [m for m in host.received if m.kind.endswith("display_data")]
    assert max(len(m.raw) for m in shown) < 2_000_000


@pytest.mark.parametrize(
    "said",
    [
        "ctx.emit('seen', {'n': Bad()})",
        "ctx.emit('seen', what=Bad())",
        "ctx.emit(Bad())",
        "ctx.progress(1, 2, Bad())",
        "ctx.progress(1, 2, '\\udc80')",
        "ctx.progress(float('nan'), Bad())",
        "ctx.span('part', what=Bad()).__enter__()",
    ],
)
def test_telling_of_a_value_breaks_no_command_whatever_the_value_does(host: Wire, said: str) -> None:
    code = f"""
        class Bad:
            def __str__(self): raise RuntimeError
            def __float__(self): raise RuntimeError

        def f(ctx):
            {said}
            return 1
    """
    assert host.run(code).value == 1


def recorder(
    command: int, *, sampled: bool = True, shown: bool = False, flood: int = 0
) -> tuple[Recorder, list[dict[str, Any]]]:
    """That of a command that has ended, and the displays that it publishes."""
    published: list[dict[str, Any]] = []
    made = Recorder(
        command,
        "f",
        {"kernel": "k"},
        Trace("a" * 32, "b" * 16, None, sampled),
        lambda kind, content: published.append(json.loads(content)),
        display_id("x", command),
    )
    made.start({})
    if shown:
        made.publish()
    for _ in range(flood):
        made.emit(("bridge", "user", "seen"), {}, {})
    made.stop(error=None, queue=0, bytes_in=0, bytes_out=0, where="", captured={})
    if flood:
        made.publish()
    return made, published


def test_a_flood_of_events_leaves_room_for_the_end_and_is_counted() -> None:
    _, published = recorder(1, flood=3000)
    (batch,) = [batch for shown in published for batch in shown["data"][TELEMETRY_MIME]]
    assert batch["events"][-1]["name"] == ["bridge", "execution", "stop"]
    assert len(batch["events"]) + batch["dropped"] == 3002


def test_a_display_of_several_commands_is_of_those_of_which_nothing_was_shown_before() -> None:
    known, before = recorder(1, shown=True)
    silent, nothing = recorder(2, sampled=False)
    fresh, alone = recorder(3)
    assert together([known, silent, fresh], "x") is None, "one alone has its own display: its host waits for that"
    other, own = recorder(4)
    content = together([known, silent, fresh, other], "x")
    assert content is not None
    shown = json.loads(content)
    assert [batch["command"] for batch in shown["data"][TELEMETRY_MIME]] == [3, 4]
    assert shown["data"]["text/plain"].startswith("2 commands")
    for one in (known, silent, fresh, other):
        one.publish()
    assert (len(before), nothing, alone, own) == (2, [], [], [])


def test_what_is_recorded_while_events_are_taken_is_not_lost() -> None:
    made, published = recorder(1, shown=True)

    class Finalized(list[Any]):
        """What is there is read, and then something is recorded, as a finalizer may."""

        def __iter__(self) -> Iterator[Any]:
            yield from super().__iter__()
            made.record(("bridge", "user", "late"), {}, {})

    made._end = None
    made._events = Finalized(made._events)  # type: ignore[assignment]
    made.publish()
    made.publish()
    names = [event["name"] for shown in published for b in shown["data"][TELEMETRY_MIME] for event in b["events"]]
    assert names[-1] == ["bridge", "user", "late"]


def test_a_line_is_one_line_that_moves_no_cursor() -> None:
    line = Line("f\r\ng", 1, message="half\n\x1b[2Jdone", done=1, error="a\nb\x1b[1m")
    assert line.text().isprintable()
    assert "\x1b" not in line.html()
    assert "half [2Jdone" in line.text()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def f(): raise ValueError('\\udc80')", REMOTE),
        ("class S(str): pass\ndef f(): raise ValueError(S('subclass'))", REMOTE),
        ("class E(Exception):\n def __str__(self): raise ZeroDivisionError\ndef f(): raise E", REMOTE),
        ("from bridge_kernel.contract.errors import NotFound\ndef f(): raise NotFound(404)", NOT_FOUND),
        ("def f(): raise SystemExit(3)", REMOTE),
        ("def f(): raise KeyboardInterrupt", REMOTE),
        ("async def f(): raise ValueError('\\udc80')", REMOTE),
        ("async def f(): raise KeyboardInterrupt", REMOTE),
        ("async def f(): raise SystemExit(3)", REMOTE),
        ("def f(): f()", REMOTE),
        ("def f(): g = lambda: g(); return g()", REMOTE),
        ("def f(): raise Exception('x' * 10_000_000)", REMOTE),
        ("def f(): return object()", -32004),
        ("def f(): return '\\udc80'", -32004),
        ("def f(:", None),
        ("raise ValueError('while defined')\ndef f(): pass", REMOTE),
    ],
)
def test_whatever_a_command_raises_or_returns_is_answered(host: Wire, text: str, code: int | None) -> None:
    if code is None:  # it does not even compile
        import hashlib

        sha256 = hashlib.sha256(text.encode()).hexdigest()
        reply = host.run({"kind": "source", "name": "f", "hash": sha256, "source": text})
        assert reply.code == REMOTE
        assert reply.error is not None
        assert "SyntaxError" in reply.text
        return
    reply = host.run(text, timeout_s=30)
    assert reply.code == code
    assert host.run("math.fabs", -1).value == 1
    assert host.run("async def f(): return 1", timeout_s=30).value == 1


def test_a_traceback_shows_the_lines_of_the_session_own_source_and_none_of_the_kernels(host: Wire) -> None:
    reply = host.run("def inner():\n    raise ValueError('x')\n\ndef outer():\n    inner()")
    assert reply.error is not None
    assert reply.error.data is not None
    assert [(f.function, f.line, f.code) for f in reply.error.data.traceback] == [
        ("outer", 5, "inner()"),
        ("inner", 2, "raise ValueError('x')"),
    ]


# -- policy ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "path"),
    [
        ("math.*", "os.system"),
        ("math.*", "builtins.eval"),
        ("math.*", "mathematics.x"),
        ("math.*", "math"),
        ("math.*", "math.__loader__"),
        ("math.*", "math.__loader__.get_data"),
        ("math.*", "math.__loader__.load_module"),
        ("math.*", "math.__spec__.loader.create_module"),
        ("math.*", "math.__dict__.get"),
        ("math.*", "math.__dict__.copy"),
        ("math.*", "math.__class__"),
        ("math.*", "math.hypot.__class__"),
        ("math.*", "math.hypot.__self__.__dict__.copy"),
        ("json.*", "json.os.system"),
        ("json.*", "json.codecs.open"),
        ("json.*", "json.decoder.re.compile"),
        ("json.*", "json.__builtins__.get"),
        ("json.*", "json.__builtins__.copy"),
        ("json.*", "json.loads.__globals__.copy"),
        ("json.*", "json.loads.__globals__.get"),
        ("json.*", "json.loads.__code__.replace"),
        ("json.*", "json.JSONEncoder.__subclasses__"),
        ("json.*", "json.JSONEncoder.__init__.__globals__.copy"),
        ("json.*", "json.JSONEncoder.__base__.__subclasses__"),
        ("json.*", "json.__loader__.get_data"),
    ],
)
def test_an_allowed_name_does_not_lead_to_what_is_not_allowed(
    policed: dict[str, Wire], allowed: str, path: str
) -> None:
    host = policed[allowed]
    for reply in (host.run(path), host.request("object.inspect", {"path": path})):
        assert reply.code in (POLICY, NOT_FOUND)
    assert host.run("math.fabs" if allowed == "math.*" else "json.dumps", 1).error is None


@pytest.fixture(scope="module")
def policed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Wire]]:
    kernels = {
        allowed: Kernel(tmp_path_factory.mktemp("policed"), f'--Policy.allow_names=["{allowed}"]')
        for allowed in ("math.*", "json.*")
    }
    yield {allowed: kernel.connect() for allowed, kernel in kernels.items()}
    for kernel in kernels.values():
        kernel.close()


def test_classes_of_instances_and_of_values_are_under_the_same_policy(policed: dict[str, Wire]) -> None:
    host = policed["math.*"]
    record = {"ref": "r", "class": "subprocess.Popen", "args": [["true"]]}
    assert host.request("instance.create", {"record": record}).code == POLICY
    assert host.request("instance.call", {"record": record, "method": "wait"}).code == POLICY


def test_a_kernel_that_takes_no_source_says_so(start: Callable[..., Wire]) -> None:
    host = start("--Policy.allow_source=False")
    assert host.run("def f(): return 1").code == POLICY
    assert host.run("math.fabs", -1).value == 1


def test_source_that_is_not_what_its_hash_says_is_refused(host: Wire) -> None:
    function = {**source("def f(): return 'one'"), "source": "def f(): return 'two'\n"}
    assert host.run(function).code == PARAMS


def test_source_that_defines_no_such_function_is_refused(host: Wire) -> None:
    assert host.run({**source("def f(): return 1"), "name": "g"}).code == PARAMS


def test_a_source_that_gave_way_to_another_is_missing_until_it_is_sent_again(start: Callable[..., Wire]) -> None:
    host = start("--Policy.max_sources=1")
    first, second = source("def first(): return 1"), source("def second(): return 2")
    by_hash = {key: value for key, value in first.items() if key != "source"}
    assert host.run(by_hash).code == SOURCE_MISSING
    assert host.run(first).value == 1
    assert host.run(by_hash).value == 1
    assert host.run(second).value == 2
    missing = host.run(by_hash)
    assert missing.code == SOURCE_MISSING
    assert missing.error is not None
    assert missing.error.data is not None
    assert missing.error.data.retryable
    assert host.run(first).value == 1
    assert host.request("kernel.stats").result["sources"] == 1


def test_what_one_call_of_a_function_leaves_in_its_globals_the_next_does_not_see(host: Wire) -> None:
    counter = source("count = 0\ndef f():\n    global count\n    count += 1\n    return count")
    assert [host.run(counter).value for _ in range(3)] == [1, 1, 1]
    left = source("def f():\n    seen = 'left' in globals()\n    globals()['left'] = 1\n    return seen")
    assert [host.run(left).value for _ in range(3)] == [False, False, False]


# -- who ends whom -----------------------------------------------------------


def test_closing_the_comm_cancels_that_hosts_commands_and_no_others(kernel: Kernel, host: Wire) -> None:
    before = host.request("kernel.stats").result["connections"]
    other = kernel.connect()
    mine, theirs = host.call(GATED), other.call(GATED)
    asked = host.callback("gate")
    other.callback("gate")
    other.detach()
    assert other.reply(theirs).code == CANCELLED
    other.expect(lambda m: m.kind == "comm_close", "the comm's close")
    host.until(lambda: host.busy() == 1, "the end of the other's command")
    assert host.request("kernel.stats").result["connections"] == before
    host.answer(asked, {"value": 1})
    assert host.reply(mine).value == 1


@pytest.mark.parametrize("text", [GATED, SPIN, "async def f(ctx): await ctx.call_tool('gate')"])
def test_a_host_that_is_cut_off_takes_its_commands_with_it(kernel: Kernel, host: Wire, text: str) -> None:
    before = host.request("kernel.stats").result["connections"]
    other = kernel.connect()
    other.call(text)
    other.expect(lambda m: m.method in ("tool.call", "command.progress"), "its start")
    assert host.request("kernel.stats").result["connections"] == before + 1
    other.close()
    host.until_idle()
    assert host.request("kernel.stats").result["connections"] == before


def _gone(process: psutil.Process) -> bool:
    try:
        return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


PARENT = textwrap.dedent(
    """
    import os, subprocess, sys, signal
    command = sys.argv[1:]
    kernel = subprocess.Popen(
        command, start_new_session=True, env={**os.environ, "JPY_PARENT_PID": str(os.getpid())},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    print(kernel.pid, flush=True)
    signal.pause()
    """
)


@pytest.mark.parametrize("wrapper", ["none", "sh -c"])
@pytest.mark.parametrize("busy", ["idle", "busy"])
def test_a_kernel_whose_parent_was_killed_ends_with_all_that_it_started(
    tmp_path: Path, wrapper: str, busy: str
) -> None:
    connection_file = write_connection_file(tmp_path)
    command = kernel_command(connection_file)
    if wrapper == "sh -c":
        command = ["sh", "-c", f"{' '.join(command)}; true"]  # `; true`, or the shell would become the kernel
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *command], stdout=subprocess.PIPE)
    processes: list[psutil.Process] = []
    host = Wire(connection_file)
    try:
        assert parent.stdout is not None
        leader = int(parent.stdout.readline())
        host.expect(lambda m: m.kind == "iopub_welcome", "the kernel's welcome")
        host.attach()
        pid = host.run("os.getpid").value
        assert (pid == leader) is (wrapper == "none")
        child = host.run("import subprocess\ndef f(): return subprocess.Popen(['sleep', '600']).pid").value
        processes = [psutil.Process(pid), psutil.Process(child)]
        if busy == "busy":
            progressed(host, host.call(SPIN))
        os.kill(parent.pid, signal.SIGKILL)
        host.until(lambda: _gone(processes[0]), "the kernel's end", timeout_s=30)
        host.until(lambda: _gone(processes[1]), "its child's end", timeout_s=30)
    finally:
        host.close()
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end of itself between the look and the kill
                if not _gone(process):
                    process.kill()


@pytest.mark.parametrize("held", ["the iopub socket", "the shield"])
def test_a_kernel_that_is_stuck_while_it_publishes_still_ends_with_its_parent(tmp_path: Path, held: str) -> None:
    stick = {
        "the iopub socket": "next(o for o in gc.get_objects() if isinstance(o, sockets.Iopub))._lock.acquire()",
        "the shield": "stops._lock.acquire()",
    }[held]
    stuck = f"""
        def stick(path):
            import gc
            from bridge_kernel import sockets, stops
            {stick}
            open(path, 'w').close()
    """
    command = kernel_command(write_connection_file(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *command], stdout=subprocess.PIPE)
    host = Wire(tmp_path / "kernel.json")
    process = None
    try:
        host.expect(lambda m: m.kind == "iopub_welcome", "the kernel's welcome")
        host.attach()
        process = psutil.Process(host.run("os.getpid").value)
        host.call(source(textwrap.dedent(stuck)), str(tmp_path / "stuck"))
        host.until((tmp_path / "stuck").exists, "the held lock")
        host.heard_of()  # answered or not: it publishes, which brings the lane to what is held
        os.kill(parent.pid, signal.SIGKILL)
        host.until(lambda: _gone(process), "the kernel's end", timeout_s=30)
    finally:
        host.close()
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()
        if process is not None and not _gone(process):
            process.kill()


def test_a_kernel_whose_parent_was_gone_before_it_started_ends_at_once(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    ended = subprocess.run(
        kernel_command(write_connection_file(tmp_path)),
        env={**os.environ, "JPY_PARENT_PID": str(gone.pid)},
        start_new_session=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode != 0


@contextlib.contextmanager
def on_a_lifeline(tmp_path: Path, *arguments: str, **settings: Any) -> Iterator[tuple[subprocess.Popen[bytes], Wire]]:
    """A kernel whose stdin the test holds, and a client of it."""
    connection_file = write_connection_file(tmp_path)
    with (tmp_path / "kernel.log").open("wb") as log:
        process = subprocess.Popen(
            kernel_command(connection_file, *arguments),
            stdin=subprocess.PIPE, stdout=log, stderr=log, env=os.environ | {"JPY_PARENT_PID": ""}, **settings
        )  # fmt: skip
    host = Wire(connection_file, log=lambda: (tmp_path / "kernel.log").read_text(errors="replace"))
    try:
        host.expect(lambda m: m.kind == "iopub_welcome", "the kernel's welcome")
        host.attach()
        yield process, host
    finally:
        host.close()
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


LIFELINE = "--BridgeKernelApp.lifeline=stdin"
CHILD = "import subprocess\ndef f(): return subprocess.Popen(['sleep', '600']).pid"


@pytest.mark.parametrize("group", ["its own session", "its parent's group"])
@pytest.mark.parametrize("busy", ["idle", "busy"])
def test_a_kernel_on_a_lifeline_ends_with_all_that_it_started_once_that_is_let_go(
    tmp_path: Path, busy: str, group: str
) -> None:
    with on_a_lifeline(tmp_path, LIFELINE, start_new_session=group == "its own session") as (process, host):
        assert os.getpgid(process.pid) == process.pid, "killed in one go, and nobody else with it"
        child = psutil.Process(host.run(CHILD).value)
        if busy == "busy":
            progressed(host, host.call(SPIN))
        assert process.stdin is not None
        process.stdin.write(b"what is written to it means nothing\n" * 1000)
        process.stdin.flush()
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(60) == -signal.SIGKILL
        host.until(lambda: _gone(child), "its child's end", timeout_s=30)


def test_nothing_that_a_kernel_runs_or_starts_can_hold_its_lifeline_or_read_from_it(tmp_path: Path) -> None:
    read = """
        import subprocess, sys
        def read():
            return [sys.stdin.read(), subprocess.run(["cat"], capture_output=True, text=True).stdout]
    """
    with on_a_lifeline(tmp_path, LIFELINE) as (process, host):
        assert process.stdin is not None
        process.stdin.write(b"not for commands")
        process.stdin.flush()
        assert host.run(textwrap.dedent(read)).value == ["", ""]
        assert process.poll() is None


def test_a_kernel_without_the_option_does_not_care_about_its_stdin(tmp_path: Path) -> None:
    with on_a_lifeline(tmp_path, start_new_session=True) as (process, host):
        assert process.stdin is not None
        process.stdin.close()
        child = psutil.Process(host.run(CHILD).value)
        assert host.run("def f(): return 'still here'").value == "still here"
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        host.until(lambda: _gone(child), "its child's end", timeout_s=30)


def test_a_kernel_that_is_to_have_a_lifeline_and_has_no_stdin_says_so(tmp_path: Path) -> None:
    command = kernel_command(write_connection_file(tmp_path), LIFELINE)
    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "lifeline" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [({"key": ""}, "no key"), ({"signature_scheme": "hmac-md5"}, "hmac-md5"), ({"shell_port": "x"}, "connection file")],
)
def test_a_connection_file_that_cannot_be_served_is_refused_with_its_reason(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    path = write_connection_file(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    ended = subprocess.run(kernel_command(path), capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


# -- what it says of itself --------------------------------------------------


def test_a_real_kernels_rpc_discover_is_the_contracts_document(host: Wire) -> None:
    discovered = host.request("rpc.discover").result["document"]
    assert discovered == json.loads(json.dumps(openrpc.document()))


def test_stats_count_what_happened(start: Callable[..., Wire]) -> None:
    host = start()
    assert host.run("math.fabs", 1).error is None
    assert host.run("math.no_such").code == NOT_FOUND
    command = host.call(GATED)
    host.callback("gate")
    host.cancel(command)
    host.reply(command)
    host.until_idle()
    stats = host.request("kernel.stats").result
    assert stats["commands"] == {"received": 4, "running": 1, "succeeded": 1, "failed": 1, "cancelled": 1}
    assert stats["dropped"] == {}
    assert stats["connections"] == 1
    assert stats["rss"] > 0
    assert stats["cpu"] > 0
    assert stats["threads"] > 1


def test_callbacks_of_one_command_from_many_threads_at_once_get_their_own_answers(host: Wire) -> None:
    host.answers["tool.call/double"] = lambda params: {"value": params["kwargs"]["x"] * 2}
    text = """
        from concurrent.futures import ThreadPoolExecutor
        def f(ctx):
            with ThreadPoolExecutor(8) as executor:
                return list(executor.map(lambda x: ctx.call_tool("double", x=x), range(100)))
    """
    assert host.run(text).value == [2 * x for x in range(100)]


def test_a_reply_to_a_callback_that_does_not_fit_the_contract_is_an_error_in_the_code(host: Wire) -> None:
    host.answers["tool.call"] = lambda params: {"wrong": 1}
    reply = host.run(GATED)
    assert reply.code == -32603
    assert "tool.call" in reply.text


def test_an_error_of_the_host_arrives_as_its_own_type_where_it_can_be_caught(host: Wire) -> None:
    def missing(params: dict[str, Any]) -> None:
        raise NotFound("there is no such variable")

    host.answers["session.get"] = missing
    caught = "def f(ctx):\n try: ctx['x']\n except KeyError as exc: return type(exc).__name__"
    assert host.run(caught).value == "NotFound"
    assert host.run("def f(ctx): return ctx['x']").code == NOT_FOUND
    assert host.run("def f(ctx): return ctx.get_variable('x', 5)").value == 5


def test_nothing_of_what_these_tests_did_made_the_kernel_complain(kernel: Kernel, host: Wire) -> None:
    """Run last: the kernel's own log has no traceback of its own in it."""
    assert host.request("kernel.ping").error is None
    assert "Exception in" not in kernel.log
    assert "Traceback" not in kernel.log
