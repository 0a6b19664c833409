"""Who waits for a kernel, and in which order: a bounded queue that is fair between sessions. Pure: no loop, no clock."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

from bridge_kernel.contract.errors import QueueFull

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("FairQueue",)

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """One queue a session, served in turn: first in, first out within a session, round-robin between them.

    At most `bound` items wait. A session may wait with at most as many as there are free places left, so
    one that floods takes half of them and the next still finds room. Items are compared by identity or
    hash; each is in the queue once. All operations take constant time.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self.length = 0
        # Ordered dicts, not deques: what is cancelled leaves from the middle.
        self._sessions: OrderedDict[str, OrderedDict[Item, None]] = OrderedDict()

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Item]:
        for items in self._sessions.values():
            yield from items

    def waiting(self, session: str) -> int:
        """How many of that session's wait."""
        return len(self._sessions.get(session, ()))

    def put(self, session: str, item: Item, *, wait_s: float | None) -> None:
        """Wait in line, behind the session's own. `wait_s` is how long that would be, None if unknown: for the error.

        Raises:
            QueueFull: the session has as many waiting as there are free places left.
        """
        items = self._sessions.get(session)
        mine = len(items) if items is not None else 0
        free = self._bound - self.length
        if mine >= free:
            whose = f", {mine} of them of session {session!r}" if mine and mine < self.length else ""
            wait = "how long the wait would be is not known yet"
            if wait_s is not None:
                wait = f"the wait would be about {wait_s:.3g} s"
            raise QueueFull(f"{self.length} commands wait for a kernel{whose}, and {self._bound} may at most: {wait}")
        if items is None:
            items = self._sessions[session] = OrderedDict()
        items[item] = None
        self.length += 1

    def pop(self) -> Item:
        """The next one: of the session whose turn it is.

        Raises:
            IndexError: nobody waits.
        """
        if not self._sessions:
            raise IndexError("nobody waits")
        session, items = next(iter(self._sessions.items()))
        item, _ = items.popitem(last=False)
        self.length -= 1
        if items:
            self._sessions.move_to_end(session)
        else:
            del self._sessions[session]
        return item

    def remove(self, session: str, item: Item) -> None:
        """Take one out of the line; does nothing if it has left already."""
        items = self._sessions.get(session)
        if items is not None and item in items:
            del items[item]
            self.length -= 1
            if not items:
                del self._sessions[session]
