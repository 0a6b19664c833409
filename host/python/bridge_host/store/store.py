"""`Store`: the sessions of one host. Memory is the truth that is read; the log is what survives."""

from __future__ import annotations

import gc
import threading
import time
import uuid
from typing import TYPE_CHECKING

from bridge_kernel.contract.errors import NotFound, QuotaExceeded, StoreDamaged

from .facts import (
    CallbackAnswered,
    CallbackMade,
    CommandBegun,
    CommandEnded,
    CommandForgotten,
    CommandTried,
    SessionPut,
)
from .log import MemoryLog
from .model import Quota, Unfinished, check_name
from .state import SessionState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .facts import Fact
    from .log import Log
    from .model import Change
    from .vault import Vault

__all__ = ("Store",)


class Store:
    """Thread-safe. `log` belongs to the store, and is closed with it."""

    def __init__(
        self,
        log: Log | None = None,
        vault: Vault | None = None,
        *,
        quota: Quota | None = None,
        ttl: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Read what the log holds. `ttl` is what new sessions get, in seconds; `clock` gives seconds since the epoch.

        Raises:
            StoreDamaged: what the log holds makes no sessions.
        """
        if vault is None:
            from .vault import Vault

            vault = Vault.in_memory()
        if ttl is not None and not ttl > 0:
            raise ValueError(f"ttl is how many seconds a session may be unused, more than 0, not {ttl!r}")
        self.log: Log = log if log is not None else MemoryLog()
        self.vault = vault
        self.quota = quota or Quota()
        self.clock = clock
        self.on_change: Callable[[int, list[Change]], object] | None = None
        self.on_make: Callable[[str], object] | None = None
        """Hears of sessions that are made, under the store's lock."""
        self.on_forget: Callable[[str], object] | None = None
        """Hears of sessions that are gone, under the store's lock: before another can have that id."""
        self._ttl = ttl
        self._sessions: dict[str, SessionState] = {}
        self._unfinished: dict[str, SessionState] = {}  # by a command's id, whose `unfinished` it is in
        self._lock = threading.Lock()
        # Hundreds of thousands of objects that all stay: to look for garbage among them is a third of the time.
        collecting = gc.isenabled()
        gc.disable()
        commands: dict[str, Unfinished] = {}
        try:
            for fact in self.log.load():
                self._load(fact, commands)
        finally:
            if collecting:
                gc.enable()
        for command in commands.values():
            self.add_unfinished(command)
        # What is left is of sessions that were deleted at the moment when it began.
        if orphans := [id for id in commands if id not in self._unfinished]:
            self.log.append([CommandForgotten(id) for id in orphans])

    def _load(self, fact: Fact, commands: dict[str, Unfinished]) -> None:
        match fact:
            case SessionPut():
                self._sessions[fact.id] = self._make(fact)
            case CommandBegun():
                commands[fact.id] = Unfinished(fact)
            case CommandTried():
                commands[fact.id].attempt = fact.attempt
            case CallbackMade():
                commands[fact.command].made.append(fact)
            case CallbackAnswered():
                commands[fact.command].answered[fact.n] = fact.reply
            case CommandEnded():
                begun = commands[fact.id].begun
                if (state := self._sessions.get(begun.session)) is not None:
                    del commands[fact.id]
                    if begun.key is not None and fact.error is None:
                        state.keep_finished(begun, fact, 0)
            case _:
                session = getattr(fact, "session", None)
                if session not in self._sessions:
                    raise StoreDamaged(f"a {type(fact).__name__} is of session {session!r}, which is not there")
                try:
                    self._sessions[session].apply(fact)
                except (ValueError, KeyError) as exc:
                    raise StoreDamaged(f"a {type(fact).__name__} of session {session!r} makes no sense: {exc}") from exc

    def _make(self, put: SessionPut) -> SessionState:
        state = SessionState(put, self.log, self.quota, self.clock)
        state.on_change = self._changed
        return state

    def _changed(self, number: int, changes: list[Change]) -> None:
        if self.on_change is not None:
            self.on_change(number, changes)

    # -- sessions ----------------------------------------------------------------

    def open(self, id: str | None = None, *, ttl: float | None = None) -> tuple[SessionState, int]:
        """The session of that id, made if there is none, a new one if no id is given; and what to wait for.

        `ttl`, if given, becomes its time to live. Raises `QuotaExceeded` if there are too many sessions.
        """
        id = check_name("session", id) if id is not None else f"session-{uuid.uuid4().hex[:12]}"
        if ttl is not None and not ttl > 0:
            raise ValueError(f"a time to live is how many seconds there are, more than 0, not {ttl!r}")
        with self._lock:
            state = self._sessions.get(id)
            number = 0
            if state is not None and self._expire(state, self.clock()):
                state = None
            if state is None:
                self._check_room(1)
                now = self.clock()
                put = SessionPut(id, now, now, ttl if ttl is not None else self._ttl, 0, None)
                number = self.log.append([put])
                state = self._sessions[id] = self._make(put)
                if self.on_make is not None:
                    self.on_make(id)
                return state, number
        if ttl is not None and ttl != state.ttl:
            number = state.set_ttl(ttl)
        state.touch()
        return state, number

    def peek(self, id: str) -> SessionState:
        """The session of that id, if there is one. Raises `NotFound`."""
        with self._lock:
            state = self._sessions.get(id)
        if state is None:
            raise NotFound(f"there is no session {id!r}")
        return state

    def delete(self, id: str) -> int:
        """Forget a session and all it owns, its journal included. Raises `NotFound`."""
        with self._lock:
            state = self._sessions.get(id)
            if state is None:
                raise NotFound(f"there is no session {id!r}")
            commands = list(state.unfinished)
            number = state.forget()
            self._drop(state, commands)
            return number

    def _expire(self, state: SessionState, now: float) -> bool:
        commands = list(state.unfinished)
        if not state.expire(now):
            return False
        self._drop(state, commands)
        return True

    def _drop(self, state: SessionState, commands: list[str]) -> None:
        # Only once it is gone: if the log takes nothing any more, it stays where it was.
        del self._sessions[state.id]
        for id in commands:
            self._unfinished.pop(id, None)
        if self.on_forget is not None:
            self.on_forget(state.id)

    def sweep(self) -> tuple[list[str], float | None]:
        """Forget the sessions that have expired: their ids, and when the next will, in seconds since the epoch.

        One at work has no end yet: when it has done its work, the next sweep finds it.
        """
        now = self.clock()
        with self._lock:
            mortal = [state for state in self._sessions.values() if state.ttl is not None]
            gone = [state.id for state in mortal if state.expired(now) and self._expire(state, now)]
            ends = [s.expires for s in mortal if s.expires is not None and not s.busy and not s.deleted]
        return gone, min(ends, default=None)

    def take(self, batches: Sequence[Sequence[Fact]]) -> list[str]:
        """Add sessions made elsewhere, each as one commit; their ids.

        Raises:
            ValueError: there is one of that id already. Nothing is added then.
            QuotaExceeded: one holds too much, or there would be too many.
        """
        made: list[SessionState] = []
        with self._lock:
            for batch in batches:
                put = batch[0]
                assert isinstance(put, SessionPut)
                if put.id in self._sessions or put.id in {state.id for state in made}:
                    raise ValueError(f"there is a session {put.id!r} already: delete it first")
                state = self._make(put)
                for fact in batch[1:]:
                    state.apply(fact)
                state.check_size()
                made.append(state)
            self._check_room(len(made))
            number = 0
            for batch, state in zip(batches, made, strict=True):
                number = self.log.append(batch)
                self._sessions[state.id] = state
        self.log.wait(number)
        return [state.id for state in made]

    def _check_room(self, more: int) -> None:
        if len(self._sessions) + more > self.quota.sessions:
            raise QuotaExceeded(
                f"the host has {len(self._sessions)} sessions, as many as it may",
                remedy="Delete some, give them a time to live, or open the host with Quota(sessions=…).",
            )

    def forget_keys(self, before: float) -> None:
        """Forget the results of commands with an idempotency key that ended before that time."""
        for state in self._all():
            if state.finished:
                state.forget_keys(before)

    def _all(self) -> list[SessionState]:
        with self._lock:
            return list(self._sessions.values())

    # -- commands that were interrupted ------------------------------------------

    def unfinished_commands(self) -> list[Unfinished]:
        """Those of every session, in the order in which they began."""
        with self._lock:
            states = set(self._unfinished.values())
        found = [unfinished for state in states for unfinished in state.unfinished_commands()]
        return sorted(found, key=lambda unfinished: unfinished.begun.began)

    def find_unfinished(self, id: str) -> Unfinished | None:
        with self._lock:
            state = self._unfinished.get(id)
            return None if state is None else state.unfinished.get(id)

    def add_unfinished(self, unfinished: Unfinished) -> None:
        """Nothing is added if its session is gone."""
        with self._lock:
            state = self._sessions.get(unfinished.begun.session)
            if state is not None and state.add_unfinished(unfinished):
                self._unfinished[unfinished.begun.id] = state

    def remove_unfinished(self, id: str) -> None:
        """Nothing happens if there is none."""
        with self._lock:
            if (state := self._unfinished.pop(id, None)) is not None:
                state.remove_unfinished(id)

    # -- all of them -------------------------------------------------------------

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(sorted(self._sessions))

    def __len__(self) -> int:
        return len(self._sessions)

    def close(self) -> None:
        """Everything is on disk, and the file is free: that even if it raises.

        Raises:
            StoreFailed: something could not be written.
        """
        try:
            for state in self._all():
                if state.ttl is not None:
                    state.save_use()
        finally:
            self.log.close()
