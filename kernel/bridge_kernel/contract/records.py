"""Instances of classes with named fields: dataclasses, pydantic models, namedtuples, enums, registered classes.

A class is found by its name among what is loaded already: nothing is imported because a peer names it, and no
`__init__`, `__post_init__`, validator or property setter runs. A side that lacks the class gets a `Record`.
"""

from __future__ import annotations

import dataclasses
import sys
from enum import Enum
from functools import cached_property
from types import MemberDescriptorType, ModuleType
from typing import TYPE_CHECKING, Any, Final

from .faults import malformed, member, too_much, unserializable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .values import Decoder, Encoder, Kind

__all__ = (
    "DECODERS",
    "MAX_CLASS_NAME",
    "Record",
    "encode_record",
    "encode_unresolved",
    "loaded_class",
    "register_record",
)

MAX_CLASS_NAME: Final = 1000  # characters of a dotted name: looking one up takes quadratic time in its dots
_HEAP_TYPE: Final = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made by a class statement
_KINDS: Final = ("dataclass", "pydantic", "namedtuple", "enum", "record")


class Record:
    """An instance of a class that this side does not have loaded: the class's name and the fields.

    `record.answer` and `record["answer"]` are fields. What is Record's own begins with an underscore, as in a
    namedtuple: `_class_name`, `_fields`, `_kind`, and `_more`, which only pydantic models use. Encoded, it
    is what it was decoded from.
    """

    __slots__ = ("_class_name", "_fields", "_kind", "_more")

    def __init__(
        self, class_name: str, fields: dict[str, Any], kind: str = "record", more: dict[str, Any] | None = None
    ) -> None:
        if kind not in _KINDS:
            raise ValueError(f"kind must be one of {', '.join(_KINDS)}, not {kind!r}")
        self._class_name = class_name
        self._fields = fields
        self._kind = kind
        self._more = more or {}

    def keys(self) -> Iterable[str]:
        """The names of the fields."""
        return self._fields.keys()

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __getattr__(self, name: str) -> Any:
        if name not in Record.__slots__ and name in self._fields:
            return self._fields[name]
        raise AttributeError(f"{name!r} is no field of this record")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._fields]

    def __eq__(self, other: object) -> bool:
        return type(other) is Record and self.__reduce__() == other.__reduce__()

    def __hash__(self) -> int:
        values: list[object] = [self._class_name, self._kind]
        for name in sorted(self._fields):
            try:
                values.append(hash(self._fields[name]))
            except TypeError:  # a class may be hashable although a field of it is not
                values.append(name)
        return hash(tuple(values))

    def __reduce__(self) -> tuple[type[Record], tuple[Any, ...]]:
        return Record, (self._class_name, self._fields, self._kind, self._more)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self._fields.items())
        return f"<Record {self._class_name}({fields})>"


def loaded_class(dotted: str) -> type | None:
    """The class of that name among the modules that are loaded, or None. Imports nothing and runs no code."""
    module_name, _, rest = dotted, "", ""
    while True:
        module = sys.modules.get(module_name)
        if module is not None:
            break
        module_name, dot, last = module_name.rpartition(".")
        if not dot:
            return None
        rest = f"{last}.{rest}" if rest else last
    # Through __dict__: a getattr could run a module's __getattr__, or a lazy module's import.
    if not rest or not issubclass(type(module), ModuleType):
        return None
    names: Any = ModuleType.__getattribute__(module, "__dict__")
    found: Any = None
    for part in rest.split("."):
        found = names.get(part)
        if not issubclass(type(found), type):
            return None
        names = type.__getattribute__(found, "__dict__")
    return found  # type: ignore[no-any-return]


_registered: dict[str, tuple[Callable[[Any], dict[str, Any]], Callable[[dict[str, Any]], Any]]] = {}


