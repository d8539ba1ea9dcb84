"""Settings of calibration and quantization."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from edgedetr.options import check
from edgedetr.quantization.observers import LEARNED, OBSERVER_NAMES, OBSERVERS

if TYPE_CHECKING:
    ObserverName = str  # a type checker does not evaluate the table
else:
    ObserverName = Literal[OBSERVER_NAMES]


@dataclass(frozen=True)
class QuantConfig:
    """How ranges are observed, and which part of the graph becomes INT8."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}

    images: int = 128  # evenly spaced over the split; published INT8 detectors use 96 to 300
    # How a range follows from the observed values of a tensor
    observer: ObserverName = field(
        default="mse",
        metadata={
            "words": {
                **{name: observer.summary for name, observer in OBSERVERS.items()},
                LEARNED: "no observer: the ranges that `edgedetr train --qat` learned",
            }
        },
    )
    percentile: float = 99.99  # only for observer = "percentile": per cent of the magnitudes inside the range
    bias_correction: bool = True  # rounding shifts the mean of each channel; the layer's bias takes it back
    smooth: float = 0.0  # SmoothQuant's alpha: 0 = off; 0.5 shares outliers of channels between activation and weights
    policy: str = "default"  # a shipped policy by name (calib/policy), or a TOML file
    cpu_weights: Literal["auto", "8bit", "7bit"] = "auto"  # auto: 7 bits where this CPU is x86 without VNNI

    def __post_init__(self) -> None:
        check(self, "quant", {"images": (1, 10**7), "percentile": (50, 100), "smooth": (0, 1)})

    @property
    def observer_option(self) -> float | None:
        """The value of the chosen observer's option; None for an observer without one."""
        option = None if self.observer == LEARNED else OBSERVERS[self.observer].option
        return None if option is None else float(getattr(self, option))

    @property
    def observer_label(self) -> str:
        """The observer as ranges.json and the graph's metadata record it: "mse", "percentile 99.99"."""
        return self.observer if self.observer_option is None else f"{self.observer} {self.observer_option:g}"
