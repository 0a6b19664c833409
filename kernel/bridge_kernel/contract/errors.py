"""Every error that may cross the bridge: its code, its meaning, its remedy, and its form on the wire.

One class an error; the classes are the table (`ERRORS`). Codes are JSON-RPC's: -32768…-32600 are the
standard's own, -32099…-32000 are Bridge's. Split by who must act: you (arguments, policy), your code
(`RemoteError`, `ToolError`), nobody (`Conflict`, `Overloaded`, `KernelDied`: run it again).
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec

from .secrets import without_secrets

if TYPE_CHECKING:
    import builtins
    from collections.abc import Iterable
    from types import TracebackType

__all__ = (
    "ERRORS",
    "BridgeError",
    "Cancelled",
    "CircuitOpen",
    "Conflict",
    "DeadlineExceeded",
    "Draining",
    "EffectInDoubt",
    "ErrorData",
    "ErrorObject",
    "Frame",
    "HostClosed",
    "InternalError",
    "InvalidArguments",
    "InvalidParams",
    "InvalidRequest",
    "InvalidValue",
    "KernelDied",
    "KernelStartFailed",
    "LimitExceeded",
    "MalformedValue",
    "MethodNotFound",
    "NotAttached",
    "NotFound",
    "NotSerializable",
    "Overloaded",
    "ParseError",
    "PolicyDenied",
    "ProtocolMismatch",
    "Quarantined",
    "QueueFull",
    "QuotaExceeded",
    "RemoteError",
    "ReplayDiverged",
    "SecretUnreadable",
    "SourceMissing",
    "StoreDamaged",
    "StoreFailed",
    "StoreLocked",
    "ToolError",
    "error_object",
    "exception_from",
    "type_of",
)

MAX_FRAMES: Final = 64  # traceback frames on the wire: both ends of a recursion, not its middle
MAX_TEXT: Final = 16_384  # characters of a message or a source line; what follows is cut and said to be


class Frame(msgspec.Struct, frozen=True):
    """One frame of a traceback, outermost first in a list of them."""

    file: str
    line: int
    function: str
    code: str = ""


class ErrorData(msgspec.Struct, frozen=True):
    """`error.data` of a JSON-RPC error: what a person or a program needs in order to act.

    `type` is the class of the exception, dotted unless it is a builtin; `retryable` says that the same
    command may succeed when it is run again.
    """

    type: str
    message: str
    traceback: tuple[Frame, ...] = ()
    retryable: bool = False
    remedy: str = ""


class ErrorObject(msgspec.Struct, frozen=True):
    """The `error` member of a JSON-RPC response."""

    code: int
    message: str
    data: ErrorData | None = None


class BridgeError(Exception):
    """The base of every error Bridge raises.

    `remedy` says what to do; `frames` is the traceback of the other side, if the error comes from there,
    and is shown as a note beneath the local traceback.
    """

    code: ClassVar[int] = -32603
    summary: ClassVar[str] = "Something inside Bridge failed."
    default_remedy: ClassVar[str] = "Please report this, with the traceback."
    retryable: bool = False

    def __init__(
        self, message: str | None = None, *, remedy: str | None = None, type: str = "", frames: tuple[Frame, ...] = ()
    ) -> None:
        # None, not "": what the other side left empty stays so.
        self.message = self.summary if message is None else message
        super().__init__(self.message)
        self.remedy = self.default_remedy if remedy is None else remedy
        self.type = type or f"bridge.{self.__class__.__name__}"
        self.frames = frames
        if frames:
            self.add_note(self.remote_traceback)
        if self.remedy:
            self.add_note(f"Remedy: {self.remedy}")

    def __str__(self) -> str:
        return self.message

    @property
    def remote_traceback(self) -> str:
        """The other side's traceback as Python prints it, or an empty string."""
        if not self.frames:
            return ""
        lines = [f"{self._where} traceback (most recent call last):"]
        for frame in self.frames:
            lines.append(f'  File "{frame.file}", line {frame.line}, in {frame.function}')
            if frame.code:
                lines.append(f"    {frame.code}")
        lines.append(f"{self.type}: {self.message}")
        return "\n".join(lines)

    _where: ClassVar[str] = "Kernel"


