"""Dotted names to what they name, while other threads import too."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING

from bridge_kernel.policy import Policy
from bridge_kernel.resolve import resolve

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_a_module_that_another_thread_is_importing_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = SimpleNamespace(entered=threading.Event(), leave=threading.Event())
    monkeypatch.setitem(sys.modules, "slow_gate", gate)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "slowly.py").write_text(
        "import slow_gate\nslow_gate.entered.set()\nslow_gate.leave.wait(30)\ndef f(): pass\n"
    )
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(resolve, "slowly.f", Policy())
        assert gate.entered.wait(30)
        second = threads.submit(resolve, "slowly.f", Policy())
        try:
            assert not second.done() or second.exception() is None
        finally:
            gate.leave.set()
        assert first.result(30) is second.result(30)
    monkeypatch.delitem(sys.modules, "slowly")
