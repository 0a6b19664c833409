"""The peers' servers, each in a process of its own: `python echo_servers.py raw|grpc ADDRESS`.

It prints "up" once it listens, and ends when its stdin does: with whoever started it, however that one ends.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import sys
import threading
from typing import Any, Final

__all__ = ("GRPC_METHOD", "KEY", "serve_grpc", "serve_raw", "sign")

KEY: Final = b"k" * 36  # as long as the key of a Jupyter connection file
GRPC_METHOD: Final = ("bench.Echo", "Call")


def sign(body: bytes) -> bytes:
    return hmac.digest(KEY, body, "sha256").hex().encode()


def serve_raw(address: str) -> None:
    import zmq

    socket = zmq.Context().socket(zmq.ROUTER)
    socket.bind(address)
    print("up", flush=True)
    while True:
        identity, signature, body = socket.recv_multipart()
        if not hmac.compare_digest(sign(body), signature):
            raise SystemExit("a message with a wrong signature")
        request = json.loads(body)
        answer = json.dumps({"id": request["id"], "result": request["payload"]}).encode()
        socket.send_multipart([identity, sign(answer), answer])


async def serve_grpc(address: str) -> None:
    import grpc

    async def call(body: bytes, context: Any) -> bytes:
        request = json.loads(body)
        return json.dumps({"id": request["id"], "result": request["payload"]}).encode()

    service, method = GRPC_METHOD
    # Without (de)serializers a handler takes and gives bytes: no protoc, and the same JSON as everyone else's.
    handler = grpc.unary_unary_rpc_method_handler(call)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    server.add_insecure_port(address)
    await server.start()
    print("up", flush=True)
    await server.wait_for_termination()


def _end_with_stdin() -> None:
    os.read(0, 1)
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    kind, where = sys.argv[1:]
    if kind == "raw":
        serve_raw(where)
    else:
        asyncio.run(serve_grpc(where))
