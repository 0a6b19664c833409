"""Instances rebuilt before, as pickles of this kernel's own making: derived data, which may vanish at any time.

What is kept is never an object but what a fresh one looked like before anybody had it; each taker gets an object
of its own, down to the classes that DSPy made for it. So nothing that a command does to an object meets another.

Kept is only what is certain to come out the same when it is made again: see `InstanceCache.key` and `_Pickler`.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import sys
import threading
from collections import OrderedDict
from fnmatch import fnmatchcase
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final

import cloudpickle
import msgspec

from .stops import shielded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .contract.methods import InstanceRecord
    from .policy import Policy

__all__ = ("InstanceCache",)

MAX_ENTRIES: Final = 4096
_CLASS_MAKERS: Final = ("_make_skeleton_class", "_make_skeleton_enum")  # cloudpickle's, for what it writes by value
OVERHEAD_BYTES: Final = 512  # an entry's key and its place, beside its pickle
_encode = msgspec.json.Encoder().encode
log = logging.getLogger(__name__)


class InstanceCache:
    """Bounded by `policy.max_cache_bytes` and `MAX_ENTRIES`; the least recently used goes. Thread-safe."""

    def __init__(self, policy: Policy) -> None:
        self._max_bytes: int = policy.max_cache_bytes
        self._names: list[str] = list(policy.cache_names)
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()
        self._refused: set[str] = set()  # classes whose objects could not be kept: not tried again
        self._bytes = 0
        self._hits = 0
        self._misses = 0

    def key(self, record: InstanceRecord) -> bytes | None:
        """The SHA-256 of everything that the object is made from; None if objects like it are not kept.

        Not kept are classes that `policy.cache_names` does not name, pickles and bare recipes, for which there is
        nothing to gain, and what comes in buffers: it arrives as read-only views, which a pickle would not give back.
        """
        state = record.state
        if state is None or state.adapter not in ("dspy", "bridge") or self._max_bytes <= 0:
            return None
        if record.cls in self._refused or not any(fnmatchcase(record.cls, pattern) for pattern in self._names):
            return None
        content = _encode((record.cls, record.args, record.kwargs, state.adapter, state.value))
        return None if b'"buffer"' in content else hashlib.sha256(content).digest()

    def get(self, key: bytes) -> Any:
        """A new object, equal to the one that was kept and sharing nothing with it; None if there is none."""
        with self._lock:
            pickled = self._kept.get(key)
            if pickled is None:
                return None
            self._kept.move_to_end(key)
        try:
            obj = _Unpickler(io.BytesIO(pickled)).load()
        except Exception:  # what was importable a moment ago may not be now: then it is rebuilt, as if never kept
            log.exception("a kept instance could not be read")
            with shielded(), self._lock:
                self._forget(key)
            return None
        with self._lock:
            self._hits += 1
        return obj

    def keep(self, key: bytes, cls: str, obj: Any) -> None:
        """Remember what `obj` is now, just made: nobody else has it yet."""
        with self._lock:
            self._misses += 1
        file = io.BytesIO()
        try:
            _Pickler(file).dump(obj)
        except Exception as exc:  # noqa: BLE001 - whatever its own code raises: it can be used, but not kept
            log.debug("%s is not kept: %s", cls, exc)
            if len(self._refused) < MAX_ENTRIES:
                self._refused.add(cls)
            return
        pickled = file.getvalue()
        with shielded(), self._lock:
            self._forget(key)
            size = len(pickled) + OVERHEAD_BYTES
            if size > self._max_bytes:
                return
            self._kept[key] = pickled
            self._bytes += size
            while self._bytes > self._max_bytes or len(self._kept) > MAX_ENTRIES:
                self._forget(next(iter(self._kept)))

    def _forget(self, key: bytes) -> None:
        pickled = self._kept.pop(key, None)
        if pickled is not None:
            self._bytes -= len(pickled) + OVERHEAD_BYTES

    @property
    def counts(self) -> dict[str, int]:
        """`hits` and `misses` since the start; `entries` and `bytes` that are kept now."""
        with self._lock:
            return {"hits": self._hits, "misses": self._misses, "entries": len(self._kept), "bytes": self._bytes}


class _Unkeepable(Exception):
    """A copy of this object could be told from one made anew."""


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """cloudpickle, but refusing what it would copy though a new object would share it with the process.

    cloudpickle writes what no name leads to by value. Of a function, that includes the globals it uses: the copy
    would no longer see the module's own. Of a class, the copy would be another class than the one that a module
    may hold. DSPy's signatures are the exception: each module makes its own, and they are most of the work.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, FunctionType) and (owner := _owner_of(obj)) is not None:
            return _function_of, (owner, obj.__name__)
        reduced = super().reducer_override(obj)
        if reduced is not NotImplemented:
            if isinstance(obj, FunctionType) and any(name in obj.__globals__ for name in _names(obj.__code__)):
                raise _Unkeepable(f"{obj.__qualname__} uses globals of its module, but no name leads to it")
            if isinstance(obj, type) and reduced[0].__name__ in _CLASS_MAKERS and not _is_signature(obj):
                raise _Unkeepable(f"no name leads to class {obj.__qualname__}")
        return reduced


class _Unpickler(pickle.Unpickler):
    """Makes classes anew, where cloudpickle would share one between all copies made in a process."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if name in _CLASS_MAKERS and module.startswith("cloudpickle."):
            return _untracked(found)
        return found


def _untracked(make_class: Callable[..., type]) -> Callable[..., type]:
    def make(constructor: Any, name: str, bases: Any, keywords: Any, tracker_id: str | None, extra: Any) -> type:
        return make_class(constructor, name, bases, keywords, None, extra)

    return make


def _is_signature(cls: type) -> bool:
    dspy = sys.modules.get("dspy")
    return dspy is not None and issubclass(cls, dspy.Signature)


def _owner_of(function: FunctionType) -> type | None:
    """The importable class whose class method this is: pydantic keeps such functions by themselves."""
    module = sys.modules.get(function.__module__ or "")
    class_name, _, name = function.__qualname__.rpartition(".")
    owner = getattr(module, class_name, None) if "." not in class_name else None
    if not isinstance(owner, type):
        return None
    method = getattr(owner, name, None)
    return owner if isinstance(method, MethodType) and method.__func__ is function else None


def _function_of(owner: type, name: str) -> Any:
    return getattr(owner, name).__func__


def _names(code: CodeType) -> Iterator[str]:
    """The names that a function's code, and what is defined within it, looks up outside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
