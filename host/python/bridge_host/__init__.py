"""Bridge's Python host: it owns the sessions; kernels compute and forget."""

from bridge_kernel._version import __version__
from bridge_kernel.contract.errors import (
    BridgeError,
    Cancelled,
    CircuitOpen,
    Conflict,
    DeadlineExceeded,
    EffectInDoubt,
    HostClosed,
    InvalidArguments,
    InvalidValue,
    KernelDied,
    KernelStartFailed,
    NotFound,
    NotSerializable,
    Overloaded,
    PolicyDenied,
    Quarantined,
    QueueFull,
    QuotaExceeded,
    RemoteError,
    ReplayDiverged,
    SecretUnreadable,
    StoreDamaged,
    StoreFailed,
    StoreLocked,
    ToolError,
)
from bridge_kernel.contract.telemetry import Event

from .current import Bridge, SessionStore
from .engine import DoubtfulCall, Interrupted, Output, Poison, Quarantine, ToolCallInfo, current_call
from .host import AsyncHost, HostOptions
from .instance import AsyncInstance
from .pool import Ask, Breaker, KernelStatus, PoolStatus, Recycle, Routing
from .session import AsyncSession
from .store import Change, Quota, SessionInfo
from .stream import AsyncStream
from .sync import Host, Instance, Session, Stream
from .telemetry import Telemetry
from .tools import Tool
from .watch import Changes, Watch

__all__ = (
    "Ask",
    "AsyncHost",
    "AsyncInstance",
    "AsyncSession",
    "AsyncStream",
    "Breaker",
    "Bridge",
    "BridgeError",
    "Cancelled",
    "Change",
    "Changes",
    "CircuitOpen",
    "Conflict",
    "DeadlineExceeded",
    "DoubtfulCall",
    "EffectInDoubt",
    "Event",
    "Host",
    "HostClosed",
    "HostOptions",
    "Instance",
    "Interrupted",
    "InvalidArguments",
    "InvalidValue",
    "KernelDied",
    "KernelStartFailed",
    "KernelStatus",
    "NotFound",
    "NotSerializable",
    "Output",
    "Overloaded",
    "Poison",
    "PolicyDenied",
    "PoolStatus",
    "Quarantine",
    "Quarantined",
    "QueueFull",
    "Quota",
    "QuotaExceeded",
    "Recycle",
    "RemoteError",
    "ReplayDiverged",
    "Routing",
    "SecretUnreadable",
    "Session",
    "SessionInfo",
    "SessionStore",
    "StoreDamaged",
    "StoreFailed",
    "StoreLocked",
    "Stream",
    "Telemetry",
    "Tool",
    "ToolCallInfo",
    "ToolError",
    "Watch",
    "__version__",
    "current_call",
)
