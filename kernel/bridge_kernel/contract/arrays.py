"""numpy arrays and scalars: dtype and shape in JSON, the items in one buffer, neither copied where it can be helped.

numpy is looked for, not imported, when encoding: a value of its types exists only if it is loaded.
"""

from __future__ import annotations

import binascii
import importlib
import math
import re
import sys
from typing import TYPE_CHECKING, Any, Final

from .faults import malformed, member, too_much, unserializable
from .scalars import MAX_INT, check_text, raw_bytes

if TYPE_CHECKING:
    from .values import Decoder, Encoder, Kind

__all__ = ("DECODERS", "MAX_DTYPE_DEPTH", "MAX_RANK", "encode_array", "library")

MAX_RANK: Final = 64  # numpy's own
MAX_DTYPE_DEPTH: Final = 16  # structs within structs: far beyond what records on disk or on a wire have
MAX_HOLLOW: Final = 1_000_000  # items that take no bytes: nothing else bounds how many a peer may declare

_PLAIN_DTYPE = re.compile(r"[<>|](?:[biufcSUV][0-9]{1,10}|[mM]8(?:\[[0-9]{0,9}[a-zA-Zμ]{1,2}\])?)")


def library(name: str) -> Any:
    """A library that a value needs in order to be decoded, imported now; `name` is never a peer's word."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise malformed(f"{name} is needed to decode it", "pip install 'bridge-kernel[arrow]'") from error


def encode_array(encoder: Encoder, value: Any, _depth: int) -> Any:
    """The tree of a numpy array or scalar, or None if it is neither."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not hasattr(numpy, "ndarray"):
        return None
    if type(value) is numpy.ndarray:
        return _encode_ndarray(encoder, value, numpy)
    if isinstance(value, numpy.generic):
        return _encode_scalar(value, numpy)
    if isinstance(value, numpy.ndarray):
        raise unserializable(f"a {type(value).__name__} is more than an array", "Convert it: numpy.array(x).")
    return None


def _encode_ndarray(encoder: Encoder, array: Any, numpy: Any) -> Any:
    descr = _describe(array.dtype, numpy)
    if not array.itemsize and array.size > MAX_HOLLOW:
        raise unserializable(f"an array of more than {MAX_HOLLOW} items of no bytes", "Give its dtype a size.")
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    # Copies only if the array is contiguous neither way.
    flat = numpy.ascontiguousarray((array.T if order == "F" else array).reshape(-1))
    data = memoryview(flat.view(numpy.uint8)).toreadonly() if array.size and array.itemsize else b""
    tree = {"$bridge": "ndarray", "dtype": descr, "shape": list(array.shape), "order": order}
    return tree | {"buffer": encoder.attach(data)}


def _encode_scalar(value: Any, numpy: Any) -> Any:
    if type(value) is not value.dtype.type or value.dtype.hasobject:
        raise unserializable(f"a {type(value).__name__} is no plain numpy scalar", "Convert it: x.item().")
    if type(value) is numpy.str_:
        check_text(str(value))
        return {"$bridge": "npscalar", "dtype": "str", "text": str(value)}
    if type(value) is numpy.bytes_:
        descr, data = "bytes", bytes(value)  # not through an array, which would drop the zeros at its end
    else:
        descr, data = _describe(value.dtype, numpy), numpy.asarray(value).tobytes()
    return {"$bridge": "npscalar", "dtype": descr, "base64": binascii.b2a_base64(data, newline=False).decode()}


def _describe(dtype: Any, numpy: Any) -> Any:
    """The dtype as numpy's own file format writes it, with lists for tuples."""
    obstacle = _obstacle(dtype, numpy, MAX_DTYPE_DEPTH)
    if not obstacle:
        try:
            descr = _to_json(numpy.lib.format.dtype_to_descr(dtype))
            if _from_json(descr, numpy, MAX_DTYPE_DEPTH) == dtype:
                return descr
        except (ValueError, TypeError):  # overlapping fields, and dtypes of other libraries
            pass
        obstacle = "a dtype that numpy's file format cannot describe"
    remedy = (
        "Convert it: x.tolist()." if dtype.hasobject else "Convert it with x.astype(…) to one of numpy's plain dtypes."
    )
    raise unserializable(f"an array of {str(dtype)[:200]}: {obstacle}", remedy)


