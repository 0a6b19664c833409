"""The contract: messages, frames, errors and the OpenRPC document. Vectors: vectors/messages.json, errors.json."""

from __future__ import annotations

import ast
import base64
import contextlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from referencing import Registry
from referencing.jsonschema import DRAFT7

from bridge_kernel.commands import HANDLERS
from bridge_kernel.contract import errors, frames, messages, methods, openrpc
from bridge_kernel.contract.errors import (
    ERRORS,
    BridgeError,
    ErrorData,
    ErrorObject,
    Frame,
    InternalError,
    InvalidRequest,
    NotFound,
    ParseError,
    RemoteError,
    ToolError,
    error_object,
    exception_from,
)
from bridge_kernel.contract.frames import DELIMITER, FrameCodec, MalformedFrames
from bridge_kernel.contract.messages import Failure, Notification, Request, Success, decode_message
from bridge_kernel.contract.telemetry import Event, EventBatch, Trace
from bridge_kernel.contract.values import Decoder

ROOT = Path(__file__).parent.parent
VECTORS = Path(__file__).parent / "vectors"
MESSAGES = json.loads((VECTORS / "messages.json").read_text())
ERROR_VECTORS = json.loads((VECTORS / "errors.json").read_text())
META_SCHEMA = json.loads((VECTORS / "openrpc-meta-schema.json").read_text())
quickly = settings(deadline=None, derandomize=True, max_examples=100)

# -- strategies --------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ids = st.one_of(st.integers(), text)
json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), text
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(text, inner, max_size=4)),
    max_leaves=8,
)
objects = st.dictionaries(text, json_values, max_size=4)
error_objects = st.builds(
    ErrorObject,
    st.integers(-(2**31), 2**31),
    text,
    st.none()
    | st.builds(
        ErrorData,
        text,
        text,
        st.lists(st.builds(Frame, text, st.integers(0, 10**6), text, text), max_size=3).map(tuple),
        st.booleans(),
        text,
    ),
)


def loads(raw: msgspec.Raw) -> Any:
    return msgspec.json.decode(raw)


# -- messages ----------------------------------------------------------------


@quickly
@given(ids, text, objects)
def test_a_request_comes_back_as_it_went(id: int | str, method: str, params: dict[str, Any]) -> None:
    message = decode_message(messages.encode_request(id, method, params))
    assert isinstance(message, Request)
    assert (message.id, type(message.id), message.method, loads(message.params)) == (id, type(id), method, params)


@quickly
@given(text, objects)
def test_a_notification_comes_back_as_it_went(method: str, params: dict[str, Any]) -> None:
    message = decode_message(messages.encode_notification(method, params))
    assert isinstance(message, Notification)
    assert (message.method, loads(message.params)) == (method, params)


@quickly
@given(ids, json_values)
def test_a_success_comes_back_as_it_went(id: int | str, result: object) -> None:
    message = decode_message(messages.encode_success(id, result))
    assert isinstance(message, Success)
    assert (message.id, type(message.id), loads(message.result)) == (id, type(id), result)


@quickly
@given(st.none() | ids, error_objects)
def test_a_failure_comes_back_as_it_went(id: int | str | None, error: ErrorObject) -> None:
    assert decode_message(messages.encode_failure(id, error)) == Failure(id, error)


def _only_parse_error_or_invalid_request(data: bytes) -> None:
    try:
        message = decode_message(data)
    except (ParseError, InvalidRequest):
        return
    assert isinstance(message, Request | Notification | Success | Failure)


@quickly
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_parse_error_or_an_invalid_request(data: bytes) -> None:
    _only_parse_error_or_invalid_request(data)


@quickly
@given(json_values)
def test_any_json_is_a_message_or_an_invalid_request(value: object) -> None:
    with contextlib.suppress(InvalidRequest):
        decode_message(json.dumps(value).encode())


