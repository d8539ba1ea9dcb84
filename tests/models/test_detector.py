"""DetrModel's own part: maps and tokens are the same numbers, and each selector's abilities are known."""

from __future__ import annotations

import pytest
import torch
from members import CLASSES, SMALL, small

from edgedetr.errors import ModelError
from edgedetr.models import FAMILY, build
from edgedetr.models.records import Memory, flatten_maps


def test_maps_become_tokens_level_by_level_and_row_by_row_and_back() -> None:
    maps = [torch.rand(2, 5, 3, 4), torch.rand(2, 5, 2, 1)]
    tokens, shapes = flatten_maps(maps)
    assert shapes == [(3, 4), (2, 1)] and tokens.shape == (2, 14, 5)
    torch.testing.assert_close(tokens[1, 1 * 4 + 2], maps[0][1, :, 1, 2], rtol=0, atol=0)
    torch.testing.assert_close(tokens[0, 12 + 1], maps[1][0, :, 1, 0], rtol=0, atol=0)
    for level, map_ in zip(Memory(tokens, shapes, [8, 16]).maps(), maps):
        assert torch.equal(level, map_)


@pytest.mark.parametrize("name", FAMILY)
def test_a_member_has_noised_queries_where_its_configuration_has_denoising(name: str) -> None:
    model = build(name, SMALL[name], CLASSES)
    labels, boxes = torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2, 4), 0.5)
    if not hasattr(SMALL[name], "denoising"):
        assert not model.denoises
        with pytest.raises(ModelError, match=f"{name} has no noised queries; use train.denoising=0"):
            model.noised_queries(labels, boxes)
    elif model.denoises:
        assert model.noised_queries(labels, boxes).content.shape[:2] == (1, 2)
    else:
        with pytest.raises(ModelError, match=r"built without model\.denoising.*use train\.denoising=0"):
            model.noised_queries(labels, boxes)


@pytest.mark.parametrize("name", FAMILY)
def test_only_two_stage_deformable_detr_has_proposals_of_one_class(name: str) -> None:
    assert small(name).class_agnostic_proposals == (name == "deformable_detr")


def test_progress_changes_the_number_of_queries_of_efficient_detr_alone() -> None:
    for name in FAMILY:
        model, counts = small(name), []
        with torch.no_grad():
            memory = model.encode(torch.rand(1, 3, 96, 128))
            for fraction in (0.0, 0.5, 1.0):
                model.progress(fraction)
                counts.append(model.select(memory).content.shape[1])
        queries = SMALL[name].queries
        assert counts == ([20, 16, 12] if name == "efficient_detr" else [queries] * 3), name
