"""Chaos: kernels killed, stopped and cut off, and their host killed, while 200 sessions work. Nothing may be lost or doubled.

`BRIDGE_CHAOS_SECONDS` makes it longer, `BRIDGE_CHAOS_SEED` chooses the same faults again.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import time
import uuid
from typing import TYPE_CHECKING

import psutil
import pytest

from chaos import plan
from chaos.checks import problems
from chaos.faults import Chaos, faults, marked
from conftest import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECONDS = float(os.environ.get("BRIDGE_CHAOS_SECONDS", "20"))
SEED = int(os.environ.get("BRIDGE_CHAOS_SEED", random.randrange(1_000_000)))
HOST_DEATHS = 2  # at least, however slow the machine is
SESSIONS = int(os.environ.get("BRIDGE_CHAOS_SESSIONS", "200"))
STEPS = 3  # that each session does, however short the time is
FINISH_S = 90.0


@pytest.fixture
def scratch() -> Iterator[str]:
    """For runtime directories: short, for the paths of sockets are."""
    directory = tempfile.mkdtemp(prefix="chaos-", dir="/tmp")
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def test_no_write_is_lost_and_no_effect_doubled_whatever_is_killed(tmp_path: Path, scratch: str) -> None:
    print(f"BRIDGE_CHAOS_SEED={SEED} for {SECONDS:g} s, in {tmp_path}")
    mark = uuid.uuid4().hex
    chaos = Chaos(tmp_path, scratch, mark, SEED, sessions=SESSIONS, steps=STEPS)
    try:
        chaos.start()
        until = time.monotonic() + SECONDS
        for fault in faults(SEED):
            chaos.happen(fault)
            late_s = time.monotonic() - until
            if late_s > 0 and chaos.counts["host"] >= HOST_DEATHS:
                break
            assert late_s < FINISH_S, f"the host gets nothing done, seed {SEED}: {chaos.counts}\n{chaos.log_tail()}"
        chaos.finish(FINISH_S)
        eventually(lambda: not marked(mark), f"no process of seed {SEED} is left")
    finally:
        chaos.close()
        for process in marked(mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    told = plan.ledger(tmp_path)
    acked = [line for line in told if isinstance(line, plan.Acked)]
    failed = [line for line in told if isinstance(line, plan.Failed)]
    opened = [line for line in told if isinstance(line, plan.Opened)]
    print(f"{len(acked)} steps, {len(failed)} failed, {len(plan.effects(tmp_path))} effects; {chaos.counts}; {opened}")
    wrong = problems(tmp_path, SEED)
    assert not wrong, f"BRIDGE_CHAOS_SEED={SEED}, {len(wrong)} problems or more:\n" + "\n".join(wrong)
    assert os.listdir(scratch) == [], f"runtime directories are left of seed {SEED}"
