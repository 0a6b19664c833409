"""Values and their wire form: a Python value to a JSON-able tree with binary buffers, and back.

What goes out and comes back is equal and of the same type, or raises `NotSerializable` naming the path inside
the value. JSON stands for itself; the rest is an object `{"$bridge": kind, …}`. This file owns the
walk; `scalars`, `containers`, `tags`, `records`, `arrays` and `tables` own their kinds. Nothing here is imported
because a peer names it, and no code of the user's runs, but for the `__hash__` of what a peer puts in a set.

Not kept: that two parts of a value are the same object, and whether an array or a table may be written to.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from . import arrays, containers, dspy_records, records, scalars, tables, tags
from .faults import Fault, key_step, malformed, too_much, unserializable
from .records import Record, loaded_class, register_record
from .scalars import MAX_INT, MIN_INT, check_text
from .tags import Ref, Tag, ToolRef, VariableRef

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

__all__ = (
    "MAX_DEPTH",
    "MAX_ITEMS",
    "Buffer",
    "Decoder",
    "Encoded",
    "Encoder",
    "Kind",
    "Record",
    "Ref",
    "Tag",
    "ToolRef",
    "VariableRef",
    "decode",
    "encode",
    "loaded_class",
    "register_record",
)

Buffer: TypeAlias = bytes | memoryview
Kind: TypeAlias = "Callable[[Any, Any, int], Any]"
"""How a kind is encoded, or decoded: (the Encoder or Decoder, the value or its tree, levels left) to the other."""

# Deeper data is almost always a cycle. A level costs up to 4 Python frames and 3 of JSON, of the 1000 there are.
MAX_DEPTH: Final = 100
# Items of all containers of one value. Lists that share lists grow exponentially when they are written as a tree.
MAX_ITEMS: Final = 10_000_000


class Encoded(NamedTuple):
    """A value's wire form: `json` holds only what JSON has, and numbers that point into `buffers`."""

    json: Any
    buffers: list[Buffer]


class Encoder:
    """Encodes several values into one list of buffers.

    Buffers are views of the values' own memory where that is possible: send them before you change the values.
    """

    __slots__ = ("_default", "_items", "buffers", "inline")

    def __init__(self, default: Callable[[object], Tag | None] | None = None) -> None:
        self.buffers: list[Buffer] = []
        self.inline = False  # inside a set: bytes are written as base64, whatever their length
        self._default = default
        self._items = 0

    def encode(self, value: object, root: str = "value") -> Any:
        """The JSON-able tree of `value`; its buffers are added to `buffers`, or none of them if it raises.

        Raises:
            NotSerializable: something inside cannot be carried; `root` begins the path that the message names.
        """
        mark = len(self.buffers)
        self._items = 0
        self.inline = False
        try:
            return self.tree(value, MAX_DEPTH)
        except Fault as fault:
            del self.buffers[mark:]
            raise fault.raised(root) from fault.__cause__
        except RecursionError:
            del self.buffers[mark:]
            raise _too_deep().raised(root) from None
        except BaseException:
            del self.buffers[mark:]
            raise

    def attach(self, buffer: Buffer) -> int:
        """Add a buffer; its number."""
        self.buffers.append(buffer)
        return len(self.buffers) - 1

    def tree(self, value: object, depth: int) -> Any:
        """The tree of any value that may hold `depth` levels of containers."""
        kind = _ENCODERS.get(type(value))
        return self._other(value, depth) if kind is None else kind(self, value, depth)

    def items(self, values: Collection[object], depth: int, step: str = "[{}]") -> list[Any]:
        """The trees of a container's items; `step` makes an item's position a step of the path."""
        self._enter(values, depth)
        kinds = set(map(type, values))
        if len(kinds) == 1 and (is_plain := _PLAIN.get(kinds.pop())) is not None and is_plain(values):
            return list(values)
        depth -= 1
        out: list[Any] = []
        try:
            for value in values:
                out.append(self.tree(value, depth))  # noqa: PERF401 - the length of `out` is the position of a fault
        except Fault as fault:
            fault.steps.append(step.format(len(out)))
            raise
        return out

    def fields(self, values: dict[str, Any], depth: int, step: Callable[[str], str] = key_step) -> dict[str, Any]:
        """The trees of a dict with strings for keys; `step` makes a key a step of the path."""
        self._enter(values, depth)
        depth -= 1
        out: dict[str, Any] = {}
        key = ""
        try:
            for key, value in values.items():
                if not key.isascii():
                    check_text(key)
                # The common kinds are looked at here: a call for each would double the time.
                kind = type(value)
                if (
                    (kind is str and value.isascii())
                    or (kind is int and MIN_INT <= value <= MAX_INT)
                    or kind is bool
                    or (kind is float and isfinite(value))
                ):
                    out[key] = value
                else:
                    encoder = _ENCODERS.get(kind)
                    out[key] = self._other(value, depth) if encoder is None else encoder(self, value, depth)
        except Fault as fault:
            fault.steps.append(step(key))
            raise
        return out

    def _enter(self, values: Collection[object], depth: int) -> None:
        if depth <= 0:
            raise _too_deep()
        self._items += len(values)
        if self._items > MAX_ITEMS:
            raise unserializable(
                f"more than {MAX_ITEMS} items in one value, those of shared lists counted each time",
                "Send a numpy array or an Arrow table instead of lists.",
            )

    def _other(self, value: object, depth: int) -> Any:
        for encode_kind in (records.encode_record, arrays.encode_array, tables.encode_table):
            tree = encode_kind(self, value, depth)
            if tree is not None:
                return tree
        tag = None if self._default is None else self._default(value)
        if tag is None:
            raise _no_kind(value)
        if type(tag) not in tags.ENCODERS:
            raise TypeError(f"default must return a Ref, a ToolRef, a VariableRef or None, not {type(tag).__name__}")
        return self.tree(tag, depth)


