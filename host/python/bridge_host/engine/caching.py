"""Gives results again: commands that ask for the cache go through here, and what could gain from it is noted.

What is kept is `results`' business, what a command read is `reads`'; here is decided when.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bridge_kernel.contract.errors import DeadlineExceeded

from ..store.facts import CommandBegun
from .commands import CallFunction, CallMethod, prepare
from .journal import Journal
from .reads import Reads, reads_of
from .running import Outcome, Running

if TYPE_CHECKING:
    from ..client import Reply
    from ..store import SessionState
    from .commands import Prepared
    from .engine import Engine
    from .results import Hit, ResultCache
    from .running import Terms
    from .telling import Teller

__all__ = ("Caching",)

MAX_LOOKED_AT: Final = 1 << 20  # bytes that a call brings with it: to look whether it is a repetition costs time too


class Caching:
    """Belongs to one event loop, its engine's."""

    def __init__(self, engine: Engine, results: ResultCache, teller: Teller) -> None:
        self._engine = engine
        self._teller = teller
        self._results = results
        self._leading: dict[tuple[str, bytes], asyncio.Future[None]] = {}

    async def run(self, session: SessionState, prepared: Prepared, terms: Terms) -> Outcome:
        """Give the result that is kept, or run the command and keep it. Of callers that ask the same at once, one runs
        it and the others wait for that; if it then gives them nothing, each runs it itself.

        Raises:
            DeadlineExceeded: the others' time was up while they waited.
            BridgeError: as `Engine.run`.
        """
        began = time.perf_counter_ns()
        prepared = self._owned(session, prepared)
        assert prepared.cache is not None
        key = prepared.result_key(self._engine.store.vault)
        name = (session.id, key)
        # Not within a command: two that wait for each other's commands would do so for ever.
        if terms.parent is None and (leader := self._leading.get(name)) is not None:
            terms = await self._wait(leader, prepared, terms)
        hit = self._results.find(session, prepared.subject, key, prepared.cache)
        if hit is not None:
            return self._given(session, prepared, terms, hit, began)
        leading: asyncio.Future[None] | None = None
        if name not in self._leading:
            leading = self._leading[name] = asyncio.get_running_loop().create_future()
        try:
            running = self._engine.begin(session, prepared, terms)
            running.began = began
            running.result_key, running.tools = key, dict(session.tools)
            self._teller.cached("miss", running)
            return await self._engine.finish(running, terms.retries)
        finally:
            if leading is not None:
                del self._leading[name]
                leading.set_result(None)

    def _owned(self, session: SessionState, prepared: Prepared) -> Prepared:
        """The same command with buffers of its own. A caller may change his arrays while it waits for a kernel: what
        came of that would be kept for what he had asked.
        """
        request = prepared.request
        if not isinstance(request, CallFunction | CallMethod):
            return prepared
        given = request.given
        if all(isinstance(buffer, bytes) for buffer in given.buffers):
            return prepared
        given = msgspec.structs.replace(given, buffers=tuple(bytes(buffer) for buffer in given.buffers))
        return prepare(msgspec.structs.replace(request, given=given), session, self._engine.store.vault)

    async def _wait(self, leader: asyncio.Future[None], prepared: Prepared, terms: Terms) -> Terms:
        """What is left of the terms when the leader has ended, however it did."""
        since = time.monotonic()
        await asyncio.wait((leader,), timeout=terms.deadline)
        if terms.deadline is None:
            return terms
        left = terms.deadline - (time.monotonic() - since)
        if left <= 0:
            raise DeadlineExceeded(f"{prepared.subject} still runs for another caller who asked the same")
        return terms._replace(deadline=left)

    def _given(self, session: SessionState, prepared: Prepared, terms: Terms, hit: Hit, began: int) -> Outcome:
        """Answer without a kernel. It is told like a command, but not journaled: nothing ran."""
        engine = self._engine
        begun = CommandBegun(
            engine.new_id(), session.id, prepared.method, prepared.subject, None, b"", b"", False, time.time()
        )
        trace = engine.telemetry.tracer.child()
        running = Running(begun, session, prepared, Journal(), None, terms.parent, trace)
        running.began = began
        self._teller.begun(running)
        self._teller.cached("hit", running, {"saved": hit.took, "age": hit.age})
        self._teller.ended(running, None)
        return Outcome(hit.reply, prepared, session)

    # -- what ran ------------------------------------------------------------------

    def succeeded(self, running: Running, reply: Reply) -> None:
        """Keep the result of a command that asked for it; note one that took long and did not."""
        took = time.perf_counter_ns() - running.tried
        key = running.result_key
        if key is None:
            if took >= self._engine.telemetry.usage.worthwhile:
                self._note(running, reply, took)
            return
        reads = reads_of(running, reply, running.tools)
        if not isinstance(reads, Reads):
            self.skip(running, reads)
        elif (size := self._results.keep(running, key, reply, reads, took)) is None:
            self.skip(running, "its result is too large")
        else:
            self._teller.cached("store", running, {"bytes": size, "saved": took})

    def skip(self, running: Running, reason: str) -> None:
        """A command that asked for the cache has no result to keep."""
        self._results.skipped(running.session.id, running.subject)
        self._teller.cached("skip", running, reason=reason)

    def _note(self, running: Running, reply: Reply, took: int) -> None:
        """Tell usage of a call that the cache could have given again."""
        prepared, session = running.prepared, running.session
        request = prepared.request
        if running.begun.key is not None or not isinstance(request, CallFunction | CallMethod):
            return
        target, size, write = _target(request, session)
        if size > MAX_LOOKED_AT:
            return
        reads = reads_of(running, reply)
        if isinstance(reads, Reads):
            parts = (prepared.result_key(self._engine.store.vault), reads.digest())
            self._engine.telemetry.usage.record(session.id, target, running.subject, write, parts, took)


def _target(request: CallFunction | CallMethod, session: SessionState) -> tuple[str, int, str]:
    """The function's name or the instance's ref; how large what goes with it is; what to write to have it cached."""
    size = sum(memoryview(buffer).nbytes for buffer in request.given.buffers)
    if isinstance(request, CallFunction):
        own = request.name in session.functions
        write = f'session.cache({_text(request.name)}, "1h")'
        return request.name, size, write if own else f'@session.function(cache="1h") that calls {request.name}'
    instance: Any = session.instances.get(request.ref)
    if instance is None:
        return request.ref, size, ""
    name = instance.name if instance.name and instance.name not in session.functions else instance.ref
    return request.ref, size + instance.size, f'session.cache({_text(name)}, "1h")'


def _text(name: str) -> str:
    return msgspec.json.encode(name).decode()
