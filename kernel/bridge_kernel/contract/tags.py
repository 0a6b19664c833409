"""What stands for something that stays in the host: an object, a tool, a variable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from .faults import key_step, member, unserializable
from .scalars import MAX_INT, check_text

if TYPE_CHECKING:
    from .values import Decoder, Encoder, Kind

__all__ = ("DECODERS", "ENCODERS", "Ref", "Tag", "ToolRef", "VariableRef")


class Ref(msgspec.Struct, frozen=True):
    """An object that the host owns, by its id. `cls` is its class's dotted name, if known."""

    id: str
    cls: str = ""
    version: int | None = None


class ToolRef(msgspec.Struct, frozen=True):
    """A function that lives in the host. `schema` is the JSON Schema of its arguments."""

    name: str
    description: str = ""
    schema: dict[str, Any] | None = None


class VariableRef(msgspec.Struct, frozen=True):
    """A variable of the session, by name: it stands for its value."""

    name: str


Tag: TypeAlias = Ref | ToolRef | VariableRef


def _ref(encoder: Encoder, tag: Ref, depth: int) -> Any:
    tree = {"$bridge": "ref", "id": _member_text(encoder, tag.id, "id")}
    if tag.cls:
        tree["class"] = _member_text(encoder, tag.cls, "cls")
    if tag.version is not None:
        if type(tag.version) is not int or not 0 <= tag.version <= MAX_INT:
            raise unserializable("a Ref's version must be a 64-bit integer from 0", "Pass an int, or None.")
        tree["version"] = tag.version
    return tree


def _tool(encoder: Encoder, tag: ToolRef, depth: int) -> Any:
    tree = {"$bridge": "tool", "name": _member_text(encoder, tag.name, "name")}
    if tag.description:
        tree["description"] = _member_text(encoder, tag.description, "description")
    if tag.schema is not None:
        if type(tag.schema) is not dict or any(type(key) is not str for key in tag.schema):
            raise unserializable("a ToolRef's schema must be a dict with strings for keys", "Pass a JSON Schema.")
        tree["schema"] = encoder.fields(tag.schema, depth, lambda key: f".schema{key_step(key)}")
    return tree


def _variable(encoder: Encoder, tag: VariableRef, depth: int) -> Any:
    return {"$bridge": "variable", "name": _member_text(encoder, tag.name, "name")}


def _member_text(encoder: Encoder, text: object, name: str) -> Any:
    if type(text) is not str:
        raise unserializable(f"a tag's {name} must be a str, not a {type(text).__name__}", "Convert it: str(x).")
    check_text(text)
    return text


def _from_ref(decoder: Decoder, tree: dict[str, Any], _depth: int) -> object:
    version = member(tree, "version", int) if "version" in tree else None
    return decoder.tag(Ref(member(tree, "id", str), member(tree, "class", str) if "class" in tree else "", version))


def _from_tool(decoder: Decoder, tree: dict[str, Any], depth: int) -> object:
    text = member(tree, "description", str) if "description" in tree else ""
    schema = decoder.fields(tree["schema"], depth) if "schema" in tree else None
    return decoder.tag(ToolRef(member(tree, "name", str), text, schema))


def _from_variable(decoder: Decoder, tree: dict[str, Any], _depth: int) -> object:
    return decoder.tag(VariableRef(member(tree, "name", str)))


ENCODERS: Final[dict[type, Kind]] = {Ref: _ref, ToolRef: _tool, VariableRef: _variable}
DECODERS: Final[dict[str, tuple[Kind, str, str]]] = {
    "ref": (_from_ref, "id", "class version"),
    "tool": (_from_tool, "name", "description schema"),
    "variable": (_from_variable, "name", ""),
}
