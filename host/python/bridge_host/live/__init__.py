"""What people see of the commands they send, where they send them from: a cell of a notebook, or a terminal."""

from .live import Live, live_for

__all__ = ("Live", "live_for")
