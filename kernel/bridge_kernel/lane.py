"""The lane: one I/O thread that owns the shell and control sockets and serves `bridge.v1` without ipykernel.

It never runs a command's code and never waits, so callbacks' replies, further commands, cancel and interrupt
are all served while commands run. What is not Bridge's goes on to the cells (`kernel.BridgeKernel`) as it came.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec
import zmq

from .connection import Connection
from .contract.errors import BridgeError, Cancelled, InvalidRequest, Overloaded, ProtocolMismatch, error_object
from .contract.frames import UNDECODABLE, MalformedFrames, comm_close, comm_content, receive, send
from .contract.messages import COMM_TARGET, PROTOCOL_VERSION, Request, decode_message
from .contract.methods import COMMANDS
from .dispatch import Dispatcher, params_of
from .info import kernel_info
from .telemetry import together

if TYPE_CHECKING:
    from collections.abc import Callable

    from .command import RunningCommand
    from .contract.frames import Envelope
    from .contract.methods import Attach
    from .lifetime import Parent
    from .output import Output
    from .runtime import Runtime
    from .sockets import Iopub, Publisher, Sockets

__all__ = ("Lane",)

TICK_S: Final = 0.1  # how often running commands' output and telemetry are shown
QUIET_S: Final = 0.003  # nothing came for this long after a command: time for its telemetry
LIVELY_S: Final = 0.03
BURST: Final = 64  # messages read, or displays published, before anything else gets its turn
MAX_UNPUBLISHED: Final = 32
COMMS: Final = ("comm_open", "comm_msg", "comm_close")

_encode = msgspec.json.Encoder().encode


class _Shutdown(msgspec.Struct, frozen=True):
    restart: bool = False


class _CommInfo(msgspec.Struct, frozen=True):
    target_name: str | None = None


_decode_shutdown = msgspec.json.Decoder(_Shutdown).decode
_decode_comm_info = msgspec.json.Decoder(_CommInfo).decode
log = logging.getLogger(__name__)


class Lane:
    """Everything here runs on the one thread that calls `run`, `interrupt_cells` and `want_cells` excepted."""

    def __init__(
        self,
        runtime: Runtime,
        sockets: Sockets,
        parent: Parent | None,
        *,
        cells_shell: zmq.Socket[bytes],
        cells_control: zmq.Socket[bytes],
        want_cells: Callable[[], None],
        interrupt_cells: Callable[[], None],
        on_shutdown: Callable[[], None],
        on_parent_death: Callable[[], None],
    ) -> None:
        """`cells_*` are inproc PAIRs to the cells; `want_cells` wakes the main thread, which serves them."""
        self._runtime = runtime
        self._sockets = sockets
        self._parent = parent
        self._cells_shell = cells_shell
        self._cells_control = cells_control
        self._want_cells = want_cells
        self._interrupt_cells = interrupt_cells
        self._on_shutdown = on_shutdown
        self._on_parent_death = on_parent_death
        self._dispatcher = Dispatcher(runtime)
        self._connections: dict[str, Connection] = {}
        self._cells_started = False
        self._stopping = False
        self.cell_output: Output | None = None
        """Where the cell that runs prints: set by the cells, shown at each tick."""

    @property
    def connections(self) -> list[Connection]:
        """The attached hosts, the latest last. Any thread."""
        return list(self._connections.values())

    @property
    def outlets(self) -> tuple[Publisher, Iopub]:
        """What a cell publishes with. Any thread."""
        return self._sockets.publisher, self._sockets.iopub

    # -- the loop ----------------------------------------------------------------

    def run(self) -> None:
        """Serve until a shutdown is asked for; when the parent is gone, `on_parent_death` is called on another thread."""
        poller = zmq.Poller()
        sockets = self._sockets
        incoming = [
            # Control first: cancel and interrupt pass what waits on shell.
            (sockets.control, self._on_control),
            (sockets.shell, self._on_shell),
        ]
        outgoing = [(self._cells_shell, sockets.shell), (self._cells_control, sockets.control)]
        for socket, _ in (*incoming, *outgoing):
            poller.register(socket, zmq.POLLIN)
        iopub_fd = sockets.iopub.fd
        poller.register(iopub_fd, zmq.POLLIN)
        if self._parent is not None and self._parent.fd is not None:
            self._parent.poll_in_thread(self._on_parent_death)
        next_tick = 0.0
        while not self._stopping:
            now = time.monotonic()
            lively = now < self._dispatcher.last_command + LIVELY_S or self._runtime.unpublished
            pause = min(self._dispatcher.until_deadline(now), QUIET_S if lively else TICK_S)
            events = dict(poller.poll(math.ceil(pause * 1000)))
            for socket, handle in incoming:
                if socket in events:
                    self._drain(socket, handle)
            for source, target in outgoing:
                if source in events:
                    with contextlib.suppress(zmq.Again):
                        while True:
                            send(target, source.recv_multipart(zmq.NOBLOCK))
            if iopub_fd in events:
                self._check_subscriptions()
            now = time.monotonic()
            self._dispatcher.expire(now)
            if not events or len(self._runtime.unpublished) > MAX_UNPUBLISHED:
                self._publish_telemetry()
            if now >= next_tick:
                next_tick = now + TICK_S
                self._check_subscriptions()
                self._tick()

    def _publish_telemetry(self) -> None:
        unpublished = self._runtime.unpublished
        by_connection: dict[Connection, list[RunningCommand]] = {}
        for _ in range(min(len(unpublished), BURST)):
            command = unpublished.popleft()
            by_connection.setdefault(command.connection, []).append(command)
        for connection, commands in by_connection.items():
            self._guarded(partial(self._publish_together, connection, commands))

    def _publish_together(self, connection: Connection, commands: list[RunningCommand]) -> None:
        """The telemetry of commands that came in quick succession: one display for those that have none yet."""
        if len(commands) > 1:
            content = together([command.recorder for command in commands], connection.comm_id)
            if content is not None:
                connection.publish_as("display_data", content, commands[-1].parent)
        for command in commands:
            command.recorder.publish()  # of what was shown before: the end, in its own display

    def _tick(self) -> None:
        self._publish_telemetry()
        self._runtime.executor.stop_stuck()
        for command in self._runtime.active:
            self._guarded(command.refresh)
        if (output := self.cell_output) is not None:
            self._guarded(output.flush)

    def _guarded(self, action: Callable[[], None]) -> None:
        """A mistake in showing something costs what was to be shown, not the thread that everything depends on."""
        try:
            action()
        except Exception:
            self._runtime.dropped["failed"] += 1
            log.exception("something could not be shown")

    def _drain(self, socket: zmq.Socket[bytes], handle: Callable[[Envelope], None]) -> None:
        # At most so many at a time: a flood on one socket must not keep the other, or deadlines, waiting.
        for _ in range(BURST):
            try:
                frames = receive(socket)
            except zmq.Again:
                return
            try:
                envelope = self._sockets.codec.unpack(frames)
                if envelope.header.session == self._sockets.codec.session:
                    raise MalformedFrames("one of our own messages came back")
                handle(envelope)
            except MalformedFrames as exc:
                self._runtime.drop("malformed", str(exc))
            except Exception:
                # A mistake of ours: it costs this message, not the thread that everything depends on.
                self._runtime.dropped["failed"] += 1
                log.exception("a message could not be served")

    # -- Jupyter messages --------------------------------------------------------

    def _on_shell(self, envelope: Envelope) -> None:
        kind = envelope.header.msg_type
        if kind in COMMS and self._on_comm(envelope):
            return
        if kind == "kernel_info_request":
            self._answer(self._sockets.shell, envelope, "kernel_info_reply", kernel_info())
        elif kind == "comm_info_request" and not self._cells_started:
            content = _encode({"status": "ok", "comms": self._comms_asked_for(envelope)})
            self._answer(self._sockets.shell, envelope, "comm_info_reply", content)
        elif kind == "shutdown_request":
            self._shut_down(self._sockets.shell, envelope)
        elif kind == "comm_msg" and not self._cells_started:
            self._runtime.drop("unknown", "a comm_msg of a comm that is not open")
        else:
            self._to_cells(self._cells_shell, envelope)

    def _on_control(self, envelope: Envelope) -> None:
        kind = envelope.header.msg_type
        if kind in COMMS and self._on_comm(envelope):
            return
        if kind == "kernel_info_request":
            self._answer(self._sockets.control, envelope, "kernel_info_reply", kernel_info())
        elif kind == "shutdown_request":
            self._shut_down(self._sockets.control, envelope)
        elif kind == "interrupt_request":
            self.interrupt()
            self._answer(self._sockets.control, envelope, "interrupt_reply", b'{"status":"ok"}')
        elif kind in COMMS:
            self._runtime.drop("unknown", f"a {kind} on control for no comm of ours")
        else:
            self._to_cells(self._cells_control, envelope)

    def _answer(self, socket: zmq.Socket[bytes], envelope: Envelope, msg_type: str, content: bytes) -> None:
        self.status("busy", envelope.raw_header)
        frames = self._sockets.publisher.frames(envelope.identities, msg_type, content, parent=envelope.raw_header)
        send(socket, frames)
        self.status("idle", envelope.raw_header)

    def status(self, state: str, parent: bytes = b"{}") -> None:
        """Publish the kernel's execution state."""
        content = b'{"execution_state":"%b"}' % state.encode()
        self._sockets.iopub.send(self._sockets.publisher.frames([b"status"], "status", content, parent=parent))

    def _to_cells(self, pair: zmq.Socket[bytes], envelope: Envelope) -> None:
        if not self._cells_started:
            self._cells_started = True
            self._want_cells()
        # Signed anew with our own key: ipykernel's Session verifies it once more, with a replay memory of its own.
        codec = self._sockets.codec
        send(
            pair,
            codec.pack(
                envelope.identities,
                envelope.raw_header,
                envelope.content,
                parent=envelope.parent,
                metadata=envelope.metadata,
                buffers=envelope.buffers,
            ),
        )

    def _shut_down(self, socket: zmq.Socket[bytes], envelope: Envelope) -> None:
        try:
            restart = _decode_shutdown(envelope.content).restart
        except UNDECODABLE as exc:
            raise MalformedFrames(f"shutdown_request: {exc}") from exc
        for connection in self.connections:
            connection.close("the kernel is shutting down")
        while self._runtime.unpublished:
            self._publish_telemetry()
        self._answer(socket, envelope, "shutdown_reply", _encode({"status": "ok", "restart": restart}))
        self._stopping = True
        self._on_shutdown()

    def interrupt(self) -> None:
        """Stop whatever runs: commands and the cell."""
        for command in self._runtime.active:
            command.stop(Cancelled("the kernel was interrupted"))
        self._interrupt_cells()

    def comms(self) -> dict[str, dict[str, str]]:
        """The open comms of ours, as `comm_info_reply` lists them."""
        return {comm_id: {"target_name": COMM_TARGET} for comm_id in list(self._connections)}

    def _comms_asked_for(self, envelope: Envelope) -> dict[str, dict[str, str]]:
        try:
            target = _decode_comm_info(envelope.content).target_name
        except UNDECODABLE as exc:
            raise MalformedFrames(f"comm_info_request: {exc}") from exc
        return self.comms() if not target or target == COMM_TARGET else {}

    # -- comms -------------------------------------------------------------------

    def _on_comm(self, envelope: Envelope) -> bool:
        """Serve a comm message if it is ours; False leaves it to the cells."""
        message = comm_content(envelope.content)
        connection = self._connections.get(message.comm_id)
        kind = envelope.header.msg_type
        if connection is None:
            if kind == "comm_open" and message.target_name.startswith("bridge."):
                self._attach(envelope, message.comm_id, message.target_name, message.data)
                return True
            return False
        if kind == "comm_close":
            self._detach(connection, "the host closed its comm")
        elif kind == "comm_open":
            self._runtime.drop("unknown", "a comm that is open already")
        else:
            self._dispatcher.take(connection, envelope, message.data)
        return True

    def _attach(self, envelope: Envelope, comm_id: str, target: str, data: msgspec.Raw) -> None:
        if not 1 <= len(comm_id) <= 128 or not comm_id.isascii() or not comm_id.isprintable():
            self._runtime.drop("malformed", "comm_id")
            return
        connection = Connection(comm_id, self._sockets.iopub, self._sockets.publisher)
        id: int | str | None = None
        try:
            request = decode_message(data)
            if not isinstance(request, Request) or request.method != "bridge.attach":
                raise InvalidRequest("the data of comm_open must be a bridge.attach request")
            id = request.id
            params: Attach = params_of(COMMANDS["bridge.attach"], request.params)
            if target != COMM_TARGET or params.protocol[0] != PROTOCOL_VERSION[0]:
                ours, theirs = (".".join(map(str, version)) for version in (PROTOCOL_VERSION, params.protocol))
                raise ProtocolMismatch(
                    f"the host speaks protocol {theirs} ({target}), this kernel {ours} ({COMM_TARGET})"
                )
            if len(self._connections) >= self._runtime.policy.max_connections:
                raise Overloaded(f"{len(self._connections)} hosts are attached, as many as this kernel takes")
        except BridgeError as exc:
            connection.publish(connection.failure(id, error_object(exc)), parent=envelope.raw_header)
            frames = self._sockets.publisher.frames([connection.topic], "comm_close", comm_close(comm_id))
            self._sockets.iopub.send(frames)
            return
        connection.session = params.session
        self._connections[comm_id] = connection
        self._runtime.connections = len(self._connections)
        connection.publish(connection.success(request.id, self._runtime.describe()), parent=envelope.raw_header)

    def _detach(self, connection: Connection, why: str) -> None:
        self._connections.pop(connection.comm_id, None)
        self._runtime.connections = len(self._connections)
        connection.close(why)

    def _check_subscriptions(self) -> None:
        for topic in self._sockets.iopub.subscriptions():
            self._unsubscribed(topic)

    def _unsubscribed(self, topic: bytes) -> None:
        """Nobody listens to a comm any more: its host died or was cut off."""
        connection = self._connections.get(topic.removeprefix(b"comm-").decode(errors="replace"))
        if connection is not None and connection.topic == topic:
            self._detach(connection, "the host stopped listening")
