"""The OpenRPC document of the contract, made from `methods.METHODS` and `errors.ERRORS`."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from .._version import __version__
from .errors import ERRORS
from .frames import JUPYTER_VERSION
from .messages import COMM_TARGET, PROTOCOL_VERSION
from .methods import METHODS, Method
from .telemetry import TELEMETRY_MIME, EventBatch

__all__ = ("document",)

_REF: Final = "#/components/schemas/{name}"

_VALUE_SCHEMA: Final = {
    "title": "Value",
    "description": (
        'Any JSON stands for itself. An object with a "$bridge" member is a tagged value: its kind and what '
        "that kind needs; binary parts are named by their index in the comm message's buffers."
    ),
    "anyOf": [
        {"type": ["null", "boolean", "integer", "number", "string"]},
        {"type": "array", "items": {"$ref": "#/components/schemas/Value"}},
        {"type": "object", "additionalProperties": {"$ref": "#/components/schemas/Value"}},
        {"type": "object", "properties": {"$bridge": {"type": "string"}}, "required": ["$bridge"]},
    ],
}


def _required(params: type[msgspec.Struct]) -> set[str]:
    return {f.encode_name for f in msgspec.structs.fields(params) if f.required}


def _method(method: Method, schemas: dict[str, Any]) -> dict[str, Any]:
    name = method.params.__name__
    required = _required(method.params)
    properties: dict[str, Any] = schemas[name].get("properties", {})
    entry: dict[str, Any] = {
        "name": method.name,
        "summary": method.summary,
        "tags": [{"name": f"sent by the {method.side}"}, {"name": "request" if method.result else "notification"}],
        "paramStructure": "by-name",
        # OpenRPC wants the required ones first, even when they go by name.
        "params": [
            {"name": key, "required": key in required, "schema": {"$ref": f"{_REF.format(name=name)}/properties/{key}"}}
            for key in sorted(properties, key=lambda key: key not in required)
        ],
        "errors": [{"code": e.code, "message": e.summary} for e in method.errors],
    }
    if method.result is not None:
        result = method.result.__name__
        entry["result"] = {"name": result, "schema": {"$ref": _REF.format(name=result)}}
    return entry


def _draft_7(node: Any) -> Any:
    """Tuples as JSON Schema 7 writes them, which is what OpenRPC 1.3 reads: msgspec writes those of 2020-12."""
    if isinstance(node, list):
        return [_draft_7(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _draft_7(value) for key, value in node.items()}
    if "prefixItems" in node:
        node["additionalItems"] = node.pop("items", True)
        node["items"] = node.pop("prefixItems")
    return node


def document() -> dict[str, Any]:
    """An OpenRPC 1.3 document: every method of both directions, every schema, every error code."""
    types = [t for m in METHODS for t in (m.params, m.result) if t is not None]
    _, schemas = msgspec.json.schema_components([*dict.fromkeys(types), EventBatch], ref_template=_REF)
    schemas = _draft_7(schemas)
    schemas["Value"] = _VALUE_SCHEMA
    return {
        "openrpc": "1.3.2",
        "info": {
            "title": "Bridge",
            "version": ".".join(map(str, PROTOCOL_VERSION)),
            "description": (
                f"JSON-RPC 2.0 in both directions over one Jupyter comm of target `{COMM_TARGET}` "
                f"(Jupyter messaging {JUPYTER_VERSION}). Each comm message's data is one JSON-RPC message; binary "
                "parts of values ride in its buffers. The host runs commands; while one runs, the kernel calls back."
            ),
            "license": {"name": "BSD-3-Clause"},
            "x-package": {"name": "bridge-kernel", "version": __version__},
        },
        "methods": [_method(m, schemas) for m in METHODS],
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "errors": {
                cls.__name__: {"code": code, "message": cls.summary, "data": cls.default_remedy}
                for code, cls in ERRORS.items()
            },
        },
        "x-telemetry": {
            "mime": TELEMETRY_MIME,
            "schema": {"type": "array", "items": {"$ref": _REF.format(name="EventBatch")}},
        },
    }
