"""`JsonSchema`: one JSON Schema (2020-12), checked when it is taken, and what values do not fit about it.

Nothing is ever fetched: references lead into the schema itself. `jsonable` says what JSON a stored value is to
be judged as. What Bridge adds to JSON Schema is in `types`.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
import math
import re
from datetime import date, datetime, time
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import msgspec
from pydantic_core import to_jsonable_python

from bridge_kernel.contract.faults import key_step
from bridge_kernel.contract.values import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..values import Stored

__all__ = ("DIALECT", "MAX_SCHEMA_BYTES", "JsonSchema", "NotJson", "as_json", "jsonable", "shown")

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
MAX_SCHEMA_BYTES: Final = 65_536
"""Of a type as JSON: that of a pydantic model with a hundred fields takes a tenth of it."""
MAX_SCHEMA_DEPTH: Final = 64
FREE_REFERENCES: Final = 2_000  # followed for a small value; a large one has ten more for each byte of it

_references_left: contextvars.ContextVar[int] = contextvars.ContextVar("references_left", default=0)


class NotJson(ValueError):
    """A value, or a part of it, that has no JSON form. The message goes on where "this value" began."""


class _TooManyReferences(Exception):
    pass


# -- values --------------------------------------------------------------------


def jsonable(stored: Stored, root: str) -> Any:
    """The JSON that a value is judged as: what pydantic makes of it. A datetime is ISO text, a tuple a list, an
    object of named fields an object, bytes are base64. NaN and infinities stay, for no type to take.

    Raises:
        NotJson: it has none (an array, a reference), or its own code raised while it was asked for it.
    """
    tree = stored.tree()
    if b'"$bridge"' not in bytes(stored.json):  # nothing is tagged: the tree is the value
        return tree
    if isinstance(tree, dict) and tree.get("$bridge") in ("ndarray", "table"):
        raise NotJson("has no JSON form")  # known without its library, which may not be installed
    try:
        return as_json(stored.read(root))
    except RecursionError:
        raise NotJson("is nested too deeply") from None
    except NotJson:
        raise
    except Exception as exc:  # a serializer, a computed field: code of the user's, which may raise anything
        raise NotJson(f"cannot be made JSON of: {type(exc).__name__}: {exc}"[:300]) from exc


def as_json(value: object) -> Any:
    """What pydantic makes of a Python value. Raises whatever the value's own code does."""
    return to_jsonable_python(value, bytes_mode="base64", inf_nan_mode="constants", fallback=_fallback)


def _fallback(value: object) -> Any:
    if isinstance(value, Record):
        if value._kind == "enum":
            raise NotJson(f"holds a member of {value._class_name}, whose class is not loaded here")
        return list(value._fields.values()) if value._kind == "namedtuple" else value._fields
    cls = type(value)
    if cls.__module__ == "numpy" and hasattr(value, "item") and not hasattr(value, "__len__"):
        return value.item()  # a scalar
    raise NotJson(f"is or holds a {cls.__name__}, which has no JSON form")


