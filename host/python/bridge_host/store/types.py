"""`VariableType`: what a variable may hold, said as JSON Schema, of Python's types or of a kind (`kinds`).

A value is compared with its type, never converted.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Final

import msgspec
from pydantic import PydanticUserError, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from bridge_kernel.contract.errors import InvalidValue, MalformedValue

from ..values import Stored, store
from .kinds import DEFAULT, KIND, KINDS, REMARKS, named, rule_of
from .schemas import MAX_SCHEMA_BYTES, JsonSchema, NotJson, as_json, jsonable, shown

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("VariableType",)

_TAGGED: Final = b'"$bridge"'

_NUMBER: Final = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "multiple_of": "multipleOf",
}
_KEYWORDS: Final[dict[str, dict[str, str]]] = {
    "number": _NUMBER,
    "integer": _NUMBER,
    "string": {"min_length": "minLength", "max_length": "maxLength", "pattern": "pattern"},
    "array": {"min_length": "minItems", "max_length": "maxItems"},
    "object": {"min_length": "minProperties", "max_length": "maxProperties"},
}
"""By JSON type: the constraints that fit it, and what they are called there."""
_ANYWHERE: Final = ("default", "description", "enum")


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class VariableType:
    """A type. Two are equal if they are written alike."""

    json: bytes
    """The schema, as it is kept."""
    default: Stored | None = dataclasses.field(compare=False)
    """What the variable holds before it is written."""
    _problem: Callable[[Stored], str | None] = dataclasses.field(compare=False)

    @classmethod
    def make(cls, kind: Any, /, **constraints: Any) -> VariableType:
        """A type from a Python type or annotation, a JSON Schema, or the name of a kind.

        Annotations: whatever pydantic makes a schema of. Constraints, where they fit: `ge`, `gt`, `le`, `lt`,
        `multiple_of`; `min_length`, `max_length` (of text, lists, objects); `pattern`; `enum`; `default`;
        `description`. Kinds: "tensor" (`dtype`, `shape` with None for any size), "embedding" (`dimensions`),
        "module" (`choices`, dotted names of classes).

        Raises:
            TypeError: there is no such kind, or a constraint does not fit it.
            ValueError: the schema is none, or a constraint's value makes it none. `InvalidValue`: of the default.
        """
        if isinstance(kind, str) and kind in KINDS:
            schema = named(kind, constraints)
        else:
            schema = _constrained(_schema_of(kind), kind, constraints)
        if (about := constraints.get("description")) is not None:
            if not isinstance(about, str):
                raise TypeError(f"a description is text, not {about!r}")
            schema["description"] = about
        if "default" in constraints:
            schema |= _default_members(constraints["default"])
        made = cls.of_schema(schema)
        for choice in schema.get("enum", ()) if "enum" in constraints else ():
            if (problem := made._problem(store(choice, "enum"))) is not None:
                raise ValueError(f"enum{problem}, so it could never be chosen")
        return made

    @classmethod
    def of_schema(cls, schema: dict[str, Any]) -> VariableType:
        """The type that is written so, by this host or another.

        Raises:
            ValueError: it is no JSON Schema, or says of a kind what cannot be. `InvalidValue`: of the default.
        """
        try:
            text = msgspec.json.encode(schema)
        except (TypeError, ValueError, OverflowError, RecursionError) as exc:
            raise ValueError(f"a type is written as JSON: {exc}") from None
        if len(text) > MAX_SCHEMA_BYTES:
            raise ValueError(
                f"a type is written in at most {MAX_SCHEMA_BYTES} bytes, its default included, not {len(text)}"
            )
        return _read(text)

    @property
    def schema(self) -> dict[str, Any]:
        """The schema, made anew: changing it changes no type."""
        return msgspec.json.decode(self.json)  # type: ignore[no-any-return]

    def check(self, name: str, stored: Stored) -> None:
        """Raise `InvalidValue` unless the value fits; the message begins with the variable's name.

        Raises:
            MalformedValue: what is stored is damaged.
        """
        try:
            problem = self._problem(stored)
        except MalformedValue:
            stored.tree(name[:60])  # raises the same, said of the variable
            raise
        if problem is not None:
            raise InvalidValue(f"{name[:60]}{problem}", remedy=f"Its type is {self}.")

    def __str__(self) -> str:
        schema = {name: value for name, value in self.schema.items() if name not in ("$defs", "title", DEFAULT)}
        text = msgspec.json.encode(schema).decode()
        return text if len(text) <= 200 else f"{text[:200]}…"

    def __repr__(self) -> str:
        return f"VariableType({self})"


@functools.lru_cache(maxsize=1024)  # a store may hold a type a hundred thousand times; it is read once
def _read(text: bytes) -> VariableType:
    schema = msgspec.json.decode(text)
    if not isinstance(schema, dict):
        raise ValueError(f"a type is written as an object, not as {shown(schema)}")  # noqa: TRY004 - another host may have written it
    made = VariableType(text, _default_of(schema), rule_of(schema) if KIND in schema else _comparison(schema))
    if made.default is not None:
        made.check("default", made.default)
    return made


def _comparison(schema: dict[str, Any]) -> Callable[[Stored], str | None]:
    checked = JsonSchema(schema)
    if schema.keys() <= REMARKS:
        return lambda _stored: None  # anything, be it JSON or not

    def problem(stored: Stored) -> str | None:
        try:
            return checked.problem(jsonable(stored, "value"), stored.size)
        except NotJson as exc:
            return f": a value of type {stored.type} {exc}"

    return problem


# -- defaults ------------------------------------------------------------------


def _default_members(value: Any) -> dict[str, Any]:
    stored = store(value, "default")
    tree = stored.tree()
    members: dict[str, Any] = {}
    if _TAGGED not in bytes(stored.json):
        return {"default": tree}
    try:
        plain = jsonable(stored, "default")
        if msgspec.json.decode(msgspec.json.encode(plain)) == plain:  # JSON would make null of a NaN
            members["default"] = plain
    except (NotJson, OverflowError):
        pass  # for readers of JSON Schema it is a remark, and the other member says it all
    buffers = [base64.b64encode(buffer).decode() for buffer in stored.buffers]
    return members | {DEFAULT: {"type": stored.type, "json": tree, "buffers": buffers}}


class _WrittenDefault(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    json: Any
    buffers: tuple[bytes, ...]


def _default_of(schema: dict[str, Any]) -> Stored | None:
    if DEFAULT in schema:
        try:
            written = msgspec.convert(schema[DEFAULT], _WrittenDefault)
        except msgspec.ValidationError as exc:
            raise ValueError(f"{DEFAULT} is no value: {exc}") from None
        return Stored.of(msgspec.json.encode(written.json), written.buffers, written.type)
    return store(schema["default"], "default") if "default" in schema else None


# -- Python's types, and constraints -------------------------------------------


class _Generator(GenerateJsonSchema):
    """JSON Schema of values as they are written, `jsonable` and this one agreeing on the form."""

    ignored_warning_kinds = frozenset({"skipped-choice", "non-serializable-default"})  # type: ignore[assignment]

    def decimal_schema(self, schema: Any) -> dict[str, Any]:
        return {"type": "string", "format": "decimal"}  # text, so that no digit is lost


def _schema_of(kind: Any) -> dict[str, Any]:
    if isinstance(kind, VariableType):
        return kind.schema
    if isinstance(kind, dict):
        return dict(kind)
    if isinstance(kind, str):
        raise TypeError(f"there is no kind {kind[:60]!r}: there are {', '.join(KINDS)}, Python types and JSON Schemas")
    try:
        return TypeAdapter(kind).json_schema(mode="serialization", schema_generator=_Generator)
    except (PydanticUserError, NameError, TypeError, RecursionError) as exc:
        about = str(exc).split("\n", 1)[0]
        raise TypeError(
            f"{kind!r:.100} makes no JSON Schema ({about}): give a type that does, a JSON Schema, or one of "
            f"{', '.join(KINDS)}"
        ) from None


def _constrained(schema: dict[str, Any], kind: Any, constraints: dict[str, Any]) -> dict[str, Any]:
    keywords: dict[str, Any] = {}
    types = set() if KIND in schema else _json_types(schema, schema)
    fitting: dict[str, list[str]] = {}
    for json_type in sorted(types):
        for name, keyword in _KEYWORDS.get(json_type, {}).items():
            fitting.setdefault(name, []).append(keyword)
    anywhere = [name for name in _ANYWHERE if name != "enum" or KIND not in schema]
    for name, value in constraints.items():
        if name not in fitting and name not in anywhere:
            raise TypeError(
                f"{name!r} does not fit {_name_of(kind)}, which takes {', '.join([*sorted(fitting), *anywhere])}"
            )
        if name == "enum":
            keywords["enum"] = _choices(value)
        elif name in fitting:
            keywords |= dict.fromkeys(fitting[name], as_json(value))
    if keywords.keys() & schema.keys():  # both hold
        around = {name: value for name, value in schema.items() if name in REMARKS or name == "$defs"}
        inner = {name: value for name, value in schema.items() if name not in around}
        schema = around | {"allOf": [inner]}
    return schema | keywords


def _name_of(kind: Any) -> str:
    return getattr(kind, "__name__", None) or f"{kind!r:.60}"


def _choices(enum: Any) -> list[Any]:
    try:
        return [as_json(value) for value in enum]
    except Exception as exc:
        raise ValueError(f"enum is the values that may be chosen, which have a JSON form: {exc}") from exc


def _json_types(schema: Any, root: dict[str, Any], depth: int = 16) -> set[str]:
    """The JSON types that a schema speaks of, as far as it says."""
    if not isinstance(schema, dict) or depth == 0:
        return set()
    if isinstance(said := schema.get("type"), str | list):
        return {said} if isinstance(said, str) else set(map(str, said))
    found: set[str] = set()
    for keyword in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(keyword)
        for part in parts if isinstance(parts, list) else ():
            found |= _json_types(part, root, depth - 1)
    if isinstance(ref := schema.get("$ref"), str) and isinstance(definitions := root.get("$defs"), dict):
        found |= _json_types(definitions.get(ref.removeprefix("#/$defs/")), root, depth - 1)
    for value in schema.get("enum") or ():
        found |= {_JSON_TYPES[type(value)]} if type(value) in _JSON_TYPES else set()
    return found


_JSON_TYPES: Final[dict[type, str]] = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
