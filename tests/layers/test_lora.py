"""Low-rank adapters: no change at first, few weights that learn, and nothing left of them after the merge."""

from __future__ import annotations

import onnx
import pytest
import torch
from members import HEIGHT, WIDTH, sample_images, small
from torch import nn

from edgedetr.errors import ModelError
from edgedetr.exporting.to_onnx import write_onnx
from edgedetr.layers.lora import LoraLinear, adapt, merged
from edgedetr.models.deploy import DeployGraph


def test_an_adapter_is_w_plus_alpha_over_r_times_up_down() -> None:
    torch.manual_seed(0)
    base = nn.Linear(5, 3)
    layer = LoraLinear(base, rank=2, alpha=6.0)
    x = torch.randn(4, 5)
    torch.testing.assert_close(layer(x), base(x))  # up is zero at first
    with torch.no_grad():
        layer.up.normal_()
    weight = base.weight + 6.0 / 2 * layer.up @ layer.down
    torch.testing.assert_close(layer(x), x @ weight.T + base.bias)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["down", "up"]


def adapted(name: str = "detr") -> nn.Module:
    detector = small(name)
    names = adapt(detector, ("*.q", "*.v"), rank=2, alpha=4.0)
    assert len(names) == 12  # q and v of two encoder layers, and of both attentions of two decoder layers
    with torch.no_grad():
        for module in detector.modules():
            if isinstance(module, LoraLinear):
                module.up.normal_(0, 0.1)
    return detector.eval()


@torch.no_grad()
def test_merged_equals_unmerged() -> None:
    detector = adapted().double()  # in float32 rounding alone is 2e-6 of a logit
    images = detector.normalize(sample_images().double())
    before, after = detector(images), merged(detector).double()(images)
    torch.testing.assert_close(after.boxes, before.boxes, atol=1e-6, rtol=0)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-6, rtol=0)
    assert sorted(merged(detector).state_dict()) == sorted(small("detr").state_dict())


def test_the_exported_graph_has_no_node_more(tmp_path) -> None:  # type: ignore[no-untyped-def]
    plain, lora = tmp_path / "plain.onnx", tmp_path / "lora.onnx"
    write_onnx(DeployGraph(small("detr"), HEIGHT, WIDTH), plain)
    write_onnx(DeployGraph(adapted(), HEIGHT, WIDTH), lora)
    kinds = [[node.op_type for node in onnx.load(path).graph.node] for path in (plain, lora)]
    assert kinds[0] == kinds[1]


def test_a_pattern_that_fits_nothing_is_named() -> None:
    with pytest.raises(ModelError, match=r"train.lora_on \['\*.query'\] matches no Linear .* like encoder"):
        adapt(small("detr"), ("*.query",), 2, 2.0)
