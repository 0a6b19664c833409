"""Every telemetry event there is: its measurements with their units, its metadata, and who emits it.

The page docs/telemetry.md and the JSON Schema docs/telemetry.schema.json are made from `EVENTS`; the tests compare
what is emitted with it, both ways.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

if TYPE_CHECKING:
    from .telemetry import Event

__all__ = ("EVENTS", "EXECUTION", "EventType", "Measured", "Said", "from_kernel", "problem", "schema", "type_of_event")

Unit = Literal["ns", "ns since the epoch", "bytes", "count", "tokens", "USD", "1"]
Side = Literal["kernel", "host", "both"]


class Measured(msgspec.Struct, frozen=True):
    """A measurement. One that is `optional` may be missing."""

    unit: Unit
    says: str
    optional: bool = False


class Said(msgspec.Struct, frozen=True):
    """A member of the metadata: `kind` is its JSON type; `null` is allowed if `nullable`."""

    says: str
    kind: Literal["string", "integer", "boolean"] = "string"
    optional: bool = False
    nullable: bool = False


class EventType(msgspec.Struct, frozen=True):
    """One kind of event. With `open` there may be other measurements and metadata too: they are the user's own.

    A name that ends in `*` stands for any word in that place.
    """

    name: tuple[str, ...]
    side: Side
    says: str
    measurements: dict[str, Measured]
    metadata: dict[str, Said]
    open: bool = False


_TRACE: Final = {
    "trace_id": Said("W3C trace id, 32 hexadecimal digits."),
    "span_id": Said("This span's id, 16 hexadecimal digits."),
    "parent_span_id": Said("The span that this one is part of; null for the root.", nullable=True),
}
_SESSION: Final = {"session": Said("The session's id.")}
_KERNEL: Final = {"kernel": Said("The kernel's id.")}
_COMMAND: Final = {
    "command": Said("The method: `function.call`."),
    "subject": Said("What people call it: `dspy.ChainOfThought.__call__`."),
    **_SESSION,
}
EXECUTION: Final = {
    **_COMMAND,
    **_KERNEL,
    "attempt": Said("Which try this is, from 1.", "integer"),
    **_TRACE,
}
"""What every event of a command's run in a kernel says."""
_ERROR: Final = {"error": Said("The error's type: `bridge.KernelDied`, `ValueError`.")}
_REASON: Final = {"reason": Said("Why.")}
_PROCESS: Final = {**_KERNEL, "pid": Said("Its process.", "integer", nullable=True)}

_SYSTEM_TIME: Final = {"system_time": Measured("ns since the epoch", "When.")}
_DURATION: Final = {"duration": Measured("ns", "How long it took.")}


def _span(
    name: tuple[str, ...],
    side: Side,
    says: str,
    metadata: dict[str, Said],
    *,
    stop: dict[str, Measured] | None = None,
    started: dict[str, Said] | None = None,
    ended: dict[str, Said] | None = None,
    open: bool = False,
) -> tuple[EventType, ...]:
    """What has a duration: its start, and its stop or its exception. `started` and `ended` are only in those."""
    stop, ended = {**_DURATION, **(stop or {})}, ended or {}
    return (
        EventType((*name, "start"), side, f"{says} begins.", _SYSTEM_TIME, {**metadata, **(started or {})}, open),
        EventType((*name, "stop"), side, f"{says} has ended well.", stop, {**metadata, **ended}, open),
        EventType(
            (*name, "exception"), side, f"{says} has ended with an error.", stop, {**metadata, **ended, **_ERROR}, open
        ),
    )


def _one(
    name: tuple[str, ...],
    side: Side,
    says: str,
    measurements: dict[str, Measured],
    metadata: dict[str, Said],
    *,
    open: bool = False,
) -> tuple[EventType, ...]:
    return (EventType(name, side, says, measurements, metadata, open),)


def _optional(said: dict[str, Said]) -> dict[str, Said]:
    return {name: msgspec.structs.replace(one, optional=True) for name, one in said.items()}


