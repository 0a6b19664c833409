"""A host's snapshots for other processes of the same user: JSON lines on a Unix socket in its runtime directory.

Always there, for it costs nothing while nobody is connected: no snapshot is made, no timer runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self

import msgspec
import psutil

from ...pool.orphans import PREFIX, here, read_owner, started
from .snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Broadcast", "Ended", "FoundHost", "Watching", "find_hosts")

SOCKET_FILE: Final = "top.sock"
EVERY_S: Final = 0.5
MAX_CLIENTS: Final = 8
MAX_LINE: Final = 1 << 18
"""Bytes of one snapshot; what `Snapshot` may hold takes a quarter of that."""
MAX_UNSENT: Final = 2 * MAX_LINE
"""Bytes that may wait for a client that does not read, beyond what its socket holds, before it is dropped."""
SILENCE_S: Final = 10.0
_PEER: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Ended(msgspec.Struct, frozen=True, tag="ended", tag_field="kind"):
    """The last line: why no more come."""

    reason: Literal["closed", "full", "gone"]
    """The host was closed, or too many look on already; "gone", which only the other end says: it broke off."""


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Snapshot | Ended).decode


class Broadcast:
    """Belongs to one event loop. Serves nothing until it is opened; `close` ends it, whatever clients do."""

    def __init__(self, directory: Path, take: Callable[[], Snapshot], *, every_s: float = EVERY_S) -> None:
        self.path = directory / SOCKET_FILE
        self._take = take
        self._every_s = every_s
        self._server: asyncio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._clients: dict[_Client, asyncio.Transport] = {}

    async def open(self) -> None:
        """Offer snapshots from now on. Where there are no Unix sockets, or the path is too long for one, nothing is.

        That costs the page in another terminal, which is no reason to fail a host.
        """
        if not hasattr(socket, "AF_UNIX"):
            return
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.bind(str(self.path))
            os.chmod(self.path, 0o600)  # before it listens: nobody was let in meanwhile, nor into the directory
        except OSError:
            listening.close()
            return
        # In two steps: it is ours to close before anything is waited for.
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: _Client(self), sock=listening, backlog=MAX_CLIENTS, start_serving=False
        )
        await self._server.start_serving()

    @property
    def clients(self) -> int:
        """How many look on."""
        return len(self._clients)

    def joined(self, client: _Client, transport: asyncio.Transport) -> None:
        """A client has connected."""
        if self._server is None or not _same_user(transport):
            transport.abort()  # it came at the very moment that the host was closed, or is not this user's
        elif len(self._clients) >= MAX_CLIENTS:
            transport.write(_encode(Ended("full")) + b"\n")
            transport.close()
        else:
            self._clients[client] = transport
            if self._timer is None:
                self._tick()
            else:
                self._send(transport, self._line())

    def left(self, client: _Client) -> None:
        """A client has gone."""
        self._clients.pop(client, None)
        if not self._clients:
            self._rest()

    def _tick(self) -> None:
        # The next one is due so long after this one, not by the clock: a loop that is late makes fewer.
        self._timer = asyncio.get_running_loop().call_later(self._every_s, self._tick)
        line = self._line()
        for transport in list(self._clients.values()):
            self._send(transport, line)

    def _line(self) -> bytes:
        return _encode(self._take()) + b"\n"

    def _send(self, transport: asyncio.Transport, line: bytes) -> None:
        if transport.get_write_buffer_size() + len(line) > MAX_UNSENT:
            transport.abort()  # it does not read; `left` comes by itself
        elif not transport.is_closing():
            transport.write(line)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Tell those that look on that the host has ended, and serve nobody any more. Waits for nobody."""
        server, self._server = self._server, None
        if server is None:
            return
        self._rest()
        server.close()
        for transport in list(self._clients.values()):
            if not transport.is_closing():
                transport.write(_encode(Ended("closed")) + b"\n")
            if transport.get_write_buffer_size():
                transport.abort()  # it is slow, and there is no time
            else:
                transport.close()
        with contextlib.suppress(OSError):
            self.path.unlink()


class _Client(asyncio.Protocol):
    """One that looks on. It has nothing to say: if it does say something it is dropped."""

    def __init__(self, broadcast: Broadcast) -> None:
        self._broadcast = broadcast
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._broadcast.joined(self, transport)

    def data_received(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._broadcast.left(self)


def _same_user(transport: asyncio.Transport) -> bool:
    """Whether the other process is this user's. Where the system does not say: the directory's mode does."""
    connection: socket.socket | None = transport.get_extra_info("socket")
    if connection is None or not hasattr(socket, "SO_PEERCRED"):
        return True
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, uid, _ = _PEER.unpack(peer)
    return bool(uid == os.getuid())


# -- the other end -----------------------------------------------------------------


class FoundHost(msgspec.Struct, frozen=True):
    """A host of this user's that runs on this machine, maybe in another process."""

    pid: int
    opened: float
    """Seconds since the epoch."""
    kernels: int
    """Processes of its own."""
    command: str
    """The process's command line, as it is."""
    path: Path
    """Its socket."""


def find_hosts(parent: Path | None = None) -> list[FoundHost]:
    """This user's hosts, the newest first. `parent` is where runtime directories are made: `$TMPDIR`, else `/tmp`."""
    found: list[FoundHost] = []
    place = here()
    for directory in (parent or Path(tempfile.gettempdir())).glob(f"{PREFIX}*"):
        owner = read_owner(directory)
        if owner is None or owner.where != place or started(owner.pid) != owner.started:
            continue
        path = directory / SOCKET_FILE
        with contextlib.suppress(OSError, psutil.Error):
            opened = path.lstat().st_mtime
            command = " ".join(psutil.Process(owner.pid).cmdline())
            found.append(FoundHost(owner.pid, opened, len(owner.kernels), command, path))
    return sorted(found, key=lambda host: -host.opened)


class Watching:
    """A connection to a host that is looked at: a context manager, and something for `select`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._unread = bytearray()
        self._over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._connection.close()

    def connect(self) -> Ended | None:
        """Connect; why not, if the host has ended meanwhile."""
        try:
            self._connection.settimeout(SILENCE_S)
            self._connection.connect(str(self._path))
        except OSError:
            return Ended("gone")
        return None

    def fileno(self) -> int:
        return self._connection.fileno()

    def read(self) -> list[Snapshot | Ended]:
        """What has come, oldest first; blocks if there is nothing. After an `Ended` nothing comes any more.

        Raises:
            TimeoutError: nothing came for 10 s: the process is stopped, or its loop blocked.
        """
        if self._over:
            return []
        try:
            received = self._connection.recv(MAX_LINE)
        except TimeoutError:
            raise
        except OSError:  # dropped
            received = b""
        self._unread += received
        *lines, rest = self._unread.split(b"\n")
        self._unread = rest
        said: list[Snapshot | Ended] = []
        try:
            said = [_decode(line) for line in lines]
        except msgspec.MsgspecError:
            received = b""  # a host of another version, or none
        if not received or len(rest) > MAX_LINE:
            said.append(Ended("gone"))
        self._over = any(isinstance(each, Ended) for each in said)
        return said
