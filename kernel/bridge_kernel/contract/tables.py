"""Arrow tables: pyarrow's, polars' and pandas', each as one Arrow IPC stream, uncompressed.

pandas' frames lose on the way what Arrow does not have. So a frame is read back before it is sent, and what
came back differently raises, naming the column.
"""

from __future__ import annotations

import io
import sys
from datetime import date
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .arrays import library
from .arrow_stream import check_stream
from .faults import Fault, key_step, malformed, member, unserializable

if TYPE_CHECKING:
    from collections.abc import Callable

    from .values import Decoder, Encoder, Kind

__all__ = ("DECODERS", "encode_table")

_PLAIN_KINDS: Final = "biufmM"  # of numpy columns that Arrow carries bit for bit, but for the sign of a NaN
_OBJECTS: Final = {str, bytes, bool, type(None), date}  # that an object column may hold, once it is read back alike
_SERIES: Final = "values"  # the one column of a pandas Series: its own name may be None


def encode_table(encoder: Encoder, value: Any, _depth: int) -> Any:
    """The tree of a table, or None if the value is none."""
    cls = type(value)
    package = cls.__module__.partition(".")[0]
    if package not in ("pyarrow", "pandas", "polars") or sys.modules.get(package) is None:
        return None
    found = _ENCODERS.get((package, cls.__name__))
    if found is None or getattr(sys.modules[package], cls.__name__, None) is not cls:
        return None
    tree = {"$bridge": "table", "library": package}
    if cls.__name__ in ("Series", "RecordBatch"):
        tree["type"] = cls.__name__
    more, stream = found(value)
    data = memoryview(stream)
    try:
        check_stream(data)  # what one side sends, the other must take
    except Fault as fault:
        raise unserializable(fault.message, fault.remedy) from None
    return tree | more | {"buffer": encoder.attach(data)}


def _encode_arrow(table: Any) -> tuple[dict[str, Any], Any]:
    pyarrow = sys.modules["pyarrow"]
    try:
        stream = _stream(table)
        back = _read_arrow(memoryview(stream), pyarrow)
    except (pyarrow.ArrowException, ValueError, TypeError) as error:
        raise unserializable(
            f"Arrow cannot write it as a stream: {error}", "Cast the columns that it names."
        ) from error
    if back.num_rows != table.num_rows or not back.schema.equals(table.schema, check_metadata=True):
        raise unserializable("its schema does not survive an Arrow stream", "Cast it: x.cast(…), or add a column.")
    return {}, stream


def _stream(table: Any) -> Any:
    import pyarrow
    import pyarrow.ipc

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression=None)) as writer:
        writer.write(table)
    return sink.getvalue()


def _encode_polars(frame: Any) -> tuple[dict[str, Any], bytes]:
    polars = sys.modules["polars"]
    if isinstance(frame, polars.Series):
        frame = frame.to_frame()
    for name, dtype in frame.schema.items():
        if _holds(dtype, polars.Object):
            raise unserializable("a column of Python objects", "Cast it to a dtype of polars' own.").at(key_step(name))
    sink = io.BytesIO()
    try:
        frame.write_ipc_stream(sink, compression="uncompressed")
        back = polars.read_ipc_stream(io.BytesIO(sink.getvalue()))
    except (polars.exceptions.PolarsError, polars.exceptions.PanicException) as error:
        raise unserializable("polars cannot write it as an Arrow stream", "Cast its unusual columns.") from error
    for name, dtype in frame.schema.items():
        if back.schema.get(name) != dtype or not back[name].equals(frame[name], check_dtypes=True, null_equal=True):
            raise unserializable(f"a column of {dtype} does not survive an Arrow stream", "Cast it.").at(key_step(name))
    if back.shape != frame.shape:
        raise unserializable("rows without columns do not survive an Arrow stream", "Add a column.")
    return {}, sink.getvalue()


def _holds(dtype: Any, wanted: Any) -> bool:
    inner = [getattr(dtype, "inner", None), *(field.dtype for field in getattr(dtype, "fields", ()))]
    return bool(dtype == wanted) or any(_holds(part, wanted) for part in inner if part is not None)


