"""From nothing to a kernel that answers: the process and the handshake, or the handshake alone for an attached one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import zmq

from bridge_kernel.contract.errors import BridgeError, HostClosed, KernelStartFailed

from ..client import KernelClient
from .process import KernelProcess, RuntimeDirectory

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..client import Listener

__all__ = ("Launcher",)

MAX_SOCKETS: Final = 16_384  # libzmq's default of 1023 is about 100 kernels


class Launcher:
    """Owns what kernels share: the ZMQ context and the runtime directory. Belongs to one event loop."""

    def __init__(self, listener: Listener, **options: Any) -> None:
        """`options` are those of `KernelProcess`."""
        self._listener = listener
        self._options = options
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.max_sockets = MAX_SOCKETS
        self._directory = RuntimeDirectory()
        self._processes: set[KernelProcess] = set()  # those of which something may be left

    @property
    def directory(self) -> Path:
        """The host's own, mode 0700, as long as it is open."""
        return self._directory.path

    def process(self, number: int) -> KernelProcess:
        """A process that is yet to be launched.

        Raises:
            KernelStartFailed: its directory cannot be made.
        """
        try:
            process = KernelProcess(self._directory, number, **self._options)
        except OSError as exc:
            raise KernelStartFailed(f"a kernel could not be started: {exc}") from exc
        self._processes.add(process)
        return process

    async def bury(self, process: KernelProcess) -> None:
        """Wait for the process to end, kill it if it does not, remove what is left of it. `close` does it again if
        this is cancelled.
        """
        await process.stop()
        self._processes.discard(process)

    async def launch(
        self, process: KernelProcess, on_exit: Callable[[], None], on_lost: Callable[[str], None]
    ) -> KernelClient:
        """Start the process and shake hands with it. If that fails nothing is left of it.

        Raises:
            KernelStartFailed: the process could not be started, ended, or does not answer.
        """
        try:
            info = await process.start(on_exit)
            client = KernelClient(info, self._context, self._listener, on_lost)
            try:
                await self._shake_hands(client, process)
            except BaseException as exc:
                client.close(exc if isinstance(exc, BridgeError) else KernelStartFailed("the start was cancelled"))
                raise
            if not process.alive:
                client.close(HostClosed())
                raise KernelStartFailed("the kernel ended as soon as it had started", remedy=process.log_tail())
        except BaseException as exc:
            process.kill()
            with anyio.CancelScope(shield=True):
                await self.bury(process)
            if isinstance(exc, OSError | zmq.ZMQError):
                raise KernelStartFailed(f"a kernel could not be started: {exc}") from exc
            raise
        return client

    async def _shake_hands(self, client: KernelClient, process: KernelProcess) -> None:
        """Shake hands, or fail as soon as the process has ended: not only when the time is up."""
        attaching = asyncio.ensure_future(client.attach())
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait((attaching, ended), return_when=asyncio.FIRST_COMPLETED)
            if not attaching.done():
                raise KernelStartFailed(
                    f"the kernel ended with exit code {process.exit_code} before it answered",
                    remedy=process.log_tail() or "It printed nothing.",
                )
            attaching.result()
        finally:
            attaching.cancel()
            ended.cancel()

    async def attach(self, connection_file: str, session: str, on_lost: Callable[[str], None]) -> KernelClient:
        """Connect to a kernel that runs already.

        Raises:
            KernelStartFailed: the file is no connection file, or nobody answers.
        """
        try:
            content = await anyio.to_thread.run_sync(Path(connection_file).read_bytes)
        except OSError as exc:
            raise KernelStartFailed(f"the connection file cannot be read: {exc}") from exc
        info = KernelClient.read_connection_file(content)
        client = KernelClient(info, self._context, self._listener, on_lost)
        try:
            await client.attach(session)
        except BaseException as exc:
            client.close(exc if isinstance(exc, BridgeError) else KernelStartFailed("the attach was cancelled"))
            raise
        return client

    async def close(self) -> None:
        """Wait for every process to end, close the sockets and remove every file."""
        async with anyio.create_task_group() as burials:
            for process in tuple(self._processes):
                burials.start_soon(self.bury, process)
        self._context.destroy(linger=0)
        self._directory.close()
