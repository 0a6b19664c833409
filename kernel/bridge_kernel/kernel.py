"""`BridgeKernel`: cells, run by ipykernel's own code, each in a fresh namespace with `session` bound to the host's.

Imported when the first cell arrives; until then a kernel has neither IPython nor ipykernel in it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import threading
from contextlib import suppress
from types import ModuleType, SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
from ipykernel.ipkernel import IPythonKernel
from ipykernel.zmqshell import ZMQDisplayPublisher, ZMQInteractiveShell
from IPython.core.error import StdinNotImplementedError
from IPython.core.profiledir import ProfileDir
from jupyter_client.session import Session
from tornado.ioloop import IOLoop
from traitlets import Float, Type, observe
from traitlets.config import Config
from zmq.eventloop.zmqstream import ZMQStream

from ._version import __version__
from .cell import Cell, CellOutput, CellSession, Unattached, UnattachedCell
from .command import OWN_FILES
from .contract.errors import BridgeError, Cancelled, Draining, PolicyDenied
from .contract.secrets import without_secrets
from .info import BANNER
from .interrupts import Interrupts
from .output import CURRENT

if TYPE_CHECKING:
    import logging
    from collections.abc import Coroutine, Sequence

    import zmq

    from .app import _MainThread
    from .lane import Lane
    from .runtime import Runtime
    from .sockets import ConnectionInfo, Iopub

__all__ = ("BridgeKernel", "serve_cells")


class _IopubFace:
    """What ipykernel's code takes for its iopub socket."""

    def __init__(self, iopub: Iopub, interrupts: Interrupts) -> None:
        self._iopub = iopub
        self._interrupts = interrupts

    def send_multipart(self, frames: Sequence[bytes], *args: Any, **kwargs: Any) -> None:
        with self._interrupts.held():
            self._iopub.send(frames)


