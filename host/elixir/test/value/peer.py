"""The Python codec as the other side: reads what Elixir wrote, compares, and writes it again.

Lines of JSON on stdin: {"json", "buffers"} and maybe "python", an expression for what it must be. For each a line on
stdout: {"json", "buffers"} of the value written anew, or {"error"}.
"""

import base64
import math
import sys
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import numpy as np

from bridge_kernel.contract.values import Record, Ref, ToolRef, VariableRef, decode, encode

NAMES = {
    "Decimal": Decimal,
    "Record": Record,
    "Ref": Ref,
    "ToolRef": ToolRef,
    "UUID": UUID,
    "VariableRef": VariableRef,
    "ZoneInfo": ZoneInfo,
    "date": date,
    "datetime": datetime,
    "math": math,
    "np": np,
    "time": time,
    "timedelta": timedelta,
    "timezone": timezone,
}


def same(a: object, b: object) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and a.flags.f_contiguous == b.flags.f_contiguous
            and a.tobytes() == b.tobytes()
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, Record):
        return same(list(a.__reduce__()[1]), list(b.__reduce__()[1]))
    return a == b


for line in sys.stdin:
    row = msgspec.json.decode(line)
    try:
        value = decode(row["json"], [base64.b64decode(data) for data in row["buffers"]])
        if "python" in row and not same(value, eval(row["python"], NAMES)):
            raise ValueError(f"{value!r} is not {row['python']}")
        tree, buffers = encode(value)
        answer = {"json": tree, "buffers": [base64.b64encode(data).decode() for data in buffers]}
    except Exception as error:  # noqa: BLE001 - the other side is told
        answer = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.flush()
