"""What a host asks of a kernel, as data: enough to run a command once more, on another kernel or in another life.

A `Request` is what is journaled. `prepare` looks up, once, what it needs of its session; what that gives builds the
parameters of each attempt.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from bridge_kernel.contract.errors import InternalError
from bridge_kernel.contract.frames import UNDECODABLE
from bridge_kernel.contract.methods import (
    COMMANDS,
    FunctionCall,
    FunctionStream,
    InstanceCall,
    InstanceCreate,
    InstanceRecord,
    ObjectInspect,
    PathFunction,
    State,
)

from ..store.facts import InstanceState
from ..store.model import LM_KEY
from ..values import Stored, ValueWriter, store_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bridge_kernel.contract.frames import Buffer
    from bridge_kernel.contract.methods import LM
    from bridge_kernel.contract.telemetry import TelemetryOptions

    from ..client import Reply
    from ..functions import FunctionSource
    from ..store import SessionState
    from ..store.vault import Vault

__all__ = (
    "Arguments",
    "Attempt",
    "CallFunction",
    "CallMethod",
    "Create",
    "Inspect",
    "Prepared",
    "Request",
    "StreamFunction",
    "arguments",
    "decode_request",
    "prepare",
    "record_of",
    "result_of",
)

_encode: Final = msgspec.json.Encoder(order="deterministic").encode
_encode_as_given: Final = msgspec.json.Encoder().encode
_results: Final = {name: msgspec.json.Decoder(m.result) for name, m in COMMANDS.items()}


class Arguments(msgspec.Struct, frozen=True):
    """The arguments of a call, encoded: trees that share a list of buffers."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    buffers: tuple[bytes, ...] = ()


def arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> Arguments:
    """Raises `NotSerializable`. The buffers are views of the values' own memory: send them before they change."""
    writer = ValueWriter()
    written_args, written_kwargs = writer.write_all(args, kwargs)
    return Arguments(written_args, written_kwargs, tuple(writer.buffers))  # type: ignore[arg-type]


class CallFunction(msgspec.Struct, frozen=True, tag="function.call"):
    name: str
    given: Arguments
    secrets: tuple[str, ...] = ()


class StreamFunction(msgspec.Struct, frozen=True, tag="function.stream"):
    name: str
    given: Arguments
    secrets: tuple[str, ...] = ()
    credit: int = 16


class Create(msgspec.Struct, frozen=True, tag="instance.create"):
    ref: str
    cls: str
    args: Stored
    kwargs: Stored
    secrets: tuple[str, ...] = ()
    cache: float | None = None


class CallMethod(msgspec.Struct, frozen=True, tag="instance.call"):
    ref: str
    method: str
    given: Arguments
    secrets: tuple[str, ...] = ()


class Inspect(msgspec.Struct, frozen=True, tag="object.inspect"):
    """One of the two: a dotted name or the name of a function, or an instance."""

    name: str | None = None
    ref: str | None = None
    secrets: tuple[str, ...] = ()


Request = CallFunction | StreamFunction | Create | CallMethod | Inspect


_decode: Final[Callable[[bytes], Request]] = msgspec.json.Decoder(Request).decode


def decode_request(content: bytes) -> Request:
    """What `msgspec.json.encode` made of a request."""
    return _decode(content)


class Attempt(NamedTuple):
    """One try at a command: what its parameters say of the try, not of the command."""

    deadline: float | None  # ms left
    attempt: int
    traceparent: str
    with_source: bool
    telemetry: TelemetryOptions | None = None

    def common(self, session: str, secrets: dict[str, str]) -> dict[str, Any]:
        """What every command's parameters begin with."""
        return {
            "session": session,
            "deadline": self.deadline,
            "attempt": self.attempt,
            "traceparent": self.traceparent,
            "secrets": secrets,
            "telemetry": self.telemetry,
        }


def _no_changes(reply: Reply) -> Sequence[tuple[InstanceState, int]]:
    return ()


def _nothing_used() -> tuple[object, Sequence[Stored]]:
    return (), ()


