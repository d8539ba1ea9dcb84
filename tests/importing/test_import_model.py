"""Wrong arguments to the import from Python are one error, before anything is read or written."""

from __future__ import annotations

from typing import Any

import pytest

from edgedetr.bundle import Bundle
from edgedetr.errors import EdgedetrError, UsageError
from edgedetr.importing.import_model import import_model
from edgedetr.importing.import_options import ImportOptions

PATHS: list[Any] = [None, 3, b"x", []]


@pytest.mark.parametrize("value", PATHS, ids=repr)
def test_what_is_no_path_is_one_error(value: Any, tmp_path) -> None:
    with pytest.raises(UsageError, match="bundle is .*; expected the path of a bundle"):
        Bundle.open(value)
    options = ImportOptions(model="detr")
    for wrong in ({"source": value}, {"out": value}):
        with pytest.raises(UsageError, match="(source|out) is "):
            import_model(**{"source": "m.onnx", "out": tmp_path / "b", **wrong})
        with pytest.raises(UsageError, match="(source|out) is "):
            import_model(**{"source": "m.pth", "out": tmp_path / "b", "options": options, **wrong})
    wrong = ImportOptions(model=value)
    with pytest.raises(EdgedetrError, match="weights need --model|model.name is "):
        import_model("m.pth", tmp_path / "b", wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": "64x96"},
        {"size": (64,)},
        {"size": (64.5, 96)},
        {"size": (0, 0)},
        {"data": 3},
        {"classes": 3},
        {"scale": "1"},
        {"mean": 3},
        {"std": (1, 2, "3")},
        {"resize": "crop"},
        {"activation": "relu"},
        {"boxes": "yxyx"},
        {"sampling": 3},
        {"sets": "a=b"},
        {"sets": [3]},
        {"outputs": "a,b"},
        {"outputs": 3},
    ],
    ids=repr,
)
def test_options_of_another_type_are_one_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} is .*; expected"):
        ImportOptions(**wrong)


@pytest.mark.parametrize(
    "source, options, message",
    [
        ("m.onnx", {"model": "detr"}, "--model is for weights, and m.onnx is an ONNX file; leave it out"),
        ("m.onnx", {"sets": ("a.b=1",)}, "--set is for weights"),
        ("m.pth", {"model": "detr", "scale": 1.0}, "--scale is for an ONNX file, and m.pth is none; leave it out"),
        ("m.pth", {"model": "detr", "sampling": "gather"}, "--sampling is for an ONNX file"),
        ("m.pth", {}, "weights need --model, one of detr, "),
    ],
)
def test_options_of_the_other_kind_of_source_are_refused(source, options, message, tmp_path) -> None:
    with pytest.raises(UsageError, match=message):
        import_model(source, tmp_path / "b", ImportOptions(**options))
    assert not list(tmp_path.iterdir())
