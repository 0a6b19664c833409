"""A command's secrets: given to its code, and shown by nothing that it says or leaves behind."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge_kernel.contract.errors import NotFound
from bridge_kernel.contract.methods import LM, Command, FunctionCall, PathFunction
from bridge_kernel.output import Output
from bridge_kernel.redaction import secrets_of, starred
from wire import Kernel, Wire

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_FOUND, REMOTE = -32005, -32000
SECRET = "correct-horse-battery"
SECRETS = {"KEY": SECRET}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with Kernel(tmp_path_factory.mktemp("shared")) as kernel:
        yield kernel


@pytest.fixture
def host(kernel: Kernel) -> Iterator[Wire]:
    host = kernel.connect()
    yield host
    host.close()


def leaks(host: Wire, secret: str = SECRET) -> list[Any]:
    return [message for message in host.received if secret.encode() in message.raw]


# -- given ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_command_gets_the_secrets_that_it_was_sent_with(host: Wire, kind: str) -> None:
    length = host.run(f"{kind} f(ctx): return len(ctx.secret('KEY'))", secrets=SECRETS)
    assert length.value == len(SECRET)
    assert not leaks(host)


def test_a_generator_gets_them_too(host: Wire) -> None:
    stream = host.stream("def f(ctx):\n yield len(ctx.secret('KEY'))", credit=2, secrets=SECRETS)
    assert host.chunk(stream) == len(SECRET)
    assert host.reply(stream).error is None


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_secret_that_was_not_sent_is_not_found_and_the_remedy_says_how_to_send_it(host: Wire, kind: str) -> None:
    reply = host.run(f"{kind} f(ctx): return ctx.secret('OTHER')", secrets=SECRETS)
    assert reply.code == NOT_FOUND
    assert "'OTHER'" in reply.text
    assert reply.error is not None
    assert reply.error.data is not None
    assert "secrets=['OTHER']" in reply.error.data.remedy


def test_a_secret_of_one_command_is_not_the_next_ones(host: Wire) -> None:
    text = "def f(ctx): return len(ctx.secret('KEY'))"
    assert host.run(text, secrets=SECRETS).error is None
    assert host.run(text).code == NOT_FOUND


def test_commands_of_every_family_take_secrets(host: Wire) -> None:
    record = {"ref": "r", "class": "collections.Counter", "args": ["aab"]}
    created = host.request("instance.create", {"record": record, "secrets": SECRETS})
    assert created.error is None
    called = host.request("instance.call", {"record": record, "method": "total", "secrets": SECRETS})
    assert called.value == 3
    assert host.request("object.inspect", {"path": "math.hypot", "secrets": SECRETS}).error is None


# -- not shown -------------------------------------------------------------------


def test_an_error_that_repeats_a_secret_is_redacted_whole(host: Wire) -> None:
    text = """
        def f(ctx, how):
            key = ctx.secret("KEY")
            if how == "message":
                raise ValueError(f"bad key {key}")
            if how == "type":
                raise type(key, (Exception,), {})()
            if how == "tool":
                ctx.call_tool("refuse")
            from bridge_kernel import NotFound
            raise NotFound(key, remedy=f"use {key}")
    """

    def refuse(params: dict[str, Any]) -> None:
        raise NotFound(f"no {SECRET}", remedy=f"not {SECRET}")

    host.answers["tool.call/refuse"] = refuse
    for how in ("message", "type", "tool", "own"):
        command = host.call(text, how, secrets=SECRETS)
        reply = host.reply(command)
        assert "***" in str(reply.error)
        host.events(command)
    assert not leaks(host)


def test_telemetry_shows_no_secret_in_names_metadata_or_progress(host: Wire) -> None:
    command = host.call(
        """
        def f(ctx):
            key = ctx.secret("KEY")
            ctx.progress(1, 2, f"with {key}")
            ctx.emit(key, {key: 1, "number": key}, what=key, **{key: 1})
            with ctx.span(key):
                pass
            try:
                with ctx.span("part"):
                    raise type(key, (Exception,), {})()
            except Exception:
                pass
        """,
        secrets=SECRETS,
    )
    assert host.reply(command).error is None
    assert "***" in str(host.events(command))
    assert not leaks(host)


def test_the_key_of_the_language_model_and_the_secrets_are_both_redacted(host: Wire) -> None:
    lm = {"model": "m", "api_key": "sk-of-the-language-model"}
    command = host.call("def f(value): print(value, flush=True)", f"{SECRET} {lm['api_key']}", lm=lm, secrets=SECRETS)
    reply = host.reply(command, timeout_s=60)
    assert reply.error is None
    assert host.printed(command) == "*** ***\n"


def test_a_secret_that_is_printed_in_pieces_is_redacted(host: Wire) -> None:
    command = host.call(
        """
        def f(ctx):
            import sys
            key = ctx.secret("KEY")
            for piece in ("a ", key[:7], key[7:], " b ", *key, " c ", key[:7], " d"):
                print(piece, end="", flush=True)
            print(key[:3], end="", file=sys.stderr, flush=True)
        """,
        secrets=SECRETS,
    )
    assert host.reply(command).error is None
    assert host.printed(command) == f"a *** b *** c {SECRET[:7]} d"
    assert host.printed(command, "stderr") == SECRET[:3]
    assert not leaks(host)


def test_what_could_be_the_beginning_of_a_secret_waits_for_more_and_the_rest_does_not(host: Wire) -> None:
    command = host.call(
        """
        def f(ctx):
            print("ready:", ctx.secret("KEY")[:7], end="", flush=True)
            ctx.call_tool("gate")
            print(ctx.secret("KEY")[7:])
        """,
        secrets=SECRETS,
    )
    gate = host.callback("gate", command)
    host.expect(lambda m: m.kind == "stream" and m.content["text"] == "ready: ", "the output")
    host.answer(gate, {"value": None})
    assert host.reply(command).error is None
    assert host.printed(command) == "ready: ***\n"


def test_a_secret_that_a_cancelled_command_was_printing_is_redacted(host: Wire) -> None:
    command = host.call(
        """
        def f(ctx):
            key = ctx.secret("KEY")
            print(key[:7], end="", flush=True)
            ctx.progress(1)
            try:
                while True:
                    pass
            finally:
                print(key[7:], "end")
        """,
        secrets=SECRETS,
    )
    host.expect(lambda m: m.method == "command.progress" and m.params["command"] == command)
    host.cancel(command)
    host.reply(command)
    host.until_idle()
    assert host.printed(command) == "*** end\n"


def test_what_a_command_displays_is_redacted(kernel: Kernel) -> None:
    host = kernel.connect(topic="")  # displays have no comm of ours in their topic
    cell = {"code": "1", "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}
    asked = host.send("execute_request", json.dumps(cell).encode())
    host.expect(lambda m: m.kind == "execute_reply" and m.parent == asked)
    command = host.call(
        """
        def f(ctx):
            from IPython.display import HTML, display
            display(HTML(f"<i>{ctx.secret('KEY')}</i>"))
        """,
        secrets=SECRETS,
    )
    assert host.reply(command).error is None
    shown = host.expect(lambda m: m.kind == "display_data" and "<i>" in m.content["data"].get("text/html", ""))
    assert shown.content["data"]["text/html"] == "<i>***</i>"
    assert not leaks(host)


def test_a_secret_with_a_line_break_is_redacted_in_a_repr_and_in_json_too(host: Wire) -> None:
    secret = "-----BEGIN 'é' KEY-----\nabc\\def\n"
    text = """
        def f(ctx):
            import json
            print(repr(ctx.secret("PEM")), json.dumps(ctx.secret("PEM")))
            raise KeyError(ctx.secret("PEM"))
    """
    command = host.call(text, secrets={"PEM": secret})
    error = host.reply(command).error
    assert "BEGIN" not in str(error)
    assert "BEGIN" not in host.printed(command)


def test_a_short_secret_is_taken_though_it_cannot_be_redacted(host: Wire) -> None:
    assert host.run("def f(ctx): return len(ctx.secret('PIN'))", secrets={"PIN": "1234", "NONE": ""}).value == 4


def test_no_repr_shows_a_secret(host: Wire) -> None:
    text = "def f(ctx): return [repr(ctx), repr(ctx._command), repr(ctx._command.params), repr(ctx._command.output)]"
    assert SECRET not in str(host.run(text, secrets=SECRETS).value)
    assert SECRET not in repr(Command(secrets=SECRETS))
    call = FunctionCall(function=PathFunction("math.hypot"), secrets=SECRETS, lm=LM(model="m", api_key=SECRET))
    assert SECRET not in f"{call!r} {call} {call.lm!r}"


# -- redaction itself ------------------------------------------------------------


def test_what_is_redacted_is_the_longest_first() -> None:
    lm = LM(model="m", api_key="sk-12345678-and-more")
    call = FunctionCall(function=PathFunction("f"), lm=lm, secrets={"A": "12345678", "B": "short", "C": ""})
    assert secrets_of(call) == ("sk-12345678-and-more", "12345678")


words = st.text("ab", min_size=1, max_size=4)


@given(pieces=st.lists(st.text("abc", max_size=6), max_size=8), secrets=st.lists(words, min_size=1, max_size=3))
def test_text_in_pieces_is_redacted_as_the_whole_would_be(pieces: list[str], secrets: list[str]) -> None:
    longest_first = tuple(sorted(set(secrets), key=len, reverse=True))
    whole, nothing = starred("".join(pieces), longest_first, final=True)
    assert not nothing
    shown = waits = ""
    for piece in pieces:
        more, waits = starred(waits + piece, longest_first, final=False)
        shown += more
        assert len(waits) < len(longest_first[0])
    assert shown + starred(waits, longest_first, final=True)[0] == whole
    assert not any(secret in whole for secret in secrets)


@given(pieces=st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.text("abc\n", max_size=6), st.booleans())))
def test_nothing_of_an_output_is_lost_but_its_secrets(pieces: list[tuple[str, str, bool]]) -> None:
    published: dict[str, str] = {"stdout": "", "stderr": ""}

    def publish(name: str, text: str) -> None:
        published[name] += text

    output = Output(publish, 1 << 20, ("abca", "bb"))
    for name, text, flush in pieces:
        output.write(name, text)
        if flush:
            output.flush()
    output.flush(final=True)
    for name, shown in published.items():
        written = "".join(text for of, text, _ in pieces if of == name)
        assert shown == starred(written, ("abca", "bb"), final=True)[0]
