"""Devices, machines and precision, by lightning-fabric."""

from __future__ import annotations

import logging

from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from edgedetr.runtime.cpu import tiles_bfloat16
from edgedetr.training.config import TrainConfig
from edgedetr.training.memory import keep_freed

log = logging.getLogger(__name__)

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def launch(config: TrainConfig) -> Fabric:
    """Devices and precision. Several devices of one machine are started from here; for several machines, on each:

    torchrun --nnodes N --nproc-per-node D --rdzv-endpoint HOST:PORT -m edgedetr train ... --set train.nodes=N
    --set train.devices=D
    """
    many = config.devices * config.nodes > 1
    # Queries of a batch without objects leave the denoising embedding unused, which only this setting allows.
    strategy = DDPStrategy(find_unused_parameters=True) if many else "auto"
    fabric = Fabric(
        accelerator="auto",
        devices=config.devices,
        num_nodes=config.nodes,
        strategy=strategy,
        precision=PRECISIONS[config.precision],  # type: ignore[arg-type]  # a Literal of the same words
    )
    fabric.launch()
    if fabric.device.type == "cpu":
        keep_freed()
        if fabric.is_global_zero and config.precision == "32" and tiles_bfloat16():
            log.info(
                "this CPU multiplies bfloat16 in tiles (AMX): with --set train.precision=bf16 a step takes 0.5 "
                "to 0.7 of the time (docs/training.md)"
            )
    return fabric
