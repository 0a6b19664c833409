"""`Owner`: one host a store. A file beside the store's carries the lock, and says whose it is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from typing import Final

import msgspec
import psutil

from bridge_kernel.contract.errors import StoreFailed, StoreLocked

__all__ = ("Owner",)

MAX_BYTES: Final = 4096  # of the file: more than that was not written by us


class _Who(msgspec.Struct, frozen=True):
    """The owner's process: `created` in seconds since the epoch, for numbers of processes are used again."""

    pid: int
    created: float
    host: str

    @classmethod
    def here(cls) -> _Who:
        return cls(os.getpid(), psutil.Process().create_time(), socket.gethostname())


class Owner:
    """Owns the store at `path` from its making until `release`, or until the process ends, however it does.

    A fork owns nothing: neither can it release what its parent owns, nor does it hold on to it.

    Raises:
        StoreLocked: another host, of this process or of another, owns it.
        StoreFailed: the lock's file cannot be made there.
    """

    def __init__(self, path: str) -> None:
        self._path = f"{path}.owner"
        self._store = path
        self._fd: int | None = None
        try:
            self._take()
        except OSError as exc:
            raise StoreFailed(f"the store {path} cannot be locked: {exc}") from exc
        _owners.add(self)

    @property
    def held(self) -> bool:
        """False once it was released, and in a fork."""
        return self._fd is not None

    def release(self) -> None:
        if self._fd is None:
            return
        # While it is locked: who finds the path free makes a file of his own, who has opened this one sees that it is gone.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._close()

    def _take(self) -> None:
        while self._fd is None:
            # Not inherited by programs that this process starts (PEP 446).
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            with contextlib.ExitStack() as unless_taken:
                # The lock ends with the descriptor, which must not outlive a failure: it would lock its own process out.
                unless_taken.callback(os.close, fd)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise self._locked(os.pread(fd, MAX_BYTES, 0)) from None
                # If not, its owner released it, and took it away, between our opening and our locking it.
                if self._is_there(fd):
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, msgspec.json.encode(_Who.here()), 0)
                    unless_taken.pop_all()
                    self._fd = fd

    def _is_there(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _locked(self, content: bytes) -> StoreLocked:
        try:
            who = msgspec.json.decode(content, type=_Who)
        except msgspec.DecodeError:  # it is being written
            return StoreLocked(f"the store {self._store} is open in another process")
        if who == _Who.here():
            return StoreLocked(f"the store {self._store} is open already, in this process ({who.pid})")
        where = f" on {who.host}" if who.host != socket.gethostname() else ""
        return StoreLocked(
            f"the store {self._store} is open in another process, {who.pid}{where}",
            remedy=f"Close the host of process {who.pid}, or end it, or open another file.",
        )

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        _owners.discard(self)
        if fd is not None:
            os.close(fd)


_owners: Final[set[Owner]] = set()


def _disown() -> None:
    # The lock belongs to the open file, which a fork shares: it would outlive its owner in the child.
    for owner in list(_owners):
        owner._close()


os.register_at_fork(after_in_child=_disown)
