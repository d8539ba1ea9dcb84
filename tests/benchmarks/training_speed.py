"""How fast a training step is, compared with the Hugging Face class of the same size: forward, loss, backward, AdamW.

usage: python tests/benchmarks/training_speed.py [--member rt_detr detr ...] [--pixels 320] [--batch 4] [--steps 5]
       [--threads 2] [--backbone frozen|trained] [--precision 32|bf16] [--device cpu|cuda] [--json]

Both sides train a COCO-sized network with random weights, a frozen BatchNorm backbone, no dropout and 14 objects a
image. Each has a process, as a training has, and they take their steps in turns, so that what else the machine does
hits both, while neither works in memory that the other left in pieces. The Hugging Face classes freeze the whole of a
backbone of their own library ("frozen"); "trained" trains the same stages on both sides: all but the stem and the first
one, and all of RT-DETR's, D-FINE's and RF-DETR's. "bf16" has both sides' forward passes under autocast, as
`train.precision=bf16` has. On "cuda" a step ends when the GPU has finished it; TF32 is as PyTorch has it (in
convolutions alone). d_fine is compared at size S. Needs transformers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from edgedetr.models import FAMILY, build
from edgedetr.training.config import TrainConfig
from edgedetr.training.data.dataset import Target, pad
from edgedetr.training.optimizer import adamw
from edgedetr.training.train import keep_freed_memory
from edgedetr.training.training_module import TrainingModule

CLASSES, OBJECTS = 3, 14
# Times as fast as the Hugging Face class.
LIMITS = {"detr": 1.5, "conditional_detr": 1.5, "deformable_detr": 4.0, "rt_detr": 1.5, "rf_detr": 1.5, "d_fine": 1.5}
# Our configuration, where the default of the member is not the size that is compared: D-FINE-S.
OURS: dict[str, dict[str, Any]] = {
    "d_fine": {"backbone": "hgnetv2_b0", "frozen_stages": 0, "expansion": 0.5, "fusion_blocks": 1, "decoder_layers": 3}
}


def theirs(member: str) -> torch.nn.Module:
    """The Hugging Face class of a member at its published size, random weights."""
    import transformers as hf

    still = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}

    def resnet50(*stages: str) -> dict[str, object]:
        return {
            "use_pretrained_backbone": False,
            "use_timm_backbone": False,
            "backbone": None,
            **still,
            "backbone_config": hf.ResNetConfig(out_features=list(stages)),
            "num_labels": CLASSES,
        }

    if member == "detr":
        return hf.DetrForObjectDetection(hf.DetrConfig(**resnet50("stage4")))
    if member == "conditional_detr":
        return hf.ConditionalDetrForObjectDetection(hf.ConditionalDetrConfig(**resnet50("stage4")))
    if member == "deformable_detr":
        return hf.DeformableDetrForObjectDetection(hf.DeformableDetrConfig(**resnet50("stage2", "stage3", "stage4")))
    if member == "rf_detr":
        return hf.RfDetrForObjectDetection(rf_detr_nano())
    if member == "d_fine":
        return hf.DFineForObjectDetection(d_fine_s())
    backbone = hf.RTDetrResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return hf.RTDetrForObjectDetection(
        hf.RTDetrConfig(
            backbone_config=backbone,
            num_labels=CLASSES,
            encoder_in_channels=[128, 256, 512],
            decoder_layers=3,
            hidden_expansion=0.5,
            **still,
        )
    )


def rf_detr_nano() -> object:
    """RF-DETR nano, with 13 groups of queries."""
    import transformers as hf

    return hf.RfDetrConfig(
        backbone_config={
            "model_type": "rf_detr_dinov2",
            "hidden_size": 384,
            "num_attention_heads": 6,
            "num_hidden_layers": 12,
            "patch_size": 16,
            "image_size": 384,
            "num_windows": 2,
            "out_indices": [3, 6, 9, 12],
        },
        decoder_layers=2,
        decoder_n_points=2,
        num_labels=CLASSES,
        dropout=0.0,
    )


def d_fine_s() -> object:
    import transformers as hf

    return hf.DFineConfig(
        backbone_config=hf.HGNetV2Config(
            stem_channels=[3, 16, 16],
            stage_in_channels=[16, 64, 256, 512],
            stage_mid_channels=[16, 32, 64, 128],
            stage_out_channels=[64, 256, 512, 1024],
            stage_num_blocks=[1, 1, 2, 1],
            stage_numb_of_layers=[3, 3, 3, 3],
            hidden_sizes=[64, 256, 512, 1024],
            use_learnable_affine_block=True,
            out_features=["stage2", "stage3", "stage4"],
        ),
        num_labels=CLASSES,
        decoder_layers=3,
        decoder_n_points=[3, 6, 3],
        depth_mult=0.34,
        hidden_expansion=0.5,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )


def trains(name: str, member: str, backbone: str) -> bool:
    """Whether a parameter of the Hugging Face class learns, by its name."""
    if ".backbone." not in name or name.startswith("model.backbone.projector."):
        return True
    first = name.startswith("model.backbone.") and ("embedder" in name or "stages.0." in name)
    return backbone == "trained" and (member in ("rt_detr", "rf_detr", "d_fine") or not first)


def their_step(
    member: str, pixels: int, batch: int, backbone: str, precision: str = "32", device: str = "cpu"
) -> Callable[[], None]:
    model = theirs(member).train().to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name, member, backbone))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    images = torch.rand(batch, 3, pixels, pixels).to(device)
    labels = [{"class_labels": target.labels.to(device), "boxes": target.boxes.to(device)} for target in targets(batch)]

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        finish(device)

    return step


def our_step(
    member: str, pixels: int, batch: int, backbone: str, precision: str = "32", device: str = "cpu"
) -> Callable[[], None]:
    if device == "cpu":
        keep_freed_memory()  # as `train` does
    config = FAMILY[member].config(**{"backbone_weights": "random", "dropout": 0.0, **OURS.get(member, {})})
    settings = TrainConfig(lr=1e-4, backbone_lr_factor=0.1, precision="32")
    detector = build(member, config, CLASSES).train().to(device).to(memory_format=torch.channels_last)
    if backbone == "frozen":
        detector.backbone.requires_grad_(False)
    training_module = TrainingModule(detector, settings, config.class_loss, CLASSES)
    optimizer, padded = adamw(detector, settings), pad(targets(batch)).to(torch.device(device))
    images = torch.randint(0, 256, (batch, 3, pixels, pixels), dtype=torch.uint8).to(device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = training_module(images, lambda: padded, float(batch * OBJECTS))[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        finish(device)

    return step


def finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def steps(
    side: str,
    member: str,
    pixels: int,
    batch: int,
    backbone: str,
    precision: str,
    device: str,
    threads: int,
    pipe: Connection,
) -> None:
    """One side, in its own process: a step, timed, each time that it receives True."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = (our_step if side == "ours" else their_step)(member, pixels, batch, backbone, precision, device)
    step()
    pipe.send(None)
    while pipe.recv():
        begun = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - begun)


