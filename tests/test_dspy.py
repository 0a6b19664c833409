"""DSPy from the host, with a scripted model behind a real HTTP round trip: what crosses, what is kept, what is left."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, Self

import pytest
from jupyter_client.blocking.client import BlockingKernelClient

from bridge_host import BridgeError, DeadlineExceeded, Host, Output, RemoteError, Session
from scripted_lm import ScriptedLM, fields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from scripted_lm import Messages

KEY = "sk-PLANTED-9f2c"
"""The planted key: wherever it shows up but in the request to the model, it has leaked."""

outputs: list[Output] = []


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """One kernel for the whole file: importing DSPy takes a second or two."""
    pytest.importorskip("dspy")
    with Host(kernels=1, on_output=outputs.append) as opened:
        yield opened


@pytest.fixture
def session(host: Host, request: pytest.FixtureRequest) -> Session:
    return host.session(request.node.name)


def use(session: Session, lm: ScriptedLM, **options: Any) -> None:
    session.lm(lm.model, api_base=lm.api_base, api_key=KEY, num_retries=0, **options)


def says(**values: str) -> Callable[[Messages], str]:
    """A model that answers anything with the same fields."""
    return lambda _messages: fields(**values)


def as_json(value: dict[str, Any]) -> str:
    return json.dumps(value)


# -- modules ---------------------------------------------------------------------


def test_predict_and_chain_of_thought_answer_through_the_sessions_model(session: Session) -> None:
    with ScriptedLM([fields(answer="Paris"), fields(reasoning="Its capital is Rome.", answer="Rome")]) as lm:
        use(session, lm, temperature=0.0, max_tokens=50)
        predict = session.create("dspy.Predict", "question -> answer")
        assert predict(question="What is the capital of France?").answer == "Paris"
        think = session.create("dspy.ChainOfThought", "question -> answer")
        prediction = think(question="What is the capital of Italy?")
        assert (prediction.reasoning, prediction.answer) == ("Its capital is Rome.", "Rome")
    first, second = lm.requests
    assert "What is the capital of France?" in first["messages"][-1]["content"]
    assert "What is the capital of Italy?" in second["messages"][-1]["content"]
    assert (first["model"], first["temperature"], first["max_completion_tokens"]) == ("scripted", 0.0, 50), first


@pytest.mark.parametrize(
    ("adapter", "reply"),
    [("JSONAdapter", '{"answer": "Paris"}'), ("XMLAdapter", "<answer>\nParis\n</answer>")],
)
def test_the_adapter_named_writes_the_prompt_and_reads_the_answer(session: Session, adapter: str, reply: str) -> None:
    with ScriptedLM([reply]) as lm:
        use(session, lm, adapter=adapter)
        assert session.create("dspy.Predict", "question -> answer")(question="Capital of France?").answer == "Paris"


def test_an_adapter_that_dspy_does_not_have_is_an_error_that_names_those_it_has(session: Session) -> None:
    with ScriptedLM([]) as lm:
        use(session, lm, adapter="YAMLAdapter")
        predict = session.create("dspy.Predict", "question -> answer")
        with pytest.raises(BridgeError, match="no adapter 'YAMLAdapter'") as caught:
            predict(question="?")
    assert "ChatAdapter" in caught.value.remedy
    assert "JSONAdapter" in caught.value.remedy
    assert lm.requests == []


def test_react_uses_a_tool_that_runs_in_the_host(session: Session) -> None:
    ran: list[tuple[str, str]] = []

    @session.tool
    def search(query: str) -> str:
        """Look something up."""
        ran.append((query, threading.current_thread().name))
        return "Kenya lies in East Africa."

    script = [
        fields(next_thought="Look it up.", next_tool_name="search", next_tool_args=as_json({"query": "Kenya"})),
        fields(next_thought="I know it.", next_tool_name="finish", next_tool_args="{}"),
        fields(reasoning="It was found.", answer="Africa"),
    ]
    with ScriptedLM(script) as lm:
        use(session, lm)
        agent = session.create("dspy.ReAct", "question -> answer", tools=[session.tools["search"]])
        prediction = agent(question="On which continent is Kenya?")
    assert prediction.answer == "Africa"
    assert [query for query, _ in ran] == ["Kenya"]
    assert prediction.trajectory["observation_0"] == "Kenya lies in East Africa."
    assert "Look something up." in json.dumps(lm.requests[0]["messages"]), "the model was told what the tool does"
    assert "Kenya lies in East Africa." in json.dumps(lm.requests[1]["messages"]), "and then what it said"


def test_react_reports_an_error_of_the_tools_to_the_model_which_may_go_on(session: Session) -> None:
    @session.tool
    def divide(a: float, b: float) -> float:
        """Divide a by b."""
        return a / b

    script = [
        fields(next_thought="Try.", next_tool_name="divide", next_tool_args=as_json({"a": 1, "b": 0})),
        fields(next_thought="It cannot be.", next_tool_name="finish", next_tool_args="{}"),
        fields(reasoning="Division by zero.", answer="undefined"),
    ]
    with ScriptedLM(script) as lm:
        use(session, lm)
        agent = session.create("dspy.ReAct", "question -> answer", tools=[session.tools["divide"]])
        prediction = agent(question="What is 1 / 0?")
    assert prediction.answer == "undefined"
    assert "ZeroDivisionError" in prediction.trajectory["observation_0"]


# -- state -----------------------------------------------------------------------

DEMO = {"question": "What is the capital of Italy?", "answer": "Rome"}


@pytest.mark.parametrize("cls", ["dspy.Predict", "dspy.ChainOfThought"])
def test_loading_demos_makes_a_new_version_and_a_call_makes_none(session: Session, cls: str) -> None:
    with ScriptedLM(says(reasoning="So.", answer="Paris")) as lm:
        use(session, lm)
        module = session.create(cls, "question -> answer")
        assert "version=1 dspy state" in repr(module)
        state = module.dump_state()
        assert "version=1 dspy state" in repr(module)
        state.get("predict", state)["demos"] = [DEMO]
        module.load_state(state)
        assert "version=2 dspy state" in repr(module)
        module(question="What is the capital of France?")
        assert "version=2 dspy state" in repr(module)
        assert module.dump_state() == json.loads(json.dumps(state)) == state
    assert "What is the capital of Italy?" in json.dumps(lm.requests[-1]["messages"]), "the demos are in the prompt"


def test_the_state_is_data_that_the_host_reads_without_a_kernel_and_without_the_key(session: Session) -> None:
    with ScriptedLM(says(answer="Paris")) as lm:
        use(session, lm)
        predict = session.create("dspy.Predict", "question -> answer")
        predict(question="What is the capital of France?")
    kept = session._state.instance(predict.ref).state.read("state")
    assert kept["signature"]["instructions"] == "Given the fields `question`, produce the fields `answer`."
    assert KEY not in json.dumps(kept)


# -- predictions -----------------------------------------------------------------


def test_a_prediction_arrives_as_dspys_own_where_the_host_has_imported_dspy_and_goes_back(session: Session) -> None:
    import dspy

    with ScriptedLM(says(reasoning="So.", answer="Paris")) as lm:
        use(session, lm)
        prediction = session.create("dspy.ChainOfThought", "question -> answer")(question="?")
    assert type(prediction) is dspy.Prediction
    assert dict(prediction) == {"reasoning": "So.", "answer": "Paris"}
    session.function("what", "def what(given):\n    return type(given).__name__, given.answer, dict(given)\n")
    assert session.call("what", prediction) == ("Prediction", "Paris", {"reasoning": "So.", "answer": "Paris"})
    session["prediction"] = prediction
    assert session["prediction"].answer == "Paris"


def test_examples_of_the_hosts_arrive_with_their_inputs_marked_and_come_back_equal(session: Session) -> None:
    import dspy

    example = dspy.Example(question="?", answer="Paris").with_inputs("question")
    session.function("inputs", "def inputs(example):\n    return dict(example.inputs()), example\n")
    assert session.call("inputs", example) == ({"question": "?"}, example)


WITHOUT_DSPY = """
import sys
from bridge_host import Host

