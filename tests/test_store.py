"""The durable log: what is acknowledged is on disk, whatever ends; one owner a file; no file is harmed."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import conftest
from bridge_host.functions import FunctionSource
from bridge_host.store import Quota, Unfinished, Write, migrations
from bridge_host.store import facts as f
from bridge_host.store.log import KEPT_BYTES, KEPT_COMMANDS, KEPT_VERSIONS, Log, MemoryLog
from bridge_host.store.owner import Owner
from bridge_host.store.sqlite import SqliteLog
from bridge_host.store.store import Store
from bridge_host.values import Stored, store
from bridge_kernel.contract.errors import LimitExceeded, NotFound, QuotaExceeded, StoreDamaged, StoreFailed, StoreLocked
from bridge_kernel.contract.methods import LM

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FORMATS = Path(__file__).parent / "store_formats"


def val(value: Any) -> Stored:
    return store(value, "value")


def session(id: str = "s", version: int = 0, lm: LM | None = None) -> f.SessionPut:
    return f.SessionPut(id, 1.5, 2.5, None, version, lm)


def put(name: str, version: int, value: Any, session: str = "s") -> f.VariablePut:
    return f.VariablePut(session, name, version, version, None if value is None else val(value), 3.25)


def begun(id: str, key: str | None = None, session: str = "s") -> f.CommandBegun:
    return f.CommandBegun(id, session, "function.call", "total", key, b"digest", b"request", False, 4.5)


def ended(id: str, result: bytes | None = None, attempts: int = 1) -> f.CommandEnded:
    return f.CommandEnded(id, None, result, 5.5, attempts, 0)


def instance(ref: str = "i-1", version: int = 1) -> f.InstanceState:
    return f.InstanceState(
        ref=ref,
        cls="accounts.Account",
        args=val([1]),
        kwargs=val({"owner": "Zoë"}),
        adapter="bridge",
        state=val({"balance": version}),
        sha256=None,
        methods=("deposit", "withdraw"),
        version=version,
        name="main",
    )


SESSIONS: list[f.Fact] = [
    session("a", 7, LM(model="openai/gpt", options={"temperature": 0.5})),
    f.SessionPut("b ü", 1.0, 2.0, 60.0, 1, None),
    f.TypePut("a", "x", b'{"type":"number"}'),
    f.FunctionPut("a", FunctionSource.make("total", "def total(): return 1\n", lm=True)),
    f.SecretPut("a", "KEY", b"\0sealed"),
    f.InstancePut("a", instance()),
    f.VariablePut("a", "gone", 2, 6, None, 3.0),
    f.VariablePut("a", "x", 3, 7, val(b"\0bytes"), 4.0, restores=1),
    f.VariablePut("b ü", "y", 1, 1, val({"a": [1, 2.5, None]}), 3.0),
]
NAMED: f.Fact = f.FunctionPut("b ü", FunctionSource.make("named", "def named(ctx): pass\n", secrets=("KEY",)))
JOURNAL: list[f.Fact] = [
    f.CommandBegun("c1", "a", "function.call", "total", None, b"d", b"request", True, 4.5),
    f.CommandTried("c1", 2),
    f.CallbackMade("c1", 0, 1, "tool.call", "pay", b"d0", b"r0"),
    f.CallbackAnswered("c1", 0, b"reply"),
    f.CallbackMade("c1", 1, None, "session.get", "x", b"d1", b"r1"),
    f.CommandBegun("c2", "a", "instance.call", "deposit", "key", b"d", b"", False, 4.75),
    f.CommandEnded("c2", "ValueError: no", b"result", 5.0, 1, 2),
]
"""Facts to keep; the files in store_formats were made with them, from format 3 on with NAMED too."""
KEYED: list[f.Fact] = [
    f.CommandBegun("c3", "a", "instance.create", "Account", "new", b"d", b"which", False, 4.8),
    f.CommandEnded("c3", None, b"result", 5.1, 1, 0),
]
LASTING = JOURNAL[:5] + KEYED
"""Of the journal, what `load` gives back: what failed is not to be known again."""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "bridge.db")


@pytest.fixture
def log(path: str) -> Iterator[SqliteLog]:
    with contextlib.closing(SqliteLog(path)) as log:
        yield log


@pytest.fixture(params=["memory", "sqlite"])
def either(request: pytest.FixtureRequest, path: str) -> Iterator[Log]:
    log: Log = MemoryLog() if request.param == "memory" else SqliteLog(path)
    with contextlib.closing(log):
        yield log


def keep(path: str, *batches: Sequence[f.Fact]) -> None:
    with contextlib.closing(SqliteLog(path)) as log:
        for batch in batches:
            log.append(batch)


def loaded(path: str) -> list[f.Fact]:
    with contextlib.closing(SqliteLog(path)) as log:
        return list(log.load())


def sql(path: str, *statements: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        return [db.execute(statement).fetchall() for statement in statements][-1]


@contextlib.contextmanager
def writer_held(path: str) -> Iterator[None]:
    """Nothing is committed meanwhile: as if the disk were slow."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=60)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


eventually = partial(conftest.eventually, seconds=20.0)


