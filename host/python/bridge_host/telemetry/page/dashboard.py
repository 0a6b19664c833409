"""`host.telemetry.dashboard()`: the live page of a host, as a widget in a notebook."""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

try:
    import anywidget
    import traitlets
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        "the dashboard needs anywidget, where the host runs and where JupyterLab runs: pip install 'bridge-kernel[lab]'; "
        "in a terminal there is `jupyter bridge top`",
        name=exc.name,
    ) from None

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..telemetry import Telemetry
    from .snapshot import Snapshot

__all__ = ("Dashboard",)

EVERY_S: Final = 0.5
_STATIC: Final = Path(__file__).parent / "static"


class Dashboard(anywidget.AnyWidget):
    """The page. It is sent what has changed, twice a second at most, until it or the host is closed.

    Nothing is sent before it is displayed, nor while the page says that nobody can see it.
    """

    # As text: given a path, anywidget would watch the file for changes.
    _esm = (_STATIC / "dashboard.js").read_text(encoding="utf-8")
    _css = (_STATIC / "dashboard.css").read_text(encoding="utf-8")
    snapshot = traitlets.Dict(help="A `Snapshot`, as JSON.").tag(sync=True)
    watched = traitlets.Bool(None, allow_none=True, help="Whether somebody can see it; None: no page said so.").tag(
        sync=True
    )

    def __init__(self, telemetry: Telemetry, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._snapshots = telemetry.snapshots
        self._clock = clock
        self._shown: Snapshot = self._snapshots.take()
        self._sent_at = clock()
        self._displayed = False
        self._refreshing = threading.Lock()
        self._wanted = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        wanted, ended = self._wanted, self._ended  # not the widget itself: nobody here keeps it alive

        def end() -> None:
            ended.set()
            wanted.set()

        self._forget = self._snapshots.on_close(end)
        self._finalizer = weakref.finalize(self, end)
        self._finalizer.atexit = False
        super().__init__(snapshot=msgspec.to_builtins(self._shown))

    def refresh(self) -> bool:
        """Send what has changed, if it is time to and somebody may see it; whether something was sent."""
        with self._refreshing:
            now = self._clock()
            if not self._wanted.is_set() or now - self._sent_at < EVERY_S:
                return False
            return self._show_now(now)

    def _show_now(self, now: float) -> bool:
        snapshot = self._snapshots.take()
        if snapshot.same_as(self._shown):
            return False
        self._shown, self._sent_at = snapshot, now
        self.snapshot = msgspec.to_builtins(snapshot)
        return True

    @traitlets.observe("watched")
    def _on_watched(self, change: Any) -> None:
        self._want()

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        self._displayed = True
        self._want()
        with self._refreshing:
            self._show_now(self._clock())  # as it is now, however long ago it was made
        return super()._repr_mimebundle_(**kwargs)

    def _want(self) -> None:
        """Start or rest, as somebody may see it or not."""
        if self._ended.is_set():
            return
        # A page that has said nothing may be busy loading, or its kernel busy: what was displayed counts as seen.
        if self.watched or (self.watched is None and self._displayed):
            self._wanted.set()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_feed,
                    args=(weakref.ref(self), self._wanted, self._ended),
                    name="bridge-dashboard",
                    daemon=True,
                )
                self._thread.start()
        else:
            self._wanted.clear()

    def close(self) -> None:
        """End it; the page that is displayed goes with it."""
        self._forget()
        self._finalizer()
        super().close()

    def __repr__(self) -> str:
        return f"<Dashboard of host {self._shown.pid}: {self._shown.summary}>"


def _feed(widget: weakref.ref[Dashboard], wanted: threading.Event, ended: threading.Event) -> None:
    while not ended.wait(EVERY_S):
        wanted.wait()
        if (dashboard := widget()) is None:
            return
        if not ended.is_set():
            dashboard.refresh()
        del dashboard
    dashboard = widget()
    if dashboard is not None and dashboard.comm is not None:
        with dashboard._refreshing:
            dashboard._show_now(dashboard._clock())  # that the host is closed
