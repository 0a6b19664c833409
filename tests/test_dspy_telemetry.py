"""What telemetry tells of DSPy: spans and their parents, exact sums of what models used, optimizers' progress.

The model is scripted, behind a real HTTP round trip; it knows what it said that each reply took.
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import pytest

from bridge_host import Host, Output, RemoteError, Session
from bridge_kernel.contract import catalogue
from conftest import eventually
from scripted_lm import Refused, Reply, ScriptedLM, fields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bridge_kernel.contract.telemetry import Capture, Event
    from scripted_lm import Messages

KEY = "sk-PLANTED-77aa"
QUESTION, ANSWER = "PLANTED-QUESTION", "PLANTED-ANSWER"

outputs: list[Output] = []


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """One kernel for the whole file: importing DSPy takes a second or two."""
    pytest.importorskip("dspy")
    with Host(kernels=1, on_output=outputs.append) as opened:
        yield opened


@pytest.fixture
def session(host: Host, request: pytest.FixtureRequest) -> Iterator[Session]:
    session = host.session(request.node.name)
    outputs.clear()
    yield session
    assert not [one.text for one in outputs if "Error when" in one.text], "DSPy logs what a callback raises, no more"
    events = session.telemetry.events()
    assert events
    assert [problem for event in events if (problem := catalogue.problem(event))] == []
    assert not any("call" in event.metadata or "parent_call" in event.metadata for event in events)
    assert KEY not in json.dumps([event.metadata for event in events]) + "\n".join(host.telemetry.lines())


def use(session: Session, lm: ScriptedLM, **options: Any) -> None:
    session.lm(lm.model, api_base=lm.api_base, api_key=KEY, **{"num_retries": 0, **options})


def numbered() -> Callable[[Messages], Reply]:
    """A model whose every reply takes another number of tokens: a sum that counts one twice or not at all is wrong."""
    count = iter(range(1, 10_000))

    def reply(_messages: Messages) -> Reply:
        n = next(count)
        return Reply(fields(reasoning="So.", answer="Paris"), 1000 + n * n, 7 * n)

    return reply


def last_command(session: Session) -> list[Event]:
    """The events of the session's last command in a kernel, without those of the host."""
    events = session.telemetry.events()
    (*_, trace) = [e.metadata["trace_id"] for e in events if e.name == ("bridge", "execution", "stop")]
    return [e for e in events if e.metadata.get("trace_id") == trace and e.name[1] in ("execution", "callback", "dspy")]


def ended(events: list[Event], kind: str, last: str = "stop") -> list[Event]:
    return [event for event in events if event.name == ("bridge", "dspy", kind, last)]


def label(event: Event) -> str:
    said = event.metadata
    if event.name[1] != "dspy":
        return str(said["method"]) if event.name[1] == "callback" else "command"
    named = said.get("module") or said.get("action") or said.get("tool") or said.get("optimizer")
    return str(named or event.name[2])


def paths(events: list[Event]) -> list[str]:
    """Each span with all it is part of, in the order in which they began: `command > Predict > lm`."""
    begun = {str(e.metadata["span_id"]): e for e in events if e.name[-1] == "start"}
    told = []
    for event in begun.values():
        path = [label(event)]
        while event.name[1] != "execution":
            event = begun[str(event.metadata["parent_span_id"])]  # a KeyError: a parent that is no span of the command
            path.append(label(event))
        told.append(" > ".join(reversed(path)))
    return told


def check_sums(host: Host, session: Session, lm: ScriptedLM, *, calls: int | None = None) -> list[Event]:
    """That the last command told of each call once, with what the model said that it took: those that ended well."""
    events = last_command(session)
    done = ended(events, "lm")
    assert len(done) == (len(lm.usages) if calls is None else calls)
    both = [*done, *ended(events, "lm", "exception")]
    begun = ended(events, "lm", "start")
    assert len({e.metadata["span_id"] for e in both}) == len(both) == len(begun), "each ends once"
    inputs, outputs = (sum(column) for column in zip(*lm.usages, strict=True))
    summed = {
        name: sum(int(e.measurements.get(name, 0)) for e in both)
        for name in ("input_tokens", "output_tokens", "tokens")
    }
    assert summed == {"input_tokens": inputs, "output_tokens": outputs, "tokens": inputs + outputs}
    line = host.telemetry.lines()[-1]
    assert f"{len(both)} LM call{'s' * (len(both) > 1)}, {inputs + outputs:,} tokens" in line
    return events


