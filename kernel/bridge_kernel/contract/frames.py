"""Signed Jupyter frames: bytes to `Envelope` and back, replays refused.

Pure: the caller owns sockets, retries, logging and the clock. The layout and the signature are those of
https://jupyter-client.readthedocs.io/en/stable/messaging.html ("The Wire Protocol").
"""

from __future__ import annotations

import hmac
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = (
    "DELIMITER",
    "JUPYTER_VERSION",
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
)

Buffer = bytes | memoryview

DELIMITER: Final = b"<IDS|MSG>"
JUPYTER_VERSION: Final = "5.4"
"""The version of the Jupyter messaging protocol that every header of ours states."""

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

    def __init__(self, key: bytes, *, session: str, username: str = "bridge", max_bytes: int = 1 << 28) -> None:
        """`max_bytes` bounds one message, buffers included.

        Raises:
            ValueError: the key is empty: a connection without one cannot be told from an attack.
        """
        if not key:
            raise ValueError("the connection file has no key: start the kernel with one, so that messages are signed")
        self._key = key
        self._max_bytes = max_bytes
        self.session = session
        middle = _encode({"username": username, "session": session, "version": JUPYTER_VERSION})
        self._middle = middle[1:-1]
        self._seen: set[bytes] = set()
        self._ring: deque[bytes] = deque()

    def sign(self, header: bytes, parent: bytes, metadata: bytes, content: bytes) -> bytes:
        """HMAC-SHA256 of the four JSON frames, in lower-case hexadecimal."""
        blob = b"".join((header, parent, metadata, content))
        return hmac.digest(self._key, blob, "sha256").hex().encode()

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
        signature, header, parent, metadata, content = (bytes(f) for f in frames[start + 1 : start + 6])
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
        except (msgspec.MsgspecError, RecursionError) as exc:
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
    except (msgspec.MsgspecError, RecursionError) as exc:
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


class _Socket(Protocol):
    def recv(self, flags: int = 0, copy: bool = True) -> Any: ...
    def getsockopt(self, option: int) -> Any: ...


def receive(socket: _Socket, flags: int, rcvmore: int) -> list[Buffer]:
    """One multipart message from a pyzmq socket: small parts as bytes, a value's buffers as views, not copied.

    `flags` are those of `recv` and `rcvmore` is zmq.RCVMORE: this module imports no zmq. Raises what `recv` raises.
    """
    frames: list[Buffer] = [socket.recv(flags)]
    left = -1 if frames[0] != DELIMITER else 5
    while socket.getsockopt(rcvmore):
        if left == 0:
            frames.append(socket.recv(flags, copy=False).buffer)
            continue
        frame = socket.recv(flags)
        frames.append(frame)
        left = left - 1 if left > 0 else 5 if frame == DELIMITER else -1
    return frames
