"""Twelve ways in which systems like this one fail, each as a test that says that this one does not.

The number in a name is that of the list in DESIGN's sources ("Where the existing systems fail"). What leaves its process group on purpose
(`setsid`) is beyond a kernel's reach and not tested (5), and so is a reused pid: kernels are watched through pidfds,
which never come to mean another process, and a test cannot make the system reuse one at will.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import datetime
import decimal
import fractions
import gc
import inspect
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import uuid
import weakref
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
import numpy as np
import psutil
import pytest
from jupyter_client.manager import AsyncKernelManager

import bridge_host
import bridge_kernel.contract
from bridge_host import (
    AsyncHost,
    AsyncSession,
    BridgeError,
    Cancelled,
    DeadlineExceeded,
    Host,
    HostClosed,
    NotFound,
    NotSerializable,
    Quarantined,
    Recycle,
    RemoteError,
    Session,
    ToolError,
)
from bridge_host.client import Reply
from bridge_host.store import Store
from bridge_host.values import ValueReader, ValueWriter
from bridge_kernel.contract.errors import MalformedValue
from bridge_kernel.contract.methods import Command, InstanceCreated, State
from bridge_kernel.contract.values import Record
from conftest import KERNELSIDE, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def running(host: Host) -> int:
    """How many commands the host's kernels run, but for the ones that ask."""
    return sum(stats.commands["running"] - 1 for stats in host.stats().values())


async def idle(host: AsyncHost) -> None:
    """Until its kernels run nothing but the command that asks."""
    async with asyncio.timeout(10):
        busy = True
        while busy:
            busy = any(stats.commands["running"] > 1 for stats in (await host.stats()).values())


class Only:
    """Sends every command to the kernel of that number, the first if there are not so many."""

    def __init__(self) -> None:
        self.number = 0

    def choose(self, ask: Any, candidates: Sequence[Any]) -> Any:
        ready = sorted(candidates, key=lambda kernel: kernel.number)
        return ready[self.number % len(ready)]


class Script:
    """A host in a process of its own, to be killed or interrupted. Prints one JSON value a line."""

    def __init__(self, source: str, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", inspect.cleandoc(source)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
            start_new_session=True,
        )
        self._watchdog = threading.Timer(60, self.process.kill)
        self._watchdog.start()

    def says(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the script has ended"
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._watchdog.cancel()
        self.process.kill()
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


# -- 1: what a tool is given -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["call_tool", "call_elixir_tool"])
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_1_a_dict_sent_to_call_elixir_tool_arrives_as_that_dict(session: Session, name: str, kind: str) -> None:
    got: list[Any] = []

    @session.tool
    def take(text: str, rows: list[Any], options: dict[str, Any], nothing: None) -> str:
        got.append((text, rows, options, nothing))
        return "taken"

    wait = "await " if kind == "async def" else ""
    session.function("f", f"{kind} f(ctx, arguments):\n    return {wait}ctx.{name}('take', arguments)\n")
    arguments: dict[str, Any] = {
        "text": "a b",
        "rows": [1, "2", None, [True]],
        "options": {"deep": {"er": [{}]}},
        "nothing": None,
    }
    assert session.call("f", arguments) == "taken"
    assert got == [("a b", [1, "2", None, [True]], {"deep": {"er": [{}]}}, None)]


# -- 2: values ---------------------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "None": None,
    "12": 12,
    "12.0": 12.0,
    "True": True,
    "2**70": 2**70,
    "-2**64": -(2**64),
    "set": {1, "a", (2, 3)},
    "frozenset": frozenset({b"x"}),
    "bytes": b"\x00\xff" * 3000,
    "int keys": {1: "a", 2: {3: None}},
    "mixed keys": {1: "int", "1": "str", (1, 2): "tuple", None: "none", True + 1: "two"},
    "tuple": (1, (2,), []),
    "a dict with our tag": {"$bridge": "bytes", "data": "gA=="},
    "Decimal": decimal.Decimal("0.10"),
    "datetime": datetime.datetime(2025, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC),
    "timedelta": datetime.timedelta(days=-1, microseconds=7),
    "UUID": uuid.UUID(int=7),
    "complex": complex(1, -0.5),
    "text": "line\nend \x00 é 🙂",
}


def carried(session: Session, value: Any) -> list[Any]:
    """The value as it comes back every way it can go."""
    back: list[Any] = []

    @session.tool
    def through(x: Any) -> Any:
        back.append(x)
        return x

    session.function(
        "ways",
        """
        def ways(ctx, x):
            ctx.set_variable("from_kernel", x)
            yield x
            yield ctx.get_variable("from_host")
            yield ctx.call_elixir_tool("through", {"x": x})
            return x
        """,
    )
    session.function("same", "def same(*, x):\n    return x\n")
    session["from_host"] = value
    stream = session.stream("ways", value)
    return [*stream, stream.result, session["from_kernel"], session.call("same", x=value), *back]


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_2_none_ints_sets_bytes_and_int_keyed_dicts_come_back_as_they_were(session: Session, value: Any) -> None:
    for back in carried(session, value):
        assert type(back) is type(value)
        assert back == value
        if isinstance(value, dict):
            assert list(map(type, back)) == list(map(type, value))