@quickly
@given(st.data())
def test_a_message_cut_or_altered_anywhere_is_a_message_or_one_of_the_two_errors(data: st.DataObject) -> None:
    whole = bytes(messages.encode_failure("id", error_object(ValueError("ünsinn"))))
    place = data.draw(st.integers(0, len(whole) - 1))
    _only_parse_error_or_invalid_request(whole[:place])
    _only_parse_error_or_invalid_request(whole[:place] + data.draw(st.binary(max_size=3)) + whole[place + 1 :])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"{",
        b'"\xff"',
        b'{"jsonrpc":"2.0","method":"\xff"}',
        b'{"jsonrpc":"2.0","id":"\xff","method":"m"}',
        b'{"jsonrpc":"2.0","method":"\\ud800"}',
        b'{"jsonrpc":"2.0","error":{"code":1,"message":"\xc3"},"id":1}',
        b"[" * 1_000_000,
        b'{"jsonrpc":"2.0","method":"m","params":' + b"[" * 1_000_000,
        b'{"jsonrpc":"2.0","method":"m","params":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
        b"\x00",
        b"\xef\xbb\xbf{}",
        b"NaN",
    ],
)
def test_what_is_not_json_is_a_parse_error_or_an_invalid_request(data: bytes) -> None:
    with pytest.raises((ParseError, InvalidRequest)):
        decode_message(data)


@pytest.mark.parametrize("case", MESSAGES["malformed"], ids=lambda case: case["name"])
def test_the_malformed_messages_of_the_vectors_raise_their_errors(case: dict[str, Any]) -> None:
    with pytest.raises(ERRORS[case["code"]]):
        decode_message(case["data"].encode())


@quickly
@given(objects)
def test_members_that_a_newer_minor_version_adds_are_passed_over(more: dict[str, Any]) -> None:
    known = {"jsonrpc": "2.0", "id": 1, "method": "kernel.ping", "params": {}}
    added = {f"x-{key}": value for key, value in more.items()}
    assert decode_message(json.dumps({**added, **known}).encode()) == Request(1, "kernel.ping", msgspec.Raw(b"{}"))


# -- frames ------------------------------------------------------------------


def codec(**more: Any) -> FrameCodec:
    return FrameCodec(b"a key", session="session", **more)


def packed(content: bytes = b'{"comm_id":"c","data":{}}', buffers: list[bytes] | None = None) -> list[bytes]:
    ours = codec()
    header = ours.header("comm_msg", "session_1", "2026-01-01T00:00:00Z")
    return [bytes(f) for f in ours.pack([b"identity"], header, content, metadata=b"{}", buffers=buffers or [])]


@quickly
@given(st.lists(st.binary(max_size=20), max_size=8), objects, st.lists(st.binary(max_size=50), max_size=4))
def test_frames_come_back_as_they_went(identities: list[bytes], content: dict[str, Any], buffers: list[bytes]) -> None:
    identities = [identity for identity in identities if identity != DELIMITER]
    ours = codec()
    header = ours.header("comm_msg", "session_1", "2026-01-01T00:00:00Z")
    body = json.dumps(content).encode()
    envelope = codec().unpack(
        ours.pack(identities, header, body, parent=b'{"a":1}', metadata=b'{"b":2}', buffers=buffers)
    )
    assert list(envelope.identities) == identities
    assert (envelope.header.msg_id, envelope.header.msg_type) == ("session_1", "comm_msg")
    assert (envelope.raw_header, envelope.parent, envelope.metadata) == (header, b'{"a":1}', b'{"b":2}')
    assert envelope.content == body
    assert [bytes(buffer) for buffer in envelope.buffers] == buffers


@quickly
@given(st.lists(st.binary(max_size=30), max_size=12))
def test_any_frames_raise_malformed_frames(junk: list[bytes]) -> None:
    with pytest.raises(MalformedFrames):
        codec().unpack(junk)
    with pytest.raises(MalformedFrames):
        codec().unpack([*junk[:3], DELIMITER, *junk])


@quickly
@given(st.data())
def test_signed_frames_cut_or_altered_anywhere_raise_malformed_frames(data: st.DataObject) -> None:
    whole = packed(buffers=[b"buffer"])
    index = data.draw(st.integers(1, 6))  # the identity is a router's to change; buffers are not signed
    at = data.draw(st.integers(0, len(whole[index]) - 1))
    byte = bytes([data.draw(st.integers(0, 255).filter(lambda b: b != whole[index][at]))])
    for broken in (
        [*whole[:index], whole[index][:at] + byte + whole[index][at + 1 :], *whole[index + 1 :]],
        [*whole[:index], whole[index][:at], *whole[index + 1 :]],
        whole[:index],
        [*whole[:index], *whole[index + 1 :]],
        [*whole[:index], b"{}", *whole[index:]] if index in (2, 3, 4, 5) else whole[:6],
    ):
        with pytest.raises(MalformedFrames):
            codec().unpack(broken)


