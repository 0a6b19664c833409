"""Facts to rows: what each fact does to the tables of a store's file, which are made in `migrations`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from bridge_kernel.contract.errors import LimitExceeded

from . import facts as f
from .log import KEPT_BYTES, KEPT_COMMANDS, KEPT_VERSIONS

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator, Sequence

    from ..values import Stored

__all__ = ("Row", "Writer", "rows_of", "size_of")

Cell: TypeAlias = "str | bytes | float | int | None"
Row: TypeAlias = tuple[str, tuple[Cell, ...]]
"""A statement and what goes into it."""

MAX_ROW_BYTES: Final = 900_000_000  # SQLite takes 1,000,000,000, what it adds included
MAX_KNOWN: Final = 20_000  # variables whose versions the writer has counted

_PUT_SESSION: Final = "REPLACE INTO sessions (id, created, used, ttl, version, lm) VALUES (?, ?, ?, ?, ?, ?)"
_PUT_VARIABLE: Final = "REPLACE INTO variables (session, name, version, at, restores, written, size, value) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_PUT_TYPE: Final = "REPLACE INTO types (session, name, schema) VALUES (?, ?, ?)"
_FORGET_TYPE: Final = "DELETE FROM types WHERE session = ? AND name = ?"
_PUT_INSTANCE: Final = (
    "REPLACE INTO instances (session, ref, name, class, adapter, methods, version, sha256, args, kwargs, state, cache)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_FORGET_INSTANCE: Final = "DELETE FROM instances WHERE session = ? AND ref = ?"
_PUT_FUNCTION: Final = (
    "REPLACE INTO functions (session, name, hash, lm, source, secrets, cache) VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_PUT_SECRET: Final = "REPLACE INTO secrets (session, name, sealed) VALUES (?, ?, ?)"
_FORGET_SECRET: Final = "DELETE FROM secrets WHERE session = ? AND name = ?"
_BEGIN: Final = (
    "INSERT INTO commands (id, session, method, subject, key, digest, sealed, began, request, attempts, callbacks)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 1, 0)"
    " ON CONFLICT (id) DO UPDATE SET session = excluded.session, method = excluded.method, subject = excluded.subject,"
    " key = excluded.key, digest = excluded.digest, sealed = excluded.sealed, began = excluded.began,"
    " request = excluded.request, attempts = 1, callbacks = 0, ending = NULL, ended = NULL, error = NULL, result = NULL"
)
_TRY: Final = "UPDATE commands SET attempts = ? WHERE id = ?"
# Of commands that are unknown by now, a deleted session's, nothing comes back.
_CALL: Final = (
    "REPLACE INTO callbacks (command, n, seq, method, about, digest, request)"
    " SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7 WHERE EXISTS (SELECT 1 FROM commands WHERE id = ?1)"
)
_ANSWER: Final = "UPDATE callbacks SET reply = ? WHERE command = ? AND n = ?"
_FORGET_CALL: Final = "DELETE FROM callbacks WHERE command = ? AND n = ?"
_FORGET_CALLS: Final = "DELETE FROM callbacks WHERE command = ?"
# What it would take to run it again is not needed any more. A key's result is kept, and which instance it made; but only
# of what succeeded: what failed may run anew, and is remembered like a command without a key.
_END: Final = (
    "UPDATE commands SET error = ?2, result = CASE WHEN key IS NULL OR ?2 IS NOT NULL THEN NULL ELSE ?3 END, ended = ?4,"
    " attempts = ?5, callbacks = ?6,"
    " request = CASE WHEN key IS NOT NULL AND ?2 IS NULL AND method = 'instance.create' THEN request ELSE x'' END,"
    " ending = CASE WHEN key IS NULL OR ?2 IS NOT NULL"
    " THEN (SELECT coalesce(max(ending), 0) + 1 FROM commands WHERE ending IS NOT NULL) END WHERE id = ?1"
)
_FORGET_OLD: Final = (
    "DELETE FROM commands WHERE ending <="
    f" (SELECT max(ending) FROM commands WHERE ending IS NOT NULL) - {KEPT_COMMANDS}"
)
_FORGET_COMMAND: Final = "DELETE FROM commands WHERE id = ?"
_FORGET_SESSION: Final = "DELETE FROM sessions WHERE id = ?"
_FORGET_OWNED: Final = (
    "DELETE FROM callbacks WHERE command IN (SELECT id FROM commands WHERE session = ?)",
    *(
        f"DELETE FROM {table} WHERE session = ?"
        for table in ("commands", "variables", "types", "instances", "functions", "secrets")
    ),
)


def rows_of(batch: Iterable[f.Fact]) -> list[Row]:
    """A batch as the rows that record it.

    Raises:
        ValueError: there is text that UTF-8 cannot carry, or a number that is none: what cannot be written is refused
            before it is in the queue, where it would fail everybody.
        LimitExceeded: a row is larger than SQLite takes.
    """
    rows = [row for fact in batch for row in _rows_of(fact)]
    for _, cells in rows:
        _check(cells)
    return rows


def size_of(rows: Iterable[Row]) -> int:
    """Roughly how many bytes they take in memory."""
    return sum(100 + sum(len(cell) for cell in cells if type(cell) is bytes or type(cell) is str) for _, cells in rows)


def _check(cells: Sequence[Cell]) -> None:
    size = 0
    for cell in cells:
        if isinstance(cell, str):
            size += len(cell) if cell.isascii() else len(cell.encode())
        elif isinstance(cell, bytes):
            size += len(cell)
        elif isinstance(cell, float):
            if math.isnan(cell):
                raise ValueError("not a number (NaN) cannot be recorded")
        elif cell is not None and not -(1 << 63) <= cell < 1 << 63:
            raise ValueError(f"{cell} is more than 64 bits")
    if size > MAX_ROW_BYTES:
        raise LimitExceeded(
            f"a value takes {size:,} bytes, and a store on disk takes {MAX_ROW_BYTES:,} at most",
            remedy="Keep it in parts, or in a file of its own whose name is the value.",
        )


def _rows_of(fact: f.Fact) -> Sequence[Row]:
    match fact:
        case f.VariablePut(session, name, version, at, value, written, restores):
            size, blob = (value.size, _packed(value)) if value is not None else (0, None)
            return ((_PUT_VARIABLE, (session, name, version, at, restores, written, size, blob)),)
        case f.SessionPut(id, created, used, ttl, version, lm):
            text = msgspec.json.encode(lm).decode() if lm is not None else None
            return ((_PUT_SESSION, (id, created, used, ttl, version, text)),)
        case f.SessionForgotten(id):
            return (*((sql, (id,)) for sql in _FORGET_OWNED), (_FORGET_SESSION, (id,)))
        case f.TypePut(session, name, None):
            return ((_FORGET_TYPE, (session, name)),)
        case f.TypePut(session, name, schema):
            return ((_PUT_TYPE, (session, name, schema)),)
        case f.InstancePut(session, instance):
            return (_instance_row(session, instance),)
        case f.InstanceForgotten(session, ref):
            return ((_FORGET_INSTANCE, (session, ref)),)
        case f.FunctionPut(session, function):
            names = msgspec.json.encode(function.secrets).decode()
            cells = (session, function.name, function.hash, function.lm, function.source, names, function.cache)
            return ((_PUT_FUNCTION, cells),)
        case f.SecretPut(session, name, sealed):
            return ((_PUT_SECRET, (session, name, sealed)),)
        case f.SecretForgotten(session, name):
            return ((_FORGET_SECRET, (session, name)),)
        case f.CommandBegun(id, session, method, subject, key, digest, request, sealed, began):
            return ((_BEGIN, (id, session, method, subject, key, digest, sealed, began, request)),)
        case f.CommandTried(id, attempt):
            return ((_TRY, (attempt, id)),)
        case f.CallbackMade(command, n, seq, method, about, digest, request):
            return ((_CALL, (command, n, seq, method, about, digest, request)),)
        case f.CallbackAnswered(command, n, reply):
            return ((_ANSWER, (reply, command, n)),)
        case f.CallbacksForgotten(command, numbers):
            return tuple((_FORGET_CALL, (command, n)) for n in numbers)
        case f.CommandEnded(id, error, result, ended, attempts, callbacks):
            end = (_END, (id, error, result, ended, attempts, callbacks))
            return (end, (_FORGET_CALLS, (id,)), (_FORGET_OLD, ()))
        case f.CommandForgotten(id):
            return ((_FORGET_CALLS, (id,)), (_FORGET_COMMAND, (id,)))


def _instance_row(session: str, i: f.InstanceState) -> Row:
    methods = msgspec.json.encode(i.methods).decode()
    blobs = (_packed(i.args), _packed(i.kwargs), _packed(i.state))
    return _PUT_INSTANCE, (session, i.ref, i.name, i.cls, i.adapter, methods, i.version, i.sha256, *blobs, i.cache)


def _packed(value: Stored) -> bytes:
    return msgspec.msgpack.encode((value.type, memoryview(value.json), value.buffers))


class _Kept:
    """Of one variable: how many versions are in the file, and what they take. `old` are those before the newest."""

    __slots__ = ("count", "newest", "old")

    def __init__(self, count: int, old: int, newest: int) -> None:
        self.count = count
        self.old = old
        self.newest = newest


class Writer:
    """Writes rows in the transaction that its owner has begun, and drops the versions that are not kept any more."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        # Derived from the file, so it may be dropped at any time.
        self._kept: dict[str, dict[str, _Kept]] = {}
        self._known = 0

    def write(self, rows: Iterable[Row]) -> None:
        for sql, cells in rows:
            if sql is _PUT_VARIABLE:
                self._put(cells)
                continue
            self._db.execute(sql, cells)
            if sql is _FORGET_SESSION:
                self._known -= len(self._kept.pop(cells[0], ()))  # type: ignore[arg-type]

    def _put(self, cells: tuple[Any, ...]) -> None:
        session, name, size = cells[0], cells[1], cells[6]
        kept = self._kept_of(session, name)
        self._db.execute(_PUT_VARIABLE, cells)
        kept.count += 1
        kept.old += kept.newest
        kept.newest = size
        if kept.count > KEPT_VERSIONS or kept.old > KEPT_BYTES:
            self._prune(session, name, kept)

    def _kept_of(self, session: str, name: str) -> _Kept:
        variables = self._kept.get(session)
        kept = variables.get(name) if variables is not None else None
        if kept is None:
            if self._known >= MAX_KNOWN:
                self._kept.clear()
                self._known = 0
            sizes = [size for _, size in self._versions(session, name)]
            kept = _Kept(len(sizes), sum(sizes[:-1]), sizes[-1] if sizes else 0)
            self._kept.setdefault(session, {})[name] = kept
            self._known += 1
        return kept

    def _versions(self, session: str, name: str) -> Iterator[tuple[int, int]]:
        return self._db.execute(
            "SELECT version, size FROM variables WHERE session = ? AND name = ? ORDER BY version", (session, name)
        )

    def _prune(self, session: str, name: str, kept: _Kept) -> None:
        last = 0
        for version, size in self._versions(session, name):
            if kept.count <= 1 or (kept.count <= KEPT_VERSIONS and kept.old <= KEPT_BYTES):
                break
            kept.count -= 1
            kept.old -= size
            last = version
        self._db.execute("DELETE FROM variables WHERE session = ? AND name = ? AND version <= ?", (session, name, last))
