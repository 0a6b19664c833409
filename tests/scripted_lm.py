"""A scripted stand-in for a language model, behind a real HTTP round trip. No model answers here.

The small model of `bridge_host.local_lm` cannot act as an agent (ReAct is beyond it), and a test of an agent has
to know what the model will say. So this server speaks OpenAI's chat completions on loopback and says what the
test wrote. What it proves is the path: client, HTTP, adapter, tools. It proves nothing about any model's answers.
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

__all__ = ("ScriptedLM", "fields")

MAX_BODY_BYTES: Final = 4 * 1024 * 1024
MAX_HELD_S: Final = 30.0  # a reply whose event nobody sets goes out then, so that no test hangs

Messages: TypeAlias = "list[dict[str, Any]]"


def fields(**values: str) -> str:
    """A reply in the form that DSPy's ChatAdapter reads: `fields(answer="Paris")`."""
    return "\n\n".join([*(f"[[ ## {name} ## ]]\n{value}" for name, value in values.items()), "[[ ## completed ## ]]"])


class ScriptedLM:
    """A chat-completions server on 127.0.0.1 that says what it is told to; a context manager.

    `replies` is a list, said in order (one more request than replies is an HTTP 400 that says so), or a function
    of the request's messages; what the function raises is an HTTP 400 as well. `held` keeps each reply back until
    the event is set: `received` is set as soon as a request has arrived. Streams when asked to, a word at a time;
    with `held`, the first word goes out before the wait.

        with ScriptedLM([fields(answer="Paris")]) as lm:
            dspy.LM(lm.model, api_base=lm.api_base, api_key=lm.api_key, cache=False)
    """

    model: Final = "openai/scripted"
    api_key: Final = "none"

    def __init__(
        self,
        replies: Callable[[Messages], str] | Sequence[str],
        *,
        held: threading.Event | None = None,
    ) -> None:
        self.requests: list[dict[str, Any]] = []  # the JSON bodies, in the order of their arrival
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

    def take(self, body: dict[str, Any]) -> str:
        """The reply to a request. One at a time, so that a list is said in the order of `requests`."""
        with self._lock:
            self.requests.append(body)
            self.received.set()
            return self._reply(body["messages"])

    def hold(self) -> None:
        """Return once the test lets replies go, or the server closes."""
        waited = 0.0
        while self._held is not None and not self._closing.is_set() and waited < MAX_HELD_S:
            if self._held.wait(0.02):
                return
            waited += 0.02


def _in_order(replies: Sequence[str]) -> Callable[[Messages], str]:
    left = iter(replies)

    def reply(messages: Messages) -> str:
        for text in left:
            return text
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
            text = self.server.script.take(body)
        except Exception as failure:  # noqa: BLE001 - a script that fails must fail the request, not hang it
            self._send_json(400, {"error": {"message": f"ScriptedLM: {failure}", "type": "invalid_request_error"}})
            return
        usage = {"prompt_tokens": len(json.dumps(body["messages"]).split()), "completion_tokens": len(text.split())}
        usage["total_tokens"] = sum(usage.values())
        if body.get("stream"):
            self._stream(text, usage)
            return
        self.server.script.hold()
        message = {"role": "assistant", "content": text}
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
