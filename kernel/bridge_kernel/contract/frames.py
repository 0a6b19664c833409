"""Signed Jupyter frames: bytes to `Envelope` and back, replays refused.

Pure: the caller owns sockets, retries, logging and the clock. The layout and the signature are those of
https://jupyter-client.readthedocs.io/en/stable/messaging.html ("The Wire Protocol").
"""

from __future__ import annotations

import hmac
from collections import deque
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = (
    "DELIMITER",
    "HEADROOM",
    "JUPYTER_VERSION",
    "MAX_MESSAGE_BYTES",
    "UNDECODABLE",
    "Buffer",
    "Envelope",
    "FrameCodec",
    "Header",
    "MalformedFrames",
    "comm_close",
    "comm_content",
    "comm_message",
    "comm_open",
    "receive",
    "send",
)

Buffer = bytes | memoryview

DELIMITER: Final = b"<IDS|MSG>"
JUPYTER_VERSION: Final = "5.4"
"""The version of the Jupyter messaging protocol that every header of ours states."""

UNDECODABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding a peer's JSON may raise: msgspec reports text that is no UTF-8, and depth, in Python's own words."""
MAX_MESSAGE_BYTES: Final = 1 << 28
"""The largest message that either side takes unless told otherwise, buffers included."""
HEADROOM: Final = 4096
"""Bytes of a message kept free for its headers and signature."""
MAX_IDENTITIES: Final = 8  # one is usual; each router on the way adds one
MAX_FRAMES: Final = 4096  # identities and buffers included
REMEMBERED: Final = 65_536
"""Signatures kept to refuse a replay: a ring, so that nothing is ever culled at once (jupyter_client stalls there)."""


class MalformedFrames(ValueError):
    """These frames are no message that we take: too few, too many, too large, unsigned, altered or replayed.

    Never sent to a peer, who may be anyone: it is counted and the message dropped.
    """


class Header(msgspec.Struct, frozen=True):
    """A Jupyter message header: the spec's own field names."""

    msg_id: str
    msg_type: str
    session: str = ""
    username: str = ""
    date: str = ""
    version: str = ""


class Envelope(NamedTuple):
    """One Jupyter message, its signature already verified.

    `raw_header` is what a reply names as its parent, byte for byte; `content` is left undecoded.
    """

    identities: Sequence[bytes]
    header: Header
    raw_header: bytes
    parent: bytes
    metadata: bytes
    content: bytes
    buffers: Sequence[Buffer]


class CommMessage(msgspec.Struct, frozen=True):
    """The content of `comm_msg`, `comm_open` and `comm_close`; `data` is left undecoded."""

    comm_id: str
    data: msgspec.Raw = msgspec.Raw(b"{}")
    target_name: str = ""


_decode_header = msgspec.json.Decoder(Header).decode
_decode_comm = msgspec.json.Decoder(CommMessage).decode
_encode = msgspec.json.Encoder().encode


