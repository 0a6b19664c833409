"""Bridge's Python host: it owns the sessions; kernels compute and forget."""

from bridge_kernel._version import __version__
from bridge_kernel.contract.errors import (
    BridgeError,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    HostClosed,
    InvalidArguments,
    KernelDied,
    KernelStartFailed,
    NotFound,
    NotSerializable,
    Overloaded,
    PolicyDenied,
    RemoteError,
    ToolError,
)
from bridge_kernel.contract.telemetry import Event

from .current import Bridge, SessionStore
from .engine import Output
from .host import AsyncHost
from .pool import KernelStatus
from .session import AsyncInstance, AsyncSession
from .stream import AsyncStream
from .sync import Host, Instance, Session, Stream
from .telemetry import Telemetry
from .tools import Tool

__all__ = (
    "AsyncHost",
    "AsyncInstance",
    "AsyncSession",
    "AsyncStream",
    "Bridge",
    "BridgeError",
    "Cancelled",
    "Conflict",
    "DeadlineExceeded",
    "Event",
    "Host",
    "HostClosed",
    "Instance",
    "InvalidArguments",
    "KernelDied",
    "KernelStartFailed",
    "KernelStatus",
    "NotFound",
    "NotSerializable",
    "Output",
    "Overloaded",
    "PolicyDenied",
    "RemoteError",
    "Session",
    "SessionStore",
    "Stream",
    "Telemetry",
    "Tool",
    "ToolError",
    "__version__",
)
