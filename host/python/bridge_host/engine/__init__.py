"""What runs commands: sends them, answers what they call back, journals both, runs them again if it must."""

from .engine import Engine, Output
from .quarantine import Poison, Quarantine
from .recovery import DoubtfulCall, Interrupted
from .running import CURRENT, RETRIES, Outcome, Running, Terms, ToolCallInfo, current_call

__all__ = (
    "CURRENT",
    "RETRIES",
    "DoubtfulCall",
    "Engine",
    "Interrupted",
    "Outcome",
    "Output",
    "Poison",
    "Quarantine",
    "Running",
    "Terms",
    "ToolCallInfo",
    "current_call",
)