@pytest.mark.parametrize("dtype", ["float64", "int8", "uint64", "bool", "complex64", "<U3", "datetime64[s]"])
def test_2_arrays_come_back_as_the_arrays_they_were(session: Session, dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    for back in carried(session, array):
        assert type(back) is np.ndarray
        assert back.dtype == array.dtype
        assert back.shape == (2, 3)
        assert (back == array).all()


def test_2_what_cannot_come_back_as_it_was_is_refused_with_its_path_and_never_a_repr(session: Session) -> None:
    session.function("made", "def made():\n    return {'rows': [1, object()]}\n")
    with pytest.raises(NotSerializable, match=r'result\["rows"\]\[1\]') as caught:
        session.call("made")
    assert caught.value.remedy
    with pytest.raises(NotSerializable, match=r"args\[0\]"):
        session.call("builtins.str", fractions)


# -- 3: instances and kernels -------------------------------------------------------------------------


@pytest.fixture
def two() -> Iterator[Host]:
    with Host(kernels=2, env={"PYTHONPATH": KERNELSIDE}, routing=Only()) as host:
        yield host


def only_on(host: Host, number: int) -> None:
    routing = host._host._options["routing"]
    assert isinstance(routing, Only)
    routing.number = number


def test_3_an_instance_made_on_one_kernel_is_called_on_another_and_outlives_both(two: Host) -> None:
    session = two.session()
    pids = []
    for number in (0, 1):
        only_on(two, number)
        pids.append(session.call("os.getpid"))
    assert len(set(pids)) == 2
    only_on(two, 0)
    account = session.create("accounts.Account", "Ada")
    session.tool(lambda: None, name="meet")
    only_on(two, 1)
    assert account.deposit(5) == 5
    only_on(two, 0)
    assert account.deposit(6) == 11
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: all(map(gone, pids)), "both kernels are dead")
    assert account.call("look", retries=2) == ("Ada", 11)
    assert session.call("os.getpid", retries=2) not in pids


def test_3_ids_of_equal_objects_never_collide(session: Session) -> None:
    equal = [session.create("builtins.list", [1]) for _ in range(200)]
    assert len({instance.ref for instance in equal}) == 200
    equal[0].append(2)
    assert [session.call("builtins.list", instance) for instance in equal[:3]] == [[1, 2], [1], [1]]


def test_3_ten_thousand_refs_are_ten_thousand_ids() -> None:
    writer = ValueWriter()
    created = InstanceCreated(State("recipe", writer.write(None, "state")), ())

    class Answers:
        async def run(self, *args: Any, **kwargs: Any) -> Reply:
            return Reply(msgspec.Raw(msgspec.json.encode(created)), ())

    async def main() -> set[str]:
        session = AsyncSession(Store().open("s")[0], Answers())  # type: ignore[arg-type]
        return {(await session.create("builtins.object")).ref for _ in range(10_000)}

    assert len(asyncio.run(main())) == 10_000


# -- 4: what a deleted session leaves ---------------------------------------------------------------------


def test_4_deleting_a_session_frees_its_tools_instances_functions_and_variables(shared_host: Host) -> None:
    session = shared_host.session("to be deleted")

    class Held:
        big = b"x" * 1000

    def make_tool(session: Session) -> Any:
        held = Held()  # what the tool keeps alive

        def look() -> int:
            return len(held.big)

        session.tool(look)
        return weakref.ref(held), weakref.ref(look)

    references = make_tool(session)
    session["x"] = 1
    session.function("f", "def f(ctx):\n    return ctx.call_tool('look')\n")
    instance = session.create("collections.Counter", "ab")
    assert (session.call("f"), instance.total()) == (1000, 2)
    state = weakref.ref(session._state)
    ref = instance.ref
    shared_host.delete_session("to be deleted")
    del session, instance
    assert "to be deleted" not in shared_host.sessions()

    def freed() -> bool:
        gc.collect()
        return all(reference() is None for reference in (*references, state))

    eventually(freed, "nothing holds the session's tool, or the session")
    again = shared_host.session("to be deleted")
    try:
        assert repr(again) == "<Session 'to be deleted' (empty)>"
        with pytest.raises(NotFound):
            again.instance(ref)
        with pytest.raises(NotFound):
            again["x"]
        with pytest.raises(NotFound, match="no module named 'f'"):
            again.call("f")
    finally:
        shared_host.delete_session("to be deleted")


def test_4_thousands_of_sessions_leave_nothing_in_the_kernel(lonely_host: Host) -> None:
    (before,) = lonely_host.stats().values()
    for number in range(1000):
        session = lonely_host.session(f"s{number}")
        session["x"] = number
        assert session.call("operator.neg", number) == -number
        lonely_host.delete_session(session.id)
    (after,) = lonely_host.stats().values()
    assert lonely_host.sessions() == []
    eventually(lambda: running(lonely_host) == 0, "no command runs on")
    assert after.sources == before.sources
    assert after.threads <= before.threads + 8


def test_4_the_heartbeat_of_a_kernel_keeps_no_session_alive() -> None:
    with Host(heartbeat=4.0) as host:
        session = host.session("s", ttl=3)
        session.tool(lambda: 1, name="tool")
        kernel = host._host.pool.kernels[0]
        assert kernel.client is not None
        heard = kernel.client.heard
        eventually(lambda: not host.sessions(), "the session has expired")
        assert kernel.client.heard > heard, "the kernel was heard of meanwhile"
        assert session._state.tools == {}, "and took its tools with it"


# -- 5: processes -------------------------------------------------------------------------------------------

WRAPPED = "{python} -m bridge_kernel -f '{{connection_file}}'; true"  # not exec: the shell stays, as the parent


