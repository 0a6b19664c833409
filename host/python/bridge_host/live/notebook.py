"""Lines in a notebook: one for each of a cell's first commands, one for all the others together."""

from __future__ import annotations

import contextvars
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from bridge_kernel.contract.line import Summary

from ..telemetry.figures.histogram import Histogram

if TYPE_CHECKING:
    from collections.abc import Callable

    from .told import Told

__all__ = ("Cell", "Notebook")

OWN: Final = 5
"""Commands of a cell that have a line of their own, and failed ones beyond those that do."""
CELLS: Final = 64
PAUSE_S: Final = 0.2
EACH_TICK: Final = 2  # so a cell's lines change ten times a second at most, all together
SHORT_NS: Final = 150_000_000
"""Before, nothing is shown of a command: most have ended by then."""
LATE_NS: Final = 1_000_000_000
"""For so long after a cell's last command has ended something may still be told of it."""
_ALL: Final = "all"


class Cell:
    """One run of a cell. What it shows is bounded, whatever is done in it: 2 * OWN lines and a summary.

    With `updates` a line is shown once a command has run for a while, and is changed in place from then on; without,
    each is shown when it is settled and not changed any more, and so is the summary, at the end of the cell.
    """

    def __init__(self, publisher: Any, *, updates: bool, now: int) -> None:
        """Belongs to the cell whose context this is: whatever is published is published in that."""
        self.updates = updates
        self.over = False
        self.running = 0
        self._context = contextvars.copy_context()
        self._publisher = publisher
        self._began = now
        self._active = now
        self._commands = 0
        self._summed = 0
        """How many commands the last summary was of that is not changed any more."""
        self._ok = 0
        self._failed = 0
        self._shown_failures = 0
        self._durations = Histogram()
        self._lm_calls = 0
        self._tokens = 0
        self._prefix = ""
        self._own: dict[str, Told] = {}
        self._ended: set[str] = set()
        self._shown: OrderedDict[str, int] = OrderedDict()  # what is displayed, the one that changed last at the end
        self._changed: set[str] = set()

    def begin(self, told: Told) -> None:
        self.running += 1
        self._commands += 1
        if self._commands <= OWN:
            self._own[told.id] = told
            self._prefix = self._prefix or told.id
        else:
            self._changed.add(_ALL)

    def has_line(self, told: Told) -> bool:
        return told.id in self._own

    def end(self, told: Told, error: BaseException | None, now: int) -> None:
        self.running -= 1
        self._active = now
        self._durations.add(now - told.began)
        if error is None:
            self._ok += 1
        else:
            self._failed += 1
            if told.id not in self._own and self._shown_failures < OWN:
                self._shown_failures += 1
                self._own[told.id] = told
        if told.id in self._own:
            told.end(error, now)
            self._ended.add(told.id)
            self._show(told.id, now)
        if self._commands > OWN:
            self._changed.add(_ALL)
            # Once they are twice as many: a thread may go on sending commands for days.
            if self.over and not self.updates and not self.running and self._commands >= 2 * self._summed:
                self._show(_ALL, now)

    def counted(self, told: Told, lm_calls: int, tokens: int) -> None:
        self._lm_calls += lm_calls
        self._tokens += tokens
        if told.id in self._own:
            self._changed.add(told.id)
        if self._commands > OWN:
            self._changed.add(_ALL)

    def tick(self, now: int, most: int) -> int:
        """Show what has changed, at most so many, those first that have waited longest; how many were shown."""
        if not self.updates:
            return 0
        due = [
            id
            for id, told in self._own.items()
            if id in self._changed or (id not in self._ended and (id in self._shown or now - told.began >= SHORT_NS))
        ]
        moves = _ALL in self._changed or (self.running and self._commands > OWN)
        if moves and (_ALL in self._shown or self._own.keys() <= self._shown.keys()):  # beneath the lines
            due.append(_ALL)
        due.sort(key=lambda id: self._shown.get(id, 0))
        for id in due[:most]:
            self._show(id, now)
        return len(due[:most])

    def finish(self, now: int) -> None:
        """The cell has been run, though some of its commands may run still."""
        self.over = True
        if self.updates:
            for id in self._own:
                if id in self._changed or id not in self._ended:
                    self._show(id, now)
        if _ALL in self._changed:
            self._show(_ALL, now)

    def quiet(self, now: int) -> bool:
        """Whether nothing is to be expected any more."""
        pending = self._changed and self.updates
        return not self.running and not pending and now - self._active > LATE_NS

    def _show(self, id: str, now: int) -> None:
        self._changed.discard(id)
        if id is _ALL:
            self._summed = self._commands
        shown = self._summary(now) if id is _ALL else self._own[id].line(now)
        data = {"text/plain": shown.text(), "text/html": shown.html()}
        if self.updates:
            transient = {"display_id": f"bridge-live-{self._prefix}-all" if id is _ALL else f"bridge-live-{id}"}
            update = id in self._shown
        else:
            transient, update = {}, False
        # Beyond the end of the cell there is nobody to take what belongs to it, unless by its display's id: without
        # one it goes to the cell that runs now, which is the one that waits for it.
        context = contextvars.Context() if self.over and not self.updates else self._context.copy()
        context.run(self._publisher.publish, data, {}, transient=transient, update=update)
        self._shown[id] = now

    def _summary(self, now: int) -> Summary:
        p50, p95 = self._durations.percentiles(0.5, 0.95)
        elapsed = now - self._began
        return Summary(self._ok, self._failed, self.running, p50, p95, self._lm_calls, self._tokens, elapsed)


