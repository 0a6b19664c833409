"""Bridge's kernel: a stateless Jupyter kernel that runs a command, calls its host back, answers and forgets."""

from ._version import __version__
from .contract.errors import (
    BridgeError,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    InvalidArguments,
    KernelDied,
    NotFound,
    NotSerializable,
    PolicyDenied,
    RemoteError,
    ToolError,
)

__all__ = (
    "BridgeError",
    "Cancelled",
    "Conflict",
    "DeadlineExceeded",
    "InvalidArguments",
    "KernelDied",
    "NotFound",
    "NotSerializable",
    "PolicyDenied",
    "RemoteError",
    "ToolError",
    "__version__",
)
