"""DINO equals the paper's equations, written out on torch's own operators; its authors' files are read whole."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from author_state_dicts import dino as in_authors_names
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.box_ops import cxcywh_to_xyxy, paired_giou
from edgedetr.models import FAMILY, build
from edgedetr.models.checkpoints.config_from_state_dict import config_from_state_dict, num_classes
from edgedetr.models.checkpoints.conversion import layout_of, translate
from edgedetr.models.checkpoints.pretrained import load_detector
from edgedetr.models.detector import DetrModel
from edgedetr.models.members.dino import DinoConfig
from edgedetr.training.config import TrainConfig
from edgedetr.training.criterion import Criterion
from edgedetr.training.data.dataset import Target

CLASSES, HEADS, DIM, POINTS, LAYERS, QUERIES = 5, 4, 64, 4, 2, 15
PIXELS = (64, 96)  # rectangular, so that a swap of x and y shows
SMALL = DinoConfig(
    backbone="resnet18",
    backbone_width=0.5,
    backbone_norm="trainable",
    frozen_stages=0,
    hidden=DIM,
    heads=HEADS,
    ffn=96,
    encoder_layers=LAYERS,
    decoder_layers=LAYERS,
    queries=QUERIES,
)
FORMS = {"4 scales": SMALL, "5 scales": replace(SMALL, levels=5)}


def spread(config: DinoConfig, seed: int = 0) -> DetrModel:
    """A model in which every tensor matters: zeros of the first weights are moved."""
    torch.manual_seed(seed)
    ours = build("dino", config, CLASSES).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in ours.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer) * 0.1)
        ours.selector.denoising_class_embed.weight[-1] = 0  # filling
    return ours


# --------------------------------------------------------- the paper's equations; w: tensors under the authors' names


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (DIM,), w[f"{name}.weight"], w[f"{name}.bias"])


def mlp(w: dict[str, Tensor], name: str, x: Tensor, layers: int = 3) -> Tensor:
    for layer in range(layers):
        x = linear(w, f"{name}.layers.{layer}", F.relu(x) if layer else x)
    return x


def feedforward(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.linear2", F.relu(linear(w, f"{name}.linear1", x)))


def logit(x: Tensor) -> Tensor:
    return torch.log(x / (1 - x))


def waves(x: Tensor, temperature: float) -> Tensor:
    """Numbers [...] -> [..., DIM / 2], sine and cosine in turn."""
    values = []
    for number in range(DIM // 2):
        angle = x * 2 * math.pi / temperature ** (2 * (number // 2) / (DIM // 2))
        values.append(angle.cos() if number % 2 else angle.sin())
    return torch.stack(values, -1)


def sampled(w: dict[str, Tensor], name: str, query: Tensor, reference: Tensor, maps: list[Tensor]) -> Tensor:
    """Deformable attention (Zhu et al. 2021, eq. 3): query [B, N, C], reference [B, N, 2|4], maps [B, C, H, W]."""
    batch, count = query.shape[:2]
    offsets = linear(w, f"{name}.sampling_offsets", query).view(batch, count, HEADS, len(maps), POINTS, 2)
    weights = linear(w, f"{name}.attention_weights", query).view(batch, count, HEADS, len(maps) * POINTS).softmax(-1)
    heads = []
    for head in range(HEADS):
        columns = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
        values = []
        for level, image in enumerate(maps):
            height, width = image.shape[2:]
            value = linear(w, f"{name}.value_proj", image.permute(0, 2, 3, 1))[..., columns].permute(0, 3, 1, 2)
            offset, center = offsets[:, :, head, level], reference[:, :, None, :2]
            if reference.shape[-1] == 4:
                place = center + offset / POINTS * reference[:, :, None, 2:] / 2
            else:
                place = center + offset / torch.tensor([width, height])
            values.append(F.grid_sample(value, 2 * place - 1, align_corners=False))  # [B, D, N, P]
        heads.append((torch.cat(values, -1) * weights[:, None, :, head]).sum(-1))  # [B, D, N]
    return linear(w, f"{name}.output_proj", torch.cat(heads, 1).transpose(1, 2))


def attended(w: dict[str, Tensor], name: str, query: Tensor, value: Tensor) -> Tensor:
    """Self-attention by torch's own function, which takes [N, B, C]."""
    q, v = query.transpose(0, 1), value.transpose(0, 1)
    packed = (w[f"{name}.in_proj_weight"], w[f"{name}.in_proj_bias"])
    out = (w[f"{name}.out_proj.weight"], w[f"{name}.out_proj.bias"])
    return F.multi_head_attention_forward(q, q, v, DIM, HEADS, *packed, None, None, False, 0.0, *out)[0].transpose(0, 1)


