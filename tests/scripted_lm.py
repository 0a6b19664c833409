"""A scripted stand-in for a language model, behind a real HTTP round trip. No model answers here.

The small model of `bridge_host.local_lm` cannot act as an agent (ReAct is beyond it), and a test of an agent has
to know what the model will say. So this server speaks OpenAI's chat completions on loopback and says what the
test wrote. What it proves is the path: client, HTTP, adapter, tools. It proves nothing about any model's answers.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

__all__ = ("Refused", "Reply", "ScriptedLM", "fields")

MAX_BODY_BYTES: Final = 4 * 1024 * 1024
MAX_HELD_S: Final = 30.0  # a reply whose event nobody sets goes out then, so that no test hangs

Messages: TypeAlias = "list[dict[str, Any]]"


def fields(**values: str) -> str:
    """A reply in the form that DSPy's ChatAdapter reads: `fields(answer="Paris")`."""
    return "\n\n".join([*(f"[[ ## {name} ## ]]\n{value}" for name, value in values.items()), "[[ ## completed ## ]]"])


@dataclass(frozen=True)
class Reply:
    """A reply that says how many tokens it took; else words are counted."""

    text: str
    input_tokens: int
    output_tokens: int


class Refused(Exception):
    """Said in place of a reply: an HTTP error of this status."""

    def __init__(self, status: int, message: str = "refused") -> None:
        super().__init__(message)
        self.status = status


class ScriptedLM:
    """A chat-completions server on 127.0.0.1 that says what it is told to; a context manager.

    `replies` is a list, said in order (one more request than replies is an HTTP 400 that says so; a `Refused` among
    them is raised), or a function of the request's messages; what the function raises is an HTTP 400 as well, a
    `Refused` one of its own status. `held` keeps each reply back until the event is set: `received` is set as soon
    as a request has arrived. Streams when asked to, a word at a time; with `held`, the first word goes out before
    the wait. `usages` is what it said that its replies took, (input, output) in tokens. A `model` that DSPy knows
    the price of has a cost.

        with ScriptedLM([fields(answer="Paris")]) as lm:
            dspy.LM(lm.model, api_base=lm.api_base, api_key=lm.api_key, cache=False)
    """

    api_key: Final = "none"

    def __init__(
        self,
        replies: Callable[[Messages], str | Reply] | Sequence[str | Reply | Refused],
        *,
        held: threading.Event | None = None,
        model: str = "openai/scripted",
    ) -> None:
        self.model: Final = model
        self.requests: list[dict[str, Any]] = []  # the JSON bodies, in the order of their arrival
        self.usages: list[tuple[int, int]] = []
        self.received = threading.Event()
        self._reply = replies if callable(replies) else _in_order(replies)
        self._held = held
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.02], name="scripted-lm")

    @property
    def api_base(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()  # waits for the threads of requests, which no longer hold anything

    def take(self, body: dict[str, Any]) -> Reply:
        """The reply to a request. One at a time, so that a list is said in the order of `requests`."""
        with self._lock:
            self.requests.append(body)
            self.received.set()
            said = self._reply(body["messages"])
            if isinstance(said, str):
                said = Reply(said, len(json.dumps(body["messages"]).split()), len(said.split()))
            self.usages.append((said.input_tokens, said.output_tokens))
            return said

    def hold(self) -> None:
        """Return once the test lets replies go, or the server closes."""
        waited = 0.0
        while self._held is not None and not self._closing.is_set() and waited < MAX_HELD_S:
            if self._held.wait(0.02):
                return
            waited += 0.02


def _in_order(replies: Sequence[str | Reply | Refused]) -> Callable[[Messages], str | Reply]:
    left = iter(replies)

    def reply(messages: Messages) -> str | Reply:
        for said in left:
            if isinstance(said, Refused):
                raise said
            return said
        raise LookupError(f"the script has {len(replies)} replies and this is one request more")

    return reply


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # server_close() joins them

    def __init__(self, script: ScriptedLM) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, as a cancelled one does, is no error of the test's."""


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.0, BaseHTTPRequestHandler's own: a connection a request, so nothing is left open for close() to wait for.
    server: _Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(min(int(self.headers["Content-Length"]), MAX_BODY_BYTES)))
        try:
            reply = self.server.script.take(body)
        except Exception as failure:  # noqa: BLE001 - a script that fails must fail the request, not hang it
            status = failure.status if isinstance(failure, Refused) else 400
            self._send_json(status, {"error": {"message": f"ScriptedLM: {failure}", "type": "invalid_request_error"}})
            return
        usage = {"prompt_tokens": reply.input_tokens, "completion_tokens": reply.output_tokens}
        usage["total_tokens"] = sum(usage.values())
        if body.get("stream"):
            self._stream(reply.text, usage)
            return
        self.server.script.hold()
        message = {"role": "assistant", "content": reply.text}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        self._send_json(200, _chunk("chat.completion", choices, usage))

    def _stream(self, text: str, usage: dict[str, int]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        pieces = re.findall(r"\S+\s*|\s+", text) or [""]
        for number, piece in enumerate(pieces):
            if number == 1 or len(pieces) == 1:
                self.server.script.hold()
            delta = {"content": piece} if number else {"role": "assistant", "content": piece}
            self._event(_chunk("chat.completion.chunk", [{"index": 0, "delta": delta, "finish_reason": None}]))
        ending = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
        self._event(_chunk("chat.completion.chunk", ending, usage))
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()

    def _send_json(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def _chunk(kind: str, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
    chunk = {"id": "chatcmpl-scripted", "object": kind, "created": 0, "model": "scripted", "choices": choices}
    return chunk | {"usage": usage} if usage else chunk
