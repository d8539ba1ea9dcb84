"""What holds for every member of the family."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from members import BEYOND, CLASSES, HEIGHT, SMALL, UNUSED, WIDTH, sample_images, small

from edgedetr.errors import ModelError
from edgedetr.layers.deformable_attention import DeformableAttention
from edgedetr.layers.drop_path import DropPath, set_rates
from edgedetr.models import FAMILY, build
from edgedetr.models.deploy import DeployGraph
from edgedetr.models.detector import DetrModel
from edgedetr.models.encoders.hybrid import HybridEncoder
from edgedetr.models.members.detr import DetrConfig
from edgedetr.models.members.rt_detr import RtDetrConfig

STAR = {"sigmoid": CLASSES, "softmax": CLASSES + 1}  # K* by activation

member = pytest.mark.parametrize("name", FAMILY)


@member
def test_every_member_is_tested(name: str) -> None:
    assert isinstance(SMALL[name], FAMILY[name].config)


@member
@torch.no_grad()
def test_shapes_and_ranges(name: str) -> None:
    detector, config = small(name), SMALL[name]
    out = detector(detector.normalize(sample_images()))
    layers, queries = config.decoder_layers, config.queries
    assert out.logits.shape == (layers, 2, queries, STAR[config.activation])
    assert out.boxes.shape == (layers, 2, queries, 4)
    assert torch.isfinite(out.boxes).all()
    if name not in BEYOND:
        assert out.boxes.min() >= 0
        assert out.boxes.max() <= 1
    if out.encoder is not None:  # proposals: the chosen ones, or every token
        proposals = out.encoder[0].shape[1]
        assert out.encoder[0].shape[0] == 2
        assert proposals >= queries
        assert out.encoder[1].shape == (2, proposals, 4)


@member
@torch.no_grad()
def test_what_is_detected_depends_on_the_image(name: str) -> None:
    """Else export, batch, deployment and INT8 of the member would be compared on constants."""
    detector = small(name)
    memory = detector.encode(detector.normalize(sample_images()))
    out = detector.decode(detector.select(memory), memory)
    for level in memory.maps():  # a typical cell differs by a large fraction of a cell's value
        assert torch.isfinite(level).all()
        assert level.abs().max() < 100
        assert (level[0] - level[1]).abs().mean() > 0.2 * level.std()  # measured 0.4 to 1.1
    for logits, boxes in zip(out.logits, out.boxes):
        assert (logits[0] - logits[1]).abs().mean() > 0.1 * logits.std()
        assert (boxes[0] - boxes[1]).abs().mean() > 1e-3


@member
@pytest.mark.parametrize("schedule", ["linear", "exponential"])
def test_stochastic_depth_reaches_every_layer_at_the_asked_rate(name: str, schedule: str) -> None:
    detector = build(name, SMALL[name], CLASSES)
    layers = layers_of(detector)
    config = SMALL[name]
    blocks = len(getattr(config, "backbone_maps", ()))  # of which each gives a map
    assert len(layers) == blocks + getattr(config, "encoder_layers", 0) + config.decoder_layers
    rates = set_rates(detector, 0.3, schedule)
    depths = [number / (len(layers) - 1) for number in range(len(layers))]
    expected = [0.3 * (d if schedule == "linear" else (math.e**d - 1) / (math.e - 1)) for d in depths]
    assert rates == pytest.approx(expected)
    for layer, rate in zip(layers, expected):
        paths = [module for module in layer.modules() if isinstance(module, DropPath)]
        assert paths
        assert [path.rate for path in paths] == [pytest.approx(rate)] * len(paths)


@member
@torch.no_grad()
def test_a_layer_that_is_left_out_passes_its_input_on(name: str) -> None:
    """In training alone: then what the layer would compute makes no difference, but for its last norms."""
    detector = small(name)
    images = detector.normalize(sample_images())
    before = detector(images)
    set_rates(detector, 0.3, "linear")
    assert torch.equal(detector(images).logits, before.logits), "evaluation is unchanged"
    for module in detector.modules():
        if isinstance(module, DropPath):
            module.rate = 1 - 1e-9
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(detector.train()(images))
        for layer in layers_of(detector):
            for key, parameter in layer.named_parameters():
                if "norm" not in key or key.startswith("cross_attention"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    assert torch.equal(results[0].logits, results[1].logits)
    assert not torch.equal(detector.eval()(images).logits, before.logits)


def layers_of(detector: DetrModel) -> list[torch.nn.Module]:
    """Blocks of a backbone that has some, layers of the encoder, whatever holds them, and of the decoder."""
    name = "attention" if isinstance(detector.encoder, HybridEncoder) else "layers"
    blocks, layers = getattr(detector.backbone, "blocks", ()), getattr(detector.encoder, name, ())
    return [*blocks, *layers, *detector.decoder.layers]


def without_effect_in_the_first_self_attention(detector: DetrModel) -> set[str]:
    """Where all queries begin with the same content, all values are equal, so that attention weights do not matter;
    where that content is zero, the weight of the values does not matter either."""
    with torch.no_grad():
        content = detector.select(detector.encode(detector.normalize(sample_images()))).content
    if not torch.equal(content, content[:1, :1].expand_as(content)):
        return set()
    parts = ["q", "q_position", "k", "k_position"]
    found = {f"decoder.layers.0.self_attention.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    return found if content.any() else {*found, "decoder.layers.0.self_attention.v.weight"}


@member
def test_gradients_reach_every_trainable_parameter(name: str) -> None:
    detector = small(name).train()
    memory = detector.encode(detector.normalize(sample_images()))
    out = detector.decode(detector.select_to_train(memory), memory)
    loss = out.logits.square().sum() + out.boxes.square().sum()
    if out.encoder is not None:
        loss = loss + out.encoder[0].square().sum() + out.encoder[1].square().sum()
    loss.backward()
    unused = {*UNUSED.get(name, ()), *without_effect_in_the_first_self_attention(detector)}
    dead = [key for key, p in detector.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]
    # A softmax does not change when all its logits move together: a key's bias has gradients of rounding size.
    assert [key for key in dead if key not in unused and not key.endswith(".k.bias")] == []


@member
@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(name: str) -> None:
    detector, images = small(name), sample_images(3)
    together = detector(detector.normalize(images))
    alone = detector(detector.normalize(images[1:2]))
    # Other batch sizes take other convolution kernels: float32 rounding, measured 3e-6.
    torch.testing.assert_close(together.logits[:, 1:2], alone.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(together.boxes[:, 1:2], alone.boxes, atol=1e-5, rtol=0)


@member
@pytest.mark.parametrize("sampling", ["gather", "grid_sample"])
@torch.no_grad()
def test_deploy_graph_equals_the_last_layer(name: str, sampling: str) -> None:
    detector, images = small(name), sample_images()
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    graph = DeployGraph(detector, HEIGHT, WIDTH, sampling)
    expected = detector(detector.normalize(images))
    logits, boxes = graph(images)
    torch.testing.assert_close(logits, expected.logits[-1], atol=1e-4, rtol=0)  # folded BatchNorm; measured 4e-6
    torch.testing.assert_close(boxes, expected.boxes[-1], atol=1e-5, rtol=0)
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items()), "the model was changed"
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in graph.modules())


@member
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_trains_and_what_is_detected_stays_float32(name: str, kind: torch.dtype) -> None:
    detector = small(name).train()
    with torch.autocast("cpu", kind):
        out = detector(detector.normalize(sample_images()))
    assert torch.isfinite(out.logits).all()
    # A box in bfloat16 has steps of 1/256 of the image; references are carried in float32.
    assert out.boxes.dtype == out.logits.dtype == torch.float32
    (out.logits.float().square().mean() + out.boxes.float().square().mean()).backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)


def test_dc5_keeps_the_last_stage_at_stride_16() -> None:
    with torch.device("meta"):
        detector = build("detr", DetrConfig(dilate_last=True), CLASSES)
        memory = detector.encode(torch.zeros(1, 3, 64, 96))
    assert memory.shapes == [(4, 6)]
    assert memory.strides == [16]
    dilations = [block.body[1].conv.dilation[0] for block in detector.backbone.stages[3]]
    assert dilations == [1, 2, 2]  # torchvision's: the first block still sees the undilated grid


@torch.no_grad()
def test_masked_tokens_do_not_change_detections() -> None:
    """detr alone takes images of several sizes in a batch; padding is what the mask says it is."""
    detector, padding = small("detr"), torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    padding[0, 64:], padding[0, :, 96:] = True, True  # whole cells of stride 32
    maps = [torch.randn(2, 128, HEIGHT // 32, WIDTH // 32)]
    other = [torch.where(padding[:, None, ::32, ::32], torch.randn_like(maps[0]) * 5, maps[0])]
    one, two = (detector.encoder(m, padding) for m in (maps, other))
    a, b = (detector.decode(detector.select(m), m) for m in (one, two))
    assert not torch.equal(one.tokens, two.tokens)
    torch.testing.assert_close(a.logits, b.logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(a.boxes, b.boxes, atol=1e-6, rtol=0)


@torch.no_grad()
def test_queries_that_a_mask_hides_do_not_change_the_others() -> None:
    """What denoising relies on: noised queries in front, hidden from the rest, sliced off again."""
    detector = small("rt_detr")
    memory = detector.encode(detector.normalize(sample_images()))
    queries = detector.select(memory)
    plain = detector.decode(queries, memory)
    noise = 5
    queries.content = torch.cat([torch.randn(2, noise, 32), queries.content], dim=1)
    queries.reference = torch.cat([torch.rand(2, noise, 4), queries.reference], dim=1)
    total = queries.content.shape[1]
    queries.self_mask = torch.zeros(total, total, dtype=torch.bool)
    queries.self_mask[noise:, :noise] = True
    noised = detector.decode(queries, memory)
    torch.testing.assert_close(noised.logits[:, :, noise:], plain.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(noised.boxes[:, :, noise:], plain.boxes, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "name, config, classes, million",
    [
        ("detr", DetrConfig(), 91, 41.3),  # the paper's table 1, without and with "no object": 41 M
        ("rt_detr", RtDetrConfig(), 80, 20.2),  # RT-DETR-R18
    ],
    ids=["detr-r50", "rt_detr-r18"],
)
def test_parameter_counts_are_the_published_ones(name: str, config: object, classes: int, million: float) -> None:
    with torch.device("meta"):
        detector = build(name, config, classes)
    count = sum(p.numel() for p in detector.parameters()) / 1e6
    assert count == pytest.approx(million, rel=0.01)


def test_discrete_sampling_stays_discrete_when_deployed() -> None:
    detector = build("rt_detr", RtDetrConfig(method="discrete", backbone_width=0.25, hidden=32, queries=5), CLASSES)
    graph = DeployGraph(detector, HEIGHT, WIDTH)
    assert {m.method for m in graph.modules() if isinstance(m, DeformableAttention)} == {"discrete"}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: build("rtdetr", RtDetrConfig(), 3), r"model.name is 'rtdetr'; expected .*; did you mean 'rt_detr'\?"),
        (lambda: build("rt_detr", DetrConfig(), 3), "rt_detr takes a RtDetrConfig; got DetrConfig"),
        (lambda: build("rt_detr", RtDetrConfig(), 0), "0 classes; expected at least one"),
        (lambda: build("rt_detr", RtDetrConfig(backbone="resnet18v"), 3), "did you mean 'resnet18vd'"),
        (lambda: build("detr", DetrConfig(backbone="resnet18", dilate_last=True), 3), "use resnet50 or resnet101"),
        (lambda: RtDetrConfig(hidden=100), "model.hidden is 100; expected a multiple of 4 and of 8 heads"),
        (lambda: RtDetrConfig(points=(4, 4)), "expected one for each of C3, C4, C5"),
        (lambda: RtDetrConfig(version=1, points=(4, 2, 1)), "use version 2"),
        (lambda: DeployGraph(small("rt_detr"), 100, 128), "input is 100 x 128 pixels; expected multiples of 32"),
        (
            lambda: DeployGraph(build("rt_detr", replace(SMALL["rt_detr"], queries=22), 3), 32, 32),
            "22 queries asked for, but the image has 21 cells; .*--set model.queries=21",
        ),
    ],
)
def test_what_cannot_be_built_says_why(make: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make()  # type: ignore[operator]
