"""Cells: what `execute_request` does in a Bridge kernel, seen through jupyter_client as any front end sees it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from jupyter_client.manager import KernelManager

from bridge_host import Host, RemoteError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jupyter_client.blocking.client import BlockingKernelClient

WAIT_S = 20.0
NO_OUTPUT = ("status", "execute_input", "comm_msg")  # a comm that a front end did not open is none of its business
ANSI = re.compile(r"\x1b\[[0-9;]*m")
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Ran:
    """What became of one cell: its reply, and every message that names it as parent, in order."""

    def __init__(self, reply: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        self.reply = reply["content"]
        self.outputs = [(m["msg_type"], m["content"]) for m in messages if m["msg_type"] not in NO_OUTPUT]
        self.kinds = [kind for kind, _ in self.outputs]

    def printed(self, name: str = "stdout") -> str:
        return "".join(c["text"] for kind, c in self.outputs if kind == "stream" and c["name"] == name)

    @property
    def result(self) -> str | None:
        return next((c["data"]["text/plain"] for kind, c in self.outputs if kind == "execute_result"), None)

    @property
    def traceback(self) -> str:
        return ANSI.sub("", "\n".join(self.reply.get("traceback", ())))


class Kernel:
    """One kernel and its client."""

    def __init__(self, manager: KernelManager) -> None:
        self.manager = manager
        self.client: BlockingKernelClient = manager.client()
        self.client.start_channels()
        try:
            self.client.wait_for_ready(timeout=WAIT_S)
        except BaseException:
            self.close()
            raise

    @property
    def file(self) -> str:
        return str(self.manager.connection_file)

    def run(self, code: str, **options: Any) -> Ran:
        return self.finish(self.send(code, **options))

    def send(self, code: str, **options: Any) -> str:
        return str(self.client.execute(code, **{"allow_stdin": False, **options}))

    def finish(self, msg_id: str, seen: Sequence[dict[str, Any]] = ()) -> Ran:
        messages = [*seen]
        while not (messages and is_idle(messages[-1])):
            messages.append(self.message(msg_id))
        return Ran(self.reply(msg_id), messages)

    def message(self, msg_id: str) -> dict[str, Any]:
        """The next message on iopub that belongs to this request."""
        while True:
            message: dict[str, Any] = self.client.get_iopub_msg(timeout=WAIT_S)
            if message["parent_header"].get("msg_id") == msg_id:
                return message

    def until_printed(self, msg_id: str, text: str) -> list[dict[str, Any]]:
        """Everything of this cell up to the moment in which it has printed `text`."""
        messages: list[dict[str, Any]] = []
        while not any(text in m["content"].get("text", "") for m in messages):
            messages.append(self.message(msg_id))
            assert not is_idle(messages[-1]), f"the cell ended without printing {text!r}"
        return messages

    def reply(self, msg_id: str) -> dict[str, Any]:
        while True:
            reply: dict[str, Any] = self.client.get_shell_msg(timeout=WAIT_S)
            if reply["parent_header"].get("msg_id") == msg_id:
                return reply

    def ask(self, msg_id: str) -> dict[str, Any]:
        content: dict[str, Any] = self.reply(msg_id)["content"]
        return content

    def interrupt(self) -> None:
        self.manager.interrupt_kernel()

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel()  # politely: a killed kernel leaves a temporary directory
        self.manager.context.destroy(linger=0)


def is_idle(message: dict[str, Any]) -> bool:
    return bool(message["msg_type"] == "status" and message["content"]["execution_state"] == "idle")


@contextlib.contextmanager
def started(*arguments: str, env: dict[str, str] | None = None) -> Iterator[Kernel]:
    manager = KernelManager(kernel_name="bridge")
    manager.start_kernel(extra_arguments=list(arguments), env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL)
    kernel = Kernel(manager)
    try:
        yield kernel
    finally:
        kernel.close()


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    with started() as kernel:
        yield kernel


@pytest.fixture
def host(kernel: Kernel) -> Iterator[Host]:
    with Host(kernels=0) as host:
        host.attach(kernel.file, session="demo")
        yield host


# -- namespaces ------------------------------------------------------------------


def test_a_name_defined_in_one_cell_is_gone_in_the_next(kernel: Kernel) -> None:
    assert kernel.run("x = 41\nx + 1").result == "42"
    assert kernel.run("x").reply["ename"] == "NameError"


def test_a_function_of_one_cell_sees_the_globals_of_its_cell(kernel: Kernel) -> None:
    assert kernel.run("n = 2\ndef twice(x): return n * x\ntwice(21)").result == "42"


def test_underscore_and_out_hold_nothing_of_an_earlier_cell(kernel: Kernel) -> None:
    assert kernel.run("'secret'").result == "'secret'"
    assert kernel.run("(_, __, ___, dict(Out), dict(_oh))").result == "('', '', '', {}, {})"


@pytest.mark.parametrize("last_line", ["probe", "1 / 0", "raise ValueError(probe)", "display(probe)"])
def test_an_object_of_a_cell_is_freed_when_the_cell_has_ended(kernel: Kernel, last_line: str) -> None:
    kernel.run(f"import sys, weakref\nclass Big: pass\nprobe = Big()\nsys.probe = weakref.ref(probe)\n{last_line}")
    assert kernel.run("import gc, sys; gc.collect(); sys.probe()").outputs == []


def test_a_cell_is_the_main_module_so_that_what_it_defines_can_be_pickled(kernel: Kernel) -> None:
    code = "import pickle\nclass P: pass\ntype(pickle.loads(pickle.dumps(P()))) is P, __name__"
    assert kernel.run(code).result == "(True, '__main__')"


def test_history_keeps_the_texts_of_cells_for_the_arrow_keys(kernel: Kernel) -> None:
    kernel.run("'remember me'")
    history = kernel.ask(kernel.client.history(hist_access_type="tail", n=1, raw=True, output=False))["history"]
    assert history[0][2] == "'remember me'"


# -- the session, without a host ------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        'session["x"]',
        'session["x"] = 1',
        'del session["x"]',
        '"x" in session',
        'session.call_tool("add", a=1)',
        'session.get_variable("x")',
        "session.x = 1",
        "list(session)",
    ],
)
def test_the_session_says_how_to_attach_a_host_whatever_is_done_with_it(kernel: Kernel, use: str) -> None:
    ran = kernel.run(use)
    assert ran.reply["ename"] == "NotAttached"
    assert "no host is attached" in ran.reply["evalue"]
    assert "Remedy: Attach one" in ran.traceback
    assert f"Host(kernels=0).attach({kernel.file!r}" in ran.traceback
    assert use in ran.traceback
    assert "bridge_kernel" not in ran.traceback


def test_the_repr_of_the_session_says_how_to_attach_a_host(kernel: Kernel) -> None:
    assert kernel.run("session").result == (
        f'<no session: attach a host with Host(kernels=0).attach({kernel.file!r}, session="demo")>'
    )


# -- the session, with a host ----------------------------------------------------


def test_a_cell_reads_and_writes_the_variables_of_the_hosts_session(kernel: Kernel, host: Host) -> None:
    host.session("demo")["x"] = [1, 2]
    ran = kernel.run('session["y"] = session["x"] + [3]\nsession["y"]')
    assert ran.result == "[1, 2, 3]"
    assert host.session("demo")["y"] == [1, 2, 3]


def test_a_cell_calls_a_tool_of_the_host(kernel: Kernel, host: Host) -> None:
    @host.session("demo").tool
    def add(a: int, b: int) -> int:
        return a + b

    assert kernel.run('session.call_tool("add", a=20, b=22)').result == "42"


def test_a_tools_error_reaches_the_cell_with_the_cells_own_line_shown(kernel: Kernel, host: Host) -> None:
    @host.session("demo").tool
    def broken() -> None:
        raise LookupError("no such shelf")

    ran = kernel.run('a = 1\nsession.call_tool("broken")')
    assert ran.reply["ename"] == "ToolError"
    assert "LookupError: no such shelf" in ran.traceback
    assert '----> 2 session.call_tool("broken")' in ran.traceback
    assert "command.py" not in ran.traceback


def test_the_repr_of_the_session_lists_what_there_is(kernel: Kernel, host: Host) -> None:
    host.session("demo")["rows"] = 3
    assert kernel.run("session").result == "<session 'demo' variables: rows>"


def test_a_thread_of_a_cell_may_use_the_session(kernel: Kernel, host: Host) -> None:
    code = """
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: session.set_variable(f"v{i}", i), range(8)))
    """
    assert kernel.run(code).reply["status"] == "ok"
    assert [host.session("demo")[f"v{i}"] for i in range(8)] == list(range(8))


def test_no_telemetry_of_a_cell_appears_among_its_outputs(kernel: Kernel, host: Host) -> None:
    code = 'session["x"] = 1\nsession.emit("n", {"n": 1})\nsession.progress(1, 2)\nwith session.span("s"): session["x"]'
    ran = kernel.run(code)
    assert ran.reply["status"] == "ok"
    assert ran.outputs == []


def test_the_session_of_a_cell_that_has_ended_says_so(kernel: Kernel, host: Host) -> None:
    kernel.run("import sys; sys.kept = session")
    ran = kernel.run("import sys; print(repr(sys.kept)); sys.kept.get_variable('x')")
    assert ran.printed() == "<session 'demo', of a cell that has ended>\n"
    assert ran.reply["ename"] == "Cancelled"
    assert "cell has ended" in ran.reply["evalue"]


def test_after_the_host_has_closed_the_session_is_unattached_again(kernel: Kernel) -> None:
    with Host(kernels=0) as host:
        host.attach(kernel.file, session="demo")
        assert kernel.run("session.session_id").result == "'demo'"
    assert kernel.run("session['x']").reply["ename"] == "NotAttached"


def test_a_host_that_closes_while_a_cell_waits_for_a_tool_fails_the_call_and_not_the_cell(kernel: Kernel) -> None:
    called, released = threading.Event(), threading.Event()
    host = Host(kernels=0)

    @host.session("demo").tool
    def slow() -> None:
        called.set()
        released.wait(WAIT_S)

    host.attach(kernel.file, session="demo")
    running = kernel.send(
        "try:\n    session.call_tool('slow')\nexcept Exception as e:\n    print(type(e).__name__, e)\nsession['x']"
    )
    assert called.wait(WAIT_S)
    closing = threading.Thread(target=host.close)
    closing.start()
    ran = kernel.finish(running)
    released.set()
    closing.join(WAIT_S)
    assert ran.printed().startswith("NotAttached the host has gone")
    assert ran.reply["ename"] == "NotAttached"


def test_commands_are_served_while_a_cell_runs(kernel: Kernel, host: Host) -> None:
    running = kernel.send("print('on')\nwhile True: pass")
    seen = kernel.until_printed(running, "on")
    assert host.session("demo").call("math.hypot", 3, 4) == 5.0
    kernel.interrupt()
    assert kernel.finish(running, seen).reply["ename"] == "KeyboardInterrupt"


def test_what_a_command_displays_is_not_the_output_of_the_cell_beside_it(kernel: Kernel, host: Host) -> None:
    host.session("demo").function(
        "show", "def show():\n    from IPython.display import display\n    display(42)\n    print(43)"
    )
    running = kernel.send("print('on')\nwhile True: pass")
    seen = kernel.until_printed(running, "on")
    host.session("demo").call("show")
    kernel.interrupt()
    ran = kernel.finish(running, seen)
    assert ran.printed() == "on\n"
    assert "display_data" not in ran.kinds


# -- asynchronous cells and interrupts --------------------------------------------


@pytest.mark.parametrize(
    ("code", "result"),
    [
        ("import asyncio\nawait asyncio.sleep(0)\n6 * 7", "42"),
        ("import asyncio\nawait asyncio.gather(asyncio.sleep(0, 1), asyncio.sleep(0, 2))", "[1, 2]"),
        ("import asyncio\nasync with asyncio.timeout(5): x = 3\nx", "3"),
        ("async def f():\n    return 4\nawait f()", "4"),
    ],
)
def test_await_works_at_the_top_level(kernel: Kernel, code: str, result: str) -> None:
    assert kernel.run(code).result == result


def test_the_session_works_in_an_asynchronous_cell(kernel: Kernel, host: Host) -> None:
    assert kernel.run("import asyncio\nawait asyncio.sleep(0)\nsession['a'] = 5\nsession['a']").result == "5"


@pytest.mark.parametrize(
    "endless",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "while True: print('more', flush=True)",
        "import threading; threading.Event().wait()",
        "import subprocess; subprocess.run(['sleep', '60'])",
        "import asyncio; await asyncio.sleep(0)\nwhile True: pass",
    ],
)
def test_an_interrupt_stops_a_cell_with_keyboard_interrupt_and_the_kernel_goes_on(kernel: Kernel, endless: str) -> None:
    running = kernel.send(f"print('on', flush=True)\n{endless}")
    seen = kernel.until_printed(running, "on")
    kernel.interrupt()
    assert kernel.finish(running, seen).reply["ename"] == "KeyboardInterrupt"
    assert kernel.run("1").result == "1"


def test_an_interrupt_cancels_a_cell_that_awaits(kernel: Kernel) -> None:
    # Printed by the loop: the cell itself awaits by then.
    running = kernel.send("import asyncio\nasyncio.get_running_loop().call_soon(print, 'on')\nawait asyncio.sleep(60)")
    seen = kernel.until_printed(running, "on")
    kernel.interrupt()
    assert kernel.finish(running, seen).reply["ename"] == "CancelledError"
    assert kernel.run("1").result == "1"


def test_an_interrupt_stops_a_cell_that_waits_for_a_tool(kernel: Kernel, host: Host) -> None:
    called, released = threading.Event(), threading.Event()

    @host.session("demo").tool
    def slow() -> None:
        called.set()
        released.wait(WAIT_S)

    running = kernel.send("session.call_tool('slow')")
    assert called.wait(WAIT_S)
    kernel.interrupt()
    assert kernel.finish(running).reply["ename"] == "KeyboardInterrupt"
    released.set()
    assert kernel.run("session.session_id").result == "'demo'"


def test_interrupts_in_the_midst_of_output_never_spoil_a_message(kernel: Kernel) -> None:
    for _ in range(20):
        running = kernel.send("print('on', flush=True)\nwhile True:\n    print('x', flush=True)\n    display(1)")
        seen = kernel.until_printed(running, "on")
        kernel.interrupt()
        ran = kernel.finish(running, seen)
        assert ran.reply["ename"] == "KeyboardInterrupt"
        assert set(ran.printed().splitlines()) <= {"on", "x"}


def test_an_interrupt_while_no_cell_runs_does_nothing(kernel: Kernel) -> None:
    kernel.interrupt()
    assert kernel.run("1").result == "1"


# -- stdin -----------------------------------------------------------------------


@pytest.mark.parametrize("asks", ["input('name? ')", "import getpass; getpass.getpass()"])
def test_asking_for_input_is_refused_clearly_if_the_front_end_has_none_to_give(kernel: Kernel, asks: str) -> None:
    ran = kernel.run(asks)
    assert ran.reply["ename"] == "StdinNotImplementedError"
    assert "does not support input requests" in ran.reply["evalue"]


@pytest.mark.parametrize(
    ("asks", "password"), [("input('name? ')", False), ("__import__('getpass').getpass('name? ')", True)]
)
def test_asking_for_input_gets_the_front_ends_answer(kernel: Kernel, asks: str, password: bool) -> None:
    running = kernel.send(asks, allow_stdin=True)
    request = kernel.client.get_stdin_msg(timeout=WAIT_S)["content"]
    assert request == {"prompt": "name? ", "password": password}
    kernel.client.input("Ada")
    assert kernel.finish(running).result == "'Ada'"


def test_a_command_cannot_ask_the_front_end_of_the_cell_beside_it(kernel: Kernel, host: Host) -> None:
    running = kernel.send("print('on', flush=True)\nwhile True: pass", allow_stdin=True)
    seen = kernel.until_printed(running, "on")
    with pytest.raises(RemoteError, match="only a cell can ask for input"):
        host.session("demo").call("builtins.input", "name? ")
    kernel.interrupt()
    kernel.finish(running, seen)


# -- output ----------------------------------------------------------------------


def test_stdout_and_stderr_come_in_the_order_in_which_they_were_written(kernel: Kernel) -> None:
    ran = kernel.run("import sys\nfor i in range(3):\n    print(i)\n    print(-i, file=sys.stderr)\n'done'")
    assert ran.kinds == ["stream"] * 6 + ["execute_result"]
    assert [c["text"] for kind, c in ran.outputs if kind == "stream"] == ["0\n", "0\n", "1\n", "-1\n", "2\n", "-2\n"]


def test_what_is_printed_shows_while_the_cell_goes_on(kernel: Kernel) -> None:
    running = kernel.send("print('shown', end='')\nimport time; time.sleep(60)")
    seen = kernel.until_printed(running, "shown")
    kernel.interrupt()
    kernel.finish(running, seen)


def test_a_displayed_object_comes_between_the_lines_printed_before_and_after_it(kernel: Kernel) -> None:
    ran = kernel.run("print('a')\ndisplay(1)\nprint('b')")
    assert ran.kinds == ["stream", "display_data", "stream"]


def test_threads_print_to_the_cell_that_started_them(kernel: Kernel) -> None:
    ran = kernel.run(
        "import threading\nt = threading.Thread(target=print, args=('from a thread',))\nt.start(); t.join()\n"
        "import asyncio\nawait asyncio.to_thread(print, 'from to_thread')"
    )
    assert ran.printed() == "from a thread\nfrom to_thread\n"


def test_a_thread_that_outlives_its_cell_still_prints_and_displays_as_that_cells(kernel: Kernel) -> None:
    first = kernel.send(
        "import sys, threading\nsys.go = threading.Event()\n"
        "def late():\n    sys.go.wait()\n    print('late')\n    display('later')\n"
        "sys.late = threading.Thread(target=late); sys.late.start()"
    )
    kernel.finish(first)
    second = kernel.send("import sys; sys.go.set(); sys.late.join(); print('own')")
    messages: list[dict[str, Any]] = []
    while not (messages and messages[-1]["parent_header"]["msg_id"] == second and is_idle(messages[-1])):
        messages.append(kernel.client.get_iopub_msg(timeout=WAIT_S))
    kernel.reply(second)
    by_first = [m["content"] for m in messages if m["parent_header"]["msg_id"] == first]
    assert "".join(content.get("text", "") for content in by_first) == "late\n"
    assert [content["data"]["text/plain"] for content in by_first if "data" in content] == ["'later'"]
    by_second = [m["content"] for m in messages if m["parent_header"]["msg_id"] == second]
    assert "".join(content.get("text", "") for content in by_second) == "own\n"
    assert not any("data" in content for content in by_second)


def test_html_is_displayed_as_html(kernel: Kernel) -> None:
    ((kind, content),) = kernel.run("from IPython.display import HTML\nHTML('<b>x</b>')").outputs
    assert kind == "execute_result"
    assert content["data"]["text/html"] == "<b>x</b>"


def test_an_image_from_bytes_is_displayed_as_png(kernel: Kernel) -> None:
    code = f"from IPython.display import Image, display\ndisplay(Image({PIXEL!r}))"
    ((kind, content),) = kernel.run(code).outputs
    assert kind == "display_data"
    assert base64.b64decode(content["data"]["image/png"]) == PIXEL


def test_a_display_with_an_id_is_updated_in_place(kernel: Kernel) -> None:
    ran = kernel.run("h = display('one', display_id='d1')\nh.update('two')")
    assert [(kind, c["data"]["text/plain"], c["transient"]) for kind, c in ran.outputs] == [
        ("display_data", "'one'", {"display_id": "d1"}),
        ("update_display_data", "'two'", {"display_id": "d1"}),
    ]


def test_an_objects_own_repr_html_is_used(kernel: Kernel) -> None:
    ran = kernel.run("class T:\n    def _repr_html_(self): return '<i>t</i>'\nT()")
    assert ran.outputs[0][1]["data"]["text/html"] == "<i>t</i>"


def test_a_large_output_arrives_whole(kernel: Kernel) -> None:
    ran = kernel.run("print('x' * 3_000_000)\n'y' * 2_000_000")
    assert ran.printed() == "x" * 3_000_000 + "\n"
    assert len(ran.result or "") == 2_000_002


def test_output_beyond_the_limit_is_dropped_and_said_to_be() -> None:
    with started("--Policy.max_output_bytes=2048") as kernel:
        ran = kernel.run("for i in range(1000): print(i)")
    assert len(ran.printed()) < 2048
    assert "output limit reached" in ran.printed("stderr")


# -- IPython ---------------------------------------------------------------------


def test_a_traceback_shows_the_cells_own_lines(kernel: Kernel) -> None:
    ran = kernel.run("def f(x):\n    return 1 / x\n\nf(0)")
    assert ran.reply["ename"] == "ZeroDivisionError"
    assert "----> 4 f(0)" in ran.traceback
    assert "----> 2     return 1 / x" in ran.traceback
    assert ran.kinds == ["error"]


def test_a_syntax_error_points_at_its_place(kernel: Kernel) -> None:
    ran = kernel.run("x = = 1")
    assert ran.reply["ename"] == "SyntaxError"
    assert "x = = 1" in ran.traceback
    assert "^" in ran.traceback


def test_names_complete(kernel: Kernel) -> None:
    content = kernel.ask(kernel.client.complete("import math; math.hyp"))
    assert "math.hypot" in content["matches"] or "hypot" in content["matches"]


@pytest.mark.parametrize("attached", [False, True])
def test_the_session_completes_and_can_be_inspected(kernel: Kernel, attached: bool) -> None:
    with contextlib.ExitStack() as stack:
        if attached:
            stack.enter_context(Host(kernels=0)).attach(kernel.file, session="demo")
        matches = kernel.ask(kernel.client.complete("session.call_t"))["matches"]
        assert [match.removeprefix("session.") for match in matches] == ["call_tool"]
        content = kernel.ask(kernel.client.inspect("session"))
        assert content["found"]
        assert ("'demo'" if attached else "attach a host") in ANSI.sub("", content["data"]["text/plain"])


def test_a_function_is_inspected(kernel: Kernel) -> None:
    content = kernel.ask(kernel.client.inspect("zip"))
    assert content["found"]
    assert "iterable" in content["data"]["text/plain"]


def test_a_question_mark_shows_help(kernel: Kernel) -> None:
    (page,) = kernel.run("len?").reply["payload"]
    assert "Return the number of items" in ANSI.sub("", page["data"]["text/plain"])


def test_magics_and_shell_commands_work(kernel: Kernel) -> None:
    assert "Wall time" in kernel.run("%time sum(range(10))").printed()
    assert kernel.run("!echo from the shell").printed().replace("\r", "") == "from the shell\n"
    assert kernel.run("files = !echo a b\nfiles").result == "['a b']"
    assert kernel.run("%%capture out\nprint('hidden')").outputs == []


def test_user_expressions_see_the_cells_names(kernel: Kernel) -> None:
    found = kernel.run("x = 6", user_expressions={"y": "x * 7"}).reply["user_expressions"]
    assert found["y"]["data"]["text/plain"] == "42"


def test_a_failed_cell_stops_those_that_wait_behind_it(kernel: Kernel) -> None:
    first = kernel.send("input(); 1 / 0", allow_stdin=True)
    kernel.client.get_stdin_msg(timeout=WAIT_S)
    waiting = [kernel.send("2"), kernel.send("3")]
    kernel.ask(kernel.client.kernel_info())  # answered by the lane: it has both of them
    kernel.client.input("go on")
    assert [kernel.ask(id)["status"] for id in (first, *waiting)] == ["error", "aborted", "aborted"]
    assert kernel.run("4").result == "4"


def test_a_failed_cell_does_not_stop_later_cells_if_so_asked(kernel: Kernel) -> None:
    ids = [kernel.send("1 / 0", stop_on_error=False), kernel.send("2")]
    assert [kernel.ask(id)["status"] for id in ids] == ["error", "ok"]


@pytest.mark.parametrize("code", ["exit", "quit()", "import sys; sys.exit(3)", "raise SystemExit"])
def test_leaving_a_cell_leaves_the_kernel_running(kernel: Kernel, code: str) -> None:
    kernel.run(code)
    assert kernel.run("1").result == "1"


def test_a_silent_cell_publishes_nothing_but_its_status(kernel: Kernel) -> None:
    ran = kernel.run("6 * 7", silent=True)
    assert ran.reply["status"] == "ok"
    assert ran.outputs == []


# -- the kernel around its cells -------------------------------------------------


def test_cells_are_refused_with_a_clear_error_if_the_policy_denies_them() -> None:
    with started("--Policy.allow_execute=False") as kernel:
        ran = kernel.run("print('never')")
    assert ran.reply["status"] == "error"
    assert ran.reply["ename"] == "PolicyDenied"
    assert "--Policy.allow_execute=True" in ran.traceback
    assert ran.kinds == ["error"]


def bridge_comms(kernel: Kernel, target: str | None = None) -> list[str]:
    comms = kernel.ask(kernel.client.comm_info(target))["comms"]
    return [comm["target_name"] for comm in comms.values()]


LOADED = "def loaded():\n    import sys\n    return sorted(m for m in sys.modules if m.split('.')[0] in {'IPython', 'ipykernel'})"


def test_ipython_is_imported_for_the_first_cell_and_not_before_and_comms_are_listed_all_along() -> None:
    with started() as kernel, Host(kernels=0) as host:
        host.attach(kernel.file, session="demo")
        host.session("demo").function("loaded", LOADED)
        assert host.session("demo").call("loaded") == []
        assert bridge_comms(kernel) == ["bridge.v1"]
        assert bridge_comms(kernel, "other") == []
        assert host.session("demo").call("loaded") == []
        assert kernel.run("6 * 7").result == "42"
        assert "IPython" in host.session("demo").call("loaded")
        assert bridge_comms(kernel) == ["bridge.v1"]
        assert bridge_comms(kernel, "bridge.v1") == ["bridge.v1"]
        assert bridge_comms(kernel, "other") == []


def test_nothing_is_written_into_the_home_directory_or_left_in_the_temporary_one(tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    unset = {name: str(home / name) for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")}
    with started(env={**unset, "HOME": str(home), "TMPDIR": str(temporary), "IPYTHONDIR": ""}) as kernel:
        kernel.run("import json\n6 * 7")
        kernel.run("1 / 0")
        kernel.ask(kernel.client.complete("import js"))
        kernel.ask(kernel.client.complete("import json; json.du"))
        kernel.ask(kernel.client.inspect("zip"))
        assert list(home.iterdir()) == []
        shut_down(kernel, restart=False)
    assert list(temporary.iterdir()) == []


def shut_down(kernel: Kernel, *, restart: bool) -> None:
    """Ask for it as any client may, and see the answer and the end of the process."""
    provisioner: Any = kernel.manager.provisioner
    process = provisioner.process
    began = time.monotonic()
    kernel.client.shutdown(restart)
    reply = kernel.client.get_control_msg(timeout=WAIT_S)
    assert reply["content"] == {"status": "ok", "restart": restart}
    assert process.wait(timeout=60) == 0
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("cell", "restart"),
    [
        (None, False),
        ("6 * 7", True),
        ("print('on', flush=True)\nwhile True: pass", True),
        ("print('on', flush=True)\nimport asyncio; await asyncio.sleep(60)", False),
        (
            "print('on', flush=True)\nwhile True:\n    try:\n        while True: pass\n    except KeyboardInterrupt: pass",
            False,
        ),
    ],
    ids=["before-any-cell", "idle", "busy", "awaiting", "stubborn"],
)
def test_a_shutdown_is_answered_the_process_ends_and_its_files_are_gone(
    tmp_path: Path, cell: str | None, restart: bool
) -> None:
    with started(env={"TMPDIR": str(tmp_path)}) as kernel:
        if cell is not None:
            running = kernel.send(cell)
            if "on" in cell:
                kernel.until_printed(running, "on")
            else:
                kernel.finish(running)
        shut_down(kernel, restart=restart)
    assert list(tmp_path.iterdir()) == []


def test_jupyter_lists_the_kernel_with_its_logos() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "jupyter", "kernelspec", "list", "--json"], check=True, capture_output=True, timeout=60
    )
    spec = json.loads(listed.stdout)["kernelspecs"]["bridge"]
    assert spec["spec"]["argv"] == ["python", "-m", "bridge_kernel", "-f", "{connection_file}"]
    assert spec["spec"]["language"] == "python"


@pytest.mark.parametrize(
    ("name", "magic"), [("logo-32x32.png", b"\x89PNG"), ("logo-64x64.png", b"\x89PNG"), ("logo-svg.svg", b"<svg")]
)
def test_the_kernelspec_has_logos(name: str, magic: bytes) -> None:
    logo = Path(__file__).parents[1] / "kernel" / "kernelspec" / name
    assert logo.read_bytes().startswith(magic)


def test_jupyter_console_runs_cells(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "jupyter", "console", "--kernel", "bridge", "--simple-prompt"],
        input=b"6 * 7\nexit\n",
        env={**os.environ, "HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython")},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    assert "Out[1]: 42" in ANSI.sub("", ended.stdout.decode())
