"""What the parts of one kernel process share: who it is, what it allows, what runs in it."""

from __future__ import annotations

import itertools
import logging
import os
import platform
import socket
import sys
import threading
import time
import uuid
from collections import Counter, deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .cache import InstanceCache
from .contract.messages import PROTOCOL_VERSION
from .contract.methods import COMMANDS, Attached, KernelIdentity, Limits
from .executor import Executor
from .sources import Sources

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .command import RunningCommand
    from .policy import Policy

__all__ = ("Runtime",)

log = logging.getLogger(__name__)


class Runtime:
    """Shared by the lane, the commands and the cells. Thread-safe."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.identity = KernelIdentity(uuid.uuid4().hex, os.getpid(), socket.gethostname(), time.time())
        self.sources = Sources(policy)
        self.cache = InstanceCache(policy)
        self.executor = Executor()
        self.draining = False
        self.connections = 0
        self.cells = 0
        """Cells running now: one at most, in a kernel that serves them."""
        self.dropped: Counter[str] = Counter()
        self.unpublished: deque[RunningCommand] = deque()
        """Commands that have been answered, whose telemetry the lane has yet to show."""
        self._counts: Counter[str] = Counter()
        self._active: dict[RunningCommand, None] = {}
        self._lock = threading.Lock()
        self._when_idle: list[Callable[[], None]] = []
        self._ids = itertools.count(1)

    def next_id(self) -> int:
        """An id for a callback: unique in this kernel, so that a reply can never meet the wrong question."""
        return next(self._ids)

    def started(self, command: RunningCommand) -> None:
        with self._lock:
            self._active[command] = None
            command.counted = True
            self._counts["received"] += 1

    def ended(self, command: RunningCommand) -> None:
        """Its code has really ended, which may be long after its answer."""
        with self._lock:
            self._active.pop(command, None)
            callbacks = self._take_when_idle()
        for callback in callbacks:
            callback()

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Call back once, as soon as neither command nor cell runs: perhaps now, on this thread."""
        with self._lock:
            self._when_idle.append(callback)
            callbacks = self._take_when_idle()
        for ready in callbacks:
            ready()

    def _take_when_idle(self) -> list[Callable[[], None]]:
        if self._active or self.cells:
            return []
        callbacks, self._when_idle = self._when_idle, []
        return callbacks

    @contextmanager
    def running_cell(self) -> Iterator[None]:
        """Within it a cell runs, which a drain waits for."""
        with self._lock:
            self.cells += 1
        try:
            yield
        finally:
            with self._lock:
                self.cells -= 1
                callbacks = self._take_when_idle()
            for callback in callbacks:
                callback()

    def drop(self, reason: str, what: str) -> None:
        """Count a message that nothing was done with; `what` is for whoever debugs."""
        self.dropped[reason] += 1
        log.debug("dropped a message (%s): %s", reason, what)

    def count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    @property
    def counts(self) -> dict[str, int]:
        with self._lock:
            kept = {key: self._counts[key] for key in ("received", "succeeded", "failed", "cancelled")}
            return {**kept, "running": len(self._active)}

    @property
    def active(self) -> list[RunningCommand]:
        with self._lock:
            return list(self._active)

    @property
    def busy(self) -> int:
        return len(self._active)

    def describe(self) -> Attached:
        """The kernel's side of the handshake."""
        policy = self.policy
        versions: dict[str, Any] = {"bridge": __version__, "python": platform.python_version()}
        for name in ("dspy", "ipykernel", "numpy"):
            if (module := sys.modules.get(name)) is not None:
                versions[name] = str(getattr(module, "__version__", ""))
        return Attached(
            protocol=PROTOCOL_VERSION,
            kernel=self.identity,
            versions=versions,
            commands=tuple(name for name in COMMANDS if name != "bridge.attach"),
            limits=Limits(
                max_message_bytes=policy.max_message_bytes,
                max_commands=policy.max_commands,
                max_sources=policy.max_sources,
                max_output_bytes=policy.max_output_bytes,
            ),
            policy=policy.describe(),
        )
