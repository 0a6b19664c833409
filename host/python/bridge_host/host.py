"""`AsyncHost`: the process that owns sessions and sends commands, for asynchronous code."""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, TypedDict, Unpack

import anyio
import anyio.to_thread

from bridge_kernel.contract.errors import HostClosed, KernelDied, NotFound, SecretUnreadable
from bridge_kernel.contract.methods import Command
from bridge_kernel.contract.secrets import forms_of
from bridge_kernel.contract.values import Ref, ToolRef

from .display import Shown
from .engine import RETRIES, Engine
from .engine.commands import Create, result_of
from .engine.results import CACHE_BYTES, ResultCache
from .instance import AsyncInstance
from .live import Live, live_for
from .pool import Pool, PoolOptions
from .session import AsyncSession
from .store import Quota, Store
from .store.exchange import export_sessions, facts_of, read_export, read_file, write_file
from .tasks import Tasks
from .telemetry import Telemetry
from .telemetry.page.broadcast import Broadcast
from .values import ValueReader

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Mapping, Sequence

    from bridge_kernel.contract.methods import Stats
    from bridge_kernel.contract.telemetry import Scalar
    from bridge_kernel.contract.values import Tag

    from .engine import Interrupted, Outcome, Output, Quarantine
    from .pool import Breaker, KernelStatus, Recycle, Routing
    from .store import SessionInfo, SessionState
    from .store.log import Journaled as JournaledCommand

__all__ = ("AsyncHost", "HostOptions", "open_store")

STATS_S: Final = 5.0
KEYS_KEPT_S: Final = 24 * 3600.0
"""How long the result of a command with an idempotency key is kept."""
SWEEP_S: Final = 60.0  # at least this often is looked for what has expired
REST_S: Final = 0.05  # and so long not, after it was looked for: each time is a look at every session


class HostOptions(TypedDict, total=False):
    """What a host can be opened with."""

    store: str | os.PathLike[str] | None
    """A file in which sessions survive; without one they live in memory."""
    ttl: float | None
    """Seconds that a new session may be unused before it expires; None: for ever."""
    quota: Quota
    """How much a session may hold."""
    kernel_name: str
    """The kernelspec."""
    arguments: Sequence[str]
    """For each kernel's command line: `["--Policy.allow_pickle=False"]`."""
    env: Mapping[str, str] | None
    """Added to the kernels' environment."""
    on_output: Callable[[Output], object] | None
    """Takes what commands print; by default it goes to this process's own stdout and stderr."""
    concurrency: int
    """Commands that one kernel runs at once."""
    queue: int
    """Commands that may wait for a kernel."""
    routing: str | Routing
    """Which kernel a command goes to: "fastest", "least_loaded", "random", "pinned", or a strategy of yours."""
    heartbeat: float | None
    """Seconds that a kernel may be silent before it is taken for dead, and killed; None: for ever."""
    spares: int
    """Kernels that are kept ready to take a dead one's place."""
    recycle: Recycle
    """When a kernel is replaced although it lives."""
    breaker: Breaker
    """When a command that keeps failing its kernels is held back."""
    cache_bytes: int
    """How much the results of functions and instances with `cache=` may take together; 64 MiB."""
    live: bool | None
    """Whether commands are shown while they run, and how they ended: in the cell that sends them, or on stderr. None:
    where somebody looks, a notebook or a terminal. False: nowhere. True: even so, on a stderr that is no terminal
    too, and in place whatever a notebook's front end says of itself."""


_POOL: Final = ("concurrency", "queue", "routing", "heartbeat", "spares", "recycle", "breaker")
_KNOWN: Final = frozenset(HostOptions.__annotations__)


def open_store(path: str | os.PathLike[str] | None, *, quota: Quota | None, ttl: float | None) -> Store:
    """The sessions in that file, or new ones in memory.

    Raises:
        StoreLocked: another host has it open.
        StoreDamaged: it is no store, is damaged, or is of a newer format; it was not changed.
    """
    if path is None:
        return Store(quota=quota, ttl=ttl)
    from .store.sqlite import SqliteLog
    from .store.vault import Vault

    log = SqliteLog(path)
    try:
        return Store(log, Vault.beside(path, store_id=log.id), quota=quota, ttl=ttl)
    except BaseException:
        log.close()
        raise


