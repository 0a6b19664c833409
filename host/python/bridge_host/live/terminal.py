"""Lines in a terminal: one, on stderr, while something runs that takes long; then how it ended."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.text import Text

from bridge_kernel.contract.line import Line, Summary, quantity

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from typing import TextIO

    from .told import Told

__all__ = ("Terminal",)

SLOW_NS: Final = 1_000_000_000
"""What takes less is not shown at all."""
FRAME_S: Final = 0.1
WINDOW_NS: Final = 1_000_000_000
EACH_WINDOW: Final = 4  # settled lines a second; the others are counted, and told in one
_STYLES: Final = {"ok": "green", "error": "red", "running": "blue", "queued": "blue"}
_ERASE: Final = "\r\x1b[2K"
# One for all: two hosts draw on one screen, and each writes through what the other has put before the streams.
_LOCK: Final = threading.RLock()
# Held while this process forks: a child whose copy some other thread held could never print again.
os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


class Terminal:
    """The terminal of this process, or whatever stderr is: if it is no terminal, only how commands ended is written.

    rich's own live display is not used: what the user prints meanwhile, it keeps until the line is ended, loses what
    then is left of it, and writes stdout to stderr.
    """

    pause = SLOW_NS / 1e9

    def __init__(self, waiting: Collection[object] | None = None) -> None:
        """Where there is a prompt, `waiting` is empty while somebody may type there: nothing is written then."""
        self.lock = _LOCK
        self._waiting = waiting
        self._told: dict[str, Told] = {}
        self._out: TextIO = _beneath(sys.stderr)
        self._console = Console(file=self._out, highlight=False)
        self._animated = self._console.is_terminal and not self._console.is_dumb_terminal
        self._drawn = False
        self._midline = False
        self._between: tuple[_Between, ...] = ()
        self._window = 0
        self._written = 0
        self._unsaid = [0, 0]  # ended well, failed

    # -- Place -------------------------------------------------------------------

    def begin(self, told: Told) -> bool:
        self._told[told.id] = told
        return True

    def waits_for(self, told: Told) -> bool:
        return False

    def counted(self, told: Told, lm_calls: int, tokens: int) -> None:
        """It is seen at the next tick."""

    def end(self, told: Told, error: BaseException | None, now: int) -> None:
        del self._told[told.id]
        if now - told.began >= SLOW_NS and self._may_write():
            told.end(error, now)
            self._settle(told.line(now), now)
        oldest = next(iter(self._told.values()), None)
        if oldest is None or now - oldest.began < SLOW_NS:
            self._say_unsaid()
            self._leave()

    def tick(self, now: int) -> float | None:
        if not self._told:
            return None
        # In the order in which they began.
        slow = [told for told in self._told.values() if now - told.began >= SLOW_NS]
        if not slow:
            return max((SLOW_NS - (now - next(iter(self._told.values())).began)) / 1e9, FRAME_S)
        if self._animated:
            if self._may_write():
                self._draw([told.line(now) for told in slow[:4]], len(self._told))
            else:
                self._leave()
        return FRAME_S

    def close(self, now: int) -> None:
        self._say_unsaid()
        self._leave()

    def abandon(self) -> None:
        self._told.clear()
        self._leave()

    def _may_write(self) -> bool:
        return self._waiting is None or bool(self._waiting)

    # -- what is on the screen -----------------------------------------------------

    def _draw(self, lines: list[Line], running: int) -> None:
        if not self._between:
            # Somebody may have written half a line: as many spaces as there are columns end it, and change nothing
            # at the beginning of one, for a terminal does not go to the next line until there is one more.
            self._write(" " * self._console.width + _ERASE)
            self._midline = False
            self._between = _Between.install(self)
        if self._midline:
            return
        if running == 1:
            text = _text(lines[0])
        else:
            subjects = ", ".join(dict.fromkeys(line.subject for line in lines))
            elapsed = f"{lines[0].elapsed / 1e9:.1f} s"
            text = Text.assemble((lines[0].mark, "blue"), f" {quantity(running, 'command')}  {elapsed} · {subjects}")
        text.truncate(max(self._console.width - 1, 1), overflow="ellipsis")
        with self._console.capture() as captured:
            self._console.print(text, end="", no_wrap=True, crop=False, soft_wrap=True)
        self._write(_ERASE + captured.get())
        self._drawn = True

    def _settle(self, line: Line, now: int) -> None:
        if now - self._window >= WINDOW_NS:
            self._say_unsaid()
            self._window, self._written = now, 0
        if self._written >= EACH_WINDOW:
            self._unsaid[line.state != "ok"] += 1
            return
        self._written += 1
        self._print(_text(line))

    def _say_unsaid(self) -> None:
        ok, failed = self._unsaid
        if ok or failed:
            self._unsaid = [0, 0]
            self._print(Text(f"… and {Summary(ok, failed).text()}", style="dim"))

    def _print(self, text: Text) -> None:
        with self._console.capture() as captured:
            self._console.print(text, soft_wrap=True)
        self._erase()
        fresh = (
            "" if not self._animated or (self._between and not self._midline) else " " * self._console.width + _ERASE
        )
        self._write(fresh + captured.get())
        self._midline = False

    def _erase(self) -> None:
        if self._drawn:
            self._write(_ERASE)
            self._drawn = False

    def _leave(self) -> None:
        """Nothing is shown any more: the streams are their owners' again."""
        self._erase()
        between, self._between = self._between, ()
        for one in between:
            one.uninstall()

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that has been closed: nobody looks any more
            self._out.write(text)
            self._out.flush()

    def write_between(self, stream: TextIO, text: str) -> int:
        """Somebody prints: the line makes room, and comes back with the next tick."""
        with self.lock:
            self._erase()
            written = stream.write(text)
            stream.flush()
            if text:
                self._midline = not text.endswith("\n")
            return written

    def make_room(self) -> None:
        """Somebody is going to write where nobody sees it, `input()` for example: as after half a line."""
        with self.lock:
            self._erase()
            self._midline = True


