"""What people see in a real JupyterLab: each test runs cells in it as a person would, and looks at the page.

With SHOTS=directory in the environment a picture of each is left there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browser.lab import Notebook, needs_a_browser, open_browser, open_lab

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Locator

    from browser.lab import Lab

__all__ = ("open_browser", "open_lab")  # fixtures: pytest finds them here

pytestmark = needs_a_browser

CELLS = [
    '''from bridge_host import Host

host = Host(kernels=2)
session = host.session("lab")

session.function("count", """
def count(ctx, upto):
    for n in range(1, upto + 1):
        ctx.progress(n, upto, "pages read")
    ctx.get_variable("go")
    ctx.call_tool("wait")
    return upto
""")
session.function("average", """
def average(values):
    return add_up(values) / len(values)

def add_up(values):
    return sum(float(value) for value in values)
""")

import threading
going = threading.Event()

@session.tool
def wait() -> bool:
    """Wait until the test has looked."""
    return going.wait(60)

session["go"] = True
''',
    """counting = session.submit("count", 20)""",
    """going.set()
counting.result()""",
    """try:
    session.call("average", ["1", "2", "three"])
except Exception as error:
    print("it failed")""",
    """for n in range(500):
    try:
        session.call("average", [n] if n % 250 else ["no number"])
    except Exception:
        pass
print("done")""",
    """letters = session.create("collections.Counter", "abracadabra")
letters.update("bbbbbb")
letters.most_common(2)""",
    '''@session.tool
def look_up(word: str) -> int:
    """Sends a command of its own, while the one that called it runs."""
    return session.call("operator.length_hint", word)

session.function("research", """
def research(ctx, words):
    with ctx.span("looking up"):
        found = [ctx.call_tool("look_up", word=word) for word in words]
    with ctx.span("summing up"):
        try:
            ctx.get_variable("a name that is not there")
        except Exception:
            pass
        return sum(found)
