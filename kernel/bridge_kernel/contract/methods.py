"""Every method of the contract: its parameters, its result and its errors, as types.

The dispatch of both sides and the OpenRPC document (`openrpc`) are made from `METHODS`; nothing else
defines what may be said over the bridge.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from . import errors
from .telemetry import TelemetryOptions

__all__ = (
    "CALLBACKS",
    "COMMANDS",
    "METHODS",
    "NOTIFICATIONS",
    "Method",
)

Value = Annotated[
    Any,
    msgspec.Meta(
        description='A value as the codec writes it: JSON, with {"$bridge": kind, …} for what JSON cannot carry.',
        extra_json_schema={"$ref": "#/components/schemas/Value"},
    ),
]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, description="What is left of the budget, in milliseconds.")]
Traceparent = Annotated[
    str,
    msgspec.Meta(
        pattern="^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$",
        description="W3C trace context: https://www.w3.org/TR/trace-context/",
    ),
]
Bytes = Annotated[int, msgspec.Meta(ge=0, description="A size in bytes.")]
Version = Annotated[int, msgspec.Meta(ge=0, description="How often a variable was written.")]
Credit = Annotated[int, msgspec.Meta(ge=1, le=1_000_000, description="How many more chunks may be sent.")]


class Method(msgspec.Struct, frozen=True):
    """One method: who may call it, with what, for what."""

    name: str
    side: Literal["host", "kernel"]  # who sends it
    summary: str
    params: type[msgspec.Struct]
    result: type[msgspec.Struct] | None  # None: a notification, which has no answer
    errors: tuple[type[errors.BridgeError], ...] = ()


# -- what many methods share -------------------------------------------------


class LM(msgspec.Struct, frozen=True, kw_only=True):
    """The language model that DSPy code of a command uses: the arguments of `dspy.LM`.

    `api_key` is a secret: it is sent with the command that needs it and kept nowhere in the kernel.
    """

    model: str
    api_base: str | None = None
    api_key: str | None = None
    adapter: str | None = None
    """How prompts are written and answers read: the name of one of DSPy's adapters, e.g. `JSONAdapter`."""
    options: dict[str, Value] = {}

    def __repr__(self) -> str:
        return f"LM(model={self.model!r}, api_base={self.api_base!r}, api_key={'***' if self.api_key else None})"


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """What every command carries."""

    session: str = ""
    deadline: Milliseconds | None = None
    attempt: Annotated[int, msgspec.Meta(ge=1)] = 1
    traceparent: Traceparent | None = None
    secrets: dict[str, str] = {}
    """The session's secrets that this command names, and nothing else: kept nowhere, redacted everywhere."""
    telemetry: TelemetryOptions | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(session={self.session!r}, attempt={self.attempt}, …)"


class Callback(msgspec.Struct, frozen=True, kw_only=True):
    """What every callback carries: the command that it belongs to; None for a cell of `execute_request`."""

    command: int | str | None
    seq: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Its place among the callbacks of the command's own flow, which a second attempt repeats in this order;
    None from other threads and tasks that the command started, whose order is nobody's promise."""


class Nothing(msgspec.Struct, frozen=True):
    """An empty object."""


class PathFunction(msgspec.Struct, frozen=True, tag="path", tag_field="kind"):
    """A function that is importable in the kernel: `math.hypot`."""

    path: str


class SourceFunction(msgspec.Struct, frozen=True, tag="source", tag_field="kind"):
    """A function of the session's: sent with its source once per kernel, by its hash from then on."""

    name: str
    hash: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", description="SHA-256 of the source, in hexadecimal.")]
    source: str | None = None


Function = PathFunction | SourceFunction


class State(msgspec.Struct, frozen=True):
    """The state of an instance, in the form that its `adapter` reads."""

    adapter: Literal["dspy", "bridge", "pickle", "recipe"]
    value: Value = None
    sha256: Annotated[str, msgspec.Meta(description="Of a pickle: buffers are not signed, so this is.")] | None = None


class InstanceRecord(msgspec.Struct, frozen=True, rename={"cls": "class"}):
    """An object as the host owns it: how to make it, and what it has become since."""

    ref: str
    cls: str
    args: tuple[Value, ...] = ()
    kwargs: dict[str, Value] = {}
    state: State | None = None
    version: int = 0


class ToolInfo(msgspec.Struct, frozen=True):
    """A tool, described; `schema` is the JSON Schema of its arguments."""

    name: str
    description: str = ""
    schema: dict[str, Any] = {}


class VariableInfo(msgspec.Struct, frozen=True):
    name: str
    version: int
    type: str
    size: Bytes


# -- host → kernel -----------------------------------------------------------


class HostIdentity(msgspec.Struct, frozen=True):
    name: str
    version: str
    pid: int | None = None


class Attach(msgspec.Struct, frozen=True, kw_only=True):
    protocol: tuple[int, int]
    host: HostIdentity
    capabilities: tuple[str, ...] = ()
    session: str = ""
    """The session in which cells (`execute_request`) run."""


