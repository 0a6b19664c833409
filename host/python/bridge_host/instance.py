"""`AsyncInstance`: an object that the host owns; what it can do is asked of a kernel. `Instances`: those of a session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from bridge_kernel.contract.values import Ref

from .display import Shown
from .engine import RETRIES, Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bridge_kernel.contract.values import Tag

    from .store import SessionState
    from .store.facts import InstanceState

__all__ = ("AsyncInstance", "InstanceBase", "Instances")


class InstanceBase:
    """An object that the host owns; what it can do is asked of a kernel."""

    def __init__(self, session: Any, ref: str) -> None:
        self._session = session
        self._ref = ref

    @property
    def _known(self) -> InstanceState:
        known: InstanceState = self._session._state.instance(self._ref)
        return known

    @property
    def ref(self) -> str:
        return self._ref

    @property
    def state(self) -> Any:
        """Its state, as the host keeps it: data for DSPy's modules and for classes that say their state themselves.

        A pickle is returned as its bytes, which the host never loads. Read without a kernel.
        """
        return self._known.state.read("state")

    @property
    def version(self) -> int:
        """1 for a new instance, one more for each call that changed it."""
        return self._known.version

    @property
    def __bridge_tag__(self) -> Tag:
        return Ref(self._ref, self._known.cls)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._known.methods})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InstanceBase) and other._ref == self._ref

    def __hash__(self) -> int:
        return hash(self._ref)

    def __repr__(self) -> str:
        known = self._session._state.instances.get(self._ref)
        if known is None:
            return f"<Instance {self._ref[:8]} (released)>"
        recipe = [repr(value) for value in known.args.read("args")]
        recipe += [f"{name}={value!r}" for name, value in known.kwargs.read("kwargs").items()]
        kept = "recipe only" if known.adapter == "recipe" else f"{known.adapter} state"
        named = f"{known.name!r} " if known.name else ""
        return f"<Instance {named}{known.cls}({', '.join(recipe)}) ref={self._ref[:8]} version={known.version} {kept}>"


class AsyncInstance(InstanceBase):
    """`await instance(…)` and `await instance.method(…)` run in a kernel, on the state that the host holds."""

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return await self._session._call_method(self._ref, "__call__", args, kwargs)

    async def call(
        self,
        method: str,
        /,
        *args: Any,
        deadline: float | None = None,
        retries: int = RETRIES,
        idempotency_key: str | None = None,
        secrets: Sequence[str] = (),
        **kwargs: Any,
    ) -> Any:
        """Call a method, with a deadline (seconds) and so on, as `session.call` has them.

        Raises:
            Conflict: another call changed the instance meanwhile; nothing of this one was kept.
        """
        terms = Terms(deadline, retries, idempotency_key, secrets)
        return await self._session._call_method(self._ref, method, args, kwargs, terms)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        async def method(*args: Any, **kwargs: Any) -> Any:
            return await self._session._call_method(self._ref, name, args, kwargs)

        method.__name__ = name
        return method


I = TypeVar("I")


class Instances(Shown, Mapping[str, I], Generic[I]):
    """`session.instances`: each by its name or its ref; iterating gives refs."""

    def __init__(self, state: SessionState, make: Callable[[str], I]) -> None:
        self._state = state
        self._make = make

    def __getitem__(self, ref_or_name: str) -> I:
        """Raises `NotFound`, a KeyError."""
        return self._make(ref_or_name)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._state.instances))

    def __len__(self) -> int:
        return len(self._state.instances)

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        known = list(self._state.instances.values())
        rows = [[i.name, i.ref[:8], i.cls, i.adapter, str(i.version), f"{i.size:,}"] for i in known]
        return ["name", "ref", "class", "state", "version", "bytes"], rows
