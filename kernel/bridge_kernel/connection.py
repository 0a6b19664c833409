"""One attached host: its comm, its commands, its callbacks that wait for a reply."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from .contract.errors import Cancelled
from .contract.frames import comm_close, comm_message
from .contract.messages import encode_failure, encode_notification, encode_request, encode_success

if TYPE_CHECKING:
    from collections.abc import Sequence

    import msgspec

    from .callbacks import Caller
    from .command import RunningCommand
    from .contract.errors import ErrorObject
    from .contract.frames import Buffer
    from .sockets import Iopub, Publisher

__all__ = ("Connection",)

MAX_CANCELLED: Final = 256  # commands cancelled before they came


class Connection:
    """The comm between this kernel and one host. Everything published about its commands has its topic as prefix."""

    def __init__(self, comm_id: str, iopub: Iopub, publisher: Publisher) -> None:
        self.comm_id = comm_id
        self.topic = f"comm-{comm_id}".encode()
        self.session = ""
        self.commands: dict[int | str, RunningCommand] = {}
        self._callbacks: dict[int, Caller] = {}
        self._cancelled: OrderedDict[int | str, None] = OrderedDict()
        self._last_id = 0
        self._iopub = iopub
        self._publisher = publisher

    def success(self, id: int | str, result: msgspec.Struct) -> bytes:
        return comm_message(self.comm_id, encode_success(id, result))

    def failure(self, id: int | str | None, error: ErrorObject) -> bytes:
        return comm_message(self.comm_id, encode_failure(id, error))

    def request(self, id: int, method: str, params: msgspec.Struct) -> bytes:
        return comm_message(self.comm_id, encode_request(id, method, params))

    def notification(self, method: str, params: msgspec.Struct) -> bytes:
        return comm_message(self.comm_id, encode_notification(method, params))

    def publish(self, content: bytes, buffers: Sequence[Buffer] = (), parent: bytes = b"{}") -> None:
        """Send a `comm_msg` to the host. Any thread."""
        self._iopub.send(self._publisher.frames([self.topic], "comm_msg", content, parent=parent, buffers=buffers))

    def publish_as(self, msg_type: str, content: bytes, parent: bytes) -> None:
        """Send output or telemetry of one of its commands. Any thread."""
        self._iopub.send(
            self._publisher.frames([self.topic + b"." + msg_type.encode()], msg_type, content, parent=parent)
        )

    def cancelled_early(self, id: int | str) -> bool:
        """Remember to cancel a command that has not come yet; False if it has come and gone, as its number tells."""
        if isinstance(id, int) and id <= self._last_id:
            return False
        self._cancelled[id] = None
        if len(self._cancelled) > MAX_CANCELLED:
            self._cancelled.popitem(last=False)
        return True

    def was_cancelled(self, id: int | str) -> bool:
        """Whether the command that comes now was cancelled before. Numbers are taken to rise, as hosts count."""
        if isinstance(id, int):
            self._last_id = max(self._last_id, id)
        return self._cancelled.pop(id, id) is None

    def expect(self, id: int, command: Caller) -> None:
        self._callbacks[id] = command

    def waiting(self, id: Any) -> Caller | None:
        """The command whose callback has this id, once; None if no reply to it is waited for."""
        return self._callbacks.pop(id, None) if isinstance(id, int) else None

    def forget(self, command: RunningCommand) -> None:
        """The command was answered: late replies to its callbacks belong to nobody."""
        self.commands.pop(command.id, None)
        for id in command.unanswered:
            self._callbacks.pop(id, None)

    def close(self, why: str) -> None:
        """Stop all of its commands: nobody waits for them."""
        for command in list(self.commands.values()):
            command.stop(Cancelled(why))
        self._iopub.send(self._publisher.frames([self.topic], "comm_close", comm_close(self.comm_id)))
