"""The kinds of single values that JSON cannot carry: numbers, bytes, moments and UUIDs."""

from __future__ import annotations

import binascii
import re
import sys
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from math import isfinite, isnan
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from .faults import malformed, member, unserializable

if TYPE_CHECKING:
    from .values import Decoder, Encoder, Kind

__all__ = ("DECODERS", "ENCODERS", "MAX_INT", "MIN_INT", "check_text")

# What msgspec, Jason and every other JSON library agree on; a larger bare integer may come back as a float.
MIN_INT: Final = -(2**63)
MAX_INT: Final = 2**63 - 1
MAX_INLINE_BYTES: Final = 64  # below this, base64 is smaller than a frame of its own with its bookkeeping

_HEX = re.compile(r"-?[0-9a-f]+")
_DECIMAL = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?(?:E[+-][0-9]+)?|Infinity|s?NaN[0-9]*)")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_TIME = re.compile(r"[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{6})?")
_DATETIME = re.compile(rf"{_DATE.pattern}T{_TIME.pattern}")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# A zone's name is looked up as a file, and in the tzdata package: nothing but plain names may get there.
_ZONE = re.compile(r"[A-Za-z][A-Za-z0-9_+-]{0,31}(?:/[A-Za-z][A-Za-z0-9_+-]{0,31}){0,2}")