class ParseError(BridgeError):
    code = -32700
    summary = "The message is not JSON."
    default_remedy = "Send one JSON-RPC 2.0 message as the comm message's data."


class InvalidRequest(BridgeError):
    code = -32600
    summary = "The message is JSON, but not a JSON-RPC 2.0 message."
    default_remedy = 'Send "jsonrpc": "2.0" with a method, or with a result or an error and the id it answers.'


class MethodNotFound(BridgeError):
    code = -32601
    summary = "There is no such command."
    default_remedy = "`jupyter bridge contract` lists the commands, and so does rpc.discover."


class InvalidParams(BridgeError):
    code = -32602
    summary = "The parameters do not fit the command's schema."
    default_remedy = "Compare them with the command's schema: `jupyter bridge contract`."


class InternalError(BridgeError):
    code = -32603


class RemoteError(BridgeError):
    """Python code raised in a kernel. `type` is its class's name, `frames` its traceback there."""

    code = -32000
    summary = "The code that the command ran raised an exception."
    default_remedy = ""

    def __str__(self) -> str:
        return f"{self.type}: {self.message}" if self.message else self.type


class ToolError(BridgeError):
    """A tool raised in the host. Raised inside the kernel, where the code that called the tool can catch it."""

    code = -32001
    summary = "A tool raised an exception in the host."
    default_remedy = ""
    _where = "Tool's"

    def __str__(self) -> str:
        return f"{self.type}: {self.message}" if self.message else self.type


class Cancelled(BridgeError):
    code = -32002
    summary = "The command was cancelled."
    default_remedy = ""


class DeadlineExceeded(BridgeError, TimeoutError):
    code = -32003
    summary = "The command's deadline passed before it ended."
    default_remedy = "Give it more time, e.g. session.call(..., deadline=60)."


class NotSerializable(BridgeError, TypeError):
    """A value cannot cross the bridge. `path` says where in the value, e.g. `result["rows"][3].handle`."""

    code = -32004
    summary = "A value cannot cross the bridge."
    default_remedy = "Convert it to plain data first."


class NotFound(BridgeError, KeyError):
    code = -32005
    summary = "There is no such variable, instance, tool, function or session."
    default_remedy = "Look at what there is: repr(session) lists it."


class Conflict(BridgeError):
    """The instance was changed by another call since this one read it; nothing of this call was kept."""

    code = -32006
    summary = "Another call changed the instance while this one ran."
    default_remedy = "Call it again: it then starts from the new state."
    retryable = True


class PolicyDenied(BridgeError):
    code = -32007
    summary = "The kernel's policy does not allow this."
    default_remedy = "Widen the policy where the kernel is started, e.g. Host(arguments=['--Policy.allow_names=*'])."


class InvalidArguments(BridgeError, ValueError):
    """A tool's arguments do not fit its schema; the tool was not run."""

    code = -32008
    summary = "The arguments do not fit the tool's schema."
    default_remedy = "Compare them with the schema: session.tools[name].schema."


class Overloaded(BridgeError):
    code = -32009
    summary = "The kernel has as many commands as it takes."
    default_remedy = "Run fewer at once, or start more kernels: Host(kernels=…)."
    retryable = True


class Draining(BridgeError):
    code = -32010
    summary = "The kernel is draining: it finishes what it has and takes no more."
    default_remedy = "Send the command to another kernel."
    retryable = True


class ProtocolMismatch(BridgeError):
    code = -32011
    summary = "Host and kernel speak different versions of the protocol."
    default_remedy = "Install the same version of bridge-kernel on both sides."


class SourceMissing(BridgeError):
    code = -32012
    summary = "The kernel no longer holds the source of this function."
    default_remedy = "Send the command again with the function's source."
    retryable = True


class MalformedValue(BridgeError, ValueError):
    """A value on the wire cannot be decoded; `message` names the path inside it."""

    code = -32013
    summary = "A value on the wire is malformed."
    default_remedy = "Encode values as docs/protocol.md says, or with bridge_kernel.contract.values."