class AsyncHost:
    """Owns sessions, and kernels to run their commands on: `async with AsyncHost(kernels=2) as host`.

    It lives in one event loop (asyncio's). When it closes, its kernels end; when its process dies, they end
    by themselves. With `store="bridge.db"` its sessions survive both.
    """

    def __init__(self, kernels: int = 1, **options: Unpack[HostOptions]) -> None:
        """`kernels` are started; 0 starts none (see `attach`). The other parameters are those of `HostOptions`."""
        if kernels < 0:
            raise ValueError(f"kernels is how many to start: 0 or more, not {kernels!r}")
        if unknown := sorted(options.keys() - _KNOWN):
            raise TypeError(f"a host has no option {', '.join(unknown)}: there is {', '.join(sorted(_KNOWN))}")
        live = options.get("live")
        if live is not None and not isinstance(live, bool):
            raise TypeError(f"live is True, False, or None: where somebody looks, not {live!r}")
        self.telemetry = Telemetry()
        self.waiting: list[object] = []
        """Not empty while a plain call waits for its command."""
        self.results = ResultCache(options.get("cache_bytes", CACHE_BYTES))
        """What is kept of the functions and instances with `cache=`, as a table; `.clear()` forgets it."""
        self._count = kernels
        self._options = options
        pool: dict[str, Any] = {name: value for name, value in options.items() if name in _POOL}
        self._pool_options = PoolOptions(**pool)
        self._engine: Engine | None = None
        self._live: Live | None = None

    async def __aenter__(self) -> Self:
        """Open the store, start the kernels and wait until they are ready.

        Raises:
            StoreLocked, StoreDamaged: the store cannot be opened.
            KernelStartFailed: a kernel does not start. Nothing is left behind.
        """
        options = self._options
        path, quota, ttl = options.get("store"), options.get("quota"), options.get("ttl")
        store = await anyio.to_thread.run_sync(lambda: open_store(path, quota=quota, ttl=ttl))
        tasks = Tasks()
        live = live_for(options.get("live"), self.telemetry, self.waiting)
        engine = Engine(store, self.telemetry, tasks, options.get("on_output"), self._hook, self.results, live)
        pool = Pool(
            tasks,
            self.telemetry,
            engine,
            kernel_name=options.get("kernel_name", "bridge"),
            arguments=tuple(options.get("arguments", ())),
            env=options.get("env") or {},
            options=self._pool_options,
        )
        engine.pool = pool
        store.on_make = self._made
        engine.watchers.serve(asyncio.get_running_loop())
        self._engine, self._live = engine, live
        self.telemetry.intake.pumped_by(pool.pump)
        self.telemetry.intake.secrets_of = partial(_secrets_of, store)
        self.telemetry.snapshots.opened(pool.status)
        self._broadcast = Broadcast(pool.directory, self.telemetry.snapshots.take)
        try:
            await self._broadcast.open()
            await pool.start(self._count)
        except BaseException:
            await self.close()
            raise
        self._swept = anyio.Event()
        tasks.start_soon(self._sweep, engine)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the kernels and everything that runs in them. What was running is listed as interrupted when the
        store is opened again; sessions in memory are gone.
        """
        engine, self._engine = self._engine, None
        if engine is None:
            return
        with anyio.CancelScope(shield=True):
            engine.closing = True
            engine.pool.refuse()
            await _in_thread(self.telemetry.sync)  # while the kernels can still tell what was answered
            self._broadcast.close()
            self.telemetry.snapshots.closed()
            async with contextlib.AsyncExitStack() as closing:  # each, whatever becomes of the others
                closing.push_async_callback(_in_thread, self.telemetry.close)  # the last: it hears of all the ends
                if self._live is not None:
                    closing.callback(self._live.close)
                closing.push_async_callback(_in_thread, engine.store.close)
                closing.push_async_callback(_in_thread, engine.watchers.close)
                closing.push_async_callback(engine.pool.close)
                await engine.tasks.close()
            self.results.clear()

    async def _sweep(self, engine: Engine) -> None:
        """Forget sessions as they expire."""
        while True:
            gone, next_end = engine.store.sweep()
            for id in gone:
                self.telemetry.tell(
                    ("bridge", "session", "stop"), {"system_time": time.time_ns()}, _gone(id, "expired")
                )
            engine.store.forget_keys(engine.store.clock() - KEYS_KEPT_S)
            pause = SWEEP_S if next_end is None else next_end - engine.store.clock()
            self._swept = anyio.Event()
            with anyio.move_on_after(min(max(pause, REST_S), SWEEP_S)):
                await self._swept.wait()

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

    def _open_session(self, id: str | None, ttl: float | None) -> SessionState:
        engine = self.engine
        state, number = engine.store.open(id, ttl=ttl)
        if number:
            engine.store.log.wait(number)
        return state

    def _made(self, session: str) -> None:
        self.telemetry.tell(("bridge", "session", "start"), {"system_time": time.time_ns()}, {"session": session})

    def session(self, id: str | None = None, *, ttl: float | None = None) -> AsyncSession:
        """The session of that id, made if there is none; a new one without an id. `ttl` becomes its time to live."""
        state = self._open_session(id, ttl)
        if state.ttl is not None:
            self._swept.set()
        return AsyncSession(state, self.engine)

    def sessions(self) -> list[str]:
        return list(self.engine.store)

    def describe(self) -> Sessions:
        """Each session's age, use, version and size, as a table to look at."""
        store = self.engine.store
        return Sessions(store.peek(id).describe() for id in store)

    def delete_session(self, id: str) -> None:
        """Forget a session and all it owns: variables, instances, tools, functions, secrets, journal. Raises `NotFound`."""
        store = self.engine.store
        store.log.wait(store.delete(id))
        self.telemetry.tell(("bridge", "session", "stop"), {"system_time": time.time_ns()}, _gone(id, "deleted"))

    def export(self, path: str | os.PathLike[str], *sessions: str, history: bool = False) -> None:
        """Write these sessions, or all, into one JSON file: all but tools, and secrets of which only the names.

        The format is that of docs/session-export.schema.json.
        """
        store = self.engine.store
        states = [store.peek(id) for id in sessions or store]
        tools = {state.id: sorted(state.tools) for state in states}
        facts = [fact for state in states for fact in state.facts()]
        # After the facts: what is ahead of them is left out.
        histories = {state.id: store.log.histories(state.id) for state in states} if history else None
        write_file(path, export_sessions(facts, now=store.clock(), histories=histories, tools=tools))

    def import_(self, path: str | os.PathLike[str]) -> list[str]:
        """Add the sessions of an exported file; their ids.

        Raises:
            StoreDamaged: it is no export, or of a newer format.
            ValueError: there is a session of that id already.
        """
        store = self.engine.store
        batches = facts_of(read_export(read_file(path)), now=store.clock())
        return store.take(batches)

    # -- what was interrupted ------------------------------------------------------

    def interrupted(self) -> list[Interrupted]:
        """The commands that were running when the store was last closed, or its host died, oldest first."""
        return self.engine.recovery.interrupted()

    async def resume(
        self,
        id: str,
        *,
        replies: Mapping[str, Any] | None = None,
        rerun: Collection[str] = (),
        deadline: float | None = None,
        retries: int = RETRIES,
    ) -> Any:
        """Run an interrupted command again, its tools' replies taken from the journal; its result.

        Register the session's tools first. `replies` says what a call in doubt returned, by the call's id; `rerun`
        names those to be made again.

        Raises:
            EffectInDoubt: a tool was running when the host died, and neither says what to do.
            NotFound: there is no such command.
        """
        outcome = await self.engine.recovery.resume(
            id, replies=replies, rerun=rerun, deadline=deadline, retries=retries
        )
        return self._value(outcome)

    def _value(self, outcome: Outcome) -> Any:
        method = outcome.prepared.method
        session = outcome.session
        request = outcome.prepared.request
        if isinstance(request, Create):
            return self._hook(session, Ref(request.ref, request.cls))
        result = result_of(method, outcome.reply)
        if method == "object.inspect":
            return result
        return ValueReader(outcome.reply.buffers, lambda tag: self._hook(session, tag)).read(result.value, "result")

    def drop(self, id: str) -> None:
        """Forget an interrupted command; nothing that it wrote is kept. Raises `NotFound`."""
        engine = self.engine
        engine.store.log.wait(engine.recovery.drop(id))

    def journal(self, session: str | None = None) -> Journaled:
        """The commands that ran, of one session or of all, the last 10,000 and those that run: a table to look at."""
        return Journaled(self.engine.store.log.commands(session))

    @property
    def quarantine(self) -> Quarantine:
        """The commands that ended every kernel they met, and are not run again until they are let out."""
        return self.engine.quarantine

    # -- kernels -----------------------------------------------------------------

    @property
    def pool(self) -> Pool:
        """The kernels: `status()`, `await scale(n)`, `await drain(id)`, `await restart(id)`."""
        return self.engine.pool

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
        engine.cells_of(kernel.client, self._open_session(session or None, None))

    async def stats(self) -> dict[str, Stats]:
        """What each kernel uses and has done, by kernel id. A kernel that does not answer within 5 s is left out."""
        found: dict[str, Stats] = {}
        for kernel in self.engine.pool.kernels:
            if kernel.client is not None and kernel.ready:
                id, future = kernel.client.request("kernel.stats", Command())
                try:
                    with contextlib.suppress(TimeoutError, KernelDied):
                        async with asyncio.timeout(STATS_S):
                            found[kernel.id] = result_of("kernel.stats", await future)
                finally:
                    kernel.client.forget(id)
        return found

    def __repr__(self) -> str:
        if self._engine is None:
            return "<AsyncHost closed>"
        return f"<AsyncHost kernels={len(self._engine.pool.kernels)} sessions={len(self._engine.store)}>"