def register_record(
    dotted_class_name: str,
    to_fields: Callable[[Any], dict[str, Any]],
    from_fields: Callable[[dict[str, Any]], Any],
) -> None:
    """Carry a class that is neither a dataclass nor a model; by name, so that it need not be imported.

    `to_fields(instance)` gives what `from_fields(fields)` makes an equal instance of. Subclasses are not meant.
    """
    _registered[dotted_class_name] = (to_fields, from_fields)


def encode_record(encoder: Encoder, value: Any, depth: int) -> Any:
    """The tree of an instance, or None if its class is of none of these kinds."""
    cls = type(value)
    if registered := _registered.get(f"{cls.__module__}.{cls.__qualname__}"):
        name, fields = _name(cls), registered[0](value)
        if type(fields) is not dict or any(type(key) is not str for key in fields):
            raise TypeError(f"to_fields of {name} must return a dict with strings for keys")
        return {"$bridge": "record", "class": name, "fields": encoder.fields(fields, depth, _attribute)}
    if issubclass(cls, Enum):
        return _encode_enum(value, cls)
    if _is_model(cls):
        return _encode_model(encoder, value, cls, depth)
    if _attribute_of(cls, "__dataclass_fields__") is not None:
        return _encode_dataclass(encoder, value, cls, depth)
    if _is_namedtuple(cls):
        return _encode_namedtuple(encoder, value, cls, depth)
    return None


def encode_unresolved(encoder: Encoder, record: Record, depth: int) -> Any:
    """The tree that a `Record` was decoded from."""
    tree: dict[str, Any] = {"$bridge": record._kind, "class": record._class_name}
    if record._kind == "enum":
        return tree | {"name": record._fields["name"]}
    tree["fields"] = encoder.fields(record._fields, depth, _attribute)
    for name, more in record._more.items():
        tree[name] = list(more) if name == "fields_set" else encoder.fields(more, depth, _attribute)
    return tree


def _encode_enum(value: Any, cls: Any) -> Any:
    if cls._member_map_.get(value._name_) is not value:
        raise unserializable(f"this {cls.__qualname__} is a combination of flags, not a member", "Send its .value.")
    return {"$bridge": "enum", "class": _name(cls), "name": value._name_}


def _encode_namedtuple(encoder: Encoder, value: Any, cls: Any, depth: int) -> Any:
    if getattr(value, "__dict__", None) or len(value) != len(cls._fields):
        raise unserializable(f"this {cls.__qualname__} has more than its fields", "Send tuple(x).")
    fields = dict(zip(cls._fields, tuple.__iter__(value), strict=True))
    return {"$bridge": "namedtuple", "class": _name(cls), "fields": encoder.fields(fields, depth, _attribute)}


def _encode_dataclass(encoder: Encoder, value: Any, cls: type, depth: int) -> Any:
    names = tuple(field.name for field in dataclasses.fields(cls))
    if (obstacle := _obstacle(cls, names)) is not None:
        raise unserializable(obstacle, "Convert it: dataclasses.asdict(x).")
    fields = _stored(value, cls, names, _slots(cls))
    return {"$bridge": "dataclass", "class": _name(cls), "fields": encoder.fields(fields, depth, _attribute)}


def _encode_model(encoder: Encoder, value: Any, cls: Any, depth: int) -> Any:
    names = tuple(cls.__pydantic_fields__)
    fields = _stored(value, cls, names, ())
    tree = {
        "$bridge": "pydantic",
        "class": _name(cls),
        "fields": encoder.fields(fields, depth, _attribute),
        "fields_set": sorted(value.__pydantic_fields_set__),
    }
    if value.__pydantic_extra__ is not None:
        tree["extra"] = encoder.fields(value.__pydantic_extra__, depth, _attribute)
    if value.__pydantic_private__ is not None:
        tree["private"] = encoder.fields(value.__pydantic_private__, depth, _attribute)
    return tree


