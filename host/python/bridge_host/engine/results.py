"""`ResultCache`: results that are given again without a kernel, for functions and instances that ask for it.

Of one host, in its memory: bounded in bytes, the least recently used goes first, and gone when the host closes. An
entry belongs to one session, and is found by what was asked (`Prepared.result_key`); it counts only as long as what
the command read of its session is what it was (`Reads`). Which function or instance asks for it, and for how long,
is its session's to keep.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple

from bridge_kernel.contract.errors import NotFound

from ..client import Reply
from ..display import Shown

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec

    from ..store import SessionState
    from .reads import Reads
    from .running import Running

__all__ = ("CACHE_BYTES", "Hit", "ResultCache")

CACHE_BYTES: Final = 64 << 20
OVERHEAD_BYTES: Final = 700  # an entry's key and its place, beside its result: as measured
LARGEST: Final = 4  # a result may take this part of the whole: one must not drive out all others
MAX_COUNTED: Final = 1000  # functions and methods whose hits are counted each; the least recently called is forgotten

_NAMES: Final = ("hits", "misses", "skips")


class Hit(NamedTuple):
    """A result from the cache. `age` and `took` (when it was run) in nanoseconds."""

    reply: Reply
    age: int
    took: int


class _Entry(NamedTuple):
    result: msgspec.Raw
    buffers: tuple[bytes, ...]
    reads: Reads
    session: SessionState
    subject: str
    stored: float  # by the cache's clock
    took: int
    size: int


class _Counts:
    __slots__ = ("hits", "misses", "saved", "skips")

    def __init__(self) -> None:
        self.hits = self.misses = self.skips = 0
        self.saved = 0  # ns


class ResultCache(Shown):
    """`host.results`: what is kept of the functions and instances with `cache=`, as a table to look at. Thread-safe."""

    def __init__(self, max_bytes: int = CACHE_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        """At most `max_bytes` are kept, 0: nothing; `clock` is in seconds.

        Raises:
            ValueError: there are fewer than 0 bytes.
        """
        if type(max_bytes) is not int or max_bytes < 0:
            raise ValueError(f"cache_bytes is how many bytes results may take, 0 or more, not {max_bytes!r}")
        self.max_bytes = max_bytes
        self.clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[str, bytes], _Entry] = OrderedDict()
        self._bytes = 0
        self._total = _Counts()
        self._counts: OrderedDict[tuple[str, str], _Counts] = OrderedDict()  # by session and subject

    # -- for the engine ------------------------------------------------------------

    def find(self, session: SessionState, subject: str, key: bytes, ttl: float) -> Hit | None:
        """The result of the same command, not older than `ttl` seconds, if it would read the same now."""
        name = (session.id, key)
        with self._lock:
            entry = self._entries.get(name)
        if entry is not None and entry.session is session:
            age = self.clock() - entry.stored
            if age < ttl and _is_current(entry, session):
                with self._lock:
                    if name in self._entries:
                        self._entries.move_to_end(name)
                    self._count(session.id, subject, "hits", entry.took)
                return Hit(Reply(entry.result, entry.buffers), int(age * 1e9), entry.took)
            self._forget(name, entry)
        with self._lock:
            self._count(session.id, subject, "misses")
        return None

    def keep(self, running: Running, key: bytes, reply: Reply, reads: Reads, took: int) -> int | None:
        """Keep a result; how many bytes it takes, None if it is too large. `took` in nanoseconds."""
        size = OVERHEAD_BYTES + len(reply.result) + reads.size + sum(memoryview(b).nbytes for b in reply.buffers)
        session, subject = running.session, running.subject
        if size > self.max_bytes // LARGEST:
            return None
        # Copied: what came is a part of a message, which would be kept with it.
        result, buffers = reply.result.copy(), tuple(bytes(buffer) for buffer in reply.buffers)
        entry = _Entry(result, buffers, reads, session, subject, self.clock(), took, size)
        name = (session.id, key)
        with self._lock:
            self._drop(name)
            if session.deleted:  # and `forget` was called before this
                return size
            self._entries[name] = entry
            self._bytes += size
            while self._bytes > self.max_bytes:
                self._drop(next(iter(self._entries)))
        return size

    def skipped(self, session: str, subject: str) -> None:
        """Count a result that is not kept."""
        with self._lock:
            self._count(session, subject, "skips")

    def forget(self, session: str) -> None:
        """Let go of what is kept for a session that is gone."""
        with self._lock:
            for name in [name for name in self._entries if name[0] == session]:
                self._drop(name)
            for counted in [counted for counted in self._counts if counted[0] == session]:
                del self._counts[counted]

    def _forget(self, name: tuple[str, bytes], entry: _Entry) -> None:
        with self._lock:
            if self._entries.get(name) is entry:
                self._drop(name)

    def _drop(self, name: tuple[str, bytes]) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._bytes -= entry.size

    def _count(self, session: str, subject: str, what: str, saved: int = 0) -> None:
        counts = self._counts.setdefault((session, subject), _Counts())
        self._counts.move_to_end((session, subject))
        if len(self._counts) > MAX_COUNTED:
            self._counts.popitem(last=False)
        for one in (counts, self._total):
            setattr(one, what, getattr(one, what) + 1)
            one.saved += saved

    # -- to look at ------------------------------------------------------------------

    def clear(self) -> None:
        """Forget every result; the counts go on."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def __len__(self) -> int:
        """How many results are kept."""
        return len(self._entries)

    def __bool__(self) -> bool:
        return True

    @property
    def size(self) -> int:
        """How many bytes they take, roughly."""
        return self._bytes

    @property
    def hits(self) -> int:
        """How often a result was given from here, since the host was opened."""
        return self._total.hits

    @property
    def misses(self) -> int:
        """How often there was none."""
        return self._total.misses

    @property
    def skips(self) -> int:
        """How often a result could not be kept; the events `bridge.cache.skip` say why."""
        return self._total.skips

    @property
    def saved(self) -> float:
        """Seconds that the commands took whose results were given from here, each time."""
        return self._total.saved / 1e9

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        with self._lock:
            kept: dict[tuple[str, str], tuple[int, int]] = {}
            for entry in self._entries.values():
                number, size = kept.get((entry.session.id, entry.subject), (0, 0))
                kept[entry.session.id, entry.subject] = (number + 1, size + entry.size)
            names = list({**dict.fromkeys(self._counts), **dict.fromkeys(kept)})
            rows = [
                _row(
                    session,
                    subject,
                    self._counts.get((session, subject), _Counts()),
                    *kept.get((session, subject), (0, 0)),
                )
                for session, subject in sorted(names)
            ]
            rows.append(_row("all", "", self._total, len(self._entries), self._bytes))
        return ["session", "what", "hits", "misses", "not kept", "saved", "results", "bytes"], rows


def _row(session: str, subject: str, counts: _Counts, entries: int, size: int) -> list[str]:
    figures = [f"{getattr(counts, name):,}" for name in _NAMES]
    return [session, subject, *figures, f"{counts.saved / 1e9:,.3f} s", f"{entries:,}", f"{size:,}"]


def _is_current(entry: _Entry, session: SessionState) -> bool:
    try:
        return entry.reads.current(session)
    except NotFound:  # it is gone at this moment
        return False
