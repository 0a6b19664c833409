"""`SqliteLog`: the log on disk. One thread writes, and what many have waiting it puts there with one sync."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import os
import sqlite3
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from bridge_kernel.contract.errors import StoreFailed

from . import reading, rows
from .migrations import connected, explained, opened
from .owner import Owner

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .facts import Fact, VariablePut
    from .log import Journaled
    from .rows import Row

__all__ = ("SqliteLog",)

MAX_BATCHES: Final = 100_000
MAX_BYTES: Final = 256 << 20
"""How much may wait for the disk; whoever brings more waits until there is room."""
LINGER_S: Final = 0.01  # how long a batch that nobody waits for may wait for others to go to the disk with
EXIT_S: Final = 10.0  # how long a process that ends without `close` waits for the disk


class _Batch(NamedTuple):
    rows: list[Row]
    size: int


class SqliteLog:
    """A `Log` in an SQLite file, which is made if there is none. `commits` counts transactions.

    When a batch cannot be written (no space, no disk), that one and all after it fail, and nothing is written from then
    on: the file keeps what was waited for. A fork of the process can do nothing with it.

    Raises:
        StoreLocked: another host has it open.
        StoreDamaged: it is no store, is damaged, or is of a newer format; it was not changed.
        StoreFailed: it cannot be read or written.
    """

    on_disk = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.realpath(path)
        self.commits = 0
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._written = threading.Condition(self._lock)
        self._queue: list[_Batch] = []
        self._bytes = 0  # of what waits, the group that is being written included
        self._appended = 0
        self._durable = 0
        self._wanted = 0  # the last batch that somebody waits for
        self._waiting: dict[asyncio.AbstractEventLoop, list[tuple[int, asyncio.Future[None]]]] = {}
        self._failure: BaseException | None = None
        self._closing = False
        self._closed = False
        self._forked = False
        self._reading = threading.Lock()
        with contextlib.ExitStack() as undo:
            self._owner = Owner(self.path)
            undo.callback(self._owner.release)
            self._db = opened(self.path)
            undo.callback(self._db.close)
            with explained(self.path):
                self._reader = connected(self.path)
                self._reader.execute("PRAGMA query_only = ON")
                undo.callback(self._reader.close)
                self.id: str = self._reader.execute("SELECT value FROM meta WHERE name = 'id'").fetchone()[0]
                """The store's own name, wherever the file is."""
            undo.pop_all()
        self._writer = rows.Writer(self._db)
        _open_logs.add(self)
        # A daemon, so that a process can end while the disk hangs; one that ends in good order waits for it below.
        self._thread = threading.Thread(target=self._run, name="bridge-store", daemon=True)
        self._thread.start()

    # -- appending ---------------------------------------------------------------

    def append(self, facts: Sequence[Fact]) -> int:
        """As `Log.append`. Blocks only while more than `MAX_BATCHES` or `MAX_BYTES` wait for the disk.

        Raises:
            StoreFailed: an earlier batch could not be written, or the log is closed.
            ValueError, LimitExceeded: a fact cannot be written; nothing of the batch is recorded.
        """
        self._require()
        batch = _Batch(made := rows.rows_of(facts), rows.size_of(made))
        with self._lock:
            while self._is_full(batch.size) and self._failure is None and not self._closing:
                self._want(self._appended)
                self._room.wait()
            if self._failure is not None:
                raise self._failed()
            if self._closing:
                raise self._is_closed()
            if not self._queue:
                self._work.notify()
            self._queue.append(batch)
            self._bytes += batch.size
            self._appended += 1
            return self._appended

    def _is_full(self, size: int) -> bool:
        # A batch that is larger than the bound goes alone.
        return len(self._queue) >= MAX_BATCHES or (self._bytes > 0 and self._bytes + size > MAX_BYTES)

    def wait(self, number: int) -> None:
        self._require()
        with self._lock:
            self._want(number)
            while self._durable < number:
                if self._failure is not None:
                    raise self._failed()
                self._written.wait()

    def _want(self, number: int) -> None:
        if number > self._wanted:
            self._wanted = number
            self._work.notify()

    async def durable(self, number: int) -> None:
        self._require()
        if self._durable >= number:
            return
        with self._lock:
            if self._durable >= number:
                return
            if self._failure is not None:
                raise self._failed()
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            self._waiting.setdefault(loop, []).append((number, future))
            self._want(number)
        await future
        if self._durable < number:
            raise self._failed()

    @property
    def backlog(self) -> int:
        return self._appended - self._durable

    # -- the thread that writes --------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._closing:
                    self._work.wait()
                if not self._queue:
                    return
                if self._wanted <= self._durable and not self._closing:
                    # Nobody waits: an fsync for each would be wasted on what the next one covers too.
                    self._work.wait_for(lambda: self._wanted > self._durable or self._closing, LINGER_S)
                group, self._queue = self._queue, []
            try:
                self._commit(group)
            except BaseException as exc:  # noqa: BLE001 - whatever it is: each waiter gets it, and nothing is written after it
                self._fail(exc)
                return
            with self._lock:
                self.commits += 1
                self._durable += len(group)
                self._bytes -= sum(batch.size for batch in group)
                self._room.notify_all()
                self._wake()
            del group

    def _commit(self, group: list[_Batch]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        for batch in group:
            self._writer.write(batch.rows)
        self._db.execute("COMMIT")

    def _fail(self, cause: BaseException) -> None:
        with contextlib.suppress(Exception):  # of the two errors the first says what happened
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        with self._lock:
            self._failure = cause
            self._queue.clear()
            self._bytes = 0
            self._room.notify_all()
            self._wake()

    def _wake(self) -> None:
        self._written.notify_all()
        for loop, waiting in list(self._waiting.items()):
            ready = [future for number, future in waiting if number <= self._durable or self._failure is not None]
            if not ready:
                continue
            if len(ready) == len(waiting):
                del self._waiting[loop]
            else:
                self._waiting[loop] = [(number, future) for number, future in waiting if number > self._durable]
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there any more
                loop.call_soon_threadsafe(_settle, ready)

    def _failed(self) -> StoreFailed:
        error = StoreFailed(f"the store {self.path} could not be written: {self._failure}")
        error.__cause__ = self._failure
        return error

    def _is_closed(self) -> StoreFailed:
        return StoreFailed(f"the store {self.path} is closed", remedy="Open the host anew.")

    def _require(self) -> None:
        # Asked for before any lock is taken: in a fork nobody may be left to release it.
        if self._forked:
            raise StoreFailed(
                f"the store {self.path} belongs to another process, of which this one is a fork",
                remedy="Use the host in the process that made it, or open a host of another file here.",
            )

    # -- reading -----------------------------------------------------------------

    def load(self) -> Iterator[Fact]:
        """As `Log.load`. Raises `StoreDamaged` where a row is no fact: somebody else has written it."""
        self._settle_all()
        if self._closed:
            raise self._is_closed()
        # A connection of its own: who reads these facts may ask for others meanwhile.
        with explained(self.path), contextlib.closing(connected(self.path, mode="ro")) as db:
            yield from reading.load(db, self.path)

    def history(self, session: str, name: str) -> list[VariablePut]:
        with self._read() as db:
            return reading.history(db, self.path, session, name)

    def histories(self, session: str) -> dict[str, list[VariablePut]]:
        with self._read() as db:
            return reading.histories(db, self.path, session)

    def commands(self, session: str | None = None) -> list[Journaled]:
        with self._read() as db:
            return reading.commands(db, self.path, session)

    @contextlib.contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        self._settle_all()
        with self._reading:
            if self._closed:
                raise self._is_closed()
            yield self._reader

    def _settle_all(self) -> None:
        # What is read has been written: every batch that was appended by now is in the file.
        self.wait(self._appended)

    # -- the end -----------------------------------------------------------------

    def close(self) -> None:
        """As `Log.close`; may be called again. In a fork it does nothing.

        Raises:
            StoreFailed: something that was appended could not be written. The file is let go of all the same.
        """
        if not self._forked:
            self._close(None)

    def _close(self, timeout_s: float | None) -> None:
        with self._lock:
            self._closing = True
            self._work.notify()
            self._room.notify_all()
        self._thread.join(timeout_s)
        with self._reading:
            if self._closed or self._thread.is_alive():
                return
            self._closed = True
            self._reader.close()
            if self._failure is None:
                with contextlib.suppress(sqlite3.Error):  # no space to make space in: the next time, then
                    self._db.execute("PRAGMA incremental_vacuum").fetchall()
            self._db.close()  # the last connection: SQLite puts its log into the file, and removes it
            self._owner.release()
        _open_logs.discard(self)
        if self._failure is not None:
            raise self._failed()

    def _abandon(self) -> None:
        # Connections that a fork closes, or collects, would write what their parent has in its hands. So nothing is
        # left to chance: they get one more reference, which is never given back.
        self._forked = True
        for connection in (self._db, self._reader):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def _settle(futures: Iterable[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():  # it was cancelled
            future.set_result(None)


_open_logs: Final[set[SqliteLog]] = set()


def _abandon_all() -> None:
    for log in _open_logs:
        log._abandon()
    _open_logs.clear()


def _close_all() -> None:
    for log in list(_open_logs):
        with contextlib.suppress(StoreFailed):  # it was said to whoever waited
            log._close(EXIT_S)


os.register_at_fork(after_in_child=_abandon_all)
atexit.register(_close_all)