def _stored(value: Any, cls: type, names: tuple[str, ...], slots: Iterable[str]) -> dict[str, Any]:
    """The values of the fields, when the instance holds nothing beside them but caches."""
    state: dict[str, Any] = getattr(value, "__dict__", {})
    extra = {name for name in slots if name not in names and hasattr(value, name)}
    extra |= {name for name in state.keys() - names if not isinstance(_attribute_of(cls, name), cached_property)}
    if extra:
        raise unserializable(
            f"this {cls.__qualname__} holds {', '.join(sorted(extra)[:8])}, which no field of it declares",
            "Declare it as a field, or delete it first.",
        )
    missing = object()
    fields = {name: state[name] if name in state else getattr(value, name, missing) for name in names}
    if unset := [name for name, field in fields.items() if field is missing]:
        raise unserializable(f"its field {unset[0]} was never set", "Set it, or give it a default.")
    return fields


def _name(cls: type) -> str:
    """The class's dotted name, by which `loaded_class` finds it again."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    if loaded_class(name) is not cls:
        where = "is defined inside a function" if "<locals>" in name else "is not what that name stands for"
        raise unserializable(f"the class {name} {where}", "Move the class to the top level of a module.")
    return name


def _bases(cls: type) -> list[dict[str, Any]]:
    """What each class of the MRO defines, read without running a metaclass's code."""
    return [type.__getattribute__(base, "__dict__") for base in type.__getattribute__(cls, "__mro__")]


def _attribute_of(cls: type, name: str) -> Any:
    return next((found[name] for found in _bases(cls) if name in found), None)


def _slots(cls: type) -> list[str]:
    return [name for found in _bases(cls) for name, held in found.items() if type(held) is MemberDescriptorType]


def _is_model(cls: type) -> bool:
    # Not pydantic.BaseModel: looking that up may import it.
    base = getattr(sys.modules.get("pydantic.main"), "BaseModel", None)
    return base is not None and issubclass(cls, base) and cls is not base


def _is_namedtuple(cls: type) -> bool:
    return issubclass(cls, tuple) and type(_attribute_of(cls, "_fields")) is tuple


def _obstacle(cls: type, names: tuple[str, ...]) -> str | None:
    """Why instances cannot be rebuilt field by field, or None."""
    for base in type.__getattribute__(cls, "__mro__"):
        if base is not object and not base.__flags__ & _HEAP_TYPE:
            return f"{cls.__qualname__} is a {base.__name__} too, whose own content is no field"
    for name in names:
        attribute = _attribute_of(cls, name)
        if hasattr(type(attribute), "__set__") and type(attribute) is not MemberDescriptorType:
            return f"the field {name} of {cls.__qualname__} is a property: setting it would run code"
    return None


def _attribute(name: str) -> str:
    return f".{name[:60]}"


def _resolve(decoder: Decoder, tree: dict[str, Any]) -> type | None:
    if len(member(tree, "class", str)) > MAX_CLASS_NAME:
        raise too_much(f'"class" is longer than {MAX_CLASS_NAME} characters')
    cls = decoder.resolve(tree["class"])
    if cls is not None and not issubclass(type(cls), type):
        raise malformed(f"{tree['class'][:120]} is not a class")
    return cls


def _wrong(tree: dict[str, Any], what: str) -> Exception:
    return malformed(
        f"{tree['class'][:120]} {what}", "Load the same version of the class on both sides, or none on this one."
    )


def _check_names(tree: dict[str, Any], names: Iterable[str]) -> None:
    expected, found = set(names), set(tree["fields"])
    if expected != found:
        differ = ", ".join(sorted(expected ^ found)[:8])
        raise _wrong(tree, f"does not have these fields here; they differ in: {differ[:200]}")


def _from_dataclass(decoder: Decoder, tree: dict[str, Any], depth: int) -> object:
    cls = _resolve(decoder, tree)
    fields = decoder.fields(tree["fields"], depth, _attribute)
    if cls is None:
        return Record(tree["class"], fields, "dataclass")
    if _attribute_of(cls, "__dataclass_fields__") is None:
        raise _wrong(tree, "is not a dataclass here")
    names = tuple(field.name for field in dataclasses.fields(cls))
    _check_names(tree, names)
    if (obstacle := _obstacle(cls, names)) is not None:
        raise malformed(obstacle)
    try:
        made: object = object.__new__(cls)
        for name, value in fields.items():
            object.__setattr__(made, name, value)
    except (TypeError, AttributeError) as error:  # an abstract class; a class without room for the field
        raise _wrong(tree, "cannot be rebuilt here") from error
    return made


