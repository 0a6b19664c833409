"""The pages of a host: the dashboard in a notebook, `jupyter bridge top` in a terminal, and the snapshots they show."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import io
import json
import os
import pty
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
import pytest
from rich.console import Console

from bridge_host import AsyncHost, Host
from bridge_host.pool.kernel import KernelStatus, PoolStatus
from bridge_host.telemetry.page import broadcast
from bridge_host.telemetry.page.broadcast import Broadcast, Ended, FoundHost, Watching, find_hosts
from bridge_host.telemetry.page.dashboard import Dashboard
from bridge_host.telemetry.page.snapshot import (
    CircuitView,
    CommandView,
    ErrorView,
    KernelView,
    Snapshot,
    Snapshots,
)
from bridge_host.telemetry.page.top import page
from bridge_host.telemetry.page.top import run as run_top
from bridge_host.telemetry.telemetry import Telemetry
from bridge_kernel.contract.errors import BridgeError
from bridge_kernel.contract.telemetry import Event
from conftest import eventually
from snapshots import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator


OF_COMMAND = ("command", "session", "command_id", "trace_id", "span_id", "parent_span_id")
ESCAPES = "\x1b[31mred\x1b]0;title\x07\r\n\u202eback"


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


# -- a snapshot ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """Of its own: what others do with theirs would be in its figures."""
    with Host(kernels=2) as host:
        yield host


def test_a_snapshot_says_what_the_host_has_and_does(host: Host) -> None:
    session = host.session()
    before = host.telemetry.snapshots.take()
    assert session.call("math.hypot", 3, 4) == 5
    with pytest.raises(BridgeError):
        session.call("math.sqrt", -1)
    host.telemetry.sync()
    now = host.telemetry.snapshots.take()
    assert now.pid == os.getpid()
    assert {kernel.pid for kernel in now.kernels} == {kernel.pid for kernel in host.kernels()}
    assert (now.ready, now.wanted, now.health, now.summary) == (2, 2, "ok", "2 kernels ready.")
    assert sum(now.command_series) >= 2
    assert sum(now.error_series) >= 1
    assert len(now.command_series) == len(now.error_series) == 60
    assert now.commands_per_s > 0
    assert now.p50 is not None
    assert now.p99 is not None
    assert 0 < now.p50 <= now.p99
    assert now.errors[0].subject == "math.sqrt"
    assert now.errors[0].type == "ValueError"
    assert now.errors[0].at >= before.at
    assert "math.sqrt" in {command.subject for command in now.commands} or len(now.commands) == 10
    assert max(kernel.error_rate or 0 for kernel in now.kernels) > 0


def test_two_snapshots_of_a_host_that_does_nothing_are_the_same_but_for_the_moment(host: Host) -> None:
    def still() -> bool:  # whatever ran before leaves the last minute, and the second that runs moves on
        first, second = host.telemetry.snapshots.take(), host.telemetry.snapshots.take()
        assert first.at < second.at
        assert [kernel.born for kernel in first.kernels] == [kernel.born for kernel in second.kernels]
        rates = dict.fromkeys(("commands_per_s", "errors_per_s"), 0.0)
        return msgspec.structs.replace(second, **rates).same_as(msgspec.structs.replace(first, **rates))

    eventually(still, "nothing changes")
    assert not host.telemetry.snapshots.take().same_as(None)


def status(*states: str, wanted: int = 2, queue: int = 0) -> PoolStatus:
    kernels = tuple(KernelStatus(f"k{n}", 100 + n, state, 0, 0, "") for n, state in enumerate(states))
    return PoolStatus(kernels, wanted, 0, queue, "fastest", 0)


@pytest.mark.parametrize(
    ("pool", "health", "summary"),
    [
        (status("ready", "ready"), "ok", "2 kernels ready."),
        (status("ready", "ready", queue=9), "busy", "2 kernels ready; commands wait for one."),
        (status("ready", "dead"), "degraded", "1 of 2 kernels ready, 1 dead."),
        (status("ready", "unresponsive", wanted=1), "degraded", "1 kernel ready, 1 unresponsive."),
        (status("starting", "starting"), "down", "0 of 2 kernels ready, 2 starting."),
        (status(wanted=0), "ok", "No kernels: scale the pool, or attach one."),
    ],
)
def test_the_state_is_said_in_words(pool: PoolStatus, health: str, summary: str) -> None:
    snapshots = Telemetry().snapshots
    snapshots.opened(lambda: pool)
    taken = snapshots.take()
    assert (taken.health, taken.summary) == (health, summary)


def test_what_is_held_back_is_said_until_it_may_run_again_or_its_kernel_ends() -> None:
    telemetry = Telemetry()
    telemetry.snapshots.opened(lambda: status("ready", "ready"))

    def breaker(state: str, kernel: str) -> None:
        numbers = {"failures": 3, "cooldown": 10**10}
        telemetry.tell(
            ("bridge", "pool", "breaker", state), numbers, {"subject": "f", "kernel": kernel, "reason": "died"}
        )

    breaker("open", "")
    breaker("open", "k1")
    taken = telemetry.snapshots.take()
    assert [(c.subject, c.kernel, c.failures) for c in taken.circuits] == [("f", "", 3), ("f", "k1", 3)]
    assert taken.health == "degraded"
    assert taken.summary.endswith("2 commands held back.")
    breaker("close", "")
    telemetry.tell(
        ("bridge", "kernel", "stop"),
        {"duration": 1, "system_time": 1, "lost": 0},
        {"kernel": "k1", "pid": 1, "expected": True, "reason": "scale"},
    )
    assert telemetry.snapshots.take().circuits == ()


def test_a_snapshot_stays_small_and_printable_whatever_is_in_it() -> None:
    telemetry = Telemetry()
    states = ["ready"] * 300
    telemetry.snapshots.opened(lambda: status(*states, wanted=300))
    for n in range(100):
        name = f"{n}{ESCAPES}" + "x" * 5000
        telemetry.tell(
            ("bridge", "command", "exception"),
            {"duration": 10**6, "attempts": 1},
            {**dict.fromkeys(OF_COMMAND, "x"), "subject": name, "error": name},
        )
        telemetry.tell(
            ("bridge", "pool", "breaker", "open"),
            {"failures": 3, "cooldown": 1},
            {"subject": name, "kernel": name, "reason": "died"},
        )
    taken = telemetry.snapshots.take()
    assert (len(taken.kernels), taken.kernels_in_all) == (200, 300)
    assert (len(taken.commands), len(taken.errors), len(taken.circuits)) == (10, 10, 20)
    assert len(msgspec.json.encode(taken)) < broadcast.MAX_LINE
    texts = [text for error in taken.errors for text in (error.subject, error.type)]
    assert all(text.isprintable() and len(text) <= 160 for text in texts)


# -- for other processes ---------------------------------------------------------------


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place of its own for runtime directories, with a short name: a socket's has 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="bt", dir="/tmp") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


def read_until_ended(path: Path) -> list[Snapshot | Ended]:
    said: list[Snapshot | Ended] = []
    with Watching(path) as watching:
        assert watching.connect() is None
        while not said or not isinstance(said[-1], Ended):
            said += watching.read()
    return said


@in_a_loop
async def test_a_host_without_kernels_offers_its_snapshots_to_its_own_user_alone(runtime: Path) -> None:
    async with AsyncHost(kernels=0):
        (found,) = find_hosts()
        assert (found.pid, found.kernels) == (os.getpid(), 0)
        assert stat.S_IMODE(found.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(found.path.parent.stat().st_mode) == 0o700
    assert find_hosts() == []
    assert os.listdir(runtime) == []


@in_a_loop
async def test_who_looks_on_is_sent_snapshots_until_the_host_is_closed(runtime: Path) -> None:
    async with AsyncHost(kernels=0) as host:
        reading = asyncio.get_running_loop().run_in_executor(None, read_until_ended, find_hosts()[0].path)
        await until(lambda: host._broadcast.clients, "it looks on")
    said = await reading
    assert isinstance(said[0], Snapshot)
    assert said[0].pid == os.getpid()
    assert said[-1] == Ended("closed")


async def serve(directory: Path, take: Callable[[], Snapshot], every_s: float = 0.002) -> Broadcast:
    serving = Broadcast(directory, take, every_s=every_s)
    await serving.open()
    return serving


async def until(condition: Callable[[], Any], what: str) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what it waits for knows nothing of tests
            await asyncio.sleep(0.001)


@in_a_loop
async def test_no_snapshot_is_made_while_nobody_is_connected(runtime: Path) -> None:
    taken = []

    def take() -> Snapshot:
        taken.append(1)
        return snapshot()

    serving = await serve(runtime, take)
    with contextlib.closing(serving):
        assert serving._timer is None
        _, writer = await asyncio.open_unix_connection(str(serving.path))
        await until(lambda: len(taken) >= 3, "snapshots are made")
        writer.close()
        await until(lambda: not serving.clients, "it has left")
        assert serving._timer is None


@in_a_loop
async def test_each_line_is_one_snapshot(runtime: Path) -> None:
    numbers = iter(range(10**9))
    serving = await serve(runtime, lambda: snapshot(waiting=next(numbers)))
    with contextlib.closing(serving):
        reader, writer = await asyncio.open_unix_connection(str(serving.path))
        lines = [json.loads(await reader.readline()) for _ in range(3)]
        assert [line["waiting"] for line in lines] == [0, 1, 2]
        assert {line["kind"] for line in lines} == {"snapshot"}
        writer.close()


@pytest.mark.parametrize("garbage", [b"\n", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100_000])
@in_a_loop
async def test_a_client_that_says_something_is_dropped_and_the_others_go_on(runtime: Path, garbage: bytes) -> None:
    serving = await serve(runtime, snapshot)
    with contextlib.closing(serving):
        reader, writer = await asyncio.open_unix_connection(str(serving.path))
        await reader.readline()
        hearing, rude = await asyncio.open_unix_connection(str(serving.path))
        rude.write(garbage)
        with contextlib.suppress(ConnectionError):
            await hearing.read()  # to the end
        await until(lambda: serving.clients == 1, "it is dropped")
        assert await reader.readline()
        writer.close()
        rude.close()


@in_a_loop
async def test_a_client_that_does_not_read_is_dropped_and_the_others_go_on(runtime: Path) -> None:
    long = snapshot(summary="x" * 60_000)
    serving = await serve(runtime, lambda: long)
    with contextlib.closing(serving), socket.socket(socket.AF_UNIX) as slow:
        slow.setblocking(False)
        slow.connect(str(serving.path))
        reader, writer = await asyncio.open_unix_connection(str(serving.path), limit=1 << 20)
        await until(lambda: serving.clients == 2, "both are there")
        while serving.clients == 2:
            assert await reader.readline()
        assert serving.clients == 1
        assert await reader.readline()
        writer.close()


@in_a_loop
async def test_those_that_are_too_many_are_told_so(runtime: Path) -> None:
    serving = await serve(runtime, snapshot)
    with contextlib.closing(serving):
        writers = [(await asyncio.open_unix_connection(str(serving.path)))[1] for _ in range(broadcast.MAX_CLIENTS)]
        await until(lambda: serving.clients == broadcast.MAX_CLIENTS, "all are there")
        said = await asyncio.get_running_loop().run_in_executor(None, read_until_ended, serving.path)
        assert said == [Ended("full")]
        for writer in writers:
            writer.close()
        await until(lambda: not serving.clients, "all have left")


@in_a_loop
async def test_a_process_of_another_user_is_sent_nothing(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: real + 1)
    serving = await serve(runtime, snapshot)
    with contextlib.closing(serving):
        reader, writer = await asyncio.open_unix_connection(str(serving.path))
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        assert serving.clients == 0
        writer.close()


@in_a_loop
async def test_closing_waits_for_no_client_however_slow(runtime: Path) -> None:
    long = snapshot(summary="x" * 60_000)
    serving = await serve(runtime, lambda: long)
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(serving.path))
        transports = serving._clients.values
        await until(lambda: any(t.get_write_buffer_size() for t in transports()), "something waits for it")
        serving.close()
        await until(lambda: not serving.clients, "it was dropped")
    assert not serving.path.exists()


@in_a_loop
async def test_who_comes_at_the_very_moment_that_the_host_is_closed_is_let_go(runtime: Path) -> None:
    serving = await serve(runtime, snapshot)
    with socket.socket(socket.AF_UNIX) as late:
        late.connect(str(serving.path))
        await asyncio.sleep(0)  # it is accepted, and its transport not made yet
        serving.close()
        with contextlib.suppress(ConnectionError):
            assert await asyncio.get_running_loop().run_in_executor(None, late.recv, 1 << 20) == b""
        assert serving.clients == 0
        assert serving._timer is None


@in_a_loop
async def test_a_path_too_long_for_a_socket_does_not_fail_the_host(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 120)
    directory.mkdir()
    serving = await serve(directory, snapshot)
    serving.close()
    assert os.listdir(directory) == []


def test_a_host_that_breaks_off_within_a_line_is_gone() -> None:
    with tempfile.TemporaryDirectory(prefix="bt", dir="/tmp") as directory:
        path = Path(directory) / "top.sock"
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            listening.listen()

            def die() -> None:
                connection, _ = listening.accept()
                with connection:
                    connection.sendall(msgspec.json.encode(snapshot()) + b'\n{"kind":"snapsh')

            thread = threading.Thread(target=die)
            thread.start()
            said = read_until_ended(path)
            thread.join()
        assert [type(each) for each in said] == [Snapshot, Ended]
        assert said[-1] == Ended("gone")


# -- jupyter bridge top ------------------------------------------------------------------

OTHER = """
import sys
from bridge_host import Host
with Host(kernels=1) as host:
    host.session("s").call("math.hypot", 3, 4)
    print("ready", flush=True)
    sys.stdin.readline()