def shown(value: object) -> str:
    """A JSON value for a message: itself if that is short, else what it is."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 else f"a string of {len(value)} characters"
    if isinstance(value, list):
        return f"a list of {len(value)} items"
    if isinstance(value, dict):
        return f"an object of {len(value)} members"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return msgspec.json.encode(value).decode() if value is None or isinstance(value, bool) else repr(value)


# -- schemas -------------------------------------------------------------------


class JsonSchema:
    """A schema that values can be compared with. Immutable; any thread may use it."""

    def __init__(self, schema: dict[str, Any]) -> None:
        """Raises `ValueError`: it is no JSON Schema of 2020-12, or refers to what is not in it."""
        validator_class = _validator_class()
        if schema.get("$schema", DIALECT) not in (DIALECT, f"{DIALECT}#"):
            raise ValueError(f"a type is a JSON Schema of 2020-12, not of {str(schema['$schema'])[:100]}")
        from jsonschema.exceptions import SchemaError
        from referencing import Registry

        try:
            validator_class.check_schema(schema)
        except SchemaError as exc:
            raise ValueError(f"this is no JSON Schema: {_path(exc.absolute_path)}{exc.message[:300]}") from None
        _check_parts(schema)
        # A registry of our own: the default one fetches what it does not know.
        self._validator = validator_class(schema, registry=Registry(), format_checker=_formats())
        probes: tuple[Any, ...] = (None, False, 0, "", [], {})
        for probe in probes:
            try:
                self._first_error(probe, 0)
            except (RecursionError, _TooManyReferences):
                raise ValueError("this JSON Schema refers to itself without an end, or nearly so") from None

    def problem(self, value: Any, size: int = 0) -> str | None:
        """What does not fit about a JSON value of `size` bytes: its path, a colon, the reason. None if it fits."""
        try:
            error = self._first_error(value, size)
        except _TooManyReferences:
            return ": it takes too many references of the schema to check it"
        except RecursionError:
            return ": it is nested too deeply to check it"
        except ValueError:
            # Only of an error's own message, which shows the value: Python prints no number of so many digits.
            return ": it holds an integer of thousands of digits, which does not fit"
        return None if error is None else f"{_path(error.absolute_path)}: {_reason(error)}"

    def _first_error(self, value: Any, size: int) -> Any:
        from jsonschema.exceptions import best_match

        token = _references_left.set(FREE_REFERENCES + 10 * size)
        try:
            # The first one only: a long list may have as many as it has items. Of alternatives, the likeliest.
            return best_match(itertools.islice(self._validator.iter_errors(value), 1))
        finally:
            _references_left.reset(token)


def _path(steps: Any) -> str:
    return "".join(map(key_step, itertools.islice(steps, 20)))


def _check_parts(schema: dict[str, Any]) -> None:
    """What the meta-schema cannot say of a schema and its subschemas."""
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    resolver = Registry().resolver_with_root(DRAFT202012.create_resource(schema))
    level = [schema]
    for _depth in range(MAX_SCHEMA_DEPTH):
        for part in level:
            if part is not schema and ("$id" in part or "x-bridge" in part):
                raise ValueError('"$id" and "x-bridge" may only be at the top of a schema')
            for keyword in ("$ref", "$dynamicRef"):
                if keyword not in part:
                    continue
                if not part[keyword].startswith("#"):
                    raise ValueError(f"{part[keyword][:100]!r} is not in the schema, and nothing is fetched")
                try:
                    resolver.lookup(part[keyword])
                except Unresolvable:
                    raise ValueError(f"{part[keyword][:100]!r} is not in the schema") from None
            for pattern in (part.get("pattern", ""), *part.get("patternProperties", ())):
                try:
                    re.compile(_as_python(pattern))
                except (re.error, RecursionError, OverflowError) as exc:
                    raise ValueError(f"the pattern {pattern[:100]!r} is none: {exc}") from None
        level = [sub for part in level for sub in DRAFT202012.subresources_of(part) if isinstance(sub, dict)]
        if not level:
            return
    raise ValueError(f"this JSON Schema is nested deeper than {MAX_SCHEMA_DEPTH} levels")


# -- the validator -------------------------------------------------------------


@functools.cache
def _validator_class() -> Any:
    # Imported here: it takes a fifth of a second, which hosts without typed variables need not spend.
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    own = {name: _counted(Draft202012Validator.VALIDATORS[name]) for name in ("$ref", "$dynamicRef")}
    types = Draft202012Validator.TYPE_CHECKER.redefine_many({"number": _is_number, "integer": _is_integer})
    return extend(
        Draft202012Validator,
        {
            **own,
            "pattern": _pattern,
            **{name: _with_patterns(Draft202012Validator.VALIDATORS[name]) for name in _PATTERNED},
            "items": _items(Draft202012Validator.VALIDATORS["items"]),
            "multipleOf": _multiple_of,
            "uniqueItems": _unique_items,
        },
        type_checker=types,
    )


def _is_number(_checker: object, value: object) -> bool:
    return _is_integer(_checker, value) or (isinstance(value, float) and math.isfinite(value))


def _is_integer(_checker: object, value: object) -> bool:
    # Stricter than JSON Schema, to which 1.0 is an integer: it is not one to Python, nor to Elixir.
    return isinstance(value, int) and not isinstance(value, bool)


def _counted(keyword: Callable[..., Any]) -> Callable[..., Any]:
    """References are what makes a small schema take exponential time."""

    def follow(validator: Any, reference: Any, instance: Any, schema: Any) -> Any:
        left = _references_left.get()
        if left <= 0:
            raise _TooManyReferences
        _references_left.set(left - 1)
        return keyword(validator, reference, instance, schema)

    return follow


_PATTERNED: Final = ("patternProperties", "additionalProperties", "unevaluatedProperties")
_DOLLARS: Final = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\$", re.DOTALL)  # escapes and classes, to pass over them


@functools.lru_cache(maxsize=1024)
def _as_python(pattern: str) -> str:
    """A pattern of JSON Schema's (ECMA 262) as `re` takes it: there `$` is the very end, not before a newline too."""
    return _DOLLARS.sub(lambda found: r"\Z" if found[0] == "$" else found[0], pattern)


