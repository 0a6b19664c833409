"""What a kernel keeps of instances that it has rebuilt: bounded, counted, and never to be noticed by any result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bridge_kernel import cache as cache_module
from bridge_kernel.cache import InstanceCache
from bridge_kernel.contract.methods import InstanceRecord, State
from bridge_kernel.policy import Policy
from wire import Kernel, Wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KERNELSIDE = str(Path(__file__).parent / "kernelside")
EVERYTHING = """--Policy.cache_names=["*"]"""
NOTHING = "--Policy.max_cache_bytes=0"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Kernel]]:
    """A kernel with the arguments given: one for all tests that ask for the same."""
    kernels: dict[tuple[str, ...], Kernel] = {}

    def started(*arguments: str) -> Kernel:
        if arguments not in kernels:
            kernels[arguments] = Kernel(tmp_path_factory.mktemp("kernel"), *arguments)
        return kernels[arguments]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (KERNELSIDE, os.environ.get("PYTHONPATH")))))
        yield started
    for kernel in kernels.values():
        kernel.close()


@pytest.fixture
def host(start: Callable[..., Kernel]) -> Iterator[Wire]:
    """A client of a kernel that keeps whatever it can."""
    host = start(EVERYTHING).connect()
    yield host
    host.close()


def created(host: Wire, cls: str, *args: Any, **more: Any) -> dict[str, Any]:
    """The record of a new instance."""
    record = {"ref": "r", "class": cls, "args": args, **more}
    reply = host.request("instance.create", {"record": record}, timeout_s=60)
    assert reply.error is None, reply.error
    return record | {"state": reply.result["state"]}


def called(host: Wire, record: dict[str, Any], method: str, *args: Any) -> tuple[Any, str]:
    """What a method returned, and how its object was come by: hit, miss or off. The record takes its new state."""
    command = host.start("instance.call", {"record": record, "method": method, "args": args})
    reply = host.reply(command, timeout_s=60)
    value = reply.value
    record["state"] = reply.result["state"] or record["state"]
    return value, rebuilt(host, command)[-1]


def rebuilt(host: Wire, command: int | str) -> list[str]:
    events = [event for event in host.events(command) if event["name"] == ["bridge", "instance", "stop"]]
    return [event["metadata"]["cache"] for event in events if event["metadata"]["action"] == "rebuild"]


def counts(host: Wire) -> dict[str, int]:
    kept: dict[str, int] = host.request("kernel.stats").result["cache"]
    return kept


# -- counted -----------------------------------------------------------------------


def test_hits_and_misses_are_counted_and_told(host: Wire) -> None:
    before = counts(host)
    record = created(host, "keepers.Keeper", 41)
    assert called(host, record, "look")[1] == "miss"
    assert called(host, record, "look")[1] == "hit"
    assert called(host, record, "add", 1) == (42, "hit")
    assert called(host, record, "look") == ([42, [], True], "miss"), "another state is another object"
    after = counts(host)
    assert {name: after[name] - before[name] for name in ("hits", "misses", "entries")} == {
        "hits": 2,
        "misses": 2,
        "entries": 2,
    }
    assert after["bytes"] > before["bytes"]


def test_dspys_own_modules_are_kept_by_default_and_other_classes_are_not(start: Callable[..., Kernel]) -> None:
    host = start().connect()
    record = created(host, "dspy.ChainOfThought", "question -> answer")
    assert [called(host, record, "dump_state")[1] for _ in range(2)] == ["miss", "hit"]
    for cls, method in (("keepers.Keeper", "look"), ("programs.Program", "recall"), ("collections.Counter", "total")):
        record = created(host, cls)
        assert [called(host, record, method)[1] for _ in range(2)] == ["off", "off"]


def test_nothing_is_kept_if_there_is_no_room_for_it(start: Callable[..., Kernel]) -> None:
    host = start(EVERYTHING, NOTHING).connect()
    record = created(host, "keepers.Keeper")
    assert [called(host, record, "look")[1] for _ in range(2)] == ["off", "off"]
    assert counts(host) == {"hits": 0, "misses": 0, "entries": 0, "bytes": 0}


def test_an_instance_that_is_passed_as_an_argument_or_inspected_is_rebuilt_from_what_was_kept(host: Wire) -> None:
    record = created(host, "keepers.Keeper", 7)
    called(host, record, "look")
    host.answers["instance.fetch"] = lambda params: record
    lent = host.call("def f(keeper): return keeper.look()", {"$bridge": "ref", "id": "r"})
    assert host.reply(lent).value == [7, [], True]
    assert rebuilt(host, lent) == ["hit"]
    inspected = host.start("object.inspect", {"record": record})
    assert host.reply(inspected).error is None
    assert rebuilt(host, inspected) == ["hit"]


# -- not to be noticed ---------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(EVERYTHING,), (NOTHING,)], ids=["on", "off"])
def test_what_a_call_does_to_an_object_beside_its_state_is_not_there_in_the_next(
    start: Callable[..., Kernel], arguments: tuple[str, ...]
) -> None:
    host = start(*arguments).connect()
    record = created(host, "keepers.Keeper", 5)
    assert [called(host, record, "look")[0] for _ in range(4)] == [[5, [], True]] * 4
    assert [called(host, record, "add", 2)[0], called(host, record, "look")[0]] == [7, [7, [], True]]
    host.answers["instance.fetch"] = lambda params: record
    scribble = """
        def scribble(keeper):
            keeper.hidden.append("scribbled")
            keeper.value = "scribbled"
            return keeper.value
    """
    for _ in range(2):
        assert host.run(scribble, {"$bridge": "ref", "id": "r"}).value == "scribbled"
        assert called(host, record, "look")[0] == [7, [], True]


def test_commands_that_run_at_once_have_an_object_each(host: Wire) -> None:
    record = created(host, "keepers.Keeper", 6)
    params = {"record": record, "method": "wait"}
    commands = [host.start("instance.call", params) for _ in range(4)]
    gates = [host.callback("gate", command) for command in commands]
    for gate in gates:
        host.answer(gate, {"value": None})
    ids, lengths = zip(*(host.reply(command).value for command in commands), strict=True)
    assert len(set(ids)) == 4
    assert lengths == (1, 1, 1, 1)


DESCRIBE = """
    def describe(module):
        found = [module.dump_state()]
        for name, predictor in module.named_predictors():
            signature = predictor.signature
            found.append([name, str(signature), signature.model_json_schema(), signature.__name__, signature.__module__])
            found.append([sorted(vars(predictor)), repr(predictor.demos), predictor.config, type(signature).__name__])
            signature.instructions = "scribbled"
            for field in signature.fields.values():
                field.json_schema_extra["desc"] = "scribbled"
            predictor.demos.append({"question": "scribbled"})
            predictor.config["temperature"] = "scribbled"
        module.scribbled = True
        return found
