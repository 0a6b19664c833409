"""One kernel process: started through jupyter_client, watched, ended with everything it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
from jupyter_client.manager import AsyncKernelManager

from bridge_kernel.contract.errors import KernelStartFailed

from ..client import KernelClient
from .orphans import Owner, here, started, write_owner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..client import ConnectionInfo

__all__ = ("KernelProcess", "RuntimeDirectory")

SHUTDOWN_S: Final = 3.0
GROUP_LOOKS: Final = 100
LOG_TAIL: Final = 4000  # characters of a dead kernel's log that go into its error


def _remove(path: str, pid: int) -> None:
    if os.getpid() == pid:  # a fork shares the directory, but does not own it
        shutil.rmtree(path, ignore_errors=True)


class RuntimeDirectory:
    """A private directory for connection files, IPC sockets and logs; removed when it is closed.

    Each kernel has a directory of its own in it, for it removes that when it finds its host dead. The record of
    who owns which process stays, for other kernels may be unable to notice (see `orphans`).
    """

    def __init__(self) -> None:
        # Short on purpose: the path of a Unix socket has room for 107 bytes.
        self.path = Path(tempfile.mkdtemp(prefix="bridge-"))  # made with mode 0700
        self._finalizer = weakref.finalize(self, _remove, str(self.path), os.getpid())
        self._where = here()
        self._started = started(os.getpid()) or 0.0
        self._kernels: dict[int, float] = {}
        self._write()

    def add(self, pid: int) -> None:
        """Record a kernel's process: our child, and not yet reaped."""
        if (start := started(pid)) is not None:
            self._kernels[pid] = start
            self._write()

    def discard(self, pid: int) -> None:
        """That process has ended: its pid may come to mean another."""
        if self._kernels.pop(pid, None) is not None:
            self._write()

    def _write(self) -> None:
        if self._finalizer.alive:
            # Failing to write costs the sweep, and only if this host is killed: no reason to fail a kernel for it.
            with contextlib.suppress(OSError):
                write_owner(self.path, Owner(self._where, os.getpid(), self._started, self._kernels))

    def close(self) -> None:
        self._finalizer()


class KernelProcess:
    """A kernel of ours, from its start to its end. Belongs to one event loop."""

    def __init__(
        self,
        directory: RuntimeDirectory,
        number: int,
        *,
        kernel_name: str,
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._runtime = directory
        self._own = directory.path / f"bridge-{number}"
        self._own.mkdir(mode=0o700)
        base = self._own / "kernel"
        self._log_path = base.with_suffix(".log")
        self._arguments = list(arguments)
        self._env = {**os.environ, **(env or {}), "BRIDGE_RUNTIME_DIR": str(self._own)}
        settings: dict[str, Any] = {"kernel_name": kernel_name, "connection_file": str(base.with_suffix(".json"))}
        if sys.platform != "win32" and len(f"{base}-5") < 100:
            # IPC: no ports to collide, and the directory's mode keeps everyone else out.
            settings |= {"transport": "ipc", "ip": str(base)}
        self._manager = AsyncKernelManager(**settings)
        self._loop = asyncio.get_running_loop()
        self._exited = asyncio.Event()
        self._watch_fd: int | None = None
        self._watch_task: asyncio.Task[None] | None = None
        self.pid = 0
        self.exit_code: int | None = None

    async def start(self, on_exit: Callable[[], None]) -> ConnectionInfo:
        """Launch the process; `on_exit` is called on the loop as soon as it has ended, whatever ended it.

        Raises:
            KernelStartFailed: the kernelspec is missing or the process could not be launched.
        """
        try:
            # Not in a thread: a start that is cancelled meanwhile would leave it open.
            with open(self._log_path, "wb") as log:  # noqa: ASYNC230
                await self._manager.start_kernel(extra_arguments=self._arguments, env=self._env, stdout=log, stderr=log)
        except asyncio.CancelledError:
            self._abort()
            raise
        except Exception as exc:
            raise KernelStartFailed(f"the kernel could not be launched: {type(exc).__name__}: {exc}") from exc
        provisioner: Any = self._manager.provisioner
        self.pid = provisioner.pid
        self._runtime.add(self.pid)
        self._watch(provisioner, on_exit)
        return KernelClient.read_connection_file(await anyio.Path(self._manager.connection_file).read_bytes())

    def _abort(self) -> None:
        """The start was cancelled: the process may be there already, and nobody knows it yet."""
        process: Any = getattr(self._manager.provisioner, "process", None)
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _watch(self, provisioner: Any, on_exit: Callable[[], None]) -> None:
        def exited() -> None:
            if self._watch_fd is not None:
                self._loop.remove_reader(self._watch_fd)
                os.close(self._watch_fd)
                self._watch_fd = None
            # Before it is reaped: until then its process group's id cannot come to mean another group.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._runtime.discard(self.pid)
            process = provisioner.process
            self.exit_code = process.poll() if process is not None else None
            self._exited.set()
            on_exit()

        with contextlib.suppress(AttributeError, OSError):  # not Linux, or forbidden in a sandbox
            self._watch_fd = os.pidfd_open(self.pid)
            self._loop.add_reader(self._watch_fd, exited)
            return

        async def poll() -> None:
            await provisioner.wait()
            exited()

        self._watch_task = self._loop.create_task(poll())

    @property
    def alive(self) -> bool:
        return self.pid != 0 and not self._exited.is_set()

    async def wait(self) -> None:
        """Until the process has ended."""
        await self._exited.wait()

    @property
    def connection_file(self) -> str:
        return str(self._manager.connection_file)

    def log_tail(self) -> str:
        """The end of what the process wrote to its own stdout and stderr: a crash's last words."""
        with contextlib.suppress(OSError):
            return self._log_path.read_text(errors="replace")[-LOG_TAIL:].strip()
        return ""

    async def stop(self) -> None:
        """Wait for the process to end, kill it if it does not, remove its files. What it started ended with it."""
        if self.pid:
            await self.end()
            await self._group_gone()
        await self._manager.cleanup_resources()
        await anyio.to_thread.run_sync(partial(shutil.rmtree, self._own, ignore_errors=True))

    async def _group_gone(self) -> None:
        """The group was killed with the process; its members may take a moment to be gone.

        Bounded: where nobody reaps orphans (a container without an init), they stay in the table as zombies.
        """
        with contextlib.suppress(OSError):  # no such group, or by now somebody else's
            for _ in range(GROUP_LOOKS):
                os.killpg(self.pid, 0)  # no signal: it only asks
                await anyio.sleep(0.005)

    def kill(self) -> None:
        """Kill the kernel's whole process group; does nothing once it has ended."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Wait until the process, which was asked to end, has done so; kill it if it takes too long."""
        try:
            async with asyncio.timeout(SHUTDOWN_S):
                await self._exited.wait()
        except TimeoutError:
            self.kill()
            await self._exited.wait()
