"""Sessions leave a host as one JSON file, and come back the same. What was altered on the way is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import msgspec
import pytest

from bridge_host.functions import FunctionSource
from bridge_host.store import exchange
from bridge_host.store.exchange import export_sessions, facts_of, read_export, read_file, write_file
from bridge_host.store.export_format import json_schema
from bridge_host.store.facts import (
    CommandBegun,
    FunctionPut,
    InstanceForgotten,
    InstancePut,
    InstanceState,
    SecretForgotten,
    SecretPut,
    SessionForgotten,
    SessionPut,
    TypePut,
    VariablePut,
)
from bridge_host.store.types import VariableType
from bridge_host.values import Stored, store
from bridge_kernel.contract.errors import StoreDamaged
from bridge_kernel.contract.methods import LM

if TYPE_CHECKING:
    from collections.abc import Callable

    from bridge_host.store.facts import Fact

DESCRIPTION = Path(__file__).parent.parent / "docs" / "session-export.schema.json"
VECTORS = json.loads((Path(__file__).parent / "vectors" / "values.json").read_text())["values"]
NOW = 1_700_000_000.25
PICKLE = b"a pickle" * 20


def put(session: str, name: str, version: int, value: Any, at: int = 1) -> VariablePut:
    stored = None if value is None else store(value, name)
    return VariablePut(session, name, version, at, stored, 5.5 + version)


def instance(ref: str, **more: Any) -> InstanceState:
    parts: dict[str, Any] = {
        "args": store([1, (2,)], "a"),
        "kwargs": store({"k": b"x" * 99}, "k"),
        "state": store(PICKLE, "s"),
    }
    given: dict[str, Any] = {
        "adapter": "pickle",
        "sha256": hashlib.sha256(PICKLE).hexdigest(),
        "methods": ("run",),
        "name": "it",
    }
    whole: dict[str, Any] = {"ref": ref, "cls": "pkg.Class", "version": 3} | parts | given | more
    return InstanceState(**whole)


FULL: list[Fact] = [
    SessionPut(
        "demo", 1.5, 9.0, 60.0, 7, LM(model="m/1", api_base="http://x", adapter="JSONAdapter", options={"t": 0.5})
    ),
    TypePut("demo", "x", VariableType.make(float, ge=0, default=0.5).json),
    TypePut("demo", "only a type", VariableType.make("tensor", dtype="<f4", shape=[None, 3]).json),
    put("demo", "x", 3, 1.5, at=6),
    put("demo", "gone", 2, None, at=7),
    put("demo", "é $bridge", 1, {"$bridge": (1, b"y" * 100)}),
    InstancePut("demo", instance("r-1")),
    InstancePut("demo", instance("r-2", name="", adapter="bridge", sha256=None, state=store({"n": 1}, "s"))),
    FunctionPut("demo", FunctionSource.make("f", "def f(): return 'é'\n", lm=True, secrets=("KEY",))),
    SecretPut("demo", "KEY", b"sealed-bytes"),
    SecretPut("demo", "lm.api_key", b"sealed-bytes-too"),
]
EMPTY: list[Fact] = [SessionPut("empty", 0.0, 0.0, None, 0, None)]
HISTORIES = {
    "demo": {
        "x": [put("demo", "x", 1, 0.5, at=2), put("demo", "x", 2, (1,), at=4), put("demo", "x", 3, 1.5, at=6)],
        "gone": [put("demo", "gone", 1, "here", at=3), put("demo", "gone", 2, None, at=7)],
    }
}


def full(history: bool = True) -> bytes:
    return export_sessions(
        FULL + EMPTY, now=NOW, histories=HISTORIES if history else None, tools={"demo": ["search", "add"]}
    )


def without_order(facts: list[Fact]) -> set[bytes]:
    return {type(fact).__name__.encode() + msgspec.msgpack.encode(fact, enc_hook=bytes) for fact in facts}


def valid(content: bytes) -> None:
    schema = json.loads(DESCRIPTION.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(json.loads(content))


def test_the_committed_description_is_what_the_structs_say() -> None:
    made = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    assert DESCRIPTION.read_text() == made, (
        'write it anew: python -c "import json; from bridge_host.store.export_format import json_schema as s; '
        f'print(json.dumps(s(), indent=2, ensure_ascii=False))" > {DESCRIPTION}'
    )


def test_every_part_of_the_format_is_described() -> None:
    for name, part in json_schema()["$defs"].items():
        assert part["title"], name
        assert part["description"], name
        assert part["additionalProperties"] is False


@pytest.mark.parametrize("history", [True, False])
def test_an_export_fits_its_description_and_makes_the_same_sessions(history: bool) -> None:
    content = full(history)
    valid(content)
    demo, empty = facts_of(read_export(content), now=99.0)
    used = msgspec.structs.replace(FULL[0], used=99.0)
    older: list[Fact] = [v for versions in HISTORIES["demo"].values() for v in versions[:-1]] if history else []
    expected = [used, *older, *(fact for fact in FULL[1:] if not isinstance(fact, SecretPut))]
    assert without_order(demo) == without_order(expected)
    assert len(demo) == len(expected)
    assert empty == [SessionPut("empty", 0.0, 99.0, None, 0, None)]


def test_the_facts_of_a_session_come_in_an_order_that_a_store_takes() -> None:
    demo = facts_of(read_export(full()), now=99.0)[0]
    assert isinstance(demo[0], SessionPut)
    versions: dict[str, int] = {}
    for fact in demo:
        if isinstance(fact, VariablePut):
            assert fact.version > versions.get(fact.name, 0)
            versions[fact.name] = fact.version
    assert versions == {"x": 3, "gone": 2, "é $bridge": 1}


def test_what_is_imported_and_exported_again_is_the_same_file() -> None:
    content = full(history=False)
    facts = [fact for batch in facts_of(read_export(content), now=1.0) for fact in batch]
    again = export_sessions(facts, now=NOW, tools={"demo": ["add", "search"]})
    first, second = json.loads(content), json.loads(again)
    assert first["sessions"][0].pop("secrets") == ["KEY", "lm.api_key"]
    second["sessions"][0].pop("secrets")
    assert first == second


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
def test_every_kind_of_value_comes_back_as_it_was(vector: dict[str, Any]) -> None:
    raw = msgspec.json.encode(vector["json"])
    stored = Stored(msgspec.Raw(raw), tuple(map(base64.b64decode, vector["buffers"])), "kind")
    kept = VariablePut("s", "x", 1, 1, stored, 1.0)
    content = export_sessions([SessionPut("s", 0.0, 0.0, None, 1, None), kept], now=NOW)
    valid(content)
    back = facts_of(read_export(content), now=0.0)[0][1]
    assert isinstance(back, VariablePut)
    assert back.value is not None
    assert bytes(back.value.json) == raw
    assert (back.value.buffers, back.value.type) == (stored.buffers, "kind")


def test_neither_secrets_nor_keys_nor_the_journal_are_in_an_export() -> None:
    lm = LM(model="m", api_key="sk-clear")
    begun = CommandBegun("c", "demo", "function.call", "f", None, b"", b"request-bytes", False, 1.0)
    facts: list[Fact] = [SessionPut("demo", 1.0, 1.0, None, 0, lm), SecretPut("demo", "KEY", b"sealed-bytes"), begun]
    content = export_sessions(facts, now=NOW)
    for hidden in (b"sk-clear", b"sealed-bytes", b"request-bytes"):
        assert hidden not in content
        assert base64.b64encode(hidden)[:-4] not in content
    assert read_export(content).sessions[0].secrets == ("KEY",)
    assert read_export(content).sessions[0].lm is not None


def test_only_what_is_there_in_the_end_is_exported() -> None:
    facts: list[Fact] = [
        *FULL,
        SessionPut("demo", 1.5, 9.0, None, 8, None),
        TypePut("demo", "only a type", None),
        put("demo", "x", 4, 2.5, at=8),
        InstanceForgotten("demo", "r-1"),
        SecretForgotten("demo", "KEY"),
        *EMPTY,
        SessionForgotten("empty"),
        put("stranger", "x", 1, 1),
    ]
    (session,) = read_export(export_sessions(facts, now=NOW, histories=HISTORIES)).sessions
    assert (session.version, session.ttl, session.lm) == (8, None, None)
    assert [v.name for v in session.variables] == ["gone", "x", "é $bridge"]
    assert session.variables[1].current is not None
    assert session.variables[1].current.version == 4
    assert [v.version for v in session.variables[1].history] == [1, 2, 3]
    assert [i.ref for i in session.instances] == ["r-2"]
    assert session.secrets == ("lm.api_key",)


def test_a_history_that_is_ahead_of_the_facts_is_cut_there() -> None:
    ahead = {"demo": {"x": [*HISTORIES["demo"]["x"], put("demo", "x", 4, 9.5, at=8)]}}
    (session,) = read_export(export_sessions(FULL, now=NOW, histories=ahead)).sessions
    (x,) = (v for v in session.variables if v.name == "x")
    assert [v.version for v in x.history] == [1, 2]


@pytest.mark.parametrize(
    ("damaged", "where"),
    [
        (VariablePut("demo", "x", 4, 8, Stored.of(b'{"a', (), "dict"), 1.0), "session 'demo': variable 'x', version 4"),
        (VariablePut("demo", "x", 4, 8, Stored.of(b'"\xff"', (), "str"), 1.0), "variable 'x', version 4"),
        (TypePut("demo", "x", b"{"), "session 'demo': variable 'x', its type"),
        (InstancePut("demo", instance("r-3", name="", state=Stored.of(b"", (), "dict"))), "instance 'r-3', state"),
    ],
    ids=["cut", "no text", "type", "instance"],
)
def test_what_was_damaged_in_the_store_is_named_and_never_exported(damaged: Fact, where: str) -> None:
    with pytest.raises(StoreDamaged, match=f"{where}: what is stored is damaged") as caught:
        export_sessions([*FULL, damaged], now=NOW)
    assert caught.value.remedy


def test_a_version_that_was_damaged_matters_only_to_an_export_of_histories() -> None:
    cut = VariablePut("demo", "x", 1, 2, Stored.of(b"[1", (), "list"), 1.0)
    export_sessions(FULL, now=NOW)
    with pytest.raises(StoreDamaged, match="variable 'x', version 1"):
        export_sessions(FULL, now=NOW, histories={"demo": {"x": [cut]}})


# -- what is refused -----------------------------------------------------------


def change(**parts: Any) -> Callable[[dict[str, Any]], None]:
    return lambda export: export.update(parts)


def session_of(export: dict[str, Any]) -> Any:
    return export["sessions"][0]


def set_in(kind: str, index: int, **parts: Any) -> Callable[[dict[str, Any]], None]:
    return lambda export: session_of(export)[kind][index].update(parts)


def twice(kind: str) -> Callable[[dict[str, Any]], None]:
    return lambda export: session_of(export)[kind].append(session_of(export)[kind][0])


def of_x(export: dict[str, Any]) -> Any:
    return next(v for v in session_of(export)["variables"] if v["name"] == "x")


REFUSED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (change(format="other"), "its format is 'other'"),
    (change(version=2), "has version 2, this Bridge .* reads version 1"),
    (change(version=0), "has version 0"),
    (change(more=1), "unknown field `more`"),
    (lambda e: e.pop("sessions"), "missing required field `sessions`"),
    (lambda e: e["sessions"].append(e["sessions"][0]), "the session 'demo' twice"),
    (lambda e: session_of(e).update(ttl=0), "ttl"),
    (lambda e: session_of(e).update(id=""), "id"),
    (lambda e: session_of(e).update(version=2**63), "session 'demo': its version is a number of more than 64 bits"),
    (lambda e: of_x(e)["current"].update(version=2**70), "variable 'x': a version is a number of more than 64 bits"),
    (lambda e: of_x(e)["current"].update(restores=-(2**70)), "variable 'x': the version that one brought back is a"),
    (set_in("instances", 0, version=2**70), "instance 'r-1': its version is a number of more than 64 bits"),
    (lambda e: session_of(e).pop("version"), "missing required field `version`"),
    (twice("variables"), "variable of session 'demo' 'gone' twice"),
    (twice("instances"), "instance of session 'demo' 'r-1' twice"),
    (twice("functions"), "function of session 'demo' 'f' twice"),
    (set_in("instances", 1, name="it"), "name of an instance of session 'demo' 'it' twice"),
    (set_in("functions", 0, source="def f(): return 'evil'\n"), "the function 'f' is not what its digest says"),
    (set_in("functions", 0, sha256="é"), "not what its digest says"),
    (set_in("instances", 0, sha256=None), "its pickled state is not what its digest says"),
    (set_in("instances", 0, sha256="0" * 64), "instance 'r-1': its pickled state is not"),
    (lambda e: session_of(e)["instances"][0]["state"].update(buffers=["AAAA"]), "its pickled state is not"),
    (set_in("instances", 0, state={"type": "str", "json": "text"}), "its pickled state is not"),
    (set_in("instances", 0, adapter="exec"), "adapter"),
    (set_in("instances", 0, args={"type": "int", "json": 1}), "its arguments are no list"),
    (set_in("instances", 0, kwargs={"type": "list", "json": [1]}), "its arguments are no list"),
    (lambda e: of_x(e)["current"].update(version=2), "version 2 comes after version 2"),
    (lambda e: of_x(e)["current"].update(at=1), "comes after"),
    (lambda e: of_x(e)["current"].update(at=8), "of the session's version 8, and the session is at 7"),
    (lambda e: of_x(e).update(current=None), "has a history and no current version"),
    (lambda e: of_x(e).update(schema={"$ref": "https://example.com"}), "its type cannot be used: .*nothing is fetched"),
    (lambda e: of_x(e).update(schema={"type": "number", "default": "x"}), "its type cannot be used: default"),
    (lambda e: of_x(e)["current"]["value"].update(json={"$bridge": "nope"}), "variable 'x', version 3: .*no kind"),
    (lambda e: of_x(e)["current"]["value"].update(json={"$bridge": "bytes", "buffer": 0}), "version 3"),
    (lambda e: of_x(e)["current"]["value"].update(buffers=["AAAA"]), "buffer 0 belongs to nothing"),
    (lambda e: of_x(e)["current"]["value"].update(buffers=["no base64"]), "base64"),
    (lambda e: of_x(e)["history"][0]["value"].update(json={"$bridge": 1}), "variable 'x', version 1"),
]


@pytest.mark.parametrize(("alter", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_an_altered_export_is_refused_and_says_where(alter: Callable[[dict[str, Any]], object], message: str) -> None:
    export = json.loads(full())
    alter(export)
    with pytest.raises(StoreDamaged, match=message) as caught:
        read_export(json.dumps(export).encode())
    assert caught.value.remedy


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no json",
        b"[]",
        b"{}",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b"SQLite format 3\x00",
        full()[:-10],
        full() + b"x",
    ],
    ids=["empty", "text", "list", "object", "null", "bytes", "deep", "sqlite", "cut", "longer"],
)
def test_what_is_no_export_is_refused(content: bytes) -> None:
    with pytest.raises(StoreDamaged, match=r"no export of sessions|is damaged"):
        read_export(content)


def test_an_export_of_another_writer_with_spaces_and_members_left_out_is_read() -> None:
    minimal = {
        "format": "bridge.sessions",
        "version": 1,
        "exported": "2024-01-01T00:00:00Z",
        "bridge": "elixir",
        "sessions": [
            {
                "id": "s",
                "created": 1,
                "ttl": None,
                "version": 1,
                "variables": [
                    {
                        "name": "x",
                        "schema": None,
                        "current": {"version": 1, "at": 1, "written": 2, "value": {"type": "list", "json": [1, 2.0]}},
                    }
                ],
            }
        ],
    }
    content = json.dumps(minimal, indent=2).encode()
    valid(content)
    (facts,) = facts_of(read_export(content), now=3.0)
    assert facts[1] == VariablePut("s", "x", 1, 1, facts[1].value, 2.0)  # type: ignore[union-attr]
    assert bytes(facts[1].value.json) == b"[1,2.0]"  # type: ignore[union-attr]


def test_a_file_that_is_too_large_is_refused_before_it_is_parsed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(exchange, "MAX_EXPORT_BYTES", 100)
    (tmp_path / "big").write_bytes(b"x" * 1000)
    content = read_file(tmp_path / "big")
    assert len(content) == 101
    with pytest.raises(StoreDamaged, match="the limit is 100"):
        read_export(content)


# -- files ---------------------------------------------------------------------


def test_a_file_is_written_whole_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "sessions.json"
    path.write_text("older")
    path.chmod(0o644)
    write_file(path, full())
    assert read_file(path) == full()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sessions.json"
    path.write_text("older")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, full())
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_is_not_there_is_named_and_so_is_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make it first, or export to another") as caught:
        write_file(tmp_path / "none" / "sessions.json", b"{}")
    assert caught.value.filename == str(tmp_path / "none")
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError, match="the export was not written") as refused:
        write_file(tmp_path / "taken", b"{}")
    assert refused.value.filename == str(tmp_path / "taken")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]
