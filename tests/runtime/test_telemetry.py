"""No library that we load reports to its maker: no host is looked up, no socket opened, nothing kept in the home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgedetr import telemetry

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
SOURCE = Path(__file__).resolve().parents[1] / "network_log.c"
# Variables by which OpenVINO knows a CI, where it reports nothing, and ours.
OF_CI = ("CI", "TF_BUILD", "JENKINS_URL", "GITHUB_ACTIONS", "TRAVIS", telemetry.VARIABLE, *telemetry.SWITCHES)

EVERYTHING = """
import sys
import numpy as np
from edgedetr import runtime
from edgedetr.cli import run
image = np.zeros((32, 48, 3), np.uint8)
for backend in ("onnxruntime", "openvino"):
    runtime.load(sys.argv[1], backend=backend, stage="onnx")([image])
from PIL import Image
Image.fromarray(image).save(sys.argv[1] + "/image.png")
for backend in ("onnxruntime", "openvino"):
    assert run(["predict", sys.argv[1], sys.argv[1] + "/image.png", "--backend", backend, "--stage", "onnx"]) == 0
assert run(["verify", sys.argv[2], "--data", sys.argv[3]]) in (0, 3)
"""


@pytest.fixture(scope="module")
def watcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler on Linux, to watch the network below Python")
    library = tmp_path_factory.mktemp("watch") / "network_log.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


def watched(watcher: Path, folder: Path, *arguments: str, **variables: str) -> tuple[str, list[str]]:
    """What a child process did on the network, and the files it left in an empty home."""
    home, log = folder / "home", folder / "network.txt"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in OF_CI and "XDG" not in name}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**environment, "HOME": str(home), "LD_PRELOAD": str(watcher), "NETWORK_LOG": str(log), **variables},
    )
    assert done.returncode == 0, done.stderr
    return (
        log.read_text() if log.exists() else "",
        sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()),
    )


def test_load_predict_and_verify_look_up_no_host_and_leave_nothing_in_the_home(watcher, tmp_path, make_bundle):
    own, trained = make_bundle("model.onnx").path, tmp_path / "trained.bundle"
    shutil.copytree(FIXTURES / "bundle-0.1", trained)
    paths = (str(own), str(trained), str(FIXTURES / "scenes-0.1"))
    assert watched(watcher, tmp_path, "-c", EVERYTHING, *paths) == ("", [])


def test_the_watcher_sees_what_it_is_there_to_see(watcher, tmp_path):
    look = """import socket
for host in ("report.invalid", ""):
    try: socket.create_connection((host, 443))
    except OSError: pass
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect_ex(("192.0.2.1", 443))
"""
    network, _ = watched(watcher, tmp_path, "-c", look)
    assert "look-up report.invalid" in network and "192.0.2.1" in network


def test_the_variable_lets_the_libraries_report(watcher, tmp_path):
    pytest.importorskip("openvino_telemetry")
    network, kept = watched(
        watcher,
        tmp_path,
        "-c",
        "from edgedetr.runtime.backends import openvino; openvino._core()",
        **{telemetry.VARIABLE: "1"},
    )
    assert "look-up" in network and kept


def test_importing_the_package_sets_the_variables_before_a_library_can_be_imported():
    code = "import os, edgedetr; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    clean = {name: value for name, value in os.environ.items() if name not in OF_CI}
    for variables, expected in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**clean, **variables}
        )
        assert done.stdout.strip() == expected
    done = subprocess.run(
        [sys.executable, "-c", "import os, edgedetr; print('ORT_DISABLE_TELEMETRY' in os.environ)"],
        capture_output=True,
        text=True,
        check=True,
        env={**clean, telemetry.VARIABLE: "1"},
    )
    assert done.stdout.strip() == "False"


def test_inference_libraries_are_imported_by_name_in_no_module():
    package = Path(telemetry.__file__).parent
    words = ("import openvino", "from openvino", "import onnxruntime", "from onnxruntime")
    found = {
        path.name
        for path in package.rglob("*.py")
        if any(line.strip().startswith(words) for line in path.read_text(encoding="utf-8").splitlines())
    }
    assert found == set()


def test_what_was_imported_before_is_found_again_after_openvino_came(monkeypatch):
    before = object()
    monkeypatch.setitem(sys.modules, telemetry.OPENVINO_REPORTS, before)
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    seen = []
    monkeypatch.setattr(
        telemetry.importlib, "import_module", lambda name: seen.append((name, sys.modules[telemetry.OPENVINO_REPORTS]))
    )
    monkeypatch.delenv(telemetry.VARIABLE, raising=False)
    telemetry.import_openvino()
    assert seen == [("openvino", None)] and sys.modules[telemetry.OPENVINO_REPORTS] is before


def test_nncf_is_imported_without_the_telemetry_package_of_openvino(monkeypatch):
    monkeypatch.delitem(sys.modules, "nncf", raising=False)
    monkeypatch.delenv(telemetry.VARIABLE, raising=False)
    seen = []
    monkeypatch.setattr(
        telemetry.importlib, "import_module", lambda name: seen.append((name, sys.modules[telemetry.OPENVINO_REPORTS]))
    )
    telemetry.import_nncf()
    assert seen == [("nncf", None)]