@pytest.mark.parametrize(
    "header",
    [b"", b"{}", b"[]", b"null", b'{"msg_id":1,"msg_type":"x"}', b'{"msg_id":"\xff","msg_type":"x"}', b"[" * 10**6],
)
def test_a_signed_header_that_is_none_raises_malformed_frames(header: bytes) -> None:
    with pytest.raises(MalformedFrames):
        codec().unpack(codec().pack((), header, b"{}"))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"comm_id":1}', b'{"comm_id":"\xff"}', b'{"comm_id":"c","data":' + b"[" * 10**6]
)
def test_comm_content_that_is_none_raises_malformed_frames(content: bytes) -> None:
    with pytest.raises(MalformedFrames):
        frames.comm_content(content)


@quickly
@given(st.binary(max_size=60))
def test_any_bytes_as_comm_content_are_that_or_raise_malformed_frames(content: bytes) -> None:
    with contextlib.suppress(MalformedFrames):
        frames.comm_content(content)


def test_a_replay_is_refused_and_so_is_one_with_other_buffers_or_identities() -> None:
    receiver = codec()
    whole = packed(buffers=[b"one"])
    assert receiver.unpack(whole).content
    for again in (whole, [*whole[:-1], b"two"], [b"another", *whole[1:]]):
        with pytest.raises(MalformedFrames, match="replayed"):
            receiver.unpack(again)


def test_a_message_that_was_refused_does_not_count_as_seen() -> None:
    receiver = codec()
    whole = packed()
    with pytest.raises(MalformedFrames):
        receiver.unpack([*whole[:-1], b"altered"])
    assert receiver.unpack(whole).content


def test_the_memory_of_replays_is_bounded_and_is_never_culled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "REMEMBERED", 100)
    sender, receiver = codec(), codec()
    sent = [sender.pack((), sender.header("x", str(number), "now"), b"{}") for number in range(1000)]
    for number, message in enumerate(sent):
        receiver.unpack(message)
        assert len(receiver._seen) == len(receiver._ring) == min(number + 1, 100)  # one in, one out: no stall
    for message in sent[-100:]:
        with pytest.raises(MalformedFrames, match="replayed"):
            receiver.unpack(message)


def test_each_limit_on_frames_is_kept() -> None:
    too_large, too_many = packed(buffers=[b"x" * 2000]), packed(buffers=[b""] * frames.MAX_FRAMES)
    with pytest.raises(MalformedFrames, match="bytes"):
        codec(max_bytes=1000).unpack(too_large)
    with pytest.raises(MalformedFrames, match="frames"):
        codec().unpack(too_many)
    with pytest.raises(MalformedFrames, match="among the first"):
        codec().unpack([b"i"] * (frames.MAX_IDENTITIES + 1) + packed()[1:])
    assert codec().unpack([b"i"] * frames.MAX_IDENTITIES + packed()[1:]).content


def test_a_codec_without_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match="no key"):
        FrameCodec(b"", session="s")


@pytest.mark.parametrize("key", [b"k", b"a" * 64, b"a" * 65, b"a" * 200])
def test_the_signature_is_the_hmac_sha256_of_the_four_json_frames(key: bytes) -> None:
    import hashlib
    import hmac

    parts = (b'{"h":1}', b'{"p":1}', b'{"m":1}', b'{"c":1}')
    expected = hmac.new(key, b"".join(parts), hashlib.sha256).hexdigest().encode()
    assert FrameCodec(key, session="s").sign(*parts) == expected


# -- vectors of messages -----------------------------------------------------


def _frame(frame: str | dict[str, str]) -> bytes:
    return frame.encode() if isinstance(frame, str) else base64.b64decode(frame["base64"])


