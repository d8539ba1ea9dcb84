"""Settings of calibration and quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from edgedetr.options import check


@dataclass(frozen=True)
class QuantConfig:
    """How ranges are observed and which part of the graph becomes INT8."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}

    images: int = 128  # evenly spaced over the split; published INT8 detectors use 96 to 300
    observer: Literal["minmax", "percentile", "entropy", "mse"] = "mse"  # of the int8 error itself, per tensor
    percentile: float = 99.99  # only for observer = "percentile": per cent of the magnitudes inside the range
    bias_correction: bool = True  # rounding shifts the mean of each channel; the layer's bias takes it back
    policy: str = "default"  # a shipped policy by name (calib/policy), or a TOML file
    cpu_weights: Literal["auto", "8bit", "7bit"] = "auto"  # auto: 7 bits where this CPU is x86 without VNNI

    def __post_init__(self) -> None:
        check(self, "quant", {"images": (1, 10**7), "percentile": (50, 100)})
