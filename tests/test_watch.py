"""Watchers at their ends: when the host closes, when their session goes, when they are too slow. And the owner's lock."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from bridge_host import Host, HostClosed
from bridge_host.store import Store
from bridge_host.store.model import Write
from bridge_host.store.owner import Owner
from bridge_host.values import store as stored
from bridge_host.watch import Watchers
from bridge_kernel.contract.errors import StoreFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bridge_host import Change
    from bridge_host.store.state import SessionState
    from bridge_host.watch import Changes

GENEROUS_S = 30.0


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.close()


@pytest.fixture
def watchers(store: Store) -> Iterator[Watchers]:
    watchers = Watchers(store)
    yield watchers
    watchers.close()


def in_time(function: Callable[[], object]) -> list[str]:
    """Call it, which must return; what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=function, daemon=True)
        thread.start()
        thread.join(GENEROUS_S)
        assert not thread.is_alive(), "it hangs"
    return [str(warning.message) for warning in caught]


def write(session: SessionState, **values: Any) -> None:
    session.commit({name: Write(stored(value, name)) for name, value in values.items()})


def values_of(changes: Changes) -> list[Any]:
    """All that it has, which must end."""
    seen: list[Any] = []
    in_time(lambda: seen.extend(change.value for change in changes))
    return seen


# -- the host closes -------------------------------------------------------------------


def test_a_watcher_that_writes_its_own_variable_holds_up_no_closing() -> None:
    host = Host(kernels=0)
    session = host.session("s")
    begun = threading.Event()

    def again(change: Change) -> None:
        begun.set()
        session["x"] = change.version

    session.watch(again, "x")
    session["x"] = 0
    assert begun.wait(GENEROUS_S)
    assert in_time(host.close) == []


def test_an_asynchronous_watcher_that_waits_is_cancelled_with_a_warning() -> None:
    host = Host(kernels=0)
    session = host.session("s")
    begun, cancelled = threading.Event(), threading.Event()

    async def waits(change: Change) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    session.watch(waits, "x")
    session["x"] = 0
    assert begun.wait(GENEROUS_S)
    session["x"] = 1
    (warning,) = in_time(host.close)
    assert "<Watch x of session 's'> was cancelled" in warning
    assert "1 commits more were not told" in warning
    assert cancelled.wait(GENEROUS_S)


def test_a_watcher_that_does_not_return_is_named_and_left_to_itself(store: Store) -> None:
    watchers = Watchers(store)
    begun, release = threading.Event(), threading.Event()
    seen: list[int] = []

    def stuck(change: Change) -> None:
        seen.append(change.version)
        begun.set()
        release.wait(GENEROUS_S)

    watchers.watch("s", "x", stuck)
    session, _ = store.open("s")
    write(session, x=1)
    write(session, x=2)
    assert begun.wait(GENEROUS_S)
    (warning,) = in_time(lambda: watchers.close(0.01))
    assert "<Watch x of session 's'> does not return" in warning
    release.set()
    for thread in threading.enumerate():
        if thread.name == "bridge-watchers":
            in_time(thread.join)
    assert seen == [1]


def test_a_watcher_that_waits_for_changes_is_let_go(store: Store) -> None:
    watchers = Watchers(store)
    begun, ended = threading.Event(), threading.Event()
    changes = watchers.changes("s", "never")

    def reads(change: Change) -> None:
        begun.set()
        assert list(changes) == []
        ended.set()

    watchers.watch("s", "x", reads)
    session, _ = store.open("s")
    write(session, x=1)
    assert begun.wait(GENEROUS_S)
    (warning,) = in_time(lambda: watchers.close(0.01))
    assert "<Watch x of session 's'>" in warning
    assert ended.wait(GENEROUS_S)


def test_all_that_was_committed_is_told_before_the_closing_ends(watchers: Watchers, store: Store) -> None:
    begun, release = threading.Event(), threading.Event()
    seen: list[Any] = []

    def watcher(change: Change) -> None:
        begun.set()
        release.wait(GENEROUS_S)
        seen.append(change.value)

    watchers.watch("s", "x", watcher)
    session, _ = store.open("s")
    for i in range(5):
        write(session, x=i)
    assert begun.wait(GENEROUS_S)
    closing = threading.Thread(target=watchers.close, args=(GENEROUS_S,))
    closing.start()
    release.set()
    closing.join(GENEROUS_S)
    assert seen == [0, 1, 2, 3, 4]
    with pytest.raises(HostClosed):
        watchers.watch("s", "x", watcher)
    with pytest.raises(HostClosed):
        watchers.changes("s", None)