def encoded(w: dict[str, Tensor], features: list[Tensor], levels: int) -> list[Tensor]:
    maps: list[Tensor] = []
    for level in range(levels):
        source, step = (features[level], 1) if level < len(features) else (features[-1], 2)
        kernel, bias = w[f"input_proj.{level}.0.weight"], w[f"input_proj.{level}.0.bias"]
        projected = F.conv2d(source, kernel, bias, step, kernel.shape[-1] // 2)
        maps.append(F.group_norm(projected, 32, w[f"input_proj.{level}.1.weight"], w[f"input_proj.{level}.1.bias"]))
    position, center = [], []
    for level, (height, width) in enumerate(image.shape[2:] for image in maps):
        row, column = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
        # DAB-DETR's temperature; cells are counted from 1 here, and from their centers where attention samples.
        place = torch.cat([waves((row + 1) / height, 20.0), waves((column + 1) / width, 20.0)], -1)
        position.append(place + w["transformer.level_embed"][level])
        center.append(torch.stack([(column + 0.5) / width, (row + 0.5) / height], -1))
    tokens = torch.cat([image.flatten(2).transpose(1, 2) for image in maps], 1)
    where, around = torch.cat(position), torch.cat(center).expand(len(tokens), -1, -1)
    for layer in range(LAYERS):
        name = f"transformer.encoder.layers.{layer}"
        tokens = norm(w, f"{name}.norm1", tokens + sampled(w, f"{name}.self_attn", tokens + where, around, maps))
        tokens = norm(w, f"{name}.norm2", tokens + feedforward(w, name, tokens))
        parts = tokens.split([image.shape[2] * image.shape[3] for image in maps], 1)
        maps = [part.transpose(1, 2).view_as(image) for part, image in zip(parts, maps)]
    return maps


def proposals(w: dict[str, Tensor], maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Class logits and boxes of the best QUERIES cells of every image."""
    tokens, anchors = torch.cat([image.flatten(2).transpose(1, 2) for image in maps], 1), []
    for level, (height, width) in enumerate(image.shape[2:] for image in maps):
        side = 0.05 * 2**level
        for row in range(height):
            anchors += [[(column + 0.5) / width, (row + 0.5) / height, side, side] for column in range(width)]
    boxes = torch.tensor(anchors)
    inside = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
    start = logit(boxes).masked_fill(~inside[:, None], math.inf)
    found = norm(w, "transformer.enc_output_norm", linear(w, "transformer.enc_output", tokens * inside[:, None]))
    logits = linear(w, "transformer.enc_out_class_embed", found)
    moved = (mlp(w, "transformer.enc_out_bbox_embed", found) + start).sigmoid()
    best = [image.max(-1).values.topk(QUERIES).indices for image in logits]
    return (
        torch.stack([row[which] for row, which in zip(logits, best)]),
        torch.stack([row[which] for row, which in zip(moved, best)]),
    )


def decoded(w: dict[str, Tensor], maps: list[Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and boxes [L, B, N, ...] of every layer; start [B, N, 4], where the boxes begin."""
    content = w["transformer.tgt_embed.weight"].expand(len(start), -1, -1)  # mixed selection: not the chosen tokens
    reference = before = start.detach()
    logits, boxes = [], []
    for layer in range(LAYERS):
        name = f"transformer.decoder.layers.{layer}"
        sine = torch.cat([waves(reference[..., axis], 10000.0) for axis in (1, 0, 2, 3)], -1)
        position = mlp(w, "transformer.decoder.ref_point_head", sine, 2)
        content = norm(w, f"{name}.norm2", content + attended(w, f"{name}.self_attn", content + position, content))
        seen = sampled(w, f"{name}.cross_attn", content + position, reference, maps)
        content = norm(w, f"{name}.norm1", content + seen)
        content = norm(w, f"{name}.norm3", content + feedforward(w, name, content))
        features = norm(w, "transformer.decoder.norm", content)
        logits.append(linear(w, f"class_embed.{layer}", features))
        # Look forward twice: the box of the layer before keeps its gradient, but only in the box that is predicted.
        boxes.append((mlp(w, f"bbox_embed.{layer}", features) + logit(before)).sigmoid())
        before = (mlp(w, f"bbox_embed.{layer}", content) + logit(reference)).sigmoid()
        reference = before.detach()
    return torch.stack(logits), torch.stack(boxes)


def both_ways(ours: DetrModel, images: Tensor) -> list[list[Tensor]]:
    """Logits and boxes of the layers, then of the proposals: as the model computes them, and by the equations."""
    with torch.no_grad():
        features = ours.backbone(images)
    memory = ours.encoder(features)
    got = ours.decode(ours.select(memory), memory)
    w = in_authors_names({**ours.state_dict(), **dict(ours.named_parameters())}, LAYERS)
    maps = encoded(w, features, len(memory.shapes))
    encoder = proposals(w, maps)
    return [[got.logits, got.boxes, *got.encoder], [*decoded(w, maps, encoder[1]), *encoder]]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_predictions_equal_the_papers_equations(form: str) -> None:
    found, wanted = both_ways(spread(FORMS[form]), torch.randn(2, 3, *PIXELS))
    for number, (mine, theirs) in enumerate(zip(found, wanted)):
        assert theirs.std() > 1e-2, "the equations say something"
        # float32 through 4 layers; measured 3e-6 and 1e-6
        torch.testing.assert_close(mine, theirs, atol=1e-5 if number % 2 else 1e-4, rtol=0)


def test_gradients_equal_those_of_the_papers_equations() -> None:
    """What is a constant to which loss: the start of the decoder, the references, and not the box looked back at."""
    ours = spread(SMALL)
    learning = {name: p for name, p in ours.named_parameters() if not name.startswith(("backbone.", "selector.deno"))}
    results, weights = [], None
    for parts in both_ways(ours, torch.randn(2, 3, *PIXELS)):
        weights = weights or [torch.randn_like(part) for part in parts]
        loss = sum((part * weight).sum() for part, weight in zip(parts, weights))
        results.append(torch.autograd.grad(loss, list(learning.values())))
    for name, mine, theirs in zip(learning, *results):
        # Sums over up to 128 tokens in another order; keys' biases have no gradient but rounding.
        assert float((mine - theirs).abs().max()) < 1e-3 * float(theirs.abs().max()) + 1e-4, name


def test_the_loss_is_focal_l1_and_giou_of_every_layer_and_of_the_chosen_proposals() -> None:
    """By loops, with the authors' weights: 1, 5 and 2 for the losses, 2, 5 and 2 for the matching costs."""
    ours, generator = spread(SMALL), torch.Generator().manual_seed(4)
    targets = [
        Target(
            torch.randint(CLASSES, (count,), generator=generator), torch.rand(count, 4, generator=generator) * 0.3 + 0.2
        )
        for count in (3, 1)
    ]
    with torch.no_grad():
        out = ours(torch.randn(2, 3, *PIXELS))
        mine = Criterion(TrainConfig(weight_class=1.0), "focal")(out, targets).total
    layers = [*zip(out.logits, out.boxes), out.encoder]
    assert layers[-1][0].shape == (2, QUERIES, CLASSES), "the loss is of the chosen proposals, not of every cell"
    wanted = 0.0
    for logits, boxes in layers:
        for image, target in enumerate(targets):
            prob, box = logits[image].sigmoid(), boxes[image]
            hit, miss = -0.25 * (1 - prob) ** 2 * prob.log(), -0.75 * prob**2 * (1 - prob).log()
            cost = torch.empty(QUERIES, len(target.labels))
            for query in range(QUERIES):
                for number, (label, wish) in enumerate(zip(target.labels, target.boxes)):
                    giou = paired_giou(cxcywh_to_xyxy(box[query]), cxcywh_to_xyxy(wish))
                    class_ = hit[query, label] - miss[query, label]
                    cost[query, number] = 2 * class_ + 5 * (box[query] - wish).abs().sum() - 2 * giou
            loss = miss.sum()
            for query, number in zip(*linear_sum_assignment(cost.numpy())):
                label, wish = target.labels[number], target.boxes[number]
                giou = paired_giou(cxcywh_to_xyxy(box[query]), cxcywh_to_xyxy(wish))
                loss += hit[query, label] - miss[query, label]
                loss += 5 * (box[query] - wish).abs().sum() + 2 * (1 - giou)
            wanted += float(loss) / 4
    assert float(mine) == pytest.approx(wanted, rel=1e-4)


def test_look_forward_twice_is_an_option_of_deformable_detr_and_off_by_default() -> None:
    """With it a box's loss reaches the box head of the layer before; without it that head has no gradient."""
    member = FAMILY["deformable_detr"]
    shared = {
        name: getattr(SMALL, name) for name in ("backbone", "backbone_width", "hidden", "heads", "ffn", "queries")
    }
    found = {}
    for twice in (False, True):
        torch.manual_seed(0)
        config = member.config(**shared, encoder_layers=1, decoder_layers=2, refine=True, look_forward_twice=twice)
        model = build("deformable_detr", config, CLASSES).eval()
        model(torch.randn(1, 3, *PIXELS, generator=torch.Generator().manual_seed(1))).boxes[1].sum().backward()
        gradient = model.decoder.boxes.box[0].layers[-1].bias.grad
        found[twice] = 0.0 if gradient is None else float(gradient.abs().sum())
    assert found[False] == 0
    assert found[True] > 1e-3
    with pytest.raises(ModelError, match="add --set model.refine=true"):
        member.config(look_forward_twice=True)


def test_the_authors_file_is_read_whole(tmp_path: Path) -> None:
    source, target = spread(SMALL), spread(SMALL, seed=1)
    weights = in_authors_names(source.state_dict(), LAYERS)
    filling = weights["label_enc.weight"].clone()
    filling[-1] = 3.0  # nothing reads theirs
    path = tmp_path / "checkpoint0011_4scale.pth"
    torch.save({"model": {**weights, "label_enc.weight": filling}, "epoch": 11}, path)
    loaded = load_detector(target, "dino", str(path))
    assert loaded.tensors == len([name for name in source.state_dict() if "num_batches" not in name])
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]) or "num_batches" in name, name
    assert layout_of("dino", weights) == "IDEA-Research/DINO"
    ours = translate("dino", weights)
    found = replace(DinoConfig(heads=HEADS), **config_from_state_dict(FAMILY["dino"], ours, HEADS))
    assert found == replace(SMALL, backbone_norm="frozen", frozen_stages=2)  # which no tensor shows
    assert num_classes(ours, "sigmoid") == CLASSES


