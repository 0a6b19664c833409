"""What is measured: each peer echoes one payload from another process, and says how long each round trip took.

Everything that a peer starts ends with its context. When to call it, how often and what to make of it is the
caller's business (`bench.latency`, `bench.profile_command`).
"""

from __future__ import annotations

import contextlib
import hmac
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self

import zmq
from bench.echo_servers import GRPC_METHOD, sign
from jupyter_client.manager import KernelManager

from bridge_host import AsyncHost, Host

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from bridge_host import AsyncSession, Session

__all__ = ("PAYLOAD", "RAW", "TIMED", "Launch", "Peer", "Place", "Transport", "launch", "machine", "open_peers")

Transport = Literal["ipc", "tcp"]

PAYLOAD: Final[dict[str, Any]] = {"x": 1, "name": "abc", "list": [1, 2, 3]}
RAW: Final = "raw pyzmq echo"
ANSWER_S: Final = 30.0
LIBRARIES: Final = ("bridge-kernel", "ipykernel", "jupyter_client", "pyzmq", "grpcio", "msgspec")

# One command, in which n callbacks are timed where they are made: in the kernel.
TIMED: Final = """
{0}def {1}(ctx, payload, n):
    from time import perf_counter_ns as now
    durations = []
    for _ in range(n):
        began = now()
        {2}
        durations.append(now() - began)
    return durations
"""

_ECHO_TARGET: Final = """
def _opened(comm, message):
    comm.on_msg(lambda message: comm.send(message["content"]["data"]))
get_ipython().kernel.comm_manager.register_target("bench.echo", _opened)
"""

now = time.perf_counter_ns


class Peer(NamedTuple):
    """`run(n)` makes n round trips and returns how long each took, in ns. `pid` is who answers.

    `share` scales n down for slow peers, so that a round is short and the rounds of all peers are comparable.
    """

    name: str
    pid: int
    run: Callable[[int], Awaitable[list[int]]]
    share: float = 1.0


class Place:
    """A private directory, and addresses in it or on the loopback interface."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        # /tmp by default, and short: the path of a Unix socket has room for 107 bytes.
        self._directory = tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True)
        self.path = Path(self._directory.name)
        self._numbers = itertools.count(1)
        # IPython's history and profile: not the user's. And what a killed kernel leaves behind goes with the rest.
        self.env = {**os.environ, "IPYTHONDIR": str(self.path / "ipython"), "TMPDIR": str(self.path)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._directory.cleanup()

    def url(self) -> str:
        """An address that nobody uses, as ZeroMQ writes it."""
        if self.transport == "ipc":
            return f"ipc://{self.path}/{next(self._numbers)}"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return f"tcp://127.0.0.1:{probe.getsockname()[1]}"

    def kernel_manager(self, kernel_name: str) -> KernelManager:
        base = self.path / f"kernel-{next(self._numbers)}"
        settings: dict[str, Any] = {"kernel_name": kernel_name, "connection_file": f"{base}.json"}
        if self.transport == "ipc":
            settings |= {"transport": "ipc", "ip": str(base)}
        return KernelManager(**settings)


def machine() -> dict[str, Any]:
    """The kind of machine, not which one: no host name, no user."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "libzmq": zmq.zmq_version(),
        **{name: version(name) for name in LIBRARIES},
    }


