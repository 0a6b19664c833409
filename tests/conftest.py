"""What the tests share: one host with real kernels, and a session of each test's own."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import bridge_host.host
from bridge_host import Host, Telemetry
from bridge_host.pool import Pool
from bridge_kernel.contract.catalogue import problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bridge_host import Event, Session

KERNELSIDE = str(Path(__file__).parent / "kernelside")
"""What the tests' kernels can import besides what is installed."""

_numbers = itertools.count(1)


def eventually(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
    """Wait for what another process or thread does; the condition decides, not the clock."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--instance-cache", choices=("on", "off"), default="on", help="the kernels' cache of instances")


@pytest.fixture(scope="session", autouse=True)
def instance_cache(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--instance-cache=off` every host of this process starts its kernels without one."""
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--instance-cache") == "off":

            def without(*args: Any, arguments: Any, **kwargs: Any) -> Pool:
                return Pool(*args, arguments=(*arguments, "--Policy.max_cache_bytes=0"), **kwargs)

            patch.setattr(bridge_host.host, "Pool", without)
        yield


@pytest.fixture(scope="session", autouse=True)
def every_event_is_in_the_catalogue() -> Iterator[None]:
    """Whatever any test's host emits or hears is as the catalogue says."""
    wrong: dict[str, None] = {}
    take = Telemetry.take

    def checked(self: Telemetry, event: Event) -> None:
        if (found := problem(event)) is not None:
            wrong[found] = None
        take(self, event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Telemetry, "take", checked)
        yield
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="session")
def shared_host() -> Iterator[Host]:
    """Two kernels for every test that does not kill them."""
    with Host(kernels=2, env={"PYTHONPATH": KERNELSIDE}) as host:
        yield host


@pytest.fixture
def session(shared_host: Host) -> Session:
    return shared_host.session(f"test-{next(_numbers)}")


@pytest.fixture
def lonely_host() -> Iterator[Host]:
    """One kernel, for tests that kill it or fill it."""
    with Host(kernels=1, env={"PYTHONPATH": KERNELSIDE}) as host:
        yield host
