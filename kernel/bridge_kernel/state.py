"""Instances between two commands: the state adapters, and how an object is rebuilt from its record."""

from __future__ import annotations

import hashlib
import hmac
import pickle
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import cloudpickle
import msgspec

from .contract.errors import InvalidParams, NotSerializable, PolicyDenied
from .contract.methods import State
from .resolve import resolve
from .values import ValueReader, ValueWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .command import RunningCommand
    from .contract.frames import Buffer
    from .contract.methods import InstanceRecord
    from .contract.telemetry import Scalar
    from .policy import Policy

__all__ = ("Snapshot", "construct", "dump", "rebuild")


class Snapshot(NamedTuple):
    """An object's state at one moment; two snapshots are equal if their fingerprints are."""

    adapter: str
    value: Any  # what the adapter dumped: JSON-able data, or a pickle's bytes
    fingerprint: bytes

    def write(self, writer: ValueWriter) -> State:
        sha256 = hashlib.sha256(self.value).hexdigest() if self.adapter == "pickle" else None
        return State(self.adapter, writer.write(self.value, "state"), sha256)  # type: ignore[arg-type]


def _is_dspy_module(obj: Any) -> bool:
    dspy = sys.modules.get("dspy")
    return dspy is not None and isinstance(obj, dspy.Module)


def dump(obj: Any, policy: Policy) -> Snapshot:
    """The state of an object, by the first adapter that fits it.

    `dspy`: `dump_state()`. `bridge`: the object's own `bridge_state()`. `pickle`: cloudpickle, if the policy
    allows it and the object can be pickled. Else `recipe`: it has no state, each call starts afresh.

    Raises:
        NotSerializable: `bridge_state()` returned what cannot cross.
    """
    if _is_dspy_module(obj):
        return _plain("dspy", obj.dump_state())
    if callable(getattr(obj, "bridge_state", None)):
        return _plain("bridge", obj.bridge_state())
    if policy.allow_pickle:
        try:
            pickled = cloudpickle.dumps(obj)
        except (pickle.PicklingError, TypeError, AttributeError, ValueError, RecursionError):
            pass  # it holds a socket, a lock, …: what it is made from is all there is to keep
        else:
            return Snapshot("pickle", pickled, hashlib.sha256(pickled).digest())
    return Snapshot("recipe", None, b"")


def _plain(adapter: str, value: Any) -> Snapshot:
    writer = ValueWriter()
    encoded = msgspec.json.encode(writer.write(value, "state"))
    digest = hashlib.sha256(encoded)
    for buffer in writer.buffers:
        digest.update(buffer)
    return Snapshot(adapter, value, digest.digest())


def construct(record: InstanceRecord, reader: ValueReader, policy: Policy) -> Any:
    """Make the object from its recipe alone: import the class, read the arguments, call it.

    Raises:
        NotFound, PolicyDenied: the class cannot be reached.
        Whatever the class raises.
    """
    cls = resolve(record.cls, policy)
    if not callable(cls):
        raise InvalidParams(f"{record.cls!r} is not a class: it is a {type(cls).__name__}")
    args = [reader.read(value, f"args[{i}]") for i, value in enumerate(record.args)]
    kwargs = {name: reader.read(value, name) for name, value in record.kwargs.items()}
    return cls(*args, **kwargs)


def rebuild(command: RunningCommand, record: InstanceRecord, buffers: Sequence[Buffer]) -> Any:
    """The object that a record stands for, with its state: the caller's own, shared with nobody.

    Raises:
        InvalidParams: the state is not one of this adapter's, or a pickle was altered on its way.
        PolicyDenied: the state is a pickle and the policy allows none.
        What `construct` raises.
    """
    cache = command.runtime.cache
    metadata: dict[str, Scalar] = {"action": "rebuild", "class": record.cls}
    with command.recorder.span(("bridge", "instance"), metadata) as said:
        key = cache.key(record)
        said["cache"] = "off"
        if key is not None and (kept := cache.get(key)) is not None:
            said["cache"] = "hit"
            return kept
        reader = ValueReader(command, buffers)
        obj = _rebuild(record, reader, command.runtime.policy)
        if key is not None and reader.plain:
            said["cache"] = "miss"
            cache.keep(key, record.cls, obj)
        return obj


def _rebuild(record: InstanceRecord, reader: ValueReader, policy: Policy) -> Any:
    state = record.state
    if state is None or state.adapter == "recipe":
        return construct(record, reader, policy)
    value = reader.read(state.value, "state")
    if state.adapter == "pickle":
        return _unpickle(value, state.sha256, record, policy)
    if state.adapter == "bridge":
        cls = resolve(record.cls, policy)
        restore = getattr(cls, "from_bridge_state", None)
        if not callable(restore):
            raise NotSerializable(
                f"{record.cls} has bridge_state() but no from_bridge_state(state)",
                remedy="Define it as a classmethod that returns the object.",
            )
        return restore(value)
    obj = construct(record, reader, policy)
    if not _is_dspy_module(obj):
        raise InvalidParams(f"the state of {record.ref!r} is DSPy's, but {record.cls} is no dspy.Module")
    obj.load_state(value)
    return obj


def _unpickle(value: Any, sha256: str | None, record: InstanceRecord, policy: Policy) -> Any:
    if not policy.allow_pickle:
        raise PolicyDenied(
            f"the state of {record.ref!r} is a pickle, and this kernel reads none",
            remedy="Give the class bridge_state() and from_bridge_state(), or start the kernel with "
            "--Policy.allow_pickle=True.",
        )
    # Jupyter signs a message's JSON but not its buffers: the signed digest is what vouches for these bytes.
    if not isinstance(value, bytes) or not hmac.compare_digest(hashlib.sha256(value).hexdigest(), sha256 or ""):
        raise InvalidParams(f"the state of {record.ref!r} is not what its digest says: it was altered on its way")
    policy.check_name(record.cls)
    return pickle.loads(value)