@pytest.fixture
def wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernelspec whose process is a shell, and the kernel its child."""
    directory = tmp_path / "kernels" / "wrapped"
    directory.mkdir(parents=True)
    spec = {
        "argv": ["sh", "-c", WRAPPED.format(python=sys.executable)],
        "display_name": "Wrapped",
        "language": "python",
        "interrupt_mode": "message",
    }
    (directory / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    return "wrapped"


def test_5_a_kernel_behind_a_wrapper_ends_with_all_it_started(wrapped: str) -> None:
    with Host(kernel_name=wrapped) as host:
        session = host.session()
        (shell,) = (kernel.pid for kernel in host.kernels())
        kernel = session.call("os.getpid")
        assert psutil.Process(kernel).ppid() == shell, "the wrapper hides the kernel, or this proves nothing"
        child = session.call("os.spawnlp", os.P_NOWAIT, "sleep", "sleep", "600")
    eventually(lambda: all(map(gone, (shell, kernel, child))), "wrapper, kernel and grandchild have ended")


def test_5_a_kernel_behind_a_wrapper_that_dies_is_noticed_and_replaced(wrapped: str) -> None:
    with Host(kernel_name=wrapped) as host:
        session = host.session()
        (shell,) = (kernel.pid for kernel in host.kernels())
        kernel = session.call("os.getpid")
        child = session.call("os.spawnlp", os.P_NOWAIT, "sleep", "sleep", "600")
        os.kill(kernel, signal.SIGKILL)
        eventually(lambda: all(map(gone, (shell, kernel, child))), "what was left of it has ended")
        assert session.call("os.getpid", retries=1) != kernel
        (shell,) = (kernel.pid for kernel in host.kernels())
        kernel = session.call("os.getpid")
        os.kill(shell, signal.SIGKILL)
        eventually(lambda: gone(kernel), "a kernel whose wrapper was killed has ended")
        assert session.call("os.getpid", retries=1) != kernel


KILLED_HOST = """
    import json, os, sys, time
    from bridge_host import Host

    with Host(kernels=2, kernel_name=sys.argv[1] if len(sys.argv) > 1 else os.environ["KERNEL"]) as host:
        session = host.session()
        pids = [kernel.pid for kernel in host.kernels()]
        for _ in range(4):
            pids.append(session.call("os.getpid"))
            pids.append(session.call("os.spawnlp", os.P_NOWAIT, "sleep", "sleep", "600"))
        session.function("spin", "def spin():\\n    while True:\\n        pass\\n")
        busy = session.submit("spin")
        print(json.dumps(pids), flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize("wrapper", [False, True], ids=["plain", "behind a wrapper"])
def test_5_kernels_and_their_children_end_within_five_seconds_of_a_host_that_is_killed(
    wrapped: str, wrapper: bool
) -> None:
    with Script(KILLED_HOST, KERNEL=wrapped if wrapper else "bridge") as script:
        pids = set(script.says())
        try:
            assert not any(map(gone, pids))
            script.process.kill()
            eventually(lambda: all(map(gone, pids)), "nothing of the host's is left", seconds=5)
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_5_a_host_that_is_closed_while_it_starts_a_kernel_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []
    up = threading.Event()
    start_kernel = AsyncKernelManager.start_kernel

    async def slowly(manager: Any, **options: Any) -> None:
        await start_kernel(manager, **options)
        launched.append(manager.provisioner.pid)
        if len(launched) > 1:  # the replacement: it serves already, and its start is not over
            while not list(Path(manager.ip).parent.glob(Path(manager.ip).name + "-*")):  # noqa: ASYNC110 - files
                await asyncio.sleep(0.01)
            up.set()
            await asyncio.sleep(600)

    monkeypatch.setattr(AsyncKernelManager, "start_kernel", slowly)
    host = Host()
    try:
        os.kill(host.kernels()[0].pid, signal.SIGKILL)
        assert up.wait(60)
    finally:
        host.close()
    try:
        assert len(launched) == 2
        eventually(lambda: all(map(gone, launched)), "no process is left", seconds=5)
    finally:
        for pid in launched:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def test_5_twenty_kernels_started_at_once_do_not_collide() -> None:
    with Host(kernels=20, routing=Only()) as host:
        kernels = host.kernels()
        for what in (
            {kernel.pid for kernel in kernels},
            {kernel.id for kernel in kernels},
            {kernel.connection_file for kernel in kernels},
            {json.loads(Path(kernel.connection_file).read_text())["key"] for kernel in kernels},
        ):
            assert len(what) == 20
        session = host.session()
        answered = []
        for number in range(20):
            only_on(host, number)
            answered.append(session.call("os.getpid"))
        assert answered == [kernel.pid for kernel in kernels]
        # 6: and they are no thread storm.
        assert max(psutil.Process(kernel.pid).num_threads() for kernel in kernels) <= 16
    assert all(gone(kernel.pid) for kernel in kernels)


# -- 6: threads ------------------------------------------------------------------------------------------------


def test_6_numeric_libraries_start_one_thread_in_a_kernel_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    with Host() as host:
        session = host.session()
        assert [session.call("os.getenv", name) for name in LIMITS] == ["1"] * len(LIMITS)
        session.function(
            "threads_of_numpy",
            """
            def threads_of_numpy():
                import psutil
                before = psutil.Process().num_threads()
                import numpy
                square = numpy.ones((600, 600))
                square @ square
                return psutil.Process().num_threads() - before
            """,
        )
        assert session.call("threads_of_numpy") == 0
    assert not any(name in os.environ for name in LIMITS), "the host's own environment is not touched"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with Host(env={"OPENBLAS_NUM_THREADS": "3"}) as host:
        session = host.session()
        found = {name: session.call("os.getenv", name) for name in LIMITS}
    assert found == dict.fromkeys(LIMITS, "1") | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "3"}


