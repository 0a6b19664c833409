"""A variable's type: what fits, what does not, and what is said about it."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import inspect
import socket
import sys
import typing
from decimal import Decimal
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_host.store.schemas import MAX_SCHEMA_BYTES
from bridge_host.store.types import VariableType
from bridge_host.values import Stored, store
from bridge_kernel.contract.errors import InvalidValue, MalformedValue
from bridge_kernel.contract.values import Record, Ref


class Colour(enum.Enum):
    RED = "r"
    TWO = 2


@dataclasses.dataclass
class Node:
    x: int
    next: Node | None = None


class Settings(pydantic.BaseModel, extra="forbid"):
    rate: float = pydantic.Field(ge=0)
    name: str = pydantic.Field(default="x", serialization_alias="Name")

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def double(self) -> float:
        return self.rate * 2


class Broken(pydantic.BaseModel):
    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def content(self) -> int:
        raise LookupError("no content")


make = VariableType.make


def fits(kind: VariableType, value: Any) -> bool:
    try:
        kind.check("x", store(value, "x"))
    except InvalidValue:
        return False
    return True


def refusal(kind: VariableType, value: Any, name: str = "x") -> InvalidValue:
    with pytest.raises(InvalidValue) as caught:
        kind.check(name, store(value, name))
    return caught.value


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (
            make(float, ge=0, le=2),
            [0, 1.5, 2, np.float32(1), np.float64(2)],
            [-1, 2.1, True, "1", None, NAN, INF, -INF],
        ),
        (make(float, gt=0, lt=1), [0.5], [0, 1]),
        (make(float | None, ge=0), [None, 1.5], [-1, "x", NAN]),
        (make(float, multiple_of=0.1), [0.3, 1e300, 2**80], [0.35]),
        (make(int, ge=0, multiple_of=5), [0, 5, 5 * 2**70], [-5, 6, 5.0, True, 2**70]),
        (make(bool), [True, False], [0, 1, None]),
        (make(str, min_length=2, max_length=4, pattern="^a"), ["ab", "abcd"], ["a", "abcde", "ba", 5, b"ab"]),
        (make(str, enum=["a", "b"]), ["a"], ["c", 1]),
        (make(list[int], min_length=1, max_length=3), [[1], (1, 2), {1, 2}], [[], [1, 2, 3, 4], ["a"], [True], [1.5]]),
        (make(list[float]), [[1, 2.5]], [[1, NAN], [1, INF], [1, "x"], [[1]]]),
        (make(tuple[int, str]), [(1, "a"), [1, "a"]], [(1,), ("a", 1), (1, "a", 2)]),
        (make(set[int]), [{1, 2}, frozenset({1})], [[1, 1], [1, "a"]]),
        (make(dict[str, float], min_length=1), [{"a": 1}], [{}, {"a": "b"}]),
        (make(dict[int, float]), [{1: 2.0}], [{1: "a"}]),
        (make(typing.Literal["a", 3]), ["a", 3], ["b", 3.5]),
        (make(Colour), [Colour.RED, "r", 2], ["z", Record("else.Colour", {"name": "RED"}, "enum")]),
        (make(datetime.datetime), [datetime.datetime(2024, 1, 2), "2024-01-02T03:04:05Z"], ["soon", 5, "2024-01-02"]),
        (make(datetime.datetime), [datetime.datetime(1, 1, 1, tzinfo=datetime.UTC)], ["2024-13-01T00:00:00"]),
        (make(datetime.date), [datetime.date(2024, 1, 2)], ["2024-02-30", "20240102"]),
        (make(datetime.time), [datetime.time(3, 4, 5, 6)], ["25:00:00"]),
        (make(datetime.timedelta), [datetime.timedelta(-1, 3, 7)], ["P", "PT"]),
        (make(Decimal), [Decimal("1E+30"), "1.50"], [Decimal("NaN"), Decimal("-Infinity"), "x", 1]),
        (make(bytes), [b"\xff\x00", b"x" * 100], [1]),
        (make(Node), [Node(1, Node(2)), {"x": 1}, Record("else.Node", {"x": 1}, "dataclass")], [Node("a"), {"x": "a"}]),  # type: ignore[arg-type]
        (
            make(Settings),
            [Settings(rate=1), {"rate": 1, "double": 2}],
            [{"rate": -1, "double": 2}, {"rate": 1, "z": 2}],
        ),
        (make(typing.Any), [None, NAN, np.zeros(3), Ref("r"), pd.DataFrame({"a": [1]})], []),
        (make({"type": "array", "uniqueItems": True}), [[1, True, "1"], [{"a": 1}, {"a": 2}]], [[1, 1.0], [{}, {}]]),
        (make({"type": ["string", "null"], "maxLength": 3}), ["abc", None], ["abcd", 1]),
        (make(make(float, ge=0), le=1), [0.5], [-0.5, 1.5]),
        (make(typing.Annotated[float, pydantic.Field(ge=0)], ge=-1), [0], [-0.5]),
        (make("tensor"), [np.zeros(3), np.array(1)], [[1, 2], np.float32(1), None, pd.Series([1.5])]),
        (
            make("tensor", dtype="float32", shape=(None, 3)),
            [np.zeros((9, 3), "f4")],
            [np.zeros((3, 3)), np.zeros(3, "f4")],
        ),
        (make("tensor", dtype=np.int16), [np.zeros(3, "<i2")], [np.zeros(3, ">i2"), np.zeros(3, "u2")]),
        (make("tensor", dtype=np.dtype("M8[s]")), [np.zeros(3, "M8[s]")], [np.zeros(3, "M8[ms]")]),
        (make("tensor", dtype=bool, shape=[]), [np.array(True)], [np.array([True])]),
        (
            make("embedding", dimensions=3),
            [[1, 2, 3.5], (1, 2, 3), np.zeros(3, "f2")],
            [[1, 2], [1, 2, NAN], np.zeros(4)],
        ),
        (make("embedding"), [[0.5], np.zeros(9)], [np.zeros((3, 3)), np.zeros(3, "i4"), "abc", {"a": 1}, Ref("r")]),
        (
            make("module", choices=["a.B", "c.D"]),
            ["a.B", Ref("r", "c.D")],
            ["x.Y", Ref("r", "x.Y"), Ref("r"), 5, ["a.B"]],
        ),
        (make("module"), ["a.B", Ref("r")], ["not a name", "", ".a", "a.", {"$bridge": "ref"}]),
    ],
    ids=str,
)
def test_a_type_takes_what_fits_and_refuses_what_does_not(
    kind: VariableType, good: list[object], bad: list[object]
) -> None:
    assert [value for value in good if not fits(kind, value)] == []
    assert [value for value in bad if fits(kind, value)] == []
    again = VariableType.of_schema(msgspec.json.decode(msgspec.json.encode(kind.schema)))
    assert again == kind
    assert all(fits(again, value) for value in good)


def test_a_refusal_names_the_variable_the_place_and_the_reason_and_shows_the_type() -> None:
    error = refusal(make(list[Node]), [Node(1), Node(2, Node("three"))], "nodes")  # type: ignore[arg-type]
    assert str(error) == 'nodes[1]["next"]["x"]: \'three\' is not of type integer'
    error = refusal(make(float, ge=0, le=2), 3, "temperature")
    assert str(error) == "temperature: 3 is more than 2"
    assert error.remedy == 'Its type is {"type":"number","minimum":0,"maximum":2}.'
    assert "Remedy: Its type is" in "".join(error.__notes__)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (make(int), "content" * 100),
        (make(str, max_length=9), "content" * 100),
        (make(int), ["content"] * 1000),
        (make(list[int]), {"content" * 100: 1}),
        (make(str), 7**100_000),
        (make(list[int], max_length=1), ["content" * 100] * 2),
        (make({"required": ["a"], "additionalProperties": False}), {"content" * 100: 1}),
        (make(int), {"a": np.zeros(1000)}),
    ],
    ids=[f"long {n}" for n in range(8)],
)
def test_a_long_value_is_described_not_repeated(kind: VariableType, value: Any) -> None:
    error = refusal(kind, value)
    assert len(str(error)) < 400
    assert "content" * 50 not in str(error)
    assert len(error.remedy) < 300


def test_what_has_no_json_form_is_an_invalid_value_and_not_a_crash() -> None:
    for value in (np.zeros(3), [np.zeros(3)], Ref("r"), pd.DataFrame(), Broken(), 1j):
        refusal(make(float), value)
    assert "LookupError: no content" in str(refusal(make(Broken), Broken()))
    assert "ndarray, which has no JSON form" in str(refusal(make(list[float]), [np.zeros(3)]))


def test_a_value_that_cannot_be_read_is_refused() -> None:
    unreadable = Stored(msgspec.Raw(b'{"$bridge":"bytes","buffer":3}'), (), "bytes")
    with pytest.raises(InvalidValue, match="MalformedValue"):
        make(bytes).check("x", unreadable)


@pytest.mark.parametrize("kind", [make(float), make("tensor"), make("embedding"), make("module")], ids=str)
def test_a_stored_value_that_was_damaged_is_said_to_be_of_the_variable(kind: VariableType) -> None:
    damaged = Stored.of(b'{"$bridge":"nda', (), "ndarray")
    with pytest.raises(MalformedValue, match=r"^rate: the stored value is damaged") as caught:
        kind.check("rate", damaged)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        ("^[a-z]+$", ["ab"], ["ab\n", "ab\nc", "\n"]),
        ("^(a|b$)", ["b", "ab\n"], ["b\n"]),
        (r"^\$[$^]\\$", ["$$\\", "$^\\"], ["$$\\\n", "$"]),
        (r"^[\]$]x?[^$]$", ["$xa", "]a"], ["$xa\n", "$x$"]),
    ],
)
def test_the_end_in_a_pattern_is_the_very_end(pattern: str, good: list[str], bad: list[str]) -> None:
    text = make(str, pattern=pattern)
    assert [value for value in good if not fits(text, value)] == []
    assert [value for value in bad if fits(text, value)] == []
    assert text.schema["pattern"] == pattern
    assert pattern in str(refusal(text, bad[0]))
    for closed in ("additionalProperties", "unevaluatedProperties"):
        members = make({"type": "object", "patternProperties": {pattern: {"type": "integer"}}, closed: False})
        assert [value for value in good if not fits(members, {value: 1}) or fits(members, {value: "x"})] == []
        assert [value for value in bad if fits(members, {value: 1})] == []
    names = make({"patternProperties": {pattern: {"type": "integer"}}})
    assert [value for value in bad if not fits(names, {value: "x"})] == []


def test_tensors_are_judged_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = store(np.zeros((2, 3), "f4"), "x"), store(np.zeros((2, 3), "f8"), "x")
    kind = make("tensor", dtype="float32", shape=[None, 3])
    monkeypatch.setitem(sys.modules, "numpy", None)
    kind.check("x", good)
    make("embedding", dimensions=3).check("x", Stored(msgspec.Raw(b"[1,2,3]"), (), "list"))
    with pytest.raises(InvalidValue, match="'<f8' is none of '<f4'"):
        kind.check("x", bad)
    with pytest.raises(InvalidValue, match="has no JSON form"):
        make(float).check("x", bad)


def test_the_kinds_are_written_for_hosts_in_other_languages_to_read() -> None:
    assert make("tensor", dtype="<f4", shape=(None, 3)).schema == {
        "x-bridge": "tensor",
        "dtype": "<f4",
        "shape": [None, 3],
    }
    assert make("embedding", dimensions=3).schema == {"x-bridge": "embedding", "dimensions": 3}
    assert make("module", choices=("a.B",)).schema == {"x-bridge": "module", "choices": ["a.B"]}
    assert make(float, ge=0, description="heat").schema == {"type": "number", "minimum": 0, "description": "heat"}


@pytest.mark.parametrize(
    ("default", "kind"),
    [
        (0.5, make(float, default=0.5)),
        (None, make(int | None, default=None)),
        ((1, "a"), make(tuple[int, str], default=(1, "a"))),
        (Node(1), make(Node, default=Node(1))),
        (b"x" * 100, make(bytes, default=b"x" * 100)),
        (2**70, make(int, default=2**70)),
        (Ref("r", "a.B"), make("module", default=Ref("r", "a.B"))),
        ({"$bridge": "int"}, make(dict[str, str], default={"$bridge": "int"})),
    ],
    ids=str,
)
def test_a_default_comes_back_equal_and_of_the_same_type_from_the_schema(default: Any, kind: VariableType) -> None:
    for each in (kind, VariableType.of_schema(msgspec.json.decode(kind.json))):
        assert each.default is not None
        found = each.default.read("default")
        assert (found, type(found)) == (default, type(default))


def test_a_default_may_be_an_array_or_a_nan() -> None:
    tensor = make("tensor", default=np.arange(3)).default
    anything = make(typing.Any, default=NAN)
    assert tensor is not None
    assert tensor.read("x").tolist() == [0, 1, 2]
    assert anything.default is not None
    assert np.isnan(anything.default.read("x"))
    assert "default" not in anything.schema  # JSON would have null there, which is another value
    assert make(float).default is None


@pytest.mark.parametrize(
    ("kind", "constraints", "message"),
    [
        (float, {"min_length": 1}, "'min_length' does not fit float, which takes ge, gt, le, lt, multiple_of, default"),
        (str, {"ge": 1}, "'ge' does not fit str, which takes max_length, min_length, pattern"),
        (bool, {"ge": 1}, "which takes default, description, enum"),
        (float, {"maximum": 1}, "'maximum' does not fit"),
        ("tensor", {"ge": 1}, "'ge' does not fit 'tensor', which takes dtype, shape, default, description"),
        ("embedding", {"enum": [1]}, "'enum' does not fit"),
        ({"x-bridge": "tensor"}, {"enum": [1]}, "'enum' does not fit"),
        ("list[int]", {}, "there is no kind 'list\\[int\\]': there are tensor, embedding, module"),
        (np.ndarray, {}, "makes no JSON Schema"),
        (typing.Callable[[int], int], {}, "makes no JSON Schema"),
        (5, {}, "makes no JSON Schema"),
        (list["Nowhere"], {}, "makes no JSON Schema"),  # type: ignore[name-defined]  # noqa: F821
        (str, {"description": 5}, "a description is text"),
    ],
)
def test_a_kind_that_is_none_or_a_constraint_that_does_not_fit_is_a_type_error(
    kind: Any, constraints: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        make(kind, **constraints)


@pytest.mark.parametrize(
    ("kind", "constraints", "message"),
    [
        ({"type": "nope"}, {}, "no JSON Schema"),
        ({"type": float}, {}, "written as JSON"),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, {}, "2020-12"),
        ({"pattern": "("}, {}, "regex"),
        ({"properties": {"a": {"x-bridge": "tensor"}}}, {}, "at the top"),
        ({"x-bridge": "nope"}, {}, "there is no kind 'nope'"),
        ({"x-bridge": ["tensor"]}, {}, "there is no kind"),
        ({"x-bridge": "tensor", "dtipe": "<f4"}, {}, "dtipe"),
        ({"description": "b" * MAX_SCHEMA_BYTES}, {}, "at most"),
        (float, {"ge": "x"}, "no JSON Schema"),
        (float, {"ge": NAN}, "no JSON Schema"),
        (str, {"min_length": -1}, "no JSON Schema"),
        (str, {"enum": ["a", 1]}, "enum: 1 is not of type string"),
        (str, {"enum": 5}, "enum is the values"),
        (float, {"default": "x"}, "default: 'x' is not of type number"),
        ("tensor", {"default": [1]}, "default: a value of type list is no array"),
        ("tensor", {"dtype": "floof"}, "there is no dtype floof"),
        ("tensor", {"dtype": np.dtype([("a", "i4")])}, "there is no dtype"),
        ("tensor", {"shape": [-1]}, "shape is a list of sizes"),
        ("tensor", {"shape": 3}, "shape is a list of sizes"),
        ("embedding", {"dimensions": 0}, "dimensions is how many"),
        ("module", {"choices": ["not a name"]}, "dotted names"),
        ("module", {"choices": []}, "dotted names"),
        ({"x-bridge-default": {"json": 1}}, {}, "x-bridge-default is no value"),
    ],
)
def test_a_schema_that_is_none_is_a_value_error(kind: Any, constraints: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind, **constraints)


@pytest.mark.parametrize("keyword", ["$ref", "$dynamicRef"])
@pytest.mark.parametrize("place", [lambda s: s, lambda s: {"properties": {"a": {"items": s}}}], ids=["top", "inside"])
def test_a_reference_out_of_the_schema_is_refused_and_never_fetched(
    keyword: str, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*args: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", connect)
    for target in ("https://example.com/schema", "file:///etc/passwd", "other.json", "#/$defs/missing", "#nowhere"):
        with pytest.raises(ValueError, match="is not in the schema"):
            VariableType.of_schema(place({keyword: target}))


def test_a_schema_may_refer_to_itself() -> None:
    tree = VariableType.of_schema(
        {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
    )
    assert fits(tree, {"next": {"next": {}}})
    assert not fits(tree, {"next": {"next": {"other": 1}}})


def test_a_schema_that_never_ends_is_refused() -> None:
    doubling = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(60)}
    for schema in (
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"$defs": {**doubling, "a60": {}}, "$ref": "#/$defs/a0"},
    ):
        with pytest.raises(ValueError, match="refers to itself"):
            VariableType.of_schema(schema)
    hidden = VariableType.of_schema({"$defs": {**doubling, "a60": {}}, "properties": {"a": {"$ref": "#/$defs/a0"}}})
    assert "too many references" in str(refusal(hidden, {"a": 1}))


def test_a_schema_or_a_value_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(70):
        schema = {"items": schema}
    with pytest.raises(ValueError, match="nested deeper than 64"):
        VariableType.of_schema(schema)
    nested = VariableType.of_schema({"items": {"$ref": "#"}})
    deep: Any = []
    for _ in range(99):
        deep = [deep]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 350)
    try:
        assert "nested too deeply" in str(refusal(nested, deep))
    finally:
        sys.setrecursionlimit(limit)
    assert fits(nested, [[], [[]]])


def test_types_are_frozen_and_compare_by_their_schema() -> None:
    kind = make(float, ge=0)
    kind.schema["minimum"] = 5
    assert kind.schema["minimum"] == 0
    assert kind == make(float, ge=0) != make(float, ge=1)
    assert hash(kind) == hash(make(float, ge=0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind.json = b"{}"  # type: ignore[misc]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab$", max_size=2), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(json_values, st.sampled_from([int, float, str, bool, list[int], list[float], list[str], dict[str, int]]))
def test_a_plain_value_fits_a_type_just_if_pydantic_takes_it_strictly(value: Any, kind: Any) -> None:
    try:
        pydantic.TypeAdapter(kind, config={"allow_inf_nan": False}).validate_python(value, strict=True)
        taken = True
    except pydantic.ValidationError:
        taken = False
    assert fits(make(kind), value) == taken
