"""Classes that the tests' kernels import: one for each way in which an object's state can be kept."""

from __future__ import annotations

import threading
from typing import Any


class Account:
    """Kept as a pickle: it says nothing of its state itself."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.balance = 0

    def deposit(self, session_context: Any, amount: int) -> int:
        session_context.call_tool("meet")
        self.balance += amount
        return self.balance

    async def deposit_later(self, ctx: Any, amount: int) -> int:
        self.balance += amount
        await ctx.set_variable("deposited", amount)
        return self.balance

    def look(self) -> tuple[str, int]:
        return self.owner, self.balance


class Diary:
    """Kept by its own two methods, as data that the host can read."""

    def __init__(self) -> None:
        self.pages: list[str] = []

    def bridge_state(self) -> dict[str, Any]:
        return {"pages": list(self.pages)}

    @classmethod
    def from_bridge_state(cls, state: dict[str, Any]) -> Diary:
        diary = cls()
        diary.pages = state["pages"]
        return diary

    def write(self, page: str) -> int:
        self.pages.append(page)
        return len(self.pages)


class Locked:
    """Kept as its recipe alone: a lock cannot be pickled."""

    def __init__(self, start: int = 0) -> None:
        self.lock = threading.Lock()
        self.count = start

    def more(self) -> int:
        self.count += 1
        return self.count
