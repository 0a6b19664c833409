"""Runs commands: on a kernel, on another if that one dies, and commits what a command wrote with its result."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import time
import uuid
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from bridge_kernel.contract.errors import (
    BridgeError,
    DeadlineExceeded,
    HostClosed,
    KernelDied,
    LimitExceeded,
    ReplayDiverged,
    SourceMissing,
    StoreFailed,
    type_of,
)
from bridge_kernel.contract.methods import Cancel, Chunk
from bridge_kernel.contract.telemetry import begins_with_any

from ..pool.outcomes import outcome_of
from ..pool.routing import Ask
from ..store.facts import CommandBegun, CommandEnded, CommandTried
from ..watch import Watchers
from .caching import Caching
from .callbacks import Callbacks
from .commands import Attempt, Prepared, prepare
from .journal import Journal
from .quarantine import Quarantine
from .recovery import Recovery, keep_reply
from .running import CURRENT, LATE_S, Outcome, Running, Terms
from .telling import Teller

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bridge_kernel.contract.frames import Buffer
    from bridge_kernel.contract.messages import Notification, Request
    from bridge_kernel.contract.telemetry import TelemetryOptions
    from bridge_kernel.contract.values import Tag

    from ..client import KernelClient, Reply, StreamText
    from ..live import Live
    from ..pool.dispatch import Lease
    from ..pool.pool import Pool
    from ..store import SessionState, Store
    from ..tasks import Tasks
    from ..telemetry import Telemetry
    from .commands import Request as CommandRequest
    from .results import ResultCache

__all__ = ("Engine", "Output")

SHARED_ATTEMPTS: Final = 2  # from the next on it runs alone: if that kernel dies too, it is proven who did it
MAX_NESTING: Final = 64  # commands within tools within commands: more is a tool that calls itself
MAX_BACKLOG: Final = 10_000  # batches on their way to the disk, before new commands wait for it
TELEMETRY_S: Final = 0.02  # how long telemetry may wait to be read when nobody asks

_decode_chunk: Final = msgspec.json.Decoder(Chunk).decode


class Output(NamedTuple):
    """What a command printed, labelled."""

    name: str  # "stdout" or "stderr"
    text: str
    session: str
    command: str
    kernel: str


class Engine:
    """Belongs to one event loop; `tasks` must outlive it."""

    def __init__(
        self,
        store: Store,
        telemetry: Telemetry,
        tasks: Tasks,
        on_output: Callable[[Output], object] | None,
        hook: Callable[[SessionState, Tag], object],
        results: ResultCache,
        live: Live | None = None,
    ) -> None:
        """`hook` says what a ref in a result becomes; `live` is where somebody looks."""
        self.store = store
        self.telemetry = telemetry
        self.tasks = tasks
        self.hook = hook
        self.quarantine = Quarantine()
        self.recovery = Recovery(self)
        self.watchers = Watchers(store)
        self.results = results
        store.on_forget = self._forget
        self.pool: Pool  # set by the host: the pool needs the engine to listen to its kernels
        self.closing = False
        self._on_output = on_output
        self._teller = Teller(telemetry, live)
        self.caching = Caching(self, results, self._teller)
        self.callbacks = Callbacks(store, telemetry, tasks, hook)
        self._running: dict[tuple[KernelClient, int], Running] = {}
        self._cells: dict[KernelClient, SessionState] = {}
        self._telemetry_due = False
        self._prefix = uuid.uuid4().hex[:12]
        self._numbers = itertools.count(1)

    # -- commands ----------------------------------------------------------------

    async def run(
        self,
        session: SessionState,
        request: CommandRequest,
        terms: Terms,
        *,
        on_chunk: Callable[[Chunk, Sequence[Buffer]], None] | None = None,
        started: Callable[[Running], None] | None = None,
    ) -> Outcome:
        """Run one command: on another kernel if the first dies, at most `retries` times.

        What is left of an enclosing command's deadline bounds its own. Cancelling it cancels the command in the
        kernel. A key makes it run once, however often it is asked for.

        Raises:
            BridgeError: what the kernel answered, or what became of the kernel. Nothing it wrote is kept then.
        """
        session.touch()
        _check(terms)
        prepared = prepare(request, session, self.store.vault)
        if terms.parent is None and (parent := CURRENT.get()) is not None:
            terms = terms._replace(parent=parent)
        if terms.key is not None:
            return await self.recovery.once(session, prepared, terms.key, terms)
        if prepared.cache is not None and on_chunk is None:
            return await self.caching.run(session, prepared, terms)
        running = self.begin(session, prepared, terms, on_chunk=on_chunk)
        if prepared.cache is not None:
            self.caching.skip(running, "it is a stream")
        if started is not None:
            started(running)
        return await self.finish(running, terms.retries)

    def begin(
        self,
        session: SessionState,
        prepared: Prepared,
        terms: Terms,
        *,
        on_chunk: Callable[[Chunk, Sequence[Buffer]], None] | None = None,
        begun: CommandBegun | None = None,
        journal: Journal | None = None,
    ) -> Running:
        """Take a command, and journal that it was taken; `begun` and `journal` are those of one that goes on."""
        parent, deadline = terms.parent, terms.deadline
        if parent is not None and parent.depth >= MAX_NESTING:
            raise LimitExceeded(
                f"commands are nested {parent.depth + 1} deep, at most {MAX_NESTING}",
                remedy="A tool seems to call, through commands, itself.",
            )
        if len(self.quarantine):
            self.quarantine.check(prepared.digest())
        until = None if deadline is None else time.monotonic() + deadline
        if parent is not None and parent.deadline is not None:
            until = parent.deadline if until is None else min(until, parent.deadline)
        trace = self.telemetry.tracer.child()
        if begun is None:
            begun = self._begun(session, prepared, terms.key)
            self.store.log.append([begun])
        running = Running(
            begun, session, prepared, journal or Journal(sealed=prepared.secret), until, parent, trace, on_chunk
        )
        self._teller.begun(running)
        return running

    def new_id(self) -> str:
        """For a command: no other has it, of this host or another."""
        return f"{self._prefix}{next(self._numbers):x}"

    def _forget(self, session: str) -> None:
        self.watchers.forget(session)
        self.results.forget(session)
        self.telemetry.usage.forget(session)

    def _begun(self, session: SessionState, prepared: Prepared, key: str | None) -> CommandBegun:
        vault = self.store.vault
        content = digest = b""
        if self.store.log.on_disk or key is not None:
            digest = prepared.fingerprint(vault)
            content = vault.seal_if(prepared.secret, msgspec.json.encode(prepared.request))
        method, subject = prepared.method, prepared.subject
        return CommandBegun(
            self.new_id(), session.id, method, subject, key, digest, content, prepared.secret, time.time()
        )

    async def finish(self, running: Running, retries: int) -> Outcome:
        """Run what was begun, to its end."""
        session = running.session
        session.busy += 1
        error: BaseException | None = None
        try:
            if self.store.log.backlog > MAX_BACKLOG:
                await self.store.log.durable(self.store.log.append(()))
            reply = await self._attempts(running, retries)
            self.caching.succeeded(running, reply)
            return Outcome(reply, running.prepared, session)
        except BaseException as exc:
            error, number = exc, 0
            if running.result_key is not None and not running.committed:
                self.caching.skip(running, "it failed")
            with contextlib.suppress(StoreFailed):  # told to whoever writes next: what ended this is what counts here
                number = self._failed(running, exc)
            if number and running.journal.effects and isinstance(exc, BridgeError):
                # Who is told that it failed must not find it among the interrupted, with its effects done.
                await asyncio.shield(self.store.log.durable(number))
            raise
        finally:
            session.busy -= 1
            running.end()
            self._teller.ended(running, error)
            if not session.deleted:
                session.used = self.store.clock()

    def _failed(self, running: Running, error: BaseException) -> int:
        """Journal that it failed; the number to wait for, 0 if it has not really ended."""
        # A host that closes has not ended its commands: they are listed when it is opened again.
        if self.closing or isinstance(error, HostClosed | StoreFailed) or running.session.deleted or running.committed:
            return 0
        out_of_time = isinstance(error, DeadlineExceeded) and running.remaining_ms() == 0
        keyed, tried = running.begun.key is not None, running.client is not None
        if (running.lost and (keyed or not tried)) or (keyed and out_of_time):
            # Whoever comes with the key again must not pay twice: the command goes on then where it was. So does one
            # that was to go on, and did not get a kernel.
            self.recovery.suspend(running)
            return 0
        name = "bridge.Cancelled" if isinstance(error, asyncio.CancelledError) else type_of(error)
        count = len(running.journal)
        return self.store.log.append([CommandEnded(running.id, name, None, time.time(), running.attempt, count)])

    async def _attempts(self, running: Running, retries: int) -> Reply:
        prepared, journal = running.prepared, running.journal
        source_hash = prepared.source.hash if prepared.source is not None else None
        resend, died = False, 0
        avoid: frozenset[str] = frozenset()
        while True:
            lease = await self._acquire(running, alone=died >= SHARED_ATTEMPTS, avoid=avoid)
            client = lease.client
            running.attempt += 1
            running.lost = False
            with_source = source_hash is not None and (resend or source_hash not in client.sources)
            options = self.telemetry.options(running.session.capture)
            trace = running.trace.traceparent
            tried = Attempt(running.remaining_ms(), running.attempt, trace, with_source, options)
            if running.attempt > 1:
                self.store.log.append([CommandTried(running.id, running.attempt)])
            outcome = "cancelled"
            try:
                reply = await self._attempt(client, running, tried)
                outcome = "ok"
            except KernelDied as exc:
                # Only if it is this kernel that died: a tool may have met another's death and passed it on.
                if exc is not client.closed:
                    outcome = "refused"
                    raise
                outcome = "died"
                died += 1
                avoid |= {lease.kernel.id}
                self._teller.lost(client, running)
                self._check_may_run_again(running, exc, died, retries)
                continue
            except SourceMissing:
                outcome = "refused"
                if resend:
                    raise
                resend = True
                running.attempt -= 1
                continue
            except BridgeError as exc:
                # A kernel that says itself that the time is up is well.
                outcome = "timeout" if isinstance(exc, DeadlineExceeded) and running.unheard else outcome_of(exc)
                raise
            finally:
                self.pool.release(lease, outcome)  # type: ignore[arg-type]
            if source_hash is not None:
                client.sources.add(source_hash)
            journal.check_complete()
            return await self._commit(running, reply)

    def _check_may_run_again(self, running: Running, exc: KernelDied, died: int, retries: int) -> None:
        """Raise if this was the last attempt."""
        running.lost = True
        if died > SHARED_ATTEMPTS:
            raise self.quarantine.add(
                running.prepared.digest(), running.subject, running.session.id, died, exc.message
            ) from exc
        if died > retries:
            raise exc
        if running.journal.overflowed and running.journal.effects:
            raise KernelDied(
                f"{exc.message}; the command called back too often to be repeated", remedy="Split it into several."
            ) from exc
        self._teller.again(running)

    async def _commit(self, running: Running, reply: Reply) -> Reply:
        """The command's writes, its instances' new states and its end: one transaction."""
        begun, log, staged = running.begun, self.store.log, running.staged
        changes = running.prepared.changes(reply)
        result = None
        if begun.key is not None:
            result = self.store.vault.seal_if(running.prepared.secret, keep_reply(reply))
        ended = CommandEnded(running.id, None, result, time.time(), running.attempt, len(running.journal))
        if not staged.writes and not changes and result is None:
            running.session.touch()  # that it is still there
            number = log.append([ended])
        else:
            kept = (begun, ended) if begun.key is not None else None
            facts = [ended] if kept is None else ()
            number = running.session.commit(staged.writes, instances=changes, facts=facts, finished=kept).number
        running.committed, running.changed = True, bool(changes)
        if log.on_disk and (staged.writes or changes or begun.key is not None or running.journal.effects):
            await asyncio.shield(log.durable(number))
        return reply

    async def _acquire(self, running: Running, *, alone: bool, avoid: frozenset[str]) -> Lease:
        source = running.prepared.source
        # Two sessions' functions of one name are two commands, as far as their durations and failures are concerned.
        command = running.subject if source is None else f"{running.subject} {source.hash[:8]}"
        ask = Ask(running.session.id, command, running.depth > 0, alone, avoid, running.trace)
        ready = self.pool.take(ask)
        if ready is not None:
            return ready
        remaining, running.asked = running.remaining_ms(), ask
        try:
            async with asyncio.timeout(None if remaining is None else remaining / 1000):
                return await self.pool.acquire(ask)
        except DeadlineExceeded:
            raise
        except TimeoutError:
            raise DeadlineExceeded(f"{running.subject} ran out of time before a kernel was ready") from None
        finally:
            running.asked = None

    async def _attempt(self, client: KernelClient, running: Running, attempt: Attempt) -> Reply:
        params, buffers = running.prepared.build(attempt)
        id, future = client.request(running.prepared.method, params, buffers)
        running.begin(client, id, future)
        self._teller.tried(client, running)
        key = (client, id)
        self._running[key] = running
        answered = False
        try:
            if attempt.deadline is None:
                reply = await future
            else:
                try:
                    async with asyncio.timeout(attempt.deadline / 1000 + LATE_S):
                        reply = await future
                except DeadlineExceeded:
                    raise  # a TimeoutError too, but the kernel's own word
                except TimeoutError:
                    running.unheard = True
                    raise DeadlineExceeded(
                        f"{running.subject} ran out of time, and its kernel did not say so itself",
                        remedy="It may hang in C code: kill the kernel if it does not come back.",
                    ) from None
            answered = True
            return reply
        except BridgeError as exc:
            # What the host itself gave up, or a deadline, may be running still; to cancel once more does no harm.
            answered = not isinstance(exc, DeadlineExceeded | ReplayDiverged) and client.closed is None
            raise
        finally:
            del self._running[key]
            client.forget(id)
            if not answered:
                client.notify("command.cancel", Cancel(id), control=True)
            elif running.trace.sampled and client.closed is None and _tells(attempt.telemetry):
                self.telemetry.intake.expect(client.display_id(id))

    # -- what kernels say (Listener) ---------------------------------------------

    def on_output(self, client: KernelClient, command: int | None, output: StreamText) -> None:
        running = self._running.get((client, command)) if command is not None else None
        kernel = client.attached.kernel.id if client.attached is not None else ""
        labelled = Output(
            output.name,
            output.text,
            running.session.id if running is not None else "",
            running.subject if running is not None else "",
            kernel,
        )
        if self._on_output is not None:
            self._on_output(labelled)
        else:
            (sys.stderr if output.name == "stderr" else sys.stdout).write(output.text)

    def on_display(self, client: KernelClient, content: bytes) -> None:
        self.telemetry.intake.take_display(content)
        if not self._telemetry_due:
            self._telemetry_due = True
            asyncio.get_running_loop().call_later(TELEMETRY_S, self._read_telemetry)

    def _read_telemetry(self) -> None:
        self._telemetry_due = False
        self.telemetry.intake.read()

    def on_notification(self, client: KernelClient, message: Notification, buffers: Sequence[Buffer]) -> None:
        if message.method == "command.chunk":
            chunk = _decode_chunk(message.params)
            running = self._running_of(client, chunk.command)
            if running is not None and running.on_chunk is not None:
                running.on_chunk(chunk, buffers)
        # command.progress is in the command's telemetry too, which is where the host shows it.

    def _running_of(self, client: KernelClient, command: int | str | None) -> Running | None:
        return self._running.get((client, command)) if isinstance(command, int) else None

    def cells_of(self, client: KernelClient, session: SessionState) -> None:
        """Cells of this kernel belong to `session`."""
        self._cells[client] = session

    def on_callback(self, client: KernelClient, request: Request, buffers: Sequence[Buffer]) -> None:
        self.callbacks.serve(
            client, request, buffers, lambda command: self._running_of(client, command), self._cells.get(client)
        )


def _tells(options: TelemetryOptions | None) -> bool:
    """Whether a kernel that was sent these tells of the command's end."""
    return options is None or not begins_with_any(("bridge",), options.off)


def _check(terms: Terms) -> None:
    if terms.deadline is not None and not terms.deadline > 0:
        raise ValueError(f"a deadline is how many seconds there are, more than 0, not {terms.deadline!r}")
    if terms.retries < 0:
        raise ValueError(f"retries is how often a command may run again, 0 or more, not {terms.retries!r}")
    if terms.key is not None and not 0 < len(terms.key) <= 255:
        raise ValueError(f"an idempotency key is a string of 1 to 255 characters, not {terms.key!r}")
