"""`AsyncStream`: what a generator in a kernel yields, as it comes, with its producer never far ahead."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import anyio
import msgspec

from bridge_kernel.contract.errors import BridgeError, Cancelled, HostClosed, InternalError, ReplayDiverged

from .values import ValueReader

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from bridge_kernel.contract.frames import Buffer
    from bridge_kernel.contract.methods import Chunk
    from bridge_kernel.contract.values import Tag

    from .engine.engine import Engine
    from .engine.running import Running

__all__ = ("WINDOW", "AsyncStream")

WINDOW: Final = 16  # chunks that a stream may be ahead of who reads it
T = TypeVar("T")


class AsyncStream(Generic[T]):
    """What a generator in a kernel yields, as it comes. `result` is what it returned, once it has ended."""

    def __init__(self, engine: Engine, hook: Callable[[Tag], object]) -> None:
        self._engine = engine
        self._hook = hook
        self._chunks: deque[Any] = deque()
        self._arrived = asyncio.Event()
        self._scope = anyio.CancelScope()
        self._running: Running | None = None
        self._consumed = 0
        self._received = 0
        self._digest = hashlib.blake2b(digest_size=16)  # of what was received
        self._attempt = 0
        self._before = 0  # chunks that had come before this attempt
        self._again = 0  # those of them that have come again
        self._digest_again = self._digest
        self._done = False
        self._error: BaseException | None = None
        self.result: Any = None

    def _start(self, run: Callable[[], Any]) -> None:
        async def pump() -> None:
            with self._scope:
                try:
                    self.result = await run()
                except Exception as exc:  # noqa: BLE001 - whoever reads the stream is told
                    self._error = self._error or exc
                except asyncio.CancelledError:
                    self._error = self._error or HostClosed("the host was closed, or the stream")
                    raise
                finally:
                    self._done = True
                    self._arrived.set()

        if not self._engine.tasks.start_soon(pump):
            self._error, self._done = HostClosed(), True
            self._arrived.set()

    def _on_started(self, running: Running) -> None:
        self._running = running

    def _on_chunk(self, chunk: Chunk, buffers: Sequence[Buffer]) -> None:
        if self._error is not None:
            return
        if self._running is not None and self._running.attempt != self._attempt:
            self._attempt, self._again, self._before = self._running.attempt, 0, self._received
            self._digest_again = hashlib.blake2b(digest_size=16)
        try:
            if self._repeats(chunk, buffers):
                return
            if chunk.seq != self._received or len(self._chunks) > 2 * WINDOW:
                raise InternalError(f"chunk {chunk.seq} came where {self._received} was due")
            _add(self._digest, chunk, buffers)
            value = ValueReader(buffers, self._hook).read(chunk.value, f"chunk[{chunk.seq}]")
        except BridgeError as exc:
            self._error = exc
            self._scope.cancel()
            return
        self._received += 1
        self._chunks.append(value)
        self._arrived.set()

    def _repeats(self, chunk: Chunk, buffers: Sequence[Buffer]) -> bool:
        """Whether an earlier attempt has sent this chunk already.

        Raises:
            ReplayDiverged: what was sent is not what is sent now.
        """
        if self._again >= self._before:
            return False
        if chunk.seq != self._again:
            raise InternalError(f"chunk {chunk.seq} came where {self._again} was due")
        _add(self._digest_again, chunk, buffers)
        self._again += 1
        if self._again == self._before and self._digest_again.digest() != self._digest.digest():
            raise ReplayDiverged(f"the stream yielded other values when it ran again, among its first {self._before}")
        if self._again <= self._consumed and self._again % (WINDOW // 2) == 0 and self._running is not None:
            self._running.give_credit(WINDOW // 2)
        return True

    async def __aiter__(self) -> AsyncIterator[T]:
        """Iterate; leaving the loop, however, stops the generator in the kernel."""
        try:
            while True:
                try:
                    yield await self.__anext__()
                except StopAsyncIteration:
                    return
        finally:
            await self.aclose()

    async def __anext__(self) -> T:
        while not self._chunks:
            if self._done:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        value: T = self._chunks.popleft()
        self._consumed += 1
        if self._consumed % (WINDOW // 2) == 0 and self._running is not None:
            self._running.give_credit(WINDOW // 2)
        return value

    async def aclose(self) -> None:
        """Stop the generator in the kernel; what it had sent already is dropped."""
        self.stop()

    def stop(self) -> None:
        """As `aclose`, from the loop's own thread."""
        self._chunks.clear()
        if not self._done and self._error is None:
            self._error = Cancelled("the stream was closed")
        self._scope.cancel()


def _add(digest: hashlib.blake2b, chunk: Chunk, buffers: Sequence[Buffer]) -> None:
    digest.update(msgspec.json.encode(chunk.value))
    for buffer in buffers:
        digest.update(buffer)
