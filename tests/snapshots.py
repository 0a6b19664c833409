"""Snapshots of a host, for tests of what shows them."""

from __future__ import annotations

from typing import Any

import msgspec

from bridge_host.telemetry.page.snapshot import (
    CircuitView,
    CommandView,
    ErrorView,
    KernelView,
    Snapshot,
)

__all__ = ("HOSTILE", "snapshot")

HOSTILE = '<img src=x onerror="window.owned=1"><script>window.owned=2</script>\'"&amp;'


def snapshot(**changes: Any) -> Snapshot:
    """A host that is at work."""
    made = Snapshot(
        at=1_790_000_000.0,
        pid=4242,
        started=1_789_996_400.0,
        health="ok",
        summary="2 kernels ready.",
        kernels=(
            KernelView("3f2a91bc", 5001, "ready", 2, 1840, 96 << 20, 1_789_996_500.0, 0.0),
            KernelView("9be0177d", 5002, "unresponsive", 1, 12, 0, 1_789_999_990.0, 0.25),
        ),
        kernels_in_all=2,
        ready=1,
        wanted=2,
        in_flight=3,
        waiting=7,
        rejected=1,
        commands_per_s=12.5,
        errors_per_s=0.3,
        p50=2_400_000,
        p95=41_000_000,
        p99=None,
        command_series=(0,) * 50 + (3, 9, 12, 14, 11, 13, 12, 15, 12, 9),
        error_series=(0,) * 59 + (2,),
        commands=(CommandView("dspy.ChainOfThought.__call__", 1200, 3, 412_000_000, 900_000_000, 1_200_000_000),),
        tokens=48_213,
        cost=0.0231,
        cache_hits=17,
        errors=(ErrorView(1_789_999_995.0, "math.sqrt", "ValueError"),),
        circuits=(CircuitView("analyse 1a2b3c4d", "", 5, 1_790_000_010.0),),
    )
    return msgspec.structs.replace(made, **changes)
