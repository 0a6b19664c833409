"""The line that people see of a command, where they sent it from: in a cell, in a terminal, in a log."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager, KernelManager
from nbclient import NotebookClient

from bridge_host import AsyncHost, Host
from bridge_host.live.live import Live
from bridge_host.live.notebook import OWN, Notebook
from bridge_host.live.terminal import Terminal
from bridge_host.live.told import Told as RealTold
from bridge_kernel.contract.line import Line, Summary
from bridge_kernel.contract.telemetry import Event, EventBatch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jupyter_client.blocking.client import BlockingKernelClient

MS = 1_000_000
S = 1000 * MS

# -- the line itself -------------------------------------------------------------------------------------------------


def test_a_line_says_what_a_command_did() -> None:
    line = Line("dspy.Predict.__call__", 412 * MS, "ok", "3f2a9c", callbacks=2, lm_calls=1, tokens=231)
    assert line.text() == "✓ dspy.Predict.__call__  412 ms · kernel 3f2a · 1 LM call, 231 tokens · 2 callbacks"
    assert "✓" in line.html()
    assert "<details>" not in line.html()


def test_a_line_of_a_command_that_waits_says_so() -> None:
    assert Line("f", 1300 * MS, "queued").text() == "⠸ f  1.3 s · queued"


def test_a_line_says_how_long_a_command_waited_if_that_is_worth_saying() -> None:
    assert Line("f", S, "ok", queue=9 * MS).text() == "✓ f  1.00 s"
    assert Line("f", S, "ok", queue=300 * MS).text() == "✓ f  1.00 s · queued 300 ms"


def test_the_bar_of_a_line_is_as_long_as_the_command_has_come() -> None:
    line = Line("f", 50 * MS, done=5, total=20, message="pages")
    assert 'value="0.250"' in line.html()
    assert line.text().endswith("5/20 pages")
    assert "<progress" not in line._replace(state="ok").html()
    assert 'value="1.000"' in line._replace(done=21).html()


def test_what_a_line_says_cannot_become_markup() -> None:
    line = Line("<b>f", 0, "error", message="<i>", error="<u>", traceback="<script>")
    assert not re.search("<(i|u|script)>|<b><b>", line.html() + line._replace(state="running").html())


def test_a_line_is_bounded() -> None:
    line = Line("f" * 1000, 0, "error", error="e" * 10_000, traceback="t" * 1_000_000)
    assert len(line.text()) < 500
    assert len(line.html()) < 22_000
    assert len(Line("f", 0, message="m" * 10_000).text()) < 250


def test_a_summary_says_what_many_commands_did() -> None:
    summary = Summary(498, 2, p50=2_100_000, p95=9_000_000, tokens=12_345)
    assert summary.text() == "500 commands · 498 ✓ · 2 ✗ · p50 2.1 ms · p95 9.0 ms · 12,345 tokens"
    assert Summary(0, 0, 3).text() == "3 commands · ⠋ 3 running"


def told_of(subject: str, began: int = 0, id: str = "id") -> RealTold:
    """A command that runs, without a kernel."""
    running = SimpleNamespace(
        id=id, subject=subject, began=began, tried=began, parent=None, client=None, journal=(), attempt=1
    )
    return RealTold(running)  # type: ignore[arg-type]


def test_what_a_command_says_of_itself_is_one_line_without_escape_sequences() -> None:
    told = told_of("f\x1b[2J")
    said = Event(("bridge", "execution", "progress"), {"done": 1}, {"message": "first\nsecond\r\x9b5A"})
    told.take(EventBatch(command=1, settled=False, metadata={}, events=(said,)), nested=False)
    assert told.line(0).subject == "f [2J"
    assert told.line(0).message == "first second  5A"


def test_who_looks_on_and_raises_does_so_once_and_to_the_command_that_runs() -> None:
    class Broken:
        lock = threading.RLock()
        pause = 0.0
        asked = 0

        def __init__(self) -> None:
            self.abandoned = asyncio.Event()

        def begin(self, told: object) -> bool:
            return True

        def waits_for(self, told: object) -> bool:
            return False

        def tick(self, now: int) -> float | None:
            self.asked += 1
            raise RuntimeError("no display")

        def abandon(self) -> None:
            self.abandoned.set()

    async def look() -> None:
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        place: Any = Broken()
        live = Live(place, lambda: None)
        running: Any = told_of("f")._running
        live.begin(running)
        async with asyncio.timeout(10):
            await place.abandoned.wait()
        with pytest.raises(RuntimeError, match="no display"):
            live.end(running, None)
        with pytest.raises(RuntimeError, match="no display"):
            live.begin(running)
        live.close()
        assert (place.asked, complaints) == (1, [])

    asyncio.run(look())


# -- in a notebook ---------------------------------------------------------------------------------------------------

CELL = {"cellId": "1234"}
"""What JupyterLab, Notebook and VS Code say of a cell when they have it run."""
NONE: dict[str, str] = {}


class Cells:
    """A plain IPython kernel in which a host is opened, as a front end has it run cells."""

    def __init__(self, client: BlockingKernelClient) -> None:
        self.client = client
        self.outputs: list[tuple[str, str, str]] = []

    def start(self, code: str, metadata: dict[str, str]) -> str:
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        message = self.client.session.msg("execute_request", content, metadata=metadata)
        self.client.shell_channel.send(message)
        id: str = message["header"]["msg_id"]
        return id

    def run(self, code: str, metadata: dict[str, str]) -> list[tuple[str, str]]:
        """(kind of message, text) of all that is published until the cell has been run, of whatever cell."""
        return [(kind, text) for kind, text, _ in self.published(code, metadata)]

    def published(self, code: str, metadata: dict[str, str]) -> list[tuple[str, str, str]]:
        """The same, with the id of the display or ""."""
        id = self.start(code, metadata)
        found = []
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            kind, content = message["msg_type"], message["content"]
            if kind == "error":
                pytest.fail("\n".join(content["traceback"]))
            if kind == "stream":
                found.append((kind, content["text"], ""))
            elif kind in ("display_data", "update_display_data", "execute_result"):
                display_id = content["transient"].get("display_id", "") if "transient" in content else ""
                found.append((kind, content["data"]["text/plain"], display_id))
            ended = kind == "status" and content["execution_state"] == "idle"
            if ended and message["parent_header"].get("msg_id") == id:
                return found


SETUP = """
import threading
from bridge_host import AsyncHost, Host
host = Host(kernels=1, concurrency=8, live=LIVE)
session = host.session("cells")
go = threading.Event()

