"""`BridgeKernel`: cells, run by ipykernel's own code, each in a fresh namespace with `session` bound to the host's."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
from ipykernel.ipkernel import IPythonKernel
from IPython.core.profiledir import ProfileDir
from jupyter_client.session import Session
from traitlets.config import Config
from zmq.eventloop.zmqstream import ZMQStream

from ._version import __version__
from .command import RunningCommand
from .context import SessionContext
from .contract.errors import NotAttached, PolicyDenied
from .contract.methods import Command
from .info import BANNER
from .output import CURRENT, Output

if TYPE_CHECKING:
    import logging
    from collections.abc import Sequence

    import zmq

    from .app import _MainThread
    from .connection import Connection
    from .lane import Lane
    from .runtime import Runtime
    from .sockets import ConnectionInfo, Iopub

__all__ = ("BridgeKernel", "serve_cells")


class _IopubFace:
    """What ipykernel's code takes for its iopub socket."""

    def __init__(self, iopub: Iopub) -> None:
        self._iopub = iopub

    def send_multipart(self, frames: Sequence[bytes], *args: Any, **kwargs: Any) -> None:
        self._iopub.send(frames)


class _Cell(RunningCommand):
    """A cell as its `session` sees it: callbacks like a command's, but Jupyter's own messages for everything else."""

    def __init__(self, kernel: BridgeKernel, connection: Connection, parent: bytes) -> None:
        super().__init__(
            kernel.runtime,
            connection,
            None,  # type: ignore[arg-type]  # in a callback: "a cell's"
            "execute_request",
            Command(session=connection.session),
            subject="cell",
            parent=parent,
            buffers=(),
            bytes_in=0,
        )

    def _publish_display(self, msg_type: str, content: bytes) -> None:
        """A cell's telemetry would be output that it did not write."""

    def close(self) -> None:
        """The cell has ended: its `session` is of no use any more."""
        with self._lock:
            self._answered = True
        self.connection.forget(self)


class _Printing:
    """Where a cell's output goes, attached or not."""

    def __init__(self, output: Output) -> None:
        self.output = output


class _Unattached:
    """`session` while no host is attached: whatever is done with it says how to attach one."""

    def __init__(self, connection_file: str) -> None:
        object.__setattr__(self, "_file", connection_file)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        file = object.__getattribute__(self, "_file")
        raise NotAttached(
            "no host is attached to this kernel, so there is no session here",
            remedy=f'Attach one, from any Python: Host(kernels=0).attach({file!r}, session="demo").',
        )

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return object.__getattribute__(self, name)
        return object.__getattribute__(self, "_refuse")()

    __getitem__ = __setitem__ = __delitem__ = __contains__ = __iter__ = __len__ = __call__ = _refuse

    def __repr__(self) -> str:
        file = object.__getattribute__(self, "_file")
        return f'<no session: attach a host with Host(kernels=0).attach({file!r}, session="demo")>'


