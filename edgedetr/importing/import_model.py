"""Import a detector made elsewhere: the one entry for ONNX files and for pretrained weights."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Union

from edgedetr.errors import UsageError
from edgedetr.importing.import_options import ImportOptions
from edgedetr.published.published_detectors import known, nearest
from edgedetr.runtime.arguments import as_path

if TYPE_CHECKING:
    from edgedetr.importing.onnx_model import ImportedOnnxModel
    from edgedetr.importing.weights import ImportedWeights

ImportedModel = Union["ImportedOnnxModel", "ImportedWeights"]


def import_model(source: str | Path, out: str | Path, options: ImportOptions | None = None) -> ImportedModel:
    """Write a bundle from a detector made elsewhere; a failed import leaves nothing behind.

    source   an ONNX file (its name ends in .onnx) of a DETR-like detector; or weights of a member of the family: a
             .safetensors or .pth file, a folder of transformers, a published detector by its name, or the id of a model
             on the Hugging Face hub
    out      the bundle to write
    return   what was found in the files. Both kinds have `bundle`, `describe()` for people and `to_json()`

    Errors: UsageError for options that do not fit the source; ExportError (ONNX), ModelError (weights), DataError and
    BundleError for files that cannot be imported.
    """
    options = options or ImportOptions()
    as_path(source, "source", "a path, or a name on the Hugging Face hub")
    name = os.fspath(source)
    is_onnx = name.endswith(".onnx")
    options.require_only_for(name, is_onnx=is_onnx)
    if is_onnx:
        from edgedetr.importing.onnx_model import import_onnx_model

        return import_onnx_model(name, out, options)
    row = None if Path(name).exists() else known(name)
    if options.model is None and row is not None:
        options = replace(options, model=row.member)
    if options.model is None:
        from edgedetr.models import FAMILY

        raise UsageError(f"weights need --model, one of {', '.join(FAMILY)}; an ONNX file ends in .onnx{nearest(name)}")
    from edgedetr.importing.weights import import_weights

    return import_weights(name, out, options)
