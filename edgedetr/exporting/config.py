"""Settings of the exported graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from edgedetr.options import check


@dataclass(frozen=True)
class ExportConfig:
    """How model.onnx is exported; the FP16 and INT8 graphs are made from it."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}

    sampling: Literal["gather", "grid_sample"] = "gather"  # GridSample is miscompiled by TensorRT 10.14 and 11.1
    opset: Literal[19] = 19  # FP16 Q/DQ need >= 19; TensorRT <= 10.x reads GridSample of opset 20 as "nearest"
    dynamic_batch: bool = False  # a fixed batch of 1 is what edge runtimes optimize best
    decoder_layers: int = 0  # run only the first ones, faster and less accurate (RT-DETR supports it); 0 = all

    def __post_init__(self) -> None:
        check(self, "export", {"decoder_layers": (0, 1000)})  # 0: all of them
