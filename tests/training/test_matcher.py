"""The matcher against brute force, against transformers, and on the cases that break naive ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from edgedetr.training.data.dataset import Target, pad
from edgedetr.training.matcher import Costs, cost_table, match

FOCAL, SOFTMAX = Costs("focal", 2.0, 5.0, 2.0), Costs("softmax", 1.0, 5.0, 2.0)


def random_target(generator: torch.Generator, count: int, classes: int) -> Target:
    center = torch.rand(count, 2, generator=generator) * 0.6 + 0.2
    size = torch.rand(count, 2, generator=generator) * 0.3 + 0.05
    return Target(torch.randint(classes, (count,), generator=generator), torch.cat([center, size], 1))


def random_predictions(generator: torch.Generator, layers: int, batch: int, queries: int, logits: int):
    boxes = torch.cat(
        [
            torch.rand(layers, batch, queries, 2, generator=generator) * 0.6 + 0.2,
            torch.rand(layers, batch, queries, 2, generator=generator) * 0.4 + 0.05,
        ],
        -1,
    )
    return torch.randn(layers, batch, queries, logits, generator=generator) * 2, boxes


@pytest.mark.parametrize("costs", [FOCAL, SOFTMAX], ids=["focal", "softmax"])
@pytest.mark.parametrize("counts", [(3, 0, 2), (1, 4, 0)])
def test_the_assignment_is_the_cheapest_of_all_permutations(costs, counts):
    generator = torch.Generator().manual_seed(sum(counts))
    padded = pad([random_target(generator, count, 3) for count in counts])
    logits, boxes = random_predictions(generator, 2, len(counts), 5, 4)
    (matches,) = match([(logits, boxes)], padded, costs)
    table = cost_table(logits, boxes, padded, costs).double().numpy()
    for layer, (row, count) in itertools.product(range(2), enumerate(counts)):
        mine = matches.image == row
        queries, targets = matches.query[layer, mine], matches.target[layer, mine]
        assert sorted(targets.tolist()) == list(range(count)) and len(set(queries.tolist())) == count
        best = min(
            (
                sum(table[layer, row, q, t] for t, q in enumerate(order))
                for order in itertools.permutations(range(5), count)
            ),
            default=0.0,
        )
        assert np.isclose(table[layer, row, queries, targets].sum(), best)


def test_more_objects_than_queries_match_every_query():
    generator = torch.Generator().manual_seed(1)
    padded = pad([random_target(generator, 6, 3), random_target(generator, 1, 3)])
    (matches,) = match([random_predictions(generator, 1, 2, 4, 3)], padded, FOCAL)
    assert torch.bincount(matches.image).tolist() == [4, 1]
    assert sorted(matches.query[0, :4].tolist()) == [0, 1, 2, 3]
    assert len(set(matches.target[0, :4].tolist())) == 4


def test_images_without_objects_match_nothing():
    empty = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    (matches,) = match([random_predictions(torch.Generator().manual_seed(2), 3, 2, 4, 3)], pad([empty, empty]), FOCAL)
    assert matches.image.shape == (0,) and matches.query.shape == (3, 0)


def test_a_query_of_nan_is_matched_last():
    generator = torch.Generator().manual_seed(3)
    padded = pad([random_target(generator, 3, 3)])
    logits, boxes = random_predictions(generator, 1, 1, 4, 3)
    boxes[0, 0, 2] = float("nan")
    logits[0, 0, 2] = float("inf")
    (matches,) = match([(logits, boxes)], padded, FOCAL)
    assert 2 not in matches.query[0].tolist()


@pytest.mark.parametrize("costs", [FOCAL, SOFTMAX], ids=["focal", "softmax"])
def test_layers_and_groups_are_matched_like_one_by_one_in_transformers(costs):
    from transformers import RTDetrConfig
    from transformers.loss.loss_for_object_detection import HungarianMatcher
    from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

    theirs = RTDetrHungarianMatcher(RTDetrConfig()) if costs is FOCAL else HungarianMatcher(1, 5, 2)
    generator = torch.Generator().manual_seed(4)
    targets = [random_target(generator, count, 3) for count in (4, 0, 7)]
    groups = [random_predictions(generator, 3, 3, 12, 4), random_predictions(generator, 1, 3, 20, 4)]
    for (logits, boxes), matches in zip(groups, match(groups, pad(targets), costs)):
        for layer in range(len(logits)):
            expected = theirs(
                {"logits": logits[layer], "pred_boxes": boxes[layer]},
                [{"class_labels": t.labels, "boxes": t.boxes} for t in targets],
            )
            for row, (queries, columns) in enumerate(expected):
                mine = matches.image == row
                assert torch.equal(matches.query[layer, mine], queries)
                assert torch.equal(matches.target[layer, mine], columns)


def test_corners_are_matched_by_the_distance_of_their_sides():
    """Sparse R-CNN's L1: of x0, y0, x1, y1, pair by pair."""
    generator = torch.Generator().manual_seed(4)
    padded = pad([random_target(generator, 3, 3)])
    logits, boxes = random_predictions(generator, 1, 1, 5, 3)
    table = cost_table(logits, boxes, padded, Costs("focal", 0.0, 1.0, 0.0, corners=True))[0, 0]
    for query, (cx, cy, w, h) in enumerate(boxes[0, 0].tolist()):
        for target, (tx, ty, tw, th) in enumerate(padded.boxes[0].tolist()):
            sides = [
                (cx - w / 2) - (tx - tw / 2),
                (cy - h / 2) - (ty - th / 2),
                (cx + w / 2) - (tx + tw / 2),
                (cy + h / 2) - (ty + th / 2),
            ]
            assert table[query, target].item() == pytest.approx(sum(map(abs, sides)), abs=1e-5)  # float32
