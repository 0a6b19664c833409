"""Looks after kernels that run: asks the silent ones, gives up those that do not answer, notices those that are worn."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import anyio
import msgspec

from bridge_kernel.contract.frames import UNDECODABLE
from bridge_kernel.contract.methods import Command, Pong

from .heartbeat import Pulse
from .options import Recycle

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from ..client import Reply
    from ..telemetry import Telemetry
    from .kernel import Kernel
    from .options import PoolOptions

__all__ = ("Health",)

LOOKS: Final = 8  # a heartbeat: often enough for its quarters
AGE_JITTER: Final = 0.1

_decode_pong: Final = msgspec.json.Decoder(Pong).decode


class Health:
    """Belongs to one event loop. It decides, and tells the pool: `on_gone(kernel, silent_s)`, `on_worn(kernel, why)`."""

    def __init__(
        self,
        telemetry: Telemetry,
        options: PoolOptions,
        *,
        on_change: Callable[[], None],
        on_gone: Callable[[Kernel, float], None],
        on_worn: Callable[[Kernel, str], None],
    ) -> None:
        self._telemetry = telemetry
        self._heartbeat = options.heartbeat
        self._recycle = options.recycle or Recycle()
        self._clock = options.clock
        self._on_change = on_change
        self._on_gone = on_gone
        self._on_worn = on_worn
        self._asked: set[Kernel] = set()

    def begin(self, kernel: Kernel) -> None:
        """The kernel is ready: from now on it is looked after. One of somebody else's never wears out."""
        if self._heartbeat is not None:
            kernel.pulse = Pulse(self._heartbeat)
        if kernel.process is None:
            return
        if self._recycle.commands is not None:
            kernel.worn_at = self._recycle.commands
        if self._recycle.age_s is not None:
            kernel.expires = self._clock() + self._recycle.age_s * random.uniform(1 - AGE_JITTER, 1 + AGE_JITTER)

    async def watch(self, kernels: Sequence[Kernel]) -> None:
        """Look at `kernels`, which may change meanwhile, again and again. Returns at once if nothing needs it."""
        spans = [span for span in (self._heartbeat, self._recycle.age_s) if span is not None]
        if not spans:
            return
        interval = min(spans) / LOOKS
        last = self._clock()
        while True:
            await anyio.sleep(interval)
            now = self._clock()
            # While this loop stood still, nobody could have been heard: that is no kernel's silence.
            ran_s, last = min(now - last, 2 * interval), now
            for kernel in tuple(kernels):
                if kernel.connected and kernel.pulse is not None:
                    self._look(kernel, kernel.pulse, ran_s)
                if now >= kernel.expires and kernel.ready:
                    self._on_worn(kernel, "age")

    def _look(self, kernel: Kernel, pulse: Pulse, ran_s: float) -> None:
        client = kernel.client
        assert client is not None
        verdict = pulse.tick(ran_s, client.heard)
        if verdict in ("unresponsive", "gone"):
            client.pump(0)  # what has arrived and was not read yet counts
            verdict = pulse.tick(0.0, client.heard)
            if not kernel.connected:
                return
        if verdict == "heard":
            self._answers(kernel)
            # However busy it is, its memory is to be known.
            if self._recycle.rss_bytes is not None or self._clock() - kernel.asked_at >= pulse.quarter_s:
                self._ask(kernel)
            return
        self._ask(kernel)
        if verdict == "gone":
            self._on_gone(kernel, pulse.silent_s)
        elif verdict == "unresponsive" and not kernel.unresponsive:
            kernel.unresponsive = True
            self._telemetry.tell(
                ("bridge", "kernel", "unresponsive"),
                {"silence": round(pulse.silent_s * 1e9), "in_flight": kernel.in_flight},
                {"kernel": kernel.id, "pid": kernel.pid, "reason": "silent"},
            )
            self._on_change()

    def _answers(self, kernel: Kernel) -> None:
        if kernel.unresponsive:
            kernel.unresponsive = False
            self._on_change()

    def _ask(self, kernel: Kernel) -> None:
        client = kernel.client
        if client is None or client.closed is not None or kernel in self._asked:
            return
        self._asked.add(kernel)
        kernel.asked_at = began = self._clock()
        _, future = client.request("kernel.ping", Command())

        def answered(future: asyncio.Future[Reply]) -> None:
            self._asked.discard(kernel)
            if future.cancelled() or future.exception() is not None:
                return  # an error is an answer as well; a closed connection is its owner's business
            try:
                kernel.rss = _decode_pong(future.result().result).rss
            except UNDECODABLE:
                return  # a kernel of another make: it has spoken, which is what counts
            if kernel.connected:
                kernel.round_trip_s = self._clock() - began
                self._telemetry.tell(
                    ("bridge", "kernel", "memory"),
                    {
                        "rss": kernel.rss,
                        "in_flight": kernel.in_flight,
                        "round_trip": round(kernel.round_trip_s * 1e9),
                    },
                    {"kernel": kernel.id, "pid": kernel.pid},
                )
                self._answers(kernel)
                if self._recycle.rss_bytes and kernel.rss > self._recycle.rss_bytes:
                    self._on_worn(kernel, "rss")

        future.add_done_callback(answered)
