"""Secrets in texts: every form that one may be shown in, and the text without them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ("captured_text", "forms_of", "without_secrets")

SHORTEST_SECRET: Final = 8  # characters: a shorter one would be found in innocent words
MAX_CAPTURED: Final = 4096

_encode: Final = msgspec.json.Encoder().encode


def forms_of(secrets: Iterable[str]) -> tuple[str, ...]:
    """What to star out, the longest first: each secret as itself, as a repr and as JSON would have it, which is how
    a line break or a quote in one gets into a text; and each of these once more, for JSON within JSON.
    """
    plain = {secret for secret in secrets if len(secret) >= SHORTEST_SECRET}
    once = {form for secret in plain for form in _written(secret)}
    forms = once | {form for text in once for form in _written(text)}
    return tuple(sorted(forms, key=lambda form: (-len(form), form)))


def _written(text: str) -> tuple[str, ...]:
    """A text as itself, and as programs write it."""
    return text, repr(text)[1:-1], json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]


def without_secrets(text: str, secrets: tuple[str, ...]) -> str:
    """The same text with each secret starred out: `secrets` are the forms that `forms_of` gives."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def captured_text(value: Any, secrets: tuple[str, ...]) -> str:
    """An encoded value as telemetry may hold it: JSON, without secrets, 4,096 characters at most.

    Secrets go before it is clipped, for a part of one would not be found any more.
    """
    text = value if isinstance(value, str) else _encode(value).decode()
    text = without_secrets(text, secrets)
    return text if len(text) <= MAX_CAPTURED else f"{text[: MAX_CAPTURED - 1]}…"