@pytest.mark.parametrize("vector", MESSAGES["messages"], ids=lambda vector: vector["name"])
def test_the_frames_of_a_vector_are_its_message_both_ways(vector: dict[str, Any]) -> None:
    ours = FrameCodec(
        MESSAGES["key"].encode(), session=vector["header"]["session"], username=vector["header"]["username"]
    )
    wire = [_frame(frame) for frame in vector["frames"]]
    envelope = ours.unpack(wire)
    assert msgspec.json.decode(envelope.raw_header) == vector["header"]
    assert msgspec.json.decode(envelope.parent) == vector["parent"]
    assert msgspec.json.decode(envelope.metadata) == vector["metadata"]
    assert msgspec.json.decode(envelope.content) == vector["content"]
    assert [bytes(buffer) for buffer in envelope.buffers] == [base64.b64decode(b) for b in vector["buffers"]]
    assert [bytes(i) for i in envelope.identities] == [i.encode() for i in vector["identities"]]
    header = vector["header"]
    assert ours.header(header["msg_type"], header["msg_id"], header["date"]) == envelope.raw_header
    again = ours.pack(
        envelope.identities,
        envelope.raw_header,
        envelope.content,
        parent=envelope.parent,
        metadata=envelope.metadata,
        buffers=envelope.buffers,
    )
    assert [bytes(frame) for frame in again] == wire
    assert bytes(again[len(vector["identities"]) + 1]).decode() == vector["signature"]
    if vector["jsonrpc"] is not None:
        comm = frames.comm_content(envelope.content)
        message = decode_message(comm.data)
        assert msgspec.json.decode(comm.data) == vector["jsonrpc"]
        encoded = _encode(message)
        assert encoded == comm.data
        maker = {"comm_msg": lambda: frames.comm_message(comm.comm_id, encoded)}
        maker["comm_open"] = lambda: frames.comm_open(comm.comm_id, comm.target_name, encoded)
        assert maker[header["msg_type"]]() == envelope.content


def _encode(message: messages.Message) -> msgspec.Raw:
    match message:
        case Request(id, method, params):
            return messages.encode_request(id, method, params)
        case Notification(method, params):
            return messages.encode_notification(method, params)
        case Success(id, result):
            return messages.encode_success(id, result)
        case Failure(id, error):
            return messages.encode_failure(id, error)
    raise AssertionError(message)


@pytest.mark.parametrize("vector", MESSAGES["messages"], ids=lambda vector: vector["name"])
def test_the_params_and_results_of_the_vectors_are_those_of_the_contract(vector: dict[str, Any]) -> None:
    rpc = vector["jsonrpc"]
    if rpc is None:
        return
    method = {m.name: m for m in methods.METHODS}[vector["method"]]
    if "error" in rpc:
        assert rpc["error"]["code"] in ERRORS
        return
    kind: Any = method.params if "method" in rpc else method.result
    decoded = msgspec.convert(rpc.get("params", rpc.get("result")), kind)
    assert isinstance(decoded, msgspec.Struct)
    sent_by_host = vector["direction"] == "host to kernel"
    assert (method.side == "host") is (sent_by_host if "method" in rpc else not sent_by_host)


def test_the_vectors_hold_each_kind_of_message_in_each_direction() -> None:
    kinds = {
        (v["direction"], next(k for k in ("method", "result", "error") if k in v["jsonrpc"]), "id" in v["jsonrpc"])
        for v in MESSAGES["messages"]
        if v["jsonrpc"] is not None
    }
    assert kinds == {
        (direction, *kind)
        for direction in ("host to kernel", "kernel to host")
        for kind in (("method", True), ("method", False), ("result", True), ("error", True))
    }
    assert {v["header"]["msg_type"] for v in MESSAGES["messages"]} == {"comm_open", "comm_msg", "comm_close"}
    assert {v["method"] for v in MESSAGES["messages"] if v["jsonrpc"]} >= set(methods.CALLBACKS) | set(methods.COMMANDS)


@pytest.mark.parametrize("case", MESSAGES["malformed_frames"], ids=lambda case: case["name"])
def test_the_malformed_frames_of_the_vectors_are_refused(case: dict[str, Any]) -> None:
    ours = FrameCodec(MESSAGES["key"].encode(), session="s", max_bytes=case.get("max_bytes", 1 << 28))
    for first in case.get("after", []):
        ours.unpack([_frame(frame) for frame in first])
    with pytest.raises(MalformedFrames):
        ours.unpack([_frame(frame) for frame in case["frames"]])


# -- errors ------------------------------------------------------------------


def _error_classes() -> list[type[BridgeError]]:
    found = [getattr(errors, name) for name in errors.__all__]
    return [c for c in found if isinstance(c, type) and issubclass(c, BridgeError) and c is not BridgeError]


def test_each_error_has_a_code_of_its_own_and_is_in_the_table() -> None:
    classes = _error_classes()
    assert len({cls.code for cls in classes}) == len(classes)
    assert set(ERRORS.values()) == set(classes)
    assert {cls.code: cls for cls in classes} == ERRORS
    assert all(-32768 <= code <= -32600 or -32099 <= code <= -32000 for code in ERRORS)