def _from_model(decoder: Decoder, tree: dict[str, Any], depth: int) -> object:
    cls: Any = _resolve(decoder, tree)
    fields = decoder.fields(tree["fields"], depth, _attribute)
    named = member(tree, "fields_set", list)
    if any(type(name) is not str for name in named) or len(set(named)) != len(named):
        raise malformed('"fields_set" must be a list of distinct strings')
    more = {name: decoder.fields(tree[name], depth, _attribute) for name in ("extra", "private") if name in tree}
    if cls is None:
        return Record(tree["class"], fields, "pydantic", {"fields_set": list(named)} | more)
    if not _is_model(cls):
        raise _wrong(tree, "is not a pydantic model here")
    _check_names(tree, cls.__pydantic_fields__)
    if ("extra" in more) is not (cls.model_config.get("extra") == "allow"):
        raise _wrong(tree, "differs here in whether it allows extra fields")
    if not cls.__private_attributes__.keys() >= more.get("private", {}).keys():
        raise _wrong(tree, "does not have these private attributes here")
    state = {
        "__dict__": fields,
        "__pydantic_fields_set__": set(named),
        "__pydantic_extra__": more.get("extra"),
        "__pydantic_private__": more.get("private"),
    }
    try:
        made = object.__new__(cls)
    except TypeError as error:  # an abstract class
        raise _wrong(tree, "cannot be rebuilt here") from error
    # BaseModel's own, whatever the class makes of __setstate__.
    sys.modules["pydantic.main"].BaseModel.__setstate__(made, state)
    return made


def _from_namedtuple(decoder: Decoder, tree: dict[str, Any], depth: int) -> object:
    cls: Any = _resolve(decoder, tree)
    fields = decoder.fields(tree["fields"], depth, _attribute)
    if cls is None:
        return Record(tree["class"], fields, "namedtuple")
    if not _is_namedtuple(cls):
        raise _wrong(tree, "is not a namedtuple here")
    _check_names(tree, cls._fields)
    return tuple.__new__(cls, [fields[name] for name in cls._fields])


def _from_enum(decoder: Decoder, tree: dict[str, Any], _depth: int) -> object:
    cls: Any = _resolve(decoder, tree)
    name = member(tree, "name", str)
    if cls is None:
        return Record(tree["class"], {"name": name}, "enum")
    if not issubclass(cls, Enum):
        raise _wrong(tree, "is not an enum here")
    if name not in cls._member_map_:
        raise _wrong(tree, f"has no member {name[:60]} here")
    return cls._member_map_[name]


def _from_registered(decoder: Decoder, tree: dict[str, Any], depth: int) -> object:
    cls = _resolve(decoder, tree)
    fields = decoder.fields(tree["fields"], depth, _attribute)
    registered = _registered.get(tree["class"])
    if cls is None or registered is None:
        return Record(tree["class"], fields)
    try:
        made = registered[1](fields)
    except Exception as error:
        raise _wrong(tree, f"cannot be made of these fields: {type(error).__name__}") from error
    if type(made) is not cls:
        raise _wrong(tree, f"is not what its from_fields makes: {type(made).__name__}")
    return made


DECODERS: Final[dict[str, tuple[Kind, str, str]]] = {
    "dataclass": (_from_dataclass, "class fields", ""),
    "pydantic": (_from_model, "class fields fields_set", "extra private"),
    "namedtuple": (_from_namedtuple, "class fields", ""),
    "enum": (_from_enum, "class name", ""),
    "record": (_from_registered, "class fields", ""),
}
