"""The kinds of variable that JSON Schema cannot say: tensor, embedding, module.

They are written `{"x-bridge": "tensor", …}`, so that a host in another language reads them too. Arrays are
judged by what is written of them: numpy is not needed.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, Final

from .schemas import JsonSchema, NotJson, jsonable, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..values import Stored

__all__ = ("DEFAULT", "KIND", "KINDS", "REMARKS", "named", "rule_of")

KIND: Final = "x-bridge"
DEFAULT: Final = "x-bridge-default"
"""A default that JSON cannot carry, as an export writes a value: type, json, buffers in base64."""
REMARKS: Final = frozenset({"$schema", "$id", "$comment", "title", "description", "default", "examples", DEFAULT})
"""The members of a schema that no value is compared with."""

_ORDER: Final = "<" if sys.byteorder == "little" else ">"
_DTYPES: Final = {
    "bool": "|b1",
    "int8": "|i1",
    "uint8": "|u1",
    **{f"int{8 * n}": f"{_ORDER}i{n}" for n in (2, 4, 8)},
    **{f"uint{8 * n}": f"{_ORDER}u{n}" for n in (2, 4, 8)},
    **{f"float{8 * n}": f"{_ORDER}f{n}" for n in (2, 4, 8)},
    "complex64": f"{_ORDER}c8",
    "complex128": f"{_ORDER}c16",
    "float": f"{_ORDER}f8",
    "int": f"{_ORDER}i8",
    "complex": f"{_ORDER}c16",
}
_DTYPE: Final = re.compile(r"[<>|][biufcSUVmM][0-9]{1,10}(\[[0-9]{0,9}[a-zA-Zμ]{1,2}\])?")
_DOTTED: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def named(kind: str, constraints: dict[str, Any]) -> dict[str, Any]:
    """The schema of a kind by its own constraints; `default` and `description` are of any type, and left out.

    Raises:
        TypeError: one does not fit it.
        ValueError: there is no such dtype.
    """
    own, _rule = KINDS[kind]
    schema: dict[str, Any] = {KIND: kind}
    for name, value in constraints.items():
        if name in ("default", "description"):
            continue
        if name not in own:
            raise TypeError(
                f"{name!r} does not fit {kind!r}, which takes {', '.join([*own, 'default', 'description'])}"
            )
        if name == "dtype" and value is not None:
            schema[name] = _dtype_text(value)
        elif value is not None:
            schema[name] = list(value) if isinstance(value, tuple | set | frozenset) else value
    return schema


def _dtype_text(dtype: Any) -> str:
    if not isinstance(dtype, str):
        # A dtype of numpy's has `str`; a class of Python's or numpy's has a name.
        plain = getattr(dtype, "names", None) is None
        written = getattr(dtype, "str", None) if plain else None
        dtype = written if isinstance(written, str) else getattr(dtype, "__name__", repr(dtype))
    dtype = _DTYPES.get(dtype, dtype)
    if not _DTYPE.fullmatch(dtype):
        raise ValueError(f"there is no dtype {dtype[:60]}: it is one of {', '.join(_DTYPES)}, or written as in '<f4'")
    return str(dtype)


def rule_of(schema: dict[str, Any]) -> Callable[[Stored], str | None]:
    """What says what does not fit about a value, or None. Raises `ValueError`: the schema is of no kind."""
    kind = schema[KIND]
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"there is no kind {shown(kind)} of variable here: there are {', '.join(KINDS)}")
    own, rule = KINDS[kind]
    if extra := schema.keys() - own - REMARKS - {KIND}:
        raise ValueError(f"a {kind!r} is not described by {', '.join(sorted(extra))[:200]}, but by {', '.join(own)}")
    return rule(schema)


def _is_size(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 0


def _tensor(schema: dict[str, Any]) -> Callable[[Stored], str | None]:
    dtype, shape = schema.get("dtype"), schema.get("shape")
    if dtype is not None and not (isinstance(dtype, str) and _DTYPE.fullmatch(dtype)):
        raise ValueError(f"dtype is written as in '<f4', not {shown(dtype)}")
    if shape is not None and not (isinstance(shape, list) and all(n is None or _is_size(n) for n in shape)):
        raise ValueError("shape is a list of sizes, null for any size")

    def problem(stored: Stored) -> str | None:
        found = _array(stored)
        if found is None:
            return f": a value of type {stored.type} is no array"
        if dtype is not None and found["dtype"] != dtype:
            return f": an array of {shown(found['dtype'])} is none of {dtype!r}"
        sizes = found["shape"]
        if shape is not None and not (
            len(sizes) == len(shape) and all(n is None or n == m for n, m in zip(shape, sizes, strict=True))
        ):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            return f": an array of shape {sizes} has not the shape [{wanted}]"
        return None

    return problem


def _array(stored: Stored) -> dict[str, Any] | None:
    tree = stored.tree()
    return tree if isinstance(tree, dict) and tree.get("$bridge") == "ndarray" else None


def _embedding(schema: dict[str, Any]) -> Callable[[Stored], str | None]:
    dimensions = schema.get("dimensions")
    if dimensions is not None and not (_is_size(dimensions) and dimensions):
        raise ValueError(f"dimensions is how many numbers there are, not {shown(dimensions)}")
    bounds = {} if dimensions is None else {"minItems": dimensions, "maxItems": dimensions}
    numbers = JsonSchema({"type": "array", "items": {"type": "number"}, **bounds})

    def problem(stored: Stored) -> str | None:
        found = _array(stored)
        if found is None:
            try:
                return numbers.problem(jsonable(stored, "value"))
            except NotJson:
                return f": a value of type {stored.type} is no list of numbers and no array"
        # The items of an array are not looked at: that would need numpy, and take as long as they are many.
        if not re.match(r"[<>|]f", str(found["dtype"])):
            return f": an array of {shown(found['dtype'])} is none of floats"
        if len(found["shape"]) != 1 or dimensions not in (None, found["shape"][0]):
            return f": an array of shape {found['shape']} has not the shape [{dimensions or 'any'}]"
        return None

    return problem


def _module(schema: dict[str, Any]) -> Callable[[Stored], str | None]:
    choices = schema.get("choices")
    if choices is not None and not (
        isinstance(choices, list) and choices and all(isinstance(c, str) and _DOTTED.fullmatch(c) for c in choices)
    ):
        raise ValueError("choices is a list of dotted names of classes")

    def problem(stored: Stored) -> str | None:
        tree = stored.tree()
        if isinstance(tree, dict) and tree.get("$bridge") == "ref":
            name = tree.get("class", "")
            if choices is not None and name not in choices:
                return f": an instance of {name or 'a class that is not said'} is none of {', '.join(choices)[:200]}"
        elif not isinstance(tree, str) or not _DOTTED.fullmatch(tree):
            return f": {shown(tree) if isinstance(tree, str) else f'a value of type {stored.type}'} is no dotted name of a class and no instance"
        elif choices is not None and tree not in choices:
            return f": {shown(tree)} is none of {', '.join(choices)[:200]}"
        return None

    return problem


KINDS: Final[dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], Callable[[Stored], str | None]]]]] = {
    "tensor": (("dtype", "shape"), _tensor),
    "embedding": (("dimensions",), _embedding),
    "module": (("choices",), _module),
}
