"""`Recovery`: commands that were interrupted when their host ended, and commands that must run once, whatever happens."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import msgspec

from bridge_kernel.contract.errors import (
    Cancelled,
    Conflict,
    DeadlineExceeded,
    EffectInDoubt,
    HostClosed,
    InvalidParams,
    NotFound,
    SecretUnreadable,
)
from bridge_kernel.contract.methods import ToolCall, ValueResult

from ..client import Reply
from ..store import Unfinished
from ..store.facts import CommandForgotten
from ..values import ValueWriter
from .callbacks import decode_asked, decode_reply
from .commands import Request, StreamFunction, decode_request, prepare
from .journal import Entry, Journal, Recorded
from .running import LATE_S, RETRIES, Outcome, Terms

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ..pool import Pool
    from ..store import SessionState
    from ..store.facts import CallbackMade, CommandBegun
    from ..store.model import Finished
    from .commands import Prepared
    from .engine import Engine
    from .running import Running

__all__ = ("DoubtfulCall", "Interrupted", "Recovery", "keep_reply")


class DoubtfulCall(msgspec.Struct, frozen=True):
    """A tool that was running when the host ended: its effect may have happened. `id` is what the tool saw as
    `current_call().id`.
    """

    id: str
    tool: str
    call: str
    """The tool with its arguments, for people."""


class Interrupted(msgspec.Struct, frozen=True, kw_only=True):
    """A command that had begun and not ended when its host did. `began` in seconds since the epoch."""

    id: str
    session: str
    method: str
    subject: str
    key: str | None
    began: float
    attempts: int
    callbacks: int
    in_doubt: tuple[DoubtfulCall, ...] = ()
    readable: bool = True
    """False if it is sealed and the key is gone: it can be dropped, or resumed once the key is back."""


class _KeptReply(msgspec.Struct, array_like=True):
    result: bytes
    buffers: tuple[bytes, ...]


def keep_reply(reply: Reply) -> bytes:
    """A command's reply, to be given again to who comes with the same idempotency key."""
    return msgspec.msgpack.encode(_KeptReply(bytes(reply.result), tuple(bytes(buffer) for buffer in reply.buffers)))


