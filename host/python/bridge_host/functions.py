"""Functions of a session: Python source that the session owns and kernels run."""

from __future__ import annotations

import ast
import builtins
import hashlib
import inspect
import textwrap
from typing import TYPE_CHECKING, Any

import msgspec

from bridge_kernel.contract.methods import SourceFunction

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("FunctionSource", "source_of")


class FunctionSource(msgspec.Struct, frozen=True):
    """A function as the session owns it. It runs in a fresh namespace: what it needs it imports itself."""

    name: str
    source: str
    hash: str
    lm: bool = False
    """Whether it is run with the session's language model."""

    @classmethod
    def make(cls, name: str, source: str, *, lm: bool = False) -> FunctionSource:
        return cls(name, source, hashlib.sha256(source.encode()).hexdigest(), lm)

    def ref(self, *, with_source: bool) -> SourceFunction:
        return SourceFunction(self.name, self.hash, self.source if with_source else None)


def source_of(name: str, what: str | Callable[..., Any], *, lm: bool = False) -> FunctionSource:
    """The source of `what`, a function or the text of one, as a function called `name`.

    Raises:
        ValueError: the text does not define `name` or does not compile, or the function uses what does not
            travel with it: a variable of an enclosing function, or a global of its module. Said at once,
            for in the kernel it would be a NameError.
    """
    if isinstance(what, str):
        source = textwrap.dedent(what).strip() + "\n"
        _check_defines(name, source)
        return FunctionSource.make(name, source, lm=lm)
    function = inspect.unwrap(what)
    if not inspect.isfunction(function) or function.__name__ == "<lambda>":
        raise ValueError(
            f"{what!r} has no source that can be sent: give a function made with def, or its text, or call it by its "
            'dotted name, e.g. session.call("math.hypot", 3, 4)'
        )
    _check_closed(name, function)
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError) as exc:
        raise ValueError(f"the source of {name!r} cannot be found ({exc}): give its text instead") from exc
    tree = ast.parse(text)
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
    definition.decorator_list.clear()  # @session.function itself, and what is the host's business
    definition.name = name
    return FunctionSource.make(name, ast.unparse(definition) + "\n", lm=lm)


def _check_defines(name: str, source: str) -> None:
    try:
        tree = ast.parse(source)
    except SyntaxError as exc:
        raise ValueError(f"the source of {name!r} does not compile: {exc}") from exc
    defined = {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    if name not in defined:
        found = ", ".join(sorted(defined)) or "nothing"
        raise ValueError(f"the source defines {found}, not {name!r}")


def _check_closed(name: str, function: Callable[..., Any]) -> None:
    outside = inspect.getclosurevars(function)
    used = {**outside.nonlocals, **outside.globals}
    used = {key: value for key, value in used.items() if not hasattr(builtins, key) and key != function.__name__}
    if used:
        modules = [key for key, value in used.items() if inspect.ismodule(value)]
        hint = f"import {', '.join(modules)} inside it" if modules else "pass it as an argument, or import it inside"
        raise ValueError(
            f"function {name!r} uses {', '.join(sorted(used))} from outside itself, which does not travel with it: {hint}"
        )