class LimitExceeded(BridgeError):
    code = -32014
    summary = "A limit was exceeded."
    default_remedy = "Send less at once, or raise the limit in the kernel's policy."


class InvalidValue(BridgeError, ValueError):
    """A value does not fit the type that its variable was defined with; nothing was written."""

    code = -32015
    summary = "The value does not fit the variable's type."
    default_remedy = "Compare it with the type: session.variables[name].schema."


class QuotaExceeded(BridgeError):
    """A write would take a session past its quota; nothing was written."""

    code = -32016
    summary = "A quota of the session is used up."
    default_remedy = "Delete what is not needed, or open the host with a larger quota: Host(quota=Quota(…))."


class KernelDied(BridgeError):
    """The kernel was lost with this command in flight, on every attempt. The session is intact: the host owns it."""

    code = -32020
    summary = "The kernel died while the command ran."
    default_remedy = "Call it again: a new kernel has taken its place. Or let the host try more often: retries=5."
    retryable = True


class KernelStartFailed(BridgeError):
    code = -32021
    summary = "A kernel could not be started."
    default_remedy = "See what it printed, above. `jupyter kernelspec list` must show `bridge`."


class NotAttached(BridgeError):
    code = -32022
    summary = "No host is attached to this kernel."
    default_remedy = 'Attach one: Host(kernels=0).attach("kernel-….json", session="demo").'


class HostClosed(BridgeError):
    code = -32023
    summary = "The host is closed."
    default_remedy = "Open another: with Host() as host: …"


class StoreLocked(BridgeError):
    """Another process owns the store: one host a file at a time."""

    code = -32024
    summary = "Another host has the store open."
    default_remedy = "Close that host, or open another file."


class StoreDamaged(BridgeError):
    """The file is no store of Bridge's, is damaged, or is of a newer format. It was not changed."""

    code = -32025
    summary = "The store cannot be read."
    default_remedy = "Restore it from a copy or an export; the file was left as it is."


class StoreFailed(BridgeError):
    """A write could not be put on disk. What was acknowledged before is safe; from here on nothing is written."""

    code = -32026
    summary = "The store could not be written."
    default_remedy = "See to the disk (space, permissions), then open the host anew."


class ReplayDiverged(BridgeError):
    """A command that ran again asked for something else than the first time, after a tool's effect had happened."""

    code = -32027
    summary = "The command did something else when it ran again."
    default_remedy = (
        "Make it repeatable (no clock, no chance before its tools are called), or mark the tool: "
        "@session.tool(idempotent=True)."
    )


class Quarantined(BridgeError):
    """The command ended every kernel that it met, the last one with nothing else running on it."""

    code = -32028
    summary = "The command kills the kernels it runs on, and is not run again."
    default_remedy = "Mend it, then let it out: host.quarantine.release(name)."


class QueueFull(BridgeError):
    """The command was not taken: so many wait already. `message` says how long the wait would be."""

    code = -32029
    summary = "Too many commands wait for a kernel."
    default_remedy = "Send fewer at once, or add kernels: host.pool.scale(n)."
    retryable = True


class CircuitOpen(BridgeError):
    """The command has failed its kernels so often in a row that it is held back for a while."""

    code = -32030
    summary = "The command is held back, for it keeps failing its kernels."
    default_remedy = "Wait as long as the message says, or mend what makes it hang."
    retryable = True


class EffectInDoubt(BridgeError):
    """The host ended while a tool ran: nobody knows whether its effect happened."""

    code = -32031
    summary = "Whether a tool's effect happened is not known."
    default_remedy = "Look, then say so: host.resume(id, replies={call: result}) or host.resume(id, rerun=[call])."


class SecretUnreadable(BridgeError):
    """A secret is in the store, but the key that it was sealed with is not at hand."""

    code = -32032
    summary = "A secret cannot be unsealed."
    default_remedy = "Put the key back where it was, or set the secret anew: session.secrets[name] = …"


def _subclasses(cls: builtins.type[BridgeError]) -> dict[int, builtins.type[BridgeError]]:
    return {sub.code: sub for sub in cls.__subclasses__()}


