"""The wheel: what `pip install` gives people."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    built = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (path,) = built.glob("bridge_kernel-*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_kernelspec_where_jupyter_looks_for_it(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("/data/share/jupyter/kernels/bridge/kernel.json"))
    spec = json.loads(wheel.read(name))
    assert spec["argv"][0] == "python", "jupyter_client puts the interpreter of its environment there"
    assert spec["interrupt_mode"] == "message"
    logos = {Path(n).name for n in wheel.namelist() if "/kernels/bridge/" in n}
    assert {"logo-32x32.png", "logo-64x64.png", "logo-svg.svg"} <= logos


def test_the_wheel_holds_both_packages_typed_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {"bridge_kernel/py.typed", "bridge_host/py.typed"} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.startswith("bridge_kernel-")} == {"bridge_kernel", "bridge_host"}


def test_the_wheel_makes_jupyter_bridge_a_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert "jupyter-bridge = bridge_host.cli:main" in wheel.read(name).decode()


def test_the_wheel_holds_the_dashboards_page(wheel: zipfile.ZipFile) -> None:
    static = "bridge_host/telemetry/page/static/"
    assert {f"{static}dashboard.js", f"{static}dashboard.css"} <= set(wheel.namelist())
