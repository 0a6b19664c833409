"""Values as commands see them: a ref arrives as the rebuilt object, a tool as a function, a variable as its value."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from .contract.errors import BridgeError, InvalidParams
from .contract.methods import InstanceFetch, SessionGet
from .contract.values import Decoder, Encoder, Ref, ToolRef, VariableRef
from .output import CURRENT
from .resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .command import RunningCommand
    from .contract.frames import Buffer
    from .contract.values import Tag

__all__ = ("ValueReader", "ValueWriter")

_ANNOTATIONS = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict}


class ValueWriter:
    """Writes the values of one message; their buffers accumulate in `buffers`."""

    def __init__(self) -> None:
        self._encoder = Encoder(default=_as_tag)

    @property
    def buffers(self) -> Sequence[Buffer]:
        return self._encoder.buffers

    def write(self, value: Any, root: str) -> Any:
        """The JSON-able tree of a value; `root` is what an error calls it. Raises `NotSerializable`."""
        return self._encoder.encode(value, root)


def _as_tag(value: object) -> Tag | None:
    tag = getattr(value, "__bridge_tag__", None)
    return tag if isinstance(tag, ToolRef) else None


class ValueReader:
    """Reads the values of one message for the command that they belong to."""

    def __init__(
        self,
        command: RunningCommand,
        buffers: Sequence[Buffer],
        *,
        asynchronous: bool = False,
        may_wait: bool = True,
    ) -> None:
        """`asynchronous`: tools arrive as functions to be awaited.

        `may_wait`: False on the event loop, where fetching an instance would hold up every other command.
        """
        self._command = command
        self._asynchronous = asynchronous
        self._may_wait = may_wait
        self._decoder = Decoder(buffers, resolve=self._class, hook=self._arrive)
        self.plain = True
        """Whether what was read so far says all of its content itself, and only in Python's own types."""

    def read(self, tree: Any, root: str) -> Any:
        """The value of a JSON tree. Raises `MalformedValue`, and what a callback for it raises."""
        return self._decoder.decode(tree, root)

    def _class(self, name: str) -> type | None:
        self.plain = False
        try:
            found = resolve(name, self._command.runtime.policy)
        except (BridgeError, ImportError):
            return None  # the value arrives as a Record, which holds it all and goes back as it came
        return found if isinstance(found, type) else None

    def _arrive(self, tag: Tag) -> Any:
        self.plain = False
        if isinstance(tag, ToolRef):
            return tool_function(self._command, tag, asynchronous=self._asynchronous)
        if not self._may_wait:
            raise InvalidParams(
                "an instance inside a value cannot be rebuilt on the event loop",
                remedy="Pass the instance as an argument of the function, or make the function synchronous.",
            )
        if isinstance(tag, Ref):
            from .state import rebuild

            record, buffers = self._command.call(
                "instance.fetch", InstanceFetch(command=self._command.id, ref=tag.id), about=tag.id
            )
            return rebuild(self._command, record, buffers)
        assert isinstance(tag, VariableRef)
        got, buffers = self._command.call(
            "session.get", SessionGet(command=self._command.id, name=tag.name), about=tag.name
        )
        return ValueReader(self._command, buffers).read(got.value, tag.name)


def tool_function(built_for: RunningCommand, tag: ToolRef, *, asynchronous: bool) -> Callable[..., Any]:
    """A host's tool as a Python function with the tool's name, documentation and signature.

    It calls back for the command in which it is called, which for an object that is kept is not the one
    it was built for.
    """
    from .context import AsyncSessionContext, SessionContext

    def current() -> RunningCommand:
        command: RunningCommand | None = CURRENT.get()
        return command if command is not None else built_for

    if asynchronous:

        async def call_async(*args: Any, **kwargs: Any) -> Any:
            context = AsyncSessionContext(current())
            params, writer = context._tool_call(tag.name, None, kwargs, args)
            return await context._call_tool(params, writer)

        function: Callable[..., Any] = call_async
    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            context = SessionContext(current())
            params, writer = context._tool_call(tag.name, None, kwargs, args)
            return context._call_tool(params, writer)

        function = call

    schema = tag.schema or {}
    required = schema.get("required", [])
    # Those without a default first, as Python wants them.
    properties = sorted(schema.get("properties", {}).items(), key=lambda item: item[0] not in required)
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if name in required else of.get("default"),
            annotation=_ANNOTATIONS.get(of.get("type", ""), Any) if isinstance(of, dict) else Any,
        )
        for name, of in properties
        if name.isidentifier()
    ]
    function.__name__ = function.__qualname__ = tag.name
    function.__doc__ = tag.description or None
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__bridge_tag__ = tag  # type: ignore[attr-defined]
    return function
