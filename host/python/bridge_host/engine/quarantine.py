"""`Quarantine`: the commands that ended every kernel they met. They are named, and not run again until let out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec

from bridge_kernel.contract.errors import NotFound, Quarantined

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("Poison", "Quarantine")

KEPT: Final = 1000


class Poison(msgspec.Struct, frozen=True):
    """One command in quarantine. `since` in seconds since the epoch."""

    name: str
    session: str
    kernels: int  # how many it ended
    last: str  # what became of the last one
    since: float


class Quarantine:
    """`host.quarantine`: iterate over it, or `release` a command by its name."""

    def __init__(self) -> None:
        self._poisons: dict[bytes, Poison] = {}

    def add(self, digest: bytes, name: str, session: str, kernels: int, last: str) -> Quarantined:
        """The error that says so."""
        self._poisons[digest] = Poison(name, session, kernels, last, time.time())
        if len(self._poisons) > KEPT:
            del self._poisons[next(iter(self._poisons))]
        return Quarantined(
            f"{name} ended {kernels} kernels, the last one with nothing else running on it: {last}",
            remedy=f"Mend it, then let it out: host.quarantine.release({name!r}).",
        )

    def check(self, digest: bytes) -> None:
        """Raise `Quarantined` if that command is here."""
        poison = self._poisons.get(digest)
        if poison is not None:
            raise Quarantined(
                f"{poison.name} is in quarantine: it ended {poison.kernels} kernels",
                remedy=f"Mend it, then let it out: host.quarantine.release({poison.name!r}).",
            )

    def release(self, name: str) -> None:
        """Let every command of that name run again. Raises `NotFound`."""
        kept = {digest: poison for digest, poison in self._poisons.items() if poison.name != name}
        if len(kept) == len(self._poisons):
            raise NotFound(
                f"no command {name!r} is in quarantine",
                remedy=f"There is: {', '.join(sorted({p.name for p in self._poisons.values()})) or 'none'}.",
            )
        self._poisons = kept

    def __iter__(self) -> Iterator[Poison]:
        return iter(list(self._poisons.values()))

    def __len__(self) -> int:
        return len(self._poisons)

    def __repr__(self) -> str:
        shown = ", ".join(f"{p.name} ({p.kernels} kernels)" for p in self)
        return f"<Quarantine {shown or 'empty'}>"