_ARGUMENTS: Final = {"arguments": Said("The arguments, as JSON; only if captured.", optional=True)}
_RESULT: Final = {"result": Said("The result, as JSON; only if captured.", optional=True)}
_PROMPT: Final = {"prompt": Said("What the model was asked, as JSON; only if captured.", optional=True)}
_COMPLETION: Final = {"completion": Said("What the model answered, as JSON; only if captured.", optional=True)}

_OF_EXECUTION: Final = {
    "queue": Measured("ns", "From its arrival in the kernel until its code began.", optional=True),
    "callbacks": Measured("count", "Callbacks that it made.", optional=True),
    "bytes_in": Measured("bytes", "What came with it and with the replies to its callbacks.", optional=True),
    "bytes_out": Measured("bytes", "What it sent.", optional=True),
    "lm_calls": Measured("count", "Calls of language models, if there were any.", optional=True),
    "tokens": Measured("tokens", "Of those calls.", optional=True),
}
_OF_LM: Final = {
    "input_tokens": Measured("tokens", "Of the prompt.", optional=True),
    "output_tokens": Measured("tokens", "Of the completion.", optional=True),
    "tokens": Measured("tokens", "Both.", optional=True),
    "cost": Measured("USD", "What DSPy says that it cost.", optional=True),
    "first_token": Measured("ns", "Until the first token came, of a call that was streamed.", optional=True),
}
_SAVED: Final = {"saved": Measured("ns", "How long the command took when it was run.")}
_CACHED: Final = {**_COMMAND, **_optional(_TRACE)}