@session.tool
def wait() -> bool:
    "Wait until a cell says so."
    return go.wait(60)

@session.tool
def nested() -> float:
    "Send a command."
    return session.call("math.sqrt", 4)

session.function("held", "def held(ctx, done=None):\\n    ctx.call_tool('wait')\\n    return done")
session.function("fails", "def fails(ctx):\\n    raise ValueError('a value')")
session.function("nests", "def nests(ctx):\\n    return ctx.call_tool('nested')")
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cells]:
    directory = tmp_path_factory.mktemp("cells")
    manager = KernelManager(kernel_name="python3", transport="ipc", ip=str(directory / "kernel"))
    manager.start_kernel(env={**os.environ, "IPYTHONDIR": str(directory)})
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        cells = Cells(client)
        cells.run(SETUP.replace("LIVE", "None"), CELL)
        yield cells
        cells.run("host.close()", NONE)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def settled(text: str) -> str:
    """A line without what no two runs share. On a machine that has other things to do a command may wait, too."""
    text = re.sub(r"kernel [0-9a-f]{4}\b", "kernel …", re.sub(r"[\d.]+ (µs|ms|s)\b", "…", text))
    return text.replace(" · queued …", "")


@pytest.mark.parametrize("metadata", [CELL, NONE], ids=["updated in place", "not updated"])
def test_a_quick_command_is_one_settled_line_before_what_follows_it(kernel: Cells, metadata: dict[str, str]) -> None:
    said = kernel.run("print(session.call('math.hypot', 3, 4))\nsession.call('math.sqrt', 9)", metadata)
    assert [(kind, settled(text)) for kind, text in said] == [
        ("display_data", "✓ math.hypot  … · kernel …"),
        ("stream", "5.0\n"),
        ("display_data", "✓ math.sqrt  … · kernel …"),
        ("execute_result", "3.0"),
    ]