class BridgeKernel(IPythonKernel):  # type: ignore[misc]
    """ipykernel's kernel without its sockets, its threads, or anything that lasts from one cell to the next."""

    implementation = "bridge"
    implementation_version = __version__

    # Set right after construction, before the first message.
    runtime: Runtime
    lane: Lane
    connection_file: str

    @property
    def banner(self) -> str:  # type: ignore[override]
        return BANNER

    @property
    def _supports_kernel_subshells(self) -> bool:
        return False

    def start(self) -> None:
        """Take messages; ipykernel's own `start` would also announce a kernel that was announced already."""
        from tornado import ioloop

        self.io_loop = ioloop.IOLoop.current()
        self._control_lock = asyncio.Lock()
        # ipykernel asks it which thread the cells run in, and for nothing else once subshells are off.
        self.shell_channel_thread = SimpleNamespace(parent_thread=threading.current_thread())
        self.control_stream.on_recv(self.dispatch_control, copy=False)

        async def on_shell(message: Any) -> None:
            await self.shell_main(None, message)

        self.shell_stream.on_recv(lambda message: self._spawn(on_shell(message)), copy=False)
        self._tasks: set[asyncio.Task[None]] = set()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the kernel owns it until it is done
        task.add_done_callback(self._tasks.discard)

    async def do_execute(self, code: str, silent: bool, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not self.runtime.policy.allow_execute:
            return self._refused()
        parent = msgspec.json.encode(self.get_parent("shell")["header"], enc_hook=str)
        connections = self.lane.connections
        cell = _Cell(self, connections[-1], parent) if connections else None
        output = Output(lambda name, text: self._print(name, text, parent), self.runtime.policy.max_output_bytes)
        if cell is not None:
            cell.output = output
        token = CURRENT.set(cell or _Printing(output))
        try:
            self._fresh_namespace(SessionContext(cell) if cell else _Unattached(self.connection_file))
            reply: dict[str, Any] = await super().do_execute(code, silent, *args, **kwargs)
            return reply
        finally:
            output.flush()
            CURRENT.reset(token)
            if cell is not None:
                cell.close()

    def _print(self, name: str, text: str, parent: bytes) -> None:
        publisher, iopub = self.lane.outlets
        content = msgspec.json.encode({"name": name, "text": text.encode("utf-8", "replace").decode()})
        iopub.send(publisher.frames([b"stream." + name.encode()], "stream", content, parent=parent))

    def _refused(self) -> dict[str, Any]:
        error = PolicyDenied("this kernel runs no cells", remedy="Start it with --Policy.allow_execute=True.")
        text = [f"{type(error).__name__}: {error} {error.remedy}"]
        content = {"ename": "PolicyDenied", "evalue": str(error), "traceback": text}
        self.session.send(self.iopub_socket, "error", content, parent=self.get_parent("shell"))
        return {"status": "error", "execution_count": 0, **content}

    def _fresh_namespace(self, session: SessionContext | _Unattached) -> None:
        shell = self.shell
        module = ModuleType("__main__", "A cell of its own: nothing of the cells before, nothing for those after.")
        sys.modules["__main__"] = module
        shell.user_module = module
        shell.user_ns = module.__dict__
        shell.user_ns_hidden.clear()
        shell.init_user_ns()
        shell.user_ns["session"] = session
        shell.user_ns_hidden["session"] = session
        shell.displayhook.flush()

    async def comm_info_request(self, stream: Any, ident: Any, parent: Any) -> None:
        target = parent["content"].get("target_name")
        open_comms = {
            **{id: {"target_name": comm.target_name} for id, comm in self.comm_manager.comms.items()},
            **self.lane.comms(),
        }
        comms = {id: comm for id, comm in open_comms.items() if target in (None, comm["target_name"])}
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
    with tempfile.TemporaryDirectory(prefix="bridge-ipython-") as directory:
        asyncio.run(_serve(runtime, lane, info, stdin, shell, control, connection_file, main, log, directory))


async def _serve(
    runtime: Runtime,
    lane: Lane,
    info: ConnectionInfo,
    stdin: zmq.Socket[bytes],
    shell: zmq.Socket[bytes],
    control: zmq.Socket[bytes],
    connection_file: str,
    main: _MainThread,
    log: logging.Logger,
    directory: str,
) -> None:
    config = Config()
    config.HistoryManager.hist_file = ":memory:"  # the cells' texts, for up-arrow; the user's own file is not ours
    config.InteractiveShell.banner1 = BANNER
    kernel = BridgeKernel.instance(
        config=config,
        session=Session(key=info.key.encode(), signature_scheme=info.signature_scheme, username="bridge"),
        shell_stream=ZMQStream(shell),
        control_stream=ZMQStream(control),
        stdin_socket=stdin,
        iopub_socket=_IopubFace(lane.outlets[1]),
        profile_dir=ProfileDir(location=os.path.join(directory, "profile")),
        user_ns={},
        log=log,
    )
    kernel.runtime, kernel.lane, kernel.connection_file = runtime, lane, connection_file
    kernel.start()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    main.on_stop(lambda: loop.call_soon_threadsafe(stop.set))
    await stop.wait()
    for stream in (kernel.shell_stream, kernel.control_stream):
        stream.flush()
        stream.close()