@contextlib.contextmanager
def program(text: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of its own, which ends here at the latest."""
    head = "import os, signal, sys\nfrom bridge_host.store.facts import *\nfrom bridge_host.store.sqlite import SqliteLog\n"
    command = [sys.executable, "-W", "ignore", "-c", head + text, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        assert process.stderr is not None
        pytest.fail(process.stderr.read())
    return line


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


# -- what is recorded ----------------------------------------------------------------


def test_every_kind_of_fact_is_there_when_the_file_is_opened_again(path: str) -> None:
    keep(path, SESSIONS, JOURNAL, KEYED)
    assert loaded(path) == SESSIONS + LASTING


def test_a_fact_that_takes_away_takes_away(path: str) -> None:
    keep(
        path,
        SESSIONS + JOURNAL,
        [
            f.TypePut("a", "x", None),
            f.SecretForgotten("a", "KEY"),
            f.InstanceForgotten("a", "i-1"),
            f.CallbacksForgotten("c1", (1,)),
            f.CommandForgotten("c2"),
            f.SessionForgotten("b ü"),
        ],
    )
    assert loaded(path) == [SESSIONS[0], SESSIONS[3], *SESSIONS[6:8], *JOURNAL[:4]]


def test_of_a_commands_callbacks_just_those_are_forgotten_that_are_named(path: str) -> None:
    calls = [f.CallbackMade("c", n, n, "session.get", "x", b"d", b"r") for n in range(5)]
    keep(path, [session(), begun("c"), *calls], [f.CallbacksForgotten("c", (1, 3)), f.CallbacksForgotten("c", ())])
    assert loaded(path) == [session(), begun("c"), calls[0], calls[2], calls[4]]


def test_the_last_of_equal_facts_counts(path: str) -> None:
    keep(path, [session("s", 1), f.InstancePut("s", instance(version=1))], [session("s", 2)])
    keep(path, [f.InstancePut("s", instance(version=2)), f.TypePut("s", "x", b"1"), f.TypePut("s", "x", b"2")])
    assert loaded(path) == [session("s", 2), f.TypePut("s", "x", b"2"), f.InstancePut("s", instance(version=2))]


def test_what_was_appended_is_seen_by_whoever_reads_at_once(log: SqliteLog) -> None:
    for version in range(1, 50):
        log.append([session("s", version), put("x", version, version), begun(f"c{version}")])
        assert [v.version for v in log.history("s", "x")] == list(range(1, version + 1))
        assert len(log.commands("s")) == version
    assert log.backlog == 0


def test_an_instance_of_large_state_and_buffers_comes_back_equal(path: str) -> None:
    large = Stored(msgspec.Raw(b'{"a":1}'), (os.urandom(3 << 20), b"", os.urandom(5)), "ndarray")
    keep(path, [session(), f.VariablePut("s", "x", 1, 1, large, 1.0)])
    assert loaded(path)[1] == f.VariablePut("s", "x", 1, 1, large, 1.0)


def test_history_is_the_same_in_memory_and_on_disk(either: Log) -> None:
    either.append([session(), put("x", 1, 1), put("y", 1, "why")])
    either.append([put("x", 2, None)])
    either.append([put("x", 3, 3)])
    assert either.history("s", "x") == [put("x", 1, 1), put("x", 2, None), put("x", 3, 3)]
    assert either.history("s", "z") == []
    assert either.histories("s") == {"x": either.history("s", "x"), "y": [put("y", 1, "why")]}
    assert either.histories("t") == {}


def test_so_many_versions_are_kept(either: Log) -> None:
    for version in range(1, KEPT_VERSIONS + 31):
        either.append([put("x", version, version)])
    assert [v.version for v in either.history("s", "x")] == list(range(31, KEPT_VERSIONS + 31))


def test_old_versions_are_kept_up_to_so_many_bytes_the_newest_always(either: Log) -> None:
    third = bytes(KEPT_BYTES // 3)
    for version, value in enumerate([1, third, third, third, 5, bytes(KEPT_BYTES * 2), None, 8, 9], start=1):
        either.append([put("x", version, value)])
        versions = [v.version for v in either.history("s", "x")]
        expected = {4: [1, 2, 3, 4], 5: [3, 4, 5], 6: [3, 4, 5, 6], 7: [7], 9: [7, 8, 9]}
        assert versions == expected.get(version, versions)


def test_versions_are_counted_across_openings(path: str) -> None:
    keep(path, [session()], [put("x", n, n) for n in range(1, 61)])
    keep(path, [put("x", n, n) for n in range(61, 121)])
    with contextlib.closing(SqliteLog(path)) as log:
        assert [v.version for v in log.history("s", "x")] == list(range(21, 121))


def test_the_journal_is_the_same_in_memory_and_on_disk(either: Log) -> None:
    either.append([session(), begun("c1"), begun("c2", "key"), begun("c3", session="t"), begun("c4", "k4")])
    either.append([f.CommandTried("c1", 2), f.CommandTried("c2", 3)])
    either.append([f.CallbackMade("c1", 0, 1, "tool.call", "pay", b"", b""), f.CallbackAnswered("c1", 0, b"")])
    either.append([ended("c2", b"result", 3), ended("c4"), f.CommandForgotten("c4"), ended("never begun")])
    short = [(c.begun.id, c.attempts, c.ended) for c in either.commands()]
    assert short == [("c1", 2, None), ("c2", 3, ended("c2", b"result", 3)), ("c3", 1, None)]
    assert [c.begun.id for c in either.commands("t")] == ["c3"]


def test_of_a_command_that_has_ended_the_request_the_callbacks_and_a_result_without_a_key_are_gone(path: str) -> None:
    call: list[f.Fact] = [
        f.CallbackMade("c1", 0, 1, "tool.call", "pay", b"d", b"r"),
        f.CallbackAnswered("c1", 0, b"reply"),
    ]
    keep(path, [session(), begun("c1"), *call], [ended("c1", b"result")])
    assert sql(path, "SELECT request, result FROM commands") == [(b"", None)]
    assert sql(path, "SELECT count(*) FROM callbacks") == [(0,)]
    assert loaded(path) == [session()]


def test_so_many_finished_commands_are_remembered_and_every_one_with_a_key(either: Log) -> None:
    either.append([begun("keyed", "key"), ended("keyed", b"result"), begun("unfinished")])
    for n in range(0, KEPT_COMMANDS + 50, 50):
        either.append([fact for i in range(n, n + 50) for fact in (begun(f"c{i}"), ended(f"c{i}"))])
    ids = [c.begun.id for c in either.commands()]
    assert ids == ["keyed", "unfinished", *(f"c{i}" for i in range(50, KEPT_COMMANDS + 50))]


def test_commands_that_failed_with_a_key_are_forgotten_like_those_without_one(either: Log) -> None:
    either.append([begun("good", "key"), ended("good", b"result")])
    for n in range(0, KEPT_COMMANDS + 50, 50):
        ends = [f.CommandEnded(f"c{i}", "ValueError: no", b"half", 5.5, 1, 0) for i in range(n, n + 50)]
        either.append([fact for end in ends for fact in (begun(end.id, f"key {end.id}"), end)])
    commands = either.commands()
    assert [c.begun.id for c in commands] == ["good", *(f"c{i}" for i in range(50, KEPT_COMMANDS + 50))]
    assert [c.ended.result for c in commands if c.ended is not None][:2] == [b"result", None]
    assert {c.begun.request for c in commands} == {b""}


def test_a_session_is_forgotten_at_the_cost_of_what_it_owns(either: Log) -> None:
    for id in "st":
        either.append([session(id), put("x", 1, 1, id), put("x", 2, 2, id)])
        either.append([begun(f"{id}1", session=id), begun(f"{id}2", "key", session=id), ended(f"{id}2", b"")])
    either.append([f.SessionForgotten("s")])
    assert [c.begun.id for c in either.commands()] == ["t1", "t2"]
    assert (either.histories("s"), list(either.histories("t"))) == ({}, ["x"])
    if isinstance(either, MemoryLog):
        assert [list(kept) for kept in (either._of_session, either._old_bytes, either._versions)] == [["t"]] * 3
        either.append([f.CommandForgotten("t1"), f.CommandForgotten("t2")])
        assert (either._commands, either._of_session) == ({}, {})


def test_callbacks_of_a_command_that_is_gone_leave_nothing(path: str) -> None:
    keep(
        path,
        [session("s"), begun("c1")],
        [f.SessionForgotten("s")],
        [f.CallbackMade("c1", 0, 1, "tool.call", "pay", b"", b""), f.CallbackAnswered("c1", 0, b""), ended("c1", b"")],
    )
    assert sql(path, "SELECT count(*) FROM callbacks") == [(0,)]


def test_forgetting_a_session_frees_every_row_of_it_in_every_table(path: str) -> None:
    keep(path, SESSIONS, JOURNAL, [put("x", n, n, "a") for n in range(4, 20)])
    tables = [name for (name,) in sql(path, "SELECT name FROM sqlite_master WHERE type = 'table'")]
    tables.remove("meta")  # the store's own

    def counts() -> dict[str, int]:
        return {table: sql(path, f"SELECT count(*) FROM {table}")[0][0] for table in tables}

    assert 0 not in counts().values(), "each table has rows to free"
    keep(path, [f.SessionForgotten("a")])
    assert {table: n for table, n in counts().items() if n} == {"sessions": 1, "variables": 1}
    keep(path, [f.SessionForgotten("b ü")])
    assert not any(counts().values())


def test_a_fact_that_cannot_be_written_is_refused_and_harms_nobody(
    log: SqliteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append([session()])
    monkeypatch.setattr("bridge_host.store.rows.MAX_ROW_BYTES", 1000)
    refused: list[tuple[f.Fact, type[Exception]]] = [
        (session("\udc80"), ValueError),
        (put("x", 1 << 63, 1), ValueError),
        (f.SessionPut("s", float("nan"), 1.0, None, 1, None), ValueError),
        (put("x", 1, bytes(2000)), LimitExceeded),
    ]
    for fact, error in refused:
        with pytest.raises(error):
            log.append([put("y", 1, 1), fact])
    log.wait(log.append([put("z", 1, 1)]))
    assert list(log.load()) == [session(), put("z", 1, 1)]


def test_a_commit_is_on_disk_and_not_on_its_way_there(log: SqliteLog) -> None:
    assert log._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert log._db.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"


# -- waiting for the disk --------------------------------------------------------------


def test_batches_that_wait_together_share_a_commit(log: SqliteLog) -> None:
    log.wait(log.append([session()]))
    before = log.commits
    with writer_held(log.path):
        numbers = [log.append([put(f"x{n}", 1, n)]) for n in range(100)]
        assert log.backlog == 100
    log.wait(numbers[-1])
    assert log.backlog == 0
    assert log.commits - before <= 2
    assert len(log.histories("s")) == 100


def test_many_threads_wait_each_for_its_own(log: SqliteLog) -> None:
    def write(name: str) -> None:
        for version in range(1, 21):
            log.wait(log.append([put(name, version, version)]))

    threads = [threading.Thread(target=write, args=(f"x{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: len(versions) for name, versions in log.histories("s").items()} == {f"x{n}": 20 for n in range(8)}


def test_a_loop_is_woken_once_for_all_that_one_commit_has_put_on_disk(
    log: SqliteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        wake, woken = loop.call_soon_threadsafe, []

        def counted(callback: Any, *args: Any, **kwargs: Any) -> Any:
            woken.append(args)
            return wake(callback, *args, **kwargs)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        with writer_held(log.path):
            first = log.append([put("x", 1, 1)])
            eventually(lambda: not log._queue, "the writer has taken it, and waits for the lock with it alone")
            numbers = [first, *(log.append([put("x", n, n)]) for n in range(2, 102))]
            waiting = [asyncio.ensure_future(log.durable(number)) for number in numbers]
            await asyncio.sleep(0)
            assert not any(task.done() for task in waiting)
        await asyncio.gather(*waiting)
        assert len(woken) == 2
        await log.durable(numbers[-1])
        assert not log._waiting

    asyncio.run(main())


def test_a_cancelled_wait_leaves_its_batch_on_the_way(log: SqliteLog) -> None:
    async def main() -> None:
        with writer_held(log.path):
            task = asyncio.ensure_future(log.durable(log.append([put("x", 1, 1)])))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert log.history("s", "x") == [put("x", 1, 1)]


def test_who_brings_more_than_the_queue_holds_waits_for_room(log: SqliteLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge_host.store.sqlite.MAX_BYTES", 10_000)

    def flood() -> None:
        for n in range(1, 21):
            log.append([put("x", n, bytes(3000))])

    with writer_held(log.path):
        thread = threading.Thread(target=flood)
        thread.start()
        eventually(lambda: log._room._waiters, "it waits for room")  # type: ignore[attr-defined]
        assert log.backlog < 4
    thread.join()
    assert len(log.history("s", "x")) == 20
    log.wait(log.append([put("y", 1, bytes(50_000))]))  # more than the queue may hold goes alone


def test_closing_puts_what_waits_on_disk_and_lets_go_of_the_file(path: str) -> None:
    log = SqliteLog(path)
    for n in range(1, 51):
        log.append([put("x", n, n)])
    log.close()
    log.close()
    assert sorted(os.listdir(os.path.dirname(path))) == ["bridge.db"]
    for use in (lambda: log.append([session()]), lambda: log.history("s", "x"), log.commands, lambda: list(log.load())):
        with pytest.raises(StoreFailed, match="is closed"):
            use()
    with contextlib.closing(SqliteLog(path)) as again:
        assert len(again.history("s", "x")) == 50


def test_a_program_that_ends_without_closing_has_its_facts_on_disk(path: str) -> None:
    text = """
log = SqliteLog(sys.argv[1])
for n in range(100):
    log.append([SessionPut(str(n), 1.0, 1.0, None, 0, None)])
"""
    with program(text, path) as process:
        assert outcome(process) == (0, "", "")
    assert len(loaded(path)) == 100


def test_after_a_full_disk_nothing_is_written_and_all_that_was_acknowledged_is_there(path: str) -> None:
    text = """
import asyncio, resource, threading
from bridge_host.values import store
from bridge_kernel.contract.errors import StoreFailed
log = SqliteLog(sys.argv[1])
log.wait(log.append([SessionPut("s", 1.0, 1.0, None, 0, None)]))
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
done, failed = 0, []
try:
    for n in range(1, 1000):
        log.wait(log.append([VariablePut("s", "x", n, n, store(bytes(50_000), "x"), 1.0), SessionPut("s", 1.0, 1.0, None, n, None)]))
        done = n
except StoreFailed as exc:
    failed.append(exc.__cause__ is not None)
for use in (lambda: log.append([SessionPut("t", 1.0, 1.0, None, 0, None)]), lambda: log.wait(done + 2),
            lambda: asyncio.run(log.durable(done + 2)), log.commands, log.close):
    try:
        use()
    except StoreFailed as exc:
        failed.append(str(exc).endswith(str(exc.__cause__)))
print(done, failed, flush=True)
"""
    with program(text, path) as process:
        _, out, err = outcome(process)
    done, _, failed = out.strip().partition(" ")
    assert failed == str([True] * 6), err
    assert 1 < int(done) < 100
    with contextlib.closing(SqliteLog(path)) as log:
        [s, x] = log.load()
        assert isinstance(s, f.SessionPut)
        assert isinstance(x, f.VariablePut)
        assert s.version == x.version == int(done)


@pytest.mark.parametrize("round", range(3))
def test_what_was_acknowledged_before_a_kill_is_there_afterwards(path: str, round: int) -> None:
    text = """
import threading
from bridge_host.values import store
log = SqliteLog(sys.argv[1])
def write(name):
    for n in range(1, 100_000):
        number = log.append([VariablePut("s", name, n, n, store(n, "x"), 1.0), SessionPut(name, 1.0, 1.0, None, n, None)])
        if n % 3:
            log.wait(number)
            os.write(1, f"{name} {n}\\n".encode())
log.append([SessionPut("s", 1.0, 1.0, None, 0, None)])
for name in "abcd":
    threading.Thread(target=write, args=(name,)).start()
"""
    acknowledged: dict[str, int] = {}
    with program(text, path) as process:
        lines = [said(process) for _ in range(200 + 300 * round)]
        process.kill()
        assert process.stdout is not None
        lines += [line for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    for line in lines:
        written, _, last = line.partition(" ")
        acknowledged[written] = int(last)
    with contextlib.closing(SqliteLog(path)) as log:
        sessions = {s.id: s.version for s in log.load() if isinstance(s, f.SessionPut)}
        for name, number in acknowledged.items():
            versions = [v.version for v in log.history("s", name)]
            assert versions[-1] >= number
            assert versions == list(range(versions[0], versions[-1] + 1))
            assert sessions[name] == versions[-1], "a batch is there as a whole"


# -- one owner a file --------------------------------------------------------------------


def test_a_second_host_of_this_process_is_told_so(log: SqliteLog, tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(log.path)
    for path in (log.path, tmp_path / "link.db"):
        with pytest.raises(StoreLocked, match=rf"in this process \({os.getpid()}\)"):
            SqliteLog(path)
    log.wait(log.append([session()]))


def test_a_second_host_is_told_the_process_of_the_first_until_that_has_died(path: str) -> None:
    with program("log = SqliteLog(sys.argv[1])\nprint('open', flush=True)\nsys.stdin.read()", path) as process:
        assert said(process) == "open"
        with pytest.raises(StoreLocked, match=f"in another process, {process.pid}\n") as caught:
            SqliteLog(path)
        assert f"process {process.pid}" in caught.value.remedy
    SqliteLog(path).close()
    assert sorted(os.listdir(os.path.dirname(path))) == ["bridge.db"]


def test_the_owner_on_another_machine_is_named_with_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner(path)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    here = json.loads(Path(f"{path}.owner").read_bytes())
    assert here["pid"] == os.getpid()
    with pytest.raises(StoreLocked, match=f"{os.getpid()} on {here['host']}"):
        Owner(path)
    owner.release()
    assert not owner.held
    owner.release()
    Owner(path).release()


def test_a_lock_that_is_being_taken_is_a_lock(path: str) -> None:
    owner = Owner(path)
    Path(f"{path}.owner").write_bytes(b"")
    with pytest.raises(StoreLocked, match="another process"):
        Owner(path)
    owner.release()


def test_a_lock_where_nothing_can_be_made_fails(tmp_path: Path) -> None:
    with pytest.raises(StoreFailed, match="cannot be locked"):
        SqliteLog(tmp_path / "nowhere" / "bridge.db")


def test_a_fork_neither_writes_nor_releases_what_its_parent_owns(path: str) -> None:
    text = """
import asyncio
log = SqliteLog(sys.argv[1])
log.wait(log.append([SessionPut("before", 1.0, 1.0, None, 0, None)]))
reply, said = os.pipe()
child = os.fork()
if not child:
    names = []
    for use in (lambda: log.append([SessionPut("child", 1.0, 1.0, None, 0, None)]), lambda: log.wait(1), lambda: list(log.load()),
                lambda: asyncio.run(log.durable(1)), log.commands, log.close, lambda: SqliteLog(sys.argv[1])):
        try:
            use()
            names.append("nothing")
        except Exception as exc:
            names.append(type(exc).__name__)
    os.write(said, " ".join(names).encode())
    sys.exit(0)
os.close(said)
names = os.read(reply, 1000).decode()
status = os.waitpid(child, 0)[1]
log.wait(log.append([SessionPut("parent", 1.0, 1.0, None, 0, None)]))
print(status, os.path.getsize(sys.argv[1] + "-wal") > 0, names, flush=True)
sys.stdin.readline()
log.append([SessionPut("later", 1.0, 1.0, None, 0, None)])
log.close()
"""
    with program(text, path) as process:
        assert said(process) == "0 True " + "StoreFailed " * 5 + "nothing StoreLocked"
        with pytest.raises(StoreLocked, match=str(process.pid)):
            SqliteLog(path)
        assert process.communicate("\n", timeout=60) == ("", "")
    assert [s.id for s in loaded(path) if isinstance(s, f.SessionPut)] == ["before", "later", "parent"]


def test_a_fork_does_not_hold_what_its_parent_owned_when_that_has_died(path: str) -> None:
    text = """
log = SqliteLog(sys.argv[1])
log.wait(log.append([SessionPut("s", 1.0, 1.0, None, 0, None)]))
heard, said = os.pipe()
child = os.fork()
if child:
    os.read(heard, 1)
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
os.write(said, b".")
sys.stdin.read()
"""
    with program(text, path) as process:
        child = int(said(process))
        assert process.wait(60) == -signal.SIGKILL
        os.kill(child, 0)
        with contextlib.closing(SqliteLog(path)) as log:
            log.wait(log.append([session("t")]))
            assert process.communicate(timeout=60) == ("", ""), "the child ends now, in good order"
            log.wait(log.append([session("u")]))
    assert [s.id for s in loaded(path) if isinstance(s, f.SessionPut)] == ["s", "t", "u"]


# -- the file ------------------------------------------------------------------------------


def test_a_new_file_is_the_users_alone(path: str) -> None:
    with contextlib.closing(SqliteLog(path)) as log:
        log.wait(log.append([session()]))
        for name in (path, f"{path}-wal", f"{path}.owner"):
            assert stat.S_IMODE(os.stat(name).st_mode) == 0o600, name
    assert sql(path, "PRAGMA application_id") == [(migrations.APPLICATION_ID,)]
    assert sql(path, "PRAGMA user_version") == [(len(migrations.STEPS),)]


def test_an_empty_file_becomes_a_store(path: str) -> None:
    Path(path).touch(0o644)
    SqliteLog(path).close()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert loaded(path) == []


def test_a_path_may_hold_any_character(tmp_path: Path) -> None:
    path = str(tmp_path / "a ?b#%41ü.db")
    keep(path, [session()])
    assert loaded(path) == [session()]
    assert os.listdir(tmp_path) == ["a ?b#%41ü.db"]


def test_what_a_host_left_that_died_while_it_made_a_store_is_no_hindrance(path: str) -> None:
    for suffix in (".new", ".new-journal", ".new-wal"):
        Path(path + suffix).write_bytes(b"half")
    keep(path, [session()])
    assert os.listdir(os.path.dirname(path)) == ["bridge.db"]


def contents(path: str) -> dict[str, bytes]:
    return {name: Path(name).read_bytes() for name in (path, f"{path}-wal") if os.path.exists(name)}


def crashed_copy(log: SqliteLog, to: str) -> None:
    """What a crash would leave on disk at this instant."""
    with writer_held(log.path):
        copy_files(log.path, to)


def copy_files(path: str, to: str) -> None:
    shutil.copyfile(path, to)
    if os.path.exists(f"{path}-wal"):
        shutil.copyfile(f"{path}-wal", f"{to}-wal")


def some_store(path: str, *, with_log: bool) -> None:
    """One of several pages a table; with a log whose facts are not in the file yet, if so asked."""
    facts = [session(f"s{n}") for n in range(200)] + [put(f"x{n}", 1, "v" * n, f"s{n % 200}") for n in range(800)]
    if not with_log:
        keep(path, facts)
        return
    with contextlib.closing(SqliteLog(f"{path}.first")) as log:
        log.wait(log.append(facts))
        log._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        log.wait(log.append([session("late")]))
        crashed_copy(log, path)
    os.remove(f"{path}.first")
    assert os.path.getsize(f"{path}-wal") > 0


def test_a_text_file_is_refused(path: str) -> None:
    Path(path).write_text("not a store\n" * 100)
    check_refusal(path, "is no SQLite file", "another file")


def test_a_file_of_a_few_bytes_is_refused(path: str) -> None:
    Path(path).write_bytes(b"SQLite format 3\0")
    check_refusal(path, "is no SQLite file", "another file")


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_another_applications_file_is_refused(path: str, mode: str) -> None:
    sql(path, f"PRAGMA journal_mode = {mode}", "CREATE TABLE sessions (id)", "INSERT INTO sessions VALUES (1)")
    check_refusal(path, "another application's", "another file")
    assert os.listdir(os.path.dirname(path)) == ["bridge.db"], "nothing was put beside it"


@pytest.mark.parametrize("with_log", [False, True])
def test_a_newer_format_is_refused(path: str, with_log: bool) -> None:
    some_store(path, with_log=with_log)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA user_version = 99")
        files = contents(path)
    if with_log:  # as if it had been killed: the format is in the log alone
        for name, data in files.items():
            Path(name).write_bytes(data)
    check_refusal(path, r"is of format 99, .* formats up to 4", "newer Bridge")


def test_a_format_that_never_was_is_refused(path: str) -> None:
    some_store(path, with_log=False)
    sql(path, "PRAGMA user_version = 0")
    check_refusal(path, "of format 0", "recover")


@pytest.mark.parametrize("with_log", [False, True])
@pytest.mark.parametrize("page", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("part", ["head", "middle", "all"])
def test_a_damaged_page_is_refused(path: str, page: int, part: str, with_log: bool) -> None:
    some_store(path, with_log=with_log)
    start, end = {"head": (0, 64), "middle": (1000, 3500), "all": (0, 4096)}[part]
    if page == 1 and part != "middle":
        start, end = 100, max(end, 164)  # the header itself is looked at first
    data = bytearray(Path(path).read_bytes())
    at = (page - 1) * 4096
    assert at + end <= len(data)
    data[at + start : at + end] = random.Random(page).randbytes(end - start)
    Path(path).write_bytes(data)
    before = contents(path)
    try:
        SqliteLog(path).close()
    except StoreDamaged as exc:
        assert "recover" in exc.remedy  # noqa: PT017 - the other way out is checked as well
        assert contents(path) == before
    else:
        assert part == "middle", "damage to a page's structure is seen; to the bytes of a value it may not be"


@pytest.mark.parametrize("with_log", [False, True])
def test_a_file_that_was_cut_is_refused(path: str, with_log: bool) -> None:
    some_store(path, with_log=with_log)
    os.truncate(path, os.path.getsize(path) // 2 // 4096 * 4096 + 100)
    check_refusal(path, "is damaged", "recover")


def test_a_log_without_its_file_is_refused(path: str) -> None:
    some_store(path, with_log=True)
    os.remove(path)
    check_refusal(path, "-wal is there", "back beside it")


def check_refusal(path: str, message: str, remedy: str) -> None:
    before = contents(path)
    with pytest.raises(StoreDamaged, match=message) as caught:
        SqliteLog(path)
    assert remedy in caught.value.remedy
    assert contents(path) == before
    assert not os.path.exists(f"{path}.owner")


def test_a_file_that_cannot_be_read_is_no_damaged_one(tmp_path: Path) -> None:
    directory = tmp_path / "bridge.db"
    directory.mkdir()
    with pytest.raises(StoreFailed, match="cannot be read or written"):
        SqliteLog(directory)


def test_a_page_that_goes_bad_while_the_store_is_open_is_said_to_be(path: str) -> None:
    some_store(path, with_log=False)
    with contextlib.closing(SqliteLog(path)) as log:
        size = os.path.getsize(path)
        with open(path, "r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (size - 4096))
        with pytest.raises(StoreDamaged, match="table sessions"):
            list(log.load())


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ("UPDATE sessions SET lm = '{\"model\":5}' WHERE id = 'a'", "table sessions, row 'a'"),
        ("UPDATE sessions SET created = 'today' WHERE id = 'a'", "table sessions, row 'a'"),
        ("UPDATE types SET schema = 'text'", "table types, row 'a', 'x'"),
        ("UPDATE functions SET source = x'00'", "table functions, row 'a', 'total'"),
        ("UPDATE secrets SET sealed = 5", "table secrets, row 'a', 'KEY'"),
        ("UPDATE instances SET state = x'93'", "table instances, row 'a', 'i-1'"),
        ("UPDATE instances SET methods = '{}'", "table instances, row 'a', 'i-1'"),
        ("UPDATE variables SET value = 'text' WHERE name = 'x'", "table variables, row 'a', 'x', 3"),
        ("UPDATE variables SET value = x'c1' WHERE name = 'x'", "table variables, row 'a', 'x', 3"),
        ("UPDATE commands SET digest = 'text' WHERE id = 'c1'", "table commands, row 'c1'"),
        ("UPDATE callbacks SET about = 5.5 || x'ff' WHERE n = 0", "table callbacks of command c1"),
        ("UPDATE callbacks SET reply = 'text' WHERE n = 0", "table callbacks of command c1, row 0"),
        ("UPDATE functions SET source = CAST(x'ff' AS TEXT)", "table functions"),
        ("DROP TABLE secrets", "table secrets: no such table"),
    ],
)
def test_a_row_that_somebody_has_edited_is_named(path: str, edit: str, named: str) -> None:
    keep(path, SESSIONS, JOURNAL)
    sql(path, edit)
    with contextlib.closing(SqliteLog(path)) as log:
        with pytest.raises(StoreDamaged) as caught:
            list(log.load())
        assert named in str(caught.value)


# -- commands, and the sessions whose they are -----------------------------------------------


def with_key(number: int, *, key: str = "key", session: str = "s", ended: float = 5.5) -> Any:
    begun = f.CommandBegun(f"k{number}", session, "function.call", "f", key, b"digest", b"r" * 1000, False, 4.5)
    return begun, f.CommandEnded(begun.id, None, b"result", ended, 1, 0)


def test_what_came_of_a_key_is_known_with_its_commit_and_when_the_store_is_opened_again(path: str) -> None:
    opened = Store(SqliteLog(path), no_vault)
    state, _ = opened.open("s")
    made = f.CommandBegun("m", "s", "instance.create", "Account", "new", b"d", b"which", False, 4.5)
    opened.log.append([with_key(1)[0], made])
    commit = state.commit({"x": Write(val(1))}, finished=with_key(1))
    state.commit({}, finished=(made, ended("m", b"made")))
    assert state.finished["key"].number == commit.number
    assert [done.begun.request for done in state.finished.values()] == [b"", b"which"]
    assert state.bytes == val(1).size + len(b"result" + b"made" + b"which")
    before = {key: done[:2] for key, done in state.finished.items()}
    opened.close()
    with contextlib.closing(Store(SqliteLog(path), no_vault)) as opened:
        again = opened.peek("s")
        assert {key: done[:2] for key, done in again.finished.items()} == before
        assert (again.bytes, {done.number for done in again.finished.values()}) == (state.bytes, {0})
        opened.forget_keys(before=6.0)
        assert (again.finished, again.bytes) == ({}, val(1).size)
        assert opened.log.commands() == []


def test_a_result_that_is_too_much_is_refused_with_all_that_comes_with_it() -> None:
    state, _ = Store(quota=Quota(bytes=10)).open("s")
    begun, _ = with_key(1)
    with pytest.raises(QuotaExceeded, match="would hold 11 bytes"):
        state.commit({"x": Write(val(1))}, finished=(begun, ended(begun.id, bytes(10))))
    assert (state.names(), state.finished, state.bytes) == ([], {}, 0)


def test_keys_are_forgotten_from_the_oldest_on_to_the_first_that_is_young() -> None:
    opened = Store()
    for id in "st":
        state, _ = opened.open(id)
        for n in range(4):
            state.commit({}, finished=with_key(n, key=f"k{n}", session=id, ended=float(n)))
    opened.forget_keys(before=2.0)
    assert [list(opened.peek(id).finished) for id in "st"] == [["k2", "k3"]] * 2


def test_to_forget_keys_does_not_mind_a_session_that_goes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Store()
    for id in "st":
        opened.open(id)[0].commit({}, finished=with_key(1, session=id))
    every, number = opened._all(), opened.delete("s")
    monkeypatch.setattr(opened, "_all", lambda: every)
    opened.forget_keys(before=6.0)
    assert (number, opened.peek("t").finished) == (0, {})


def test_a_command_that_ends_after_its_session_leaves_nothing() -> None:
    opened = Store()
    state, _ = opened.open("s")
    opened.delete("s")
    opened.open("s")
    with pytest.raises(NotFound):
        state.commit({}, finished=with_key(1))
    assert (state.finished, opened.peek("s").finished) == ({}, {})


def test_unfinished_commands_are_found_in_the_order_in_which_they_began_and_go_with_their_session() -> None:
    opened = Store()
    for id in "st":
        opened.open(id)
    for n, id in enumerate("tstsx"):
        opened.add_unfinished(Unfinished(msgspec.structs.replace(begun(f"c{n}", session=id), began=float(n))))
    assert [u.begun.id for u in opened.unfinished_commands()] == ["c0", "c1", "c2", "c3"]
    assert list(opened.peek("t").unfinished) == ["c0", "c2"]
    found = opened.find_unfinished("c2")
    assert found is opened.peek("t").unfinished["c2"]
    opened.delete("s")
    opened.remove_unfinished("c0")
    opened.remove_unfinished("never")
    assert [u.begun.id for u in opened.unfinished_commands()] == ["c2"]
    assert opened.find_unfinished("c1") is opened.find_unfinished("c0") is None


def test_a_command_that_began_while_its_session_was_deleted_is_dropped_when_the_store_is_opened(path: str) -> None:
    call = f.CallbackMade("late", 0, 1, "tool.call", "pay", b"d", b"r")
    keep(path, [session("s"), session("t"), begun("own", session="t")], [f.SessionForgotten("s")])
    keep(path, [begun("late", session="s"), begun("done", "key", session="s"), ended("done", b""), call])
    with contextlib.closing(Store(SqliteLog(path), no_vault)) as opened:
        assert [u.begun.id for u in opened.unfinished_commands()] == ["own"]
    assert sql(path, "SELECT id FROM commands") == [("own",)]


def test_a_session_that_cannot_be_forgotten_stays_with_all_it_owns(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(Store(SqliteLog(path), no_vault)) as opened:
        state, _ = opened.open("s")
        opened.add_unfinished(Unfinished(begun("c")))
        with monkeypatch.context() as patch:
            patch.setattr(opened.log, "append", no_space)
            with pytest.raises(StoreFailed):
                opened.delete("s")
        assert (opened.peek("s"), list(state.unfinished)) == (state, ["c"])
        assert opened.find_unfinished("c") is not None
        opened.delete("s")
        assert (list(opened), opened.unfinished_commands()) == ([], [])


def no_space(facts: Any) -> int:
    raise StoreFailed("no space left on device")


def test_a_store_that_fails_while_it_closes_lets_go_of_its_file(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Store(SqliteLog(path), no_vault)
    opened.open("s", ttl=60)
    monkeypatch.setattr(opened.log, "append", no_space)
    with pytest.raises(StoreFailed, match="no space"):
        opened.close()
    with contextlib.closing(Store(SqliteLog(path), no_vault)) as opened:
        assert list(opened) == ["s"]


def test_a_session_is_described_by_facts_without_a_look_at_the_log(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(Store(SqliteLog(path), no_vault)) as opened:
        state, _ = opened.open("s")
        for value in (1, 2, None, 3):
            state.commit({"x": Write(None if value is None else val(value), None, value), "y": Write(val(value))})
        newest = [versions[-1] for versions in opened.log.histories("s").values()]
    with contextlib.closing(Store(SqliteLog(path), no_vault)) as opened:
        for read in ("history", "histories", "commands", "wait"):
            monkeypatch.setattr(SqliteLog, read, None)
        puts = [fact for fact in opened.peek("s").facts() if isinstance(fact, f.VariablePut)]
        monkeypatch.undo()
    assert puts == newest


# -- formats -----------------------------------------------------------------------------------


def frozen(path: str, format: int) -> None:
    """The file that a Bridge of that format has made of SESSIONS and, from format 2 on, JOURNAL, from 3 on NAMED."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript((FORMATS / f"format-{format}.sql").read_text())
        db.execute("PRAGMA journal_mode = WAL")


def shape(path: str) -> list[Any]:
    return sql(path, "SELECT type, name, sql FROM sqlite_master ORDER BY name")


@pytest.mark.parametrize("format", range(1, len(migrations.STEPS) + 1))
def test_a_store_of_each_format_opens_and_holds_what_it_held(path: str, format: int) -> None:
    frozen(path, format)
    sessions = [*SESSIONS[:4], NAMED, *SESSIONS[4:]] if format >= 3 else SESSIONS
    assert loaded(path) == sessions + (JOURNAL[:5] if format >= 2 else [])
    keep(path, JOURNAL, KEYED)
    assert loaded(path) == sessions + LASTING
    copies = [f"bridge.db.v{format}"] if format < len(migrations.STEPS) else []
    assert sorted(os.listdir(os.path.dirname(path))) == ["bridge.db", *copies]


@pytest.mark.parametrize("format", range(1, len(migrations.STEPS) + 1))
def test_a_step_that_was_released_is_not_changed(tmp_path: Path, format: int) -> None:
    frozen(str(tmp_path / "then.db"), format)
    migrations.opened(str(tmp_path / "now.db"), migrations.STEPS[:format]).close()
    assert shape(str(tmp_path / "then.db")) == shape(str(tmp_path / "now.db"))


def test_a_migrated_store_has_the_shape_of_a_new_one(tmp_path: Path) -> None:
    frozen(str(tmp_path / "old.db"), 1)
    SqliteLog(tmp_path / "old.db").close()
    SqliteLog(tmp_path / "new.db").close()
    assert shape(str(tmp_path / "old.db")) == shape(str(tmp_path / "new.db"))


def test_before_a_migration_a_copy_is_made_that_opens_as_it_was(path: str) -> None:
    frozen(path, 1)
    SqliteLog(path).close()
    copy = f"{path}.v1"
    assert stat.S_IMODE(os.stat(copy).st_mode) == 0o600
    assert sql(copy, "PRAGMA user_version") == [(1,)]
    assert loaded(copy) == SESSIONS


def test_a_migration_that_fails_midway_leaves_the_old_format(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen(path, 1)

    def half(db: sqlite3.Connection) -> None:
        db.execute("CREATE TABLE commands (id)")
        db.execute("DELETE FROM sessions")
        raise sqlite3.OperationalError("the disk is gone")

    with pytest.raises(StoreDamaged, match="the disk is gone"):
        migrations.opened(path, (migrations.STEPS[0], half))
    assert sql(path, "PRAGMA user_version") == [(1,)]
    assert loaded(path) == SESSIONS


def test_a_host_that_is_killed_in_a_migration_leaves_the_old_format(path: str) -> None:
    frozen(path, 1)
    text = """
from bridge_host.store import migrations
def half(db):
    db.execute("PRAGMA cache_size = 1")
    db.execute("CREATE TABLE commands (id)")
    db.execute("DELETE FROM sessions")
    db.execute("CREATE TABLE filler AS WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000) SELECT zeroblob(2000) FROM n")
    os.kill(os.getpid(), signal.SIGKILL)
migrations.opened(sys.argv[1], (migrations.STEPS[0], half))
"""
    with program(text, path) as process:
        assert outcome(process)[0] == -signal.SIGKILL
    assert os.path.getsize(f"{path}-wal") > 1_000_000, "it was in the middle of it"
    assert loaded(path) == SESSIONS


# -- a crash between any two writes ------------------------------------------------------------


class _Plain(msgspec.Struct):
    """A session as a plain model knows it: of each variable the versions, of each instance its version."""

    version: int = 0
    variables: dict[str, list[tuple[int, Any]]] = {}
    instances: dict[str, int] = {}
    functions: dict[str, str] = {}


class _PlainCommand(msgspec.Struct):
    session: str
    attempt: int = 1
    callbacks: list[bytes | None] = []  # the replies


class _PlainStore(msgspec.Struct):
    sessions: dict[str, _Plain] = {}
    commands: dict[str, _PlainCommand] = {}


def plain(store: Store) -> _PlainStore:
    """What a store that was just opened holds."""
    there = _PlainStore()
    for id in store:
        state = store.peek(id)
        versions = store.log.histories(id)
        there.sessions[id] = _Plain(
            state.version,
            {
                n: [(v.version, None if v.value is None else v.value.tree()) for v in puts]
                for n, puts in versions.items()
            },
            {ref: instance.version for ref, instance in state.instances.items()},
            {name: function.source for name, function in state.functions.items()},
        )
        for name, puts in versions.items():
            assert state.version_of(name) == puts[-1].version
        assert {n: state.get(n).value for n in state.names()} == {
            n: p[-1].value for n, p in versions.items() if p[-1].value
        }
    for unfinished in store.unfinished_commands():
        replies = [unfinished.answered.get(call.n) for call in unfinished.made]
        there.commands[unfinished.begun.id] = _PlainCommand(unfinished.begun.session, unfinished.attempt, replies)
    return there


NAMES = st.sampled_from(["a", "b", "c"])
SIZES = st.sampled_from([None, 1, 2, 1500, 9000])
"""Of values: parts of a page, and pages; None deletes."""


class CrashingStore(RuleBasedStateMachine):
    """A store whose files are copied as a crash would leave them: what opens is the model after some of its commits."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp()
        self.copies = 0
        self.commands = 0
        self.held = contextlib.ExitStack()
        self.holding = False
        self.now = _PlainStore()
        self.states = [copy.deepcopy(self.now)]  # after each commit
        self.sure = 0  # the newest of them that was acknowledged
        self.open(f"{self.directory}/0.db")

    def open(self, path: str) -> None:
        self.store = Store(SqliteLog(path), no_vault)
        assert plain(self.store) == self.now
        self.sure = len(self.states) - 1
        self.number = 0

    def committed(self, number: int) -> None:
        self.number = max(self.number, number)
        self.states.append(copy.deepcopy(self.now))

    @rule(session=NAMES)
    def make_session(self, session: str) -> None:
        _, number = self.store.open(session)
        self.now.sessions.setdefault(session, _Plain())
        self.committed(number)

    @precondition(lambda self: self.now.sessions)
    @rule(data=st.data())
    def delete_session(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.now.sessions)))
        del self.now.sessions[session]
        self.now.commands = {k: c for k, c in self.now.commands.items() if c.session != session}
        self.committed(self.store.delete(session))

    @precondition(lambda self: self.now.sessions)
    @rule(data=st.data(), sizes=st.dictionaries(NAMES, SIZES, min_size=1))
    def write_variables_at_once(self, data: st.DataObject, sizes: dict[str, int | None]) -> None:
        session = data.draw(st.sampled_from(sorted(self.now.sessions)))
        known = self.now.sessions[session]
        known.version += 1
        writes = {name: None if size is None else "v" * size for name, size in sizes.items()}
        for name, value in writes.items():
            versions = known.variables.get(name, [])
            if value is not None or (versions and versions[-1][1] is not None):
                known.variables[name] = [*versions, (len(versions) + 1, value)]
        commit = self.store.peek(session).commit({n: Write(None if v is None else val(v)) for n, v in writes.items()})
        assert commit.version == known.version
        self.committed(commit.number)

    @precondition(lambda self: self.now.sessions)
    @rule(data=st.data(), ref=NAMES)
    def change_instance(self, data: st.DataObject, ref: str) -> None:
        session = data.draw(st.sampled_from(sorted(self.now.sessions)))
        known = self.now.sessions[session]
        read = known.instances.get(ref, 0)
        known.instances[ref] = read + 1
        known.version += 1
        unnamed = msgspec.structs.replace(instance(ref, read + 1), name="")
        commit = self.store.peek(session).commit({}, instances=[(unnamed, read)])
        self.committed(commit.number)

    @precondition(lambda self: self.now.sessions)
    @rule(data=st.data(), name=NAMES, size=st.sampled_from([1, 5000]))
    def put_function(self, data: st.DataObject, name: str, size: int) -> None:
        session = data.draw(st.sampled_from(sorted(self.now.sessions)))
        function = FunctionSource.make(name, "#" * size)
        self.now.sessions[session].functions[name] = function.source
        self.committed(self.store.peek(session).put_function(function))

    @precondition(lambda self: self.now.sessions)
    @rule(data=st.data())
    def begin_command(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.now.sessions)))
        self.commands += 1
        self.now.commands[f"c{self.commands}"] = _PlainCommand(session)
        self.committed(self.store.log.append([begun(f"c{self.commands}", session=session)]))

    @precondition(lambda self: self.now.commands)
    @rule(data=st.data(), what=st.sampled_from(["try", "call", "answer", "end", "end with a write"]))
    def go_on_with_command(self, data: st.DataObject, what: str) -> None:
        id = data.draw(st.sampled_from(sorted(self.now.commands)))
        command = self.now.commands[id]
        if what == "try":
            command.attempt += 1
            number = self.store.log.append([f.CommandTried(id, command.attempt)])
        elif what == "call":
            number = self.store.log.append(
                [f.CallbackMade(id, len(command.callbacks), None, "tool.call", "pay", b"d", b"request")]
            )
            command.callbacks.append(None)
        elif what == "answer":
            last = len(command.callbacks) - 1
            if last >= 0:
                command.callbacks[last] = b"reply"
            number = self.store.log.append([f.CallbackAnswered(id, last, b"reply")])
        else:
            del self.now.commands[id]
            if what == "end":
                number = self.store.log.append([ended(id, attempts=command.attempt)])
            else:
                known = self.now.sessions[command.session]
                known.version += 1
                known.functions.pop("result", None)
                versions = known.variables.get("result", [])
                known.variables["result"] = [*versions, (len(versions) + 1, id)]
                number = self.store.peek(command.session).commit({"result": Write(val(id))}, facts=[ended(id)]).number
        self.committed(number)

    @precondition(lambda self: not self.holding)
    @rule()
    def wait_for_the_disk(self) -> None:
        self.store.log.wait(self.number)
        self.sure = len(self.states) - 1

    @precondition(lambda self: not self.holding)
    @rule()
    def let_nothing_more_reach_the_disk(self) -> None:
        self.wait_for_the_disk()
        self.held.enter_context(writer_held(self.path))
        self.holding = True

    @precondition(lambda self: self.holding)
    @rule()
    def let_all_reach_the_disk(self) -> None:
        self.held.close()
        self.holding = False

    @property
    def path(self) -> str:
        log = self.store.log
        assert isinstance(log, SqliteLog)
        return log.path

    def crashed(self) -> str:
        self.copies += 1
        crashed = f"{self.directory}/{self.copies}.db"
        if self.holding:
            copy_files(self.path, crashed)
        else:
            with writer_held(self.path):
                copy_files(self.path, crashed)
        return crashed

    @rule(pages=st.none() | st.integers(0, 40), bytes=st.integers(0, 4119))
    def crash(self, pages: int | None, bytes: int) -> None:
        """At whatever moment this is for the writer; without the last pages and bytes of its log, too."""
        crashed = self.crashed()
        if pages is not None and os.path.exists(f"{crashed}-wal"):
            size = os.path.getsize(f"{crashed}-wal")
            os.truncate(f"{crashed}-wal", max(0, size - pages * 4120 - bytes))
        with contextlib.closing(Store(SqliteLog(crashed), no_vault)) as store:
            assert plain(store) in self.states[self.sure if pages is None else 0 :]

    @rule()
    def crash_and_go_on(self) -> None:
        """From what had been acknowledged; all that came after it is lost. (How much is, may not depend on time here.)"""
        if not self.holding:
            self.wait_for_the_disk()
        crashed = self.crashed()
        self.teardown_store()
        del self.states[self.sure + 1 :]
        self.now = copy.deepcopy(self.states[self.sure])
        self.open(crashed)

    @rule()
    def close_and_open(self) -> None:
        path = self.path
        self.teardown_store()
        self.open(path)

    @invariant()
    def memory_is_the_model(self) -> None:
        assert list(self.store) == sorted(self.now.sessions)
        for id, known in self.now.sessions.items():
            state = self.store.peek(id)
            current = {name: versions[-1][1] for name, versions in known.variables.items()}
            assert {name: state.get(name).value.tree() for name in state.names()} == {
                name: value for name, value in current.items() if value is not None
            }

    def teardown_store(self) -> None:
        self.held.close()
        self.holding = False
        self.store.close()

    def teardown(self) -> None:
        self.teardown_store()
        shutil.rmtree(self.directory)


no_vault: Any = object()  # there are no secrets here

TestCrashingStore = CrashingStore.TestCase
TestCrashingStore.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
