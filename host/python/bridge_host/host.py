"""`AsyncHost`: the process that owns sessions and sends commands, for asynchronous code."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final, Self

import anyio

from bridge_kernel.contract.errors import HostClosed, KernelDied
from bridge_kernel.contract.methods import Command
from bridge_kernel.contract.values import Ref, ToolRef

from .engine import Engine
from .pool import Pool
from .session import AsyncInstance, AsyncSession, _result
from .store import MemoryStore
from .tasks import Tasks
from .telemetry import Telemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bridge_kernel.contract.methods import Stats
    from bridge_kernel.contract.values import Tag

    from .engine import Output
    from .pool import KernelStatus
    from .store import SessionState

__all__ = ("AsyncHost",)

STATS_S: Final = 5.0


class AsyncHost:
    """Owns sessions, and kernels to run their commands on: `async with AsyncHost(kernels=2) as host`.

    It lives in one event loop (asyncio's). When it closes, its kernels end; when its process dies, they end
    by themselves.
    """

    def __init__(
        self,
        kernels: int = 1,
        *,
        kernel_name: str = "bridge",
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        on_output: Callable[[Output], object] | None = None,
    ) -> None:
        """`kernels` are started; 0 starts none (see `attach`).

        `kernel_name` is the kernelspec; `arguments` go to each kernel's command line, e.g.
        `["--Policy.allow_pickle=False"]`; `env` is added to its environment. `on_output` takes what commands
        print; by default it goes to this process's own stdout and stderr.
        """
        if kernels < 0:
            raise ValueError(f"kernels is how many to start: 0 or more, not {kernels}")
        self.telemetry = Telemetry()
        self._count = kernels
        self._options: dict[str, Any] = {"kernel_name": kernel_name, "arguments": tuple(arguments), "env": env or {}}
        self._on_output = on_output
        self._sessions = MemoryStore()
        self._engine: Engine | None = None

    async def __aenter__(self) -> Self:
        """Start the kernels and wait until they are ready. Raises `KernelStartFailed`, and leaves nothing behind."""
        tasks = Tasks()
        engine = Engine(self._sessions, self.telemetry, tasks, self._on_output)
        pool = Pool(tasks, self.telemetry, engine, **self._options)
        engine.pool = pool
        engine.hook = self._hook
        self._engine = engine
        self.telemetry.pumped_by(pool.pump)
        try:
            await pool.start(self._count)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the kernels and everything that runs in them. Sessions are gone with the host: they live in memory."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        with anyio.CancelScope(shield=True):
            engine.pool.refuse()
            await engine.tasks.close()
            await engine.pool.close()

    @property
    def engine(self) -> Engine:
        """What runs commands. Raises `HostClosed`."""
        if self._engine is None:
            raise HostClosed(
                "the host is not open", remedy="Open it: async with AsyncHost() as host, or with Host() as host."
            )
        return self._engine

    def _hook(self, session: SessionState, tag: Tag) -> object:
        """What a ref or a tool in a result becomes, here in the host."""
        if isinstance(tag, Ref):
            session.instance(tag.id)
            return AsyncInstance(AsyncSession(session, self.engine), tag.id)
        if isinstance(tag, ToolRef) and tag.name in session.tools:
            return session.tools[tag.name]
        return tag

    # -- sessions ----------------------------------------------------------------

    def session(self, id: str | None = None) -> AsyncSession:
        """The session of that id, made if there is none; a new one without an id."""
        return AsyncSession(self._sessions.open(id), self.engine)

    def sessions(self) -> list[str]:
        return list(self._sessions)

    def delete_session(self, id: str) -> None:
        """Forget a session and all it owns. Raises `NotFound`."""
        self._sessions.delete(id)

    # -- kernels -----------------------------------------------------------------

    def kernels(self) -> list[KernelStatus]:
        """Each kernel: id, pid, state, commands in flight and completed."""
        return [kernel.status() for kernel in self.engine.pool.kernels]

    async def attach(self, connection_file: str, session: str = "") -> None:
        """Use a kernel that somebody else started; its cells (`execute_request`) run in `session`.

        Raises:
            KernelStartFailed: the file cannot be read, or nobody answers.
        """
        engine = self.engine
        kernel = await engine.pool.attach(connection_file, session)
        assert kernel.client is not None
        engine.cells_of(kernel.client, self._sessions.open(session if session else None))

    async def stats(self) -> dict[str, Stats]:
        """What each kernel uses and has done, by kernel id. A kernel that does not answer within 5 s is left out."""
        found: dict[str, Stats] = {}
        for kernel in self.engine.pool.kernels:
            if kernel.client is not None and kernel.ready:
                id, future = kernel.client.request("kernel.stats", Command())
                try:
                    with contextlib.suppress(TimeoutError, KernelDied):
                        async with asyncio.timeout(STATS_S):
                            found[kernel.id] = _result("kernel.stats", await future)
                finally:
                    kernel.client.forget(id)
        return found

    def __repr__(self) -> str:
        if self._engine is None:
            return "<AsyncHost closed>"
        return f"<AsyncHost kernels={len(self._engine.pool.kernels)} sessions={len(self._sessions)}>"