_ALL: Final = (
    *_span(
        ("bridge", "command"),
        "host",
        "A command, as the host that asked for it sees it: queue, all attempts and commit included,",
        {**_COMMAND, "command_id": Said("The host's own id of it."), **_TRACE},
        stop={"attempts": Measured("count", "How often it was tried; 0 if the cache had the result.")},
    ),
    *_span(
        ("bridge", "execution"),
        "both",
        "A command's run in a kernel; a run whose kernel died is ended by the host. It",
        EXECUTION,
        stop=_OF_EXECUTION,
        started=_ARGUMENTS,
        ended={
            "success": Said("Whether it ended well.", "boolean"),
            "error": Said("The error's type; null if there is none.", nullable=True),
            **_RESULT,
        },
    ),
    *_one(
        ("bridge", "execution", "progress"),
        "kernel",
        "A command says how far it is.",
        {
            "done": Measured("1", "Steps done, if it is a number.", optional=True),
            "total": Measured("1", "Of how many, if known.", optional=True),
        },
        {**EXECUTION, "message": Said("In words.", optional=True)},
    ),
    *_one(
        ("bridge", "execution", "retry"),
        "host",
        "A command whose kernel died is going to be run again.",
        {
            "attempt": Measured("count", "Which try comes next."),
            "recorded": Measured("count", "Callbacks that the journal will answer."),
        },
        {**_COMMAND, **_TRACE},
    ),
    *_span(
        ("bridge", "callback"),
        "kernel",
        "A callback, as the kernel sees it,",
        {**EXECUTION, "method": Said("`session.get`, `tool.call`, …"), "about": Said("Which variable or tool.")},
    ),
    *_span(
        ("bridge", "tool"),
        "host",
        "A tool's run in the host",
        {
            "tool": Said("Its name."),
            **_SESSION,
            "command_id": Said("For which command; missing for a cell.", optional=True),
            **_optional(_TRACE),
        },
        started=_ARGUMENTS,
        ended=_RESULT,
    ),
    *_span(
        ("bridge", "instance"),
        "kernel",
        "Making an instance from its recipe and state",
        {
            **EXECUTION,
            "action": Said("`create` or `rebuild`."),
            "class": Said("Its class."),
        },
        ended={"cache": Said("`hit`, `miss` or `off`: the kernel's cache of rebuilt instances.", optional=True)},
    ),
    *_span(
        ("bridge", "span"),
        "both",
        "A part that somebody measures with `span(name)`",
        {"name": Said("What they call it."), **_optional(EXECUTION), **_TRACE},
        open=True,
    ),
    *_one(("bridge", "user", "*"), "both", "An event of the user's own: `emit(name, …)`.", {}, {}, open=True),
    *_span(
        ("bridge", "dspy", "module"),
        "kernel",
        "A DSPy module's call",
        {**EXECUTION, "module": Said("Its class.")},
        open=False,
    ),
    *_span(
        ("bridge", "dspy", "lm"),
        "kernel",
        "A language model's call",
        {**EXECUTION, "model": Said("As the session names it: `openai/gpt-4.1`.")},
        stop=_OF_LM,
        started=_PROMPT,
        ended={
            "response_model": Said("As the provider names it.", optional=True),
            "cache_hit": Said("Whether DSPy's cache had the answer.", "boolean", optional=True),
            "streamed": Said("Whether it came in pieces.", "boolean", optional=True),
            **_COMPLETION,
        },
    ),
    *_span(
        ("bridge", "dspy", "adapter"),
        "kernel",
        "An adapter's work",
        {**EXECUTION, "adapter": Said("Its class."), "action": Said("`format` or `parse`.")},
    ),
    *_span(("bridge", "dspy", "tool"), "kernel", "A DSPy tool's call", {**EXECUTION, "tool": Said("Its name.")}),
    *_span(
        ("bridge", "dspy", "evaluate"),
        "kernel",
        "An evaluation",
        {**EXECUTION, "metric": Said("The metric's name.", optional=True)},
        stop={
            "score": Measured("1", "The overall score, as DSPy gives it.", optional=True),
            "examples": Measured("count", "How many examples there were.", optional=True),
        },
    ),
    *_span(
        ("bridge", "dspy", "optimizer"),
        "kernel",
        "An optimizer's `compile`",
        {**EXECUTION, "optimizer": Said("Its class.")},
    ),
    *_one(
        ("bridge", "dspy", "optimizer", "progress"),
        "kernel",
        "An optimizer has evaluated one more candidate.",
        {
            "candidate": Measured("count", "Which one, from 1."),
            "score": Measured("1", "Its score, if there is one.", optional=True),
            "best": Measured("1", "The best score so far, if there is one.", optional=True),
        },
        {**EXECUTION, "optimizer": Said("Its class.")},
    ),
    *_one(("bridge", "session", "start"), "host", "A session is made.", _SYSTEM_TIME, _SESSION),
    *_one(("bridge", "session", "stop"), "host", "A session is gone.", _SYSTEM_TIME, {**_SESSION, **_REASON}),
    *_one(
        ("bridge", "kernel", "start"),
        "host",
        "A kernel is ready.",
        {**_DURATION, **_SYSTEM_TIME},
        {
            **_PROCESS,
            "spare": Said("Whether it is kept ready for a death.", "boolean"),
            "deaths": Said("How many died in its place before.", "integer"),
        },
    ),
    *_one(
        ("bridge", "kernel", "stop"),
        "host",
        "A kernel has ended.",
        {
            "duration": Measured("ns", "How long it lived."),
            **_SYSTEM_TIME,
            "lost": Measured("count", "Commands that it took with it."),
        },
        {
            **_PROCESS,
            "exit_code": Said("Of its process.", "integer", optional=True, nullable=True),
            "expected": Said("Whether the host ended it.", "boolean"),
            **_REASON,
        },
    ),
    *_one(
        ("bridge", "kernel", "unresponsive"),
        "host",
        "A kernel does not answer its heartbeat.",
        {"silence": Measured("ns", "For how long."), "in_flight": Measured("count", "Commands that it runs.")},
        {**_PROCESS, **_REASON},
    ),
    *_one(
        ("bridge", "kernel", "memory"),
        "host",
        "What a kernel uses, with each heartbeat that it answers.",
        {
            "rss": Measured("bytes", "Its resident memory."),
            "in_flight": Measured("count", "Commands that it runs."),
            "round_trip": Measured("ns", "How long the heartbeat took."),
        },
        _PROCESS,
    ),
    *_one(
        ("bridge", "pool", "route"),
        "host",
        "A command gets its place in a kernel.",
        {
            "system_time": Measured("ns since the epoch", "When.", optional=True),
            "queue": Measured("ns", "How long it waited for that."),
            "candidates": Measured("count", "Kernels that could have taken it."),
            "expected": Measured("ns", "How long it is expected to take there."),
        },
        {
            **_KERNEL,
            "strategy": Said("`fastest`, `least_loaded`, …"),
            "subject": Said("What people call the command."),
            **_SESSION,
            **_optional(_TRACE),
        },
    ),
    *_one(
        ("bridge", "pool", "queue", "reject"),
        "host",
        "The queue is full: a command is refused.",
        {
            "waiting": Measured("count", "Commands in the queue."),
            "session_waiting": Measured("count", "Of this session."),
        },
        {**_SESSION, "subject": Said("What people call the command.")},
    ),
    *(
        event
        for state, says in (
            ("open", "A command that keeps failing is held back."),
            ("close", "It may run again."),
        )
        for event in _one(
            ("bridge", "pool", "breaker", state),
            "host",
            says,
            {
                "failures": Measured("count", "Failures in a row, or within the window."),
                "cooldown": Measured("ns", "For how long."),
            },
            {
                "subject": Said("What people call the command."),
                "kernel": Said('On which kernel; "": on all.'),
                **_REASON,
            },
        )
    ),
    *_one(
        ("bridge", "pool", "recycle"),
        "host",
        "A kernel is going to be replaced although it lives.",
        {
            "completed": Measured("count", "Commands that it ran."),
            "age": Measured("ns", "How long it has lived."),
            "rss": Measured("bytes", "Its resident memory."),
        },
        {**_PROCESS, **_REASON},
    ),
    *_one(
        ("bridge", "pool", "scale"),
        "host",
        "The number of kernels changes.",
        {"before": Measured("count", "Kernels wanted until now."), "wanted": Measured("count", "From now on.")},
        _REASON,
    ),
    *_one(
        ("bridge", "pool", "sweep"),
        "host",
        "Kernels that a dead host had left behind were killed.",
        {"killed": Measured("count", "How many.")},
        {"host": Said("The dead host's process.", "integer"), **_REASON},
    ),
    *_one(
        ("bridge", "journal", "replay"),
        "host",
        "The journal answers a callback of a command that runs again.",
        {"n": Measured("count", "Which callback of the command.")},
        {
            "method": Said("The callback's method."),
            "about": Said("Which variable or tool."),
            **_SESSION,
            "command_id": Said("The host's own id of the command."),
        },
    ),
    *_one(
        ("bridge", "cache", "hit"),
        "host",
        "A result is given from the cache: no kernel runs.",
        {**_SAVED, "age": Measured("ns", "How old it is.")},
        _CACHED,
    ),
    *_one(("bridge", "cache", "miss"), "host", "The cache has no result.", {}, _CACHED),
    *_one(
        ("bridge", "cache", "store"),
        "host",
        "A result is kept in the cache.",
        {"bytes": Measured("bytes", "What it takes."), **_SAVED},
        _CACHED,
    ),
    *_one(("bridge", "cache", "skip"), "host", "A result is not kept, although asked for.", {}, {**_CACHED, **_REASON}),
    *_one(
        ("bridge", "telemetry", "drop"),
        "host",
        "A command emitted more events at once than are kept.",
        {"events": Measured("count", "How many were dropped.")},
        {**EXECUTION},
    ),
    *_one(
        ("bridge", "telemetry", "detach"),
        "host",
        "A handler raised, and is not called any more.",
        {},
        {"handler": Said("Its id."), **_ERROR},
    ),
)