# -- 7: streams --------------------------------------------------------------------------------------------------

COUNT = "def count(n):\n    for i in range(n):\n        yield i\n    return 'end'\n"


def test_7_the_end_of_a_hundred_thousand_small_chunks_arrives() -> None:
    async def main() -> None:
        async with AsyncHost() as host:
            session = host.session()
            session.function("count", COUNT)
            stream = session.stream("count", 100_000)
            expected = 0
            async for value in stream:
                assert value == expected
                expected += 1
            assert (expected, stream.result) == (100_000, "end")

    asyncio.run(asyncio.wait_for(main(), 120))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 500])
def test_7_the_end_arrives_wherever_the_window_stands(session: Session, n: int) -> None:
    session.function("count", COUNT)
    session.function(
        "count_async",
        "async def count_async(n, fail):\n" + "    for i in range(n):\n        yield i\n    1 / (not fail)\n",
    )
    stream = session.stream("count", n)
    assert (list(stream), stream.result) == (list(range(n)), "end")
    assert list(session.stream("count_async", n, False)) == list(range(n))
    got = []
    with pytest.raises(RemoteError, match="ZeroDivisionError"):
        for value in session.stream("count_async", n, True):
            got.append(value)  # noqa: PERF402 - what came before the error counts
    assert got == list(range(n))


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_7_each_chunk_arrives_as_it_is_produced_and_not_in_one_burst(session: Session, kind: str) -> None:
    seen = [threading.Event() for _ in range(40)]

    @session.tool
    def wait_until_seen(number: int) -> bool:
        return seen[number].wait(60)

    wait = "await " if kind == "async def" else ""
    session.function(
        "f",
        f"{kind} f(ctx):\n    for i in range(40):\n        yield i\n"
        f"        assert {wait}ctx.call_tool('wait_until_seen', number=i)\n",
    )
    for value in session.stream("f"):
        seen[value].set()
    assert all(event.is_set() for event in seen)


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_7_a_producer_waits_for_a_consumer_that_is_slower(session: Session, kind: str) -> None:
    consumed = 0
    ahead: list[int] = []

    @session.tool
    def about_to_yield(number: int) -> None:
        ahead.append(number - consumed)

    wait = "await " if kind == "async def" else ""
    session.function(
        "f",
        f"{kind} f(ctx):\n    for i in range(200):\n        {wait}ctx.call_tool('about_to_yield', number=i)\n"
        "        yield i\n",
    )
    stream = iter(session.stream("f"))
    next(stream)
    consumed = 1
    eventually(lambda: len(ahead) >= 16, "the producer has used its credit up")
    for _ in stream:
        consumed += 1
    assert consumed == 200
    assert max(ahead) <= 17


def test_7_a_producer_stops_when_its_client_leaves(lonely_host: Host, tmp_path: Path) -> None:
    session = lonely_host.session()
    session.function(
        "endless",
        """
        def endless(closed):
            try:
                while True:
                    yield "chunk"
            finally:
                open(closed, "w").close()
        """,
    )
    session.function(
        "endless_async",
        """
        async def endless_async(closed):
            import asyncio
            try:
                while True:
                    yield "chunk"
                    await asyncio.sleep(0)
            finally:
                open(closed, "w").close()
        """,
    )
    for name in ("endless", "endless_async"):
        for _ in session.stream(name, str(tmp_path / name)):
            break
        eventually((tmp_path / name).exists, f"{name} was closed")
    eventually(lambda: running(lonely_host) == 0, "no producer runs on")


@pytest.mark.parametrize("leave", ["break", "aclose", "cancel", "an error"])
def test_7_a_producer_stops_however_an_asynchronous_client_leaves(leave: str) -> None:
    async def main() -> None:
        async with AsyncHost() as host:
            session = host.session()
            session.function("endless", "def endless():\n    while True:\n        yield 'chunk'\n")
            first = asyncio.Event()

            async def read() -> None:
                stream = session.stream("endless")
                async for _ in stream:
                    first.set()
                    if leave == "break":
                        break
                    if leave == "aclose":
                        await stream.aclose()
                        break
                    if leave == "an error":
                        raise LookupError

            reader = asyncio.create_task(read())
            await asyncio.wait_for(first.wait(), 60)
            if leave == "cancel":
                reader.cancel()
            await asyncio.wait([reader], timeout=10)
            assert reader.done()
            if not reader.cancelled():
                reader.exception()
            await idle(host)

    asyncio.run(main())


def consume(session: Session, name: str, got: list[Any], *args: Any) -> threading.Thread:
    """Read a stream in a thread; the last thing in `got` is the error that ended it, or "end"."""

    def read() -> None:
        try:
            for value in session.stream(name, *args):
                got.append(value)  # noqa: PERF402 - seen from outside while it grows
        except BridgeError as error:
            got.append(error)
        except CancelledError as error:
            got.append(error)
        else:
            got.append("end")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def test_7_a_consumer_does_not_hang_when_the_kernel_dies(lonely_host: Host) -> None:
    session = lonely_host.session()
    session.function(
        "dies",
        "def dies():\n    import os, signal\n    for i in range(100):\n        yield i\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n",
    )
    got: list[Any] = []
    consume(session, "dies", got).join(30)
    assert isinstance(got[-1], Quarantined), "it killed three kernels"
    assert got[:-1] == list(range(len(got) - 1)), "what arrived is what was sent, without a gap and nothing twice"