def test_a_command_that_runs_is_updated_in_place_where_the_front_end_can_do_that(kernel: Cells) -> None:
    said = kernel.published("go.clear()\nthreading.Timer(.6, go.set).start()\nsession.call('held')", CELL)
    assert said[0][0] == "display_data"
    assert re.match(r"[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏] held  0\.\d s · kernel", said[0][1])
    assert {kind for kind, *_ in said[1:]} == {"update_display_data"}
    assert settled(said[-1][1]) == "✓ held  … · kernel … · 1 callback"
    assert len({display_id for *_, display_id in said}) == 1
    assert len(said) < 20


def test_a_command_that_runs_is_told_once_where_the_front_end_cannot_do_that(kernel: Cells) -> None:
    said = kernel.run("go.clear()\nthreading.Timer(.6, go.set).start()\nsession.call('held')", NONE)
    assert [(kind, settled(text)) for kind, text in said] == [("display_data", "✓ held  … · kernel … · 1 callback")]


@pytest.mark.parametrize("metadata", [CELL, NONE], ids=["updated in place", "not updated"])
def test_a_loop_of_five_hundred_commands_leaves_a_few_lines(kernel: Cells, metadata: dict[str, str]) -> None:
    code = """
for n in range(500):
    try:
        session.call("math.sqrt", -1 if n % 25 == 24 else 1)
    except Exception:
        pass
"""
    said = kernel.published(code, metadata)
    displays = [settled(text) for kind, text, _ in said if kind == "display_data"]
    assert displays[:5] == ["✓ math.sqrt  … · kernel …"] * 5
    failures = [text for text in displays if text.startswith("✗")]
    assert failures == ["✗ math.sqrt  … · kernel … · ValueError"] * 5
    assert len(displays) == 11
    assert settled(said[-1][1]) == "500 commands · 480 ✓ · 20 ✗ · p50 … · p95 …"
    assert len([text for text in displays if "commands" in text]) == 1


def test_an_error_is_folded_with_where_it_happened_and_without_values(kernel: Cells) -> None:
    code = """
from IPython.utils.capture import capture_output
with capture_output() as captured:
    try:
        session.call("fails")
    except Exception:
        pass
print(captured.outputs[0].data["text/html"])
"""
    ((_, html),) = kernel.run(code, CELL)
    assert "<details>" in html
    assert "in fails" in html
    assert "ValueError" in html
    assert "a value" not in html


def test_what_captures_the_output_of_a_cell_captures_one_line_a_command(kernel: Cells) -> None:
    assert (
        kernel.run("%%capture captured\ngo.clear()\nthreading.Timer(.6, go.set).start()\nsession.call('held')", CELL)
        == []
    )
    ((_, text),) = kernel.run("print(*(o.data['text/plain'] for o in captured.outputs), sep='|')", CELL)
    assert settled(text) == "✓ held  … · kernel … · 1 callback\n"


def test_a_command_of_a_tool_is_part_of_the_one_that_called_the_tool(kernel: Cells) -> None:
    said = kernel.run("session.call('nests')", NONE)
    assert [settled(text) for _, text in said] == ["✓ nests  … · kernel … · 1 callback", "2.0"]


def test_a_submitted_command_is_told_in_the_cell_that_waits_for_it_where_nothing_is_updated(kernel: Cells) -> None:
    assert kernel.run("go.clear()\nfuture = session.submit('held', 1)", NONE) == []
    said = kernel.run("go.set()\nfuture.result()", NONE)
    assert [settled(text) for _, text in said] == ["✓ held  … · kernel … · 1 callback", "1"]


def test_submitted_commands_settle_in_their_own_cell_where_lines_are_updated(kernel: Cells) -> None:
    id = kernel.start("go.clear()\nfutures = [session.submit('held') for n in range(7)]", CELL)
    shown: dict[str, list[str]] = {}

    def read(until: Any) -> None:
        while not until():
            message = kernel.client.get_iopub_msg(timeout=60)
            if "display_data" in message["msg_type"]:
                assert message["parent_header"]["msg_id"] == id
                content = message["content"]
                shown.setdefault(content["transient"]["display_id"], []).append(content["data"]["text/plain"])

    read(lambda: len(shown) == 6 and list(shown)[-1].endswith("-all"))  # beneath the lines
    kernel.start("go.set()", CELL)
    read(lambda: all("running" not in texts[-1] and "✓" in texts[-1] for texts in shown.values()))
    assert settled(list(shown.values())[-1][-1]) == "7 commands · 7 ✓ · p50 … · p95 …"


