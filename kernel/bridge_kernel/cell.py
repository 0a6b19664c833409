"""A cell as Bridge sees it: where it prints, and what `session` is in it. IPython, which runs it, is `kernel.py`'s."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from .command import RunningCommand
from .context import SessionContext
from .contract.errors import BridgeError, Cancelled, NotAttached, error_object
from .contract.messages import Failure
from .contract.methods import Command
from .contract.telemetry import TelemetryOptions
from .output import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import msgspec

    from .connection import Connection
    from .contract.frames import Buffer
    from .interrupts import Interrupts
    from .runtime import Runtime

__all__ = ("Cell", "CellOutput", "CellSession", "Unattached", "UnattachedCell")

CELL: Final = "bridge-cell"  # the key of a connection's cell among its commands; no command is called so


class CellOutput(Output):
    """A cell's output; what its threads and tasks print after its end is its own too, and shown at once."""

    def __init__(self, publish: Callable[[str, str], None], max_bytes: int, interrupts: Interrupts) -> None:
        super().__init__(publish, max_bytes)
        self.interrupts = interrupts
        self._ended = False

    def write(self, name: str, text: str) -> None:
        with self.interrupts.held():
            super().write(name, text)
            if self._ended:
                super().flush()

    def flush(self, *, final: bool = False) -> None:
        with self.interrupts.held():
            super().flush(final=final)

    def end(self) -> None:
        self._ended = True
        self.flush()


def _not_attached(message: str, connection_file: str) -> NotAttached:
    remedy = f'Attach one, from any Python: Host(kernels=0).attach({connection_file!r}, session="demo").'
    return NotAttached(message, remedy=remedy)


class UnattachedCell:
    """A cell without a host."""

    def __init__(self, parent: bytes, output: CellOutput) -> None:
        self.parent = parent
        self.output = output

    def close(self) -> None:
        self.output.end()


class Unattached:
    """`session` while no host is attached: whatever is done with it says how to attach one."""

    def __init__(self, connection_file: str) -> None:
        object.__setattr__(self, "_file", connection_file)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        message = "no host is attached to this kernel, so there is no session here"
        raise _not_attached(message, object.__getattribute__(self, "_file"))

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return object.__getattribute__(self, name)
        return object.__getattribute__(self, "_refuse")()

    def __setattr__(self, name: str, value: Any) -> None:
        object.__getattribute__(self, "_refuse")()

    __getitem__ = __setitem__ = __delitem__ = __contains__ = __iter__ = __len__ = __call__ = _refuse

    def __dir__(self) -> list[str]:
        return dir(SessionContext)  # what there will be: for completion

    def __repr__(self) -> str:
        file = object.__getattribute__(self, "_file")
        return f'<no session: attach a host with Host(kernels=0).attach({file!r}, session="demo")>'


class CellSession(SessionContext):
    """`session` in a cell, where people look at it: its repr lists what there is."""

    _command: Cell

    def __repr__(self) -> str:
        if self._command.answered:
            return f"<session {self.session_id!r}, of a cell that has ended>"
        try:
            parts = {
                "variables": [variable.name for variable in self.variables()],
                "tools": [tool.name for tool in self.tools()],
            }
        except BridgeError as exc:
            return f"<session {self.session_id!r}: {exc}>"
        shown = "; ".join(f"{what}: {', '.join(names[:12])}" for what, names in parts.items() if names)
        return f"<session {self.session_id!r}{' ' + shown if shown else ' (empty)'}>"


class Cell(RunningCommand):
    """A cell as its `session` sees it: callbacks like a command's, but Jupyter's own messages for everything else.

    Nothing can stop it but an interrupt: when its host goes, its callbacks fail and it runs on.
    """

    def __init__(
        self, runtime: Runtime, connection: Connection, parent: bytes, output: CellOutput, connection_file: str
    ) -> None:
        super().__init__(
            runtime,
            connection,
            None,  # type: ignore[arg-type]  # in a callback: "a cell's"
            "execute_request",
            # Its telemetry would be output that it did not write.
            Command(session=connection.session, telemetry=TelemetryOptions(off=(("bridge",),))),
            subject="cell",
            parent=parent,
            buffers=(),
            bytes_in=0,
        )
        self.output: CellOutput = output
        self._connection_file = connection_file
        self._lost: Callable[[], BridgeError] | None = None
        connection.commands[CELL] = self  # so that the connection's end stops it too

    def stop(self, error: BridgeError) -> None:
        """The host has gone: fail the callbacks that wait, and those to come."""
        self._end_callbacks(lambda: _not_attached(f"the host has gone: {error}", self._connection_file))

    def close(self) -> None:
        """The cell has ended: its `session` is of no use any more."""
        self._end_callbacks(lambda: Cancelled("this cell has ended, and its session with it"))
        self._answered = True
        self.connection.commands.pop(CELL, None)
        self.connection.forget(self)
        self.output.end()

    def _end_callbacks(self, error: Callable[[], BridgeError]) -> None:
        with self._lock:
            self._lost = error
            pending, self._pending = self._pending, {}
        for id, resolve in pending.items():
            resolve(Failure(id, error_object(error())), ())

    def _request(self, *args: Any) -> None:
        if self._lost is not None:
            raise self._lost()
        with self.output.interrupts.held():
            super()._request(*args)
        if self._lost is not None:  # it came between the two: nobody will answer
            self._end_callbacks(self._lost)

    def notify(self, method: str, params: msgspec.Struct, buffers: Sequence[Buffer] = ()) -> None:
        """A cell's progress: no command of the host's waits for it."""