# -- spans -------------------------------------------------------------------------


def test_each_part_is_beneath_the_part_that_made_it(host: Host, session: Session) -> None:
    with ScriptedLM(numbered()) as lm:
        use(session, lm)
        session.create("dspy.ChainOfThought", "question -> answer")(question="?")
        events = check_sums(host, session, lm)
    predict = "command > ChainOfThought > Predict"
    assert paths(events) == [
        "command",
        "command > ChainOfThought",
        predict,
        f"{predict} > format",
        f"{predict} > lm",
        f"{predict} > parse",
    ]
    (asked,) = ended(events, "lm")
    assert asked.metadata["model"] == "openai/scripted"
    assert asked.metadata["response_model"] == "scripted"
    assert (asked.metadata["cache_hit"], asked.metadata["streamed"]) == (False, False)
    assert "first_token" not in asked.measurements
    assert "cost" not in asked.measurements, "DSPy does not know what this model costs"
    assert [e.metadata["adapter"] for e in ended(events, "adapter")] == ["ChatAdapter"] * 2


def test_an_adapter_that_inherits_its_methods_is_told_of_once(session: Session) -> None:
    with ScriptedLM(['{"answer": "Paris"}']) as lm:
        use(session, lm, adapter="JSONAdapter")
        session.create("dspy.Predict", "question -> answer")(question="?")
    told = [(e.metadata["adapter"], e.metadata["action"]) for e in ended(last_command(session), "adapter")]
    assert told == [("JSONAdapter", "format"), ("JSONAdapter", "parse")]


def test_a_tool_and_the_callback_that_it_makes_are_beneath_their_agent(session: Session) -> None:
    session.tool(lambda query: f"found {query}", name="search")
    script = [
        fields(next_thought="Look.", next_tool_name="search", next_tool_args=json.dumps({"query": "Kenya"})),
        fields(next_thought="Done.", next_tool_name="finish", next_tool_args="{}"),
        fields(reasoning="It was found.", answer="Africa"),
    ]
    with ScriptedLM(script) as lm:
        use(session, lm)
        session.create("dspy.ReAct", "question -> answer", tools=[session.tools["search"]])(question="?")
    told = paths(last_command(session))
    assert "command > ReAct > search > tool.call" in told
    assert "command > ReAct > finish" in told
    assert told.count("command > ReAct > Predict > lm") == 2
    assert told.count("command > ReAct > ChainOfThought > Predict > lm") == 1


def test_a_span_of_the_users_is_between_what_is_around_it_and_what_is_in_it(session: Session) -> None:
    session.function(
        "ask",
        """
        def ask(ctx):
            import dspy
            with ctx.span("mine") as span:
                dspy.Predict("question -> answer")(question="?")
                return span["span_id"]
        """,
        lm=True,
    )
    with ScriptedLM(numbered()) as lm:
        use(session, lm)
        mine = session.call("ask")
    (module,) = ended(last_command(session), "module")
    assert module.metadata["parent_span_id"] == mine


# -- exact sums, whoever calls ---------------------------------------------------------

PREDICT = "command > Predict > lm"