class FrameCodec:
    """Packs and unpacks the messages of one peer, with the key of one connection file.

    Not thread-safe for unpacking (one thread owns a socket); packing may happen on any thread.
    """

    def __init__(
        self, key: bytes, *, session: str, username: str = "bridge", max_bytes: int = MAX_MESSAGE_BYTES
    ) -> None:
        """`max_bytes` bounds one message, buffers included.

        Raises:
            ValueError: the key is empty: a connection without one cannot be told from an attack.
        """
        if not key:
            raise ValueError("the connection file has no key: start the kernel with one, so that messages are signed")
        # HMAC-SHA256 (RFC 2104) from saved states: half of what hmac.digest costs, which looks its digest up each time.
        padded = (sha256(key).digest() if len(key) > 64 else key).ljust(64, b"\0")
        self._inner = sha256(bytes(byte ^ 0x36 for byte in padded))
        self._outer = sha256(bytes(byte ^ 0x5C for byte in padded))
        self._max_bytes = max_bytes
        self.session = session
        middle = _encode({"username": username, "session": session, "version": JUPYTER_VERSION})
        self._middle = middle[1:-1]
        self._seen: set[bytes] = set()
        self._ring: deque[bytes] = deque()

    def sign(self, header: bytes, parent: bytes, metadata: bytes, content: bytes) -> bytes:
        """HMAC-SHA256 of the four JSON frames, in lower-case hexadecimal."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(b"".join((header, parent, metadata, content)))
        outer.update(inner.digest())
        return outer.hexdigest().encode()

    def header(self, msg_type: str, msg_id: str, date: str) -> bytes:
        """A header's bytes; `date` is ISO 8601. `msg_type`, `msg_id` and `date` are ours: plain ASCII, no quotes."""
        return f'{{"msg_id":"{msg_id}","msg_type":"{msg_type}","date":"{date}",'.encode() + self._middle + b"}"

    def pack(
        self,
        identities: Sequence[bytes],
        header: bytes,
        content: bytes,
        *,
        parent: bytes = b"{}",
        metadata: bytes = b"{}",
        buffers: Sequence[Buffer] = (),
    ) -> list[Buffer]:
        """The frames of one message, signed; buffers are passed on, not copied."""
        signature = self.sign(header, parent, metadata, content)
        return [*identities, DELIMITER, signature, header, parent, metadata, content, *buffers]

    def unpack(self, frames: Sequence[Buffer]) -> Envelope:
        """Bound, verify, refuse a replay, and only then parse the header.

        Raises:
            MalformedFrames: and nothing of the message was looked at beyond what it says.
        """
        if len(frames) > MAX_FRAMES:
            raise MalformedFrames(f"{len(frames)} frames, at most {MAX_FRAMES}")
        size = sum(map(len, frames))
        if size > self._max_bytes:
            raise MalformedFrames(f"{size} bytes, at most {self._max_bytes}")
        start = 0
        for frame in frames[: MAX_IDENTITIES + 1]:
            if frame == DELIMITER:
                break
            start += 1
        else:
            raise MalformedFrames(f"no {DELIMITER.decode()} among the first {MAX_IDENTITIES + 1} frames")
        if len(frames) < start + 6:
            raise MalformedFrames(f"{len(frames) - start - 1} frames after the delimiter, at least 5")
        signature, header, parent, metadata, content = map(bytes, frames[start + 1 : start + 6])
        if not hmac.compare_digest(signature, self.sign(header, parent, metadata, content)):
            raise MalformedFrames("signature mismatch: unsigned, altered, or signed with another key")
        if signature in self._seen:
            raise MalformedFrames("replayed: this very message was received before")
        if len(self._ring) >= REMEMBERED:
            self._seen.discard(self._ring.popleft())
        self._ring.append(signature)
        self._seen.add(signature)
        try:
            decoded = _decode_header(header)
        except UNDECODABLE as exc:
            raise MalformedFrames(f"header: {exc}") from exc
        identities = [bytes(f) for f in frames[:start]]
        return Envelope(identities, decoded, header, parent, metadata, content, frames[start + 6 :])


def comm_content(content: bytes) -> CommMessage:
    """The content of a comm message.

    Raises:
        MalformedFrames: it is not one.
    """
    try:
        return _decode_comm(content)
    except UNDECODABLE as exc:
        raise MalformedFrames(f"comm content: {exc}") from exc


def comm_message(comm_id: str, data: msgspec.Raw) -> bytes:
    """The content of a `comm_msg`."""
    return _encode({"comm_id": comm_id, "data": data})


def comm_open(comm_id: str, target_name: str, data: msgspec.Raw) -> bytes:
    """The content of a `comm_open`."""
    return _encode({"comm_id": comm_id, "target_name": target_name, "data": data})


def comm_close(comm_id: str) -> bytes:
    """The content of a `comm_close`."""
    return _encode({"comm_id": comm_id, "data": {}})


class _Frame(Protocol):
    @property
    def bytes(self) -> bytes: ...
    @property
    def buffer(self) -> memoryview: ...
    @property
    def more(self) -> bool: ...


class _Socket(Protocol):
    def recv(self, flags: int = 0, copy: bool = True) -> Any: ...
    def send(self, data: Any, flags: int = 0, copy: bool = True) -> Any: ...


# libzmq's own numbers. pyzmq's enums cost more than the calls that they are given to: a quarter of a round trip.
_NOBLOCK: Final = 1
_SNDMORE: Final = 2
COPY_LIMIT: Final = 1 << 16
"""Bytes. Below this, copying a frame is cheaper than telling zmq whose memory it is."""


def send(socket: _Socket, frames: Sequence[Buffer], *, block: bool = True) -> None:
    """Send one multipart message on a pyzmq socket; large frames are handed over, not copied.

    Raises what `socket.send` raises: zmq.Again if it would block and `block` is False.
    """
    flags = 0 if block else _NOBLOCK
    last = len(frames) - 1
    for index, frame in enumerate(frames):
        more = flags if index == last else flags | _SNDMORE
        socket.send(frame, more, copy=len(frame) < COPY_LIMIT)


def receive(socket: _Socket) -> list[Buffer]:
    """One multipart message from a pyzmq socket: small parts as bytes, a value's buffers as views, not copied.

    Raises what `socket.recv` raises: zmq.Again if there is none.
    """
    frame: _Frame = socket.recv(_NOBLOCK, copy=False)
    frames: list[Buffer] = [frame.bytes]
    left = 5 if frames[0] == DELIMITER else -1
    while frame.more:
        frame = socket.recv(_NOBLOCK, copy=False)
        if left == 0:
            frames.append(frame.buffer)
            continue
        part = frame.bytes
        frames.append(part)
        left = left - 1 if left > 0 else 5 if part == DELIMITER else -1
    return frames
