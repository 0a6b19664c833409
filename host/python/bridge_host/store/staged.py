"""`Staged`: what one attempt at a command has written, seen by that command alone until it succeeds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge_kernel.contract.errors import Conflict, NotFound
from bridge_kernel.contract.methods import VariableInfo

from .model import Variable, Write, check_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..values import Stored
    from .state import SessionState

__all__ = ("Staged",)


class Staged:
    """A view of a session with this attempt's own writes over it. Belongs to one event loop."""

    def __init__(self, state: SessionState) -> None:
        self._state = state
        self._versions: dict[str, int] = {}
        self._growth: dict[str, tuple[int, int, int]] = {}  # by each write: things, bytes, names never used
        self._total = (0, 0, 0)
        self.writes: dict[str, Write] = {}
        self.asked = False
        """Whether the command asked for a write, be it one that was refused: what it does may depend on that."""

    def get(self, name: str) -> Variable:
        """Raises `NotFound`."""
        write = self.writes.get(name)
        if write is None:
            return self._state.get(name)
        if write.value is None:
            raise NotFound(f"variable {name!r} was deleted by this command")
        return Variable(write.value, self._versions[name])

    def get_many(self, names: Sequence[str]) -> dict[str, Variable]:
        """Those that exist."""
        found = self._state.get_many([name for name in names if name not in self.writes])
        own = {n: self.get(n) for n in names if (w := self.writes.get(n)) is not None and w.value is not None}
        return {name: v for name in names if (v := own.get(name) or found.get(name)) is not None}

    def variables(self) -> tuple[VariableInfo, ...]:
        there = {info.name: info for info in self._state.variables() if info.name not in self.writes}
        for name, write in self.writes.items():
            if write.value is not None:
                there[name] = VariableInfo(name, self._versions[name], write.value.type, write.value.size)
        return tuple(info for _, info in sorted(there.items()))

    def set(self, name: str, value: Stored, if_version: int | None = None) -> int:
        """The version that it becomes if nobody else writes it first.

        Raises:
            InvalidValue, QuotaExceeded, Conflict: at once, and again at the commit for what changed meanwhile.
        """
        self.asked = True
        check_name("variable", name)
        self._state.check(name, value)
        growth = self._growth_by(name, value)
        more, size, new = self._total_with(name, growth)
        self._state.check_quota(more, size, new=new)
        return self._stage(name, value, if_version)

    def _growth_by(self, name: str, value: Stored | None) -> tuple[int, int, int]:
        version = self._state.version_of(name)
        known = self._state.get_many([name]).get(name)
        more = (value is not None) - (known is not None)
        size = (value.size if value is not None else 0) - (known.value.size if known is not None else 0)
        return more, size, int(value is not None and not version)

    def _total_with(self, name: str, growth: tuple[int, int, int]) -> tuple[int, int, int]:
        """What all writes together add, this one's in place of an earlier one of the same name."""
        earlier = self._growth.get(name, (0, 0, 0))
        more, size, new = (t + g - e for t, g, e in zip(self._total, growth, earlier, strict=True))
        return more, size, new

    def delete(self, name: str, if_version: int | None = None) -> None:
        """Raises `NotFound`, `Conflict`."""
        self.asked = True
        self.get(name)
        self._stage(name, None, if_version)

    def _stage(self, name: str, value: Stored | None, if_version: int | None) -> int:
        earlier = self.writes.get(name)
        if earlier is None:
            self._state.check_version(name, if_version)
            self._versions[name] = self._state.version_of(name) + 1
            self.writes[name] = Write(value, if_version)
        else:
            at = self._versions[name] if earlier.value is not None else 0
            if if_version is not None and if_version != at:
                raise Conflict(f"this command itself has written variable {name!r}: it is at version {at}")
            self.writes[name] = Write(value, earlier.if_version)
        growth = self._growth_by(name, value)
        self._total = self._total_with(name, growth)
        self._growth[name] = growth
        return self._versions[name]
