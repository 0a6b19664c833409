"""DSPy's own events as telemetry: spans with their right parents, and what each call of a language model used.

Imports DSPy, so it is imported only where that is wanted. Everything hangs on public hooks of DSPy 3.4: callbacks, and
settings that hold for the time of one call. A callback is told of no usage; `settings.usage_tracker` is, of failed
calls as well, once for each call that reached the provider.
"""

from __future__ import annotations

import json
import math
import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import dspy
from dspy.streaming.messages import StatusMessage
from dspy.utils.callback import BaseCallback
from dspy.utils.callback_context import ACTIVE_CALL_ID

from .stops import CommandStopped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .command import RunningCommand
    from .contract.telemetry import Scalar
    from .telemetry import Recorder, Span

__all__ = ("Tap", "tap_history", "tap_of")

DSPY: Final = ("bridge", "dspy")


def tap_history() -> None:
    """Have language models report what they would add to their histories: once for the process.

    A call that a `Tap` watches is not kept in any history, for `GLOBAL_HISTORY` and those of kept modules would
    outlive the command. Other calls are none of our business.
    """
    keep = dspy.BaseLM.update_history

    def update_history(self: Any, entry: dict[str, Any]) -> None:
        meter = dspy.settings.usage_tracker
        if isinstance(meter, _Meter):
            meter.entry = entry
        else:
            keep(self, entry)

    dspy.BaseLM.update_history = update_history


def tap_of(command: RunningCommand) -> Tap:
    """The command's one tap, however often it enters its settings; it dies with the command."""
    tap = command.recorder.adrift
    if not isinstance(tap, Tap):
        tap = command.recorder.adrift = Tap(command)
    return tap


