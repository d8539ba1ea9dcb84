"""Devices, machines and precision, by lightning-fabric."""

from __future__ import annotations

from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from edgedetr.train.config import TrainConfig

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def launch(config: TrainConfig) -> Fabric:
    """Devices and precision. Several devices of one machine are started from here; for several machines, on each:

    torchrun --nnodes N --nproc-per-node D --rdzv-endpoint HOST:PORT -m edgedetr.cli train ... --set train.nodes=N
    --set train.devices=D
    """
    many = config.devices * config.nodes > 1
    # Queries of a batch without objects leave the denoising embedding unused, which only this setting allows.
    strategy = DDPStrategy(find_unused_parameters=True) if many else "auto"
    fabric = Fabric(accelerator="auto", devices=config.devices, num_nodes=config.nodes, strategy=strategy,
                    precision=PRECISIONS[config.precision])  # type: ignore[arg-type]  # a Literal of the same words
    fabric.launch()
    return fabric
