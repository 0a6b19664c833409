"""A raw client for tests: a real kernel process, and Jupyter's sockets with nothing of the host around them.

It can say what the host never says: broken, unsigned, replayed and out of order. It waits for conditions, never
for time, and on one thread: callbacks are answered while it waits for something else.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import zmq

from bridge_kernel.contract.errors import BridgeError, ErrorObject, error_object
from bridge_kernel.contract.frames import FrameCodec, comm_close, comm_content, comm_message, comm_open, receive
from bridge_kernel.contract.messages import (
    COMM_TARGET,
    Failure,
    Message,
    Notification,
    Request,
    Success,
    decode_message,
    encode_failure,
    encode_notification,
    encode_request,
    encode_success,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType

    import msgspec

    from bridge_kernel.contract.frames import Buffer

__all__ = ("Kernel", "Received", "Reply", "Wire", "kernel_command", "loads", "source", "write_connection_file")

TIMEOUT_S: Final = 60.0  # how long any one condition may take, on a machine that does other things too
PORTS: Final = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
DATE: Final = "2026-01-01T00:00:00Z"


class Received(NamedTuple):
    """One message from the kernel: `topic` is iopub's, or the name of the channel; `parent` is a msg_id or ""."""

    topic: str
    kind: str
    parent: str
    content: dict[str, Any]
    message: Message | None
    buffers: Sequence[Buffer]
    raw: bytes

    @property
    def method(self) -> str:
        """The method of a JSON-RPC request or notification, or an empty string."""
        return self.message.method if isinstance(self.message, Request | Notification) else ""

    @property
    def params(self) -> dict[str, Any]:
        assert isinstance(self.message, Request | Notification), self
        decoded: dict[str, Any] = loads(self.message.params)
        return decoded


class Reply(NamedTuple):
    """The answer to a command: one of `result` and `error`."""

    result: Any
    error: ErrorObject | None
    buffers: Sequence[Buffer]

    @property
    def value(self) -> Any:
        """What a function returned; fails if it was an error."""
        assert self.error is None, self.error
        return self.result["value"]

    @property
    def code(self) -> int:
        """The error's code; fails if there was no error."""
        assert self.error is not None, self.result
        return self.error.code

    @property
    def text(self) -> str:
        """The error's message; fails if there was no error."""
        assert self.error is not None, self.result
        return self.error.message


def loads(data: msgspec.Raw | bytes) -> Any:
    return json.loads(bytes(data))


def source(text: str) -> dict[str, Any]:
    """A function as a host ships it: the last `def` of `text` is what is called."""
    text = textwrap.dedent(text).strip() + "\n"
    functions = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return {"kind": "source", "name": functions[-1].name, "hash": sha256, "source": text}


def write_connection_file(directory: Path, transport: str = "ipc") -> Path:
    """A connection file with a fresh key. IPC by default: no ports to collide."""
    info: dict[str, Any] = {"key": uuid.uuid4().hex, "signature_scheme": "hmac-sha256", "transport": transport}
    if transport == "ipc":
        info |= {"ip": str(directory / "k"), **{name: i for i, name in enumerate(PORTS, 1)}}
    else:
        with contextlib.ExitStack() as held:  # all at once, so that they differ
            info["ip"] = "127.0.0.1"
            for name in PORTS:
                bound = held.enter_context(socket.socket())
                bound.bind(("127.0.0.1", 0))
                info[name] = bound.getsockname()[1]
    path = directory / "kernel.json"
    path.write_text(json.dumps(info))
    path.chmod(0o600)
    return path


def kernel_command(connection_file: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "bridge_kernel", "-f", str(connection_file), *arguments]


