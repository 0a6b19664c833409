"""`Reads`: what a command took from its session while it ran, and whether it would find the same now.

Pure but for looking: what is made of it, a cache or a suggestion, is others' business.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bridge_kernel.contract.errors import NotFound
from bridge_kernel.contract.methods import (
    InstanceFetch,
    InstanceRecord,
    SessionGet,
    SessionGetMany,
    ToolCall,
    Tools,
    Variables,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..client import Reply
    from ..store import SessionState
    from ..tools import Tool
    from .running import Running

__all__ = ("Reads", "reads_of")

# Within a string its quotes would be escaped. A dict of a user's own that looks like it is not kept, which does no harm.
_TAG: Final = re.compile(rb'"\$bridge"\s*:\s*"(?:ref|tool|variable)"')
_encode: Final = msgspec.json.Encoder().encode


class Reads(msgspec.Struct, frozen=True):
    """Of one command that changed nothing. `variables` by name, with the versions it saw, 0: there was none."""

    variables: dict[str, int]
    instances: dict[str, int]
    tools: dict[str, Any]  # that it called, all of them idempotent
    listed: Variables | None = None
    offered: Tools | None = None

    def current(self, session: SessionState) -> bool:
        """Whether the command would read the same now. Raises `NotFound` if the session is gone."""
        if self.variables:
            found = session.get_many(list(self.variables))
            for name, version in self.variables.items():
                if version != (found[name].version if name in found else 0):
                    return False
        for ref, version in self.instances.items():
            instance = session.instances.get(ref)
            if instance is None or instance.version != version:
                return False
        if any(session.tools.get(name) is not tool for name, tool in self.tools.items()):
            return False
        if self.listed is not None and self.listed.variables != session.variables():
            return False
        return self.offered is None or self.offered == _offered(session)

    def digest(self) -> bytes:
        """The same for two commands that read the same."""
        return _encode((self.variables, self.instances, sorted(self.tools), self.listed, self.offered))

    @property
    def size(self) -> int:
        """Roughly how many bytes it takes in memory."""
        return 2 * len(self.digest()) + 100 * (len(self.variables) + len(self.instances) + len(self.tools))


def _offered(session: SessionState) -> Tools:
    return Tools(tuple(tool.info for _, tool in sorted(session.tools.items())))


class _Refused(Exception):
    """Says why; met where it is raised."""


def reads_of(running: Running, reply: Reply, tools: Mapping[str, Tool] | None = None) -> Reads | str:
    """What a command that succeeded has read; or why its result is of this run alone, for people.

    `tools` are the session's as they were when the command began.
    """
    journal = running.journal
    if running.staged.asked:
        return "it writes variables"
    if running.changed:
        return "it changes its instance"
    if journal.overflowed:
        return "it calls back too often"
    if _has_tags(reply):
        return "its result refers to what the host holds"
    reads = Reads({}, {}, {})
    try:
        for entry in journal.entries:
            reads = _with(reads, entry, tools if tools is not None else running.session.tools, running.session)
    except _Refused as refused:
        return str(refused)
    return reads


def _with(reads: Reads, entry: Any, tools: Mapping[str, Tool], session: SessionState) -> Reads:
    params, reply = entry.params, entry.reply
    failed = reply is not None and reply.error is not None
    match params:
        case ToolCall():
            tool = tools.get(params.name)
            if entry.effect:
                raise _Refused(f"it calls the tool {params.name[:60]!r}, which is not idempotent")
            if failed:
                raise _Refused(f"the tool {params.name[:60]!r} failed")
            if tool is None or session.tools.get(params.name) is not tool:
                raise _Refused(f"the tool {params.name[:60]!r} was replaced while it ran")
            reads.tools[params.name] = tool
        case SessionGet() | SessionGetMany():
            if failed and reply.error.code != NotFound.code:
                raise _Refused("a variable could not be read")
            seen = entry.versions or {}
            for name in (params.name,) if isinstance(params, SessionGet) else params.names:
                if reads.variables.setdefault(name, seen.get(name, 0)) != seen.get(name, 0):
                    raise _Refused(f"the variable {name[:60]!r} was written while it ran")
        case InstanceFetch():
            if failed or not isinstance(reply.result, InstanceRecord):
                raise _Refused("an instance could not be read")
            if reads.instances.setdefault(params.ref, reply.result.version) != reply.result.version:
                raise _Refused("an instance was changed while it ran")
        case _ if not failed and isinstance(reply.result, Variables) and reads.listed in (None, reply.result):
            reads = msgspec.structs.replace(reads, listed=reply.result)
        case _ if not failed and isinstance(reply.result, Tools) and reads.offered in (None, reply.result):
            reads = msgspec.structs.replace(reads, offered=reply.result)
        case _:
            raise _Refused("what it lists was changed while it ran")
    return reads


def _has_tags(reply: Reply) -> bool:
    """Whether a result holds a ref, a tool or a variable: they are the host's, and may be gone tomorrow.

    Looked for in its bytes: to decode a large one takes longer than the host's loop may stand still.
    """
    return _TAG.search(memoryview(reply.result)) is not None