api_base, = sys.argv[1:]
with Host() as host:
    session = host.session("plain")
    session.lm("openai/scripted", api_base=api_base, api_key="none")
    prediction = session.create("dspy.Predict", "question -> answer")(question="?")
    session.function("what", "def what(given):\\n    return type(given).__module__, given.answer\\n")
    print(type(prediction).__name__, prediction.answer, prediction["answer"], dict(prediction), sep="|")
    print(*session.call("what", prediction), sep="|")
    assert not [name for name in sys.modules if name.split(".")[0] == "dspy"], "the host has no need of DSPy"
"""


def test_a_prediction_arrives_as_a_record_where_the_host_has_no_dspy_and_goes_back() -> None:
    with ScriptedLM(says(answer="Paris")) as lm:
        ran = subprocess.run(
            [sys.executable, "-W", "error", "-c", WITHOUT_DSPY, lm.api_base],
            capture_output=True,
            check=False,
            text=True,
            timeout=60,
        )
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == ["Record|Paris|Paris|{'answer': 'Paris'}", "dspy.primitives.prediction|Paris"]


# -- whose model -----------------------------------------------------------------


def test_sessions_that_share_a_kernel_use_their_own_models_even_at_once(host: Host) -> None:
    release = threading.Event()
    with (
        ScriptedLM(says(answer="one"), held=release) as one,
        ScriptedLM(says(answer="two"), held=release) as two,
    ):
        instances = []
        for name, lm in (("model-one", one), ("model-two", two)):
            session = host.session(name)
            use(session, lm)
            session.create("dspy.Predict", "question -> answer")
            session.function("ask", "def ask(module):\n    return module(question='?').answer\n", lm=True)
            instances.append((session, session.create("dspy.Predict", "question -> answer")))
        futures = [session.submit("ask", instance) for session, instance in instances for _ in range(3)]
        assert one.received.wait(60)
        assert two.received.wait(60)
        release.set()  # until here neither had an answer: they overlap in the one kernel
        assert [future.result(60) for future in futures] == ["one"] * 3 + ["two"] * 3
        assert [instance(question="?").answer for _, instance in instances] == ["one", "two"]
    assert (len(one.requests), len(two.requests)) == (4, 4)
    assert len(host.kernels()) == 1


def test_a_function_of_the_sessions_has_its_model_only_if_it_asks_for_it(session: Session) -> None:
    source = "def ask():\n    import dspy\n    return dspy.Predict('question -> answer')(question='?').answer\n"
    with ScriptedLM(says(answer="Paris")) as lm:
        use(session, lm)
        session.function("ask", source, lm=True)
        assert session.call("ask") == "Paris"
        session.function("ask", source)
        with pytest.raises(RemoteError, match="No LM is loaded"):
            session.call("ask")
    assert len(lm.requests) == 1


def test_an_asynchronous_function_and_an_asynchronous_method_have_it_too(session: Session) -> None:
    with ScriptedLM(says(answer="Paris")) as lm:
        use(session, lm)
        session.function(
            "ask",
            """
            async def ask(ctx, times):
                import asyncio
                import dspy

                predict = dspy.Predict("question -> answer")
                return [p.answer for p in await asyncio.gather(*(predict.acall(question=str(i)) for i in range(times)))]
            """,
            lm=True,
        )
        assert session.call("ask", 3) == ["Paris"] * 3
        assert session.create("dspy.Predict", "question -> answer").acall(question="?").answer == "Paris"


def test_a_model_changed_is_the_new_one_at_the_next_call(session: Session) -> None:
    with ScriptedLM(says(answer="old")) as old, ScriptedLM(says(answer="new")) as new:
        use(session, old)
        predict = session.create("dspy.Predict", "question -> answer")
        assert predict(question="?").answer == "old"
        use(session, new)
        assert predict(question="?").answer == "new"


# -- what is told and what is not --------------------------------------------------


def test_telemetry_tells_of_modules_and_models_with_durations_and_tokens(host: Host, session: Session) -> None:
    with ScriptedLM([fields(reasoning="So.", answer="Paris")]) as lm:
        use(session, lm)
        session.create("dspy.ChainOfThought", "question -> answer")(question="?")
        ((prompt, completion),) = lm.usages
    events = [e for e in session.telemetry.events("bridge", "dspy") if e.name[2] != "adapter"]
    assert [(*event.name[2:], event.metadata.get("module")) for event in events] == [
        ("module", "start", "ChainOfThought"),
        ("module", "start", "Predict"),
        ("lm", "start", None),
        ("lm", "stop", None),
        ("module", "stop", "Predict"),
        ("module", "stop", "ChainOfThought"),
    ]
    assert all(event.measurements["duration"] > 0 for event in events if event.name[-1] == "stop")
    outer, inner, asked, used, *_ = events
    assert inner.metadata["parent_span_id"] == outer.metadata["span_id"]
    assert asked.metadata["parent_span_id"] == inner.metadata["span_id"]
    assert asked.metadata["model"] == "openai/scripted"
    counted = {"input_tokens": prompt, "output_tokens": completion, "tokens": prompt + completion}
    assert counted.items() <= used.measurements.items()
    assert f"1 LM call, {prompt + completion:,} tokens" in host.telemetry.lines()[-1]


def test_a_model_that_fails_is_an_error_with_the_kernels_traceback_and_is_told(host: Host, session: Session) -> None:
    with ScriptedLM([]) as lm:
        use(session, lm)
        predict = session.create("dspy.Predict", "question -> answer")
        with pytest.raises(RemoteError, match="this is one request more") as caught:
            predict(question="?")
    assert "dspy" in caught.value.remote_traceback
    ends = [e for e in host.telemetry.events("bridge", "dspy") if e.metadata["session"] == session.id]
    assert ("bridge", "dspy", "lm", "exception") in [event.name for event in ends]
    assert ("bridge", "dspy", "module", "exception") in [event.name for event in ends]


class Wire:
    """Every frame that a kernel publishes while it is open."""

    def __init__(self, connection_file: str) -> None:
        self._client = BlockingKernelClient(connection_file=connection_file)
        self._client.load_connection_file()
        self._socket = self._client.connect_iopub()

    def read(self) -> bytes:
        """What has come by now; at first, wait until the kernel says that nothing will be missed."""
        assert self._socket.poll(10_000), "nothing arrives"
        frames: list[bytes] = []
        while self._socket.poll(200):
            frames += self._socket.recv_multipart()
        return b"\n".join(frames)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close(linger=0)
        self._client.context.destroy(linger=0)


def test_the_key_reaches_the_model_and_is_told_to_nobody_else(host: Host, session: Session) -> None:
    (kernel,) = host.kernels()
    shown: list[str] = []
    with Wire(kernel.connection_file) as wire, ScriptedLM([fields(answer="Paris")]) as lm:
        assert b"iopub_welcome" in wire.read()
        use(session, lm)
        predict = session.create("dspy.Predict", "question -> answer")
        shown += [repr(session), repr(predict), repr(predict(question="?"))]
        session.function(
            "careless",
            """
            def careless(ctx):
                import dspy
                import logging

                print(dspy.settings.lm, repr(dspy.settings.lm))
                module = dspy.Predict("question -> answer")
                module.set_lm(dspy.settings.lm)
                print(module, module.dump_state())
                logging.getLogger("dspy").error("%r", dspy.settings.lm)
                return module.dump_state()
            """,
            lm=True,
        )
        shown.append(repr(session.call("careless")))
        with pytest.raises(RemoteError) as caught:
            predict(question="one request more than replies")
        error = caught.value
        shown += [str(error), repr(error), error.remote_traceback, repr(error.frames), *error.__notes__]
        published = wire.read()
    assert b"comm_msg" in published
    assert b"dspy.Predict.__call__" in published, "the telemetry is in what was read"
    assert KEY.encode() not in published
    shown += [repr(session._state), repr(session._state.lm), repr(session._state.functions)]
    shown += [repr(output) for output in outputs] + [repr(event) for event in host.telemetry.events()]
    assert KEY not in "\n".join([*shown, *host.telemetry.lines()])


def test_the_key_is_taken_out_of_an_error_in_which_the_provider_repeats_it(host: Host, session: Session) -> None:
    def refuse(_messages: Messages) -> str:
        raise PermissionError(f"Incorrect API key provided: {KEY}")

    with ScriptedLM(refuse) as lm:
        use(session, lm)
        predict = session.create("dspy.Predict", "question -> answer")
        with pytest.raises(RemoteError, match="Incorrect API key provided") as caught:
            predict(question="?")
    assert KEY not in str(caught.value) + caught.value.remote_traceback + "".join(caught.value.__notes__)


def test_a_module_that_was_given_the_model_itself_can_still_be_rebuilt(session: Session) -> None:
    session.function(
        "bind",
        """
        def bind(module):
            import dspy

            module.set_lm(dspy.settings.lm)
            return module.dump_state()
        """,
        lm=True,
    )
    with ScriptedLM(says(answer="Paris")) as lm:
        use(session, lm)
        predict = session.create("dspy.Predict", "question -> answer")
        predict.load_state(session.call("bind", predict))
        assert predict.dump_state()["lm"]["model"] == "openai/scripted"


# -- calls that must stop ----------------------------------------------------------


def test_a_call_that_waits_for_its_model_ends_at_its_deadline_and_the_kernel_goes_on(session: Session) -> None:
    release = threading.Event()
    with ScriptedLM(says(answer="late"), held=release) as lm:
        use(session, lm)
        predict = session.create("dspy.Predict", "question -> answer")
        # The kernel itself says so, by which it is known that nobody waited for the model.
        with pytest.raises(DeadlineExceeded, match=r"dspy\.Predict\.__call__ ran out of time: it had 0.3 s"):
            predict.call("__call__", question="?", deadline=0.3)
        assert lm.received.is_set()
        assert session.call("math.sqrt", 4) == 2
        release.set()
        assert predict(question="?").answer == "late"


def test_cancelling_a_call_that_waits_for_its_model_ends_it_at_once(session: Session) -> None:
    release = threading.Event()
    with ScriptedLM(says(answer="late"), held=release) as lm:
        use(session, lm)
        session.function("ask", "def ask(module):\n    return module(question='?').answer\n", lm=True)
        future = session.submit("ask", session.create("dspy.Predict", "question -> answer"))
        assert lm.received.wait(60)
        future.cancel()
        with pytest.raises(CancelledError):
            future.result(60)
        release.set()
        assert session.call("ask", session.create("dspy.Predict", "question -> answer")) == "late"


# -- nothing is left -----------------------------------------------------------------


def test_fifty_calls_leave_nothing_in_the_kernel(session: Session) -> None:
    session.function(
        "left",
        """
        def left():
            import dspy
            from dspy.clients import base_lm
            from dspy.dsp.utils.settings import main_thread_config

            return len(dspy.settings.trace or []), len(base_lm.GLOBAL_HISTORY), dspy.settings.lm, main_thread_config["lm"]
        """,
    )
    session.function(
        "ask",
        """
        def ask():
            import dspy

            module = dspy.ChainOfThought("question -> answer")
            module(question="?")
            lm = dspy.settings.lm
            return len(dspy.settings.trace), len(lm.history), len(module.history), len(module.predict.history)
        """,
        lm=True,
    )
    with ScriptedLM(says(reasoning="So.", answer="Paris")) as lm:
        use(session, lm)
        predict = session.create("dspy.Predict", "question -> answer")
        for i in range(50):
            assert predict(question=f"Question {i}?").answer == "Paris"
        assert session.call("ask")[0] == 1, "a trace is there while the command runs"
        assert session.call("ask")[0] == 1, "and only its own"
    assert len(lm.requests) == 52
    assert session.call("left") == (0, 0, None, None)


def test_the_same_question_asked_twice_is_asked_twice(session: Session) -> None:
    with ScriptedLM([fields(answer="first"), fields(answer="second")]) as lm:
        use(session, lm)
        predict = session.create("dspy.Predict", "question -> answer")
        assert [predict(question="?").answer for _ in range(2)] == ["first", "second"], "no cache in the kernel"


# -- optimizers ----------------------------------------------------------------------

TRAINSET = [
    {"question": "What is the capital of Italy?", "answer": "Rome"},
    {"question": "What is the capital of Spain?", "answer": "Madrid"},
    {"question": "What is the capital of Norway?", "answer": "Oslo"},
]


def demos(state: dict[str, Any]) -> list[str]:
    return [demo["answer"] for demo in state["demos"]]


def test_labeled_few_shot_compiles_in_a_kernel_and_the_state_is_loaded_into_the_instance(session: Session) -> None:
    session.function(
        "compile",
        """
        def compile(student, trainset):
            import dspy

            examples = [dspy.Example(**row).with_inputs("question") for row in trainset]
            return dspy.LabeledFewShot(k=2).compile(student, trainset=examples).dump_state()
        """,
        lm=True,
    )
    with ScriptedLM(says(answer="Paris")) as lm:
        use(session, lm)
        student = session.create("dspy.Predict", "question -> answer")
        compiled = session.call("compile", student, TRAINSET)
        assert len(demos(compiled)) == 2
        assert "version=1 " in repr(student), "a function that is given an instance does not change it"
        student.load_state(compiled)
        assert "version=2 " in repr(student)
        assert student(question="What is the capital of France?").answer == "Paris"
    (asked,) = lm.requests
    assert all(answer in json.dumps(asked["messages"]) for answer in demos(compiled))


def capitals(messages: Sequence[dict[str, Any]]) -> str:
    """A model that knows two of the three."""
    question = str(messages[-1]["content"])
    return fields(answer="Rome" if "Italy" in question else "Oslo" if "Norway" in question else "Lisbon")


def test_bootstrap_few_shot_with_a_metric_that_is_a_tool_of_the_hosts(session: Session) -> None:
    scored: list[tuple[str, str]] = []

    @session.tool
    def exact(example: dict[str, Any], prediction: dict[str, Any]) -> bool:
        """Whether the answer is the expected one."""
        scored.append((example["answer"], prediction["answer"]))
        return bool(example["answer"] == prediction["answer"])

    session.function(
        "compile",
        """
        def compile(ctx, student, trainset, metric):
            import dspy

            def scored(example, prediction, trace=None):
                return metric(dict(example), dict(prediction))

            examples = [dspy.Example(**row).with_inputs("question") for row in trainset]
            optimizer = dspy.BootstrapFewShot(metric=scored, max_bootstrapped_demos=2, max_labeled_demos=0)
            return optimizer.compile(student, trainset=examples).dump_state()
        """,
        lm=True,
    )
    with ScriptedLM(capitals) as lm:
        use(session, lm)
        student = session.create("dspy.Predict", "question -> answer")
        compiled = session.call("compile", student, TRAINSET, session.tools["exact"])
        student.load_state(compiled)
        assert student(question="And Norway?").answer == "Oslo"
    assert scored == [("Rome", "Rome"), ("Madrid", "Lisbon"), ("Oslo", "Oslo")]
    assert demos(compiled) == demos(student.dump_state()) == ["Rome", "Oslo"]


def test_a_module_of_dspys_says_what_it_takes_though_its_metaclass_does_not(session: Session) -> None:
    inspected = session.inspect("dspy.Predict")
    assert [p.name for p in inspected.parameters] == ["signature", "callbacks", "config"]
