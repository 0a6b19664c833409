"""`SessionState`: one session as a host owns it, in memory, every change of it recorded in the log first."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import msgspec

from bridge_kernel.contract.errors import Conflict, NotFound, QuotaExceeded
from bridge_kernel.contract.methods import LM, VariableInfo

from .facts import (
    CommandForgotten,
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
from .model import LM_KEY, Change, Commit, Finished, SessionInfo, Variable, Write, check_name
from .types import VariableType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from bridge_kernel.contract.telemetry import Capture

    from ..functions import FunctionSource
    from ..tools import Tool
    from ..values import Stored
    from .facts import CommandBegun, CommandEnded, Fact
    from .log import Log
    from .model import Quota, Unfinished

__all__ = ("SessionState",)


class SessionState:
    """One session. Each method is atomic; any thread may call it. What changes it returns the number to wait for."""

    def __init__(self, put: SessionPut, log: Log, quota: Quota, clock: Callable[[], float]) -> None:
        self.id = put.id
        self.created = put.created
        self.used = put.used
        self.ttl = put.ttl
        self.version = put.version
        self.lm: LM | None = put.lm
        self.tools: dict[str, Tool] = {}
        self.functions: dict[str, FunctionSource] = {}
        self.instances: dict[str, InstanceState] = {}
        self.secrets: dict[str, bytes] = {}  # sealed
        self.types: dict[str, VariableType] = {}
        self.finished: dict[str, Finished] = {}
        """By idempotency key: what succeeded. Like `unfinished` for others to read only, and changed under the lock."""
        self.unfinished: dict[str, Unfinished] = {}
        """By its id, each command that was running when its host ended, or that lost its kernels."""
        self.capture: frozenset[Capture] = frozenset()
        """What telemetry may hold of its values: of this life only."""
        self.busy = 0  # commands that run: a session at work does not expire
        self.bytes = 0
        self.on_change: Callable[[int, list[Change]], object] | None = None
        self._gone = ""  # why, once it was deleted or has expired
        self._log = log
        self._quota = quota
        self._clock = clock
        self._variables: dict[str, Variable] = {}
        self._deleted: dict[str, int] = {}  # the last version of variables that are no more
        self._lock = threading.RLock()

    # -- its life ----------------------------------------------------------------

    def touch(self) -> None:
        """It is used: its time to live begins anew. Raises `NotFound` if it is gone."""
        if self._gone:
            raise self._is_gone()
        if self.ttl is not None:
            now = self._clock()
            if not self.busy and now >= self.used + self.ttl:
                raise NotFound(
                    f"session {self.id!r} has expired: it was not used for {self.ttl:g} s",
                    remedy="Open it anew: host.session(id, ttl=…).",
                )
            self.used = now

    def expired(self, now: float) -> bool:
        return self.expires is not None and not self.busy and now >= self.expires

    def _is_gone(self) -> NotFound:
        return NotFound(f"session {self.id!r} {self._gone}", remedy="Open it anew: host.session(id).")

    @property
    def deleted(self) -> bool:
        return bool(self._gone)

    @property
    def expires(self) -> float | None:
        """When it will be gone unless it is used, in seconds since the epoch."""
        return None if self.ttl is None else self.used + self.ttl

    def set_ttl(self, ttl: float | None) -> int:
        """Seconds that it may be unused; None: for ever."""
        if ttl is not None and not ttl > 0:
            raise ValueError(f"a time to live is how many seconds there are, more than 0, not {ttl!r}")
        with self._lock:
            self.touch()
            number = self._log.append([self._put(ttl=ttl, used=self._clock())])
            self.ttl, self.used = ttl, self._clock()
            return number

    def save_use(self) -> int:
        """Record when it was last used."""
        with self._lock:
            return 0 if self._gone else self._log.append([self._put()])

    def expire(self, now: float) -> bool:
        """Let go of all it owns if it has expired; whether it had."""
        with self._lock:
            if not self.expired(now):
                return False
            self.forget("has expired")
            return True

    def forget(self, why: str = "was deleted") -> int:
        """Let go of all it owns."""
        with self._lock:
            if self._gone:
                return 0
            number = self._log.append([SessionForgotten(self.id)])
            self._gone = why
            owned: tuple[dict[str, Any], ...] = (
                self._variables, self._deleted, self.tools, self.functions, self.instances, self.secrets, self.types,
                self.finished, self.unfinished,
            )  # fmt: skip
            for kind in owned:
                kind.clear()
            self.lm = None
            self.bytes = 0
            return number

    def describe(self) -> SessionInfo:
        with self._lock:
            return SessionInfo(
                id=self.id,
                version=self.version,
                created=self.created,
                used=self.used,
                ttl=self.ttl,
                expires=self.expires,
                variables=len(self._variables),
                instances=len(self.instances),
                functions=len(self.functions),
                tools=len(self.tools),
                secrets=len(self.secrets),
                bytes=self.bytes,
            )

    def facts(self) -> list[Fact]:
        """What would make it: as `Log.load` gives it, with no journal."""
        with self._lock:
            self.touch()
            return [
                self._put(),
                *[
                    VariablePut(self.id, name, v.version, v.at, v.value, v.written, v.restores)
                    for name, v in self._variables.items()
                ],
                *[TypePut(self.id, name, kind.json) for name, kind in self.types.items()],
                *[InstancePut(self.id, instance) for instance in self.instances.values()],
                *[FunctionPut(self.id, function) for function in self.functions.values()],
                *[SecretPut(self.id, name, sealed) for name, sealed in self.secrets.items()],
            ]

    def _put(self, **changed: Any) -> SessionPut:
        now = {"used": self.used, "ttl": self.ttl, "version": self.version, "lm": self.lm, **changed}
        return SessionPut(self.id, self.created, **now)

    # -- variables ---------------------------------------------------------------

    def get(self, name: str) -> Variable:
        """Raises `NotFound`, naming what there is."""
        if self.ttl is not None or self._gone:
            self.touch()
        try:
            return self._variables[name]
        except KeyError:
            raise self._missing("variable", name, self._variables) from None

    def get_many(self, names: Sequence[str]) -> dict[str, Variable]:
        """Those that exist, as they were at one moment."""
        with self._lock:
            self.touch()
            return {name: self._variables[name] for name in names if name in self._variables}

    def version_of(self, name: str) -> int:
        """How often a variable was written, deletions included; 0 if never."""
        known = self._variables.get(name)
        return known.version if known is not None else self._deleted.get(name, 0)

    def names(self) -> list[str]:
        with self._lock:
            self.touch()
            return sorted(self._variables)

    def variables(self) -> tuple[VariableInfo, ...]:
        """Name, version, type and size of every variable, by name."""
        with self._lock:
            self.touch()
            known = sorted(self._variables.items())
        return tuple(VariableInfo(name, v.version, v.value.type, v.value.size) for name, v in known)

    def check(self, name: str, value: Stored) -> None:
        """Raise `InvalidValue` unless the value fits the variable's type, if it has one."""
        kind = self.types.get(name)
        if kind is not None:
            kind.check(name, value)

    def define(self, name: str, kind: VariableType | None) -> int:
        """Give a variable a type, or take it away. Its default is written if there is no value yet.

        Raises:
            InvalidValue: the value that is there does not fit.
        """
        check_name("variable", name)
        with self._lock:
            self.touch()
            facts: list[Fact] = []
            writes = {}
            if kind is not None:
                if (known := self._variables.get(name)) is not None:
                    kind.check(name, known.value)
                elif kind.default is not None:
                    writes[name] = Write(kind.default)
            schema = None if kind is None else kind.json
            facts.append(TypePut(self.id, name, schema))
            number = self.commit(writes, facts=facts, checked=True).number
            if kind is None:
                self.types.pop(name, None)
            else:
                self.types[name] = kind
            return number

    def set(self, name: str, value: Stored, if_version: int | None = None) -> Commit:
        """Write one variable. Raises as `commit` does."""
        return self.commit({check_name("variable", name): Write(value, if_version)})

    def delete(self, name: str, if_version: int | None = None) -> Commit:
        """Raises `NotFound`."""
        with self._lock:
            self.get(name)
            return self.commit({name: Write(None, if_version)})

    # -- commits -----------------------------------------------------------------

    def commit(
        self,
        writes: Mapping[str, Write],
        *,
        instances: Sequence[tuple[InstanceState, int]] = (),
        facts: Sequence[Fact] = (),
        finished: tuple[CommandBegun, CommandEnded] | None = None,
        checked: bool = False,
    ) -> Commit:
        """Write variables and instances in one go: all of it or, if it raises, nothing.

        `instances` come with the version that each was computed from, 0 for a new one. `facts` are recorded with it.
        `finished` is a command with an idempotency key that has succeeded: its end is recorded, and known from then on.
        `checked` says that the values are known to fit their variables' types.

        Raises:
            Conflict: a variable is not at the version that was asked for, an instance was changed meanwhile, or a new
                one has another's name.
            InvalidValue: a value does not fit its variable's type.
            QuotaExceeded: the session would hold too much.
            StoreFailed: the store cannot be written any more.
            NotFound: the session is gone, or the instance is.
        """
        with self._lock:
            self.touch()
            growth, more, new = 0, 0, 0
            if finished is not None:
                growth += self._growth_by(_kept(*finished, 0))
                facts = [*facts, finished[1]]
            versions: dict[str, int] = {}
            puts: list[Fact] = []
            changes: list[Change] = []
            now = self._clock()
            version = self.version + 1 if writes or instances else self.version
            for name, write in writes.items():
                known = self._variables.get(name)
                self.check_version(name, write.if_version)
                if write.value is None and known is None:
                    versions[name] = self.version_of(name)
                    continue  # deleted twice, or made and deleted by the same command
                if write.value is not None and not checked:
                    self.check(name, write.value)
                growth += (write.value.size if write.value else 0) - (known.value.size if known else 0)
                more += (write.value is not None) - (known is not None)
                new += known is None and name not in self._deleted
                number = versions[name] = self.version_of(name) + 1
                puts.append(VariablePut(self.id, name, number, version, write.value, now, write.restores))
                changes.append(Change(self.id, name, number, write.value, known.value if known else None))
            for instance, read in instances:
                was = self._instance_at(instance, read)
                if was is None:
                    self._check_unnamed(instance)
                growth += instance.size - (was.size if was is not None else 0)
                more += was is None
                # Named meanwhile, perhaps, or cached: that is no change of its state.
                named = instance if was is None else msgspec.structs.replace(instance, name=was.name, cache=was.cache)
                puts.append(InstancePut(self.id, named))
            self.check_quota(more, growth, new=new)
            if version != self.version:
                puts.insert(0, self._put(version=version))
            batch = self._log.append([*puts, *facts]) if puts or facts else 0
            for fact in puts:
                self.apply(fact)
            self.version = version
            if finished is not None:
                self.keep_finished(*finished, batch)
            if changes and self.on_change is not None:
                self.on_change(batch, changes)
            return Commit(batch, version, versions)

    def check_version(self, name: str, if_version: int | None) -> None:
        """Raise `Conflict` unless the variable is at that version; None asks for none."""
        if if_version is not None and (at := self.version_of(name) if name in self._variables else 0) != if_version:
            raise Conflict(
                f"variable {name!r} is at version {at}, not {if_version}: it was written meanwhile",
                remedy="Read it again, and compute from that.",
            )

    def _instance_at(self, instance: InstanceState, read: int) -> InstanceState | None:
        if not read:
            return None
        known = self.instance(instance.ref)
        if known.version != read:
            raise Conflict(
                f"{known.cls} {known.ref} was changed by another call (version {read} → {known.version}) while this one "
                "ran"
            )
        return known

    def check_size(self) -> None:
        """Raise `QuotaExceeded` if it holds more than it may: an imported one."""
        self.check_quota(0, 0, whole=True)

    def check_quota(self, more: int, growth: int, *, new: int = 0, whole: bool = False) -> None:
        """Raise `QuotaExceeded` if it could not hold so many things and bytes more, and variables of names never used."""
        count = len(self._variables) + len(self.instances) + len(self.functions) + len(self.secrets) + more
        if (more > 0 or whole) and count > self._quota.count:
            raise QuotaExceeded(f"session {self.id!r} would hold {count} things, and may hold {self._quota.count}")
        if new > 0 and len(self._deleted) >= self._quota.count:
            raise QuotaExceeded(
                f"session {self.id!r} keeps the versions of {len(self._deleted)} deleted variables, as many as it may",
                remedy="Use their names again, rather than new ones; or go on in a new session.",
            )
        if (growth > 0 or whole) and self.bytes + growth > self._quota.bytes:
            raise QuotaExceeded(
                f"session {self.id!r} would hold {self.bytes + growth:,} bytes, and may hold {self._quota.bytes:,}"
            )

    def apply(self, fact: Fact) -> None:
        """Make memory what a fact says: at its commit, and when a store is opened."""
        match fact:
            case VariablePut():
                known = self._variables.get(fact.name)
                self.bytes -= known.value.size if known is not None else 0
                if fact.value is None:
                    self._variables.pop(fact.name, None)
                    self._deleted[fact.name] = fact.version
                else:
                    self._variables[fact.name] = Variable(
                        fact.value, fact.version, fact.restores, fact.at, fact.written
                    )
                    self._deleted.pop(fact.name, None)
                    self.bytes += fact.value.size
            case InstancePut():
                before = self.instances.get(fact.instance.ref)
                self.bytes += fact.instance.size - (before.size if before is not None else 0)
                self.instances[fact.instance.ref] = fact.instance
            case InstanceForgotten():
                self.bytes -= self.instances.pop(fact.ref).size
            case FunctionPut():
                old = self.functions.get(fact.function.name)
                self.bytes += len(fact.function.source) - (len(old.source) if old is not None else 0)
                self.functions[fact.function.name] = fact.function
            case SecretPut():
                self.secrets[fact.name] = fact.sealed
            case SecretForgotten():
                self.secrets.pop(fact.name, None)
            case TypePut():
                if fact.schema is None:
                    self.types.pop(fact.name, None)
                else:
                    self.types[fact.name] = VariableType.of_schema(msgspec.json.decode(fact.schema))
            case SessionPut():
                self.used, self.ttl, self.version, self.lm = fact.used, fact.ttl, fact.version, fact.lm

    def _record(self, fact: Fact) -> int:
        """One fact that is no variable and no change of an instance's state."""
        with self._lock:
            self.touch()
            number = self._log.append([fact])
            self.apply(fact)
            return number

    # -- tools, functions, instances, secrets ----------------------------------------

    def tool(self, name: str) -> Tool:
        try:
            return self.tools[name]
        except KeyError:
            raise self._missing("tool", name, self.tools) from None

    def put_function(self, function: FunctionSource) -> int:
        with self._lock:
            known = self.functions.get(function.name)
            self.check_quota(known is None, len(function.source) - (len(known.source) if known is not None else 0))
            return self._record(FunctionPut(self.id, function))

    def cache_function(self, name: str, seconds: float | None) -> int:
        """Seconds that a result may be given again; None: not at all. Raises `NotFound`."""
        with self._lock:
            known = self.functions.get(name)
            if known is None:
                raise self._missing("function", name, self.functions)
            return self._record(FunctionPut(self.id, msgspec.structs.replace(known, cache=seconds)))

    def put_secret(self, name: str, sealed: bytes) -> int:
        with self._lock:
            self.check_quota(name not in self.secrets, 0)
            return self._record(SecretPut(self.id, name, sealed))

    def secret(self, name: str) -> bytes:
        """Sealed. Raises `NotFound`."""
        try:
            return self.secrets[name]
        except KeyError:
            raise self._missing("secret", name, [n for n in self.secrets if n != LM_KEY]) from None

    def forget_secret(self, name: str) -> int:
        with self._lock:
            self.secret(name)
            return self._record(SecretForgotten(self.id, name))

    def put_lm(self, lm: LM, sealed_key: bytes | None) -> int:
        """`lm` without its key, which comes sealed."""
        with self._lock:
            self.touch()
            key = SecretPut(self.id, LM_KEY, sealed_key) if sealed_key else SecretForgotten(self.id, LM_KEY)
            facts: list[Fact] = [self._put(lm=lm), key]
            number = self._log.append(facts)
            for fact in facts:
                self.apply(fact)
            return number

    def instance(self, ref: str) -> InstanceState:
        try:
            return self.instances[ref]
        except KeyError:
            raise self._missing("instance", ref, self.instances) from None

    def find_instance(self, ref_or_name: str) -> InstanceState:
        """By its ref or by its name."""
        with self._lock:
            found = self.instances.get(ref_or_name)
            named = [i for i in self.instances.values() if i.name == ref_or_name]
        if found is None and not named:
            names = {i.name or i.ref: i for i in self.instances.values()}
            raise self._missing("instance", ref_or_name, names)
        return found if found is not None else named[0]

    def put_instance(self, instance: InstanceState) -> Commit:
        """A new one. Raises `Conflict` if another instance has its name."""
        return self.commit({}, instances=[(instance, 0)])

    def name_instance(self, ref: str, name: str) -> int:
        """Raises `Conflict` if another instance has that name."""
        with self._lock:
            known = self.instance(ref)
            named = msgspec.structs.replace(known, name=name)
            self._check_unnamed(named)
            return self._record(InstancePut(self.id, named))

    def cache_instance(self, ref: str, seconds: float | None) -> int:
        """As `cache_function`, for an instance's methods."""
        with self._lock:
            known = self.instance(ref)
            return self._record(InstancePut(self.id, msgspec.structs.replace(known, cache=seconds)))

    def _check_unnamed(self, instance: InstanceState) -> None:
        """Raise `Conflict` if another instance has its name."""
        name, ref = instance.name, instance.ref
        if name and any(i.name == name and i.ref != ref for i in self.instances.values()):
            raise Conflict(f"another instance of session {self.id!r} is called {name!r}", remedy="Rename that first.")

    def forget_instance(self, ref: str) -> int:
        with self._lock:
            self.instance(ref)
            return self._record(InstanceForgotten(self.id, ref))

    # -- commands ----------------------------------------------------------------

    def keep_finished(self, begun: CommandBegun, ended: CommandEnded, number: int) -> None:
        """What the log knows to have succeeded, its end in batch `number` (0: on disk)."""
        assert begun.key is not None
        with self._lock:
            finished = _kept(begun, ended, number)
            self.bytes += self._growth_by(finished)
            self.finished.pop(begun.key, None)  # in the order in which they ended
            self.finished[begun.key] = finished

    def _growth_by(self, finished: Finished) -> int:
        known = self.finished.get(finished.begun.key or "")
        return finished.size - (known.size if known is not None else 0)

    def forget_keys(self, before: float) -> int:
        """Forget the results of commands that ended before that time, in seconds since the epoch."""
        with self._lock:
            old = []
            for key, finished in self.finished.items():
                if finished.ended.ended >= before:
                    break
                old.append(key)
            if not old:
                return 0
            number = self._log.append([CommandForgotten(self.finished[key].begun.id) for key in old])
            for key in old:
                self.bytes -= self.finished.pop(key).size
            return number

    def add_unfinished(self, unfinished: Unfinished) -> bool:
        """Whether it was added: not if the session is gone."""
        with self._lock:
            if not self._gone:
                self.unfinished[unfinished.begun.id] = unfinished
            return not self._gone

    def remove_unfinished(self, id: str) -> None:
        with self._lock:
            self.unfinished.pop(id, None)

    def unfinished_commands(self) -> list[Unfinished]:
        with self._lock:
            return list(self.unfinished.values())

    # -- history -----------------------------------------------------------------

    def history(self, name: str) -> list[VariablePut]:
        """The kept versions of a variable, oldest first. Raises `NotFound` if there never was one."""
        self.touch()
        versions = self._log.history(self.id, name)
        if not versions:
            raise self._missing("variable", name, self._variables)
        return versions

    def at(self, version: int) -> dict[str, VariablePut]:
        """The variables as they were after the session's commit `version`.

        Raises:
            NotFound: there was no such commit, or its values are not kept any more.
        """
        self.touch()
        if not 0 <= version <= self.version:
            raise NotFound(
                f"session {self.id!r} has no version {version}",
                remedy=f"There are 0 to {self.version}: each commit is one.",
            )
        found: dict[str, VariablePut] = {}
        for name, versions in self._log.histories(self.id).items():
            past = [put for put in versions if put.at <= version]
            if past:
                if past[-1].value is not None:
                    found[name] = past[-1]
            elif versions[0].version > 1:
                raise NotFound(
                    f"version {version} of session {self.id!r} is not kept any more: {name!r} was written too often since",
                    remedy=f"Its oldest kept version is of commit {versions[0].at}.",
                )
        return found

    def _missing(self, kind: str, name: str, known: Mapping[str, Any] | Iterable[str]) -> NotFound:
        if self._gone:
            return self._is_gone()
        there = ", ".join(sorted(known)[:20]) or "none"
        return NotFound(f"session {self.id!r} has no {kind} {name!r}", remedy=f"There is: {there}.")


def _kept(begun: CommandBegun, ended: CommandEnded, number: int) -> Finished:
    """What is kept of a finished command: of its request, only what says which instance it made."""
    if begun.method != "instance.create" and begun.request:
        begun = msgspec.structs.replace(begun, request=b"")
    return Finished(begun, ended, number)
