"""Events to a file, one JSON object a line: `host.telemetry.to_file("events.jsonl")`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import time
from typing import TYPE_CHECKING, Final

import msgspec

from bridge_kernel.contract.telemetry import Scalar

from .exporter import Exporter
from .feed import Feed, warn

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bridge_kernel.contract.telemetry import Event

    from ..telemetry import Telemetry
    from .feed import Taken

__all__ = ("JsonLines",)

MAX_BYTES: Final = 64 * 2**20
CLOSE_S: Final = 5.0
AGAIN_S: Final = 1.0
"""How long a file that cannot be written is left alone."""


class _Line(msgspec.Struct, omit_defaults=True):
    name: tuple[str, ...]
    measurements: dict[str, int | float]
    metadata: dict[str, Scalar]
    time: int
    dropped: int = 0


_encode: Final = msgspec.json.Encoder().encode


class JsonLines(Exporter):
    """Appends each event to a file: `{"name": […], "measurements": {…}, "metadata": {…}, "time": …}`.

    `time` is when the host had it, in ns since the epoch. Written by a thread of its own: what does not fit into its
    queue, or cannot be written, is counted in `dropped`, and the line next to the gap says how many (`"dropped": n`).

    The file belongs to this exporter: at `max_bytes` it becomes `<path>.1`, in place of the one before.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        path: str | os.PathLike[str],
        prefix: str | Iterable[str] = (),
        *,
        max_bytes: int = MAX_BYTES,
        max_queued: int = 10_000,
    ) -> None:
        """Open the file, made with mode 0600 if there is none, and attach to events whose names begin with `prefix`.

        Raises:
            OSError: it cannot be opened.
        """
        if max_bytes <= 0:
            raise ValueError(f"max_bytes is how large the file may get, not {max_bytes!r}")
        self.path = os.path.abspath(os.fspath(path))
        self._telemetry = telemetry
        self._max_bytes = max_bytes
        self._file: int | None = None
        self._size = 0
        self._rotates = True
        self._written = 0
        self._unwritten = 0
        self._untold = 0
        self._again_at = 0.0
        self._warned = False
        self._open()
        self._feed = Feed("bridge-jsonl", self._write, max_queued=max_queued)
        self._id = telemetry.attach(prefix, self._feed.put)

    @property
    def dropped(self) -> int:
        """How many events are not in the file: for want of room in the queue, or because it could not be written."""
        return self._feed.dropped + self._unwritten

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Write everything that has happened so far; whether it was done in time."""
        self._telemetry.sync()
        return self._feed.flush(timeout_s)

    def close(self) -> None:
        """Write what has happened, for 5 s at most, and let go of the file. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        self._telemetry.sync()
        self._telemetry.detach(self._id)
        if self._feed.close(CLOSE_S):
            self._let_go()
        # Else its thread hangs in a write, on a file system that is gone: the file is that thread's.

    def __repr__(self) -> str:
        dropped = f", {self.dropped} dropped" if self.dropped else ""
        return f"<JsonLines {self.path!r}: {self._written} events{dropped}{', closed' if self._closed else ''}>"

    # -- on the feed's thread ----------------------------------------------------

    def _write(self, taken: Taken, dropped: int) -> None:
        if not taken:
            return
        self._untold += dropped
        lines = [_line(at, event, 0) for at, event in taken]
        if self._untold:
            lines[-1] = _line(*taken[-1], self._untold)
        done = 0
        try:
            if self._gone() and time.monotonic() >= self._again_at:
                self._open()
            while self._file is not None and done < len(lines):
                if not self._rotates:
                    self._size = 0
                if self._size and self._size + len(lines[done]) > self._max_bytes:
                    self._rotate()
                count, room = done, self._max_bytes - self._size
                while count < len(lines) and (count == done or room >= len(lines[count])):
                    room -= len(lines[count])
                    count += 1
                self._append(b"".join(lines[done:count]))
                done = count
        except OSError as exc:
            self._let_go()
            self._again_at = time.monotonic() + AGAIN_S
            if not self._warned:
                self._warned = True
                warn(f"telemetry cannot be written to {self.path}: {exc}; it is tried again, what is lost is counted")
        self._written += done
        self._unwritten += len(lines) - done
        self._untold = self._untold + len(lines) - done if done < len(lines) else 0

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            with contextlib.suppress(OSError):  # all of it or nothing, so that the count is right
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)

    def _gone(self) -> bool:
        """Whether there is no file any more to write to, or another one in its place: somebody else moved it."""
        if self._file is None:
            return True
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            self._let_go()
            return True
        if os.path.samestat(there, os.fstat(self._file)):
            return False
        self._let_go()
        return True

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        about = os.fstat(self._file)
        self._size = about.st_size
        self._rotates = stat.S_ISREG(about.st_mode)  # /dev/null and its like must stay where they are
        # A line that was cut off, by a full disk or a crash, must not swallow the next one.
        if self._size and os.pread(self._file, 1, self._size - 1) != b"\n":
            self._append(b"\n")

    def _rotate(self) -> None:
        self._let_go()
        os.replace(self.path, f"{self.path}.1")
        self._open()

    def _let_go(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # what was not written has been said
                os.close(file)


def _line(at: int, event: Event, dropped: int) -> bytes:
    try:
        return _encode(_Line(event.name, event.measurements, event.metadata, at, dropped)) + b"\n"
    except (TypeError, ValueError, OverflowError):  # an event of the user's own with what JSON cannot carry
        measurements, metadata = _plain(event.measurements), _plain(event.metadata)
        said = {"name": [*map(str, event.name)], "measurements": measurements, "metadata": metadata, "time": at}
        return json.dumps(said | ({"dropped": dropped} if dropped else {})).encode() + b"\n"


def _plain(members: Mapping[str, object]) -> dict[str, object]:
    return {str(name): _plain_value(value) for name, value in members.items()}


def _plain_value(value: object) -> object:
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return f"an integer of {value.bit_length()} bits"  # in digits it may be too long for Python
    if isinstance(value, float) and not math.isfinite(value):
        return None  # as msgspec has it: JSON has no word for it
    return value if value is None or isinstance(value, str | int | float) else str(value)
