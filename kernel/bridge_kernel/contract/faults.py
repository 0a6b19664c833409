"""An error on its way up through a value: it gathers the path, and becomes a `BridgeError` at the root.

Containers add a step while the exception unwinds, so that a value without errors pays nothing for its path.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .errors import BridgeError, LimitExceeded, MalformedValue, NotSerializable

__all__ = ("Fault", "key_step", "malformed", "member", "too_much", "unserializable")

_MAX_STEP = 60  # characters of a key in a path: enough to find it by


class Fault(Exception):
    """What is wrong, and the steps from the value it is wrong with up to the root, innermost first."""

    def __init__(self, error: type[BridgeError], message: str, remedy: str) -> None:
        super().__init__(message)
        self.error = error
        self.message = message
        self.remedy = remedy
        self.steps: list[str] = []

    def at(self, step: str) -> Fault:
        """This fault, one step further up."""
        self.steps.append(step)
        return self

    def raised(self, root: str) -> BridgeError:
        """The error to raise: its message begins with the path, e.g. `result["rows"][3].handle: …`."""
        return self.error(f"{root}{''.join(reversed(self.steps))}: {self.message}", remedy=self.remedy)


def unserializable(message: str, remedy: str) -> Fault:
    return Fault(NotSerializable, message, remedy)


def malformed(message: str, remedy: str = "") -> Fault:
    return Fault(MalformedValue, message, remedy)


def too_much(message: str, remedy: str = "") -> Fault:
    return Fault(LimitExceeded, message, remedy)


def key_step(key: object) -> str:
    """The step into a mapping: `["rows"]`, `[3]`, or `[<Point>]` for a key that is no plain scalar."""
    if type(key) is str:
        clipped = key if len(key) <= _MAX_STEP else f"{key[:_MAX_STEP]}…"
        return f"[{msgspec.json.encode(clipped.encode(errors='replace').decode()).decode()}]"
    if key is None or type(key) in (bool, float) or (type(key) is int and key.bit_length() <= 64):
        return f"[{key}]"
    return f"[<{type(key).__name__}>]"


def member(tree: dict[str, Any], name: str, kind: type) -> Any:
    """`tree[name]`, which must be exactly a `kind`."""
    found = tree[name]
    if type(found) is not kind:
        raise malformed(f'"{name}" of a "{tree["$bridge"]}" must be {_JSON_NAMES[kind]}, not {type(found).__name__}')
    return found


_JSON_NAMES: dict[type, str] = {str: "a string", int: "an integer", float: "a float", list: "a list", dict: "an object"}
