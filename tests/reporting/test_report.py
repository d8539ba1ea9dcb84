"""The page: complete, self-contained, safe with hostile names, and drawn by a real browser."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgedetr.errors import BundleError
from edgedetr.evaluation.coco_metrics import evaluate
from edgedetr.evaluation.verdict import ArtifactVerdict, Verdict
from edgedetr.reporting.differences import difference, jpeg_data_url, most_different
from edgedetr.reporting.evidence import precision_recall, read_evidence
from edgedetr.reporting.report import write_report
from edgedetr.reporting.tables import artifact_rows, verdict_sentence
from edgedetr.runtime.postprocess import named


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(verified) -> Page:
    return Page(write_report(verified.bundle).path.read_text(encoding="utf-8"))


def test_page_asks_nothing_of_the_net(page):
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    addresses = [
        value for tag, name, value in page.attributes if name in ("src", "href", "xlink:href", "action", "data")
    ]
    assert addresses
    assert all(value.startswith(("data:image/jpeg;base64,", "#")) for value in addresses)


def test_hostile_class_names_stay_text(page):
    assert page.tags["img"] == 0
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert '<img src=x onerror="alert(1)">' in page.text


def test_every_artifact_and_its_verdict_is_in_the_table(page, verified):
    for row in artifact_rows(read_evidence(verified.bundle).verdict)[1]:
        for cell in row:
            assert cell is None or cell in page.text
    assert "beyond" in page.text
    assert "synthetic data" in page.text
    assert "int8-cpu (onnxruntime): diverges <b>here</b>" in page.text


def test_all_four_figures_are_drawn(page):
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    for start in (
        "AP points lost by each artifact",
        "Latency against AP",
        "Precision over recall",
        "AP points lost by each class",
    ):
        assert any(label.startswith(start) for label in labels)


def test_boxes_that_one_side_alone_has_are_drawn_as_such(page, verified):
    classes = Counter(value for tag, name, value in page.attributes if tag == "rect" and name == "class")
    assert classes["box reference"] == sum(verified.lost.values())
    assert classes["box other"] == 0
    assert classes["box both"] == sum(
        4 - lost for lost in verified.lost.values() if lost
    )  # agreeing images are left out


def test_images_that_are_gone_are_named_and_the_page_is_still_written(verified, tmp_path):
    text = Page(write_report(verified.bundle, data=tmp_path).path.read_text(encoding="utf-8")).text
    assert f"images/003.png is not in {tmp_path}" in text
    write_report(verified.bundle)


def test_an_image_that_changed_since_verifying_is_not_shown(verified, tmp_path):
    shutil.copytree(verified.image_root, tmp_path / "copy")
    Image.new("RGB", (160, 120)).save(tmp_path / "copy" / "images" / "003.png")
    text = Page(write_report(verified.bundle, data=tmp_path / "copy").path.read_text(encoding="utf-8")).text
    assert "images/003.png" in text
    assert "is not the image that was verified" in text
    write_report(verified.bundle)


@pytest.mark.parametrize(
    "name, words",
    [
        ("../secret.png", "leads out of"),
        ("{outside}/secret.png", "leads out of"),
        ("images/link.png", "leads out of"),
        ("linked/secret.png", "leads out of"),
        ("images/nul\0.png", "embedded null"),
        ("a" * 300 + ".png", "name too long"),
    ],
)
def test_an_image_outside_of_the_data_is_never_embedded(verified, tmp_path, name, words):
    data, outside = tmp_path / "data", tmp_path
    (data / "images").mkdir(parents=True)
    Image.new("RGB", (160, 120), (200, 30, 30)).save(outside / "secret.png")
    (data / "images" / "link.png").symlink_to(outside / "secret.png")
    (data / "linked").symlink_to(outside)
    # The digest fits: a stranger who knows the file's bytes still learns nothing from its location.
    sha256 = hashlib.sha256((outside / "secret.png").read_bytes()).hexdigest()
    embedded, trouble = jpeg_data_url(data, name.format(outside=outside), sha256, 120, 160)
    assert embedded == "" and words in trouble.lower()


def test_an_image_is_embedded_only_with_its_digest(verified):
    assert jpeg_data_url(verified.image_root, "images/001.png", "", 120, 160)[0] == ""
    sha256 = hashlib.sha256((verified.image_root / "images" / "001.png").read_bytes()).hexdigest()
    assert jpeg_data_url(verified.image_root, "images/001.png", sha256, 120, 160)[0].startswith("data:image/jpeg")


def test_a_linked_report_folder_is_not_written_through(tmp_path, verified):
    shutil.copytree(verified.bundle.path, tmp_path / "b.bundle")
    shutil.rmtree(tmp_path / "b.bundle" / "report", ignore_errors=True)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("years of work")
    (tmp_path / "b.bundle" / "report").symlink_to(tmp_path / "site")
    with pytest.raises(BundleError, match="report: a link"):
        write_report(type(verified.bundle).open(tmp_path / "b.bundle"))
    assert (tmp_path / "site" / "index.html").read_text() == "years of work"


def test_without_a_verdict_the_error_names_the_command(tmp_path, verified):
    shutil.copytree(verified.bundle.path, tmp_path / "b.bundle")
    (tmp_path / "b.bundle" / "results" / "verify.json").unlink()
    bundle = type(verified.bundle).open(tmp_path / "b.bundle")
    with pytest.raises(BundleError, match="run: edgedetr verify"):
        write_report(bundle)


ARTIFACT = '{"name": "onnx", "backend": "onnxruntime", "passed": true, "drop": 0, "drop_upper95": 0, "ap": 1'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"passed": true}',
        '{"stages": [{}], "budget": 1, "passed": true}',
        "[" * 100_000,
        '{"stages": [], "budget": 1, "passed": true}',
        '{"stages": [' + ARTIFACT + ', "ap50": 1}], "budget": "1", "passed": true}',
        '{"stages": [' + ARTIFACT + ', "ap50": 1}], "budget": NaN, "passed": true}',
        '{"stages": [' + ARTIFACT + ', "ap50": 1, "note": 3}], "budget": 1, "passed": true}',
        '{"stages": [' + ARTIFACT + ', "ap50": 1, "p50_ms": "x"}], "budget": 1, "passed": true}',
        '{"stages": [' + ARTIFACT + ', "ap50": 1e999}], "budget": 1, "passed": true}',
        '{"stages": [' + ARTIFACT + ', "ap50": 1}], "budget": 1, "passed": 1}',
        '{"budget": ' + "9" * 5000 + "}",
    ],
)
def test_a_damaged_verdict_is_refused(tmp_path, verified, text):
    shutil.copytree(verified.bundle.path, tmp_path / "b.bundle")
    bundle = type(verified.bundle).open(tmp_path / "b.bundle")
    with bundle.add("results/verify.json", stage="verify") as path:
        path.write_text(text)
    with pytest.raises(BundleError, match=r"not a verdict .* run: edgedetr verify"):
        read_evidence(bundle)


@pytest.mark.parametrize("threshold, name", [(0, "ap50"), (5, "ap75")])
def test_area_under_the_drawn_curve_is_the_average_precision_of_pycocotools(verified, threshold, name):
    for artifact in read_evidence(verified.bundle).artifacts:
        curve = precision_recall(artifact.metrics, threshold)
        # float64 means of 101 values in another order
        assert 100 * curve.mean() == pytest.approx(getattr(artifact.metrics, name), abs=1e-9)


def test_the_most_different_images_lost_the_most_boxes(verified):
    evidence = read_evidence(verified.bundle)
    shown = most_different(evidence.reference.detections, evidence.worst.detections, 3)
    assert [verified.lost[d.image_id] for d in shown[:2]] == [3, 3]
    assert [len(d.only_reference) for d in shown] == [verified.lost[d.image_id] for d in shown]


def test_agreeing_detections_are_no_difference(verified):
    found = verified.reference.detections
    assert most_different(found, found, 5) == []


def test_difference_by_hand(verified):
    classes = verified.bundle.manifest.classes
    a = named(
        np.array([[0, 0, 10, 10], [50, 50, 60, 60]], np.float32),
        np.array([0.9, 0.4], np.float32),
        np.array([0, 1]),
        classes,
    )
    b = named(
        np.array([[0, 0, 10, 9], [50, 50, 60, 60]], np.float32),
        np.array([0.7, 0.5], np.float32),
        np.array([0, 0]),
        classes,
    )
    found = difference(1, a, b)
    assert found.pairs.tolist() == [[0, 0]]  # IoU 0.9, same class
    assert found.only_reference.tolist() == [1]
    assert found.only_other.tolist() == [1]  # same position as the other's second, but of another class
    assert found.score == pytest.approx(0.2 + 0.4 + 0.5, abs=1e-6)  # float32 confidences


def _verdict(drop: float, upper: float, passed: bool) -> Verdict:
    artifact = ArtifactVerdict("int8", "openvino", passed, 50.0, 70.0, drop, upper)
    return Verdict(passed, 1.0, 2.2, (artifact,))


@pytest.mark.parametrize(
    "verdict, word, sentence",
    [
        (_verdict(0.2, 0.8, True), "within", "no file loses more than 0.80 AP"),
        (_verdict(0.2, 2.1, False), "not certified", "smallest tolerance it can certify is 2.20"),
        (_verdict(1.7, 2.1, False), "beyond", "int8 on openvino loses 1.70 AP"),
    ],
)
def test_verdict_in_words(verdict, word, sentence):
    assert artifact_rows(verdict)[1][0][-1] == word
    assert sentence in verdict_sentence(verdict)


def test_a_drop_of_nearly_nothing_has_no_minus():
    assert artifact_rows(_verdict(-0.001, 0.004, True))[1][0][4:6] == ["+0.00", "+0.00"]


def test_same_bundle_gives_the_same_bytes(verified):
    assert write_report(verified.bundle).path.read_bytes() == write_report(verified.bundle).path.read_bytes()


def browser() -> str | None:
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return found
    return None


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_draws_the_page(verified, tmp_path, theme):
    program = browser()
    if program is None:
        pytest.skip("needs chromium or google-chrome to draw the page; on Debian: apt-get install chromium")
    page = write_report(verified.bundle).path
    shot = tmp_path / f"{theme}.png"
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    subprocess.run(
        [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            *dark,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={shot}",
            "--window-size=1200,2600",
            page.resolve().as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=90,
    )
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (2600, 1200, 3)
    background = pixels[5, 5]
    assert (background > 200).all() if theme == "light" else (background < 60).all()
    # Colors of the drawn boxes and of the figures: what only PyTorch found, and the verdict's colors.
    for color in ((0x2F, 0xA8, 0xFF), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        near = (np.abs(pixels - np.array(color)).max(axis=-1) <= 6).sum()
        assert near > 40, f"{color} was seen on {near} pixels only"
    if target := _keep_screenshots():
        shutil.copy(shot, target / shot.name)


def _keep_screenshots() -> Path | None:
    """EDGEDETR_SCREENSHOTS names a folder to look at the images afterwards."""
    import os

    where = os.environ.get("EDGEDETR_SCREENSHOTS")
    return Path(where) if where else None


def test_figures_do_not_fix_a_color_for_text(verified):
    text = write_report(verified.bundle).path.read_text(encoding="utf-8")
    assert "#010203" not in text
    assert len(re.findall("currentColor", text)) > 20


def test_evaluation_of_the_recorded_detections_is_the_recorded_ap(verified):
    evidence = read_evidence(verified.bundle)
    for artifact in evidence.artifacts:
        if artifact.verdict.name == "int8-cpu":
            assert evaluate(evidence.reference.truth, artifact.detections).ap == artifact.verdict.ap
