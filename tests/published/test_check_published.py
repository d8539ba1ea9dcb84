"""The weekly comparison with transformers holds on files that the test makes, and notices other weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import check_published
import pytest
import torch
from hub_folder import small_rt_detr_v2, write_hub_folder
from references import with_spread

from edgedetr.data.synthetic import render
from edgedetr.published import published_detectors

ROWS = published_detectors.published()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    constants = pytest.importorskip("huggingface_hub.constants")
    write_hub_folder(tmp_path / "hub", "someone/small", with_spread(small_rt_detr_v2()))
    row = replace(ROWS["rtdetrv2-r34"], name="small", hub="someone/small", input=(64, 64), revision="", params=0.1)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(published_detectors, "published", lambda: {"small": row})
    monkeypatch.setattr(check_published, "published", lambda: {"small": row})
    return tmp_path / "hub"


def test_an_imported_detector_finds_what_transformers_finds(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Export and INT8 are the script's own; so is the comparison, which must fail for other weights."""
    monkeypatch.setattr(
        check_published, "render", lambda path, **_: render(path, train=8, val=1, verify=2, size=64, seed=1)
    )
    monkeypatch.setattr(check_published, "CALIBRATION", 8)
    compared = []
    original = check_published.transformers_detections

    def again(folder, bundle, images):
        compared.append((bundle, original(folder, bundle, images)))
        return compared[-1][1]

    monkeypatch.setattr(check_published, "transformers_detections", again)
    assert check_published.main([]) == 0
    assert "1 of 1 held" in capsys.readouterr().out
    ((_, found),) = compared
    assert sum(len(check_published.best(one)) for one in found) >= 10
    shifted = [replace(one, xyxy=one.xyxy + 2) for one in found]  # 2 of 64 pixels
    assert all(check_published.count_lost(one, two, (64, 64)) for one, two in zip(found, shifted))
    fainter = [replace(one, confidence=one.confidence * 0.9 - 0.01) for one in found]
    assert all(check_published.count_lost(one, two, (64, 64)) for one, two in zip(found, fainter))


def test_a_detector_that_does_not_come_is_named_and_the_others_are_checked(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = check_published.Result("small", True, 0, 5)
    real = check_published.check
    monkeypatch.setattr(check_published, "render", lambda path, **_: path)
    monkeypatch.setattr(check_published, "check", lambda name, *rest: held if name == "small" else real(name, *rest))
    assert check_published.main(["none-of-them", "small"]) == 1
    printed = capsys.readouterr().out
    assert "no published detector 'none-of-them'" in printed and "small: 5 of 5 detections" in printed
    assert "1 of 2 held: none-of-them" in printed


def test_each_family_that_a_program_can_download_has_a_small_one() -> None:
    rows = check_published.smallest_of_each_family(ROWS.values())
    assert {row.family: row.name for row in rows} == {
        "DETR": "detr-r50",
        "Deformable DETR": "deformable-detr-r50-single-scale",
        "Conditional DETR": "conditional-detr-r50",
        "RT-DETR": "rtdetr-r18",
        "RT-DETRv2": "rtdetrv2-r18",
        "D-FINE": "dfine-n",
        "DEIMv2": "deimv2-atto",
        "RF-DETR": "rfdetr-nano",
        "LW-DETR": "lwdetr-tiny",
    }


def test_random_weights_are_those_of_the_file(cache: Path) -> None:
    """The oracle of the test above is transformers reading the files, and not this package."""
    transformers = pytest.importorskip("transformers")
    folder = cache / "models--someone--small" / "snapshots" / ("c" * 40)
    read = transformers.AutoModelForObjectDetection.from_pretrained(str(folder)).state_dict()
    made = with_spread(small_rt_detr_v2()).state_dict()
    assert all(torch.equal(read[name], made[name]) for name in made)