@pytest.mark.parametrize("cls", _error_classes(), ids=lambda cls: cls.__name__)
def test_each_error_says_what_it_is_and_comes_back_as_itself(cls: type[BridgeError]) -> None:
    assert cls.summary.endswith(".")
    assert cls is InternalError or cls.summary != BridgeError.summary
    back = exception_from(error_object(cls("what happened", remedy="do this")))
    assert type(back) is cls
    assert back.message == "what happened"
    assert back.remedy == "do this"
    assert back.retryable is cls.retryable
    assert back.type == f"bridge.{cls.__name__}"
    assert cls().message == cls.summary


def test_the_errors_of_the_vectors_are_the_table() -> None:
    table = [
        {
            "code": code,
            "name": cls.__name__,
            "retryable": cls.retryable,
            "summary": cls.summary,
            "remedy": cls.default_remedy,
        }
        for code, cls in ERRORS.items()
    ]
    assert ERROR_VECTORS["errors"] == table


@pytest.mark.parametrize("case", ERROR_VECTORS["examples"], ids=lambda case: case["name"])
def test_the_error_objects_of_the_vectors_come_back_as_they_went(case: dict[str, Any]) -> None:
    error = msgspec.json.decode(json.dumps(case["error"]), type=ErrorObject)
    back = exception_from(error)
    assert type(back).__name__ == case["raises"]
    assert str(back) == case["text"]
    if error.data is not None:
        assert (back.type, back.message, back.remedy) == (error.data.type, error.data.message, error.data.remedy)
        assert back.frames == error.data.traceback
        for frame in error.data.traceback:
            assert frame.function in back.remote_traceback
    if case["exact"]:
        assert json.loads(msgspec.json.encode(error_object(back))) == case["error"]


def _raised(function: Any) -> BaseException:
    try:
        function()
    except BaseException as exc:  # noqa: BLE001 - whatever it raises is what is looked at
        return exc
    raise AssertionError("raised nothing")


def test_a_python_exception_goes_with_its_type_message_and_traceback() -> None:
    def inner() -> None:
        raise json.JSONDecodeError("bad", "doc", 0)

    error = error_object(_raised(lambda: inner()))
    assert error.code == RemoteError.code
    assert error.data is not None
    assert error.data.type == "json.decoder.JSONDecodeError"
    assert [frame.function for frame in error.data.traceback][-1] == "inner"
    assert error.data.traceback[-1].code == 'raise json.JSONDecodeError("bad", "doc", 0)'
    back = exception_from(error)
    assert isinstance(back, RemoteError)
    assert str(back) == "json.decoder.JSONDecodeError: bad: line 1 column 1 (char 0)"
    assert "Kernel traceback" in back.remote_traceback
    assert back.__notes__ == [back.remote_traceback]
    assert error_object(ValueError("x"), wrap=ToolError).code == ToolError.code
    data = error_object(KeyError("k")).data
    assert data is not None
    assert data.type == "KeyError"


def test_frames_of_the_kernels_own_are_left_out_at_the_head() -> None:
    exc = _raised(lambda: json.loads("{"))
    shown = error_object(exc, hidden=str(Path(__file__).parent)).data
    assert shown is not None
    assert "json" in shown.traceback[0].file


def test_an_error_passed_on_twice_keeps_the_first_ones_traceback() -> None:
    def tool() -> None:
        raise ValueError("in the tool")

    from_tool = exception_from(error_object(_raised(tool), wrap=ToolError))

    def code_in_kernel() -> None:
        raise from_tool

    data = error_object(_raised(code_in_kernel)).data
    assert data is not None
    assert data.type == "ValueError"
    functions = [frame.function for frame in data.traceback]
    assert functions.index("code_in_kernel") < functions.index("tool")


@pytest.mark.parametrize("depth", [50, 900])
def test_the_traceback_of_a_deep_recursion_is_bounded_and_shows_both_ends(depth: int) -> None:
    def down(left: int) -> None:
        if left == 0:
            raise ValueError("bottom")
        down(left - 1)

    def top() -> None:
        down(depth)

    exc = _raised(top)
    data = error_object(exc).data
    assert data is not None
    assert len(data.traceback) <= errors.MAX_FRAMES + 1
    assert data.traceback[1].function == "top"
    assert data.traceback[-1].code == 'raise ValueError("bottom")'
    passed_on = error_object(exception_from(error_object(exc))).data
    assert passed_on is not None
    assert len(passed_on.traceback) <= errors.MAX_FRAMES + 1


