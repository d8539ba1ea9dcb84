"""DN-DETR: the same detections as transformers' DAB-DETR, and label vectors that inference keeps."""

from __future__ import annotations

import pytest
import torch
from references import reference_resnet, transformers, with_spread

from edgedetr.errors import ModelError
from edgedetr.models import build
from edgedetr.models.checkpoints.conversion import translate
from edgedetr.models.checkpoints.pretrained import load_weights
from edgedetr.models.deploy import DeployGraph
from edgedetr.models.members.dn_detr import DnDetrConfig

CLASSES = 5
SMALL = {
    "backbone": "resnet18",
    "backbone_width": 0.25,
    "hidden": 32,
    "heads": 4,
    "ffn": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "queries": 10,
}


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    config = transformers.DabDetrConfig(
        backbone_config=reference_resnet(18, width=0.25),
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        num_labels=CLASSES,
        hidden_size=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=10,
    )
    model = with_spread(transformers.DabDetrForObjectDetection(config))
    with torch.no_grad():
        # Boxes of a usual size: the modulation divides by their sides.
        model.model.query_refpoint_embeddings.weight.normal_(0, 0.7)
        # The refinement's head is tied to the heads' in files; in memory it is a copy that has to follow.
        model.model.decoder.bbox_embed.load_state_dict(model.bbox_predictor.state_dict())
    return model


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_detections_equal_those_of_transformers(theirs: torch.nn.Module, padded: bool) -> None:
    ours = build("dn_detr", DnDetrConfig(**SMALL, denoising=False), CLASSES).eval()
    load_weights(ours, translate("dn_detr", theirs.state_dict()), "transformers")
    images, padding = torch.randn(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.bool)
    if padded:
        padding[0, :, 96:], padding[1, 64:] = True, True
    expected = theirs(pixel_values=images, pixel_mask=(~padding).long())
    got = ours(images, padding if padded else None)
    assert min(expected.logits.std(), expected.pred_boxes.std()) > 1e-2, "the reference says something"
    # float32 through about 40 layers and three refinements; measured 2e-8 and below 1e-8
    torch.testing.assert_close(got.logits[-1], expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.boxes[-1], expected.pred_boxes, atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_knowledge_the_content_is_the_vector_of_an_unknown_label() -> None:
    selector = build("dn_detr", DnDetrConfig(**SMALL), CLASSES).selector
    content = selector(memory_of(2)).content
    table = selector.denoising_class_embed.weight
    assert table.shape == (CLASSES + 1, 31)
    assert torch.equal(content, torch.cat([table[CLASSES], torch.zeros(1)]).expand(2, 10, 32))
    boxes = torch.rand(2, 3, 4)
    known = selector.noised(torch.tensor([[0, 4, CLASSES], [2, 2, 1]]), boxes)
    assert torch.equal(known.content[0, 1], torch.cat([table[4], torch.ones(1)]))  # the last channel distinguishes them
    assert torch.equal(known.reference, boxes)


@torch.no_grad()
def test_dab_starts_from_zero_and_has_nothing_for_labels() -> None:
    selector = build("dn_detr", DnDetrConfig(**SMALL, denoising=False), CLASSES).selector
    assert not selector(memory_of(1)).content.any()
    with pytest.raises(ModelError, match="built without model.denoising"):
        selector.noised(torch.zeros(1, 1, dtype=torch.int64), torch.rand(1, 1, 4))


def memory_of(batch: int):
    from edgedetr.models.records import Memory

    return Memory(torch.zeros(batch, 4, 32), [(2, 2)], [32])


@torch.no_grad()
def test_the_deployed_graph_is_that_of_dab_detr() -> None:
    """Label vectors become one constant row of content: the same operators, and nothing that noises."""
    graphs = []
    for denoising in (True, False):
        graph = DeployGraph(build("dn_detr", DnDetrConfig(**SMALL, denoising=denoising), CLASSES), 64, 64)
        exported = torch.export.export(graph, (torch.zeros(1, 3, 64, 64),))
        graphs.append([str(node.target) for node in exported.graph.nodes if node.op == "call_function"])
    of_content = {
        "aten.cat.default",
        "aten.zeros_like.default",
        "aten.select.int",
        "aten.slice.Tensor",
        "aten.new_zeros.default",
    }
    with_labels, without = ([name for name in graph if name not in of_content] for graph in graphs)
    assert with_labels == without
    assert not any("rand" in name or "embedding" in name or "where" in name for name in graphs[0])


def test_a_layer_hands_on_a_box_but_no_gradient_through_the_sampled_position() -> None:
    """The loss of the second layer reaches the first layer's box ("look forward twice"), the reference is constant."""
    detector = build("dn_detr", DnDetrConfig(**SMALL), CLASSES)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    detector(torch.randn(1, 3, 64, 64)).boxes[1].sum().backward()
    assert detector.selector.box.weight.grad.abs().max() > 0


def test_parameters_are_as_many_as_transformers_counts() -> None:
    with torch.device("meta"):
        detector = build("dn_detr", DnDetrConfig(denoising=False), 91)
    norms = sum(b.numel() for name, b in detector.named_buffers() if name.endswith((".norm.weight", ".norm.bias")))
    assert (sum(p.numel() for p in detector.parameters()) + norms) / 1e6 == pytest.approx(43.7, rel=0.01)
