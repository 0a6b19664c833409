"""The catalogue of telemetry: every event in it is emitted by something that people do, and is as it says there.

`conftest.py` checks the other direction, for all tests: no event is emitted that the catalogue does not have.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import textwrap
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import msgspec
import pytest

from bridge_host import Breaker, BridgeError, Host, Recycle, RemoteError
from bridge_host.pool import orphans
from bridge_kernel.contract.catalogue import EVENTS, problem, schema, type_of_event
from bridge_kernel.contract.telemetry import Event
from conftest import KERNELSIDE, eventually
from scripted_lm import Refused, ScriptedLM, fields

if TYPE_CHECKING:
    from bridge_host import Session

KERNEL_CODE = """
    def work(ctx, x):
        with ctx.span("a part", rows=1):
            ctx.progress(1, 2, "half")
            ctx.emit("seen", {"n": 1})
            return ctx.call_tool("double", x=ctx["x"])

    def fail(ctx):
        with ctx.span("a part"):
            ctx.call_tool("refuse")

    def flood(ctx):
        for n in range(3000):
            ctx.emit("seen", {"n": n})

    def survive(ctx, marker):
        import os, signal
        ctx.call_tool("double", x=1)
        if not os.path.exists(marker):
            open(marker, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)

    def noted(ctx, x):
        ctx["y"] = x
        return x
