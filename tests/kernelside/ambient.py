"""What code of a command's may reach that is not its own: an importable context variable, and a marker of this process."""

from __future__ import annotations

from contextvars import ContextVar

LEVEL: ContextVar[int] = ContextVar("level", default=0)
"""As a library has one: a command that sets it sets it for itself."""
