"""The lean client of one kernel: three sockets, one comm, no threads. It carries messages and knows none of them.

It subscribes to its own comm only, so that it never sees (nor parses) what other clients cause.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import select
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec
import zmq

from bridge_kernel._version import __version__
from bridge_kernel.contract.errors import (
    BridgeError,
    InternalError,
    KernelDied,
    KernelStartFailed,
    LimitExceeded,
    exception_from,
)
from bridge_kernel.contract.frames import (
    HEADROOM,
    MAX_MESSAGE_BYTES,
    UNDECODABLE,
    FrameCodec,
    Header,
    MalformedFrames,
    comm_close,
    comm_content,
    comm_message,
    comm_open,
    receive,
    send,
)
from bridge_kernel.contract.messages import (
    COMM_TARGET,
    PROTOCOL_VERSION,
    Failure,
    Notification,
    Request,
    Success,
    decode_message,
    encode_failure,
    encode_notification,
    encode_request,
    encode_success,
)
from bridge_kernel.contract.methods import Attach, Attached, HostIdentity
from bridge_kernel.contract.telemetry import display_id

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bridge_kernel.contract.errors import ErrorObject
    from bridge_kernel.contract.frames import Buffer, Envelope

__all__ = ("ConnectionInfo", "KernelClient", "Listener", "Reply", "StreamText")

RECONNECT_MS: Final = 5
PUMP_MS: Final = 5
BURST: Final = 256  # messages read before the loop's other tasks get their turn

_decode_header = msgspec.json.Decoder(Header).decode
_decode_attached = msgspec.json.Decoder(Attached).decode


class ConnectionInfo(msgspec.Struct, frozen=True):
    """The part of a Jupyter connection file that a client needs."""

    shell_port: int
    iopub_port: int
    control_port: int
    ip: str
    key: str
    transport: str = "tcp"
    curve_publickey: str | None = None

    def url(self, port: int) -> str:
        return f"{self.transport}://{self.ip}{':' if self.transport == 'tcp' else '-'}{port}"

    def __repr__(self) -> str:
        return f"ConnectionInfo({self.transport}://{self.ip}, key=***)"


class Reply(NamedTuple):
    """A command's result, its values not yet decoded."""

    result: msgspec.Raw
    buffers: Sequence[Buffer]


class StreamText(msgspec.Struct, frozen=True):
    """What a command printed: the content of a Jupyter `stream` message."""

    name: str
    text: str


_decode_stream = msgspec.json.Decoder(StreamText).decode


class Listener(Protocol):
    """Who is told what a kernel sends by itself. Called on the loop; must not block."""

    def on_callback(self, client: KernelClient, request: Request, buffers: Sequence[Buffer]) -> None: ...
    def on_notification(self, client: KernelClient, message: Notification, buffers: Sequence[Buffer]) -> None: ...
    def on_output(self, client: KernelClient, command: int | None, output: StreamText) -> None: ...
    def on_display(self, client: KernelClient, content: bytes) -> None: ...


