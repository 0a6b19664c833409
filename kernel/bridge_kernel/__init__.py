"""Bridge's kernel: a stateless Jupyter kernel that runs a command, calls its host back, answers and forgets."""

from ._version import __version__
from .contract.errors import BridgeError, NotFound, NotSerializable, PolicyDenied, ToolError

__all__ = ("BridgeError", "NotFound", "NotSerializable", "PolicyDenied", "ToolError", "__version__")
