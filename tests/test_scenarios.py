"""The scenarios of tests/scenarios, run against the Python host; tests/scenarios/README.md says what their steps mean."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from base64 import b64decode, b64encode
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psutil
import pytest

from bridge_host import BridgeError, Host, Quota, current_call
from bridge_host.values import ValueReader, ValueWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bridge_host import HostOptions, Session

DIRECTORY: Final = Path(__file__).parent / "scenarios"
KERNELSIDE: Final = str(Path(__file__).parent / "kernelside")
SCHEMA: Final[dict[str, Any]] = json.loads((DIRECTORY / "scenario.schema.json").read_text())
MAIN: Final = "main"
PATIENCE_S: Final = 30.0

Json = Any
Step = dict[str, Any]


class Scenario(NamedTuple):
    name: str
    content: dict[str, Any]

    @property
    def lives(self) -> list[list[Step]]:
        """Its steps, up to each death of the host."""
        lives: list[list[Step]] = [[]]
        for step in self.content["steps"]:
            if step == {"kill": "host"}:
                lives.append([])
            else:
                lives[-1].append(step)
        return lives

    @property
    def host(self) -> dict[str, Any]:
        host: dict[str, Any] = self.content.get("host", {})
        return host

    @property
    def shares_its_host(self) -> bool:
        return not self.host.get("store") and {"restart": "host"} not in self.content["steps"]


def scenarios(file: Path) -> list[Scenario]:
    """Those of one file. Raises ValidationError if it does not fit the schema, ValueError if a name is there twice."""
    import jsonschema  # late: a life of its own was checked already, and this is half its start

    content = json.loads(file.read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(content)
    found = [Scenario(scenario["name"], scenario) for scenario in content["scenarios"]]
    if len({scenario.name for scenario in found}) < len(found):
        raise ValueError(f"{file}: two scenarios have one name")
    return found


# -- values ------------------------------------------------------------------------------


def read(tree: Json) -> Any:
    """What a value of a scenario is in Python: as on the wire, but with its buffers in place."""
    buffers: list[bytes] = []

    def taken(tree: Json) -> Json:
        if isinstance(tree, list):
            return [taken(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        tree = {name: taken(item) for name, item in tree.items()}
        if tree.get("$bridge") in ("ndarray", "table") and "base64" in tree:
            buffers.append(b64decode(tree.pop("base64")))
            tree["buffer"] = len(buffers) - 1
        return tree

    tree = taken(tree)
    return ValueReader(buffers).read(tree, "value")


def written(value: Any) -> Json:
    """What a value of Python's is in a scenario."""
    writer = ValueWriter()
    tree = writer.write(value, "value")

    def placed(tree: Json) -> Json:
        if isinstance(tree, list | tuple):
            return [placed(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        tree = {name: placed(item) for name, item in tree.items()}
        if "$bridge" in tree and "buffer" in tree:
            tree["base64"] = b64encode(writer.buffers[tree.pop("buffer")]).decode()
        return tree

    return placed(tree)


def text(tree: Json) -> str:
    """The same for two values that are equal: 1 and 1.0 are not."""
    return json.dumps(tree, sort_keys=True, ensure_ascii=False)


def same(what: str, expected: Json, found: Json) -> None:
    assert text(found) == text(expected), f"{what} is {text(found)}, not {text(expected)}"


# -- the runner --------------------------------------------------------------------------


class Gate:
    def __init__(self) -> None:
        self._times = 0
        self._changed = threading.Condition()

    def open(self) -> None:
        with self._changed:
            self._times += 1
            self._changed.notify_all()

    def wait(self, seconds: float, times: int = 1) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._times >= times, seconds)


def open_host(options: dict[str, Any], scratch: Path) -> Host:
    given: HostOptions = {"env": {"PYTHONPATH": KERNELSIDE}}
    if options.get("store"):
        given["store"] = scratch / "bridge.db"
    if "ttl" in options:
        given["ttl"] = options["ttl"] / 1000
    if "heartbeat" in options:
        given["heartbeat"] = options["heartbeat"] / 1000
    if (quota := options.get("quota")) is not None:
        names = {"things": "count", "bytes": "bytes"}
        given["quota"] = Quota(**{names[name]: value for name, value in quota.items()})
    return Host(options.get("kernels", 2), **given)


TYPES: Final[dict[str, Any]] = {
    "integer": int,
    "number": int | float,
    "string": str,
    "boolean": bool,
    "array": list[Any],
    "object": dict[str, Any],
    "any": Any,
}


class Refused(Exception):
    """What a scripted tool raises."""


class Run:
    """One life of a scenario on one host."""

    def __init__(self, scenario: Scenario, scratch: Path, host: Host, patience_s: float = PATIENCE_S) -> None:
        self.scenario = scenario
        self.scratch = scratch
        self.host = host
        self.patience_s = patience_s
        self.prefix = hashlib.sha256(f"{scenario.name} {scratch}".encode()).hexdigest()[:8]
        self.problems: list[str] = []
        self._gates: dict[str, Gate] = {}
        self._started: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(8)

    # -- names -------------------------------------------------------------------

    def id(self, session: str) -> str:
        return f"{session}-{self.prefix}"

    def session(self, step: Step) -> Session:
        return self.host.session(self.id(step.get("in", MAIN)))

    def gate(self, name: str) -> Gate:
        with self._lock:
            return self._gates.setdefault(name, Gate())

    @property
    def _refs(self) -> dict[str, str]:
        """Instances by the names that the scenario gave them; they outlive a host."""
        file = self.scratch / "refs"
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def value(self, tree: Json) -> Any:
        """A value of the scenario's, in which instances may be named."""
        refs = self._refs

        def named(tree: Json) -> Json:
            if isinstance(tree, list):
                return [named(item) for item in tree]
            if not isinstance(tree, dict):
                return tree
            if tree.get("$bridge") == "ref" and tree.get("id") in refs:
                return {**tree, "id": refs[tree["id"]]}
            return {name: named(item) for name, item in tree.items()}

        return read(named(tree))

    def values(self, step: Step) -> tuple[list[Any], dict[str, Any]]:
        return self.value(step.get("args", [])), {name: self.value(v) for name, v in step.get("kwargs", {}).items()}

    # -- a life ------------------------------------------------------------------

    def set_up(self) -> None:
        content = self.scenario.content
        if variables := content.get("variables"):
            self.step_update({"update": variables})
        for name, source in content.get("functions", {}).items():
            self.step_function({"function": name, "source": source})
        for name, script in content.get("tools", {}).items():
            self.step_tool({"tool": name, **script})

    def steps(self, steps: list[Step]) -> None:
        for step in steps:
            try:
                self.step(step)
                assert not self.problems, "; ".join(self.problems)
            except BaseException as exc:
                exc.add_note(f"at the step {text(step)[:1000]}; {self.problems or 'no other problems'}")
                raise

    def step(self, step: Step) -> None:
        (verb,) = (name for name in step if name in VERBS and not ("export" in step and name == "sessions"))
        getattr(self, f"step_{verb}")(step)

    def end(self) -> None:
        """Raises AssertionError if something was started and not waited for."""
        left = sorted(self._started)
        for started in self._started.values():
            started.cancel()
        for gate in self._gates.values():
            gate.open()
        self._threads.shutdown()
        with contextlib.suppress(BridgeError):
            for session in self.host.sessions():
                if session.endswith(self.prefix):
                    self.host.delete_session(session)
        assert not left, f"started and never joined: {left}"

    def expect(self, step: Step, act: Callable[[], Any]) -> None:
        try:
            found = act()
        except (BridgeError, concurrent.futures.CancelledError) as exc:
            if "raises" not in step:
                raise
            _same_error(step["raises"], exc)
            return
        assert "raises" not in step, f"it should raise {step['raises']}, and is {text(written(found))}"
        if "returns" in step:
            same("the result", step["returns"], written(found))

    # -- commands ----------------------------------------------------------------

    def call(self, what: str, step: Step) -> Any:
        args, kwargs = self.values(step)
        session = self.session(step)
        if "on" in step:
            return session.instance(self._refs[step["on"]]).call(what, *args, **_terms(step), **kwargs)
        return session.call(what, *args, **_terms(step), **kwargs)

    def step_call(self, step: Step) -> None:
        self.expect(step, lambda: self.call(step["call"], step))

    def step_start(self, step: Step) -> None:
        assert step["as"] not in self._started, f"{step['as']} was started already"
        if "on" in step:
            future = self._threads.submit(self.call, step["start"], step)
        else:
            args, kwargs = self.values(step)
            future = self.session(step).submit(step["start"], *args, **_terms(step), **kwargs)
        self._started[step["as"]] = future

    def step_join(self, step: Step) -> None:
        future = self._started.pop(step["join"])
        self.expect(step, lambda: future.result(self.patience_s))

    def step_cancel(self, step: Step) -> None:
        self._started[step["cancel"]].cancel()

    def step_stream(self, step: Step) -> None:
        args, kwargs = self.values(step)
        got: list[Any] = []

        def act() -> Any:
            stream = self.session(step).stream(step["stream"], *args, **_terms(step), **kwargs)
            with contextlib.closing(iter(stream)) as values:  # type: ignore[type-var]  # a generator
                for value in values:
                    got.append(written(value))
                    if len(got) == 1 and "meanwhile" in step:
                        self.step(step["meanwhile"])
                    if len(got) == step.get("take"):
                        break
            return stream.result

        self.expect(step, act)
        if "take" in step:
            assert len(got) == step["take"], f"the stream ended after {len(got)} values"
        if "yields" in step:
            same("what it yielded", step["yields"], got)

    def step_create(self, step: Step) -> None:
        args, kwargs = self.values(step)

        def act() -> None:
            made = self.session(step).create(step["create"], *args, **kwargs)
            (self.scratch / "refs").write_text(json.dumps({**self._refs, step["as"]: made.ref}))

        self.expect(step, act)

    # -- a session ---------------------------------------------------------------

    def step_set(self, step: Step) -> None:
        value = self.value(step["to"])
        self.expect(step, lambda: self.session(step).set(step["set"], value, if_version=step.get("if_version")))

    def step_get(self, step: Step) -> None:
        session = self.session(step)
        self.expect(step, lambda: session[step["get"]])
        if "version" in step:
            same("the version", step["version"], session.variables[step["get"]].version)

    def step_delete(self, step: Step) -> None:
        self.expect(step, lambda: self.session(step).__delitem__(step["delete"]))

    def step_update(self, step: Step) -> None:
        values = {name: self.value(value) for name, value in step["update"].items()}
        self.expect(step, lambda: self.session(step).update(values))

    def step_variables(self, step: Step) -> None:
        same("the variables", sorted(step["variables"]), sorted(self.session(step)))

    def step_history(self, step: Step) -> None:
        history = self.session(step).variables[step["history"]].history()
        same("the history", step["values"], [written(version.value) for version in history])

    def step_define(self, step: Step) -> None:
        self.expect(step, lambda: self.session(step).define(step["define"], step["schema"]))

    def step_function(self, step: Step) -> None:
        source = "\n".join(step["source"]).replace("$SCRATCH", str(self.scratch)) + "\n"
        self.expect(step, lambda: self.session(step).function(step["function"], source))

    def step_sessions(self, step: Step) -> None:
        ending = f"-{self.prefix}"
        found = [id.removesuffix(ending) for id in self.host.sessions() if id.endswith(ending)]
        same("the sessions", sorted(step["sessions"]), sorted(found))

    def step_delete_session(self, step: Step) -> None:
        self.expect(step, lambda: self.host.delete_session(self.id(step["delete_session"])))

    def step_export(self, step: Step) -> None:
        names = step.get("sessions", [MAIN])
        self.host.export(self.scratch / step["export"], *map(self.id, names), history=True)

    def step_import(self, step: Step) -> None:
        self.host.import_(self.scratch / step["import"])

    # -- tools and gates ---------------------------------------------------------

    def step_tool(self, step: Step) -> None:
        name = step["tool"]
        session = self.session(step)

        def run(**given: Any) -> Any:
            return self._act(name, given, step.get("does", []))

        taken = [(name, type) for parameter in step.get("takes", []) for name, type in parameter.items()]
        keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, keyword, annotation=TYPES[type]) for name, type in taken]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        session.tool(run, name=name, idempotent=step.get("idempotent", False))

    @property
    def _effects(self) -> list[Any]:
        file = self.scratch / "effects"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def _act(self, tool: str, given: dict[str, Any], actions: list[Step]) -> Any:
        call = current_call()
        assert call is not None
        with self._lock:  # before anything else: this is the effect that is counted
            with (self.scratch / "effects").open("a") as file:
                file.write(text({"tool": tool, "given": written(given), "id": call.id}) + "\n")
            number = sum(effect["tool"] == tool for effect in self._effects)
        own = {"$argument": lambda name: written(given[name]), "$run": {"number": number, "id": call.id}.__getitem__}
        result = None
        for action in actions:
            action = _filled(action, own)
            match next(iter(action.keys() & ACTIONS)):
                case "opens":
                    self.gate(action["opens"]).open()
                case "waits_for":
                    if not self.gate(action["waits_for"]).wait(self.patience_s):
                        self.problems.append(f"tool {tool} waited for {action['waits_for']!r} in vain")
                case "kills":
                    self.step_kill({"kill": "kernels"})
                case "sets":
                    self.session(action)[action["sets"]] = self.value(action["to"])
                case "calls":
                    result = self.call(action["calls"], action)
                case "returns":
                    result = self.value(action["returns"])
                case "raises":
                    raise Refused(action["raises"])
        return result

    def step_open(self, step: Step) -> None:
        self.gate(step["open"]).open()

    def step_await(self, step: Step) -> None:
        times = step.get("times", 1)
        assert self.gate(step["await"]).wait(self.patience_s, times), f"{step['await']!r} was not opened {times} times"

    def step_ran(self, step: Step) -> None:
        runs = [effect for effect in self._effects if effect["tool"] == step["ran"]]
        given = [run["given"] for run in runs]
        if "with" in step:
            order = (lambda trees: sorted(trees, key=text)) if step.get("in_any_order") else list
            same(f"what {step['ran']} ran with", order(step["with"]), order(given))
        if "times" in step:
            same(f"how often {step['ran']} ran", step["times"], len(runs))
        if "at_most" in step:
            assert len(runs) <= step["at_most"], f"{step['ran']} ran {len(runs)} times"
        if step.get("under_one_id"):
            assert len({run["id"] for run in runs}) == 1, f"{step['ran']} ran as {[run['id'] for run in runs]}"

    # -- what ends ---------------------------------------------------------------

    def step_kill(self, step: Step) -> None:
        busy = [kernel.pid for kernel in self.host.kernels() if kernel.in_flight]
        assert busy, "no kernel runs a command"
        for pid in busy:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).send_signal(signal.SIGKILL)

    def step_restart(self, step: Step) -> None:
        self.host.close()
        self._started.clear()  # they ended with their host
        self.host = open_host(self.scenario.host, self.scratch)

    def step_quarantine(self, step: Step) -> None:
        same("the quarantine", sorted(step["quarantine"]), sorted(poison.name for poison in self.host.quarantine))

    def step_release(self, step: Step) -> None:
        self.expect(step, lambda: self.host.quarantine.release(step["release"]))

    def step_interrupted(self, step: Step) -> None:
        expected = [
            {"subject": one["subject"], "in_doubt": sorted(one.get("in_doubt", []))} for one in step["interrupted"]
        ]
        found = [
            {"subject": one.subject, "in_doubt": sorted(c.tool for c in one.in_doubt)} for one in self._interrupted
        ]
        same("what was interrupted", expected, found)

    @property
    def _interrupted(self) -> list[Any]:
        return [one for one in self.host.interrupted() if one.session.endswith(self.prefix)]

    def _find(self, subject: str) -> tuple[str, dict[str, str]]:
        """An interrupted command's id, and those of its calls in doubt by their tool."""
        for one in self._interrupted:
            if one.subject == subject:
                return one.id, {call.tool: call.id for call in one.in_doubt}
        return subject, {}

    def step_resume(self, step: Step) -> None:
        id, calls = self._find(step["resume"])
        rerun = [calls.get(tool, tool) for tool in step.get("rerun", [])]
        replies = {calls.get(tool, tool): self.value(value) for tool, value in step.get("replies", {}).items()}
        self.expect(step, lambda: self.host.resume(id, rerun=rerun, replies=replies))

    def step_drop(self, step: Step) -> None:
        self.expect(step, lambda: self.host.drop(self._find(step["drop"])[0]))

    def step_eventually(self, step: Step) -> None:
        until = time.monotonic() + self.patience_s
        while True:
            try:
                self.step(step["eventually"])
            except AssertionError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)
            else:
                return


