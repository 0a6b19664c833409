"""The kernels of one host, as its engine and its user see them: places for commands, and how many there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge_kernel.contract.errors import (
    HostClosed,
    KernelDied,
    NotFound,
)

from .dispatch import Dispatcher, Lease
from .kernel import Kernel, KernelStatus, PoolStatus
from .launch import Launcher
from .options import PoolOptions, Recycle
from .roster import Roster

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..client import Listener
    from ..tasks import Tasks
    from ..telemetry import Telemetry
    from .outcomes import Outcome
    from .routing import Ask

__all__ = ("Kernel", "KernelStatus", "Lease", "Pool", "PoolOptions", "PoolStatus", "Recycle")


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
        options: PoolOptions | None = None,
    ) -> None:
        options = options or PoolOptions()
        self._telemetry = telemetry
        launcher = Launcher(listener, kernel_name=kernel_name, arguments=arguments, env=env)
        self.directory = launcher.directory
        """The host's own runtime directory, mode 0700; removed by `close`."""
        self._roster = roster = Roster(tasks, telemetry, launcher, options)
        self._desk = roster.desk = Dispatcher(telemetry, options, hopeless=roster.hopeless, on_worn=roster.wear_out)

    @property
    def kernels(self) -> list[Kernel]:
        return list(self._roster.kernels)

    async def start(self, count: int) -> None:
        """Start `count` kernels more, all at once, and wait for them.

        Raises:
            KernelStartFailed: one of them did not start; those that did go on, and fewer are wanted.
        """
        await self._roster.start(count)

    async def attach(self, connection_file: str, session: str) -> Kernel:
        """Use a kernel that runs already and is somebody else's: it is neither restarted nor shut down.

        Raises:
            KernelStartFailed: the file is no connection file, or nobody answers.
        """
        return await self._roster.attach(connection_file, session)

    # -- a command's place -----------------------------------------------------------

    def take(self, ask: Ask) -> Lease | None:
        """A place for the command, at once, or None: then it must wait (`acquire`).

        Raises:
            CircuitOpen: the command is held back.
            HostClosed: the host is closed.
        """
        return self._desk.take(ask)

    async def acquire(self, ask: Ask) -> Lease:
        """As `take`, but wait for a place. Cancelling it leaves the queue at once, and nothing was sent.

        Raises:
            QueueFull: too many wait already, or too many of this session.
            CircuitOpen: the command is held back.
            KernelStartFailed: no kernel can be started.
            Overloaded: the host has no kernels at all.
            HostClosed: the host is closed.
        """
        return await self._desk.acquire(ask)

    def hurry(self, ask: Ask) -> None:
        """A tool of a running command waits for who asked this: it goes on as a nested one, if it waits still."""
        self._desk.hurry(ask)

    def release(self, lease: Lease, outcome: Outcome) -> None:
        """Give the place back: exactly once, whatever became of the command."""
        self._desk.release(lease, outcome)

    # -- what people ask for -----------------------------------------------------

    def status(self) -> PoolStatus:
        """What there is and what it does."""
        return PoolStatus(
            tuple(kernel.status() for kernel in self._roster.kernels),
            self._roster.wanted,
            sum(kernel.spare and kernel.ready for kernel in self._roster.kernels),
            self._desk.waiting,
            self._desk.strategy,
            self._roster.restarts,
        )

    async def scale(self, count: int) -> None:
        """Have `count` kernels: start those that are missing, or drain those that are too many, and wait for it.

        Raises:
            ValueError: `count` is negative.
            KernelStartFailed: one did not start.
        """
        if count < 0:
            raise ValueError(f"a pool has 0 kernels or more, not {count}")
        self._require_open()
        before = self._roster.wanted
        self._telemetry.tell(("bridge", "pool", "scale"), {"before": before, "wanted": count}, {"reason": "asked"})
        if count >= before:
            await self._roster.start(count - before)
        else:
            await self._roster.shrink(count)

    async def drain(self, id: str) -> None:
        """Let that kernel finish what it runs, send it nothing more, and end it: at once another is started for it.

        An attached kernel is detached instead.

        Raises:
            NotFound: there is no such kernel.
        """
        await self._roster.retire(self._find(id), "drain")

    async def restart(self, id: str | None = None) -> None:
        """Replace that kernel, or all of ours one after the other: the new one is ready before the old one drains.

        One that does not answer is killed.

        Raises:
            NotFound: there is no such kernel of ours.
        """
        ours = [kernel for kernel in self._roster.kernels if kernel.process is not None and kernel.connected]
        if id is not None:
            ours = [kernel for kernel in ours if kernel is self._find(id)]
            if not ours:
                raise NotFound(f"kernel {id!r} is not this host's own", remedy="Restart it where it was started.")
        self._require_open()
        for kernel in ours:
            if kernel.unresponsive:
                self._roster.lose(kernel, KernelDied(f"{kernel.name} was restarted, for it did not answer"), "silent")
            elif kernel.spare:
                await self._roster.retire(kernel, "restart")
            else:
                await self._roster.replace(kernel, "restart")

    def _find(self, id: str) -> Kernel:
        self._require_open()
        for kernel in self._roster.kernels:
            if kernel.id == id and kernel.connected:
                return kernel
        known = ", ".join(kernel.id for kernel in self._roster.kernels if kernel.connected)
        raise NotFound(f"there is no kernel {id!r}", remedy=f"There are: {known or 'none'}.")

    def _require_open(self) -> None:
        if self._roster.closed:
            raise HostClosed

    def pump(self) -> None:
        """Read what has arrived from every kernel: only from the loop's own thread."""
        for kernel in self._roster.kernels:
            if kernel.client is not None:
                kernel.client.pump()

    # -- the end -----------------------------------------------------------------

    def refuse(self) -> None:
        """From here on no kernel is started or given out; what waits for one is told so."""
        self._roster.refuse()

    async def close(self) -> None:
        """End every kernel of ours, close the connections to the others, remove every file."""
        await self._roster.close()