class Prepared(NamedTuple):
    """A request with all that it needs of its session, looked up once: every attempt is the same command."""

    request: Request
    method: str
    subject: str
    build: Callable[[Attempt], tuple[msgspec.Struct, Sequence[Buffer]]]
    changes: Callable[[Reply], Sequence[tuple[InstanceState, int]]] = _no_changes
    """What a reply does to instances: each new state with the version that it was computed from."""
    source: FunctionSource | None = None
    secret: bool = False
    """Whether it carries secrets: what is kept of it on disk is sealed then."""
    cache: float | None = None
    """Seconds that its result may be given again."""
    used: Callable[[], tuple[object, Sequence[Stored]]] = _nothing_used
    """What of its session goes with it, secrets included: to be hashed, and never to be shown."""

    def result_key(self, vault: Vault) -> bytes:
        """The same for two commands that, if they read the same, have the same result.

        Other than in `digest` the order of a dict's members counts, which code sees; an instance is what it is made
        of, whatever its ref; and secrets and the language model count, but for its key.
        """
        request = self.request
        buffers: Sequence[Buffer] = ()
        if isinstance(request, CallMethod | CallFunction):
            given = request.given
            buffers = given.buffers
            bare = Arguments(given.args, given.kwargs)
            if isinstance(request, CallMethod):
                request = msgspec.structs.replace(request, ref="", given=bare)
            else:
                request = msgspec.structs.replace(request, given=bare)
        told, values = self.used()
        digest = hashlib.blake2b(_encode_as_given((self.method, request, told)), digest_size=32)
        for parts in (buffers, *((value.json, *value.buffers) for value in values)):
            digest.update(len(parts).to_bytes(8, "big"))
            for part in parts:
                view = memoryview(part)
                digest.update(view.nbytes.to_bytes(8, "big"))
                digest.update(view)
        return vault.fingerprint(digest.digest()) if self.secret else digest.digest()

    def fingerprint(self, vault: Vault) -> bytes:
        """As `digest`, to be kept: if it carries secrets, nobody can guess from it what was asked."""
        return vault.fingerprint(self.digest()) if self.secret else self.digest()

    def digest(self) -> bytes:
        """The same for two commands that ask the same."""
        request = msgspec.structs.replace(self.request, ref="") if isinstance(self.request, Create) else self.request
        source = "" if self.source is None else self.source.hash
        return hashlib.blake2b(_encode((request, source)), digest_size=16).digest()


def prepare(request: Request, session: SessionState, vault: Vault) -> Prepared:
    """Raises `NotFound` if it names a secret or an instance that is not there, `SecretUnreadable`."""
    match request:
        case CallFunction() | StreamFunction():
            return _function(request, session, vault)
        case Create():
            return _create(request, session, vault)
        case CallMethod():
            return _method(request, session, vault)
        case Inspect():
            return _inspect(request, session, vault)


def _secrets(names: Sequence[str], session: SessionState, vault: Vault) -> dict[str, str]:
    return {name: vault.unseal(session.secret(name)).decode() for name in names}


def _lm(session: SessionState, vault: Vault) -> LM | None:
    if session.lm is None or (sealed := session.secrets.get(LM_KEY)) is None:
        return session.lm
    return msgspec.structs.replace(session.lm, api_key=vault.unseal(sealed).decode())


def _without_key(lm: LM | None) -> LM | None:
    return None if lm is None else msgspec.structs.replace(lm, api_key=None)


def _function(request: CallFunction | StreamFunction, session: SessionState, vault: Vault) -> Prepared:
    name, given = request.name, request.given
    source = session.functions.get(name)
    wanted = request.secrets if source is None else (*source.secrets, *request.secrets)
    secrets = _secrets(wanted, session, vault) if wanted else {}
    lm = _lm(session, vault) if name.startswith("dspy.") or (source is not None and source.lm) else None

    def build(attempt: Attempt) -> tuple[msgspec.Struct, Sequence[Buffer]]:
        function = PathFunction(name) if source is None else source.ref(with_source=attempt.with_source)
        common = attempt.common(session.id, secrets)
        common |= {"function": function, "args": given.args, "kwargs": given.kwargs, "lm": lm}
        if isinstance(request, StreamFunction):
            return FunctionStream(**common, credit=request.credit), given.buffers
        return FunctionCall(**common), given.buffers

    def used() -> tuple[object, Sequence[Stored]]:
        return ("" if source is None else source.hash, _without_key(lm), sorted(secrets.items())), ()

    method = "function.call" if isinstance(request, CallFunction) else "function.stream"
    secret = bool(secrets) or (lm is not None and lm.api_key is not None)
    cache = None if source is None else source.cache
    return Prepared(request, method, name, build, source=source, secret=secret, cache=cache, used=used)


