"""Sessions and what they own, in memory and on disk: variables with types and history, instances, secrets, ends."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import numpy
import pytest

from bridge_host import (
    AsyncHost,
    Change,
    Conflict,
    Host,
    InvalidValue,
    NotFound,
    Quota,
    QuotaExceeded,
    RemoteError,
)
from bridge_host.functions import FunctionSource
from bridge_host.store import Commit, MemoryLog, Staged, Store, Write
from bridge_host.store.facts import InstanceState
from bridge_host.store.sqlite import SqliteLog
from bridge_host.values import store as stored
from conftest import KERNELSIDE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bridge_host import Session


@pytest.fixture(params=["memory", "disk"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    """Without kernels: nothing here needs one."""
    path = tmp_path / "bridge.db" if request.param == "disk" else None
    with Host(kernels=0, store=path, quota=Quota(count=8, bytes=10_000, sessions=5)) as host:
        yield host


@pytest.fixture
def session(host: Host) -> Session:
    return host.session("s")


class Clock:
    """Seconds since the epoch, as a test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["memory", "disk"])
def clocked(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Store, Clock]]:
    clock = Clock()
    log = SqliteLog(tmp_path / "bridge.db") if request.param == "disk" else MemoryLog()
    store = Store(log, clock=clock)
    yield store, clock
    store.close()


# -- variables: versions, history, undo ------------------------------------------------


def test_history_has_every_version_with_its_value_and_its_place_among_the_commits(session: Session) -> None:
    session["x"] = 1
    session["y"] = "between"
    session["x"] = [2]
    del session["x"]
    session["x"] = 4
    history = session.variables["x"].history()
    assert [(v.version, v.at, None if v.deleted else v.value) for v in history] == [
        (1, 1, 1),
        (2, 3, [2]),
        (3, 4, None),
        (4, 5, 4),
    ]
    assert [v.written for v in history] == sorted(v.written for v in history)
    with pytest.raises(NotFound, match="version 3 of 'x' deleted it"):
        _ = history[2].value
    assert session.version == 5


def test_undo_goes_back_step_by_step_and_each_step_is_a_version_of_its_own(session: Session) -> None:
    for value in ("one", "two", "three"):
        session["x"] = value
    x = session.variables["x"]
    assert x.undo() == 4
    assert session["x"] == "two"
    assert x.undo() == 5
    assert session["x"] == "one"
    with pytest.raises(NotFound, match="nothing before version 1"):
        x.undo()
    assert x.revert(3) == 6
    assert [v.restores for v in x.history()] == [None, None, None, 2, 1, 3]
    with pytest.raises(NotFound):
        x.revert(99)


def test_undo_of_a_new_value_brings_back_what_was_there_before_it_an_undone_value_too(session: Session) -> None:
    for value in "ABC":
        session["x"] = value
    x = session.variables["x"]
    x.undo()
    x.undo()
    session["x"] = "D"
    x.undo()
    assert session["x"] == "A"
    with pytest.raises(NotFound, match="nothing before version 1"):
        x.undo()


def test_a_value_that_python_cannot_write_out_breaks_no_table(session: Session) -> None:
    session["big"] = 10**5000
    assert "<int>" in repr(session.variables)


def test_undo_brings_a_deleted_variable_back(session: Session) -> None:
    session["x"] = 1
    x = session.variables["x"]
    del session["x"]
    assert x.undo() == 3
    assert session["x"] == 1


def test_a_session_can_be_looked_at_and_brought_back_as_it_was_at_any_commit(session: Session) -> None:
    session["a"] = 1
    session.update({"a": 2, "b": [3]})
    del session["a"]
    session["c"] = 4
    assert [dict(session.at(version)) for version in range(5)] == [
        {},
        {"a": 1},
        {"a": 2, "b": [3]},
        {"b": [3]},
        {"b": [3], "c": 4},
    ]
    session.restore(2)
    assert {name: session[name] for name in session} == {"a": 2, "b": [3]}
    assert session.version == 5, "one commit"
    with pytest.raises(NotFound, match="no version 77"):
        session.at(77)


