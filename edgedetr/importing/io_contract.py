"""What a detector's ONNX file made elsewhere takes: the image, and what some exporters ask for besides."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import ModelProto, TensorProto, ValueInfoProto

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.index import type_name


@dataclass(frozen=True)
class Inputs:
    """Names of the graph's inputs: the image, the size of the original image or "", a mask of its pixels or ""."""

    image: str
    sizes: str = ""
    mask: str = ""


def inputs(model: ModelProto) -> Inputs:
    """Which input is what; ExportError that lists them where that is not clear."""
    constants = {tensor.name for tensor in model.graph.initializer}
    for item in model.graph.input:
        if item.type.WhichOneof("value") != "tensor_type":
            raise ExportError(f"input {item.name!r} is no tensor; {_EXPECTED_INPUTS}")
    found: dict[str, list[str]] = {"image": [], "sizes": [], "mask": []}
    for item in model.graph.input:
        if item.name in constants:
            continue
        rank, kind = len(item.type.tensor_type.shape.dim), item.type.tensor_type.elem_type
        if rank == 4:
            found["image"].append(item.name)
            if kind != TensorProto.FLOAT:
                raise ExportError(
                    f"input {item.name!r} is {type_name(kind)}; expected float32 images: export the "
                    "float32 model, normalized outside the graph"
                )
        elif rank == 2 and (item.type.tensor_type.shape.dim[1].dim_value in (0, 2)):
            found["sizes"].append(item.name)
        elif rank == 3 and "mask" in item.name:
            found["mask"].append(item.name)
        else:
            raise ExportError(f"input {_signature(item)} is not known; {_EXPECTED_INPUTS}")
    if len(found["image"]) != 1 or len(found["sizes"]) > 1 or len(found["mask"]) > 1:
        listed = ", ".join(_signature(item) for item in model.graph.input if item.name not in constants)
        raise ExportError(f"the graph takes {listed or 'nothing'}; {_EXPECTED_INPUTS}")
    return Inputs(found["image"][0], *(next(iter(found[name]), "") for name in ("sizes", "mask")))


def size_of(model: ModelProto, image: str) -> tuple[int | None, int | None]:
    """Height and width that the file is fixed to; None where open. ExportError when it is no batch of RGB images."""
    item = next(item for item in model.graph.input if item.name == image)
    batch, channels, height, width = (
        size.dim_value if size.HasField("dim_value") and size.dim_value > 0 else None
        for size in item.type.tensor_type.shape.dim
    )
    if channels not in (None, 3):
        raise ExportError(
            f"input {_signature(item)} has {channels} channels at its second place; expected RGB "
            "images [B, 3, H, W]; export the model with channels first"
        )
    if batch not in (None, 1):
        raise ExportError(
            f"input {_signature(item)} takes {batch} images at a time; expected 1 or an open batch: "
            "export the model with batch size 1"
        )
    return height, width


def _signature(item: ValueInfoProto) -> str:
    shape = ", ".join(size.dim_param or str(size.dim_value or "?") for size in item.type.tensor_type.shape.dim)
    return f"{item.name} {type_name(item.type.tensor_type.elem_type)} [{shape}]"


_EXPECTED_INPUTS = (
    "expected images float32 [B, 3, H, W], and besides them at most orig_target_sizes [B, 2] and "
    "pixel_mask [B, H, W]; export the detector with these inputs alone"
)
