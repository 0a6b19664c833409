"""Export and import: sessions as the content of one file (`export_format`), and back.

Plain data in and out: the facts that make sessions. Stores, files' places and what to do about sessions that are
there already are the caller's business. Secrets are named and never exported.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import itertools
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bridge_kernel._version import __version__
from bridge_kernel.contract.errors import BridgeError, StoreDamaged
from bridge_kernel.contract.methods import LM
from bridge_kernel.contract.values import decode

from ..functions import FunctionSource
from ..values import Stored
from .export_format import (
    FORMAT,
    VERSION,
    Export,
    Function,
    Header,
    Instance,
    LanguageModel,
    Session,
    Value,
    Variable,
    Version,
)
from .facts import (
    FunctionPut,
    InstanceForgotten,
    InstancePut,
    InstanceState,
    SecretForgotten,
    SecretPut,
    SessionForgotten,
    SessionPut,
    TypePut,
    VariablePut,
)
from .types import VariableType

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .facts import Fact

__all__ = (
    "MAX_EXPORT_BYTES",
    "export_sessions",
    "facts_of",
    "read_export",
    "read_file",
    "write_file",
)

MAX_EXPORT_BYTES: Final = 2 << 30
"""A larger file is not read: it would take several times as much memory."""
_MAX_COUNT: Final = 2**63 - 1  # what a store can hold

# -- writing -------------------------------------------------------------------


class _Gathered:
    """One session, while its facts come in."""

    def __init__(self, put: SessionPut) -> None:
        self.put = put
        self.schemas: dict[str, bytes] = {}
        self.variables: dict[str, VariablePut] = {}
        self.instances: dict[str, InstanceState] = {}
        self.functions: dict[str, FunctionSource] = {}
        self.secrets: set[str] = set()

    def take(self, fact: Fact) -> None:
        match fact:
            case VariablePut():
                self.variables[fact.name] = fact
            case TypePut(schema=None):
                self.schemas.pop(fact.name, None)
            case TypePut(schema=bytes() as schema):
                self.schemas[fact.name] = schema
            case InstancePut():
                self.instances[fact.instance.ref] = fact.instance
            case InstanceForgotten():
                self.instances.pop(fact.ref, None)
            case FunctionPut():
                self.functions[fact.function.name] = fact.function
            case SecretPut():
                self.secrets.add(fact.name)
            case SecretForgotten():
                self.secrets.discard(fact.name)
            case _:
                pass  # the journal is this host's own


def export_sessions(
    facts: Iterable[Fact],
    *,
    now: float,
    histories: Mapping[str, Mapping[str, Sequence[VariablePut]]] | None = None,
    tools: Mapping[str, Iterable[str]] | None = None,
) -> bytes:
    """The file's content.

    `facts` make the sessions to export, as `Log.load` gives them: each session before what it owns. `histories` are
    `Log.histories` by session, or None to leave them out; `tools` the names of tools by session. `now` in seconds
    since the epoch.

    Raises:
        StoreDamaged: a value or a type is no JSON any more; says which.
    """
    sessions: dict[str, _Gathered] = {}
    for fact in facts:
        match fact:
            case SessionPut():
                if (known := sessions.get(fact.id)) is not None:
                    known.put = fact
                else:
                    sessions[fact.id] = _Gathered(fact)
            case SessionForgotten():
                sessions.pop(fact.id, None)
            case _:
                if (owner := sessions.get(getattr(fact, "session", ""))) is not None:
                    owner.take(fact)
    export = Export(
        format=FORMAT,
        version=VERSION,
        exported=datetime.fromtimestamp(now, UTC).isoformat(),
        bridge=__version__,
        sessions=tuple(
            _written(session, (histories or {}).get(id, {}), (tools or {}).get(id, ()))
            for id, session in sessions.items()
        ),
    )
    return msgspec.json.encode(export)


def _written(session: _Gathered, histories: Mapping[str, Sequence[VariablePut]], tools: Iterable[str]) -> Session:
    put = session.put
    lm = put.lm
    where = f"session {put.id[:60]!r}"
    return Session(
        id=put.id,
        created=put.created,
        ttl=put.ttl,
        version=put.version,
        lm=None if lm is None else LanguageModel(lm.model, lm.api_base, lm.adapter, lm.options),
        variables=tuple(
            _written_variable(name, session, histories.get(name, ()), f"{where}: variable {name[:60]!r}")
            for name in sorted(session.variables.keys() | session.schemas.keys())
        ),
        instances=tuple(
            _written_instance(it, f"{where}: instance {it.ref[:60]!r}") for it in session.instances.values()
        ),
        functions=tuple(
            Function(f.name, f.source, f.hash, f.lm, f.secrets, f.cache) for f in session.functions.values()
        ),
        secrets=tuple(sorted(session.secrets)),
        tools=tuple(sorted(tools)),
    )


def _written_variable(name: str, session: _Gathered, history: Sequence[VariablePut], where: str) -> Variable:
    current, schema = session.variables.get(name), session.schemas.get(name)
    return Variable(
        name=name,
        schema=None if schema is None else _sound(schema, f"{where}, its type"),
        current=None if current is None else _written_version(current, where),
        # Asked for a moment later than the facts, it may be ahead of them.
        history=tuple(
            _written_version(v, where) for v in history if current is not None and v.version < current.version
        ),
    )


def _written_version(put: VariablePut, where: str) -> Version:
    value = None if put.value is None else _written_value(put.value, f"{where}, version {put.version}")
    return Version(put.version, put.at, put.written, value, put.restores)


def _sound(json: bytes | msgspec.Raw, where: str) -> Any:
    # What it stands for is not made: that may need a library, or a class, that this host has not.
    try:
        return msgspec.json.decode(json)
    except (ValueError, RecursionError) as exc:
        raise StoreDamaged(
            f"{where}: what is stored is damaged: {exc}",
            remedy="Set or delete it, or restore the store from a copy, then export. Nothing was written.",
        ) from exc


def _written_value(stored: Stored, where: str) -> Value:
    _sound(stored.json, where)
    return Value(stored.type, stored.json, stored.buffers)


def _written_instance(it: InstanceState, where: str) -> Instance:
    return Instance(
        ref=it.ref,
        name=it.name,
        cls=it.cls,
        args=_written_value(it.args, f"{where}, args"),
        kwargs=_written_value(it.kwargs, f"{where}, kwargs"),
        adapter=it.adapter,  # type: ignore[arg-type]
        state=_written_value(it.state, f"{where}, state"),
        sha256=it.sha256,
        version=it.version,
        methods=it.methods,
        cache=it.cache,
    )


# -- reading -------------------------------------------------------------------


def read_export(content: bytes) -> Export:
    """What a file says, all of it checked: what this returns makes sessions.

    Raises:
        StoreDamaged: it is no export, is of a newer version, is damaged, or was altered: a function or a pickle is
            not what its digest says.
    """
    if len(content) > MAX_EXPORT_BYTES:
        raise StoreDamaged(
            f"an export of {len(content)} bytes is not read: the limit is {MAX_EXPORT_BYTES}",
            remedy="Export fewer sessions at once, or without their history.",
        )
    try:
        header = msgspec.json.decode(content, type=Header)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise _damaged(f"it is no export of sessions: {exc}") from None
    if header.format != FORMAT:
        raise _damaged(f"it is no export of sessions: its format is {header.format[:60]!r}, not {FORMAT!r}")
    if header.version != VERSION:
        raise StoreDamaged(
            f"the export has version {header.version}, this Bridge ({__version__}) reads version {VERSION}",
            remedy="Import it with the Bridge that wrote it, or a newer one: pip install --upgrade bridge-kernel.",
        )
    try:
        export = msgspec.json.decode(content, type=Export)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise _damaged(f"the export is damaged: {exc}") from None
    _check_distinct("session", [session.id for session in export.sessions])
    return msgspec.structs.replace(export, sessions=tuple(map(_checked, export.sessions)))


def _damaged(message: str) -> StoreDamaged:
    return StoreDamaged(message, remedy="Export it anew. Nothing was imported.")


def _check_distinct(kind: str, names: list[str]) -> None:
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _damaged(f"the export has the {kind} {twice[:60]!r} twice")


def _check_count(where: str, kind: str, count: int) -> None:
    if abs(count) > _MAX_COUNT:
        raise _damaged(f"{where}: {kind} is a number of more than 64 bits")


def _checked(session: Session) -> Session:
    where = f"session {session.id[:60]!r}"
    _check_count(where, "its version", session.version)
    _check_distinct(f"variable of {where}", [variable.name for variable in session.variables])
    _check_distinct(f"instance of {where}", [instance.ref for instance in session.instances])
    _check_distinct(f"name of an instance of {where}", [it.name for it in session.instances if it.name])
    _check_distinct(f"function of {where}", [function.name for function in session.functions])
    for function in session.functions:
        if not hmac.compare_digest(
            hashlib.sha256(function.source.encode()).hexdigest().encode(), function.sha256.encode()
        ):
            raise _damaged(f"{where}: the source of the function {function.name[:60]!r} is not what its digest says")
    return msgspec.structs.replace(
        session,
        variables=tuple(_checked_variable(variable, session.version, where) for variable in session.variables),
        instances=tuple(_checked_instance(instance, where) for instance in session.instances),
    )


def _checked_variable(variable: Variable, newest: int, where: str) -> Variable:
    where = f"{where}: variable {variable.name[:60]!r}"
    versions = [*variable.history, *([variable.current] if variable.current is not None else [])]
    if variable.history and variable.current is None:
        raise _damaged(f"{where} has a history and no current version")
    for version in versions:
        _check_count(where, "a version", version.version)
        _check_count(where, "the version that one brought back", version.restores or 0)
    for before, after in itertools.pairwise(versions):
        if before.version >= after.version or before.at > after.at:
            raise _damaged(f"{where}: version {after.version} comes after version {before.version}")
    if versions and versions[-1].at > newest:
        raise _damaged(f"{where} is of the session's version {versions[-1].at}, and the session is at {newest}")
    if variable.schema is not None:
        try:
            default = VariableType.of_schema(variable.schema).default
            if default is not None:
                default.read("default")
        except (ValueError, TypeError, BridgeError) as exc:
            raise _damaged(f"{where}: its type cannot be used: {exc}") from exc
    read = [_checked_version(version, where) for version in versions]
    current = read.pop() if read else None
    return msgspec.structs.replace(variable, current=current, history=tuple(read))


def _checked_version(version: Version, where: str) -> Version:
    if version.value is None:
        return version
    value = _checked_value(version.value, f"{where}, version {version.version}")[0]
    return msgspec.structs.replace(version, value=value)


def _checked_instance(instance: Instance, where: str) -> Instance:
    where = f"{where}: instance {instance.ref[:60]!r}"
    _check_count(where, "its version", instance.version)
    args, given = _checked_value(instance.args, f"{where}, args")
    kwargs, named = _checked_value(instance.kwargs, f"{where}, kwargs")
    state, value = _checked_value(instance.state, f"{where}, state")
    if type(given) is not list or type(named) is not dict or any(type(name) is not str for name in named):
        raise _damaged(f"{where}: its arguments are no list and no object")
    if instance.adapter == "pickle":
        found = hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else ""
        if not found or not hmac.compare_digest(found.encode(), (instance.sha256 or "").encode()):
            raise _damaged(f"{where}: its pickled state is not what its digest says")
    return msgspec.structs.replace(instance, args=args, kwargs=kwargs, state=state)


def _checked_value(value: Value, where: str) -> tuple[Value, Any]:
    """The value as this side writes its JSON, and what it reads as."""
    try:
        tree = msgspec.json.decode(value.json)
        read = decode(tree, value.buffers)
        text = msgspec.json.encode(tree)  # without the spaces of whoever wrote it
    except BridgeError as exc:
        raise StoreDamaged(f"{where}: {exc.message}", remedy=exc.remedy or None) from exc
    except (ValueError, TypeError, OverflowError, RecursionError) as exc:
        raise _damaged(f"{where}: {exc}") from exc
    return Value(value.type, msgspec.Raw(text), value.buffers), read


def facts_of(export: Export, *, now: float) -> list[list[Fact]]:
    """What makes the sessions: one batch for each, to be committed whole. They count as used `now`."""
    return [_facts(session, now) for session in export.sessions]


def _facts(session: Session, now: float) -> list[Fact]:
    id = session.id
    lm = session.lm
    put = SessionPut(
        id=id,
        created=session.created,
        used=now,
        ttl=session.ttl,
        version=session.version,
        lm=None if lm is None else LM(model=lm.model, api_base=lm.api_base, adapter=lm.adapter, options=lm.options),
    )
    facts: list[Fact] = [put]
    for variable in session.variables:
        if variable.schema is not None:
            facts.append(TypePut(id, variable.name, msgspec.json.encode(variable.schema)))
        for version in (*variable.history, *([variable.current] if variable.current is not None else [])):
            value = None if version.value is None else _stored(version.value)
            facts.append(
                VariablePut(id, variable.name, version.version, version.at, value, version.written, version.restores)
            )
    for instance in session.instances:
        state = InstanceState(
            ref=instance.ref,
            cls=instance.cls,
            args=_stored(instance.args),
            kwargs=_stored(instance.kwargs),
            adapter=instance.adapter,
            state=_stored(instance.state),
            sha256=instance.sha256,
            methods=instance.methods,
            version=instance.version,
            name=instance.name,
            cache=instance.cache,
        )
        facts.append(InstancePut(id, state))
    for f in session.functions:
        function = FunctionSource.make(f.name, f.source, lm=f.lm, secrets=f.secrets, cache=f.cache)
        facts.append(FunctionPut(id, function))
    return facts


def _stored(value: Value) -> Stored:
    return Stored.of(msgspec.json.encode(msgspec.json.decode(value.json)), value.buffers, value.type)


# -- files ---------------------------------------------------------------------


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Put an export on disk, whole or not at all: what was there before stays until all of it is. Mode 0600.

    Raises:
        OSError: it could not be written, `FileNotFoundError` if there is no such directory.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, "there is no such directory: make it first, or export to another", str(path.parent)
        )
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException as exc:
        with contextlib.suppress(OSError):  # there is none, or the first error says why it cannot be removed
            draft.unlink()
        if isinstance(exc, OSError) and exc.filename is not None:  # the draft's, which nobody asked for
            raise OSError(exc.errno, f"the export was not written: {exc.strerror}", str(path)) from exc
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The content of a file, for `read_export`; of one that is too large, as much as it takes to see it."""
    with open(path, "rb") as file:
        return file.read(MAX_EXPORT_BYTES + 1)
