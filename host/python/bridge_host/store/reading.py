"""Rows to facts: what the tables of a store's file hold. A row that is no fact was written by somebody else."""

from __future__ import annotations

from types import NoneType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from bridge_kernel.contract.methods import LM

from ..functions import FunctionSource
from ..values import Stored
from . import facts as f
from .log import Journaled
from .migrations import damaged, explained

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator, Sequence

__all__ = ("commands", "histories", "history", "load")

_VARIABLES: Final = "SELECT session, name, version, at, restores, written, value FROM variables"
_COMMANDS: Final = (
    "SELECT id, session, method, subject, key, digest, request, sealed, began, attempts, error, result, ended, callbacks"
    " FROM commands"
)
_unpack: Final = msgspec.msgpack.Decoder(tuple[str, bytes, tuple[bytes, ...]]).decode
_methods: Final = msgspec.json.Decoder(tuple[str, ...]).decode
_lm: Final = msgspec.json.Decoder(LM).decode


_Type: TypeAlias = "type | tuple[type, ...]"
_INT_OR_NULL: Final = (int, NoneType)
_REAL_OR_NULL: Final = (float, NoneType)
_TEXT_OR_NULL: Final = (str, NoneType)
_BLOB_OR_NULL: Final = (bytes, NoneType)


def _mismatch(row: tuple[object, ...], shape: tuple[_Type, ...]) -> str:
    wrong = next(i for i, (cell, type_) in enumerate(zip(row, shape, strict=True)) if not isinstance(cell, type_))
    return f"its column {wrong + 1} holds {type(row[wrong]).__name__}"


class _Reader:
    """Rows as facts. Keeps one of equal names, for a store has few of them and very many rows."""

    def __init__(self, db: sqlite3.Connection, path: str) -> None:
        self._db = db
        self._path = path
        self._words: dict[str, str] = {}

    def read(
        self,
        table: str,
        make: Callable[..., Any],
        shape: tuple[_Type, ...],
        keys: int,
        sql: str,
        cells: Sequence[str] = (),
    ) -> Iterator[Any]:
        """What `make` makes of each row, whose cells are of the types of `shape`; the first `keys` of them name it.

        Raises:
            StoreDamaged: a row is something else, or the table is.
        """
        with explained(self._path, f"table {table}"):
            for row in self._db.execute(sql, cells):
                try:
                    if not all(map(isinstance, row, shape)):
                        raise ValueError(_mismatch(row, shape))
                    made = make(*row)
                except ValueError as exc:  # msgspec's own are ValueErrors
                    key = ", ".join(map(repr, row[:keys]))
                    raise damaged(self._path, f"table {table}, row {key}: {exc}") from exc
                yield made

    def word(self, text: str) -> str:
        return self._words.setdefault(text, text)

    def stored(self, blob: bytes) -> Stored:
        type_, json, buffers = _unpack(blob)
        return Stored.of(json, buffers, self.word(type_))

    def variables(self, sql: str, cells: Sequence[str] = ()) -> Iterator[f.VariablePut]:
        word, stored = self.word, self.stored

        def make(
            session: str, name: str, version: int, at: int, restores: int | None, written: float, value: bytes | None
        ) -> f.VariablePut:
            there = None if value is None else stored(value)
            return f.VariablePut(word(session), word(name), version, at, there, written, restores)

        shape = (str, str, int, int, _INT_OR_NULL, float, _BLOB_OR_NULL)
        return self.read("variables", make, shape, 3, sql, cells)

    def sessions(self) -> Iterator[f.SessionPut]:
        def make(id: str, created: float, used: float, ttl: float | None, version: int, lm: str | None) -> f.SessionPut:
            return f.SessionPut(self.word(id), created, used, ttl, version, None if lm is None else _lm(lm))

        shape = (str, float, float, _REAL_OR_NULL, int, _TEXT_OR_NULL)
        return self.read("sessions", make, shape, 1, "SELECT id, created, used, ttl, version, lm FROM sessions")

    def types(self) -> Iterator[f.TypePut]:
        def make(session: str, name: str, schema: bytes) -> f.TypePut:
            return f.TypePut(session, name, schema)

        return self.read("types", make, (str, str, bytes), 2, "SELECT session, name, schema FROM types")

    def functions(self) -> Iterator[f.FunctionPut]:
        def make(
            session: str, name: str, source: str, hash: str, lm: int, secrets: str, cache: float | None
        ) -> f.FunctionPut:
            names = msgspec.json.decode(secrets, type=tuple[str, ...])
            return f.FunctionPut(session, FunctionSource(name, source, hash, bool(lm), names, cache))

        sql = "SELECT session, name, source, hash, lm, secrets, cache FROM functions"
        return self.read("functions", make, (str, str, str, str, int, str, _REAL_OR_NULL), 2, sql)

    def secrets(self) -> Iterator[f.SecretPut]:
        def make(session: str, name: str, sealed: bytes) -> f.SecretPut:
            return f.SecretPut(session, name, sealed)

        return self.read("secrets", make, (str, str, bytes), 2, "SELECT session, name, sealed FROM secrets")

    def instances(self) -> Iterator[f.InstancePut]:
        stored = self.stored

        def make(
            session: str,
            ref: str,
            name: str,
            cls: str,
            adapter: str,
            methods: str,
            version: int,
            sha256: str | None,
            args: bytes,
            kwargs: bytes,
            state: bytes,
            cache: float | None,
        ) -> f.InstancePut:
            instance = f.InstanceState(
                ref=ref,
                cls=cls,
                args=stored(args),
                kwargs=stored(kwargs),
                adapter=adapter,
                state=stored(state),
                sha256=sha256,
                methods=_methods(methods),
                version=version,
                name=name,
                cache=cache,
            )
            return f.InstancePut(session, instance)

        shape = (str, str, str, str, str, str, int, _TEXT_OR_NULL, bytes, bytes, bytes, _REAL_OR_NULL)
        sql = (
            "SELECT session, ref, name, class, adapter, methods, version, sha256, args, kwargs, state, cache"
            " FROM instances"
        )
        return self.read("instances", make, shape, 2, sql)

    def commands(self, sql: str, cells: Sequence[str] = ()) -> Iterator[Journaled]:
        def make(
            id: str,
            session: str,
            method: str,
            subject: str,
            key: str | None,
            digest: bytes,
            request: bytes,
            sealed: int,
            began: float,
            attempts: int,
            error: str | None,
            result: bytes | None,
            ended: float | None,
            callbacks: int,
        ) -> Journaled:
            begun = f.CommandBegun(id, session, method, subject, key, digest, request, bool(sealed), began)
            end = None if ended is None else f.CommandEnded(id, error, result, ended, attempts, callbacks)
            return Journaled(begun, attempts, end)

        journal = (str, str, str, str, _TEXT_OR_NULL, bytes, bytes, int, float, int)
        shape = (*journal, _TEXT_OR_NULL, _BLOB_OR_NULL, _REAL_OR_NULL, int)
        return self.read("commands", make, shape, 1, sql, cells)

    def callbacks(self, command: str) -> Iterator[tuple[f.CallbackMade, bytes | None]]:
        def make(
            n: int, seq: int | None, method: str, about: str, digest: bytes, request: bytes, reply: bytes | None
        ) -> tuple[f.CallbackMade, bytes | None]:
            return f.CallbackMade(command, n, seq, method, about, digest, request), reply

        shape = (int, _INT_OR_NULL, str, str, bytes, bytes, _BLOB_OR_NULL)
        sql = "SELECT n, seq, method, about, digest, request, reply FROM callbacks WHERE command = ? ORDER BY n"
        return self.read(f"callbacks of command {command}", make, shape, 1, sql, (command,))