def targets(batch: int) -> list[Target]:
    return [Target(torch.randint(0, CLASSES, (OBJECTS,)), torch.rand(OBJECTS, 4) * 0.2 + 0.3) for _ in range(batch)]


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name in LIMITS if name in FAMILY]
    parser.add_argument("--member", nargs="+", default=known, choices=known)
    parser.add_argument("--pixels", type=int, default=320)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backbone", choices=["frozen", "trained"], default="frozen")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows, begin = [], multiprocessing.get_context("spawn")
    for member in options.member:
        sides = {}
        for side in ("ours", "hf"):
            here, there = begin.Pipe()
            words = (
                side,
                member,
                options.pixels,
                options.batch,
                options.backbone,
                options.precision,
                options.device,
                options.threads,
                there,
            )
            sides[side] = here, begin.Process(target=steps, args=words, daemon=True)
            sides[side][1].start()
            here.recv()  # it is ready, and has taken a step: the first allocates memory and chooses kernels
        seconds: dict[str, list[float]] = {"ours": [], "hf": []}
        for _ in range(options.steps):
            for side, (pipe, _process) in sides.items():
                pipe.send(True)
                seconds[side].append(pipe.recv())
        for pipe, process in sides.values():
            pipe.send(False)
            process.join()
        ours, hf = (options.batch / median(seconds[side]) for side in ("ours", "hf"))
        rows.append({"member": member, "ours": ours, "hf": hf, "ratio": ours / hf, "asked": LIMITS[member]})
        print(
            f"{member:18} ours {ours:6.2f}  hf {hf:6.2f} images/s  ratio {ours / hf:5.2f}  asked {LIMITS[member]}",
            file=sys.stderr,
            flush=True,
        )
    if options.json:
        print(
            json.dumps(
                {
                    "pixels": options.pixels,
                    "batch": options.batch,
                    "threads": options.threads,
                    "backbone": options.backbone,
                    "precision": options.precision,
                    "device": options.device,
                    "rows": rows,
                }
            )
        )
    sys.exit(0 if all(row["ratio"] >= row["asked"] for row in rows) else 3)


if __name__ == "__main__":
    main()