def _encode_pandas(value: Any) -> tuple[dict[str, Any], Any]:
    pandas = sys.modules["pandas"]
    more: dict[str, Any] = {}
    frame = value
    if value.attrs or not value.flags.allows_duplicate_labels:
        raise unserializable("its attrs and flags would be lost", "Clear them: x.attrs = {}.")
    if isinstance(value, pandas.Series):
        if value.name is not None and type(value.name) is not str:
            raise unserializable("its name is not a string", "Rename it: x.rename(str(x.name)).").at(".name")
        if value.name is not None:
            more["name"] = value.name
        frame = value.to_frame(_SERIES)
    labels = list(frame.columns)
    if len(set(labels)) != len(labels) or any(type(label) is not str for label in labels):
        raise unserializable("labels of columns must be distinct strings", "Rename them.").at(".columns")
    if (freq := getattr(frame.index, "freq", None)) is not None and hasattr(frame.index, "inferred_freq"):
        more["freq"] = freq.freqstr
    try:
        import pyarrow
    except ImportError as error:
        raise unserializable(
            "pandas needs pyarrow to write a frame", "pip install 'bridge-kernel[arrow]' on this side."
        ) from error
    table = _arrow_of(frame, labels, pyarrow)
    try:
        stream = _stream(table)
        back = _read_pandas(memoryview(stream), pyarrow, more)
    except Exception as error:
        raise unserializable("its index or columns do not survive Arrow", "Use x.reset_index().") from error
    _compare(frame, back)
    return more, stream


def _arrow_of(frame: Any, labels: list[str], pyarrow: Any) -> Any:
    for label in labels:
        column = frame[label]
        if column.dtype == object:
            for row, item in enumerate(column):
                if type(item) not in _OBJECTS:
                    fault = unserializable(
                        f"a {type(item).__name__} in a column of objects", "Cast the column: x.astype(…), or drop it."
                    )
                    raise fault.at(f"[{row}]").at(key_step(label))
        try:
            array = pyarrow.array(column, from_pandas=True)
        except Exception as error:
            raise unserializable(f"a column of {column.dtype}, which Arrow lacks", "Cast it.").at(
                key_step(label)
            ) from error
        if not _is_flat(array.type, pyarrow.types):
            raise unserializable(f"a column of {column.dtype}", "Cast it to a plain dtype.").at(key_step(label))
    try:
        table = pyarrow.Table.from_pandas(frame)
    except Exception as error:
        raise unserializable("its index does not fit into Arrow", "Use x.reset_index().").at(".index") from error
    if not all(_is_flat(field.type, pyarrow.types) for field in table.schema):
        raise unserializable("its index does not survive Arrow", "Use x.reset_index().").at(".index")
    return table


def _is_flat(kind: Any, types: Any) -> bool:
    """Whether a column's type is one that pandas makes no more of than it has bytes."""
    if types.is_dictionary(kind):
        return types.is_integer(kind.index_type) and _is_flat(kind.value_type, types)
    return any(
        check(kind)
        for check in (
            types.is_boolean,
            types.is_integer,
            types.is_floating,
            types.is_string,
            types.is_large_string,
            types.is_binary,
            types.is_large_binary,
            types.is_temporal,
            types.is_null,
        )
    ) and not types.is_interval(kind)


def _compare(frame: Any, back: Any) -> None:
    """Raise for the first part of `frame` that is not the same in `back`."""
    if not _same_index(frame.columns, back.columns):
        raise unserializable("the labels of its columns do not survive Arrow", "Rename them.").at(".columns")
    if not _same_index(frame.index, back.index):
        raise unserializable("its index does not survive Arrow", "Use x.reset_index().").at(".index")
    for label in frame.columns:
        ours, theirs = frame[label], back[label]
        plain = type(ours.dtype).__module__.startswith("numpy") and ours.dtype.kind in _PLAIN_KINDS
        if not _same_dtype(ours.dtype, theirs.dtype) or not (plain or _same_items(ours, theirs)):
            message = f"a column of {ours.dtype} comes back as {theirs.dtype}, or with other values"
            raise unserializable(message, "Cast it: e.g. x.astype('str') for text.").at(key_step(label))


def _same_index(ours: Any, theirs: Any) -> bool:
    if type(ours) is not type(theirs) or list(ours.names) != list(theirs.names):
        return False
    if ours.nlevels > 1:
        return all(
            _same_index(ours.get_level_values(level), theirs.get_level_values(level)) for level in range(ours.nlevels)
        )
    same = _same_dtype(ours.dtype, theirs.dtype) and _same_items(ours, theirs)
    return same and getattr(ours, "freq", None) == getattr(theirs, "freq", None)


def _same_dtype(ours: Any, theirs: Any) -> bool:
    categories = getattr(ours, "categories", None)
    if type(ours) is not type(theirs) or ours != theirs or str(ours) != str(theirs):
        return False
    # dtypes of unordered categories are equal in any order, but their codes are not.
    return categories is None or _same_index(categories, theirs.categories)


def _same_items(ours: Any, theirs: Any) -> bool:
    if ours.dtype != object:
        return bool(ours.equals(theirs))
    return len(ours) == len(theirs) and all(
        type(a) is type(b) and (a is b or a == b) for a, b in zip(ours, theirs, strict=True)
    )


