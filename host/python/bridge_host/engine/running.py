"""`Running`: a command that is being run for somebody, over all its attempts."""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from bridge_kernel.contract.methods import GiveCredit

from ..store import Staged

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    import anyio

    from bridge_kernel.contract.frames import Buffer
    from bridge_kernel.contract.methods import Chunk
    from bridge_kernel.contract.telemetry import Trace

    from ..client import KernelClient, Reply
    from ..pool import Ask
    from ..store import SessionState
    from ..store.facts import CommandBegun
    from ..tools import Tool
    from .commands import Prepared
    from .journal import Journal

__all__ = (
    "CURRENT",
    "CURRENT_CALL",
    "LATE_S",
    "RETRIES",
    "Outcome",
    "Running",
    "Terms",
    "ToolCallInfo",
    "current_call",
)

RETRIES: Final = 2
"""How often a command runs again, on another kernel, when its kernel dies."""


LATE_S: Final = 0.5
"""How long after its deadline a kernel may still say so itself."""


class ToolCallInfo(msgspec.Struct, frozen=True):
    """The call for which a tool runs. `id` is the same whenever this call is made again: an idempotency key."""

    id: str
    tool: str
    command: str
    session: str


class Terms(NamedTuple):
    """On which terms a command runs: `deadline` in seconds, `key` an idempotency key, `secrets` the names of those
    that it gets, `parent` the command in whose tool it was sent.
    """

    deadline: float | None = None
    retries: int = RETRIES
    key: str | None = None
    secrets: Sequence[str] = ()
    parent: Running | None = None


class Outcome(NamedTuple):
    """What came of a command. `prepared` is the one that was run: an earlier one, if an idempotency key was used again."""

    reply: Reply
    prepared: Prepared
    session: SessionState


class Running:
    """Belongs to one event loop."""

    def __init__(
        self,
        begun: CommandBegun,
        session: SessionState,
        prepared: Prepared,
        journal: Journal,
        deadline: float | None,
        parent: Running | None,
        trace: Trace,
        on_chunk: Callable[[Chunk, Sequence[Buffer]], None] | None = None,
    ) -> None:
        self.begun = begun
        self.id = begun.id
        self.session = session
        self.prepared = prepared
        self.journal = journal
        self.staged = Staged(session)
        self.began = self.tried = time.perf_counter_ns()
        self.deadline = deadline  # time.monotonic
        self.parent = parent
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.trace = trace
        self.on_chunk = on_chunk
        self.attempt = 0
        self.committed = False
        self.changed = False  # whether its answer changed an instance
        self.result_key: bytes | None = None  # what its result is to be kept under
        self.tools: dict[str, Tool] | None = None  # the session's when it began, if that counts
        self.asked: Ask | None = None  # while it waits for a kernel
        self.lost = False  # whether it has run, and no kernel has it: what its code raised is another matter
        self.unheard = False  # whether its kernel did not even say that the deadline had passed
        self.client: KernelClient | None = None
        self.request_id = 0  # what the kernel of this attempt knows it by
        self.answer: asyncio.Future[Reply] | None = None
        self._tools: set[anyio.CancelScope] = set()
        self._ended = False

    @property
    def subject(self) -> str:
        return self.prepared.subject

    def remaining_ms(self) -> float | None:
        return None if self.deadline is None else max(0.0, (self.deadline - time.monotonic()) * 1000)

    def begin(self, client: KernelClient, request_id: int, answer: asyncio.Future[Reply]) -> None:
        """An attempt begins: of what an earlier one wrote nothing is left, but its tools may run still."""
        self.client, self.request_id, self.answer = client, request_id, answer
        self.tried = time.perf_counter_ns()
        if self.attempt > 1:
            self.staged = Staged(self.session)
        self.journal.begin()

    def add(self, scope: anyio.CancelScope) -> None:
        self._tools.add(scope)
        if self._ended:
            scope.cancel()

    def remove(self, scope: anyio.CancelScope) -> None:
        self._tools.discard(scope)

    def end(self) -> None:
        """Nobody waits for its tools any more: cancel them. A tool in a thread runs on, and its result is dropped."""
        self._ended = True
        for scope in self._tools:
            scope.cancel()

    def give_credit(self, credit: int) -> None:
        if self.client is not None and not self._ended:
            self.client.notify("command.credit", GiveCredit(self.request_id, credit))


CURRENT: ContextVar[Running | None] = ContextVar("bridge_running_command", default=None)
"""The command for which a tool runs here: what it sends itself is nested in that, and shares its budget."""

CURRENT_CALL: ContextVar[ToolCallInfo | None] = ContextVar("bridge_tool_call", default=None)


def current_call() -> ToolCallInfo | None:
    """The call for which this tool runs, None outside of one. Its `id` is what an outside service takes as its
    idempotency key: it is the same when the call is made again after a host died in the middle of it.
    """
    return CURRENT_CALL.get()