class Recovery:
    """Belongs to one event loop, its engine's."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        self._shared: dict[tuple[str, str], _Shared] = {}
        self._resuming: set[str] = set()

    # -- what a host that died left behind -------------------------------------------

    def interrupted(self) -> list[Interrupted]:
        """The commands that were running when the host was last closed, or died, oldest first."""
        found = []
        for unfinished in self._store.unfinished_commands():
            begun = unfinished.begun
            readable, in_doubt = True, []
            try:
                in_doubt = self._doubtful(unfinished)
            except SecretUnreadable:
                readable = False
            found.append(
                Interrupted(
                    id=begun.id,
                    session=begun.session,
                    method=begun.method,
                    subject=begun.subject,
                    key=begun.key,
                    began=begun.began,
                    attempts=unfinished.attempt,
                    callbacks=len(unfinished.made),
                    in_doubt=tuple(in_doubt),
                    readable=readable,
                )
            )
        return found

    def suspend(self, running: Running) -> None:
        """Keep a command that no kernel has any more, and that somebody may come back for: as if its host had died."""
        unfinished = Unfinished(running.begun)
        unfinished.attempt = running.attempt
        callbacks = self._engine.callbacks
        for entry in running.journal.entries:
            unfinished.made.append(callbacks.made(running, entry))
            if (content := callbacks.answered(running, entry)) is not None:
                unfinished.answered[entry.n] = content
        self._store.add_unfinished(unfinished)

    def _find(self, id: str) -> Unfinished:
        unfinished = self._store.find_unfinished(id)
        if unfinished is None or id in self._resuming:
            there = ", ".join(sorted(other.begun.id for other in self._store.unfinished_commands())) or "none"
            raise NotFound(f"there is no interrupted command {id!r}", remedy=f"There is: {there}.")
        return unfinished

    def drop(self, id: str) -> int:
        """Forget an interrupted command; nothing that it wrote is kept. Raises `NotFound`."""
        self._find(id)
        number = self._store.log.append([CommandForgotten(id)])
        self._store.remove_unfinished(id)
        return number

    async def resume(
        self,
        id: str,
        *,
        replies: Mapping[str, Any] | None = None,
        rerun: Collection[str] = (),
        deadline: float | None = None,
        retries: int = RETRIES,
    ) -> Outcome:
        """Run an interrupted command again: what its tools answered before the host ended is not asked of them again.

        `replies` says what a call in doubt returned, by its id; `rerun` names those to be called again.

        Raises:
            EffectInDoubt: a tool was running when the host ended, and neither says what to do.
            InvalidParams: it is a stream: nobody is there to read it. Drop it.
            NotFound: there is no such command, or its session is gone.
        """
        terms = Terms(deadline, retries)
        return await self._resume(self._find(id), dict(replies or {}), set(rerun), terms)

    async def _resume(
        self,
        unfinished: Unfinished,
        replies: dict[str, Any],
        rerun: set[str],
        terms: Terms,
        shared: _Shared | None = None,
    ) -> Outcome:
        begun = unfinished.begun
        request = self.request_of(begun)
        if isinstance(request, StreamFunction):
            raise InvalidParams(
                f"{begun.subject} is a stream, which nobody reads any more", remedy="host.drop(id), then stream anew."
            )
        session = self._store.peek(begun.session)
        entries = self._entries(unfinished, replies, rerun)
        prepared = prepare(request, session, self._store.vault)
        running = self._engine.begin(
            session, prepared, terms, begun=begun, journal=Journal(entries, sealed=prepared.secret)
        )
        running.attempt, running.lost = unfinished.attempt, True
        if shared is not None:
            shared.begun(running)
        self._resuming.add(begun.id)
        try:
            return await self._engine.finish(running, terms.retries)
        finally:
            self._resuming.discard(begun.id)
            # Unless it was suspended once more, or the host is closing.
            if not self._engine.closing and self._store.find_unfinished(begun.id) is unfinished:
                self._store.remove_unfinished(begun.id)

    def request_of(self, begun: CommandBegun) -> Request:
        """What a journaled command asked. Raises `SecretUnreadable` if it is sealed and the key is gone."""
        return decode_request(self._store.vault.unseal_if(begun.sealed, begun.request))

    def _entry(self, unfinished: Unfinished, made: CallbackMade) -> Entry:
        sealed, vault = unfinished.begun.sealed, self._store.vault
        params, buffers, effect = decode_asked(made, vault.unseal_if(sealed, made.request))
        entry = Entry(made.n, made.seq, made.method, params, buffers, effect=effect, sealed=sealed)
        if (answer := unfinished.answered.get(made.n)) is not None:
            entry.reply, entry.versions = decode_reply(vault.unseal_if(sealed, answer))
        elif isinstance(params, ToolCall):
            entry.lost = True
            tool = self._store.peek(unfinished.begun.session).tools.get(params.name)
            entry.effect = effect and not (tool is not None and tool.idempotent)
        return entry

    def _doubtful(self, unfinished: Unfinished) -> list[DoubtfulCall]:
        entries = [self._entry(unfinished, m) for m in unfinished.made if m.n not in unfinished.answered]
        return [
            DoubtfulCall(f"{unfinished.begun.id}:{e.n}", e.params.name, repr(e))
            for e in entries
            if isinstance(e.params, ToolCall) and e.lost and e.effect
        ]

    def _entries(self, unfinished: Unfinished, replies: dict[str, Any], rerun: set[str]) -> list[Entry]:
        entries = [self._entry(unfinished, made) for made in unfinished.made]
        entries = [e for e in entries if e.reply is not None or e.versions is not None or e.lost]
        for entry in entries:
            call = f"{unfinished.begun.id}:{entry.n}"
            if not entry.lost:
                continue
            if call in replies:
                writer = ValueWriter()
                tree = writer.write(replies.pop(call), f"replies[{call!r}]")
                entry.reply, entry.lost = Recorded(ValueResult(tree), tuple(map(bytes, writer.buffers))), False
            elif call in rerun:
                rerun.discard(call)
            elif entry.effect:
                raise EffectInDoubt(
                    f"the host ended while {entry!r} ran (call {call}): whether its effect happened is not known"
                )
        if unknown := sorted({*replies, *rerun}):
            raise NotFound(f"command {unfinished.begun.id} has no call in doubt {', '.join(unknown)}")
        return entries

    # -- idempotency keys ------------------------------------------------------------

    async def once(self, session: SessionState, prepared: Prepared, key: str, terms: Terms) -> Outcome:
        """Run the command that has this key, unless it has run, or runs now, or was interrupted: then go on with that.

        Only what succeeded is remembered: a command that failed runs anew, one that lost its kernels or ran out of
        time goes on where it was. Whoever gives up leaves the others waiting; the command is cancelled with the last of them.

        Raises:
            Conflict: the key is another command's, or that of the very command in whose tool this is.
            DeadlineExceeded: somebody else's run of it takes longer than this caller has.
        """
        name, digest = (session.id, key), prepared.fingerprint(self._store.vault)
        if (done := session.finished.get(key)) is not None:
            _check_same(key, done.begun.digest, digest)
            await self._store.log.durable(done.number)  # who ran it may still be waiting for the disk
            return self._outcome(session, prepared, done)
        ancestor = terms.parent
        while ancestor is not None:
            if (ancestor.session.id, ancestor.begun.key) == name:
                raise Conflict(
                    f"the command with the key {key!r} would wait for itself: its own tool sends it again",
                    remedy="Give the inner command a key of its own.",
                )
            ancestor = ancestor.parent
        until = None if terms.deadline is None else time.monotonic() + terms.deadline
        while True:
            shared = self._shared.get(name)
            begun_here = shared is None
            if shared is None:
                shared = self._shared[name] = _Shared(digest)
                if not self._engine.tasks.start_soon(self._run_shared, name, shared, session, prepared, terms):
                    del self._shared[name]
                    raise HostClosed
            _check_same(key, shared.digest, digest)
            if terms.parent is not None:
                shared.join_within(terms.parent.depth + 1, self._engine.pool)
            try:
                return await self._join(shared, prepared, key, until)
            except DeadlineExceeded:
                # The time of whoever began it was up, not this caller's: it goes on with what has been done.
                if begun_here or (until is not None and time.monotonic() >= until):
                    raise
                if until is not None:
                    terms = terms._replace(deadline=until - time.monotonic())

    async def _join(self, shared: _Shared, prepared: Prepared, key: str, until: float | None) -> Outcome:
        shared.waiters += 1
        try:
            async with asyncio.timeout(None if until is None else max(0.0, until - time.monotonic()) + LATE_S):
                return await asyncio.shield(shared.future)
        except DeadlineExceeded:
            raise
        except TimeoutError:
            raise DeadlineExceeded(f"{prepared.subject} still runs for another caller with the key {key!r}") from None
        finally:
            shared.waiters -= 1
            if not shared.waiters and not shared.future.done():
                shared.abandoned = True
                if shared.task is not None:
                    shared.task.cancel()

    async def _run_shared(
        self, name: tuple[str, str], shared: _Shared, session: SessionState, prepared: Prepared, terms: Terms
    ) -> None:
        try:
            shared.task = asyncio.current_task()
            if shared.abandoned:
                raise Cancelled
            outcome = await self._begin_or_resume(session, prepared, name[1], shared, terms)
        except BaseException as exc:
            closed = isinstance(exc, asyncio.CancelledError) and self._engine.closing
            told = HostClosed() if closed else Cancelled() if isinstance(exc, asyncio.CancelledError) else exc
            shared.future.set_exception(told)
            if not isinstance(exc, Exception):
                raise
        else:
            shared.future.set_result(outcome)
        finally:
            del self._shared[name]

    def _outcome(self, session: SessionState, prepared: Prepared, done: Finished) -> Outcome:
        begun, result = done.begun, done.ended.result
        assert result is not None
        kept = msgspec.msgpack.decode(self._store.vault.unseal_if(begun.sealed, result), type=_KeptReply)
        # The first call's request: a Create has the ref under which the instance is known.
        request = self.request_of(begun) if begun.request else prepared.request
        return Outcome(Reply(msgspec.Raw(kept.result), kept.buffers), prepared._replace(request=request), session)

    async def _begin_or_resume(
        self, session: SessionState, prepared: Prepared, key: str, shared: _Shared, terms: Terms
    ) -> Outcome:
        for unfinished in session.unfinished_commands():
            begun = unfinished.begun
            if begun.key == key:
                _check_same(key, begun.digest, shared.digest)
                return await self._resume(unfinished, {}, set(), terms, shared)
        running = self._engine.begin(session, prepared, terms)
        shared.begun(running)
        return await self._engine.finish(running, terms.retries)


class _Shared:
    """One run of a command with a key, and who waits for it."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.future.add_done_callback(lambda done: done.cancelled() or done.exception())  # perhaps nobody waits now
        self.task: asyncio.Task[Any] | None = None
        self.waiters = 0
        self.abandoned = False
        self._running: Running | None = None
        self._depth = 0

    def begun(self, running: Running) -> None:
        running.depth = max(running.depth, self._depth)
        self._running = running

    def join_within(self, depth: int, pool: Pool) -> None:
        """A tool waits for it too. The place that it waits for may be that of the tool's own command."""
        self._depth = max(self._depth, depth)
        if self._running is not None:
            self._running.depth = max(self._running.depth, depth)
            if self._running.asked is not None:
                pool.hurry(self._running.asked)


def _check_same(key: str, known: bytes, asked: bytes) -> None:
    if known != asked:
        raise Conflict(
            f"the idempotency key {key!r} was used for another command",
            remedy="One key names one command with its arguments: choose another.",
        )