VERBS: Final = frozenset(name.removeprefix("step_") for name in SCHEMA["$defs"] if name.startswith("step_"))
ACTIONS: Final = frozenset(name.removeprefix("does_") for name in SCHEMA["$defs"] if name.startswith("does_"))


def _terms(step: Step) -> dict[str, Any]:
    terms: dict[str, Any] = {}
    if "deadline" in step:
        terms["deadline"] = step["deadline"] / 1000
    if "retries" in step:
        terms["retries"] = step["retries"]
    if "key" in step:
        terms["idempotency_key"] = step["key"]
    return terms


def _filled(tree: Json, own: dict[str, Callable[[str], Json]]) -> Json:
    """With what only the tool's call knows put in."""
    if isinstance(tree, list):
        return [_filled(item, own) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1 and (name := next(iter(tree))) in own:
        return own[name](tree[name])
    return {name: _filled(item, own) for name, item in tree.items()}


def _same_error(expected: Json, exc: BaseException) -> None:
    if isinstance(expected, str):
        expected = {"error": expected}
    name = "Cancelled" if isinstance(exc, concurrent.futures.CancelledError) else type(exc).__name__
    assert name == expected["error"], f"it raised {name}, not {expected['error']}: {exc}"
    if "type" in expected:
        found = exc.type.rpartition(".")[2] if isinstance(exc, BridgeError) else ""
        assert found == expected["type"], f"the error's type is {found}, not {expected['type']}"
    if "retryable" in expected:
        same("retryable", expected["retryable"], isinstance(exc, BridgeError) and exc.retryable)
    for said in expected.get("says", []):
        assert said in str(exc), f"the error says nothing of {said!r}: {exc}"


def run(path: Path, scenario: Scenario, scratch: Path, hosts: Hosts, patience_s: float = PATIENCE_S) -> None:
    """All lives of a scenario; those that end by the host's death have a process of their own."""
    *before, last = scenario.lives
    for number, _ in enumerate(before):
        command = [sys.executable, __file__, str(path), scenario.name, str(scratch), str(number)]
        said = scratch / "said"
        with said.open("w") as file:  # no pipe: the kernels have it too, and end a while after their host
            life = subprocess.run(command, stdout=file, stderr=file, timeout=120, check=False)
        assert life.returncode == -signal.SIGKILL, f"life {number}: {said.read_text()}"
    with hosts.host_for(scenario, scratch) as host:
        one = Run(scenario, scratch, host, patience_s)
        try:
            if not before:
                one.set_up()
            one.steps(last)
        finally:
            hosts.now(scenario, one.host)
            one.end()


class Hosts:
    """Hosts that scenarios share, by what they were opened with."""

    def __init__(self) -> None:
        self._open: dict[str, Host] = {}
        self._own: Host | None = None

    @contextlib.contextmanager
    def host_for(self, scenario: Scenario, scratch: Path) -> Iterator[Host]:
        if scenario.shares_its_host:
            name = text(scenario.host)
            if name not in self._open:
                self._open[name] = open_host(scenario.host, scratch)
            yield self._open[name]
            return
        self._own = open_host(scenario.host, scratch)
        try:
            yield self._own
        finally:
            self._own.close()

    def now(self, scenario: Scenario, host: Host) -> None:
        """The host of this scenario is another one since it was restarted."""
        if not scenario.shares_its_host:
            self._own = host

    def close(self) -> None:
        for host in self._open.values():
            host.close()


def live(file: str, name: str, scratch: str, number: str) -> None:
    """One life, which this process ends with."""
    (content,) = [one for one in json.loads(Path(file).read_text())["scenarios"] if one["name"] == name]
    scenario = Scenario(name, content)
    one = Run(scenario, Path(scratch), open_host(scenario.host, Path(scratch)))
    if number == "0":
        one.set_up()
    one.steps(scenario.lives[int(number)])
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    live(*sys.argv[1:])


# -- the tests ---------------------------------------------------------------------------

FILES: Final = sorted(path for path in DIRECTORY.glob("*.json") if path.name != "scenario.schema.json")
ALL: Final = [
    pytest.param(file, scenario, id=f"{file.stem}: {scenario.name}") for file in FILES for scenario in scenarios(file)
]
WRONG: Final = DIRECTORY / "wrong"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    yield hosts
    hosts.close()


@pytest.mark.parametrize(("file", "scenario"), ALL)
def test_scenario(file: Path, scenario: Scenario, hosts: Hosts, tmp_path: Path) -> None:
    run(file, scenario, tmp_path, hosts)


@pytest.mark.parametrize("scenario", [pytest.param(s, id=s.name) for s in scenarios(WRONG / "fails.json")])
def test_a_scenario_that_expects_what_is_not_so_fails(scenario: Scenario, hosts: Hosts, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, BridgeError)):
        run(WRONG / "fails.json", scenario, tmp_path, hosts, patience_s=0.2)


@pytest.mark.parametrize(
    "content", [pytest.param(one["file"], id=one["name"]) for one in json.loads((WRONG / "refused.json").read_text())]
)
def test_a_file_that_does_not_fit_the_schema_is_refused(content: Json, tmp_path: Path) -> None:
    file = tmp_path / "scenario.json"
    file.write_text(json.dumps(content))
    with pytest.raises(Exception, match=r"two scenarios have one name|Failed validating"):
        scenarios(file)


def test_every_step_and_every_action_is_used_by_a_scenario() -> None:
    used = "".join(json.dumps(json.loads(file.read_text())) for file in FILES)
    assert [name for name in sorted(VERBS | ACTIONS) if f'"{name}": ' not in used] == []
