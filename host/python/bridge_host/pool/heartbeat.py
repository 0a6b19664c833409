"""How silent a kernel is, and what follows from it. Pure: who counts the time says how much of it the host's loop ran."""

from __future__ import annotations

from typing import Literal

__all__ = ("Pulse", "Verdict")

Verdict = Literal["heard", "ask", "unresponsive", "gone"]


class Pulse:
    """One kernel's. It is asked after a quarter of the heartbeat, unresponsive after half, gone after all of it."""

    __slots__ = ("_heard", "_heartbeat_s", "quarter_s", "silent_s")

    def __init__(self, heartbeat_s: float) -> None:
        self._heartbeat_s = heartbeat_s
        self.quarter_s = heartbeat_s / 4
        self._heard = 0
        self.silent_s = 0.0
        """For how long nothing was heard, counting only time in which the host could have heard it."""

    def tick(self, ran_s: float, heard: int) -> Verdict:
        """The host's loop ran for `ran_s` more; `heard` counts all messages of the kernel's so far."""
        if heard != self._heard:
            self._heard = heard
            self.silent_s = 0.0
            return "heard"
        self.silent_s += ran_s
        if self.silent_s >= self._heartbeat_s:
            return "gone"
        if self.silent_s >= self._heartbeat_s / 2:
            return "unresponsive"
        return "ask" if self.silent_s >= self.quarter_s else "heard"
