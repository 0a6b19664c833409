"""What the chaos test's driver, its faults and its checks agree on: who does what, and the lines of the two files.

`effects` is written by tools, a line each time one runs; `ledger` by the driver, a line for whatever it was told. Both
are appended to with single writes, so that a killed process leaves whole lines.
"""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

__all__ = (
    "PARTS",
    "Acked",
    "Effect",
    "Failed",
    "Finished",
    "Line",
    "Opened",
    "Place",
    "Step",
    "Violation",
    "append",
    "biz_of",
    "effects",
    "ledger",
    "places",
    "session_of",
    "step",
)

PARTS: Final[dict[str, frozenset[str]]] = {
    "note": frozenset(),
    "look": frozenset(),
    "order": frozenset({"pay", "ship"}),
    "gather": frozenset({"part-0", "part-1", "part-2"}),
    "deposit": frozenset({"pay"}),
    "stream": frozenset({"pay"}),
    "nested": frozenset({"inner"}),
}
"""The kinds of steps, and the tools' effects that each has."""


class Step(NamedTuple):
    """What a session does: `keyed` with an idempotency key, `again`: the same key once more afterwards."""

    kind: str
    keyed: bool
    again: bool

    @property
    def writes(self) -> bool:
        """Whether it is a command that counts in `done` and leaves its name in `last`."""
        return self.kind not in ("note", "look")


class Place(NamedTuple):
    """How far a session is: the step that is not acknowledged yet, and how often that has failed."""

    step: int = 0
    failures: int = 0


class Effect(msgspec.Struct, frozen=True):
    """A tool ran, for this call (`current_call().id`)."""

    call: str
    biz: str
    part: str


class Acked(msgspec.Struct, frozen=True, tag="acked"):
    """A step was acknowledged. `receipts` are the calls that its tools ran for; `how` the driver came to know it."""

    biz: str
    kind: str
    receipts: tuple[str, ...]
    how: str = "returned"


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A step has failed, and nothing that it wrote may be there. It is tried again under another name.

    `at` in seconds since the epoch.
    """

    biz: str
    kind: str
    error: str
    at: float


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """A host has opened the store."""

    pid: int
    interrupted: int
    in_doubt: int


class Violation(msgspec.Struct, frozen=True, tag="violation"):
    """The driver itself saw what must not be."""

    biz: str
    what: str


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The driver has done all its work, and has closed its host."""

    pid: int


Line = Acked | Failed | Opened | Violation | Finished

_decode_line: Final = msgspec.json.Decoder(Line).decode
_decode_effect: Final = msgspec.json.Decoder(Effect).decode


def step(seed: int, session: str, number: int) -> Step:
    """The same each time it is asked for."""
    chance = random.Random(f"{seed}/{session}/{number}")
    kind = chance.choice(list(PARTS))
    keyed = kind in ("order", "gather", "deposit", "nested") and chance.random() < 0.5
    return Step(kind, keyed, chance.random() < 0.3)


def biz_of(session: str, place: Place) -> str:
    return f"{session}/{place.step}#{place.failures}"


def session_of(biz: str) -> str:
    return biz.partition("/")[0]


def append(file: int, line: msgspec.Struct) -> None:
    """`file` is open for appending."""
    os.write(file, msgspec.json.encode(line) + b"\n")


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def ledger(directory: Path) -> list[Line]:
    return [_decode_line(line) for line in _lines(directory / "ledger")]


def effects(directory: Path) -> list[Effect]:
    return [_decode_effect(line) for line in _lines(directory / "effects")]


def places(lines: list[Line]) -> dict[str, Place]:
    """Where each session is, by what the driver was told."""
    found: dict[str, Place] = {}
    for line in lines:
        if isinstance(line, Acked):
            session = session_of(line.biz)
            found[session] = Place(found.get(session, Place()).step + 1)
        elif isinstance(line, Failed):
            session = session_of(line.biz)
            place = found.get(session, Place())
            found[session] = Place(place.step, place.failures + 1)
    return found