def _create(request: Create, session: SessionState, vault: Vault) -> Prepared:
    secrets = _secrets(request.secrets, session, vault)

    def build(attempt: Attempt) -> tuple[msgspec.Struct, Sequence[Buffer]]:
        writer = ValueWriter()
        written = writer.write_all(request.args.read("args"), request.kwargs.read("kwargs"))
        record = InstanceRecord(request.ref, request.cls, *written)
        return InstanceCreate(**attempt.common(session.id, secrets), record=record), writer.buffers

    def changes(reply: Reply) -> Sequence[tuple[InstanceState, int]]:
        created = result_of("instance.create", reply)
        made = InstanceState(
            ref=request.ref,
            cls=request.cls,
            args=request.args,
            kwargs=request.kwargs,
            adapter=created.state.adapter,
            state=store_tree(created.state.value, reply.buffers, "state"),
            sha256=created.state.sha256,
            methods=created.methods,
            cache=request.cache,
        )
        return [(made, 0)]

    return Prepared(request, "instance.create", f"{request.cls}()", build, changes, secret=bool(secrets))


def _method(request: CallMethod, session: SessionState, vault: Vault) -> Prepared:
    instance = session.instance(request.ref)
    given = request.given
    secrets = _secrets(request.secrets, session, vault)
    lm = _lm(session, vault) if instance.adapter == "dspy" else None

    def build(attempt: Attempt) -> tuple[msgspec.Struct, Sequence[Buffer]]:
        writer = ValueWriter(given.buffers)
        params = InstanceCall(
            **attempt.common(session.id, secrets),
            record=record_of(instance, writer),
            method=request.method,
            args=given.args,
            kwargs=given.kwargs,
            lm=lm,
        )
        return params, writer.buffers

    def changes(reply: Reply) -> Sequence[tuple[InstanceState, int]]:
        called = result_of("instance.call", reply)
        if called.state is None:
            return ()
        changed = msgspec.structs.replace(
            instance,
            adapter=called.state.adapter,
            state=store_tree(called.state.value, reply.buffers, "state"),
            sha256=called.state.sha256,
            version=instance.version + 1,
        )
        return [(changed, instance.version)]

    def used() -> tuple[object, Sequence[Stored]]:
        told = (instance.cls, instance.adapter, instance.sha256, _without_key(lm), sorted(secrets.items()))
        return told, (instance.args, instance.kwargs, instance.state)

    secret = bool(secrets) or (lm is not None and lm.api_key is not None)
    subject = f"{instance.cls}.{request.method}"
    return Prepared(request, "instance.call", subject, build, changes, secret=secret, cache=instance.cache, used=used)


def _inspect(request: Inspect, session: SessionState, vault: Vault) -> Prepared:
    instance = session.instance(request.ref) if request.ref is not None else None
    source = session.functions.get(request.name) if request.name is not None else None

    def build(attempt: Attempt) -> tuple[msgspec.Struct, Sequence[Buffer]]:
        writer = ValueWriter()
        params = ObjectInspect(
            **attempt.common(session.id, {}),
            path=request.name if source is None else None,
            function=source.ref(with_source=True) if source is not None else None,
            record=record_of(instance, writer) if instance is not None else None,
        )
        return params, writer.buffers

    return Prepared(request, "object.inspect", "object.inspect", build)


def record_of(instance: InstanceState, writer: ValueWriter) -> InstanceRecord:
    """An instance as a kernel is told of it; its values are written into `writer`'s message."""
    args = [writer.write(value, f"args[{i}]") for i, value in enumerate(instance.args.read("args"))]
    kwargs = {name: writer.write(value, name) for name, value in instance.kwargs.read("kwargs").items()}
    state = State(
        instance.adapter,  # type: ignore[arg-type]
        writer.write(instance.state.read("state"), "state"),
        instance.sha256,
    )
    return InstanceRecord(instance.ref, instance.cls, tuple(args), kwargs, state, instance.version)


def result_of(method: str, reply: Reply) -> Any:
    """A command's result, decoded; its values are still trees."""
    try:
        return _results[method].decode(reply.result)
    except UNDECODABLE as exc:
        raise InternalError(f"the kernel's answer to {method} does not fit the contract: {exc}") from exc
