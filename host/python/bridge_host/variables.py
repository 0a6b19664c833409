"""`Variables`: a session's variables as people look at them, with their types, versions and history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from bridge_kernel.contract.errors import MalformedValue, NotFound

from .display import Shown
from .store import Write
from .values import store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bridge_kernel.contract.values import Tag

    from .store import SessionState
    from .store.facts import VariablePut

__all__ = ("Snapshot", "Variable", "Variables", "Version")

SHOWN: Final = 60  # characters of a value in a table


class Access(NamedTuple):
    """A session as its views reach it: what it owns, what a ref becomes, how a commit is waited for."""

    state: SessionState
    arrive: Callable[[Tag], object]
    wait: Callable[[int], None]


class Version:
    """One version of a variable. `at` is the session's version, `written` in seconds since the epoch."""

    def __init__(self, put: VariablePut, arrive: Callable[[Tag], object]) -> None:
        self._put = put
        self._arrive = arrive
        self.version = put.version
        self.at = put.at
        self.written = put.written
        self.restores = put.restores
        """The version whose value this one brought back, None if it was written anew."""

    @property
    def deleted(self) -> bool:
        return self._put.value is None

    @property
    def value(self) -> Any:
        """Raises `NotFound` for the version that deleted it."""
        if self._put.value is None:
            raise NotFound(f"version {self.version} of {self._put.name!r} deleted it", remedy="Look at an earlier one.")
        return self._put.value.read(self._put.name, self._arrive)

    def __repr__(self) -> str:
        shown = "deleted" if self.deleted else _shown(self.value)
        again = f", as version {self.restores}" if self.restores is not None else ""
        return f"<Version {self.version} of {self._put.name!r}: {shown}{again}>"


class Variable:
    """One variable: `session.variables["x"]`. To read and to write its value, `session["x"]` is enough."""

    def __init__(self, access: Access, name: str) -> None:
        self._access = access
        self.name = name

    @property
    def value(self) -> Any:
        return self._access.state.get(self.name).value.read(self.name, self._access.arrive)

    @property
    def version(self) -> int:
        return self._access.state.get(self.name).version

    @property
    def type(self) -> str:
        """The name of its value's type."""
        return self._access.state.get(self.name).value.type

    @property
    def size(self) -> int:
        """Bytes of its value, encoded."""
        return self._access.state.get(self.name).value.size

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON Schema that it was defined with, None if any value will do."""
        kind = self._access.state.types.get(self.name)
        return None if kind is None else dict(kind.schema)

    def set(self, value: Any, *, if_version: int | None = None) -> int:
        """Write it; returns its version. Raises `Conflict` unless it is at `if_version` (0: not there), `InvalidValue`."""
        state = self._access.state
        commit = state.set(self.name, store(value, self.name), if_version)
        self._access.wait(commit.number)
        return commit.versions[self.name]

    def history(self) -> list[Version]:
        """Its versions, oldest first: the last 100, as far as those before the newest fit into 16 MiB."""
        return [Version(put, self._access.arrive) for put in self._access.state.history(self.name)]

    def revert(self, version: int) -> int:
        """Bring an earlier version back, as a new one; returns that one's number. Raises `NotFound` if it is not kept."""
        state = self._access.state
        found = next((put for put in state.history(self.name) if put.version == version), None)
        if found is None:
            raise NotFound(f"version {version} of {self.name!r} is not kept", remedy="See .history().")
        commit = state.commit({self.name: Write(found.value, None, found.restores or found.version)})
        self._access.wait(commit.number)
        return commit.versions[self.name]

    def undo(self) -> int:
        """Bring back what was there before the last change; again, what was there before that. Returns the new version.

        Raises:
            NotFound: nothing is kept from before.
        """
        versions = self._access.state.history(self.name)
        origin = versions[-1].restores or versions[-1].version
        # What an undo brought back has in front of it what it had the first time; anything else, whatever was there.
        before = next((put for put in versions if put.version == origin - 1), None)
        if before is None:
            raise NotFound(f"there is nothing before version {origin} of {self.name!r}", remedy="See .history().")
        return self.revert(before.version)

    def __repr__(self) -> str:
        known = self._access.state.get(self.name)
        return f"<Variable {self.name!r} = {_shown(self.value)} ({known.value.type}, version {known.version})>"


class Variables(Shown, Mapping[str, Variable]):
    """`session.variables`: by name, as a table to look at."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def __getitem__(self, name: str) -> Variable:
        """A variable, deleted ones included as long as their history is kept. Raises `NotFound`."""
        if self._access.state.version_of(name) == 0:
            self._access.state.get(name)
        return Variable(self._access, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._access.state.names())

    def __len__(self) -> int:
        return len(self._access.state.names())

    def __contains__(self, name: object) -> bool:
        return name in self._access.state.names()

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        rows = []
        for info in self._access.state.variables():
            try:
                shown = _shown(self[info.name].value)
            except MalformedValue:
                shown = "(damaged)"
            rows.append([info.name, info.type, shown, str(info.version), f"{info.size:,}"])
        return ["variable", "type", "value", "version", "bytes"], rows


class Snapshot(Mapping[str, Any]):
    """`session.at(version)`: what the variables were after that commit. Read only."""

    def __init__(self, version: int, puts: dict[str, VariablePut], arrive: Callable[[Tag], object]) -> None:
        self.version = version
        self._puts = puts
        self._arrive = arrive

    def __getitem__(self, name: str) -> Any:
        put = self._puts.get(name)
        if put is None or put.value is None:
            raise NotFound(f"there was no variable {name!r} at version {self.version}")
        return put.value.read(name, self._arrive)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._puts))

    def __len__(self) -> int:
        return len(self._puts)

    def __repr__(self) -> str:
        return f"<Snapshot of version {self.version}: {', '.join(f'{name}={_shown(self[name])}' for name in self)}>"


def _shown(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of more digits than Python writes
        text = f"<{type(value).__name__}>"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