def check_text(text: str) -> None:
    """Raise the fault of a string that is no Unicode text: one with a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise unserializable(
            "this string has a lone surrogate, which UTF-8 cannot carry",
            "Send bytes: x.encode('utf-8', 'surrogatepass').",
        ) from None


def _same(_encoder: Encoder, value: object, _depth: int) -> object:
    return value


def _text(_encoder: Encoder, value: str, _depth: int) -> str:
    if not value.isascii():
        check_text(value)
    return value


def _int(_encoder: Encoder, value: int, _depth: int) -> object:
    # Hexadecimal: it converts in linear time, and Python's limit of 4300 decimal digits does not apply.
    return value if MIN_INT <= value <= MAX_INT else {"$bridge": "int", "hex": format(value, "x")}


def _float(_encoder: Encoder, value: float, _depth: int) -> object:
    if isfinite(value):
        return value
    return {"$bridge": "float", "value": "nan" if isnan(value) else "inf" if value > 0 else "-inf"}


def _complex(encoder: Encoder, value: complex, depth: int) -> object:
    return {
        "$bridge": "complex",
        "real": _float(encoder, value.real, depth),
        "imag": _float(encoder, value.imag, depth),
    }


def _bytes(encoder: Encoder, value: bytes | bytearray, _depth: int) -> object:
    kind = type(value).__name__
    if len(value) <= MAX_INLINE_BYTES or encoder.inline:
        return {"$bridge": kind, "base64": binascii.b2a_base64(value, newline=False).decode()}
    return {"$bridge": kind, "buffer": encoder.attach(memoryview(value).toreadonly())}


def _decimal(_encoder: Encoder, value: Decimal, _depth: int) -> object:
    return {"$bridge": "decimal", "value": str(value)}


def _uuid(_encoder: Encoder, value: UUID, _depth: int) -> object:
    return {"$bridge": "uuid", "value": str(value)}


def _date(_encoder: Encoder, value: date, _depth: int) -> object:
    return {"$bridge": "date", "value": value.isoformat()}


def _timedelta(_encoder: Encoder, value: timedelta, _depth: int) -> object:
    return {
        "$bridge": "timedelta",
        "days": value.days,
        "seconds": value.seconds,
        "microseconds": value.microseconds,
    }


def _moment(_encoder: Encoder, value: datetime | time, _depth: int) -> object:
    plain = value.replace(tzinfo=None, fold=0)
    tree: dict[str, Any] = {"$bridge": type(value).__name__, "value": plain.isoformat()}
    if value.tzinfo is not None:
        tree |= _zone(value.tzinfo)
    if value.fold:
        tree["fold"] = 1
    return tree


def _zone(zone: tzinfo) -> dict[str, Any]:
    if type(zone) is timezone:
        offset, *name = zone.__getinitargs__()  # type: ignore[attr-defined]
        tree: dict[str, Any] = {"offset_us": offset // timedelta(microseconds=1)}
        if name:
            check_text(name[0])
            tree["name"] = name[0]
        return tree
    zoneinfo = sys.modules.get("zoneinfo")
    named: Any = zone
    key = named.key if zoneinfo is not None and type(zone) is zoneinfo.ZoneInfo else None
    if key is None or not _ZONE.fullmatch(key):
        raise unserializable(
            f"its time zone is a {type(zone).__name__}, which has no name to find it by on the other side",
            "Use zoneinfo.ZoneInfo('Area/City') or datetime.timezone.",
        )
    return {"zone": key}


def _from_hex(_decoder: Decoder, tree: dict[str, Any], _depth: int) -> int:
    digits = member(tree, "hex", str)
    if not _HEX.fullmatch(digits):
        raise malformed('"hex" of an "int" must be lower-case hexadecimal digits, with "-" before them if negative')
    return int(digits, 16)


def _from_float(_decoder: Decoder, tree: dict[str, Any], _depth: int) -> float:
    if (name := tree["value"]) not in ("nan", "inf", "-inf"):
        raise malformed('"value" of a "float" must be "nan", "inf" or "-inf"')
    return float(name)  # a new object each time: two NaNs may be two keys


def _from_complex(decoder: Decoder, tree: dict[str, Any], depth: int) -> complex:
    real, imag = decoder.value(tree["real"], depth), decoder.value(tree["imag"], depth)
    if type(real) is not float or type(imag) is not float:
        raise malformed('"real" and "imag" of a "complex" must be floats')
    return complex(real, imag)


def raw_bytes(decoder: Decoder, tree: dict[str, Any]) -> memoryview | bytes:
    """The bytes of a tag that has either a "base64" or a "buffer" member."""
    if ("base64" in tree) is ("buffer" in tree):
        raise malformed(f'a "{tree["$bridge"]}" has either "base64" or "buffer"')
    if "buffer" in tree:
        return decoder.take(tree["buffer"])
    try:
        return binascii.a2b_base64(member(tree, "base64", str), strict_mode=True)
    except ValueError:  # binascii.Error, and text that is not ASCII
        raise malformed('"base64" is not base64') from None


def _from_bytes(decoder: Decoder, tree: dict[str, Any], _depth: int) -> bytes:
    return bytes(raw_bytes(decoder, tree))


def _from_bytearray(decoder: Decoder, tree: dict[str, Any], _depth: int) -> bytearray:
    return bytearray(raw_bytes(decoder, tree))


def _from_decimal(_decoder: Decoder, tree: dict[str, Any], _depth: int) -> Decimal:
    text = member(tree, "value", str)
    try:
        if _DECIMAL.fullmatch(text):
            return Decimal(text)
    except ArithmeticError:  # an exponent out of decimal's range
        pass
    raise malformed('"value" of a "decimal" must be a number as Python writes a Decimal')


def _from_uuid(_decoder: Decoder, tree: dict[str, Any], _depth: int) -> UUID:
    text = member(tree, "value", str)
    if not _UUID.fullmatch(text):
        raise malformed('"value" of a "uuid" must be 8-4-4-4-12 lower-case hexadecimal digits')
    return UUID(text)


def _iso(tree: dict[str, Any], pattern: re.Pattern[str], kind: type[Any]) -> Any:
    text = member(tree, "value", str)
    try:
        if pattern.fullmatch(text):
            return kind.fromisoformat(text)
    except ValueError:
        pass
    raise malformed(f'"value" of a "{tree["$bridge"]}" is not one in ISO 8601')


def _from_date(_decoder: Decoder, tree: dict[str, Any], _depth: int) -> object:
    return _iso(tree, _DATE, date)


def _from_timedelta(_decoder: Decoder, tree: dict[str, Any], _depth: int) -> timedelta:
    days, seconds, micros = (member(tree, name, int) for name in ("days", "seconds", "microseconds"))
    if not (-999_999_999 <= days <= 999_999_999 and 0 <= seconds < 86_400 and 0 <= micros < 1_000_000):
        raise malformed('a "timedelta" is out of range: 0 <= seconds < 86400, 0 <= microseconds < 1000000')
    return timedelta(days, seconds, micros)


def _from_datetime(_decoder: Decoder, tree: dict[str, Any], _depth: int) -> object:
    return _in_zone(tree, _iso(tree, _DATETIME, datetime))


def _from_time(_decoder: Decoder, tree: dict[str, Any], _depth: int) -> object:
    return _in_zone(tree, _iso(tree, _TIME, time))


def _in_zone(tree: dict[str, Any], plain: Any) -> object:
    zone: tzinfo | None = None
    if "zone" in tree:
        if "offset_us" in tree or "name" in tree:
            raise malformed('a moment has either "zone" or "offset_us"')
        zone = _zone_named(member(tree, "zone", str))
    elif "offset_us" in tree:
        offset = member(tree, "offset_us", int)
        if abs(offset) >= 86_400_000_000:
            raise malformed('"offset_us" must be less than a day')
        name = [member(tree, "name", str)] if "name" in tree else []
        zone = timezone(timedelta(microseconds=offset), *name)
    elif "name" in tree:
        raise malformed('"name" needs "offset_us"')
    fold = member(tree, "fold", int) if "fold" in tree else 0
    if fold not in (0, 1):
        raise malformed('"fold" must be 0 or 1')
    return plain.replace(tzinfo=zone, fold=fold)


def _zone_named(key: str) -> tzinfo:
    import zoneinfo

    try:
        if _ZONE.fullmatch(key):
            return zoneinfo.ZoneInfo(key)
    except (OSError, ValueError, LookupError, ImportError):  # no such file, a folder, not a zone's file
        pass
    raise malformed(f"there is no time zone {key[:60]!r} here", "Install the names of zones: pip install tzdata.")


ENCODERS: Final[dict[type, Kind]] = {
    type(None): _same,
    bool: _same,
    str: _text,
    int: _int,
    float: _float,
    complex: _complex,
    bytes: _bytes,
    bytearray: _bytes,
    Decimal: _decimal,
    UUID: _uuid,
    date: _date,
    datetime: _moment,
    time: _moment,
    timedelta: _timedelta,
}
_MOMENT = "zone offset_us name fold"
# Kind: its decoder, the members it must have, the members it may have.
DECODERS: Final[dict[str, tuple[Kind, str, str]]] = {
    "int": (_from_hex, "hex", ""),
    "float": (_from_float, "value", ""),
    "complex": (_from_complex, "real imag", ""),
    "bytes": (_from_bytes, "", "base64 buffer"),
    "bytearray": (_from_bytearray, "", "base64 buffer"),
    "decimal": (_from_decimal, "value", ""),
    "uuid": (_from_uuid, "value", ""),
    "date": (_from_date, "value", ""),
    "datetime": (_from_datetime, "value", _MOMENT),
    "time": (_from_time, "value", _MOMENT),
    "timedelta": (_from_timedelta, "days seconds microseconds", ""),
}
