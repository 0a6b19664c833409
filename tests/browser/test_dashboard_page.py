"""The dashboard's page, rendered by a real browser from snapshots that the test makes up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from bridge_host.telemetry.page import dashboard
from bridge_host.telemetry.page.snapshot import CircuitView, CommandView, ErrorView, KernelView, Snapshot
from browser.lab import needs_a_browser, open_browser
from snapshots import HOSTILE, snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, BrowserContext

__all__ = ("open_browser",)  # a fixture: pytest finds it here

pytestmark = needs_a_browser

STATIC = Path(dashboard.__file__).parent / "static"
SHELL = """<!doctype html><html lang="en"><meta charset="utf-8"><title>page</title>
<link rel="stylesheet" href="dashboard.css"><body style="margin:0;padding:16px"><div id="output"></div></html>"""
MODEL = """async (first) => {
  const { default: widget } = await import("./dashboard.js");
  const state = { snapshot: first, watched: null }, heard = {};
  window.sent = [];
  window.model = {
    get: (name) => state[name],
    set: (name, value) => { state[name] = value; },
    save_changes: () => window.sent.push(state.watched),
    on: (name, call) => (heard[name] ??= new Set()).add(call),
    off: (name, call) => heard[name]?.delete(call),
    receive: (name, value) => { state[name] = value; for (const call of heard[`change:${name}`] ?? []) call(); },
    listeners: () => Object.values(heard).reduce((n, calls) => n + calls.size, 0),
  };
  window.cleanup = widget.render({ model: window.model, el: document.getElementById("output") });
}"""


class Shown:
    """The page in a browser, with a model that the test speaks for."""

    def __init__(self, browser_page: Any) -> None:
        self.page = browser_page
        self.said: list[str] = []
        browser_page.on("console", lambda message: self.said.append(message.text))
        browser_page.on("pageerror", lambda error: self.said.append(str(error)))
        browser_page.route("http://bridge.test/**", self._serve)
        self.asked: list[str] = []
        browser_page.on("request", lambda request: self.asked.append(request.url))
        browser_page.goto("http://bridge.test/page.html")

    def _serve(self, route: Any) -> None:
        name = route.request.url.rpartition("/")[2]
        if name == "page.html":
            route.fulfill(body=SHELL, content_type="text/html")
        elif (STATIC / name).is_file():
            kind = "text/javascript" if name.endswith(".js") else "text/css"
            route.fulfill(body=(STATIC / name).read_text(), content_type=kind)
        else:
            route.fulfill(body="", status=204)  # the browser's own wish for an icon

    def open(self, taken: Snapshot) -> None:
        self.page.evaluate(MODEL, msgspec.to_builtins(taken))

    def receive(self, taken: Snapshot) -> None:
        self.page.evaluate("(it) => window.model.receive('snapshot', it)", msgspec.to_builtins(taken))

    def text(self, selector: str) -> str:
        text: str = self.page.locator(selector).inner_text()
        return text

    def table(self, title: str) -> list[list[str]]:
        """The rows that can be seen."""
        rows = self.page.locator(f"section[aria-label='Bridge host'] section:has(h3:text-is('{title}')) tbody tr")
        return [row.locator("th, td").all_inner_texts() for row in rows.all() if row.is_visible()]


@pytest.fixture(scope="module")
def chromium(browser: Browser) -> BrowserContext:
    return browser.new_context(viewport={"width": 1100, "height": 900}, reduced_motion="reduce")


@pytest.fixture
def shown(chromium: Any) -> Iterator[Shown]:
    made = Shown(chromium.new_page())
    yield made
    made.page.close()
    assert made.said == [], "nothing in the console"
    assert all(url.startswith("http://bridge.test/") for url in made.asked), "nothing from elsewhere"


def test_the_page_shows_the_state_in_words_figures_and_tables(shown: Shown) -> None:
    shown.open(snapshot(health="degraded", summary="1 of 2 kernels ready, 1 unresponsive."))
    assert shown.text("[role=status]") == "▲ Degraded 1 of 2 kernels ready, 1 unresponsive."
    tiles = shown.text("dl")
    for words in ("Kernels\n1/2\n3 running", "Waiting\n7\n1 refused", "12.5", "2.4 ms", "41.0 ms", "$0.0231"):
        assert words in tiles
    assert shown.table("Kernels")[1] == ["9be0177d", "▲ unresponsive", "1", "12", "25 %", "–", "10 s", "5002"]
    assert shown.table("Most called commands") == [
        ["dspy.ChainOfThought.__call__", "1,200", "3", "412 ms", "900 ms", "1.20 s"]
    ]
    assert shown.table("Last errors")[0][1:] == ["math.sqrt", "ValueError"]
    assert shown.table("Held back")[0][:3] == ["analyse 1a2b3c4d", "all", "5"]


def test_an_update_changes_the_page_in_place(shown: Shown) -> None:
    shown.open(snapshot())
    shown.page.evaluate("document.querySelectorAll('.bridge-dashboard *').forEach((node) => (node.mine = true))")
    kernels = (snapshot().kernels[0],)
    shown.receive(snapshot(waiting=1234, kernels=kernels, kernels_in_all=1, errors=(), circuits=()))
    assert "1,234" in shown.text("dl")
    assert [row[0] for row in shown.table("Kernels")] == ["3f2a91bc"]
    assert shown.table("Last errors") == []
    assert "No errors." in shown.text(".bridge-dashboard")
    assert shown.page.locator("h3:text-is('Held back')").is_hidden()
    new = "[...document.querySelectorAll('.bridge-dashboard *')].filter((node) => !node.mine).length"
    assert shown.page.evaluate(new) == 0
    shown.receive(snapshot())
    assert [row[0] for row in shown.table("Kernels")] == ["3f2a91bc", "9be0177d"]
    assert shown.page.evaluate(new) == 0


def test_other_peoples_text_is_text_and_nothing_else(shown: Shown) -> None:
    hostile = snapshot(
        summary=HOSTILE,
        health=HOSTILE,
        kernels=(KernelView(HOSTILE, 1, HOSTILE, 0, 0, 0, 0.0, None),),
        commands=(CommandView(HOSTILE, 1, 1, 1, 1, 1),),
        errors=(ErrorView(0.0, HOSTILE, HOSTILE),),
        circuits=(CircuitView(HOSTILE, HOSTILE, 1, 0.0),),
    )
    shown.open(hostile)
    shown.receive(msgspec.structs.replace(hostile, waiting=8))
    assert shown.page.locator(".bridge-dashboard :is(img, script)").count() == 0
    assert shown.page.evaluate("window.owned") is None
    assert shown.table("Last errors")[0][1:] == [HOSTILE, HOSTILE]
    assert shown.table("Most called commands")[0][0] == HOSTILE
    assert shown.text("[role=status]").endswith(HOSTILE)


def test_only_the_summary_is_read_out_and_tables_have_headings(shown: Shown) -> None:
    shown.open(snapshot())
    page = shown.page
    assert page.locator("[aria-live]").count() == 1
    said = page.locator("[aria-live=polite]")
    assert said.inner_text() == "✓ All well 2 kernels ready."
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("tbody tr:visible").count() == page.locator("tbody tr:visible > th[scope=row]").count()
    assert page.get_by_role("heading", name="Bridge host").count() == 1
    # What can be scrolled can be reached with the keyboard, and says what it is.
    assert page.get_by_role("region", name="Kernels").get_attribute("tabindex") == "0"
    page.evaluate("window.before = document.querySelector('[aria-live]').innerHTML")
    shown.receive(snapshot(waiting=99, at=1_790_000_001.0))
    assert page.evaluate("window.before === document.querySelector('[aria-live]').innerHTML")


THEMES = {
    "light": ("light", {}, {}),
    "dark": ("dark", {}, {}),
    "lab-light": ("dark", {"--jp-layout-color1": "#fff", "--jp-ui-font-color1": "rgba(0,0,0,.87)"}, "true"),
    "lab-dark": ("light", {"--jp-layout-color1": "#111", "--jp-ui-font-color1": "rgba(255,255,255,1)"}, "false"),
}
CONTRASTS = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const root = document.querySelector(".bridge-dashboard");
  const ground = parts(getComputedStyle(root).backgroundColor).slice(0, 3);
  const found = {};
  for (const node of root.querySelectorAll("*")) {
    if (node.namespaceURI.endsWith("svg") || !node.checkVisibility() || !node.innerText.trim()) continue;
    const [r, g, b, a = 1] = parts(getComputedStyle(node).color);
    const seen = [r, g, b].map((v, i) => v * a + ground[i] * (1 - a));
    const [high, low] = [light(seen), light(ground)].sort((x, y) => y - x);
    found[`${node.className} ${getComputedStyle(node).color}`] = (high + 0.05) / (low + 0.05);
  }
  return found;
}"""


