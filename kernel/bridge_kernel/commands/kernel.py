"""`kernel.stats` and `rpc.discover`: what the kernel says of itself."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from ..command import Answer
from ..contract.methods import Discovered, Stats
from ..memory import resident_bytes

if TYPE_CHECKING:
    from ..command import RunningCommand
    from ..contract.methods import Command

__all__ = ("discover", "stats")


def stats(command: RunningCommand, params: Command) -> Answer:
    runtime = command.runtime
    times = os.times()
    return Answer(
        Stats(
            uptime=time.time() - runtime.identity.started,
            rss=resident_bytes(),
            cpu=times.user + times.system,
            threads=threading.active_count(),
            commands=runtime.counts,
            dropped=dict(runtime.dropped),
            sources=len(runtime.sources),
            cache=runtime.cache.counts,
            connections=runtime.connections,
        )
    )


def discover(command: RunningCommand, params: Command) -> Answer:
    from ..contract.openrpc import document

    return Answer(Discovered(document()))
