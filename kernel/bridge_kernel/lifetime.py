"""When a kernel must end by itself: its parent is gone, or has let go of it, so nobody will ever end it."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import shutil
import signal
import threading
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Lifeline", "Parent", "leave", "orphaned")

POLL_S: Final = 1.0


class Parent:
    """The process that started this kernel, as `JPY_PARENT_PID` names it."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.fd: int | None = None
        if hasattr(os, "pidfd_open"):
            try:
                # Readable once the process has ended; and unlike a pid it never comes to mean another process.
                self.fd = os.pidfd_open(pid)
            except ProcessLookupError:
                self._pid = 0
            except OSError:
                self.fd = None  # forbidden here (a sandbox): ask again and again instead

    @classmethod
    def from_environment(cls) -> Parent | None:
        """The parent, or None if nobody said who it is (a kernel started by hand)."""
        pid = os.environ.get("JPY_PARENT_PID", "")
        return cls(int(pid)) if pid.isdigit() and int(pid) > 1 else None

    @property
    def gone(self) -> bool:
        """Whether it had ended before we could watch it."""
        return self._pid == 0

    def poll_in_thread(self, on_death: Callable[[], None]) -> None:
        """Watch on a thread of its own, which needs nothing that a command's code could keep from it.

        Without pidfd, by asking again and again.
        """

        def watch() -> None:
            if self.fd is not None:
                poll = select.poll()
                poll.register(self.fd, select.POLLIN)
                poll.poll()
                on_death()
                return
            with contextlib.suppress(ProcessLookupError):
                while True:
                    os.kill(self._pid, 0)  # no signal: it only asks. Not getppid, which a wrapper would change
                    time.sleep(POLL_S)
            on_death()

        threading.Thread(target=watch, name="bridge-parent", daemon=True).start()


class Lifeline:
    """A pipe on stdin, held open by whoever owns this kernel; its end is the kernel's.

    For owners that are less than a process: a part of one that has failed closes its pipe, the process itself lives on.
    Taking it also makes the kernel the leader of a process group of its own, so that nothing it started survives it.

    Raises:
        OSError: stdin is closed.
    """

    def __init__(self) -> None:
        # Away from descriptor 0, and not inherited: a command's code, and what it starts, would read from it.
        self._fd = os.dup(0)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        if hasattr(os, "setpgid") and os.getpgrp() != os.getpid():
            os.setpgid(0, 0)

    def watch_in_thread(self, on_end: Callable[[], None]) -> None:
        """Call `on_end` once it has ended, on a thread of its own; what is written to it means nothing."""

        def watch() -> None:
            with contextlib.suppress(OSError):  # closed by a command's code: better ended than never to be ended
                while os.read(self._fd, 4096):
                    pass
            on_end()

        threading.Thread(target=watch, name="bridge-lifeline", daemon=True).start()


def remove_runtime_directory() -> None:
    """Remove the directory of the host that started us: its connection files hold keys, and nobody else will."""
    directory = os.environ.get("BRIDGE_RUNTIME_DIR", "")
    if directory and os.path.basename(directory).startswith("bridge-"):
        shutil.rmtree(directory, ignore_errors=True)


def end_group() -> None:
    """End at once, together with every process of this kernel's own process group: no grandchild survives."""
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    # A wrapper leads the group (`sh -c`), so others may be in it: end what we started, by name.
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    os._exit(1)


def orphaned() -> None:
    """The parent is gone, or its lifeline is: clean up after it, and end."""
    gc.disable()  # a finalizer of a command's may wait for ever for what a stuck thread holds
    remove_runtime_directory()
    end_group()


def leave(code: int, *, grace_s: float) -> None:
    """End within `grace_s` whatever the main thread is doing: daemon threads may hold up Python's own way out."""

    def out() -> None:
        time.sleep(grace_s)
        os._exit(code)

    threading.Thread(target=out, name="bridge-leave", daemon=True).start()
