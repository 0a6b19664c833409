"""The kernel process: its configuration, its threads, and who ends them."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import zmq
from traitlets import CaselessStrEnum, Dict, Unicode
from traitlets.config import Application, Configurable

from ._version import __version__
from .lane import Lane
from .lifetime import Lifeline, Parent, leave, orphaned
from .output import capture, inherit_in_threads
from .policy import Policy
from .runtime import Runtime
from .sockets import ConnectionInfo, Sockets, bind

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("BridgeKernelApp",)

SWITCH_INTERVAL_S = 5e-4
"""Python's default of 5 ms lets one busy command hold up each message of all others that long."""
SHUTDOWN_GRACE_S = 1.0
THREAD_LIMITS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "POLARS_MAX_THREADS",
    "RAYON_NUM_THREADS",
)
"""Set to 1 unless the environment says otherwise: kernels run in numbers, and each would start a thread a core."""


class BridgeKernelApp(Application):
    """A stateless Jupyter kernel: it runs a command, calls its host back, answers and forgets."""

    name = "bridge-kernel"
    version = __version__
    classes: list[type[Configurable]] = [Policy]  # noqa: RUF012 - a declaration of traitlets
    aliases = Dict({"f": "BridgeKernelApp.connection_file", "log-level": "Application.log_level"})
    flags = Dict({})

    connection_file = Unicode(help="The Jupyter connection file to serve.").tag(config=True)
    lifeline = CaselessStrEnum(
        ["", "stdin"],
        "",
        help="With 'stdin' the kernel ends, and all that it started, once its stdin does: who owns it holds the pipe.",
    ).tag(config=True)

    def start(self) -> None:
        """Serve until shut down. Exits with 1 if the connection file cannot be served, with the reason on stderr."""
        faulthandler.enable()
        if self.lifeline and not self._take_lifeline():
            return
        for name in THREAD_LIMITS:
            os.environ.setdefault(name, "1")
        # Only a running cell may be interrupted by a signal; commands are stopped by the lane.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        runtime = Runtime(Policy(parent=self))
        try:
            if not self.connection_file:
                raise ValueError("no connection file: start the kernel with -f FILE, as Jupyter does")
            info = ConnectionInfo.read(self.connection_file)
            sockets = bind(info, session=runtime.identity.id, max_message_bytes=runtime.policy.max_message_bytes)
        except (ValueError, OSError, zmq.ZMQError) as exc:
            self.log.critical("Bridge cannot serve %r: %s", self.connection_file, exc)
            self.exit(1)
            return
        inherit_in_threads()
        capture()
        self._serve(runtime, info, sockets)

    def _take_lifeline(self) -> bool:
        """Before anything else: the owner may go while the kernel starts."""
        try:
            Lifeline().watch_in_thread(orphaned)
        except OSError as exc:
            self.log.critical("Bridge cannot take its lifeline, stdin: %s", exc)
            self.exit(1)
            return False
        return True

    def _serve(self, runtime: Runtime, info: ConnectionInfo, sockets: Sockets) -> None:
        parent = Parent.from_environment()
        if parent is not None and parent.gone:
            orphaned()
        main = _MainThread()
        pairs = [_pair(sockets.context, name) for name in ("shell", "control")]
        lane = Lane(
            runtime,
            sockets,
            parent,
            cells_shell=pairs[0][0],
            cells_control=pairs[1][0],
            want_cells=main.want_cells,
            interrupt_cells=main.interrupt,
            on_shutdown=main.shut_down,
            on_parent_death=orphaned,
        )
        if parent is not None and parent.fd is None:
            parent.poll_in_thread(orphaned)
        threading.Thread(target=_heartbeat, args=(sockets.heartbeat,), name="bridge-heartbeat", daemon=True).start()
        lane.status("starting")
        io_thread = threading.Thread(target=_or_end, args=(lane.run, self.log), name="bridge-io", daemon=True)
        io_thread.start()
        if main.wait() == "cells":
            from .kernel import serve_cells  # IPython: half a second that most kernels never spend

            ends = (pairs[0][1], pairs[1][1])
            serve_cells(runtime, lane, info, sockets.stdin, *ends, self.connection_file, main, self.log)
        io_thread.join(SHUTDOWN_GRACE_S)
        sockets.shell.close(linger=500)
        sockets.control.close(linger=500)
        sockets.iopub.close()
        logging.shutdown()


def _or_end(run: Callable[[], None], log: logging.Logger) -> None:
    """A kernel whose lane has failed is deaf: better that its host sees it die."""
    try:
        run()
    except BaseException:
        log.critical("the lane failed: the kernel ends", exc_info=True)
        os._exit(1)


class _MainThread:
    """What the main thread waits for: a first cell, or the end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._cells = False
        self._stopped = False
        self._on_stop: Any = None
        self.interrupt_cell: Callable[[], None] | None = None  # set by the cells

    def want_cells(self) -> None:
        with self._changed:
            self._cells = True
            self._changed.notify()

    def shut_down(self) -> None:
        """End the process, within the grace period whatever a cell is doing."""
        leave(0, grace_s=SHUTDOWN_GRACE_S)
        with self._changed:
            self._stopped = True
            self._changed.notify()
            on_stop = self._on_stop
        if on_stop is not None:
            on_stop()

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the running cell; does nothing if there is none."""
        if self.interrupt_cell is not None:
            self.interrupt_cell()

    def wait(self) -> str:
        """Until cells are wanted ("cells") or the process should end ("stop")."""
        with self._changed:
            self._changed.wait_for(lambda: self._cells or self._stopped)
            return "stop" if self._stopped else "cells"

    def on_stop(self, callback: Any) -> None:
        """Call `callback` at shutdown: at once if that has begun."""
        with self._changed:
            self._on_stop = callback
            stopped = self._stopped
        if stopped:
            callback()


def _pair(context: zmq.Context[zmq.Socket[bytes]], name: str) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """Two ends of an inproc PAIR without a bound: what is in it was bounded where it came in."""
    ends = (context.socket(zmq.PAIR), context.socket(zmq.PAIR))
    for end in ends:
        end.linger = 0
        end.set_hwm(0)
    ends[0].bind(f"inproc://cells-{name}")
    ends[1].connect(f"inproc://cells-{name}")
    return ends


def _heartbeat(socket: zmq.Socket[bytes]) -> None:
    with suppress(zmq.ZMQError):  # the context's end is how it ends
        zmq.proxy(socket, socket)
