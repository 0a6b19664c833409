"""What a host must never be made to run: a module that nobody but a kernel imports, and objects that bite when unpickled."""

from __future__ import annotations

import os
from collections import namedtuple
from dataclasses import dataclass
from enum import Enum


@dataclass
class Point:
    x: int
    y: int

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError("x is not negative")


Pair = namedtuple("Pair", "left right")


class Colour(Enum):
    RED = 1


class TrapError(Exception):
    pass


class Bomb:
    """Makes a directory wherever it is unpickled."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.directory,)

    def touch(self) -> None:
        """Nothing; to be called, the object must be rebuilt."""


def make() -> dict[str, object]:
    return {"point": Point(1, 2), "pair": Pair(3, 4), "colour": Colour.RED, "list": [Point(5, 6)]}


def fail() -> None:
    raise TrapError("caught")


def pickled(directory: str) -> bytes:
    import pickle

    return pickle.dumps(Bomb(directory))
