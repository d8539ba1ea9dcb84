"""What a peer is: another quantizer that writes an INT8 graph from model.onnx, and the images that it calibrates on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedetr.bundle import InputContract
from edgedetr.data.images import decode
from edgedetr.runtime.preprocess import prepare


@dataclass(frozen=True)
class CalibrationBatches:
    """The images as the graph takes them, [1, 3, H, W] each, in order; they can be read any number of times."""

    paths: Sequence[Path]
    contract: InputContract

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.read, self.paths)

    def read(self, path: Path) -> np.ndarray:
        return prepare([decode(path)], self.contract)[0]


class CalibrationReader:
    """The images as ONNX Runtime's quantizer and ModelOpt ask for them, {"images": [1, 3, H, W]} one by one."""

    def __init__(self, batches: CalibrationBatches) -> None:
        self._batches = batches
        self.rewind()

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._left, None)
        return None if batch is None else {"images": batch}

    def get_first(self) -> dict[str, np.ndarray]:
        return {"images": next(iter(self._batches))}

    def rewind(self) -> None:
        self._left = iter(self._batches)


@dataclass(frozen=True)
class Peer:
    """One quantizer with one choice of settings.

    name       what `export --quantizer` takes
    package    the distribution whose version is recorded
    needs      modules that it imports
    settings   what it is given, by the names of its own options; what is not named keeps the quantizer's default
    run        (float graph, images, file to write, settings); imports the quantizer when it is called
    """

    name: str
    package: str
    needs: tuple[str, ...]
    settings: Mapping[str, Any]
    run: Callable[[Path, CalibrationBatches, Path, Mapping[str, Any]], None]