def test_long_messages_are_clipped_and_say_so() -> None:
    long = "x" * (errors.MAX_TEXT + 500)
    for exc in (ValueError(long), NotFound(long), RemoteError(long)):
        error = error_object(exc)
        assert error.data is not None
        for said in (error.message, error.data.message):
            assert len(said) < errors.MAX_TEXT + 100
            assert said.endswith("more characters)")


class _Broken(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


class _BrokenOfOurs(NotFound):
    def __str__(self) -> str:
        raise ZeroDivisionError


class _Text(str):
    __slots__ = ()


class _Nameless(Exception):
    __module__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "exc",
    [
        pytest.param(_Broken(), id="its __str__ raises"),
        pytest.param(_BrokenOfOurs("x"), id="a BridgeError whose __str__ raises"),
        pytest.param(ValueError("\udc80"), id="text that is no UTF-8"),
        pytest.param(NotFound("\udc80"), id="a BridgeError with text that is no UTF-8"),
        pytest.param(ValueError(_Text("x")), id="a subclass of str"),
        pytest.param(NotFound(_Text("x")), id="a BridgeError with a subclass of str"),
        pytest.param(NotFound(404), id="a BridgeError with a number"),  # type: ignore[arg-type]
        pytest.param(_Nameless(), id="no module"),
        pytest.param(KeyboardInterrupt(), id="KeyboardInterrupt"),
        pytest.param(SystemExit(3), id="SystemExit"),
        pytest.param(ExceptionGroup("several", [ValueError("one")]), id="an ExceptionGroup"),
        pytest.param(OSError(2, "no", "\udcff"), id="OSError of a file whose name is no UTF-8"),
    ],
)
def test_whatever_was_raised_can_be_sent(exc: BaseException) -> None:
    error = error_object(exc)
    message = decode_message(messages.encode_failure(1, error))
    assert isinstance(message, Failure)
    assert isinstance(exception_from(message.error), BridgeError)


@quickly
@given(error_objects)
def test_any_error_object_becomes_an_exception_and_can_be_printed(error: ErrorObject) -> None:
    back = exception_from(error)
    assert isinstance(back, ERRORS.get(error.code, InternalError))
    assert isinstance(f"{back} {back!r} {back.remote_traceback}", str)


def test_errors_are_also_pythons_own_where_there_is_one() -> None:
    for cls, python in (
        (errors.DeadlineExceeded, TimeoutError),
        (errors.NotFound, KeyError),
        (errors.NotSerializable, TypeError),
        (errors.InvalidArguments, ValueError),
        (errors.MalformedValue, ValueError),
    ):
        assert issubclass(cls, python)
        assert str(cls("plain")) == "plain"


# -- telemetry ---------------------------------------------------------------


def test_a_trace_without_a_parent_is_a_root_and_with_one_its_child() -> None:
    root = Trace.child_of(None)
    assert root.parent_span_id is None
    child = Trace.child_of(root.traceparent)
    assert (child.trace_id, child.parent_span_id) == (root.trace_id, root.span_id)
    assert child.span_id != root.span_id
    assert Trace.child_of(child.traceparent).trace_id == root.trace_id


@quickly
@given(
    ids,
    st.dictionaries(text, st.integers(-(2**63), 2**63), max_size=3),
    st.dictionaries(text, st.none() | text, max_size=3),
)
def test_events_come_back_as_they_went(id: int | str, measurements: dict[str, int | float], metadata: Any) -> None:
    batch = EventBatch(id, {"session": "s"}, (Event(("bridge", "user", "x"), measurements, metadata),), 3)
    assert msgspec.json.decode(msgspec.json.encode(batch), type=EventBatch) == batch


# -- the OpenRPC document ----------------------------------------------------


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(json.dumps(openrpc.document()))
    return decoded


def test_the_document_is_valid_openrpc(document: dict[str, Any]) -> None:
    embedded = META_SCHEMA["definitions"]["https://meta.json-schema.tools"]
    resources = [(url, DRAFT7.create_resource(embedded)) for url in (embedded["$id"], embedded["$id"].rstrip("/"))]
    registry: Registry[Any] = Registry().with_resources(resources)
    validator = jsonschema.Draft7Validator(META_SCHEMA, registry=registry)
    assert [f"{e.json_path}: {e.message}"[:300] for e in validator.iter_errors(document)] == []
    broken = {**document, "methods": [{"name": "without params"}]}
    assert list(validator.iter_errors(broken)), "the validator finds nothing at all"


