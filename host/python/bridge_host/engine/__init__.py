"""What runs commands: sends them, answers what they call back, journals both, runs them again if it must."""

from .engine import RETRIES, Engine, Output
from .quarantine import Poison, Quarantine
from .recovery import DoubtfulCall, Interrupted
from .running import CURRENT, Running, ToolCallInfo, current_call

__all__ = (
    "CURRENT",
    "RETRIES",
    "DoubtfulCall",
    "Engine",
    "Interrupted",
    "Output",
    "Poison",
    "Quarantine",
    "Running",
    "ToolCallInfo",
    "current_call",
)
