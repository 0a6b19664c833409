"""DSPy inside a command: the session's language model by context, nothing left behind. `dspy_telemetry` tells of it.

Settled by DSPy 3.4: settings belong to the thread or task that entered `dspy.context`; `settings.trace`
and `GLOBAL_HISTORY` would otherwise keep every call of the process.
"""

from __future__ import annotations

import functools
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..contract.errors import InvalidParams
from ..values import ValueReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..command import RunningCommand
    from ..contract.methods import LM

__all__ = ("settings",)


@functools.cache
def _prepare() -> tuple[Any, Callable[[RunningCommand], Any]]:
    """Import DSPy once, without its caches: a cache of the kernel's own would be state, and is the host's to keep."""
    # litellm, DSPy's fallback, would otherwise fetch its price list from the internet at import.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import dspy
    import tqdm  # type: ignore[import-untyped]

    from ..dspy_telemetry import tap_history, tap_of

    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    # The first progress bar, shown or not, would start a thread for all of them, which outlives its command.
    tqdm.tqdm.monitor_interval = 0
    tap_history()
    return dspy, tap_of


_prepare_once = threading.Lock()


@contextmanager
def settings(command: RunningCommand, lm: LM) -> Iterator[None]:
    """Enter a `dspy.context` with the command's language model and with telemetry, and leave nothing in the process."""
    with _prepare_once:
        dspy, tap_of = _prepare()
    reader = ValueReader(command, command.buffers)
    options = {name: reader.read(value, f"lm.{name}") for name, value in lm.options.items()}
    if lm.api_base is not None:
        options["api_base"] = lm.api_base
    if lm.api_key is not None:
        options["api_key"] = lm.api_key
    options.setdefault("cache", False)
    tap = tap_of(command)
    # The model has it too, for threads that did not inherit the settings but were given the model.
    changed: dict[str, Any] = {"lm": dspy.LM(lm.model, **options, callbacks=[tap])}
    if lm.adapter is not None:
        changed["adapter"] = _adapter(dspy, lm.adapter)
    try:
        with dspy.context(**changed, callbacks=[tap], trace=[]):
            yield
    finally:
        tap.forget()


def _adapter(dspy: Any, name: str) -> Any:
    cls = getattr(dspy, name, None)
    if not (isinstance(cls, type) and issubclass(cls, dspy.Adapter)):
        known = [
            key for key, value in vars(dspy).items() if isinstance(value, type) and issubclass(value, dspy.Adapter)
        ]
        raise InvalidParams(f"DSPy has no adapter {name!r}", remedy=f"It has {', '.join(sorted(known))}.")
    return cls()