""")
with host.telemetry.span("an afternoon"):
    session.call("research", ["page", "leaf"])
host.telemetry.trace()''',
    """host.telemetry.dashboard()""",
    """host.close()""",
]
LAST = len(CELLS) - 1


@pytest.fixture(scope="module")
def notebook(lab: Lab, browser: Browser) -> Iterator[Notebook]:
    """A notebook with an open host, used by all tests."""
    lab.write("live.ipynb", CELLS)
    page = browser.new_page(viewport={"width": 1000, "height": 800}, device_scale_factor=1)
    notebook = Notebook(page, lab, "live.ipynb")
    notebook.run(0)
    yield notebook
    notebook.run(LAST)
    page.close()


def shoot(shown: Locator, name: str) -> None:
    if directory := os.environ.get("SHOTS"):
        shown.screenshot(path=Path(directory) / f"{name}.png")


def test_a_command_that_runs_shows_how_far_it_is_and_then_settles_in_the_same_line(notebook: Notebook) -> None:
    notebook.run(1)
    line = notebook.output(1)
    line.locator("progress").wait_for()
    assert line.locator("progress").evaluate("bar => bar.position") == 1
    assert re.search(r"^[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏] count [\d.]+ s · 20/20 pages read · kernel [0-9a-f]{4}", line.inner_text())
    before = line.inner_text()
    notebook.page.wait_for_function(
        "([line, before]) => line.innerText !== before", arg=[line.element_handle(), before]
    )
    line.get_by_text(re.compile(r"· 2 callbacks")).wait_for()
    shoot(notebook.cell(1), "live-line")
    notebook.run(2)
    line.get_by_text("✓").wait_for()
    assert re.search(r"^✓ count [\d.]+ m?s · kernel [0-9a-f]{4} · 2 callbacks$", line.inner_text())
    assert notebook.output(1).count() == 1
    assert line.locator("progress").count() == 0
    shoot(notebook.cell(1), "live-line-settled")


def test_an_error_is_folded_and_unfolds_by_a_click(notebook: Notebook) -> None:
    notebook.run(3)
    line = notebook.output(3).first
    assert re.search(r"^✗ average [\d.]+ (µs|ms|s) · kernel [0-9a-f]{4} · ValueError$", line.inner_text())
    traceback = line.locator("pre")
    assert not traceback.is_visible()
    line.locator("summary").click()
    traceback.wait_for(state="visible")
    assert "in add_up" in traceback.inner_text()
    assert "three" not in traceback.inner_text(), "a value"
    shoot(notebook.cell(3), "live-error")


def test_five_hundred_commands_leave_a_few_lines_and_a_summary(notebook: Notebook) -> None:
    notebook.run(4)
    texts = notebook.output(4).all_inner_texts()
    lines = [text for text in texts if re.match("[✓✗] average", text)]
    (summary,) = [text for text in texts if " commands · " in text]
    assert len(lines) == 6, "the first five, and a failed one"
    assert re.search(r"^500 commands · 498 ✓ · 2 ✗ · p50 [\d.]+ \S+ · p95 [\d.]+ \S+$", summary)
    assert len(texts) == len(lines) + 2, "and what it printed"
    shoot(notebook.cell(4), "live-summary")


def test_each_command_of_a_cell_has_a_line_before_its_result(notebook: Notebook) -> None:
    notebook.run(5)
    *lines, result = notebook.output(5).all_inner_texts()
    assert [" ".join(line.split()[:2]) for line in lines] == [
        "✓ collections.Counter()",
        "✓ collections.Counter.update",
        "✓ collections.Counter.most_common",
    ]
    assert result == "[('b', 8), ('a', 5)]"


def test_a_trace_is_drawn_as_a_waterfall(notebook: Notebook) -> None:
    notebook.run(6)
    picture = notebook.output(6).locator("img")
    picture.wait_for()
    assert picture.evaluate("image => image.complete && image.naturalWidth > 600")
    shoot(picture, "waterfall")


def test_the_dashboard_shows_the_host_and_follows_it(notebook: Notebook) -> None:
    notebook.run(7)
    page = notebook.output(7).get_by_label("Bridge host")
    page.wait_for(timeout=60_000)
    page.get_by_text("2 kernels ready").wait_for()
    assert page.get_by_role("region", name="Kernels").locator("tbody tr").count() == 2
    commands = page.get_by_role("region", name="Most called commands")
    before = commands.inner_text()
    assert "research" in before
    notebook.run(4)  # 500 commands more
    notebook.page.wait_for_function(
        "([shown, before]) => shown.innerText !== before", arg=[commands.element_handle(), before]
    )
    commands.get_by_text("average").wait_for()
    page.get_by_role("region", name="Last errors").get_by_text("ValueError").first.wait_for()
    term, figure = page.locator("dt").first.bounding_box(), page.locator("dd").first.bounding_box()
    assert term is not None
    assert figure is not None
    assert term["y"] + term["height"] <= figure["y"], "JupyterLab's own style sheet leaves the tiles as they are"
    shoot(page, "dashboard")


def contrast(shown: Locator) -> float:
    """Between a text and what is behind it, as WCAG 2 defines it."""
    ratio: float = shown.evaluate(
        """element => {
            const brush = document.createElement("canvas").getContext("2d", {willReadFrequently: true})
            const parse = text => {  // whatever the notation: a browser knows them all
                brush.clearRect(0, 0, 1, 1)
                brush.fillStyle = text
                brush.fillRect(0, 0, 1, 1)
                const [r, g, b, a] = brush.getImageData(0, 0, 1, 1).data
                return [r, g, b, a / 255]
            }
            const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]))
            let opacity = 1, behind = null
            for (let e = element; e; e = e.parentElement) {
                const style = getComputedStyle(e)
                if (!behind) opacity *= Number(style.opacity)
                const colour = parse(style.backgroundColor)
                if (!behind && colour[3] > 0) behind = colour
            }
            const [r, g, b, a] = parse(getComputedStyle(element).color)
            const light = colour => {
                const [r, g, b] = colour.map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
                return .2126 * r + .7152 * g + .0722 * b
            }
            const pair = [light(over([r, g, b, a * opacity], behind)), light(behind)]
            return (Math.max(...pair) + .05) / (Math.min(...pair) + .05)
        }"""
    )
    return ratio


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_can_be_read_in_each_theme(notebook: Notebook, theme: str) -> None:
    notebook.run(3)
    notebook.run(4)
    notebook.output(3).locator("summary").click()
    if theme == "dark":
        notebook.dark()
    shoot(notebook.page.locator(".jp-Notebook"), f"live-{theme}")
    shown = notebook.page.locator(".bridge-line span, .bridge-line b, .bridge-line pre")
    ratios = {span.inner_text()[:40]: contrast(span) for span in shown.all()}
    assert ratios
    assert not {text: ratio for text, ratio in ratios.items() if ratio < 4.5}, "4.5:1 is what WCAG asks for"


def test_the_page_has_no_errors(notebook: Notebook) -> None:
    assert notebook.errors == []
