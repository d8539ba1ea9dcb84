"""What is read about a board, from files laid out as on an Orin Nano with JetPack 6."""

from __future__ import annotations

import json

import fake_cuda
import fake_tensorrt
import pytest

from edgedetr import cli, doctor
from edgedetr.doctor import examine
from edgedetr.runtime import jetson
from edgedetr.runtime.jetson import Clock

FILES = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "etc/nvpmodel.conf": (
        "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=25W >\n"
        "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG DEFAULT=1 >\n"
    ),
    "var/lib/nvpmodel/status": "pmode:0000",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "624750000\n",
    "sys/class/devfreq/15340000.vic/cur_freq": "1\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "729600\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "729600\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1510400\n",
    "proc/meminfo": "MemTotal:        7802440 kB\nMemFree:          101 kB\nMemAvailable:    5120000 kB\n",
    "sys/class/thermal/thermal_zone0/temp": "47500\n",
    "sys/class/thermal/thermal_zone1/temp": "51250\n",
    "sys/class/thermal/thermal_zone2/temp": "-256000\n",
}


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        write(tmp_path, name, text)
    return tmp_path


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_everything_is_read(root):
    found = jetson.read(root)
    assert (found.model, found.release) == (FILES["proc/device-tree/model"].rstrip("\0"), "36.4.3")
    assert (found.jetpack, found.power_mode) == ("6.1 or 6.2", "15W (0)")
    assert (found.gpu, found.cpu) == (Clock(306, 306, 625), Clock(730, 730, 1510))
    assert found.memory == (7802440 * 1024, 5120000 * 1024)
    assert found.celsius == 51.25
    assert found.conditions() == (
        "power mode 15W (0), GPU 306..625 MHz, CPU 730..1510 MHz, 51 C, clocks follow the load"
    )


def test_advice_is_about_what_makes_latencies_meaningless(root):
    said = "\n".join(jetson.read(root).advice())
    assert "sudo jetson_clocks" in said and "sudo nvpmodel -m ID" in said and "swap" not in said
    write(root, "sys/class/devfreq/17000000.gpu/min_freq", "624750000")
    write(root, "var/lib/nvpmodel/status", "pmode:0002 fmode:quiet")
    fixed = jetson.read(root)
    assert fixed.power_mode == "MAXN_SUPER (2)" and fixed.advice() == []
    assert fixed.conditions().endswith("GPU 625 MHz, CPU 730..1510 MHz, 51 C, clocks fixed")
    write(root, "proc/meminfo", "MemTotal: 7802440 kB\nMemAvailable: 204800 kB\n")
    write(root, "sys/class/thermal/thermal_zone1/temp", "91000")
    said = "\n".join(jetson.read(root).advice())
    assert "only 0.2 GB of memory are free" in said and "add swap" in said and "91 C" in said


@pytest.mark.parametrize(
    "release, jetpack",
    [
        ("R35 (release), REVISION: 4.1", "5"),
        ("R36 (release), REVISION: 3.0", "6.0"),
        ("R38 (release), REVISION: 2.0", "7.0"),
        ("R39 (release), REVISION: 2.0", "7.2"),
        ("R47 (release), REVISION: 1.0", ""),
    ],
)
def test_the_release_names_the_jetpack(root, release, jetpack):
    write(root, "etc/nv_tegra_release", f"# {release}, GCID: 1")
    assert jetson.read(root).jetpack == jetpack


def test_without_a_status_the_default_mode_counts_and_an_unknown_number_has_no_name(root):
    (root / "var/lib/nvpmodel/status").unlink()
    assert jetson.read(root).power_mode == "25W (1)"
    write(root, "var/lib/nvpmodel/status", "pmode:0007")
    assert jetson.read(root).power_mode == "mode (7)"


def test_another_machine_has_no_board_and_gets_no_advice(tmp_path):
    nothing = jetson.read(tmp_path)
    assert not nothing.is_jetson and nothing.rows() == nothing.advice() == [] and nothing.conditions() == ""
    assert nothing.clocks_fixed is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"\xff\xfe nonsense \x00", None])
def test_unusual_or_missing_files_never_stop_it(root, name, content):
    (root / name).unlink()
    if content is not None:
        (root / name).write_bytes(content)
    found = jetson.read(root)
    found.rows(), found.advice(), found.conditions()
    assert found.is_jetson == (name != "etc/nv_tegra_release")


@pytest.fixture
def on_board(root, monkeypatch):
    """doctor on this board, with no package for training."""
    monkeypatch.setattr(doctor, "examine", lambda: examine(root))
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("torch", "onnx") else version(name))


def test_doctor_says_what_a_board_lacks_and_the_command(on_board, capsys):
    assert cli.run(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    assert "6.1 or 6.2 (Jetson Linux 36.4.3)" in captured.err and "15W (0)" in captured.err
    assert "306 MHz, follows the load, 306 to 625 MHz" in captured.err
    assert "no NVIDIA driver" in captured.err and "sudo apt install nvidia-jetpack" in captured.err
    assert "sudo apt install python3-libnvinfer" in captured.err
    assert "pip install torch" not in captured.err.partition("everything that running and verifying need is here")[2]
    printed = json.loads(captured.out)
    assert printed["board"]["gpu"] == {"now": 306, "least": 306, "most": 625}
    assert printed["gpu"]["device"] is None and "libcuda" in printed["gpu"]["no_device"]


def test_doctor_on_a_board_that_is_ready(on_board, monkeypatch, bindings, capsys):
    fake = fake_cuda.install(monkeypatch)
    fake.device(integrated=True)
    fake_tensorrt.install(monkeypatch, bindings.module("10.3.0"), fake)
    assert cli.run(["doctor"]) == 0
    said = capsys.readouterr().err
    assert "Orin (sm_87), 8.0 GiB shared with the CPU" in said and "12.6; the driver runs up to 12.6" in said
    assert "check TensorRT with: edgedetr selftest" in said and "nvidia-jetpack" not in said


@pytest.mark.parametrize(
    "text, expected",
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64", "R36.4.3"),
        ("# R39 (release), REVISION: 2.0, GCID: 1", "R39.2.0"),
        ("something else", ""),
    ],
)
def test_the_release_of_jetson_linux_is_read(tmp_path, text, expected):
    path = tmp_path / "etc" / "nv_tegra_release"
    path.parent.mkdir()
    path.write_text(text)
    assert jetson.linux_release(tmp_path) == expected
    path.unlink()
    assert jetson.linux_release(tmp_path) == ""
