"""Sessions: what a host owns on behalf of its users. In memory; a kernel never holds any of it."""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING, Any

import msgspec

from bridge_kernel.contract.errors import Conflict, NotFound
from bridge_kernel.contract.methods import VariableInfo

from .values import Stored

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bridge_kernel.contract.methods import LM

    from .functions import FunctionSource
    from .tools import Tool

__all__ = ("InstanceState", "MemoryStore", "SessionState", "Variable", "check_name")


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


class Variable(msgspec.Struct, frozen=True):
    """A value of a session's and how often it was written."""

    value: Stored
    version: int


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

    @property
    def size(self) -> int:
        """Bytes of recipe and state."""
        return self.args.size + self.kwargs.size + self.state.size


class SessionState:
    """One session. Each method is atomic; any thread may call it."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.tools: dict[str, Tool] = {}
        self.functions: dict[str, FunctionSource] = {}
        self.instances: dict[str, InstanceState] = {}
        self.lm: LM | None = None
        self.deleted = False
        self._variables: dict[str, Variable] = {}
        self._lock = threading.Lock()

    def require(self) -> None:
        """Raise `NotFound` if the session was deleted: what it took would be nobody's."""
        if self.deleted:
            raise NotFound(f"session {self.id!r} was deleted", remedy="Open it anew: host.session(id).")

    def clear(self) -> None:
        """Let go of all it owns."""
        with self._lock:
            self.deleted = True
            for owned in (self._variables, self.tools, self.functions, self.instances):
                owned.clear()
            self.lm = None

    # -- variables ---------------------------------------------------------------

    def get(self, name: str) -> Variable:
        """Raises `NotFound`, naming what there is."""
        try:
            return self._variables[name]
        except KeyError:
            raise self._missing("variable", name, self._variables) from None

    def get_many(self, names: tuple[str, ...]) -> dict[str, Variable]:
        """Those that exist."""
        with self._lock:
            return {name: self._variables[name] for name in names if name in self._variables}

    def set(self, name: str, value: Stored) -> int:
        """Write a variable; returns its version, 1 for the first. Raises `NotFound` if the session was deleted."""
        check_name("variable", name)
        with self._lock:
            self.require()
            known = self._variables.get(name)
            version = known.version + 1 if known else 1
            self._variables[name] = Variable(value, version)
            return version

    def delete(self, name: str) -> None:
        """Raises `NotFound`."""
        with self._lock:
            if self._variables.pop(name, None) is None:
                raise self._missing("variable", name, self._variables)

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._variables)

    def describe(self) -> tuple[VariableInfo, ...]:
        """Name, version, type and size of every variable, by name."""
        with self._lock:
            variables = sorted(self._variables.items())
        return tuple(VariableInfo(name, v.version, v.value.type, v.value.size) for name, v in variables)

    # -- tools, functions, instances ----------------------------------------------

    def tool(self, name: str) -> Tool:
        try:
            return self.tools[name]
        except KeyError:
            raise self._missing("tool", name, self.tools) from None

    def instance(self, ref: str) -> InstanceState:
        try:
            return self.instances[ref]
        except KeyError:
            raise self._missing("instance", ref, self.instances) from None

    def change_instance(self, ref: str, read: int, adapter: str, state: Stored, sha256: str | None) -> int:
        """Commit a new state that was computed from version `read`; returns the new version.

        Raises:
            Conflict: another change was committed since; nothing is kept of this one.
            NotFound: the instance was released meanwhile.
        """
        with self._lock:
            known = self.instance(ref)
            if known.version != read:
                raise Conflict(
                    f"{known.cls} {ref} was changed by another call (version {read} → {known.version}) while this one ran"
                )
            self.instances[ref] = msgspec.structs.replace(
                known, adapter=adapter, state=state, sha256=sha256, version=read + 1
            )
            return read + 1

    def _missing(self, kind: str, name: str, known: dict[str, Any]) -> NotFound:
        there = ", ".join(sorted(known)[:20]) or "none"
        return NotFound(f"session {self.id!r} has no {kind} {name!r}", remedy=f"There is: {there}.")


class MemoryStore:
    """The sessions of one host, in this process. Thread-safe."""

    def __init__(self) -> None:
        self._sessions: dict[str, SessionState] = {}
        self._lock = threading.Lock()

    def open(self, id: str | None = None) -> SessionState:
        """The session of that id, made if there is none; a new one if no id is given."""
        id = check_name("session", id) if id is not None else f"session-{uuid.uuid4().hex[:12]}"
        with self._lock:
            return self._sessions.setdefault(id, SessionState(id))

    def delete(self, id: str) -> None:
        """Forget a session and all it owns. Raises `NotFound`."""
        with self._lock:
            state = self._sessions.pop(id, None)
        if state is None:
            raise NotFound(f"there is no session {id!r}")
        state.clear()

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(sorted(self._sessions))

    def __len__(self) -> int:
        return len(self._sessions)
