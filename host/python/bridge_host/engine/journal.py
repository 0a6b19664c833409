"""`Journal`: what one command has called back and was answered, so that it may run again without its tools doing so.

Pure: it knows neither kernels nor tools. A callback of the command's own flow is found again by its place in it
(`seq`), one from another thread or task by what it asks.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from bridge_kernel.contract.errors import ErrorObject, ReplayDiverged
from bridge_kernel.contract.methods import InstanceFetch, SessionGet, SessionGetMany, ToolCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bridge_kernel.contract.frames import Buffer
    from bridge_kernel.contract.methods import Callback

__all__ = ("MAX_CALLBACKS", "Entry", "Journal", "Recorded", "digest_of", "shown")

MAX_CALLBACKS: Final = 100_000  # that one command's journal holds; a command that asks for more runs once only
SHOWN: Final = 300  # characters of a request in an error

_encode: Final = msgspec.json.Encoder(order="deterministic").encode


class Recorded(NamedTuple):
    """The reply to a callback: a result with its buffers, or an error."""

    result: msgspec.Struct | msgspec.Raw | None
    buffers: Sequence[Buffer] = ()
    error: ErrorObject | None = None


def _asked(params: Callback) -> tuple[Any, ...]:
    """What a callback asks, without who asks and when."""
    match params:
        case ToolCall():
            return (params.name, params.args, params.kwargs)
        case SessionGet():
            return (params.name,)
        case SessionGetMany():
            return params.names
        case InstanceFetch():
            return (params.ref,)
        case _:
            return ()


def digest_of(method: str, params: Callback, buffers: Sequence[Buffer]) -> bytes:
    """The same for two callbacks that ask the same."""
    digest = hashlib.blake2b(_encode((method, _asked(params))), digest_size=16)
    for buffer in buffers:
        digest.update(len(buffer).to_bytes(8, "big"))
        digest.update(buffer)
    return digest.digest()


def shown(method: str, params: Callback, *, sealed: bool = False) -> str:
    """A callback as an error shows it. Of a command that has secrets (`sealed`) no argument is shown."""
    if isinstance(params, ToolCall) and sealed:
        text = f"tool {params.name}(…)"
    elif isinstance(params, ToolCall):
        given = [_encode(a).decode() for a in params.args]
        given += [f"{name}={_encode(value).decode()}" for name, value in params.kwargs.items()]
        text = f"tool {params.name}({', '.join(given)})"
    else:
        text = f"{method}({', '.join(map(str, _asked(params)))})"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


class Entry:
    """One callback. `reply` is None while its tool runs, or for ever if the host died meanwhile."""

    __slots__ = (
        "_digest",
        "_sealed",
        "buffers",
        "effect",
        "lost",
        "method",
        "n",
        "params",
        "reply",
        "seq",
        "versions",
        "waiting",
    )

    def __init__(
        self,
        n: int,
        seq: int | None,
        method: str,
        params: Callback,
        buffers: Sequence[Buffer],
        *,
        effect: bool,
        sealed: bool,
    ) -> None:
        self.n = n
        self.seq = seq
        self.method = method
        self.params = params
        self.buffers = buffers
        self.effect = effect  # a tool's, and not to happen twice
        self.reply: Recorded | None = None
        self.versions: dict[str, int] | None = None  # of the variables it read, if that is all that is known
        self.lost = False  # whether nobody runs its tool any more: it is to be run for whoever asks again
        self.waiting: list[Any] = []  # who is to be told the reply when it is there
        self._digest: bytes | None = None
        self._sealed = sealed

    @property
    def digest(self) -> bytes:
        if self._digest is None:
            self._digest = digest_of(self.method, self.params, self.buffers)
        return self._digest

    def __repr__(self) -> str:
        return shown(self.method, self.params, sealed=self._sealed)


class Journal:
    """Of one command, `sealed` if it has secrets. Belongs to one event loop."""

    def __init__(self, entries: Sequence[Entry] = (), *, sealed: bool = False) -> None:
        self._sealed = sealed
        self._entries: dict[int, Entry] = {entry.n: entry for entry in entries}
        self._next = max(self._entries, default=0) + 1
        self._own: dict[int, Entry] = {}
        self._free: defaultdict[bytes, deque[Entry]] = defaultdict(deque)
        self.replaying = False
        self.overflowed = False
        self.effects = any(entry.effect for entry in entries)
        """Whether anything happened that must not happen twice."""

    def __len__(self) -> int:
        return len(self._entries)

    def begin(self) -> None:
        """A new attempt: everything recorded is to be asked for again."""
        if not self._entries:
            return
        self._own = {entry.seq: entry for entry in self._entries.values() if entry.seq is not None}
        self._free = defaultdict(deque)
        for entry in self._entries.values():
            if entry.seq is None:
                self._free[entry.digest].append(entry)
        self.replaying = True

    def match(
        self, seq: int | None, method: str, params: Callback, buffers: Sequence[Buffer]
    ) -> tuple[Entry | None, tuple[int, ...]]:
        """The recorded callback that this one repeats, or None if it is new.

        The second member are the `n` of those that are now forgotten, because the command took another way where
        that did no harm.

        Raises:
            ReplayDiverged: the command takes another way although a tool's effect has happened on the first.
        """
        digest = digest_of(method, params, buffers)
        if seq is None:
            found = self._free.get(digest)
            return (found.popleft() if found else None), ()
        entry = self._own.pop(seq, None)
        if entry is None and not isinstance(params, ToolCall):
            return None, ()  # a reading that was not recorded: by itself it does no harm
        if entry is not None and entry.digest == digest:
            self.replaying = bool(self._own) or any(self._free.values())
            return entry, ()
        left = list(self._own.values()) + ([entry] if entry is not None else [])
        # Those behind were passed over without being asked for: a tool must not run before that is noticed.
        effect = next((other for other in left if other.effect and self._judged(other, seq, params)), None)
        if effect is not None:
            raise ReplayDiverged(
                f"the first time, callback {effect.seq} of the command was {effect!r}; when it ran again, callback "
                f"{seq} was {shown(method, params, sealed=self._sealed)}"
            )
        ahead = [other for other in left if other.seq is not None and other.seq >= seq]
        for other in ahead:
            self._own.pop(other.seq or 0, None)
            self._entries.pop(other.n, None)
        return None, tuple(sorted(other.n for other in ahead))

    @staticmethod
    def _judged(other: Entry, seq: int, params: Callback) -> bool:
        return other.seq is not None and (other.seq >= seq or isinstance(params, ToolCall))

    def record(
        self, seq: int | None, method: str, params: Callback, buffers: Sequence[Buffer], *, effect: bool = False
    ) -> Entry:
        """A new callback."""
        entry = Entry(self._next, seq, method, params, buffers, effect=effect, sealed=self._sealed)
        self._next += 1
        self.effects = self.effects or effect
        if len(self._entries) < MAX_CALLBACKS:
            self._entries[entry.n] = entry
        else:
            self.overflowed = True
        return entry

    @property
    def entries(self) -> list[Entry]:
        return list(self._entries.values())

    def check_complete(self) -> None:
        """Raise `ReplayDiverged` if a tool's effect has happened that the attempt which succeeded did not ask for."""
        if not self.replaying:
            return
        left = [entry for entry in self._own.values() if entry.effect]
        left += [entry for entries in self._free.values() for entry in entries if entry.effect]
        if left:
            raise ReplayDiverged(
                f"the first time, the command called {left[0]!r}; when it ran again, it ended without calling that"
            )