class KernelIdentity(msgspec.Struct, frozen=True):
    id: str
    pid: int
    hostname: str
    started: Annotated[float, msgspec.Meta(description="Seconds since the epoch.")]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    max_message_bytes: Bytes
    max_commands: int
    max_sources: int
    max_output_bytes: Bytes


class Attached(msgspec.Struct, frozen=True, kw_only=True):
    protocol: tuple[int, int]
    kernel: KernelIdentity
    versions: dict[str, str]
    commands: tuple[str, ...]
    limits: Limits
    policy: dict[str, Any]


class FunctionCall(Command, frozen=True, kw_only=True):
    function: Function
    args: tuple[Value, ...] = ()
    kwargs: dict[str, Value] = {}
    lm: LM | None = None


class ValueResult(msgspec.Struct, frozen=True):
    value: Value


class FunctionStream(FunctionCall, frozen=True, kw_only=True):
    credit: Credit = 16


class Streamed(msgspec.Struct, frozen=True):
    """The end of a stream: how many chunks there were, and what a generator returned."""

    chunks: int
    value: Value = None


class InstanceCreate(Command, frozen=True, kw_only=True):
    record: InstanceRecord


class InstanceCreated(msgspec.Struct, frozen=True):
    """`state` is where the object starts from; `methods` is what it can be asked."""

    state: State
    methods: tuple[str, ...] = ()


class InstanceCall(Command, frozen=True, kw_only=True):
    record: InstanceRecord
    method: str
    args: tuple[Value, ...] = ()
    kwargs: dict[str, Value] = {}
    lm: LM | None = None


class InstanceCalled(msgspec.Struct, frozen=True):
    """`state` is there only if the call changed it."""

    value: Value
    state: State | None = None


class ObjectInspect(Command, frozen=True, kw_only=True):
    """Exactly one of the three: a dotted name, a function of the session's, an instance."""

    path: str | None = None
    function: SourceFunction | None = None
    record: InstanceRecord | None = None


class Parameter(msgspec.Struct, frozen=True):
    name: str
    kind: Literal["positional_only", "positional_or_keyword", "var_positional", "keyword_only", "var_keyword"]
    annotation: str = ""
    default: str | None = None
    """Python's repr of it, for people; None if there is none."""


class Member(msgspec.Struct, frozen=True):
    name: str
    kind: Literal["method", "property", "attribute", "class", "function"]
    signature: str = ""
    summary: str = ""
    parameters: tuple[Parameter, ...] = ()


