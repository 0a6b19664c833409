"""The demo: a DSPy program on a real language model, its kernel killed in the middle, its host closed, nothing lost."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bridge_kernel.contract.errors import BridgeError

from .local_lm import LocalLM
from .sync import Host

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .sync import Instance, Session

__all__ = ("run",)

# A model of 135 million parameters answers in the right form only after a few examples; a big one needs none.
DEMOS: Final = [
    {"question": "What is the capital of Italy?", "reasoning": "The capital of Italy is Rome.", "answer": "Rome"},
    {"question": "How many legs does a spider have?", "reasoning": "A spider has 8 legs.", "answer": "8"},
    {"question": "What colour is the sky?", "reasoning": "The colour of the sky is blue.", "answer": "Blue"},
]
QUESTIONS: Final = (
    "What is the capital of France?",
    "How many legs does a dog have?",
    "What is the largest planet in the solar system?",
)
KILLED: Final = "What is the opposite of hot?"

ANSWER: Final = '''
def answer(session_context, qa, question):
    """Runs in a kernel. `qa` arrives rebuilt from the host's recipe and state."""
    temperature = session_context.get_variable("temperature")
    prediction = qa(question=question, config={"temperature": temperature})
    inputs = {"question": question}
    valid = session_context.call_tool("validate_prediction", {"prediction": dict(prediction), "context": inputs})
    session_context.set_variable("last_answer", prediction.answer)
    return {"answer": prediction.answer, "valid": valid}