def test_history_keeps_the_last_hundred_versions_and_says_what_it_no_longer_has(session: Session) -> None:
    for i in range(150):
        session["x"] = i
    history = session.variables["x"].history()
    assert [v.value for v in history] == list(range(50, 150))
    assert dict(session.at(51)) == {"x": 50}
    with pytest.raises(NotFound, match="not kept any more"):
        session.at(10)


def test_an_update_is_one_commit_or_none(session: Session) -> None:
    session["a"] = 1
    with pytest.raises(TypeError):
        session.update({"a": 2, "b": threading.Lock()})
    session.define("b", int)
    with pytest.raises(InvalidValue):
        session.update({"a": 2, "b": "text"})
    assert (session["a"], session.version) == (1, 1)
    session.update({"a": 2, "b": 3})
    assert (session["a"], session["b"], session.version) == (2, 3, 2)


def test_a_write_that_counts_on_a_version_is_refused_if_it_is_another(session: Session) -> None:
    session.set("x", 1, if_version=0)
    with pytest.raises(Conflict, match="'x' is at version 1, not 0"):
        session.set("x", 2, if_version=0)
    assert session.variables["x"].set(2, if_version=1) == 2


def test_concurrent_writers_leave_no_gap_in_the_versions(session: Session) -> None:
    def write(n: int) -> None:
        for i in range(25):
            session["x"] = (n, i)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [v.version for v in session.variables["x"].history()] == list(range(1, 101))
    assert session.version == 100


def test_a_read_gives_its_own_copy_of_what_can_change(session: Session) -> None:
    session["x"] = {"rows": [1, 2], "array": numpy.arange(3)}
    session["x"]["rows"].append(3)
    assert session["x"]["rows"] == [1, 2]


# -- types ---------------------------------------------------------------------------


def test_a_defined_variable_takes_only_what_fits_and_has_its_default(session: Session) -> None:
    session.define("temperature", float, ge=0, le=2, default=0.7)
    assert session["temperature"] == 0.7
    session["temperature"] = 1.5
    for wrong in (2.5, "hot", None, float("nan"), True):
        with pytest.raises(InvalidValue, match="temperature"):
            session["temperature"] = wrong
    assert session["temperature"] == 1.5
    schema = session.variables["temperature"].schema
    assert schema is not None
    assert (schema["minimum"], schema["maximum"]) == (0, 2)
    session.define("temperature", None)
    session["temperature"] = "hot"


def test_a_type_that_the_value_there_does_not_fit_is_refused(session: Session) -> None:
    session["name"] = "Ada"
    with pytest.raises(InvalidValue):
        session.define("name", int)
    session.define("name", str, pattern="^A", max_length=5)
    with pytest.raises(InvalidValue):
        session["name"] = "Bob"


def test_tensors_and_embeddings_have_types_too(session: Session) -> None:
    session.define("weights", "tensor", dtype="float32", shape=(None, 3))
    session["weights"] = numpy.zeros((5, 3), dtype="float32")
    for wrong in (numpy.zeros((5, 3)), numpy.zeros((5, 4), dtype="float32"), [[0.0, 0.0, 0.0]]):
        with pytest.raises(InvalidValue):
            session["weights"] = wrong
    session.define("meaning", "embedding", dimensions=4)
    session["meaning"] = [0.1, 0.2, 0.3, 0.4]
    with pytest.raises(InvalidValue):
        session["meaning"] = [0.1]


def test_a_type_is_there_again_when_the_store_is_opened_again(tmp_path: Path) -> None:
    with Host(kernels=0, store=tmp_path / "bridge.db") as host:
        host.session("s").define("n", int, ge=1)
        host.session("s")["n"] = 5
    with Host(kernels=0, store=tmp_path / "bridge.db") as host:
        session = host.session("s")
        with pytest.raises(InvalidValue):
            session["n"] = 0
        assert session["n"] == 5


# -- watchers --------------------------------------------------------------------------


def told(seen: list[Any], count: int, told_enough: threading.Event) -> Callable[[Change], None]:
    def watcher(change: Change) -> None:
        seen.append((change.name, change.version, change.before, change.value))
        if len(seen) == count:
            told_enough.set()

    return watcher