"""


@pytest.mark.parametrize(
    ("cls", "args"),
    [
        ("dspy.Predict", ("question -> answer",)),
        ("dspy.ChainOfThought", ("context: list[str], question -> answer: str, confidence: float",)),
        ("dspy.ReAct", ("question -> answer", [])),
        ("dspy.ProgramOfThought", ("question -> answer: float",)),
        ("dspy.MultiChainComparison", ("question -> answer",)),
        ("programs.Program", ("question -> answer",)),
    ],
)
def test_a_dspy_module_that_was_kept_is_the_same_as_one_made_anew_and_shares_not_even_its_signature(
    start: Callable[..., Kernel], cls: str, args: tuple[Any, ...]
) -> None:
    on, off = start(EVERYTHING).connect(), start(NOTHING).connect()
    record = created(off, cls, *args)
    seen = []
    for host, expected in ((off, "off"), (on, "miss"), (on, "hit"), (on, "hit")):
        host.answers["instance.fetch"] = lambda params: record
        command = host.call(DESCRIBE, {"$bridge": "ref", "id": "r"})
        seen.append(host.reply(command, timeout_s=60).value)
        assert rebuilt(host, command) == [expected]
    assert len(seen[0]) > 1, "it has predictors"
    assert seen == [seen[0]] * 4


def test_two_dspy_modules_that_are_there_at_once_have_a_signature_each(host: Wire) -> None:
    record = created(host, "dspy.Predict", "question -> answer")
    host.answers["instance.fetch"] = lambda params: record
    compare = """
        def compare(a, b, c):
            b.signature.instructions = "scribbled"
            return [a is b, a.signature is b.signature, b.signature is c.signature, c.signature.instructions]
    """
    command = host.call(compare, *[{"$bridge": "ref", "id": "r"}] * 3)
    same = [False, False, False, record["state"]["value"]["signature"]["instructions"]]
    assert host.reply(command, timeout_s=60).value == same
    assert rebuilt(host, command)[1:] == ["hit", "hit"]


# -- what is not kept --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "method", "value"),
    [
        ("keepers.Locked", "look", [0, [], True]),
        ("keepers.Bound", "limit_now", 3),
        ("keepers.Nameless", "is_ours", True),
    ],
)
def test_objects_of_which_a_copy_could_be_told_from_a_new_one_are_not_kept(
    host: Wire, cls: str, method: str, value: Any
) -> None:
    before = counts(host)
    record = created(host, cls)
    assert [called(host, record, method)[0] for _ in range(3)] == [value] * 3
    assert called(host, record, method)[1] == "off", "it was tried once"
    after = counts(host)
    assert (after["entries"], after["hits"]) == (before["entries"], before["hits"])


@pytest.mark.parametrize(
    "argument",
    [
        {"$bridge": "ref", "id": "other"},
        {"$bridge": "variable", "name": "a"},
        {"$bridge": "tool", "name": "double"},
        {"$bridge": "enum", "class": "traps.Colour", "name": "RED"},
    ],
    ids=lambda argument: argument["$bridge"],
)
def test_what_is_made_from_more_than_its_record_says_is_not_kept(host: Wire, argument: dict[str, Any]) -> None:
    host.answers["session.get"] = lambda params: {"value": 1, "version": 1}
    host.answers["instance.fetch"] = lambda params: {"ref": "other", "class": "collections.Counter"}
    record = {"ref": "r", "class": "keepers.Argued", "state": {"adapter": "bridge", "value": {"value": argument}}}
    assert [called(host, record, "describe")[1] for _ in range(2)] == ["off", "off"]


def test_what_came_in_buffers_is_not_kept_for_it_could_be_written_to_afterwards(host: Wire) -> None:
    command = host.call("def f():\n import numpy\n return numpy.arange(4)")
    reply = host.reply(command)
    record = {"ref": "r", "class": "keepers.Argued", "state": {"adapter": "bridge", "value": reply.value}}
    for _ in range(2):
        command = host.start("instance.call", {"record": record, "method": "describe"}, reply.buffers)
        assert host.reply(command).value == "ndarray"
        assert rebuilt(host, command) == ["off"]


def test_pickles_and_bare_recipes_are_not_kept_for_nothing_would_be_gained(host: Wire) -> None:
    for cls, adapter, method in (("collections.Counter", "pickle", "total"), ("accounts.Locked", "recipe", "more")):
        record = created(host, cls)
        assert record["state"]["adapter"] == adapter
        assert [called(host, record, method)[1] for _ in range(2)] == ["off", "off"]


# -- bounded -------------------------------------------------------------------------------


class Thing:
    def __init__(self, value: object = None) -> None:
        self.value = value


def record_of(value: int, **more: Any) -> InstanceRecord:
    return InstanceRecord("r", "things.Thing", state=State("bridge", {"value": value}), **more)


def filled(cache: InstanceCache, numbers: range) -> list[bytes]:
    keys = []
    for number in numbers:
        key = cache.key(record_of(number))
        assert key is not None
        cache.keep(key, "Thing", Thing(number))
        keys.append(key)
    return keys


def test_the_least_recently_used_gives_way_when_the_bytes_are_used_up() -> None:
    cache = InstanceCache(Policy(max_cache_bytes=10_000, cache_names=["*"]))
    keys = filled(cache, range(2))
    for number in range(2, 100):
        assert cache.get(keys[0]).value == 0, "it is used all the time"
        keys += filled(cache, range(number, number + 1))
        assert cache.counts["bytes"] <= 10_000
    kept = [cache.get(key) for key in keys]
    entries = cache.counts["entries"]
    assert 2 < entries < 98
    assert [index for index, obj in enumerate(kept) if obj is not None] == [0, *range(100 - entries + 1, 100)]


def test_the_number_of_entries_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MAX_ENTRIES", 5)
    cache = InstanceCache(Policy(cache_names=["*"]))
    filled(cache, range(20))
    assert cache.counts["entries"] == 5


def test_what_is_larger_than_all_the_room_there_is_drives_out_nothing() -> None:
    cache = InstanceCache(Policy(max_cache_bytes=5_000, cache_names=["*"]))
    (small,) = filled(cache, range(1))
    cache.keep(b"large", "Thing", Thing(list(range(10_000))))
    assert cache.get(b"large") is None
    assert cache.get(small) is not None
    assert cache.counts["entries"] == 1


def test_the_same_key_kept_twice_is_counted_once() -> None:
    cache = InstanceCache(Policy(cache_names=["*"]))
    filled(cache, range(1))
    once = cache.counts["bytes"]
    filled(cache, range(1))
    assert (cache.counts["bytes"], cache.counts["entries"]) == (once, 1)


def test_whatever_an_object_is_made_from_is_in_its_key() -> None:
    cache = InstanceCache(Policy(cache_names=["*"]))
    state = State("bridge", {"value": 1})
    records = [
        record_of(1),
        record_of(2),
        record_of(1, args=(1,)),
        record_of(1, args=(1.0,)),
        record_of(1, args=("1",)),
        record_of(1, args=([1],)),
        record_of(1, kwargs={"value": 1}),
        InstanceRecord("r", "things.Other", state=state),
        InstanceRecord("r", "things.Thing", state=State("dspy", {"value": 1})),
    ]
    keys = [cache.key(record) for record in records]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert cache.key(InstanceRecord("another", "things.Thing", state=state, version=9)) == keys[0]


def test_what_cannot_be_read_any_more_is_forgotten_and_made_anew(caplog: pytest.LogCaptureFixture) -> None:
    cache = InstanceCache(Policy(cache_names=["*"]))
    cache.keep(b"key", "Thing", Thing(_Vanishing()))
    assert cache.counts["entries"] == 1
    assert cache.get(b"key") is None
    assert "could not be read" in caplog.text
    assert (cache.counts["entries"], cache.counts["bytes"], cache.counts["hits"]) == (0, 0, 0)


class _Vanishing:
    def __reduce__(self) -> tuple[object, ...]:
        return _gone, ()


def _gone() -> None:
    raise ImportError("it was there a moment ago")