@pytest.mark.parametrize(("metadata", "displays"), [(CELL, OWN + 1), (NONE, OWN + 8)])
def test_what_a_cell_has_left_behind_may_send_commands_for_days(metadata: dict[str, str], displays: int) -> None:
    published: list[bool] = []
    parent = {"header": {"msg_type": "execute_request", "msg_id": "cell"}, "content": {}, "metadata": metadata}
    shell = SimpleNamespace(
        events=SimpleNamespace(register=lambda *_: None),
        kernel=SimpleNamespace(get_parent=lambda _: parent),
        display_pub=SimpleNamespace(pub_socket=None, publish=lambda *_, update, **__: published.append(update)),
    )
    notebook = Notebook(shell, lambda: None, clock=lambda: 0)
    notebook._ran()
    for number in range(1000):
        told, now = told_of("f", number * 10 * S, str(number)), number * 10 * S
        assert notebook.begin(told)
        notebook.end(told, None, now + MS)
        for after in range(6):
            notebook.tick(now + after * S)
    assert published.count(False) == displays


def test_awaited_commands_have_their_lines_too(kernel: Cells) -> None:
    code = """
async with AsyncHost(kernels=1) as other:
    theirs = other.session()
    print(await theirs.call("math.sqrt", 16))
"""
    assert [settled(text) for _, text in kernel.run(code, NONE)] == ["✓ math.sqrt  … · kernel …", "4.0\n"]


def test_a_host_that_is_not_to_be_looked_at_shows_nothing(kernel: Cells) -> None:
    code = "with Host(kernels=1, live=False) as quiet:\n    print(quiet.session().call('math.sqrt', 4))"
    assert kernel.run(code, CELL) == [("stream", "2.0\n")]


def test_an_executed_notebook_has_settled_lines_and_no_others(tmp_path: Path) -> None:
    notebook: Any = nbformat.v4.new_notebook(  # type: ignore[no-untyped-call]
        cells=[
            nbformat.v4.new_code_cell(source)  # type: ignore[no-untyped-call]
            for source in (
                SETUP.replace("LIVE", "None"),
                "threading.Timer(.5, go.set).start()\nsession.call('held', 1)",
            )
        ]
    )
    manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=str(tmp_path / "kernel"))
    NotebookClient(notebook, km=manager, timeout=60).execute(
        cleanup_kc=True, env={**os.environ, "IPYTHONDIR": str(tmp_path)}
    )
    texts = [settled(output.data["text/plain"]) for output in notebook.cells[1].outputs]
    assert texts == ["✓ held  … · kernel … · 1 callback", "1"]


# -- in a terminal ---------------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """As much of a terminal as is needed to know what is on its screen: 80 columns, no end of lines."""

    WIDTH = 80

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = [[]]
        self.column = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for part in re.findall(r"\x1b\[[\d;?]*[a-zA-Z]|.", text, re.DOTALL):
            if part == "\n":
                self.rows.append([])
                self.column = 0
            elif part == "\r":
                self.column = 0
            elif part == "\x1b[2K":
                self.rows[-1] = []
            elif not part.startswith("\x1b"):
                if self.column == self.WIDTH:
                    self.rows.append([])
                    self.column = 0
                row = self.rows[-1]
                row.extend(" " * (self.column + 1 - len(row)))
                row[self.column] = part
                self.column += 1
        return len(text)

    @property
    def lines(self) -> list[str]:
        return ["".join(row).rstrip() for row in self.rows]


class Told:
    """A command, as far as a terminal looks at it."""

    def __init__(self, subject: str) -> None:
        self.id = str(id(self))
        self.subject = subject
        self.began = 0
        self.state = "running"

    def end(self, error: BaseException | None, now: int) -> None:
        self.state = "ok" if error is None else "error"

    def line(self, now: int) -> Line:
        return Line(
            self.subject, now - self.began, self.state, "abcd", error="" if self.state != "error" else "ValueError"
        )


