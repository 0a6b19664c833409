"""Values cross the bridge equal and of the same type, or raise and say where. Vectors: vectors/values.json."""

from __future__ import annotations

import ast
import base64
import contextlib
import dataclasses
import enum
import json
import math
import struct
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_host.values import Stored
from bridge_kernel.contract import values
from bridge_kernel.contract.errors import BridgeError, LimitExceeded, MalformedValue, NotSerializable
from bridge_kernel.contract.values import (
    MAX_DEPTH,
    Decoder,
    Encoder,
    Record,
    Ref,
    ToolRef,
    VariableRef,
    decode,
    encode,
    loaded_class,
    register_record,
)

VECTORS = json.loads((Path(__file__).parent / "vectors" / "values.json").read_text())
quickly = settings(deadline=None, derandomize=True, max_examples=150)


@dataclasses.dataclass
class Point:
    x: object
    y: object = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    name: object
    size: int = dataclasses.field(init=False, default=3)


@dataclasses.dataclass
class Child(Point):
    z: object = None

    def __post_init__(self) -> None:
        if isinstance(self.x, str) and self.x == "refused":
            raise AssertionError("__post_init__ ran")

    @cached_property
    def double(self) -> object:
        return [self.x, self.x]


class Slotted:
    __slots__ = ("hidden",)


@dataclasses.dataclass
class Hiding(Slotted):
    x: int


@dataclasses.dataclass
class Failure(Exception):
    x: int


class Pair(NamedTuple):
    left: object
    right: object


class Colour(enum.Enum):
    RED = 1
    CRIMSON = 1  # noqa: PIE796 - an alias
    BLUE = "b"


class Level(enum.IntEnum):
    LOW = 1


class Perm(enum.Flag):
    R = 1
    W = 2


class Model(pydantic.BaseModel):
    a: Any
    b: int = 2
    _secret: Any = pydantic.PrivateAttr(default=None)

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @cached_property
    def twice(self) -> int:
        return self.b * 2


class Open(pydantic.BaseModel, extra="allow"):
    a: Any = None


class Handle:
    """Neither a dataclass nor a model."""

    def __init__(self, content: object) -> None:
        self.content = content


class Registered(Handle):
    pass


class Local:
    class Inner(NamedTuple):
        x: int


register_record(f"{__name__}.Registered", lambda it: {"content": it.content}, lambda fields: Registered(**fields))


