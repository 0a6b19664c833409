"""Functions whose source a session owns: compiled here once, by the hash of the source, run in a fresh namespace."""

from __future__ import annotations
import __future__

import hashlib
import hmac
import linecache
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from .contract.errors import InvalidParams, PolicyDenied, RemoteError, SourceMissing, error_object

if TYPE_CHECKING:
    from types import CodeType

    from .contract.methods import SourceFunction
    from .policy import Policy

__all__ = ("Sources",)


class Sources:
    """A bounded cache of compiled sources. Derived data: losing any of it costs a `SourceMissing`, never a result."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._codes: OrderedDict[str, tuple[CodeType, str]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._codes)

    def function(self, ref: SourceFunction) -> Any:
        """The function that `ref` names, made anew: what one call leaves in its globals the next does not see.

        Raises:
            PolicyDenied: the kernel takes no source.
            SourceMissing: `ref` has no source and the kernel does not hold it.
            InvalidParams: the source is not what the hash says, or defines no such function.
            RemoteError: it does not compile, or raised while it was defined.
        """
        code = self._code(ref)
        namespace: dict[str, Any] = {"__name__": f"bridge.function.{ref.name}", "__builtins__": __builtins__}
        exec(code, namespace)  # noqa: S102 - running code is what a kernel is for; the policy was asked
        function = namespace.get(ref.name)
        if not callable(function):
            raise InvalidParams(f"the source of function {ref.name!r} defines no {ref.name!r}")
        return function

    def _code(self, ref: SourceFunction) -> CodeType:
        if not self._policy.allow_source:
            raise PolicyDenied("this kernel takes no source", remedy="Start it with --Policy.allow_source=True.")
        with self._lock:
            known = self._codes.get(ref.hash)
            if known is not None:
                self._codes.move_to_end(ref.hash)
                return known[0]
        if ref.source is None:
            raise SourceMissing(f"the kernel does not hold the source of function {ref.name!r}")
        if not hmac.compare_digest(hashlib.sha256(ref.source.encode()).hexdigest(), ref.hash):
            raise InvalidParams(f"the source of function {ref.name!r} is not what its hash says")
        filename = f"<bridge function {ref.name} {ref.hash[:8]}>"
        try:
            # Annotations stay strings: what they name need not be there in the kernel.
            code: CodeType = compile(
                ref.source, filename, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True
            )
        except (SyntaxError, ValueError) as exc:
            data = error_object(exc).data
            assert data is not None
            raise RemoteError(data.message, type=data.type) from exc
        lines = ref.source.splitlines(keepends=True)
        with self._lock:
            self._codes[ref.hash] = (code, filename)
            linecache.cache[filename] = (len(ref.source), None, lines, filename)  # so that tracebacks show the lines
            while len(self._codes) > self._policy.max_sources:
                _, (_, old) = self._codes.popitem(last=False)
                linecache.cache.pop(old, None)
        return code