def test_7_a_consumer_does_not_hang_when_the_host_is_closed() -> None:
    with Host() as host:
        session = host.session()
        session.function("stuck", "def stuck():\n    yield 1\n    import time\n    time.sleep(600)\n")
        got: list[Any] = []
        reader = consume(session, "stuck", got)
        eventually(lambda: got == [1], "the first chunk came")
        closing = threading.Thread(target=host.close, daemon=True)
        closing.start()
        reader.join(60)
        closing.join(60)
        stuck = [name for name, thread in (("consumer", reader), ("close()", closing)) if thread.is_alive()]
        for kernel in psutil.Process().children():
            if "bridge_kernel" in " ".join(kernel.cmdline()) and stuck and kernel.pid == host_pid(host):
                kernel.kill()
        if stuck:
            # Its loop would hang the interpreter's exit too: let whoever waits there go.
            host._portal.start_task_soon(cancel_all)
        assert not stuck
    assert isinstance(got[-1], BridgeError | CancelledError)


def host_pid(host: Host) -> int:
    with contextlib.suppress(BridgeError):
        return host.kernels()[0].pid
    return 0


async def cancel_all() -> None:
    current = asyncio.current_task()
    for task in asyncio.all_tasks():
        if task is not current:
            task.cancel()


def test_7_an_asynchronous_consumer_does_not_hang_when_the_host_is_closed() -> None:
    async def main() -> None:
        host = AsyncHost()
        async with host:
            session = host.session()
            session.function("stuck", "def stuck():\n    yield 1\n    import time\n    time.sleep(600)\n")
            first = asyncio.Event()

            async def read() -> None:
                async for _ in session.stream("stuck"):
                    first.set()

            reader = asyncio.create_task(read())
            await asyncio.wait_for(first.wait(), 60)
        with pytest.raises(BridgeError):
            await asyncio.wait_for(reader, 60)

    asyncio.run(main())


def test_7_a_chunk_that_the_host_cannot_read_is_an_error_and_not_a_gap(session: Session) -> None:
    session.function(
        "f",
        """
        def f():
            from bridge_kernel.contract.values import Ref
            for i in range(100):
                yield Ref("no such instance", "x") if i % 4 == 3 else i
        """,
    )
    got: list[Any] = []
    reader = consume(session, "f", got)
    reader.join(60)
    assert not reader.is_alive()
    assert got[:3] == [0, 1, 2]
    assert isinstance(got[3], NotFound), "the chunk that could not be read ends the stream, and says why"


# -- 8: callbacks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_8_fifty_tools_that_block_starve_neither_health_checks_nor_other_commands(lonely_host: Host, kind: str) -> None:
    session = lonely_host.session()
    inside, release = threading.Semaphore(0), threading.Event()

    def block(number: int) -> int:
        inside.release()
        assert release.wait(30)
        return number

    async def block_async(number: int) -> int:
        inside.release()
        while not release.is_set():  # noqa: ASYNC110 - it is set from a thread that is not the loop's
            await asyncio.sleep(0.005)
        return number

    session.tool(block if kind == "sync" else block_async, name="block")
    session.function("f", "def f(ctx, n):\n    return ctx.call_tool('block', number=n)\n")
    session.function("g", "async def g(ctx, n):\n    return await ctx.call_tool('block', number=n)\n")
    futures = [session.submit("fg"[n % 2], n) for n in range(50)]
    try:
        for _ in range(50):
            assert inside.acquire(timeout=60)
        (kernel,) = lonely_host._host.engine.pool.kernels
        client = kernel.client
        assert client is not None

        async def ping() -> Any:
            return await asyncio.wait_for(client.request("kernel.ping", Command())[1], 60)

        assert b'"busy":50' in bytes(lonely_host._portal.call(ping).result).replace(b" ", b"")
        assert running(lonely_host) == 50
        assert session.call("math.sqrt", 4, deadline=10) == 2
        session["x"] = 1
        session.function("get", "def get(ctx):\n    return ctx.get_variable('x')\n")
        assert session.call("get", deadline=10) == 1
        assert not any(future.done() for future in futures)
    finally:
        release.set()
    assert [future.result(60) for future in futures] == list(range(50))


def test_8_a_tool_may_use_the_host_in_every_way_while_its_command_waits(lonely_host: Host) -> None:
    session = lonely_host.session()

    @session.tool
    def busy() -> list[Any]:
        session["made"] = [1]
        session.tool(lambda: "the inner tool", name="inner")
        session.function("inner_function", "def inner_function(ctx):\n    return ctx.call_tool('inner')\n")
        counter = session.create("collections.Counter", "aab")
        counter.update("b")
        return [
            session.call("inner_function"),
            counter.total(),
            list(session.stream("builtins.range", 20)) == list(range(20)),
            lonely_host.stats()[lonely_host.kernels()[0].id].commands["running"],
            session.inspect(counter).name,
            session["made"],
        ]

    session.function("outer", "def outer(ctx):\n    return ctx.call_tool('busy')\n")
    assert session.call("outer", deadline=20) == ["the inner tool", 4, True, 2, "collections.Counter", [1]]


# -- 9: time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_9_without_a_deadline_there_is_none_anywhere(session: Session, kind: str) -> None:
    @session.tool
    def inner() -> Any:
        return session.call("left")

    wait = "await " if kind == "async def" else ""
    session.function("left", f"{kind} left(ctx):\n    return ctx.deadline\n")
    session.function("outer", f"{kind} outer(ctx):\n    return ctx.deadline, {wait}ctx.call_tool('inner')\n")
    assert session.call("outer") == (None, None)
    methods: list[Any] = [
        Session.call,
        Session.submit,
        Session.stream,
        Session.create,
        Session.inspect,
        bridge_host.Instance.call,
    ]
    assert {inspect.signature(method).parameters["deadline"].default for method in methods} == {None}