class Tap(BaseCallback):  # type: ignore[misc]
    """Tells of one command's DSPy. Thread-safe, and inert once the command is gone: it holds that only weakly.

    It may be among the callbacks of the settings and of a language model as well; each call is told of once.
    """

    def __init__(self, command: RunningCommand) -> None:
        self._command = weakref.ref(command)
        self._lock = threading.Lock()
        self._calls: dict[str | None, _Call] = {}

    def forget(self) -> None:
        """Forget what has begun and not ended: it was stopped midway, or is in a thread that was left behind."""
        self._calls.clear()

    # A module is copied, and a program pickled, together with the language model that was set on it.
    def __deepcopy__(self, memo: object) -> Tap:
        return self

    def __reduce__(self) -> tuple[type[Any], tuple[()]]:
        return BaseCallback, ()

    def __call__(self) -> str | None:
        """The span of the call that this thread works for, whose context it did not inherit: DSPy hands on an id."""
        call = self._calls.get(ACTIVE_CALL_ID.get())
        return None if call is None else call.span.id

    # -- spans -------------------------------------------------------------------

    def _begin(
        self,
        call_id: str,
        instance: Any,
        kind: str,
        metadata: dict[str, Scalar],
        captured: Callable[[Recorder], Mapping[str, Scalar]] = lambda recorder: {},
    ) -> _Call | None:
        """Begin a call's span; None if it is not to be told of, or has been."""
        command = self._command()
        if command is None or call_id in self._calls:
            return None
        if command.stopped:
            raise CommandStopped  # the one way to stop an optimizer: DSPy lets a BaseException through
        recorder = command.recorder
        metadata = {
            name: recorder.named(value) if isinstance(value, str) else value for name, value in metadata.items()
        }
        outer = self._calls.get(ACTIVE_CALL_ID.get())
        if kind == "adapter" and outer is not None and outer.instance is instance and outer.said == metadata:
            self._calls[call_id] = outer  # DSPy wraps an adapter's method again for each subclass that inherits it
            return None
        call = _Call(call_id, instance, metadata, recorder, recorder.span((*DSPY, kind), metadata))
        call.compile = None if outer is None else outer.compile
        self._calls[call_id] = call
        call.span.start(**captured(recorder))
        return call

    def _taken(self, call_id: str) -> _Call | None:
        """The call that ends here, no longer in the table; None if it was not told of."""
        call = self._calls.pop(call_id, None)
        return call if call is not None and call.id == call_id else None

    def _end(
        self, call_id: str, exception: BaseException | None, measurements: Mapping[str, int | float] | None = None
    ) -> None:
        call = self._taken(call_id)
        if call is not None:
            call.span.end(exception, measurements)

    # -- modules, adapters, tools ------------------------------------------------

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._begin(call_id, instance, "module", {"module": type(instance).__name__})

    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self._end(call_id, exception)

    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._begin(call_id, instance, "adapter", {"adapter": type(instance).__name__, "action": "format"})

    def on_adapter_format_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self._end(call_id, exception)

    def on_adapter_parse_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._begin(call_id, instance, "adapter", {"adapter": type(instance).__name__, "action": "parse"})

    def on_adapter_parse_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self._end(call_id, exception)

    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._begin(call_id, instance, "tool", {"tool": str(getattr(instance, "name", ""))})

    def on_tool_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self._end(call_id, exception)

    # -- language models ---------------------------------------------------------

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        def prompt(recorder: Recorder) -> Mapping[str, Scalar]:
            return recorder.captured("prompts", "prompt", lambda: _prompt(inputs))

        call = self._begin(call_id, instance, "lm", {"model": str(getattr(instance, "model", ""))}, prompt)
        if call is not None:
            call.meter = _Meter()
            call.meter.enter()

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        call = self._taken(call_id)
        if call is None or (meter := call.meter) is None:
            return
        meter.leave()
        measurements = meter.measurements()
        metadata = call.span.metadata
        metadata["streamed"] = meter.first_token is not None
        if exception is None:
            metadata["cache_hit"] = not meter.reported
            if meter.entry.get("response_model"):
                metadata["response_model"] = call.recorder.named(meter.entry["response_model"])
            said = meter.entry.get("outputs", outputs)
            metadata.update(call.recorder.captured("completions", "completion", lambda: _json(said)))
        with self._lock:
            call.recorder.lm_calls += 1
            call.recorder.tokens += int(measurements.get("tokens", 0))
        call.span.end(exception, measurements)

    # -- evaluations and optimizers ----------------------------------------------

    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        metadata: dict[str, Scalar] = {}
        metric = _first(inputs.get("metric"), getattr(instance, "metric", None))
        if metric is not None:
            metadata["metric"] = str(getattr(metric, "__name__", None) or type(metric).__name__)
        call = self._begin(call_id, instance, "evaluate", metadata)
        devset = _first(inputs.get("devset"), getattr(instance, "devset", None))
        if call is not None and hasattr(devset, "__len__"):
            call.examples = len(devset)

    def on_evaluate_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        call = self._taken(call_id)
        if call is None:
            return
        measurements: dict[str, int | float] = {} if call.examples is None else {"examples": call.examples}
        score = None if exception is not None else _number(getattr(outputs, "score", outputs))
        if score is not None:
            measurements["score"] = score
        call.span.end(exception, measurements)
        if exception is None and call.compile is not None:
            self._candidate(call.compile, score)

    def on_compile_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        call = self._begin(call_id, instance, "optimizer", {"optimizer": type(instance).__name__})
        if call is not None:
            call.compile = call

    def on_compile_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self._end(call_id, exception)

    def _candidate(self, compile: _Call, score: float | None) -> None:
        """Tell that an optimizer has evaluated one more candidate."""
        with self._lock:
            compile.candidates += 1
            if score is not None:
                compile.best = score if compile.best is None else max(compile.best, score)
            candidate, best = compile.candidates, compile.best
        measurements: dict[str, int | float] = {"candidate": candidate}
        said = f"candidate {candidate}"
        if score is not None:
            measurements["score"] = score
        if best is not None:
            measurements["best"] = best
            said = f"{said} · best {best:.4g}"
        compile.recorder.record((*DSPY, "optimizer", "progress"), measurements, compile.span.metadata.copy())
        compile.recorder.say(said)


class _Call:
    """A call of DSPy's that has begun and not ended."""

    __slots__ = ("best", "candidates", "compile", "examples", "id", "instance", "meter", "recorder", "said", "span")

    def __init__(self, id: str, instance: Any, said: Mapping[str, Scalar], recorder: Recorder, span: Span) -> None:
        self.id = id
        self.instance = instance
        self.said = said
        self.recorder = recorder
        self.span = span
        self.compile: _Call | None = None
        """The innermost `compile` that it is part of, or is."""
        self.meter: _Meter | None = None
        self.examples: int | None = None
        self.candidates = 0
        self.best: float | None = None


