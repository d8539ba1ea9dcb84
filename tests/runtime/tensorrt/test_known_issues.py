"""The list of versions that go wrong is complete, and each entry matches exactly its versions."""

from __future__ import annotations

import json

import pytest

from edgedetr.runtime.onnx_bytes import OnnxFacts
from edgedetr.runtime.tensorrt import known_issues
from edgedetr.runtime.tensorrt.engine_metadata import BuildArguments
from edgedetr.runtime.tensorrt.gpu import version


def issues(
    tensorrt: str,
    *,
    sm: int = 87,
    operators: tuple[str, ...] = ("Conv",),
    opset: int = 19,
    precision: str = "int8",
    batch: tuple[int, int, int] = (1, 1, 1),
) -> set[str]:
    facts = OnnxFacts(opset, {}, {}, frozenset(operators), ())
    arguments = BuildArguments(precision, batch, 1024, 3, "auto")
    return {entry.id for entry in known_issues.affecting(facts, tensorrt, sm, arguments) if not entry.on_failure}


@pytest.mark.parametrize(
    "tensorrt, concerned",
    [
        ("10.3.0", False),
        ("10.13.3.9", False),
        ("10.14.1.48", True),
        ("10.16.2.10", False),
        ("11.0.0.114", True),
        ("11.1.0.106", True),
        ("11.2.1", False),
        ("11.4.0.106", False),
    ],
)
def test_grid_sample_is_warned_about_in_the_versions_that_miscompile_it(tensorrt, concerned):
    assert ("gridsample-miscompiled" in issues(tensorrt, operators=("Conv", "GridSample"))) is concerned
    assert "gridsample-miscompiled" not in issues(tensorrt)  # sampling by gather has no GridSample


@pytest.mark.parametrize(
    "tensorrt, opset, refused",
    [("10.3.0", 20, True), ("10.16.2.10", 20, True), ("11.4.0", 20, False), ("10.3.0", 19, False)],
)
def test_grid_sample_of_opset_20_is_refused_where_it_would_be_read_as_nearest(tensorrt, opset, refused):
    facts = OnnxFacts(opset, {}, {}, frozenset({"GridSample"}), ())
    arguments = BuildArguments("fp16", (1, 1, 1), 1024, 3, "auto")
    assert any(entry.refuse for entry in known_issues.affecting(facts, tensorrt, 87, arguments)) is refused


@pytest.mark.parametrize(
    "words, expected",
    [
        ({"tensorrt": "10.2.0", "operators": ("GridSample",)}, {"gridsample-slow"}),
        (
            {"tensorrt": "10.13.3.9", "operators": ("GridSample",), "batch": (1, 8, 16), "sm": 110},
            {"gridsample-dynamic"},
        ),
        ({"tensorrt": "10.13.3.9", "operators": ("GridSample",), "batch": (8, 8, 8), "sm": 110}, set()),
        ({"tensorrt": "10.16.1.11", "operators": ("Softmax",), "sm": 120}, {"half-attention-sm120"}),
        ({"tensorrt": "10.16.1.11", "operators": ("Softmax",), "sm": 120, "precision": "fp32"}, set()),
        ({"tensorrt": "11.1.0", "operators": ("Softmax",), "batch": (4, 4, 4)}, {"batch-rows-differ"}),
        ({"tensorrt": "10.11.0", "operators": ("Softmax",), "batch": (1, 1, 4)}, {"batch-rows-differ"}),
        ({"tensorrt": "10.11.0", "operators": ("Softmax",)}, set()),
        ({"tensorrt": "10.7.0.23"}, {"wheel-without-sm87"}),
        ({"tensorrt": "10.7.0.23", "sm": 89}, set()),
        # Our own graphs on JetPack 6 and 7.2.
        ({"tensorrt": "10.3.0", "operators": ("Conv", "Softmax"), "batch": (4, 4, 4)}, set()),
        ({"tensorrt": "10.16.2.10", "operators": ("Conv", "Softmax"), "batch": (4, 4, 4)}, set()),
    ],
)
def test_an_entry_concerns_its_version_device_precision_and_batch(words, expected):
    assert issues(**words) == expected


def test_the_list_is_whole():
    entries = known_issues.all_issues()
    assert len({entry.id for entry in entries}) == len(entries) == len(json.loads(known_issues.DATA.read_text()))
    for entry in entries:
        assert entry.source.startswith("https://") and entry.text and entry.fix and entry.source in str(entry)
        for first, before in entry.tensorrt:
            assert version(first) < version(before)


@pytest.mark.parametrize(
    "text, expected",
    [("10.16.1.11", (10, 16, 1, 11)), ("10.3.0", (10, 3, 0)), ("11.0.0a1", (11, 0)), ("", ()), ("dev", ())],
)
def test_versions_are_compared_as_numbers(text, expected):
    assert version(text) == expected
