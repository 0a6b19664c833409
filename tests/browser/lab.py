"""A real JupyterLab on loopback, in a real Chromium, used as a person would."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Locator, Page

__all__ = ("CHROMIUM", "Lab", "Notebook", "needs_a_browser", "open_browser", "open_lab")

CHROMIUM: Final = "/usr/bin/chromium"
REQUIRED: Final = bool(os.environ.get("BRIDGE_REQUIRE_BROWSER"))
START_S: Final = 60
CELL_MS: Final = 60_000

_SETTINGS: Final = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/completer-extension:manager": {"autoCompletion": False},
    "@jupyterlab/fileeditor-extension:plugin": {"editorConfig": {"autoClosingBrackets": False}},
    "@jupyterlab/notebook-extension:tracker": {"codeCellConfig": {"autoClosingBrackets": False}},
}

_UNUSED: Final = dict.fromkeys(
    [
        "@jupyterlab/apputils-extension:announcements",
        "@jupyterlab/debugger-extension",
        "@jupyterlab/extensionmanager-extension",
        "@jupyterlab/terminal-extension",
    ],
    True,
)
"""Not loaded: they take time, or ask for servers that do not run here."""
_READY: Final = """() => {
    const context = window.jupyterapp?.shell.currentWidget?.sessionContext
    const kernel = context?.session?.kernel
    return context?.isReady && kernel?.connectionStatus === "connected" && kernel.status === "idle"
}"""


def _missing() -> str:
    """What there is not, of what a browser test needs; "" if all is there."""
    if not Path(CHROMIUM).exists():
        return f"there is no {CHROMIUM}: apt-get install chromium"
    for module in ("playwright", "jupyterlab"):
        try:
            __import__(module)
        except ImportError:
            return f"{module} is not installed"
    return ""


MISSING: Final = _missing()
needs_a_browser = pytest.mark.skipif(bool(MISSING) and not REQUIRED, reason=MISSING or "all is there")


class Lab:
    """The server. Everything that it reads and writes is in one directory; it ends with `close`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = directory / "files"
        self.token = secrets.token_hex(16)
        settings = directory / "settings"
        for path in (self.files, settings, directory / "runtime"):
            path.mkdir()
        (directory / "overrides").mkdir()
        (directory / "overrides" / "overrides.json").write_text(json.dumps(_SETTINGS))
        (directory / "overrides" / "page_config.json").write_text(json.dumps({"disabledExtensions": _UNUSED}))
        env = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
        env |= {
            "HOME": str(directory),
            "IPYTHONDIR": str(directory / "ipython"),
            "JUPYTER_CONFIG_DIR": str(directory / "config"),
            "JUPYTER_DATA_DIR": str(directory / "data"),
            "JUPYTER_RUNTIME_DIR": str(directory / "runtime"),
            "JUPYTER_NO_CONFIG": "1",
        }
        self._log = (directory / "lab.log").open("wb")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--ServerApp.ip=127.0.0.1",
                "--ServerApp.port=0",
                "--ServerApp.allow_root=True",
                f"--ServerApp.root_dir={self.files}",
                f"--IdentityProvider.token={self.token}",
                "--LabApp.news_url=None",
                "--LabApp.expose_app_in_browser=True",
                f"--LabApp.user_settings_dir={settings}",
                f"--LabApp.workspaces_dir={directory / 'workspaces'}",
                f"--LabApp.app_settings_dir={directory / 'overrides'}",
                "--KernelSpecManager.ensure_native_kernel=True",
                "--Session.check_pid=False",
            ],
            env=env,
            cwd=directory,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self.url = ""

    @property
    def log(self) -> str:
        return (self.directory / "lab.log").read_text(errors="replace")

    def wait(self) -> None:
        """Until it answers."""
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            assert self._process.poll() is None, f"JupyterLab ended:\n{self.log}"
            found = re.search(r"http://127\.0\.0\.1:(\d+)/lab", self.log)
            if found and found.group(1) != "0":
                self.url = f"http://127.0.0.1:{found.group(1)}"
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{self.url}/api?token={self.token}", timeout=5).close()
                    return
            time.sleep(0.05)
        pytest.fail(f"JupyterLab did not start within {START_S} s:\n{self.log}")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def write(self, name: str, cells: list[str]) -> None:
        """Make a notebook of these cells."""
        notebook: dict[str, Any] = {
            "cells": [
                {
                    "cell_type": "code",
                    "id": f"cell-{n}",
                    "metadata": {},
                    "execution_count": None,
                    "outputs": [],
                    "source": source,
                }
                for n, source in enumerate(cells)
            ],
            "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        (self.files / name).write_text(json.dumps(notebook))


class Notebook:
    """An open notebook. Cells are counted from 0."""

    def __init__(self, page: Page, lab: Lab, name: str) -> None:
        self.page = page
        self.errors: list[str] = []
        """What the page said of errors in its console."""
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(f"{lab.url}/doc/tree/{name}?token={lab.token}")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=CELL_MS)
        page.wait_for_function(_READY, timeout=CELL_MS)
        self.errors.clear()  # JupyterLab's own, while it loads: it looks for servers that do not run here

    def cell(self, n: int) -> Locator:
        return self.page.locator(".jp-Notebook .jp-CodeCell").nth(n)

    def output(self, n: int) -> Locator:
        return self.cell(n).locator(".jp-OutputArea-output")

    def start(self, n: int) -> None:
        """Run the cell as a person does: click into it, Ctrl+Enter."""
        self.cell(n).locator(".jp-InputArea-editor").click()
        self.page.keyboard.press("Control+Enter")

    def wait(self, n: int) -> None:
        """Until the cell has been run."""
        done = self.cell(n).locator(".jp-InputArea-prompt", has_text=re.compile(r"\[\d+\]"))
        done.wait_for(timeout=CELL_MS)

    def run(self, n: int) -> None:
        self.start(n)
        self.wait(n)

    def dark(self) -> None:
        """Change to the dark theme."""
        self.page.evaluate(
            "() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"
        )
        self.page.locator('body[data-jp-theme-name="JupyterLab Dark"]').wait_for(state="attached")


# Not of the session: as long as Playwright is open its event loop runs, and no other can in this thread.
@pytest.fixture(scope="module", name="browser")
def open_browser() -> Iterator[Browser]:
    if MISSING:
        pytest.fail(f"BRIDGE_REQUIRE_BROWSER is set, but {MISSING}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", name="lab")
def open_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    try:
        lab.wait()
        yield lab
    finally:
        lab.close()
