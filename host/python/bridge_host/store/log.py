"""`Log`: where a store's facts are kept, in the order in which they happened; and the one that keeps them in memory."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec

from .facts import CommandBegun, CommandEnded, CommandForgotten, CommandTried, SessionForgotten, VariablePut

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .facts import Fact

__all__ = ("KEPT_BYTES", "KEPT_COMMANDS", "KEPT_VERSIONS", "Journaled", "Log", "MemoryLog")

KEPT_VERSIONS: Final = 100
"""How many versions of a variable are kept, the current one included."""
KEPT_BYTES: Final = 16 << 20
"""How much the versions before the current one may take; the oldest go first."""
KEPT_COMMANDS: Final = 10_000
"""How many finished commands the journal remembers, those that succeeded with an idempotency key not counted."""


class Journaled(NamedTuple):
    """What the journal remembers of a command; no `ended` says that it is unfinished."""

    begun: CommandBegun
    attempts: int
    ended: CommandEnded | None


class Log(Protocol):
    """Facts in, in batches that are kept whole or not at all, in order: if one is on disk, all before it are. Thread-safe."""

    @property
    def on_disk(self) -> bool:
        """Whether it outlives this process."""
        ...

    def load(self) -> Iterable[Fact]:
        """What is there now, as the facts that would make it: each session before what it owns; of each variable the
        newest version only; of commands those that are unfinished (with their callbacks) or have succeeded with a key.
        """
        ...

    def append(self, facts: Sequence[Fact]) -> int:
        """Record a batch; returns its number. Does not wait for the disk.

        Raises:
            StoreFailed: an earlier batch could not be written. Nothing is recorded from then on.
        """
        ...

    def wait(self, number: int) -> None:
        """Block until that batch is on disk. Raises `StoreFailed` if it cannot be put there."""
        ...

    async def durable(self, number: int) -> None:
        """As `wait`, without blocking the event loop. Cancelling it leaves the batch on its way."""
        ...

    @property
    def backlog(self) -> int:
        """How many batches are not on disk yet."""
        ...

    def history(self, session: str, name: str) -> list[VariablePut]:
        """The kept versions of a variable, oldest first, deletions included."""
        ...

    def histories(self, session: str) -> dict[str, list[VariablePut]]:
        """`history` of every variable that the session has or had."""
        ...

    def commands(self, session: str | None = None) -> list[Journaled]:
        """The journal, oldest first: each command, the number of attempts, how it ended (None: it has not)."""
        ...

    def close(self) -> None:
        """Put everything on disk and let go of the file."""
        ...


class MemoryLog:
    """Keeps what must be asked for later (versions, the journal), in this process; it is gone with it."""

    backlog = 0
    on_disk = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._versions: dict[str, dict[str, list[VariablePut]]] = {}
        self._old_bytes: dict[str, dict[str, int]] = {}
        self._commands: dict[str, Journaled] = {}
        self._of_session: dict[str, set[str]] = {}
        self._finished: deque[str] = deque()

    def load(self) -> Iterable[Fact]:
        return ()

    def append(self, facts: Sequence[Fact]) -> int:
        with self._lock:
            for fact in facts:
                match fact:
                    case VariablePut():
                        self._keep(fact)
                    case SessionForgotten():
                        self._versions.pop(fact.id, None)
                        self._old_bytes.pop(fact.id, None)
                        for id in self._of_session.pop(fact.id, ()):
                            del self._commands[id]
                    case CommandBegun():
                        self._forget(fact.id)
                        self._commands[fact.id] = Journaled(fact, 1, None)
                        self._of_session.setdefault(fact.session, set()).add(fact.id)
                    case CommandTried():
                        if fact.id in self._commands:
                            self._commands[fact.id] = Journaled(self._commands[fact.id].begun, fact.attempt, None)
                    case CommandEnded():
                        self._end(fact)
                    case CommandForgotten():
                        self._forget(fact.id)
                    case _:
                        pass
        return 0

    def _forget(self, id: str) -> None:
        known = self._commands.pop(id, None)
        if known is not None:
            of_session = self._of_session[known.begun.session]
            of_session.discard(id)
            if not of_session:
                del self._of_session[known.begun.session]

    def _keep(self, put: VariablePut) -> None:
        versions = self._versions.setdefault(put.session, {}).setdefault(put.name, [])
        old_bytes = self._old_bytes.setdefault(put.session, {})
        if versions and versions[-1].value is not None:
            old_bytes[put.name] = old_bytes.get(put.name, 0) + versions[-1].value.size
        versions.append(put)
        while len(versions) > 1 and (len(versions) > KEPT_VERSIONS or old_bytes.get(put.name, 0) > KEPT_BYTES):
            old = versions.pop(0)
            if old.value is not None:
                old_bytes[put.name] -= old.value.size

    def _end(self, ended: CommandEnded) -> None:
        known = self._commands.get(ended.id)
        if known is None:
            return
        lasts = known.begun.key is not None and ended.error is None
        begun = msgspec.structs.replace(known.begun, request=b"")
        kept = ended if lasts or ended.result is None else msgspec.structs.replace(ended, result=None)
        self._commands[ended.id] = Journaled(begun, known.attempts, kept)
        if not lasts:
            self._finished.append(ended.id)
            if len(self._finished) > KEPT_COMMANDS:
                self._forget(self._finished.popleft())

    def wait(self, number: int) -> None:
        pass

    async def durable(self, number: int) -> None:
        pass

    def history(self, session: str, name: str) -> list[VariablePut]:
        with self._lock:
            return list(self._versions.get(session, {}).get(name, ()))

    def histories(self, session: str) -> dict[str, list[VariablePut]]:
        with self._lock:
            return {name: list(versions) for name, versions in self._versions.get(session, {}).items()}

    def commands(self, session: str | None = None) -> list[Journaled]:
        with self._lock:
            return [c for c in self._commands.values() if session is None or c.begun.session == session]

    def close(self) -> None:
        pass
