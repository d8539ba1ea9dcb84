"""A stranger's bundle.json describes a model of any size; it is compared with the weights before it takes memory."""

from __future__ import annotations

import dataclasses
import resource

import pytest

from edgedetr.bundle import Bundle
from edgedetr.errors import ModelError
from edgedetr.models.deploy import load_bundle_model


@pytest.mark.parametrize(
    "huge",
    [{"hidden": 8192, "ffn": 32768, "encoder_layers": 100, "decoder_layers": 100}, {"backbone_width": 8.0}],
    ids=["terabytes of layers", "a wide backbone"],
)
def test_numbers_of_a_bundle_that_its_weights_do_not_have_take_no_memory(huge, fresh, tmp_path):
    bundle = fresh("detr", tmp_path / "b")
    manifest = dataclasses.replace(bundle.manifest, config={**bundle.manifest.config, **huge})
    hostile = Bundle(bundle.path, manifest)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="the weights do not fit the detr that bundle.json describes"):
        load_bundle_model(hostile)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10  # KiB; either asks for gigabytes
