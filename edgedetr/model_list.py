"""Lists the members of the family at their default configurations: paper, size, cost, settings.

To count its parameters and operations a model must be built and run on shapes, and 14 of them take many seconds. So the
list at 640 px is kept in model_list.json, which `make docs` writes and a test compares with the models.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edgedetr.artifacts import DELIVERED

RECORDED = Path(__file__).with_name("model_list.json")
RECORDED_PIXELS = 640
COCO_CLASSES = 80  # for which parameters are counted


@dataclass(frozen=True)
class MemberSummary:
    """One member of the family at its default configuration.

    gmacs    multiply-accumulates of one image of `pixels` x `pixels`, in 1e9: convolutions and matrix products
    levels   (height, width, stride) of each feature map that the decoder reads, at that size
    dialects ids of the graphs that it exports to (edgedetr/artifacts.py); the name is that of `models --json`
    """

    name: str
    paper: str
    parameters: int
    gmacs: float
    pixels: int
    levels: tuple[tuple[int, int, int], ...]
    queries: int
    activation: str
    dialects: tuple[str, ...] = tuple(DELIVERED)

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def to_record(self) -> dict[str, object]:
        """What model_list.json keeps: all but what is the same for every member."""
        return {key: value for key, value in asdict(self).items() if key not in ("pixels", "dialects")}


def summaries(pixels: int = RECORDED_PIXELS) -> list[MemberSummary]:
    """All members, the older papers first; at another size than the recorded one they are built and counted."""
    if pixels != RECORDED_PIXELS:
        from edgedetr.models import FAMILY

        return [summarize(name, pixels) for name in FAMILY]
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    return [
        MemberSummary(**{**one, "levels": tuple(tuple(level) for level in one["levels"])}, pixels=pixels)
        for one in recorded
    ]


def summarize(name: str, pixels: int = RECORDED_PIXELS) -> MemberSummary:
    """One member, counted for 80 classes without memory or downloads."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from edgedetr.models import FAMILY, build

    member = FAMILY[name]
    config = member.config()
    if hasattr(config, "backbone_weights"):
        config = replace(config, backbone_weights="random")
    with torch.device("meta"):  # shapes only: nothing is allocated, initialized or computed
        model = build(name, config, COCO_CLASSES).eval().requires_grad_(False)
        images = torch.empty(1, 3, pixels, pixels)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            memory = model.encode(images)
            model.decode(model.select(memory), memory, last_only=True)
    levels = tuple((h, w, stride) for (h, w), stride in zip(memory.shapes, memory.strides))
    return MemberSummary(
        name,
        member.paper,
        sum(p.numel() for p in model.parameters()),
        counter.get_total_flops() / 2e9,
        pixels,
        levels,
        config.queries,
        config.activation,
    )


def main() -> None:
    """Write model_list.json again."""
    from edgedetr.models import FAMILY

    found = [summarize(name).to_record() for name in FAMILY]
    RECORDED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
