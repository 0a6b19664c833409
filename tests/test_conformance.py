"""The public conformance suite for Jupyter kernels, `jupyter_kernel_test`, with everything that it can test switched on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import jupyter_kernel_test
import pytest

if TYPE_CHECKING:
    from unittest import TestCase


class _Skipped(AssertionError):
    """A feature that the suite could have tested and did not."""


@pytest.fixture(autouse=True)
def _skipping_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jupyter_kernel_test, "SkipTest", _Skipped)


class TestBridge(jupyter_kernel_test.KernelTests):  # type: ignore[misc]
    kernel_name = "bridge"
    language_name = "python"
    file_extension = ".py"

    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('test', file=sys.stderr)"
    completion_samples: ClassVar[list[dict[str, Any]]] = [
        {"text": "zi", "matches": {"zip"}},
        {"text": "import hashl", "matches": {"hashlib"}},
        {"text": "isinst", "matches": {"isinstance"}},
    ]
    complete_code_samples: ClassVar[list[str]] = [
        "1",
        "print('hello, world')",
        "def f(x):\n    return x * 2\n\n\n",
        "%time",
    ]
    incomplete_code_samples: ClassVar[list[str]] = ["print('''hello", "def f(x):\n    x * 2", "for i in range(3):"]
    invalid_code_samples: ClassVar[list[str]] = ["import = 7q", "raise = 2"]
    code_page_something = "zip?"
    code_generate_error = "raise ValueError('as asked')"
    code_execute_result: ClassVar[list[dict[str, str]]] = [
        {"code": "6 * 7", "result": "42"},
        {"code": "'ab' * 2", "result": "'abab'"},
        {"code": "import math; math.hypot(3, 4)", "result": "5.0"},
    ]
    code_display_data: ClassVar[list[dict[str, str]]] = [
        {"code": "from IPython.display import HTML, display; display(HTML('<b>test</b>'))", "mime": "text/html"},
        {"code": "from IPython.display import Math, display; display(Math('\\\\frac{1}{2}'))", "mime": "text/latex"},
    ]
    code_history_pattern = "6 ?*"
    supported_history_operations = ("tail", "range", "search")
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; clear_output()"


class TestBridgeWelcomes(jupyter_kernel_test.IopubWelcomeTests):  # type: ignore[misc]
    kernel_name = "bridge"
    support_iopub_welcome = True


@pytest.mark.parametrize(
    ("suite", "ours"),
    [
        (jupyter_kernel_test.KernelTests, TestBridge),
        (jupyter_kernel_test.IopubWelcomeTests, TestBridgeWelcomes),
    ],
    ids=["KernelTests", "IopubWelcomeTests"],
)
def test_every_feature_that_the_suite_can_test_is_switched_on(suite: type[TestCase], ours: type[TestCase]) -> None:
    switches = [name for name, off in vars(suite).items() if not name.startswith("_") and not off]
    assert switches
    assert [name for name in switches if not getattr(ours, name)] == []


def test_a_skipped_test_would_fail() -> None:
    class Empty(jupyter_kernel_test.KernelTests):  # type: ignore[misc]
        pass

    with pytest.raises(_Skipped):
        Empty("test_execute_stdout").test_execute_stdout()
