"""Functions of a session: Python source that the session owns and kernels run."""

from __future__ import annotations

import ast
import builtins
import copy
import hashlib
import inspect
import symtable
import textwrap
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bridge_kernel.contract.methods import SourceFunction

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("FunctionSource", "source_of")

_MODULE_NAMES: Final = {"__name__", "__file__", "__builtins__"}


class FunctionSource(msgspec.Struct, frozen=True):
    """A function as the session owns it. It runs in a fresh namespace: what it needs it imports itself."""

    name: str
    source: str
    hash: str
    lm: bool = False
    """Whether it is run with the session's language model."""
    secrets: tuple[str, ...] = ()
    """The session's secrets that it is run with."""
    cache: float | None = None
    """Seconds that a result may be given again."""

    @classmethod
    def make(
        cls, name: str, source: str, *, lm: bool = False, secrets: tuple[str, ...] = (), cache: float | None = None
    ) -> FunctionSource:
        return cls(name, source, hashlib.sha256(source.encode()).hexdigest(), lm, secrets, cache)

    def ref(self, *, with_source: bool) -> SourceFunction:
        return SourceFunction(self.name, self.hash, self.source if with_source else None)


def source_of(
    name: str,
    what: str | Callable[..., Any],
    *,
    lm: bool = False,
    secrets: tuple[str, ...] = (),
    cache: float | None = None,
) -> FunctionSource:
    """The source of `what`, a function or the text of one, as a function called `name`.

    Raises:
        ValueError: the text does not compile or does not define `name`, or uses a name that does not travel
            with it (a variable of an enclosing function, a global of its module). Said at once, for in the
            kernel it would be a NameError.
    """
    tree = _parse(name, textwrap.dedent(what)) if isinstance(what, str) else _definition_of(name, what)
    defined = [
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    if name not in defined:
        raise ValueError(f"the source defines {', '.join(defined) or 'nothing'}, not {name!r}")
    if missing := _names_from_outside(tree):
        raise ValueError(
            f"function {name!r} uses {', '.join(missing)} from outside itself, which does not travel with it: "
            "import it inside, pass it as an argument, or give the text of both: session.function(name, source)"
        )
    text = textwrap.dedent(what).strip() if isinstance(what, str) else ast.unparse(tree)
    return FunctionSource.make(name, text + "\n", lm=lm, secrets=secrets, cache=cache)


def _parse(name: str, text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError as exc:
        raise ValueError(f"the source of {name!r} does not compile: {exc}") from exc


def _definition_of(name: str, function: Callable[..., Any]) -> ast.Module:
    function = inspect.unwrap(function)
    if not inspect.isfunction(function) or function.__name__ == "<lambda>":
        raise ValueError(
            f"{function!r} has no source that can be sent: give a function made with def, or its text, or call it by "
            'its dotted name, e.g. session.call("math.hypot", 3, 4)'
        )
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as exc:
        raise ValueError(f"the source of {name!r} cannot be found ({exc}): give its text instead") from exc
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
    definition.decorator_list.clear()  # @session.function itself, and what is the host's business
    definition.name = name
    return tree


class _WithoutAnnotations(ast.NodeTransformer):
    """In the kernel annotations stay strings: what they name need not be there."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)


def _names_from_outside(tree: ast.Module) -> list[str]:
    """The names that the source reads and neither makes nor finds among the builtins."""
    bare = ast.fix_missing_locations(_WithoutAnnotations().visit(copy.deepcopy(tree)))
    top = symtable.symtable(ast.unparse(bare), "<function>", "exec")
    made = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    read: set[str] = set()
    tables = [top]
    while tables:
        table = tables.pop()
        tables.extend(table.get_children())
        outer = table is top
        read |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (outer or s.is_global())}
        made |= {s.get_name() for s in table.get_symbols() if s.is_declared_global() and s.is_assigned()}
    return sorted(name for name in read - made if not hasattr(builtins, name) and name not in _MODULE_NAMES)