class Decoder:
    """Decodes several values that share a list of buffers. Each buffer belongs to exactly one value.

    Decoded arrays are read-only views of their buffer (`.copy()` makes one to write to).
    """

    __slots__ = ("_buffers", "_hook", "_unused", "resolve")

    def __init__(
        self,
        buffers: Iterable[Buffer] = (),
        *,
        resolve: Callable[[str], type | None] = loaded_class,
        hook: Callable[[Tag], object] | None = None,
    ) -> None:
        self._buffers = list(buffers)
        self._unused = set(range(len(self._buffers)))
        self.resolve = resolve
        self._hook = hook

    def decode(self, tree: object, root: str = "value") -> Any:
        """The value of a tree.

        Raises:
            MalformedValue: the tree or a buffer is not what `Encoder` makes; the message begins with the path.
            LimitExceeded: it is deeper than `MAX_DEPTH`, or another limit is passed.
        """
        try:
            return self.value(tree, MAX_DEPTH)
        except Fault as fault:
            raise fault.raised(root) from fault.__cause__
        except RecursionError:
            raise _too_deep_to_read().raised(root) from None

    def finish(self, root: str = "value") -> None:
        """Call when all values are decoded.

        Raises:
            MalformedValue: a buffer belongs to no value.
        """
        if self._unused:
            raise malformed(f"buffer {min(self._unused)} belongs to nothing in it").raised(root)

    def take(self, index: object) -> memoryview | bytes:
        """The bytes of a buffer, which nothing else may use."""
        if type(index) is not int or not 0 <= index < len(self._buffers):
            raise malformed(f'"buffer" must be an integer from 0 to {len(self._buffers) - 1}')
        if index not in self._unused:
            raise malformed(f"buffer {index} is used twice")
        self._unused.discard(index)
        view = memoryview(self._buffers[index])
        return view.cast("B").toreadonly() if view.nbytes else b""

    def value(self, tree: object, depth: int) -> Any:
        """The value of a tree that may hold `depth` levels of containers."""
        kind = type(tree)
        if kind in _SCALARS:
            return tree
        if kind is dict:
            return self._tagged(tree, depth) if "$bridge" in tree else self.fields(tree, depth)  # type: ignore[operator,arg-type]
        if kind is list:
            return self.items(tree, depth)
        raise malformed(f"a {kind.__name__} is not JSON")

    def items(self, trees: object, depth: int, step: str = "[{}]") -> list[Any]:
        """The values of a container's items; `step` makes an item's position a step of the path."""
        if type(trees) is not list:
            raise malformed("a list of values was expected")
        if depth <= 0:
            raise _too_deep_to_read()
        if _SCALARS.issuperset(map(type, trees)):
            return trees.copy()
        depth -= 1
        out: list[Any] = []
        try:
            for tree in trees:
                out.append(self.value(tree, depth))  # noqa: PERF401 - as in Encoder.items
        except Fault as fault:
            fault.steps.append(step.format(len(out)))
            raise
        return out

    def fields(self, trees: object, depth: int, step: Callable[[str], str] = key_step) -> dict[str, Any]:
        """The values of an object whose members all stand for themselves."""
        if type(trees) is not dict:
            raise malformed("an object of values was expected")
        if depth <= 0:
            raise _too_deep_to_read()
        depth -= 1
        out: dict[str, Any] = {}
        key = ""
        try:
            for key, tree in trees.items():
                if type(key) is not str:
                    raise malformed("a key of a JSON object must be a string")
                out[key] = tree if type(tree) in _SCALARS else self.value(tree, depth)
        except Fault as fault:
            fault.steps.append(step(key))
            raise
        return out

    def tag(self, tag: Tag) -> object:
        """What takes the tag's place."""
        return tag if self._hook is None else self._hook(tag)

    def _tagged(self, tree: dict[str, Any], depth: int) -> Any:
        name = tree["$bridge"]
        known = _DECODERS.get(name) if type(name) is str else None
        if known is None:
            raise malformed(
                f"there is no kind {key_step(name)[1:-1]} of value", "Is the other side newer than this one?"
            )
        kind, required, allowed = known
        if not required <= tree.keys() <= allowed:
            missing, extra = required - tree.keys(), tree.keys() - allowed
            wrong = f"lacks {_names(missing)}" if missing else f"must not have {_names(extra)}"
            raise malformed(f'a "{name}" {wrong}')
        return kind(self, tree, depth)