def _obstacle(dtype: Any, numpy: Any, depth: int) -> str:
    if depth < 0:
        return f"structs nested deeper than {MAX_DTYPE_DEPTH}"
    if dtype.hasobject:
        return "its items are Python objects"
    if dtype.metadata is not None:
        return "metadata of its dtype would be lost"
    if dtype.names is not None and dtype.type is not numpy.void:
        return f"its items are {dtype.type.__name__}, not plain structs"
    inner = [] if dtype.subdtype is None else [dtype.subdtype[0]]
    for name, (field, *_rest) in (dtype.fields or {}).items():
        check_text(name)
        inner.append(field)
    return next(filter(None, (_obstacle(field, numpy, depth - 1) for field in inner)), "")


def _to_json(descr: Any) -> Any:
    return descr if isinstance(descr, str | int) else [_to_json(part) for part in descr]


def _from_json(descr: Any, numpy: Any, depth: int) -> Any:
    """The dtype of a description, every part of it checked before numpy sees it."""
    try:
        return numpy.lib.format.descr_to_dtype(_checked(descr, depth))
    except (ValueError, TypeError, OverflowError, MemoryError, KeyError, IndexError, SyntaxError) as error:
        raise malformed('"dtype" is none that numpy knows here') from error


def _checked(descr: Any, depth: int) -> Any:
    if depth < 0:
        raise too_much(f'"dtype" has structs nested deeper than {MAX_DTYPE_DEPTH}')
    if type(descr) is str and _PLAIN_DTYPE.fullmatch(descr):
        return descr
    if type(descr) is list and all(type(field) is list and len(field) in (2, 3) for field in descr):
        return [(_field_name(name), _checked(inner, depth - 1), *map(_shape, shape)) for name, inner, *shape in descr]
    raise malformed('"dtype" must be a description as in numpy\'s file format')


def _field_name(name: Any) -> Any:
    if type(name) is str:
        return name
    if type(name) is list and len(name) == 2 and all(type(part) is str for part in name):
        return tuple(name)  # title and name
    raise malformed('a field of "dtype" must be named by a string, or by its title and name')


def _shape(shape: Any) -> tuple[int, ...]:
    if type(shape) is not list or any(type(length) is not int or not 0 <= length <= MAX_INT for length in shape):
        raise malformed("a shape must be a list of 64-bit integers from 0")
    if len(shape) > MAX_RANK:
        raise too_much(f"an array has at most {MAX_RANK} dimensions, not {len(shape)}")
    return tuple(shape)


def _from_ndarray(decoder: Decoder, tree: dict[str, Any], _depth: int) -> object:
    shape = _shape(tree["shape"])
    if (order := tree["order"]) not in ("C", "F"):
        raise malformed('"order" must be "C" or "F"')
    numpy = library("numpy")
    dtype = _from_json(tree["dtype"], numpy, MAX_DTYPE_DEPTH)
    data = decoder.take(tree["buffer"])
    items = math.prod(shape)  # Python's integers: a huge shape fails here, before anything is allocated
    if items * dtype.itemsize != len(data):
        raise malformed(f"{items} items of {dtype.itemsize} bytes do not make a buffer of {len(data)} bytes")
    if not dtype.itemsize and items > MAX_HOLLOW:
        raise too_much(f"more than {MAX_HOLLOW} items of no bytes")
    try:
        return numpy.ndarray(shape, dtype, memoryview(data), order=order)
    except (ValueError, TypeError, OverflowError, MemoryError) as error:  # e.g. one length is 0, the others huge
        raise malformed("numpy cannot make an array of this shape") from error


def _from_scalar(decoder: Decoder, tree: dict[str, Any], _depth: int) -> object:
    numpy = library("numpy")
    if tree["dtype"] == "str":
        if "text" not in tree or "base64" in tree:
            raise malformed('a "npscalar" of "str" has "text"')
        return numpy.str_(member(tree, "text", str))
    if "base64" not in tree or "text" in tree:
        raise malformed('a "npscalar" has "base64"')
    data = raw_bytes(decoder, tree)
    if tree["dtype"] == "bytes":
        return numpy.bytes_(data)
    dtype = _from_json(tree["dtype"], numpy, MAX_DTYPE_DEPTH)
    if dtype.itemsize != len(data) or dtype.kind in "SU" or dtype.subdtype is not None:
        raise malformed(f"{len(data)} bytes are no scalar of this dtype")
    return numpy.ndarray((), dtype, data)[()]


DECODERS: Final[dict[str, tuple[Kind, str, str]]] = {
    "ndarray": (_from_ndarray, "dtype shape order buffer", ""),
    "npscalar": (_from_scalar, "dtype", "base64 text"),
}