def the_screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """What this process has for a terminal. No fixture: pytest changes the streams before the test itself begins."""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    return screen


def begin(terminal: Terminal, *told: Any) -> None:
    for one in told:
        terminal.begin(one)


def test_a_short_command_writes_nothing_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = the_screen(monkeypatch)
    terminal, told = Terminal(), Told("f")
    begin(terminal, told)
    terminal.tick(900 * MS)
    terminal.end(told, None, 999 * MS)  # type: ignore[arg-type]
    assert screen.lines == [""]


def test_a_long_command_has_a_line_in_a_terminal_which_its_end_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = the_screen(monkeypatch)
    terminal, told = Terminal(), Told("f")
    begin(terminal, told)
    assert terminal.tick(1100 * MS) is not None
    assert screen.lines == ["⠙ f  1.1 s · kernel abcd"]
    terminal.tick(1500 * MS)
    assert screen.lines == ["⠴ f  1.5 s · kernel abcd"]
    terminal.end(told, None, 2 * S)  # type: ignore[arg-type]
    assert screen.lines == ["✓ f  2.00 s · kernel abcd", ""]
    assert terminal.tick(3 * S) is None
    assert sys.stdout is screen


def test_commands_that_run_at_once_share_a_line_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = the_screen(monkeypatch)
    terminal, told = Terminal(), [Told("f"), Told("f"), Told("g")]
    begin(terminal, *told)
    terminal.tick(1100 * MS)
    assert screen.lines == ["⠙ 3 commands  1.1 s · f, g"]
    terminal.end(told[2], ValueError(), 2 * S)  # type: ignore[arg-type]
    terminal.tick(2100 * MS)
    assert screen.lines == ["✗ g  2.00 s · kernel abcd · ValueError", "⠙ 2 commands  2.1 s · f"]


def test_what_is_printed_meanwhile_stays_above_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = the_screen(monkeypatch)
    terminal, told = Terminal(), Told("f")
    print("first", end="")
    begin(terminal, told)
    terminal.tick(1100 * MS)
    assert screen.lines == ["first", "⠙ f  1.1 s · kernel abcd"]
    print("a", end=" ")
    terminal.tick(1200 * MS)
    print("b", end="")
    assert screen.lines == ["first", "a b"], "half a line is left alone"
    print("!")
    terminal.tick(1300 * MS)
    assert screen.lines == ["first", "a b!", "⠸ f  1.3 s · kernel abcd"]
    print("c", end="")
    terminal.end(told, None, 2 * S)  # type: ignore[arg-type]
    print("last")
    assert screen.lines == ["first", "a b!", "c", "✓ f  2.00 s · kernel abcd", "last", ""]


def test_what_goes_to_a_file_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = the_screen(monkeypatch)
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    terminal = Terminal()
    begin(terminal, Told("f"))
    terminal.tick(1100 * MS)
    assert sys.stdout is file
    terminal.close(2 * S)
    assert screen.lines == [""]


def test_a_hundred_long_commands_that_end_at_once_do_not_flood_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = the_screen(monkeypatch)
    terminal, told = Terminal(), [Told(f"f{n}") for n in range(100)]
    begin(terminal, *told)
    for one in told:
        terminal.end(one, None, 2 * S)  # type: ignore[arg-type]
    assert len(screen.lines) == 6
    assert screen.lines[-2] == "… and 96 commands · 96 ✓"