class Inspected(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    kind: Literal["function", "class", "module", "instance", "value"]
    module: str = ""
    signature: str = ""
    parameters: tuple[Parameter, ...] = ()
    returns: str = ""
    doc: str = ""
    members: tuple[Member, ...] = ()
    source_file: str = ""


class Pong(msgspec.Struct, frozen=True):
    kernel: str
    busy: Annotated[int, msgspec.Meta(description="Commands running now.")]
    rss: Bytes = 0


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    uptime: Annotated[float, msgspec.Meta(description="Seconds.")]
    rss: Bytes
    cpu: Annotated[float, msgspec.Meta(description="Processor seconds used.")]
    threads: int
    commands: dict[str, int]
    """Counts since the start: received, running, succeeded, failed, cancelled."""
    dropped: dict[str, int]
    """Messages dropped since the start, by reason: malformed, unknown, late, failed."""
    sources: int
    connections: int
    cache: dict[str, int] = {}
    """Instances rebuilt from what was kept of them: hits and misses since the start, entries and bytes kept now."""


class Drained(msgspec.Struct, frozen=True):
    finished: Annotated[int, msgspec.Meta(description="Commands that were running when the drain began.")]


class Cancel(msgspec.Struct, frozen=True):
    command: int | str


class GiveCredit(msgspec.Struct, frozen=True):
    command: int | str
    credit: Credit


class Discovered(msgspec.Struct, frozen=True):
    document: dict[str, Any]


# -- kernel → host -----------------------------------------------------------


class SessionGet(Callback, frozen=True, kw_only=True):
    name: str


class VariableValue(msgspec.Struct, frozen=True):
    value: Value
    version: int


class SessionGetMany(Callback, frozen=True, kw_only=True):
    names: tuple[str, ...]


class VariableValues(msgspec.Struct, frozen=True):
    """Only those that exist."""

    values: dict[str, Value]


class SessionSet(Callback, frozen=True, kw_only=True):
    """`if_version`: only if the variable is still at that version; 0 if there must be none."""

    name: str
    value: Value
    if_version: Version | None = None


class Versioned(msgspec.Struct, frozen=True):
    version: int


class SessionDelete(Callback, frozen=True, kw_only=True):
    name: str
    if_version: Version | None = None


class SessionList(Callback, frozen=True, kw_only=True):
    pass


class Variables(msgspec.Struct, frozen=True):
    variables: tuple[VariableInfo, ...]


class InstanceFetch(Callback, frozen=True, kw_only=True):
    ref: str


class ToolCall(Callback, frozen=True, kw_only=True):
    """`args` are matched with the tool's parameters in order, before its schema is applied."""

    name: str
    args: tuple[Value, ...] = ()
    kwargs: dict[str, Value] = {}
    traceparent: Traceparent | None = None
    """The span of this very callback, beneath which the tool's belongs."""


class ToolList(Callback, frozen=True, kw_only=True):
    pass


class Tools(msgspec.Struct, frozen=True):
    tools: tuple[ToolInfo, ...]


class Progress(msgspec.Struct, frozen=True):
    """How far a command is: of `total` steps, if that is known."""

    command: int | str
    done: float
    total: float | None = None
    message: str = ""


class Chunk(msgspec.Struct, frozen=True):
    """The `seq`th value of a stream, counted from 0."""

    command: int | str
    seq: int
    value: Value


_RUN = (
    errors.RemoteError,
    errors.ToolError,
    errors.Cancelled,
    errors.DeadlineExceeded,
    errors.NotSerializable,
    errors.MalformedValue,
    errors.NotFound,
    errors.PolicyDenied,
    errors.Overloaded,
    errors.Draining,
    errors.LimitExceeded,
)

METHODS: Final[tuple[Method, ...]] = (
    Method(
        "bridge.attach",
        "host",
        "Say who the host is and learn who the kernel is: the data of comm_open, so it comes first and once.",
        Attach,
        Attached,
        (errors.ProtocolMismatch,),
    ),
    Method(
        "function.call",
        "host",
        "Call a function: importable in the kernel, or one whose source the session owns.",
        FunctionCall,
        ValueResult,
        (*_RUN, errors.SourceMissing),
    ),
    Method(
        "function.stream",
        "host",
        "Run a generator, synchronous or asynchronous; each value it yields is a command.chunk.",
        FunctionStream,
        Streamed,
        (*_RUN, errors.SourceMissing),
    ),
    Method(
        "instance.create",
        "host",
        "Make an object from its recipe, to see that it can be made and what state it starts from; then forget it.",
        InstanceCreate,
        InstanceCreated,
        _RUN,
    ),
    Method(
        "instance.call",
        "host",
        "Rebuild an object from its recipe and state, call one of its methods, hand back what changed.",
        InstanceCall,
        InstanceCalled,
        _RUN,
    ),
    Method(
        "object.inspect",
        "host",
        "Describe a function, class, module or instance, as data: signature, documentation, members.",
        ObjectInspect,
        Inspected,
        (*_RUN, errors.SourceMissing),
    ),
    Method(
        "kernel.ping",
        "host",
        "Answer at once, however busy: the heartbeat. It is no work, and emits no telemetry.",
        Command,
        Pong,
    ),
    Method("kernel.stats", "host", "What the kernel uses and has done.", Command, Stats),
    Method("kernel.drain", "host", "Take no more commands; answer when those running have ended.", Command, Drained),
    Method("rpc.discover", "host", "This document.", Command, Discovered),
    Method(
        "command.cancel",
        "host",
        "Stop a command. Asynchronous code is cancelled at once; synchronous code at its next line of Python. "
        "Sent on the control channel, so that it passes whatever waits on shell.",
        Cancel,
        None,
    ),
    Method("command.credit", "host", "Let a stream send this many more chunks.", GiveCredit, None),
    Method(
        "session.get",
        "kernel",
        "Read a variable of the command's session.",
        SessionGet,
        VariableValue,
        (errors.NotFound,),
    ),
    Method("session.get_many", "kernel", "Read several variables at once.", SessionGetMany, VariableValues),
    Method(
        "session.set",
        "kernel",
        "Write a variable of the command's session: seen by this command at once, by others when it has succeeded.",
        SessionSet,
        Versioned,
        (errors.MalformedValue, errors.InvalidValue, errors.QuotaExceeded, errors.Conflict),
    ),
    Method(
        "session.delete",
        "kernel",
        "Delete a variable: as with session.set, others see it when the command has succeeded.",
        SessionDelete,
        Nothing,
        (errors.NotFound, errors.Conflict),
    ),
    Method("session.list", "kernel", "Name the variables there are.", SessionList, Variables),
    Method("instance.fetch", "kernel", "The record of an instance.", InstanceFetch, InstanceRecord, (errors.NotFound,)),
    Method(
        "tool.call",
        "kernel",
        "Run a tool in the host; its arguments are checked against its schema first.",
        ToolCall,
        ValueResult,
        (errors.ToolError, errors.InvalidArguments, errors.NotFound, errors.DeadlineExceeded, errors.NotSerializable),
    ),
    Method("tool.list", "kernel", "Describe the tools there are.", ToolList, Tools),
    Method("command.progress", "kernel", "How far a command is.", Progress, None),
    Method("command.chunk", "kernel", "One value of a stream; at most as many as there was credit for.", Chunk, None),
)

COMMANDS: Final = {m.name: m for m in METHODS if m.side == "host" and m.result is not None}
"""Requests that a host sends."""
CALLBACKS: Final = {m.name: m for m in METHODS if m.side == "kernel" and m.result is not None}
"""Requests that a kernel sends while it runs a command."""
NOTIFICATIONS: Final = {m.name: m for m in METHODS if m.result is None}
"""What is sent without an answer, by either side."""