def _pattern(validator: Any, pattern: str, instance: Any, _schema: Any) -> Iterator[Any]:
    from jsonschema.exceptions import ValidationError

    if validator.is_type(instance, "string") and not re.search(_as_python(pattern), instance):
        yield ValidationError("no match")


def _with_patterns(keyword: Callable[..., Any]) -> Callable[..., Any]:
    """Members whose names match patterns, and the others: the library is given the patterns as `re` takes them."""

    def look(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        patterns = schema.get("patternProperties")
        if not patterns:
            return keyword(validator, value, instance, schema)
        # `a$` and `a\Z` may both be there: then both hold.
        translated: dict[str, Any] = {}
        for pattern, part in patterns.items():
            known = _as_python(pattern)
            translated[known] = {"allOf": [translated[known], part]} if known in translated else part
        own = value is patterns
        return keyword(validator, translated if own else value, instance, schema | {"patternProperties": translated})

    return look


_PLAIN: Final[dict[str, set[type]]] = {"number": {int, float}, "integer": {int}, "string": {str}, "boolean": {bool}}


def _items(keyword: Callable[..., Any]) -> Callable[..., Any]:
    """A long list of plain numbers or strings is looked at as a whole: item by item it takes a hundred times as long."""

    def look(validator: Any, items: Any, instance: Any, schema: Any) -> Any:
        kinds = (
            _PLAIN.get(items["type"])
            if isinstance(items, dict) and items.keys() == {"type"} and isinstance(items["type"], str)
            else None
        )
        if (
            kinds is not None
            and "prefixItems" not in schema
            and isinstance(instance, list)
            and kinds.issuperset(map(type, instance))
            and (float not in kinds or all(map(math.isfinite, instance)))
        ):
            return ()
        return keyword(validator, items, instance, schema)

    return look


def _multiple_of(validator: Any, factor: Any, instance: Any, _schema: Any) -> Iterator[Any]:
    from jsonschema.exceptions import ValidationError

    # As written, not as floats are: 0.3 is a multiple of 0.1.
    if validator.is_type(instance, "number") and _fraction(instance) % _fraction(factor):
        yield ValidationError("not a multiple")


def _fraction(number: float) -> Fraction:
    return Fraction(number) if isinstance(number, int) else Fraction(repr(number))


def _unique_items(validator: Any, unique: Any, instance: Any, _schema: Any) -> Iterator[Any]:
    from jsonschema.exceptions import ValidationError

    # Hashed: the library compares each with each if they are objects.
    if unique and validator.is_type(instance, "array") and len(set(map(_identity, instance))) != len(instance):
        yield ValidationError("not unique")


def _identity(value: Any) -> Any:
    if isinstance(value, dict):
        return frozenset((name, _identity(item)) for name, item in value.items())
    if isinstance(value, list):
        return tuple(map(_identity, value))
    return (bool, value) if isinstance(value, bool) else value


def _is(kind: Callable[[str], object], pattern: str, *errors: type[Exception]) -> Callable[[object], bool]:
    matches = re.compile(pattern).fullmatch

    def fits(text: object) -> bool:
        if not isinstance(text, str):
            return True
        try:
            return matches(text) is not None and kind(text) is not None
        except errors:
            return False

    return fits


@functools.cache
def _formats() -> Any:
    """The formats that are checked, the others being remarks: those that pydantic writes of Python's own types."""
    from jsonschema import FormatChecker

    day, clock = r"\d{4}-\d\d-\d\d", r"\d\d:\d\d(:\d\d([.]\d{1,6})?)?(Z|z|[+-]\d\d:?\d\d(:\d\d)?)?"
    number = r"\d+([.]\d+)?"
    checker = FormatChecker(formats=())
    checker.checkers = {
        "date": (_is(date.fromisoformat, day, ValueError), ()),
        "time": (_is(time.fromisoformat, clock, ValueError), ()),
        "date-time": (_is(datetime.fromisoformat, f"{day}[Tt ]{clock}", ValueError), ()),
        "duration": (
            _is(
                str,
                rf"[+-]?P(?=[\dT])({number}Y)?({number}M)?({number}W)?({number}D)?(T(?=\d)({number}H)?({number}M)?({number}S)?)?",
            ),
            (),
        ),
        "uuid": (_is(UUID, r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", ValueError), ()),
        "decimal": (_is(_finite_decimal, r"[0-9+Ee.-]{1,4000}", InvalidOperation), ()),
    }
    return checker


def _finite_decimal(text: str) -> Decimal | None:
    found = Decimal(text)
    return found if found.is_finite() else None


# -- what is said --------------------------------------------------------------

_REASONS: Final = {
    "minimum": "{value} is less than {limit}",
    "maximum": "{value} is more than {limit}",
    "exclusiveMinimum": "{value} is not more than {limit}",
    "exclusiveMaximum": "{value} is not less than {limit}",
    "multipleOf": "{value} is not a multiple of {limit}",
    "minLength": "{value} is shorter than {limit} characters",
    "maxLength": "{value} is longer than {limit} characters",
    "minItems": "{value} has fewer than {limit}",
    "maxItems": "{value} has more than {limit}",
    "minProperties": "{value} has fewer than {limit}",
    "maxProperties": "{value} has more than {limit}",
    "pattern": "{value} does not match the pattern {limit}",
    "format": "{value} is no {limit}",
    "enum": "{value} is none of {limit}",
    "const": "{value} is not {limit}",
    "uniqueItems": "{value} holds the same twice",
    "anyOf": "{value} fits none of the alternatives",
    "oneOf": "{value} does not fit exactly one of the alternatives",
}


def _reason(error: Any) -> str:
    # Never the library's message about a value: it repeats the value, however long.
    limit, value = error.validator_value, shown(error.instance)
    if error.validator == "type":
        wanted = " or ".join(limit if isinstance(limit, list) else [limit])
        return f"{value} is not of type {wanted}"
    if error.validator in ("required", "additionalProperties", "dependentRequired"):
        return str(error.message)[:200]  # names members only
    if error.validator is None:
        return "the schema allows nothing here"
    text = msgspec.json.encode(limit).decode() if not isinstance(limit, str) else limit
    text = text if len(text) <= 120 else f"{text[:120]}…"
    return _REASONS.get(error.validator, "{value} does not fit " + f"{error.validator}: {{limit}}").format(
        value=value, limit=text
    )
