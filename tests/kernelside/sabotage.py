"""What goes wrong in kernels, done on purpose: connections cut, processes stopped, memory kept, the interpreter's lock held."""

from __future__ import annotations

import os
import signal
import socket
import stat

_kept: list[bytes] = []


def cut() -> None:
    """Shut down every connected Unix socket of this process, as if somebody had cut the wires."""
    for name in os.listdir("/proc/self/fd"):
        try:
            fd = os.dup(int(name))
        except OSError:
            continue
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            os.close(fd)
            continue
        with socket.socket(fileno=fd) as wire:
            listening = wire.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if wire.family == socket.AF_UNIX and not listening:
                try:
                    wire.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue


def stop() -> None:
    """Stop the whole process, as SIGSTOP from outside would."""
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(code: int) -> None:
    os._exit(code)


def keep(size: int) -> int:
    """Use `size` bytes of memory from now on."""
    _kept.append(b"x" * size)
    return sum(map(len, _kept))
