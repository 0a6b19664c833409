"""A kernel that does not keep to the contract, for tests: what it does is said by the name of the function that is called.

Run in place of Python, with the arguments of a kernel. It shakes hands as it should, and answers `good` with 1.
"""

import hashlib
import hmac
import json
import os
import sys
import uuid
from typing import Any

import zmq

with open(sys.argv[sys.argv.index("-f") + 1]) as file:
    connection = json.load(file)
context = zmq.Context()
sockets = {}
for name, kind in (("shell", zmq.ROUTER), ("control", zmq.ROUTER), ("iopub", zmq.XPUB)):
    sockets[name] = context.socket(kind)
    sockets[name].set_hwm(0)
for name in ("shell", "control", "iopub"):  # the last is what the host waits for
    sockets[name].bind(f"ipc://{connection['ip']}-{connection[name + '_port']}")
iopub = sockets["iopub"]
comm = ""


def send(kind: str, content: dict[str, Any], parent: dict[str, Any] | None = None, topic: str = "") -> None:
    header = {
        "msg_id": uuid.uuid4().hex,
        "msg_type": kind,
        "session": "h",
        "username": "",
        "date": "",
        "version": "5.4",
    }
    frames = [json.dumps(part).encode() for part in (header, parent or {}, {}, content)]
    signature = hmac.new(connection["key"].encode(), b"".join(frames), hashlib.sha256).hexdigest().encode()
    iopub.send_multipart([f"comm-{comm}{topic}".encode(), b"<IDS|MSG>", signature, *frames])


def say(**data: Any) -> None:
    send("comm_msg", {"comm_id": comm, "data": {"jsonrpc": "2.0", **data}})


def chunk(command: str, seq: int, **more: Any) -> None:
    say(method="command.chunk", params={"command": command, "seq": seq, **more})


def obey(id: str, what: str, params: dict[str, Any], parent: dict[str, Any]) -> None:
    match what:
        case "good":
            say(id=id, result={"value": 1})
        case "no_value":
            say(id=id, result={})
        case "a_list":
            say(id=id, result=[1])
        case "both":
            say(id=id, result={"value": 1}, error={"code": -32000, "message": "no"})
        case "bad_error":
            say(id=id, error="no")
        case "unknown_code":
            say(id=id, error={"code": 7, "message": "seven"})
        case "bad_value":
            say(id=id, result={"value": {"$bridge": "nonsense"}})
        case "bad_state":
            say(id=id, result={"state": {"adapter": 7}, "value": 1})
        case "bad_digest":
            say(id=id, result={"state": {"adapter": "pickle", "value": None, "sha256": {}}, "value": 1})
        case "no_state":
            say(id=id, result={"state": None})
        case "inspected":
            say(id=id, result={"name": ["x"], "kind": 1, "members": [{"name": {}}], "doc": 3})
        case "twice":
            say(id=id, result={"value": 1})
            say(id=id, result={"value": 2})
        case "greedy":
            for seq in range(1000):
                chunk(id, seq, value=seq)
        case "chunk_without_value":
            chunk(id, 0)
        case "chunk_out_of_turn":
            chunk(id, 0, value=0)
            chunk(id, 10**30, value=1)
        case "odd_callbacks":
            for n, odd in enumerate(
                ([1], {}, {"command": id, "names": 7}, {"command": {}}, {"command": id, "seq": -1})
            ):
                say(id=n, method="session.get_many" if n % 2 else "no.such", params=odd)
                waiting[n] = id
        case "noise":
            digits = {"msg_id": parent["msg_id"].rpartition("_")[0] + "_" + "9" * 200_000}
            send("stream", {"name": "stdout", "text": "x"}, digits, ".stream")
            send("stream", {"name": 1, "text": []}, parent, ".stream")
            send("display_data", {"data": {"text/plain": 1}, "transient": "x"}, parent, ".display_data")
            send(
                "display_data", {"data": {"text/plain": ["a"]}, "transient": {"display_id": 3}}, parent, ".display_data"
            )
            send("display_data", {"data": {"application/vnd.bridge.telemetry.v1+json": 5}}, parent, ".display_data")
            for transient in (False, None, {"display_id": []}):
                send("display_data", {"data": {"text/plain": "a"}, "transient": transient}, parent, ".display_data")
            say(method="command.progress", params=7)
            say(method="no.such", params={"command": id})
            say(id="x", result={})
            say(id=None, error={"code": 1, "message": "?"})
            say(id=id, result={"value": 1})
        case "closes_and_answers":
            if params["attempt"] == 1:
                send("comm_close", {"comm_id": comm, "data": {}})
            say(id=id, result={"value": params["attempt"]})
        case "dies":
            os._exit(3)


waiting = {}
poller = zmq.Poller()
for watched in (*sockets.values(), sys.stdin):
    poller.register(watched, zmq.POLLIN)
while True:
    ready = dict(poller.poll())
    if sys.stdin.fileno() in ready:
        os._exit(0)
    if iopub in ready and (topic := iopub.recv())[:1] == b"\1":
        comm = topic[len(b"\1comm-") :].decode()
        send("iopub_welcome", {})
    if sockets["control"] in ready:
        frames = sockets["control"].recv_multipart()
        if b"shutdown_request" in frames[-4]:
            os._exit(0)
    if sockets["shell"] in ready:
        *_, header, _, _, content = sockets["shell"].recv_multipart()
        header, message = json.loads(header), json.loads(content)["data"]
        params, id = message.get("params", {}), message.get("id")
        if message.get("method") == "bridge.attach":
            limits = {"max_message_bytes": "lots", "max_commands": -1}
            say(id=id, result={"kernel": {"id": uuid.uuid4().hex}, "limits": limits})
        elif "method" not in message:
            command = waiting.pop(id)
            if not waiting:
                say(id=command, result={"value": "answered"})
        elif message["method"] == "kernel.ping":
            say(id=id, result={"rss": "much", "busy": []})
        elif message["method"] == "instance.create":
            obey(id, params["record"]["class"], params, header)
        elif message["method"] == "instance.call":
            obey(id, params["method"], params, header)
        elif message["method"] == "object.inspect":
            obey(id, "inspected", params, header)
        elif message["method"].startswith("function."):
            obey(id, params["function"]["path"], params, header)
