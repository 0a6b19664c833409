"""The line that a command is told in, alive or settled: as text and as HTML, the same from a kernel and from a host."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Line", "Summary", "duration", "quantity")

SPINNER: Final = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
FRAME_NS: Final = 100_000_000
MAX_SUBJECT: Final = 120
MAX_ERROR: Final = 300
MAX_MESSAGE: Final = 200
WORTH_SAYING_NS: Final = 10_000_000
MAX_TRACEBACK: Final = 20_000

_SETTLED: Final = ("ok", "error")
# Mixed with the colour of the text, which is dark on a light page and light on a dark one: readable on both.
_COLOURS: Final = {
    state: f"color-mix(in srgb, {colour} 60%, currentcolor)"
    for state, colour in {"running": "#2979ff", "queued": "#2979ff", "ok": "#1ea65a", "error": "#f0392b"}.items()
}


class Line(NamedTuple):
    """One command. Durations in ns."""

    subject: str
    """What people call it: `dspy.ChainOfThought.__call__`."""
    elapsed: int
    state: str = "running"
    """"queued", while it has no kernel; "running", "ok" or "error"."""
    kernel: str = ""
    queue: int = 0
    """How long it waited for a kernel; shown from 10 ms on."""
    callbacks: int = 0
    lm_calls: int = 0
    tokens: int = 0
    attempt: int = 1
    done: float | None = None
    total: float | None = None
    message: str = ""
    """How far it is, while it runs."""
    cached: bool = False
    error: str = ""
    traceback: str = ""
    """Shown folded, in HTML only."""

    @property
    def mark(self) -> str:
        """✓, ✗, or a spinner's frame."""
        return _mark(self.state, self.elapsed)

    @property
    def details(self) -> list[str]:
        """What is said after the subject, in order."""
        said = [duration(self.elapsed) if self.state in _SETTLED else f"{self.elapsed / 1e9:.1f} s"]
        if self.state == "queued":
            said.append("queued")
        elif self.state == "running" and (self.done is not None or self.message):
            said.append(_clip(self._progress(), MAX_MESSAGE))
        if self.kernel:
            said.append(f"kernel {self.kernel[:4]}")
        if self.cached:
            said.append("from the cache")
        if self.queue >= WORTH_SAYING_NS and self.state != "queued":
            said.append(f"queued {duration(self.queue)}")
        if self.attempt > 1:
            said.append(f"attempt {self.attempt}")
        if self.lm_calls:
            tokens = f", {quantity(self.tokens, 'token')}" if self.tokens else ""
            said.append(f"{quantity(self.lm_calls, 'LM call')}{tokens}")
        if self.callbacks:
            said.append(quantity(self.callbacks, "callback"))
        if self.error:
            said.append(_clip(self.error, MAX_ERROR))
        return said

    def _progress(self) -> str:
        if self.done is None:
            return self.message
        of = f"/{self.total:g}" if self.total is not None else ""
        return f"{self.done:g}{of} {self.message}".strip()

    def redacted(self, said: Callable[[str], str]) -> Line:
        """The same, with each text as `said` gives it."""
        return self._replace(
            subject=said(self.subject),
            message=said(self.message),
            error=said(self.error),
            traceback=said(self.traceback),
        )

    def text(self) -> str:
        """One line, without a newline."""
        return f"{self.mark} {_clip(self.subject, MAX_SUBJECT)}  {' · '.join(self.details)}"

    def html(self) -> str:
        """The same, coloured; of a command that has come some of its way a bar, of an error its traceback, folded."""
        subject, details = html.escape(_clip(self.subject, MAX_SUBJECT)), html.escape(" · ".join(self.details))
        share = ""
        if self.state == "running" and self.done is not None and self.total:
            value = min(max(self.done / self.total, 0.0), 1.0)
            share = f' <progress value="{value:.3f}" max="1" style="width:8em;vertical-align:middle"></progress>'
        line = f'{_coloured(self.state, self.mark)} <b>{subject}</b> <span style="opacity:.75">{details}</span>{share}'
        if self.traceback:
            folded = html.escape(self.traceback[:MAX_TRACEBACK])
            line = (
                f'<details><summary style="cursor:pointer">{line}</summary>'
                f'<pre style="margin:.3em 0 0 1.5em;font-size:11px;white-space:pre-wrap">{folded}</pre></details>'
            )
        return _framed(line)


class Summary(NamedTuple):
    """Many commands in one line. Durations in ns."""

    ok: int
    failed: int
    running: int = 0
    p50: int | None = None
    p95: int | None = None
    lm_calls: int = 0
    tokens: int = 0
    elapsed: int = 0
    """Since the first of them began; moves the spinner."""

    @property
    def parts(self) -> list[tuple[str, str]]:
        """What is said, in order, each with the state whose colour it has, or ""."""
        said = [("", quantity(self.ok + self.failed + self.running, "command"))]
        if self.ok:
            said.append(("ok", f"{self.ok:,} ✓"))
        if self.failed:
            said.append(("error", f"{self.failed:,} ✗"))
        if self.running:
            said.append(("running", f"{_mark('running', self.elapsed)} {self.running:,} running"))
        if self.p50 is not None and self.p95 is not None:
            said += [("", f"p50 {duration(self.p50)}"), ("", f"p95 {duration(self.p95)}")]
        if self.lm_calls:
            said.append(("", quantity(self.lm_calls, "LM call")))
        if self.tokens:
            said.append(("", quantity(self.tokens, "token")))
        return said

    def text(self) -> str:
        """One line, without a newline."""
        return " · ".join(said for _, said in self.parts)

    def html(self) -> str:
        """The same, coloured."""
        (_, first), *rest = self.parts
        said = [_coloured(state, part) if state else f'<span style="opacity:.75">{part}</span>' for state, part in rest]
        return _framed('<span style="opacity:.75"> · </span>'.join([f"<b>{first}</b>", *said]))


def _mark(state: str, elapsed: int) -> str:
    if state in _SETTLED:
        return "✓" if state == "ok" else "✗"
    return SPINNER[elapsed // FRAME_NS % len(SPINNER)]


def _coloured(state: str, text: str) -> str:
    return f'<span style="color:{_COLOURS[state]}">{text}</span>'


def _framed(line: str) -> str:
    return f'<div class="bridge-line" style="font:12px/1.5 ui-monospace,monospace;padding-left:var(--jp-code-padding,0)">{line}</div>'


def duration(ns: float) -> str:
    """A duration as people read it: `412 ms`."""
    if ns < 1_000_000:
        return f"{ns / 1000:.0f} µs"
    if ns < 100_000_000:
        return f"{ns / 1e6:.1f} ms"
    if ns < 1_000_000_000:
        return f"{ns / 1e6:.0f} ms"
    if ns < 120_000_000_000:
        return f"{ns / 1e9:.2f} s"
    return f"{ns / 60e9:.1f} min"


def quantity(count: float, what: str) -> str:
    """`1 callback`, `2 callbacks`, `12,000 tokens`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _clip(text: str, most: int) -> str:
    """On one line, and without what would move a terminal's cursor."""
    if not text.isprintable():
        text = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * most]).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