def _refs(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [ref for value in node.values() for ref in _refs(value)]
    return [ref for item in node for ref in _refs(item)] if isinstance(node, list) else []


def test_each_ref_of_the_document_leads_somewhere(document: dict[str, Any]) -> None:
    refs = _refs(document)
    assert refs
    for ref in refs:
        node: Any = document
        assert ref.startswith("#/")
        for part in ref[2:].split("/"):
            assert part in node, ref
            node = node[part]


def test_each_schema_of_the_document_is_a_json_schema(document: dict[str, Any]) -> None:
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft7Validator.check_schema(schema)


def test_the_document_has_each_method_and_error_of_the_contract(document: dict[str, Any]) -> None:
    assert [m["name"] for m in document["methods"]] == [m.name for m in methods.METHODS]
    assert {e["code"] for e in document["components"]["errors"].values()} == set(ERRORS)
    assert set(document["components"]["errors"]) == {cls.__name__ for cls in ERRORS.values()}
    for entry, method in zip(document["methods"], methods.METHODS, strict=True):
        assert ("result" in entry) is (method.result is not None)
        assert {e["code"] for e in entry["errors"]} <= set(ERRORS)
        required = [p["required"] for p in entry["params"]]
        assert required == sorted(required, reverse=True)


def _validator(document: dict[str, Any], name: str) -> jsonschema.Draft7Validator:
    # OpenRPC 1.3: "The Schema Object allows the definition of input and output data types … JSON Schema 7".
    return jsonschema.Draft7Validator({"$ref": f"#/components/schemas/{name}", "components": document["components"]})


@pytest.mark.parametrize("vector", MESSAGES["messages"], ids=lambda vector: vector["name"])
def test_what_the_vectors_say_fits_the_published_schemas(document: dict[str, Any], vector: dict[str, Any]) -> None:
    rpc = vector["jsonrpc"]
    if rpc is None or "error" in rpc:
        return
    method = {m.name: m for m in methods.METHODS}[vector["method"]]
    kind: Any = method.params if "method" in rpc else method.result
    problems = _validator(document, kind.__name__).iter_errors(rpc.get("params", rpc.get("result")))
    assert [f"{e.json_path}: {e.message}" for e in problems] == []


def test_what_a_host_sends_fits_the_published_schemas(document: dict[str, Any]) -> None:
    value = {"$bridge": "tuple", "items": [1, {"$bridge": "int", "value": "99999999999999999999"}]}
    record = methods.InstanceRecord("ref", "package.Class", (1, value), {"k": None}, methods.State("recipe"), 3)
    common: dict[str, Any] = {
        "session": "s",
        "deadline": 12.5,
        "attempt": 2,
        "traceparent": f"00-{'a' * 32}-{'b' * 16}-01",
    }
    shipped = methods.SourceFunction("f", "0" * 64, "def f(): pass")
    lm = methods.LM(model="openai/x", api_key="k", options={"temperature": 0.5})
    sent: list[msgspec.Struct] = [
        methods.Attach(protocol=messages.PROTOCOL_VERSION, host=methods.HostIdentity("h", "1", 5), session="s"),
        methods.Attach(protocol=messages.PROTOCOL_VERSION, host=methods.HostIdentity("h", "1"), capabilities=("a",)),
        methods.FunctionCall(function=methods.PathFunction("math.hypot"), args=(3, 4), **common),
        methods.FunctionCall(function=shipped, kwargs={"x": value}, lm=lm),
        methods.FunctionStream(function=methods.SourceFunction("f", "f" * 64), credit=3, **common),
        methods.InstanceCreate(record=record, **common),
        methods.InstanceCall(record=record, method="run", args=(value,), lm=lm, **common),
        methods.ObjectInspect(path="math"),
        methods.ObjectInspect(record=record),
        methods.ObjectInspect(function=shipped),
        methods.Command(),
        methods.Cancel(5),
        methods.GiveCredit("id", 4),
        methods.VariableValue(value, 3),
        methods.Tools((methods.ToolInfo("t", "does", {"type": "object"}),)),
        methods.Variables((methods.VariableInfo("v", 1, "integer", 8),)),
    ]
    for params in sent:
        wire = json.loads(msgspec.json.encode(params))
        problems = _validator(document, type(params).__name__).iter_errors(wire)
        assert [f"{type(params).__name__} {e.json_path}: {e.message}" for e in problems] == []


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("FunctionCall", {}),
        ("FunctionCall", {"function": {"kind": "other"}}),
        ("FunctionCall", {"function": {"kind": "path", "path": 5}}),
        ("FunctionCall", {"function": {"kind": "path", "path": "m"}, "deadline": -1}),
        ("FunctionCall", {"function": {"kind": "path", "path": "m"}, "traceparent": "00"}),
        ("FunctionStream", {"function": {"kind": "path", "path": "m"}, "credit": 0}),
        ("SourceFunction", {"kind": "source", "name": "f", "hash": "00"}),
        ("Attach", {"protocol": [1], "host": {"name": "h", "version": "1"}}),
        ("Attach", {"protocol": [1, 0, 0], "host": {"name": "h", "version": "1"}}),
        ("Attach", {"protocol": ["1", 0], "host": {"name": "h", "version": "1"}}),
        ("Cancel", {"command": None}),
        ("State", {"adapter": "other"}),
    ],
)
def test_what_the_schemas_refuse_the_kernel_refuses_too(document: dict[str, Any], name: str, wrong: object) -> None:
    assert list(_validator(document, name).iter_errors(wrong))
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, getattr(methods, name))