CALLERS: dict[str, tuple[str, str, int]] = {
    "dspy.Parallel": (
        """
        def ask():
            import dspy
            predict = dspy.Predict("question -> answer")
            dspy.Parallel(num_threads=8, disable_progress_bar=True)([(predict, {"question": str(i)}) for i in range(24)])
        """,
        PREDICT,
        24,
    ),
    "Parallel within a module": (
        """
        def ask():
            import dspy
            class Many(dspy.Module):
                def __init__(self):
                    super().__init__()
                    self.predict = dspy.Predict("question -> answer")
                def forward(self, n):
                    parallel = dspy.Parallel(num_threads=8, disable_progress_bar=True)
                    return parallel([(self.predict, {"question": str(i)}) for i in range(n)])
            Many()(n=16)
        """,
        "command > Many > Predict > lm",
        16,
    ),
    "Evaluate with 8 threads": (
        """
        def ask():
            import dspy
            devset = [dspy.Example(question=str(i), answer="Paris").with_inputs("question") for i in range(24)]
            def exact(example, prediction):
                return example.answer == prediction.answer
            evaluate = dspy.Evaluate(devset=devset, metric=exact, num_threads=8)
            assert evaluate(dspy.Predict("question -> answer")).score == 100
        """,
        "command > evaluate > Predict > lm",
        24,
    ),
    "asyncio.gather": (
        """
        async def ask():
            import asyncio, dspy
            predict = dspy.Predict("question -> answer")
            await asyncio.gather(*(predict.acall(question=str(i)) for i in range(12)))
        """,
        PREDICT,
        12,
    ),
    "asyncify": (
        """
        async def ask():
            import asyncio, dspy
            predict = dspy.asyncify(dspy.Predict("question -> answer"))
            await asyncio.gather(*(predict(question=str(i)) for i in range(6)))
        """,
        PREDICT,
        6,
    ),
    "streamify of a synchronous program": (
        """
        async def ask():
            import dspy
            async for _ in dspy.streamify(dspy.Predict("question -> answer"))(question="?"):
                pass
        """,
        PREDICT,
        1,
    ),
    "threads that inherited nothing but the model": (
        """
        def ask():
            import dspy, threading
            lm = dspy.settings.lm
            threads = [threading.Thread(target=lm, args=[str(i)]) for i in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        """,
        "command > lm",
        6,
    ),
    "a copy of the model": (
        """
        def ask():
            import dspy
            predict = dspy.Predict("question -> answer")
            predict.set_lm(dspy.settings.lm.copy(temperature=0.5))
            predict.deepcopy()(question="?")
        """,
        PREDICT,
        1,
    ),
    "a model of the function's own": (
        """
        def ask():
            import dspy
            given = dspy.settings.lm
            own = dspy.LM(given.model, api_base=given.kwargs["api_base"], api_key="x", cache=False)
            with dspy.context(lm=own):
                dspy.Predict("question -> answer")(question="?")
            own("once more")
        """,
        "",
        2,
    ),
    "a program that counts for itself": (
        """
        def ask():
            import dspy
            with dspy.track_usage() as tracker:
                dspy.Predict("question -> answer")(question="?")
            with dspy.context(track_usage=True):
                prediction = dspy.Predict("question -> answer")(question="?")
            ((_, mine),) = tracker.get_total_tokens().items()
            ((_, its),) = prediction.get_lm_usage().items()
            assert (mine["prompt_tokens"], its["prompt_tokens"]) == (1001, 1004)
        """,
        PREDICT,
        2,
    ),
    "without histories": (
        """
        def ask():
            import dspy
            with dspy.context(disable_history=True):
                dspy.Predict("question -> answer")(question="?")
        """,
        PREDICT,
        1,
    ),
    "several completions": (
        """
        def ask():
            import dspy
            prediction = dspy.Predict("question -> answer", n=3, temperature=1.0)(question="?")
            assert len(prediction.completions) == 3
        """,
        PREDICT,
        1,
    ),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_each_call_of_a_model_is_counted_once_with_its_own_tokens(host: Host, session: Session, caller: str) -> None:
    source, path, calls = CALLERS[caller]
    session.function("ask", source, lm=True)
    with ScriptedLM(numbered()) as lm:
        use(session, lm)
        session.call("ask")
        told = paths(check_sums(host, session, lm, calls=calls))
    asked = [one for one in told if one.endswith("> lm")]
    assert len(asked) == calls
    if path:
        assert set(asked) == {path}
        ways = {path.replace("> lm", way) for way in ("> format", "> parse")}
        assert "Predict" not in path or ways <= set(told)


def test_a_metrics_callback_from_an_evaluations_thread_is_beneath_the_evaluation(session: Session) -> None:
    session.tool(lambda answer: answer == "Paris", name="right")
    session.function(
        "ask",
        """
        def ask(ctx):
            import dspy
            devset = [dspy.Example(question=str(i)).with_inputs("question") for i in range(4)]
            def right(example, prediction):
                return ctx.call_tool("right", answer=prediction.answer)
            return dspy.Evaluate(devset=devset, metric=right, num_threads=4)(dspy.Predict("question -> answer")).score
        """,
        lm=True,
    )
    with ScriptedLM(numbered()) as lm:
        use(session, lm)
        assert session.call("ask") == 100
    events = last_command(session)
    assert paths(events).count("command > evaluate > tool.call") == 4
    (evaluation,) = ended(events, "evaluate")
    assert evaluation.metadata["metric"] == "right"
    assert (evaluation.measurements["score"], evaluation.measurements["examples"]) == (100, 4)


def test_an_adapter_that_asks_again_is_two_calls(host: Host, session: Session) -> None:
    replies = ["no fields at all", '{"answer": "Paris"}']
    with ScriptedLM(replies) as lm:
        use(session, lm)
        assert session.create("dspy.Predict", "question -> answer")(question="?").answer == "Paris"
        events = check_sums(host, session, lm, calls=2)
    (failed,) = ended(events, "adapter", "exception")
    assert (failed.metadata["adapter"], failed.metadata["action"]) == ("ChatAdapter", "parse")
    assert "AdapterParseError" in str(failed.metadata["error"])
    parsed = [e.metadata["adapter"] for e in ended(events, "adapter") if e.metadata["action"] == "parse"]
    assert parsed == ["JSONAdapter"]


def test_a_call_that_is_tried_again_is_one_call_with_the_tokens_of_the_try_that_was_answered(
    host: Host, session: Session
) -> None:
    with ScriptedLM([Refused(500), Reply(fields(answer="Paris"), 11, 3)]) as lm:
        use(session, lm, num_retries=1)
        session.create("dspy.Predict", "question -> answer")(question="?")
        assert len(lm.requests) == 2
        check_sums(host, session, lm, calls=1)


def test_what_dspy_says_that_a_call_costs_is_told_and_adds_up(host: Host, session: Session) -> None:
    with ScriptedLM(lambda _: Reply(fields(answer="Paris"), 1000, 100), model="openai/gpt-4o-mini") as lm:
        use(session, lm)
        session.function(
            "ask",
            """
            def ask():
                import dspy
                predict = dspy.Predict("question -> answer")
                for i in range(3):
                    predict(question=str(i))
            """,
            lm=True,
        )
        session.call("ask")
        events = check_sums(host, session, lm)
    costs = [e.measurements["cost"] for e in ended(events, "lm")]
    assert len(costs) == 3
    assert len(set(costs)) == 1
    assert 0 < costs[0] < 0.01


# -- DSPy's cache ------------------------------------------------------------------------


def test_a_model_with_its_cache_on_finds_none_in_a_kernel(host: Host, session: Session) -> None:
    with ScriptedLM(numbered()) as lm:
        use(session, lm, cache=True)
        predict = session.create("dspy.Predict", "question -> answer")
        for _ in range(2):
            predict(question="the same")
        assert len(lm.requests) == 2
    assert [e.metadata["cache_hit"] for e in ended(session.telemetry.events(), "lm")] == [False, False]


def test_an_answer_from_a_cache_that_code_has_switched_on_takes_no_tokens(host: Host, session: Session) -> None:
    session.function(
        "ask",
        """
        def ask():
            import dspy
            dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
            try:
                predict = dspy.Predict("question -> answer")
                return [predict(question="the same").answer for _ in range(2)]
            finally:
                dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
        """,
        lm=True,
    )
    with ScriptedLM(lambda _: Reply(fields(answer="Paris"), 1000, 100), model="openai/gpt-4o-mini") as lm:
        use(session, lm, cache=True)
        assert session.call("ask") == ["Paris", "Paris"]
        assert len(lm.requests) == 1
        events = check_sums(host, session, lm, calls=2)
    asked, found = ended(events, "lm")
    assert (asked.metadata["cache_hit"], found.metadata["cache_hit"]) == (False, True)
    assert asked.measurements["cost"] > 0
    assert set(found.measurements) == {"duration"}


# -- streams -----------------------------------------------------------------------------


def test_the_time_until_the_first_token_of_a_stream_is_when_it_came(host: Host, session: Session) -> None:
    release = threading.Event()
    session.tool(lambda: None, name="seen")
    session.tool(release.set, name="go")
    session.function(
        "ask",
        """
        async def ask(ctx):
            import dspy
            program = dspy.streamify(dspy.Predict("question -> answer"), is_async_program=True)
            values = []
            async for value in program(question="?"):
                values.append(value)
                if len(values) == 1:
                    await ctx.call_tool("seen")
                    await ctx.call_tool("go")
            return len(values) - 1, values[-1].answer
        """,
        lm=True,
    )
    with ScriptedLM([Reply(fields(answer="It is Paris"), 50, 9)], held=release) as lm:
        use(session, lm)
        pieces, answer = session.call("ask")
        assert lm.requests[0]["stream"] is True
        events = check_sums(host, session, lm)
    assert (pieces > 2, answer) == (True, "It is Paris")
    (asked,) = ended(events, "lm")
    assert asked.metadata["streamed"] is True
    (seen, _) = [e for e in events if e.name == ("bridge", "callback", "stop")]
    # The first token came before `seen` was called, the last after it had returned.
    after = asked.measurements["duration"] - asked.measurements["first_token"]
    assert after > seen.measurements["duration"] > 0
    assert asked.measurements["first_token"] > 0


# -- errors ------------------------------------------------------------------------------


def test_a_model_that_fails_is_told_with_its_type_and_without_tokens(session: Session) -> None:
    with ScriptedLM([Refused(500, f"overloaded, {KEY}")]) as lm:
        use(session, lm)
        predict = session.create("dspy.Predict", "question -> answer")
        with pytest.raises(RemoteError):
            predict(question="?")
    events = [e for e in session.telemetry.events() if e.name[1:2] == ("dspy",)]
    assert [e.name[2] for e in events if e.name[-1] == "exception"] == ["lm", "module"]
    (failed,) = ended(events, "lm", "exception")
    assert str(failed.metadata["error"]).startswith("dspy.")
    assert "tokens" not in failed.measurements
    assert "cache_hit" not in failed.metadata


def test_what_a_call_had_used_before_it_failed_is_counted(host: Host, session: Session) -> None:
    session.function(
        "ask",
        """
        def ask():
            import dspy
            try:
                dspy.settings.lm("?", n=3, temperature=1.0)
            except dspy.LMError as error:
                return type(error).__name__
        """,
        lm=True,
    )
    with ScriptedLM([Reply("one", 10, 1), Reply("two", 20, 2), Refused(400)]) as lm:
        use(session, lm)
        session.call("ask")
        events = check_sums(host, session, lm, calls=0)
    (failed,) = ended(events, "lm", "exception")
    assert failed.measurements["tokens"] == 33


def test_a_tool_that_raises_is_told_with_its_type(session: Session) -> None:
    session.function(
        "ask",
        """
        def ask():
            import dspy
            def divide(a: int, b: int) -> float:
                return a / b
            agent = dspy.ReAct("question -> answer", tools=[divide])
            return agent(question="?").answer
        """,
        lm=True,
    )
    script = [
        fields(next_thought="Try.", next_tool_name="divide", next_tool_args=json.dumps({"a": 1, "b": 0})),
        fields(next_thought="Done.", next_tool_name="finish", next_tool_args="{}"),
        fields(reasoning="No.", answer="undefined"),
    ]
    with ScriptedLM(script) as lm:
        use(session, lm)
        assert session.call("ask") == "undefined"
    (failed,) = ended(last_command(session), "tool", "exception")
    assert (failed.metadata["tool"], failed.metadata["error"]) == ("divide", "ZeroDivisionError")


# -- optimizers --------------------------------------------------------------------------

TUNE = """
def tune(ctx, answers, sizes):
    import dspy

    devset = [dspy.Example(question=str(i), answer=a).with_inputs("question") for i, a in enumerate(answers)]

    def exact(example, prediction, trace=None):
        return example.answer == prediction.answer

    class Tuner(dspy.teleprompt.Teleprompter):
        def compile(self, student, *, trainset, **_):
            for size in sizes:
                dspy.Evaluate(devset=trainset[:size], metric=exact, num_threads=3)(student)
            ctx.call_tool("look")
            return student

    Tuner().compile(dspy.Predict("question -> answer"), trainset=devset)
"""


def test_an_optimizer_tells_of_each_candidate_and_of_the_best_also_in_the_live_line(
    host: Host, session: Session
) -> None:
    found = []

    def look() -> None:
        eventually(lambda: any("candidate 3 · best 66.67" in line for line in host.telemetry.lines()), "it is told")
        found.append(True)

    session.tool(look)
    session.function("tune", TUNE, lm=True)
    with ScriptedLM(numbered()) as lm:
        use(session, lm)
        session.call("tune", ["Rome", "Paris", "Paris"], [3, 2, 1])
        events = check_sums(host, session, lm, calls=6)
    assert found == [True]
    progress = [e for e in events if e.name == ("bridge", "dspy", "optimizer", "progress")]
    assert [
        (e.measurements["candidate"], round(e.measurements["score"]), round(e.measurements["best"])) for e in progress
    ] == [
        (1, 67, 67),
        (2, 50, 67),
        (3, 0, 67),
    ]
    (compiled,) = ended(events, "optimizer")
    assert {e.metadata["span_id"] for e in progress} == {compiled.metadata["span_id"]}
    assert {e.metadata["optimizer"] for e in progress} == {"Tuner"}
    assert paths(events).count("command > Tuner > evaluate > Predict > lm") == 6
    assert "candidate" not in host.telemetry.lines()[-1], "the settled line says what it took"


def test_dspys_own_random_search_tells_of_its_candidates_and_of_the_optimizer_within(
    host: Host, session: Session
) -> None:
    session.function(
        "compile",
        """
        def compile():
            import dspy
            trainset = [dspy.Example(question=str(i), answer="Paris").with_inputs("question") for i in range(3)]
            def exact(example, prediction, trace=None):
                return example.answer == prediction.answer
            search = dspy.BootstrapFewShotWithRandomSearch(
                metric=exact, max_bootstrapped_demos=1, max_labeled_demos=1, num_candidate_programs=1, num_threads=2
            )
            search.compile(dspy.Predict("question -> answer"), trainset=trainset)
        """,
        lm=True,
    )
    with ScriptedLM(numbered()) as lm:
        use(session, lm)
        session.call("compile")
        events = check_sums(host, session, lm)
    progress = [e for e in events if e.name == ("bridge", "dspy", "optimizer", "progress")]
    evaluations = ended(events, "evaluate")
    assert [e.measurements["candidate"] for e in progress] == list(range(1, len(evaluations) + 1))
    assert {e.metadata["optimizer"] for e in progress} == {"BootstrapFewShotWithRandomSearch"}
    assert "command > BootstrapFewShotWithRandomSearch > BootstrapFewShot > Predict > lm" in paths(events)


def test_cancelling_an_optimizer_stops_it_at_its_next_call_also_in_its_threads(session: Session) -> None:
    release = threading.Event()
    session.tool(lambda: None, name="look")
    session.function("tune", TUNE, lm=True)
    session.function(
        "threads",
        """
        def threads():
            import threading
            return [t.name for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]
        """,
    )
    with ScriptedLM(numbered(), held=release) as lm:
        use(session, lm)
        future = session.submit("tune", ["Paris"] * 12, [12, 12])
        assert lm.received.wait(30)
        future.cancel()
        with pytest.raises(CancelledError):
            future.result(30)
        # Until the kernel has heard of it, what waits for a thread is still wanted.
        told = ("bridge", "execution", "exception")
        eventually(lambda: any(e.name == told for e in session.telemetry.events()), "the kernel has cancelled it")
        release.set()
        eventually(lambda: session.call("threads") == [], "the evaluation's threads have ended", 30)
    assert len(lm.requests) <= 3, "what waited for a thread asked no model any more"


# -- what is captured, and what never is -----------------------------------------------------


def captured(session: Session) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"prompt": set(), "completion": set()}
    for event in session.telemetry.events():
        for name in found.keys() & event.metadata.keys():
            assert event.name[:3] == ("bridge", "dspy", "lm")
            found[name].add(str(event.metadata[name]))
    return found


