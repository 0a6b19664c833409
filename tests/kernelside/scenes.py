"""What the functions of tests/scenarios use inside a kernel: which attempt this is, how to die, how to run for ever."""

from __future__ import annotations

import os
import signal
import time
from typing import Any


def attempt(file: str) -> int:
    """How often this was called with that file, this time included. It calls nothing back, so no journal knows of it."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(fd, b"x")
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def die() -> None:
    """End this kernel at once, as the system does when it is out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def spin() -> None:
    """Run until somebody stops it, which can happen at every line."""
    while True:
        time.sleep(0.01)


def revive(ctx: Any) -> None:
    """Make a command that has ended able to call its host again, which a kernel would not let it: the host must refuse."""
    command = ctx._command
    while command in command.runtime._active:  # stopped perhaps, but its code is still to notice
        time.sleep(0.01)
    command._stopped = command._answered = False


def settled(file: str) -> int:
    """How long a file is once it has grown for 0.3 s no more: how far somebody got who can get no further."""
    size, since = -1, time.monotonic()
    while time.monotonic() - since < 0.3:
        now = os.path.getsize(file)
        if now != size:
            size, since = now, time.monotonic()
        time.sleep(0.01)
    return size


def there(file: str) -> bool:
    """Whether a file is there, or comes within 10 s."""
    until = time.monotonic() + 10
    while not os.path.exists(file) and time.monotonic() < until:
        time.sleep(0.01)
    return os.path.exists(file)