def equal(a: Any, b: Any) -> bool:
    """Equal and of the same type, all the way down; a NaN equals a NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, complex) and not isinstance(a, np.generic):
        return equal(a.real, b.real) and equal(a.imag, b.imag)
    if isinstance(a, Decimal):
        return str(a) == str(b)
    if isinstance(a, datetime | time):
        return a.isoformat() == b.isoformat() and a.fold == b.fold and repr(a.tzinfo) == repr(b.tzinfo)
    if isinstance(a, np.ndarray | np.generic):
        same = a.dtype == b.dtype and a.dtype.byteorder == b.dtype.byteorder and a.shape == b.shape
        if a.dtype in (np.longdouble, np.clongdouble):  # some of their bytes are padding, and may be anything
            return bool(same and np.array_equal(a, b, equal_nan=True))
        return bool(same and (a.tobytes() == b.tobytes() or (a.dtype.names and np.array_equal(a, b))))  # padding again
    if isinstance(a, pa.Table | pa.RecordBatch):
        return bool(a.schema.equals(b.schema, check_metadata=True) and a.to_pylist() == b.to_pylist())
    if isinstance(a, pl.DataFrame):
        return a.schema == b.schema and a.equals(b, null_equal=True)
    if isinstance(a, pl.Series):
        return a.name == b.name and a.equals(b, check_dtypes=True, null_equal=True)
    if isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b, check_exact=True, check_freq=True)
        return True
    if isinstance(a, pd.Series):
        pd.testing.assert_series_equal(a, b, check_exact=True, check_freq=True)
        return True
    if isinstance(a, dict):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, set | frozenset):
        rest = list(b)
        for item in a:
            found = next((i for i, other in enumerate(rest) if equal(item, other)), None)
            if found is None:
                return False
            del rest[found]
        return not rest
    if dataclasses.is_dataclass(a):
        return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, pydantic.BaseModel):
        parts = "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__"
        held = all(equal(getattr(a, name), getattr(b, name)) for name in type(a).model_fields)
        return held and all(equal(getattr(a, part), getattr(b, part)) for part in parts)
    if isinstance(a, Record):
        return equal(a.__reduce__(), b.__reduce__())
    if isinstance(a, Handle):
        return equal(a.content, b.content)
    return bool(a == b)


def through_text(value: object) -> Any:
    """There and back, through real JSON text, with the buffers as a socket gives them."""
    tree, buffers = encode(value)
    text = msgspec.json.encode(tree)
    assert json.loads(json.dumps(tree, allow_nan=False)) == msgspec.json.decode(text)
    return decode(msgspec.json.decode(text), [bytes(buffer) for buffer in buffers])


def assert_survives(value: object) -> None:
    back = through_text(value)
    assert equal(value, back), f"{value!r} came back as {back!r}"


zones = st.sampled_from(
    [
        None,
        UTC,
        ZoneInfo("Europe/Berlin"),
        ZoneInfo("UTC"),
        timezone(timedelta(hours=-3, microseconds=5)),
        timezone(timedelta(hours=1), "CET"),
        timezone(timedelta(0), "Zulu"),
    ]
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
hashables = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        texts,
        st.binary(max_size=100),
        st.complex_numbers(),
        st.decimals(allow_nan=False),
        st.dates(),
        st.datetimes(timezones=zones),
        st.times(timezones=st.sampled_from([None, UTC, timezone(timedelta(hours=5), "X")])),
        st.timedeltas(),
        st.uuids(),
        st.sampled_from([Colour.RED, Colour.BLUE, Level.LOW, Perm.R, Ref("i"), VariableRef("v")]),
        st.sampled_from(
            [np.float32(1.5), np.int8(-3), np.str_("é"), np.bytes_(b"a\0"), np.bool_(True), np.datetime64("NaT")]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.frozensets(inner, max_size=3),
        st.builds(Frozen, inner),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=4,
)
unhashables = st.one_of(
    st.binary(max_size=100).map(bytearray),
    st.sampled_from(["nan", "-nan7", "snan", "0e5", "-0", "1.10", "inf"]).map(Decimal),
    st.lists(st.integers(-9, 9), max_size=4).map(lambda v: np.array(v, dtype=">i4")),
    st.builds(ToolRef, texts, texts, st.none() | st.dictionaries(texts, st.integers(), max_size=2)),
    st.lists(st.floats(), max_size=3).map(lambda v: pa.table({"v": pa.array(v, pa.float64()).is_nan()})),
)
everything = st.recursive(
    hashables | unhashables,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(texts | st.just("$bridge"), inner, max_size=4),
        st.dictionaries(hashables, inner, max_size=4),
        st.sets(hashables, max_size=4),
        st.builds(Point, inner, inner),
        st.builds(Child, inner, inner, inner),
        st.builds(Model, a=inner),
        st.builds(Open, a=inner, more=inner),
        st.builds(Registered, inner),
    ),
    max_leaves=12,
)


@settings(quickly, max_examples=300)
@given(everything)
def test_whatever_goes_out_comes_back_equal_and_of_the_same_type(value: Any) -> None:
    assert_survives(value)


@quickly
@given(everything)
def test_the_encoding_of_a_decoded_value_is_the_same_encoding(value: Any) -> None:
    first = encode(value)
    second = encode(decode(first.json, first.buffers))
    assert (first.json, list(map(bytes, first.buffers))) == (second.json, list(map(bytes, second.buffers)))


@quickly
@given(everything)
def test_a_side_without_the_classes_passes_records_on_unchanged(value: Any) -> None:
    first = encode(value)
    second = encode(decode(first.json, first.buffers, resolve=lambda _name: None))
    assert msgspec.json.encode(first.json) == msgspec.json.encode(second.json)


EDGES = [
    -(2**63),
    2**63 - 1,
    2**63,
    -(2**63) - 1,
    10**5000,
    -0.0,
    5e-324,
    1.7976931348623157e308,
    float("nan"),
    complex("nan-infj"),
    complex(-0.0, -0.0),
    "",
    "\0\U0001f600\u2028",
    b"",
    b"x" * 64,
    b"x" * 65,
    bytearray(b"y" * 65),
    (),
    ((),),
    set(),
    frozenset({frozenset({1}), 2}),
    {b"k" * 100, b"l" * 100},
    {float("nan"): 1, math.nan: 2},
    {},
    {"$bridge": "int"},
    {"$bridge": {"$bridge": {"$bridge": 1}}},
    {1: "a", "1": "b", None: "c", (1, 2): "d", 2.5: "e"},
    {"": 1},
    datetime.max,
    datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
    datetime(1, 1, 1),
    time(1, 2, 3, 4, fold=1),
    timedelta.min,
    timedelta.max,
    date.min,
    Decimal("NaN123"),
    Decimal("-Infinity"),
    Decimal("1E+999999"),
    UUID(int=0),
    Local.Inner(1),
    Child(1),
    [Ref("id", "a.B", 3), Ref("x"), ToolRef("t", "does", {"type": "object", "$bridge": 1}), VariableRef("v")],
    *(
        np.bytes_(b"a\0"),
        np.str_(""),
        np.longdouble("1.1"),
        np.float16("nan"),
        np.datetime64("2024", "Y"),
        np.void(b"ab"),
    ),
]


@pytest.mark.parametrize("value", EDGES, ids=lambda value: f"{type(value).__name__}")
def test_an_edge_case_survives(value: Any) -> None:
    assert_survives(value)


DTYPES = [
    *("?", "i1", "<i2", ">i4", "i8", "u1", ">u8", "f2", "<f4", ">f8", "longdouble", "c8", ">c16", "clongdouble"),
    *("S0", "S3", ">U2", "U1", "V5", "M8[ns]", ">M8[25us]", "M8", "m8[D]", "m8"),
    np.dtype([("a", "<i4"), ("b", ">f4", (2, 3))]),
    np.dtype([("a", [("x", "i2"), ("y", "S2")]), ("é", "?")]),
    np.dtype({"names": ["a", "b"], "formats": ["i1", "f8"], "offsets": [3, 16], "itemsize": 32}),
    np.dtype([("a", "i1"), ("b", "f8")], align=True),
    np.dtype([(("title", "a"), "<i4")]),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3), (1,) * 64], ids=lambda s: f"rank{len(s)}")
def test_an_array_of_any_dtype_survives_in_any_layout(dtype: Any, shape: Any) -> None:
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    fill = (b"\0\1" * size)[:size] if dtype.kind != "U" else ("a" * size).encode("utf-32-le")[:size]
    array = np.ndarray(shape, dtype, fill)
    for layout in [array, np.asfortranarray(array), array[..., ::-1] if shape else array, array.T]:
        assert_survives(layout)


def test_a_decoded_array_is_a_read_only_view_of_its_buffer() -> None:
    array = np.arange(5)
    tree, buffers = encode(array)
    assert np.shares_memory(decode(tree, buffers), array)
    assert not decode(tree, buffers).flags.writeable
    assert not decode(tree, [memoryview(bytearray(bytes(buffers[0])))]).flags.writeable
    assert decode(encode(np.asfortranarray(np.ones((2, 3)))).json, [bytes(48)]).flags.f_contiguous


FRAMES = {
    "numbers": pd.DataFrame({"i": [1, 2], "f": [1.5, math.nan], "b": [True, False], "u": np.array([1, 2], "u1")}),
    "half": pd.DataFrame({"h": np.array([1, math.nan], "f2")}),
    "text": pd.DataFrame({"s": ["a", None], "t": pd.Series(["a", None], dtype="string")}),
    "nullable": pd.DataFrame({"i": pd.Series([1, None], dtype="Int64"), "b": pd.Series([True, None], dtype="boolean")}),
    "categories": pd.DataFrame({"c": pd.Categorical(["b", "a"], ["b", "a", "z"], ordered=True)}),
    "moments": pd.DataFrame({"t": pd.to_datetime(["2024-01-01", "NaT"]), "d": pd.to_timedelta([1, 2], "s")}),
    "zoned": pd.DataFrame({"t": pd.to_datetime(["2024-01-01"]).tz_localize("Europe/Berlin")}),
    "bytes": pd.DataFrame({"o": [b"a", None]}),
    "indexed": pd.DataFrame({"a": [1, 2]}, index=pd.Index(["x", "y"], name="key")),
    "range": pd.DataFrame({"a": [1, 2]}, index=pd.RangeIndex(4, 8, 2, name="r")),
    "dates": pd.DataFrame({"a": [1, 2]}, index=pd.date_range("2024", periods=2, freq="D")),
    "levels": pd.DataFrame({"a": [1, 2]}, index=pd.MultiIndex.from_tuples([("x", 1), ("y", 2)], names=["k", None])),
    "empty": pd.DataFrame(),
    "no rows": pd.DataFrame({"a": np.array([], "i4")}),
    "no columns": pd.DataFrame(index=range(3)),
    "series": pd.Series([1.5, math.nan], name="s"),
    "nameless series": pd.Series(["a", "b"], index=[3, 4]),
    "polars": pl.DataFrame(
        {"i": [1, None], "f": [1.5, math.nan], "s": ["é", None], "l": [[1], None], "t": [{"a": 1}, None]}
    ),
    "polars kinds": pl.DataFrame(
        {
            "c": pl.Series(["u", "v"], dtype=pl.Categorical),
            "e": pl.Series(["u", "v"], dtype=pl.Enum(["u", "v"])),
            "d": pl.Series(["1.1", "2.2"]).cast(pl.Decimal(10, 2)),
            "t": [datetime(2024, 1, 1, tzinfo=UTC)] * 2,
            "n": [None, None],
            "b": [b"x", b"y"],
        }
    ),
    "polars empty": pl.DataFrame(),
    "polars series": pl.Series("s", [1, 2], dtype=pl.Int8),
    "arrow": pa.table({"i": [1, None], "l": [["a"], []], "m": pa.array([{"a": 1}, None])}),
    "arrow sliced": pa.table({"i": list(range(10))}).slice(3, 4),
    "arrow dictionary": pa.table({"d": pa.array(["a", "b", "a"]).dictionary_encode()}),
    "arrow metadata": pa.table({"i": [1]}, metadata={"k": "v"}),
    "arrow empty": pa.table({}),
    "arrow batch": pa.RecordBatch.from_pydict({"a": [1, 2]}),
    "arrow batch of none": pa.RecordBatch.from_pydict({"a": pa.array([], pa.int8())}),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_table_survives(name: Any) -> None:
    assert_survives({"in": [FRAMES[name]]})


def cycle() -> list[Any]:
    loop: list[Any] = []
    loop.extend([loop, loop])
    return loop


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


def explosion() -> Any:
    value: Any = [0] * 1000
    for _ in range(50):
        value = [value, value]
    return value


def local_instance() -> Any:
    @dataclasses.dataclass
    class Hidden:
        x: int

    return Hidden(1)


def with_attribute() -> Point:
    point = Point(1)
    point.z = 2  # type: ignore[attr-defined]
    return point


def hiding() -> Hiding:
    made = Hiding(1)
    made.hidden = 2  # type: ignore[attr-defined]
    return made


def tagged_frame() -> pd.DataFrame:
    frame = pd.DataFrame({"a": [1]})
    frame.attrs["k"] = 1
    return frame


class MyStr(str):
    __slots__ = ()


REFUSED = {
    "object": (Handle(1), "value", "dataclass"),
    "deep inside": ({"rows": [0, (1, Point(Handle(1)))]}, 'value["rows"][1][1].x', ""),
    "map value": ({1: object()}, "value[1]", ""),
    "map key": ({object(): 1}, "value.keys()[0]", ""),
    "in a set": ({object()}, "value{0}", ""),
    "surrogate": (["\ud800"], "value[0]", "surrogatepass"),
    "surrogate key": ({"\ud800": 1}, 'value["?"]', ""),
    "cycle": (cycle(), "value", "Flatten"),
    "explosion": (explosion(), "value", "numpy"),
    "memoryview": (memoryview(b"a"), "value", "bytes(x)"),
    "str subclass": (MyStr("a"), "value", "str(x)"),
    "OrderedDict": (OrderedDict(a=1), "value", "dict(x)"),
    "defaultdict": (defaultdict(list), "value", "dict(x)"),
    "Counter": (Counter("a"), "value", "dict(x)"),
    "deque": (deque(), "value", "list(x)"),
    "range": (range(3), "value", "list(x)"),
    "Path": (Path(), "value", "str(x)"),
    "Fraction": (Fraction(1, 2), "value", "numerator"),
    "function": (equal, "value", "tool"),
    "class": (Point, "value", ""),
    "flags": (Perm.R | Perm.W, "value", ".value"),
    "local class": (local_instance(), "value", "top level"),
    "extra attribute": (with_attribute(), "value", "field"),
    "hidden slot": (hiding(), "value", "field"),
    "exception": (Failure(1), "value", "asdict"),
    "private": (lambda: None, "value", "tool"),
    "object array": ([np.array([None])], "value[0]", "tolist"),
    "string array": (np.array(["a"], np.dtypes.StringDType()), "value", "tolist"),
    "masked array": (np.ma.array([1]), "value", "numpy.array"),
    "metadata": (np.array([1], np.dtype("i4", metadata={"a": 1})), "value", "astype"),
    "overlapping": (
        np.zeros(1, np.dtype({"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [0, 2]})),
        "value",
        "",
    ),
    "record dtype": (np.zeros(1, np.dtype((np.record, [("a", "i4")]))), "value", ""),
    "hollow": (np.lib.stride_tricks.as_strided(np.zeros(1, "V0"), (2**40,), (0,)), "value", "size"),
    "mixed column": (pd.DataFrame({"a": [1], "col": [{"x": 1}]}), 'value["col"][0]', "Cast"),
    "text as objects": (pd.DataFrame({"col": pd.Series(["a"], dtype=object)}), 'value["col"]', "astype"),
    "complex column": (pd.DataFrame({"col": [1j]}), 'value["col"]', ""),
    "period column": (pd.DataFrame({"col": pd.period_range("2024", periods=1)}), 'value["col"]', ""),
    "duplicate labels": (pd.DataFrame([[1, 2]], columns=["a", "a"]), "value.columns", "Rename"),
    "number labels": (pd.DataFrame([[1, 2]]), "value.columns", "Rename"),
    "interval index": (pd.DataFrame({"a": [1]}, index=pd.interval_range(0, 1)), "value.index", "reset_index"),
    "attrs": (tagged_frame(), "value", "attrs"),
    "polars objects": (pl.DataFrame({"o": pl.Series([object()], dtype=pl.Object)}), 'value["o"]', "Cast"),
    "timestamp": (pd.Timestamp(0), "value", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_cannot_be_carried_raises_naming_its_path(name: Any) -> None:
    value, path, remedy = REFUSED[name]
    encoder = Encoder()
    with pytest.raises(NotSerializable) as caught:
        encoder.encode([b"x" * 100, value], root="result")
    assert str(caught.value).startswith("result[1]" + path.removeprefix("value"))
    assert remedy in caught.value.remedy
    assert caught.value.remedy
    assert encoder.buffers == []
    if name not in ("cycle", "explosion"):
        assert str(caught.value).startswith("result[1]" + path.removeprefix("value") + ": ")


def test_depth_is_bounded_alike_on_both_sides() -> None:
    assert_survives(nested(MAX_DEPTH))
    with pytest.raises(NotSerializable, match="deeper than 100 levels, or contains itself"):
        encode(nested(MAX_DEPTH + 1))
    with pytest.raises(LimitExceeded, match=r"^it(\[0\]){100}: nested deeper"):
        decode(nested(MAX_DEPTH + 1), root="it")
    wraps: list[Any] = [lambda v: (v,), lambda v: {1: v}, Point, lambda v: {"$bridge": v}, lambda v: frozenset([v])]
    for wrap in wraps:
        value: Any = ()
        for _ in range(MAX_DEPTH - 1):
            value = wrap(value)
        through_text(value)  # neither side's recursion, nor the JSON library's, is deeper


def test_an_object_the_codec_does_not_know_is_offered_to_default() -> None:
    made = encode([Handle("r1"), 3], default=lambda it: Ref(vars(it)["content"], "a.B", 2)).json
    assert made == [{"$bridge": "ref", "id": "r1", "class": "a.B", "version": 2}, 3]
    with pytest.raises(NotSerializable):
        encode(Handle(1), default=lambda _it: None)
    with pytest.raises(TypeError, match="default must return"):
        encode(Handle(1), default=lambda _it: "no tag")  # type: ignore[arg-type,return-value]


def test_a_hook_takes_the_place_of_tags() -> None:
    tree = encode({"a": Ref("r"), "b": [VariableRef("v"), ToolRef("t")]}).json
    assert decode(tree, hook=lambda tag: type(tag).__name__) == {"a": "Ref", "b": ["VariableRef", "ToolRef"]}


def test_several_values_share_one_list_of_buffers() -> None:
    encoder = Encoder()
    first, second = encoder.encode(b"a" * 100), encoder.encode(b"b" * 100)
    decoder = Decoder(encoder.buffers)
    assert decoder.decode(second) == b"b" * 100
    with pytest.raises(MalformedValue, match="buffer 0 belongs to nothing"):
        decoder.finish()
    assert decoder.decode(first) == b"a" * 100
    decoder.finish()


def test_a_set_is_written_alike_in_every_process() -> None:
    code = "from bridge_kernel.contract.values import encode; print(encode({'a','b',('c',b'x'*99),1,None}))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "12"
    }
    assert len(runs) == 1


def test_a_record_shows_its_fields_and_is_a_value() -> None:
    tree = {"$bridge": "dataclass", "class": "far.away.Answer", "fields": {"answer": 42, "keys": "k", "_kind": 1}}
    record = decode(tree)
    assert type(record) is Record
    assert (record.answer, record["answer"], record["keys"], dict(record)["_kind"]) == (42, 42, "k", 1)
    assert repr(record) == "<Record far.away.Answer(answer=42, keys='k', _kind=1)>"
    assert record == decode(tree)
    assert hash(record) == hash(decode(tree))
    assert record != Record("far.away.Answer", {"answer": 42})
    assert encode(record).json == tree
    with pytest.raises(AttributeError, match="no field"):
        _ = record.missing
    with pytest.raises(ValueError, match="kind must be"):
        Record("a.B", {}, "pickle")


def test_a_dataclass_is_rebuilt_without_running_its_code() -> None:
    child = Child(1)
    assert child.double == [1, 1]  # a cache of what the fields say: not a field, not sent
    child.x = "refused"
    back = through_text(child)
    assert (type(back), back.x) == (Child, "refused")
    assert back.__dict__ == {"x": "refused", "y": 0, "z": None}


def test_a_model_keeps_what_was_set_its_extra_fields_and_private_attributes() -> None:
    model = Model(a=[1])
    model._secret = {"k": (1,)}
    assert model.twice == 4
    back = through_text(model)
    assert (back.model_fields_set, back._secret, back.twice) == ({"a"}, {"k": (1,)}, 4)
    extra = through_text(Open.model_validate({"a": 1, "other": (2,)}))
    assert (extra.other, extra.model_fields_set) == ((2,), {"a", "other"})
    model._secret = object()
    with pytest.raises(NotSerializable, match=r"^value\._secret: "):
        encode(model)


def test_a_class_name_of_any_length_takes_no_time() -> None:
    with pytest.raises(LimitExceeded, match="longer than 1000 characters"):
        decode({"$bridge": "record", "class": "a." * 1_000_000, "fields": {}})


def test_a_class_is_looked_for_only_among_loaded_modules(monkeypatch: Any) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    for name in [
        "this.C",
        "",
        ".",
        "os..path",
        "json",
        "json.dumps",
        "json.missing",
        f"{__name__}.Point.x",
        "__main__.",
    ]:
        assert loaded_class(name) is None
    assert loaded_class(f"{__name__}.Local.Inner") is Local.Inner
    assert "this" not in sys.modules


@pytest.mark.parametrize("kind", ["dataclass", "pydantic", "namedtuple", "enum", "record"])
def test_a_class_of_another_kind_is_refused_whatever_resolve_says(kind: Any) -> None:
    tree = {"$bridge": kind, "class": "x.Y", "fields": {}, "fields_set": [], "name": "N"}
    wanted = {"enum": ["name"], "pydantic": ["fields", "fields_set"]}.get(kind, ["fields"])
    tree = {key: tree[key] for key in ["$bridge", "class", *wanted]}
    for found in [] if kind == "record" else [Handle, subprocess.Popen, int, "no class"]:
        with pytest.raises(MalformedValue, match=r"^value: "):
            decode(tree, resolve=dict.fromkeys(["x.Y"], found).get)  # type: ignore[arg-type]
    assert type(decode(tree)) is Record


def test_numbers_with_one_hash_are_refused_before_they_take_quadratic_time() -> None:
    prime = sys.hash_info.modulus
    tree = {"$bridge": "set", "items": [{"$bridge": "int", "hex": format(prime * n, "x")} for n in range(1, 50_000)]}
    with pytest.raises(LimitExceeded, match="same hash"):
        decode(tree)


VALID = [
    encode(value) for value in (*EDGES, Point(1), Model(a=1), Colour.RED, Pair(1, 2), np.ones((2, 2)), np.float32(1))
]
json_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
KINDS = sorted(
    {row["json"]["$bridge"] for row in VECTORS["values"] if type(row["json"]) is dict and "$bridge" in row["json"]}
)
MEMBERS = [
    "items",
    "value",
    "class",
    "fields",
    "fields_set",
    "buffer",
    "base64",
    "hex",
    "shape",
    "dtype",
    "order",
    "library",
]
near_misses = st.builds(
    lambda kind, members: {"$bridge": kind, **members},
    st.sampled_from(KINDS),
    st.dictionaries(
        st.sampled_from([*MEMBERS, "type", "name", "zone", "offset_us", "days", "id"]), json_trees, max_size=4
    ),
)


@settings(quickly, max_examples=250)
@given(json_trees | near_misses, st.lists(st.binary(max_size=8), max_size=2))
def test_garbage_raises_only_bridge_errors(tree: Any, buffers: Any) -> None:
    try:
        decode(tree, buffers)
    except BridgeError as error:
        assert str(error).startswith("value")  # noqa: PT017


def mutate(tree: Any, data: st.DataObject) -> Any:
    """A copy of the tree in which one part is another."""
    if isinstance(tree, dict) and tree and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(tree)))
        return {**tree, key: mutate(tree[key], data)}
    if isinstance(tree, list) and tree and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(tree) - 1))
        return [*tree[:at], mutate(tree[at], data), *tree[at + 1 :]]
    return data.draw(json_trees | st.just(2**62) | st.just(-1) | st.sampled_from(KINDS))


@settings(quickly, max_examples=400)
@given(st.sampled_from(VALID), st.data())
def test_a_valid_value_with_one_part_changed_decodes_or_raises_a_bridge_error(encoded: Any, data: Any) -> None:
    with contextlib.suppress(BridgeError):
        decode(mutate(encoded.json, data), [bytes(buffer) for buffer in encoded.buffers])


STREAMS = [encode(FRAMES[name]) for name in ("text", "categories", "levels", "polars", "arrow", "arrow dictionary")]


@settings(quickly, max_examples=500)
@given(st.sampled_from(STREAMS), st.data())
def test_a_damaged_arrow_stream_decodes_or_raises_a_bridge_error(encoded: Any, data: Any) -> None:
    stream = bytearray(encoded.buffers[0])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(stream) - 1))
        stream[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(stream)) | st.just(len(stream)))
    with contextlib.suppress(BridgeError):
        decode(encoded.json, [bytes(stream[:cut])])


def test_a_compressed_arrow_stream_is_refused() -> None:
    sink = pa.BufferOutputStream()
    table = pa.table({"a": [0] * 100_000})
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write(table)
    for library in ["pyarrow", "pandas", "polars"]:
        with pytest.raises(MalformedValue, match="compressed"):
            decode({"$bridge": "table", "library": library, "buffer": 0}, [sink.getvalue().to_pybytes()])


def test_a_column_of_nulls_is_bounded_by_the_bytes_it_comes_in() -> None:
    with pytest.raises(NotSerializable, match="more rows than it has bytes"):
        encode(pa.table({"n": pa.nulls(2_000_000)}))


def test_a_library_that_is_missing_is_named(monkeypatch: Any) -> None:
    tree, buffers = encode(np.ones(2))
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(MalformedValue, match="numpy is needed") as caught:
        decode(tree, buffers)
    assert caught.value.remedy == "pip install 'bridge-kernel[arrow]'"


def test_importing_the_codec_imports_no_library_of_arrays_tables_or_models() -> None:
    code = """if True:
        import sys, bridge_kernel.contract.values as values
        values.encode({'a': [1, (2,), b'x' * 99]})
        print([name for name in ('numpy', 'pandas', 'polars', 'pyarrow', 'pydantic') if name in sys.modules])
    """
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "[]\n"


def test_all_is_what_the_module_defines_publicly() -> None:
    tree = ast.parse(Path(values.__file__).read_text())
    defined, imported = set(), set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
        elif isinstance(node, ast.ImportFrom) and node.module in ("records", "tags"):
            imported |= {alias.name for alias in node.names}
    assert set(values.__all__) == {name for name in defined | imported if not name.startswith("_")}
    assert all(hasattr(values, name) for name in values.__all__)


@pytest.mark.parametrize("row", VECTORS["values"], ids=lambda row: row["name"])
def test_a_vector_decodes_and_encodes_as_it_says(row: Any) -> None:
    buffers = [base64.b64decode(buffer) for buffer in row["buffers"]]
    value = decode(row["json"], buffers)
    again = encode(value)
    same = again.json == row["json"] and list(map(bytes, again.buffers)) == buffers
    assert msgspec.json.decode(msgspec.json.encode(again.json)) == again.json
    assert same or not row["canonical"]
    names = {"np": np, "pd": pd, "pl": pl, "pa": pa, "Record": Record, "Ref": Ref, "ToolRef": ToolRef}
    names |= {"VariableRef": VariableRef, "ZoneInfo": ZoneInfo, "Decimal": Decimal, "UUID": UUID, "timezone": timezone}
    names |= {"date": date, "datetime": datetime, "time": time, "timedelta": timedelta}
    assert equal(value, eval(row["python"], names))


@pytest.mark.parametrize("row", VECTORS["malformed"], ids=lambda row: row["name"])
def test_a_malformed_vector_raises_what_it_says(row: Any) -> None:
    error = {"MalformedValue": MalformedValue, "LimitExceeded": LimitExceeded}[row["error"]]
    with pytest.raises(error) as caught:
        decode(row["json"], [base64.b64decode(buffer) for buffer in row["buffers"]])
    assert str(caught.value).startswith(row["path"] + ": ")


def test_every_kind_has_a_vector() -> None:
    assert set(KINDS) == set(values._DECODERS)


@pytest.mark.parametrize(
    ("json", "buffers"),
    [
        (b"[1,", ()),
        (b"", ()),
        (b'"\xff"', ()),
        (b"[" * 100_000, ()),
        (b'{"$bridge":"by', ()),
        (b'{"$bridge":"bytes","buffer":3}', ()),
        (b'{"$bridge":"ndarray","dtype":"<f8","shape":[2],"buffer":0}', (b"short",)),
    ],
    ids=["cut", "empty", "no text", "deep", "cut tag", "no buffer", "short buffer"],
)
def test_a_value_that_was_damaged_at_rest_raises_a_malformed_value_that_names_it(
    json: bytes, buffers: tuple[bytes, ...]
) -> None:
    stored = Stored.of(json, buffers, "kind")
    with pytest.raises(MalformedValue, match=r"^rate: ") as caught:
        stored.read("rate")
    assert "set it anew" in caught.value.remedy
