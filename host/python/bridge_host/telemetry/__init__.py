"""Telemetry in the host: events from kernels and of the host's own, and all that is made of them."""

from .session import SessionTelemetry
from .telemetry import Telemetry

__all__ = ("SessionTelemetry", "Telemetry")