async def _in_thread(function: Callable[[], None]) -> None:
    await anyio.to_thread.run_sync(function)


def _secrets_of(store: Store, session: str) -> tuple[str, ...]:
    """Every form in which a secret of the session could be shown; one that cannot be unsealed cannot be shown either."""
    secrets = []
    with contextlib.suppress(NotFound):
        for sealed in list(store.peek(session).secrets.values()):
            with contextlib.suppress(SecretUnreadable):
                secrets.append(store.vault.unseal(sealed).decode())
    return forms_of(secrets)


def _gone(session: str, reason: str) -> dict[str, Scalar]:
    return {"session": session, "reason": reason}


class Sessions(Shown, list["SessionInfo"]):
    """Sessions, described: a list that shows itself as a table."""

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        now = time.time()
        rows = [
            [
                info.id,
                str(info.version),
                str(info.variables),
                str(info.instances),
                f"{info.bytes:,}",
                f"{now - info.used:,.0f} s ago",
                "never" if info.expires is None else f"in {info.expires - now:,.0f} s",
            ]
            for info in self
        ]
        return ["session", "version", "variables", "instances", "bytes", "used", "expires"], rows


class Journaled(Shown, list["JournaledCommand"]):
    """Commands of the journal: a list that shows itself as a table."""

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        rows = [
            [
                command.begun.id,
                command.begun.session,
                command.begun.subject,
                "running" if command.ended is None else command.ended.error or "ok",
                str(command.attempts if command.ended is None else command.ended.attempts),
                "" if command.ended is None else str(command.ended.callbacks),
                "" if command.ended is None else f"{(command.ended.ended - command.begun.began) * 1e3:,.1f} ms",
            ]
            for command in self
        ]
        return ["command", "session", "what", "end", "attempts", "callbacks", "took"], rows