class _DisplayPublisher(ZMQDisplayPublisher):
    """Displays belong to the cell or command whose code makes them, in its threads and after its end too."""

    def publish(self, data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        secrets = getattr(CURRENT.get(), "secrets", ())
        shown = {kind: without_secrets(it, secrets) if isinstance(it, str) else it for kind, it in data.items()}
        publisher: Any = super()
        publisher.publish(shown, *args, **kwargs)

    @property
    def parent_header(self) -> Any:
        current = CURRENT.get()
        return super().parent_header if current is None else msgspec.json.decode(current.parent)

    @parent_header.setter
    def parent_header(self, value: Any) -> None:
        publisher: Any = ZMQDisplayPublisher
        publisher.parent_header.fset(self, value)


class _Shell(ZMQInteractiveShell):
    """IPython without a home directory, and whose `exit` leaves the kernel to those who still need it."""

    display_pub_class = Type(_DisplayPublisher)

    def init_ipython_dir(self, ipython_dir: str | None) -> None:
        self.ipython_dir = self.kernel.profile_dir.location

    @observe("exit_now")
    def _update_exit_now(self, change: object) -> None:
        """The front end is told (`ask_exit`) and may shut the kernel down."""

    def _get_exc_info(self, exc_tuple: Any = None) -> tuple[Any, Any, Any]:
        ipython: Any = super()
        etype, value, tb = ipython._get_exc_info(exc_tuple)
        # Our own frames beneath the cell's line would hide it.
        return etype, value, _without_own_frames(tb) if isinstance(value, BridgeError) else tb


def _without_own_frames(tb: TracebackType | None) -> TracebackType | None:
    """The traceback up to its last frame that is not in the kernel's own files."""
    entries: list[TracebackType] = []
    while tb is not None:
        entries.append(tb)
        tb = tb.tb_next
    while len(entries) > 1 and entries[-1].tb_frame.f_code.co_filename.startswith(OWN_FILES):
        entries.pop()
    kept: TracebackType | None = None
    for entry in reversed(entries):
        kept = TracebackType(kept, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return kept


class BridgeKernel(IPythonKernel):
    """ipykernel's kernel without its sockets, its threads, or anything that lasts from one cell to the next."""

    implementation = "bridge"
    implementation_version = __version__
    banner = BANNER
    shell_class = Type(_Shell)
    _execute_sleep = Float(0.0)  # iopub has no thread of its own that output would have to reach first

    # What ipykernel declares optional, and is always there.
    shell: Any
    session: Session
    shell_stream: ZMQStream
    control_stream: ZMQStream
    profile_dir: ProfileDir

    # Set right after construction, before the first message.
    runtime: Runtime
    lane: Lane
    connection_file: str
    interrupts: Interrupts

    @property
    def _supports_kernel_subshells(self) -> bool:
        return False

    def start(self) -> None:
        """Take messages; ipykernel's own `start` would also announce a kernel that was announced already."""
        self.io_loop = IOLoop.current()
        self._control_lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        # ipykernel asks it which thread the cells run in, and for nothing else once subshells are off.
        self.shell_channel_thread = SimpleNamespace(parent_thread=threading.current_thread())
        # On the control channel it would not wait for the cell that runs: one at a time.
        del self.control_handlers["execute_request"]
        self.interrupts.install()
        self._fresh_namespace(None)
        self.control_stream.on_recv(self.dispatch_control, copy=False)
        self.shell_stream.on_recv(lambda message: self._spawn(self.shell_main(None, message)), copy=False)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the kernel owns it until it is done
        task.add_done_callback(self._tasks.discard)

    def pre_handler_hook(self) -> None:
        """Interrupts are allowed in cells only, by `Interrupts`: elsewhere one would cost the reply."""

    def post_handler_hook(self) -> None:
        """See `pre_handler_hook`."""

    def _cancel_on_sigint(self, future: asyncio.Future[Any]) -> Any:
        return self.interrupts.of_task(future)

    def _abort_queues(self, subshell_id: str | None = None) -> None:
        """A cell failed: refuse those that wait already, in the order in which they came."""
        self._aborting = True
        self.shell_stream.flush()

        async def stop_aborting() -> None:
            async with self._main_asyncio_lock:  # fair: its turn comes after theirs
                self._aborting = False

        self._spawn(stop_aborting())

    # -- cells -------------------------------------------------------------------

    async def do_execute(self, code: str, silent: bool, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not self.runtime.policy.allow_execute:
            return self._refused()
        if self.runtime.draining:
            return self._failed(Draining())
        with self.runtime.running_cell():
            return await self._run_cell(code, silent, *args, **kwargs)

    async def _run_cell(self, code: str, silent: bool, *args: Any, **kwargs: Any) -> dict[str, Any]:
        cell = self._open_cell()
        token = CURRENT.set(cell)
        self.lane.cell_output = cell.output
        try:
            with self.interrupts.allowed(self._fresh_namespace(cell)):
                ipython: Any = super()
                reply: dict[str, Any] = await ipython.do_execute(code, silent, *args, **kwargs)
        except KeyboardInterrupt:
            reply = self._failed(KeyboardInterrupt("interrupted outside its own lines"))
        finally:
            self.lane.cell_output = None
            CURRENT.reset(token)
            cell.close()
            self._fresh_namespace(None)
        return reply

    def get_parent(self, channel: str | None = None) -> dict[str, Any]:
        ipython: Any = super()
        parent: dict[str, Any] = ipython.get_parent(channel)
        return parent

    def _open_cell(self) -> Cell | UnattachedCell:
        parent = msgspec.json.encode(self.get_parent("shell")["header"])
        output = CellOutput(
            lambda name, text: self._print(name, text, parent), self.runtime.policy.max_output_bytes, self.interrupts
        )
        connections = self.lane.connections
        # The latest host that said whose session cells are in; else the latest.
        for connection in reversed([c for c in connections if c.session] or connections):
            cell = Cell(self.runtime, connection, parent, output, self.connection_file)
            if connection not in self.lane.connections:
                cell.stop(Cancelled("the host closed its comm"))  # it went before it could know of this cell
            return cell
        return UnattachedCell(parent, output)

    def _print(self, name: str, text: str, parent: bytes) -> None:
        publisher, iopub = self.lane.outlets
        content = msgspec.json.encode({"name": name, "text": text.encode("utf-8", "replace").decode()})
        iopub.send(publisher.frames([b"stream." + name.encode()], "stream", content, parent=parent))

    def _refused(self) -> dict[str, Any]:
        remedy = "Start it with --Policy.allow_execute=True."
        return self._failed(PolicyDenied("this kernel runs no cells", remedy=remedy))

    def _failed(self, error: BaseException) -> dict[str, Any]:
        """What a cell answers that IPython did not run, or not to its end."""
        content = {
            "ename": type(error).__name__,
            "evalue": str(error),
            "traceback": [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())],
        }
        self.session.send(self.iopub_socket, "error", content, self.get_parent("shell"), ident=b"error")
        return {"status": "error", "execution_count": self.execution_count, **content}

    def _fresh_namespace(self, cell: Cell | UnattachedCell | None) -> dict[str, Any]:
        """Forget the last cell's, and return the next one's; without a cell, one to complete and inspect names in."""
        shell: Any = self.shell
        shell.user_module, shell.user_ns = shell.prepare_user_module(
            ModuleType("__main__", "A cell of its own: nothing of the cells before, nothing for those after.")
        )
        sys.modules["__main__"] = shell.user_module
        # Everything else in IPython and Python that would keep an object of the last cell's alive.
        history, hook = shell.history_manager, shell.displayhook
        for kept in (history.output_hist, history.output_hist_reprs, history.outputs, history.exceptions):
            kept.clear()
        hook._ = hook.__ = hook.___ = ""
        hook.exec_result = shell.last_execution_result = None
        for handler in (shell.InteractiveTB, shell.SyntaxTB):
            handler.etype = handler.value = handler.tb = None
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):
            with suppress(AttributeError):
                delattr(sys, name)
        shell.user_ns_hidden.clear()
        shell.init_user_ns()
        session = CellSession(cell) if isinstance(cell, Cell) else Unattached(self.connection_file)
        given = {"session": session, "_": "", "__": "", "___": ""}
        shell.user_ns.update(given)
        shell.user_ns_hidden.update(given)
        shell.set_completer_frame()
        namespace: dict[str, Any] = shell.user_ns
        return namespace

    # -- what else a front end asks ----------------------------------------------

    def do_complete(self, code: str, cursor_pos: int | None) -> Any:
        self._show_session()
        if self.shell.Completer.use_jedi:
            import jedi  # type: ignore[import-untyped]

            jedi.settings.cache_directory = os.path.join(self.profile_dir.location, "jedi")
        ipython: Any = super()
        return ipython.do_complete(code, cursor_pos)

    def do_history(self, hist_access_type: str, *args: Any, **kwargs: Any) -> Any:
        ipython: Any = super()
        reply = ipython.do_history(hist_access_type, *args, **kwargs)
        if hist_access_type == "range":
            # IPython calls the session that is now 0 here, but by its number in every other answer.
            now = self.shell.history_manager.session_number
            reply["history"] = [(session or now, *entry) for session, *entry in reply["history"]]
        return reply

    def do_inspect(self, code: str, cursor_pos: int, detail_level: int = 0, omit_sections: Any = ()) -> Any:
        self._show_session()
        ipython: Any = super()
        return ipython.do_inspect(code, cursor_pos, detail_level, omit_sections)

    def _show_session(self) -> None:
        """Between cells there is no session, but people want to see what it will be able to do."""
        cell = self._open_cell()
        cell.close()
        if isinstance(cell, Cell):
            self.shell.user_ns["session"] = CellSession(cell)

    def raw_input(self, prompt: str = "") -> str:
        self._require_cell()
        ipython: Any = super()
        answer: str = ipython.raw_input(prompt)
        return answer

    def getpass(self, *args: Any, **kwargs: Any) -> str:
        self._require_cell()
        return super().getpass(*args, **kwargs)

    def _require_cell(self) -> None:
        # `input` is one for the whole process while a cell runs: commands that run beside it find it too.
        if not isinstance(CURRENT.get(), Cell | UnattachedCell):
            raise StdinNotImplementedError("only a cell can ask for input: a command has nobody to ask")

    async def comm_info_request(self, stream: Any, ident: Any, parent: Any) -> None:
        target = parent["content"].get("target_name")
        open_comms = {
            **{id: {"target_name": comm.target_name} for id, comm in self.comm_manager.comms.items()},
            **self.lane.comms(),
        }
        comms = {id: comm for id, comm in open_comms.items() if target in (None, "", comm["target_name"])}
        self.session.send(stream, "comm_info_reply", {"status": "ok", "comms": comms}, parent, ident)


def serve_cells(
    runtime: Runtime,
    lane: Lane,
    info: ConnectionInfo,
    stdin: zmq.Socket[bytes],
    shell: zmq.Socket[bytes],
    control: zmq.Socket[bytes],
    connection_file: str,
    main: _MainThread,
    log: logging.Logger,
) -> None:
    """Run cells on this thread, the main one, until the kernel shuts down."""
    # IPython wants a profile directory; the user's own is not ours to write to.
    with tempfile.TemporaryDirectory(
        prefix="bridge-ipython-", dir=os.environ.get("BRIDGE_RUNTIME_DIR"), ignore_cleanup_errors=True
    ) as directory:

        async def serve() -> None:
            kernel = _kernel(
                runtime, lane, info, stdin, ZMQStream(shell), ZMQStream(control), connection_file, directory, log
            )
            kernel.start()
            stopped = asyncio.Event()
            loop = asyncio.get_running_loop()

            def stop() -> None:
                loop.call_soon_threadsafe(stopped.set)
                main.interrupt()  # the cell that runs, so that the process ends in its own time
                shutil.rmtree(directory, ignore_errors=True)  # at once: a cell that does not heed it is cut short

            main.interrupt_cell = kernel.interrupts.deliver
            main.on_stop(stop)
            await stopped.wait()
            for stream in (kernel.shell_stream, kernel.control_stream):
                stream.flush()
                stream.close()

        asyncio.run(serve())


def _kernel(
    runtime: Runtime,
    lane: Lane,
    info: ConnectionInfo,
    stdin: zmq.Socket[bytes],
    shell: ZMQStream,
    control: ZMQStream,
    connection_file: str,
    directory: str,
    log: logging.Logger,
) -> BridgeKernel:
    config = Config()
    config.HistoryManager.hist_file = ":memory:"  # the cells' texts, for up-arrow; the user's own file is not ours
    config.InteractiveShell.banner1 = BANNER
    interrupts = Interrupts()
    kernel: BridgeKernel = BridgeKernel.instance(
        config=config,
        session=Session(key=info.key.encode(), signature_scheme=info.signature_scheme, username="bridge"),
        shell_stream=shell,
        control_stream=control,
        stdin_socket=stdin,
        iopub_socket=_IopubFace(lane.outlets[1], interrupts),
        profile_dir=ProfileDir(location=directory),
        user_ns={},
        log=log,
    )
    kernel.runtime, kernel.lane, kernel.interrupts = runtime, lane, interrupts
    kernel.connection_file = os.path.abspath(connection_file)
    return kernel
