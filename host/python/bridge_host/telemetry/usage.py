"""Which calls are repeated, and what a cache would save."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import msgspec

from ..display import Shown

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ("Suggestion", "Suggestions", "Usage")

WORTHWHILE_NS: Final = 5_000_000  # a shorter call gains little, and to look at it would cost a part of that
MAX_CALLS: Final = 10_000  # of which is known that they were made; the oldest is forgotten
MAX_SUBJECTS: Final = 1000


class Suggestion(msgspec.Struct, frozen=True, kw_only=True):
    """One function, or one instance's method. `seconds` were spent on calls that had been made before."""

    session: str
    subject: str
    calls: int
    """That took 5 ms or more, had no effects and left the session as it was."""
    repeats: int
    """Of these, the ones that asked the same as an earlier one and read the same."""
    seconds: float
    write: str
    """The line of Python that has its results kept."""


class Suggestions(Shown, tuple[Suggestion, ...]):
    """Calls that would gain from a cache, those that would save most first: a tuple that shows itself as a table."""

    __slots__ = ()

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        rows = [[s.session, s.subject, f"{s.calls:,}", f"{s.repeats:,}", f"{s.seconds:,.3f} s", s.write] for s in self]
        return ["session", "what", "calls", "repeats", "would save", "write"], rows


class _Subject:
    __slots__ = ("calls", "name", "ns", "repeats", "write")

    def __init__(self, name: str, write: str) -> None:
        self.name = name
        self.write = write
        self.calls = self.repeats = self.ns = 0


class Usage:
    """Thread-safe. Keeps digests of what was asked, and never what was asked."""

    def __init__(self) -> None:
        self.worthwhile = WORTHWHILE_NS
        """A call that takes less, in nanoseconds, is not to be recorded."""
        self._lock = threading.Lock()
        self._subjects: OrderedDict[tuple[str, str, str], _Subject] = OrderedDict()
        self._made: OrderedDict[bytes, None] = OrderedDict()

    def record(
        self, session: str, target: str, subject: str, write: str, parts: Iterable[bytes], duration: int
    ) -> None:
        """A call that could have been cached, and was not.

        `target` is the function's name or the instance's ref, `subject` what people call it, `write` what has it
        cached; `parts` are the same for calls that have the same result; `duration` is in nanoseconds.
        """
        digest = hashlib.blake2b(digest_size=16)
        for part in (session.encode(), target.encode(), subject.encode(), *parts):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
        key = digest.digest()
        with self._lock:
            known = self._subjects.setdefault((session, target, subject), _Subject(subject, write))
            self._subjects.move_to_end((session, target, subject))
            known.write = write
            known.calls += 1
            if key in self._made:
                known.repeats += 1
                known.ns += duration
            self._made[key] = None
            self._made.move_to_end(key)
            if len(self._made) > MAX_CALLS:
                self._made.popitem(last=False)
            if len(self._subjects) > MAX_SUBJECTS:
                self._subjects.popitem(last=False)

    def forget(self, session: str, target: str | None = None) -> None:
        """Suggest nothing of what was recorded of it: it is cached now, or gone. Without a target: the whole session."""
        with self._lock:
            for name in [n for n in self._subjects if n[0] == session and target in (None, n[1])]:
                del self._subjects[name]

    def suggestions(self) -> Suggestions:
        """What has been repeated."""
        with self._lock:
            found = [
                Suggestion(
                    session=session, subject=s.name, calls=s.calls, repeats=s.repeats, seconds=s.ns / 1e9, write=s.write
                )
                for (session, _, _), s in self._subjects.items()
                if s.repeats
            ]
        return Suggestions(sorted(found, key=lambda s: s.seconds, reverse=True))
