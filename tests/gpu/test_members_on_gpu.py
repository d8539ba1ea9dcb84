"""Every member computes on a GPU what it computes on the CPU, forwards and backwards, and trains in half precision."""

from __future__ import annotations

import copy

import pytest
import torch
from members import HEIGHT, WIDTH, deployed, sample_images, small

from edgedetr.models import FAMILY

member = pytest.mark.parametrize("name", FAMILY)


def both(name, cuda):
    """The little detector on the CPU, and a copy on the GPU."""
    detector = small(name)
    return detector, copy.deepcopy(detector).to(cuda)


@member
@torch.no_grad()
def test_detections_are_those_of_the_cpu(name, cuda):
    (here, there), images = both(name, cuda), sample_images()
    expected, found = here(here.normalize(images)), there(there.normalize(images.to(cuda)))
    # float32 sums in another order, as between kernels of the CPU
    torch.testing.assert_close(found.logits.cpu(), expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.boxes.cpu(), expected.boxes, atol=1e-5, rtol=0)


@member
@pytest.mark.parametrize("sampling", ["gather", "grid_sample"])
@torch.no_grad()
def test_the_deployed_graph_runs_there(name, sampling, cuda):
    graph, images = deployed(name, sampling), sample_images()
    expected = graph(images)
    found = copy.deepcopy(graph).to(cuda)(images.to(cuda))
    torch.testing.assert_close(found[0].cpu(), expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1].cpu(), expected[1], atol=1e-5, rtol=0)
    assert found[1].shape[2] == 4 and (graph.height, graph.width) == (HEIGHT, WIDTH)


@member
def test_gradients_are_those_of_the_cpu(name, cuda):
    """In float64: in float32 a ReLU or a cell of a map that flips is worth up to 2e-3 of the gradient, on a CPU too."""
    images, gradients = sample_images().double(), []
    for detector in both(name, cuda):
        detector.double().train()
        for part in detector.modules():
            if isinstance(getattr(part, "dropout", None), float):
                part.dropout = 0.0
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        out = detector(detector.normalize(images.to(next(detector.parameters()).device)))
        (out.logits.square().mean() + out.boxes.square().mean()).backward()
        gradients.append(torch.cat([p.grad.cpu().flatten() for p in detector.parameters() if p.grad is not None]))
    off = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert off < 1e-6  # a wrong sign, factor or sum is off by 0.1 and more


@member
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_trains_and_what_is_detected_stays_float32(name, kind, cuda):
    detector = small(name).train().to(cuda)
    with torch.autocast("cuda", kind):
        out = detector(detector.normalize(sample_images().to(cuda)))
    assert torch.isfinite(out.logits).all() and torch.isfinite(out.boxes).all()
    assert out.boxes.dtype == out.logits.dtype == torch.float32
    (out.logits.square().mean() + out.boxes.square().mean()).backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)