"""

DSPY_CODE = """
    def optimize():
        import dspy

        devset = [dspy.Example(question="a", answer="Rome").with_inputs("question")]

        def exact(example, prediction, trace=None):
            return example.answer == prediction.answer

        class Tuner(dspy.teleprompt.Teleprompter):
            def compile(self, student, *, trainset, **_):
                dspy.Evaluate(devset=trainset, metric=exact, num_threads=1)(student)
                if student is None or not trainset:
                    raise ValueError("nothing to do")
                return student

        tuner = Tuner()
        tuner.compile(dspy.Predict("question -> answer"), trainset=devset)
        with_tool = dspy.Tool(lambda x: 1 // x, name="divide", args={"x": {"type": "integer"}})
        with_tool(x=1)
        hopeless = dspy.Evaluate(devset=devset, metric=lambda *_: 1 // 0, num_threads=1, max_errors=1)
        student = dspy.Predict("question -> answer")
        for failing in (
            lambda: with_tool(x=0),
            lambda: tuner.compile(None, trainset=devset),
            lambda: hopeless(student),
        ):
            try:
                failing()
            except Exception:
                pass

    def ask():
        import dspy
        return dspy.Predict("question -> answer")(question="?").answer
"""


def names_of(host: Host) -> Counter[tuple[str, ...]]:
    return Counter(event.name for event in host.telemetry.events())


def give(session: Session, code: str, *, lm: bool = False) -> None:
    """One function of the session for each of the code's."""
    parts = textwrap.dedent(code).strip().split("\n\ndef ")
    for number, part in enumerate(parts):
        source = part if number == 0 else f"def {part}"
        session.function(source[4 : source.index("(")], source, lm=lm)


def commands(told: Counter[tuple[str, ...]], tmp_path: Path) -> None:
    left = Path(tempfile.mkdtemp(prefix="bridge-left-"))
    orphans.write_owner(left, orphans.Owner(orphans.here(), 2**22 + 1, 1.0))
    with Host(kernels=2, env={"PYTHONPATH": KERNELSIDE}) as host:
        session = host.session("a")
        session["x"] = 2
        session.tool(lambda x: 2 * x, name="double")
        session.tool(lambda: 1 // 0, name="refuse")
        give(session, KERNEL_CODE)
        with host.telemetry.span("all of it"), suppress(ZeroDivisionError), host.telemetry.span("a part"):
            session.call("work", 1)
            raise ZeroDivisionError
        host.telemetry.tell(("bridge", "user", "mine"), {}, {})
        for failing in (
            lambda: session.call("fail"),
            lambda: session.create("fractions.Fraction", 1, 0),
            lambda: session.create("collections.no_such_class"),
        ):
            with pytest.raises(BridgeError):
                failing()
        session.create("fractions.Fraction", 1, 2)
        # A kernel that is killed takes what it has not sent: the next but one of these commands kills one.
        eventually(lambda: names_of(host)["bridge", "instance", "stop"], "what the instance's kernel tells has come")
        session.call("flood")
        session.call("survive", str(tmp_path / "marker"))
        host.telemetry.attach("bridge.command", lambda event: 1 // 0, id="broken")
        with pytest.warns(UserWarning, match="broken"):
            session.call("work", 1)
        session.function("cached", "def cached(x):\n    return x\n", cache="1h")
        session.function("noted", textwrap.dedent(KERNEL_CODE).split("\n\n")[-1], cache="1h")
        for _ in range(2):
            session.call("cached", 1)
        session.call("noted", 1)
        host.pool.scale(1)
        host.delete_session("a")
        told += names_of(host)


def pool(told: Counter[tuple[str, ...]]) -> None:
    with Host(kernels=1, concurrency=1, queue=0, breaker=Breaker(kernel_failures=1), heartbeat=4.0) as host:
        session = host.session()
        eventually(lambda: names_of(host)["bridge", "kernel", "memory"], "a heartbeat was answered")
        blocked = session.submit("time.sleep", 600)
        eventually(lambda: host.kernels()[0].in_flight, "the kernel is taken")
        with pytest.raises(BridgeError, match="wait for a kernel"):
            session.call("math.sqrt", 4)
        os.kill(host.kernels()[0].pid, signal.SIGSTOP)  # silent: noticed, killed, replaced
        eventually(lambda: names_of(host)["bridge", "kernel", "unresponsive"], "its silence is noticed", 30)
        with suppress(BridgeError):
            blocked.result(60)
        told += names_of(host)
    with Host(kernels=1, breaker=Breaker(error_rate=0.5, error_window=4, cooldown_s=0.001)) as host:
        session = host.session()
        opened, closed = (("bridge", "pool", "breaker", state) for state in ("open", "close"))
        for arguments in (("x",), ("4",)):
            wanted = opened if arguments == ("x",) else closed

            def tried(arguments: tuple[str] = arguments, wanted: tuple[str, ...] = wanted) -> bool:
                with suppress(BridgeError):
                    session.call("builtins.int", *arguments)
                return names_of(host)[wanted] > 0

            eventually(tried, f"{wanted}", 30)
        told += names_of(host)
    with Host(kernels=1, recycle=Recycle(commands=1)) as host:
        host.session().call("math.sqrt", 4)
        eventually(lambda: names_of(host)["bridge", "pool", "recycle"], "the kernel is recycled", 30)
        told += names_of(host)


def dspy(told: Counter[tuple[str, ...]]) -> None:
    with Host(kernels=1) as host:
        session = host.session()
        give(session, DSPY_CODE, lm=True)
        with ScriptedLM([fields(answer="Rome")] * 5) as lm:
            session.lm(lm.model, api_base=lm.api_base, api_key=lm.api_key, engine="lm15")
            session.call("optimize")
        for reply in (Refused(500), "nothing that an adapter could read"):
            with ScriptedLM([reply] * 10) as lm:
                session.lm(lm.model, api_base=lm.api_base, api_key=lm.api_key, engine="lm15", num_retries=0)
                with pytest.raises(RemoteError):
                    session.call("ask")
        told += names_of(host)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Counter[tuple[str, ...]]:
    """How often each event was emitted by all that these functions do."""
    counted: Counter[tuple[str, ...]] = Counter()
    commands(counted, tmp_path_factory.mktemp("catalogue"))
    pool(counted)
    dspy(counted)
    return counted


@pytest.mark.parametrize("name", EVENTS, ids=".".join)
def test_each_event_of_the_catalogue_is_emitted(told: Counter[tuple[str, ...]], name: tuple[str, ...]) -> None:
    if name[-1] == "*":
        assert any(emitted[:-1] == name[:-1] for emitted in told)
    else:
        assert told[name]


def test_each_event_that_was_emitted_is_in_the_catalogue(told: Counter[tuple[str, ...]]) -> None:
    assert [name for name in told if type_of_event(name) is None] == []


def example(name: tuple[str, ...]) -> Event:
    """An event with all that the catalogue says of it."""
    known = EVENTS[name]
    kinds: dict[str, Any] = {"string": "x", "integer": 1, "boolean": True}
    metadata = {member: None if said.nullable else kinds[said.kind] for member, said in known.metadata.items()}
    return Event(tuple("x" if word == "*" else word for word in name), dict.fromkeys(known.measurements, 1), metadata)


@pytest.mark.parametrize("name", EVENTS, ids=".".join)
def test_the_check_and_the_json_schema_agree_on_what_fits(name: tuple[str, ...]) -> None:
    validator = jsonschema.Draft202012Validator(schema())

    def fits(event: Event) -> bool:
        valid = bool(validator.is_valid(json.loads(msgspec.json.encode(event))))
        assert valid == (problem(event) is None)
        return valid

    whole, known = example(name), EVENTS[name]
    assert fits(whole)
    for member, said in known.metadata.items():
        left = {key: value for key, value in whole.metadata.items() if key != member}
        assert fits(Event(whole.name, whole.measurements, left)) == said.optional
        assert not fits(Event(whole.name, whole.measurements, {**whole.metadata, member: 1.5}))
    for member, measured in known.measurements.items():
        some = {key: value for key, value in whole.measurements.items() if key != member}
        assert fits(Event(whole.name, some, whole.metadata)) == measured.optional
    assert fits(Event(whole.name, whole.measurements, {**whole.metadata, "more": "x"})) == known.open
    assert fits(Event(whole.name, {**whole.measurements, "more": 1}, whole.metadata)) == known.open


def test_a_name_that_the_catalogue_does_not_have_is_a_problem() -> None:
    assert problem(Event(("bridge", "nothing"), {}, {})) == "('bridge', 'nothing') is not in the catalogue"
    assert problem(Event((), {}, {})) is not None
