"""What the sessions of the chaos test ask of their kernels. `biz` names one order of business; a tool's reply is its receipt."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator


def _finish(ctx: Any, biz: str) -> None:
    ctx["done"] = ctx["done"] + 1
    ctx["last"] = biz


def order(ctx: Any, biz: str) -> list[str]:
    receipts = [ctx.call_tool("pay", biz=biz, part="pay"), ctx.call_tool("ship", biz=biz, part="ship")]
    _finish(ctx, biz)
    return receipts


async def gather(ctx: Any, biz: str) -> list[str]:
    """Tools called from tasks, in no order; and a variable that comes and goes."""
    calls = [ctx.call_tool(("pay", "ship")[i % 2], biz=biz, part=f"part-{i}") for i in range(3)]
    receipts = await asyncio.gather(*calls)
    if await ctx.get_variables("fleeting"):
        await ctx.delete_variable("fleeting")
    else:
        await ctx.set_variable("fleeting", biz)
    await ctx.set_variable("done", await ctx.get_variable("done") + 1)
    await ctx.set_variable("last", biz)
    return list(receipts)


def stream(ctx: Any, biz: str, count: int) -> Generator[int, None, list[str]]:
    receipt = ""
    for i in range(count):
        yield i
        if i == count // 2:
            receipt = ctx.call_tool("pay", biz=biz, part="pay")
    _finish(ctx, biz)
    return [receipt]


def nested(ctx: Any, biz: str) -> list[str]:
    receipts: list[str] = ctx.call_tool("nested", biz=biz)
    _finish(ctx, biz)
    return receipts


def inner(ctx: Any, biz: str) -> list[str]:
    receipt = ctx.call_tool("pay", biz=biz, part="inner")
    ctx["inners"] = ctx["inners"] + 1
    return [receipt]


def look(ctx: Any) -> int:
    """Neither writes nor calls."""
    found: int = ctx["note"]
    return found


class Wallet:
    """Its state is how often it was paid into."""

    def __init__(self) -> None:
        self.balance = 0

    def bridge_state(self) -> dict[str, Any]:
        return {"balance": self.balance}

    @classmethod
    def from_bridge_state(cls, state: dict[str, Any]) -> Wallet:
        wallet = cls()
        wallet.balance = state["balance"]
        return wallet

    def deposit(self, ctx: Any, biz: str) -> list[str]:
        receipt = ctx.call_tool("pay", biz=biz, part="pay")
        self.balance += 1
        _finish(ctx, biz)
        return [receipt]
