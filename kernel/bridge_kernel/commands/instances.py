"""`instance.create` and `instance.call`: objects that the host owns, rebuilt here for one command."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from ..command import Answer
from ..contract.errors import InvalidParams, NotFound, PolicyDenied
from ..contract.methods import InstanceCalled, InstanceCreated
from ..contract.values import Ref
from ..state import construct, dump, rebuild
from ..values import ValueReader, ValueWriter
from .functions import call_with_context, with_lm

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from ..command import RunningCommand
    from ..contract.methods import InstanceCall, InstanceCreate
    from ..state import Snapshot

__all__ = ("call", "create")


def create(command: RunningCommand, params: InstanceCreate) -> Answer:
    with command.recorder.span(("bridge", "instance"), {"action": "create", "class": params.record.cls}):
        obj = construct(params.record, ValueReader(command, command.buffers), command.runtime.policy)
        writer = ValueWriter()
        state = dump(obj, command.runtime.policy).write(writer)
    methods = [name for name in dir(type(obj)) if not name.startswith("_") and callable(getattr(type(obj), name, None))]
    return Answer(InstanceCreated(state, tuple(methods)), writer.buffers)


def call(command: RunningCommand, params: InstanceCall) -> Answer | Coroutine[Any, Any, Answer]:
    obj = rebuild(command, params.record, command.buffers)
    before = dump(obj, command.runtime.policy)
    result = call_with_context(command, _method(obj, params), params, params.lm)
    if inspect.iscoroutine(result):
        return _await(command, params, obj, before, result)
    return _answer(command, params, obj, before, result)


def _method(obj: Any, params: InstanceCall) -> Any:
    name = params.method
    if name.startswith("_") and name != "__call__":
        raise PolicyDenied(f"{name!r} is private: only public methods and __call__ can be called")
    try:
        method = getattr(obj, name)
    except AttributeError:
        raise NotFound(f"{params.record.cls} has no method {name!r}") from None
    if not callable(method):
        if params.args or params.kwargs:
            raise InvalidParams(f"{params.record.cls}.{name} is an attribute, not a method: it takes no arguments")
        return lambda: method
    return method


async def _await(
    command: RunningCommand, params: InstanceCall, obj: Any, before: Snapshot, coroutine: Coroutine[Any, Any, Any]
) -> Answer:
    with with_lm(command, params.lm):
        result = await coroutine
    return _answer(command, params, obj, before, result)


def _answer(command: RunningCommand, params: InstanceCall, obj: Any, before: Snapshot, result: Any) -> Answer:
    writer = ValueWriter()
    if result is obj:
        # A method that returns its own object, to be chained, returns what stands for it in the host.
        result = Ref(params.record.ref, params.record.cls)
    value = writer.write(result, "result")
    after = dump(obj, command.runtime.policy)
    changed = after.fingerprint != before.fingerprint
    return Answer(InstanceCalled(value, after.write(writer) if changed else None), writer.buffers)
