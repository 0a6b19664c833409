"""DSPy inside a command: the session's language model by context, its events as telemetry, nothing left behind.

Settled by DSPy 3.4: settings belong to the thread or task that entered `dspy.context`; `settings.trace`
and `GLOBAL_HISTORY` would otherwise keep every call of the process.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..contract.errors import InvalidParams, type_of
from ..stops import CommandStopped
from ..values import ValueReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..command import RunningCommand
    from ..contract.methods import LM
    from ..contract.telemetry import Scalar

__all__ = ("settings",)


@functools.cache
def _prepare() -> Any:
    """Import DSPy once, without its caches: a cache of the kernel's own would be state, and is the host's to keep."""
    # litellm, DSPy's fallback, would otherwise fetch its price list from the internet at import.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import dspy

    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    return dspy


_prepare_once = threading.Lock()


@contextmanager
def settings(command: RunningCommand, lm: LM) -> Iterator[None]:
    """Enter a `dspy.context` with the command's language model and with telemetry, and leave nothing in the process."""
    with _prepare_once:
        dspy = _prepare()
    reader = ValueReader(command, command.buffers)
    options = {name: reader.read(value, f"lm.{name}") for name, value in lm.options.items()}
    if lm.api_base is not None:
        options["api_base"] = lm.api_base
    if lm.api_key is not None:
        options["api_key"] = lm.api_key
    options.setdefault("cache", False)
    changed: dict[str, Any] = {"lm": _tapped(dspy, command)(lm.model, **options)}
    if lm.adapter is not None:
        changed["adapter"] = _adapter(dspy, lm.adapter)
    with dspy.context(**changed, callbacks=[_tap(dspy, command)], trace=[]):
        yield


def _adapter(dspy: Any, name: str) -> Any:
    cls = getattr(dspy, name, None)
    if not (isinstance(cls, type) and issubclass(cls, dspy.Adapter)):
        known = [
            key for key, value in vars(dspy).items() if isinstance(value, type) and issubclass(value, dspy.Adapter)
        ]
        raise InvalidParams(f"DSPy has no adapter {name!r}", remedy=f"It has {', '.join(sorted(known))}.")
    return cls()


def _tapped(dspy: Any, command: RunningCommand) -> Any:
    class TappedLM(dspy.LM):  # type: ignore[misc]
        """Reports each call instead of adding it to a history that the process would keep."""

        def update_history(self, entry: dict[str, Any]) -> None:
            usage = dict(entry.get("usage") or {})
            measurements: dict[str, int | float] = {
                name: value for name, value in usage.items() if isinstance(value, int | float)
            }
            if isinstance(entry.get("cost"), int | float):
                measurements["cost"] = entry["cost"]
            metadata: dict[str, Scalar] = {"model": str(entry.get("response_model") or entry.get("model"))}
            command.recorder.emit(("bridge", "dspy", "lm", "usage"), measurements, metadata)

    # A state that names its model's class names DSPy's own, which any process can load.
    TappedLM.__module__, TappedLM.__qualname__ = dspy.LM.__module__, dspy.LM.__qualname__
    return TappedLM


def _tap(dspy: Any, command: RunningCommand) -> Any:
    began: dict[str, tuple[tuple[str, ...], int, dict[str, Scalar]]] = {}
    active = _active_call()

    def start(call_id: str, kind: str, metadata: dict[str, Scalar]) -> None:
        if command.stopped:
            raise CommandStopped
        name = ("bridge", "dspy", kind)
        metadata = {**metadata, "call": call_id, "parent_call": active()}
        began[call_id] = (name, time.perf_counter_ns(), metadata)
        command.recorder.emit((*name, "start"), {"system_time": time.time_ns()}, metadata)

    def end(call_id: str, exception: Exception | None) -> None:
        if (entry := began.pop(call_id, None)) is None:
            return
        name, started, metadata = entry
        if exception is not None:
            metadata["error"] = type_of(exception)
        last = "stop" if exception is None else "exception"
        command.recorder.emit((*name, last), {"duration": time.perf_counter_ns() - started}, metadata)

    class Tap(dspy.utils.callback.BaseCallback):  # type: ignore[misc]
        def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            start(call_id, "module", {"module": type(instance).__name__})

        def on_module_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
            end(call_id, exception)

        def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            start(call_id, "lm", {"model": str(getattr(instance, "model", ""))})

        def on_lm_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
            end(call_id, exception)

        def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            start(call_id, "tool", {"tool": str(getattr(instance, "name", ""))})

        def on_tool_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
            end(call_id, exception)

    return Tap()


def _active_call() -> Any:
    from dspy.utils.callback_context import ACTIVE_CALL_ID

    return ACTIVE_CALL_ID.get
