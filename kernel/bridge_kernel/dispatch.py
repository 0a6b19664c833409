"""What a host's JSON-RPC messages do: commands begin, callbacks are answered, deadlines are kept. No sockets."""

from __future__ import annotations

import heapq
import itertools
import math
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .command import Answer, RunningCommand
from .commands import HANDLERS, subject
from .contract.errors import (
    BridgeError,
    Cancelled,
    Draining,
    InvalidParams,
    InvalidRequest,
    MethodNotFound,
    Overloaded,
    error_object,
)
from .contract.frames import UNDECODABLE
from .contract.messages import Failure, Notification, Request, Success, decode_message
from .contract.methods import COMMANDS, NOTIFICATIONS, Cancel, Drained, GiveCredit, Pong
from .memory import resident_bytes

if TYPE_CHECKING:
    from .connection import Connection
    from .contract.frames import Envelope
    from .contract.methods import Command, Method
    from .runtime import Runtime

__all__ = ("Dispatcher", "params_of")

_decoders: Final = {
    m.name: msgspec.json.Decoder(m.params) for m in (*COMMANDS.values(), *NOTIFICATIONS.values()) if m.side == "host"
}
_WHILE_DRAINING: Final = ("kernel.drain", "kernel.stats", "rpc.discover")


def params_of(method: Method, raw: msgspec.Raw) -> Any:
    """The parameters of a message, as the method's own type. Raises `InvalidParams`."""
    try:
        return _decoders[method.name].decode(raw)
    except UNDECODABLE as exc:
        raise InvalidParams(f"{method.name}: {exc}") from exc


class Dispatcher:
    """Everything here runs on the lane's thread, and never waits."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._deadlines: list[tuple[float, int, weakref.ref[RunningCommand]]] = []
        self._order = itertools.count()
        self.last_command = -math.inf
        """When the last command came, by the monotonic clock (s)."""

    def take(self, connection: Connection, envelope: Envelope, data: msgspec.Raw) -> None:
        """Do what one message of a host asks for, or answer why not."""
        size = len(envelope.content) + sum(map(len, envelope.buffers))
        id: int | str | None = None
        try:
            message = decode_message(data)
            if isinstance(message, Success | Failure):
                command = connection.waiting(message.id)
                if command is None:
                    self._runtime.drop("late", f"a reply to callback {message.id}, for which nobody waits")
                else:
                    assert isinstance(message.id, int)
                    command.reply(message.id, message, envelope.buffers, size)
            elif isinstance(message, Notification):
                self._on_notification(connection, message)
            else:
                id = message.id
                self._on_request(connection, envelope, message, size)
        except BridgeError as exc:
            connection.publish(connection.failure(id, error_object(exc)), parent=envelope.raw_header)

    def _on_notification(self, connection: Connection, message: Notification) -> None:
        method = NOTIFICATIONS.get(message.method)
        if method is None or method.side != "host":
            self._runtime.drop("unknown", f"notification {message.method!r}")
            return
        try:
            params = params_of(method, message.params)
        except InvalidParams as exc:
            self._runtime.drop("malformed", str(exc))  # a notification is never answered
            return
        command = connection.commands.get(params.command)
        if command is None and isinstance(params, Cancel) and connection.cancelled_early(params.command):
            return  # control is read before shell: the command may be on its way still
        if command is None:
            self._runtime.drop("late", f"{message.method} for a command that has ended")
        elif isinstance(params, Cancel):
            command.stop(Cancelled(f"{command.recorder.subject} was cancelled"))
        elif isinstance(params, GiveCredit):
            command.credit.give(params.credit)

    def _on_request(self, connection: Connection, envelope: Envelope, request: Request, size: int) -> None:
        method = COMMANDS.get(request.method)
        if method is None or method.name == "bridge.attach":
            raise MethodNotFound(f"there is no command {request.method!r}")
        if request.id in connection.commands:
            raise InvalidRequest(f"command {request.id!r} is running: an id names one command")
        params: Command = params_of(method, request.params)
        if connection.was_cancelled(request.id):
            raise Cancelled(f"{method.name} was cancelled before it began")
        if method.name == "kernel.ping":
            pong = Pong(self._runtime.identity.id, self._runtime.busy, resident_bytes())
            connection.publish(connection.success(request.id, pong), parent=envelope.raw_header)
            return
        runtime = self._runtime
        if runtime.draining and method.name not in _WHILE_DRAINING:
            raise Draining
        if runtime.busy >= runtime.policy.max_commands and method.name != "kernel.drain":
            raise Overloaded(f"{runtime.busy} commands run in this kernel, as many as it takes")
        command = RunningCommand(
            runtime,
            connection,
            request.id,
            request.method,
            params,
            subject=subject(request.method, params),
            parent=envelope.raw_header,
            buffers=envelope.buffers,
            bytes_in=size,
        )
        connection.commands[request.id] = command
        if method.name == "kernel.drain":
            runtime.draining = True
            drained = Answer(Drained(runtime.busy + runtime.cells))
            runtime.when_idle(lambda: command.succeed(drained))
            return
        runtime.started(command)
        self.last_command = time.monotonic()
        if command.deadline is not None:
            self._watch_deadline(command.deadline, command)
        try:
            runtime.executor.submit(partial(command.run, HANDLERS[request.method]))
        except RuntimeError as exc:  # the system gives no more threads
            command.fail(Overloaded(f"no thread can be started: {exc}"))
            runtime.ended(command)

    # -- deadlines ---------------------------------------------------------------

    def _watch_deadline(self, deadline: float, command: RunningCommand) -> None:
        if len(self._deadlines) > 64 + 2 * self._runtime.busy:
            # Commands that ended long before their deadline: let them go.
            self._deadlines = [
                entry for entry in self._deadlines if (other := entry[2]()) is not None and not other.answered
            ]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (deadline, next(self._order), weakref.ref(command)))

    def until_deadline(self, now: float) -> float:
        """Seconds until the next deadline, never below 0; infinite if there is none."""
        return max(0.0, self._deadlines[0][0] - now) if self._deadlines else math.inf

    def expire(self, now: float) -> None:
        """Stop the commands whose deadline has passed."""
        while self._deadlines and self._deadlines[0][0] <= now:
            late = heapq.heappop(self._deadlines)[2]()
            if late is not None:
                late.expire()
