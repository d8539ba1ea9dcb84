"""RT-DETR's queries: chosen by score, and starting from their tokens or from learned vectors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from members import CLASSES, HEIGHT, SMALL, WIDTH, sample_images
from torch import nn

from edgedetr.exporting.to_onnx import write_onnx
from edgedetr.models import build, member
from edgedetr.models.checkpoints.config_from_state_dict import StateDict
from edgedetr.models.deploy import DeployGraph
from edgedetr.models.detector import DetrModel
from edgedetr.models.records import Memory

CONFIG = replace(SMALL["rt_detr"], learned_content=True)


def detector() -> DetrModel:
    torch.manual_seed(0)
    return build("rt_detr", CONFIG, CLASSES).eval()


def memory(detector: DetrModel) -> Memory:
    return detector.encode(detector.normalize(sample_images()))


def test_learned_content_goes_by_rank_and_the_boxes_by_token() -> None:
    learned = detector()
    plain = build("rt_detr", SMALL["rt_detr"], CLASSES).eval()
    plain.load_state_dict(
        {name: tensor for name, tensor in learned.state_dict().items() if name != "selector.content.weight"}
    )
    seen = memory(learned)
    got, token = learned.select(seen), plain.select(seen)
    assert torch.equal(got.content, learned.selector.content.weight.expand(2, -1, -1))
    assert torch.equal(got.reference, token.reference)
    scores = got.encoder[0].amax(-1)
    assert torch.equal(scores, scores.sort(dim=1, descending=True).values), "the first vector is the best token's"


def test_learned_content_learns() -> None:
    learned = detector().train()
    learned(sample_images() / 255).logits.square().sum().backward()
    assert (learned.selector.content.weight.grad.abs().sum(-1) > 0).all()


def test_learned_content_is_deployed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    deim = replace(CONFIG, head_activation="silu", position_layers=3)  # DEIM's decoder, deployed here as well
    graph = DeployGraph(build("rt_detr", deim, CLASSES), HEIGHT, WIDTH)
    write_onnx(graph, tmp_path / "model.onnx", batch=None)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    images = sample_images(3)
    with torch.no_grad():
        wanted = graph(images)
    for got, expected in zip(session.run(["logits", "boxes"], {"images": images.numpy()}), wanted):
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)


def test_deims_heads_and_query_position_are_silu_networks_of_three_layers() -> None:
    torch.manual_seed(0)
    config = replace(SMALL["rt_detr"], head_activation="silu", position_layers=3)
    model = build("rt_detr", config, CLASSES)

    def by_hand(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
        first, second, third = mlp.layers
        x = x @ first.weight.T + first.bias
        x = (x * x.sigmoid()) @ second.weight.T + second.bias
        return (x * x.sigmoid()) @ third.weight.T + third.bias

    position, width = model.decoder.query_position, config.hidden
    assert [tuple(layer.weight.shape) for layer in position.layers] == [(width, 4), (width, width), (width, width)]
    for mlp in (position, *model.decoder.boxes.box, model.selector.box):
        x = torch.randn(7, mlp.layers[0].weight.shape[1])
        torch.testing.assert_close(mlp(x), by_hand(mlp, x), atol=1e-6, rtol=1e-5)
    state = {name: value for name, value in model.state_dict().items() if "query_position" in name}
    assert member("rt_detr").readers["position_layers"](StateDict(state, config.heads)) == 3
