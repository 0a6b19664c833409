"""The frame of an Arrow IPC stream, checked before any library reads it.

What may cost more than its own bytes is refused: compressed bodies, and lengths that the bytes do not bear out.
The layout is Arrow's: messages of a flatbuffer (Message.fbs, Schema.fbs) and a body. Pure.
"""

from __future__ import annotations

import struct
from typing import Final

from .faults import malformed, too_much

__all__ = ("MAX_HOLLOW_ROWS", "check_stream")

# Columns of nulls take no bytes, however many rows they claim: rows are counted against the bytes, eight a byte as
# in a column of booleans, and this many are free.
MAX_HOLLOW_ROWS: Final = 1_000_000

_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3


class _Table:
    """A table of a flatbuffer: `field(n)` is where its n-th field is, or 0 if it is absent."""

    __slots__ = ("at", "data", "vtable", "width")

    def __init__(self, data: memoryview, at: int) -> None:
        self.data, self.at = data, at
        self.vtable = at - _read("<i", data, at)
        self.width = _read("<H", data, self.vtable)

    def field(self, number: int) -> int:
        slot = 4 + 2 * number
        offset = _read("<H", self.data, self.vtable + slot) if slot < self.width else 0
        return self.at + offset if offset else 0

    def number(self, number: int, code: str) -> int:
        at = self.field(number)
        return _read(code, self.data, at) if at else 0

    def table(self, number: int) -> _Table:
        at = self.field(number)
        if not at:
            raise malformed("the Arrow stream lacks a part of a message")
        return _Table(self.data, at + _read("<I", self.data, at))

    def pairs(self, number: int) -> list[tuple[int, int]]:
        """A vector of structs of two 64-bit integers."""
        at = self.field(number)
        if not at:
            return []
        at += _read("<I", self.data, at)
        length = _read("<I", self.data, at)
        if length * 16 > len(self.data) - at - 4:
            raise malformed("the Arrow stream is cut off")
        return list(struct.iter_unpack("<qq", self.data[at + 4 : at + 4 + 16 * length]))


def _read(code: str, data: memoryview, at: int) -> int:
    if at < 0:
        raise malformed("the Arrow stream has an offset that points before its start")
    try:
        return struct.unpack_from(code, data, at)[0]  # type: ignore[no-any-return]
    except struct.error:
        raise malformed("the Arrow stream is cut off") from None


def check_stream(data: memoryview) -> None:
    """Raise the fault of a stream that is cut off, compressed, or claims more rows than it has bytes for."""
    at = rows = messages = 0
    allowed = MAX_HOLLOW_ROWS + 8 * len(data)
    while at < len(data):
        if _read("<I", data, at) != 0xFFFF_FFFF:
            raise malformed("this is no Arrow IPC stream")
        size = _read("<i", data, at + 4)
        at += 8
        if size == 0:
            break
        if not 0 < size <= len(data) - at:
            raise malformed("the Arrow stream is cut off")
        metadata = data[at : at + size]
        message = _Table(metadata, _read("<I", metadata, 0))
        at += size
        body = message.number(3, "<q")
        if not 0 <= body <= len(data) - at:
            raise malformed("the Arrow stream is cut off")
        kind = message.number(1, "<B")
        if kind not in (_SCHEMA, _DICTIONARY, _BATCH) or (kind == _SCHEMA) is not (messages == 0):
            raise malformed("the Arrow stream's messages are not a schema, then batches")
        if kind != _SCHEMA:
            header = message.table(2)
            rows += _check_batch(header.table(1) if kind == _DICTIONARY else header, body)
            if rows > allowed:
                raise too_much("the Arrow table claims more rows than it has bytes for", "Leave out columns of nulls.")
        at += body
        messages += 1
    if at != len(data) or not messages:
        raise malformed("the Arrow stream does not end where its buffer does")


def _check_batch(batch: _Table, body: int) -> int:
    """The most rows that any array of the batch claims."""
    if batch.field(3):
        raise malformed("the Arrow stream is compressed", "Send it uncompressed: a small body may hold a huge table.")
    for offset, length in batch.pairs(2):
        if not (offset >= 0 and length >= 0 and offset + length <= body):
            raise malformed("the Arrow stream has a buffer outside its body")
    lengths = [batch.number(0, "<q")]
    for length, nulls in batch.pairs(1):
        if not 0 <= nulls <= length:
            raise malformed("the Arrow stream has an array of impossible length")
        lengths.append(length)
    if min(lengths) < 0:
        raise malformed("the Arrow stream has an array of impossible length")
    return max(lengths)
