"""The verdicts of several bundles as one Markdown table, with other quantizers beside ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgedetr import cli
from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract
from edgedetr.errors import BundleError
from edgedetr.evaluation.verdict import ArtifactVerdict, Verdict, write_verdict
from edgedetr.reporting.markdown import markdown_table


def row(name: str, backend: str, drop: float, ms: float | None, quantizer: str = "") -> ArtifactVerdict:
    return ArtifactVerdict(
        name,
        backend,
        passed=True,
        ap=60 - drop,
        ap50=80,
        drop=drop,
        drop_upper95=drop + 0.25,
        p50_ms=ms,
        size_mb=None if ms is None else 4.04,
        images=800,
        quantizer=quantizer,
    )


ROWS = (
    row("torch", "pytorch", 0, None),
    row("onnx", "onnxruntime", 0, 10),
    row("int8", "onnxruntime", 0.3, None),
    row("int8", "openvino", 0.31, 5),
    row("int8-cpu", "onnxruntime", 0.1, 4),
    row("int8-nncf", "onnxruntime", 0.08, 6, "nncf"),
    row("int8-nncf", "openvino", 0.2, 4.5, "nncf"),
    row("int8-modelopt", "onnxruntime", 0.5, 3.5, "modelopt"),
    row("int8-modelopt", "openvino", 60, None, "modelopt"),
    row("int8-onnxruntime", "onnxruntime", 0.1, 4, "onnxruntime"),
)


def bundle_with(path: Path, rows: tuple[ArtifactVerdict, ...] = ROWS) -> Bundle:
    classes = (ClassInfo(0, 1, "cat"),)
    bundle = Bundle.create(path, Manifest("rt_detr", classes, InputContract(480, 640), OutputContract()))
    write_verdict(bundle, "results/verify.json", Verdict(True, 1.0, 0.6, rows), made_from=())
    return bundle


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return bundle_with(tmp_path_factory.mktemp("markdown") / "cells.bundle")


def test_every_row_has_its_drop_with_bound_its_time_and_its_share_of_float32(bundle):
    table = cells(markdown_table([bundle]))
    assert table[2][:5] == ["cells", "rt_detr, 640 x 480 px, 800 images", "torch", "pytorch", "60.0"]
    found = {(line[2], line[3]): line[4:] for line in table[2:]}
    assert found["onnx", "onnxruntime"][1:4] == ["0.00 (0.25)", "10.0", ""]
    assert found["int8", "onnxruntime"][1:4] == ["0.30 (0.55)", "", ""]  # a simulation, which is not timed
    assert found["int8-cpu", "onnxruntime"] == ["59.9", "0.10 (0.35)", "4.0", "0.40", "4.0", ""]
    assert found["int8", "openvino"][2:4] == ["5.0", "0.50 (ONNX Runtime's)"]


def test_where_another_quantizer_is_better_it_says_so(bundle):
    words = {(line[2], line[3]): line[-1] for line in cells(markdown_table([bundle]))[2:]}
    assert {key: said for key, said in words.items() if said} == {
        ("int8-nncf", "onnxruntime"): "better: drop",
        ("int8-nncf", "openvino"): "better: drop, time",
        ("int8-modelopt", "onnxruntime"): "better: time",
        ("int8-modelopt", "openvino"): "does not run",
        ("int8-onnxruntime", "onnxruntime"): "no better",
    }


def test_another_quantizer_is_compared_with_the_faster_of_our_two_graphs_for_a_backend(tmp_path):
    """OpenVINO runs both: 0.31 points and 5 ms, or 0.05 points and 4.4 ms; NNCF loses 0.2 points in 4.5 ms."""
    both = bundle_with(tmp_path / "b.bundle", (*ROWS, row("int8-cpu", "openvino", 0.05, 4.4)))
    found = {(line[2], line[3]): line[-1] for line in cells(markdown_table([both]))[2:]}
    assert found["int8-nncf", "openvino"] == "no better"


def test_times_that_were_measured_apart_replace_those_of_the_verdict(bundle):
    apart = {("onnx", "openvino"): 8.0, ("int8", "openvino"): 2.0, ("int8-nncf", "openvino"): 3.0}
    found = {(line[2], line[3]): line[6:8] + line[-1:] for line in cells(markdown_table([bundle], [apart]))[2:]}
    assert found["int8", "openvino"] == ["2.0", "0.25", ""]
    assert found["int8-nncf", "openvino"] == ["3.0", "0.38", "better: drop"]
    assert found["int8-cpu", "onnxruntime"][0] == ""


def test_the_command_prints_one_table_of_several_bundles(bundle, tmp_path, capsys):
    other = bundle_with(tmp_path / "a|b.bundle", (replace(ROWS[0], ap=41.0), *ROWS[1:]))
    assert cli.app.run(["report", str(bundle.path), str(other.path), "--table"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 + 2 * len(ROWS)
    assert lines[2 + len(ROWS)].startswith(r"| a\|b | rt_detr, 640 x 480 px, 800 images | torch | pytorch | 41.0 |")


@pytest.mark.parametrize("words", [["--table", "--open"], ["--table", "--data", "."], ["again"]])
def test_what_makes_no_sense_together_is_refused(words, bundle, capsys):
    words = [str(bundle.path) if word == "again" else word for word in words]
    assert cli.app.run(["report", str(bundle.path), *words]) == 2
    assert "--table" in capsys.readouterr().err


def test_a_bundle_that_was_not_verified_names_the_command(tmp_path):
    bundle = Bundle.create(
        tmp_path / "new.bundle", Manifest("rt_detr", (ClassInfo(0, 1, "cat"),), InputContract(8, 8), OutputContract())
    )
    with pytest.raises(BundleError, match="run: edgedetr verify"):
        markdown_table([bundle])