def test_9_a_longer_deadline_inside_does_not_outlast_the_budget_it_is_in(session: Session) -> None:
    noted: list[float] = []

    @session.tool
    def nested(depth: int) -> Any:
        return session.call("descend", depth, deadline=3600)

    @session.tool
    def note(left: float) -> None:
        noted.append(left)

    session.function(
        "descend",
        """
        def descend(ctx, depth):
            ctx.call_tool("note", left=ctx.deadline)
            return ctx.call_tool("nested", depth=depth - 1) if depth else "bottom"
        """,
    )
    assert session.call("descend", 5, deadline=60) == "bottom"
    assert len(noted) == 6
    assert noted == sorted(noted, reverse=True)
    assert noted[0] <= 60


def test_9_a_shorter_deadline_inside_ends_the_inner_command_and_the_outer_sees_the_cause(session: Session) -> None:
    @session.tool
    def nested() -> Any:
        return session.call("time.sleep", 600, deadline=0.2)

    session.function(
        "outer",
        """
        def outer(ctx):
            from bridge_kernel.contract.errors import DeadlineExceeded
            try:
                ctx.call_tool("nested")
            except DeadlineExceeded as error:
                return str(error), ctx.cancelled
        """,
    )
    message, cancelled = session.call("outer", deadline=60)
    assert "time.sleep ran out of time" in message
    assert not cancelled


def test_9_when_the_budget_is_gone_the_caller_is_told_so_and_nothing_runs_on(lonely_host: Host) -> None:
    session = lonely_host.session()

    @session.tool
    def nested() -> Any:
        return session.call("time.sleep", 1, deadline=3600)

    session.function("outer", "def outer(ctx):\n    return ctx.call_tool('nested')\n")
    with pytest.raises(DeadlineExceeded, match="ran out of time"):
        session.call("outer", deadline=0.3)
    eventually(lambda: running(lonely_host) == 0, "nothing of it runs on")


# -- 10: measured where it is said ------------------------------------------------------------------------------------


def test_10_the_memory_that_is_reported_is_the_kernels_own(wrapped: str) -> None:
    with Host(kernel_name=wrapped) as host:
        session = host.session()
        held, release = threading.Event(), threading.Event()

        @session.tool
        def hold() -> None:
            held.set()
            release.wait(30)

        (before,) = host.stats().values()
        session.function(
            "f", "def f(ctx):\n    big = b'x' * (200 << 20)\n    ctx.call_tool('hold')\n    return len(big)\n"
        )
        future = session.submit("f")
        try:
            assert held.wait(30)
            (during,) = host.stats().values()
            assert during.rss - before.rss >= 150 << 20
        finally:
            release.set()
        assert future.result(30) == 200 << 20


def test_10_a_kernel_is_recycled_by_its_own_memory_and_not_by_its_neighbours() -> None:
    with Host(kernels=2, heartbeat=8.0, recycle=Recycle(rss_bytes=400 << 20), routing=Only()) as host:
        session = host.session()
        session.function(
            "grow",
            "def grow():\n    import builtins, os\n    builtins.hog = bytearray(500 << 20)\n    return os.getpid()\n",
        )
        only_on(host, 0)
        before = {kernel.pid for kernel in host.kernels()}
        grown = session.call("grow")
        (other,) = before - {grown}
        eventually(lambda: gone(grown), "the kernel that grew was replaced", seconds=30)
        eventually(lambda: len([k for k in host.kernels() if k.state == "ready"]) == 2, "there are two again")
        assert other in [kernel.pid for kernel in host.kernels()]
        recycled = [event.metadata for event in host.telemetry.events("bridge", "pool", "recycle")]
        assert [(event["pid"], event["reason"]) for event in recycled] == [(grown, "rss")]


# -- 11: cancelling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_11_a_user_cancels_what_runs_in_the_kernel(lonely_host: Host, kind: str) -> None:
    session = lonely_host.session()
    entered = threading.Event()
    session.tool(lambda: entered.set(), name="started")
    body = "await ctx.call_tool('started'); import asyncio; await asyncio.sleep(600)"
    if kind == "def":
        body = "ctx.call_tool('started')\n    while True: pass"
    session.function("f", f"{kind} f(ctx):\n    {body}\n")
    future = session.submit("f")
    assert entered.wait(60)
    assert future.cancel()
    eventually(lambda: running(lonely_host) == 0, "it has stopped in the kernel")
    assert session.call("math.sqrt", 4) == 2


