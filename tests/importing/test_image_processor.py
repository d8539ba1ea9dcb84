"""Image processors of transformers: every key is read as they do, refused by its name, or without effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from references import transformers

from edgedetr.bundle import InputContract
from edgedetr.errors import ModelError
from edgedetr.importing.image_processor import KEYS, Preprocessing, find_processor, preprocessing_of
from edgedetr.importing.onnx_model import read_model_files
from edgedetr.models import FAMILY
from edgedetr.models.checkpoints.transformers_keys import NoEffect, Only
from edgedetr.models.checkpoints.weight_source import WeightSource
from edgedetr.runtime.preprocess import resize

MEMBERS = {
    "DetrImageProcessor": "detr",
    "ConditionalDetrImageProcessor": "conditional_detr",
    "DeformableDetrImageProcessor": "deformable_detr",
    "RTDetrImageProcessor": "rt_detr",
}
kinds = pytest.mark.parametrize("kind", MEMBERS)
# A photograph has no steps: then resampling differs by a level or two, and a wrong scale or mean by many.
IMAGE = np.stack(
    [np.add.outer(np.linspace(20, 90, 64), np.linspace(0, 140, 96)) + 10 * channel for channel in range(3)], axis=-1
).astype(np.uint8)


def written(kind: str, **options: Any) -> dict[str, Any]:
    """preprocessor_config.json as the processor itself writes it, without torchvision: its Pillow form."""
    made = getattr(transformers, f"{kind}Pil")(**options)
    return json.loads(made.to_json_string())


def theirs(kind: str, **options: Any) -> np.ndarray:
    made = getattr(transformers, f"{kind}Pil")(**options)
    return made(images=Image.fromarray(IMAGE), return_tensors="np")["pixel_values"][0]


def ours(kind: str, raw: dict[str, Any]) -> np.ndarray:
    """What reaches the network of the bundle."""
    found = preprocessing_of(raw, FAMILY[MEMBERS[kind]].resize, "p.json", None)
    assert found.mean is not None and found.std is not None
    sized, _ = resize(IMAGE, InputContract(found.height, found.width, found.resize), backend="numpy")
    return ((sized / 255 - np.array(found.mean)) / np.array(found.std)).transpose(2, 0, 1)


@kinds
@pytest.mark.parametrize(
    "options",
    [
        {"size": {"height": 32, "width": 64}},
        {"size": [64, 32]},
        {"size": {"max_height": 64, "max_width": 96}},
        {"size": {"max_height": 64, "max_width": 96}, "do_pad": True, "pad_size": {"height": 64, "width": 96}},
        {"size": {"shortest_edge": 64, "longest_edge": 96}},
        {"size": {"shortest_edge": 96, "longest_edge": 96}},
        {"size": {"height": 64, "width": 96}, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": 0.25},
        {"size": {"height": 64, "width": 96}, "do_normalize": True, "image_mean": 0.5},
        {"size": {"height": 64, "width": 96}, "do_normalize": False},
        {"size": {"height": 64, "width": 96}, "do_rescale": False, "do_normalize": False},
        {
            "size": {"height": 64, "width": 96},
            "do_rescale": False,
            "do_normalize": True,
            "image_mean": [120.0, 110.0, 100.0],
            "image_std": [60.0, 61.0, 62.0],
        },
        {
            "size": {"height": 64, "width": 96},
            "rescale_factor": 1 / 127.5,
            "do_normalize": True,
            "image_mean": [1.0] * 3,
            "image_std": [1.0] * 3,
        },
        {"size": {"height": 64, "width": 96}, "rescale_factor": 2 / 255, "do_normalize": False},
    ],
    ids=str,
)
def test_the_pixels_that_reach_the_network_are_those_of_the_processor(kind: str, options: dict[str, Any]) -> None:
    expected, found = theirs(kind, **options), ours(kind, written(kind, **options))
    if expected.shape != found.shape:  # theirs keeps the aspect and pads later; ours pads at once
        found = found[:, : expected.shape[1], : expected.shape[2]]
    # Two levels of 255 in the scale of these pixels: Pillow's bilinear filter is wider than ours where it shrinks.
    level = (expected.max() - expected.min()) / (int(IMAGE.max()) - int(IMAGE.min()))
    assert np.abs(found - expected).max() < 2.5 * level


@pytest.mark.parametrize(
    "raw, short, long", [({"size": 800, "max_size": 1000}, 800, 1000), ({"size": 600}, 600, 1333), ({}, 800, 1333)]
)
@pytest.mark.parametrize("kind", [kind for kind in MEMBERS if kind != "RTDetrImageProcessor"])
def test_one_number_is_the_shorter_side_and_max_size_the_longer(
    kind: str, raw: dict[str, Any], short: int, long: int
) -> None:
    made = getattr(transformers, f"{kind}Pil")(**raw)
    assert (made.size["shortest_edge"], made.size["longest_edge"]) == (short, long), "the processor's own reading"
    found = preprocessing_of(raw, FAMILY[MEMBERS[kind]].resize, "p.json", None)
    assert (found.height, found.width) == (-(-short // 32) * 32, -(-long // 32) * 32)
    assert f"shorter side at {short} px and the longer at most {long}" in found.notes[0]


@kinds
def test_no_sentence_about_edges_where_a_file_says_something_else(kind: str) -> None:
    for size in ({"height": 320, "width": 320}, {"max_height": 480, "max_width": 640}):
        found = preprocessing_of(written(kind, size=size), FAMILY[MEMBERS[kind]].resize, "p.json", None)
        assert not any("1333" in note or "800" in note for note in found.notes), found.notes


def test_without_a_file_the_published_resize_is_taken_and_reported() -> None:
    assert "no preprocessor_config.json" in preprocessing_of(None, FAMILY["rt_detr"].resize, "x", None).notes[0]
    assert preprocessing_of(None, FAMILY["rt_detr"].resize, "x", None) == Preprocessing(
        640, 640, "stretch", None, None, ("no preprocessor_config.json: stretched to 640 x 640, as published",)
    )
    assert (
        preprocessing_of(None, FAMILY["detr"].resize, "x", (320, 320))
        .notes[1]
        .startswith("input 320 x 320 instead of the 800 x 1344")
    )


@kinds
def test_every_key_of_the_processor_is_in_the_table(kind: str) -> None:
    made = getattr(transformers, f"{kind}Pil")
    unknown = (set(made.valid_kwargs.__annotations__) | set(written(kind))) - set(KEYS)
    assert not unknown, f"transformers {transformers.__version__}: {sorted(unknown)}"


@kinds
def test_keys_without_effect_change_no_pixel_there_and_nothing_here(kind: str) -> None:
    other = {
        "default_to_square": True,
        "do_convert_rgb": True,
        "do_convert_annotations": False,
        "format": "coco_panoptic",
        "crop_size": {"height": 8, "width": 8},
        "disable_grouping": True,
        "image_seq_length": 5,
    }
    size = {"size": {"height": 64, "width": 96}}
    np.testing.assert_array_equal(theirs(kind, **size, **other), theirs(kind, **size))
    raw = written(kind, **size)
    named = {key: other.get(key, "anything") for key, entry in KEYS.items() if isinstance(entry, NoEffect)}
    assert preprocessing_of({**raw, **named}, FAMILY[MEMBERS[kind]].resize, "p", None) == preprocessing_of(
        raw, FAMILY[MEMBERS[kind]].resize, "p", None
    )


@kinds
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resample": 3}, "resample is 3"),
        ({"resample": 0}, "resample is 0"),
        ({"resample": "bicubic"}, "resample is"),
        ({"do_center_crop": True}, "do_center_crop is true"),
        ({"auto_map": {"AutoImageProcessor": "x"}}, "auto_map is"),
        ({"do_resize": False}, "do_resize is false.*--input HxW"),
        ({"do_resize": "no"}, 'do_resize is "no"; expected true'),
        ({"image_processor_type": "ViTImageProcessor"}, 'image_processor_type is "ViTImageProcessor"'),
        ({"size": {"shortest_edge": 800}}, "size is .*shortest_edge.*expected"),
        ({"size": {"longest_edge": 800}}, "size is .*longest_edge.*expected"),
        ({"size": {"height": 640, "width": 640, "shortest_edge": 3}}, "size is "),
        ({"size": "big"}, 'size is "big"'),
        ({"size": {"min_pixels": 1, "max_pixels": 2}}, "size is "),
        ({"size": {"height": -1, "width": 2}}, "size: height is -1"),
        ({"size": {"height": 10**9, "width": 2}}, "size: height"),
        ({"size": {"height": True, "width": 2}}, "size: height is true"),
        ({"size": {"shortest_edge": 900, "longest_edge": 800}}, "size has longest_edge 800 below shortest_edge 900"),
        ({"do_pad": True, "pad_size": {"height": 5, "width": 5}}, "pad_size is "),
        ({"rescale_factor": "x"}, "rescale_factor is"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
        ({"rescale_factor": float("nan")}, "rescale_factor is NaN"),
        ({"do_normalize": True, "image_std": [1, 0, 1]}, "image_std is 0"),
        ({"do_normalize": 1}, "do_normalize is 1"),
        ({"do_normalize": True, "image_mean": [1, 2]}, "image_mean is .*expected three"),
        ({"do_normalize": True, "image_mean": {"r": 1}}, "image_mean is"),
        ({"do_color": 1}, "unknown key 'do_color' = 1"),
    ],
)
def test_what_a_bundle_cannot_do_is_refused_by_name(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=f"p.json: {message}"):
        preprocessing_of({**written(kind), **changes}, FAMILY[MEMBERS[kind]].resize, "p.json", None)


def test_a_processor_that_does_not_resize_needs_a_size_and_gets_it() -> None:
    found = preprocessing_of({"do_resize": False}, FAMILY["detr"].resize, "p.json", (96, 128))
    assert (found.height, found.width, found.resize) == (96, 128, "stretch")
    assert "keeps every image's size" in found.notes[0]


def test_one_number_is_no_size_to_rt_detr() -> None:
    with pytest.raises(ModelError, match="size is 640"):
        preprocessing_of({"size": 640}, FAMILY["rt_detr"].resize, "p.json", None)
    found = preprocessing_of(
        {"size": 640, "image_processor_type": "DetrImageProcessor"}, FAMILY["rt_detr"].resize, "p", None
    )
    assert found.resize == "letterbox"


@kinds
def test_every_suffix_of_a_class_is_known(kind: str) -> None:
    for name in (kind, f"{kind}Fast", f"{kind}Pil", kind.replace("ImageProcessor", "FeatureExtractor")):
        preprocessing_of({"image_processor_type": name}, FAMILY[MEMBERS[kind]].resize, "p.json", None)


def size_of_processor(origin: WeightSource) -> dict[str, int]:
    found = find_processor(origin.file_next_to, ModelError)
    assert found is not None
    return found[0]["size"]


def test_the_newer_file_goes_first_and_the_older_is_taken_where_it_nests_nothing(tmp_path: Path) -> None:
    """As transformers 5.23 does; its own saving shows that the nested form is read."""
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 64, "width": 64}}))
    origin = WeightSource(str(tmp_path))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "X"}))
    assert size_of_processor(origin) == {"height": 64, "width": 64}
    nested = {"image_processor": {"size": {"height": 32, "width": 32}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert size_of_processor(origin) == {"height": 32, "width": 32}
    (tmp_path / "processor_config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="processor_config.json: nested too deep"):
        size_of_processor(origin)
    (tmp_path / "processor_config.json").write_text("[]")
    with pytest.raises(ModelError, match="processor_config.json: list; expected an object"):
        size_of_processor(origin)


@kinds
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": 600, "max_size": 900},
        {"size": {"height": 64, "width": 96}},
        {"do_normalize": True, "image_mean": 0.5},
        {
            "do_normalize": True,
            "rescale_factor": 1 / 127.5,
            "image_mean": [1.0, 0.9, 0.8],
            "image_std": [0.5, 1.0, 2.0],
        },
        {"do_rescale": False, "do_normalize": False},
    ],
    ids=str,
)
def test_imports_of_weights_and_of_onnx_files_read_a_processor_alike(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    if kind == "RTDetrImageProcessor" and isinstance(options.get("size"), int):
        pytest.skip("RT-DETR's processor takes no single number")
    raw = {"image_processor_type": kind, **options}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    weights = preprocessing_of(raw, FAMILY[MEMBERS[kind]].resize, "p.json", None)
    onnx = read_model_files(tmp_path / "model.onnx").normalization
    assert onnx is not None and weights.mean is not None and weights.std is not None
    assert onnx.resize == weights.resize
    for value in (0, 100, 255):
        expected = (value / 255 - np.array(weights.mean)) / np.array(weights.std)
        np.testing.assert_allclose(value * onnx.factor + onnx.shift, expected, rtol=1e-12, atol=1e-12)


def test_tables_say_why() -> None:
    assert all(entry.why for entry in KEYS.values())
    assert {key for key, entry in KEYS.items() if isinstance(entry, Only)} == {
        "resample",
        "do_center_crop",
        "do_flip_channel_order",
        "auto_map",
    }
