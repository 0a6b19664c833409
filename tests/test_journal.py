"""The journal of one command: what is found again when it runs again, and what it means if it is not."""

from __future__ import annotations

import pytest

from bridge_host.engine.journal import Journal
from bridge_host.engine.running import current_call
from bridge_kernel.contract.errors import ReplayDiverged
from bridge_kernel.contract.methods import SessionGet, ToolCall


def tool(name: str, *args: object, command: int = 1, seq: int | None = None) -> ToolCall:
    return ToolCall(command=command, seq=seq, name=name, args=args)


def get(name: str, seq: int | None) -> SessionGet:
    return SessionGet(command=1, seq=seq, name=name)


def ask(
    journal: Journal, params: ToolCall | SessionGet, buffers: tuple[bytes, ...] = (), *, effect: bool = True
) -> bool:
    """Whether it was found again; recorded otherwise."""
    method = "tool.call" if isinstance(params, ToolCall) else "session.get"
    entry, _ = journal.match(params.seq, method, params, buffers)
    if entry is None:
        journal.record(params.seq, method, params, buffers, effect=effect and method == "tool.call")
    return entry is not None


def first_attempt(*asked: ToolCall | SessionGet, effect: bool = True) -> Journal:
    journal = Journal()
    journal.begin()
    for params in asked:
        assert not ask(journal, params, effect=effect)
    journal.begin()
    return journal


def test_the_same_callbacks_are_found_again_whatever_the_command_is_called_this_time() -> None:
    journal = first_attempt(get("x", 1), tool("pay", 3, seq=2))
    assert ask(journal, get("x", 1))
    assert ask(journal, tool("pay", 3, seq=2, command=77))
    assert not ask(journal, tool("pay", 4, seq=3))
    journal.check_complete()


def test_two_calls_alike_are_two_calls() -> None:
    journal = first_attempt(tool("pay", 3), tool("pay", 3))
    assert ask(journal, tool("pay", 3))
    assert ask(journal, tool("pay", 3))
    assert not ask(journal, tool("pay", 3))


def test_the_buffers_are_part_of_what_is_asked() -> None:
    journal = Journal()
    journal.begin()
    ask(journal, tool("keep", {"$bridge": "bytes", "buffer": 0}), (b"one",))
    journal.begin()
    assert not ask(journal, tool("keep", {"$bridge": "bytes", "buffer": 0}), (b"two",))
    with pytest.raises(ReplayDiverged):
        journal.check_complete()


def test_callbacks_of_other_threads_may_come_in_any_order() -> None:
    journal = first_attempt(tool("a"), tool("b"), tool("c"))
    assert [ask(journal, tool(name)) for name in "cdab"] == [True, False, True, True]
    journal.check_complete()


def test_another_request_in_the_place_of_a_tools_call_is_a_divergence_that_names_both() -> None:
    journal = first_attempt(get("x", 1), tool("pay", 3, seq=2))
    assert ask(journal, get("x", 1))
    with pytest.raises(ReplayDiverged, match=r"was tool pay\(3\).*was tool pay\(4\)"):
        ask(journal, tool("pay", 4, seq=2))


def test_a_tool_that_is_called_before_one_whose_effect_has_happened_is_a_divergence() -> None:
    journal = first_attempt(tool("pay", 3, seq=5))
    with pytest.raises(ReplayDiverged):
        ask(journal, tool("mail", seq=4))


def test_another_way_that_forgets_only_readings_does_no_harm() -> None:
    journal = first_attempt(get("x", 1), get("y", 2), get("z", 3))
    assert ask(journal, get("x", 1))
    entry, forgotten = journal.match(2, "session.get", get("q", 2), ())
    assert entry is None
    assert forgotten == (2, 3), "and nothing else, whatever came after them"
    assert not ask(journal, get("z", 3))
    journal.check_complete()


def test_another_way_around_an_idempotent_tool_is_allowed() -> None:
    journal = first_attempt(tool("look", 1, seq=1), effect=False)
    assert not ask(journal, tool("look", 2, seq=1))
    journal.check_complete()


def test_an_end_without_a_call_whose_effect_has_happened_is_a_divergence() -> None:
    for seq in (None, 1):
        journal = first_attempt(tool("pay", 3, seq=seq))
        with pytest.raises(ReplayDiverged, match=r"called tool pay\(3\).*ended without"):
            journal.check_complete()


def test_a_journal_that_is_full_says_so_and_holds_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge_host.engine.journal.MAX_CALLBACKS", 3)
    journal = Journal()
    journal.begin()
    for n in range(5):
        ask(journal, get("x", n + 1))
    assert journal.overflowed
    assert len(journal) == 3
    assert not journal.effects
    ask(journal, tool("pay", seq=6))
    assert journal.effects, "one that was not kept counts all the more"


def test_an_effect_that_was_passed_over_is_noticed_before_the_next_tool_runs() -> None:
    journal = first_attempt(tool("pay", "A", seq=1))
    # The second time a write has taken the first place.
    with pytest.raises(ReplayDiverged, match=r'was tool pay\("A"\).*was tool pay\("B"\)'):
        ask(journal, tool("pay", "B", seq=2))


def test_of_a_command_that_has_secrets_an_error_shows_no_argument() -> None:
    journal = Journal(sealed=True)
    journal.begin()
    ask(journal, tool("pay", "sk-1", seq=1))
    journal.begin()
    with pytest.raises(ReplayDiverged, match=r"was tool pay\(…\).*was tool pay\(…\)"):
        ask(journal, tool("pay", "sk-2", seq=1))


def test_outside_of_a_tool_there_is_no_call() -> None:
    assert current_call() is None