def test_11_cancelling_an_awaiting_task_cancels_in_the_kernel() -> None:
    async def main() -> None:
        async with AsyncHost() as host:
            session = host.session()
            entered = asyncio.Event()

            @session.tool
            async def started() -> None:
                entered.set()

            session.function("f", "def f(ctx):\n    ctx.call_tool('started')\n    while True:\n        pass\n")
            task = asyncio.create_task(session.call("f"))
            await asyncio.wait_for(entered.wait(), 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await idle(host)

    asyncio.run(main())


def test_11_a_call_whose_sync_tool_cannot_be_stopped_ends_at_once_and_the_tools_result_goes_nowhere(
    lonely_host: Host,
) -> None:
    session = lonely_host.session()
    entered, release, left = threading.Event(), threading.Event(), threading.Event()

    @session.tool
    def stubborn() -> str:
        entered.set()
        release.wait(30)
        left.set()
        return "too late"

    session.function("f", "def f(ctx):\n    return ctx.call_tool('stubborn')\n")
    future = session.submit("f")
    try:
        assert entered.wait(60)
        future.cancel()
        with pytest.raises(CancelledError):
            future.result(60)
        eventually(lambda: running(lonely_host) == 0, "the kernel does not wait for it")
        assert not left.is_set()
    finally:
        release.set()
    assert left.wait(60)
    assert session.call("math.sqrt", 4) == 2


INTERRUPTED_HOST = """
    import json, os, threading
    from bridge_host import Host

    def say(what):
        print(json.dumps(what), flush=True)

    with Host() as host:
        session = host.session()
        session.tool(lambda: say("started"), name="started")
        session.function("spin", "def spin(ctx):\\n    ctx.call_tool('started')\\n    while True:\\n        pass\\n")
        session.function("endless", "def endless(ctx):\\n    ctx.call_tool('started')\\n    yield 1\\n    while True:\\n        pass\\n")
        session.function("waits", "def waits(ctx):\\n    ctx.call_tool('started')\\n    ctx.call_tool('never')\\n")
        session.tool(lambda: threading.Event().wait(60), name="never")
        say([kernel.pid for kernel in host.kernels()])
        for name in ("spin", "endless", "waits"):
            try:
                if name == "endless":
                    list(session.stream(name))
                else:
                    session.call(name)
            except KeyboardInterrupt:
                (stats,) = host.stats().values()
                while stats.commands["running"] > 1:
                    (stats,) = host.stats().values()
                say([name, session.call("os.getpid")])
        os._exit(0)  # the tool that cannot be stopped must not hold this script
"""


def test_11_ctrl_c_cancels_in_the_kernel_which_goes_on() -> None:
    with Script(INTERRUPTED_HOST) as script:
        (pid,) = script.says()
        try:
            for name in ("spin", "endless", "waits"):
                assert script.says() == "started"
                script.process.send_signal(signal.SIGINT)
                assert script.says() == [name, pid]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("way", ["call", "stream"])
def test_11_ctrl_c_while_a_command_is_being_handed_over_cancels_it_too(
    way: str, lonely_host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, handed_over = lonely_host, asyncio.run_coroutine_threadsafe
    session, started = host.session(), threading.Event()
    session.tool(started.set, name="started")
    session.function(
        "endless", "def endless(ctx):\n    ctx.call_tool('started')\n    yield 1\n    while True:\n        pass\n"
    )
    session.function("spin", "def spin(ctx):\n    ctx.call_tool('started')\n    while True:\n        pass\n")

    def interrupted(*args: Any) -> Any:
        handed_over(*args)
        assert started.wait(30)  # the kernel runs it, and who asked has not got the future
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
        session.call("spin") if way == "call" else session.stream("endless")
    while any(stats.commands["running"] > 1 for stats in host.stats().values()):
        pass
    assert session.call("math.hypot", 3, 4) == 5


# -- 12: what a host never does ---------------------------------------------------------------------------------------------

HOST_FILES = [
    *Path(bridge_host.__file__).parent.rglob("*.py"),
    *Path(bridge_kernel.contract.__file__).parent.rglob("*.py"),
]
UNPICKLERS = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "copyreg",
    "imp",
    "runpy",
}
RUNNERS = {"eval", "exec", "compile", "__import__", "import_module", "loads", "load_module", "exec_module", "unpickle"}
MAY_IMPORT = ("arrays.py", "importlib.import_module(name)")
"""`library(name)`: numpy, pandas, polars or pyarrow. That a peer cannot choose another is tested below."""


@pytest.mark.parametrize("path", HOST_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_12_no_file_of_the_host_can_unpickle_or_run_what_it_is_sent(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]} if not node.level else set()
        elif isinstance(node, ast.Call):
            called = node.func
            name = (
                called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
            )
            if name == "compile" and isinstance(called, ast.Attribute):
                assert isinstance(called.value, ast.Name)
                assert called.value.id == "re", ast.unparse(node)
                continue
            names = {name} & RUNNERS
            if (path.name, ast.unparse(node)) == MAY_IMPORT:
                continue
            assert "allow_pickle" not in {word.arg for word in node.keywords if not is_false(word.value)}
        else:
            continue
        assert not names & (UNPICKLERS | RUNNERS), f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_12_there_are_files_to_look_at() -> None:
    assert len(HOST_FILES) > 20


def test_12_classes_that_only_the_kernel_knows_arrive_as_records_and_go_back_as_themselves(session: Session) -> None:
    made = session.call("traps.make")
    assert "traps" not in sys.modules
    assert {type(made[name]) for name in ("point", "pair", "colour")} == {Record}
    assert made["point"]._class_name == "traps.Point"
    assert (made["point"].x, made["list"][0].y) == (1, 6)
    session.function(
        "types", "def types(x):\n    return [type(v).__qualname__ for v in (x['point'], x['pair'], x['colour'])]\n"
    )
    assert session.call("types", made) == ["Point", "Pair", "Colour"]
    with pytest.raises(RemoteError, match="caught") as caught:
        session.call("traps.fail")
    assert caught.value.type == "traps.TrapError"
    assert "traps" not in sys.modules


def test_12_a_pickle_is_kept_and_passed_on_and_never_opened_by_the_host(session: Session, tmp_path: Path) -> None:
    directory = tmp_path / "made by whoever unpickles"
    data = session.call("traps.pickled", str(directory))
    assert type(data) is bytes
    session["data"] = data
    seen: list[Any] = []
    session.tool(lambda x: seen.append(x), name="take")
    session.function(
        "f",
        "def f(ctx):\n    x = ctx.get_variable('data')\n    ctx.call_tool('take', x=x)\n    yield x\n    raise ValueError(x)\n",
    )
    with pytest.raises(RemoteError):
        for value in session.stream("f"):
            assert value == data
    assert seen == [data]
    bomb = session.create("traps.Bomb", str(directory))
    assert "pickle state" in repr(bomb)
    assert bomb in session.instances.values()
    assert session["data"] == data
    assert not directory.exists(), "nobody has unpickled it"
    with pytest.raises(BridgeError):
        bomb.touch()
    assert directory.exists(), "the kernel has: the bomb was a live one"


FORGED = {
    "a class of os": {"$bridge": "dataclass", "class": "os.system", "fields": {"command": "touch {marker}"}},
    "a function": {"$bridge": "dataclass", "class": "subprocess.call", "fields": {}},
    "a class that runs": {"$bridge": "dataclass", "class": "subprocess.Popen", "fields": {"args": "touch {marker}"}},
    "a model of no model": {"$bridge": "pydantic", "class": "subprocess.Popen", "fields": {}, "fields_set": []},
    "an enum of no enum": {"$bridge": "enum", "class": "subprocess.Popen", "name": "touch {marker}"},
    "a tuple of no tuple": {"$bridge": "namedtuple", "class": "os.system", "fields": {"0": "touch {marker}"}},
    "a registered class": {"$bridge": "record", "class": "subprocess.Popen", "fields": {"args": "touch {marker}"}},
    "a module to import": {"$bridge": "dataclass", "class": "traps.Point", "fields": {"x": 1, "y": 2}},
    "objects in an array": {"$bridge": "ndarray", "dtype": "|O", "shape": [1], "order": "C", "buffer": 0},
    "a table of another library": {
        "$bridge": "arrow",
        "library": "traps",
        "type": "traps",
        "class": "traps",
        "buffer": 0,
    },
    "a kind of its own": {"$bridge": "pickle", "buffer": 0},
    "nothing at all": {"$bridge": None},
    "a reduce": {"$bridge": "reduce", "class": "os.system", "args": ["touch {marker}"]},
}


@pytest.mark.parametrize("tree", FORGED.values(), ids=FORGED)
def test_12_a_forged_value_is_refused_or_a_record_and_runs_nothing(tree: Any, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    forged = json.loads(json.dumps(tree).replace("{marker}", str(marker)))
    buffer = pickle.dumps(Touch(str(marker)))
    before = set(sys.modules)
    try:
        value = ValueReader([buffer]).read({"deep": [forged]}, "result")
    except (MalformedValue, BridgeError):
        pass
    else:
        assert type(value["deep"][0]) is Record
    assert not marker.exists()
    assert not {
        name for name in set(sys.modules) - before if name.partition(".")[0] in ("traps", "subprocess", "pickle")
    }


class Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("tree", FORGED.values(), ids=FORGED)
def test_12_a_kernel_that_forges_messages_hurts_only_its_own_command(
    session: Session, tree: Any, tmp_path: Path
) -> None:
    """The bytes go out by the kernel's own socket, signed: as from a kernel that was taken over."""
    marker = tmp_path / "ran"
    taken: list[Any] = []
    session.tool(lambda x: taken.append(x), name="take")
    session.function(
        "forge",
        """
        def forge(ctx, forged, how):
            import json
            command = ctx._command
            connection = command.connection
            value = json.loads(forged)
            def say(**message):
                connection.publish(json.dumps({"jsonrpc": "2.0", **message}).encode(), [b"x"], command.parent)
            if how == "tool":
                say(id=10**9, method="tool.call", params={"command": command.id, "name": "take", "args": [], "kwargs": {"x": value}})
                say(id=10**9 + 1, method="session.set", params={"command": command.id, "name": "forged", "value": value})
            elif how == "telemetry":
                command._publish_display("display_data", json.dumps({"data": value, "metadata": {}, "transient": value}).encode())
                say(method="command.progress", params=value)
                say(method="command.chunk", params={"command": command.id, "seq": 0, "value": value})
            else:
                say(id=command.id, result={"value": value})
            return "the honest answer"
        """,
    )
    forged = json.dumps(tree).replace("{marker}", str(marker))
    for how in ("tool", "telemetry", "answer"):
        with contextlib.suppress(BridgeError):
            answer = session.call("forge", forged, how, deadline=10)
            assert answer == "the honest answer" or (how == "answer" and type(answer) is Record)
    assert session.call("math.sqrt", 4, deadline=10) == 2
    assert not marker.exists()
    assert "traps" not in sys.modules
    assert all(type(value) is Record for value in taken)


def test_12_errors_named_by_a_kernel_are_none_that_the_host_would_import() -> None:
    from bridge_kernel.contract.errors import ErrorData, ErrorObject, exception_from

    for code in (-32000, -32001, 12345, -32603):
        error = exception_from(ErrorObject(code, "m", ErrorData(type="traps.TrapError", message="m")))
        assert isinstance(error, BridgeError)
    assert isinstance(exception_from(ErrorObject(-32001, "m")), ToolError)
    assert isinstance(exception_from(ErrorObject(-32002, "m")), Cancelled)
    assert isinstance(exception_from(ErrorObject(-32023, "m")), HostClosed)
    assert "traps" not in sys.modules
