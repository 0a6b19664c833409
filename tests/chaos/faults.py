"""What goes wrong in the chaos test, and when: kernels and hosts killed from outside, by a seeded choice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import psutil

from chaos import plan

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("MARK", "Chaos", "Fault", "faults", "marked")

MARK: Final = "BRIDGE_CHAOS"
"""The environment variable that every process of a run has, to be found by it."""
KERNEL_FAULTS: Final = ("kill", "stop", "cut")
SIGNALS: Final = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "cut": signal.SIGUSR2}  # see kernelside/sitecustomize
EARLY: Final = 0.2  # the share of kernels' faults that happen before their host has opened the store
AT_WORK: Final = 100  # lines in the ledger, after which a host may be killed
NEWS_S: Final = 0.3
TESTS: Final = Path(__file__).parents[1]


class Fault(NamedTuple):
    """After `pause_s`, `what` happens: to the host, or to one of its kernels, which `which` chooses."""

    pause_s: float
    what: str
    which: float


def faults(seed: int) -> Iterator[Fault]:
    """The same faults for the same seed, without end."""
    chance = random.Random(seed)
    now, death = 0.0, chance.uniform(3, 7)
    while True:
        pause_s = chance.uniform(0.1, 1.3)
        now += pause_s
        if now < death:
            yield Fault(pause_s, chance.choice(KERNEL_FAULTS), chance.random())
            continue
        yield Fault(pause_s, "host", 0.0)
        if chance.random() < 0.3:
            yield Fault(chance.uniform(0.2, 3.0), "newborn", 0.0)
        death = now + chance.uniform(4, 9)


def marked(mark: str) -> list[psutil.Process]:
    """Every process of that run, but not this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
    return found


class Chaos:
    """One run: a driver that is started again whenever it was killed. `directory` keeps what it leaves."""

    def __init__(self, directory: Path, scratch: str, mark: str, seed: int, *, sessions: int, steps: int) -> None:
        """`scratch` is where runtime directories are made: a short path, for sockets are there."""
        self.directory = directory
        self.counts = dict.fromkeys(("host", *KERNEL_FAULTS), 0)
        self._command = [sys.executable, "-m", "chaos.driver", str(directory), str(seed), str(sessions), str(steps)]
        path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH", ""))))
        self._env = {**os.environ, MARK: mark, "TMPDIR": scratch, "PYTHONPATH": path}
        self._log = directory / "driver.log"
        self._driver: subprocess.Popen[bytes] | None = None
        self._owed = False  # whether the host is to be killed as soon as it has opened the store

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._driver = subprocess.Popen(self._command, env=self._env, stdout=log, stderr=log)

    def happen(self, fault: Fault) -> None:
        """Have it happen. A host is killed once it is at work, a newborn one at once; its kernels seldom before that.

        Raises:
            AssertionError: the driver has ended by itself.
        """
        time.sleep(fault.pause_s)
        driver = self._running()
        self._owed |= fault.what == "host"
        if fault.what == "newborn" or (self._owed and self._told >= AT_WORK):
            self._owed = False
            self.counts["host"] += 1
            self._await_news()
            driver.kill()
            driver.wait()
            self.start()
            return
        if fault.what == "host" or (self._told == 0 and fault.which > EARLY):
            return
        kernels = self._kernels(driver.pid)
        if fault.what == "stop":
            ready = (self.directory / "ready").read_text().split() if kernels else []
            kernels = [kernel for kernel in kernels if str(kernel.pid) in ready]
        if kernels:
            with contextlib.suppress(psutil.Error):
                kernels[int(fault.which * len(kernels))].send_signal(SIGNALS[fault.what])
                self.counts[fault.what] += 1

    def _kernels(self, host: int) -> list[psutil.Process]:
        found = []
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(host).children():
                with contextlib.suppress(psutil.Error):
                    if "bridge_kernel" in child.cmdline() and child.status() != psutil.STATUS_STOPPED:
                        found.append(child)
        return found

    def finish(self, timeout_s: float) -> None:
        """Have the driver end in good order. Raises AssertionError if it does not."""
        driver = self._running()
        until = time.monotonic() + timeout_s
        while not self._told and time.monotonic() < until:
            time.sleep(0.05)  # it listens to signals once it has opened the store
        driver.terminate()
        try:
            code = driver.wait(timeout_s)
        except subprocess.TimeoutExpired:
            for sign in (signal.SIGUSR1, signal.SIGUSR2):  # it says where it is
                driver.send_signal(sign)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    driver.wait(2)
            raise AssertionError(f"the driver does not come to its end in {timeout_s} s\n{self.log_tail()}") from None
        assert code == 0, f"the driver ended with exit code {code}\n{self.log_tail()}"

    def _await_news(self) -> None:
        """Until something is told, if anything is: what was told this very moment is what could still be lost."""
        ledger = self.directory / "ledger"
        before = ledger.stat().st_size if ledger.exists() else 0
        until = time.monotonic() + NEWS_S
        while time.monotonic() < until and (not before or ledger.stat().st_size == before):
            time.sleep(0.001)

    @property
    def _told(self) -> int:
        """How many lines the driver that runs now has written; 0 until it has opened the store."""
        pid = self._running().pid
        lines = plan.ledger(self.directory)
        opened = [n for n, line in enumerate(lines) if isinstance(line, plan.Opened) and line.pid == pid]
        return len(lines) - opened[-1] if opened else 0

    def _running(self) -> subprocess.Popen[bytes]:
        driver = self._driver
        assert driver is not None
        assert driver.poll() is None, f"the driver ended with exit code {driver.returncode}\n{self.log_tail()}"
        return driver

    def log_tail(self, characters: int = 20_000) -> str:
        return self._log.read_text(errors="replace")[-characters:]

    def close(self) -> None:
        """Leave nothing running, whatever happened."""
        if self._driver is not None and self._driver.poll() is None:
            self._driver.kill()
            self._driver.wait()
