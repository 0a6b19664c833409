"""What the tests share: one host with real kernels, and a session of each test's own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bridge_host import Host

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bridge_host import Session

KERNELSIDE = str(Path(__file__).parent / "kernelside")
"""What the tests' kernels can import besides what is installed."""

_numbers = itertools.count(1)


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