def ask_with_planted(session: Session) -> None:
    with ScriptedLM(lambda _: fields(answer=f"{ANSWER} {KEY}")) as lm:
        use(session, lm, user="PLANTED-OPTION")
        predict = session.create("dspy.Predict", "question -> answer")
        predict(question=f"{QUESTION} {KEY}")
        assert KEY in json.dumps(lm.requests[0]["messages"])
        assert lm.requests[0]["user"] == "PLANTED-OPTION"


def test_prompts_and_completions_are_told_only_if_captured(host: Host, session: Session) -> None:
    ask_with_planted(session)
    assert captured(session) == {"prompt": set(), "completion": set()}
    everything = json.dumps([(e.measurements, e.metadata) for e in session.telemetry.events()])
    assert "PLANTED" not in everything + "\n".join(host.telemetry.lines()[-2:])


@pytest.mark.parametrize("what", ["prompts", "completions"])
def test_what_is_captured_is_told_without_secrets_and_nothing_else_is(session: Session, what: Capture) -> None:
    session.telemetry.capture = {what}
    ask_with_planted(session)
    found = captured(session)
    (text,) = found.pop(what.removesuffix("s"))
    assert list(found.values()) == [set()]
    assert (QUESTION if what == "prompts" else ANSWER) in text
    assert "***" in text
    assert KEY not in text
    assert "PLANTED-OPTION" not in text, "of a call's options nothing is told"
    said = json.loads(text)
    assert said[-1]["role"] == "user" if what == "prompts" else said == [fields(answer=f"{ANSWER} ***")]


