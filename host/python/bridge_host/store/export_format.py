"""The form of an export: sessions as one JSON file, the structs that it is made of, and its JSON Schema."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

__all__ = (
    "FORMAT",
    "VERSION",
    "Export",
    "Function",
    "Header",
    "Instance",
    "LanguageModel",
    "Session",
    "Value",
    "Variable",
    "Version",
    "json_schema",
)

FORMAT: Final = "bridge.sessions"
VERSION: Final = 1

Name = Annotated[str, msgspec.Meta(min_length=1)]
Seconds = Annotated[float, msgspec.Meta(description="Seconds since the epoch.")]
Count = Annotated[int, msgspec.Meta(ge=1)]
CacheSeconds = Annotated[float, msgspec.Meta(gt=0, description="Seconds that a result may be given again.")]
Tree = Annotated[
    msgspec.Raw,
    msgspec.Meta(
        description='A value as docs/protocol.md writes it: JSON, with {"$bridge": kind, …} for what JSON cannot carry.'
    ),
]


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A value: its JSON, and its binary parts in base64, in the order in which the JSON numbers them."""

    type: Annotated[str, msgspec.Meta(description="The name of its class, for people.")]
    json: Tree
    buffers: tuple[bytes, ...] = ()


class Version(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One version of a variable; no `value`: it was deleted."""

    version: Count
    at: Annotated[int, msgspec.Meta(ge=0, description="The session's version that it belongs to.")]
    written: Seconds
    value: Value | None
    restores: Annotated[int, msgspec.Meta(description="The version whose value this one brought back.")] | None = None


class Variable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A variable: no `current` version, if it only has a type."""

    name: Name
    schema: (
        Annotated[dict[str, Any], msgspec.Meta(description="Its type: JSON Schema 2020-12, or a kind: x-bridge.")]
        | None
    )
    current: Version | None
    history: Annotated[tuple[Version, ...], msgspec.Meta(description="The versions before, the oldest first.")] = ()


class Instance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"cls": "class"}):
    """An object: how to make it, and its state, in the form that its `adapter` reads."""

    ref: Name
    name: str
    cls: Annotated[str, msgspec.Meta(min_length=1, description="The dotted name of its class.")]
    args: Value
    kwargs: Value
    adapter: Literal["dspy", "bridge", "pickle", "recipe"]
    state: Value
    sha256: Annotated[str, msgspec.Meta(description="Of a pickle's bytes, in hexadecimal.")] | None
    version: Count
    methods: tuple[str, ...]
    cache: CacheSeconds | None = None


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function: Python source, run in a kernel."""

    name: Name
    source: str
    sha256: Annotated[str, msgspec.Meta(description="Of the source in UTF-8, in hexadecimal.")]
    lm: Annotated[bool, msgspec.Meta(description="Whether it is run with the session's language model.")] = False
    secrets: Annotated[tuple[str, ...], msgspec.Meta(description="The session's secrets that it is run with.")] = ()
    cache: CacheSeconds | None = None


class LanguageModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments of `dspy.LM`, without the key."""

    model: str
    api_base: str | None
    adapter: str | None
    options: dict[str, Any]


class Session(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A session and what it owns. `secrets` and `tools` are names only: set and define them anew."""

    id: Name
    created: Seconds
    ttl: Annotated[float, msgspec.Meta(gt=0, description="Seconds that it may be unused before it expires.")] | None
    version: Annotated[int, msgspec.Meta(ge=0, description="How many commits there were.")]
    lm: LanguageModel | None = None
    variables: tuple[Variable, ...] = ()
    instances: tuple[Instance, ...] = ()
    functions: tuple[Function, ...] = ()
    secrets: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()


class Export(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sessions of Bridge, exported."""

    format: Literal["bridge.sessions"]
    version: Annotated[
        Literal[1], msgspec.Meta(description="Of the format. A reader refuses one that it does not know.")
    ]
    exported: Annotated[str, msgspec.Meta(description="When, in ISO 8601, UTC.")]
    bridge: Annotated[str, msgspec.Meta(description="The version of Bridge that wrote it.")]
    sessions: tuple[Session, ...]


class Header(msgspec.Struct):
    """What says whether the rest can be read."""

    format: str = ""
    version: int = 0


def json_schema() -> dict[str, Any]:
    """The format as JSON Schema 2020-12, for hosts in other languages; committed as docs/session-export.schema.json."""
    schema = msgspec.json.schema(Export)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Sessions of Bridge, exported",
        "description": "One file, in UTF-8. Names of tools and secrets are in it, their content is not.",
        **schema,
    }
