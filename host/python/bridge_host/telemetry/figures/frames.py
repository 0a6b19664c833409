"""Data frames of pandas or polars, from events and from figures: typed, and null where something is missing."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from bridge_kernel.contract.telemetry import Event, Scalar

__all__ = ("LIBRARIES", "Kind", "events_frame", "frame_of")

Kind = Literal["time", "boolean", "integer", "number", "text"]
"""What a column holds; "time" is ns since the epoch."""

LIBRARIES: Final = ("pandas", "polars")
TIMES: Final[Mapping[str, Kind]] = {"system_time": "time"}
MAX_BITS: Final = 4096  # of what is shown in digits: of much more Python refuses to
_INT64: Final = range(-(2**63), 2**63)
_PANDAS: Final[Mapping[Kind, str]] = {
    "boolean": "boolean",
    "integer": "Int64",
    "number": "Float64",
    "text": "string",
}


def events_frame(events: Iterable[Event], library: str = "pandas") -> Any:
    """A row an event: `name` with dots, then each measurement and each member of the metadata as a column.

    Durations are Int64 (ns), `system_time` is a time in UTC. A member that an event has under a name that is taken in
    its row, `name` or one of its measurements, is in the column `metadata.<name>`.

    Raises:
        ModuleNotFoundError: the library is not installed.
        ValueError: it is neither pandas nor polars.
    """
    _known(library)
    rows: list[dict[str, Scalar]] = []
    measured: dict[str, None] = {}
    said: dict[str, None] = {}
    for event in events:
        row: dict[str, Scalar] = {"name": ".".join(event.name)}
        for values, prefix, columns in (
            (event.measurements, "measurements", measured),
            (event.metadata, "metadata", said),
        ):
            for member, value in values.items():
                column = f"{prefix}.{member}" if member in row else member
                columns[column] = None
                row[column] = value
        rows.append(row)
    names = {"name": None, **measured, **said}
    return frame_of({name: [row.get(name) for row in rows] for name in names}, library, TIMES)


def frame_of(columns: Mapping[str, Sequence[Scalar]], library: str, kinds: Mapping[str, Kind] | None = None) -> Any:
    """A frame of columns of one length. `kinds` says what some of them hold, "time" being ns since the epoch.

    Raises:
        ModuleNotFoundError: the library is not installed.
        ValueError: it is neither pandas nor polars.
    """
    _known(library)
    try:
        module = _imported(library)
    except ModuleNotFoundError as exc:
        if exc.name != library:
            raise
        raise ModuleNotFoundError(
            f"{library} is not installed: pip install 'bridge-kernel[arrow]'", name=library
        ) from None
    typed = {name: _typed(values, (kinds or {}).get(name)) for name, values in columns.items()}
    return _polars(module, typed) if library == "polars" else _pandas(module, typed)


def _imported(library: str) -> Any:
    if library == "polars":
        import polars

        return polars
    import pandas

    return pandas


def _known(library: str) -> None:
    if library not in LIBRARIES:
        raise ValueError(f'library is "pandas" or "polars", not {library!r}')


def _typed(values: Sequence[Scalar], kind: Kind | None) -> tuple[Kind, list[Scalar]]:
    """What kind of column holds all these, and the values as it wants them."""
    types = {type(value) for value in values if value is not None}
    if not types:
        return kind or "text", list(values)
    if types == {bool}:
        return "boolean", list(values)
    if types == {int} and all(value in _INT64 for value in values if value is not None):
        return kind if kind in ("time", "number") else "integer", list(values)
    if types <= {int, float}:
        with contextlib.suppress(OverflowError):
            return "number", [None if value is None else float(value) for value in values]
    return "text", [None if value is None else _text(value) for value in values]


def _text(value: Scalar) -> str:
    if type(value) is int and value not in _INT64:
        return f"an integer of {value.bit_length()} bits" if value.bit_length() > MAX_BITS else str(value)
    text = str(value)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair


def _pandas(pandas: Any, typed: Mapping[str, tuple[Kind, list[Scalar]]]) -> Any:
    made = {}
    for name, (kind, values) in typed.items():
        if kind == "time":
            made[name] = pandas.to_datetime(pandas.array(values, dtype="Int64"), unit="ns", utc=True)
        else:
            made[name] = pandas.array(values, dtype=_PANDAS[kind])
    return pandas.DataFrame(made)


def _polars(polars: Any, typed: Mapping[str, tuple[Kind, list[Scalar]]]) -> Any:
    dtypes = {
        "time": polars.Datetime("ns", "UTC"),
        "boolean": polars.Boolean,
        "integer": polars.Int64,
        "number": polars.Float64,
        "text": polars.String,
    }
    series = []
    for name, (kind, values) in typed.items():
        one = polars.Series(name, values, dtype=polars.Int64 if kind == "time" else dtypes[kind])
        series.append(one.cast(polars.Datetime("ns")).dt.replace_time_zone("UTC") if kind == "time" else one)
    return polars.DataFrame(series)