def load(db: sqlite3.Connection, path: str) -> Iterator[f.Fact]:
    """The facts that would make what is there, as `Log.load` says. Raises `StoreDamaged`."""
    reader = _Reader(db, path)
    yield from reader.sessions()
    yield from reader.types()
    yield from reader.functions()
    yield from reader.secrets()
    yield from reader.instances()
    # The newest versions are found by their keys alone, without a look at the values of the others.
    yield from reader.variables(
        "SELECT session, name, version, at, restores, written, value FROM (SELECT session, name, max(version) AS version"
        " FROM variables GROUP BY session, name) CROSS JOIN variables USING (session, name, version)"
    )
    # Those unfinished, and those that succeeded with a key: the others were given their place among the ended.
    for begun, attempts, ended in reader.commands(f"{_COMMANDS} WHERE ending IS NULL AND error IS NULL ORDER BY n"):
        yield begun
        if attempts > 1:
            yield f.CommandTried(begun.id, attempts)
        for made, reply in reader.callbacks(begun.id) if ended is None else ():
            yield made
            if reply is not None:
                yield f.CallbackAnswered(made.command, made.n, reply)
        if ended is not None:
            yield ended


def history(db: sqlite3.Connection, path: str, session: str, name: str) -> list[f.VariablePut]:
    """As `Log.history`. Raises `StoreDamaged`."""
    sql = f"{_VARIABLES} WHERE session = ? AND name = ? ORDER BY version"
    return list(_Reader(db, path).variables(sql, (session, name)))


def histories(db: sqlite3.Connection, path: str, session: str) -> dict[str, list[f.VariablePut]]:
    """As `Log.histories`. Raises `StoreDamaged`."""
    found: dict[str, list[f.VariablePut]] = {}
    for put in _Reader(db, path).variables(f"{_VARIABLES} WHERE session = ? ORDER BY name, version", (session,)):
        found.setdefault(put.name, []).append(put)
    return found


def commands(db: sqlite3.Connection, path: str, session: str | None) -> list[Journaled]:
    """As `Log.commands`. Raises `StoreDamaged`."""
    where, cells = ("", ()) if session is None else (" WHERE session = ?", (session,))
    return list(_Reader(db, path).commands(f"{_COMMANDS}{where} ORDER BY n", cells))
