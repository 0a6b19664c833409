"""What every exporter is: open until it is closed, by hand, by the block that it was opened in, or with its host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ("Exporter",)


class Exporter(ABC):
    """A context manager. `close` sets `_closed`."""

    _closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    @abstractmethod
    def close(self) -> None:
        """Send what has happened, within a bounded time, and end. Closing twice does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
