"""The page shows what `edgedetr sensitivity` and a search under a budget found; what it cannot read it names."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from edgedetr.bundle import Bundle
from edgedetr.cli import app
from edgedetr.errors import BundleError
from edgedetr.quantization.placement import Placement
from edgedetr.quantization.search.costs import Costs, GroupCost
from edgedetr.quantization.search.front import Edge
from edgedetr.quantization.search.search_report import Candidate, SearchReport
from edgedetr.quantization.search.sequential import LookResult
from edgedetr.quantization.sensitivity import Sensitive, SensitivityResult
from edgedetr.reporting.markdown import markdown_table, search_table
from edgedetr.reporting.quantization_results import read_search, read_sensitivity
from edgedetr.reporting.report import write_report

HOSTILE = "</svg><script>alert(1)</script>"

SENSITIVITY = SensitivityResult(
    (
        Sensitive("/detector/decoder/boxes/MatMul", "decoder", "linear", "box_head", "no", 1000, 0.4, 0.02),
        Sensitive(f"/detector/{HOSTILE}/Conv", "backbone", "conv", "", "yes", 90000, 0.1, 0.01),
    ),
    "layer",
    16,
    ("val",),
    0.93,
    1e-6,
    9.5,
    32.0,
)
COSTS = Costs(
    "onnxruntime", "measured", True, {"a": GroupCost(2.0, 1.0, 0.1), "b": GroupCost(1.0, 0.9, 0.1)},
    (Edge("a", "b", 0.05),), 20.0, 17.0,
)  # fmt: skip
SEARCH = SearchReport(
    "onnxruntime",
    0.5,
    {"search": 40, "verify": 70, "bench": 8},
    "0" * 64,
    61.2,
    COSTS,
    {"a": 0.1, "b": 0.2},
    0.8,
    (
        Candidate("front 1", Placement(("a",)), -1.0, 0.1, 0.11, 0.2, 20.0, 12.0, 0.1),
        Candidate("front 2", Placement(("a", "b")), -1.2, 0.3, 0.35, 1.9, 20.0, 11.0, 0.1),
        Candidate(HOSTILE, Placement(("b",)), -0.1, 0.2, 0.2, 0.1, 20.0, 20.5, 0.1),
    ),
    ("front 1", "front 2"),
    (
        LookResult(0, 70, 0.025, 0.15, 0.1, 0.41, -0.05, "accepted"),
        LookResult(1, 70, 0.025, 1.7, 0.3, 2.3, 1.2, "rejected"),
    ),
    0.41,
    "accepted",
    "front 1",
)


def with_results(root: Path, verified: Any, **texts: str) -> Bundle:
    """A copy of the verified bundle, with files under results/."""
    shutil.copytree(verified.bundle.path, root / "b.bundle")
    bundle = Bundle.open(root / "b.bundle")
    for name, text in texts.items():
        with bundle.add(f"results/{name}.json", stage=name) as path:
            path.write_text(text)
    return bundle


def sensitivity_json(**changed: object) -> str:
    return json.dumps(
        {"schema": 1, "key": "k", "ranges": {}, "distances": {}, "result": asdict(SENSITIVITY), **changed}
    )


def search_json(**changed: object) -> str:
    return json.dumps({**SEARCH.to_json(), **changed})


def test_what_was_written_is_read_as_it_was(tmp_path: Path, verified: Any) -> None:
    bundle = with_results(tmp_path, verified, sensitivity=sensitivity_json(), search=search_json())
    assert read_sensitivity(bundle) == SENSITIVITY
    assert read_search(bundle) == SEARCH


def test_the_page_shows_the_search_and_the_sensitivity(tmp_path: Path, verified: Any) -> None:
    bundle = with_results(tmp_path, verified, sensitivity=sensitivity_json(), search=search_json())
    page = write_report(bundle).path.read_text(encoding="utf-8")
    assert "<script" not in page
    for label in ("Latency against AP lost of each placement", "What INT8 in each group of layers alone does"):
        assert f'aria-label="{label}' in page
    assert "loses at most 0.5 points" in page and SEARCH.sentence() in page.replace("&#39;", "'")
    for ratio in ("0.60", "0.55", "1.02"):  # 12.0, 11.0 and 20.5 of 20 ms
        assert f">{ratio}</td>" in page
    assert "mean over 16 images of val" in page and "two halves of the images: 0.93." in page
    assert "budget 0.5" in page and "decoder/boxes" in page


def test_without_them_the_page_has_no_such_section(verified: Any) -> None:
    page = write_report(verified.bundle).path.read_text(encoding="utf-8")
    assert "Search for the fastest" not in page and "sensitive to INT8" not in page


def test_a_measurement_that_was_interrupted_is_not_shown(tmp_path: Path, verified: Any) -> None:
    bundle = with_results(tmp_path, verified, sensitivity=sensitivity_json(result=None))
    assert read_sensitivity(bundle) is None
    assert "sensitive to INT8" not in write_report(bundle).path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        search_json(schema=2),
        search_json(candidates=[]),
        search_json(candidates=[{"name": "front 1"}]),
        search_json(order=["front 1", "front 9"]),
        search_json(looks=[]),
        search_json(looks=[{**asdict(SEARCH.looks[0]), "candidate": -1}]),
        search_json(accepted="front 3"),
        search_json(outcome="none", looks=[]),
        search_json(outcome="float", candidates=[], order=[], looks=[]),
        search_json(budget="0.5"[:0]),
        search_json().replace("0.41", "NaN"),
    ],
)
def test_a_damaged_search_is_named_and_the_page_is_written(tmp_path: Path, verified: Any, text: str) -> None:
    bundle = with_results(tmp_path, verified, search=text, sensitivity=sensitivity_json())
    with pytest.raises(BundleError, match=r"search\.json"):
        read_search(bundle)
    page = write_report(bundle).path.read_text(encoding="utf-8")
    assert "search.json" in page and "so it is not shown" in page
    assert "Search for the fastest" not in page and "sensitive to INT8" in page


def test_results_of_an_older_graph_are_named_with_the_command(tmp_path: Path, verified: Any) -> None:
    bundle = with_results(tmp_path, verified)
    with bundle.add("model.onnx", stage="export") as path:
        path.write_bytes(b"graph")
    with bundle.add("results/sensitivity.json", stage="sensitivity", made_from=["model.onnx"]) as path:
        path.write_text(sensitivity_json())
    assert read_sensitivity(bundle) == SENSITIVITY
    with bundle.add("model.onnx", stage="export") as path:
        path.write_bytes(b"another graph")
    page = write_report(bundle).path.read_text(encoding="utf-8")
    assert "results/sensitivity.json" in page and "edgedetr sensitivity" in page


def test_the_table_has_a_row_for_each_search_with_its_figures(tmp_path: Path, verified: Any) -> None:
    bundle = with_results(tmp_path, verified, search=search_json())
    head, _, row = search_table([bundle, verified.bundle]).splitlines()
    assert head.count("|") == row.count("|") == 11
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # 12 of 20 ms; on 70 images 0.15 points lost, 0.41 at most, which is the smallest budget these images certify.
    assert cells == ["b", "onnxruntime", "0.5", "front 1", "1", "0.15 (0.41)", "70", "12.00", "0.60", "0.41"]
    assert search_table([verified.bundle]) == ""


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"outcome": "none", "accepted": ""}, ["none is certified", *[""] * 5, "0.41"]),
        ({"outcome": "open", "accepted": ""}, ["not ended", *[""] * 5, "0.41"]),
        ({"outcome": "float", "accepted": "", "looks": [], "order": [], "certifiable": None},
         ["none is faster", *[""] * 6]),
    ],
)  # fmt: skip
def test_a_search_that_accepts_nothing_says_why(
    tmp_path: Path, verified: Any, changed: dict[str, Any], expected: list[str]
) -> None:
    table = search_table([with_results(tmp_path, verified, search=search_json(**changed))])
    assert [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")][3:] == expected


def test_a_latency_from_a_model_is_said_to_be_predicted(tmp_path: Path, verified: Any) -> None:
    accepted = {**asdict(SEARCH.candidates[0]), "float_ms": 0.0, "int8_ms": -1.0}
    table = search_table(
        [
            with_results(
                tmp_path,
                verified,
                search=search_json(candidates=[accepted], order=["front 1"], looks=[asdict(SEARCH.looks[0])]),
            )
        ]
    )
    assert "| 70 |  | 0.95 predicted |" in table  # 1 of the float graph's 20 is saved


def test_the_command_prints_both_tables(tmp_path: Path, verified: Any, capsys: Any) -> None:
    bundle = with_results(tmp_path, verified, search=search_json())
    assert app.run(["report", str(bundle.path), "--table"]) == 0
    assert capsys.readouterr().out == f"{markdown_table([bundle])}\n{search_table([bundle])}"
