"""The 8-bit dot product is found by its flag and not guessed."""

from __future__ import annotations

from functools import lru_cache

import pytest

from edgedetr.runtime import cpu


@pytest.fixture(autouse=True)
def fresh():
    for function in (cpu.fields, cpu.int8_dot_product, cpu.mkl_is_narrow, cpu.tiles_bfloat16):
        function.cache_clear()
    yield
    for function in (cpu.fields, cpu.int8_dot_product, cpu.mkl_is_narrow, cpu.tiles_bfloat16):
        function.cache_clear()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("flags\t\t: fpu sse2 avx2 avx512_vnni avx512_bf16\n", "avx512_vnni"),
        ("flags\t\t: fpu avx2 avx_vnni\n", "avx_vnni"),
        ("flags\t\t: fpu avx2 avx_vnni amx_int8 avx512_vnni\n", "amx_int8"),
        ("Features\t: fp asimd asimddp\n", "asimddp"),  # Jetson Orin's Cortex-A78AE
        ("flags\t\t: fpu sse2 avx2\nmodel name: avx512_vnnish\n", None),
        ("", None),
    ],
)
def test_flags_of_cpuinfo(tmp_path, monkeypatch, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu.int8_dot_product() == expected


@pytest.mark.parametrize(
    "machine, instruction, expected",
    [
        ("x86_64", None, True),
        ("AMD64", None, True),
        ("x86_64", "avx_vnni", False),
        ("aarch64", None, False),  # without the instruction Arm widens to 16 bits before it adds: slow, and exact
    ],
)
def test_only_x86_without_the_instruction_saturates(monkeypatch, machine, instruction, expected):
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(cpu, "int8_dot_product", lru_cache(lambda: instruction))
    assert cpu.int8_saturates() is expected


@pytest.mark.parametrize("machine, expected", [("arm64", "asimddp"), ("x86_64", None)])
def test_without_cpuinfo_only_apple_silicon_is_known(tmp_path, monkeypatch, machine, expected):
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "missing")
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    assert cpu.int8_dot_product() == expected


def test_doctor_shows_the_instructions_and_the_name_of_the_processor(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(processor("GenuineIntel", 6, "fpu avx2 avx512_vnni sse2"))
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu.instructions() == ("avx2", "avx512_vnni") and cpu.model_name() == "x"


def test_there_is_at_least_one_core():
    assert cpu.cores() >= 1


def processor(vendor: str, family: int, flags: str) -> str:
    """One of two cores; the second has other flags, which must be ignored."""
    return (
        f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel name\t: x\nflags\t\t: {flags}\n\n"
        "processor\t: 1\nvendor_id\t: Other\ncpu family\t: 1\nflags\t\t: fpu\n"
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        (processor("AuthenticAMD", 26, "fpu avx2 avx512f"), True),  # Zen 5
        (processor("AuthenticAMD", 26, "fpu avx2 avx512_bf16"), False),  # hidden by a virtual machine
        (processor("AuthenticAMD", 25, "fpu avx2 avx512f"), False),  # Zen 4: two halves, as MKL does
        (processor("GenuineIntel", 26, "fpu avx2 avx512f"), False),
        ("Features\t: fp asimd asimddp\n", False),
        ("cpu family\t: ?\nvendor_id: AuthenticAMD\n", False),
        ("", False),
    ],
)
def test_mkl_is_narrow_on_zen_5_alone(tmp_path, monkeypatch, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu.mkl_is_narrow() is expected


def test_without_cpuinfo_mkl_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "none")
    assert cpu.mkl_is_narrow() is False


@pytest.mark.parametrize(
    "text, expected",
    [
        (processor("GenuineIntel", 6, "fpu avx512f avx512_bf16 amx_bf16 amx_tile amx_int8"), True),  # Sapphire Rapids
        (processor("GenuineIntel", 6, "fpu avx512f amx_tile amx_int8"), False),  # hidden in part
        (processor("AuthenticAMD", 26, "fpu avx512f avx512_bf16"), False),
        ("", False),
        (None, False),
    ],
)
def test_bfloat16_is_tiled_where_the_flag_says_so(tmp_path, monkeypatch, text, expected):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu.tiles_bfloat16() is expected
