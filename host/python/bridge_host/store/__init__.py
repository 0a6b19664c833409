"""What a host owns on behalf of its users, in memory and, if it is asked for, on disk. Kernels never hold any of it."""

from .log import Log, MemoryLog
from .model import Change, Commit, Finished, Quota, SessionInfo, Unfinished, Variable, Write, check_name
from .staged import Staged
from .state import SessionState
from .store import Store

__all__ = (
    "Change",
    "Commit",
    "Finished",
    "Log",
    "MemoryLog",
    "Quota",
    "SessionInfo",
    "SessionState",
    "Staged",
    "Store",
    "Unfinished",
    "Variable",
    "Write",
    "check_name",
)
