"""How every benchmark ends: measured, written to a file if asked for, shown."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ("measured",)


def measured(measure: Callable[[], dict[str, Any]], show: Callable[[Any, Console], None], file: Path | None) -> int:
    """Measure, write the report into `file`, show it; the exit code: 130 if it was interrupted."""
    # As Ctrl-C: contexts end what they started.
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.raise_signal(signal.SIGINT))
    try:
        with Console(stderr=True).status("Measuring …"):
            report = measure()
    except KeyboardInterrupt:
        return 130
    if file is not None:
        file.write_text(json.dumps(report, indent=2) + "\n")
    console = Console()
    show(report, console if console.is_terminal else Console(width=120))
    return 0