class KernelClient:
    """One host's connection to one kernel. Belongs to one event loop."""

    def __init__(
        self,
        info: ConnectionInfo,
        context: zmq.Context[zmq.Socket[bytes]],
        listener: Listener,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        """`on_lost` is called once, with the reason, if the kernel or its end of a connection goes away after
        the handshake: messages may have been lost that nobody can name. It is to close this client.
        """
        self._info = info
        self._listener = listener
        self._on_lost = on_lost
        self._watched = on_lost is not None
        self._loop = asyncio.get_running_loop()
        self._comm_id = uuid.uuid4().hex
        self._codec = FrameCodec(info.key.encode(), session=uuid.uuid4().hex, max_bytes=MAX_MESSAGE_BYTES)
        self._pending: dict[int, asyncio.Future[Reply]] = {}
        self._ids = itertools.count(1)
        self._welcome: asyncio.Future[None] = self._loop.create_future()
        self._closed: BridgeError | None = None
        self.dropped = 0
        self.heard = 0
        """Messages that arrived, of whatever kind: it grows as long as the kernel says anything."""
        self.attached: Attached | None = None
        self.sources: set[str] = set()
        """Hashes of the functions' sources that this kernel was sent."""
        self._shell = self._connect(context, zmq.DEALER, info.shell_port)
        self._control = self._connect(context, zmq.DEALER, info.control_port)
        self._iopub = self._connect(context, zmq.SUB, info.iopub_port)
        self._fd = int(self._iopub.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._readable)
        self._deaf = False
        self._wires = select.poll()
        self._monitors = [self._monitor(socket) for socket in (self._shell, self._control, self._iopub)]

    def _connect(self, context: zmq.Context[zmq.Socket[bytes]], kind: int, port: int) -> zmq.Socket[bytes]:
        socket = context.socket(kind)
        socket.linger = 1000
        socket.set_hwm(0)  # what is in flight is bounded by commands and credit, not by dropping
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        # The kernel may not have bound yet: zmq's own 100 ms between two tries would be most of a start.
        socket.reconnect_ivl, socket.reconnect_ivl_max = RECONNECT_MS, 100 * RECONNECT_MS
        if self._info.curve_publickey:
            public, secret = zmq.curve_keypair()
            socket.curve_publickey, socket.curve_secretkey = public, secret
            socket.curve_serverkey = self._info.curve_publickey.encode()
        if kind == zmq.SUB:
            socket.subscribe(f"comm-{self._comm_id}".encode())
        socket.connect(self._info.url(port))
        return socket

    def _monitor(self, socket: zmq.Socket[bytes]) -> tuple[zmq.Socket[bytes], int]:
        # An address of our own: pyzmq's default is made from a descriptor, which may come again too soon.
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED, f"inproc://monitor-{uuid.uuid4().hex}")
        monitor.linger = 0
        fd = int(monitor.getsockopt(zmq.FD))
        self._loop.add_reader(fd, self._on_monitor, monitor)
        self._wires.register(fd, select.POLLIN)
        self._on_monitor(monitor)  # ZMQ tells a reader of news only once it has found that there are none
        return monitor, fd

    def _on_monitor(self, monitor: zmq.Socket[bytes]) -> None:
        try:
            while not monitor.closed:
                monitor.recv_multipart(zmq.NOBLOCK)
                self._lost("was cut")
        except zmq.Again:
            return

    def _lost(self, reason: str) -> None:
        # Before the handshake is over nothing can have been lost, and ZMQ connects again by itself.
        on_lost = self._on_lost
        if on_lost is not None and self.attached is not None and self._closed is None:
            self._on_lost = None
            # ZMQ may have connected again, and what comes now has a gap before it: nothing more is believed.
            self._deaf = True
            self._loop.remove_reader(self._fd)
            on_lost(reason)

    def _check_wires(self) -> None:
        for monitor, _ in self._monitors:
            self._on_monitor(monitor)

    def display_id(self, command: int | str) -> str:
        """The id of the display in which the kernel shows that command's telemetry."""
        return display_id(self._comm_id, command)

    @property
    def closed(self) -> BridgeError | None:
        """Why the connection was closed: the very error that its commands failed with. None while it is open."""
        return self._closed

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    # -- the handshake -----------------------------------------------------------

    async def attach(self, session: str = "", *, timeout_s: float = 30.0) -> Attached:
        """Open the comm. `session` is where the kernel's cells run.

        Raises:
            KernelStartFailed: no answer within `timeout_s`.
            ProtocolMismatch: the kernel speaks another version.
        """
        try:
            async with asyncio.timeout(timeout_s):
                # Only once the kernel has welcomed our subscription can nothing be missed (JEP 65).
                await self._welcome
                identity = HostIdentity("bridge_host (Python)", __version__, os.getpid())
                params = Attach(protocol=PROTOCOL_VERSION, host=identity, session=session)
                id = next(self._ids)
                future = self._expect(id)
                self._send(
                    self._shell,
                    "comm_open",
                    id,
                    comm_open(self._comm_id, COMM_TARGET, encode_request(id, "bridge.attach", params)),
                )
                reply = await future
        except TimeoutError:
            raise KernelStartFailed(f"the kernel did not answer within {timeout_s:g} s") from None
        try:
            self.attached = _decode_attached(reply.result)
        except UNDECODABLE as exc:
            raise InternalError(f"the kernel's answer to bridge.attach does not fit the contract: {exc}") from exc
        return self.attached

    # -- sending -----------------------------------------------------------------

    def _send(
        self, socket: zmq.Socket[bytes], msg_type: str, id: int, content: bytes, buffers: Sequence[Buffer] = ()
    ) -> None:
        header = self._codec.header(msg_type, f"{self._codec.session}_{id}", datetime.now(UTC).isoformat())
        frames = self._codec.pack((), header, content, buffers=buffers)
        send(socket, frames, block=False)

    def _expect(self, id: int) -> asyncio.Future[Reply]:
        if self._closed is not None:
            raise self._closed
        future = self._pending[id] = self._loop.create_future()
        return future

    def request(
        self, method: str, params: msgspec.Struct, buffers: Sequence[Buffer] = ()
    ) -> tuple[int, asyncio.Future[Reply]]:
        """Send a command: its id and the future of its reply, which fails with the error that the kernel answers.

        Raises:
            BridgeError: the connection is closed, for the reason it gives.
            LimitExceeded: the message is larger than the kernel takes.
        """
        id = next(self._ids)
        content = comm_message(self._comm_id, encode_request(id, method, params))
        self._check_size(method, content, buffers)
        future = self._expect(id)
        self._send(self._shell, "comm_msg", id, content, buffers)
        return id, future

    def _check_size(self, what: str, content: bytes, buffers: Sequence[Buffer]) -> None:
        limit = self.attached.limits.max_message_bytes if self.attached is not None else MAX_MESSAGE_BYTES
        if (size := len(content) + sum(map(len, buffers))) > limit - HEADROOM:
            raise LimitExceeded(
                f"{what} takes {size} bytes, and its kernel takes {limit}",
                remedy="Send less at once, or start kernels with a larger --Policy.max_message_bytes.",
            )

    def forget(self, id: int) -> None:
        """Nobody waits for this reply any more; when it comes it is dropped."""
        self._pending.pop(id, None)

    def notify(self, method: str, params: msgspec.Struct, *, control: bool = False) -> None:
        """Send a notification, past everything that waits on shell if `control`. Does nothing once closed."""
        if self._closed is None:
            content = comm_message(self._comm_id, encode_notification(method, params))
            self._send(self._control if control else self._shell, "comm_msg", next(self._ids), content)

    def answer(self, id: int | str, result: msgspec.Struct | msgspec.Raw, buffers: Sequence[Buffer] = ()) -> None:
        """Answer a callback. Does nothing once closed: the kernel that asked is gone.

        Raises:
            LimitExceeded: the answer is larger than the kernel takes.
        """
        if self._closed is None:
            content = comm_message(self._comm_id, encode_success(id, result))
            self._check_size("the answer", content, buffers)
            self._send(self._shell, "comm_msg", next(self._ids), content, buffers)

    def refuse(self, id: int | str, error: ErrorObject) -> None:
        """Answer a callback with an error."""
        if self._closed is None:
            content = comm_message(self._comm_id, encode_failure(id, error))
            self._send(self._shell, "comm_msg", next(self._ids), content)

    def shut_down(self) -> None:
        """Ask the kernel process to end."""
        if self._closed is None:
            self._send(self._control, "shutdown_request", next(self._ids), b'{"restart":false}')

    def pump(self, wait_ms: int = PUMP_MS) -> None:
        """Read what has arrived, waiting a moment if there is nothing: only from the loop's own thread."""
        if self._closed is None and self._iopub.poll(wait_ms):
            self._readable()

    # -- receiving ---------------------------------------------------------------

    def _readable(self) -> None:
        # ZMQ's descriptor is edge-triggered: read until there is nothing, or come back by ourselves.
        for _ in range(BURST):
            if self._closed is not None or self._deaf:
                return
            try:
                frames = receive(self._iopub)
            except zmq.Again:
                return
            if self._wires.poll(0):  # the loop may come to it only after this message
                self._check_wires()
                if self._deaf:
                    return
            self.heard += 1
            try:
                self._on_frames(frames)
            except (MalformedFrames, BridgeError, *UNDECODABLE):
                self.dropped += 1
            except BaseException:
                self._loop.call_soon(self._readable)  # the descriptor will not say again what is left to read
                raise
        self._loop.call_soon(self._readable)

    def _on_frames(self, frames: Sequence[Buffer]) -> None:
        envelope = self._codec.unpack(frames)
        kind = envelope.header.msg_type
        if kind == "comm_msg":
            self._on_comm(envelope)
        elif kind == "stream":
            self._listener.on_output(self, self._command_of(envelope), _decode_stream(envelope.content))
        elif kind in ("display_data", "update_display_data"):
            # What it says is looked at when there is time, or when somebody asks: not between a command and its reply.
            self._listener.on_display(self, envelope.content)
        elif kind == "iopub_welcome":
            if not self._welcome.done():
                self._welcome.set_result(None)
        elif kind == "comm_close":
            if self._watched and self.attached is not None:
                self._lost("was closed by the kernel")
            else:
                self.close(KernelDied("the kernel closed the connection"))

    def _command_of(self, envelope: Envelope) -> int | None:
        """The id of the command whose message is this one's parent: our msg_ids end in it."""
        session, _, id = _decode_header(envelope.parent).msg_id.rpartition("_")
        return int(id) if session == self._codec.session and id.isascii() and id.isdigit() and len(id) < 20 else None

    def _on_comm(self, envelope: Envelope) -> None:
        comm = comm_content(envelope.content)
        if comm.comm_id != self._comm_id:
            self.dropped += 1
            return
        message = decode_message(comm.data)
        if isinstance(message, Request):
            self._listener.on_callback(self, message, envelope.buffers)
        elif isinstance(message, Notification):
            self._listener.on_notification(self, message, envelope.buffers)
        else:
            future = self._pending.pop(message.id, None) if isinstance(message.id, int) else None
            if future is None or future.done():
                self.dropped += 1  # late: whoever waited has gone
            elif isinstance(message, Success):
                future.set_result(Reply(message.result, envelope.buffers))
            else:
                assert isinstance(message, Failure)
                future.set_exception(exception_from(message.error))

    # -- the end -----------------------------------------------------------------

    def close(self, reason: BridgeError, *, polite: bool = False) -> None:
        """Close the sockets; every command in flight fails with `reason`. `polite` tells the kernel."""
        if self._closed is not None:
            return
        if polite:
            self._send(self._shell, "comm_close", next(self._ids), comm_close(self._comm_id))
        self._closed = reason
        self._loop.remove_reader(self._fd)
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(reason)
                future.exception()  # seen: a command that nobody awaits any more is no error of ours
        if not self._welcome.done():
            self._welcome.cancel()
        for socket, (monitor, fd) in zip((self._shell, self._control, self._iopub), self._monitors, strict=True):
            self._loop.remove_reader(fd)
            # In this order: ZMQ's own thread, telling a monitor whose other end is closed, would wait for ever.
            socket.disable_monitor()
            monitor.close()
            socket.close(linger=1000 if polite else 0)

    @staticmethod
    def read_connection_file(content: bytes) -> ConnectionInfo:
        """Parse a Jupyter connection file.

        Raises:
            KernelStartFailed: it is not one, or names no key.
        """
        try:
            info = msgspec.json.decode(content, type=ConnectionInfo)
        except msgspec.MsgspecError as exc:
            raise KernelStartFailed(f"not a Jupyter connection file: {exc}") from exc
        if not info.key:
            raise KernelStartFailed("the connection file has no key: Bridge takes signed messages only")
        return info