class _Between:
    """Stands for stdout or stderr while a line is shown beneath what is printed."""

    def __init__(self, terminal: Terminal, name: str, stream: TextIO) -> None:
        self.stream = stream
        self.installed = True
        self._terminal = terminal
        self._name = name

    @classmethod
    def install(cls, terminal: Terminal) -> tuple[_Between, ...]:
        made = []
        for name in ("stdout", "stderr"):
            _remove_ended(name)
            stream = getattr(sys, name)
            # What goes to a file goes there as before: it does not meet the line.
            if stream is not None and stream.isatty():
                made.append(cls(terminal, name, stream))
                setattr(sys, name, made[-1])
        return tuple(made)

    def uninstall(self) -> None:
        """Out of the way, unless somebody has put something before this one: then as soon as that is gone."""
        self.installed = False
        _remove_ended(self._name)

    def write(self, text: str) -> int:
        if not self.installed:  # somebody has kept it
            return self.stream.write(text)
        return self._terminal.write_between(self.stream, text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def fileno(self) -> int:
        number = self.stream.fileno()
        if self.installed:
            self._terminal.make_room()
        return number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _remove_ended(name: str) -> None:
    while isinstance(stream := getattr(sys, name), _Between) and not stream.installed:
        setattr(sys, name, stream.stream)


def _beneath(stream: TextIO) -> TextIO:
    while isinstance(stream, _Between):
        stream = stream.stream
    return stream


def _text(line: Line) -> Text:
    mark, rest = line.text().split(" ", 1)
    subject = len(rest) - len(rest.split("  ", 1)[-1])
    text = Text.assemble((mark, _STYLES[line.state]), " ", rest)
    text.stylize("bold", 2, 2 + subject)
    text.stylize("dim", 2 + subject)
    return text