class _Meter:
    """What one call of a language model used: DSPy's usage tracker for the time of that call, and its stream's ear.

    What it is told goes on to the tracker that was there before, which may be the user's own.
    """

    def __init__(self) -> None:
        self.entry: dict[str, Any] = {}
        """What DSPy would have added to its history."""
        self.reported = False
        """Whether any usage was reported: of an answer from DSPy's cache none is."""
        self.first_token: int | None = None
        """In ns, of an answer that came in pieces."""
        self._usages: list[Mapping[str, Any]] = []
        outer = dspy.settings.usage_tracker
        # One language model may call another: what that used is its own, and told of there.
        self._outer: Any = outer._outer if isinstance(outer, _Meter) else outer
        self._scope: Any = None
        self._began = time.perf_counter_ns()

    def enter(self) -> None:
        changed: dict[str, Any] = {"usage_tracker": self}
        stream = dspy.settings.send_stream
        if stream is not None:
            changed["send_stream"] = _Ear(stream, self)
        self._scope = dspy.context(**changed)
        self._scope.__enter__()

    def leave(self) -> None:
        # A coroutine that nobody finishes is closed in another context than it ran in, to which nothing was changed.
        with suppress(ValueError):
            self._scope.__exit__(None, None, None)

    def add_usage(self, model: str, usage: Mapping[str, Any]) -> None:
        """Called by DSPy."""
        self.reported = True
        self._usages.append(usage)
        if self._outer is not None:
            self._outer.add_usage(model, usage)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outer, name)

    def __deepcopy__(self, memo: object) -> _Meter:
        return self  # DSPy gives each of its threads a copy, and loses what that counts

    def heard(self) -> None:
        if self.first_token is None:
            self.first_token = time.perf_counter_ns() - self._began

    def measurements(self) -> dict[str, int | float]:
        """As the catalogue has them; what is not known is not there."""
        measured: dict[str, int | float] = {}
        for name, keys in _TOKENS.items():
            counts = [count for usage in self._usages if (count := _tokens(usage, keys)) is not None]
            if counts:
                measured[name] = sum(counts)
        if "input_tokens" in measured and "output_tokens" in measured:
            measured["tokens"] = measured["input_tokens"] + measured["output_tokens"]
        cost = _number(self.entry.get("cost"))
        if cost is not None and self.reported:  # of a cached answer DSPy gives what it had cost
            measured["cost"] = cost
        if self.first_token is not None:
            measured["first_token"] = self.first_token
        return measured


class _Ear:
    """A stream that tells when the first token goes through it."""

    def __init__(self, stream: Any, meter: _Meter) -> None:
        self._stream = stream
        self._meter = meter

    async def send(self, chunk: Any) -> None:
        if _holds_tokens(chunk):
            self._meter.heard()
        await self._stream.send(chunk)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# Chat completions' words, then those of the Responses API.
_TOKENS: Final = {
    "input_tokens": ("prompt_tokens", "input_tokens"),
    "output_tokens": ("completion_tokens", "output_tokens"),
    "tokens": ("total_tokens",),
}


def _tokens(usage: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        count = usage.get(key)
        if isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**53:
            return count
    return None


def _holds_tokens(chunk: Any) -> bool:
    """Whether a chunk of a stream has any of the answer; a first one often says only who speaks."""
    if isinstance(chunk, StatusMessage):
        return False
    choices = getattr(chunk, "choices", None)
    if not choices:
        return choices is None  # a language model's own kind of chunk
    delta = getattr(choices[0], "delta", None)
    return any(getattr(delta, name, None) for name in ("content", "reasoning_content", "tool_calls"))


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _prompt(inputs: Mapping[str, Any]) -> str:
    """What a language model is asked: never how, for its options hold keys and headers."""
    asked = _first(inputs.get("messages"), inputs.get("prompt"), inputs.get("kwargs", {}).get("request"))
    if isinstance(asked, dspy.lm15.Request):
        asked = {"system": asked.system, "messages": [{"role": m.role, "content": m.text} for m in asked.messages]}
    return _json(asked)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # keys that are no texts, or a value that holds itself
        return str(value)
