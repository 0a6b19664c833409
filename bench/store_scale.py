"""A store with much in it, in a process of its own so that its memory can be told: `python -m bench.store_scale TASK …`.

What it measured goes to stdout as one JSON object. `bench.store` starts it.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import sqlite3
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import psutil
from bench.peers import PAYLOAD

from bridge_host.host import open_store
from bridge_host.store import (
    Write,
    sqlite,  # noqa: F401 - these two come with the first store otherwise, and their memory would be the store's
    vault,  # noqa: F401
)
from bridge_host.store.facts import CallbackAnswered, CallbackMade, CommandBegun, CommandEnded
from bridge_host.values import store as stored

if TYPE_CHECKING:
    from bridge_host.store import Store

__all__ = ("TASKS", "fill", "fill_memory", "journal", "journal_plain", "open_filled", "open_plain")

VARIABLES: Final = 20
GROUP: Final = 100  # commands a transaction, where SQLite is used plainly
now = time.perf_counter


def _rss() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def _bytes(path: str) -> int:
    """Of the file and SQLite's log beside it."""
    return sum(p.stat().st_size for p in (Path(path), Path(f"{path}-wal")) if p.exists())


def _put_sessions(store: Store, count: int) -> None:
    """Half of the variables are numbers, half are small dicts; each session's values are its own."""
    for i in range(count):
        state, _ = store.open(f"session-{i}")
        state.commit(
            {
                f"variable_{j}": Write(stored({**PAYLOAD, "x": i} if j % 2 else i + j / 8, "value"))
                for j in range(VARIABLES)
            }
        )


def fill(path: str, count: str) -> dict[str, Any]:
    """Make a store of so many sessions."""
    with contextlib.closing(open_store(path, quota=None, ttl=None)) as store:
        began = now()
        _put_sessions(store, int(count))
        store.log.wait(store.log.append(()))
        seconds = now() - began
    return {"seconds": seconds, "file_bytes": _bytes(path)}


def open_filled(path: str, count: str) -> dict[str, Any]:
    """Open it, as a host does."""
    before, began = _rss(), now()
    with contextlib.closing(open_store(path, quota=None, ttl=None)) as store:
        seconds = now() - began
        values = sum(store.peek(id).bytes for id in store)
        return {"seconds": seconds, "rss": _rss() - before, "sessions": len(store), "value_bytes": values}


def open_plain(path: str, count: str) -> dict[str, Any]:
    """The same rows into dicts of bytes: the least that this can cost in Python."""
    before, began = _rss(), now()
    sessions: dict[str, dict[str, bytes]] = {}
    with contextlib.closing(sqlite3.connect(path)) as db:
        for session, name, value in db.execute("SELECT session, name, value FROM variables"):
            sessions.setdefault(session, {})[name] = value
    return {"seconds": now() - began, "rss": _rss() - before, "sessions": len(sessions)}


def fill_memory(path: str, count: str) -> dict[str, Any]:
    """As many sessions in memory, with no file."""
    before = _rss()
    store = open_store(None, quota=None, ttl=None)
    began = now()
    _put_sessions(store, int(count))
    return {"seconds": now() - began, "rss": _rss() - before, "sessions": len(store)}


_REQUEST: Final = msgspec.json.encode({"type": "function.call", "name": "echo", "given": {"args": [PAYLOAD]}})


def journal(path: str, count: str) -> dict[str, Any]:
    """So many commands, each with one call of a tool, through the log: begun, called, answered, ended."""
    before, sizes = _rss(), []
    commands = int(count)
    with contextlib.closing(open_store(path, quota=None, ttl=None)) as store:
        state, _ = store.open("session")
        log, at, digest = store.log, time.time(), hashlib.blake2b(_REQUEST, digest_size=16).digest()
        began = now()
        for i in range(commands):
            id = f"command-{i:x}"
            log.append([CommandBegun(id, "session", "function.call", "echo", None, digest, _REQUEST, False, at)])
            log.append([CallbackMade(id, 1, 1, "tool.call", "tool", digest, _REQUEST)])
            log.append([CallbackAnswered(id, 1, _REQUEST)])
            number = state.commit({}, facts=[CommandEnded(id, None, None, at, 1, 1)], checked=True).number
            if (i + 1) % max(1, commands // 5) == 0:
                log.wait(number)
                sizes.append(_bytes(path))
        seconds, rss = now() - began, _rss()
    began = now()
    with contextlib.closing(open_store(path, quota=None, ttl=None)):
        reopened = now() - began
    return {
        "commands": commands,
        "seconds": seconds,
        "bytes_by_fifth": sizes,
        "bytes_closed": _bytes(path),
        "rss": rss - before,
        "reopen_s": reopened,
    }


def journal_plain(path: str, count: str) -> dict[str, Any]:
    """The same bytes into one table with plain sqlite3, a transaction for every hundred commands; nothing is dropped."""
    commands = int(count)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE commands (id TEXT PRIMARY KEY, request BLOB, called BLOB, reply BLOB, ended REAL)")
        began = now()
        for first in range(0, commands, GROUP):
            db.execute("BEGIN IMMEDIATE")
            for i in range(first, min(first + GROUP, commands)):
                id = f"command-{i:x}"
                db.execute("INSERT INTO commands (id, request) VALUES (?, ?)", (id, _REQUEST))
                db.execute("UPDATE commands SET called = ? WHERE id = ?", (_REQUEST, id))
                db.execute("UPDATE commands SET reply = ? WHERE id = ?", (_REQUEST, id))
                db.execute("UPDATE commands SET request = x'', ended = ? WHERE id = ?", (0.5, id))
            db.execute("COMMIT")
        seconds = now() - began
    return {"commands": commands, "seconds": seconds, "bytes_closed": _bytes(path)}


TASKS: Final = {task.__name__: task for task in (fill, fill_memory, open_filled, open_plain, journal, journal_plain)}


if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](*sys.argv[2:])))
