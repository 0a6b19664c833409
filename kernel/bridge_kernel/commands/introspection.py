"""`object.inspect`: a function, class, module or instance, described as data that a host can show or write code from."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..command import Answer
from ..contract.errors import InvalidParams
from ..contract.methods import Inspected, Member, Parameter
from ..resolve import resolve
from ..state import rebuild
from .functions import find

if TYPE_CHECKING:
    from ..command import RunningCommand
    from ..contract.methods import ObjectInspect

__all__ = ("describe", "inspect_object")

MAX_MEMBERS = 500
_KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: "positional_only",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional_or_keyword",
    inspect.Parameter.VAR_POSITIONAL: "var_positional",
    inspect.Parameter.KEYWORD_ONLY: "keyword_only",
    inspect.Parameter.VAR_KEYWORD: "var_keyword",
}


def inspect_object(command: RunningCommand, params: ObjectInspect) -> Answer:
    given = [x for x in (params.path, params.function, params.record) if x is not None]
    if len(given) != 1:
        raise InvalidParams("object.inspect takes exactly one of path, function and record")
    if params.path is not None:
        return Answer(describe(resolve(params.path, command.runtime.policy), params.path))
    if params.function is not None:
        return Answer(describe(find(command, params.function), params.function.name))
    assert params.record is not None
    return Answer(describe(rebuild(command, params.record, command.buffers), params.record.cls))


def describe(obj: Any, name: str) -> Inspected:
    """What there is to know about an object without calling it."""
    signature, parameters, returns = _signature(obj)
    return Inspected(
        name=name,
        kind=_kind(obj),
        module=getattr(obj, "__module__", None) or getattr(type(obj), "__module__", "") or "",
        signature=signature,
        parameters=parameters,
        returns=returns,
        doc=inspect.getdoc(obj) or "",
        members=_members(obj),
        source_file=_source_file(obj),
    )


def _kind(obj: Any) -> Any:
    if inspect.isclass(obj):
        return "class"
    if isinstance(obj, ModuleType):
        return "module"
    if inspect.isroutine(obj):
        return "function"
    return "value" if isinstance(obj, str | bytes | int | float | bool | list | dict | tuple | None) else "instance"


def _annotation(annotation: Any) -> str:
    return "" if annotation is inspect.Signature.empty else inspect.formatannotation(annotation).strip("'\"")


def _default(default: Any) -> str | None:
    if default is inspect.Parameter.empty:
        return None
    try:
        return repr(default)[:200]
    except Exception:  # noqa: BLE001 - somebody's __repr__: a default that cannot be shown is still a default
        return f"<{type(default).__name__}>"


def _says_nothing(signature: inspect.Signature) -> bool:
    kinds = [p.kind for p in signature.parameters.values()]
    return kinds == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


def _signature(obj: Any) -> tuple[str, tuple[Parameter, ...], str]:
    if not callable(obj):
        return "", (), ""
    try:
        signature = inspect.signature(obj)
        if inspect.isclass(obj) and type(obj).__call__ is not type.__call__ and _says_nothing(signature):
            # A metaclass that takes whatever comes and hands it on, as DSPy's: the class itself says what it takes.
            own = inspect.signature(obj.__init__)
            signature = own.replace(parameters=list(own.parameters.values())[1:])
    except (ValueError, TypeError):
        return "", (), ""  # some builtins have none
    parameters = tuple(
        Parameter(p.name, _KINDS[p.kind], _annotation(p.annotation), _default(p.default))  # type: ignore[arg-type]
        for p in signature.parameters.values()
    )
    return str(signature), parameters, _annotation(signature.return_annotation)


def _summary(obj: Any) -> str:
    return (inspect.getdoc(obj) or "").split("\n", 1)[0]


def _members(obj: Any) -> tuple[Member, ...]:
    if inspect.isroutine(obj):
        return ()
    owner = obj if inspect.isclass(obj) or isinstance(obj, ModuleType) else type(obj)
    members: list[Member] = []
    for name in dir(owner):
        if name.startswith("_") and name != "__call__":
            continue
        if name == "__call__" and not any("__call__" in vars(base) for base in getattr(owner, "__mro__", (owner,))):
            continue  # each class has type's own; one that it or a base defines is what makes its objects callable
        try:
            member = inspect.getattr_static(owner, name)
        except AttributeError:
            continue
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        if isinstance(member, property):
            members.append(Member(name, "property", "", _summary(member)))
        elif inspect.isclass(member):
            members.append(Member(name, "class", "", _summary(member)))
        elif inspect.isroutine(member):
            text, parameters, _ = _signature(member)
            kind: Any = "function" if isinstance(owner, ModuleType) else "method"
            members.append(Member(name, kind, text, _summary(member), parameters))
        elif not isinstance(member, ModuleType):
            members.append(Member(name, "attribute"))
        if len(members) == MAX_MEMBERS:
            break
    return tuple(members)


def _source_file(obj: Any) -> str:
    try:
        return inspect.getsourcefile(obj) or ""
    except TypeError:
        return ""
