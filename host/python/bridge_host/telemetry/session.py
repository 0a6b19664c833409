"""`session.telemetry`: what telemetry may hold of a session's values, and what it has told of that session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bridge_kernel.contract.telemetry import CAPTURES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bridge_kernel.contract.telemetry import Capture, Event

    from ..store import SessionState
    from .telemetry import Telemetry

__all__ = ("SessionTelemetry",)


class SessionTelemetry:
    """Of one session."""

    __slots__ = ("_state", "_telemetry")  # a misspelt name is an error, not a switch that switches nothing

    def __init__(self, telemetry: Telemetry, state: SessionState) -> None:
        self._telemetry = telemetry
        self._state = state

    @property
    def capture(self) -> frozenset[Capture]:
        """Which values events may hold: "arguments", "results", "prompts", "completions"; none unless they are set.

        Each is clipped at 4,096 characters, secrets are redacted. It is not kept in the store: a session that is
        opened again captures nothing.
        """
        return self._state.capture

    @capture.setter
    def capture(self, what: Iterable[Capture]) -> None:
        wanted: frozenset[Any] = frozenset((what,) if isinstance(what, str) else what)
        if unknown := wanted - frozenset(CAPTURES):
            raise ValueError(f"there is {', '.join(CAPTURES)} to capture, not {', '.join(map(repr, sorted(unknown)))}")
        self._state.capture = wanted

    def events(self, *prefix: str) -> list[Event]:
        """As `host.telemetry.events`, those of this session."""
        return [e for e in self._telemetry.events(*prefix) if e.metadata.get("session") == self._state.id]

    def __repr__(self) -> str:
        captured = ", ".join(sorted(self._state.capture)) or "nothing"
        return f"<Telemetry of session {self._state.id!r}: {len(self.events())} events, captures {captured}>"