ERRORS: Final[dict[int, builtins.type[BridgeError]]] = dict(sorted(_subclasses(BridgeError).items(), reverse=True))
"""Every error by its code: the table that the OpenRPC document and docs/protocol.md are made from."""


def _clip(text: object, secrets: tuple[str, ...] = ()) -> str:
    # Plain text that UTF-8 can carry, whatever it was: an error that cannot be sent would never be answered.
    # Redacted first: half of a secret that is cut is no secret that could be found.
    text = without_secrets(str(text), secrets).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT} more characters)"


def qualified_name(cls: builtins.type) -> str:
    """`ValueError` for a builtin, `package.module.Class` for anything else."""
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def type_of(exc: BaseException) -> str:
    """What the wire and telemetry call an exception's type: the remote one's own name, if it is remote."""
    return exc.type if isinstance(exc, BridgeError) else qualified_name(type(exc))


def frames_of(tb: TracebackType | None, *, hidden: str = "", secrets: tuple[str, ...] = ()) -> tuple[Frame, ...]:
    """The frames of a traceback, outermost first, without the leading ones whose file starts with `hidden`."""
    # lookup_lines is left on: source that the kernel was sent is in linecache only while it is kept compiled.
    summary = traceback.extract_tb(tb)
    frames = [Frame(f.filename, f.lineno or 0, f.name, (f.line or "").strip()) for f in summary]
    start = 0
    while hidden and start < len(frames) and frames[start].file.startswith(hidden):
        start += 1
    frames = frames[start:]
    if len(frames) > MAX_FRAMES:
        half = MAX_FRAMES // 2
        cut = Frame("…", 0, f"({len(frames) - MAX_FRAMES} frames left out)")
        frames = [*frames[:half], cut, *frames[-half:]]
    return _clipped(frames, secrets)


def _clipped(frames: Iterable[Frame], secrets: tuple[str, ...]) -> tuple[Frame, ...]:
    return tuple(
        Frame(_clip(f.file, secrets), f.line, _clip(f.function, secrets), _clip(f.code, secrets)) for f in frames
    )


def _message_of(exc: BaseException) -> str:
    try:
        return str(exc)
    except Exception as broken:  # noqa: BLE001 - an exception whose own __str__ raises must still be reported
        return f"<its __str__ raised {type(broken).__name__}>"


def error_object(
    exc: BaseException,
    *,
    wrap: builtins.type[BridgeError] = RemoteError,
    hidden: str = "",
    secrets: tuple[str, ...] = (),
) -> ErrorObject:
    """The wire form of an exception, `secrets` starred out: a provider that refuses a key likes to repeat it.

    A `BridgeError` keeps its code; any other exception becomes a `wrap`: `RemoteError` where the kernel
    reports what code raised, `ToolError` where the host reports what a tool raised.
    """
    if isinstance(exc, BridgeError):
        own: tuple[Frame, ...] = ()
        if isinstance(exc, RemoteError | ToolError):
            own = frames_of(exc.__traceback__, hidden=hidden, secrets=secrets)
        frames = (own + _clipped(exc.frames, secrets))[-MAX_FRAMES:]
        message, remedy = _clip(exc.message, secrets), _clip(exc.remedy, secrets)
        data = ErrorData(_clip(exc.type, secrets), message, frames, exc.retryable, remedy)
        return ErrorObject(exc.code, _clip(_message_of(exc), secrets), data)
    name, message = _clip(qualified_name(type(exc)), secrets), _clip(_message_of(exc), secrets)
    frames = frames_of(exc.__traceback__, hidden=hidden, secrets=secrets)
    text = f"{name}: {message}" if message else name
    return ErrorObject(wrap.code, text, ErrorData(name, message, frames, remedy=wrap.default_remedy))


def exception_from(error: ErrorObject) -> BridgeError:
    """The exception that a wire error stands for; a code this side does not know is an `InternalError`."""
    cls = ERRORS.get(error.code, InternalError)
    data = error.data
    if data is None:
        return cls(error.message)
    return cls(data.message, remedy=data.remedy, type=data.type, frames=data.traceback)
