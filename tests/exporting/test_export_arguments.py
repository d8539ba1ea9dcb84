"""Wrong arguments to the import from Python are one error, before anything is read or written."""

from __future__ import annotations

from typing import Any

import pytest

from edgedetr.bundle import Bundle
from edgedetr.errors import BundleError, EdgedetrError, UsageError
from edgedetr.importing.onnx_model import bring
from edgedetr.importing.weights import import_weights

PATHS: list[Any] = [None, 3, b"x", []]


@pytest.mark.parametrize("value", PATHS, ids=repr)
def test_what_is_no_path_is_one_error(value: Any, tmp_path) -> None:
    with pytest.raises(BundleError, match="bundle is .*; expected the path of a bundle"):
        Bundle.open(value)
    for wrong in ({"path": value}, {"out": value}):
        with pytest.raises(UsageError, match="(path|out) is "):
            bring(**{"path": "m.onnx", "out": tmp_path / "b", **wrong})
        with pytest.raises(UsageError, match="(source|out) is "):
            import_weights(
                **{
                    "source": "m.pth",
                    "model": "detr",
                    "out": tmp_path / "b",
                    **{"source" if key == "path" else key: one for key, one in wrong.items()},
                }
            )
    with pytest.raises(EdgedetrError, match="model.name is "):
        import_weights("m.pth", value, tmp_path / "b")


@pytest.mark.parametrize(
    "wrong",
    [{"size": "64x96"}, {"size": (64,)}, {"size": (64.5, 96)}, {"size": (0, 0)}, {"data": 3}, {"classes": 3}],
    ids=repr,
)
def test_options_of_another_type_are_one_error(wrong: dict[str, Any], tmp_path) -> None:
    for call in (
        lambda: bring("m.onnx", tmp_path / "b", **wrong),
        lambda: import_weights("m.pth", "detr", tmp_path / "b", **wrong),
    ):
        with pytest.raises(UsageError, match=f"{next(iter(wrong))} is .*; expected"):
            call()
    assert not list(tmp_path.iterdir())


def test_texts_that_are_no_lists_are_one_error(tmp_path) -> None:
    for value in ("a=b", [3], 3):
        with pytest.raises(UsageError, match="sets is"):
            import_weights("m.pth", "detr", tmp_path / "b", sets=value)
        with pytest.raises(UsageError, match="outputs is"):
            bring("m.onnx", tmp_path / "b", outputs=value)
    with pytest.raises(UsageError, match="pixels is 3"):
        bring("m.onnx", tmp_path / "b", pixels=3)