def test_watchers_are_told_in_the_order_of_the_commits(session: Session) -> None:
    seen: list[Any] = []
    done = threading.Event()
    watch = session.watch(told(seen, 103, done))
    only: list[Any] = []
    session.watch(lambda change: only.append(change.version), "y")
    for i in range(100):
        session["x"] = i
    session.update({"y": 1, "z": 2})
    del session["y"]
    assert done.wait(30)
    assert seen[:100] == [("x", i + 1, i - 1 if i else None, i) for i in range(100)]
    assert seen[100:] == [("y", 1, None, 1), ("z", 1, None, 2), ("y", 2, 1, None)]
    watch.close()
    session["x"] = "unheard"
    with session.changes("w") as changes:
        session["w"] = 5
        assert next(iter(changes)).value == 5
    assert len(seen) == 103
    assert only == [1, 2]


def test_a_watcher_may_write_and_one_that_raises_is_closed_with_a_warning(session: Session) -> None:
    done = threading.Event()

    def double(change: Change) -> None:
        session["doubled"] = change.value * 2
        if change.value == 3:
            done.set()

    def broken(change: Change) -> None:
        raise LookupError("mine")

    session.watch(double, "x")
    session.watch(broken, "x")
    with pytest.warns(UserWarning, match="raised LookupError"):
        for i in range(4):
            session["x"] = i
        assert done.wait(30)
    assert session["doubled"] == 6


def test_a_watch_ends_with_its_session_and_hears_nothing_of_a_new_one_of_that_name(host: Host) -> None:
    session = host.session("brief")
    heard: list[Any] = []
    session.watch(lambda change: heard.append(change.value))
    changes = session.changes()
    host.delete_session("brief")
    assert list(changes) == []
    again = host.session("brief")
    done = threading.Event()
    again.watch(lambda change: done.set())
    again["x"] = 1
    assert done.wait(30)
    assert heard == []


def test_asynchronous_watchers_run_on_the_loop_and_changes_can_be_iterated_over() -> None:
    async def main() -> tuple[list[Any], list[Any]]:
        async with AsyncHost(kernels=0) as host:
            session = host.session("s")
            heard: list[Any] = []
            enough = asyncio.Event()

            async def watcher(change: Change) -> None:
                await asyncio.sleep(0)
                heard.append(change.value)
                if len(heard) == 3:
                    enough.set()

            session.watch(watcher, "x")
            changes = session.changes()
            for i in range(3):
                await session.set("x", i)
            seen = []
            async for change in changes:
                seen.append(change.value)
                if len(seen) == 3:
                    changes.close()
            await enough.wait()
            return heard, seen

    assert asyncio.run(main()) == ([0, 1, 2], [0, 1, 2])


# -- life: quotas, time to live, deletion -------------------------------------------------


def test_a_quota_refuses_what_is_too_much_and_names_it(host: Host, session: Session) -> None:
    with pytest.raises(QuotaExceeded, match=r"would hold 12,0.. bytes, and may hold 10,000"):
        session["big"] = b"x" * 12_000
    for i in range(8):
        session[f"v{i}"] = i
    with pytest.raises(QuotaExceeded, match="would hold 9 things, and may hold 8"):
        session["one more"] = 1
    with pytest.raises(QuotaExceeded):
        session.function("f", "def f():\n    pass\n")
    session["v1"] = "written again: no more than before"
    del session["v0"]
    session["one more"] = 1
    for i in range(4):
        host.session(f"other-{i}")
    with pytest.raises(QuotaExceeded, match="5 sessions, as many as it may"):
        host.session("too many")


def test_what_is_freed_can_be_used_again(session: Session) -> None:
    for _ in range(20):
        session["big"] = b"x" * 6_000
        del session["big"]
    assert session.describe().bytes == 0


def test_what_a_command_writes_counts_together_before_it_is_committed() -> None:
    state, _ = Store(quota=Quota(bytes=1000, count=3)).open("s")
    state.set("there", stored("x" * 300, "there"))
    staged = Staged(state)
    staged.set("a", stored("x" * 500, "a"))
    with pytest.raises(QuotaExceeded, match="bytes"):
        staged.set("b", stored("x" * 300, "b"))
    staged.set("a", stored("x" * 100, "a"))
    staged.set("b", stored("x" * 300, "b"))
    with pytest.raises(QuotaExceeded, match="would hold 4 things"):
        staged.set("c", stored(1, "c"))
    staged.delete("there")
    staged.set("c", stored("x" * 300, "c"))
    state.commit(staged.writes)
    assert state.names() == ["a", "b", "c"]


