"""Kernels that outlived their host: what a host writes down of its processes, and the sweep that the next host does.

A kernel ends by itself when its host has died, but not while it is stopped (SIGSTOP, a debugger). So each host records
its processes in its runtime directory, and each host that starts looks for records whose host is gone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import tempfile
from pathlib import Path
from typing import Final

import msgspec
import psutil

__all__ = ("OWNER_FILE", "PREFIX", "Owner", "Swept", "here", "read_owner", "started", "sweep", "write_owner")

OWNER_FILE: Final = "owner.json"
PREFIX: Final = "bridge-"
MAX_RECORD_BYTES: Final = 1 << 20


class Owner(msgspec.Struct, frozen=True):
    """Whose a runtime directory is. A pid alone says nothing, for pids are reused: with its start it names one process."""

    where: str
    pid: int
    started: float
    kernels: dict[int, float] = {}
    """The kernels' processes, each the leader of its group: pid and start."""


class Swept(msgspec.Struct, frozen=True):
    """A directory that a dead host had left behind, and the kernels that were killed for it."""

    directory: str
    host: int
    killed: tuple[int, ...]


_decode: Final = msgspec.json.Decoder(Owner).decode


def here() -> str:
    """The boot and the pid namespace in which this process's pids mean something.

    A directory may be seen from elsewhere (a container that shares /tmp), where its live host looks dead.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return os.uname().nodename if hasattr(os, "uname") else ""


def started(pid: int) -> float | None:
    """When the process started, to be compared with the same of another time; None if there is no such process.

    On Linux in clock ticks since boot: seconds since the epoch would differ after the clock was set, and a live
    host would look like a dead one.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except FileNotFoundError:
        if os.path.exists("/proc/self/stat"):
            return None
    except OSError:
        return None
    else:
        state, *fields = line.rpartition(")")[2].split()
        return None if state in "ZX" else float(fields[18])
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def write_owner(directory: Path, owner: Owner) -> None:
    """Write the record, whole or not at all."""
    path = directory / f".{OWNER_FILE}"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(owner))
    os.replace(path, directory / OWNER_FILE)


def read_owner(directory: Path) -> Owner | None:
    """The record of a directory that is certainly this user's own, or None."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        found = os.lstat(directory)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
            return None
        with open(os.open(directory / OWNER_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            opened = os.fstat(file.fileno())
            if stat.S_ISREG(opened.st_mode) and opened.st_uid == os.getuid():
                return _decode(file.read(MAX_RECORD_BYTES))
    return None


def _kill(pid: int, start: float) -> bool:
    """Kill the group that the process leads, if it is that very process; whether that was done."""
    if pid <= 1 or pid == os.getpid() or started(pid) != start:
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)  # works on stopped processes too
            return True
    return False


def sweep(parent: str | None = None) -> list[Swept]:
    """End what is left of this user's dead hosts, and remove their runtime directories. Blocks for some milliseconds.

    `parent` is where runtime directories are made. A directory without a readable record, of another user, of
    another machine or of a living host is left alone.
    """
    if not hasattr(os, "getuid"):
        return []
    done: list[Swept] = []
    place = here()
    for directory in Path(parent or tempfile.gettempdir()).glob(f"{PREFIX}*"):
        owner = read_owner(directory)
        if owner is None or owner.where != place or started(owner.pid) == owner.started:
            continue
        killed = tuple(pid for pid, start in owner.kernels.items() if _kill(pid, start))
        shutil.rmtree(directory, ignore_errors=True)
        done.append(Swept(str(directory), owner.pid, killed))
    return done
