"""Values as the host holds them: kept encoded, so that nobody changes them by accident, and decoded when read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from bridge_kernel.contract.errors import BridgeError, MalformedValue
from bridge_kernel.contract.values import Decoder, Encoder, Tag

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bridge_kernel.contract.frames import Buffer

__all__ = ("Stored", "ValueReader", "ValueWriter", "store", "store_tree")

_decode: Final = msgspec.json.Decoder().decode
_AT_REST: Final = (
    "It is not what was written, or its class has changed since: set it anew, bring back an earlier version "
    "(session.variables[name].revert), or restore the store from a copy."
)


def _as_tag(value: object) -> Tag | None:
    # Looked up on the class: an instance's proxy answers to any name.
    found = getattr(type(value), "__bridge_tag__", None)
    return value.__bridge_tag__ if found is not None else None  # type: ignore[attr-defined]


class ValueWriter:
    """Writes the values of one message; their buffers accumulate."""

    def __init__(self, buffers: Sequence[Buffer] = ()) -> None:
        """`buffers` are those of values that were written before and are in the message too."""
        self._encoder = Encoder(default=_as_tag)
        self._encoder.buffers.extend(buffers)

    @property
    def buffers(self) -> Sequence[Buffer]:
        return self._encoder.buffers

    def write(self, value: Any, root: str) -> Any:
        """The JSON-able tree; raises `NotSerializable`, whose path begins with `root`."""
        return self._encoder.encode(value, root)

    def write_all(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call."""
        return (
            tuple(self.write(value, f"args[{i}]") for i, value in enumerate(args)),
            {name: self.write(value, name) for name, value in kwargs.items()},
        )


class ValueReader:
    """Reads the values of one message. `hook` says what a ref or a tool becomes; without one they stay tags."""

    def __init__(self, buffers: Sequence[Buffer], hook: Callable[[Tag], object] | None = None) -> None:
        self._decoder = Decoder(buffers, hook=hook)

    def read(self, tree: Any, root: str) -> Any:
        return self._decoder.decode(tree, root)


class Stored(msgspec.Struct, frozen=True):
    """A value at rest: its JSON and its buffers, copied, so that it is nobody else's."""

    json: msgspec.Raw
    buffers: tuple[bytes, ...]
    type: str
    plain: bool = False
    """Whether the JSON stands for itself, with nothing tagged in it."""

    @classmethod
    def of(cls, json: bytes, buffers: tuple[bytes, ...], type: str) -> Stored:
        return cls(msgspec.Raw(json), buffers, type, not buffers and b'"$bridge"' not in json)

    @property
    def size(self) -> int:
        return len(self.json) + sum(map(len, self.buffers))

    def tree(self, root: str = "value") -> Any:
        """The JSON-able tree. Raises `MalformedValue`, as `read` does."""
        try:
            return _decode(self.json)
        except (ValueError, RecursionError) as exc:
            raise MalformedValue(f"{root}: the stored value is damaged: {exc}", remedy=_AT_REST) from exc

    def read(self, root: str, hook: Callable[[Tag], object] | None = None) -> Any:
        """The value, made anew: changing it changes nothing here.

        Raises:
            MalformedValue: its bytes were damaged where they were kept. The message begins with `root`.
        """
        if not self.plain:
            return self._read_tagged(root, hook)
        try:
            return _decode(self.json)
        except (ValueError, RecursionError):
            return self.tree(root)  # which says so

    def _read_tagged(self, root: str, hook: Callable[[Tag], object] | None) -> Any:
        tree = self.tree(root)
        try:
            return ValueReader(self.buffers, hook).read(tree, root)
        except MalformedValue as exc:
            if exc.remedy:  # a library that is missing, say
                raise
            raise MalformedValue(exc.message, remedy=_AT_REST) from exc


def store(value: Any, root: str) -> Stored:
    """Put a value of the host's at rest. Raises `NotSerializable`."""
    writer = ValueWriter()
    tree = writer.write(value, root)
    return Stored.of(msgspec.json.encode(tree), tuple(map(bytes, writer.buffers)), type(value).__name__)


def store_tree(tree: Any, buffers: Sequence[Buffer], root: str) -> Stored:
    """Put at rest what a kernel sent, once it has proved to be a value.

    Raises:
        MalformedValue: it is none.
    """
    try:
        value = ValueReader(buffers).read(tree, root)
    except BridgeError:
        raise
    except (ValueError, TypeError, RecursionError) as exc:
        raise MalformedValue(f"{root}: {exc}") from exc
    # Written anew: the message's buffers hold other values too, and their numbers are the message's.
    return store(value, root)