def test_the_end_reaches_everybody_who_iterates(watchers: Watchers) -> None:
    async def main() -> list[list[Change]]:
        changes = watchers.changes("s", None)
        readers = [asyncio.create_task(read(changes)) for _ in range(3)]
        await asyncio.sleep(0)  # all of them wait now
        await asyncio.to_thread(changes.close)
        return await asyncio.wait_for(asyncio.gather(*readers), GENEROUS_S)

    assert asyncio.run(main()) == [[], [], []]


async def read(changes: Changes) -> list[Change]:
    return [change async for change in changes]


# -- the session goes ------------------------------------------------------------------


def test_what_watches_a_session_ends_with_it_and_hears_nothing_of_the_next(watchers: Watchers, store: Store) -> None:
    busy, release = threading.Event(), threading.Event()

    def slow(change: Change) -> None:
        busy.set()
        release.wait(GENEROUS_S)

    watchers.watch("other", None, slow)
    other, _ = store.open("other")
    write(other, y=1)
    assert busy.wait(GENEROUS_S)

    # While the watchers' thread is busy: what the first session wrote is still to be told when the second is there.
    first, _ = store.open("s")
    old = watchers.changes("s", None)
    heard: list[Any] = []
    watchers.watch("s", None, lambda change: heard.append(change.value))
    write(first, x="first")
    store.delete("s")
    watchers.forget("s")
    new = watchers.changes("s", None)
    second, _ = store.open("s")
    write(second, x="second")
    release.set()
    assert next(iter(new)).value == "second"
    assert values_of(old) == []
    assert heard == []


# -- too slow --------------------------------------------------------------------------


def test_a_reader_that_is_too_far_behind_misses_the_oldest_is_told_how_many_and_warned_once(
    watchers: Watchers, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge_host.watch.WAITING", 3)
    session, _ = store.open("s")
    changes = watchers.changes("s", None)
    turn = threading.Semaphore(0)
    watchers.watch("s", None, lambda change: turn.release())

    def write_all() -> None:
        for i in range(8):
            write(session, x=i)
            assert turn.acquire(timeout=GENEROUS_S)  # so it is this reader who is slow, not the watchers
        watchers.close(GENEROUS_S)

    (warning,) = in_time(write_all)
    assert "<Watch every variable of session 's'> is more than 3 changes behind" in warning
    assert changes.missed == 5
    assert values_of(changes) == [5, 6, 7]


def test_watchers_that_are_too_slow_miss_the_oldest_are_told_how_many_and_warned_once(
    watchers: Watchers, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge_host.watch.WAITING", 3)
    session, _ = store.open("s")
    begun, release = threading.Event(), threading.Event()
    seen: list[Any] = []

    def slow(change: Change) -> None:
        begun.set()
        release.wait(GENEROUS_S)
        seen.append(change.value)

    watch = watchers.watch("s", "x", slow)
    unconcerned = watchers.watch("s", "y", slow)

    def write_all() -> None:
        write(session, x=0)
        assert begun.wait(GENEROUS_S)
        for i in range(1, 8):
            write(session, x=i)
        release.set()
        watchers.close(GENEROUS_S)

    (warning,) = in_time(write_all)
    assert "<Watch x of session 's'> is more than 3 changes behind" in warning
    assert (watch.missed, unconcerned.missed) == (4, 0)
    assert seen == [0, 5, 6, 7]


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_does_not_end_the_other_watchers(
    watchers: Watchers, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: said.append(args.exc_value))
    session, _ = store.open("s")

    def broken(change: Change) -> None:
        raise LookupError("mine")

    watchers.watch("s", None, broken)
    changes = watchers.changes("s", None)
    write(session, x=1)
    watchers.close(GENEROUS_S)
    assert values_of(changes) == [1]
    assert "raised LookupError" in str(said)


# -- the owner's lock ------------------------------------------------------------------


@pytest.mark.parametrize("function", ["pwrite", "ftruncate", "fstat"])
def test_a_lock_that_cannot_be_written_is_not_kept(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = str(tmp_path / "bridge.db")
    with monkeypatch.context() as patched:
        patched.setattr(os, function, full)
        with pytest.raises(StoreFailed, match="No space left"):
            Owner(path)
    Owner(path).release()
