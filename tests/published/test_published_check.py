"""models --check: published weights, imported by their name, have the AP that transformers' own detections give them.

The set's objects are what the model of transformers finds above a score: detections computed as it computes them are
ranked exactly before all others, so the AP is 100.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub_folder import small_rt_detr_v2, write_hub_folder
from PIL import Image
from references import with_spread

from edgedetr import cli, published_check
from edgedetr.bundle import Bundle
from edgedetr.data.coco_classes import COCO
from edgedetr.published import published_detectors

SIDE, IMAGES, KEPT = 64, 6, 4  # pixels; images; objects of each
ROWS = published_detectors.published()


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return with_spread(small_rt_detr_v2(), 0.2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, model: torch.nn.Module) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_hub_folder(folder, "someone/small", model)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, model: torch.nn.Module) -> Path:
    """COCO layout, split val2017, with the model's best detections of each image as its objects."""
    root, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    (root / "val2017").mkdir()
    (root / "annotations").mkdir()
    images, annotations = [], []
    found = []
    for number in range(1, IMAGES + 1):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "val2017" / f"{number:012}.png")
        images.append({"id": number, "file_name": f"{number:012}.png", "height": SIDE, "width": SIDE})
        with torch.no_grad():
            out = model(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
        scores = out.logits[0].sigmoid()
        best = scores.flatten().topk(KEPT * 3)
        for score, place in zip(best.values.tolist(), best.indices.tolist()):
            query, label = divmod(place, 80)
            cx, cy, w, h = (float(value) * SIDE for value in out.pred_boxes[0, query].clamp(0, 1))
            found.append((score, number, label, [cx - w / 2, cy - h / 2, w, h]))
    ids = list(COCO)
    for _, number, label, box in sorted(found, reverse=True)[: IMAGES * KEPT]:
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": ids[label],
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
        )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in COCO.items()],
    }
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def row(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that puts a detector of this published AP into the table."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(ap: float, **changed: object) -> None:
        row = replace(ROWS["rtdetrv2-r34"], name="small", hub="someone/small", input=(SIDE, SIDE), revision="", ap=ap)
        rows = {**ROWS, "small": replace(row, **changed)}
        monkeypatch.setattr(published_detectors, "published", lambda: rows)

    return put


def test_weights_that_have_the_published_ap_pass(row, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row(ap=99.8)
    assert cli.run(["models", "--check", "small", "--data", str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ap"] == pytest.approx(100, abs=0.05) and found["published_ap"] == 99.8
    assert (found["within"], found["tolerance"], found["images"], found["split"]) == (True, 0.3, IMAGES, "val")


def test_weights_that_differ_from_the_published_ap_end_with_exit_code_3(
    row, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The detections of the check before are not computed again."""
    row(ap=99.5)
    monkeypatch.setattr(published_check, "detect_with_pytorch", lambda *_: {})
    monkeypatch.setattr(published_check, "evaluate", lambda *_, **__: SimpleNamespace(ap=99.9))
    assert cli.run(["models", "--check", "small", "--data", str(data), "--json"]) == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out)["within"] is False
    assert "AP 99.90 on 6 images, 99.5 as published; expected at most 0.3 between them" in printed.err


def test_a_published_name_is_imported_with_the_table_s_classes_and_pixels(row, tmp_path: Path) -> None:
    row(ap=1.0, normalize="imagenet")
    assert cli.run(["import", "small", "--out", str(tmp_path / "b")]) == 0
    manifest = Bundle.open(tmp_path / "b").manifest
    assert [item.name for item in manifest.classes] == list(COCO.values())
    assert (manifest.input.height, manifest.input.width, manifest.input.resize) == (SIDE, SIDE, "stretch")
    assert list(manifest.config["mean"]) == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--check", "smal"], "add --data DIR"),
        (["--check", "rtdetrv2-r8", "--data", "."], "did you mean 'rtdetrv2-r18'"),
        (["--split", "val"], "are for --check NAME"),
    ],
)
def test_a_check_that_lacks_something_is_wrong_usage(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["models", *words]) == 2
    assert message in capsys.readouterr().err