def encode(value: object, *, root: str = "value", default: Callable[[object], Tag | None] | None = None) -> Encoded:
    """A value's wire form. `default` is asked for the tag of an object that the codec does not know.

    Raises:
        NotSerializable: something inside cannot be carried; `root` begins the path that the message names.
    """
    encoder = Encoder(default)
    return Encoded(encoder.encode(value, root), encoder.buffers)


def decode(
    tree: object,
    buffers: Sequence[Buffer] = (),
    *,
    root: str = "value",
    resolve: Callable[[str], type | None] = loaded_class,
    hook: Callable[[Tag], object] | None = None,
) -> Any:
    """The value that `encode` was given.

    `resolve` gives the class of a record by its dotted name, or None: then the result is a `Record`. `hook`
    gives what takes the place of a tag.

    Raises:
        MalformedValue: the tree or a buffer is not what `encode` makes; the message begins with the path.
        LimitExceeded: it is deeper than `MAX_DEPTH`, or another limit is passed.
    """
    decoder = Decoder(buffers, resolve=resolve, hook=hook)
    value = decoder.decode(tree, root)
    decoder.finish(root)
    return value


def _names(names: Iterable[object]) -> str:
    return ", ".join(sorted(key_step(name)[1:-1] for name in names)[:8])


def _too_deep() -> Fault:
    return unserializable(
        f"nested deeper than {MAX_DEPTH} levels, or contains itself",
        "Flatten it; refer to parts by key, not by object.",
    )


def _too_deep_to_read() -> Fault:
    return too_much(f"nested deeper than {MAX_DEPTH} levels", "Flatten it on the side that sends it.")


_REMEDIES: Final = {
    "array.array": "Convert it: list(x), or numpy.array(x).",
    "builtins.function": "Register it as a tool of the session, and pass the tool.",
    "builtins.generator": "Convert it: list(x).",
    "builtins.memoryview": "Convert it: bytes(x).",
    "builtins.method": "Register it as a tool of the session, and pass the tool.",
    "builtins.range": "Convert it: list(x).",
    "collections.deque": "Convert it: list(x).",
    "fractions.Fraction": "Send (x.numerator, x.denominator).",
}


def _no_kind(value: object) -> Fault:
    cls = type(value)
    name = f"{cls.__module__}.{cls.__qualname__}"
    remedy = _REMEDIES.get(name, "")
    if not remedy and cls.__module__.startswith("pathlib"):
        remedy = "Convert it: str(x)."
    # A subclass is not flattened: what it adds would be lost without a word.
    for base in () if remedy else (int, float, complex, str, bytes, bytearray, list, tuple, dict, frozenset, set):
        if isinstance(value, base):
            remedy = f"Convert it: {base.__name__}(x)."
            break
    shown = name.removeprefix("builtins.")
    return unserializable(
        f"a {shown} cannot cross the bridge",
        remedy or "Convert it to plain data, make its class a dataclass, or keep the object in an instance.",
    )


_SCALARS: Final = frozenset({type(None), bool, int, float, str})
_ENCODERS: Final = scalars.ENCODERS | containers.ENCODERS | tags.ENCODERS | {Record: records.encode_unresolved}
# Lists of one kind of scalar are checked at the speed of C.
_PLAIN: Final[dict[type, Callable[[Any], bool]]] = {
    type(None): bool,
    bool: bool,
    int: lambda values: min(values) >= MIN_INT and max(values) <= MAX_INT,
    float: lambda values: all(map(isfinite, values)),
    str: lambda values: all(map(str.isascii, values)),
}
_DECODERS: Final = {
    name: (kind, frozenset({"$bridge", *required.split()}), frozenset({"$bridge", *(required + " " + allowed).split()}))
    for table in (scalars, containers, tags, records, arrays, tables)
    for name, (kind, required, allowed) in table.DECODERS.items()
}


dspy_records.register()
