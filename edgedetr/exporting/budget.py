"""The search of `edgedetr export --int8 --max-drop`, which comes between model.onnx and the INT8 files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgedetr.bundle import Bundle
from edgedetr.errors import NotWithinTolerance
from edgedetr.exporting.export import recipe_settings
from edgedetr.progress import Progress
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.search.search import IMAGES, search
from edgedetr.quantization.search.search_report import SearchReport


def search_within(
    bundle: Bundle,
    max_drop: float,
    *,
    target: str | None = None,
    images: int | None = None,
    calib: Path | None = None,
    quant: QuantConfig | None = None,
    cure_for: Sequence[str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> SearchReport:
    """The report of a search in a bundle that has model.onnx; quant: None = the settings of its recipe.

    Errors: NotWithinTolerance where no placement is proved to be within the budget, with what to do next; also those of
    `search`.
    """
    found = search(
        bundle,
        max_drop=max_drop,
        target=target or "onnxruntime",
        images=images or IMAGES,
        calib=calib,
        config=quant or recipe_settings(bundle)[1],
        cure_for=cure_for,
        threads=threads,
        progress=progress,
    )
    if found.outcome == "none":
        raise NotWithinTolerance(
            f"{bundle.path}: {found.sentence()}; give that budget (--max-drop {found.smallest_budget:g}), verify on "
            f"more images, or train for INT8: edgedetr train --qat {bundle.path}"
        )
    return found
