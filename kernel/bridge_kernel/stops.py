"""Stopping a thread's Python code from outside, but never in the middle of what must be whole."""

from __future__ import annotations

import ctypes
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("CommandStopped", "calm", "shielded", "stop_thread")


class CommandStopped(BaseException):
    """Raised inside the code of a command that was cancelled or ran out of time.

    A BaseException, as `asyncio.CancelledError` is: `except Exception` must not hold on to a dead command.
    """


# Re-entrant: a finalizer that prints may run inside any of these, and to print is to send within a shield. Each pair of
# steps that it takes here undoes itself.
_lock = threading.RLock()
_shields: dict[int, int] = {}  # thread → how many shields it is within
_owed: set[int] = set()  # threads to be stopped as soon as they leave their shield
_sent: set[int] = set()  # threads in which the exception was raised, delivered or not: CPython does not say


class _Settled(BaseException):
    """Takes the place of a `CommandStopped` that is taken back."""


def _raise(thread: int, exception: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(exception))


def _settle(thread: int) -> None:
    """Take back what was raised in this thread and has not arrived, if it has not; the caller holds `_lock`.

    Something is raised and caught in its place. Raising nothing, as CPython has it, would leave the interpreter
    alert for an exception that never comes: all threads run slower from then on, and CPython 3.11 goes round in
    circles as soon as one sets a trace function, as debugpy does when the first cell has it imported.
    """
    try:
        _raise(thread, _Settled)
        while True:
            pass  # it arrives here at the latest
    except _Settled:
        pass


def stop_thread(thread: int) -> None:
    """Raise `CommandStopped` in `thread` at its next line of Python, or when it leaves its shield."""
    with _lock:
        if thread in _shields:
            _owed.add(thread)
        else:
            _sent.add(thread)
            _raise(thread, CommandStopped)


def calm() -> None:
    """Take back what was raised in this thread and has not arrived. Call it again if it raises `CommandStopped`."""
    thread = threading.get_ident()
    if thread in _sent or thread in _owed:
        with _lock:
            _owed.discard(thread)
            if thread in _sent:
                _sent.discard(thread)
                _settle(thread)


@contextmanager
def shielded() -> Iterator[None]:
    """Within it this thread is not stopped: half a message on a socket would corrupt the next.

    Raises:
        CommandStopped: on leaving, if the thread was to be stopped meanwhile.
    """
    thread = threading.get_ident()
    with _lock:
        _shields[thread] = _shields.get(thread, 0) + 1
        if thread in _sent:
            _sent.discard(thread)
            _settle(thread)
            # If it had arrived already, the code is on its way out and must not be stopped twice.
            if not isinstance(sys.exc_info()[1], CommandStopped):
                _owed.add(thread)
    try:
        yield
    finally:
        with _lock:
            left = _shields[thread] - 1
            if left:
                _shields[thread] = left
                stop = False
            else:
                del _shields[thread]
                stop = thread in _owed
                _owed.discard(thread)
        if stop:
            raise CommandStopped