@pytest.mark.parametrize(
    "change, message",
    [
        ({"transformer.enc_out_class_embed.bias": None}, r"missing \(1\): selector.score.bias"),
        ({"transformer.patterns.weight": torch.zeros(1)}, r"left over \(1\): patterns.weight"),
        ({"class_embed.1.bias": torch.ones(CLASSES)}, "expected equal copies"),
    ],
    ids=["missing", "left over", "heads per layer"],
)
def test_a_file_that_does_not_fit_is_refused(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    ours = spread(SMALL)
    weights = {**in_authors_names(ours.state_dict(), LAYERS), **change}
    torch.save({"model": {key: tensor for key, tensor in weights.items() if tensor is not None}}, tmp_path / "x.pth")
    with pytest.raises(ModelError, match=message):
        load_detector(ours, "dino", str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    "levels, strides, million",
    # The authors' model, built by their code from config/DINO/DINO_4scale.py and DINO_5scale.py, has these.
    [(4, [8, 16, 32, 64], 46.893), (5, [4, 8, 16, 32, 64], 47.256)],
)
def test_parameter_counts_are_those_of_the_authors_model(levels: int, strides: list[int], million: float) -> None:
    with torch.device("meta"):
        detector = build("dino", DinoConfig(levels=levels), 91)
        memory = detector.encode(torch.zeros(1, 3, 64, 64))
    assert sum(p.numel() for p in detector.parameters()) / 1e6 == pytest.approx(million, rel=1e-4)
    assert memory.strides == strides


def test_levels_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ModelError, match=r"model.levels is 2, model.points 4; expected 3 \(C3 to C5\)"):
        DinoConfig(levels=2)


def test_one_pair_of_heads_serves_all_layers() -> None:
    ours = build("dino", SMALL, CLASSES)
    assert sum(isinstance(part, nn.Linear) and part.out_features == CLASSES for part in ours.modules()) == 2
