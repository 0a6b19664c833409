"""Classes whose rebuilt objects a kernel may keep, if it is told to: what of them no state says must never last."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT = 3


class Keeper:
    """Its state says `value` and nothing of what else it does to itself, to its class and to what it holds."""

    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.hidden: list[int] = []
        self.nested: dict[str, list[int]] = {"seen": self.hidden}
        self.itself = self

    def bridge_state(self) -> dict[str, Any]:
        return {"value": self.value}

    @classmethod
    def from_bridge_state(cls, state: dict[str, Any]) -> Keeper:
        return cls(state["value"])

    def look(self) -> list[Any]:
        """What it is, then changed where no state shows it."""
        seen = list(self.nested["seen"])
        self.hidden.append(len(seen))
        self.extra = getattr(self, "extra", 0) + 1
        return [self.value, seen, self.itself is self and self.nested["seen"] is self.hidden]

    def wait(self, ctx: Any) -> list[int]:
        self.hidden.append(1)
        ctx.call_tool("gate")
        return [id(self), len(self.hidden)]

    def add(self, amount: int) -> int:
        self.value += amount
        return self.value


class Locked(Keeper):
    """Cannot be pickled."""

    def __init__(self, value: int = 0) -> None:
        super().__init__(value)
        self.lock = threading.Lock()


class Bound(Keeper):
    """Holds a function that looks at its module: a copy of it would look at a copy."""

    def __init__(self, value: int = 0) -> None:
        super().__init__(value)
        self.limit: Callable[[], int] = lambda: LIMIT

    def limit_now(self) -> int:
        return self.limit()


class Nameless(Keeper):
    """Holds an object of a class that no name leads to: a copy would be of another class."""

    def __init__(self, value: int = 0) -> None:
        super().__init__(value)
        self.of = _LOCAL()

    def is_ours(self) -> bool:
        return isinstance(self.of, _LOCAL)


class Argued:
    """Holds what it was made with, whatever that is, and says nothing of it."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def bridge_state(self) -> None:
        return None

    @classmethod
    def from_bridge_state(cls, state: Any) -> Argued:
        return cls(state)

    def describe(self) -> str:
        return type(self.value).__name__


def _local() -> type:
    class Local:
        pass

    return Local


_LOCAL = _local()