def test_a_function_that_is_replaced_counts_as_the_difference() -> None:
    state, _ = Store(quota=Quota(bytes=1000)).open("s")
    for size in (600, 600, 900, 100):
        state.put_function(FunctionSource.make("f", "#" * size))
    with pytest.raises(QuotaExceeded):
        state.put_function(FunctionSource.make("f", "#" * 1001))
    assert state.bytes == 100


def test_so_many_deleted_variables_are_kept_and_then_only_their_names_can_be_used() -> None:
    state, _ = Store(quota=Quota(count=3)).open("s")
    for i in range(3):
        state.set(f"v{i}", stored(i, "v"))
        state.delete(f"v{i}")
    with pytest.raises(QuotaExceeded, match="versions of 3 deleted variables") as refused:
        state.set("new", stored(1, "new"))
    assert "names again" in refused.value.remedy
    with pytest.raises(QuotaExceeded, match="deleted variables"):
        Staged(state).set("new", stored(1, "new"))
    assert state.set("v0", stored(1, "v0")).versions == {"v0": 3}
    state.set("new", stored(1, "new"))


def test_a_write_returns_its_own_version_whoever_writes_meanwhile(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, x = session._state, session.variables
    session["x"] = 0
    real = state.commit

    def overtaken(*args: Any, **options: Any) -> Commit:
        commit = real(*args, **options)
        real({"x": Write(stored("another's", "x"))})
        return commit

    monkeypatch.setattr(state, "commit", overtaken)
    assert (x["x"].set(1), x["x"].revert(2)) == (2, 4)
    assert [(v.version, v.value) for v in x["x"].history()] == [
        (1, 0), (2, 1), (3, "another's"), (4, 1), (5, "another's"),
    ]  # fmt: skip


def test_a_session_that_is_not_used_expires_with_all_it_owns(clocked: tuple[Store, Clock]) -> None:
    store, clock = clocked
    state, _ = store.open("s", ttl=60)
    state.set("x", stored(1, "x"))
    clock.now += 59
    assert state.get("x").version == 1  # reading is use
    clock.now += 59
    assert store.sweep() == ([], clock.now + 1)
    clock.now += 1
    with pytest.raises(NotFound, match="'s' has expired: it was not used for 60 s"):
        state.get("x")
    assert store.sweep() == (["s"], None)
    assert list(store) == []
    fresh, _ = store.open("s", ttl=60)
    assert fresh.names() == []
    with pytest.raises(NotFound, match="has expired"):
        state.set("x", stored(2, "x"))


def test_a_session_at_work_does_not_expire(clocked: tuple[Store, Clock]) -> None:
    store, clock = clocked
    state, _ = store.open("s", ttl=60)
    state.busy += 1
    clock.now += 1000
    assert store.sweep() == ([], None), "when it will end is not known"
    store.open("later", ttl=60)
    assert store.sweep() == ([], clock.now + 60)
    state.busy -= 1
    assert store.sweep()[0] == ["s"]


def test_a_session_that_has_expired_makes_room_for_itself() -> None:
    clock = Clock()
    store = Store(quota=Quota(sessions=1), clock=clock)
    store.open("s", ttl=60)[0].set("x", stored(1, "x"))
    clock.now += 60
    assert store.open("s", ttl=60)[0].names() == []
    with pytest.raises(QuotaExceeded):
        store.open("t")


def test_a_host_does_not_keep_looking_whether_a_session_at_work_has_expired(host: Host) -> None:
    store, looked = host._host.engine.store, threading.Event()
    ends: list[float | None] = []
    state = host.session("at work", ttl=3600)._state
    state.busy += 1
    state.used -= 4000
    real = store.sweep

    def seen() -> tuple[list[str], float | None]:
        found = real()
        ends.append(found[1])
        looked.set()
        return found

    store.sweep = seen  # type: ignore[method-assign]
    later = host.session("wakes it", ttl=3600)._state
    assert looked.wait(20)
    assert ends[-1] == later.expires
    state.busy -= 1


def test_time_goes_on_while_the_store_is_closed(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(SqliteLog(tmp_path / "bridge.db"), clock=clock)
    store.open("short", ttl=60)
    store.open("long", ttl=600)
    store.open("ever")
    clock.now += 50
    store.peek("short").touch()
    store.close()
    clock.now += 61
    store = Store(SqliteLog(tmp_path / "bridge.db"), clock=clock)
    assert store.sweep()[0] == ["short"]
    assert list(store) == ["ever", "long"]
    store.close()


def test_the_time_to_live_of_an_open_host_is_kept_without_anybody_asking(host: Host) -> None:
    session = host.session("brief", ttl=0.05)
    session.tool(lambda: 1, name="tool")
    state = session._state
    while host.sessions():
        assert host.telemetry is not None
    assert (state.tools, state.deleted) == ({}, True)
    with pytest.raises(ValueError, match="more than 0"):
        host.session("wrong", ttl=0)


def test_to_delete_a_session_frees_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "bridge.db"

    def rows() -> dict[str, int]:
        db = sqlite3.connect(path)
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        counts = {table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}
        db.close()
        return counts

    with Host(store=path, env={"PYTHONPATH": KERNELSIDE}) as host:
        empty = rows()
        session = host.session("s", ttl=600)
        session.define("x", int)
        session["x"] = 1
        session["x"] = 2
        session.secrets["KEY"] = "a secret of mine"
        session.lm("openai/some", api_key="another secret")
        session.tool(lambda: 1, name="tool")
        session.function("f", "def f(ctx):\n    ctx['y'] = ctx.call_tool('tool')\n")
        session.create("collections.Counter", "ab")
        session.call("f", idempotency_key="k")
        session.call("f")
        full = rows()
        assert all(full[table] > empty[table] for table in full if table not in ("callbacks", "meta")), full
        state = session._state
        host.delete_session("s")
        assert rows() == empty
        assert (state.names, state.tools, state.functions, state.instances, state.secrets, state.types, state.bytes)[
            1:
        ] == ({}, {}, {}, {}, {}, 0)
        assert list(host.journal()) == []
        assert host.sessions() == []
        with pytest.raises(NotFound, match="was deleted"):
            session["x"]
        with pytest.raises(NotFound):
            session.call("f")
        with pytest.raises(NotFound, match="no session 's'"):
            host.delete_session("s")


def test_sessions_are_listed_and_described(host: Host, session: Session) -> None:
    session["x"] = [1, 2, 3]
    host.session("t", ttl=60)
    assert host.sessions() == ["s", "t"]
    s, t = host.describe()
    assert (s.id, s.variables, s.version, s.bytes, s.ttl, s.expires) == ("s", 1, 1, 7, None, None)
    assert t.expires is not None
    assert t.expires == t.used + 60
    text = repr(host.describe())
    assert "never" in text
    assert "in 60 s" in text or "in 59 s" in text
    assert "<td" in host.describe()._repr_html_()
    session.ttl = 5.5
    assert session.ttl == 5.5


# -- instances -----------------------------------------------------------------------


@pytest.fixture(params=["memory", "disk"])
def working(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    with Host(
        store=tmp_path / "bridge.db" if request.param == "disk" else None, env={"PYTHONPATH": KERNELSIDE}
    ) as host:
        yield host


def test_instances_can_be_named_copied_and_released(working: Host) -> None:
    session = working.session("s")
    counter = session.create("collections.Counter", "aab")
    session.rename(counter, "letters")
    counter.update("c")
    assert session.instances["letters"].most_common(1) == [("a", 2)]
    assert session.instance("letters") == counter
    assert "'letters' collections.Counter" in repr(counter)
    twin = session.copy("letters", name="twin")
    twin.update("bbb")
    assert twin.most_common(1) == [("b", 4)]
    assert counter.most_common(1) == [("a", 2)]
    assert (counter.version, twin.version) == (2, 2)
    with pytest.raises(Conflict, match="is called 'twin'"):
        session.rename("letters", "twin")
    with pytest.raises(Conflict):
        session.copy(counter, name="twin")
    shown = repr(session.instances)
    assert "letters" in shown
    assert "twin" in shown
    session.release("twin")
    assert list(session.instances) == [counter.ref]
    with pytest.raises(NotFound):
        twin.most_common()
    with pytest.raises(NotFound, match="no instance 'twin'"):
        session.release("twin")
    with pytest.raises(TypeError, match="by its name or ref"):
        session.release(5)


def test_of_copies_that_are_made_at_once_under_one_name_there_is_one(session: Session) -> None:
    put_instance(session, "i")
    for round in range(20):
        start = threading.Barrier(4)
        refused: list[Any] = []

        def copy(name: str = f"twin {round}", start: threading.Barrier = start, refused: list[Any] = refused) -> None:
            start.wait()
            try:
                session.copy("i", name=name)
            except Conflict as exc:
                refused.append(exc)

        threads = [threading.Thread(target=copy) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 3
        session.release(f"twin {round}")


def test_a_copy_is_refused_if_another_takes_its_name_at_the_last_moment(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_instance(session, "i")
    state = session._state
    real = state.put_instance

    def overtaken(instance: InstanceState) -> Commit:
        real(msgspec.structs.replace(instance, ref="first"))
        return real(instance)

    monkeypatch.setattr(state, "put_instance", overtaken)
    with pytest.raises(Conflict, match="is called 'twin'"):
        session.copy("i", name="twin")
    assert sorted(state.instances) == ["first", "i"]


def put_instance(session: Session, ref: str) -> None:
    empty = stored({}, "state")
    session._state.put_instance(
        InstanceState(
            ref=ref, cls="C", args=empty, kwargs=empty, adapter="bridge", state=empty, sha256=None, methods=()
        )
    )


def test_state_that_is_data_can_be_looked_at_without_a_kernel(working: Host) -> None:
    session = working.session("s")
    predict = session.create("dspy.Predict", "question -> answer")
    assert json.dumps(predict.state["demos"]) == "[]"


def test_everything_a_session_owns_is_there_again_when_the_store_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "bridge.db"
    with Host(store=path, env={"PYTHONPATH": KERNELSIDE}) as host:
        session = host.session("s")
        session.update({"x": (1, {2}), "array": numpy.arange(6).reshape(2, 3), "n": 2**70})
        session.function("double", "def double(ctx, x):\n    return 2 * x\n")
        session.secrets["KEY"] = "hunter2-hunter2"
        session.lm("openai/some", api_key="sk-another-secret", temperature=0.5)
        account = session.create("accounts.Account", "Ada")
        account.deposit_later(5)
        session.rename(account, "ada")
        session["account"] = account
    with Host(store=path, env={"PYTHONPATH": KERNELSIDE}) as host:
        session = host.session("s")
        assert (session["x"], session["n"]) == ((1, {2}), 2**70)
        assert (session["array"] == numpy.arange(6).reshape(2, 3)).all()
        assert session.call("double", 4) == 8
        assert session.secrets["KEY"].get_secret_value() == "hunter2-hunter2"
        assert session["account"].look() == session.instances["ada"].look() == ("Ada", 5)
        assert session.instances["ada"].version == 2
        lm = session._state.lm
        assert lm is not None
        assert (lm.model, lm.api_key, lm.options) == ("openai/some", None, {"temperature": 0.5})
        assert session.version == 4, "commits, one of them with the instance and what it wrote"


# -- secrets -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"model": 3},
        {"model": None},
        {"model": "m", "api_base": 5},
        {"model": "m", "adapter": 7},
        {"model": "m", "api_key": b"k"},
    ],
)
def test_a_language_model_that_is_none_is_refused_before_it_is_written(given: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "lm.db"
    with Host(kernels=0, store=path) as host:
        with pytest.raises(TypeError, match="is a text, not a"):
            host.session("s").lm(**given)
        host.session("s")["kept"] = 1
    with Host(kernels=0, store=path) as host:
        assert host.session("s")["kept"] == 1


def test_a_secret_reaches_only_the_command_that_names_it(working: Host, tmp_path: Path) -> None:
    session = working.session("s")
    session.secrets["API_KEY"] = "sk-very-secret-123"
    session.function("use", "def use(ctx):\n    return len(ctx.secret('API_KEY'))\n")
    with pytest.raises(NotFound, match="given no secret 'API_KEY'"):
        session.call("use")
    assert session.call("use", secrets=["API_KEY"]) == 18
    session.function("named", "def named(ctx):\n    return len(ctx.secret('API_KEY'))\n", secrets=["API_KEY"])
    assert session.call("named") == 18
    with pytest.raises(NotFound, match="no secret 'OTHER'"):
        session.call("use", secrets=["OTHER"])
    with pytest.raises(TypeError, match="a list of names"):
        session.call("use", secrets="API_KEY")


def test_a_secret_is_shown_nowhere(working: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "sk-very-secret-123"
    session = working.session("s")
    session.secrets["API_KEY"] = secret
    session.lm("openai/some", api_key=secret)
    said: list[str] = []

    @session.tool
    def tool(given: str) -> str:
        return given

    @session.function(secrets=["API_KEY"])
    def leak(ctx):  # type: ignore[no-untyped-def]
        key = ctx.secret("API_KEY")
        print("printed", key[:9], end="")
        print(key[9:])
        print("whole", key)
        ctx.progress(1, 2, key)
        ctx.emit("mine", {}, key=key)
        ctx.call_tool("tool", given=key)
        raise ValueError(key)

    with pytest.raises(RemoteError) as caught:
        session.call("leak")
    said += [str(caught.value), repr(caught.value), caught.value.remote_traceback, *caught.value.__notes__]
    said += [repr(x) for x in (session, session.secrets, session.secrets["API_KEY"], working, session._state.lm)]
    said += [str(working.telemetry.events()), *working.telemetry.lines(), repr(working.journal())]
    said += list(capsys.readouterr())
    working.export(tmp_path / "export.json")
    said.append((tmp_path / "export.json").read_text())
    for kept in tmp_path.glob("bridge.db*"):
        said.append(kept.read_bytes().decode("latin-1"))
    assert "printed" in "".join(said)
    assert not [text for text in said if secret in text or "sk-very-s" in text]


def test_secrets_are_a_mapping_that_gives_them_wrapped(session: Session) -> None:
    session.secrets["A"] = "aaaa"
    assert list(session.secrets) == ["A"]
    assert "A" in session.secrets
    assert "aaaa" not in repr(session.secrets["A"])
    assert session.secrets["A"].get_secret_value() == "aaaa"
    del session.secrets["A"]
    with pytest.raises(KeyError):
        session.secrets["A"]
    with pytest.raises(ValueError, match="not empty"):
        session.secrets["B"] = ""


# -- export and import -----------------------------------------------------------------


def test_what_one_store_exports_another_imports(tmp_path: Path) -> None:
    with Host(store=tmp_path / "one.db", env={"PYTHONPATH": KERNELSIDE}) as host:
        session = host.session("s", ttl=6000)
        session.define("n", int, ge=0)
        session.update({"n": 1, "array": numpy.arange(3), "big": 2**70})
        session["n"] = 2
        session.function("double", "def double(ctx, x):\n    return 2 * x\n")
        session.rename(session.create("accounts.Account", "Ada"), "ada")
        host.export(tmp_path / "export.json", history=True)
    with Host(env={"PYTHONPATH": KERNELSIDE}) as host:
        assert host.import_(tmp_path / "export.json") == ["s"]
        session = host.session("s")
        assert (session["n"], session["big"], session.ttl) == (2, 2**70, 6000)
        assert (session["array"] == numpy.arange(3)).all()
        assert [v.value for v in session.variables["n"].history()] == [1, 2]
        with pytest.raises(InvalidValue):
            session["n"] = -1
        assert session.call("double", 4) == 8
        assert session.instances["ada"].look() == ("Ada", 0)
        with pytest.raises(ValueError, match="'s' already"):
            host.import_(tmp_path / "export.json")
        host.export(tmp_path / "back.json", "s", history=True)
    one, back = (json.loads((tmp_path / name).read_text())["sessions"] for name in ("export.json", "back.json"))
    for exported in (one, back):
        for item in exported:
            item.pop("used", None)
    assert one == back
