"""`function.call` and `function.stream`: a dotted name, or source that the session owns."""

from __future__ import annotations

import contextlib
import inspect
from contextlib import AbstractContextManager, nullcontext
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any

from ..command import Answer
from ..context import CONTEXT_NAMES, AsyncSessionContext, SessionContext
from ..contract.errors import InvalidParams
from ..contract.methods import Chunk, PathFunction, Streamed, ValueResult
from ..resolve import resolve
from ..values import ValueReader, ValueWriter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

    from ..command import RunningCommand
    from ..contract.methods import LM, Function, FunctionCall, FunctionStream

__all__ = ("call", "call_with_context", "find", "name_of", "stream", "with_lm")


def name_of(function: Function) -> str:
    return function.path if isinstance(function, PathFunction) else function.name


def find(command: RunningCommand, function: Function) -> Any:
    """The object that a `Function` names. Raises as `resolve` and `Sources.function` do."""
    if isinstance(function, PathFunction):
        return resolve(function.path, command.runtime.policy)
    return command.runtime.sources.function(function)


def _wants_context(function: Any) -> bool:
    if isinstance(function, BuiltinFunctionType):
        return False
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None:
        return False  # a class, a builtin, a callable object: they cannot know of Bridge
    first = 1 if inspect.ismethod(function) else 0
    count: int = code.co_argcount
    names: tuple[str, ...] = code.co_varnames
    return count > first and names[first] in CONTEXT_NAMES


def _is_async(function: Any) -> bool:
    if isinstance(function, BuiltinFunctionType):
        return False  # the answer for most calls, without inspect's twenty questions
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def with_lm(command: RunningCommand, lm: LM | None) -> AbstractContextManager[object]:
    if lm is None:
        return nullcontext()
    from .dspy import settings

    return settings(command, lm)


def call_with_context(command: RunningCommand, function: Callable[..., Any], params: Any, lm: LM | None) -> Any:
    """Read the arguments of `params`, call, and return what the function returns: a coroutine if it is asynchronous."""
    asynchronous = _is_async(function)
    reader = ValueReader(command, command.buffers, asynchronous=asynchronous)
    args = [reader.read(value, f"args[{i}]") for i, value in enumerate(params.args)]
    kwargs = {name: reader.read(value, name) for name, value in params.kwargs.items()}
    if _wants_context(function):
        args.insert(0, AsyncSessionContext(command) if asynchronous else SessionContext(command))
    with with_lm(command, lm):
        return function(*args, **kwargs)


def call(command: RunningCommand, params: FunctionCall) -> Answer | Coroutine[Any, Any, Answer]:
    function = find(command, params.function)
    if not callable(function):
        raise InvalidParams(f"{name_of(params.function)!r} is not callable: it is a {type(function).__name__}")
    result = call_with_context(command, function, params, params.lm)
    if inspect.iscoroutine(result):
        return _await(command, result, params.lm)
    return _value(result)


async def _await(command: RunningCommand, coroutine: Coroutine[Any, Any, Any], lm: LM | None) -> Answer:
    with with_lm(command, lm):
        return _value(await coroutine)


def _value(result: Any) -> Answer:
    writer = ValueWriter()
    return Answer(ValueResult(writer.write(result, "result")), writer.buffers)


def stream(command: RunningCommand, params: FunctionStream) -> Answer | Coroutine[Any, Any, Answer]:
    function = find(command, params.function)
    if not callable(function):
        raise InvalidParams(f"{name_of(params.function)!r} is not callable: it is a {type(function).__name__}")
    produced = call_with_context(command, function, params, params.lm)
    if hasattr(produced, "__aiter__"):
        return _pump_async(command, produced.__aiter__(), params.lm)
    if not hasattr(produced, "__iter__") or isinstance(produced, str | bytes | dict):
        kind = type(produced).__name__
        if inspect.iscoroutine(produced):
            produced.close()
        raise InvalidParams(
            f"{name_of(params.function)!r} returned a {kind}: there is nothing to stream",
            remedy="Let it yield, or call it with function.call.",
        )
    with with_lm(command, params.lm):
        return _pump(command, iter(produced))


def _send(command: RunningCommand, seq: int, value: Any) -> None:
    writer = ValueWriter()
    chunk = Chunk(command.id, seq, writer.write(value, f"chunk[{seq}]"))
    command.output.flush()  # what was printed before the chunk is seen before it
    command.notify("command.chunk", chunk, writer.buffers)


def _pump(command: RunningCommand, values: Iterator[Any]) -> Answer:
    credit = command.credit
    seq = 0
    try:
        while True:
            while not credit.take():
                command.wait_for(credit.when_given)
            try:
                value = next(values)
            except StopIteration as end:
                writer = ValueWriter()
                return Answer(Streamed(seq, writer.write(end.value, "result")), writer.buffers)
            _send(command, seq, value)
            seq += 1
    finally:
        close = getattr(values, "close", None)
        if close is not None:
            close()


async def _pump_async(command: RunningCommand, values: AsyncIterator[Any], lm: LM | None) -> Answer:
    credit = command.credit
    seq = 0
    with with_lm(command, lm):
        try:
            while True:
                while not credit.take():
                    await command.await_for(credit.when_given)
                try:
                    value = await anext(values)
                except StopAsyncIteration:
                    return Answer(Streamed(seq, None))
                _send(command, seq, value)
                seq += 1
        finally:
            close = getattr(values, "aclose", None)
            if close is not None:
                with contextlib.suppress(RuntimeError):  # it ignores GeneratorExit: its own business
                    await close()