@contextlib.asynccontextmanager
async def open_peers(place: Place) -> AsyncIterator[list[Peer]]:
    """Every peer, started and answering."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            stack.enter_context(_raw(place)),
            await stack.enter_async_context(_grpc(place)),
            *stack.enter_context(_ipykernel(place)),
            *await stack.enter_async_context(_bridge_async(place)),
            *stack.enter_context(_bridge_sync(place)),
        ]


# -- the peers that are not Bridge ---------------------------------------------------


@contextlib.contextmanager
def _server(kind: str, address: str) -> Iterator[int]:
    script = Path(__file__).with_name("echo_servers.py")
    with subprocess.Popen(
        [sys.executable, str(script), kind, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is ours to handle
    ) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != b"up\n":
                raise RuntimeError(f"the {kind} echo server did not start")
            yield process.pid
        finally:
            process.kill()


def _timed(trip: Callable[[int], object]) -> Callable[[int], Awaitable[list[int]]]:
    """`run` of a peer whose round trip blocks."""

    async def run(n: int) -> list[int]:
        durations = []
        for i in range(n):
            began = now()
            trip(i)
            durations.append(now() - began)
        return durations

    return run


def _timed_async(trip: Callable[[int], Awaitable[object]]) -> Callable[[int], Awaitable[list[int]]]:
    async def run(n: int) -> list[int]:
        durations = []
        for i in range(n):
            began = now()
            await trip(i)
            durations.append(now() - began)
        return durations

    return run


@contextlib.contextmanager
def _raw(place: Place) -> Iterator[Peer]:
    url = place.url()
    with _server("raw", url) as pid, zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.rcvtimeo = int(ANSWER_S * 1000)
        dealer.connect(url)

        def trip(i: int) -> None:
            body = json.dumps({"id": str(i), "op": "echo", "payload": PAYLOAD}).encode()
            dealer.send_multipart([sign(body), body])
            signature, answer = dealer.recv_multipart()
            if not hmac.compare_digest(sign(answer), signature):
                raise RuntimeError("an answer with a wrong signature")
            json.loads(answer)

        yield Peer(RAW, pid, _timed(trip))


@contextlib.asynccontextmanager
async def _grpc(place: Place) -> AsyncIterator[Peer]:
    import grpc

    url = place.url()
    address = url.replace("ipc://", "unix:").replace("tcp://", "")
    with _server("grpc", address) as pid:
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.unary_unary("/" + "/".join(GRPC_METHOD))

            async def trip(i: int) -> None:
                json.loads(await call(json.dumps({"id": str(i), "payload": PAYLOAD}).encode()))

            yield Peer("grpc.aio unary echo", pid, _timed_async(trip))


@contextlib.contextmanager
def _running_kernel(place: Place, kernel_name: str) -> Iterator[KernelManager]:
    manager = place.kernel_manager(kernel_name)
    try:
        manager.start_kernel(env=place.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        yield manager
    finally:
        manager.shutdown_kernel(now=True)


def _pid(manager: KernelManager) -> int:
    provisioner: Any = manager.provisioner
    return int(provisioner.pid)


@contextlib.contextmanager
def _ipykernel(place: Place) -> Iterator[list[Peer]]:
    with _running_kernel(place, "python3") as manager:
        client = manager.blocking_client()
        client.start_channels(hb=False)
        try:
            client.wait_for_ready(timeout=ANSWER_S)
            client.execute_interactive(_ECHO_TARGET, store_history=False, timeout=ANSWER_S)
            pid = _pid(manager)
            yield [
                Peer("ipykernel comm echo", pid, _comm_echo(client), share=0.5),
                Peer("ipykernel execute_request of 1", pid, _execute(client), share=0.25),
            ]
        finally:
            client.stop_channels()


def _send(client: Any, msg_type: str, content: dict[str, Any]) -> None:
    client.shell_channel.send(client.session.msg(msg_type, content))


def _comm_echo(client: Any) -> Callable[[int], Awaitable[list[int]]]:
    comm_id = "bench"
    _send(client, "comm_open", {"comm_id": comm_id, "target_name": "bench.echo", "data": {}})

    def trip(i: int) -> None:
        _send(client, "comm_msg", {"comm_id": comm_id, "data": {"id": i, "payload": PAYLOAD}})
        while True:
            message = client.get_iopub_msg(timeout=ANSWER_S)
            if message["msg_type"] == "comm_msg" and message["content"]["data"]["id"] == i:
                return

    return _timed(trip)


def _execute(client: Any) -> Callable[[int], Awaitable[list[int]]]:
    def trip(i: int) -> None:
        msg_id = client.execute("1", store_history=False)
        while client.get_shell_msg(timeout=ANSWER_S)["parent_header"].get("msg_id") != msg_id:
            pass
        while True:
            message = client.get_iopub_msg(timeout=ANSWER_S)
            if message["parent_header"].get("msg_id") == msg_id and message["content"].get("execution_state") == "idle":
                return

    return _timed(trip)


# -- Bridge --------------------------------------------------------------------------


def _furnish(session: AsyncSession | Session) -> None:
    """Give the session what the commands below need."""
    session["x"] = PAYLOAD
    session.function("echo", "def echo(value):\n    return value\n")
    session.function("get", TIMED.format("", "get", 'ctx.get_variable("x")'))
    session.function("get_async", TIMED.format("async ", "get_async", 'await ctx.get_variable("x")'))
    for tool in ("tool_async", "tool_sync"):
        session.function(tool, TIMED.format("", tool, f'ctx.call_tool("{tool}", value=payload)'))

    def tool_sync(value: dict[str, Any]) -> dict[str, Any]:
        return value

    async def tool_async(value: dict[str, Any]) -> dict[str, Any]:
        return value

    session.tool(tool_sync)
    session.tool(tool_async)


@contextlib.asynccontextmanager
async def _bridge_async(place: Place) -> AsyncIterator[list[Peer]]:
    """Over IPC the host starts its own kernel, as it always does; over TCP it attaches to one."""
    async with contextlib.AsyncExitStack() as stack:
        host = await stack.enter_async_context(AsyncHost(kernels=int(place.transport == "ipc")))
        if place.transport == "tcp":
            await host.attach(stack.enter_context(_running_kernel(place, "bridge")).connection_file)
        session = host.session()
        _furnish(session)
        pid = host.kernels()[0].pid

        def callbacks(function: str) -> Callable[[int], Awaitable[list[int]]]:
            async def run(n: int) -> list[int]:
                durations: list[int] = await session.call(function, PAYLOAD, n)
                return durations

            return run

        yield [
            Peer("Bridge command operator.index(1)", pid, _timed_async(lambda i: session.call("operator.index", i))),
            Peer("Bridge command echo", pid, _timed_async(lambda i: session.call("echo", PAYLOAD))),
            Peer("Bridge callback get_variable", pid, callbacks("get")),
            Peer("Bridge callback await get_variable", pid, callbacks("get_async")),
            Peer("Bridge callback call_tool, async tool", pid, callbacks("tool_async")),
            Peer("Bridge callback call_tool, sync tool", pid, callbacks("tool_sync")),
        ]


@contextlib.contextmanager
def _bridge_sync(place: Place) -> Iterator[list[Peer]]:
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(Host(kernels=int(place.transport == "ipc")))
        if place.transport == "tcp":
            host.attach(stack.enter_context(_running_kernel(place, "bridge")).connection_file)
        session = host.session()
        _furnish(session)
        pid = host.kernels()[0].pid
        yield [Peer("Bridge command echo, sync Host", pid, _timed(lambda i: session.call("echo", PAYLOAD)))]


# -- starting ------------------------------------------------------------------------


class Launch(NamedTuple):
    """Seconds from the start of a kernel's process to its first answers; nan: was not asked."""

    kernel_info_s: float
    first_result_s: float


def launch(place: Place, kernel_name: str, *, execute: bool) -> Launch:
    """Start a kernel as any Jupyter client would, ask for its `kernel_info`, then perhaps for `1`."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as shell:
        shell.linger = 0
        shell.reconnect_ivl = 2  # milliseconds; the default of 100 would be most of what is measured
        began = time.perf_counter()
        with _running_kernel(place, kernel_name) as manager:
            client: Any = manager.client()
            shell.connect(client._make_url("shell"))

            def ask(msg_type: str, content: dict[str, Any]) -> float:
                client.session.send(shell, msg_type, content)
                if not shell.poll(int(ANSWER_S * 1000)):
                    raise RuntimeError(f"{kernel_name} did not answer {msg_type}")
                client.session.recv(shell)
                return time.perf_counter() - began

            known = ask("kernel_info_request", {})
            if not execute:
                return Launch(known, float("nan"))
            return Launch(known, ask("execute_request", {"code": "1", "silent": False, "store_history": False}))


def launch_host() -> float:
    """Seconds from `Host()` to the answer of its first command."""
    began = time.perf_counter()
    with Host() as host:
        host.session().call("operator.index", 1)
        return time.perf_counter() - began
