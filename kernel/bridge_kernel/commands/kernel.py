"""`kernel.stats` and `rpc.discover`: what the kernel says of itself."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from ..command import Answer
from ..contract.methods import Discovered, Stats

if TYPE_CHECKING:
    from ..command import RunningCommand
    from ..contract.methods import Command

__all__ = ("discover", "stats")


def stats(command: RunningCommand, params: Command) -> Answer:
    import psutil  # here: a kernel that is never asked starts without it

    runtime = command.runtime
    process = psutil.Process(os.getpid())
    times = process.cpu_times()
    return Answer(
        Stats(
            uptime=time.time() - runtime.identity.started,
            rss=process.memory_info().rss,
            cpu=times.user + times.system,
            threads=threading.active_count(),
            commands=runtime.counts,
            dropped=dict(runtime.dropped),
            sources=len(runtime.sources),
            connections=runtime.connections,
        )
    )


def discover(command: RunningCommand, params: Command) -> Answer:
    from ..contract.openrpc import document

    return Answer(Discovered(document()))