class Notebook:
    """The cells of the notebook whose kernel this process is."""

    pause = PAUSE_S

    def __init__(
        self,
        shell: Any,
        sync: Callable[[], None],
        *,
        forced: bool = False,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        """`shell` is IPython's; `forced`: update in place whatever the front end says of itself."""
        self.lock = threading.RLock()
        self._shell = shell
        self._sync = sync
        self._forced = forced
        self._clock = clock
        # Also those that are quiet: what a cell has left behind may go on sending commands, and counts with it.
        self._cells: OrderedDict[str, Cell] = OrderedDict()
        self._over: OrderedDict[str, None] = OrderedDict()  # cells that have been run
        shell.events.register("post_run_cell", self._ran)

    def begin(self, told: Told) -> bool:
        parent = self._shell.kernel.get_parent("shell")
        header = parent.get("header") if parent else None
        if not header or header["msg_type"] != "execute_request" or parent["content"].get("silent"):
            return False  # what a widget asks for, for example: it has no cell
        cell = self._cells.get(header["msg_id"])
        if cell is None:
            cell = self._cells[header["msg_id"]] = self._cell(parent["metadata"], told.began)
            cell.over = header["msg_id"] in self._over
        self._cells.move_to_end(header["msg_id"])
        told.where = cell
        cell.begin(told)
        return True

    def _cell(self, metadata: dict[str, Any], now: int) -> Cell:
        if len(self._cells) >= CELLS:
            del self._cells[next((id for id, cell in self._cells.items() if not cell.running), next(iter(self._cells)))]
        publisher = self._shell.display_pub
        # JupyterLab, Notebook and VS Code name the cell; jupyter console and nbclient do not. The console ignores
        # updates, nbclient those that come after the end of the cell: a spinner would be left there for ever.
        # What captures a cell's output (%%capture) keeps every update.
        updates = (self._forced or "cellId" in metadata) and hasattr(publisher, "pub_socket")
        return Cell(publisher, updates=updates, now=now)

    def waits_for(self, told: Told) -> bool:
        cell: Cell = told.where
        return not cell.updates and cell.has_line(told)

    def end(self, told: Told, error: BaseException | None, now: int) -> None:
        cell: Cell = told.where
        cell.end(told, error, now)

    def counted(self, told: Told, lm_calls: int, tokens: int) -> None:
        cell: Cell = told.where
        cell.counted(told, lm_calls, tokens)

    def tick(self, now: int) -> float | None:
        left = EACH_TICK
        for cell in self._cells.values():
            left -= cell.tick(now, left)
        return PAUSE_S if any(not cell.quiet(now) for cell in self._cells.values()) else None

    def _ran(self, result: object = None) -> None:
        """A cell has been run: IPython's event, before the front end hears of it."""
        parent = self._shell.kernel.get_parent("shell")
        if not parent:
            return
        id = parent["header"]["msg_id"]
        with self.lock:
            self._over[id] = None  # what it has submitted may begin only now
            if len(self._over) > CELLS:
                self._over.popitem(last=False)
            cell = self._cells.get(id)
        if cell is not None:
            self._sync()
            with self.lock:
                cell.finish(self._clock())

    def close(self, now: int) -> None:
        for cell in self._cells.values():
            if not cell.over:
                cell.finish(now)
        self.abandon()

    def abandon(self) -> None:
        self._shell.events.unregister("post_run_cell", self._ran)
        self._cells.clear()