'''


def run(svg: Path | None = None) -> int:
    """Run it and return the exit code: 0 if every step did what it shows."""
    console = Console(record=svg is not None, width=112 if svg is not None else None, highlight=False)
    console.print(Text("Bridge: the host owns the state; kernels compute and forget.\n", style="bold"))
    try:
        with ExitStack() as stack:
            model = _model(console, stack)
            store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bridge-demo-"))) / "bridge.db"
            with ExitStack() as opened:
                with _step(console, "Starting two kernels; the session is in bridge.db"):
                    host = opened.enter_context(Host(kernels=2, store=store))
                _show(console, host, model)
            _open_again(console, store)
    except BridgeError as error:
        console.print(f"[red]{type(error).__name__}:[/] {error}\n{error.remote_traceback}\n{error.remedy}")
        return 1
    if svg is not None:
        picture = console.export_svg(title="make demo")
        # Without the fonts that it would fetch from a server: a monospace one is everywhere.
        svg.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))
    return 0


def _model(console: Console, stack: ExitStack) -> dict[str, Any]:
    """What `session.lm` takes: the model named by MODEL, or the small one on this machine."""
    name = os.environ.get("MODEL")
    if name:
        provider = name.split("/", 1)[0].upper()
        key = os.environ.get(f"{provider}_API_KEY")
        if key is None:
            console.print(f"[yellow]{provider}_API_KEY is not set: {name} may refuse.[/]")
        return {"model": name, "api_key": key, "api_base": os.environ.get(f"{provider}_API_BASE")}
    with _step(console, "Loading a language model on this machine: SmolLM2, 135 million parameters"):
        local = stack.enter_context(LocalLM())
    return {
        "model": local.model,
        "api_base": local.api_base,
        "api_key": local.api_key,
        "adapter": "JSONAdapter",
        "engine": "lm15",
        "max_tokens": 100,
    }


def _show(console: Console, host: Host, model: dict[str, Any]) -> None:
    session = host.session("demo")
    session["temperature"] = 0.0
    session.lm(**model)

    asked: list[str] = []
    doomed = threading.Event()

    # Idempotent: a model that is asked again may answer otherwise, and to judge that too does no harm.
    @session.tool(idempotent=True)
    def validate_prediction(prediction: dict[str, Any], context: dict[str, Any]) -> bool:
        """A short phrase that is not merely in the question. Runs in the host."""
        answer = str(prediction.get("answer", "")).strip(" .")
        asked.append(answer)
        if doomed.is_set():  # the command is in its middle: it waits for this very call
            doomed.clear()
            os.kill(next(kernel.pid for kernel in host.kernels() if kernel.in_flight), signal.SIGKILL)
        return 0 < len(answer.split()) <= 3 and answer.lower() not in str(context.get("question", "")).lower()

    session.function("answer", ANSWER, lm=True)
    with _step(console, "Importing DSPy in the kernel and creating dspy.ChainOfThought"):
        qa = session.create("dspy.ChainOfThought", "question -> answer")
        state = qa.dump_state()
        state["predict"]["demos"] = DEMOS
        qa.load_state(state)
        session.rename(qa, "qa")
    console.print()

    answers = Table("question", "answer", "valid", "tries", "kernel", "took", title="Answers", title_justify="left")
    for question in QUESTIONS:
        _ask(console, answers, host, session, qa, question)
    before = len(asked)
    doomed.set()
    _ask(console, answers, host, session, qa, KILLED, "The kernel is killed while it waits for the tool")
    replayed = "the tool was asked [bold]once[/], the journal answered the second time"
    if len(asked) > before + 1:
        replayed = "the model said something else then, so the tool was asked about that too"
    console.print(f"  [red]✗[/] SIGKILL. [green]↻[/] It ran again on another kernel: {replayed}.")

    for table in (answers, _state(session, qa), _telemetry(host)):
        console.print()
        console.print(table)
    console.print()
    told = len(host.telemetry.events())
    console.print(
        f"[bold]{len(asked)}[/] calls of the host's tool from inside running commands, "
        f"[bold]{len(host.telemetry.events('bridge', 'kernel', 'stop'))}[/] kernel killed, "
        f"[bold]{told}[/] telemetry events, nothing lost."
    )


def _ask(
    console: Console, table: Table, host: Host, session: Session, qa: Instance, question: str, note: str = ""
) -> None:
    began = time.perf_counter()
    with _step(console, f"{question}  {note}".strip()):
        result = session.call("answer", qa, question)
    took = time.perf_counter() - began
    told = [event for event in host.telemetry.events("bridge", "execution") if event.metadata["subject"] == "answer"]
    ran = told[-1].metadata
    table.add_row(
        question,
        f"[bold]{result['answer']}[/]",
        "[green]✓ valid[/]" if result["valid"] else "[red]✗ not valid[/]",
        str(ran["attempt"]),
        str(ran["kernel"])[:4],
        f"{took:.1f} s",
    )


def _open_again(console: Console, store: Path) -> None:
    with Host(kernels=0, store=store) as host:
        session = host.session("demo")
        qa = session.instances["qa"]
        console.print(
            f"The host was closed and opened again on bridge.db ({store.stat().st_size // 1024} KiB): "
            f"last_answer is [bold]{session['last_answer']!r}[/], qa has {len(qa.state['predict']['demos'])} demos."
        )


def _state(session: Session, qa: Instance) -> Table:
    table = Table("what", "kept by the host", "bytes", title="Where the state lives", title_justify="left")
    for info in session.variables.values():
        table.add_row(f"variable {info.name}", f"{info.value!r}, version {info.version}", str(info.size))
    known = session._state.instance(qa.ref)
    demos = len(qa.state["predict"]["demos"])
    table.add_row(
        f"instance {known.name}",
        f"{known.cls}: recipe, and state with {demos} demos, version {known.version}",
        str(known.size),
    )
    for tool in session.tools.values():
        table.add_row(f"tool {tool.name}", tool.description, "")
    table.add_row("kernels", "nothing", "0")
    return table


def _telemetry(host: Host) -> Table:
    table = Table("Telemetry of every command, as its kernel displays it", title="", box=None)
    for line in host.telemetry.lines():
        table.add_row(line, style="red" if line.startswith("✗") else "")
    return table


@contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
    """A line that lives while something takes its time, and stays with the time it took."""
    began = time.perf_counter()
    with console.status(f"{what} …"):
        yield
    console.print(f"  [green]✓[/] {what}  [dim]{time.perf_counter() - began:.1f} s[/]")
