"""Decoding against plain loops and hand-worked numbers."""

from __future__ import annotations

import numpy as np
import pytest

from edgedetr.bundle import ClassInfo, InputContract, OutputContract
from edgedetr.errors import BundleError, ModelError
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.postprocess import decode
from edgedetr.runtime.preprocess import Geometry

CONTRACT = InputContract(100, 200)


def classes(count: int) -> tuple[ClassInfo, ...]:
    return tuple(ClassInfo(i, 10 + i, f"class {i}") for i in range(count))


def random_raw(rng: np.random.Generator, batch: int, queries: int, columns: int) -> RawOutputs:
    shape = (batch, queries, 2)
    boxes = np.concatenate([rng.uniform(0, 1, shape), rng.uniform(0.01, 0.8, shape)], axis=-1)
    return RawOutputs(rng.normal(0, 3, (batch, queries, columns)).astype(np.float32), boxes.astype(np.float32))


def corners(box: np.ndarray, geometry: Geometry) -> list[float]:
    """By hand, for a stretched image: input fractions -> source pixels, cut to the image."""
    cx, cy, w, h = (float(v) for v in box)
    x = [np.clip((cx + s * w / 2) * geometry.used_width, 0, geometry.source_width) for s in (-1, 1)]
    y = [np.clip((cy + s * h / 2) * geometry.used_height, 0, geometry.source_height) for s in (-1, 1)]
    return [x[0], y[0], x[1], y[1]]


@pytest.mark.parametrize("queries, count, top_k", [(7, 3, 5), (7, 3, 100), (1, 1, 1), (50, 4, 60)])
def test_sigmoid_takes_the_best_of_all_queries_and_classes(rng, queries, count, top_k):
    raw = random_raw(rng, 2, queries, count)
    geometries = [Geometry.of(333, 777, CONTRACT), Geometry.of(60, 40, CONTRACT)]
    found = decode(raw, geometries, classes(count), OutputContract("sigmoid", top_k))
    for logits, boxes, geometry, detections in zip(raw.logits, raw.boxes, geometries, found):
        by_score = sorted(((float(logits[n, k]), n, k) for n in range(queries) for k in range(count)), reverse=True)
        assert len(detections) == min(top_k, queries * count)
        for rank, (logit, n, k) in enumerate(by_score[:top_k]):
            # float32 corners of up to 777 pixels: a few units in the last place
            np.testing.assert_allclose(detections.xyxy[rank], corners(boxes[n], geometry), atol=2e-4)
            assert detections.confidence[rank] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)
            assert detections.class_id[rank] == k
            assert detections.data["class_name"][rank] == f"class {k}"
            assert detections.data["category_id"][rank] == 10 + k


def test_softmax_takes_the_best_class_of_each_query_and_never_no_object(rng):
    raw = random_raw(rng, 1, 20, 4)
    geometry = Geometry.of(90, 120, CONTRACT)
    found = decode(raw, [geometry], classes(3), OutputContract("softmax", 12))[0]
    rows = []
    for n in range(20):
        e = np.exp(raw.logits[0, n].astype(np.float64))
        p = (e / e.sum())[:3]
        rows.append((p.max(), n, int(p.argmax())))
    rows.sort(reverse=True)
    assert len(found) == 12
    for rank, (p, n, k) in enumerate(rows[:12]):
        assert found.confidence[rank] == pytest.approx(p, abs=1e-6)  # float32 softmax of four values
        assert found.class_id[rank] == k
        np.testing.assert_allclose(found.xyxy[rank], corners(raw.boxes[0, n], geometry), atol=1e-4)  # float32 pixels


def test_letterbox_boxes_come_back_by_hand():
    # 100 x 400 into 100 x 200: half size, 50 rows of image and 50 of padding.
    geometry = Geometry.of(100, 400, InputContract(100, 200, "letterbox"))
    raw = RawOutputs(np.array([[[5.0]]], np.float32), np.array([[[0.5, 0.25, 0.5, 0.2]]], np.float32))
    found = decode(raw, [geometry], classes(1), OutputContract())[0]
    np.testing.assert_allclose(found.xyxy, [[100, 30, 300, 70]], atol=1e-4)  # float32 pixels


def test_boxes_are_cut_to_the_image_and_have_supervisions_types():
    geometry = Geometry.of(10, 20, CONTRACT)
    raw = RawOutputs(np.array([[[5.0, -80.0]]], np.float32), np.array([[[0.5, 0.5, 3.0, 3.0]]], np.float32))
    found = decode(raw, [geometry], classes(2), OutputContract())[0]
    assert found.xyxy.tolist() == [[0, 0, 20, 10]] * 2
    assert (found.xyxy.dtype, found.confidence.dtype, found.class_id.dtype) == (np.float32, np.float32, np.int64)
    assert 0 < found.confidence[1] < 1e-30  # no overflow, no warning, at a logit of -80


def test_logits_of_other_classes_are_refused():
    raw = RawOutputs(np.zeros((1, 2, 5), np.float32), np.zeros((1, 2, 4), np.float32))
    with pytest.raises(BundleError, match="5 logits per query, expected 3 for 2 classes and softmax"):
        decode(raw, [Geometry.of(10, 10, CONTRACT)], classes(2), OutputContract("softmax"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_an_error_and_not_a_detection(bad):
    raw = RawOutputs(np.full((1, 2, 2), bad, np.float32), np.zeros((1, 2, 4), np.float32))
    with pytest.raises(ModelError, match="NaN or infinity"):
        decode(raw, [Geometry.of(10, 10, CONTRACT)], classes(2), OutputContract())
