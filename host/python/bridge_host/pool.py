"""The kernels of one host: started, chosen from, replaced when they die."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import msgspec
import zmq

from bridge_kernel.contract.errors import BridgeError, HostClosed, KernelDied, KernelStartFailed, Overloaded

from .client import KernelClient
from .process import KernelProcess, RuntimeDirectory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .client import Listener
    from .tasks import Tasks
    from .telemetry import Telemetry

__all__ = ("Kernel", "KernelStatus", "Pool")

FIRST_BACKOFF_S: Final = 0.1
LAST_BACKOFF_S: Final = 30.0
HEALTHY_S: Final = 5.0  # a kernel that lived this long has earned an immediate replacement
GIVE_UP_AFTER: Final = 3  # starts that failed one after another, before waiting commands are told
MAX_SOCKETS: Final = 8192  # libzmq's default of 1023 is about 300 kernels


class KernelStatus(msgspec.Struct, frozen=True):
    """One kernel, as `host.kernels()` reports it."""

    id: str
    pid: int
    state: str  # "starting", "ready" or "dead"
    in_flight: int
    completed: int
    connection_file: str


class Kernel:
    """A place in the pool, or an attached kernel that somebody else owns. Its process may change; it may not."""

    def __init__(self, number: int, process: KernelProcess | None) -> None:
        self.number = number
        self.process = process
        self.client: KernelClient | None = None
        self.connection_file = ""
        self.completed = 0
        self.last_used = 0

    @property
    def ready(self) -> bool:
        return self.client is not None and self.client.closed is None

    @property
    def id(self) -> str:
        attached = self.client.attached if self.client is not None else None
        return attached.kernel.id if attached is not None else ""

    @property
    def pid(self) -> int:
        if self.process is not None:
            return self.process.pid
        attached = self.client.attached if self.client is not None else None
        return attached.kernel.pid if attached is not None else 0

    def status(self) -> KernelStatus:
        starting = self.process is not None and self.process.pid == 0
        state = "ready" if self.ready else "starting" if starting or (self.process and self.process.alive) else "dead"
        in_flight = self.client.in_flight if self.client is not None else 0
        return KernelStatus(self.id, self.pid, state, in_flight, self.completed, self.connection_file)


class Pool:
    """Belongs to one event loop; `tasks` must outlive it."""

    def __init__(
        self,
        tasks: Tasks,
        telemetry: Telemetry,
        listener: Listener,
        *,
        kernel_name: str,
        arguments: Sequence[str],
        env: Mapping[str, str],
    ) -> None:
        self._tasks = tasks
        self._telemetry = telemetry
        self._listener = listener
        self._options: dict[str, Any] = {"kernel_name": kernel_name, "arguments": arguments, "env": env}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.max_sockets = MAX_SOCKETS
        self._directory = RuntimeDirectory()
        self._kernels: list[Kernel] = []
        self._numbers = itertools.count(1)
        self._uses = itertools.count(1)
        self._changed = asyncio.Condition()
        self._wanted = 0  # kernels of our own that there should be
        self._failures = 0
        self._last_failure: BridgeError | None = None
        self._closed = False

    @property
    def kernels(self) -> list[Kernel]:
        return list(self._kernels)

    # -- starting ----------------------------------------------------------------

    async def start(self, count: int) -> None:
        """Start `count` kernels at once and wait for all of them.

        Raises:
            KernelStartFailed: one of them did not start; those that did go on.
        """
        self._wanted += count
        failures: list[BridgeError] = []

        async def one() -> None:
            try:
                await self._start_kernel()
            except BridgeError as exc:
                failures.append(exc)

        async with anyio.create_task_group() as starting:
            for _ in range(count):
                starting.start_soon(one)
        if failures:
            raise failures[0]

    async def _start_kernel(self) -> None:
        number = next(self._numbers)
        began = time.perf_counter_ns()
        process = KernelProcess(self._directory, number, **self._options)
        kernel = Kernel(number, process)
        self._kernels.append(kernel)
        born = time.monotonic()
        try:
            info = await process.start(lambda: self._on_exit(kernel, born))
            kernel.connection_file = process.connection_file
            client = KernelClient(info, self._context, self._listener)
            try:
                await self._attach(client, process)
            except BaseException as exc:
                reason = exc if isinstance(exc, BridgeError) else KernelStartFailed("the start was cancelled")
                client.close(reason)
                raise
            if self._closed or not process.alive:
                client.close(HostClosed())
                raise KernelStartFailed("the kernel ended as soon as it had started", remedy=process.log_tail())
        except BaseException as exc:
            if kernel in self._kernels:
                self._kernels.remove(kernel)
            process.kill()
            with anyio.CancelScope(shield=True):
                await process.stop()
            if isinstance(exc, OSError | zmq.ZMQError):
                raise KernelStartFailed(f"a kernel could not be started: {exc}") from exc
            raise
        kernel.client = client
        self._failures = 0
        self._telemetry.emit(
            ("bridge", "kernel", "start"),
            {"duration": time.perf_counter_ns() - began, "system_time": time.time_ns()},
            {"kernel": kernel.id, "pid": kernel.pid},
        )
        async with self._changed:
            self._changed.notify_all()

    async def _attach(self, client: KernelClient, process: KernelProcess) -> None:
        """Shake hands, or fail as soon as the process has ended: not only when the time is up."""
        attaching = asyncio.ensure_future(client.attach())
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait((attaching, ended), return_when=asyncio.FIRST_COMPLETED)
            if not attaching.done():
                raise KernelStartFailed(
                    f"the kernel ended with exit code {process.exit_code} before it answered",
                    remedy=process.log_tail() or "It printed nothing.",
                )
            attaching.result()
        finally:
            attaching.cancel()
            ended.cancel()

    async def attach(self, connection_file: str, session: str) -> Kernel:
        """Use a kernel that runs already and is somebody else's: it is neither restarted nor shut down.

        Raises:
            KernelStartFailed: the file is no connection file, or nobody answers.
        """
        try:
            content = await anyio.to_thread.run_sync(Path(connection_file).read_bytes)
        except OSError as exc:
            raise KernelStartFailed(f"the connection file cannot be read: {exc}") from exc
        client = KernelClient(KernelClient.read_connection_file(content), self._context, self._listener)
        try:
            await client.attach(session)
        except BaseException as exc:
            client.close(exc if isinstance(exc, BridgeError) else KernelStartFailed("the attach was cancelled"))
            raise
        kernel = Kernel(next(self._numbers), None)
        kernel.client = client
        kernel.connection_file = connection_file
        self._kernels.append(kernel)
        async with self._changed:
            self._changed.notify_all()
        return kernel

    # -- dying -------------------------------------------------------------------

    def _on_exit(self, kernel: Kernel, born: float) -> None:
        """The process has ended: fail what was in flight at once, and see to a replacement."""
        process = kernel.process
        assert process is not None
        client, kernel.client = kernel.client, None
        if client is None:
            return  # it never was ready: whoever starts it sees that
        self._kernels.remove(kernel)
        lost = client.in_flight
        attached = client.attached
        id = attached.kernel.id if attached is not None else ""
        self._telemetry.emit(
            ("bridge", "kernel", "stop"),
            {"duration": round((time.monotonic() - born) * 1e9), "system_time": time.time_ns(), "lost": lost},
            {"kernel": id, "pid": process.pid, "exit_code": process.exit_code, "expected": self._closed},
        )
        self._telemetry.abandon(client.display_id(""))
        client.close(
            KernelDied(
                f"kernel {id[:4]} (pid {process.pid}) ended with exit code {process.exit_code}, {lost} in flight"
            )
        )
        self._tasks.start_soon(self._replace, process, time.monotonic() - born)

    async def _replace(self, dead: KernelProcess, lived_s: float) -> None:
        with anyio.CancelScope(shield=True):
            await dead.stop()
        backoff = 0.0 if lived_s >= HEALTHY_S else FIRST_BACKOFF_S
        while not self._closed:
            await anyio.sleep(backoff)
            try:
                await self._start_kernel()
            except BridgeError as exc:
                self._failures += 1
                self._last_failure = exc
                backoff = min(max(backoff, FIRST_BACKOFF_S) * 2, LAST_BACKOFF_S)
                async with self._changed:
                    self._changed.notify_all()
            else:
                return

    def pump(self) -> None:
        """Read what has arrived from every kernel: only from the loop's own thread."""
        for kernel in self._kernels:
            if kernel.client is not None:
                kernel.client.pump()

    # -- choosing ----------------------------------------------------------------

    def choose(self) -> Kernel | None:
        """The ready kernel with the fewest commands in flight, the longest unused first; None if none is ready."""
        best: Kernel | None = None
        least = (0, 0)
        for kernel in self._kernels:
            if kernel.client is not None and kernel.client.closed is None:
                load = (kernel.client.in_flight, kernel.last_used)
                if best is None or load < least:
                    best, least = kernel, load
        if best is not None:
            best.last_used = next(self._uses)
        return best

    async def acquire(self) -> Kernel:
        """As `choose`, but wait for a kernel to be ready.

        Raises:
            KernelStartFailed: no kernel can be started.
            Overloaded: the host has no kernels at all.
            HostClosed: the host is closed.
        """
        while True:
            if self._closed:
                raise HostClosed
            if (chosen := self.choose()) is not None:
                return chosen
            if self._failures >= GIVE_UP_AFTER and self._last_failure is not None:
                raise KernelStartFailed(str(self._last_failure), remedy=self._last_failure.remedy)
            if not self._wanted:
                raise Overloaded("this host has no kernels", remedy="Start some: Host(kernels=1), or attach one.")
            async with self._changed:
                await self._changed.wait()

    # -- the end -----------------------------------------------------------------

    def refuse(self) -> None:
        """From here on no kernel is started or given out."""
        self._closed = True

    async def close(self) -> None:
        """End every kernel of ours, close the connections to the others, remove every file."""
        self.refuse()
        async with self._changed:
            self._changed.notify_all()
        async with anyio.create_task_group() as stopping:
            for kernel in self.kernels:
                client, kernel.client = kernel.client, None
                if client is not None:
                    if kernel.process is not None:
                        client.shut_down()
                    client.close(HostClosed(), polite=True)
                if kernel.process is not None:
                    stopping.start_soon(kernel.process.stop)
        self._kernels.clear()
        self._context.destroy(linger=0)
        self._directory.close()
