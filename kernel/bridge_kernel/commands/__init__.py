"""The commands of the contract, one file a family. `HANDLERS` is the table that the lane dispatches by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from . import functions, instances, introspection, kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from ..command import Answer, RunningCommand

__all__ = ("HANDLERS", "subject")

HANDLERS: Final[dict[str, Callable[[RunningCommand, Any], Answer | Coroutine[Any, Any, Answer]]]] = {
    "function.call": functions.call,
    "function.stream": functions.stream,
    "instance.create": instances.create,
    "instance.call": instances.call,
    "object.inspect": introspection.inspect_object,
    "kernel.stats": kernel.stats,
    "rpc.discover": kernel.discover,
}
"""Run on a worker thread. `kernel.ping` and `kernel.drain` are not here: the lane itself answers them, however busy."""


def subject(method: str, params: Any) -> str:
    """What people call a command: the function or method that it runs, else its own name."""
    if method in ("function.call", "function.stream"):
        return functions.name_of(params.function)
    if method == "instance.call":
        return f"{params.record.cls}.{params.method}"
    if method == "instance.create":
        return f"{params.record.cls}()"
    return method
