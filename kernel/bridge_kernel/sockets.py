"""The kernel's five Jupyter sockets: bound once from the connection file, and what makes iopub safe to share."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import threading
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import zmq

from .contract.frames import COPY_LIMIT, FrameCodec, send
from .stops import shielded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .contract.frames import Buffer

__all__ = ("ConnectionInfo", "Iopub", "Publisher", "Sockets", "bind")

_encode = msgspec.json.Encoder().encode
_EVENTS, _POLLIN, _NOBLOCK = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.NOBLOCK)  # as ints: see `contract.frames`


class ConnectionInfo(msgspec.Struct, frozen=True):
    """A Jupyter connection file: https://jupyter-client.readthedocs.io/en/stable/kernels.html#connection-files."""

    shell_port: int
    iopub_port: int
    stdin_port: int
    control_port: int
    hb_port: int
    ip: str = "127.0.0.1"
    key: str = ""
    transport: str = "tcp"
    signature_scheme: str = "hmac-sha256"
    curve_publickey: str | None = None
    curve_secretkey: str | None = None

    @classmethod
    def read(cls, path: str) -> ConnectionInfo:
        """Read a connection file.

        Raises:
            ValueError: it is not one, names no key, or a signature scheme other than hmac-sha256.
            OSError: it cannot be read.
        """
        with open(path, "rb") as file:
            try:
                info = msgspec.json.decode(file.read(), type=cls)
            except msgspec.MsgspecError as exc:
                raise ValueError(f"{path} is not a Jupyter connection file: {exc}") from exc
        if not info.key:
            raise ValueError(f"{path} has no key: Bridge takes signed messages only")
        if info.signature_scheme != "hmac-sha256":
            raise ValueError(f"{path} asks for {info.signature_scheme}: Bridge signs with hmac-sha256")
        return info

    def url(self, port: int) -> str:
        separator = ":" if self.transport == "tcp" else "-"
        return f"{self.transport}://{self.ip}{separator}{port}"


class Iopub:
    """The XPUB socket, written from any thread, each message whole: no thread of its own, so no hop, and no waiting.

    Who finds the socket taken leaves the message to whoever has it, who sends it before letting go. Waiting could be
    for ever: garbage collection may run within a send, and a finalizer that prints sends on the very same thread, or
    wants what another thread holds that wants to send.

    Nothing is ever dropped for a slow subscriber (no high-water mark); what one command can publish is
    bounded instead: streams by credit, output and telemetry by the policy.
    """

    def __init__(self, socket: zmq.Socket[bytes], publisher: Publisher) -> None:
        self._socket = socket
        self._publisher = publisher
        self._lock = threading.Lock()  # only ever tried, but by `close`
        self._waiting: deque[list[Buffer]] = deque()
        self._asked = False  # for the subscriptions, by a thread that may have found the socket taken
        self._gone: deque[bytes] = deque()

    @property
    def fd(self) -> int:
        return int(self._socket.getsockopt(zmq.FD))

    def send(self, frames: Sequence[Buffer]) -> None:
        """Send after all that was given before; large frames may be read later, small ones are the caller's again."""
        message = list(frames)
        with shielded():
            self._waiting.append(message)
            if not self._serve():
                for index, frame in enumerate(message):
                    if type(frame) is not bytes and len(frame) < COPY_LIMIT:
                        message[index] = bytes(frame)

    def subscriptions(self) -> list[bytes]:
        """Welcome new subscribers; return the topics that nobody subscribes to any more."""
        self._asked = True
        self._serve()
        return [self._gone.popleft() for _ in range(len(self._gone))]

    def _serve(self) -> bool:
        """Send what waits and see who came; False if another call does so, on this thread or another."""
        while self._lock.acquire(blocking=False):
            try:
                while self._waiting:
                    send(self._socket, self._waiting.popleft())
                self._asked = False
                # The descriptor is edge-triggered: a subscription that came during a send would not wake the poller.
                if int(self._socket.getsockopt(_EVENTS)) & _POLLIN:
                    self._drain()
            finally:
                self._lock.release()
            if not (self._waiting or self._asked):  # only now: what came before the release found the socket taken
                return True
        return False

    def _drain(self) -> None:
        while True:
            try:
                event = self._socket.recv(_NOBLOCK)
            except zmq.Again:
                return
            topic = event[1:]
            if event[:1] == b"\x01":
                # JEP 65: the subscriber learns that from now on it misses nothing.
                content = _encode({"subscription": topic.decode(errors="replace")})
                self._socket.send_multipart(self._publisher.frames([topic], "iopub_welcome", content))
            elif event[:1] == b"\x00":
                self._gone.append(topic)

    def close(self) -> None:
        with self._lock:
            self._socket.close(linger=500)


class Publisher:
    """Makes messages: ids, dates and signatures. Thread-safe."""

    def __init__(self, codec: FrameCodec) -> None:
        self._codec = codec
        self._ids = itertools.count()

    def frames(
        self,
        identities: Sequence[bytes],
        msg_type: str,
        content: bytes,
        *,
        parent: bytes = b"{}",
        buffers: Sequence[Buffer] = (),
    ) -> list[Buffer]:
        date = datetime.now(UTC).isoformat()
        header = self._codec.header(msg_type, f"{self._codec.session}_{next(self._ids)}", date)
        return self._codec.pack(identities, header, content, parent=parent, buffers=buffers)


class Sockets(NamedTuple):
    """All bound; `shell` and `control` belong to the lane's thread, `stdin` to the main thread's cells."""

    context: zmq.Context[zmq.Socket[bytes]]
    shell: zmq.Socket[bytes]
    control: zmq.Socket[bytes]
    stdin: zmq.Socket[bytes]
    heartbeat: zmq.Socket[bytes]
    iopub: Iopub
    publisher: Publisher
    codec: FrameCodec


def bind(info: ConnectionInfo, *, session: str, max_message_bytes: int) -> Sockets:
    """Bind all five sockets.

    Raises:
        zmq.ZMQError: an address is taken or not ours.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    codec = FrameCodec(info.key.encode(), session=session, max_bytes=max_message_bytes)
    publisher = Publisher(codec)

    def make(kind: int, port: int, configure: Callable[[zmq.Socket[bytes]], None]) -> zmq.Socket[bytes]:
        socket = context.socket(kind)
        socket.linger = 500
        socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
        configure(socket)
        if info.curve_secretkey and info.curve_publickey:
            socket.curve_secretkey = info.curve_secretkey.encode()
            socket.curve_publickey = info.curve_publickey.encode()
            socket.curve_server = True
        socket.bind(info.url(port))
        if info.transport == "ipc":
            with contextlib.suppress(FileNotFoundError):  # an abstract socket has no file
                os.chmod(f"{info.ip}-{port}", stat.S_IRUSR | stat.S_IWUSR)
        return socket

    def router(socket: zmq.Socket[bytes]) -> None:
        socket.router_handover = True  # a client that reconnects takes its identity back

    def publishing(socket: zmq.Socket[bytes]) -> None:
        socket.sndhwm = 0
        socket.setsockopt(zmq.XPUB_VERBOSE, 1)  # each subscriber is welcomed, not only a topic's first

    return Sockets(
        context,
        make(zmq.ROUTER, info.shell_port, router),
        make(zmq.ROUTER, info.control_port, router),
        make(zmq.ROUTER, info.stdin_port, router),
        make(zmq.ROUTER, info.hb_port, router),
        Iopub(make(zmq.XPUB, info.iopub_port, publishing), publisher),
        publisher,
        codec,
    )
