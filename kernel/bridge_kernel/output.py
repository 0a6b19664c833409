"""stdout and stderr, labelled with the command that writes: from its threads and tasks too."""

from __future__ import annotations

import io
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from .redaction import starred

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("CURRENT", "CommandStream", "Output", "capture", "inherit_in_threads")

FLUSH_AT = 4096  # characters: a message a line would cost more than the lines
GIVE_WAY_S = 1.0
"""How long a flush waits for another that shows the same output, before it leaves its text to that one."""
LIMIT_REACHED = ("stderr", "\n[output limit reached: the rest of what this command prints is dropped]\n")


class HasOutput(Protocol):
    """What prints: a running command, or a cell."""

    @property
    def output(self) -> Output: ...


CURRENT: ContextVar[Any] = ContextVar("bridge_current_command", default=None)
"""The command or cell whose code runs here."""


class Output:
    """What one command prints, collected into few messages, in the order in which it was written."""

    def __init__(self, publish: Callable[[str, str], None], max_bytes: int, secrets: tuple[str, ...] = ()) -> None:
        """`publish(name, text)` sends one Jupyter `stream` message; `secrets`, the longest first, are starred out."""
        self._publish = publish
        self._secrets = secrets
        self._waiting: dict[str, str] = {}  # by stream: an end that may be the beginning of a secret
        self._left = max_bytes
        self._parts: deque[tuple[str, str]] = deque()
        self._size = 0
        # Reentrant: a signal handler or a finalizer may print while this thread prints.
        self._lock = threading.RLock()
        self._showing = False
        self._asked = False  # for one more round, by a flush that could not show its text itself

    def write(self, name: str, text: str) -> None:
        # Without the lock: a finalizer may print while its thread holds what whoever has the lock waits for.
        # Between the two looks at what is left nothing is called, so no other thread gets its turn there.
        part, size = (name, text), len(text.encode("utf-8", "replace"))
        if self._left <= 0:
            return
        self._left -= size
        self._parts.append(part if self._left > 0 else LIMIT_REACHED)
        self._size += len(text)
        if self._size >= FLUSH_AT:
            self.flush()

    def flush(self, *, final: bool = False) -> None:
        """Send what there is, but for an end that could be the beginning of a secret, unless no more will come."""
        while True:
            if not self._lock.acquire(blocking=False):
                self._asked = True
                if not self._lock.acquire(timeout=GIVE_WAY_S):
                    return  # whoever has the lock shows it
            try:
                if self._showing:
                    self._asked = True  # within a flush of this thread: that one shows it
                    return
                self._showing, self._asked = True, False
                try:
                    self._show_all(final=final)
                finally:
                    self._showing = False
            finally:
                self._lock.release()
            if not (self._asked and self._parts):
                return

    def _show_all(self, *, final: bool) -> None:
        self._size = 0
        parts = self._parts
        for _ in range(len(parts)):
            if not parts:
                break
            name, text = parts.popleft()
            texts = [text]
            while parts and parts[0][0] == name and len(texts) < FLUSH_AT:
                texts.append(parts.popleft()[1])
            self._show(name, "".join(texts), final=False)
        if final:
            for name in list(self._waiting):
                self._show(name, "", final=True)

    def _show(self, name: str, text: str, *, final: bool) -> None:
        if self._secrets:
            text, waits = starred(self._waiting.pop(name, "") + text, self._secrets, final=final)
            if waits:
                self._waiting[name] = waits
        if text:
            self._publish(name, text)


class CommandStream(io.TextIOBase):
    """Takes the place of `sys.stdout` or `sys.stderr`."""

    def __init__(self, name: str, fallback: TextIO) -> None:
        self.name = name
        self._fallback = fallback

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """The process's own descriptor: what a subprocess inherits goes to the kernel's log."""
        return self._fallback.fileno()

    def write(self, text: str) -> int:
        current: HasOutput | None = CURRENT.get()
        if current is None:
            return self._fallback.write(text)
        current.output.write(self.name, str(text))
        return len(text)

    def flush(self) -> None:
        current: HasOutput | None = CURRENT.get()
        if current is None:
            self._fallback.flush()
        else:
            current.output.flush()


def capture() -> None:
    """Put the streams in place; what no command writes still goes where it went."""
    sys.stdout = CommandStream("stdout", sys.stdout)
    sys.stderr = CommandStream("stderr", sys.stderr)


def inherit_in_threads() -> None:
    """Let threads and executors know the command that started them, as tasks and `asyncio.to_thread` do.

    CPython passes a context on to a new thread from 3.14 on; until then, a command's raw threads would
    print as nobody's. Only `CURRENT` is passed on: other variables keep Python's meaning.
    """
    start = threading.Thread.start
    submit = ThreadPoolExecutor.submit

    def within(command: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            token = CURRENT.set(command)
            try:
                return function(*args, **kwargs)
            finally:
                CURRENT.reset(token)

        return run

    @wraps(start)
    def start_within(self: threading.Thread) -> None:
        command = CURRENT.get()
        if command is not None:
            self.run = within(command, self.run)  # type: ignore[method-assign]
        start(self)

    def submit_within(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        command = CURRENT.get()
        if command is None:
            return submit(self, fn, *args, **kwargs)
        # The pool's own new threads must not take after the first command that used the pool.
        token = CURRENT.set(None)
        try:
            return submit(self, within(command, fn), *args, **kwargs)
        finally:
            CURRENT.reset(token)

    threading.Thread.start = start_within  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = submit_within  # type: ignore[method-assign, assignment]
