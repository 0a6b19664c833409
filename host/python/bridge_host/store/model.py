"""What a session is made of and how it changes: values that `SessionState` takes and gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from ..values import Stored

if TYPE_CHECKING:
    from .facts import CallbackMade, CommandBegun, CommandEnded

__all__ = (
    "LM_KEY",
    "Change",
    "Commit",
    "Finished",
    "Quota",
    "SessionInfo",
    "Unfinished",
    "Variable",
    "Write",
    "check_name",
)

LM_KEY: Final = "lm.api_key"
"""The secret that holds the key of the session's language model."""


def check_name(kind: str, name: object) -> str:
    """A name that every host and kernel can write: a string, not empty, of real characters.

    Raises:
        TypeError, ValueError: it is none.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a {kind} is a string, not {name!r}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the name of a {kind} holds half a character: {name!r}") from None
    if not name:
        raise ValueError(f"the name of a {kind} is a string that is not empty")
    return name


class Quota(msgspec.Struct, frozen=True, kw_only=True):
    """How much one session may hold, and how many sessions a host may have."""

    count: int = 100_000
    """Variables, instances, functions and secrets of one session; and as many deleted variables, whose versions go on."""
    bytes: int = 1 << 30
    """What they take together, encoded: current values, not their history."""
    sessions: int = 1_000_000


class Variable(msgspec.Struct, frozen=True):
    """A value of a session's and how often it was written."""

    value: Stored
    version: int
    restores: int | None = None
    at: int = 0  # the session's version when it was written
    written: float = 0.0


class Write(NamedTuple):
    """What a commit does to one variable; no value deletes it. `if_version`: only if it is still at that one."""

    value: Stored | None
    if_version: int | None = None
    restores: int | None = None


class Commit(NamedTuple):
    """`number` is what the log calls it: to be waited for. `version` is the session's from now on, `versions` are
    those of the variables that were written.
    """

    number: int
    version: int
    versions: dict[str, int]


class Finished(NamedTuple):
    """What a command with an idempotency key was, and what came of it; not to be told before batch `number` is on disk
    (0: it is). `begun` has its request only if the command made an instance.
    """

    begun: CommandBegun
    ended: CommandEnded
    number: int

    @property
    def size(self) -> int:
        """Bytes of the result and of the request that is kept."""
        return len(self.ended.result or b"") + len(self.begun.request)


class Unfinished:
    """A command that the log knows to have begun and not to have ended, with what it had called back."""

    def __init__(self, begun: CommandBegun) -> None:
        self.begun = begun
        self.attempt = 1
        self.made: list[CallbackMade] = []
        self.answered: dict[int, bytes] = {}


class Change(msgspec.Struct, frozen=True):
    """What a watcher is told, after the commit: one variable's new version."""

    session: str
    name: str
    version: int
    stored: Stored | None
    stored_before: Stored | None

    @property
    def deleted(self) -> bool:
        return self.stored is None

    @property
    def value(self) -> Any:
        """The new value; None if the variable was deleted."""
        return None if self.stored is None else self.stored.read(self.name)

    @property
    def before(self) -> Any:
        """The value before; None if there was none."""
        return None if self.stored_before is None else self.stored_before.read(self.name)

    def __repr__(self) -> str:
        return f"<Change {self.name!r} to version {self.version}{' (deleted)' if self.deleted else ''}>"


class SessionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A session, described. Times in seconds since the epoch; `expires` is None without a time to live."""

    id: str
    version: int
    created: float
    used: float
    ttl: float | None
    expires: float | None
    variables: int
    instances: int
    functions: int
    tools: int
    secrets: int
    bytes: int