@pytest.mark.parametrize("theme", THEMES)
def test_every_text_stands_out_from_its_ground_in_every_theme(shown: Shown, theme: str) -> None:
    scheme, variables, lab = THEMES[theme]
    shown.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    if lab:
        shown.page.evaluate("(light) => (document.body.dataset.jpThemeLight = light)", lab)
    for name, value in variables.items():
        shown.page.evaluate("([n, v]) => document.documentElement.style.setProperty(n, v)", [name, value])
    states = ("ready", "starting", "spare", "draining", "unresponsive", "dead")
    kernels = tuple(KernelView("k", 1, state, 0, 0, 0, 0.0, 0.5) for state in states)
    for health in ("ok", "busy", "degraded", "down", "closed"):
        taken = snapshot(health=health, kernels=kernels, kernels_in_all=len(kernels))
        shown.receive(taken) if health != "ok" else shown.open(taken)
        contrasts = shown.page.evaluate(CONTRASTS)
        assert len(contrasts) > 5
        assert min(contrasts.values()) >= 4.5, contrasts
    ground = shown.page.evaluate("getComputedStyle(document.querySelector('.bridge-dashboard')).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") is (theme in ("light", "lab-light"))


def test_the_page_says_whether_it_can_be_seen_and_leaves_nothing_behind(shown: Shown) -> None:
    shown.open(snapshot())
    page = shown.page
    assert page.evaluate("window.sent") == [True]
    page.evaluate(
        "Object.defineProperty(document, 'hidden', { value: true, configurable: true });"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    assert page.evaluate("window.sent") == [True, False]
    page.evaluate("Object.defineProperty(document, 'hidden', { value: false });window.model.receive('watched', false)")
    assert page.evaluate("window.sent") == [True, False, True], "another view was hidden, this one is not"
    page.evaluate("window.cleanup()")
    assert page.evaluate("window.model.listeners()") == 0
    assert page.evaluate("window.sent.at(-1)") is False