def _from_table(decoder: Decoder, tree: dict[str, Any], _depth: int) -> object:
    name, form = member(tree, "library", str), tree.get("type", "")
    read = _READERS.get(name)
    if read is None or type(form) is not str or form not in ("", _FORMS[name]):
        raise malformed('"library" and "type" of a "table" are none that go together')
    if extra := {"name", "freq"}.intersection(tree) - ({"name", "freq"} if name == "pandas" else set()):
        raise malformed(f"a table of {name} must not have {', '.join(sorted(extra))}")
    if "name" in tree and form != "Series":
        raise malformed('only a pandas "Series" has a "name"')
    more: dict[str, Any] = {key: member(tree, key, str) for key in ("name", "freq") if key in tree}
    data = memoryview(decoder.take(tree["buffer"]))
    check_stream(data)
    module = library("pyarrow" if name == "pandas" else name)
    if name == "pandas":
        library("pandas")
    try:
        table = read(data, module, more)
        return _in_form(table, name, form, more)
    except Fault:
        raise
    except MemoryError as error:
        raise malformed(f"{name} cannot read it: no memory") from error
    except Exception as error:
        raise malformed(f"{name} cannot read it: {type(error).__name__}") from error
    except BaseException as error:
        # A panic of polars is a BaseException; nothing else of that kind is ours to stop.
        if type(error).__name__ != "PanicException":
            raise
        raise malformed(f"{name} cannot read it") from error


def _in_form(table: Any, name: str, form: str, more: dict[str, Any]) -> object:
    if not form:
        return table
    if form == "RecordBatch":
        batches = table.to_batches()
        if len(batches) > 1:
            raise malformed('a "RecordBatch" is one batch')
        return batches[0] if batches else sys.modules["pyarrow"].RecordBatch.from_pylist([], schema=table.schema)
    if table.shape[1] != 1 or (name == "pandas" and list(table.columns) != [_SERIES]):
        raise malformed('a "Series" is one column')
    return table.to_series(0) if name == "polars" else table[_SERIES].rename(more.get("name"))


def _read_arrow(data: memoryview, pyarrow: Any, _more: dict[str, Any] | None = None) -> Any:
    table = library("pyarrow.ipc").open_stream(pyarrow.py_buffer(data)).read_all()
    table.validate(full=True)  # offsets, indices and UTF-8: Arrow trusts them from here on
    return table


def _read_polars(data: memoryview, polars: Any, _more: dict[str, Any]) -> Any:
    try:
        # polars trusts offsets and indices; where pyarrow is installed, let it look at them first.
        pyarrow = library("pyarrow")
        _read_arrow(data, pyarrow)
    except Fault:
        pass  # polars does not need pyarrow
    except pyarrow.ArrowNotImplementedError:
        pass  # polars has types that pyarrow lacks
    return polars.read_ipc_stream(io.BytesIO(data))


def _read_pandas(data: memoryview, pyarrow: Any, more: dict[str, Any]) -> Any:
    table = _read_arrow(data, pyarrow)
    if not all(_is_flat(field.type, pyarrow.types) for field in table.schema):
        raise malformed("a pandas frame has a column of a type that pandas lacks")
    described = msgspec.json.decode((table.schema.metadata or {}).get(b"pandas", b""))
    if len(described["column_indexes"]) > 1:  # read by evaluating literals: not for a peer to choose
        raise malformed("a pandas frame must have one level of columns")
    frame = table.to_pandas()
    if not len(frame.columns):
        frame.columns = library("pandas").RangeIndex(0)  # as in DataFrame(): Arrow has no labels without columns
    if "freq" in more:
        frame.index.freq = more["freq"]
    return frame


_ENCODERS: Final[dict[tuple[str, str], Callable[[Any], tuple[dict[str, Any], Any]]]] = {
    ("pyarrow", "Table"): _encode_arrow,
    ("pyarrow", "RecordBatch"): lambda batch: _encode_arrow(sys.modules["pyarrow"].Table.from_batches([batch])),
    ("polars", "DataFrame"): _encode_polars,
    ("polars", "Series"): _encode_polars,
    ("pandas", "DataFrame"): _encode_pandas,
    ("pandas", "Series"): _encode_pandas,
}
_READERS: Final[dict[str, Callable[[memoryview, Any, dict[str, Any]], Any]]] = {
    "pyarrow": _read_arrow,
    "polars": _read_polars,
    "pandas": _read_pandas,
}
_FORMS: Final = {"pyarrow": "RecordBatch", "polars": "Series", "pandas": "Series"}
DECODERS: Final[dict[str, tuple[Kind, str, str]]] = {"table": (_from_table, "library buffer", "type name freq")}