"""
TOP = [sys.executable, "-c", "from bridge_host.cli import main; main()", "top"]


def top(directory: str, *arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, "COLUMNS": "100", "TMPDIR": directory}
    return subprocess.Popen([*TOP, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A host in another process, and the TMPDIR of both."""
    with (
        tempfile.TemporaryDirectory(prefix="bt", dir="/tmp") as directory,
        subprocess.Popen(
            [sys.executable, "-c", OTHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": directory},
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        yield process, directory
        process.stdin.close()
        process.wait(20)


def test_top_prints_one_page_or_one_snapshot_of_a_host_in_another_process(
    elsewhere: tuple[subprocess.Popen[str], str],
) -> None:
    process, directory = elsewhere
    with top(directory, "--once") as once, top(directory, "--json", "--pid", str(process.pid)) as as_json:
        printed, errors = once.communicate(timeout=60)
        taken = msgspec.json.decode(as_json.communicate(timeout=60)[0], type=Snapshot)
    assert (once.returncode, as_json.returncode) == (0, 0), errors
    assert f"process {process.pid}" in printed
    assert "✓ All well  1 kernel ready." in printed
    assert re.search(r"● ready", printed)
    assert re.search(r"math\.hypot +1 +0", printed)
    assert "\x1b" not in printed, "no colours where nobody can see them"
    assert taken.pid == process.pid
    assert [command.subject for command in taken.commands] == ["math.hypot"]


def test_top_lists_hosts_and_says_if_that_process_has_none(
    elsewhere: tuple[subprocess.Popen[str], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process, directory = elsewhere
    monkeypatch.setattr(tempfile, "tempdir", directory)
    assert run_top(None, once=False, as_json=False, only_list=True) == 0
    line = rf"{process.pid} +\d+ s +1 +{re.escape(sys.executable)}"
    assert re.search(line, capsys.readouterr().out)
    assert run_top(1, once=False, as_json=False, only_list=False) == 1
    said = capsys.readouterr().err
    assert "Process 1 has no open host of yours" in said
    assert re.search(line, said)


def test_top_wants_to_know_which_of_several_hosts(
    elsewhere: tuple[subprocess.Popen[str], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process, directory = elsewhere
    monkeypatch.setattr(tempfile, "tempdir", directory)
    with Host(kernels=0):
        assert run_top(None, once=True, as_json=False, only_list=False) == 1
        said = capsys.readouterr().err
        assert "--pid" in said
        assert str(process.pid) in said
        assert str(os.getpid()) in said
        assert run_top(os.getpid(), once=True, as_json=False, only_list=False) == 0
        assert f"process {os.getpid()}" in capsys.readouterr().out


def test_top_puts_together_a_snapshot_that_comes_in_pieces(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory(prefix="bt", dir="/tmp") as directory:
        path = Path(directory) / "top.sock"
        line = msgspec.json.encode(snapshot()) + b"\n"
        first_read = threading.Event()
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            listening.listen()

            def serve_it() -> None:
                connection, _ = listening.accept()
                with connection:
                    connection.sendall(line[:100])
                    first_read.wait(60)
                    connection.sendall(line[100:])

            read = Watching.read

            def told(watching: Watching) -> list[Snapshot | Ended]:
                said = read(watching)
                first_read.set()
                return said

            monkeypatch.setattr(Watching, "read", told)
            monkeypatch.setattr("bridge_host.telemetry.page.top.find_hosts", lambda: [FoundHost(1, 0, 0, "", path)])
            thread = threading.Thread(target=serve_it)
            thread.start()
            assert run_top(None, once=False, as_json=True, only_list=False) == 0
            thread.join()
    assert json.loads(capsys.readouterr().out)["kind"] == "snapshot"


def test_top_says_what_to_do_if_there_is_no_host(runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_top(None, once=False, as_json=False, only_list=False) == 1
    said = capsys.readouterr()
    assert "Host(kernels=2)" in said.err
    assert said.out == ""


def test_top_says_that_it_cannot_be_where_there_are_no_unix_sockets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    assert run_top(None, once=False, as_json=False, only_list=False) == 1
    assert "host.telemetry.dashboard()" in capsys.readouterr().err


class Terminal:
    """`jupyter bridge top` in a terminal of 100 columns."""

    def __init__(self, directory: str) -> None:
        import fcntl
        import struct
        import termios

        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            TOP, stdin=theirs, stdout=theirs, stderr=theirs, env={**env, "TERM": "xterm", "TMPDIR": directory}
        )
        os.close(theirs)
        self.shown = ""
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while received := os.read(self._ours, 65536):
                self.shown += received.decode(errors="replace")

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reading.join()
        os.close(self._ours)


def test_top_is_live_in_a_terminal_until_q_or_ctrl_c_or_it_is_ended(
    elsewhere: tuple[subprocess.Popen[str], str],
) -> None:
    with Terminal(elsewhere[1]) as first, Terminal(elsewhere[1]) as second, Terminal(elsewhere[1]) as third:
        for terminal in (first, second, third):
            eventually(lambda: terminal.shown.count("math.hypot") >= 2, "the page is drawn again", 30)  # noqa: B023
            assert "q quits" in terminal.shown
            assert "\x1b[?1049h" in terminal.shown, "the whole screen"
        first.type(b"q")
        second.process.send_signal(signal.SIGINT)
        third.process.send_signal(signal.SIGTERM)
        for terminal, code in ((first, 0), (second, 0), (third, 128 + signal.SIGTERM)):
            assert terminal.process.wait(60) == code
            eventually(lambda: "\x1b[?1049l" in terminal.shown, "the screen is given back")  # noqa: B023
            assert "Traceback" not in terminal.shown


def test_top_says_that_the_host_has_ended(runtime: Path) -> None:
    with Host(kernels=0) as host, Terminal(str(runtime)) as terminal:
        eventually(lambda: "All well" in terminal.shown, "the page is drawn", 30)
        host.close()
        assert terminal.process.wait(60) == 0
        eventually(lambda: "The host was closed." in terminal.shown, "it says so")


def drawn(taken: Snapshot, width: int, height: int | None = None) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height or 100, force_terminal=False, color_system=None)
    console.print(page(taken, width, height))
    return out.getvalue()


@pytest.mark.parametrize("width", [30, 50, 80, 200])
def test_the_page_fits_into_any_terminal(width: int) -> None:
    lines = drawn(snapshot(), width).splitlines()
    assert max(map(len, lines)) <= width
    assert any("Degraded" in line or "All well" in line for line in lines)


@pytest.mark.parametrize("height", [24, 30, 50])
def test_the_page_has_no_more_lines_than_the_terminal_and_says_what_is_missing(height: int) -> None:
    many = tuple(KernelView(f"k{n}", n, "ready", 0, n, 0, 0.0, None) for n in range(50))
    shown = drawn(snapshot(kernels=many, kernels_in_all=50), 100, height)
    assert len(shown.splitlines()) <= height
    assert re.search(r"Kernels  \d+ more", shown)


def test_no_escape_sequence_of_a_name_reaches_the_terminal() -> None:
    hostile = snapshot(
        summary=ESCAPES,
        errors=(ErrorView(0.0, ESCAPES, ESCAPES),),
        commands=(CommandView(ESCAPES, 1, 1, 1, 1, 1),),
        circuits=(CircuitView(ESCAPES, ESCAPES, 1, 0.0),),
        kernels=(KernelView(ESCAPES, 1, ESCAPES, 0, 0, 0, 0.0, None),),
    )
    shown = drawn(hostile, 400)
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert "\\x1b[31mred" in shown


# -- the widget ----------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def telemetry() -> Telemetry:
    made = Telemetry()
    made.snapshots.opened(lambda: status("ready", "ready"))
    return made


def fail(telemetry: Telemetry, subject: str = "f") -> None:
    telemetry.take(
        Event(
            ("bridge", "pool", "queue", "reject"),
            {"waiting": 1, "session_waiting": 1},
            {"session": "s", "subject": subject},
        )
    )


def test_the_widget_holds_the_snapshot_of_its_host(host: Host) -> None:
    with contextlib.closing(host.telemetry.dashboard()) as dashboard:
        assert msgspec.convert(dashboard.snapshot, Snapshot).pid == os.getpid()
        assert dashboard.snapshot["ready"] == 2
        assert repr(dashboard) == f"<Dashboard of host {os.getpid()}: 2 kernels ready.>"


def test_nothing_is_sent_before_it_is_displayed_and_then_twice_a_second_at_most(telemetry: Telemetry) -> None:
    clock = Clock()
    with contextlib.closing(Dashboard(telemetry, clock=clock)) as dashboard:
        clock.now = 10
        fail(telemetry)
        assert not dashboard.refresh(), "nobody has displayed it"
        assert dashboard.snapshot["rejected"] == 0
        dashboard._repr_mimebundle_()
        assert dashboard.snapshot["rejected"] == 1
        clock.now += 0.49
        fail(telemetry)
        assert not dashboard.refresh(), "too soon"
        clock.now += 0.01
        # The widget's own thread may have been quicker by now: what counts is that it was sent, and once.
        dashboard.refresh()
        assert dashboard.snapshot["rejected"] == 2


def test_what_has_not_changed_is_not_sent(telemetry: Telemetry) -> None:
    clock = Clock()
    with contextlib.closing(Dashboard(telemetry, clock=clock)) as dashboard:
        dashboard._repr_mimebundle_()
        sent: list[Any] = []
        dashboard.observe(sent.append, "snapshot")
        clock.now += 10
        assert not dashboard.refresh()
        assert sent == []


def test_nothing_is_sent_while_no_page_can_be_seen(telemetry: Telemetry) -> None:
    clock = Clock()
    with contextlib.closing(Dashboard(telemetry, clock=clock)) as dashboard:
        dashboard._repr_mimebundle_()
        dashboard.watched = False
        fail(telemetry)
        clock.now += 10
        assert not dashboard.refresh()
        dashboard.watched = True
        eventually(lambda: dashboard.snapshot["rejected"] == 1, "it is sent again")


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "bridge-dashboard"]


def test_the_widget_ends_with_its_host_and_says_so() -> None:
    with Host(kernels=0) as host:
        dashboard = host.telemetry.dashboard()
        dashboard._repr_mimebundle_()
        assert len(threads()) == 1
    eventually(lambda: dashboard.snapshot["health"] == "closed", "the page says that the host is closed")
    eventually(lambda: not threads(), "its thread has ended")
    dashboard.close()
    late = host.telemetry.dashboard()
    late._repr_mimebundle_()
    assert late.snapshot["health"] == "closed"
    assert not threads(), "there is nothing to wait for"
    late.close()


def test_the_widgets_thread_ends_when_it_is_closed(telemetry: Telemetry) -> None:
    dashboard = Dashboard(telemetry)
    dashboard._repr_mimebundle_()
    assert len(threads()) == 1
    dashboard.close()
    eventually(lambda: not threads(), "its thread has ended")


def test_the_widgets_thread_ends_when_nobody_has_it_any_more(telemetry: Telemetry) -> None:
    dashboard = Dashboard(telemetry)
    dashboard._repr_mimebundle_()
    gone = weakref.ref(dashboard)
    forget(dashboard)
    del dashboard
    gc.collect()
    assert gone() is None
    eventually(lambda: not threads(), "its thread has ended")


def forget(widget: Any) -> None:
    """Take from ipywidgets and comm what keeps a widget that was not closed."""
    import ipywidgets.widgets.widget as module  # type: ignore[import-untyped]

    module._instances.pop(widget.model_id, None)
    widget.comm.on_msg(None)


def test_without_anywidget_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "bridge_host.telemetry.page.dashboard")
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'bridge-kernel[lab]'")):
        Telemetry().dashboard()


def test_a_snapshots_source_forgets_who_does_not_want_to_hear_of_the_end() -> None:
    snapshots: Snapshots = Telemetry().snapshots
    told: list[str] = []
    forget = snapshots.on_close(lambda: told.append("first"))
    snapshots.on_close(lambda: told.append("second"))
    forget()
    snapshots.closed()
    snapshots.closed()
    assert told == ["second"]


def test_a_host_of_which_many_commands_fail_is_not_all_well(lonely_host: Host) -> None:
    session = lonely_host.session()
    for _ in range(5):
        with contextlib.suppress(BridgeError):
            session.call("math.sqrt", -1)
    taken = lonely_host.telemetry.snapshots.take()
    assert (taken.health, taken.summary) == ("degraded", "1 kernel ready; many commands fail.")