EVENTS: Final[dict[tuple[str, ...], EventType]] = {event.name: event for event in _ALL}


def type_of_event(name: tuple[str, ...]) -> EventType | None:
    """What the catalogue says of events of this name; None if it does not know them."""
    found = EVENTS.get(name)
    return found if found is not None or len(name) < 2 else EVENTS.get((*name[:-1], "*"))


_KINDS: Final[dict[str, tuple[type, ...]]] = {"string": (str,), "integer": (int,), "boolean": (bool,)}


def problem(event: Event) -> str | None:
    """In what an event is not as the catalogue says; None if it is."""
    known = type_of_event(event.name)
    if known is None:
        return f"{event.name} is not in the catalogue"
    for what, given, expected in (
        ("measurement", event.measurements, known.measurements),
        ("metadata", event.metadata, known.metadata),
    ):
        missing = [name for name, one in expected.items() if name not in given and not one.optional]
        more = [] if known.open else [name for name in given if name not in expected]
        if missing or more:
            return f"{event.name}: {what} {missing} missing, {more} not in the catalogue"
    for name, value in event.metadata.items():
        said = known.metadata.get(name)
        if said is not None and not (said.nullable and value is None) and type(value) not in _KINDS[said.kind]:
            return f"{event.name}: metadata {name!r} is {value!r}, no {said.kind}"
    return None


