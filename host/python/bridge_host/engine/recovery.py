"""`Recovery`: commands that were interrupted when their host ended, and commands that must run once, whatever happens."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from bridge_kernel.contract.errors import Cancelled, Conflict, EffectInDoubt, InvalidParams, NotFound
from bridge_kernel.contract.methods import ToolCall, ValueResult

from ..client import Reply
from ..store import Unfinished
from ..store.facts import CommandForgotten
from ..values import ValueWriter
from .callbacks import decode_asked, decode_reply
from .commands import Request, StreamFunction, decode_request, prepare
from .journal import Entry, Journal, Recorded, shown
from .running import RETRIES, Outcome, Terms

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ..store import SessionState
    from ..store.facts import CallbackMade, CommandBegun
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
        self._by_key: dict[tuple[str, str], tuple[bytes, asyncio.Future[Outcome]]] = {}
        self._resuming: set[str] = set()

    # -- what a host that died left behind -------------------------------------------

    def interrupted(self) -> list[Interrupted]:
        """The commands that were running when the host was last closed, or died, oldest first."""
        found = []
        for unfinished in self._store.unfinished.values():
            begun = unfinished.begun
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
                    in_doubt=tuple(self._doubtful(unfinished)),
                )
            )
        return found

    def suspend(self, running: Running) -> None:
        """Keep a command that lost its kernels, and that has a key to come back with: as if its host had died."""
        unfinished = Unfinished(running.begun)
        unfinished.attempt = running.attempt
        callbacks = self._engine.callbacks
        for entry in running.journal.entries:
            unfinished.made.append(callbacks.made(running, entry))
            if (content := callbacks.answered(running, entry)) is not None:
                unfinished.answered[entry.n] = content
        self._store.unfinished[running.id] = unfinished

    def _find(self, id: str) -> Unfinished:
        unfinished = self._store.unfinished.get(id)
        if unfinished is None or id in self._resuming:
            there = ", ".join(sorted(self._store.unfinished)) or "none"
            raise NotFound(f"there is no interrupted command {id!r}", remedy=f"There is: {there}.")
        return unfinished

    def drop(self, id: str) -> int:
        """Forget an interrupted command; nothing that it wrote is kept. Raises `NotFound`."""
        self._find(id)
        number = self._store.log.append([CommandForgotten(id)])
        del self._store.unfinished[id]
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
        unfinished = self._find(id)
        begun = unfinished.begun
        request = self.request_of(begun)
        if isinstance(request, StreamFunction):
            raise InvalidParams(
                f"{begun.subject} is a stream, which nobody reads any more", remedy="host.drop(id), then stream anew."
            )
        session = self._store.peek(begun.session)
        entries = self._entries(unfinished, dict(replies or {}), set(rerun))
        prepared = prepare(request, session, self._store.vault)
        running = self._engine.begin(session, prepared, Terms(deadline, retries), begun=begun, journal=Journal(entries))
        running.attempt = unfinished.attempt
        self._resuming.add(id)
        try:
            return await self._engine.finish(running, retries)
        finally:
            self._resuming.discard(id)
            # Unless it was suspended once more, or the host is closing.
            if not self._engine.closing and self._store.unfinished.get(id) is unfinished:
                del self._store.unfinished[id]

    def request_of(self, begun: CommandBegun) -> Request:
        """What a journaled command asked. Raises `SecretUnreadable` if it is sealed and the key is gone."""
        return decode_request(self._store.vault.unseal(begun.request) if begun.sealed else begun.request)

    def _entry(self, unfinished: Unfinished, made: CallbackMade) -> Entry:
        sealed = unfinished.begun.sealed
        content = self._store.vault.unseal(made.request) if sealed else made.request
        params, buffers, effect = decode_asked(made, content)
        entry = Entry(made.n, made.seq, made.method, params, buffers, effect=effect)
        if (answer := unfinished.answered.get(made.n)) is not None:
            entry.reply, entry.versions = decode_reply(self._store.vault.unseal(answer) if sealed else answer)
        elif isinstance(params, ToolCall):
            entry.lost = True
            tool = self._store.peek(unfinished.begun.session).tools.get(params.name)
            entry.effect = effect and not (tool is not None and tool.idempotent)
        return entry

    def _doubtful(self, unfinished: Unfinished) -> list[DoubtfulCall]:
        entries = [self._entry(unfinished, m) for m in unfinished.made if m.n not in unfinished.answered]
        return [
            DoubtfulCall(f"{unfinished.begun.id}:{e.n}", e.params.name, shown(e.method, e.params))
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

    async def once(
        self,
        session: SessionState,
        prepared: Prepared,
        key: str,
        terms: Terms,
    ) -> Outcome:
        """Run the command that has this key, unless it has run, or runs now, or was interrupted: then go on with that.

        Only what succeeded is remembered: a command that failed runs anew.

        Raises:
            Conflict: the key is another command's.
        """
        name, digest = (session.id, key), prepared.digest()
        if (done := self._store.finished.get(name)) is not None:
            begun, ended = done
            _check_same(key, begun.digest, digest)
            assert ended.result is not None
            content = self._store.vault.unseal(ended.result) if begun.sealed else ended.result
            kept = msgspec.msgpack.decode(content, type=_KeptReply)
            request = self.request_of(begun) if begun.request else prepared.request
            return Outcome(Reply(msgspec.Raw(kept.result), kept.buffers), prepared._replace(request=request), session)
        if (runs := self._by_key.get(name)) is not None:
            _check_same(key, runs[0], digest)
            # Shielded: who asked first must not lose it because who asked second gave up.
            return await asyncio.shield(runs[1])
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # perhaps nobody else asked
        self._by_key[name] = (digest, future)
        try:
            outcome = await self._begin_or_resume(session, prepared, key, digest, terms)
        except BaseException as exc:
            del self._by_key[name]
            future.set_exception(Cancelled() if isinstance(exc, asyncio.CancelledError) else exc)
            raise
        del self._by_key[name]
        future.set_result(outcome)
        return outcome

    async def _begin_or_resume(
        self,
        session: SessionState,
        prepared: Prepared,
        key: str,
        digest: bytes,
        terms: Terms,
    ) -> Outcome:
        for unfinished in list(self._store.unfinished.values()):
            begun = unfinished.begun
            if (begun.session, begun.key) == (session.id, key):
                _check_same(key, begun.digest, digest)
                return await self.resume(begun.id, deadline=terms.deadline, retries=terms.retries)
        running = self._engine.begin(session, prepared, terms)
        return await self._engine.finish(running, terms.retries)


def _check_same(key: str, known: bytes, asked: bytes) -> None:
    if known != asked:
        raise Conflict(
            f"the idempotency key {key!r} was used for another command",
            remedy="One key names one command with its arguments: choose another.",
        )