def test_each_command_is_served_and_nothing_else_is() -> None:
    by_the_lane = {"bridge.attach", "kernel.ping", "kernel.drain"}
    assert set(HANDLERS) | by_the_lane == set(methods.COMMANDS)
    assert not set(HANDLERS) & by_the_lane


def test_each_method_is_of_one_side_and_of_one_kind() -> None:
    names = [m.name for m in methods.METHODS]
    assert len(names) == len(set(names))
    assert not set(methods.COMMANDS) & set(methods.CALLBACKS)
    assert not (set(methods.COMMANDS) | set(methods.CALLBACKS)) & set(methods.NOTIFICATIONS)
    for method in methods.METHODS:
        if method.side == "kernel" and method.result is not None:
            assert issubclass(method.params, methods.Callback)
        elif method.result is not None and method.name != "bridge.attach":
            assert issubclass(method.params, methods.Command)


def test_secrets_are_not_in_the_repr_of_what_carries_them() -> None:
    lm = methods.LM(model="m", api_key="sk-secret")
    assert "sk-secret" not in f"{lm!r} {methods.FunctionCall(function=methods.PathFunction('f'), lm=lm)!r}"


# -- layers ------------------------------------------------------------------


def _imports(path: Path, package: str) -> set[str]:
    """The absolute names of everything that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def _files(folder: str, package: str) -> list[tuple[Path, str]]:
    root = ROOT / folder
    files = [(p, ".".join([package, *p.relative_to(root).parts[:-1]])) for p in sorted(root.rglob("*.py"))]
    assert files
    return files


def _is(name: str, *allowed: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


def test_the_host_imports_only_the_contract_and_the_version_of_the_kernel() -> None:
    for path, package in _files("host/python/bridge_host", "bridge_host"):
        of_kernel = {name for name in _imports(path, package) if _is(name, "bridge_kernel")}
        wrong = {n for n in of_kernel if not _is(n, "bridge_kernel.contract", "bridge_kernel._version")}
        assert not wrong, path


def test_the_kernel_never_imports_the_host() -> None:
    for path, package in _files("kernel/bridge_kernel", "bridge_kernel"):
        assert not {name for name in _imports(path, package) if _is(name, "bridge_host")}, path


def test_the_contract_knows_no_sockets_no_threads_no_loop_and_no_clock() -> None:
    for path, package in _files("kernel/bridge_kernel/contract", "bridge_kernel.contract"):
        names = _imports(path, package)
        assert not {n for n in names if _is(n, "zmq", "asyncio", "threading", "socket", "time")}, path
        of_kernel = {n for n in names if _is(n, "bridge_kernel")}
        assert not {n for n in of_kernel if not _is(n, "bridge_kernel.contract", "bridge_kernel._version")}, path


def test_every_value_inside_a_message_vector_is_a_value() -> None:
    def check(tree: Any, buffers: list[bytes]) -> int:
        if isinstance(tree, dict) and "$bridge" in tree:
            Decoder(buffers).decode(tree)
            return 1
        inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
        return sum(check(part, buffers) for part in inside)

    checked = 0
    for vector in MESSAGES["messages"]:
        buffers = [base64.b64decode(buffer) for buffer in vector["buffers"]]
        checked += check(vector["jsonrpc"], buffers)
    assert checked >= 2
