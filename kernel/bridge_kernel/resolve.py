"""Dotted names to objects, under a policy that attribute access cannot walk around."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .contract.errors import NotFound, PolicyDenied

if TYPE_CHECKING:
    from .policy import Policy

__all__ = ("resolve",)


def _defined_as(obj: Any) -> str | None:
    """Where an object says it was defined, or None if it does not say (a constant, a bound builtin)."""
    if isinstance(obj, ModuleType):
        return obj.__name__
    module, name = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    return f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else None


def resolve(path: str, policy: Policy) -> Any:
    """Import the object that `path` names, e.g. `math.hypot` or `package.module.Class.method`.

    The policy is asked about `path` and, when it restricts names at all, about each object on the way and
    where that says it was defined: an allowed `package.*` does not lead to `package.os.system`.

    Raises:
        NotFound: no such module or attribute. What a module raises while it is imported is passed on.
        PolicyDenied: the policy does not allow it.
    """
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts):
        raise NotFound(f"{path!r} is not a dotted name", remedy='Name it as you would import it, e.g. "math.hypot".')
    policy.check_name(path)
    restricted = "*" not in policy.allow_names
    module, rest = _import_longest(parts)
    obj: Any = module
    for attribute in rest:
        if restricted and attribute.startswith("_"):
            # `json.loads.__globals__.clear`: what lies behind such names belongs to nobody's pattern.
            raise PolicyDenied(f"{path!r}: {attribute!r} may not be reached in a kernel that restricts names")
        try:
            obj = getattr(obj, attribute)
        except AttributeError:
            raise NotFound(
                f"{path!r}: {_defined_as(obj) or type(obj).__name__} has no attribute {attribute!r}",
                remedy="Check the spelling, and that the kernel has the version of the package that you mean.",
            ) from None
        if restricted and (defined := _defined_as(obj)) is not None:
            policy.check_name(defined)
    return obj


def _import_longest(parts: list[str]) -> tuple[ModuleType, list[str]]:
    """The longest prefix of `parts` that is a module, imported, and what is left."""
    name = ""
    module: ModuleType | None = None
    for count, part in enumerate(parts):
        name = f"{name}.{part}" if name else part
        loaded = sys.modules.get(name)
        if loaded is not None and getattr(getattr(loaded, "__spec__", None), "_initializing", False):
            loaded = importlib.import_module(name)  # another thread is in the middle of it: waits until it is done
        if loaded is None:
            if module is not None and not hasattr(module, "__path__"):
                return module, parts[count:]
            if module is not None and part in vars(module):
                return module, parts[count:]
            try:
                loaded = importlib.import_module(name)
            except ModuleNotFoundError as exc:
                if exc.name != name:
                    raise
                if module is not None:
                    return module, parts[count:]
                raise NotFound(
                    f"no module named {name!r} in the kernel",
                    remedy=f"Install it where the kernel runs: pip install {name}"
                    + ("" if len(parts) > 1 else f", or give the session a function {name!r}."),
                ) from None
        module = loaded
    assert module is not None
    return module, []
