"""Denoising queries: what they are made of, and that the real queries never notice them."""

from __future__ import annotations

import pytest
import torch

from edgedetr.boxes import iou
from edgedetr.layers.boxes import cxcywh_to_xyxy
from edgedetr.models import build
from edgedetr.models.detector import Queries
from edgedetr.models.rt_detr import RtDetrConfig
from edgedetr.train import denoising
from edgedetr.train.targets import Target, pad

CLASSES = 3
CONFIG = RtDetrConfig(backbone_width=0.125, backbone_weights="random", backbone_norm="trainable", hidden=32, heads=4,
                      encoder_ffn=32, decoder_ffn=32, decoder_layers=2, queries=10)


def targets(*counts: int):
    generator = torch.Generator().manual_seed(sum(counts))
    near, size = torch.tensor([0.4, 0.4, 0.1, 0.1]), torch.tensor([0.2, 0.2, 0.1, 0.1])     # noise stays in the picture
    return pad([Target(torch.randint(CLASSES, (n,), generator=generator),
                       near + size * torch.rand(n, 4, generator=generator)) for n in counts])


def test_groups_fill_the_wish_and_positive_copies_stay_nearer_than_negative_ones():
    padded = targets(4, 2)
    noised = denoising.noise(padded, CLASSES, 10, label_noise=0.0, box_noise=1.0)
    assert (noised.groups, noised.per_group, len(noised)) == (2, 4, 16)
    truth, found = cxcywh_to_xyxy(padded.boxes), cxcywh_to_xyxy(noised.boxes)
    shift = (found.reshape(2, 2, 2, 4, 4) - truth[:, None, None]).abs()     # [picture, group, sign, object, side]
    half = padded.boxes[..., 2:].repeat(1, 1, 2)[:, None] / 2
    for row, count in enumerate((4, 2)):
        near, far, limit = shift[row, :, 0, :count], shift[row, :, 1, :count], half[row, :, :count]
        rounding = 1e-6     # float32 of a coordinate in 0..1
        assert (near <= limit + rounding).all()
        assert (far >= limit - rounding).all() and (far <= 2 * limit + rounding).all()
    assert noised.labels[1].reshape(4, 4)[:, 2:].eq(CLASSES).all()          # the emptier picture's filling


def test_half_of_the_share_of_labels_is_drawn_anew():
    torch.manual_seed(0)
    padded = targets(50, 50)
    noised = denoising.noise(padded, 10, 5000, label_noise=0.5, box_noise=0.0)
    changed = (noised.labels != padded.labels.repeat(1, 2 * noised.groups)).float().mean()
    # A quarter is drawn, a tenth of that as it was; 20,000 draws have a standard deviation of 0.003.
    assert abs(float(changed) - 0.25 * 0.9) < 0.01


def test_without_noise_every_positive_query_is_its_object():
    padded = targets(3, 0, 5)
    noised = denoising.noise(padded, CLASSES, 20, label_noise=0.0, box_noise=0.0)
    matches = denoising.positives(noised, padded, layers=1)
    assert len(matches.image) == noised.groups * 8
    query, target = (matches.image, matches.query[0]), (matches.image, matches.target[0])
    torch.testing.assert_close(noised.boxes[query], padded.boxes[target])
    assert torch.equal(noised.labels[query], padded.labels[target])
    assert torch.bincount(matches.image, minlength=3).tolist() == [3 * noised.groups, 0, 5 * noised.groups]


def test_a_batch_without_objects_has_no_denoising():
    assert denoising.noise(targets(0, 0), CLASSES, 100, 0.5, 1.0) is None


def test_the_mask_is_what_the_rule_says_pair_by_pair():
    noised = denoising.noise(targets(2, 1), CLASSES, 6, 0.5, 1.0)
    queries = Queries(torch.zeros(2, 3, 8), reference=torch.full((2, 3, 4), 0.5))
    mask = denoising.prepend(queries, noised, torch.nn.Embedding(CLASSES + 1, 8)).self_mask
    count = len(noised)
    for row in range(count + 3):
        for column in range(count + 3):
            if column >= count:
                hidden = False                                              # everybody sees the real queries
            elif row >= count:
                hidden = True                                               # real ones do not see noised ones
            else:
                hidden = row // 4 != column // 4                            # 2 objects, positive and negative
            assert bool(mask[row, column]) == hidden, (row, column)


@pytest.mark.parametrize("seed", [0, 1])
def test_noised_queries_change_nothing_for_the_real_ones(seed):
    torch.manual_seed(seed)
    detector = build("rt_detr", CONFIG, CLASSES).eval()
    images, padded = torch.rand(2, 3, 64, 64), targets(3, 1)
    with torch.no_grad():
        memory = detector.encode(images)
        queries = detector.select(memory)
        alone = detector.decode(queries, memory)
        for _ in range(2):      # other noise each time
            noised = denoising.noise(padded, CLASSES, 12, 0.5, 1.0)
            together = detector.decode(
                denoising.prepend(queries, noised, detector.selector.denoising_class_embed), memory)
            real, denoised = denoising.split(together, noised, padded)
            # The same sums with more rows beside them: float32 in another blocking.
            torch.testing.assert_close(real.logits, alone.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(real.boxes, alone.boxes, rtol=1e-4, atol=1e-5)
            assert denoised.logits.shape == (2, 2, len(noised), CLASSES)


def test_negative_copies_overlap_less_than_positive_ones_on_average():
    padded = targets(6)
    noised = denoising.noise(padded, CLASSES, 600, 0.0, 1.0)
    truth, found = cxcywh_to_xyxy(padded.boxes)[0].numpy(), cxcywh_to_xyxy(noised.boxes)[0].numpy()
    overlap = iou(truth, found).reshape(6, noised.groups, 2, 6)
    own = overlap[range(6), :, :, range(6)].mean((0, 1))
    assert own[0] > own[1] + 0.1
