"""Imported by every kernel of the chaos test as it starts: lets somebody outside cut the kernel's sockets."""

from __future__ import annotations

import signal


def _cut(signum: int, frame: object) -> None:
    from sabotage import cut

    cut()


signal.signal(signal.SIGUSR2, _cut)
