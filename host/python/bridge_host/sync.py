"""`Host`, `Session` and `Instance`: the plain face of a host, for notebooks and scripts. Its loop has its own thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Self, Unpack

from anyio.from_thread import BlockingPortal, start_blocking_portal

from bridge_kernel.contract.errors import BridgeError, HostClosed
from bridge_kernel.contract.values import Ref

from . import current
from .engine import CURRENT, RETRIES, Terms
from .host import AsyncHost, HostOptions
from .instance import AsyncInstance, InstanceBase, Instances
from .session import AsyncSession, SessionBase, ttl_of
from .store import check_name
from .values import store

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    from bridge_kernel.contract.methods import Inspected, Stats
    from bridge_kernel.contract.values import Tag

    from .durations import Duration
    from .engine.quarantine import Quarantine
    from .engine.recovery import Interrupted
    from .engine.results import ResultCache
    from .host import Journaled, Sessions
    from .pool.kernel import KernelStatus, PoolStatus
    from .store import SessionState
    from .stream import AsyncStream
    from .telemetry import Telemetry

__all__ = ("Host", "Instance", "Session", "Stream")


_of_the_parent: list[contextlib.ExitStack] = []


class _SyncHost(AsyncHost):
    """An `AsyncHost` whose instances are the plain ones."""

    face: Host

    def _hook(self, session: SessionState, tag: Tag) -> object:
        found = super()._hook(session, tag)
        if isinstance(found, AsyncInstance):
            assert isinstance(tag, Ref)
            return Instance(self.face.session(session.id), tag.id)
        return found


class Host:
    """Owns sessions, and kernels to run their commands on: `with Host(kernels=2) as host`, or `host = Host()`.

    Works inside a running event loop too (a notebook's): the host's own loop runs in a thread of its own.
    Its kernels end with `close()`, at the latest with this process.
    """

    def __init__(self, kernels: int = 1, **options: Unpack[HostOptions]) -> None:
        """Open the store, start the kernels and wait until they are ready; the parameters are those of `HostOptions`.

        Raises:
            StoreLocked, StoreDamaged: the store cannot be opened.
            KernelStartFailed: and nothing is left behind.
        """
        self._host = _SyncHost(kernels, **options)
        self._host.face = self
        stack = contextlib.ExitStack()
        self._portal: BlockingPortal = stack.enter_context(start_blocking_portal("asyncio", name="bridge-host"))
        try:
            stack.enter_context(self._portal.wrap_async_context_manager(self._host))
            self._loop, self._loop_thread = self._portal.call(_running_loop)
        except BaseException:
            stack.close()
            raise
        # A notebook's host is often never closed: end it with the interpreter, before its threads are gone.
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _close, stack, self._pid)
        current.opened(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the kernels and everything that runs in them. Closing twice does nothing."""
        current.closed(self)
        self._finalizer()

    @property
    def telemetry(self) -> Telemetry:
        return self._host.telemetry

    @property
    def results(self) -> ResultCache:
        """What is kept of the functions and instances with `cache=`, as a table; `.clear()` forgets it."""
        return self._host.results

    def session(self, id: str | None = None, *, ttl: float | None = None) -> Session:
        """The session of that id, made if there is none; a new one without an id. `ttl` becomes its time to live."""
        self._require_open()
        state = self._host._open_session(id, ttl)
        if state.ttl is not None:
            self._loop.call_soon_threadsafe(self._host._swept.set)
        return Session(state, self._host.engine, self)

    def sessions(self) -> list[str]:
        return self._host.sessions()

    def describe(self) -> Sessions:
        """Each session's age, use, version and size, as a table to look at."""
        return self._host.describe()

    def delete_session(self, id: str) -> None:
        """Forget a session and all it owns: variables, instances, tools, functions, secrets, journal. Raises `NotFound`."""
        self._host.delete_session(id)

    def export(self, path: str | os.PathLike[str], *sessions: str, history: bool = False) -> None:
        """Write these sessions, or all, into one JSON file: all but tools, and secrets of which only the names."""
        self._host.export(path, *sessions, history=history)

    def import_(self, path: str | os.PathLike[str]) -> list[str]:
        """Add the sessions of an exported file; their ids. Raises `StoreDamaged`, ValueError if one is there already."""
        return self._host.import_(path)

    def interrupted(self) -> list[Interrupted]:
        """The commands that were running when the store was last closed, or its host died, oldest first."""
        return self._host.interrupted()

    def resume(
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
        names those to be made again. Raises `EffectInDoubt`, `NotFound`.
        """

        async def resume() -> Any:
            return await self._host.resume(id, replies=replies, rerun=rerun, deadline=deadline, retries=retries)

        return self._run(resume)

    def drop(self, id: str) -> None:
        """Forget an interrupted command; nothing that it wrote is kept. Raises `NotFound`."""
        self._host.drop(id)

    def journal(self, session: str | None = None) -> Journaled:
        """The commands that ran, of one session or of all, the last 10,000 and those that run: a table to look at."""
        return self._host.journal(session)

    @property
    def quarantine(self) -> Quarantine:
        """The commands that ended every kernel they met, and are not run again until they are let out."""
        return self._host.quarantine

    @property
    def pool(self) -> KernelPool:
        """The kernels: `status()`, `scale(n)`, `drain(id)`, `restart(id)`."""
        self._require_open()
        return KernelPool(self)

    def kernels(self) -> list[KernelStatus]:
        """Each kernel: id, pid, state, commands in flight and completed."""
        return self._host.kernels()

    def attach(self, connection_file: str, session: str = "") -> None:
        """Use a kernel that somebody else started; its cells (`execute_request`) run in `session`."""
        self._run(self._host.attach, connection_file, session)

    def stats(self) -> dict[str, Stats]:
        """What each kernel uses and has done, by kernel id."""
        found: dict[str, Stats] = self._run(self._host.stats)
        return found

    def _require_open(self) -> None:
        if os.getpid() != self._pid:
            raise HostClosed("this process is a fork of the host's", remedy="Open a host of its own here.")
        _ = self._host.engine  # closed: a clear error, not the loop's

    def _start(self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Future[Any]:
        """Start on the host's loop; cancelling the future cancels the task."""
        # Not the portal's own way: that costs a quarter of a command's round trip more.
        return asyncio.run_coroutine_threadsafe(function(*args), self._loop)

    def _run(self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
        """Run on the host's loop and wait. Ctrl-C cancels it, in the kernel too."""
        self._require_open()
        if threading.get_ident() == self._loop_thread:
            raise RuntimeError(
                "this runs on the host's own event loop, which cannot wait for itself: make the tool a plain def, or "
                "use AsyncHost and await"
            )
        # Ctrl-C may come at any line of this, also between the start of the task and its future: it is cancelled by
        # what it runs, which is there before.
        running = function(*args)
        waiting = self._host.waiting
        waiting.append(function)
        try:
            return asyncio.run_coroutine_threadsafe(running, self._loop).result()
        except BridgeError as exc:
            # The loop's own frames say nothing to who called; the kernel's traceback is the error's note.
            raise exc.with_traceback(None) from None
        except Exception:
            raise
        except BaseException:
            self._soon(_cancel, running)
            raise
        finally:
            waiting.pop()

    def _soon(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the host is closed, and its loop with it
            self._loop.call_soon_threadsafe(function, *args)

    def __repr__(self) -> str:
        return repr(self._host).replace("AsyncHost", "Host")


def _close(stack: contextlib.ExitStack, pid: int) -> None:
    if os.getpid() == pid:
        stack.close()
    else:
        # In a fork the host's thread does not exist, and what is there is the parent's. Kept, for to be collected
        # the stack would run what it holds.
        _of_the_parent.append(stack)


async def _running_loop() -> tuple[asyncio.AbstractEventLoop, int]:
    return asyncio.get_running_loop(), threading.get_ident()


def _cancel(running: Coroutine[Any, Any, Any]) -> None:
    """On the loop: cancel the task that runs this coroutine; one that never became a task is closed."""
    for task in asyncio.all_tasks():
        if task.get_coro() is running:
            task.cancel()
            return
    with contextlib.suppress(ValueError):  # it runs, which only a task does: it has ended meanwhile
        running.close()


def _stop(loop: asyncio.AbstractEventLoop, stream: AsyncStream[Any]) -> None:
    with contextlib.suppress(RuntimeError):  # the host is closed, and its loop with it
        loop.call_soon_threadsafe(stream.stop)


class Session(SessionBase):
    """A session: variables, tools, functions and instances that the host owns; kernels borrow them for a command."""

    def __init__(self, state: SessionState, engine: Any, host: Host) -> None:
        super().__init__(state, engine)
        self._host = host
        self._async = AsyncSession(state, engine)

    def set(self, name: str, value: Any, *, if_version: int | None = None) -> None:
        """As `session[name] = value`; with `if_version` only if the variable is at that version, 0: not there.

        Raises:
            Conflict: it is not.
        """
        self._wait(self._state.set(name, store(value, check_name("variable", name)), if_version).number)

    def call(
        self,
        name: str,
        /,
        *args: Any,
        deadline: float | None = None,
        retries: int = RETRIES,
        idempotency_key: str | None = None,
        secrets: Sequence[str] = (),
        **kwargs: Any,
    ) -> Any:
        """Call one of the session's functions, or one importable in the kernel: `call("math.hypot", 3, 4)`.

        `deadline` in seconds, callbacks included; `retries`: how often it runs again if its kernel dies, its tools
        not called a second time; `idempotency_key`: however often it is called with the same key, it runs once and
        the first result is given; `secrets` are the names of those that it gets.

        Raises:
            RemoteError: what the function raised, with the kernel's traceback.
            DeadlineExceeded, KernelDied, NotSerializable, NotFound, PolicyDenied, Quarantined, QueueFull,
            ReplayDiverged, Conflict: as they say. Nothing that the command wrote is kept then.
        """
        terms = Terms(deadline, retries, idempotency_key, secrets, CURRENT.get())
        return self._host._run(self._async._call, name, args, kwargs, terms)

    def submit(
        self,
        name: str,
        /,
        *args: Any,
        deadline: float | None = None,
        retries: int = RETRIES,
        idempotency_key: str | None = None,
        secrets: Sequence[str] = (),
        **kwargs: Any,
    ) -> Future[Any]:
        """As `call`, without waiting: a `concurrent.futures.Future`, whose `cancel()` cancels it in the kernel."""
        self._host._require_open()
        terms = Terms(deadline, retries, idempotency_key, secrets, CURRENT.get())
        return self._host._start(self._async._call, name, args, kwargs, terms)

    def stream(
        self,
        name: str,
        /,
        *args: Any,
        deadline: float | None = None,
        retries: int = RETRIES,
        secrets: Sequence[str] = (),
        **kwargs: Any,
    ) -> Stream:
        """Run a generator and iterate over what it yields. Leaving the loop early stops it."""
        run, terms = self._host._run, Terms(deadline, retries, None, secrets, CURRENT.get())
        started: list[AsyncStream[Any]] = []

        async def start() -> AsyncStream[Any]:
            started.append(self._async._stream(name, args, kwargs, terms))
            return started[0]

        def stop() -> None:
            for stream in started:
                stream.stop()

        try:
            return Stream(run(start), run, self._host._loop)
        except BaseException:  # Ctrl-C, and nobody has the stream
            self._host._soon(stop)
            raise

    def create(
        self,
        cls: str,
        /,
        *args: Any,
        deadline: float | None = None,
        secrets: Sequence[str] = (),
        cache: Duration | None = None,
        **kwargs: Any,
    ) -> Instance:
        """Make an object in a kernel and keep it here: as its recipe, and the state it has.

        `cache="1h"`: results of its methods may be given again for so long; see `cache()`.
        Raises as `call` does; nothing is kept then.
        """
        terms = Terms(deadline, secrets=secrets, parent=CURRENT.get())
        return Instance(self, self._host._run(self._async._create, cls, args, kwargs, terms, ttl_of(cache)))

    def inspect(self, target: Any, /, *, deadline: float | None = None) -> Inspected:
        """Describe a dotted name, a function of the session's, or an instance: signature, documentation, members."""
        inspected: Inspected = self._host._run(self._async._inspect, target, Terms(deadline, parent=CURRENT.get()))
        return inspected

    def instance(self, ref: str) -> Instance:
        """The instance of that ref or name. Raises `NotFound`."""
        return Instance(self, self._state.find_instance(ref).ref)

    @property
    def instances(self) -> Instances[Instance]:
        """The session's instances by name or ref, as a table to look at."""
        return Instances(self._state, self.instance)

    def copy(self, instance: Any, *, name: str = "") -> Instance:
        """A new instance with the same recipe and state, from now on its own."""
        return Instance(self, self._copy(instance, name))


class Instance(InstanceBase):
    """`instance(…)` and `instance.method(…)` run in a kernel, on the state that the host holds."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("__call__", args, kwargs)

    def call(
        self,
        method: str,
        /,
        *args: Any,
        deadline: float | None = None,
        retries: int = RETRIES,
        idempotency_key: str | None = None,
        secrets: Sequence[str] = (),
        **kwargs: Any,
    ) -> Any:
        """Call a method, with a deadline (seconds) and so on, as `session.call` has them.

        Raises:
            Conflict: another call changed the instance meanwhile; nothing of this one was kept.
        """
        return self._call(method, args, kwargs, Terms(deadline, retries, idempotency_key, secrets, CURRENT.get()))

    def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], terms: Terms | None = None) -> Any:
        session: Session = self._session
        terms = terms or Terms(parent=CURRENT.get())
        return session._host._run(session._async._call_method, self._ref, method, args, kwargs, terms)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def method(*args: Any, **kwargs: Any) -> Any:
            return self._call(name, args, kwargs)

        method.__name__ = name
        return method


class KernelPool:
    """`host.pool`: the kernels of a host, to look at and to steer."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def status(self) -> PoolStatus:
        """Each kernel, the queue, the routing: a table to look at."""
        return self._host._host.pool.status()

    def scale(self, kernels: int) -> None:
        """Have so many kernels: starts some, and waits for them, or lets some finish and go."""
        self._host._run(self._host._host.pool.scale, kernels)

    def drain(self, kernel: str) -> None:
        """Send a kernel nothing more, let it finish what it runs, end it; another takes its place. Raises `NotFound`."""
        self._host._run(self._host._host.pool.drain, kernel)

    def restart(self, kernel: str | None = None) -> None:
        """End a kernel, or all, and start anew; what ran there runs again elsewhere."""
        self._host._run(self._host._host.pool.restart, kernel)

    def __repr__(self) -> str:
        return repr(self.status())

    def _repr_html_(self) -> str:
        return self.status()._repr_html_()


class Stream:
    """What a generator in a kernel yields, as it comes. `result` is what it returned, once it has ended."""

    def __init__(self, stream: AsyncStream[Any], run: Callable[..., Any], loop: asyncio.AbstractEventLoop) -> None:
        self._stream = stream
        self._run = run
        # A stream that is dropped, iterated or not, must not leave its generator waiting in the kernel.
        self._finalizer = weakref.finalize(self, _stop, loop, stream)
        self._finalizer.atexit = False

    @property
    def result(self) -> Any:
        return self._stream.result

    def __iter__(self) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._run(self._stream.__anext__)
                except StopAsyncIteration:
                    return
        finally:
            self.close()

    def close(self) -> None:
        """Stop the generator in the kernel. Does not wait: it may be called by the garbage collector, on any thread."""
        self._finalizer()
