"""One kernel as its pool sees it: its process, its connection, what runs there and in which state it is."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Final

import msgspec

from ..display import table
from .load import Kinds, Load
from .outcomes import Window

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..client import KernelClient
    from .heartbeat import Pulse
    from .process import KernelProcess

__all__ = ("Kernel", "KernelStatus", "PoolStatus")

RECENT: Final = 50
"""How many commands the error rate is about that people see."""


class KernelStatus(msgspec.Struct, frozen=True):
    """One kernel, as `host.kernels()` reports it."""

    id: str
    pid: int
    state: str  # "starting", "ready", "unresponsive", "draining", "spare" or "dead"
    in_flight: int
    completed: int
    connection_file: str
    age_s: float = 0.0
    rss: int = 0  # bytes, as the kernel last said; 0 if it was not asked yet
    deaths: int = 0  # kernels that died in this place before
    error_rate: float = 0.0  # 0 to 1, of its last 50 commands; errors of whoever asked do not count
    round_trip_s: float = 0.0  # of its last heartbeat; 0 if it was not asked yet


class PoolStatus(msgspec.Struct, frozen=True):
    """The pool, as `host.pool.status()` reports it. `repr` is a table."""

    kernels: tuple[KernelStatus, ...]
    wanted: int  # kernels of the host's own, spares not counted
    spares: int  # ready
    queue: int  # commands that wait
    routing: str
    restarts: int  # kernels that took the place of one that died

    def _table(self, *, html: bool = False) -> str:
        title = (
            f"{self.wanted} kernels wanted, {self.spares} spare; {self.queue} commands wait; "
            f"routing {self.routing}; {self.restarts} restarts"
        )
        rows = [
            [
                k.id[:8] or "-",
                str(k.pid or "-"),
                k.state,
                str(k.in_flight),
                str(k.completed),
                f"{k.age_s:.0f} s",
                f"{k.rss / 2**20:.0f} MiB" if k.rss else "-",
                f"{k.error_rate:.0%}",
                str(k.deaths),
            ]
            for k in self.kernels
        ]
        columns = ["kernel", "pid", "state", "in flight", "completed", "age", "memory", "errors", "deaths"]
        return table(columns, rows, html=html, title=title)

    def __repr__(self) -> str:
        return self._table()

    def _repr_html_(self) -> str:
        return self._table(html=True)


class Kernel:
    """A kernel of ours from its start to its end, or an attached one that somebody else owns (`process` is None)."""

    def __init__(self, number: int, process: KernelProcess | None, clock: Callable[[], float]) -> None:
        self.number = number
        self.process = process
        self._clock = clock
        self.born = clock()
        self.client: KernelClient | None = None
        self.id = ""
        self.pid = 0
        self.connection_file = ""
        self.capacity = 0
        self.expires = math.inf  # when it is too old
        self.worn_at: float = math.inf  # commands completed, after which it is replaced
        self.pulse: Pulse | None = None
        self.rss = 0
        self.round_trip_s = 0.0
        self.asked_at = -math.inf
        # What runs there:
        self.in_flight = 0
        self.running = 0  # of these, what counts against the capacity: not the nested
        self.completed = 0
        self.served = False  # some command ended as commands should
        self.last_used = 0
        self.load = Load(Kinds())  # until it takes part in the work
        self.recent = Window(RECENT)
        # Which commands it may be given:
        self.spare = False
        self.worn = False  # it has served long enough, and somebody sees to that
        self.leaving = False  # another takes its place; it is drained when that is ready
        self.draining = False
        self.unresponsive = False
        self.cut = False
        self.alone = False  # runs a command that is to be alone
        self.reserved = False  # for one that waits to be
        self.lost = ""  # why it was given up or ended; "" while it lives
        self.casualties = 0  # commands in flight when it was lost
        # The history of its place, which its successor inherits:
        self.deaths = 0
        self.setbacks = 0
        self.idle = asyncio.Event()
        """Set when a draining kernel runs nothing any more, or is lost."""

    @property
    def connected(self) -> bool:
        return self.client is not None and not self.lost and self.client.closed is None

    @property
    def ready(self) -> bool:
        """It answers: whatever has to run somewhere may run here."""
        return self.connected and not self.unresponsive and not self.cut

    @property
    def routable(self) -> bool:
        """It takes part in the work."""
        return self.ready and not self.spare and not self.draining

    @property
    def state(self) -> str:
        if self.lost:
            return "dead"
        if self.client is None:
            return "starting"
        if self.cut or self.client.closed is not None:
            return "dead"
        if self.draining:
            return "draining"
        if self.unresponsive:
            return "unresponsive"
        return "spare" if self.spare else "ready"

    @property
    def name(self) -> str:
        """For messages."""
        return f"kernel {self.id[:4]} (pid {self.pid})"

    def connect(self, client: KernelClient, concurrency: int) -> None:
        """The handshake is over: from now on it can be given commands."""
        attached = client.attached
        assert attached is not None
        self.id = attached.kernel.id
        self.pid = self.process.pid if self.process is not None else attached.kernel.pid
        self.capacity = min(concurrency, attached.limits.max_commands)
        self.client = client

    @property
    def age_s(self) -> float:
        return self._clock() - self.born

    def status(self) -> KernelStatus:
        pid = self.pid or (self.process.pid if self.process is not None else 0)
        return KernelStatus(
            self.id,
            pid,
            self.state,
            self.in_flight,
            self.completed,
            self.connection_file,
            self.age_s,
            self.rss,
            self.deaths,
            self.recent.rate,
            self.round_trip_s,
        )
