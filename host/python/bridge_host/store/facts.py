"""What a store records: facts, each about one thing a session owns. A batch of them is one atomic commit.

Memory is made from them when a host opens, and a log keeps them. They are data: a log in another language can keep the same.
"""

from __future__ import annotations

import msgspec

from bridge_kernel.contract.methods import LM

from ..functions import FunctionSource
from ..values import Stored

__all__ = (
    "CallbackAnswered",
    "CallbackMade",
    "CallbacksForgotten",
    "CommandBegun",
    "CommandEnded",
    "CommandForgotten",
    "CommandTried",
    "Fact",
    "FunctionPut",
    "InstanceForgotten",
    "InstancePut",
    "InstanceState",
    "SecretForgotten",
    "SecretPut",
    "SessionForgotten",
    "SessionPut",
    "TypePut",
    "VariablePut",
)


class InstanceState(msgspec.Struct, frozen=True, kw_only=True):
    """An object as the host owns it: its recipe, and its state after `version` changes."""

    ref: str
    cls: str
    args: Stored
    kwargs: Stored
    adapter: str
    state: Stored
    sha256: str | None
    methods: tuple[str, ...]
    version: int = 1
    name: str = ""
    cache: float | None = None  # seconds that a call's result may be given again

    @property
    def size(self) -> int:
        """Bytes of recipe and state."""
        return self.args.size + self.kwargs.size + self.state.size


class SessionPut(msgspec.Struct, frozen=True):
    """A session was made, or its own record changed. `created` and `used` in seconds since the epoch, `ttl` in seconds."""

    id: str
    created: float
    used: float
    ttl: float | None
    version: int  # how many commits there were
    lm: LM | None  # without its key, which is a secret


class SessionForgotten(msgspec.Struct, frozen=True):
    """A session and everything that it owned is gone, its journal included."""

    id: str


class VariablePut(msgspec.Struct, frozen=True):
    """One version of a variable; no `value` says that it was deleted. `at` is the session's version."""

    session: str
    name: str
    version: int
    at: int
    value: Stored | None
    written: float
    restores: int | None = None  # the version whose value this one brought back


class TypePut(msgspec.Struct, frozen=True):
    """A variable's type as JSON Schema; None takes it away."""

    session: str
    name: str
    schema: bytes | None


class InstancePut(msgspec.Struct, frozen=True):
    session: str
    instance: InstanceState


class InstanceForgotten(msgspec.Struct, frozen=True):
    session: str
    ref: str


class FunctionPut(msgspec.Struct, frozen=True):
    session: str
    function: FunctionSource


class SecretPut(msgspec.Struct, frozen=True):
    """A secret, sealed."""

    session: str
    name: str
    sealed: bytes


class SecretForgotten(msgspec.Struct, frozen=True):
    session: str
    name: str


class CommandBegun(msgspec.Struct, frozen=True):
    """A command was taken. `request` is what it takes to run it again, sealed if it carries secrets."""

    id: str
    session: str
    method: str
    subject: str
    key: str | None  # its idempotency key
    digest: bytes  # of the request: the same key with another request is a mistake
    request: bytes
    sealed: bool
    began: float


class CommandTried(msgspec.Struct, frozen=True):
    """An attempt after the first has begun."""

    id: str
    attempt: int


class CallbackMade(msgspec.Struct, frozen=True):
    """The `n`th callback that a command made, in the order in which they came."""

    command: str
    n: int
    seq: int | None  # its place in the command's own flow
    method: str
    about: str
    digest: bytes
    request: bytes


class CallbackAnswered(msgspec.Struct, frozen=True):
    """The reply to it."""

    command: str
    n: int
    reply: bytes


class CallbacksForgotten(msgspec.Struct, frozen=True):
    """The command took another way, on which it did not make these callbacks: just these are forgotten."""

    command: str
    numbers: tuple[int, ...]


class CommandEnded(msgspec.Struct, frozen=True):
    """A command was answered: its callbacks are forgotten, `result` is kept if it has a key."""

    id: str
    error: str | None
    result: bytes | None
    ended: float
    attempts: int
    callbacks: int


class CommandForgotten(msgspec.Struct, frozen=True):
    """A command's record is gone: dropped while it was unfinished, or its key has expired."""

    id: str


Fact = (
    SessionPut
    | SessionForgotten
    | VariablePut
    | TypePut
    | InstancePut
    | InstanceForgotten
    | FunctionPut
    | SecretPut
    | SecretForgotten
    | CommandBegun
    | CommandTried
    | CallbackMade
    | CallbackAnswered
    | CallbacksForgotten
    | CommandEnded
    | CommandForgotten
)