# -- nothing is left ---------------------------------------------------------------------------


def test_nothing_of_what_was_told_is_left_once_the_commands_have_ended(session: Session) -> None:
    session.function(
        "left",
        """
        def left():
            import gc
            gc.collect()
            kinds = [type(o).__name__ for o in gc.get_objects() if type(o).__module__ == "bridge_kernel.dspy_telemetry"]
            from dspy.clients import base_lm
            from dspy.utils.callback_context import ACTIVE_CALL_ID
            import dspy
            from bridge_kernel.telemetry import _SPAN
            return kinds, len(base_lm.GLOBAL_HISTORY), (ACTIVE_CALL_ID.get(), _SPAN.get(), dspy.settings.usage_tracker)
        """,
    )
    session.function(
        "restored",
        """
        def restored(fail):
            import dspy
            from bridge_kernel.telemetry import _SPAN
            before = dspy.settings.usage_tracker, _SPAN.get()
            try:
                dspy.Predict("question -> answer")(question="?")
            except dspy.LMError:
                assert fail
            return before == (dspy.settings.usage_tracker, _SPAN.get())
        """,
        lm=True,
    )
    session.function("bind", "def bind(module):\n    import dspy\n    module.set_lm(dspy.settings.lm)\n", lm=True)
    with ScriptedLM(lambda messages: fields(answer="Paris")) as lm:
        use(session, lm)
        predict = session.create("dspy.Predict", "question -> answer")
        for i in range(5):
            predict(question=str(i))
        assert session.call("restored", False)
        session.call("bind", predict)
    with ScriptedLM([Refused(500)]) as lm:
        use(session, lm)
        assert session.call("restored", True)
    # The command that the lane showed last may still be named by its frames, and its tap with it.
    eventually(lambda: session.call("left")[0] in ([], ["Tap"]), "no call outlives its command")
    assert session.call("left")[1:] == (0, (None, None, None))
