"""Which kernels there are, and that there are as many as are wanted: started, given up, replaced, retired."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from typing import TYPE_CHECKING, Final

import anyio

from bridge_kernel.contract.errors import BridgeError, HostClosed, KernelDied, KernelStartFailed, Overloaded

from .health import Health
from .kernel import Kernel
from .load import Load
from .orphans import sweep

if TYPE_CHECKING:
    from ..client import KernelClient
    from ..tasks import Tasks
    from ..telemetry import Telemetry
    from .dispatch import Dispatcher
    from .launch import Launcher
    from .options import PoolOptions

__all__ = ("Roster",)

FIRST_BACKOFF_S: Final = 0.1
LAST_BACKOFF_S: Final = 30.0
HEALTHY_S: Final = 5.0  # a kernel that lived this long has earned an immediate replacement
GIVE_UP_AFTER: Final = 3  # starts that failed one after another, before waiting commands are told
EXIT_GRACE_S: Final = 0.25  # a cut connection is mostly a process that is ending: its exit code says more


class Roster:
    """Belongs to one event loop; `tasks` must outlive it."""

    def __init__(self, tasks: Tasks, telemetry: Telemetry, launcher: Launcher, options: PoolOptions) -> None:
        self._tasks = tasks
        self._telemetry = telemetry
        self._launcher = launcher
        self._options = options
        self._clock = options.clock
        self._health = Health(telemetry, options, on_change=self._changed, on_gone=self._on_gone, on_worn=self.wear_out)
        self.desk: Dispatcher  # set by the pool: each needs the other
        self.kernels: list[Kernel] = []
        self.wanted = 0
        """Kernels of our own that there should be, spares not counted."""
        self.restarts = 0
        self.closed = False
        self._numbers = itertools.count(1)
        self._coming = {False: 0, True: 0}  # kernels that will start; True: spares
        self._news = asyncio.Event()  # replaced by another whenever something has changed
        self._replacing = asyncio.Lock()
        self._failures = 0
        self._last_failure: BridgeError | None = None
        self._begun = False

    def _changed(self) -> None:
        self.desk.update(self.kernels)
        self._news.set()
        self._news = asyncio.Event()

    def hopeless(self) -> BridgeError | None:
        """Why no kernel will ever take a command, if that is so."""
        if self.closed:
            return HostClosed()
        if any(kernel.connected and not kernel.draining for kernel in self.kernels):
            return None
        if not self.wanted:
            return Overloaded("this host has no kernels", remedy="Start some: Host(kernels=1), or attach one.")
        if self._failures >= GIVE_UP_AFTER and self._last_failure is not None:
            return KernelStartFailed(str(self._last_failure), remedy=self._last_failure.remedy)
        return None

    # -- starting ----------------------------------------------------------------

    async def start(self, count: int) -> None:
        """Start `count` kernels more, all at once, and wait for them.

        Raises:
            KernelStartFailed: one of them did not start; those that did go on, and fewer are wanted.
        """
        self.wanted += count
        self._coming[False] += count
        failures: list[BridgeError] = []

        async def one() -> None:
            try:
                await self._start_kernel()
            except BridgeError as exc:
                self.wanted -= 1
                failures.append(exc)

        if not self._begun:
            self._begun = True
            self._tasks.start_soon(self._sweep)
            self._tasks.start_soon(self._health.watch, self.kernels)
        async with anyio.create_task_group() as starting:
            for _ in range(count):
                starting.start_soon(one)
        self._refill()
        self._changed()
        if failures:
            raise failures[0]

    async def _sweep(self) -> None:
        for swept in await anyio.to_thread.run_sync(sweep):
            self._telemetry.tell(
                ("bridge", "pool", "sweep"), {"killed": len(swept.killed)}, {"host": swept.host, "reason": "orphaned"}
            )

    async def _start_kernel(self, *, spare: bool = False, deaths: int = 0, setbacks: int = 0) -> None:
        self._coming[spare] -= 1
        began = time.perf_counter_ns()
        number = next(self._numbers)
        process = self._launcher.process(number)
        kernel = Kernel(number, process, self._clock)
        kernel.spare, kernel.deaths, kernel.setbacks = spare, deaths, setbacks
        self.kernels.append(kernel)
        try:
            client = await self._launcher.launch(
                process, lambda: self._on_exit(kernel), lambda why: self._on_cut(kernel, why)
            )
            if self.closed:
                client.close(HostClosed())
                process.kill()
                with anyio.CancelScope(shield=True):
                    await self._launcher.bury(process)
                raise HostClosed
        except BaseException:
            if kernel in self.kernels:
                self.kernels.remove(kernel)
            raise
        self._welcome(kernel, client, process.connection_file)
        self._failures = 0
        self._telemetry.tell(
            ("bridge", "kernel", "start"),
            {"duration": time.perf_counter_ns() - began, "system_time": time.time_ns()},
            {"kernel": kernel.id, "pid": kernel.pid, "spare": kernel.spare, "deaths": deaths},
        )
        self._changed()
        self._trim()

    async def attach(self, connection_file: str, session: str) -> Kernel:
        """Use a kernel that runs already and is somebody else's: it is neither restarted nor shut down.

        Raises:
            KernelStartFailed: the file is no connection file, or nobody answers.
        """
        kernel = Kernel(next(self._numbers), None, self._clock)
        client = await self._launcher.attach(connection_file, session, lambda why: self._on_cut(kernel, why))
        if self.closed:
            client.close(HostClosed(), polite=True)
            raise HostClosed
        self.kernels.append(kernel)
        self._welcome(kernel, client, connection_file)
        self._changed()
        return kernel

    def _welcome(self, kernel: Kernel, client: KernelClient, connection_file: str) -> None:
        kernel.connect(client, self._options.concurrency)
        kernel.connection_file = connection_file
        kernel.load = Load(self.desk.kinds, self.desk.mean_s)
        self._health.begin(kernel)
        if kernel.cut:
            self._on_cut(kernel, "was cut")

    # -- dying -------------------------------------------------------------------

    def _on_exit(self, kernel: Kernel) -> None:
        """The process has ended: fail what was in flight at once, and see to a replacement."""
        process = kernel.process
        assert process is not None
        if kernel.client is None:
            return  # it never was ready: whoever starts it sees that
        died = KernelDied(f"{kernel.name} ended with exit code {process.exit_code}, {kernel.in_flight} in flight")
        expected = self.closed or kernel.lost not in ("", "cut", "silent")
        self.lose(kernel, died, "exit")
        if kernel in self.kernels:
            self.kernels.remove(kernel)
        self._telemetry.tell(
            ("bridge", "kernel", "stop"),
            {"duration": round(kernel.age_s * 1e9), "system_time": time.time_ns(), "lost": kernel.casualties},
            {
                "kernel": kernel.id,
                "pid": process.pid,
                "exit_code": process.exit_code,
                "expected": expected,
                "reason": kernel.lost,
            },
        )
        self._tasks.start_soon(self._launcher.bury, process)
        self._changed()

    def _on_cut(self, kernel: Kernel, why: str) -> None:
        """Messages were lost that nobody can name: the kernel is given up."""
        kernel.cut = True
        if kernel.client is None:
            return  # the handshake is over, but nobody has looked yet: `_welcome` will
        self._changed()
        self._tasks.start_soon(self._give_up_cut, kernel, why)

    async def _give_up_cut(self, kernel: Kernel, why: str) -> None:
        if kernel.process is not None:
            with anyio.move_on_after(EXIT_GRACE_S):
                await kernel.process.wait()
        self.lose(kernel, KernelDied(f"the connection to {kernel.name} {why}"), "cut")

    def _on_gone(self, kernel: Kernel, silent_s: float) -> None:
        error = KernelDied(f"{kernel.name} did not answer for {silent_s:.3g} s: it hangs or is stopped")
        self.lose(kernel, error, "silent")

    def lose(self, kernel: Kernel, error: KernelDied, reason: str) -> None:
        """Give the kernel up: its commands fail with `error`, its process is killed, another takes its place.

        Does nothing if that was done already, for whatever reason.
        """
        client = kernel.client
        if kernel.lost or client is None:
            return
        kernel.lost, kernel.casualties = reason, kernel.in_flight
        kernel.idle.set()
        client.close(error)
        self._telemetry.intake.abandon(client.display_id(""))
        self.desk.forget(kernel.id)
        if kernel.process is None:
            self.kernels.remove(kernel)
            self._telemetry.tell(
                ("bridge", "kernel", "stop"),
                {"duration": round(kernel.age_s * 1e9), "system_time": time.time_ns(), "lost": kernel.casualties},
                {"kernel": kernel.id, "pid": kernel.pid, "expected": False, "reason": reason},
            )
        else:
            kernel.process.kill()
            self._refill(kernel)
        self._changed()

    # -- as many as are wanted -----------------------------------------------------

    def _count(self, *, spare: bool) -> int:
        """Our kernels in that role that are there or starting, and will stay."""
        return sum(
            kernel.process is not None and kernel.spare is spare and not kernel.leaving and not kernel.lost
            for kernel in self.kernels
        )

    def _refill(self, dead: Kernel | None = None) -> None:
        """See to it that there are as many kernels and spares as are wanted. `dead` leaves its history behind."""
        deaths = setbacks = 0
        if dead is not None:
            healthy = dead.served or dead.age_s >= HEALTHY_S
            deaths, setbacks = dead.deaths + 1, 0 if healthy else dead.setbacks + 1
            if not (self.closed or dead.spare or dead.leaving):
                self.restarts += 1
        while not self.closed and self._count(spare=False) + self._coming[False] < self.wanted:
            spare = next((kernel for kernel in self.kernels if kernel.spare and kernel.ready), None)
            if spare is not None:
                spare.spare, spare.deaths = False, deaths
                deaths = 0
            else:
                self._bring_soon(spare=False, deaths=deaths, setbacks=setbacks)
                deaths = setbacks = 0
        spares = self._options.spares if self.wanted else 0
        while not self.closed and self._count(spare=True) + self._coming[True] < spares:
            self._bring_soon(spare=True, setbacks=setbacks)
            setbacks = 0

    def _bring_soon(self, *, spare: bool, deaths: int = 0, setbacks: int = 0) -> None:
        self._coming[spare] += 1
        if not self._tasks.start_soon(self._bring, spare, deaths, setbacks):
            self._coming[spare] -= 1
            self.refuse()  # the host is closing

    async def _bring(self, spare: bool, deaths: int, setbacks: int) -> None:
        """Start one kernel, again and again until one has started or is not wanted any more."""
        while not self.closed:
            if setbacks:
                backoff = min(FIRST_BACKOFF_S * 2 ** min(setbacks - 1, 30), LAST_BACKOFF_S)
                await anyio.sleep(backoff * random.uniform(0.5, 1.5))
            wanted = self._options.spares if spare else self.wanted
            if self._count(spare=spare) + self._coming[spare] > wanted:
                self._coming[spare] -= 1
                return
            try:
                await self._start_kernel(spare=spare, deaths=deaths, setbacks=setbacks)
            except BridgeError as exc:
                self._coming[spare] += 1
                setbacks += 1
                self._failures += 1
                self._last_failure = exc
                self._changed()
            else:
                return

    def _trim(self) -> None:
        """A kernel started that is not wanted any more: fewer were asked for meanwhile."""
        if self._count(spare=False) > self.wanted:
            self._tasks.start_soon(self.retire, self._superfluous(1)[0], "scale")

    async def shrink(self, count: int) -> None:
        """Want `count` kernels, fewer than before, and wait until those that are too many have ended."""
        self.wanted = count
        ending = self._superfluous(max(0, self._count(spare=False) - count))
        if not count:
            ending += [kernel for kernel in self.kernels if kernel.spare and kernel.connected]
        for kernel in ending:
            kernel.leaving = True
        async with anyio.create_task_group() as drains:
            for kernel in ending:
                drains.start_soon(self.retire, kernel, "scale")

    def _superfluous(self, count: int) -> list[Kernel]:
        """Which kernels to end: those that run the least."""
        ours = [
            kernel
            for kernel in self.kernels
            if kernel.process is not None and kernel.connected and not kernel.spare and not kernel.leaving
        ]
        return sorted(ours, key=lambda kernel: (not kernel.unresponsive, kernel.in_flight, -kernel.number))[:count]

    # -- worn out ------------------------------------------------------------------

    def wear_out(self, kernel: Kernel, reason: str) -> None:
        """Replace a kernel that has served long enough."""
        if not kernel.worn and not kernel.leaving and kernel.process is not None:
            kernel.worn = True
            self._tasks.start_soon(self.retire if kernel.spare else self.replace, kernel, reason)

    async def replace(self, kernel: Kernel, reason: str) -> None:
        """Start another first, then drain this one. One at a time: there is never more than one too many."""
        async with self._replacing:
            if kernel.leaving or kernel.lost:
                return
            self._telemetry.tell(
                ("bridge", "pool", "recycle"),
                {
                    "completed": kernel.completed,
                    "age": round(kernel.age_s * 1e9),
                    "rss": kernel.rss,
                },
                {"kernel": kernel.id, "pid": kernel.pid, "reason": reason},
            )
            kernel.leaving = True
            self._refill()
            self._changed()
            while kernel.connected and not self.closed and self._serving() < self.wanted:
                await self._news.wait()
        await self.retire(kernel, reason)

    def _serving(self) -> int:
        return sum(k.process is not None and k.routable and not k.leaving for k in self.kernels)

    async def retire(self, kernel: Kernel, reason: str) -> None:
        """Let the kernel finish what it runs, then end it."""
        kernel.leaving = kernel.draining = True
        self._refill()
        self._changed()
        while kernel.in_flight and not kernel.lost:
            kernel.idle.clear()
            await kernel.idle.wait()
        client = kernel.client
        if kernel.lost or client is None:
            return
        kernel.lost = reason
        self._telemetry.intake.abandon(client.display_id(""))
        self.desk.forget(kernel.id)
        if kernel.process is None:
            client.close(KernelDied(f"{kernel.name} was detached"), polite=True)
            self.kernels.remove(kernel)
        else:
            client.shut_down()
            client.close(KernelDied(f"{kernel.name} was ended ({reason})"), polite=True)
        self._changed()
        if kernel.process is not None:
            await kernel.process.end()

    # -- the end -----------------------------------------------------------------

    def refuse(self) -> None:
        """From here on no kernel is started."""
        if not self.closed:
            self.closed = True
            self.desk.close()
            self._changed()

    async def close(self) -> None:
        """End every kernel of ours, close the connections to the others, remove every file."""
        self.refuse()
        for kernel in self.kernels:
            client = kernel.client
            if client is not None and not kernel.lost:
                kernel.lost = "closed"
                if kernel.process is not None:
                    client.shut_down()
                client.close(HostClosed(), polite=True)
        await self._launcher.close()
        self.kernels.clear()
