"""The other end, for tests: real ZeroMQ sockets that do what the messages they receive say.

Prints where they listen, as JSON, and ends with its stdin. ROUTER: `echo`, `size` (a frame of so many bytes), `count`
(so many messages), `frames` (one message of so many), `later` (an echo once so many milliseconds have passed), `publish`
(topic, text), `bye` (closes the sockets). `strict` is a ROUTER too, which cuts off who answers no PING in time. XPUB:
greets who subscribes to `hello` on that topic. REP: echoes.
"""

import json
import sys

import zmq

directory = sys.argv[1]
context = zmq.Context()
router, strict, xpub, rep = (context.socket(kind) for kind in (zmq.ROUTER, zmq.ROUTER, zmq.XPUB, zmq.REP))
strict.setsockopt(zmq.HEARTBEAT_IVL, 20)
strict.setsockopt(zmq.HEARTBEAT_TIMEOUT, 200)
addresses = {}
for name, socket in (("router", router), ("strict", strict), ("xpub", xpub), ("rep", rep)):
    socket.set_hwm(0)
    socket.linger = 0
    socket.bind(f"ipc://{directory}/{name}")
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    addresses[name] = {"ipc": f"{directory}/{name}", "tcp": port}
print(json.dumps({"libzmq": zmq.zmq_version(), **addresses}), flush=True)

poller = zmq.Poller()
for watched in (router, strict, xpub, rep, sys.stdin):
    poller.register(watched, zmq.POLLIN)

while True:
    ready = dict(poller.poll())
    if sys.stdin.fileno() in ready:
        break
    if xpub in ready and (topic := xpub.recv())[1:].startswith(b"hello") and topic[0] == 1:
        xpub.send_multipart([topic[1:], b"welcome"])
    if rep in ready:
        rep.send_multipart(rep.recv_multipart())
    for asked in {router, strict} & ready.keys():
        who, what, *rest = asked.recv_multipart()
        if what == b"echo":
            asked.send_multipart([who, *rest])
        elif what == b"size":
            asked.send_multipart([who, bytes(int(rest[0]))])
        elif what == b"count":
            for n in range(int(rest[0])):
                asked.send_multipart([who, str(n).encode()])
        elif what == b"frames":
            asked.send_multipart([who, *(str(n).encode() for n in range(int(rest[0])))])
        elif what == b"later":
            # libzmq's own thread goes on with its PINGs.
            zmq.select([sys.stdin], [], [], int(rest[0]) / 1000)
            asked.send_multipart([who, *rest])
        elif what == b"publish":
            xpub.send_multipart(rest)
        elif what == b"bye":
            context.destroy()
            sys.exit()
