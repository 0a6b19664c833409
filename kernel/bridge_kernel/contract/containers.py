"""The kinds of containers: list and dict as JSON has them, tuple, set, and dicts that JSON cannot carry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from .faults import Fault, key_step, malformed, member, too_much

if TYPE_CHECKING:
    from collections.abc import Sized

    from .values import Decoder, Encoder, Kind

__all__ = ("DECODERS", "ENCODERS", "MAX_SAME_HASH")

# Keys of one dict, or elements of one set, with one hash. Python's hashes of numbers are no secret: a peer could
# send a set whose insertion takes quadratic time.
MAX_SAME_HASH: Final = 64

_ONLY_STR: Final = {str}


def _list(encoder: Encoder, value: list[Any], depth: int) -> Any:
    return encoder.items(value, depth)


def _dict(encoder: Encoder, value: dict[Any, Any], depth: int) -> Any:
    if value and set(map(type, value)) != _ONLY_STR:
        return _map(encoder, value, depth)
    tree = encoder.fields(value, depth)
    return {"$bridge": "dict", "value": tree} if "$bridge" in tree else tree


def _map(encoder: Encoder, value: dict[Any, Any], depth: int) -> Any:
    keys = encoder.items(value.keys(), depth, ".keys()[{}]")
    items: list[Any] = []
    key = None
    try:
        for tree, key in zip(keys, value, strict=True):
            items.append([tree, encoder.tree(value[key], depth - 1)])
    except Fault as fault:
        fault.steps.append(key_step(key))
        raise
    return {"$bridge": "map", "items": items}


def _tuple(encoder: Encoder, value: tuple[Any, ...], depth: int) -> Any:
    return {"$bridge": "tuple", "items": encoder.items(value, depth)}


def _set(encoder: Encoder, value: set[Any] | frozenset[Any], depth: int) -> Any:
    # Sorted by their JSON, so that every process writes the same set alike. Bytes are written inline, for the
    # number of a buffer would depend on the order that is being looked for.
    outer, encoder.inline = encoder.inline, True
    trees = encoder.items(value, depth, "{{{}}}")
    encoder.inline = outer
    return {"$bridge": type(value).__name__, "items": sorted(trees, key=msgspec.json.encode)}


def _from_tuple(decoder: Decoder, tree: dict[str, Any], depth: int) -> tuple[Any, ...]:
    return tuple(decoder.items(tree["items"], depth))


def _from_set(decoder: Decoder, tree: dict[str, Any], depth: int) -> set[Any]:
    items = decoder.items(tree["items"], depth, "{{{}}}")
    _check_keys(items)
    out = set(items)
    _check_distinct(out, items)
    return out


def _from_frozenset(decoder: Decoder, tree: dict[str, Any], depth: int) -> frozenset[Any]:
    return frozenset(_from_set(decoder, tree, depth))


def _from_map(decoder: Decoder, tree: dict[str, Any], depth: int) -> dict[Any, Any]:
    pairs = member(tree, "items", list)
    if not all(type(pair) is list and len(pair) == 2 for pair in pairs):
        raise malformed('"items" of a "map" must be pairs, [key, value]')
    keys = decoder.items([pair[0] for pair in pairs], depth, ".keys()[{}]")
    _check_keys(keys)
    out: dict[Any, Any] = {}
    key = None
    try:
        for key, pair in zip(keys, pairs, strict=True):
            out[key] = decoder.value(pair[1], depth - 1)
    except Fault as fault:
        fault.steps.append(key_step(key))
        raise
    _check_distinct(out, keys)
    return out


def _check_keys(keys: list[Any]) -> None:
    seen: dict[int, int] = {}
    for position, key in enumerate(keys):
        try:
            digest = hash(key)
        except Exception as error:
            raise malformed(f"element {position}, a {type(key).__name__}, cannot be hashed") from error
        seen[digest] = count = seen.get(digest, 0) + 1
        if count > MAX_SAME_HASH:
            raise too_much(f"more than {MAX_SAME_HASH} of its elements have the same hash", "Send a list of pairs.")


def _check_distinct(made: Sized, keys: list[Any]) -> None:
    if len(made) != len(keys):
        raise malformed("two of its elements are equal")


def _from_dict(decoder: Decoder, tree: dict[str, Any], depth: int) -> dict[str, Any]:
    return decoder.fields(tree["value"], depth)


ENCODERS: Final[dict[type, Kind]] = {list: _list, dict: _dict, tuple: _tuple, set: _set, frozenset: _set}
DECODERS: Final[dict[str, tuple[Kind, str, str]]] = {
    "tuple": (_from_tuple, "items", ""),
    "set": (_from_set, "items", ""),
    "frozenset": (_from_frozenset, "items", ""),
    "map": (_from_map, "items", ""),
    "dict": (_from_dict, "value", ""),
}