MAX_NUMBER: Final = 2**62
"""Of what a kernel measures: more is none of a clock's, nor of a counter's, and what adds it up may overflow."""


def from_kernel(event: Event) -> bool:
    """Whether a kernel, which may be anybody's, can have measured this: it has all that is counted of it.

    What a later kernel says beside that, events that are not in the catalogue too, is let through.
    """
    known = type_of_event(event.name)
    if known is None:
        return event.name[:1] == ("bridge",)
    if known.side == "host":
        return False
    lowest, kinds = _demands(known.name)
    given = event.measurements
    for name, low, optional in lowest:
        number = given.get(name)
        if number is None:
            if not optional:
                return False
        elif not low <= number <= MAX_NUMBER:
            return False
    metadata = event.metadata
    for name, allowed in kinds:  # noqa: SIM110 - for each event of each kernel: a generator takes twice as long
        if type(metadata.get(name, _MISSING)) not in allowed:
            return False
    return True


_MISSING: Final = object()


@functools.cache
def _demands(name: tuple[str, ...]) -> tuple[list[tuple[str, int, bool]], list[tuple[str, frozenset[type]]]]:
    """Of each measurement its least value and whether it may be missing; of each member of the metadata its types."""
    known = EVENTS[name]
    lowest = [(name, -MAX_NUMBER if m.unit == "1" else 0, m.optional) for name, m in known.measurements.items()]
    kinds = []
    for member, said in known.metadata.items():
        allowed = (
            {*_KINDS[said.kind]} | ({type(None)} if said.nullable else set()) | ({object} if said.optional else set())
        )
        kinds.append((member, frozenset(allowed)))
    return lowest, kinds


def schema() -> dict[str, Any]:
    """A JSON Schema (2020-12) of an event: one alternative for each kind."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Bridge telemetry event",
        "description": "One event, in the shape of Elixir's :telemetry.",
        "oneOf": [_schema_of(event) for event in EVENTS.values()],
    }


def _schema_of(event: EventType) -> dict[str, Any]:
    words = [{"type": "string"} if word == "*" else {"const": word} for word in event.name]
    measurements = {
        name: {"type": "number", "description": f"{one.says} Unit: {one.unit}."}
        for name, one in event.measurements.items()
    }
    metadata = {
        name: {"type": [one.kind, "null"] if one.nullable else one.kind, "description": one.says}
        for name, one in event.metadata.items()
    }
    return {
        "title": ".".join(event.name),
        "description": f"{event.says} Emitted by: {event.side}.",
        "type": "object",
        "required": ["name", "measurements", "metadata"],
        "properties": {
            "name": {"type": "array", "prefixItems": words, "items": False, "minItems": len(words)},
            "measurements": _object(measurements, event.measurements, closed=not event.open),
            "metadata": _object(metadata, event.metadata, closed=not event.open),
        },
    }


def _object(
    properties: dict[str, Any], members: dict[str, Measured] | dict[str, Said], *, closed: bool
) -> dict[str, Any]:
    required = [name for name, one in members.items() if not one.optional]
    made: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
    if closed:
        made["additionalProperties"] = False
    return made
