"""The documentation says what the code does: its tables are the code's, its links lead somewhere, its examples run."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import pytest
from jsonschema import Draft202012Validator

from bridge_kernel.contract import arrays, containers, records, scalars, tables, tags
from bridge_kernel.contract.catalogue import EVENTS, EXECUTION, schema
from bridge_kernel.contract.errors import ERRORS
from bridge_kernel.contract.messages import Notification, Request, decode_message
from bridge_kernel.contract.methods import METHODS, Callback, Command
from bridge_kernel.contract.telemetry import TELEMETRY_MIME, EventBatch
from bridge_kernel.contract.values import decode

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bridge_kernel.contract.catalogue import EventType, Measured, Said
    from bridge_kernel.contract.methods import Method

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "host" / "elixir" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
TIMEOUT_S = 300

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run:(?P<reason>[^>]*)-->\s*\Z")
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block; `not_run` is the reason not to run it, None if it is to be run."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def _blocks(page: Path) -> Iterable[Block]:
    text = page.read_text()
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        opted_out = _NOT_RUN.search(before)
        reason = opted_out["reason"].strip() if opted_out else None
        yield Block(str(page.relative_to(ROOT)), before.count("\n") + 2, fence["language"], fence["text"], reason)


BLOCKS = [block for page in PAGES for block in _blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
EXAMPLES = [block for block in PYTHON if "Host(" in block.text and block.not_run is None]
JSON = [block for block in BLOCKS if block.language == "json"]


def _table(name: str, page: str = "protocol") -> list[str]:
    """The rows of the table that follows the comment `<!-- table: name -->`, without its head."""
    _, found, rest = (ROOT / "docs" / f"{page}.md").read_text().partition(f"<!-- table: {name} -->\n")
    assert found, f"docs/{page}.md has no table {name!r}"
    return rest.split("\n\n", 1)[0].splitlines()[2:]


def _same(name: str, expected: list[str], page: str = "protocol") -> None:
    assert _table(name, page) == expected, f"docs/{page}.md should say:\n" + "\n".join(expected)


# -- tables ------------------------------------------------------------------


def _members(struct: type[msgspec.Struct], shared: type[msgspec.Struct] | None = None) -> str:
    left_out = {f.name for f in msgspec.structs.fields(shared)} if shared is not None else set()
    fields = [f for f in msgspec.structs.fields(struct) if f.name not in left_out]
    return ", ".join(f"`{f.encode_name}`" + ("" if f.required else "?") for f in fields) or "—"


def _method_row(method: Method) -> str:
    shared = next((base for base in (Command, Callback) if issubclass(method.params, base)), None)
    result = "none: a notification" if method.result is None else _members(method.result)
    return f"| `{method.name}` | {method.side} | {_members(method.params, shared)} | {result} | {method.summary} |"


def test_the_table_of_methods_is_the_contracts() -> None:
    _same("methods", [_method_row(method) for method in METHODS])


def test_the_table_of_errors_is_the_contracts() -> None:
    _same(
        "errors",
        [
            f"| {code} | `{e.__name__}` | {e.summary} | {'yes' if e.retryable else 'no'} | {e.default_remedy or '—'} |"
            for code, e in ERRORS.items()
        ],
    )


def _said(members: Mapping[str, Measured | Said]) -> str:
    run = EXECUTION.keys() <= members.keys()
    own = [f"`{name}`{'?' if one.optional else ''}" for name, one in members.items() if not (run and name in EXECUTION)]
    first = [f"*run*{'?' if members['kernel'].optional else ''}"] if run else []
    return ", ".join(first + own)


def _event_row(event: EventType) -> str:
    metadata = _said(event.metadata) + (", and the user's own" if event.open else "")
    cells = ("`" + " ".join(event.name[1:]) + "`", event.side, _said(event.measurements) or "—", metadata, event.says)
    return f"| {' | '.join(cells)} |"


def test_the_table_of_events_is_the_catalogue() -> None:
    _same("events", [_event_row(event) for event in EVENTS.values()], page="telemetry")


def test_the_schema_of_events_is_the_catalogue() -> None:
    written = (ROOT / "docs" / "telemetry.schema.json").read_text()
    assert written == json.dumps(schema(), indent=2) + "\n"
    Draft202012Validator.check_schema(json.loads(written))


_KINDS = {
    name: (set(required.split()), set(optional.split()))
    for module in (scalars, containers, arrays, tables, records, tags)
    for name, (_, required, optional) in module.DECODERS.items()
}


def test_the_table_of_values_has_every_kind_with_its_members_and_an_example_that_is_one() -> None:
    rows = [row.strip("| ").split(" | ") for row in _table("values")]
    documented: dict[str, tuple[set[str], set[str]]] = {}
    for kind, members, _, example in rows:
        named = [member.strip() for member in members.split(",")]
        documented[kind.strip("`")] = (
            {m.strip("`") for m in named if not m.endswith("?")},
            {m.rstrip("?").strip("`") for m in named if m.endswith("?")},
        )
        tree: dict[str, Any] = json.loads(example.strip("`"))
        assert tree["$bridge"] == kind.strip("`")
        if "buffer" not in tree:
            decode(tree)
    assert documented == _KINDS


# -- examples ----------------------------------------------------------------


def test_the_documentation_has_examples_that_run() -> None:
    assert EXAMPLES
    assert JSON


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.not_run is not None], ids=lambda block: block.name)
def test_an_example_that_is_not_run_says_why(block: Block) -> None:
    assert block.not_run, f"{block.name}: write <!-- not run: the reason -->"


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_an_example_is_python(block: Block) -> None:
    compile(block.text, block.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


@pytest.mark.parametrize("block", EXAMPLES, ids=lambda block: block.name)
def test_an_example_runs(block: Block, tmp_path: Path) -> None:
    script = tmp_path / "example.py"  # a file: the session finds the source of functions there
    script.write_text(block.text)
    run = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert run.returncode == 0, f"{block.name}\n{run.stdout}\n{run.stderr}"


@pytest.mark.parametrize("block", JSON, ids=lambda block: block.name)
def test_a_message_in_the_documentation_is_one(block: Block) -> None:
    parsed: dict[str, Any] = json.loads(block.text)
    if (batch := parsed.get("data", {}).get(TELEMETRY_MIME)) is not None:
        msgspec.convert(batch, tuple[EventBatch, ...], strict=False)
    rpc = parsed.get("data", parsed)
    if "jsonrpc" not in rpc:
        return
    message = decode_message(json.dumps(rpc).encode())
    if isinstance(message, Request | Notification):
        params = {method.name: method.params for method in METHODS}[message.method]
        decoded = msgspec.json.decode(message.params, type=params)
        known = {field.encode_name for field in msgspec.structs.fields(decoded)}
        assert rpc["params"].keys() <= known


# -- links -------------------------------------------------------------------


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    broken = []
    for link in _LINK.finditer(_FENCE.sub("", page.read_text())):
        path, _, anchor = link["target"].partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        target = (page.parent / path).resolve() if path else page
        found = target.exists() and (not anchor or target.suffix != ".md" or anchor in _anchors(target))
        if not found:
            broken.append(link["target"])
    assert not broken


# -- guarantees --------------------------------------------------------------

GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text()
_PROOF = re.compile(r"`(?P<file>tests/[\w/]+\.py|host/elixir/test/[\w/]+_test\.exs)(?:::(?P<name>\w+))?`")


def _defined(file: str) -> set[str]:
    """What a test file defines at its top: functions, classes and names that are assigned."""
    found: set[str] = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Assign(targets=targets):
                found.update(target.id for target in targets if isinstance(target, ast.Name))
    return found


def test_every_test_that_proves_a_guarantee_is_there() -> None:
    proofs = [(match["file"], match["name"]) for match in _PROOF.finditer(GUARANTEES)]
    assert len(proofs) > 50
    missing = [file for file, _ in proofs if not (ROOT / file).exists()]
    assert not missing
    defined = {file: _defined(file) for file, name in proofs if name is not None}
    assert [f"{file}::{name}" for file, name in proofs if name is not None and name not in defined[file]] == []
    assert all(name is None or name.lower().startswith("test") for _, name in proofs)


def test_every_guarantee_names_a_test() -> None:
    rows = [line for line in GUARANTEES.splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith(("| promise |", "| --- |"))]
    assert len(promises) > 30
    assert [row for row in promises if not _PROOF.search(row) and not row.endswith("| the same |")] == []


@pytest.mark.parametrize("name", ["latency", "store", "pool", "telemetry", "telemetry_flow", "elixir"])
def test_the_benchmark_runs(name: str, tmp_path: Path) -> None:
    """It is documentation that runs: `make bench` must not rot. Its figures are asserted nowhere."""
    if name == "elixir" and shutil.which("mix") is None and "BRIDGE_REQUIRE_ELIXIR" not in os.environ:
        pytest.skip("Elixir is missing")
    result = tmp_path / "bench.json"
    subprocess.run(
        [sys.executable, "-m", f"bench.{name}", "--quick", "--json", str(result)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=TIMEOUT_S,
    )
    assert json.loads(result.read_text())["machine"]["cores"]
