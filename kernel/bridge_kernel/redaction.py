"""A command's secrets, as they must not be shown: in no error, no output, no telemetry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .contract.secrets import forms_of

if TYPE_CHECKING:
    from .contract.methods import Command

__all__ = ("secrets_of", "starred")


def secrets_of(params: Command) -> tuple[str, ...]:
    """What to star out of what a command shows: its secrets and its language model's key, in every form."""
    lm = getattr(params, "lm", None)
    return forms_of([*params.secrets.values(), lm.api_key if lm is not None and lm.api_key else ""])


def starred(text: str, secrets: tuple[str, ...], *, final: bool) -> tuple[str, str]:
    """The text with `***` for each secret, and its end that must wait: it may be the beginning of one.

    However a text is cut, its pieces, each put behind what had to wait, show what the whole would. `final`: no
    more will come, so nothing waits. (No `re`: it would keep the secrets, in its cache of patterns.)
    """
    shown: list[str] = []
    begin = 0
    wait = len(text) if final else _possible_start(text, secrets, 0)
    while True:
        at, secret = len(text), ""
        for candidate in secrets:  # the longest first, so that of two that begin here the longer is found
            found = text.find(candidate, begin)
            if found != -1 and found < at:
                at, secret = found, candidate
        if not secret or wait <= at:
            shown.append(text[begin:wait])
            return "".join(shown), text[wait:]
        shown += (text[begin:at], "***")
        begin = at + len(secret)
        if wait < begin:
            wait = _possible_start(text, secrets, begin)


def _possible_start(text: str, secrets: tuple[str, ...], begin: int) -> int:
    """Where, from `begin` on, all that follows is the beginning of a secret but no whole one; else the end."""
    first = len(text)
    for secret in secrets:
        start = text.find(secret[0], max(begin, len(text) - len(secret) + 1))
        while start != -1 and not secret.startswith(text[start:]):
            start = text.find(secret[0], start + 1)
        if start != -1:
            first = min(first, start)
    return first