class Kernel:
    """A kernel process in a process group of its own, killed with all of it at the end; a context manager."""

    def __init__(self, directory: Path, *arguments: str, transport: str = "ipc") -> None:
        self.connection_file = write_connection_file(directory, transport)
        self._log_path = directory / "kernel.log"
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                kernel_command(self.connection_file, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "JPY_PARENT_PID": str(os.getpid())},
            )
        self._wires: list[Wire] = []

    @property
    def log(self) -> str:
        """What the process wrote to its own stdout and stderr."""
        return self._log_path.read_text(errors="replace")

    def connect(self, *, attach: bool = True, welcome: bool = True, topic: str | None = None) -> Wire:
        """A new client; welcomed and attached, unless a test wants it otherwise. It is closed with the kernel."""
        wire = Wire(self.connection_file, topic=topic, log=lambda: self.log[-2000:])
        self._wires.append(wire)
        if welcome:
            wire.expect(lambda m: m.kind == "iopub_welcome", "the kernel's welcome")
        if attach:
            wire.attach()
        return wire

    def close(self) -> None:
        for wire in self._wires:
            wire.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Wire:
    """A client of one kernel: a DEALER for shell, one for control, a SUB for iopub, a REQ for the heartbeat."""

    def __init__(
        self,
        connection_file: Path,
        *,
        topic: str | None = None,
        log: Callable[[], str] = lambda: "",
    ) -> None:
        """`topic` is what it subscribes to: its own comm's, unless a test says otherwise."""
        self.info: dict[str, Any] = json.loads(connection_file.read_text())
        self.comm_id = uuid.uuid4().hex
        self.codec = FrameCodec(self.info["key"].encode(), session=uuid.uuid4().hex)
        self.answers: dict[str, Callable[[dict[str, Any]], Any]] = {}
        """Scripted answers, by method or by `tool.call/NAME`: params to result; a BridgeError is answered as such.
        A callback without one waits until the test takes it with `callback`."""
        self.received: list[Received] = []
        """Everything that ever came, in order."""
        self.msg_ids: dict[int | str, str] = {}
        """The msg_id under which each command was sent: the parent of all that is published about it."""
        self._log = log
        self._unread: list[Received] = []
        self._ids = itertools.count(1)
        self._messages = itertools.count(1)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        self.shell = self.socket(zmq.DEALER, "shell_port")
        self.control = self.socket(zmq.DEALER, "control_port")
        self._iopub = self.socket(zmq.SUB, "iopub_port")
        self._iopub.subscribe(topic if topic is not None else f"comm-{self.comm_id}")
        self._heart = self.socket(zmq.REQ, "hb_port")
        self._poller = zmq.Poller()
        for channel in (self._iopub, self.shell, self.control):
            self._poller.register(channel, zmq.POLLIN)

    def socket(self, kind: int, port: str) -> zmq.Socket[bytes]:
        """One more socket to the kernel; closed with this client."""
        separator = ":" if self.info["transport"] == "tcp" else "-"
        made = self._context.socket(kind)
        self._sockets.append(made)
        made.linger = 0
        made.set_hwm(0)
        made.connect(f"{self.info['transport']}://{self.info['ip']}{separator}{self.info[port]}")
        return made

    def close(self) -> None:
        """Close the sockets without a word, as a host that is killed does."""
        for made in self._sockets:
            made.close(linger=0)
        self._context.term()

    # -- sending -----------------------------------------------------------------

    def pack(self, kind: str, content: bytes, buffers: Sequence[Buffer] = (), *, msg_id: str = "") -> list[Buffer]:
        msg_id = msg_id or f"{self.codec.session}_{next(self._messages)}"
        return self.codec.pack((), self.codec.header(kind, msg_id, DATE), content, buffers=buffers)

    def send_frames(self, frames: Sequence[Buffer], *, channel: str = "shell") -> None:
        (self.control if channel == "control" else self.shell).send_multipart(frames)

    def send(self, kind: str, content: bytes, buffers: Sequence[Buffer] = (), *, channel: str = "shell") -> str:
        """Send any Jupyter message; its msg_id."""
        msg_id = f"{self.codec.session}_{next(self._messages)}"
        self.send_frames(self.pack(kind, content, buffers, msg_id=msg_id), channel=channel)
        return msg_id

    def send_data(self, data: msgspec.Raw, buffers: Sequence[Buffer] = (), *, channel: str = "shell") -> str:
        """Send one JSON-RPC message, or anything in its place, in a comm_msg."""
        return self.send("comm_msg", comm_message(self.comm_id, data), buffers, channel=channel)

    def start(
        self,
        method: str,
        params: dict[str, Any] | None = None,
        buffers: Sequence[Buffer] = (),
        *,
        id: int | str | None = None,
        channel: str = "shell",
    ) -> int | str:
        """Send a request and do not wait; its id."""
        id = next(self._ids) if id is None else id
        self.msg_ids[id] = self.send_data(encode_request(id, method, params or {}), buffers, channel=channel)
        return id

    def notify(self, method: str, params: dict[str, Any], *, channel: str = "control") -> None:
        self.send_data(encode_notification(method, params), channel=channel)

    def cancel(self, command: int | str) -> None:
        self.notify("command.cancel", {"command": command})

    def call(self, function: str | dict[str, Any], *args: Any, method: str = "function.call", **more: Any) -> int | str:
        """Start a function: a dotted path, the source of one, or what `source` made. `more` is further params."""
        if isinstance(function, str):
            is_path = all(part.isidentifier() for part in function.split("."))
            function = {"kind": "path", "path": function} if is_path else source(function)
        return self.start(method, {"function": function, "args": args, **more})

    def stream(self, function: str | dict[str, Any], *args: Any, credit: int, **more: Any) -> int | str:
        return self.call(function, *args, method="function.stream", credit=credit, **more)

    def open(self, data: msgspec.Raw, *, target: str = COMM_TARGET) -> None:
        self.send("comm_open", comm_open(self.comm_id, target, data))

    def attach(self, *, protocol: Sequence[int] = (1, 0), target: str = COMM_TARGET) -> Reply:
        id = next(self._ids)
        params = {"protocol": protocol, "host": {"name": "wire", "version": "0"}, "session": "wire"}
        self.open(encode_request(id, "bridge.attach", params), target=target)
        return self.reply(id)

    def detach(self) -> None:
        self.send("comm_close", comm_close(self.comm_id))

    def answer(self, callback: Received, result: object) -> None:
        """Answer a callback; a BridgeError is answered as the error it is."""
        assert isinstance(callback.message, Request)
        id = callback.message.id
        if isinstance(result, BridgeError):
            self.send_data(encode_failure(id, error_object(result)))
        else:
            self.send_data(encode_success(id, result))

    def heartbeat(self, *, timeout_s: float = TIMEOUT_S) -> bool:
        """Whether the kernel echoes."""
        beat = uuid.uuid4().bytes
        self._heart.send(beat)
        return bool(self._heart.poll(int(timeout_s * 1000))) and self._heart.recv() == beat

    # -- receiving ---------------------------------------------------------------

    def expect(
        self, predicate: Callable[[Received], object], what: str = "a message", *, timeout_s: float = TIMEOUT_S
    ) -> Received:
        """The first message, not taken before, that `predicate` is true of. Fails after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            for index, message in enumerate(self._unread):
                if predicate(message):
                    return self._unread.pop(index)
            left = deadline - time.monotonic()
            if left <= 0:
                seen = "\n".join(f"  {m.kind} {m.content}"[:300] for m in self._unread[-20:])
                raise AssertionError(f"{what} did not come within {timeout_s:g} s; unread:\n{seen}\n{self._log()}")
            self._pump(left)

    def _pump(self, timeout_s: float) -> None:
        for channel, _ in self._poller.poll(int(timeout_s * 1000) + 1):
            with contextlib.suppress(zmq.Again):
                while True:
                    self._take(channel, receive(channel))

    def _take(self, channel: zmq.Socket[bytes], frames: Sequence[Buffer]) -> None:
        topic = {self.shell: b"shell", self.control: b"control"}.get(channel) or bytes(frames[0])
        envelope = self.codec.unpack(frames)
        message = None
        if envelope.header.msg_type == "comm_msg":
            message = decode_message(comm_content(envelope.content).data)
        received = Received(
            topic.decode(),
            envelope.header.msg_type,
            loads(envelope.parent).get("msg_id", ""),
            loads(envelope.content),
            message,
            envelope.buffers,
            b"".join(bytes(frame) for frame in frames),
        )
        self.received.append(received)
        if isinstance(message, Request):
            name = f"tool.call/{received.params['name']}" if message.method == "tool.call" else message.method
            answer = self.answers.get(name) or self.answers.get(message.method)
            if answer is not None:
                try:
                    self.answer(received, answer(received.params))
                except BridgeError as exc:
                    self.answer(received, exc)
                return
        self._unread.append(received)

    def reply(self, id: int | str | None, *, timeout_s: float = TIMEOUT_S) -> Reply:
        """The answer to the request `id`."""

        def answers(received: Received) -> bool:
            return isinstance(received.message, Success | Failure) and received.message.id == id

        received = self.expect(answers, f"the reply to {id!r}", timeout_s=timeout_s)
        if isinstance(received.message, Failure):
            return Reply(None, received.message.error, received.buffers)
        assert isinstance(received.message, Success)
        return Reply(loads(received.message.result), None, received.buffers)

    def request(
        self, method: str, params: dict[str, Any] | None = None, *, timeout_s: float = TIMEOUT_S, **more: Any
    ) -> Reply:
        """Send a request and wait for its answer."""
        return self.reply(self.start(method, params, **more), timeout_s=timeout_s)

    def run(self, function: str | dict[str, Any], *args: Any, timeout_s: float = TIMEOUT_S, **more: Any) -> Reply:
        """Call a function (see `call`) and wait for its answer."""
        return self.reply(self.call(function, *args, **more), timeout_s=timeout_s)

    def callback(self, tool: str, command: int | str | None = None) -> Received:
        """The next unanswered call of `tool`, by a certain command if one is named."""
        return self.expect(
            lambda m: (
                m.method == "tool.call"
                and m.params["name"] == tool
                and (command is None or m.params["command"] == command)
            ),
            f"a call of tool {tool!r}",
        )

    def chunk(self, command: int | str) -> Any:
        """The next chunk of a stream: its value."""
        found = self.expect(lambda m: m.method == "command.chunk" and m.params["command"] == command, "a chunk")
        return found.params["value"]

    def printed(self, command: int | str, name: str = "stdout") -> str:
        """What a command has printed so far, by the parent of the messages."""
        parent = self.msg_ids[command]
        return "".join(
            m.content["text"]
            for m in self.received
            if m.kind == "stream" and m.parent == parent and m.content["name"] == name
        )

    def events(self, command: int | str) -> list[dict[str, Any]]:
        """The telemetry of a command that has been answered: events, in order. The last ones follow the answer."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            batches = [
                batch
                for m in self.received
                if m.kind in ("display_data", "update_display_data")
                for batch in m.content["data"]["application/vnd.bridge.telemetry.v1+json"]
                if batch["command"] == command
            ]
            events = [
                {**event, "metadata": {**batch["metadata"], **event["metadata"]}}
                for batch in batches
                for event in batch["events"]
            ]
            if batches and batches[-1]["settled"]:
                return events
            left = deadline - time.monotonic()
            assert left > 0, f"the telemetry of command {command} did not end; so far {events}"
            self._pump(left)

    def heard_of(self, *, timeout_s: float = 1.0) -> bool:
        """Whether the kernel's lane still answers, attached or not."""
        asked = self.send("kernel_info_request", b"{}")
        try:
            self.expect(lambda m: m.kind == "kernel_info_reply" and m.parent == asked, timeout_s=timeout_s)
        except AssertionError:
            return False
        return True

    # -- asking ------------------------------------------------------------------

    def busy(self) -> int:
        """How many commands run: their code, answered or not."""
        count: int = self.request("kernel.ping").result["busy"]
        return count

    def until_idle(self, *, timeout_s: float = TIMEOUT_S) -> None:
        """Until no command's code runs any more."""
        self.until(lambda: self.busy() == 0, "all commands' end", timeout_s=timeout_s)

    def until(self, condition: Callable[[], object], what: str, *, timeout_s: float = TIMEOUT_S) -> None:
        """Ask again and again, each time through the kernel or the system, which is what takes the time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come within {timeout_s:g} s\n{self._log()}"

    def dropped(self, reason: str) -> int:
        """How many messages the kernel says it dropped."""
        count: int = self.request("kernel.stats").result["dropped"].get(reason, 0)
        return count