def test_nothing_is_written_over_a_prompt_at_which_somebody_types(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = the_screen(monkeypatch)
    waiting: list[object] = []
    terminal, told = Terminal(waiting), Told("f")
    begin(terminal, told)
    terminal.tick(1100 * MS)
    assert screen.lines == [""]
    waiting.append("for it")
    terminal.tick(1200 * MS)
    assert screen.lines == ["⠹ f  1.2 s · kernel abcd"]
    waiting.clear()
    terminal.tick(1300 * MS)
    assert screen.lines == [""]
    terminal.end(told, None, 2 * S)  # type: ignore[arg-type]
    assert screen.lines == [""]


def test_two_hosts_on_one_screen_and_who_redirects_leave_the_streams_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = the_screen(monkeypatch)
    one, other = Terminal(), Terminal()
    for _ in range(3):
        first, second = Told("first"), Told("second")
        begin(one, first)
        begin(other, second)
        one.tick(1100 * MS)
        other.tick(1100 * MS)
        assert Terminal()._out is screen, "what is made meanwhile does not write through the others"
        one.end(first, None, 2 * S)  # type: ignore[arg-type]
        kept = sys.stdout
        with contextlib.redirect_stdout(io.StringIO()):
            other.end(second, None, 2 * S)  # type: ignore[arg-type]
        print("printed")
        assert kept.write("by who has kept it\n")
        begin(one, third := Told("third"))
        one.tick(1100 * MS)
        one.end(third, None, 1500 * MS)  # type: ignore[arg-type]
        assert sys.stdout is sys.stderr is screen
    assert screen.lines.count("printed") == screen.lines.count("by who has kept it") == 3


def test_who_asks_at_the_terminal_is_not_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = the_screen(monkeypatch)
    monkeypatch.setattr(screen, "fileno", lambda: 1, raising=False)
    terminal = Terminal()
    begin(terminal, Told("f"))
    terminal.tick(1100 * MS)
    sys.stdout.fileno()  # as `input()` does before it has its prompt written by C
    screen.write("name: ")
    terminal.tick(1200 * MS)
    assert screen.lines[-1] == "name:"
    print()
    terminal.tick(1300 * MS)
    assert screen.lines[-1] == "⠸ f  1.3 s · kernel abcd"
    terminal.close(2 * S)


def test_the_end_of_one_of_many_commands_does_not_look_at_all_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = 0

    class Looked(Told):
        def __getattribute__(self, name: str) -> Any:
            nonlocal looked
            looked += name == "began"
            return super().__getattribute__(name)

    the_screen(monkeypatch)
    terminal, told = Terminal(), [Looked(f"f{n}") for n in range(300)]
    begin(terminal, *told)
    for one in told:
        terminal.end(one, None, 500 * MS)  # type: ignore[arg-type]
    assert looked <= 3 * len(told)


FORKS = """
import os, threading
from bridge_host.live.terminal import Terminal
terminal = Terminal()
held, go = threading.Event(), threading.Event()
def draw():
    with terminal.lock:
        held.set()
        go.wait()
threading.Thread(target=draw).start()
held.wait()
os.register_at_fork(before=go.set)
child = os.fork()
if not child:
    os._exit(not terminal.lock.acquire(timeout=30))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_made_while_a_line_is_drawn_can_print() -> None:
    ran = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("0\n", "")


SCRIPT = """
from bridge_host import Host
with Host(kernels=1, live=LIVE) as host:
    session = host.session()
    session.call("math.sqrt", 4)
    session.call("time.sleep", 1.2)
    print("slept")
"""


def test_a_script_has_its_line_in_a_real_terminal() -> None:
    mine, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT.replace("LIVE", "None")], stdin=theirs, stdout=theirs, stderr=theirs, env=env
    ) as script:
        os.close(theirs)
        written = b""
        while True:
            try:
                part = os.read(mine, 10_000)
            except OSError:  # Linux: whoever had it open has closed it
                break
            if not part:
                break
            written += part
    os.close(mine)
    assert script.returncode == 0
    text = written.decode()
    assert re.search(r"[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]", text)
    screen = Screen()
    screen.write(text)
    assert [settled(line) for line in screen.lines] == ["✓ time.sleep  … · kernel …", "slept", ""]


@pytest.mark.parametrize(("live", "lines"), [("None", 0), ("False", 0), ("True", 1)])
def test_a_script_whose_stderr_is_no_terminal_writes_lines_only_if_told_to(live: str, lines: int) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("LIVE", live)], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "slept\n"
    assert [settled(line) for line in ran.stderr.splitlines()] == ["✓ time.sleep  … · kernel …"] * lines


@pytest.mark.parametrize("host", [Host, AsyncHost])
def test_a_wrong_value_of_the_option_says_what_to_write(host: Any) -> None:
    with pytest.raises(TypeError, match="live is True, False, or None: where somebody looks, not 'yes'"):
        host(kernels=0, live="yes")
