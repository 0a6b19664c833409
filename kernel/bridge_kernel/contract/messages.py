"""JSON-RPC 2.0 messages: bytes to a closed union of frozen types, and back.

What the methods mean is `methods`'s; which frames carry a message is `frames`'s.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from .errors import ErrorObject, InvalidRequest, ParseError

__all__ = (
    "COMM_TARGET",
    "PROTOCOL_VERSION",
    "Failure",
    "Id",
    "Message",
    "Notification",
    "Request",
    "Success",
    "decode_message",
    "encode_failure",
    "encode_notification",
    "encode_request",
    "encode_success",
)

PROTOCOL_VERSION: Final = (1, 0)
"""Major, minor. A different major is refused; a newer minor only adds members with defaults."""
COMM_TARGET: Final = f"bridge.v{PROTOCOL_VERSION[0]}"

Id = int | str


class Request(msgspec.Struct, frozen=True):
    """A call that wants an answer; `params` is left undecoded until the method is known."""

    id: Id
    method: str
    params: msgspec.Raw


class Notification(msgspec.Struct, frozen=True):
    """A call that wants none."""

    method: str
    params: msgspec.Raw


class Success(msgspec.Struct, frozen=True):
    """The answer to the request `id`; `result` is left undecoded until the request is known."""

    id: Id
    result: msgspec.Raw


class Failure(msgspec.Struct, frozen=True):
    """The refusal of the request `id`; None if the request could not be read."""

    id: Id | None
    error: ErrorObject


Message = Request | Notification | Success | Failure

_EMPTY: Final = msgspec.Raw(b"{}")


class _Envelope(msgspec.Struct):
    jsonrpc: Literal["2.0"]
    id: Id | msgspec.UnsetType | None = msgspec.UNSET
    method: str | msgspec.UnsetType = msgspec.UNSET
    params: msgspec.Raw = _EMPTY
    result: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    error: ErrorObject | msgspec.UnsetType = msgspec.UNSET


_decode = msgspec.json.Decoder(_Envelope).decode


def decode_message(data: bytes | memoryview | msgspec.Raw) -> Message:
    """Decode one JSON-RPC message; its params or result stay raw.

    Raises:
        ParseError: `data` is not JSON.
        InvalidRequest: it is JSON, but not exactly one request, notification, success or failure.
    """
    try:
        env = _decode(data)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(f"not a JSON-RPC 2.0 message: {exc}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ParseError(f"not JSON: {exc}") from exc
    unset = msgspec.UNSET
    answers = (env.result is not unset) + (env.error is not unset)
    if env.method is not unset:
        if answers:
            raise InvalidRequest("a JSON-RPC message has a method, or a result, or an error: one of them")
        if env.id is unset:
            return Notification(env.method, env.params)
        if env.id is None:
            raise InvalidRequest("a request's id is a number or a string, not null")
        return Request(env.id, env.method, env.params)
    if answers != 1 or env.id is unset:
        raise InvalidRequest("a JSON-RPC answer has an id and either a result or an error")
    if env.error is not unset:
        return Failure(env.id, env.error)
    assert env.result is not unset
    if env.id is None:
        raise InvalidRequest("a result answers a request: its id is not null")
    return Success(env.id, env.result)


class _RequestOut(msgspec.Struct):
    jsonrpc: Literal["2.0"]
    id: Id
    method: str
    params: object


class _NotificationOut(msgspec.Struct):
    jsonrpc: Literal["2.0"]
    method: str
    params: object


class _SuccessOut(msgspec.Struct):
    jsonrpc: Literal["2.0"]
    id: Id
    result: object


class _FailureOut(msgspec.Struct):
    jsonrpc: Literal["2.0"]
    id: Id | None
    error: ErrorObject


_encode = msgspec.json.Encoder().encode


def encode_request(id: Id, method: str, params: object) -> msgspec.Raw:
    """`params` is a Struct or a mapping that JSON can carry (see `values.encode`)."""
    return msgspec.Raw(_encode(_RequestOut("2.0", id, method, params)))


def encode_notification(method: str, params: object) -> msgspec.Raw:
    return msgspec.Raw(_encode(_NotificationOut("2.0", method, params)))


def encode_success(id: Id, result: object) -> msgspec.Raw:
    return msgspec.Raw(_encode(_SuccessOut("2.0", id, result)))


def encode_failure(id: Id | None, error: ErrorObject) -> msgspec.Raw:
    return msgspec.Raw(_encode(_FailureOut("2.0", id, error)))
